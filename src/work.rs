//! Counts what readers do, for tests that compare the work on inputs of two sizes. Compiled only
//! for tests.

use std::cell::Cell;

thread_local! {
    static UNITS: Cell<u64> = const { Cell::new(0) };
}

/// Adds the work on `units` bytes or elements.
pub(crate) fn count(units: usize) {
    UNITS.set(UNITS.get() + units as u64);
}

/// Returns the work that `run` does.
pub(crate) fn of(run: impl FnOnce()) -> u64 {
    let before = UNITS.get();
    run();
    UNITS.get() - before
}
