//! Reads the command line and its configuration file again (SIGHUP).
//!
//! Only the level of the log changes. Certificates, the allowlist file and the logs are files that
//! the process reads or opens again at the same time. All other settings keep the values with which
//! the process has started; a different value is logged.

use std::sync::Arc;

use crate::cli::{self, Command};
use crate::config::Config;
use crate::metrics::ReloadResult;

/// The settings with which the process runs.
pub(super) struct Reload {
    config: Config,
    result: Arc<ReloadResult>,
}

impl Reload {
    /// Creates the state of a process that has started with `config`.
    pub(super) fn new(config: &Config, result: Arc<ReloadResult>) -> Self {
        Self {
            config: config.clone(),
            result,
        }
    }

    /// Reads the settings again. An invalid file changes nothing.
    pub(super) fn run(&mut self) {
        match cli::parse(std::env::args_os()) {
            Ok(Command::Proxy(config, _)) => {
                self.result.record(true);
                self.take(&config);
            }
            // Only a proxy has settings that can change.
            Ok(Command::Check(_) | Command::Mock(_) | Command::Demo(_)) => {}
            Err(exit) => {
                self.result.record(false);
                let why = exit.message.trim_end();
                tracing::warn!("configuration not reloaded, keeping the current one: {why}");
            }
        }
    }

    fn take(&mut self, config: &Config) {
        let level = config.log.level;
        if level != self.config.log.level {
            self.config.log.level = level;
            cli::set_log_level(level);
        }
        for (key, now) in changed(&self.config, config) {
            tracing::warn!("{key}: changed, effective after a restart: {now}");
        }
        tracing::info!("configuration reloaded");
    }
}

/// Returns the settings of `new` that differ from those of `old`.
fn changed(old: &Config, new: &Config) -> Vec<(String, String)> {
    let old = old.describe();
    let new = new.describe().into_iter();
    new.filter(|line| !old.contains(line)).collect()
}
