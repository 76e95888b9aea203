//! Request and response heads.
//!
//! A head is parsed in two steps. First, `Scan` checks the first line, searches for the other line
//! ends, remembers its position across calls, and enforces all limits and the CRLF rule. A head
//! that arrives byte by byte therefore costs linear work. Once the scan has found the blank line,
//! `httparse` parses the complete head once. `httparse` is lenient about line ends, leading blank
//! lines and target bytes; the scan is strict about them. If `httparse` refuses the head, a slow
//! second pass determines the exact error.

use std::mem::MaybeUninit;
use std::ops::Deref;

use httparse::Status;
use memchr::{memchr, memchr_iter};

use super::error::HeadError;
use super::first_line::{LineKind, Progress};
use super::method::Method;
use super::name::Name;
use super::syntax::{is_ows, is_token, is_value_byte};
use super::target::target_form;
use crate::limits::{HEAD_BYTES_MAX, HEAD_FIELDS_MAX, REQUEST_LINE_BYTES_MAX};
use crate::span::Span;

/// HTTP version of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Version {
    /// HTTP/1.0
    Http10,
    /// HTTP/1.1
    #[default]
    Http11,
}

/// One field line of a head, represented by spans of the buffer that the head was parsed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Span of the field name as received.
    pub name: Span,
    /// Span of the field value without leading and trailing whitespace.
    pub value: Span,
    /// The field name as an enum, [`Name::Other`] if the proxy does not act on the field.
    pub known: Name,
}

/// The head of a message, represented by spans of the buffer it was parsed from. The fields of its
/// first line are those of `L`.
#[derive(Clone, Debug, Default)]
pub struct Head<L> {
    line: L,
    /// The header fields in the order received.
    pub fields: Vec<Field>,
    /// Length of the head in bytes, including a skipped empty line before it and the blank line
    /// that ends it.
    pub len: usize,
    scan: Scan,
}

/// The head of a request.
pub type RequestHead = Head<RequestLine>;

/// The head of a response.
pub type ResponseHead = Head<StatusLine>;

/// The first line of a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct RequestLine {
    /// The method.
    pub method: Method,
    /// Span of the method as received.
    pub method_span: Span,
    /// Span of the request target as received.
    pub target: Span,
    /// The version.
    pub version: Version,
}

/// The first line of a response.
#[derive(Clone, Copy, Debug, Default)]
pub struct StatusLine {
    /// The status code, 100 to 599.
    pub status: u16,
    /// Span of the reason phrase as received, possibly empty.
    pub reason: Span,
    /// The version.
    pub version: Version,
}

/// The first line of a head, which determines how the head is parsed.
pub trait FirstLine: Default {
    /// Continues to parse a head, as [`Head::parse`] describes.
    #[doc(hidden)]
    fn parse(head: &mut Head<Self>, buf: &[u8]) -> Result<bool, HeadError>;
}

impl<L> Deref for Head<L> {
    type Target = L;

    fn deref(&self) -> &L {
        &self.line
    }
}

impl<L: FirstLine> Head<L> {
    /// Parses the head at the start of `buf`. Returns `true` if the head is complete and `false` if
    /// more bytes are needed.
    ///
    /// After `false`, call it again with the same bytes followed by more; only the new bytes are
    /// scanned. After `true` or an error, the next call starts a new head. To abandon an
    /// incomplete head, call [`Head::reset`].
    ///
    /// One empty line before a request line is skipped (RFC 9112 2.2 recommends skipping at least
    /// one); a second one is refused. Before a status line none is skipped: RFC 9112 2.2 allows
    /// that to servers only.
    ///
    /// # Errors
    /// The first violation in `buf`. The error does not depend on how the bytes were split over
    /// calls.
    pub fn parse(&mut self, buf: &[u8]) -> Result<bool, HeadError> {
        let done = L::parse(self, buf);
        match done {
            Ok(false) => {}
            Ok(true) => self.scan = Scan::default(),
            // The caller must not find fields or a length of a refused head.
            Err(_) => self.reset(),
        }
        done
    }

    /// Discards an incomplete head, so that the next call of [`Head::parse`] starts a new one.
    /// Keeps the memory allocated for `fields`.
    pub fn reset(&mut self) {
        self.fields.clear();
        self.len = 0;
        self.scan = Scan::default();
    }

    /// Returns the first field named `name`, or `None` if the head has no such field.
    #[must_use]
    pub fn field(&self, name: Name) -> Option<&Field> {
        self.fields.iter().find(|field| field.known == name)
    }

    /// Returns all fields named `name`, in the order received.
    pub fn fields_named(&self, name: Name) -> impl Iterator<Item = &Field> + Clone {
        self.fields.iter().filter(move |field| field.known == name)
    }
}

impl FirstLine for RequestLine {
    fn parse(head: &mut Head<Self>, buf: &[u8]) -> Result<bool, HeadError> {
        let start = if buf.starts_with(b"\r\n") { 2 } else { 0 };
        match buf.get(start) {
            None => return Ok(false),
            // Perhaps the start of an empty line.
            Some(b'\r') if buf.len() == 1 => return Ok(false),
            Some(_) => {}
        }
        let Some(len) = head.scan.find_end(buf, start, &REQUEST_LINE)? else {
            return Ok(false);
        };
        let bytes = &buf[start..len];
        let mut slots = [const { MaybeUninit::uninit() }; HEAD_FIELDS_MAX];
        let mut parsed = httparse::Request::new(&mut []);
        match parsed.parse_with_uninit_headers(bytes, &mut slots) {
            Ok(Status::Complete(parsed_len)) if parsed_len == bytes.len() => {}
            Ok(_) | Err(_) => return Err(diagnose(bytes)),
        }
        let (Some(method), Some(target), Some(version)) =
            (parsed.method, parsed.path, parsed.version)
        else {
            return Err(HeadError::BadRequestLine);
        };
        head.line.method_span = Span::within(buf, method.as_bytes());
        head.line.method = Method::of(method.as_bytes());
        head.line.target = Span::within(buf, target.as_bytes());
        head.line.version = version_of(version);
        fill(&mut head.fields, parsed.headers, buf);
        head.len = len;
        Ok(true)
    }
}

impl FirstLine for StatusLine {
    fn parse(head: &mut Head<Self>, buf: &[u8]) -> Result<bool, HeadError> {
        let Some(len) = head.scan.find_end(buf, 0, &STATUS_LINE)? else {
            return Ok(false);
        };
        let bytes = &buf[..len];
        let mut slots = [const { MaybeUninit::uninit() }; HEAD_FIELDS_MAX];
        let mut parsed = httparse::Response::new(&mut []);
        let parser = httparse::ParserConfig::default();
        match parser.parse_response_with_uninit_headers(&mut parsed, bytes, &mut slots) {
            Ok(Status::Complete(parsed_len)) if parsed_len == bytes.len() => {}
            Ok(_) | Err(_) => return Err(diagnose(bytes)),
        }
        let (Some(status), Some(version)) = (parsed.code, parsed.version) else {
            return Err(HeadError::BadStatusLine);
        };
        head.line.status = status;
        head.line.version = version_of(version);
        head.line.reason = reason_span(bytes);
        fill(&mut head.fields, parsed.headers, buf);
        head.len = len;
        Ok(true)
    }
}

/// How the first line of a head is checked.
struct LineRules {
    kind: LineKind,
    /// Maximum length of the line in bytes, without its CRLF.
    bytes_max: usize,
    /// Checks the parts of a complete line of the right form, without its CRLF.
    check: fn(&[u8]) -> Result<(), HeadError>,
}

const REQUEST_LINE: LineRules = LineRules {
    kind: LineKind::Request,
    bytes_max: REQUEST_LINE_BYTES_MAX,
    check: |line| {
        let mut parts = line.split(|byte| *byte == b' ');
        let method = Method::of(parts.next().unwrap_or_default());
        let form = target_form(method, parts.next().unwrap_or_default());
        form.map(|_| ()).ok_or(HeadError::BadTarget)
    },
};

const STATUS_LINE: LineRules = LineRules {
    kind: LineKind::Status,
    // Never reached: only the limit of the whole head applies.
    bytes_max: usize::MAX / 2,
    check: |_| Ok(()),
};

/// State of the search for the blank line that ends a head, kept between calls of `parse`.
#[derive(Clone, Copy, Debug, Default)]
struct Scan {
    /// Number of bytes of the buffer scanned so far.
    at: usize,
    /// Offset in the buffer at which the current, incomplete line starts.
    line_start: usize,
    /// Number of complete lines of the head found so far.
    lines: usize,
    first_line: Progress,
}

impl Scan {
    /// Scans the new bytes of `buf`, in which the head starts at `start`. Returns the offset in
    /// `buf` after the blank line that ends the head, or `None` if it has not arrived. `line` are
    /// the rules for the first line.
    ///
    /// The order of the checks makes the result independent of how the bytes are split over calls:
    /// an error is always the one that the first offending byte causes.
    fn find_end(
        &mut self,
        buf: &[u8],
        start: usize,
        line: &LineRules,
    ) -> Result<Option<usize>, HeadError> {
        // A head only grows between calls, so a shorter buffer contains another head.
        if self.at > buf.len() {
            *self = Self::default();
        }
        if self.at < start {
            self.at = start;
            self.line_start = start;
        }
        let from = self.at;
        if self.lines == 0 {
            // The bytes from here on are beyond a limit, which the checks below report.
            let end = (start + line.bytes_max + 2).min(HEAD_BYTES_MAX);
            let new = &buf[from..end.clamp(from, buf.len())];
            self.first_line = self.first_line.over(line.kind, new)?;
        }
        for offset in memchr_iter(b'\n', &buf[from..]) {
            let end = from + offset;
            self.check_limits(end, line.bytes_max)?;
            if end == self.line_start || buf[end - 1] != b'\r' {
                return Err(HeadError::BareLf);
            }
            if end - 1 == self.line_start {
                return Ok(Some(end + 1));
            }
            if self.lines == 0 {
                (line.check)(&buf[self.line_start..end - 1])?;
            }
            self.lines += 1;
            self.line_start = end + 1;
            if self.lines > HEAD_FIELDS_MAX + 1 {
                return Err(HeadError::TooManyFields);
            }
        }
        self.at = buf.len();
        self.check_limits(buf.len(), line.bytes_max)?;
        Ok(None)
    }

    /// Returns an error if a byte at `position` exceeds the limit of the first line, `line_max`, or
    /// of the whole head, `HEAD_BYTES_MAX`. For an incomplete head, `position` is that of the next
    /// byte: it has not arrived yet, but at least one more byte must follow.
    fn check_limits(&self, position: usize, line_max: usize) -> Result<(), HeadError> {
        // `+ 1` for the CR, which does not count as part of the line.
        if self.lines == 0 && position - self.line_start > line_max + 1 {
            return Err(HeadError::LineTooLong);
        }
        if position >= HEAD_BYTES_MAX {
            return Err(HeadError::TooLong);
        }
        Ok(())
    }
}

fn fill(fields: &mut Vec<Field>, parsed: &[httparse::Header<'_>], buf: &[u8]) {
    fields.clear();
    for header in parsed {
        let name = header.name.as_bytes();
        fields.push(Field {
            name: Span::within(buf, name),
            value: trim(buf, Span::within(buf, header.value)),
            known: Name::of(name),
        });
    }
}

/// Returns `span` without leading and trailing whitespace (RFC 9110 5.5).
pub(super) fn trim(buf: &[u8], span: Span) -> Span {
    let Span { mut start, mut end } = span;
    while start < end && is_ows(buf[start]) {
        start += 1;
    }
    while start < end && is_ows(buf[end - 1]) {
        end -= 1;
    }
    Span::new(start, end)
}

const fn version_of(minor: u8) -> Version {
    match minor {
        0 => Version::Http10,
        _ => Version::Http11,
    }
}

/// Returns the range of the reason phrase in a head that `httparse` accepted.
///
/// `httparse` returns an empty phrase if the phrase contains obs-text, so the phrase is located
/// here: `HTTP/1.1 200` is 12 bytes, followed by a space or the line end.
fn reason_span(head: &[u8]) -> Span {
    let end = memchr(b'\r', head).unwrap_or(head.len());
    Span::new(end.min(13), end)
}

/// Determines the error for a head that `httparse` refused although its first line is valid: that
/// of the first invalid field line. If this line has several violations, the first of the checks
/// below that fails determines the error. If the checks find none in the whole head, the error is
/// `BadToken`.
#[cold]
fn diagnose(head: &[u8]) -> HeadError {
    let mut line_start = 0;
    for end in memchr_iter(b'\n', head) {
        let line = &head[line_start..end.saturating_sub(1).max(line_start)];
        let error = if line_start == 0 {
            None
        } else if memchr(b'\r', line).is_some() {
            Some(HeadError::BareCr)
        } else {
            field_line_error(line)
        };
        if let Some(error) = error {
            return error;
        }
        line_start = end + 1;
    }
    // The checks above found no violation, so `httparse` refused the head for another reason.
    HeadError::BadToken
}

fn field_line_error(line: &[u8]) -> Option<HeadError> {
    if line.first().is_some_and(|&byte| is_ows(byte)) {
        return Some(HeadError::FieldLineFolded);
    }
    if line.is_empty() {
        return None;
    }
    let Some(colon) = memchr(b':', line) else {
        return Some(HeadError::NoColon);
    };
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    match name.last() {
        None => Some(HeadError::EmptyName),
        Some(&last) if is_ows(last) => Some(HeadError::SpaceBeforeColon),
        Some(_) if !is_token(name) => Some(HeadError::BadToken),
        Some(_) => {
            (!value.iter().all(|&byte| is_value_byte(byte))).then_some(HeadError::ControlByte)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::syntax::is_token_byte;
    use super::*;

    fn request(data: &[u8]) -> (Result<bool, HeadError>, RequestHead) {
        let mut head = RequestHead::default();
        let whole = head.parse(data);
        // The result must be the same at every split point, always with a reused head.
        let mut again = RequestHead::default();
        for split in 0..data.len() {
            let first = again.parse(&data[..split]);
            let got = if first == Ok(false) {
                again.parse(data)
            } else {
                first
            };
            assert_eq!(got, whole, "split at {split}");
            assert_eq!(again.fields, head.fields);
            assert_eq!(again.len, head.len);
            again.reset();
        }
        (whole, head)
    }

    fn response(data: &[u8]) -> (Result<bool, HeadError>, ResponseHead) {
        let mut head = ResponseHead::default();
        let whole = head.parse(data);
        let mut again = ResponseHead::default();
        for split in 0..data.len() {
            let first = again.parse(&data[..split]);
            let got = if first == Ok(false) {
                again.parse(data)
            } else {
                first
            };
            assert_eq!(got, whole, "split at {split}");
            again.reset();
        }
        (whole, head)
    }

    fn check_requests(cases: &[(&[u8], Result<bool, HeadError>)]) {
        for (data, want) in cases {
            let (got, _) = request(data);
            assert_eq!(got, *want, "{}", data.escape_ascii());
        }
    }

    #[test]
    fn request_heads_are_parsed() {
        let data = b"\r\nPOST /v1/x?y HTTP/1.1\r\nhOST: a:1\r\nX:\t b c \t\r\nEmpty:\r\n\r\nbody";
        let (done, head) = request(data);
        assert_eq!(done, Ok(true));
        assert_eq!(head.len, data.len() - 4);
        assert_eq!(head.method, Method::Post);
        assert_eq!(head.method_span.of(data), b"POST");
        assert_eq!(head.target.of(data), b"/v1/x?y");
        assert_eq!(head.version, Version::Http11);
        let fields: Vec<_> = head
            .fields
            .iter()
            .map(|field| (field.name.of(data), field.value.of(data), field.known))
            .collect();
        let want: [(&[u8], &[u8], Name); 3] = [
            (b"hOST", b"a:1", Name::Host),
            (b"X", b"b c", Name::Other),
            (b"Empty", b"", Name::Other),
        ];
        assert_eq!(fields, want);
        assert_eq!(head.field(Name::Host), Some(&head.fields[0]));
        assert_eq!(head.field(Name::Date), None);
        assert_eq!(head.fields_named(Name::Other).count(), 2);
    }

    #[test]
    fn response_heads_are_parsed() {
        let data = b"HTTP/1.0 503 Not \xe4 now\r\nDate: x\r\n\r\nrest";
        let (done, head) = response(data);
        assert_eq!(done, Ok(true));
        assert_eq!((head.status, head.version), (503, Version::Http10));
        assert_eq!(head.reason.of(data), b"Not \xe4 now");
        assert_eq!(head.len, data.len() - 4);
        assert_eq!(
            head.field(Name::Date).map(|field| field.value.of(data)),
            Some(&b"x"[..])
        );
        for (data, reason) in [
            (&b"HTTP/1.1 200\r\n\r\n"[..], &b""[..]),
            (b"HTTP/1.1 200 \r\n\r\n", b""),
            (b"HTTP/1.1 200 A b\r\n\r\n", b"A b"),
        ] {
            let (done, head) = response(data);
            assert_eq!(done, Ok(true));
            assert_eq!(head.reason.of(data), reason);
        }
    }

    #[test]
    fn invalid_request_lines_are_refused_with_the_correct_error() {
        use HeadError::*;
        let cases: &[(&[u8], Result<bool, HeadError>)] = &[
            (b"", Ok(false)),
            (b"\r", Ok(false)),
            (b"\r\n", Ok(false)),
            (b"GET / HTTP/1.1\r\nHost: a\r\n", Ok(false)),
            (b"GET / HTTP/1.1\r\nHost: a\r\n\r", Ok(false)),
            (b"GET / HTTP/1.1\r\n\r\n", Ok(true)),
            (b"GET / HTTP/1.0\r\nA_b: \x80\xff\t\r\n\r\n", Ok(true)),
            (b"M-SEARCH / HTTP/1.1\r\n\r\n", Ok(true)),
            (b"\n", Err(BareLf)),
            (b"\r\n\r\n", Err(BadRequestLine)),
            (b"\rGET / HTTP/1.1\r\n\r\n", Err(BadRequestLine)),
            (b" GET / HTTP/1.1\r\n\r\n", Err(BadMethod)),
            (b"\x16\x03\x01\x02", Err(BadMethod)),
            (b"GE(T / HTTP/1.1\r\n\r\n", Err(BadMethod)),
            (b"GET /\r\n\r\n", Err(BadRequestLine)),
            (b"GET\r\n\r\n", Err(BadRequestLine)),
            (b"GET /a b HTTP/1.1\r\n\r\n", Err(BadRequestLine)),
            (b"GET  / HTTP/1.1\r\n\r\n", Err(BadRequestLine)),
            (b"GET /  HTTP/1.1\r\n\r\n", Err(BadRequestLine)),
            (b"GET / HTTP/1.1 \r\n\r\n", Err(BadRequestLine)),
            (b"GET\t/ HTTP/1.1\r\n\r\n", Err(BadRequestLine)),
            (b"GET /\0 HTTP/1.1\r\n\r\n", Err(ControlByte)),
            (b"GET /\x7f HTTP/1.1\r\n\r\n", Err(ControlByte)),
            (b"GET /\xc3\xa4 HTTP/1.1\r\n\r\n", Err(BadTarget)),
            (b"GET /a#b HTTP/1.1\r\n\r\n", Err(BadTarget)),
            (b"GET /\ta HTTP/1.1\r\n\r\n", Err(BadTarget)),
            (b"GET a HTTP/1.1\r\n\r\n", Err(BadTarget)),
            (b"GET * HTTP/1.1\r\n\r\n", Err(BadTarget)),
            (b"GET a:80 HTTP/1.1\r\n\r\n", Err(BadTarget)),
            (b"CONNECT / HTTP/1.1\r\n\r\n", Err(BadTarget)),
            (b"GET ftp://a/ HTTP/1.1\r\n\r\n", Err(BadTarget)),
            (b"GET http://u@a/ HTTP/1.1\r\n\r\n", Err(BadTarget)),
            (b"GET http:///x HTTP/1.1\r\n\r\n", Err(BadTarget)),
            (b"GET http://a?x HTTP/1.1\r\n\r\n", Err(BadTarget)),
            (b"GET / HTTP/1.2\r\n\r\n", Err(UnsupportedVersion)),
            (b"PRI * HTTP/2.0\r\n\r\n", Err(UnsupportedVersion)),
            (b"GET / HTTP/1.\r\n\r\n", Err(BadVersion)),
            (b"GET / HTTP/11.1\r\n\r\n", Err(BadVersion)),
            (b"GET / http/1.1\r\n\r\n", Err(BadVersion)),
        ];
        check_requests(cases);
    }

    #[test]
    fn invalid_fields_are_refused_with_the_correct_error() {
        use HeadError::*;
        let cases: &[(&[u8], Result<bool, HeadError>)] = &[
            (b"GET / HTTP/1.1\nHost: a\r\n\r\n", Err(BareLf)),
            (b"GET / HTTP/1.1\r\nHost: a\n\r\n", Err(BareLf)),
            (b"GET / HTTP/1.1\r\nHost: a\r\n\n", Err(BareLf)),
            (b"GET / HTTP/1.1\r\nA: b\rc\r\n\r\n", Err(BareCr)),
            (b"GET / HTTP/1.1\r\nA: b\r\r\n\r\n", Err(BareCr)),
            (b"GET / HTTP/1.1\r\r\nA: b\r\n\r\n", Err(BareCr)),
            (b"GET / HTTP/1.1\r\n\r\r\n\r\n", Err(BareCr)),
            (b"GET / HTTP/1.1\r\n A: b\r\n\r\n", Err(FieldLineFolded)),
            (
                b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
                Err(FieldLineFolded),
            ),
            (
                b"GET / HTTP/1.1\r\nA: b\r\n\tc: d\r\n\r\n",
                Err(FieldLineFolded),
            ),
            (b"GET / HTTP/1.1\r\nA: b\r\n \r\n\r\n", Err(FieldLineFolded)),
            (b"GET / HTTP/1.1\r\nA : b\r\n\r\n", Err(SpaceBeforeColon)),
            (b"GET / HTTP/1.1\r\nA\t: b\r\n\r\n", Err(SpaceBeforeColon)),
            (b"GET / HTTP/1.1\r\n: b\r\n\r\n", Err(EmptyName)),
            (b"GET / HTTP/1.1\r\nA\r\n\r\n", Err(NoColon)),
            (b"GET / HTTP/1.1\r\nA b: c\r\n\r\n", Err(BadToken)),
            (b"GET / HTTP/1.1\r\nA\0: c\r\n\r\n", Err(BadToken)),
            (b"GET / HTTP/1.1\r\n\xc3\xa4: c\r\n\r\n", Err(BadToken)),
            (b"GET / HTTP/1.1\r\nA: \0\r\n\r\n", Err(ControlByte)),
            (b"GET / HTTP/1.1\r\nA: a\x01b\r\n\r\n", Err(ControlByte)),
            (b"GET / HTTP/1.1\r\nA: a\x7f\r\n\r\n", Err(ControlByte)),
            (b"GET / HTTP/1.1\r\nA: a\x0b\r\n\r\n", Err(ControlByte)),
        ];
        check_requests(cases);
    }

    #[test]
    fn invalid_responses_are_refused_with_the_correct_error() {
        use HeadError::*;
        let cases: &[(&[u8], Result<bool, HeadError>)] = &[
            (b"", Ok(false)),
            (b"HT", Ok(false)),
            (b"HTTP/1.1 200 OK\r\n", Ok(false)),
            (b"HTTP/1.1 599 \r\n\r\n", Ok(true)),
            (b"\r\nHTTP/1.1 200 OK\r\n\r\n", Err(BadStatusLine)),
            (b"HTTX", Err(BadStatusLine)),
            (b"ICY 200 OK\r\n\r\n", Err(BadStatusLine)),
            (b"HTTP/2.0 200 OK\r\n\r\n", Err(UnsupportedVersion)),
            (b"HTTP/1.x 200 OK\r\n\r\n", Err(BadVersion)),
            (b"HTTP/1.1\r\n\r\n", Err(BadStatusLine)),
            (b"HTTP/1.1  200 OK\r\n\r\n", Err(BadStatusLine)),
            (b"HTTP/1.1 20 OK\r\n\r\n", Err(BadStatusLine)),
            (b"HTTP/1.1 2000 OK\r\n\r\n", Err(BadStatusLine)),
            (b"HTTP/1.1 +20 OK\r\n\r\n", Err(BadStatusLine)),
            (b"HTTP/1.1 099 OK\r\n\r\n", Err(BadStatus)),
            (b"HTTP/1.1 600 OK\r\n\r\n", Err(BadStatus)),
            (b"HTTP/1.1 200 O\0K\r\n\r\n", Err(ControlByte)),
            (b"HTTP/1.1 200 OK\n\r\n", Err(BareLf)),
            (b"HTTP/1.1 200 OK\r\nA: b\n\r\n", Err(BareLf)),
            (b"HTTP/1.1 200 O\rK\r\n\r\n", Err(BareCr)),
            (
                b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
                Err(FieldLineFolded),
            ),
            (b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n", Err(SpaceBeforeColon)),
            (b"HTTP/1.1 200 OK\r\n: b\r\n\r\n", Err(EmptyName)),
            (b"HTTP/1.1 200 OK\r\nA\r\n\r\n", Err(NoColon)),
            (b"HTTP/1.1 200 OK\r\nA(: b\r\n\r\n", Err(BadToken)),
            (b"HTTP/1.1 200 OK\r\nA: b\0\r\n\r\n", Err(ControlByte)),
        ];
        for (data, want) in cases {
            let (got, _) = response(data);
            assert_eq!(got, *want, "{}", data.escape_ascii());
        }
    }

    /// Places every byte value into a field name, a field value and a request target. The head must
    /// be accepted exactly if the byte is allowed there.
    #[test]
    fn every_byte_in_names_values_and_targets() {
        for byte in 0..=255_u8 {
            let data = [b"GET / HTTP/1.1\r\nA", &[byte][..], b"b: c\r\n\r\n"].concat();
            let fits = is_token_byte(byte) || byte == b':';
            assert_eq!(request(&data).0.is_ok(), fits, "name {byte}");
            let data = [b"GET / HTTP/1.1\r\nA: b", &[byte][..], b"c\r\n\r\n"].concat();
            let fits = byte == b'\t' || byte >= b' ' && byte != 0x7f;
            assert_eq!(request(&data).0.is_ok(), fits, "value {byte}");
            // Long enough for the SIMD paths of `httparse`.
            let long = vec![b'v'; 70];
            for at in [0, 15, 16, 31, 32, 69] {
                let mut value = long.clone();
                value[at] = byte;
                let data = [b"HTTP/1.1 200 OK\r\nA: ", &value[..], b"\r\n\r\n"].concat();
                assert_eq!(response(&data).0.is_ok(), fits, "value {byte} at {at}");
                let mut target = long.clone();
                target[at] = byte;
                let data = [b"GET /", &target[..], b" HTTP/1.1\r\n\r\n"].concat();
                let fits = (0x21..=0x7e).contains(&byte) && byte != b'#';
                assert_eq!(request(&data).0.is_ok(), fits, "target {byte} at {at}");
            }
        }
    }

    fn grow(data: &[u8]) -> Result<bool, HeadError> {
        let mut pieces = RequestHead::default();
        for len in 0..data.len() {
            let done = pieces.parse(&data[..len]);
            if done != Ok(false) {
                return done;
            }
        }
        pieces.parse(data)
    }

    #[test]
    fn limits_are_exact() {
        let with_target = |len: usize| {
            // "GET /" and " HTTP/1.1" are 14 bytes.
            let target = "a".repeat(len - 14);
            format!("GET /{target} HTTP/1.1\r\n\r\n").into_bytes()
        };
        let with_len = |len: usize| {
            let mut head = b"GET / HTTP/1.1\r\nA: ".to_vec();
            head.resize(len - 4, b'v');
            head.extend_from_slice(b"\r\n\r\n");
            head
        };
        let with_fields = |count: usize| {
            let fields = "A: b\r\n".repeat(count);
            format!("GET / HTTP/1.1\r\n{fields}\r\n").into_bytes()
        };
        let cases = [
            (with_target(REQUEST_LINE_BYTES_MAX), Ok(true)),
            (
                with_target(REQUEST_LINE_BYTES_MAX + 1),
                Err(HeadError::LineTooLong),
            ),
            (with_target(HEAD_BYTES_MAX * 2), Err(HeadError::LineTooLong)),
            (with_len(HEAD_BYTES_MAX), Ok(true)),
            (with_len(HEAD_BYTES_MAX + 1), Err(HeadError::TooLong)),
            (with_len(HEAD_BYTES_MAX * 2), Err(HeadError::TooLong)),
            (with_fields(HEAD_FIELDS_MAX), Ok(true)),
            (
                with_fields(HEAD_FIELDS_MAX + 1),
                Err(HeadError::TooManyFields),
            ),
        ];
        for (number, (data, want)) in cases.iter().enumerate() {
            let mut head = RequestHead::default();
            assert_eq!(head.parse(data), *want, "case {number}");
            assert_eq!(grow(data), *want, "case {number} byte by byte");
        }
        // The first line of a response has no limit other than that of the head.
        let reason = "r".repeat(HEAD_BYTES_MAX - 17);
        let mut head = ResponseHead::default();
        let data = format!("HTTP/1.1 200 {reason}\r\n\r\n");
        assert_eq!(head.parse(data.as_bytes()), Ok(true));
        assert_eq!(head.len, HEAD_BYTES_MAX);
        let data = format!("HTTP/1.1 200 {reason}r\r\n\r\n");
        assert_eq!(head.parse(data.as_bytes()), Err(HeadError::TooLong));
        assert_eq!(
            head.parse(&data.as_bytes()[..HEAD_BYTES_MAX]),
            Err(HeadError::TooLong)
        );
    }

    #[test]
    fn heads_can_be_reused() {
        let mut head = RequestHead::default();
        assert_eq!(
            head.parse(b"GET / HTTP/1.1\r\nA: b\r\nC: d\r\n\r\n"),
            Ok(true)
        );
        assert_eq!(head.parse(b"GET /longer/target HTTP/1.1\r\nA"), Ok(false));
        head.reset();
        assert_eq!(head.parse(b"PUT / HTTP/1.0\r\n\r\n"), Ok(true));
        assert_eq!((head.method, head.fields.len()), (Method::Put, 0));
        assert_eq!(head.parse(b"GET / HTTP/1.1\r\nA: b\r\nC: d"), Ok(false));
        assert_eq!(
            head.parse(b"GET / HTTP/1.1\nA: b\r\n"),
            Err(HeadError::BareLf)
        );
        assert_eq!(head.parse(b"GET / HTTP/1.1\r\nA: b\r\n\r\n"), Ok(true));
        assert_eq!(head.parse(b"\n"), Err(HeadError::BareLf));
        assert_eq!((head.len, head.fields.len()), (0, 0));
        assert_eq!(head.parse(b"get / HTTP/1.1\r\n\r\n"), Ok(true));
        assert_eq!(head.method, Method::Other);
    }
}
