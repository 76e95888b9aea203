//! Logs incidents that shards report: each kind at most once per `SAME_AGAIN` and engine, with the
//! number of incidents since the previous line.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::fault::Incident;

/// Capacity of the queue from the shards to the logging task, for the whole process. Incidents
/// beyond it are counted in metrics but not logged.
const INCIDENTS_MAX: usize = 64;
/// Kinds and engines of which the last log line is remembered. Incidents of more of them within
/// `SAME_AGAIN` are counted in metrics but not logged.
const REMEMBERED_MAX: usize = 256;
/// Minimum interval between two log lines about the same kind and engine.
const SAME_AGAIN: Duration = Duration::from_secs(30);

/// Passes incidents to the task that logs them. Usable from any thread.
#[derive(Clone)]
pub(super) struct Incidents(mpsc::Sender<Incident>);

impl Incidents {
    /// Spawns the task that logs incidents.
    pub(super) fn start() -> Self {
        let (sender, reported) = mpsc::channel(INCIDENTS_MAX);
        tokio::spawn(write(reported));
        Self(sender)
    }

    /// Queues an incident for the log without blocking. If the queue is full, it is dropped.
    pub(super) fn record(&self, incident: Incident) {
        // If the queue is full, it already holds enough incidents to log.
        let _ = self.0.try_send(incident);
    }
}

async fn write(mut reported: mpsc::Receiver<Incident>) {
    let mut written: HashMap<(&'static str, String), (Instant, u64)> = HashMap::new();
    while let Some(incident) = reported.recv().await {
        if written.len() >= REMEMBERED_MAX {
            written.retain(|_, (at, _)| at.elapsed() < SAME_AGAIN);
        }
        if written.len() >= REMEMBERED_MAX && !written.contains_key(&incident.key()) {
            continue;
        }
        match written.get_mut(&incident.key()) {
            Some((at, more)) if at.elapsed() < SAME_AGAIN => *more += 1,
            Some((at, more)) => {
                tracing::warn!("{incident} ({more} more since the last such line)");
                (*at, *more) = (Instant::now(), 0);
            }
            None => {
                tracing::warn!("{incident}");
                written.insert(incident.key(), (Instant::now(), 0));
            }
        }
    }
}
