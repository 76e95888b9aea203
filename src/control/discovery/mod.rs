//! Discovery: the sources that change the fleet's state while the process runs.
//!
//! A source is one file. It is read once before the shards start, where a failure ends the process,
//! and then followed by a task that sends each change to `publish`.

mod allowlist_file;
#[cfg(feature = "k8s")]
mod allowlist_pods;
mod mori_hosts;
#[cfg(feature = "k8s")]
mod reflect;

use std::sync::Arc;

use super::publish::{Changes, Publisher};
use crate::cli::Exit;
use crate::config::{Config, PoolRef};
use crate::fleet::{Change, RuleSource};
use crate::metrics::{AllowlistMetrics, DnsCounters};
use allowlist_file::RulesFile;
use mori_hosts::MoriPods;

/// The sources that the configuration names, each read once.
pub(super) struct Sources {
    rules_file: Option<RulesFile>,
    pool: Option<PoolRef>,
    mori: Option<MoriPods>,
}

impl Sources {
    /// Reads the sources and publishes what they contain. `allowlist` has the metrics of the
    /// allowlist; `None` without one.
    ///
    /// # Errors
    /// A source cannot be read or is invalid.
    pub(super) async fn read(
        config: &Config,
        allowlist: Option<&Arc<AllowlistMetrics>>,
        dns: &Arc<DnsCounters>,
        publisher: &mut Publisher,
    ) -> Result<Self, Exit> {
        let mori = MoriPods::resolve(config, dns, publisher).await?;
        let (mut rules_file, mut pool) = (None, None);
        if let (Some(list), Some(metrics)) = (&config.allowlist, allowlist) {
            publisher.apply(Change::Allow(RuleSource::Fixed, list.rules.clone()));
            if let Some(path) = &list.rules_file {
                rules_file = Some(RulesFile::open(path, Arc::clone(metrics), publisher)?);
            }
            pool = list.pool.clone();
        }
        Ok(Self {
            rules_file,
            pool,
            mori,
        })
    }

    /// Returns whether a source looks names up again.
    pub(super) const fn resolves_names(&self) -> bool {
        self.mori.is_some()
    }

    /// Spawns the tasks that follow the sources.
    ///
    /// # Errors
    /// This build cannot watch a pool, or this process has no access to the Kubernetes API.
    pub(super) async fn follow(
        self,
        allowlist: Option<&Arc<AllowlistMetrics>>,
        changes: &Changes,
    ) -> Result<(), Exit> {
        if let Some(file) = self.rules_file {
            tokio::spawn(file.follow(changes.clone()));
        }
        if let Some(mori) = self.mori {
            tokio::spawn(mori.follow(changes.clone()));
        }
        if let (Some(pool), Some(metrics)) = (&self.pool, allowlist) {
            follow_pool(pool, metrics, changes).await?;
        }
        Ok(())
    }
}

#[cfg(feature = "k8s")]
async fn follow_pool(
    pool: &PoolRef,
    metrics: &Arc<AllowlistMetrics>,
    changes: &Changes,
) -> Result<(), Exit> {
    allowlist_pods::follow(pool, metrics, changes.clone()).await
}

#[cfg(not(feature = "k8s"))]
#[expect(
    clippy::unused_async,
    reason = "same signature as with the feature `k8s`"
)]
async fn follow_pool(_: &PoolRef, _: &Arc<AllowlistMetrics>, _: &Changes) -> Result<(), Exit> {
    Err(Exit::config(
        "ringside: --inference-pool: this build cannot watch an InferencePool; build with the \
         feature `k8s`, or list the targets with --allow-target or --allow-targets-file",
    ))
}
