//! A running process: its signals, its drain and its end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::inbox::{Inbox, Message};
use super::publish::Changes;
use super::traces::Exporter;
use crate::cli::Exit;
use crate::config::DrainConfig;
use crate::fleet::{Change, Service};
use crate::metrics::Registry;
use crate::metrics::access_log::AccessWriter;

/// A process whose shards are accepting connections.
pub struct Running {
    pub(super) drain: DrainConfig,
    pub(super) changes: Changes,
    pub(super) inboxes: Vec<Inbox>,
    pub(super) ended: mpsc::UnboundedReceiver<io::Result<()>>,
    pub(super) access: Option<AccessWriter>,
    pub(super) traces: Option<Exporter>,
    pub(super) metrics: Arc<Registry>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running")
            .field("shards", &self.inboxes.len())
            .finish_non_exhaustive()
    }
}

pub(super) struct Signals {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Signals {
    pub(super) fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

impl Running {
    /// Returns the metrics in the exposition format that the admin server serves.
    #[must_use]
    pub fn metrics(&self) -> String {
        self.metrics.render()
    }

    /// Serves until the first signal, then drains. A second signal ends the drain immediately.
    /// Fails if a shard ends before the first signal.
    pub(super) async fn until_signal(mut self, mut signals: Signals) -> Result<(), Exit> {
        tokio::select! {
            () = signals.next() => {}
            ended = self.ended.recv() => return Err(shard_ended(ended)),
        }
        let DrainConfig { timeout, settle } = self.drain;
        tracing::info!("draining");
        let drained = self.drain(settle, timeout);
        let cut = tokio::select! {
            cut = drained => cut,
            () = signals.next() => {
                tracing::warn!("second signal received: exiting without waiting for open requests");
                true
            }
        };
        if cut {
            // Skip the final flush: the access log's writer may be blocked on a full pipe, and
            // `finish` would then never return.
            tracing::warn!(
                "drain incomplete: open streams are aborted (--drain-timeout limits the wait)"
            );
            return Ok(());
        }
        if let Some(access) = self.access.take() {
            access.finish();
        }
        if let Some(traces) = self.traces.take() {
            traces.finish().await;
        }
        Ok(())
    }

    /// Drains the shards: reports unhealthy from now on, stops accepting after `settle`, and then
    /// waits until all open requests have finished. Returns `true` if `timeout` expired first.
    pub async fn drain(&mut self, settle: Duration, timeout: Option<Duration>) -> bool {
        self.changes.apply(Change::Service(Service::Settling)).await;
        tokio::time::sleep(settle).await;
        self.changes.apply(Change::Service(Service::Draining)).await;
        for inbox in &self.inboxes {
            inbox.send(Message::CheckDrain);
        }
        let all = async {
            for _ in 0..self.inboxes.len() {
                self.ended.recv().await;
            }
        };
        match timeout {
            None => {
                all.await;
                false
            }
            Some(timeout) => tokio::time::timeout(timeout, all).await.is_err(),
        }
    }
}

fn shard_ended(ended: Option<io::Result<()>>) -> Exit {
    match ended {
        Some(Err(error)) => Exit::runtime(format!("shard failed: {error}")),
        // Shards stop only when draining. Exit, so that a supervisor restarts the process, rather
        // than continue with fewer shards.
        Some(Ok(())) | None => Exit::runtime("shard stopped unexpectedly"),
    }
}
