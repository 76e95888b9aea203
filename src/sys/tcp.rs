//! The kernel's view of a TCP connection (`TCP_INFO`, tcp(7)).

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

/// States in which a peer can vanish (`include/net/tcp_states.h`).
const ESTABLISHED: u8 = 1;
const FIN_WAIT1: u8 = 4;
const CLOSE_WAIT: u8 = 8;

/// For how long a peer must have acknowledged nothing, although it was asked to, to count as
/// vanished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Silence {
    /// Retransmissions or probes without an acknowledgement, each twice as long after the one
    /// before.
    pub tries: u8,
    /// Milliseconds since the last acknowledgement.
    pub ms: u32,
}

/// The acknowledgements of a peer, at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Acknowledged {
    state: u8,
    /// Times that the oldest unacknowledged bytes have been retransmitted in vain.
    retransmits: u8,
    /// Probes of a closed receive window, or of an idle connection, since the last acknowledgement.
    probes: u8,
    /// Milliseconds since the last acknowledgement.
    ms: u32,
}

impl Acknowledged {
    /// Reads it. `None` if the descriptor is not a TCP socket.
    fn read(socket: BorrowedFd<'_>) -> Option<Self> {
        let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
        let mut len = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).ok()?;
        #[expect(unsafe_code, reason = "no safe wrapper of this option")]
        // SAFETY: `info` has room for `len` bytes, of which the kernel writes at most as many.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                info.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        if result != 0 {
            return None;
        }
        #[expect(unsafe_code, reason = "no safe wrapper of this option")]
        // SAFETY: all fields are integers, for which zeros and what the kernel writes are valid.
        let info = unsafe { info.assume_init() };
        Some(Self {
            state: info.tcpi_state,
            retransmits: info.tcpi_retransmits,
            probes: info.tcpi_probes,
            ms: info.tcpi_last_ack_recv,
        })
    }

    fn has_vanished(self, least: Silence) -> bool {
        matches!(self.state, ESTABLISHED | FIN_WAIT1 | CLOSE_WAIT)
            && self.retransmits.max(self.probes) >= least.tries
            && self.ms >= least.ms
    }
}

/// Returns whether the peer of a TCP connection has vanished: it has not acknowledged what was sent
/// to it for at least `least`. A peer that reads nothing has not: it acknowledges the probes of its
/// closed receive window. `false` for any other socket.
///
/// The kernel notices that by itself only after 15 minutes (`net.ipv4.tcp_retries2`).
/// `TCP_USER_TIMEOUT` would make it do so earlier, but also ends connections to peers that read
/// nothing for that long.
#[must_use]
pub fn has_vanished(socket: BorrowedFd<'_>, least: Silence) -> bool {
    Acknowledged::read(socket).is_some_and(|peer| peer.has_vanished(least))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    #[test]
    fn only_a_peer_that_acknowledges_nothing_has_vanished() {
        let least = Silence {
            tries: 8,
            ms: 45_000,
        };
        for (state, retransmits, probes, ms, want) in [
            (ESTABLISHED, 8, 0, 51_000, true),
            (ESTABLISHED, 0, 8, 51_000, true),
            (FIN_WAIT1, 9, 0, 102_000, true),
            (CLOSE_WAIT, 9, 0, 102_000, true),
            // An idle connection.
            (ESTABLISHED, 0, 0, 3_600_000, false),
            // A request after a long pause, a few lost packets.
            (ESTABLISHED, 3, 0, 3_600_000, false),
            // A closed window whose probes are acknowledged.
            (ESTABLISHED, 0, 1, 119_000, false),
            // A connection that loses most packets.
            (ESTABLISHED, 8, 0, 44_999, false),
            // A connect, a listening socket, a closed connection.
            (2, 9, 0, 102_000, false),
            (10, 9, 0, 102_000, false),
            (7, 9, 0, 102_000, false),
        ] {
            let peer = Acknowledged {
                state,
                retransmits,
                probes,
                ms,
            };
            assert_eq!(peer.has_vanished(least), want, "{peer:?}");
        }
    }

    #[test]
    fn open_sockets_have_peers() {
        let least = Silence { tries: 1, ms: 0 };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let read = Acknowledged::read(stream.as_fd()).unwrap();
        assert_eq!((read.state, read.retransmits), (ESTABLISHED, 0));
        assert!(!has_vanished(stream.as_fd(), least));
        assert!(!has_vanished(listener.as_fd(), least));
        let (unix, _other) = UnixStream::pair().unwrap();
        assert_eq!(Acknowledged::read(unix.as_fd()), None);
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(!has_vanished(file.as_fd(), least));
    }
}
