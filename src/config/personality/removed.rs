//! Flags of pd-sidecar and its predecessor that have a different name or no equivalent here.
//!
//! Existing manifests still use them. Each flag is mapped to its replacement or ignored, in most
//! cases with a warning. None is accepted in the configuration document. Two groups only configure
//! logging: klog's flags (from the predecessor) and controller-runtime's (`--zap-*`).

use crate::config::flag_table::{self, Key};
use crate::config::{Problem, RawConfig, units};

/// The meaning of a removed flag.
#[derive(Clone, Copy, Debug)]
enum Meaning {
    /// The flag is an old name of this key.
    Key(&'static Key),
    /// The flag is a switch. If it is true, it adds this item to the list of this key.
    Item(&'static Key, &'static str),
    /// The flag is an old name of this key, whose value is a size, and gives it in megabytes.
    Megabytes(&'static Key),
    /// The flag gives the namespace part of `--inference-pool`.
    PoolNamespace,
    /// The flag gives the name part of `--inference-pool`.
    PoolName,
    /// The flag gives klog's verbosity, which is mapped to `--log-level`.
    Verbosity,
    /// The flag gives the log level of controller-runtime, which is mapped to `--log-level`.
    ZapLevel,
    /// The flag gives the log format of controller-runtime, which is mapped to `--log-format`.
    ZapEncoder,
    /// The flag configures logging in another way. It has no effect: the log is written to standard
    /// error.
    Logs,
}

/// A removed flag.
#[derive(Debug)]
pub struct Removed {
    /// Name of the flag without leading dashes.
    pub name: &'static str,
    /// Whether the flag is a switch, whose value, if any, must be attached with `=`.
    pub is_switch: bool,
    meaning: Meaning,
}

const fn switch(name: &'static str, meaning: Meaning) -> Removed {
    Removed {
        name,
        is_switch: true,
        meaning,
    }
}

const fn value(name: &'static str, meaning: Meaning) -> Removed {
    Removed {
        name,
        is_switch: false,
        meaning,
    }
}

/// All removed flags.
pub const ALL: &[Removed] = &[
    value("connector", Meaning::Key(&flag_table::KV_CONNECTOR)),
    switch(
        "prefiller-use-tls",
        Meaning::Item(&flag_table::ENABLE_TLS, "prefiller"),
    ),
    switch(
        "decoder-use-tls",
        Meaning::Item(&flag_table::ENABLE_TLS, "decoder"),
    ),
    switch(
        "prefiller-tls-insecure-skip-verify",
        Meaning::Item(&flag_table::TLS_INSECURE_SKIP_VERIFY, "prefiller"),
    ),
    switch(
        "decoder-tls-insecure-skip-verify",
        Meaning::Item(&flag_table::TLS_INSECURE_SKIP_VERIFY, "decoder"),
    ),
    value("inference-pool-namespace", Meaning::PoolNamespace),
    value("inference-pool-name", Meaning::PoolName),
    value("v", Meaning::Verbosity),
    value("vmodule", Meaning::Logs),
    value("log_backtrace_at", Meaning::Logs),
    value("log_dir", Meaning::Key(&flag_table::LOG_DIR)),
    value("log_file", Meaning::Key(&flag_table::LOG_FILE)),
    value(
        "log_file_max_size",
        Meaning::Megabytes(&flag_table::LOG_FILE_MAX_SIZE),
    ),
    value("stderrthreshold", Meaning::Logs),
    switch("logtostderr", Meaning::Logs),
    switch("alsologtostderr", Meaning::Logs),
    switch("legacy_stderr_threshold_behavior", Meaning::Logs),
    switch("one_output", Meaning::Logs),
    switch("add_dir_header", Meaning::Logs),
    switch("skip_headers", Meaning::Logs),
    switch("skip_log_headers", Meaning::Logs),
    value("zap-log-level", Meaning::ZapLevel),
    value("zap-encoder", Meaning::ZapEncoder),
    value("zap-stacktrace-level", Meaning::Logs),
    value("zap-time-encoding", Meaning::Logs),
    switch("zap-devel", Meaning::Logs),
];

/// Lowest klog verbosity (`--v`) that is treated as `--log-level=debug`.
const VERBOSITY_DEBUG: i64 = 4;

impl Removed {
    /// Returns the name of the key that replaces the flag.
    #[must_use]
    pub const fn replacement(&self) -> &'static str {
        match self.meaning {
            Meaning::Key(key) | Meaning::Item(key, _) | Meaning::Megabytes(key) => key.name,
            Meaning::PoolNamespace | Meaning::PoolName => flag_table::INFERENCE_POOL.name,
            Meaning::Verbosity | Meaning::ZapLevel => flag_table::LOG_LEVEL.name,
            Meaning::ZapEncoder | Meaning::Logs => flag_table::LOG_FORMAT.name,
        }
    }
}

/// Applies to `raw` the removed flags that were given on the command line.
///
/// `given` returns the last value of the flag with this name, or `None` if it was not given. The
/// current flags must already be set in `raw`, because they take precedence.
pub fn apply(raw: &mut RawConfig, given: &dyn Fn(&str) -> Option<String>) {
    for removed in ALL {
        if let Some(value) = given(removed.name) {
            raw.apply(removed, &value);
        }
    }
    let (namespace, name) = (
        given("inference-pool-namespace"),
        given("inference-pool-name"),
    );
    raw.set_old_pool(namespace.as_deref(), name.as_deref());
}

impl RawConfig {
    fn apply(&mut self, removed: &Removed, value: &str) {
        let name = removed.name;
        match removed.meaning {
            Meaning::Key(key) => {
                self.renamed(name, key.name);
                if !self.has_flag(key) {
                    self.set_as(key, value, name);
                }
            }
            Meaning::Megabytes(key) => {
                self.renamed(name, key.name);
                match value.parse::<u32>() {
                    // klog has no limit then.
                    Ok(0) if !self.has_flag(key) => self.set_as(key, "1TiB", name),
                    Ok(size) if !self.has_flag(key) => self.set_as(key, format!("{size}MiB"), name),
                    Ok(_) => {}
                    Err(_) => self.wanted(name, value, "a number of megabytes"),
                }
            }
            Meaning::Item(key, item) => {
                self.renamed(name, &format!("{}={item}", key.name));
                if let Some(true) = self.switch(name, value) {
                    self.add_as(key, item, name);
                }
            }
            Meaning::PoolNamespace | Meaning::PoolName => {
                self.renamed(name, "inference-pool=NAMESPACE/NAME");
            }
            Meaning::Verbosity => match value.parse::<i64>() {
                Ok(level) if level >= VERBOSITY_DEBUG => {
                    self.renamed(name, "log-level=debug");
                    self.log_level(name, "debug");
                }
                Ok(_) => self.warn(format!("--{name}={value} has no effect; see --log-level")),
                Err(_) => self.wanted(name, value, "a number"),
            },
            Meaning::ZapLevel => match (value, value.parse::<u32>()) {
                ("debug", _) | (_, Ok(1..)) => self.log_level(name, "debug"),
                ("info", _) => self.log_level(name, "info"),
                ("error" | "panic", _) => self.log_level(name, "error"),
                _ => self.wanted(name, value, "debug, info, error, panic or a number above 0"),
            },
            Meaning::ZapEncoder => {
                let format = match value {
                    "json" => "json",
                    "console" => "text",
                    _ => return self.wanted(name, value, "json or console"),
                };
                if !self.has_flag(&flag_table::LOG_FORMAT) {
                    self.set_as(&flag_table::LOG_FORMAT, format, name);
                }
            }
            Meaning::Logs => self.warn(format!(
                "--{name} has no effect: logs are written to standard error; see --log-level and \
                 --log-format"
            )),
        }
    }

    fn renamed(&mut self, name: &str, new: &str) {
        self.warn(format!(
            "--{name} was removed from pd-sidecar; it is treated as --{new}"
        ));
    }

    fn log_level(&mut self, name: &'static str, level: &str) {
        if !self.has_flag(&flag_table::LOG_LEVEL) {
            self.set_as(&flag_table::LOG_LEVEL, level, name);
        }
    }

    fn switch(&mut self, name: &str, value: &str) -> Option<bool> {
        let switch = units::switch(value);
        if switch.is_none() {
            self.wanted(name, value, "true or false");
        }
        switch
    }

    fn wanted(&mut self, name: &str, value: &str, wanted: &str) {
        self.add_problem(Problem {
            key: format!("--{name}"),
            text: format!("`{value}` is not valid; give {wanted}"),
            excerpt: String::new(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_is_both_removed_and_a_key() {
        let is_key = |name| flag_table::ALL.iter().any(|key| key.name == name);
        for (index, removed) in ALL.iter().enumerate() {
            assert!(!is_key(removed.name), "{}", removed.name);
            assert!(is_key(removed.replacement()));
            let again = ALL[..index].iter().any(|other| other.name == removed.name);
            assert!(!again, "{}", removed.name);
        }
    }
}
