//! The allowlist rules in a file (`--allow-targets-file`), read again when the file changes.
//!
//! If the file cannot be read, the rules last read from it remain in effect, with no limit on their
//! age.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cli::Exit;
use crate::control::publish::{Changes, Publisher};
use crate::control::watch::DirWatch;
use crate::fleet::{AllowError, AllowRule, Change, RuleSource};
use crate::limits::{ALLOW_FILE_BYTES_MAX, ALLOW_PROBLEMS_SHOWN_MAX};
use crate::metrics::{AllowSource, AllowlistMetrics};
use crate::sys::{self, ReadError};

/// A rules file that has been read once.
pub(in crate::control) struct RulesFile {
    path: PathBuf,
    watch: DirWatch,
    rules: Vec<AllowRule>,
    metrics: Arc<AllowlistMetrics>,
}

impl RulesFile {
    /// Reads the file and publishes its rules.
    ///
    /// # Errors
    /// The file cannot be read or has invalid lines.
    pub(in crate::control) fn open(
        path: &Path,
        metrics: Arc<AllowlistMetrics>,
        publisher: &mut Publisher,
    ) -> Result<Self, Exit> {
        metrics.uses(AllowSource::File);
        // Start watching before the first read, so that no change in between is missed.
        let watch = DirWatch::around(path);
        let rules = read_rules(path).map_err(|why| {
            let path = path.display();
            Exit::config(format!("ringside: --allow-targets-file: {path} {why}"))
        })?;
        metrics.heard(AllowSource::File);
        publisher.apply(Change::Allow(RuleSource::File, rules.clone()));
        Ok(Self {
            path: path.to_owned(),
            watch,
            rules,
            metrics,
        })
    }

    /// Reads the file again whenever its directory may have changed. Never returns. New rules are
    /// published, and a new error is logged and counted. A result that equals the last one, as
    /// after a change to another file, is neither published nor logged.
    pub(in crate::control) async fn follow(mut self, changes: Changes) {
        let metrics = &self.metrics;
        let path = self.path.display();
        let mut last = Ok(self.rules);
        loop {
            self.watch.changed().await;
            let file = self.path.clone();
            let reading = tokio::task::spawn_blocking(move || read_rules(&file));
            let now = reading.await.unwrap_or_else(|error| Err(error.to_string()));
            match &now {
                Ok(_) if now == last => metrics.heard(AllowSource::File),
                Err(_) if now == last => {}
                Ok(rules) => {
                    metrics.heard(AllowSource::File);
                    let change = Change::Allow(RuleSource::File, rules.clone());
                    changes.apply(change).await;
                    tracing::info!("allowlist file {path} reloaded: {} rules", rules.len());
                }
                Err(why) => {
                    metrics.failed(AllowSource::File);
                    tracing::warn!("allowlist file {path} {why}\nkeeping the previous rules");
                }
            }
            last = now;
        }
    }
}

/// Reads and parses a rules file. On failure, returns the rest of a sentence that starts with the
/// path, such as "is not a regular file".
fn read_rules(path: &Path) -> Result<Vec<AllowRule>, String> {
    let bytes = sys::read_regular(path, ALLOW_FILE_BYTES_MAX).map_err(|error| match error {
        ReadError::NotRegular => "is not a regular file".to_owned(),
        ReadError::TooLarge => format!("is larger than {ALLOW_FILE_BYTES_MAX} bytes"),
        ReadError::Io(error) => format!("cannot be read: {error}"),
    })?;
    let text = String::from_utf8(bytes).map_err(|_| "cannot be read: it is not UTF-8")?;
    AllowRule::parse_lines(&text).map_err(|wrong| explain(&wrong))
}

fn explain(wrong: &[(usize, &str, AllowError)]) -> String {
    let count = match wrong.len() {
        1 => "an invalid line".to_owned(),
        count => format!("{count} invalid lines"),
    };
    let mut text = format!("has {count}:");
    for (line, rule, why) in wrong.iter().take(ALLOW_PROBLEMS_SHOWN_MAX) {
        text += &format!("\n  line {line}: `{}`: {why}", rule.escape_debug());
    }
    if wrong.len() > ALLOW_PROBLEMS_SHOWN_MAX {
        text += "\n  ...";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_problems_of_a_rules_file_are_reported_together() {
        let path = std::env::temp_dir().join(format!("ringside-rules-{}", std::process::id()));
        let read = |text: &[u8]| {
            std::fs::write(&path, text).unwrap();
            read_rules(&path)
        };
        assert_eq!(
            read(b"a # one\n\n10.0.0.0/8:80").map(|rules| rules.len()),
            Ok(2)
        );
        let wrong = read(b"a\nb c\x07\n10.0.0.0/33\n").unwrap_err();
        let lines: Vec<_> = wrong.lines().collect();
        assert_eq!(lines[0], "has 2 invalid lines:");
        assert!(
            lines[1].starts_with("  line 2: `b c\\u{7}`: neither a name nor an address"),
            "{wrong}"
        );
        assert!(
            lines[2].starts_with("  line 3: `10.0.0.0/33`: the prefix length"),
            "{wrong}"
        );
        assert!(
            read(b":\n")
                .unwrap_err()
                .starts_with("has an invalid line:\n")
        );
        let many = read(":\n".repeat(ALLOW_PROBLEMS_SHOWN_MAX + 5).as_bytes()).unwrap_err();
        assert_eq!(many.lines().count(), ALLOW_PROBLEMS_SHOWN_MAX + 2);
        let long = vec![b'#'; usize::try_from(ALLOW_FILE_BYTES_MAX).unwrap() + 1];
        assert!(read(&long[1..]).is_ok());
        assert!(read(&long).unwrap_err().starts_with("is larger than "));
        assert!(read(b"\xff").unwrap_err().starts_with("cannot be read: "));
        std::fs::remove_file(&path).unwrap();
        assert!(
            read_rules(&path)
                .unwrap_err()
                .starts_with("cannot be read: ")
        );
        assert_eq!(
            read_rules(&std::env::temp_dir()),
            Err("is not a regular file".to_owned())
        );
    }
}
