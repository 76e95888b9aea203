//! Look-up of a target in the allowlist. Its cost does not depend on the number of rules.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;

use super::allow_rule::{AllowHost, AllowNet};
use super::{Address, AllowRule, Target};

/// A set of rules indexed for looking up targets. Immutable; a change creates a new list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowList {
    names: HashMap<String, Ports>,
    nets: HashMap<AllowNet, Ports>,
    /// Distinct prefix lengths of the IPv4 rules (`bits_v4`) and IPv6 rules (`bits_v6`), in bits,
    /// longest first. An address is looked up in `nets` once per length until a rule permits it.
    bits_v4: Vec<u8>,
    bits_v6: Vec<u8>,
    entries: usize,
}

/// The allowed ports of one host or network, sorted and unique. Empty means any port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Ports(Vec<u16>);

impl Ports {
    fn has(&self, port: u16) -> bool {
        self.0.is_empty() || self.0.binary_search(&port).is_ok()
    }
}

impl AllowList {
    /// Creates a list from these rules. Duplicates are merged, and a rule for any port of a host
    /// replaces the rules for single ports of the same host.
    pub fn new<'a>(rules: impl IntoIterator<Item = &'a AllowRule>) -> Self {
        let mut by_host: HashMap<&AllowHost, Option<BTreeSet<u16>>> = HashMap::new();
        for rule in rules {
            let ports = by_host.entry(&rule.host);
            let ports = ports.or_insert_with(|| Some(BTreeSet::new()));
            match (rule.port, ports.as_mut()) {
                (None, _) => *ports = None,
                (Some(port), Some(ports)) => {
                    ports.insert(port);
                }
                (Some(_), None) => {}
            }
        }
        let mut list = Self::default();
        let (mut bits_v4, mut bits_v6) = (BTreeSet::new(), BTreeSet::new());
        for (host, ports) in by_host {
            let ports = Ports(ports.into_iter().flatten().collect());
            list.entries += ports.0.len().max(1);
            match host {
                AllowHost::Name(name) => {
                    list.names.insert(name.clone(), ports);
                }
                AllowHost::Net(net) => {
                    match net.ip {
                        IpAddr::V4(_) => bits_v4.insert(net.bits),
                        IpAddr::V6(_) => bits_v6.insert(net.bits),
                    };
                    list.nets.insert(*net, ports);
                }
            }
        }
        // Longest prefix first, because most rules are for single hosts.
        list.bits_v4 = bits_v4.into_iter().rev().collect();
        list.bits_v6 = bits_v6.into_iter().rev().collect();
        list
    }

    /// Returns whether a rule covers the target as written: names are not resolved, and addresses
    /// are compared with address rules only. A Unix socket is never permitted.
    #[must_use]
    pub fn permits(&self, target: &Target) -> bool {
        if let Some((name, port)) = target.name() {
            return self.names.get(name).is_some_and(|ports| ports.has(port));
        }
        let Some(Address::Tcp(address)) = target.address() else {
            return false;
        };
        let (ip, port) = (address.ip(), address.port());
        let lengths = match ip {
            IpAddr::V4(_) => &self.bits_v4,
            IpAddr::V6(_) => &self.bits_v6,
        };
        lengths.iter().any(|bits| {
            let ports = self.nets.get(&AllowNet::around(ip, *bits));
            ports.is_some_and(|ports| ports.has(port))
        })
    }

    /// Returns the number of distinct pairs of a host or network and a port. A host that is allowed
    /// on any port counts as one.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.entries
    }

    /// Returns whether the list allows nothing.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(rules: &[&str]) -> AllowList {
        let rules: Vec<_> = rules
            .iter()
            .map(|rule| AllowRule::parse(rule).unwrap())
            .collect();
        AllowList::new(&rules)
    }

    fn target(text: &str) -> Target {
        Target::parse_local(text.as_bytes()).unwrap()
    }

    #[test]
    fn a3_only_listed_hosts_are_allowed_on_any_port() {
        let list = list(&["10.0.0.1", "pod-1", "pod-1.ns.svc.cluster.local", "fd00::1"]);
        assert_eq!(list.len(), 4);
        for allowed in [
            "10.0.0.1",
            "10.0.0.1:8000",
            "http://10.0.0.1:1",
            "[::ffff:10.0.0.1]:80",
            "[::ffff:a00:1]:80",
            "pod-1",
            "POD-1:8000",
            "http://pod-1:8000",
            "pod-1.ns.svc.cluster.local:9",
            "[fd00::1]:8000",
            "[fd00:0:0::0:1]",
        ] {
            assert!(list.permits(&target(allowed)), "{allowed}");
        }
        for denied in [
            "10.0.0.2:8000",
            "10.0.0.10:8000",
            "pod-2",
            "pod-10",
            "pod-1.",
            "pod-1.ns",
            "x.pod-1",
            "[fd00::2]:8000",
            "[::10.0.0.1]:80",
            "localhost:8000",
            "unix:/pod-1",
            "unix:@pod-1",
        ] {
            assert!(!list.permits(&target(denied)), "{denied}");
        }
    }

    #[test]
    fn prefixes_and_ports() {
        let list = list(&[
            "10.4.0.0/16:8000",
            "10.4.7.0/24",
            "10.4.0.9",
            "[fd00::/8]:8000",
            "a:1",
            "a:2",
            "a:2",
            "b:1",
            "b",
        ]);
        assert_eq!(list.len(), 7);
        for (text, want) in [
            ("10.4.1.1:8000", true),
            ("10.4.1.1:8001", false),
            ("10.4.7.1:8001", true),
            ("10.4.0.9:1", true),
            ("10.5.0.0:8000", false),
            ("[fdff::1]:8000", true),
            ("[fdff::1]:80", false),
            ("[fe00::1]:8000", false),
            ("a:1", true),
            ("a:2", true),
            ("a:3", false),
            ("b:3", true),
        ] {
            assert_eq!(list.permits(&target(text)), want, "{text}");
        }
    }

    #[test]
    fn zero_length_prefixes_match_one_address_family() {
        let (v4, v6) = (list(&["0.0.0.0/0"]), list(&["::/0"]));
        assert!(v4.permits(&target("255.255.255.255:1")));
        assert!(!v4.permits(&target("[::1]:1")));
        assert!(v6.permits(&target("[::1]:1")));
        assert!(!v6.permits(&target("1.2.3.4:1")));
        assert!(!v6.permits(&target("[::ffff:1.2.3.4]:1")));
        let none = list(&[]);
        assert!(none.is_empty() && !none.permits(&target("a:1")));
    }

    /// Reference implementation of [`AllowList::permits`]: checks the rules one by one and compares
    /// the bits of addresses as text.
    fn naive(rules: &[(String, Option<u16>)], host: &str, port: u16) -> bool {
        let bits = |ip: IpAddr| match ip.to_canonical() {
            IpAddr::V4(ip) => format!("4{:032b}", ip.to_bits()),
            IpAddr::V6(ip) => format!("6{:0128b}", ip.to_bits()),
        };
        let covers = |rule: &str| match (rule.split_once('/'), host.parse::<IpAddr>()) {
            (Some((ip, count)), Ok(host)) => {
                let count: usize = count.parse().unwrap();
                let ip = bits(ip.parse().unwrap());
                bits(host).starts_with(&ip[..=count])
            }
            (Some(_), Err(_)) => false,
            (None, Ok(host)) => rule
                .parse::<IpAddr>()
                .is_ok_and(|ip| bits(ip) == bits(host)),
            (None, Err(_)) => rule.eq_ignore_ascii_case(host),
        };
        let mut rules = rules.iter();
        rules.any(|(rule, only)| only.is_none_or(|only| only == port) && covers(rule))
    }

    /// A pseudo-random generator of rules and hosts. It generates few distinct hosts, so that they
    /// often match a rule.
    struct Chance(u64);

    impl Chance {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }

        fn host(&mut self) -> String {
            let (a, b) = (self.below(3), self.below(4));
            match self.below(5) {
                0 => format!("pod-{b}"),
                1 => format!("Pod-{b}"),
                2 => format!("10.0.{a}.{b}"),
                3 => format!("fd00:{a}::{b}"),
                _ => format!("::ffff:10.0.{a}.{b}"),
            }
        }

        /// Returns a random rule without a port: a host, or an address prefix whose other bits are
        /// zero.
        fn rule(&mut self) -> String {
            let host = self.host();
            let Ok(ip) = host.parse::<IpAddr>() else {
                return host;
            };
            let ip = ip.to_canonical();
            let width: u64 = if ip.is_ipv4() { 32 } else { 128 };
            match self.below(3) {
                0 => host,
                1 => {
                    let bits = self.below(width + 1);
                    let net = AllowNet::around(ip, u8::try_from(bits).unwrap());
                    format!("{}/{bits}", net.ip)
                }
                _ => {
                    let bits = width - self.below(4);
                    let net = AllowNet::around(ip, u8::try_from(bits).unwrap());
                    format!("{}/{bits}", net.ip)
                }
            }
        }
    }

    #[test]
    fn agrees_with_a_linear_search() {
        let mut allowed = [0_u32; 2];
        for seed in 1..2000_u64 {
            let mut chance = Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let rules: Vec<(String, Option<u16>)> = (0..chance.below(6))
                .map(|_| {
                    (
                        chance.rule(),
                        [None, Some(1), Some(2)][chance.below(3) as usize],
                    )
                })
                .collect();
            let texts: Vec<String> = rules
                .iter()
                .map(|(host, port)| match port {
                    None => host.clone(),
                    Some(port) if host.contains(':') => format!("[{host}]:{port}"),
                    Some(port) => format!("{host}:{port}"),
                })
                .collect();
            let list = list(&texts.iter().map(String::as_str).collect::<Vec<_>>());
            for _ in 0..20 {
                let host = chance.host();
                let port = 1 + u16::try_from(chance.below(3)).unwrap();
                let target = Target::new(&host, port).unwrap();
                let want = naive(&rules, &host, port);
                assert_eq!(
                    list.permits(&target),
                    want,
                    "{texts:?} {target} seed {seed}"
                );
                allowed[usize::from(want)] += 1;
            }
        }
        assert!(allowed.iter().all(|count| *count > 3000), "{allowed:?}");
    }
}
