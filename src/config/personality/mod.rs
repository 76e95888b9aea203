//! Personalities: the commands that run a proxy, each with the flags and the outside of the program
//! it replaces. A personality is one file.

mod contract;
pub mod removed;
mod sidecar;

pub use contract::{Alias, Personality};
pub use sidecar::SIDECAR;

/// Every personality, in the order of `--help`.
pub const ALL: &[&Personality] = &[&SIDECAR];

/// Returns the personality that replaces the program with this file name, and the program.
#[must_use]
pub fn of_program(name: &str) -> Option<(&'static Personality, &'static Alias)> {
    ALL.iter().find_map(|personality| {
        let mut aliases = personality.aliases.iter();
        let alias = aliases.find(|alias| alias.program == name)?;
        Some((*personality, alias))
    })
}
