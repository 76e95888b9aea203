//! Checks a `RawConfig` and creates the `Config`, or reports all of its problems together.
//!
//! The reader does not stop at a problem: it records the problem and continues with a placeholder
//! value. Placeholders are never used, because a `RawConfig` with problems does not result in a
//! `Config`.

use super::read::Reader;
use super::{Config, Personality, Problem, RawConfig};

/// A checked configuration with its warnings.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The configuration.
    pub config: Config,
    /// Warnings about the configuration: one sentence each, without the final full stop.
    pub warnings: Vec<String>,
}

/// Checks the values as written and creates the configuration of a personality.
///
/// # Errors
/// Returns all problems, mostly in the order of `--help`.
pub fn check(personality: &Personality, raw: &RawConfig) -> Result<Checked, Vec<Problem>> {
    let mut raw = raw.clone();
    raw.warn_of_unreadable_variables();
    let mut reader = Reader {
        raw: &raw,
        problems: raw.problems.clone(),
        warnings: raw.warnings.clone(),
    };
    let config = (personality.read)(&mut reader);
    if reader.problems.is_empty() {
        reader.check_overlaps(&config);
    }
    if reader.problems.is_empty() {
        let warnings = reader.warnings;
        Ok(Checked { config, warnings })
    } else {
        Err(reader.problems)
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
pub(super) mod tests;
