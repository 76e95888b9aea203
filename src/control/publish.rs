//! The one task that owns the fleet's state.
//!
//! Discovery, health checks and the drain send it changes. After each, it publishes a snapshot,
//! which the shards read without a lock. Nothing else publishes anything.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot};

use crate::fleet::{Change, Registry, Snapshot};
use crate::limits::CHANGES_MAX;
use crate::metrics::AllowlistMetrics;

/// The snapshot that shards read.
pub(super) type Published = Arc<ArcSwap<Snapshot>>;

struct Applied {
    change: Change,
    done: oneshot::Sender<()>,
}

/// Sends changes to the task that owns the fleet's state. Cheap to clone.
#[derive(Clone)]
pub(super) struct Changes(mpsc::Sender<Applied>);

impl Changes {
    /// Applies a change. Returns once it has been published.
    pub(super) async fn apply(&self, change: Change) {
        let (done, published) = oneshot::channel();
        // The task ends only with the process.
        if self.0.send(Applied { change, done }).await.is_ok() {
            let _ = published.await;
        }
    }
}

/// The owner of the fleet's state.
pub(super) struct Publisher {
    registry: Registry,
    published: Published,
    allowlist: Option<Arc<AllowlistMetrics>>,
}

impl Publisher {
    /// Publishes the state of `registry`. `allowlist` has the metrics of the allowlist, if there is
    /// one.
    pub(super) fn new(registry: Registry, allowlist: Option<Arc<AllowlistMetrics>>) -> Self {
        let published = Arc::new(ArcSwap::from_pointee(registry.snapshot().clone()));
        Self {
            registry,
            published,
            allowlist,
        }
    }

    /// Returns the snapshot that the shards read.
    pub(super) fn published(&self) -> Published {
        Arc::clone(&self.published)
    }

    /// Applies a change before the task runs.
    pub(super) fn apply(&mut self, change: Change) {
        let is_rules = matches!(change, Change::Allow(..));
        if !self.registry.apply(change) {
            return;
        }
        let snapshot = self.registry.snapshot();
        if let (true, Some(metrics), Some(allow)) = (is_rules, &self.allowlist, &snapshot.allow) {
            let entries = allow.list.len();
            metrics.set_entries(entries);
            tracing::debug!("allowlist published: {entries} entries");
        }
        self.published.store(Arc::new(snapshot.clone()));
    }

    /// Spawns the task that applies the changes sent from now on.
    pub(super) fn start(mut self) -> Changes {
        let (sender, mut changes) = mpsc::channel::<Applied>(CHANGES_MAX);
        tokio::spawn(async move {
            while let Some(Applied { change, done }) = changes.recv().await {
                self.apply(change);
                // The sender may have ended.
                let _ = done.send(());
            }
        });
        Changes(sender)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::Service;

    #[test]
    fn a_change_is_published_before_it_is_acknowledged() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        runtime.block_on(async {
            let mut publisher = Publisher::new(Registry::new(Vec::new()), None);
            let published = publisher.published();
            publisher.apply(Change::Service(Service::Settling));
            assert_eq!(published.load().service, Service::Settling);
            let changes = publisher.start();
            changes.apply(Change::Service(Service::Draining)).await;
            assert_eq!(published.load().service, Service::Draining);
            assert_eq!(published.load().epoch, 2);
        });
    }
}
