//! Checks the first line of a head while it arrives.
//!
//! A peer that does not speak HTTP/1.1 may never send the blank line that ends a head. The line is
//! therefore checked up to the last byte received, and refused at its first wrong byte.

use super::error::HeadError;
use super::syntax::{is_target_byte, is_token_byte, is_value_byte};

/// The kind of a first line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LineKind {
    /// `method SP target SP version` (RFC 9112 3).
    Request,
    /// `version SP status [SP reason]` (RFC 9112 4).
    Status,
}

/// Position in a first line. Every byte up to it fits the grammar.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Progress {
    /// Before the first byte.
    #[default]
    Start,
    Method,
    /// Before the first byte of the target.
    TargetStart,
    Target,
    /// In the version, after this many bytes of it.
    Version(u8),
    /// After the version.
    VersionEnd,
    /// In the status code, after this many digits of it.
    Status(u8),
    /// After the status code.
    StatusEnd,
    Reason,
    /// After the CR.
    Cr,
    /// After the LF.
    End,
}

/// The accepted versions without their last byte, the minor version.
const VERSION: &[u8; 7] = b"HTTP/1.";
/// Length of `HTTP/`, after which a digit may differ from [`VERSION`] in a well-formed version.
const MAJOR: usize = 5;

impl Progress {
    /// Checks the next bytes of the line, up to its LF, and returns the position after them.
    ///
    /// # Errors
    /// The first wrong byte. The error does not depend on the bytes after it.
    pub(super) fn over(mut self, kind: LineKind, bytes: &[u8]) -> Result<Self, HeadError> {
        let mut at = 0;
        while self != Self::End
            && let Some(&byte) = bytes.get(at)
        {
            // The usual version in one comparison: this runs for every head.
            let rest = &bytes[at..];
            match (kind, self) {
                (LineKind::Request, Self::Version(0)) if rest.starts_with(b"HTTP/1.1\r\n") => {
                    return Ok(Self::End);
                }
                (LineKind::Status, Self::Start) if rest.starts_with(b"HTTP/1.1 ") => {
                    self = Self::Status(0);
                    at += b"HTTP/1.1 ".len();
                    continue;
                }
                _ => {}
            }
            self = self.step(kind, byte)?;
            at += 1;
            // Targets can be long.
            let rest = bytes[at..].iter();
            at += match self {
                Self::Target => rest.take_while(|byte| is_target_byte(**byte)).count(),
                Self::Reason => rest.take_while(|byte| is_value_byte(**byte)).count(),
                _ => 0,
            };
        }
        Ok(self)
    }

    fn step(self, kind: LineKind, byte: u8) -> Result<Self, HeadError> {
        match byte {
            b'\n' if self == Self::Cr => return Ok(Self::End),
            b'\n' => return Err(HeadError::BareLf),
            _ if self == Self::Cr => return Err(HeadError::BareCr),
            b'\r' => return self.carriage_return(kind),
            _ => {}
        }
        match self {
            Self::Start if kind == LineKind::Status => Self::version(kind, 0, byte),
            Self::Start | Self::Method => match byte {
                _ if is_token_byte(byte) => Ok(Self::Method),
                b' ' if self == Self::Method => Ok(Self::TargetStart),
                b'\t' if self == Self::Method => Err(HeadError::BadRequestLine),
                _ => Err(HeadError::BadMethod),
            },
            Self::TargetStart | Self::Target => match byte {
                _ if is_target_byte(byte) => Ok(Self::Target),
                b' ' if self == Self::Target => Ok(Self::Version(0)),
                b' ' => Err(HeadError::BadRequestLine),
                _ if is_value_byte(byte) => Err(HeadError::BadTarget),
                _ => Err(HeadError::ControlByte),
            },
            Self::Version(read) => Self::version(kind, read, byte),
            Self::VersionEnd => match (kind, byte) {
                (LineKind::Status, b' ') => Ok(Self::Status(0)),
                (LineKind::Status, _) => Err(HeadError::BadStatusLine),
                (LineKind::Request, _) if byte.is_ascii_digit() => Err(HeadError::BadVersion),
                (LineKind::Request, _) => Err(HeadError::BadRequestLine),
            },
            // Codes outside of the five classes are invalid (RFC 9110 15).
            Self::Status(0) if matches!(byte, b'0' | b'6'..=b'9') => Err(HeadError::BadStatus),
            Self::Status(read) => match byte {
                b'0'..=b'9' if read == 2 => Ok(Self::StatusEnd),
                b'0'..=b'9' => Ok(Self::Status(read + 1)),
                _ => Err(HeadError::BadStatusLine),
            },
            Self::StatusEnd if byte != b' ' => Err(HeadError::BadStatusLine),
            Self::StatusEnd | Self::Reason => {
                if is_value_byte(byte) {
                    Ok(Self::Reason)
                } else {
                    Err(HeadError::ControlByte)
                }
            }
            Self::Cr | Self::End => Ok(self),
        }
    }

    /// Returns the position after one more byte of a version, of which `read` bytes were read.
    fn version(kind: LineKind, read: u8, byte: u8) -> Result<Self, HeadError> {
        let at = usize::from(read);
        let malformed = match kind {
            LineKind::Status if at < MAJOR => HeadError::BadStatusLine,
            // A third part that does not begin like a version: the line has too many parts.
            LineKind::Request if at == 0 && byte != b'h' => HeadError::BadRequestLine,
            LineKind::Status | LineKind::Request => HeadError::BadVersion,
        };
        match VERSION.get(at) {
            Some(&want) if byte == want => Ok(Self::Version(read + 1)),
            None if matches!(byte, b'0' | b'1') => Ok(Self::VersionEnd),
            Some(_) if at == MAJOR && byte.is_ascii_digit() => Err(HeadError::UnsupportedVersion),
            None if byte.is_ascii_digit() => Err(HeadError::UnsupportedVersion),
            Some(_) | None => Err(malformed),
        }
    }

    fn carriage_return(self, kind: LineKind) -> Result<Self, HeadError> {
        match (self, kind) {
            (Self::VersionEnd, LineKind::Request)
            | (Self::StatusEnd | Self::Reason, LineKind::Status) => Ok(Self::Cr),
            (Self::Version(1..), _) => Err(HeadError::BadVersion),
            (_, LineKind::Request) => Err(HeadError::BadRequestLine),
            (_, LineKind::Status) => Err(HeadError::BadStatusLine),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks `line` byte by byte and as a whole. Returns the error, and the number of bytes
    /// including the wrong one.
    fn refused(kind: LineKind, line: &[u8]) -> Option<(HeadError, usize)> {
        let mut progress = Progress::default();
        let mut found = None;
        for (at, byte) in line.iter().enumerate() {
            match progress.over(kind, &[*byte]) {
                Ok(next) => progress = next,
                Err(error) => {
                    found = Some((error, at + 1));
                    break;
                }
            }
        }
        let whole = Progress::default().over(kind, line);
        assert_eq!(whole.err(), found.map(|(error, _)| error));
        found
    }

    #[test]
    fn what_cannot_become_a_request_is_refused_at_its_first_wrong_byte() {
        use HeadError::*;
        let cases: &[(&[u8], HeadError)] = &[
            (b"SSH-2.0-OpenSSH_9.6\r", BadRequestLine),
            (b"helo\r", BadRequestLine),
            (b"USER anonymous\r", BadRequestLine),
            (b"GET /index.html\r", BadRequestLine),
            (b"*1\r", BadRequestLine),
            (b"{", BadMethod),
            (b"\x16", BadMethod),
            (b"GET\0", BadMethod),
            (b"GET / F", BadRequestLine),
            (b"GET / h", BadVersion),
            (b"GET / HTTP/2", UnsupportedVersion),
            (b"PRI * HTTP/2", UnsupportedVersion),
            (b"GET / HTTP/1.2", UnsupportedVersion),
            (b"GET / HTTP/1.11", BadVersion),
            (b"GET / HTTP/1.1 ", BadRequestLine),
            (b"GET / HTTP/1.1\rG", BareCr),
            (b"GET / HTTP/1.1\n", BareLf),
            (b"GET /\n", BareLf),
            (b"GET /\0", ControlByte),
        ];
        for (line, error) in cases {
            let want = Some((*error, line.len()));
            assert_eq!(
                refused(LineKind::Request, line),
                want,
                "{}",
                line.escape_ascii()
            );
        }
    }

    #[test]
    fn what_cannot_become_a_response_is_refused_at_its_first_wrong_byte() {
        use HeadError::*;
        let cases: &[(&[u8], HeadError)] = &[
            (b"I", BadStatusLine),
            (b"HTTPS", BadStatusLine),
            (b"HTTP/2", UnsupportedVersion),
            (b"HTTP/x", BadVersion),
            (b"HTTP/1.1\r", BadStatusLine),
            (b"HTTP/1.1 7", BadStatus),
            (b"HTTP/1.1 20\r", BadStatusLine),
            (b"HTTP/1.1 2000", BadStatusLine),
            (b"HTTP/1.1 200 O\0", ControlByte),
            (b"HTTP/1.1 200\n", BareLf),
        ];
        for (line, error) in cases {
            let want = Some((*error, line.len()));
            assert_eq!(
                refused(LineKind::Status, line),
                want,
                "{}",
                line.escape_ascii()
            );
        }
    }

    #[test]
    fn nothing_after_the_line_is_checked() {
        let ends = |kind, line: &[u8]| Progress::default().over(kind, line) == Ok(Progress::End);
        assert!(ends(LineKind::Request, b"GET /a?b HTTP/1.0\r\n\0\0"));
        assert!(ends(LineKind::Status, b"HTTP/1.1 200\r\n\0"));
        assert!(ends(LineKind::Status, b"HTTP/1.1 599 \x80\t b\r\n\n"));
    }
}
