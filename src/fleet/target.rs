//! The one strict reading of `host:port`.
//!
//! The value a routing header is checked by and the value that is dialled are the same parsed
//! value (`reliability.md` 4.5): there is no second reading that an attacker could make differ.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Longest host name (RFC 1035 2.3.4, in text form).
const HOST_BYTES_MAX: usize = 253;
/// Port of plain HTTP where a target names none.
const PORT_DEFAULT: u16 = 80;

/// Where to connect: a host and a port, nothing else.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    host: Host,
    port: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Host {
    Address(IpAddr),
    /// Lower case, checked against the host-name alphabet.
    Name(String),
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
        let host = match bare.parse::<IpAddr>() {
            Ok(address) => Host::Address(address.to_canonical()),
            Err(_) => parse_name(bare.as_bytes())?,
        };
        Ok(Self { host, port })
    }

    /// Parses `[http://]host[:port]`: a name, an IPv4 address or an IPv6 address in brackets.
    /// The port is decimal, 1 to 65535, 80 when absent.
    ///
    /// # Errors
    /// Anything else: user information, a path (even `/`), blanks, percent signs, another scheme,
    /// a port that is not a number.
    pub fn parse(text: &[u8]) -> Result<Self, TargetError> {
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
            return Self::parse_bracketed(rest);
        }
        let mut parts = text.splitn(2, |byte| *byte == b':');
        let host = parts.next().unwrap_or_default();
        let port = parts.next().map_or(Ok(PORT_DEFAULT), parse_port)?;
        if host.is_empty() {
            return Err(TargetError::HostMissing);
        }
        let address = std::str::from_utf8(host)
            .ok()
            .and_then(|host| host.parse::<Ipv4Addr>().ok());
        let host = match address {
            Some(address) => Host::Address(IpAddr::V4(address)),
            None => parse_name(host)?,
        };
        Ok(Self { host, port })
    }

    fn parse_bracketed(rest: &[u8]) -> Result<Self, TargetError> {
        let close = rest.iter().position(|byte| *byte == b']');
        let Some(close) = close else {
            return Err(TargetError::AddressMalformed);
        };
        let address = std::str::from_utf8(&rest[..close])
            .ok()
            .and_then(|text| text.parse::<Ipv6Addr>().ok())
            .ok_or(TargetError::AddressMalformed)?;
        let port = match rest[close + 1..].split_first() {
            None => PORT_DEFAULT,
            Some((b':', port)) => parse_port(port)?,
            Some(_) => return Err(TargetError::AddressMalformed),
        };
        Ok(Self {
            host: Host::Address(IpAddr::V6(address).to_canonical()),
            port,
        })
    }

    /// The port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// The socket address, where the host is an address already.
    #[must_use]
    pub const fn address(&self) -> Option<SocketAddr> {
        match &self.host {
            Host::Address(address) => Some(SocketAddr::new(*address, self.port)),
            Host::Name(_) => None,
        }
    }

    /// The name to resolve, where the host is not an address.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match &self.host {
            Host::Address(_) => None,
            Host::Name(name) => Some(name),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Address(address) => SocketAddr::new(*address, self.port).fmt(f),
            Host::Name(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

/// Digits only: the standard parser would take a plus sign.
fn parse_port(text: &[u8]) -> Result<u16, TargetError> {
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
fn parse_name(host: &[u8]) -> Result<Host, TargetError> {
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
    let name = String::from_utf8_lossy(host).to_ascii_lowercase();
    Ok(Host::Name(name))
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
