//! The engines of a prefiller, as its bootstrap server lists them.

use std::sync::Arc;

use crate::budget::{Budget, Reserved};
use crate::json::{inner, member, members};

/// One engine of a prefiller, from its bootstrap server's response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootstrapEngine {
    /// Data-parallel rank of the engine.
    pub rank: u32,
    /// Engine id, a JSON string including the quotes.
    pub id: Box<[u8]>,
}

/// The engines of one prefiller, kept for later requests.
#[derive(Debug)]
pub struct ListedEngines {
    /// The engines in rank order, at least one.
    pub list: Vec<BootstrapEngine>,
    _reserved: Reserved,
}

impl ListedEngines {
    /// Returns the engines of `list`, and how many bytes they have, which are reserved in `budget`;
    /// `None` if it has no room, so that they must not be kept.
    #[must_use]
    pub fn new(list: Vec<BootstrapEngine>, budget: &Arc<Budget>) -> (Self, Option<usize>) {
        let ids = list.iter().map(|engine| engine.id.len());
        let bytes = ids.sum::<usize>() + list.capacity() * size_of::<BootstrapEngine>();
        let mut reserved = Reserved::new(budget);
        let kept = reserved.grow_to(bytes as u64).is_ok().then_some(bytes);
        let engines = Self {
            list,
            _reserved: reserved,
        };
        (engines, kept)
    }
}

/// Maximum number of engines of one prefiller. A bootstrap response with more is rejected.
pub const ENGINES_MAX: usize = 1024;

/// Parses the response of a bootstrap server, `{"0":{"engine_id":"e0"},...}`, and returns its
/// engines in rank order. Returns `None` if the response does not have this shape, contains no
/// engine, or contains more than [`ENGINES_MAX`].
#[must_use]
pub fn engines(response: &[u8]) -> Option<Vec<BootstrapEngine>> {
    let mut engines = Vec::new();
    let mut walk = members(response);
    for item in &mut walk {
        let rank = std::str::from_utf8(inner(item.key)?).ok()?.parse().ok()?;
        let id = member(item.value, "engine_id")?;
        let is_text = inner(id).is_some_and(|text| !text.is_empty());
        if !is_text || engines.len() == ENGINES_MAX {
            return None;
        }
        let id = id.into();
        engines.push(BootstrapEngine { rank, id });
    }
    engines.sort_unstable_by_key(|engine| engine.rank);
    (walk.is_whole() && !engines.is_empty()).then_some(engines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn k1_engines_are_sorted_by_rank() {
        let response = br#"{"1":{"worker_addr":{},"engine_id":"e1"},"0":{"engine_id":"e0"}}"#;
        let found = engines(response).unwrap();
        let shown: Vec<_> = found.iter().map(|e| (e.rank, &*e.id)).collect();
        assert_eq!(shown, [(0, &b"\"e0\""[..]), (1, &b"\"e1\""[..])]);
        for broken in [
            "",
            "{}",
            "[]",
            "null",
            r#"{"0":{}}"#,
            r#"{"0":{"engine_id":7}}"#,
            r#"{"0":{"engine_id":""}}"#,
            r#"{"x":{"engine_id":"e"}}"#,
            r#"{"0":{"engine_id":"e"}"#,
        ] {
            assert_eq!(engines(broken.as_bytes()), None, "{broken}");
        }
    }
}
