//! Validation of the chunked transfer coding (RFC 9112 7.1) while it is forwarded.
//!
//! The coding may be forwarded unmodified, so every byte of it must be valid for a strict parser:
//! lines end in CRLF, sizes are hexadecimal digits, extensions have no control bytes, and trailers
//! follow the rules for header fields. The result does not depend on how the bytes are split.

use std::fmt;

use super::syntax::{hex_value, is_ows, is_token_byte, is_value_byte, prefix_len};
use crate::limits::{
    CHUNK_BYTES_MAX, CHUNK_EXTENSION_BYTES_MAX, CHUNK_SIZE_DIGITS_MAX, TRAILER_BYTES_MAX,
};
use crate::span::Span;

/// Reason why a chunked body was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChunkError {
    /// A chunk size is not a hexadecimal number, or is followed by something other than CRLF or an
    /// extension.
    BadSize,
    /// A chunk size of more than `CHUNK_SIZE_DIGITS_MAX` digits.
    SizeTooLong,
    /// A chunk of more than `CHUNK_BYTES_MAX` bytes.
    SizeTooLarge,
    /// A control byte other than HTAB in a chunk extension.
    BadExtension,
    /// More than `CHUNK_EXTENSION_BYTES_MAX` bytes of chunk extensions in one body, all chunks
    /// together.
    ExtensionsTooLong,
    /// The data of a chunk is not followed by CRLF, or a CR elsewhere in the coding is not followed
    /// by LF.
    BadLineEnd,
    /// A trailer line that is not a valid field line (`name: value`).
    BadTrailer,
    /// A trailer section of more than `TRAILER_BYTES_MAX` bytes.
    TrailersTooLong,
}

impl ChunkError {
    /// Returns a description of the error that contains no part of the refused message.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::BadSize => "a chunk size is malformed",
            Self::SizeTooLong => "a chunk size has too many digits",
            Self::SizeTooLarge => "a chunk size is too large",
            Self::BadExtension => "a control byte in a chunk extension",
            Self::ExtensionsTooLong => "the chunk extensions are too long",
            Self::BadLineEnd => "CRLF is missing in the chunked coding",
            Self::BadTrailer => "a trailer line is malformed",
            Self::TrailersTooLong => "the trailers are too long",
        }
    }
}

impl fmt::Display for ChunkError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl std::error::Error for ChunkError {}

/// The bytes that [`Chunked::take`] processed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// How many bytes, from the front, belong to the body.
    pub len: usize,
    /// Those of them that are trailer fields. Without them, the bytes are the same body without
    /// trailers.
    pub trailers: Span,
}

/// Decodes one chunked body, which may be split at any byte.
#[derive(Clone, Debug)]
pub struct Chunked {
    state: State,
    /// Number of digits of the chunk size read so far.
    digits: u8,
    /// While a chunk size is read: its value so far. Afterwards: remaining bytes of the chunk.
    left: u64,
    payload_bytes: u64,
    extension_bytes: u64,
    trailer_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before or within the digits of a chunk size.
    Size,
    /// In whitespace after a chunk size. Only an extension may follow (RFC 9112 7.1.1).
    SizeSpace,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// At the start of a trailer line or of the final CRLF.
    Line,
    TrailerName,
    TrailerValue,
    TrailerLf,
    EndLf,
    Done,
    Refused(ChunkError),
}

impl Default for Chunked {
    fn default() -> Self {
        Self::new()
    }
}

impl Chunked {
    /// Creates a decoder for a new body.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            state: State::Size,
            digits: 0,
            left: 0,
            payload_bytes: 0,
            extension_bytes: 0,
            trailer_bytes: 0,
        }
    }

    /// Processes received bytes and returns how many of them, from the front, belong to this body.
    ///
    /// If the result is less than `bytes.len()`, the body has ended and the remaining bytes are not
    /// part of it.
    ///
    /// # Errors
    /// The coding is malformed. Every later call with input returns the same error.
    pub fn verify(&mut self, bytes: &[u8]) -> Result<usize, ChunkError> {
        self.decode(bytes, |_| {})
    }

    /// Does the same as [`Chunked::verify`] and also calls `payload` with each run of body bytes,
    /// as a range of `bytes`. In case of an error, `payload` has already received the runs before
    /// the error.
    ///
    /// # Errors
    /// The coding is malformed. Every later call with input returns the same error.
    pub fn decode(&mut self, bytes: &[u8], payload: impl FnMut(Span)) -> Result<usize, ChunkError> {
        self.run(bytes, payload).map(|taken| taken.len)
    }

    /// Does the same as [`Chunked::verify`] and also returns which of the bytes are trailer fields.
    ///
    /// # Errors
    /// The coding is malformed. Every later call with input returns the same error.
    pub fn take(&mut self, bytes: &[u8]) -> Result<Taken, ChunkError> {
        self.run(bytes, |_| {})
    }

    fn run(&mut self, bytes: &[u8], mut payload: impl FnMut(Span)) -> Result<Taken, ChunkError> {
        let mut at = 0;
        let mut trailers = Span::default();
        while let Some(&byte) = bytes.get(at) {
            match self.state {
                State::Data => {
                    let run = prefix_len(&bytes[at..], self.left);
                    payload(Span::new(at, at + run));
                    at += run;
                    self.left -= run as u64;
                    self.payload_bytes += run as u64;
                    if self.left == 0 {
                        self.state = State::DataCr;
                    }
                }
                State::Done => break,
                State::Size
                | State::SizeSpace
                | State::Extension
                | State::SizeLf
                | State::DataCr
                | State::DataLf
                | State::Line
                | State::TrailerName
                | State::TrailerValue
                | State::TrailerLf
                | State::EndLf
                | State::Refused(_) => {
                    let trailer_bytes = self.trailer_bytes;
                    self.state = match self.step(byte) {
                        Ok(state) => state,
                        Err(error) => {
                            self.state = State::Refused(error);
                            return Err(error);
                        }
                    };
                    if self.trailer_bytes > trailer_bytes {
                        // Nothing but the final CRLF follows trailer fields.
                        if trailers.is_empty() {
                            trailers.start = at;
                        }
                        trailers.end = at + 1;
                    }
                    at += 1;
                }
            }
        }
        if let State::Refused(error) = self.state {
            return Err(error);
        }
        Ok(Taken { len: at, trailers })
    }

    /// Returns whether the whole body, including its final CRLF, has been received.
    #[must_use]
    pub const fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Returns the number of body bytes received so far, excluding the chunked coding.
    #[must_use]
    pub const fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }

    /// Processes one byte that is part of the coding, not of the payload. Returns the next state,
    /// or the reason why the byte is not allowed here.
    fn step(&mut self, byte: u8) -> Result<State, ChunkError> {
        match self.state {
            State::Size => self.size(byte),
            State::SizeSpace if byte != b';' && !is_ows(byte) => Err(ChunkError::BadSize),
            State::SizeSpace | State::Extension => self.extension(byte),
            State::SizeLf => {
                line_feed(byte)?;
                self.digits = 0;
                Ok(if self.left == 0 {
                    State::Line
                } else {
                    State::Data
                })
            }
            State::DataCr if byte == b'\r' => Ok(State::DataLf),
            State::DataCr => Err(ChunkError::BadLineEnd),
            State::DataLf => line_feed(byte).map(|()| State::Size),
            State::Line if byte == b'\r' => Ok(State::EndLf),
            State::Line | State::TrailerName | State::TrailerValue | State::TrailerLf => {
                self.trailer(byte)
            }
            State::EndLf => line_feed(byte).map(|()| State::Done),
            State::Data | State::Done => Ok(self.state),
            State::Refused(error) => Err(error),
        }
    }

    fn size(&mut self, byte: u8) -> Result<State, ChunkError> {
        if let Some(value) = hex_value(byte) {
            if self.digits == CHUNK_SIZE_DIGITS_MAX {
                return Err(ChunkError::SizeTooLong);
            }
            self.digits += 1;
            self.left = self.left << 4 | u64::from(value);
            if self.left > CHUNK_BYTES_MAX {
                return Err(ChunkError::SizeTooLarge);
            }
            return Ok(State::Size);
        }
        match byte {
            _ if self.digits == 0 => Err(ChunkError::BadSize),
            b'\r' => Ok(State::SizeLf),
            b';' | b' ' | b'\t' => self.extension(byte),
            _ => Err(ChunkError::BadSize),
        }
    }

    /// Processes one byte after the digits of a chunk size. All bytes between the digits and the CR
    /// count towards the extension limit, including whitespace.
    fn extension(&mut self, byte: u8) -> Result<State, ChunkError> {
        if byte == b'\r' {
            return Ok(State::SizeLf);
        }
        if !is_value_byte(byte) {
            return Err(ChunkError::BadExtension);
        }
        self.extension_bytes += 1;
        if self.extension_bytes > CHUNK_EXTENSION_BYTES_MAX {
            return Err(ChunkError::ExtensionsTooLong);
        }
        let begun = self.state == State::Extension || byte == b';';
        Ok(if begun {
            State::Extension
        } else {
            State::SizeSpace
        })
    }

    fn trailer(&mut self, byte: u8) -> Result<State, ChunkError> {
        self.trailer_bytes += 1;
        if self.trailer_bytes > TRAILER_BYTES_MAX {
            return Err(ChunkError::TrailersTooLong);
        }
        match (self.state, byte) {
            (State::TrailerLf, _) => line_feed(byte).map(|()| State::Line),
            (State::TrailerName, b':') => Ok(State::TrailerValue),
            (State::TrailerValue, b'\r') => Ok(State::TrailerLf),
            (State::TrailerValue, _) if is_value_byte(byte) => Ok(State::TrailerValue),
            (State::Line | State::TrailerName, _) if is_token_byte(byte) => Ok(State::TrailerName),
            _ => Err(ChunkError::BadTrailer),
        }
    }
}

const fn line_feed(byte: u8) -> Result<(), ChunkError> {
    if byte == b'\n' {
        Ok(())
    } else {
        Err(ChunkError::BadLineEnd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::h1::fuzz::fuzz_chunked;
    use crate::h1::testing::Random;

    fn decode(data: &[u8]) -> (Result<usize, ChunkError>, Vec<u8>, bool) {
        // Compares all split points and several part lengths with each other and the reference.
        fuzz_chunked(data);
        let mut reader = Chunked::new();
        let mut payload = Vec::new();
        let end = reader.decode(data, |run| payload.extend_from_slice(run.of(data)));
        (end, payload, reader.is_done())
    }

    #[test]
    fn chunked_bodies_are_decoded() {
        let cases: &[(&[u8], usize, &[u8], bool)] = &[
            (b"", 0, b"", false),
            (b"0\r\n\r\n", 5, b"", true),
            (b"0\r\n\r\nGET /", 5, b"", true),
            (b"000\r\n\r\n", 7, b"", true),
            (b"5\r\nhello\r\n0\r\n\r\n", 15, b"hello", true),
            (
                b"1\r\na\r\nA\r\n0123456789\r\n0\r\n\r\n",
                26,
                b"a0123456789",
                true,
            ),
            (b"a\r\n0123456789\r\n", 15, b"0123456789", false),
            (b"5\r\nhel", 6, b"hel", false),
            (b"1;x\r\na\r\n0;y=\"z\"\r\n\r\n", 19, b"a", true),
            (b"1 \t;x\r\na\r\n0\r\n\r\n", 15, b"a", true),
            (b"1;\r\na\r\n0\r\n\r\n", 12, b"a", true),
            (b"0\r\nA: b\r\nC:\r\n\r\nx", 15, b"", true),
            (b"2\r\n\r\n\r\n0\r\n\r\n", 12, b"\r\n", true),
            (b"0000000000000001\r\na\r\n", 21, b"a", false),
            (b"00000000000000000001\r\na\r\n", 25, b"a", false),
            (b"20000000000000\r\nab", 18, b"ab", false),
        ];
        for (data, len, payload, done) in cases {
            let want = (Ok(*len), payload.to_vec(), *done);
            assert_eq!(decode(data), want, "{}", data.escape_ascii());
        }
    }

    #[test]
    fn invalid_bodies_are_refused_with_the_correct_error() {
        use ChunkError::*;
        let cases: &[(&[u8], ChunkError)] = &[
            (b"\r\n", BadSize),
            (b"\n", BadSize),
            (b";a\r\n", BadSize),
            (b"-1\r\n", BadSize),
            (b"+1\r\n", BadSize),
            (b" 1\r\n", BadSize),
            (b"0x1\r\n", BadSize),
            (b"g\r\n", BadSize),
            (b"1_0\r\n", BadSize),
            (b"1\n", BadSize),
            (b"1 \r\n", BadSize),
            (b"1 2\r\n", BadSize),
            (b"\xef\xbc\x91\r\n", BadSize),
            (b"000000000000000000000", SizeTooLong),
            (b"000000000000000000001", SizeTooLong),
            (b"20000000000001", SizeTooLarge),
            (b"7fffffffffffffff", SizeTooLarge),
            (b"8000000000000000", SizeTooLarge),
            (b"ffffffffffffffff", SizeTooLarge),
            (b"10000000000000000", SizeTooLarge),
            (b"10000000000000005", SizeTooLarge),
            (b"1;a\n", BadExtension),
            (b"1;a\0\r\n", BadExtension),
            (b"1;a\x7f\r\n", BadExtension),
            (b"1\ra", BadLineEnd),
            (b"1\r\r\n", BadLineEnd),
            (b"1;a\rb\r\n", BadLineEnd),
            (b"1\r\nab", BadLineEnd),
            (b"1\r\na\n", BadLineEnd),
            (b"1\r\na\r0", BadLineEnd),
            (b"1\r\na0\r\n\r\n", BadLineEnd),
            (b"0\r\n\n", BadTrailer),
            (b"0\r\n\rX", BadLineEnd),
            (b"0\r\nGET / HTTP/1.1\r\n", BadTrailer),
            (b"0\r\n: a\r\n", BadTrailer),
            (b"0\r\n A: b\r\n", BadTrailer),
            (b"0\r\nA: b\r\n c\r\n", BadTrailer),
            (b"0\r\nA : b\r\n", BadTrailer),
            (b"0\r\nA\r\n", BadTrailer),
            (b"0\r\nA: b\n", BadTrailer),
            (b"0\r\nA: \0\r\n", BadTrailer),
            (b"0\r\nA: b\rc", BadLineEnd),
        ];
        for (data, want) in cases {
            assert_eq!(decode(data).0, Err(*want), "{}", data.escape_ascii());
        }
    }

    #[test]
    fn an_error_is_permanent() {
        let mut reader = Chunked::new();
        assert_eq!(reader.verify(b"x"), Err(ChunkError::BadSize));
        assert_eq!(reader.verify(b"0\r\n\r\n"), Err(ChunkError::BadSize));
        assert!(!reader.is_done());
    }

    #[test]
    fn a_chunk_of_the_largest_size_is_counted() {
        let mut reader = Chunked::new();
        assert_eq!(reader.verify(b"20000000000000\r\n"), Ok(16));
        assert_eq!(reader.verify(&[0; 100]), Ok(100));
        assert_eq!(
            (reader.payload_bytes(), reader.left),
            (100, CHUNK_BYTES_MAX - 100)
        );
    }

    #[test]
    fn without_its_trailers_a_body_is_the_same_at_every_split() {
        for (data, want) in [
            (
                &b"1\r\na\r\n0\r\nA: b\r\nC:\r\n\r\nGET"[..],
                &b"1\r\na\r\n0\r\n\r\n"[..],
            ),
            (b"1\r\na\r\n0;x\r\n\r\nGET", b"1\r\na\r\n0;x\r\n\r\n"),
            (b"0\r\nAuthorization: x\r\n\r\n", b"0\r\n\r\n"),
        ] {
            for split in 0..=data.len() {
                let mut reader = Chunked::new();
                let mut kept = Vec::new();
                for piece in [&data[..split], &data[split..]] {
                    let Taken { len, trailers } = reader.take(piece).unwrap();
                    assert!(trailers.end <= len);
                    kept.extend_from_slice(&piece[..trailers.start]);
                    kept.extend_from_slice(&piece[trailers.end..len]);
                }
                assert!(reader.is_done());
                assert_eq!(kept, want, "split at {split}");
            }
        }
    }

    #[test]
    fn limits_are_exact_and_apply_to_the_whole_body() {
        let half = CHUNK_EXTENSION_BYTES_MAX as usize / 2;
        let extended = |extra: usize| {
            let (a, b) = ("a".repeat(half - 1), "b".repeat(half - 1 + extra));
            format!("1;{a}\r\nx\r\n0;{b}\r\n\r\n").into_bytes()
        };
        assert!(decode(&extended(0)).2);
        assert_eq!(decode(&extended(1)).0, Err(ChunkError::ExtensionsTooLong));
        let half = TRAILER_BYTES_MAX as usize / 2;
        let trailed = |extra: usize| {
            let (a, b) = ("a".repeat(half - 4), "b".repeat(half - 4 + extra));
            format!("0\r\nA:{a}\r\nB:{b}\r\n\r\n").into_bytes()
        };
        assert!(decode(&trailed(0)).2);
        assert_eq!(decode(&trailed(1)).0, Err(ChunkError::TrailersTooLong));
    }

    #[test]
    fn random_bodies_decode_to_their_payload() {
        for seed in 0..300 {
            let mut random = Random::new(seed);
            let (mut data, mut want) = (Vec::new(), Vec::new());
            for _ in 0..random.below(8) {
                let chunk: Vec<u8> = (0..=random.below(60))
                    .map(|_| random.next() as u8)
                    .collect();
                let line = match random.below(3) {
                    0 => format!("{:x}\r\n", chunk.len()),
                    1 => format!("{:05X}\r\n", chunk.len()),
                    _ => format!("{:x} ;a=\"{}\"\r\n", chunk.len(), random.below(99)),
                };
                data.extend_from_slice(line.as_bytes());
                data.extend_from_slice(&chunk);
                data.extend_from_slice(b"\r\n");
                want.extend_from_slice(&chunk);
            }
            data.extend_from_slice(if seed % 2 == 0 {
                b"0\r\n\r\n"
            } else {
                b"0\r\nA:b\r\n\r\n"
            });
            let len = data.len();
            data.extend_from_slice(b"HTTP/1.1 200");
            assert_eq!(decode(&data), (Ok(len), want, true), "seed {seed}");
            // With one byte changed, the decoder and the reference must still agree.
            let at = random.below(data.len());
            data[at] = random.next() as u8;
            fuzz_chunked(&data);
        }
    }
}
