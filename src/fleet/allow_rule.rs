//! Entries of the allowlist of targets, and their text format.
//!
//! Hosts are parsed by the parser for targets. A rule and a request that name the same host
//! therefore contain the same value: names in lower case, addresses in canonical form.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Target;
use super::target::parse_port;
use crate::limits::ALLOW_RULES_MAX;

/// One entry of the allowlist: `HOST[:PORT]` or `CIDR[:PORT]`. An IPv6 address or prefix followed
/// by a port is written in brackets.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct AllowRule {
    pub(super) host: AllowHost,
    /// The port that is allowed on the host; `None` allows any port.
    pub(super) port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum AllowHost {
    /// A host name in lower case. It is compared with the name in a request, not with the addresses
    /// of that name.
    Name(String),
    /// All addresses with a common prefix. A single address is a prefix of full length.
    Net(AllowNet),
}

/// The addresses whose first `bits` bits equal those of `ip`. All other bits of `ip` are zero.
///
/// IPv4-mapped IPv6 addresses are stored as IPv4, so an IPv6 prefix never contains an IPv4 address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct AllowNet {
    pub(super) ip: IpAddr,
    pub(super) bits: u8,
}

/// Reason why a text is not a valid rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AllowError {
    /// The host is neither a name nor an address.
    Host,
    /// The prefix length is not a number, or is longer than the address.
    Bits,
    /// The address has bits set after its first N bits, where N is the prefix length.
    HostBits,
    /// The port is not a number from 1 to 65535.
    Port,
    /// The rules file has more than `ALLOW_RULES_MAX` rules.
    TooMany,
}

impl fmt::Display for AllowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str(
                "neither a name nor an address (before a port, an IPv6 address needs brackets)",
            ),
            Self::Bits => f.write_str("the prefix length must be 0-32 (IPv4) or 0-128 (IPv6)"),
            Self::HostBits => f.write_str(
                "the address has bits set after the prefix; give the first address of the network, \
                 or omit the prefix length to allow this address only",
            ),
            Self::Port => f.write_str("the port must be a number from 1 to 65535"),
            Self::TooMany => write!(
                f,
                "more than {ALLOW_RULES_MAX} rules; replace some by prefixes"
            ),
        }
    }
}

impl AllowRule {
    /// Parses `HOST[:PORT]` or `CIDR[:PORT]`, such as `prefill-0`, `10.4.0.0/16:8000` or
    /// `[fd00::/8]:8000`.
    ///
    /// # Errors
    /// Returns the reason if `text` has any other form.
    pub fn parse(text: &str) -> Result<Self, AllowError> {
        if let Some(rest) = text.strip_prefix('[') {
            let (host, behind) = rest.split_once(']').ok_or(AllowError::Host)?;
            let port = match behind.strip_prefix(':') {
                Some(number) => Some(port(number)?),
                None if behind.is_empty() => None,
                None => return Err(AllowError::Host),
            };
            return match parse_host(host)? {
                // Brackets are allowed around IPv6 addresses and prefixes only.
                host if host_has_colon(text) => Ok(Self { host, port }),
                _ => Err(AllowError::Host),
            };
        }
        let (host, port) = match text.split_once(':') {
            Some((host, number)) if !number.contains(':') => (host, Some(port(number)?)),
            // No colon, or an IPv6 address without brackets, which has no port.
            _ => (text, None),
        };
        let host = parse_host(host)?;
        Ok(Self { host, port })
    }

    /// Returns a rule for any port of one host. Used for the pods of an `InferencePool`.
    ///
    /// # Errors
    /// Returns an error if `text` is neither a name nor an address.
    pub fn host(text: &str) -> Result<Self, AllowError> {
        let host = match parse_host(text)? {
            AllowHost::Net(_) if text.contains('/') => return Err(AllowError::Host),
            host => host,
        };
        Ok(Self { host, port: None })
    }

    /// Parses the text of a rules file: one rule per line. Blank lines are skipped, and `#` starts
    /// a comment.
    ///
    /// # Errors
    /// Returns the number, the text and the problem of every line that is not a valid rule, up to
    /// the line that exceeds `ALLOW_RULES_MAX`.
    pub fn parse_lines(text: &str) -> Result<Vec<Self>, Vec<(usize, &str, AllowError)>> {
        let mut rules = Vec::new();
        let mut wrong = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            if rules.len() == ALLOW_RULES_MAX {
                wrong.push((index + 1, line, AllowError::TooMany));
                break;
            }
            match Self::parse(line) {
                Ok(rule) => rules.push(rule),
                Err(error) => wrong.push((index + 1, line, error)),
            }
        }
        if wrong.is_empty() {
            Ok(rules)
        } else {
            Err(wrong)
        }
    }
}

fn host_has_colon(bracketed: &str) -> bool {
    let inside = bracketed.split(']').next().unwrap_or_default();
    inside.contains(':')
}

fn port(text: &str) -> Result<u16, AllowError> {
    parse_port(text.as_bytes()).map_err(|_| AllowError::Port)
}

/// Parses the host of a rule: a name, an address, or an address and a prefix length (CIDR).
fn parse_host(text: &str) -> Result<AllowHost, AllowError> {
    if let Some((ip, bits)) = text.split_once('/') {
        let ip = ip.parse().map_err(|_| AllowError::Host)?;
        return AllowNet::parse(ip, bits).map(AllowHost::Net);
    }
    if let Ok(ip) = text.parse() {
        return Ok(AllowHost::Net(AllowNet::one(ip)));
    }
    let target = Target::new(text, 1).map_err(|_| AllowError::Host)?;
    let name = target.name().filter(|_| !text.starts_with('['));
    let (name, _) = name.ok_or(AllowError::Host)?;
    Ok(AllowHost::Name(name.to_owned()))
}

impl AllowNet {
    pub(super) fn one(ip: IpAddr) -> Self {
        let ip = ip.to_canonical();
        Self {
            ip,
            bits: width(ip),
        }
    }

    /// Returns the network of prefix length `bits` that contains `ip`. `ip` must be canonical.
    pub(super) fn around(ip: IpAddr, bits: u8) -> Self {
        let behind = u32::from(width(ip).saturating_sub(bits));
        let ip = match ip {
            IpAddr::V4(ip) => {
                let mask = u32::MAX.checked_shl(behind).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(ip.to_bits() & mask))
            }
            IpAddr::V6(ip) => {
                let mask = u128::MAX.checked_shl(behind).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(ip.to_bits() & mask))
            }
        };
        Self { ip, bits }
    }

    fn parse(ip: IpAddr, bits: &str) -> Result<Self, AllowError> {
        let is_number = (1..=3).contains(&bits.len()) && bits.bytes().all(|b| b.is_ascii_digit());
        let bits = bits.parse().ok().filter(|_| is_number);
        let bits: u8 = bits.ok_or(AllowError::Bits)?;
        if bits > width(ip) {
            return Err(AllowError::Bits);
        }
        if Self::around(ip, bits).ip != ip {
            return Err(AllowError::HostBits);
        }
        let canonical = ip.to_canonical();
        // An IPv4 prefix written as IPv6 (`::ffff:10.0.0.0/104`): the first 96 bits are constant.
        let extra = width(ip) - width(canonical);
        match bits.checked_sub(extra) {
            Some(bits) => Ok(Self {
                ip: canonical,
                bits,
            }),
            None => Ok(Self { ip, bits }),
        }
    }
}

/// Returns the length of an address in bits.
const fn width(ip: IpAddr) -> u8 {
    match ip {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(ip: &str, bits: u8, port: Option<u16>) -> Result<AllowRule, AllowError> {
        let ip = ip.parse().unwrap();
        let host = AllowHost::Net(AllowNet { ip, bits });
        Ok(AllowRule { host, port })
    }

    fn name(name: &str, port: Option<u16>) -> Result<AllowRule, AllowError> {
        let host = AllowHost::Name(name.to_owned());
        Ok(AllowRule { host, port })
    }

    #[test]
    fn rules() {
        use AllowError as E;
        let cases = [
            ("prefill-0", name("prefill-0", None)),
            (
                "Prefill-0.NS.svc:8000",
                name("prefill-0.ns.svc", Some(8000)),
            ),
            ("a_b:1", name("a_b", Some(1))),
            ("10.0.0.1", net("10.0.0.1", 32, None)),
            ("10.0.0.1:65535", net("10.0.0.1", 32, Some(65535))),
            ("10.4.0.0/16", net("10.4.0.0", 16, None)),
            ("10.4.0.0/16:8000", net("10.4.0.0", 16, Some(8000))),
            ("0.0.0.0/0", net("0.0.0.0", 0, None)),
            ("10.0.0.1/32", net("10.0.0.1", 32, None)),
            ("::1", net("::1", 128, None)),
            ("[::1]", net("::1", 128, None)),
            ("[::1]:80", net("::1", 128, Some(80))),
            ("0:0::0:1", net("::1", 128, None)),
            ("FD00::/8", net("fd00::", 8, None)),
            ("[fd00::/8]", net("fd00::", 8, None)),
            ("[fd00::/8]:8000", net("fd00::", 8, Some(8000))),
            ("::/0", net("::", 0, None)),
            ("::ffff:10.0.0.1", net("10.0.0.1", 32, None)),
            ("[::ffff:a00:1]:80", net("10.0.0.1", 32, Some(80))),
            ("::ffff:10.0.0.0/104", net("10.0.0.0", 8, None)),
            ("::ffff:0:0/96", net("0.0.0.0", 0, None)),
            ("::ffff:0:0/95", Err(E::HostBits)),
            ("::fffe:0:0/95", net("::fffe:0:0", 95, None)),
            ("", Err(E::Host)),
            (":80", Err(E::Host)),
            ("*", Err(E::Host)),
            ("*.prefill", Err(E::Host)),
            ("a b", Err(E::Host)),
            ("http://a:80", Err(E::Host)),
            ("user@a", Err(E::Host)),
            ("unix:/run/x", Err(E::Port)),
            ("[a]:80", Err(E::Host)),
            ("[10.0.0.1]:80", Err(E::Host)),
            ("[[::1]]", Err(E::Host)),
            ("[::1", Err(E::Host)),
            ("[::1]80", Err(E::Host)),
            ("[fd00::]/8", Err(E::Host)),
            ("fe80::1%eth0", Err(E::Host)),
            ("127.1", Err(E::Host)),
            ("2130706433", Err(E::Host)),
            ("0x7f.0.0.1", Err(E::Host)),
            ("010.0.0.1", Err(E::Host)),
            ("a/8", Err(E::Host)),
            ("/8", Err(E::Host)),
            ("10.0.0.0/33", Err(E::Bits)),
            ("10.0.0.0/", Err(E::Bits)),
            ("10.0.0.0/+8", Err(E::Bits)),
            ("10.0.0.0/8/8", Err(E::Bits)),
            ("10.0.0.0/0008", Err(E::Bits)),
            ("fd00::/129", Err(E::Bits)),
            ("fd00::/8:80", Err(E::Bits)),
            ("10.4.1.0/16", Err(E::HostBits)),
            ("fd00::1/64", Err(E::HostBits)),
            ("a:", Err(E::Port)),
            ("a:0", Err(E::Port)),
            ("a:+80", Err(E::Port)),
            ("a:65536", Err(E::Port)),
            ("10.0.0.0/8:x", Err(E::Port)),
            ("[::1]:0", Err(E::Port)),
        ];
        for (text, want) in cases {
            assert_eq!(AllowRule::parse(text), want, "{text}");
        }
    }

    #[test]
    fn pod_hosts() {
        assert_eq!(AllowRule::host("10.0.0.1"), net("10.0.0.1", 32, None));
        assert_eq!(AllowRule::host("fd00::0:1"), net("fd00::1", 128, None));
        assert_eq!(AllowRule::host("decode-7f"), name("decode-7f", None));
        for text in ["", "10.0.0.0/8", "fd00::/8", "[::1]", "a:80", "a/b"] {
            assert_eq!(AllowRule::host(text), Err(AllowError::Host), "{text}");
        }
    }

    #[test]
    fn files() {
        let text = "# ours\n\n a \t\r\n10.0.0.0/8:80 # theirs\n#\n[::1]:1";
        let rules = ["a", "10.0.0.0/8:80", "[::1]:1"].map(|rule| AllowRule::parse(rule).unwrap());
        assert_eq!(AllowRule::parse_lines(text), Ok(rules.to_vec()));
        assert_eq!(AllowRule::parse_lines(""), Ok(vec![]));
        let wrong = AllowRule::parse_lines("a b\nc\n\nd:x#y\n");
        let wants = vec![(1, "a b", AllowError::Host), (4, "d:x", AllowError::Port)];
        assert_eq!(wrong, Err(wants));
        let many = "a\n".repeat(ALLOW_RULES_MAX + 2);
        assert_eq!(
            AllowRule::parse_lines(&many),
            Err(vec![(ALLOW_RULES_MAX + 1, "a", AllowError::TooMany)])
        );
    }
}
