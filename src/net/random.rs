//! The random numbers of a shard.

use std::cell::Cell;
use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Numbers that one system call returns.
const NUMBERS: usize = 64;

/// Random numbers of the operating system. Transfer ids and bootstrap rooms are made of them, so
/// no client may be able to compute one from others, such as the request ids in responses.
pub(super) struct Random {
    numbers: [Cell<u64>; NUMBERS],
    left: Cell<usize>,
}

impl Random {
    /// Takes the first numbers.
    ///
    /// # Errors
    /// The system call is not permitted.
    pub(super) fn new() -> io::Result<Self> {
        let random = Self {
            numbers: [const { Cell::new(0) }; NUMBERS],
            left: Cell::new(0),
        };
        random.refill()?;
        Ok(random)
    }

    pub(super) fn next(&self) -> u64 {
        // After a first success, a call can only fail because a signal has interrupted it.
        while self.left.get() == 0 {
            let _ = self.refill();
        }
        let at = self.left.get() - 1;
        self.left.set(at);
        self.numbers[at].take()
    }

    fn refill(&self) -> io::Result<()> {
        let mut bytes = [0; NUMBERS * size_of::<u64>()];
        let filled = getrandom(&mut bytes, GetRandomFlags::empty())?;
        let numbers = bytes[..filled].as_chunks::<{ size_of::<u64>() }>().0;
        for (number, bytes) in self.numbers.iter().zip(numbers) {
            number.set(u64::from_ne_bytes(*bytes));
        }
        self.left.set(numbers.len());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_do_not_repeat() {
        let random = Random::new().unwrap();
        let mut numbers: Vec<_> = (0..5 * NUMBERS).map(|_| random.next()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 5 * NUMBERS);
    }
}
