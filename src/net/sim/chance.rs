//! The seeded random numbers of a simulation.

use std::cell::Cell;

/// A stream of pseudo-random numbers (splitmix64): good enough for simulated choices, and needs no
/// crate. The same seed gives the same stream.
#[derive(Debug)]
pub(super) struct Dice {
    state: Cell<u64>,
}

impl Dice {
    pub(super) const fn new(seed: u64) -> Self {
        Self {
            state: Cell::new(seed),
        }
    }

    pub(super) fn next(&self) -> u64 {
        let state = self.state.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.state.set(state);
        mix(state)
    }

    /// Returns a number below `bound`, or 0 if `bound` is 0.
    pub(super) fn below(&self, bound: u64) -> u64 {
        self.next().checked_rem(bound).unwrap_or(0)
    }

    /// Returns `true` with a probability of `in_256` / 256.
    pub(super) fn hits(&self, in_256: u8) -> bool {
        in_256 > 0 && self.below(256) < u64::from(in_256)
    }
}

/// The finalizer of splitmix64: every input bit affects every output bit.
pub(super) const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
