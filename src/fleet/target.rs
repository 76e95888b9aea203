//! The one strict reading of where an engine is.
//!
//! The value a routing header is checked by and the value that is dialled are the same parsed
//! value (`reliability.md` 4.5): there is no second reading that an attacker could make differ.
//! What comes from clients is `host:port` ([`Target::parse`]); a socket of this machine can only
//! be named by its operator ([`Target::parse_local`]).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Address, SocketPath};

/// Longest host name (RFC 1035 2.3.4, in text form).
const HOST_BYTES_MAX: usize = 253;
/// Port of plain HTTP where a target names none.
pub const HTTP_PORT: u16 = 80;
/// The same with TLS.
pub const HTTPS_PORT: u16 = 443;

/// What an operator writes before the path of a Unix socket.
const UNIX_SCHEME: &[u8] = b"unix:";

/// Where to connect: a host and a port or a Unix socket, nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target(Place);

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Place {
    Address(Address),
    /// Lower case, checked against the host-name alphabet.
    Name(String, u16),
}

/// Why a text is not a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetError {
    /// Nothing before the port, or nothing at all.
    HostMissing,
    /// The host is longer than any name can be.
    HostTooLong,
    /// A byte that neither a host name nor an address has.
    HostMalformed,
    /// A bracket that is not closed, or no IPv6 address inside.
    AddressMalformed,
    /// The port is not a number from 1 to 65535.
    PortMalformed,
    /// User information (`user@host`).
    UserInfo,
    /// A scheme other than one leading `http://`.
    Scheme,
    /// A path, query or fragment behind the port.
    NotAlone,
    /// White space or a control byte.
    Blank,
    /// A Unix socket without a path, or with an abstract name that is empty.
    SocketMissing,
    /// The path of a Unix socket does not begin with `/` or `@`.
    SocketRelative,
    /// The path of a Unix socket has an empty, `.` or `..` part.
    SocketParts,
    /// The path of a Unix socket is longer than the kernel takes.
    SocketTooLong,
    /// The path of a Unix socket is no UTF-8.
    SocketMalformed,
}

impl TargetError {
    /// What is wrong, in words fit for a client: no address, no input repeated.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::HostMissing => "the target has no host",
            Self::HostTooLong => "the target's host name is too long",
            Self::HostMalformed => "the target's host has a byte that host names do not have",
            Self::AddressMalformed => "the target's address in brackets is not an IPv6 address",
            Self::PortMalformed => "the target's port is not a number from 1 to 65535",
            Self::UserInfo => "the target must not carry user information",
            Self::Scheme => "the target's scheme must be http or absent",
            Self::NotAlone => "the target must be host:port without a path",
            Self::Blank => "the target has a blank or a control byte inside",
            Self::SocketMissing => "the socket has no path; give one such as /run/vllm.sock",
            Self::SocketRelative => "the socket's path must begin with / (or @, if it is abstract)",
            Self::SocketParts => {
                "the socket's path must name a file, without empty, `.` and `..` parts"
            }
            Self::SocketTooLong => {
                "the socket's path is longer than the 107 bytes a socket can have"
            }
            Self::SocketMalformed => "the socket's path is not UTF-8",
        }
    }
}

impl Target {
    /// A target from parts that are already known to be good; the host is checked all the same.
    ///
    /// # Errors
    /// As [`Target::parse`], for the host alone.
    pub fn new(host: &str, port: u16) -> Result<Self, TargetError> {
        let bare = host
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
            .unwrap_or(host);
        match bare.parse::<IpAddr>() {
            Ok(address) => Ok(Self::at(address, port)),
            Err(_) => Self::named(bare.as_bytes(), port),
        }
    }

    /// Parses what an operator may write: all that [`Target::parse`] takes, or `unix:` and a path
    /// or `@name` ([`SocketPath::parse`]).
    ///
    /// # Errors
    /// Anything else.
    pub fn parse_local(text: &[u8]) -> Result<Self, TargetError> {
        let Some(path) = text.strip_prefix(UNIX_SCHEME) else {
            return Self::parse(text);
        };
        let path = std::str::from_utf8(path).map_err(|_| TargetError::SocketMalformed)?;
        SocketPath::parse(path).map(Self::from)
    }

    /// Parses `[http://]host[:port]`: a name, an IPv4 address or an IPv6 address in brackets.
    /// The port is decimal, 1 to 65535, 80 when absent. The reading for what clients say: never a
    /// Unix socket, behind which may be anything of this machine.
    ///
    /// # Errors
    /// Anything else: user information, a path (even `/`), blanks, percent signs, another scheme,
    /// a port that is not a number.
    pub fn parse(text: &[u8]) -> Result<Self, TargetError> {
        Self::parse_or_port(text, HTTP_PORT)
    }

    /// As [`Target::parse`], with another port for a target that names none.
    ///
    /// # Errors
    /// As [`Target::parse`].
    pub fn parse_or_port(text: &[u8], port_default: u16) -> Result<Self, TargetError> {
        if text.iter().any(|byte| *byte <= b' ' || *byte == 0x7f) {
            return Err(TargetError::Blank);
        }
        let text = text.strip_prefix(b"http://").unwrap_or(text);
        if text.contains(&b'@') {
            return Err(TargetError::UserInfo);
        }
        if text.windows(3).any(|window| window == b"://") {
            return Err(TargetError::Scheme);
        }
        if text
            .iter()
            .any(|byte| matches!(byte, b'/' | b'?' | b'#' | b'\\'))
        {
            return Err(TargetError::NotAlone);
        }
        if let Some(rest) = text.strip_prefix(b"[") {
            return Self::parse_bracketed(rest, port_default);
        }
        let mut parts = text.splitn(2, |byte| *byte == b':');
        let host = parts.next().unwrap_or_default();
        let port = parts.next().map_or(Ok(port_default), parse_port)?;
        if host.is_empty() {
            return Err(TargetError::HostMissing);
        }
        let address = std::str::from_utf8(host)
            .ok()
            .and_then(|host| host.parse::<Ipv4Addr>().ok());
        match address {
            Some(address) => Ok(Self::at(IpAddr::V4(address), port)),
            None => Self::named(host, port),
        }
    }

    /// The same with the port required.
    ///
    /// # Errors
    /// As [`Target::parse`], and for an absent port.
    pub fn parse_with_port(text: &[u8]) -> Result<Self, TargetError> {
        let target = Self::parse_or_port(text, HTTP_PORT)?;
        // A port that is written does not depend on the default.
        if Self::parse_or_port(text, HTTPS_PORT)? == target {
            Ok(target)
        } else {
            Err(TargetError::PortMalformed)
        }
    }

    fn parse_bracketed(rest: &[u8], port_default: u16) -> Result<Self, TargetError> {
        let close = rest.iter().position(|byte| *byte == b']');
        let Some(close) = close else {
            return Err(TargetError::AddressMalformed);
        };
        let address = std::str::from_utf8(&rest[..close])
            .ok()
            .and_then(|text| text.parse::<Ipv6Addr>().ok())
            .ok_or(TargetError::AddressMalformed)?;
        let port = match rest[close + 1..].split_first() {
            None => port_default,
            Some((b':', port)) => parse_port(port)?,
            Some(_) => return Err(TargetError::AddressMalformed),
        };
        Ok(Self::at(IpAddr::V6(address), port))
    }

    fn at(ip: IpAddr, port: u16) -> Self {
        let address = SocketAddr::new(ip.to_canonical(), port);
        Self(Place::Address(Address::Tcp(address)))
    }

    fn named(host: &[u8], port: u16) -> Result<Self, TargetError> {
        parse_name(host).map(|name| Self(Place::Name(name, port)))
    }

    /// The address, where no name has to be resolved first.
    #[must_use]
    pub const fn address(&self) -> Option<&Address> {
        match &self.0 {
            Place::Address(address) => Some(address),
            Place::Name(..) => None,
        }
    }

    /// The name to resolve and the port, where there is no address yet.
    #[must_use]
    pub fn name(&self) -> Option<(&str, u16)> {
        match &self.0 {
            Place::Address(_) => None,
            Place::Name(name, port) => Some((name, *port)),
        }
    }

    /// The host alone, an IPv6 address without brackets; a Unix socket has none.
    #[must_use]
    pub fn host(&self) -> String {
        match &self.0 {
            Place::Address(address) => address.ip().map(|ip| ip.to_string()).unwrap_or_default(),
            Place::Name(name, _) => name.clone(),
        }
    }

    /// The port; a Unix socket has none.
    #[must_use]
    pub const fn port(&self) -> Option<u16> {
        match &self.0 {
            Place::Address(Address::Tcp(address)) => Some(address.port()),
            Place::Address(Address::Unix(_)) => None,
            Place::Name(_, port) => Some(*port),
        }
    }

    /// The same host on another port. A Unix socket stays what it is.
    #[must_use]
    pub fn with_port(&self, port: u16) -> Self {
        match &self.0 {
            Place::Address(Address::Tcp(address)) => Self::at(address.ip(), port),
            Place::Address(Address::Unix(_)) => self.clone(),
            Place::Name(name, _) => Self(Place::Name(name.clone(), port)),
        }
    }

    /// What a request of our own says as `Host`. A Unix socket has no host: `localhost`, as curl
    /// has it.
    #[must_use]
    pub fn authority(&self) -> String {
        match &self.0 {
            Place::Address(Address::Unix(_)) => "localhost".to_owned(),
            Place::Address(Address::Tcp(_)) | Place::Name(..) => self.to_string(),
        }
    }
}

impl From<SocketPath> for Target {
    fn from(path: SocketPath) -> Self {
        Self(Place::Address(Address::Unix(path)))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Place::Address(address) => address.fmt(f),
            Place::Name(name, port) => write!(f, "{name}:{port}"),
        }
    }
}

/// Digits only: the standard parser would take a plus sign.
pub(super) fn parse_port(text: &[u8]) -> Result<u16, TargetError> {
    let mut port: u32 = 0;
    if text.is_empty() || text.len() > 5 {
        return Err(TargetError::PortMalformed);
    }
    for byte in text {
        if !byte.is_ascii_digit() {
            return Err(TargetError::PortMalformed);
        }
        port = port * 10 + u32::from(byte - b'0');
    }
    match u16::try_from(port) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(TargetError::PortMalformed),
    }
}

/// A host name: letters, digits, `-`, `_` and `.`. A name whose last label is all digits would be
/// read as an odd IPv4 form (`127.1`, `0x7f.1`) by some resolvers, and is refused.
fn parse_name(host: &[u8]) -> Result<String, TargetError> {
    if host.is_empty() {
        return Err(TargetError::HostMissing);
    }
    if host.len() > HOST_BYTES_MAX {
        return Err(TargetError::HostTooLong);
    }
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    if !host.iter().all(allowed) || host.starts_with(b".") || host.starts_with(b"-") {
        return Err(TargetError::HostMalformed);
    }
    let trimmed = host.strip_suffix(b".").unwrap_or(host);
    let mut labels = trimmed.split(|byte| *byte == b'.');
    let empty_label = labels.clone().any(<[u8]>::is_empty);
    let last = labels.next_back().unwrap_or_default();
    let odd_address = last.iter().all(u8::is_ascii_digit)
        || last
            .get(..2)
            .is_some_and(|start| start.eq_ignore_ascii_case(b"0x"));
    if empty_label || odd_address {
        return Err(TargetError::HostMalformed);
    }
    Ok(String::from_utf8_lossy(host).to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_one_host_and_port() {
        let cases = [
            ("10.4.0.7:8000", "10.4.0.7:8000"),
            ("http://10.4.0.7:8000", "10.4.0.7:8000"),
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("localhost:65535", "localhost:65535"),
            (
                "Prefill-0.pre_fill.svc.cluster.local:8000",
                "prefill-0.pre_fill.svc.cluster.local:8000",
            ),
            ("host", "host:80"),
            ("[::1]:8000", "[::1]:8000"),
            ("[fd00::7]", "[fd00::7]:80"),
            ("http://[fd00::7]:9", "[fd00::7]:9"),
            ("[::ffff:10.0.0.1]:8000", "10.0.0.1:8000"),
            ("host.:8000", "host.:8000"),
        ];
        for (text, want) in cases {
            let target = Target::parse(text.as_bytes()).unwrap_or_else(|e| panic!("{text}: {e:?}"));
            assert_eq!(target.to_string(), want, "{text}");
        }
    }

    #[test]
    fn sockets_are_for_operators_only() {
        for text in ["unix:/run/vllm.sock", "unix:@engine"] {
            let target = Target::parse_local(text.as_bytes()).unwrap();
            assert_eq!(target.to_string(), text);
            assert_eq!(target.authority(), "localhost");
            assert!(target.name().is_none());
        }
        let tcp = Target::parse_local(b"host:1").unwrap();
        assert_eq!(tcp, Target::parse(b"host:1").unwrap());
        assert_eq!(tcp.authority(), "host:1");
        for text in [
            "unix:/run/vllm.sock",
            "unix:@engine",
            "unix:///run/vllm.sock",
            "http://unix:/run/vllm.sock",
            "http+unix://run",
            "unix:run",
            "unix:",
            "UNIX:/x",
            "/run/vllm.sock",
            "@engine",
        ] {
            assert!(Target::parse(text.as_bytes()).is_err(), "{text}");
        }
        for (text, want) in [
            ("unix:", TargetError::SocketMissing),
            ("unix:run", TargetError::SocketRelative),
            ("unix://run/x", TargetError::SocketParts),
            ("UNIX:/x", TargetError::NotAlone),
            (" unix:/x", TargetError::Blank),
        ] {
            assert_eq!(Target::parse_local(text.as_bytes()), Err(want), "{text}");
        }
        let odd = Target::parse_local(b"unix:/\xff");
        assert_eq!(odd, Err(TargetError::SocketMalformed));
    }

    #[test]
    fn refuses_everything_else() {
        use TargetError as E;
        let cases: [(&str, TargetError); 32] = [
            ("", E::HostMissing),
            (":8000", E::HostMissing),
            ("http://", E::HostMissing),
            ("https://host:1", E::Scheme),
            ("http://http://host:1", E::Scheme),
            ("HTTP://host:1", E::Scheme),
            ("user@host:1", E::UserInfo),
            ("http://user:pw@host:1", E::UserInfo),
            ("host:1/", E::NotAlone),
            ("host:1/path", E::NotAlone),
            ("host:1?x", E::NotAlone),
            ("host:1#x", E::NotAlone),
            ("host\\x:1", E::NotAlone),
            ("ho st:1", E::Blank),
            ("host:1 ", E::Blank),
            ("host\t:1", E::Blank),
            ("host\u{7f}:1", E::Blank),
            ("host:", E::PortMalformed),
            ("host:0", E::PortMalformed),
            ("host:65536", E::PortMalformed),
            ("host:+80", E::PortMalformed),
            ("host:8o", E::PortMalformed),
            ("host:1:2", E::PortMalformed),
            ("::1:8000", E::PortMalformed),
            ("[::1:8000", E::AddressMalformed),
            ("[host]:8000", E::AddressMalformed),
            ("[::1]8000", E::AddressMalformed),
            ("ho%73t:1", E::HostMalformed),
            ("127.1:80", E::HostMalformed),
            ("0x7f.0x1:80", E::HostMalformed),
            ("2130706433:80", E::HostMalformed),
            ("a..b:80", E::HostMalformed),
        ];
        for (text, want) in cases {
            assert_eq!(Target::parse(text.as_bytes()), Err(want), "{text}");
        }
        let long = format!("{}:80", "a".repeat(254));
        assert_eq!(Target::parse(long.as_bytes()), Err(E::HostTooLong));
        assert_eq!(Target::parse("hôst:80".as_bytes()), Err(E::HostMalformed));
    }
}
