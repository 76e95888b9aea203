//! Which targets requests may name: rules over hosts and ports.

use std::fmt;
use std::net::IpAddr;

use super::Target;

/// One entry of the allowlist: `HOST[:PORT]` or `CIDR[:PORT]`, an IPv6 one in brackets where a
/// port follows.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AllowRule {
    host: AllowHost,
    /// `None`: any port.
    port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum AllowHost {
    /// A name, lower case: what the request writes, not what it resolves to.
    Name(String),
    /// The addresses that share the first `bits` bits with this one.
    Net(IpAddr, u8),
}

/// Why a text is no rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllowError {
    /// The host is neither a name nor an address.
    Host,
    /// The prefix length is no number, or longer than the address.
    Bits,
    /// The port is not a number from 1 to 65535.
    Port,
}

impl fmt::Display for AllowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Host => "the host is neither a name nor an IP address",
            Self::Bits => "the prefix length must be a number of bits the address has",
            Self::Port => "the port must be a number from 1 to 65535",
        })
    }
}

impl AllowRule {
    /// Parses `HOST[:PORT]` or `CIDR[:PORT]`, such as `prefill-0`, `10.4.0.0/16:8000` or
    /// `[fd00::/8]:8000`.
    ///
    /// # Errors
    /// Anything else.
    pub fn parse(text: &str) -> Result<Self, AllowError> {
        let (host, port) = split_port(text)?;
        let (host, bits) = match host.split_once('/') {
            Some((host, bits)) => (host, Some(bits)),
            None => (host, None),
        };
        let host = match (host.parse::<IpAddr>(), bits) {
            (Ok(ip), None) => AllowHost::Net(ip, width(ip)),
            (Ok(ip), Some(bits)) => {
                let bits = bits.parse::<u8>().map_err(|_| AllowError::Bits)?;
                if bits > width(ip) {
                    return Err(AllowError::Bits);
                }
                AllowHost::Net(ip, bits)
            }
            (Err(_), Some(_)) => return Err(AllowError::Host),
            (Err(_), None) => {
                Target::new(host, 1).map_err(|_| AllowError::Host)?;
                AllowHost::Name(host.to_ascii_lowercase())
            }
        };
        Ok(Self { host, port })
    }
}

const fn width(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

/// The host and the port behind it. An IPv6 address without brackets has no port.
fn split_port(text: &str) -> Result<(&str, Option<u16>), AllowError> {
    let port = |port: &str| match port.parse::<u16>() {
        Ok(0) | Err(_) => Err(AllowError::Port),
        Ok(port) => Ok(Some(port)),
    };
    if let Some(rest) = text.strip_prefix('[') {
        let (host, behind) = rest.split_once(']').ok_or(AllowError::Host)?;
        return match behind.strip_prefix(':') {
            Some(number) => Ok((host, port(number)?)),
            None if behind.is_empty() => Ok((host, None)),
            None => Err(AllowError::Host),
        };
    }
    match text.split_once(':') {
        Some((host, number)) if !number.contains(':') => Ok((host, port(number)?)),
        _ => Ok((text, None)),
    }
}
