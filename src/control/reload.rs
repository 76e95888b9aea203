//! Reads the command line and its configuration file again (SIGHUP).
//!
//! Only the level of the log changes. Certificates, the allowlist file and the logs are files that
//! the process reads or opens again at the same time. All other settings keep the values with which
//! the process has started; a different value is logged.

use std::sync::Arc;

use tokio::sync::mpsc;

use crate::cli::{self, Command, Exit};
use crate::config::Config;
use crate::metrics::ReloadResult;

/// Asks the task that reads the settings again.
pub(super) struct Reload(mpsc::Sender<()>);

impl Reload {
    /// Starts the task of a process that has started with `config`.
    pub(super) fn start(config: &Config, result: Arc<ReloadResult>) -> Self {
        // One more may be asked for while the settings are being read.
        let (sender, asked) = mpsc::channel(1);
        let settings = Settings {
            config: config.clone(),
            result,
        };
        tokio::spawn(settings.follow(asked));
        Self(sender)
    }

    /// Makes the task read the settings again.
    pub(super) fn ask(&self) {
        // If the queue is full, they will be read again anyway.
        let _ = self.0.try_send(());
    }
}

/// The settings with which the process runs.
struct Settings {
    config: Config,
    result: Arc<ReloadResult>,
}

impl Settings {
    async fn follow(mut self, mut asked: mpsc::Receiver<()>) {
        while asked.recv().await.is_some() {
            // The file may be on a mount that hangs.
            let reading = tokio::task::spawn_blocking(|| cli::parse(std::env::args_os()));
            match reading.await {
                Ok(parsed) => self.read(parsed),
                Err(error) => tracing::warn!(%error, "configuration not reloaded"),
            }
        }
    }

    /// Takes the settings that have been read. Invalid ones change nothing.
    fn read(&mut self, parsed: Result<Command, Exit>) {
        match parsed {
            Ok(Command::Proxy(config, warnings)) => {
                self.result.record(true);
                for warning in warnings {
                    tracing::warn!("{warning}");
                }
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
        let changed = changed(&self.config, config);
        for (key, now) in &changed {
            tracing::warn!("{key}: changed, effective after a restart: {now}");
        }
        // A summary does not show each of them, such as the rules of the allowlist.
        if changed.is_empty() && *config != self.config {
            tracing::warn!("settings have changed that are effective after a restart only");
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
