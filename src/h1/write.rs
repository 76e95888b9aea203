//! Functions that append parts of a message to a buffer, without the overhead of `std::fmt`.

use std::ops::Deref;

use super::syntax::{is_target_byte, is_token, is_value_byte};

/// The last chunk and the empty trailer section that end a chunked body.
pub const LAST_CHUNK: &[u8] = b"0\r\n\r\n";

/// The line before a chunk: the chunk size in lower-case hexadecimal and CRLF.
#[derive(Clone, Copy, Debug)]
pub struct ChunkLine {
    /// Filled from the end: the line is `bytes[start..]`.
    bytes: [u8; CHUNK_LINE_BYTES_MAX],
    start: u8,
}

/// Length of the longest [`ChunkLine`] in bytes: 16 hexadecimal digits and CRLF.
const CHUNK_LINE_BYTES_MAX: usize = 18;

impl Deref for ChunkLine {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[usize::from(self.start)..]
    }
}

/// Returns the line before a chunk of `size` bytes.
///
/// A size of 0 marks the last chunk, after which the body still needs a trailer section. Use
/// [`LAST_CHUNK`], which contains both, instead.
#[must_use]
pub fn chunk_line(size: usize) -> ChunkLine {
    let mut bytes = [0; CHUNK_LINE_BYTES_MAX];
    bytes[CHUNK_LINE_BYTES_MAX - 2..].copy_from_slice(b"\r\n");
    let mut start = CHUNK_LINE_BYTES_MAX - 2;
    let mut rest = size;
    loop {
        start -= 1;
        bytes[start] = b"0123456789abcdef"[rest & 0xf];
        rest >>= 4;
        if rest == 0 {
            break;
        }
    }
    ChunkLine {
        bytes,
        start: start as u8,
    }
}

/// Appends the field line `name: value` and its CRLF.
///
/// The caller must pass a token and a value without control bytes other than HTAB, either from the
/// parser or written by the proxy itself. Only debug builds check this.
pub fn push_field(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    debug_assert!(is_token(name));
    debug_assert!(value.iter().all(|&byte| is_value_byte(byte)));
    out.reserve(name.len() + value.len() + 4);
    out.extend_from_slice(name);
    out.extend_from_slice(b": ");
    out.extend_from_slice(value);
    out.extend_from_slice(b"\r\n");
}

/// Appends `n` as decimal digits.
pub fn push_decimal(out: &mut Vec<u8>, n: u64) {
    // 64 bits have at most 20 decimal digits.
    let mut digits = [0; 20];
    let mut start = digits.len();
    let mut rest = n;
    loop {
        start -= 1;
        digits[start] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    out.extend_from_slice(&digits[start..]);
}

/// Appends a request line for HTTP/1.1.
pub fn push_request_line(out: &mut Vec<u8>, method: &[u8], target: &[u8]) {
    debug_assert!(is_token(method));
    debug_assert!(!target.is_empty() && target.iter().all(|&byte| is_target_byte(byte)));
    out.extend_from_slice(method);
    out.push(b' ');
    out.extend_from_slice(target);
    out.extend_from_slice(b" HTTP/1.1\r\n");
}

/// Appends a status line for HTTP/1.1. The space after the code is required even if `reason` is
/// empty (RFC 9112 4).
pub fn push_status_line(out: &mut Vec<u8>, status: u16, reason: &[u8]) {
    debug_assert!((100..=599).contains(&status));
    debug_assert!(reason.iter().all(|&byte| is_value_byte(byte)));
    out.extend_from_slice(b"HTTP/1.1 ");
    push_decimal(out, u64::from(status));
    out.push(b' ');
    out.extend_from_slice(reason);
    out.extend_from_slice(b"\r\n");
}

/// Returns the reason phrase of a status code, or an empty string for unknown codes.
///
/// The codes are defined in RFC 9110 15, RFC 4918 (507), RFC 6585 (428, 429, 431) and RFC 8470
/// (425). 499 is not standardised; nginx introduced it.
#[must_use]
pub const fn reason_phrase(status: u16) -> &'static str {
    match status {
        100 => "Continue",
        101 => "Switching Protocols",
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        206 => "Partial Content",
        301 => "Moved Permanently",
        302 => "Found",
        303 => "See Other",
        304 => "Not Modified",
        307 => "Temporary Redirect",
        308 => "Permanent Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        406 => "Not Acceptable",
        408 => "Request Timeout",
        409 => "Conflict",
        410 => "Gone",
        411 => "Length Required",
        412 => "Precondition Failed",
        413 => "Content Too Large",
        414 => "URI Too Long",
        415 => "Unsupported Media Type",
        416 => "Range Not Satisfiable",
        417 => "Expectation Failed",
        421 => "Misdirected Request",
        422 => "Unprocessable Content",
        425 => "Too Early",
        426 => "Upgrade Required",
        428 => "Precondition Required",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        499 => "Client Closed Request",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        505 => "HTTP Version Not Supported",
        507 => "Insufficient Storage",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_like_std_fmt() {
        let mut numbers = vec![0, 1, 9, 10, 15, 16, 99, 100, 255, 256, 4096, u64::MAX];
        numbers.extend((0..64).map(|shift| 1_u64 << shift));
        for number in numbers {
            let mut out = b"x".to_vec();
            push_decimal(&mut out, number);
            assert_eq!(out, format!("x{number}").as_bytes());
            let line = chunk_line(number as usize);
            assert_eq!(&*line, format!("{number:x}\r\n").as_bytes());
        }
    }

    #[test]
    fn lines_are_appended() {
        let mut out = Vec::new();
        push_request_line(&mut out, b"POST", b"/v1/x?y");
        push_field(&mut out, b"Host", b"a:1");
        push_field(&mut out, b"X", b"");
        push_status_line(&mut out, 404, reason_phrase(404).as_bytes());
        push_status_line(&mut out, 299, reason_phrase(299).as_bytes());
        let want = "POST /v1/x?y HTTP/1.1\r\nHost: a:1\r\nX: \r\n\
            HTTP/1.1 404 Not Found\r\nHTTP/1.1 299 \r\n";
        assert_eq!(out, want.as_bytes());
    }

    #[test]
    fn every_refusal_status_has_a_reason_phrase() {
        for status in [400, 414, 417, 431, 501, 502, 505] {
            assert_ne!(reason_phrase(status), "", "{status}");
        }
    }
}
