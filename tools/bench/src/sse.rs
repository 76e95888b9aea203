//! Splits a stream into server-sent events.
//!
//! Only `data:` lines matter here. A lone CR as a line end, which the format allows, is not
//! recognised, because no engine sends it.

use memchr::memchr;

use crate::limits::EVENT_BYTES_MAX;

/// The error for an event larger than [`EVENT_BYTES_MAX`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventTooLarge;

/// Splits one stream, which arrives in fragments of any size, into server-sent events.
#[derive(Clone, Debug, Default)]
pub struct Splitter {
    /// The bytes received so far of a line whose end has not arrived.
    line: Vec<u8>,
    /// The values of the `data:` lines of the current event, joined by line feeds.
    data: Vec<u8>,
    has_data: bool,
}

impl Splitter {
    /// Consumes the next fragment and calls `event` with the data of each event that it completes.
    /// Blocks without a data line, such as keep-alive comments, are skipped.
    ///
    /// # Errors
    /// If an event is too large, and any error that `event` returns.
    pub fn feed<E: From<EventTooLarge>>(
        &mut self,
        mut piece: &[u8],
        mut event: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while !piece.is_empty() {
            let end = memchr(b'\n', piece);
            let part = &piece[..end.unwrap_or(piece.len())];
            if self.line.len() + self.data.len() + part.len() > EVENT_BYTES_MAX {
                return Err(EventTooLarge.into());
            }
            self.line.extend_from_slice(part);
            let Some(end) = end else { break };
            piece = &piece[end + 1..];
            if self.end_line() {
                event(&self.data)?;
                self.data.clear();
            }
        }
        Ok(())
    }

    /// Returns whether the bytes so far end within an event.
    #[must_use]
    pub fn is_inside(&self) -> bool {
        !self.line.is_empty() || self.has_data
    }

    /// Processes the end of the current line and returns whether it completed an event.
    fn end_line(&mut self) -> bool {
        let line = self.line.strip_suffix(b"\r").unwrap_or(&self.line);
        let ended = line.is_empty() && std::mem::take(&mut self.has_data);
        let value = match line.strip_prefix(b"data") {
            Some(b"") => Some(&b""[..]),
            Some(rest) => rest
                .strip_prefix(b":")
                .map(|value| value.strip_prefix(b" ").unwrap_or(value)),
            None => None,
        };
        if let Some(value) = value {
            if self.has_data {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(value);
            self.has_data = true;
        }
        self.line.clear();
        ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(pieces: &[&[u8]]) -> Vec<String> {
        let mut splitter = Splitter::default();
        let mut events = Vec::new();
        for piece in pieces {
            let taken: Result<(), EventTooLarge> = splitter.feed(piece, |data| {
                events.push(String::from_utf8_lossy(data).into_owned());
                Ok(())
            });
            taken.unwrap();
        }
        if splitter.is_inside() {
            events.push("(inside)".to_owned());
        }
        events
    }

    #[test]
    fn events_are_the_same_at_any_split() {
        let cases: &[(&str, &[&str])] = &[
            ("", &[]),
            ("data: 1\n\n", &["1"]),
            ("data:1\r\n\r\ndata:  2\r\n\r\n", &["1", " 2"]),
            ("data: 1\ndata: 2\n\n", &["1\n2"]),
            ("data\n\n", &[""]),
            ("data: 1\n", &["(inside)"]),
            ("data: 1", &["(inside)"]),
            (": alive\n\n\n\n", &[]),
            ("event: x\nid: 3\ndata: y\n\ndatax: 1\n\n", &["y"]),
            ("data: {}\n\ndata: [DONE]\n\n", &["{}", "[DONE]"]),
        ];
        for (text, want) in cases {
            let bytes = text.as_bytes();
            for at in 0..=bytes.len() {
                assert_eq!(split(&[&bytes[..at], &bytes[at..]]), *want, "{text:?} {at}");
            }
            let single: Vec<&[u8]> = bytes.chunks(1).collect();
            assert_eq!(split(&single), *want, "{text:?}");
        }
    }

    #[test]
    fn an_event_is_bounded() {
        let mut splitter = Splitter::default();
        let piece = vec![b'x'; EVENT_BYTES_MAX / 2 + 1];
        let mut feed = || splitter.feed(&piece, |_| Ok::<(), EventTooLarge>(()));
        assert_eq!(feed(), Ok(()));
        assert_eq!(feed(), Err(EventTooLarge));
    }
}
