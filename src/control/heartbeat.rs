//! Pings the shards and reports those that do not respond.
//!
//! Missed pings are counted, not time: after a pause of the whole machine every shard may respond
//! first.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::time::MissedTickBehavior;

use super::inbox::Inbox;
use crate::limits::{PING_SECS, PINGS_MISSED_MAX};

/// The number of consecutive pings that each shard has missed.
#[derive(Clone, Debug)]
pub(super) struct Missed(Arc<[AtomicU32]>);

impl Missed {
    /// Returns the number of shards.
    pub(super) fn shards(&self) -> usize {
        self.0.len()
    }

    /// Returns the indices of the shards that are stuck.
    pub(super) fn stuck(&self) -> Vec<usize> {
        let counts = self.0.iter().enumerate();
        let stuck = counts.filter(|(_, missed)| missed.load(Ordering::Relaxed) >= PINGS_MISSED_MAX);
        stuck.map(|(index, _)| index).collect()
    }
}

/// Spawns the task that pings the shards.
pub(super) fn follow(inboxes: &[Inbox]) -> Missed {
    let missed = Missed(inboxes.iter().map(|_| AtomicU32::new(0)).collect());
    tokio::spawn(ping(inboxes.to_vec(), missed.clone()));
    missed
}

async fn ping(inboxes: Vec<Inbox>, missed: Missed) {
    let mut interval = tokio::time::interval(Duration::from_secs(PING_SECS));
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut beats = vec![0; inboxes.len()];
    loop {
        interval.tick().await;
        for (index, inbox) in inboxes.iter().enumerate() {
            let before = std::mem::replace(&mut beats[index], inbox.beats());
            let count = next_missed(
                missed.0[index].load(Ordering::Relaxed),
                before,
                beats[index],
            );
            missed.0[index].store(count, Ordering::Relaxed);
            if count == PINGS_MISSED_MAX {
                tracing::error!(
                    shard = index,
                    "the shard has not run for {} s: its connections make no progress, and /livez \
                     returns 503",
                    u64::from(PINGS_MISSED_MAX) * PING_SECS
                );
            }
            inbox.ping();
        }
    }
}

/// Returns how many pings a shard has missed, given the count before and its beats before and
/// after the last ping.
const fn next_missed(missed: u32, before: u64, beats: u64) -> u32 {
    if beats == before && beats != Inbox::ENDED {
        missed.saturating_add(1)
    } else {
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_consecutive_missed_pings_count() {
        let mut missed = 0;
        let mut before = 0;
        for (beats, want) in [(1, 0), (1, 1), (1, 2), (2, 0), (5, 0), (5, 1)] {
            missed = next_missed(missed, before, beats);
            assert_eq!(missed, want);
            before = beats;
        }
        assert_eq!(next_missed(9, Inbox::ENDED, Inbox::ENDED), 0);
        let missed = Missed(
            [0, PINGS_MISSED_MAX, PINGS_MISSED_MAX - 1]
                .map(AtomicU32::new)
                .into(),
        );
        assert_eq!(missed.stuck(), [1]);
    }
}
