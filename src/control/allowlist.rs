//! The allowlist of targets: merged from its sources and published to the shards.
//!
//! Rules from the configuration are fixed. A rules file and the pods of an `InferencePool` are
//! watched for changes. If a source cannot be read, the rules last read from it remain in effect,
//! with no limit on their age.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::watch::DirWatch;
use crate::admin::Check;
use crate::cli::Exit;
use crate::config::{AllowlistConfig, PoolRef};
use crate::fleet::{AllowError, AllowList, AllowRule, TargetAllowlist};
use crate::limits::{ALLOW_FILE_BYTES_MAX, ALLOW_PROBLEMS_SHOWN_MAX};
use crate::metrics::{AllowSource, AllowlistMetrics};

/// The allowlist of targets that requests may name: the list that the shards read, its metrics, and
/// the rules from each source.
#[derive(Debug)]
pub(super) struct Allowlist {
    pub(super) targets: Arc<TargetAllowlist>,
    pub(super) metrics: Arc<AllowlistMetrics>,
    sources: Mutex<Sources>,
}

#[derive(Debug, Default)]
struct Sources {
    fixed: Vec<AllowRule>,
    file: Vec<AllowRule>,
    /// Name of the configured `InferencePool`, for messages, until the first call of `set_pods`;
    /// then `None`, as without a pool. While it is `Some`, the allowlist is incomplete.
    awaited: Option<String>,
    pods: Vec<AllowRule>,
    entries: usize,
}

impl Allowlist {
    /// Reads the rules file, publishes the list, and spawns the tasks that watch the file and the
    /// pool.
    ///
    /// # Errors
    /// Returns an error if the file cannot be read or has invalid lines, or if this build cannot
    /// watch a pool or this process has no access to the Kubernetes API.
    pub(super) async fn start(config: &AllowlistConfig) -> Result<Arc<Self>, Exit> {
        let list = Arc::new(Self {
            targets: TargetAllowlist::new(),
            metrics: Arc::default(),
            sources: Mutex::new(Sources {
                fixed: config.rules.clone(),
                awaited: config.pool.as_ref().map(ToString::to_string),
                ..Sources::default()
            }),
        });
        if let Some(path) = &config.rules_file {
            list.begin_file(path)?;
        }
        list.change(|_| ());
        if let Some(pool) = &config.pool {
            follow_pool(pool, &list).await?;
        }
        Ok(list)
    }

    /// Replaces the rules for the pods of the `InferencePool`. From the first call on, the
    /// allowlist is complete.
    #[cfg_attr(
        not(feature = "k8s"),
        expect(dead_code, reason = "called by the module `pool` only")
    )]
    pub(super) fn set_pods(&self, pods: Vec<AllowRule>) {
        self.change(|sources| {
            sources.pods = pods;
            sources.awaited = None;
        });
    }

    /// Returns the allowlist's line of the readiness page. The check is good unless an
    /// `InferencePool` is configured and its pods are not known yet.
    pub(super) fn readiness(&self) -> Check {
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        Check {
            is_good: sources.awaited.is_none(),
            text: match &sources.awaited {
                None => format!("allowlist: {} entries", sources.entries),
                Some(pool) => format!("allowlist: waiting for the pods of {pool}"),
            },
        }
    }

    fn change(&self, change: impl FnOnce(&mut Sources)) {
        // Only the control plane's thread takes this lock: the tasks here and the readiness page.
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut sources);
        let fixed_and_file = sources.fixed.iter().chain(&sources.file);
        let list = AllowList::new(fixed_and_file.chain(&sources.pods));
        sources.entries = list.len();
        self.metrics.set_entries(sources.entries);
        tracing::debug!("allowlist published: {} entries", sources.entries);
        self.targets.publish(list, sources.awaited.is_none());
    }

    fn begin_file(self: &Arc<Self>, path: &Path) -> Result<(), Exit> {
        self.metrics.uses(AllowSource::File);
        // Start watching before the first read, so that no change in between is missed.
        let watch = DirWatch::around(path);
        let read = read_rules(path);
        match &read {
            Ok(rules) => self.take_file(rules),
            Err(why) => {
                let path = path.display();
                let text = format!("ringside: --allow-targets-file: {path} {why}");
                return Err(Exit::config(text));
            }
        }
        tokio::spawn(follow_file(Arc::clone(self), path.to_owned(), watch, read));
        Ok(())
    }

    fn take_file(&self, rules: &[AllowRule]) {
        self.metrics.heard(AllowSource::File);
        self.change(|sources| sources.file = rules.to_vec());
    }
}

/// Reads the rules file again whenever its directory may have changed. Never returns. New rules are
/// published, and a new error is logged and counted. A result that equals the last one, as after a
/// change to another file, is neither published nor logged.
async fn follow_file(
    list: Arc<Allowlist>,
    path: PathBuf,
    mut watch: DirWatch,
    mut last: Result<Vec<AllowRule>, String>,
) {
    loop {
        watch.changed().await;
        let file = path.clone();
        let reading = tokio::task::spawn_blocking(move || read_rules(&file));
        let now = reading.await.unwrap_or_else(|error| Err(error.to_string()));
        match &now {
            Ok(_) if now == last => list.metrics.heard(AllowSource::File),
            Err(_) if now == last => {}
            Ok(rules) => {
                list.take_file(rules);
                tracing::info!(
                    "allowlist file {} reloaded: {} rules",
                    path.display(),
                    rules.len()
                );
            }
            Err(why) => {
                list.metrics.failed(AllowSource::File);
                tracing::warn!(
                    "allowlist file {} {why}\nkeeping the previous rules",
                    path.display()
                );
            }
        }
        last = now;
    }
}

/// Reads and parses a rules file. On failure, returns the rest of a sentence that starts with the
/// path, such as "is not a regular file".
fn read_rules(path: &Path) -> Result<Vec<AllowRule>, String> {
    let cannot = |error: std::io::Error| format!("cannot be read: {error}");
    // Opening a named pipe would block until a writer opens it.
    if !path.metadata().map_err(cannot)?.is_file() {
        return Err("is not a regular file".to_owned());
    }
    let mut text = String::new();
    let file = File::open(path).map_err(cannot)?;
    let mut file = file.take(ALLOW_FILE_BYTES_MAX + 1);
    file.read_to_string(&mut text).map_err(cannot)?;
    if text.len() as u64 > ALLOW_FILE_BYTES_MAX {
        return Err(format!("is larger than {ALLOW_FILE_BYTES_MAX} bytes"));
    }
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

#[cfg(feature = "k8s")]
async fn follow_pool(pool: &PoolRef, list: &Arc<Allowlist>) -> Result<(), Exit> {
    super::pool::follow(pool, list).await
}

#[cfg(not(feature = "k8s"))]
#[expect(
    clippy::unused_async,
    reason = "same signature as with the feature `k8s`"
)]
async fn follow_pool(_: &PoolRef, _: &Arc<Allowlist>) -> Result<(), Exit> {
    Err(Exit::config(
        "ringside: --inference-pool: this build cannot watch an InferencePool; build with the \
         feature `k8s`, or list the targets with --allow-target or --allow-targets-file",
    ))
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
