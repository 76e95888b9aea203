//! An incremental reader of HTTP/1.1 responses.
//!
//! It deliberately shares no code with the proxy: otherwise a defect of the proxy could go
//! unnoticed here. It is used for GET and POST requests only, so the response's framing depends
//! only on its head.

use std::fmt;

use memchr::{memchr, memmem};

use crate::limits::{
    CHUNK_LINE_BYTES_MAX, HEAD_BYTES_MAX, HEAD_FIELDS_MAX, INTERIM_RESPONSES_MAX, TRAILER_LINES_MAX,
};

/// The reason why received bytes are not one complete HTTP/1 response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseError {
    /// The bytes are not an HTTP/1 response head, or the status is 101, although no request
    /// contains an upgrade.
    Head,
    /// The head exceeds the limit on its size or its number of fields.
    HeadTooLarge,
    /// Too many interim (1xx) responses precede the final one.
    Interim,
    /// `content-length` and `transfer-encoding` conflict, are repeated or have an unsupported
    /// value.
    Framing,
    /// A chunk's size line, the end of a chunk or the trailer section is malformed or too long.
    Chunk,
    /// Bytes were received after the end of the response.
    TrailingBytes,
    /// The connection ended before the response was complete.
    Cut,
}

impl fmt::Display for ResponseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Head => "the response does not start with an HTTP/1 head",
            Self::HeadTooLarge => "the response head is too large",
            Self::Interim => "too many interim responses",
            Self::Framing => "the response's length or transfer coding is not supported",
            Self::Chunk => "a chunk of the response is malformed",
            Self::TrailingBytes => "bytes were received after the end of the response",
            Self::Cut => "the connection ended before the response was complete",
        })
    }
}

impl std::error::Error for ResponseError {}

/// The parts of a response head that the client uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// Status code of the response.
    pub status: u16,
    /// Whether `content-type` is `text/event-stream`.
    pub event_stream: bool,
    /// Whether the connection can be reused after this response.
    pub keep_alive: bool,
    /// The `server` field, as far as it is text; `None` if the response has none.
    pub server: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Head,
    Length(u64),
    UntilClose,
    ChunkLine,
    Chunk(u64),
    ChunkEnd,
    Trailer(u32),
    Done,
}

/// An incremental parser of one response, which may follow interim (1xx) responses.
#[derive(Clone, Debug)]
pub struct Reader {
    state: State,
    /// The bytes received so far of an incomplete head, chunk size line or trailer line.
    held: Vec<u8>,
    head: Option<Head>,
    interim: u32,
}

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

impl Reader {
    /// Creates a reader at the start of a response.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: State::Head,
            held: Vec::new(),
            head: None,
            interim: 0,
        }
    }

    /// Creates a reader at the start of a body whose head the caller has parsed: of `length` bytes,
    /// or chunked if `length` is `None`.
    #[must_use]
    pub const fn at_body(length: Option<u64>) -> Self {
        let mut reader = Self::new();
        reader.state = match length {
            Some(0) => State::Done,
            Some(length) => State::Length(length),
            None => State::ChunkLine,
        };
        reader
    }

    /// Returns the head of the final (not 1xx) response; `None` until it has been received
    /// completely.
    #[must_use]
    pub const fn head(&self) -> Option<&Head> {
        self.head.as_ref()
    }

    /// Returns whether the response is complete.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.state == State::Done
    }

    /// Parses the next received bytes and appends the body bytes among them to `body`. Bytes after
    /// the end of the response are an error.
    ///
    /// # Errors
    /// Returns the first error; the reader must not be used afterwards.
    pub fn feed(&mut self, piece: &[u8], body: &mut Vec<u8>) -> Result<(), ResponseError> {
        match self.feed_response(piece, body)? {
            [] => Ok(()),
            _ => Err(ResponseError::TrailingBytes),
        }
    }

    /// Like [`Reader::feed`], but returns the bytes after the end of this response, which belong to
    /// the response to the next pipelined request.
    ///
    /// # Errors
    /// Returns the first error; the reader must not be used afterwards.
    pub fn feed_response<'a>(
        &mut self,
        mut piece: &'a [u8],
        body: &mut Vec<u8>,
    ) -> Result<&'a [u8], ResponseError> {
        while !piece.is_empty() {
            piece = match self.state {
                State::Head => self.feed_head(piece)?,
                State::Length(left) => {
                    let (part, left, rest) = take(piece, left);
                    body.extend_from_slice(part);
                    self.state = match left {
                        0 => State::Done,
                        left => State::Length(left),
                    };
                    rest
                }
                State::UntilClose => {
                    body.extend_from_slice(piece);
                    &[]
                }
                State::Chunk(left) => {
                    let (part, left, rest) = take(piece, left);
                    body.extend_from_slice(part);
                    self.state = match left {
                        0 => State::ChunkEnd,
                        left => State::Chunk(left),
                    };
                    rest
                }
                State::ChunkLine | State::ChunkEnd | State::Trailer(_) => self.feed_line(piece)?,
                State::Done => break,
            };
        }
        Ok(piece)
    }

    /// Handles the end of the connection, which is also the end of a response without a length.
    ///
    /// # Errors
    /// Returns an error if the response is not complete.
    pub fn end(&mut self) -> Result<(), ResponseError> {
        match self.state {
            State::UntilClose | State::Done => {
                self.state = State::Done;
                Ok(())
            }
            State::Head
            | State::Length(_)
            | State::ChunkLine
            | State::Chunk(_)
            | State::ChunkEnd
            | State::Trailer(_) => Err(ResponseError::Cut),
        }
    }

    fn feed_head<'a>(&mut self, piece: &'a [u8]) -> Result<&'a [u8], ResponseError> {
        let before = self.held.len();
        self.held.extend_from_slice(piece);
        // The blank line may start in bytes fed earlier.
        let from = before.saturating_sub(3);
        let Some(at) = memmem::find(&self.held[from..], b"\r\n\r\n") else {
            return if self.held.len() > HEAD_BYTES_MAX {
                Err(ResponseError::HeadTooLarge)
            } else {
                Ok(&[])
            };
        };
        let len = from + at + 4;
        let head = parse_head(&self.held[..len])?;
        self.held.clear();
        match head {
            Parsed::Interim => {
                self.interim += 1;
                if self.interim > INTERIM_RESPONSES_MAX {
                    return Err(ResponseError::Interim);
                }
            }
            Parsed::Final(head, state) => {
                self.head = Some(head);
                self.state = state;
            }
        }
        Ok(&piece[len - before..])
    }

    fn feed_line<'a>(&mut self, piece: &'a [u8]) -> Result<&'a [u8], ResponseError> {
        let end = memchr(b'\n', piece);
        let part = &piece[..end.unwrap_or(piece.len())];
        if self.held.len() + part.len() > CHUNK_LINE_BYTES_MAX {
            return Err(ResponseError::Chunk);
        }
        self.held.extend_from_slice(part);
        let Some(end) = end else {
            return Ok(&[]);
        };
        let line = self.held.strip_suffix(b"\r").ok_or(ResponseError::Chunk)?;
        self.state = match self.state {
            State::ChunkLine => match chunk_size(line).ok_or(ResponseError::Chunk)? {
                0 => State::Trailer(0),
                size => State::Chunk(size),
            },
            State::ChunkEnd if line.is_empty() => State::ChunkLine,
            State::Trailer(_) if line.is_empty() => State::Done,
            State::Trailer(lines) if lines < TRAILER_LINES_MAX => State::Trailer(lines + 1),
            State::ChunkEnd
            | State::Trailer(_)
            | State::Head
            | State::Length(_)
            | State::UntilClose
            | State::Chunk(_)
            | State::Done => return Err(ResponseError::Chunk),
        };
        self.held.clear();
        Ok(&piece[end + 1..])
    }
}

/// Splits `piece` at the end of a body or chunk of which `left` bytes have not been received yet.
/// Returns the bytes of `piece` that belong to the body or chunk, the number of its bytes that are
/// still missing after them, and the bytes of `piece` after its end.
fn take(piece: &[u8], left: u64) -> (&[u8], u64, &[u8]) {
    let len = usize::try_from(left).map_or(piece.len(), |left| left.min(piece.len()));
    let (part, rest) = piece.split_at(len);
    (part, left - len as u64, rest)
}

fn chunk_size(line: &[u8]) -> Option<u64> {
    let digits = line.split(|byte| *byte == b';').next()?.trim_ascii_end();
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

enum Parsed {
    Interim,
    Final(Head, State),
}

fn parse_head(bytes: &[u8]) -> Result<Parsed, ResponseError> {
    let mut fields = [httparse::EMPTY_HEADER; HEAD_FIELDS_MAX];
    let mut response = httparse::Response::new(&mut fields);
    match response.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(ResponseError::Head),
        Err(httparse::Error::TooManyHeaders) => return Err(ResponseError::HeadTooLarge),
        Err(_) => return Err(ResponseError::Head),
    }
    let status = response.code.ok_or(ResponseError::Head)?;
    if (100..200).contains(&status) {
        // No request contains an upgrade, so 101 is an error.
        return match status {
            101 => Err(ResponseError::Head),
            _ => Ok(Parsed::Interim),
        };
    }
    let mut head = Head {
        status,
        event_stream: false,
        keep_alive: response.version == Some(1),
        server: None,
    };
    let (mut length, mut coded) = (None, false);
    for field in response.headers.iter() {
        let value = field.value.trim_ascii();
        if field.name.eq_ignore_ascii_case("content-length") {
            let text = std::str::from_utf8(value).map_err(|_| ResponseError::Framing)?;
            let value = text.parse::<u64>().map_err(|_| ResponseError::Framing)?;
            if length.replace(value).is_some() {
                return Err(ResponseError::Framing);
            }
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            if coded || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(ResponseError::Framing);
            }
            coded = true;
        } else if field.name.eq_ignore_ascii_case("content-type") {
            let media = value.split(|byte| *byte == b';').next().unwrap_or(value);
            head.event_stream = media
                .trim_ascii()
                .eq_ignore_ascii_case(b"text/event-stream");
        } else if field.name.eq_ignore_ascii_case("server") {
            head.server = std::str::from_utf8(value).ok().map(str::to_owned);
        } else if field.name.eq_ignore_ascii_case("connection")
            && value
                .split(|byte| *byte == b',')
                .any(|option| option.trim_ascii().eq_ignore_ascii_case(b"close"))
        {
            head.keep_alive = false;
        }
    }
    let state = match (status, length, coded) {
        (_, Some(_), true) => return Err(ResponseError::Framing),
        (204 | 304, ..) | (_, Some(0), false) => State::Done,
        (_, Some(length), false) => State::Length(length),
        (_, None, true) => State::ChunkLine,
        (_, None, false) => {
            head.keep_alive = false;
            State::UntilClose
        }
    };
    Ok(Parsed::Final(head, state))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses a response, given in `pieces`, that is followed by the end of the connection. Returns
    /// its head and its body.
    fn read(pieces: &[&[u8]]) -> Result<(Head, Vec<u8>), ResponseError> {
        let (mut reader, mut body) = (Reader::new(), Vec::new());
        for piece in pieces {
            reader.feed(piece, &mut body)?;
        }
        reader.end()?;
        Ok((reader.head().cloned().unwrap_or_default(), body))
    }

    const CHUNKED: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\
                           Content-Type: text/event-stream; charset=utf-8\r\n\r\n";

    #[test]
    fn responses_read_the_same_at_any_split() {
        let long = format!("{CHUNKED}3;x=1\r\nabc\r\nA \r\n0123456789\r\n0\r\nt: 1\r\n\r\n");
        type Want<'a> = Result<(u16, bool, bool, &'a str), ResponseError>;
        let cases: &[(&str, Want<'_>)] = &[
            (&long, Ok((200, true, true, "abc0123456789"))),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello",
                Ok((200, false, true, "hello")),
            ),
            (
                "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\
                 Connection: x, Close\r\n\r\nno",
                Ok((404, false, false, "no")),
            ),
            (
                "HTTP/1.0 200 OK\r\n\r\nuntil the end",
                Ok((200, false, false, "until the end")),
            ),
            ("HTTP/1.1 204 \r\n\r\n", Ok((204, false, true, ""))),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhell",
                Err(ResponseError::Cut),
            ),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nhe",
                Err(ResponseError::TrailingBytes),
            ),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 1\r\n\r\nh",
                Err(ResponseError::Framing),
            ),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
                Err(ResponseError::Framing),
            ),
            (
                "HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n",
                Err(ResponseError::Framing),
            ),
            ("HTTP/1.1 101 Up\r\n\r\n", Err(ResponseError::Head)),
            ("SSH-2.0-x\r\n\r\n", Err(ResponseError::Head)),
        ];
        for (text, want) in cases {
            let want = want.map(|(status, event_stream, keep_alive, body)| {
                let head = Head {
                    status,
                    event_stream,
                    keep_alive,
                    server: None,
                };
                (head, body.as_bytes().to_vec())
            });
            let bytes = text.as_bytes();
            for split in 0..=bytes.len() {
                assert_eq!(
                    read(&[&bytes[..split], &bytes[split..]]),
                    want,
                    "{text} at {split}"
                );
            }
            let single: Vec<&[u8]> = bytes.chunks(1).collect();
            assert_eq!(read(&single), want, "{text} byte by byte");
        }
    }

    #[test]
    fn bytes_after_a_pipelined_response_are_returned() {
        for (first, body) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab", "ab"),
            ("HTTP/1.1 204 \r\n\r\n", ""),
            (
                "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
                "a",
            ),
        ] {
            let both = format!("{first}HTTP/1.1 200 OK\r\n");
            for split in 0..=first.len() {
                let (mut reader, mut got) = (Reader::new(), Vec::new());
                let (one, two) = both.as_bytes().split_at(split);
                let mut rest = reader.feed_response(one, &mut got).unwrap().to_vec();
                rest.extend_from_slice(reader.feed_response(two, &mut got).unwrap());
                assert!(reader.is_done());
                assert_eq!(
                    (&*got, &*rest),
                    (body.as_bytes(), &b"HTTP/1.1 200 OK\r\n"[..])
                );
            }
        }
    }

    #[test]
    fn malformed_chunks_are_rejected() {
        for (tail, want) in [
            ("-1\r\n", ResponseError::Chunk),
            ("\r\n", ResponseError::Chunk),
            ("3\nabc\r\n", ResponseError::Chunk),
            ("3\r\nabcd\r\n", ResponseError::Chunk),
            ("ffffffffffffffffff\r\n", ResponseError::Chunk),
            ("3\r\nabc\r\n", ResponseError::Cut),
            ("0\r\n\r\nx", ResponseError::TrailingBytes),
        ] {
            let text = format!("{CHUNKED}{tail}");
            assert_eq!(read(&[text.as_bytes()]), Err(want), "{tail:?}");
        }
    }

    #[test]
    fn the_server_field_is_kept() {
        for (field, want) in [("Server: nginx/1.27 \r\n", Some("nginx/1.27")), ("", None)] {
            let text = format!("HTTP/1.1 200 OK\r\n{field}content-length: 0\r\n\r\n");
            let (head, _) = read(&[text.as_bytes()]).unwrap();
            assert_eq!(head.server.as_deref(), want);
        }
    }

    #[test]
    fn endless_heads_and_lines_are_bounded() {
        let mut reader = Reader::new();
        let mut body = Vec::new();
        reader.feed(b"HTTP/1.1 200 OK\r\n", &mut body).unwrap();
        let mut result = Ok(());
        for _ in 0..=HEAD_BYTES_MAX / 8 {
            result = result.and_then(|()| reader.feed(b"a: bcd\r\n", &mut body));
        }
        assert_eq!(result, Err(ResponseError::HeadTooLarge));

        let interim = "HTTP/1.1 103 Hints\r\n\r\n".repeat(INTERIM_RESPONSES_MAX as usize + 1);
        let result = Reader::new().feed(interim.as_bytes(), &mut body);
        assert_eq!(result, Err(ResponseError::Interim));

        let line = format!("{CHUNKED}1;{}", "x".repeat(CHUNK_LINE_BYTES_MAX));
        let result = Reader::new().feed(line.as_bytes(), &mut body);
        assert_eq!(result, Err(ResponseError::Chunk));
    }
}
