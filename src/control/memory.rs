//! Returns memory to the system after a peak of what requests keep.

use std::sync::Arc;
use std::time::Duration;

use crate::budget::Budget;
use crate::limits::{GIVE_BACK_BYTES_MIN, GIVE_BACK_SECS};
use crate::sys;

/// Spawns the task that compares what is kept with its peak, and returns free memory to the system
/// if the difference is large.
pub(super) fn follow(budget: Arc<Budget>) {
    tokio::spawn(async move {
        let mut interval = tokio::time::interval(Duration::from_secs(GIVE_BACK_SECS));
        loop {
            interval.tick().await;
            if is_after_peak(&budget) {
                // On another thread, because it takes milliseconds. It does not panic.
                let _ = tokio::task::spawn_blocking(sys::release_free_memory).await;
            }
        }
    });
}

/// Returns whether much less is kept than at the peak, and starts the next peak.
fn is_after_peak(budget: &Budget) -> bool {
    let used = budget.used();
    let is_after = budget.peak().saturating_sub(used) >= GIVE_BACK_BYTES_MIN;
    if is_after {
        budget.restart_peak();
    }
    is_after
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Kept;

    #[test]
    fn memory_is_returned_once_after_a_peak() {
        let budget = Budget::new(u64::MAX);
        let large = usize::try_from(GIVE_BACK_BYTES_MIN).unwrap();
        let keep = |bytes| {
            let mut kept = Kept::new(&budget);
            kept.reserve_exact(bytes).unwrap();
            kept
        };
        let small = keep(1000);
        assert!(!is_after_peak(&budget));
        let peak = keep(large);
        assert!(!is_after_peak(&budget), "still kept");
        drop(peak);
        assert!(is_after_peak(&budget));
        assert!(!is_after_peak(&budget));
        drop(keep(large - 1001));
        assert!(!is_after_peak(&budget), "too small");
        drop(keep(large));
        assert!(is_after_peak(&budget), "{small:?}");
    }
}
