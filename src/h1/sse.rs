//! Finds the data of an event stream that arrives in parts (section 9.2.6 of the WHATWG HTML
//! standard): LF, CR and CRLF end a line.
//!
//! Lines do not determine the end of a stream: only its framing does, because not every API sends a
//! final event.

use memchr::{memchr, memchr2};

/// Returns whether a `Content-Type` is that of an event stream. Parameters are ignored; the names
/// of media types are compared without case (RFC 9110 8.3.1).
#[must_use]
pub fn is_event_stream(content_type: &[u8]) -> bool {
    let end = memchr(b';', content_type).unwrap_or(content_type.len());
    let media_type = content_type[..end].trim_ascii();
    media_type.eq_ignore_ascii_case(b"text/event-stream")
}

/// Start of the lines that carry data.
const FIELD: &[u8; 5] = b"data:";

/// Splits one stream into the data of its lines. The stream may be split at any byte.
#[derive(Clone, Copy, Debug, Default)]
pub struct DataLines {
    at: Position,
}

/// Position of the next byte in its line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Position {
    #[default]
    Start,
    /// After this number of bytes of `data:`.
    Field(usize),
    /// After `data:`, where one space may follow.
    Blank,
    /// After `data: `, where the data begins.
    First,
    /// Within the data.
    Data,
    /// In a line without data.
    Other,
}

/// A part of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinePart {
    /// Bytes `start..end` of the piece are data of the line. `begins` is whether its data begins
    /// here. Data is never empty.
    Data {
        /// Position of the first byte.
        start: usize,
        /// Position after the last byte.
        end: usize,
        /// Whether these are the first bytes of the line's data.
        begins: bool,
    },
    /// The line has ended. `is_data` is whether it is a `data` line, perhaps without data.
    End {
        /// Whether it is a `data` line.
        is_data: bool,
    },
}

impl DataLines {
    /// Returns whether the next byte begins a line. The caller may then skip whole lines.
    #[must_use]
    pub fn is_at_line_start(&self) -> bool {
        self.at == Position::Start
    }

    /// Returns the next part in `piece` from `*from` on, and advances `from` past it. Returns
    /// `None` at the end of `piece`; the next call then continues with the next piece.
    pub fn next(&mut self, piece: &[u8], from: &mut usize) -> Option<LinePart> {
        #[cfg(test)]
        let start = *from;
        let part = self.part(piece, from);
        #[cfg(test)]
        crate::work::count(*from - start);
        part
    }

    fn part(&mut self, piece: &[u8], from: &mut usize) -> Option<LinePart> {
        while let Some(&byte) = piece.get(*from) {
            let is_end = matches!(byte, b'\n' | b'\r');
            match self.at {
                _ if is_end => {
                    *from += 1;
                    let is_data =
                        matches!(self.at, Position::Blank | Position::First | Position::Data);
                    self.at = Position::Start;
                    return Some(LinePart::End { is_data });
                }
                Position::Start => self.at = Position::Field(0),
                Position::Field(known) if byte == FIELD[known] => {
                    *from += 1;
                    self.at = match known + 1 {
                        known if known < FIELD.len() => Position::Field(known),
                        _ => Position::Blank,
                    };
                }
                Position::Field(_) => self.at = Position::Other,
                Position::Blank if byte == b' ' => {
                    *from += 1;
                    self.at = Position::First;
                }
                Position::Other => *from = line_end(piece, *from),
                Position::Blank | Position::First | Position::Data => {
                    let (start, begins) = (*from, self.at != Position::Data);
                    let end = line_end(piece, start);
                    *from = end;
                    self.at = Position::Data;
                    return Some(LinePart::Data { start, end, begins });
                }
            }
        }
        None
    }
}

/// Returns the position of the next line end from `from` on, or the length of `piece`.
fn line_end(piece: &[u8], from: usize) -> usize {
    memchr2(b'\n', b'\r', &piece[from..]).map_or(piece.len(), |end| from + end)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the data of each `data` line that has ended, given the stream in pieces.
    fn data<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<String> {
        let mut lines = DataLines::default();
        let (mut all, mut open) = (Vec::new(), Vec::new());
        for piece in pieces {
            let mut at = 0;
            while let Some(part) = lines.next(piece, &mut at) {
                match part {
                    LinePart::Data { start, end, begins } => {
                        assert_eq!(begins, open.is_empty());
                        assert!(start < end, "data is never empty");
                        open.extend_from_slice(&piece[start..end]);
                    }
                    LinePart::End { is_data: true } => {
                        all.push(String::from_utf8(std::mem::take(&mut open)).unwrap());
                    }
                    LinePart::End { is_data: false } => assert!(open.is_empty()),
                }
            }
            assert_eq!(at, piece.len());
        }
        all
    }

    #[test]
    fn data_is_found_at_any_split() {
        let cases: &[(&[u8], &[&str])] = &[
            (b"", &[]),
            (b"data: 1", &[]),
            (b"data: 1\n", &["1"]),
            (b"data: 1\r\n\r\n", &["1"]),
            (b"data: 1\rdata:2\r", &["1", "2"]),
            (b"data:1\n\ndata: [DONE]\n\n", &["1", "[DONE]"]),
            (b"event: x\ndata: 1\n\n", &["1"]),
            (b"data:\ndata: \ndata:  x\n", &["", "", " x"]),
            (b"data\n\ndatax: 1\n\ndat\n\n data: 1\n\n", &[]),
            (
                b": keep-alive\n\nid: 1\ndata: {\"a\":1}\n\n",
                &["{\"a\":1}"],
            ),
            (b"da\ndata: data: x\n", &["data: x"]),
        ];
        for (stream, want) in cases {
            for split in 0..=stream.len() {
                let pieces = [&stream[..split], &stream[split..]];
                assert_eq!(data(pieces), *want, "{}", stream.escape_ascii());
            }
            assert_eq!(data(stream.chunks(1)), *want, "{}", stream.escape_ascii());
        }
    }
}
