//! The buffers of one shard: two for receiving bodies and tokens, and recycled ones for requests,
//! heads and fields.

use std::cell::RefCell;

use crate::h1::Field;
use crate::limits::{
    KEPT_RECEIVED_BYTES_MIN, RECEIVE_LARGE_BYTES, RECEIVE_SMALL_BYTES, RECYCLED_BUFFER_BYTES_MAX,
    RECYCLED_BUFFERS_MAX, RECYCLED_FIELDS_MAX, RECYCLED_RECEIVED_MAX,
};

/// Initial capacity in bytes of a buffer from [`Buffers::buffer`]; enough for a typical head.
const SMALL_BUFFER_BYTES: usize = 1024;

/// The buffers of one shard. Owned by one thread.
pub(crate) struct Buffers {
    small: RefCell<Box<[u8]>>,
    large: RefCell<Box<[u8]>>,
    spare: RefCell<Vec<Vec<u8>>>,
    /// Buffers for requests, each with a capacity of `RECEIVE_SMALL_BYTES`.
    spare_received: RefCell<Vec<Vec<u8>>>,
    spare_fields: RefCell<Vec<Vec<Field>>>,
}

impl Buffers {
    pub(crate) fn new() -> Self {
        Self {
            small: RefCell::new(vec![0; RECEIVE_SMALL_BYTES].into_boxed_slice()),
            large: RefCell::new(Box::default()),
            spare: RefCell::new(Vec::new()),
            spare_received: RefCell::new(Vec::new()),
            spare_fields: RefCell::new(Vec::new()),
        }
    }

    /// Calls `work` with the shard's receive buffer for heads and tokens. `work` is synchronous, so
    /// the buffer is never in use across an await.
    pub(crate) fn with_small<T>(&self, work: impl FnOnce(&mut [u8]) -> T) -> T {
        work(&mut self.small.borrow_mut())
    }

    /// Calls `work` with the shard's receive buffer for bodies, under the same rule as
    /// [`Buffers::with_small`]. The buffer is allocated on first use: a shard whose bodies always
    /// arrive with their heads does not need it.
    pub(crate) fn with_large<T>(&self, work: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut large = self.large.borrow_mut();
        if large.is_empty() {
            *large = vec![0; RECEIVE_LARGE_BYTES].into_boxed_slice();
        }
        work(&mut large)
    }

    /// Returns an empty buffer, a recycled one if available.
    pub(crate) fn buffer(&self) -> Vec<u8> {
        let spare = self.spare.borrow_mut().pop();
        spare.unwrap_or_else(|| Vec::with_capacity(SMALL_BUFFER_BYTES))
    }

    /// Returns a buffer that contains `bytes`.
    pub(crate) fn copy(&self, bytes: &[u8]) -> Vec<u8> {
        let mut buffer = self.buffer();
        buffer.reserve_exact(bytes.len());
        buffer.extend_from_slice(bytes);
        buffer
    }

    /// Calls `receive` with an empty buffer of `RECEIVE_SMALL_BYTES` and returns what it has
    /// appended: that buffer if it holds at least `KEPT_RECEIVED_BYTES_MIN`, otherwise a copy that
    /// takes no more memory than it needs.
    ///
    /// # Errors
    /// The error of `receive`.
    pub(crate) fn receive<E>(
        &self,
        receive: impl FnOnce(&mut Vec<u8>) -> Result<usize, E>,
    ) -> Result<Vec<u8>, E> {
        let spare = self.spare_received.borrow_mut().pop();
        let mut buffer = spare.unwrap_or_else(|| Vec::with_capacity(RECEIVE_SMALL_BYTES));
        let received = receive(&mut buffer);
        if buffer.len() >= KEPT_RECEIVED_BYTES_MIN {
            return received.map(|_| buffer);
        }
        let copied = received.map(|count| match count {
            0 => Vec::new(),
            _ => self.copy(&buffer),
        });
        self.recycle(buffer);
        copied
    }

    /// Keeps a buffer for reuse. It is freed instead if its capacity is neither
    /// `RECEIVE_SMALL_BYTES` nor at most `RECYCLED_BUFFER_BYTES_MAX`, or enough buffers are kept.
    pub(crate) fn recycle(&self, mut buffer: Vec<u8>) {
        let (spare, count_max) = match buffer.capacity() {
            RECEIVE_SMALL_BYTES => (&self.spare_received, RECYCLED_RECEIVED_MAX),
            1..=RECYCLED_BUFFER_BYTES_MAX => (&self.spare, RECYCLED_BUFFERS_MAX),
            _ => return,
        };
        let mut spare = spare.borrow_mut();
        if spare.len() < count_max {
            buffer.clear();
            spare.push(buffer);
        }
    }

    /// Returns an empty list of header fields, a recycled one if available.
    pub(crate) fn fields(&self) -> Vec<Field> {
        let spare = self.spare_fields.borrow_mut().pop();
        spare.unwrap_or_default()
    }

    /// Keeps a list of header fields for reuse. It is freed instead if its capacity is larger than
    /// `RECYCLED_FIELDS_MAX` or enough lists are kept.
    pub(crate) fn recycle_fields(&self, mut fields: Vec<Field>) {
        let mut spare = self.spare_fields.borrow_mut();
        if (1..=RECYCLED_FIELDS_MAX).contains(&fields.capacity())
            && spare.len() < RECYCLED_BUFFERS_MAX
        {
            fields.clear();
            spare.push(fields);
        }
    }
}
