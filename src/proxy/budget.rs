//! The limit on buffered request body bytes in the whole process.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The process-wide budget of buffered body bytes. A request reserves bytes before it reads them,
/// so a flood of large prompts is rejected immediately instead of exhausting the memory.
#[derive(Debug)]
pub struct Budget {
    bytes_max: u64,
    used: AtomicU64,
}

impl Budget {
    /// Creates a budget of `bytes_max` bytes.
    #[must_use]
    pub fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Self {
            bytes_max,
            used: AtomicU64::new(0),
        })
    }

    /// Bytes currently reserved by all requests of the process.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn try_reserve(&self, bytes: u64) -> bool {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.bytes_max);
        // Relaxed suffices: the counter limits an amount and does not order other memory accesses.
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits)
            .is_ok()
    }
}

/// The bytes reserved by one request; returned to the budget on drop.
#[derive(Debug)]
pub(super) struct Reserved {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Reserved {
    /// Creates a reservation of 0 bytes.
    pub(super) fn new(budget: &Arc<Budget>) -> Self {
        Self {
            budget: Arc::clone(budget),
            bytes: 0,
        }
    }

    /// Grows the reservation to a total of `bytes`. Returns `false`, and reserves nothing more, if
    /// the budget does not allow it.
    pub(super) fn grow_to(&mut self, bytes: u64) -> bool {
        let more = bytes.saturating_sub(self.bytes);
        if !self.budget.try_reserve(more) {
            return false;
        }
        self.bytes += more;
        true
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservations_never_exceed_the_budget_and_are_returned() {
        let budget = Budget::new(100);
        let mut first = Reserved::new(&budget);
        let mut second = Reserved::new(&budget);
        assert!(first.grow_to(60) && first.grow_to(60) && first.grow_to(10));
        assert!(second.grow_to(40));
        assert!(!second.grow_to(41) && !first.grow_to(u64::MAX));
        assert_eq!(budget.used(), 100);
        drop(first);
        assert!(second.grow_to(100));
        drop(second);
        assert_eq!(budget.used(), 0);
    }
}
