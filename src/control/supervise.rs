//! A running process: its signals, its drain and its end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

use super::inbox::{Inbox, Message};
use super::publish::Changes;
use super::reload::Reload;
use super::signals::{Signal, Signals};
use super::traces::Exporter;
use super::watch;
use crate::cli::{self, Exit};
use crate::config::DrainConfig;
use crate::fault::Fault;
use crate::fleet::{Change, Service};
use crate::limits::{CUT_MS_MAX, LOG_FLUSH_MS_MAX, SAME_SIGNAL_MS_MAX};
use crate::metrics::access_log::AccessWriter;
use crate::metrics::{Registry, ShardMetrics};

/// A process whose shards are accepting connections.
pub struct Running {
    pub(super) drain: DrainConfig,
    pub(super) changes: Changes,
    pub(super) inboxes: Vec<Inbox>,
    pub(super) ended: mpsc::UnboundedReceiver<io::Result<()>>,
    pub(super) access: Option<AccessWriter>,
    pub(super) traces: Option<Exporter>,
    pub(super) metrics: Arc<Registry>,
    pub(super) shard_metrics: Vec<Arc<ShardMetrics>>,
    pub(super) reload: Reload,
    pub(super) started: Instant,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running")
            .field("shards", &self.inboxes.len())
            .finish_non_exhaustive()
    }
}

impl Running {
    /// Returns the metrics in the exposition format that the admin server serves.
    #[must_use]
    pub fn metrics(&self) -> String {
        self.metrics.render()
    }

    /// Serves until the first signal to end, then drains. A second one ends the drain immediately.
    /// Fails if a shard ends before the first signal.
    pub(super) async fn until_signal(mut self, mut signals: Signals) -> Result<(), Exit> {
        loop {
            tokio::select! {
                signal = signals.next() => match signal {
                    Signal::End => break,
                    Signal::Reload => self.reload(),
                },
                ended = self.ended.recv() => return Err(shard_ended(ended)),
            }
        }
        let first = Instant::now();
        let DrainConfig { timeout, settle } = self.drain;
        tracing::info!("draining");
        let end = timeout.map(|timeout| Instant::now() + settle + timeout);
        if let Some(end) = end {
            signals.end_after(end - Instant::now());
        }
        let is_cut = tokio::select! {
            is_cut = self.drain(settle, timeout) => is_cut,
            () = second_end(&mut signals, first) => {
                tracing::warn!("second signal received: exiting without waiting for open requests");
                true
            }
        };
        if is_cut {
            signals.end_after(Duration::ZERO);
            self.cut().await;
        }
        if let Some(access) = self.access.take() {
            let wait = Duration::from_millis(LOG_FLUSH_MS_MAX);
            let finished = tokio::task::spawn_blocking(move || access.finish(wait));
            let written = finished.await.unwrap_or_default();
            let queued = self.sum(ShardMetrics::access_log_lines);
            let lost = queued.saturating_sub(written);
            if lost > 0 {
                tracing::warn!(
                    "access log: {lost} lines were lost, because the log could not be written \
                     within {LOG_FLUSH_MS_MAX} ms"
                );
            }
        }
        if let Some(traces) = self.traces.take()
            && !is_cut
        {
            // The process is ended soon after the deadline.
            match end {
                Some(end) => drop(timeout_at(end, traces.finish()).await),
                None => traces.finish().await,
            }
        }
        self.log_end(is_cut);
        Ok(())
    }

    /// Reads what files hold again, and opens the logs again.
    fn reload(&self) {
        reopen_log();
        if let Some(access) = &self.access {
            access.reopen();
        }
        watch::read_again();
        self.reload.ask();
    }

    /// Logs what the process has served.
    fn log_end(&self, is_cut: bool) {
        let requests = self.sum(ShardMetrics::requests);
        let failed = self.sum(ShardMetrics::requests_failed);
        let uptime_s = self.started.elapsed().as_secs();
        let how = if is_cut { "cut" } else { "drained" };
        tracing::info!(requests, failed, uptime_s, "ended: {how}");
    }

    fn sum(&self, count: impl Fn(&ShardMetrics) -> u64) -> u64 {
        self.shard_metrics.iter().map(|shard| count(shard)).sum()
    }

    /// Makes the shards end, which cuts the requests that are open, and logs how many these are.
    async fn cut(&mut self) {
        for inbox in &self.inboxes {
            inbox.send(Message::Cut);
        }
        let wait = Duration::from_millis(CUT_MS_MAX);
        let all = async { while self.ended.recv().await.is_some() {} };
        let _ = tokio::time::timeout(wait, all).await;
        let cut = self.sum(|shard| shard.faults(Fault::Drained.index()));
        tracing::warn!(
            "drain incomplete: {cut} open requests were cut (--drain-timeout limits the wait)"
        );
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

fn reopen_log() {
    if let Some(log) = cli::log_queues() {
        log.reopen();
    }
}

/// Waits for a signal to end that is not a repetition of the first one: some supervisors send both
/// SIGINT and SIGTERM, or to each process and to its group.
async fn second_end(signals: &mut Signals, first: Instant) {
    loop {
        match signals.next().await {
            Signal::End if first.elapsed() >= Duration::from_millis(SAME_SIGNAL_MS_MAX) => return,
            Signal::End => {}
            Signal::Reload => reopen_log(),
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
