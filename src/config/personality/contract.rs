//! The value that distinguishes the commands which run a proxy.

use super::removed::Removed;
use crate::api::Routes;
use crate::config::read::Reader;
use crate::config::{Config, ErrorStyle, Key, RawConfig};

/// A command that runs a proxy: its flags and how they become a [`Config`], and the outside that
/// the programs it replaces have. Nothing downstream of `config` knows which one was used.
pub struct Personality {
    /// Name of the command.
    pub name: &'static str,
    /// Description of the command for `--help`.
    pub about: &'static str,
    /// Examples for `--help`.
    pub examples: &'static str,
    /// Notes for `--help`, after the examples.
    pub notes: &'static str,
    /// The programs that the command replaces. A binary with the file name of one runs the command.
    pub aliases: &'static [Alias],
    /// The keys, in the order of `--help`.
    pub table: &'static [&'static Key],
    /// The environment variables that do not correspond to a single key.
    pub variables: &'static [&'static str],
    /// Flags of the replaced programs that have another name or no equivalent.
    pub removed: &'static [Removed],
    /// Applies the removed flags that were given.
    pub apply_removed: fn(&mut RawConfig, &Given<'_>),
    /// Reads the configuration. Records problems, and continues with placeholders.
    pub(in crate::config) read: fn(&mut Reader<'_>) -> Config,
    /// The requests that the proxy inspects or responds to itself.
    pub routes: &'static Routes,
    /// The form of the error responses that the proxy generates.
    pub errors: ErrorStyle,
}

/// Returns the value of a flag, or `None` if it was not given.
pub(super) type Given<'a> = dyn Fn(&str) -> Option<String> + 'a;

/// A program that a command replaces.
pub struct Alias {
    /// File name of the program.
    pub program: &'static str,
    /// The defaults in which the program differs from the command.
    pub defaults: &'static [(&'static Key, &'static str)],
}

impl std::fmt::Debug for Personality {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl std::fmt::Debug for Alias {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.program)
    }
}
