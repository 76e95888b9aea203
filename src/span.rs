//! A byte range in a buffer owned elsewhere.

/// A half-open byte range `start..end` in a buffer owned elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Span {
    /// Offset of the first byte.
    pub start: usize,
    /// Offset one past the last byte; never less than `start`.
    pub end: usize,
}

impl Span {
    /// Creates the range `start..end`.
    #[must_use]
    pub const fn new(start: usize, end: usize) -> Self {
        debug_assert!(start <= end);
        Self { start, end }
    }

    /// Returns the range of `part`, which must be a part of `buffer`.
    #[must_use]
    pub fn within(buffer: &[u8], part: &[u8]) -> Self {
        let start = part.as_ptr().addr() - buffer.as_ptr().addr();
        debug_assert!(
            start + part.len() <= buffer.len(),
            "not a part of the buffer"
        );
        Self::new(start, start + part.len())
    }

    /// Returns the length in bytes.
    #[must_use]
    pub const fn len(self) -> usize {
        self.end - self.start
    }

    /// Returns whether the range is empty.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// Returns the bytes of this range in `buffer`, which must be the buffer the span was made for.
    #[must_use]
    pub fn of(self, buffer: &[u8]) -> &[u8] {
        &buffer[self.start..self.end]
    }
}
