//! The state of a check.

use crate::config::{Problem, RawConfig};

/// Reads the values of a `RawConfig` and collects problems and warnings.
pub(in crate::config) struct Reader<'a> {
    pub(in crate::config) raw: &'a RawConfig,
    pub(in crate::config) problems: Vec<Problem>,
    pub(in crate::config) warnings: Vec<String>,
}
