//! The state of a check.

use super::{Problem, RawConfig};

/// Reads the values of a `RawConfig` and collects problems and warnings.
pub(super) struct Reader<'a> {
    pub(super) raw: &'a RawConfig,
    pub(super) problems: Vec<Problem>,
    pub(super) warnings: Vec<String>,
}
