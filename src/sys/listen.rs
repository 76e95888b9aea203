//! Listening sockets.
//!
//! Every shard has its own socket on the same port (`SO_REUSEPORT`). This option would also let a
//! second ringside process share the port silently and receive half of the connections. So `probe`
//! binds the port once without the option, before the first shard does.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketFlags, SocketType, bind, ipproto, listen, socket_with, sockopt,
};

use crate::config::ListenAddress;
use crate::limits::{KEEPALIVE_IDLE_SECS, KEEPALIVE_INTERVAL_SECS, KEEPALIVE_PROBES_MAX};

/// Maximum number of connections in the accept queue of one listening socket. The kernel caps it at
/// `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Reason why a listening socket could not be created.
#[derive(Debug)]
pub enum BindError {
    /// Another process uses the port.
    Busy(ListenAddress),
    /// This process lacks the permission to listen on the port.
    Permission(ListenAddress),
    /// The address does not belong to this host.
    NoSuchAddress(ListenAddress),
    /// Any other error.
    Failed(ListenAddress, io::Error),
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy(at) => write!(
                f,
                "port {} is in use ({at}); stop the process that uses it (`ss -ltnp 'sport = :{}'` \
                 shows it) or choose another port",
                at.port(),
                at.port()
            ),
            Self::Permission(at) => write!(
                f,
                "no permission to listen on port {} ({at}); choose port 1024 or higher, or grant \
                 CAP_NET_BIND_SERVICE",
                at.port()
            ),
            Self::NoSuchAddress(at) => write!(
                f,
                "{at} is not an address of this host; choose one that `ip address` lists, or leave \
                 the address out to listen on all of them"
            ),
            Self::Failed(at, error) => write!(f, "cannot listen on {at}: {error}"),
        }
    }
}

impl std::error::Error for BindError {}

impl BindError {
    fn new(at: ListenAddress, errno: Errno) -> Self {
        match errno {
            Errno::ADDRINUSE => Self::Busy(at),
            Errno::ACCESS | Errno::PERM => Self::Permission(at),
            Errno::ADDRNOTAVAIL => Self::NoSuchAddress(at),
            errno => Self::Failed(at, errno.into()),
        }
    }
}

/// Checks that no other process uses the port, by listening on it once without `SO_REUSEPORT`. Call
/// it once per address, before any `bind_shared`.
///
/// # Errors
/// The reason why the port cannot be used.
pub fn probe(at: ListenAddress) -> Result<(), BindError> {
    let socket = open(at, Sharing::Alone)?;
    // Listen as well: a socket that is only bound does not conflict with another one, so two
    // processes that start at the same time could both pass the probe.
    listen(&socket, 1).map_err(|errno| BindError::new(at, errno))
}

/// Checks that a process can listen at an address, without listening.
///
/// # Errors
/// The reason why it cannot. [`BindError::Busy`] may be due to a process that is to be replaced.
pub fn check_address(at: ListenAddress) -> Result<(), BindError> {
    open(at, Sharing::Alone).map(drop)
}

/// Returns a listening socket that shares its port with the sockets of other shards.
///
/// # Errors
/// The reason why the socket could not be created.
pub fn bind_shared(at: ListenAddress) -> Result<TcpListener, BindError> {
    let socket = open(at, Sharing::Shards)?;
    listen(&socket, BACKLOG).map_err(|errno| BindError::new(at, errno))?;
    Ok(TcpListener::from(socket))
}

/// Returns a listening socket that does not share its port, for the admin server.
///
/// # Errors
/// The reason why the socket could not be created.
pub fn bind_alone(at: ListenAddress) -> Result<TcpListener, BindError> {
    let socket = open(at, Sharing::Alone)?;
    listen(&socket, BACKLOG).map_err(|errno| BindError::new(at, errno))?;
    Ok(TcpListener::from(socket))
}

/// Returns whether a process of this host listens on `port` of all addresses, of IPv4 or of the
/// version of `ip`. If it does, no other address can be bound, not even one that no interface has.
#[must_use]
pub fn has_wildcard_listener(ip: IpAddr, port: u16) -> bool {
    // TEST-NET-1 (RFC 5737) and the documentation prefix (RFC 3849): no process listens on these.
    let nowhere = match ip {
        IpAddr::V4(_) => IpAddr::from([192, 0, 2, 1]),
        IpAddr::V6(_) => IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]),
    };
    bind_nowhere(SocketAddr::from((nowhere, port))) == Err(Errno::ADDRINUSE)
}

/// Binds a socket to an address that no interface needs to have, and closes it again.
fn bind_nowhere(address: SocketAddr) -> Result<(), Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    // Without it, an engine could not bind its port at the same moment. A listener is detected
    // all the same.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    match address {
        SocketAddr::V4(_) => sockopt::set_ip_freebind(&socket, true)?,
        SocketAddr::V6(_) => sockopt::set_ipv6_freebind(&socket, true)?,
    }
    bind(&socket, &address)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sharing {
    Alone,
    Shards,
}

fn open(at: ListenAddress, sharing: Sharing) -> Result<OwnedFd, BindError> {
    let opened = match at {
        ListenAddress::Address(address) => socket_at(address, sharing),
        ListenAddress::DualStack(port) => {
            let all = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
            match socket_at(all, sharing) {
                // The kernel has no IPv6, or none is configured.
                Err(Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL) => {
                    socket_at(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)), sharing)
                }
                opened => opened,
            }
        }
    };
    opened.map_err(|errno| BindError::new(at, errno))
}

/// Returns a bound, non-blocking socket that does not listen yet. A socket on `[::]` also accepts
/// IPv4.
fn socket_at(address: SocketAddr, sharing: Sharing) -> Result<OwnedFd, Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let socket = socket_with(
        family,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        Some(ipproto::TCP),
    )?;
    if let SocketAddr::V6(address) = address {
        sockopt::set_ipv6_v6only(&socket, !address.ip().is_unspecified())?;
    }
    // A restart must not have to wait for old connections in TIME_WAIT.
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if sharing == Sharing::Shards {
        sockopt::set_socket_reuseport(&socket, true)?;
        // Accepted connections inherit TCP_NODELAY and the keep-alive settings. Without TCP_NODELAY
        // a token could wait for the acknowledgement of the previous one.
        sockopt::set_tcp_nodelay(&socket, true)?;
        set_keepalive(&socket)?;
    }
    bind(&socket, &address)?;
    Ok(socket)
}

/// Enables TCP keep-alive, so that the kernel detects a peer that has vanished without closing the
/// connection.
///
/// # Errors
/// The error of the socket option that the kernel refused.
pub fn set_keepalive(socket: &OwnedFd) -> Result<(), Errno> {
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, Duration::from_secs(KEEPALIVE_IDLE_SECS))?;
    sockopt::set_tcp_keepintvl(socket, Duration::from_secs(KEEPALIVE_INTERVAL_SECS))?;
    sockopt::set_tcp_keepcnt(socket, KEEPALIVE_PROBES_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;
    use std::net::TcpStream;

    fn free_port() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    }

    #[test]
    fn accepted_connections_inherit_the_options_of_the_listener() {
        let port = free_port();
        let at = ListenAddress::Address(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let listener = bind_shared(at).unwrap();
        listener.set_nonblocking(false).unwrap();
        let client = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert!(accepted.nodelay().unwrap());
        assert!(sockopt::socket_keepalive(&accepted).unwrap());
        drop(client);
    }

    #[test]
    fn shards_share_a_port() {
        let at = ListenAddress::Address(SocketAddr::from(([127, 0, 0, 1], free_port())));
        probe(at).unwrap();
        let first = bind_shared(at).unwrap();
        let second = bind_shared(at).unwrap();
        assert_eq!(first.local_addr().unwrap(), second.local_addr().unwrap());
        assert_eq!(first.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
    }

    #[test]
    fn a_port_used_by_another_ringside_is_detected() {
        let at = ListenAddress::DualStack(free_port());
        let _other = bind_shared(at).unwrap();
        let error = probe(at).unwrap_err();
        assert!(matches!(error, BindError::Busy(_)), "{error}");
        assert!(
            error
                .to_string()
                .starts_with(&format!("port {} is in use", at.port()))
        );
        assert!(matches!(bind_alone(at), Err(BindError::Busy(_))));
    }

    #[test]
    fn dual_stack_accepts_ipv4() {
        let at = ListenAddress::DualStack(free_port());
        let _listener = bind_shared(at).unwrap();
        TcpStream::connect((Ipv4Addr::LOCALHOST, at.port())).unwrap();
    }

    #[test]
    fn an_address_of_another_host_is_reported() {
        // TEST-NET-1 is never assigned to this host.
        let at = ListenAddress::Address(SocketAddr::from(([192, 0, 2, 1], free_port())));
        assert!(matches!(probe(at), Err(BindError::NoSuchAddress(_))));
    }

    #[test]
    fn a_listener_on_all_addresses_is_detected() {
        let wildcard = |at: IpAddr, of: IpAddr| {
            let port = free_port();
            let at = ListenAddress::Address(SocketAddr::from((at, port)));
            let _listener = bind_shared(at).unwrap();
            // Neither a client nor an accepted connection counts as a listener.
            let _client = TcpStream::connect((of, port));
            has_wildcard_listener(of, port)
        };
        let (v4, v6) = (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into());
        assert!(wildcard(Ipv4Addr::UNSPECIFIED.into(), v4));
        assert!(wildcard(Ipv6Addr::UNSPECIFIED.into(), v6));
        assert!(wildcard(Ipv6Addr::UNSPECIFIED.into(), v4), "dual-stack");
        assert!(!wildcard(v4, v4));
        assert!(!wildcard(v6, v6));
        assert!(!has_wildcard_listener(v4, free_port()));
    }

    #[test]
    fn errors_contain_a_remedy() {
        let at = ListenAddress::DualStack(80);
        for (errno, want) in [
            (Errno::ADDRINUSE, "ss -ltnp 'sport = :80'"),
            (Errno::ACCESS, "CAP_NET_BIND_SERVICE"),
            (Errno::ADDRNOTAVAIL, "not an address of this host"),
            (Errno::NOBUFS, "cannot listen on [::]:80"),
        ] {
            assert!(
                BindError::new(at, errno).to_string().contains(want),
                "{errno:?}"
            );
        }
    }
}
