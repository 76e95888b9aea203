//! Returns memory to the system after a peak of what requests keep.

use std::sync::Arc;
use std::time::Duration;

use crate::budget::Budget;
use crate::limits::{GIVE_BACK_BYTES_MIN, GIVE_BACK_LOW_SECS, GIVE_BACK_PAUSE_SECS};
use crate::sys;

/// Time between two comparisons: the limits count seconds.
const TICK: Duration = Duration::from_secs(1);

/// Spawns the task that compares what is kept with its peak, and returns free memory to the system
/// if the difference is large and lasts.
pub(super) fn follow(budget: Arc<Budget>) {
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(TICK);
        let mut decision = Decision::default();
        loop {
            interval.tick().await;
            if decision.is_due(budget.used(), budget.peak()) {
                budget.restart_peak();
                // On another thread, because it takes milliseconds. It does not panic.
                let _ = tokio::task::spawn_blocking(sys::release_free_memory).await;
            }
        }
    });
}

/// Decides when memory is returned.
#[derive(Debug, Default)]
struct Decision {
    /// Consecutive seconds for which much less was kept than at the peak.
    low: u32,
    /// Seconds until memory may be returned again.
    pause: u32,
}

impl Decision {
    /// Returns whether memory is to be returned at this tick. It is not while what is kept goes up
    /// and down, because the next peak would fault the pages in again.
    fn is_due(&mut self, used: u64, peak: u64) -> bool {
        self.pause = self.pause.saturating_sub(1);
        if peak.saturating_sub(used) < GIVE_BACK_BYTES_MIN {
            self.low = 0;
            return false;
        }
        self.low += 1;
        let is_due = self.low >= GIVE_BACK_LOW_SECS && self.pause == 0;
        if is_due {
            *self = Self {
                low: 0,
                pause: GIVE_BACK_PAUSE_SECS,
            };
        }
        is_due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_returned_after_a_peak_that_has_passed() {
        let (low, high) = (1000, 1000 + GIVE_BACK_BYTES_MIN);
        let mut decision = Decision::default();
        for _ in 0..10 {
            assert!(!decision.is_due(low, high - 1), "a small peak");
            assert!(!decision.is_due(low, high), "it has just passed");
            assert!(!decision.is_due(high, high), "it lasts");
        }
        let mut due = (0..GIVE_BACK_LOW_SECS).map(|_| decision.is_due(low, high));
        assert_eq!(
            due.by_ref().position(|due| due),
            Some(GIVE_BACK_LOW_SECS as usize - 1)
        );
        for _ in 1..GIVE_BACK_PAUSE_SECS {
            assert!(!decision.is_due(low, high), "the next peak was soon");
        }
        assert!(decision.is_due(low, high));
    }
}
