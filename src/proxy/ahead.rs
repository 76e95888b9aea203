//! The bytes received from a client that no request has consumed yet.
//!
//! A request is taken from the front. If others follow it, as with a client that pipelines, it is
//! copied and they stay where they are. So each byte is copied once, no matter how many requests
//! arrive together. Only the end of a chunked body is not known before it is read: what follows it
//! is put back. Without bytes there is no buffer, so an idle connection holds none.

use crate::upstream::Buffers;

/// Received bytes, in order.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    bytes: Vec<u8>,
    /// Number of bytes at the front of `bytes` that have been taken.
    begin: usize,
}

impl Ahead {
    /// Returns the bytes that have not been taken.
    pub(super) fn unread(&self) -> &[u8] {
        &self.bytes[self.begin..]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.unread().is_empty()
    }

    /// Takes `len` bytes from the front, or all if there are fewer. Returns the buffer itself if it
    /// contains no others.
    pub(super) fn take(&mut self, len: usize, buffers: &Buffers) -> Vec<u8> {
        let unread = self.unread();
        if self.begin == 0 && unread.len() <= len {
            return self.take_buffer();
        }
        let len = len.min(unread.len());
        let taken = buffers.copy(&unread[..len]);
        self.begin += len;
        if self.is_empty() {
            buffers.recycle(self.take_buffer());
        }
        taken
    }

    /// Appends received bytes. Copies nothing if there are no others.
    pub(super) fn append(&mut self, received: Vec<u8>, buffers: &Buffers) {
        if self.is_empty() {
            self.bytes = received;
            return;
        }
        // Each byte that is moved here makes up for one that has been taken.
        if self.begin >= self.unread().len() {
            self.bytes.drain(..self.begin);
            self.begin = 0;
        }
        self.bytes.extend_from_slice(&received);
        buffers.recycle(received);
    }

    /// Puts bytes back in front of the others.
    pub(super) fn put_back(&mut self, bytes: &[u8]) {
        if let Some(begin) = self.begin.checked_sub(bytes.len()) {
            self.bytes[begin..self.begin].copy_from_slice(bytes);
            self.begin = begin;
        } else {
            self.bytes.splice(..self.begin, bytes.iter().copied());
            self.begin = 0;
        }
    }

    /// Puts `bytes[begin..]` back in front of the others. If there are none, keeps the buffer and
    /// copies nothing.
    pub(super) fn restore(&mut self, bytes: Vec<u8>, begin: usize, buffers: &Buffers) {
        if !self.is_empty() {
            self.put_back(&bytes[begin..]);
            buffers.recycle(bytes);
        } else if begin < bytes.len() {
            *self = Self { bytes, begin };
        } else {
            buffers.recycle(bytes);
        }
    }

    /// Returns the buffer and leaves no bytes.
    fn take_buffer(&mut self) -> Vec<u8> {
        std::mem::take(self).bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares it with a plain vector under random operations.
    #[test]
    fn bytes_are_taken_and_put_back_in_order() {
        let buffers = Buffers::new();
        let (mut ahead, mut want) = (Ahead::default(), Vec::new());
        let mut random = 7_u64;
        let mut next = 0_u8;
        for _ in 0..50_000 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let size = (random >> 40) as usize % 9;
            match (random >> 33) % 5 {
                0 | 1 => {
                    let received: Vec<u8> = (0..size as u8).map(|i| next.wrapping_add(i)).collect();
                    next = next.wrapping_add(size as u8);
                    want.extend_from_slice(&received);
                    ahead.append(received, &buffers);
                }
                2 => {
                    let taken = ahead.take(size, &buffers);
                    assert_eq!(taken, want[..size.min(want.len())]);
                    want.drain(..taken.len());
                    if random >> 63 == 0 {
                        // A request that ends within what was taken for it.
                        let kept = taken.len() / 2;
                        want.splice(..0, taken[kept..].iter().copied());
                        ahead.restore(taken, kept, &buffers);
                    }
                }
                3 => {
                    let taken = ahead.take(usize::MAX, &buffers);
                    assert_eq!(taken, want);
                    let kept = size.min(taken.len());
                    want.drain(..kept);
                    ahead.restore(taken, kept, &buffers);
                }
                _ => {
                    let bytes = vec![next; size];
                    ahead.put_back(&bytes);
                    want.splice(..0, bytes);
                }
            }
            assert_eq!(ahead.unread(), want);
            assert_eq!(ahead.is_empty(), want.is_empty());
            assert_eq!(ahead.bytes.capacity() == 0, want.is_empty());
            assert!(
                ahead.bytes.len() <= 2 * want.len() + 64,
                "memory is bounded"
            );
        }
    }
}
