//! The strict parser for the location of an engine.
//!
//! The value that is checked against the allowlist and the value that is connected to are the same
//! parsed [`Target`], so no second parser exists whose result an attacker could make differ. A
//! client can give `host:port` only ([`Target::parse`]); a Unix socket can be named only by the
//! operator ([`Target::parse_local`]).

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::{Address, SocketPath, TargetError};

/// Longest host name in bytes (RFC 1035 section 2.3.4, in text form).
const HOST_BYTES_MAX: usize = 253;
/// Default port of a target reached over plain HTTP.
pub const HTTP_PORT: u16 = 80;
/// Default port of a target reached over TLS.
pub const HTTPS_PORT: u16 = 443;

/// Prefix that a target named by a client may have.
const HTTP_SCHEME: &[u8] = b"http://";
/// Prefix that marks a Unix socket in a target set by the operator.
const UNIX_SCHEME: &[u8] = b"unix:";

/// Location of an engine: a host and a port, or a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target(Place);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Address(Address),
    /// A host name, in lower case and checked against the host-name alphabet, and a port.
    Name(String, u16),
}

/// Every leg looks its engine up. `SipHash` costs most per write, and the derived implementation
/// has one for each discriminant.
impl Hash for Target {
    fn hash<H: Hasher>(&self, state: &mut H) {
        match &self.0 {
            Place::Address(Address::Tcp(SocketAddr::V4(address))) => {
                let ip = u64::from(address.ip().to_bits());
                state.write_u64((ip << 16) | u64::from(address.port()));
            }
            Place::Address(Address::Tcp(SocketAddr::V6(address))) => {
                state.write_u128(address.ip().to_bits());
                state.write_u16(address.port());
            }
            Place::Address(Address::Unix(path)) => path.hash(state),
            Place::Name(name, port) => {
                state.write(name.as_bytes());
                state.write_u16(*port);
            }
        }
    }
}

impl Target {
    /// Creates a target from a host and a port. An IPv6 address may have brackets.
    ///
    /// # Errors
    /// Returns an error if the host is not an IP address or a well-formed host name.
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

    /// Parses a target set by the operator: anything that [`Target::parse`] accepts, or `unix:`
    /// followed by a path or `@name` ([`SocketPath::parse`]).
    ///
    /// # Errors
    /// Returns the reason if `text` is neither.
    pub fn parse_local(text: &[u8]) -> Result<Self, TargetError> {
        let Some(path) = text.strip_prefix(UNIX_SCHEME) else {
            return Self::parse(text);
        };
        let path = std::str::from_utf8(path).map_err(|_| TargetError::SocketMalformed)?;
        SocketPath::parse(path).map(Self::from)
    }

    /// Parses a target named by a client, `host[:port]` or `http://host[:port][/]`, where the host
    /// is a name, an IPv4 address or an IPv6 address in brackets. The scheme is compared without
    /// case (RFC 3986 3.1).
    ///
    /// The port is a decimal number from 1 to 65535 and defaults to 80. The result is never a Unix
    /// socket, because a client must not reach arbitrary services of this machine.
    ///
    /// # Errors
    /// Returns an error for anything else: user information, a path, white space, percent signs,
    /// another scheme, a port that is not a number.
    pub fn parse(text: &[u8]) -> Result<Self, TargetError> {
        Self::parse_or_port(text, HTTP_PORT)
    }

    /// Like [`Target::parse`], with `port_default` instead of 80 for a target without a port.
    ///
    /// # Errors
    /// The same as for [`Target::parse`].
    pub fn parse_or_port(text: &[u8], port_default: u16) -> Result<Self, TargetError> {
        if text.iter().any(|byte| *byte <= b' ' || *byte == 0x7f) {
            return Err(TargetError::Blank);
        }
        let text = match text.split_at_checked(HTTP_SCHEME.len()) {
            // The root path is that of a URL without a path (RFC 9110 4.2.3).
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case(HTTP_SCHEME) => {
                rest.strip_suffix(b"/").unwrap_or(rest)
            }
            Some(_) | None => text,
        };
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

    /// Like [`Target::parse`], but requires a port.
    ///
    /// # Errors
    /// The same as for [`Target::parse`], and `PortMalformed` if the port is missing.
    pub fn parse_with_port(text: &[u8]) -> Result<Self, TargetError> {
        let target = Self::parse_or_port(text, HTTP_PORT)?;
        // With an explicit port, the result does not depend on the default.
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

    /// Returns the address, or `None` if a name must be resolved first.
    #[must_use]
    pub const fn address(&self) -> Option<&Address> {
        match &self.0 {
            Place::Address(address) => Some(address),
            Place::Name(..) => None,
        }
    }

    /// Returns the name to resolve and the port, or `None` if the target is an address.
    #[must_use]
    pub fn name(&self) -> Option<(&str, u16)> {
        match &self.0 {
            Place::Address(_) => None,
            Place::Name(name, port) => Some((name, *port)),
        }
    }

    /// Returns the host without the port, an IPv6 address without brackets. Empty for a Unix
    /// socket.
    #[must_use]
    pub fn host(&self) -> String {
        match &self.0 {
            Place::Address(address) => address
                .tcp()
                .map(|at| at.ip().to_string())
                .unwrap_or_default(),
            Place::Name(name, _) => name.clone(),
        }
    }

    /// Returns the port, or `None` for a Unix socket.
    #[must_use]
    pub const fn port(&self) -> Option<u16> {
        match &self.0 {
            Place::Address(Address::Tcp(address)) => Some(address.port()),
            Place::Address(Address::Unix(_)) => None,
            Place::Name(_, port) => Some(*port),
        }
    }

    /// Returns the target with another port. A Unix socket is returned unchanged.
    #[must_use]
    pub fn with_port(&self, port: u16) -> Self {
        match &self.0 {
            Place::Address(Address::Tcp(address)) => Self::at(address.ip(), port),
            Place::Address(Address::Unix(_)) => self.clone(),
            Place::Name(name, _) => Self(Place::Name(name.clone(), port)),
        }
    }

    /// Returns the `Host` value for requests that the proxy itself creates. For a Unix socket it is
    /// `localhost`, as in curl.
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

/// Parses a port from 1 to 65535. Accepts digits only; the standard parser would accept a plus
/// sign.
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

/// Parses a host name of letters, digits, `-`, `_` and `.`. A name whose last label is all digits
/// or starts with `0x` is refused, because some resolvers read it as an IPv4 address (`127.1`,
/// `0x7f.1`).
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
            ("http://10.4.0.7:8000/", "10.4.0.7:8000"),
            ("HTTP://10.4.0.7:8000", "10.4.0.7:8000"),
            ("Http://[fd00::7]/", "[fd00::7]:80"),
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
        let cases: [(&str, TargetError); 36] = [
            ("", E::HostMissing),
            (":8000", E::HostMissing),
            ("http://", E::HostMissing),
            ("https://host:1", E::Scheme),
            ("http://http://host:1", E::Scheme),
            ("HTTPS://host:1", E::Scheme),
            ("http://host:1/path", E::NotAlone),
            ("http://host:1//", E::NotAlone),
            ("http://host:1/?x", E::NotAlone),
            ("http:///", E::HostMissing),
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
