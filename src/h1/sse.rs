//! Counting server-sent events in a stream that passes by.
//!
//! This is bookkeeping for time to first token and tokens per stream; the end of a stream is
//! told by its framing alone, since not every API sends a last event. A lone CR as line end,
//! which the format allows, is not recognised: no engine sends it, and such a stream merely
//! counts no events.

use memchr::memchr_iter;

/// Counts the events of one stream, fed in any pieces.
#[derive(Clone, Copy, Debug, Default)]
pub struct SseEvents {
    /// Bytes of the current line seen in earlier pieces, as many as [`PREFIX_BYTES_MAX`].
    prefix: [u8; PREFIX_BYTES_MAX],
    prefix_len: usize,
    /// The current block has a data line.
    data: bool,
    events: u64,
}

/// `data:` is all that has to be recognised of a line.
const PREFIX_BYTES_MAX: usize = 5;

impl SseEvents {
    /// A counter at the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next piece of the stream: how many events it completed. A block is an event when
    /// it has a data line; comments, such as keep-alives, are none. `data: [DONE]` is one.
    pub fn feed(&mut self, piece: &[u8]) -> u32 {
        let mut completed = 0;
        let mut start = 0;
        for end in memchr_iter(b'\n', piece) {
            self.keep_prefix(&piece[start..end]);
            completed += u32::from(self.end_line());
            start = end + 1;
        }
        self.keep_prefix(&piece[start..]);
        self.events += u64::from(completed);
        completed
    }

    /// Whether an event with data has been completed.
    #[must_use]
    pub const fn has_data(&self) -> bool {
        self.events > 0
    }

    /// Events completed so far.
    #[must_use]
    pub const fn events(&self) -> u64 {
        self.events
    }

    fn keep_prefix(&mut self, part: &[u8]) {
        let room = &mut self.prefix[self.prefix_len..];
        let len = room.len().min(part.len());
        room[..len].copy_from_slice(&part[..len]);
        self.prefix_len += len;
    }

    /// Ends the current line; whether that ended an event.
    fn end_line(&mut self) -> bool {
        let line = &self.prefix[..self.prefix_len];
        self.prefix_len = 0;
        match line {
            [] | b"\r" => std::mem::take(&mut self.data),
            b"data:" | b"data" | b"data\r" => {
                self.data = true;
                false
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_counted_at_any_split() {
        let cases: &[(&[u8], u64)] = &[
            (b"", 0),
            (b"data: 1\n", 0),
            (b"data: 1\n\n", 1),
            (b"data: 1\r\n\r\n", 1),
            (b"data:1\n\ndata: [DONE]\n\n", 2),
            (b"event: x\ndata: 1\n\n", 1),
            (b"data: 1\ndata: 2\n\n", 1),
            (b"data\n\n", 1),
            (b"data\r\n\r\n", 1),
            (b": keep-alive\n\n", 0),
            (b"\n\n\n", 0),
            (b"datax: 1\n\ndat\n\n data: 1\n\n", 0),
            (b"id: 1\n\n: x\n\ndata: 1\n\n", 1),
            (b"data: 1\n\r\r\n\n", 1),
        ];
        for (data, want) in cases {
            for split in 0..=data.len() {
                let mut events = SseEvents::new();
                let first = events.feed(&data[..split]);
                assert_eq!(events.has_data(), first > 0);
                let second = events.feed(&data[split..]);
                assert_eq!(u64::from(first + second), *want, "{}", data.escape_ascii());
            }
            let mut events = SseEvents::new();
            for byte in data.chunks(1) {
                events.feed(byte);
            }
            assert_eq!(events.events(), *want, "{}", data.escape_ascii());
        }
    }
}
