//! The engines that the routing headers of a request name: the prefill targets, in the order in
//! which to try them, and the encoders.

use crate::fleet::{HTTP_PORT, HTTPS_PORT, Target, TargetError};

/// Maximum number of targets that are read from a routing header; later ones are ignored.
/// Schedulers send one or a few.
pub const CANDIDATES_MAX: usize = 16;

/// The elements of a routing header.
///
/// If there is exactly one header line, it is split on commas. With two or more lines, each line is
/// one element and is not split, as in pd-sidecar (`docs/pd-sidecar.md#routing-headers`). Blanks
/// around an element are removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidates<'a> {
    elements: Vec<&'a [u8]>,
    port_default: u16,
}

impl<'a> Candidates<'a> {
    /// Reads the lines of `x-prefiller-host-port`, or those of the older `x-prefiller-url` if there
    /// is no line with the new name at all. `is_tls` is whether prefillers are connected to with
    /// TLS, which determines the port of elements that do not specify one.
    pub fn read(
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
    pub fn choose(&self, random: Option<u64>) -> Result<Vec<Target>, TargetError> {
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
#[must_use]
pub fn list<'a>(lines: impl Iterator<Item = &'a [u8]> + Clone, is_tls: bool) -> Vec<Target> {
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
}
