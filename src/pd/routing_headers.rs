//! The engines that the routing headers of a request name: the prefill targets, in the order in
//! which to try them, the encoders, and the source of a cached prefix.
//!
//! Each header has two names (`PREFILLER`, `ENCODERS`, `CACHE_SOURCE`), and schedulers send either
//! or both. Every name is removed from every forwarded request.

use crate::fleet::{HTTP_PORT, HTTPS_PORT, Target, TargetError};
use crate::h1::Name;

/// The names of a routing header, in the order of precedence. The older name comes first: a
/// scheduler from before the renaming removes only that one from what a client sends, so a newer
/// one next to it can be the client's (llm-d/llm-d-router#3087).
type Names = [Name; 2];

/// The header that names prefill targets.
const PREFILLER: Names = [Name::XPrefillerHostPort, Name::XLlmDPrefillerHostPort];
/// The header that names encoders.
const ENCODERS: Names = [Name::XEncoderHostsPorts, Name::XLlmDEncoderHostsPorts];
/// The header that names the source of a cached prefix.
const CACHE_SOURCE: Names = [
    Name::XKvCacheSourceHostPort,
    Name::XLlmDKvCacheSourceHostPort,
];

/// Maximum number of targets that are read from a routing header; later ones are ignored.
/// Schedulers send one or a few.
const CANDIDATES_MAX: usize = 16;

/// The engines that a request names in addition to its decoder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Routing {
    /// Prefill candidates in the order to try them. If empty, the decoder computes the prompt.
    pub prefillers: Vec<Target>,
    /// Encoders among which the request's multimodal items are distributed. If empty, there is no
    /// encode stage.
    pub encoders: Vec<Target>,
    /// Number of encoders that the request names, including those that are not allowed.
    pub encoders_named: usize,
    /// The engine from which the prefill engine (or, without a prefill leg, the decoder) pulls a
    /// cached prefix of the prompt; `None` if the request names no usable one.
    pub source: Option<Target>,
    /// Whether the two names of a routing header have different values. The older name counts.
    pub has_conflict: bool,
}

/// The settings that determine how routing headers are read.
#[derive(Clone, Copy, Debug)]
pub struct RoutingRules<'a> {
    /// Whether prefillers are connected to with TLS.
    pub prefiller_tls: bool,
    /// Whether encoders are connected to with TLS.
    pub encoder_tls: bool,
    /// Whether encoders are used.
    pub encodes: bool,
    /// A random number that chooses the prefill target; without it, the first one is chosen.
    pub random: Option<u64>,
    /// The address of this rank, which is never a source of cached prefixes; `None` if cached
    /// prefixes are not pulled.
    pub pull_unless: Option<OwnAddress<'a>>,
}

/// The address under which other engines know a rank, as far as it is known.
#[derive(Clone, Copy, Debug, Default)]
pub struct OwnAddress<'a> {
    /// IP address of the pod.
    pub ip: Option<&'a str>,
    /// Port on which the rank serves clients.
    pub port: Option<u16>,
}

impl Routing {
    /// Reads the prefill candidates, encoders and cache source from the head of a request.
    /// `values` returns the values of the fields with a name.
    ///
    /// # Errors
    /// A prefill target is malformed. Malformed encoders and cache sources are ignored, because
    /// without them the request is served correctly, only more slowly.
    pub fn read<'a, I: Iterator<Item = &'a [u8]> + Clone>(
        values: impl Fn(Name) -> I,
        rules: &RoutingRules<'_>,
    ) -> Result<Self, TargetError> {
        let named = |names: Names| {
            let [first, second] = names.map(&values);
            if first.clone().next().is_some() {
                first
            } else {
                second
            }
        };
        let old = values(Name::XPrefillerUrl);
        let candidates = Candidates::read(named(PREFILLER), old, rules.prefiller_tls);
        let encoders = if rules.encodes {
            list(named(ENCODERS), rules.encoder_tls)
        } else {
            Vec::new()
        };
        let source = rules
            .pull_unless
            .and_then(|own| cache_source(named(CACHE_SOURCE), own));
        let has_conflict = [PREFILLER, ENCODERS, CACHE_SOURCE].iter().any(|names| {
            let [first, second] = names.map(&values);
            let is_twice = first.clone().next().is_some() && second.clone().next().is_some();
            is_twice && !first.eq(second)
        });
        Ok(Self {
            prefillers: candidates.choose(rules.random)?,
            encoders_named: encoders.len(),
            encoders,
            source,
            has_conflict,
        })
    }

    /// Returns whether the request involves no engine other than its decoder.
    #[must_use]
    pub const fn is_local(&self) -> bool {
        self.prefillers.is_empty() && self.encoders.is_empty() && self.source.is_none()
    }
}

/// Returns the engine to pull a cached prefix from, or `None` if the request names none. Only the
/// first field line counts, and a source that is this rank itself is ignored
/// (`docs/pd-sidecar.md#cached-prefix-pulls`).
fn cache_source<'a>(
    mut lines: impl Iterator<Item = &'a [u8]>,
    own: OwnAddress<'_>,
) -> Option<Target> {
    let source = Target::parse_with_port(lines.next()?.trim_ascii()).ok()?;
    let is_own = own.ip.is_some_and(|ip| source.host() == ip) && source.port() == own.port;
    (!is_own).then_some(source)
}

/// The elements of a routing header.
///
/// If there is exactly one header line, it is split on commas. With two or more lines, each line is
/// one element and is not split, as in pd-sidecar (`docs/pd-sidecar.md#routing-headers`). Blanks
/// around an element are removed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidates<'a> {
    elements: Vec<&'a [u8]>,
    port_default: u16,
}

impl<'a> Candidates<'a> {
    /// Reads the lines of [`PREFILLER`], or those of the much older `x-prefiller-url` if there is
    /// no line of either name at all. `is_tls` is whether prefillers are connected to with TLS,
    /// which determines the port of elements that do not specify one.
    fn read(
        lines: impl Iterator<Item = &'a [u8]> + Clone,
        old_lines: impl Iterator<Item = &'a [u8]> + Clone,
        is_tls: bool,
    ) -> Self {
        if lines.clone().next().is_some() {
            Self::split(lines, is_tls)
        } else {
            Self::split(old_lines, is_tls)
        }
    }

    fn split(lines: impl Iterator<Item = &'a [u8]> + Clone, is_tls: bool) -> Self {
        let elements = if lines.clone().nth(1).is_none() {
            lines
                .flat_map(|line| line.split(|byte| *byte == b','))
                .take(CANDIDATES_MAX)
                .map(<[u8]>::trim_ascii)
                .collect()
        } else {
            lines.take(CANDIDATES_MAX).map(<[u8]>::trim_ascii).collect()
        };
        Self {
            elements,
            port_default: default_port(is_tls),
        }
    }

    /// Returns the prefill targets to try, in order.
    ///
    /// The first is the first element of the header or, if `random` is given, the one at index
    /// `random` modulo the number of elements. The other elements follow in list order, wrapping
    /// around, without duplicates. If the chosen first element is empty, or the header has no
    /// elements, the request has no prefill leg: the result is an empty list and the other elements
    /// are not parsed. Other empty elements are skipped.
    ///
    /// # Errors
    /// If any parsed element is malformed: no target of such a list is dialled.
    fn choose(&self, random: Option<u64>) -> Result<Vec<Target>, TargetError> {
        let count = self.elements.len();
        if count == 0 {
            return Ok(Vec::new());
        }
        let first = random.map_or(0, |random| (random % count as u64) as usize);
        if self.elements[first].is_empty() {
            return Ok(Vec::new());
        }
        let mut targets = Vec::with_capacity(count);
        for offset in 0..count {
            let element = self.elements[(first + offset) % count];
            if element.is_empty() {
                continue;
            }
            let target = Target::parse_or_port(element, self.port_default)?;
            if !targets.contains(&target) {
                targets.push(target);
            }
        }
        Ok(targets)
    }
}

/// Returns the port of a target that does not specify one.
const fn default_port(is_tls: bool) -> u16 {
    if is_tls { HTTPS_PORT } else { HTTP_PORT }
}

/// Returns the targets in the lines of an optional routing header, such as the one that names
/// encoders, which are connected to with TLS if `is_tls`. The lines are split like those of
/// [`Candidates`]; malformed elements and duplicates are omitted, because the request can be served
/// without them.
fn list<'a>(lines: impl Iterator<Item = &'a [u8]> + Clone, is_tls: bool) -> Vec<Target> {
    let mut targets = Vec::new();
    let candidates = Candidates::split(lines, is_tls);
    for element in candidates.elements {
        if let Ok(target) = Target::parse_or_port(element, candidates.port_default)
            && !targets.contains(&target)
        {
            targets.push(target);
        }
    }
    targets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cache_source_is_another_rank_with_a_port() {
        let own = OwnAddress {
            ip: Some("10.0.0.1"),
            port: Some(8000),
        };
        for (lines, own, want) in [
            (&["10.0.0.2:8000"][..], own, Some("10.0.0.2:8000")),
            (&[" 10.0.0.1:8001 "], own, Some("10.0.0.1:8001")),
            (&["10.0.0.1:8000"], own, None),
            (
                &["10.0.0.1:8000"],
                OwnAddress::default(),
                Some("10.0.0.1:8000"),
            ),
            // The first line counts, even if it names no engine.
            (&["10.0.0.1:8000", "10.0.0.2:8000"], own, None),
            (&["", "10.0.0.2:8000"], own, None),
            (&["10.0.0.2"], own, None),
            (&[], own, None),
        ] {
            let source = cache_source(lines.iter().map(|line| line.as_bytes()), own);
            let source = source.map(|source| source.to_string());
            assert_eq!(source.as_deref(), want, "{lines:?} {own:?}");
        }
    }

    fn choose(lines: &[&str], random: Option<u64>) -> Result<Vec<String>, TargetError> {
        let lines = lines.iter().map(|line| line.as_bytes());
        let chosen = Candidates::read(lines, std::iter::empty(), false).choose(random)?;
        Ok(chosen.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn the_default_port_applies_to_targets_without_one() {
        let lines = [&b"a,b:2,[::1],192.0.2.1"[..]].into_iter();
        let candidates = Candidates::read(lines, std::iter::empty(), true);
        let chosen: Vec<_> = candidates.choose(None).unwrap();
        let chosen: Vec<_> = chosen.iter().map(ToString::to_string).collect();
        assert_eq!(chosen, ["a:443", "b:2", "[::1]:443", "192.0.2.1:443"]);
    }

    #[test]
    fn h1_no_line_no_value_and_empty_values_mean_no_prefill() {
        for lines in [&[][..], &[""], &["", ""], &[" "], &[",a:1"]] {
            assert_eq!(choose(lines, None), Ok(vec![]), "{lines:?}");
        }
    }

    #[test]
    fn h2_h3_the_first_element_of_one_line_or_of_several_lines() {
        assert_eq!(choose(&["a:1"], None), Ok(vec!["a:1".into()]));
        assert_eq!(
            choose(&["a:1,b:2"], None),
            Ok(vec!["a:1".into(), "b:2".into()])
        );
        assert_eq!(
            choose(&["a:1", "b:2"], None),
            Ok(vec!["a:1".into(), "b:2".into()])
        );
        assert_eq!(choose(&["a:1,,a:1"], None), Ok(vec!["a:1".into()]));
    }

    #[test]
    fn h4_sampling_starts_at_the_index_and_wraps_around() {
        let two = |first: &str, second: &str| Ok(vec![first.to_string(), second.to_string()]);
        for random in 0..6 {
            let want = if random % 2 == 0 {
                two("a:1", "b:2")
            } else {
                two("b:2", "a:1")
            };
            assert_eq!(choose(&[" a:1, b:2"], Some(random)), want);
            assert_eq!(choose(&["a:1", "b:2"], Some(random)), want);
        }
        assert_eq!(
            choose(&["a:1,"], Some(1)),
            Ok(vec![]),
            "a random choice of an empty element"
        );
    }

    #[test]
    fn commas_inside_one_of_several_lines_are_not_split() {
        assert_eq!(
            choose(&["a:1,b:2", "c:3"], None),
            Err(TargetError::PortMalformed)
        );
    }

    #[test]
    fn the_old_header_is_read_only_if_the_new_one_is_absent() {
        let old = [&b"http://old:1"[..]];
        let none: [&[u8]; 0] = [];
        let read = |new: &[&'static [u8]]| {
            Candidates::read(new.iter().copied(), old.into_iter(), false)
                .choose(None)
                .unwrap()
        };
        assert_eq!(read(&none)[0].to_string(), "old:1");
        assert_eq!(read(&[b"new:2"])[0].to_string(), "new:2");
        assert_eq!(read(&[b""]), vec![]);
    }

    /// Returns the first prefiller, the first encoder, the source, and whether names conflict.
    fn engines(head: &[(Name, &'static str)]) -> (String, String, String, bool) {
        let rules = RoutingRules {
            prefiller_tls: false,
            encoder_tls: false,
            encodes: true,
            random: None,
            pull_unless: Some(OwnAddress::default()),
        };
        let values = |name| {
            let fields: Vec<&[u8]> = head
                .iter()
                .filter(|field| field.0 == name)
                .map(|field| field.1.as_bytes())
                .collect();
            fields.into_iter()
        };
        let routing = Routing::read(values, &rules).unwrap();
        let text = |target: Option<&Target>| target.map(ToString::to_string).unwrap_or_default();
        (
            text(routing.prefillers.first()),
            text(routing.encoders.first()),
            text(routing.source.as_ref()),
            routing.has_conflict,
        )
    }

    #[test]
    fn either_name_of_a_routing_header_counts_and_the_older_one_first() {
        use Name::*;
        let named = |p: &str, e: &str, s: &str, conflict| {
            (p.to_owned(), e.to_owned(), s.to_owned(), conflict)
        };
        let old = [
            (XPrefillerHostPort, "p:1"),
            (XEncoderHostsPorts, "e:1"),
            (XKvCacheSourceHostPort, "s:1"),
        ];
        let new = [
            (XLlmDPrefillerHostPort, "p:2"),
            (XLlmDEncoderHostsPorts, "e:2"),
            (XLlmDKvCacheSourceHostPort, "s:2"),
        ];
        assert_eq!(engines(&old), named("p:1", "e:1", "s:1", false));
        assert_eq!(engines(&new), named("p:2", "e:2", "s:2", false));
        for one in 0..3 {
            let all = [&old[..], &new[one..=one]].concat();
            assert_eq!(engines(&all), named("p:1", "e:1", "s:1", true), "{one}");
        }
        let same = [(XPrefillerHostPort, "p:1"), (XLlmDPrefillerHostPort, "p:1")];
        assert_eq!(engines(&same), named("p:1", "", "", false));
        // A line without a value is a line.
        for (old, new) in [
            (XPrefillerHostPort, XLlmDPrefillerHostPort),
            (XEncoderHostsPorts, XLlmDEncoderHostsPorts),
            (XKvCacheSourceHostPort, XLlmDKvCacheSourceHostPort),
        ] {
            assert_eq!(engines(&[(old, ""), (new, "x:2")]), named("", "", "", true));
        }
        let oldest = [
            (XPrefillerUrl, "http://p:3/"),
            (XLlmDPrefillerHostPort, "p:2"),
        ];
        assert_eq!(engines(&oldest).0, "p:2");
    }
}
