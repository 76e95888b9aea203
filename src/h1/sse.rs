//! Counts the server-sent events of a stream that arrives in parts.
//!
//! The counts are intended for measurements such as time to first token and tokens per stream. They
//! do not determine the end of a stream: only its framing does, because not every API sends a final
//! event.
//!
//! A lone CR as line end, which the format allows, is not recognised. No engine sends it, and the
//! only effect is that the events of such a stream are not counted.

use memchr::memchr_iter;

/// Counts the events of one stream, which may be split at any byte.
#[derive(Clone, Copy, Debug, Default)]
pub struct SseEvents {
    /// The first bytes of the current line, at most [`PREFIX_BYTES_MAX`].
    prefix: [u8; PREFIX_BYTES_MAX],
    prefix_len: usize,
    /// Whether a line since the last blank line is a `data` line.
    data: bool,
    events: u64,
}

/// Length of `data:`, the longest prefix of a line that must be recognised.
const PREFIX_BYTES_MAX: usize = 5;

impl SseEvents {
    /// Creates a counter for a new stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Processes the next part of the stream and returns the number of events it completed.
    ///
    /// The lines up to a blank line count as an event if one of them is a `data` line. Comments,
    /// such as keep-alives, do not count; `data: [DONE]` does.
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

    /// Returns whether an event with data has been completed.
    #[must_use]
    pub const fn has_data(&self) -> bool {
        self.events > 0
    }

    /// Returns the number of events completed so far.
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

    /// Ends the current line and returns whether that completed an event.
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
