//! The chunked coding (RFC 9112 7.1), checked while it passes.
//!
//! The coding is forwarded as it came, so every byte of it must have the one meaning that a
//! strict reader gives it: CRLF exactly, hexadecimal digits only, no control bytes in extensions,
//! trailers under the rules of header fields. The result does not depend on how the bytes were
//! split.

use super::framing::prefix_len;
use super::syntax::{hex_value, is_ows, is_token_byte, is_value_byte};
use crate::limits::{CHUNK_EXTENSION_BYTES_MAX, TRAILER_BYTES_MAX};
use crate::span::Span;

/// Why a chunked body was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChunkError {
    /// A chunk size that is not hexadecimal digits, or with something odd behind them.
    BadSize,
    /// A chunk size of more than 16 digits, which could pass 64 bits.
    SizeTooLong,
    /// A control byte in a chunk extension.
    BadExtension,
    /// More than `CHUNK_EXTENSION_BYTES_MAX` bytes of extensions in one body.
    ExtensionsTooLong,
    /// CRLF is missing behind a size, a chunk, a trailer or the body.
    BadLineEnd,
    /// A trailer line that is not a field line.
    BadTrailer,
    /// A trailer section of more than `TRAILER_BYTES_MAX` bytes.
    TrailersTooLong,
}

impl ChunkError {
    /// One clause for people; it holds nothing of the message.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::BadSize => "a chunk size is malformed",
            Self::SizeTooLong => "a chunk size has too many digits",
            Self::BadExtension => "a control byte in a chunk extension",
            Self::ExtensionsTooLong => "the chunk extensions are too long",
            Self::BadLineEnd => "CRLF is missing in the chunked coding",
            Self::BadTrailer => "a trailer line is malformed",
            Self::TrailersTooLong => "the trailers are too long",
        }
    }
}

/// A reader of one chunked body, fed in any pieces.
#[derive(Clone, Debug)]
pub struct Chunked {
    state: State,
    /// Digits of the size that is being read.
    digits: u8,
    /// The size being read, then the bytes of the chunk still to come.
    left: u64,
    payload_bytes: u64,
    extension_bytes: u64,
    trailer_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before or within the digits of a size.
    Size,
    /// Whitespace behind a size; only an extension may follow (RFC 9112 7.1.1).
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
    /// A reader at the start of a body.
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

    /// Takes bytes as they came: how many from the front belong to this body. Fewer than given
    /// means that the body ended; the rest is somebody else's.
    ///
    /// # Errors
    /// The coding is malformed; every later call says so again.
    pub fn verify(&mut self, bytes: &[u8]) -> Result<usize, ChunkError> {
        self.decode(bytes, |_| {})
    }

    /// Like [`Chunked::verify`], and hands `payload` each run of body bytes as a range of `bytes`.
    /// Runs in front of an error have been handed out when it returns.
    ///
    /// # Errors
    /// The coding is malformed; every later call says so again.
    pub fn decode(
        &mut self,
        bytes: &[u8],
        mut payload: impl FnMut(Span),
    ) -> Result<usize, ChunkError> {
        let mut at = 0;
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
                State::Done => return Ok(at),
                _ => {
                    self.state = match self.step(byte) {
                        Ok(state) => state,
                        Err(error) => {
                            self.state = State::Refused(error);
                            return Err(error);
                        }
                    };
                    at += 1;
                }
            }
        }
        match self.state {
            State::Refused(error) => Err(error),
            _ => Ok(at),
        }
    }

    /// Whether the whole body, its final CRLF included, has been seen.
    #[must_use]
    pub const fn is_done(&self) -> bool {
        matches!(self.state, State::Done)
    }

    /// Body bytes seen so far, without the coding around them.
    #[must_use]
    pub const fn payload_bytes(&self) -> u64 {
        self.payload_bytes
    }

    /// The state behind one byte of the coding itself.
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
            // 16 digits fill 64 bits exactly, so the shift below loses nothing.
            if self.digits == 16 {
                return Err(ChunkError::SizeTooLong);
            }
            self.digits += 1;
            self.left = self.left << 4 | u64::from(value);
            return Ok(State::Size);
        }
        match byte {
            _ if self.digits == 0 => Err(ChunkError::BadSize),
            b'\r' => Ok(State::SizeLf),
            b';' | b' ' | b'\t' => self.extension(byte),
            _ => Err(ChunkError::BadSize),
        }
    }

    /// All that stands between the digits and the CR counts as extension, whitespace included.
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
