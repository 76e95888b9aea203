//! The limit on the bytes that the whole process keeps for its requests: bodies, and the parts of
//! engines' responses that are not relayed as they arrive.

use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::limits::{KEPT_BYTES_MIN, KEPT_STEP_BYTES};

/// The process-wide budget of kept bytes. Bytes are reserved before they are kept, so a flood of
/// large prompts or responses is rejected instead of exhausting the memory.
#[derive(Debug)]
pub struct Budget {
    bytes_max: u64,
    used: AtomicU64,
    peak: AtomicU64,
}

/// The budget does not allow more bytes to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BudgetSpent;

impl Budget {
    /// Creates a budget of `bytes_max` bytes.
    #[must_use]
    pub fn new(bytes_max: u64) -> Arc<Self> {
        Arc::new(Self {
            bytes_max,
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
        })
    }

    /// Bytes currently reserved by all requests of the process.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Returns whether `bytes` more bytes could be reserved now.
    #[must_use]
    pub fn has_room(&self, bytes: u64) -> bool {
        self.used().saturating_add(bytes) <= self.bytes_max
    }

    /// Bytes that all requests of the process may reserve.
    #[must_use]
    pub const fn bytes_max(&self) -> u64 {
        self.bytes_max
    }

    /// The most bytes that were reserved together, as far as large reservations and earlier calls
    /// have seen.
    #[must_use]
    pub fn peak(&self) -> u64 {
        let used = self.used();
        self.peak.fetch_max(used, Ordering::Relaxed).max(used)
    }

    /// Starts a new peak, with what is reserved now. One that is reached at the same time may be
    /// missed.
    pub fn restart_peak(&self) {
        self.peak.store(self.used(), Ordering::Relaxed);
    }

    fn try_reserve(&self, bytes: u64) -> bool {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.bytes_max);
        // Relaxed suffices: the counter limits an amount and does not order other memory accesses.
        let before = self
            .used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits);
        // Small reservations are not worth the second access to memory that all shards share.
        if let Ok(before) = before
            && bytes >= KEPT_STEP_BYTES as u64
        {
            self.peak.fetch_max(before + bytes, Ordering::Relaxed);
        }
        before.is_ok()
    }
}

/// The bytes reserved by one owner; returned to the budget on drop.
#[derive(Debug)]
pub struct Reserved {
    /// `None` if nothing may be reserved.
    budget: Option<Arc<Budget>>,
    bytes: u64,
}

impl Reserved {
    /// Creates a reservation of 0 bytes.
    #[must_use]
    pub fn new(budget: &Arc<Budget>) -> Self {
        Self {
            budget: Some(Arc::clone(budget)),
            bytes: 0,
        }
    }

    /// Grows the reservation to a total of `bytes`.
    ///
    /// # Errors
    /// The budget does not allow it. Nothing more is reserved.
    pub fn grow_to(&mut self, bytes: u64) -> Result<(), BudgetSpent> {
        let more = bytes.saturating_sub(self.bytes);
        let budget = self.budget.as_ref();
        if more > 0 && !budget.is_some_and(|budget| budget.try_reserve(more)) {
            return Err(BudgetSpent);
        }
        self.bytes += more;
        Ok(())
    }

    fn shrink_to(&mut self, bytes: u64) {
        let less = self.bytes.saturating_sub(bytes);
        if less > 0
            && let Some(budget) = &self.budget
        {
            budget.used.fetch_sub(less, Ordering::Relaxed);
            self.bytes -= less;
        }
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

/// A buffer whose memory is reserved in the budget for as long as it exists.
///
/// That is its capacity, except for the room for bytes that are announced (see [`Kept::announce`]):
/// the kernel provides that memory only when the bytes arrive.
pub struct Kept {
    bytes: Vec<u8>,
    reserved: Reserved,
    announced: usize,
}

impl Kept {
    /// Creates an empty buffer.
    #[must_use]
    pub fn new(budget: &Arc<Budget>) -> Self {
        Self {
            bytes: Vec::new(),
            reserved: Reserved::new(budget),
            announced: 0,
        }
    }

    /// Creates a buffer that is and stays empty.
    #[must_use]
    pub const fn empty() -> Self {
        Self {
            bytes: Vec::new(),
            reserved: Reserved {
                budget: None,
                bytes: 0,
            },
            announced: 0,
        }
    }

    /// Creates a buffer with these parts, one after the other.
    ///
    /// # Errors
    /// The budget does not allow it.
    pub fn of(budget: &Arc<Budget>, parts: &[&[u8]]) -> Result<Self, BudgetSpent> {
        let mut kept = Self::new(budget);
        kept.reserve_exact(parts.iter().map(|part| part.len()).sum())?;
        for part in parts {
            kept.bytes.extend_from_slice(part);
        }
        Ok(kept)
    }

    /// Makes room for `bytes` bytes in total.
    ///
    /// # Errors
    /// The budget does not allow it, or the memory is exhausted.
    pub fn reserve_exact(&mut self, bytes: usize) -> Result<(), BudgetSpent> {
        if bytes <= self.bytes.capacity() {
            return Ok(());
        }
        self.reserved.grow_to(bytes as u64)?;
        self.bytes
            .try_reserve_exact(bytes - self.bytes.len())
            .map_err(|_| BudgetSpent)
    }

    /// Announces that the buffer will have at most `bytes` bytes, and perhaps as many. When it
    /// becomes large, it gets the room for all of them together. Growing would copy it, and need
    /// the memory of both copies.
    pub fn announce(&mut self, bytes: usize) {
        self.announced = bytes;
    }

    /// Appends `piece`. The capacity grows by at least a quarter, so that the total cost of copying
    /// is linear and no large part of it stays unused.
    ///
    /// # Errors
    /// The budget does not allow the larger buffer, or the memory is exhausted. Nothing is
    /// appended.
    pub fn append(&mut self, piece: &[u8]) -> Result<(), BudgetSpent> {
        let wanted = self.bytes.len() + piece.len();
        if wanted > self.bytes.capacity() {
            self.make_room(wanted)?;
        }
        let step = wanted.next_multiple_of(KEPT_STEP_BYTES);
        self.reserved
            .grow_to(step.min(self.bytes.capacity()) as u64)
            .or_else(|BudgetSpent| self.reserved.grow_to(wanted as u64))?;
        self.bytes.extend_from_slice(piece);
        Ok(())
    }

    fn make_room(&mut self, wanted: usize) -> Result<(), BudgetSpent> {
        let capacity = self.bytes.capacity();
        let mut room = wanted.max(capacity + capacity / 4).max(KEPT_BYTES_MIN);
        if room > KEPT_STEP_BYTES {
            if room <= self.announced {
                self.reserved.grow_to(wanted as u64)?;
                let more = self.announced - self.bytes.len();
                return self.bytes.try_reserve_exact(more).map_err(|_| BudgetSpent);
            }
            room = room.next_multiple_of(KEPT_STEP_BYTES);
        }
        // The piece may fit even if a larger buffer does not.
        self.reserve_exact(room)
            .or_else(|BudgetSpent| self.reserve_exact(wanted))
    }

    /// Removes all bytes and returns their memory.
    pub fn clear(&mut self) {
        self.bytes = Vec::new();
        self.reserved.shrink_to(0);
    }

    /// Returns the room for announced bytes that have not arrived.
    pub fn complete(&mut self) {
        self.announced = 0;
        if self.bytes.capacity() as u64 > self.reserved.bytes {
            self.bytes.shrink_to_fit();
            self.reserved.shrink_to(self.bytes.capacity() as u64);
        }
    }

    /// Returns the bytes for changes that keep their length.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Deref for Kept {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsRef<[u8]> for Kept {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl PartialEq for Kept {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for Kept {}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.bytes.escape_ascii())
    }
}

#[cfg(any(test, feature = "fuzzing"))]
impl Kept {
    /// Creates a buffer with these bytes in an unlimited budget.
    pub fn unlimited(bytes: impl AsRef<[u8]>) -> Self {
        let mut kept = Self::new(&Budget::new(u64::MAX));
        let appended = kept.append(bytes.as_ref());
        debug_assert_eq!(appended, Ok(()), "there is no limit");
        kept
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
        for bytes in [60, 60, 10] {
            assert_eq!(first.grow_to(bytes), Ok(()));
        }
        assert_eq!(second.grow_to(40), Ok(()));
        assert_eq!(second.grow_to(41), Err(BudgetSpent));
        assert_eq!(first.grow_to(u64::MAX), Err(BudgetSpent));
        assert_eq!(budget.used(), 100);
        drop(first);
        assert_eq!(second.grow_to(100), Ok(()));
        drop(second);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn the_capacity_of_a_buffer_is_what_is_reserved() {
        let budget = Budget::new(4 * KEPT_STEP_BYTES as u64);
        let mut kept = Kept::new(&budget);
        assert_eq!(budget.used(), 0, "an empty buffer");
        let piece = [7; 1000];
        let mut appended = 0;
        while kept.append(&piece).is_ok() {
            appended += piece.len();
            assert_eq!(budget.used(), kept.bytes.capacity() as u64);
        }
        assert_eq!(kept.len(), appended, "a refused piece is not appended");
        let unused = 4 * KEPT_STEP_BYTES - appended;
        assert!(
            unused < piece.len(),
            "{unused} bytes of the budget are not used"
        );
        assert!(budget.has_room(0) && !budget.has_room(piece.len() as u64));
        kept.clear();
        assert_eq!(budget.used(), 0);
        kept.append(&piece).unwrap();
        assert_eq!(&*kept, piece);
        drop(kept);
        assert_eq!(budget.used(), 0);
        let announced = 100 * KEPT_STEP_BYTES;
        kept = Kept::new(&budget);
        kept.announce(announced);
        for size in [1, KEPT_STEP_BYTES - 1, 1, 2 * KEPT_STEP_BYTES - 1] {
            kept.append(&vec![7; size]).unwrap();
        }
        assert_eq!(kept.bytes.capacity(), announced);
        assert_eq!(budget.used(), 3 * KEPT_STEP_BYTES as u64);
        kept.append(&piece).unwrap();
        assert_eq!(budget.used(), 4 * KEPT_STEP_BYTES as u64);
        let len = kept.len();
        assert_eq!(kept.append(&vec![7; KEPT_STEP_BYTES]), Err(BudgetSpent));
        assert_eq!(kept.len(), len, "a refused piece is not appended");
        kept.complete();
        assert!(kept.bytes.capacity() < announced);
        assert_eq!(budget.used(), kept.bytes.capacity() as u64);
        drop(kept);
        assert_eq!(budget.used(), 0);
        let parts: [&[u8]; 2] = [b"ab", b"c"];
        assert_eq!(&*Kept::of(&budget, &parts).unwrap(), b"abc");
        let small = Budget::new(2);
        assert_eq!(Kept::of(&small, &parts), Err(BudgetSpent));
    }
}
