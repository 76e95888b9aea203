//! Message framing and connection persistence (RFC 9112 6 and 9).
//!
//! Only this module determines where a message ends. Code that forwards a message drops the
//! received framing fields and writes new ones from the [`Framing`] determined here, so that the
//! next hop cannot find a different end.

use super::chunked::{ChunkError, Chunked, Taken};
use super::error::HeadError;
use super::head::{Field, RequestHead, ResponseHead, Version};
use super::hop::list_items;
use super::method::Method;
use super::name::Name;
use super::syntax::prefix_len;
use super::target::{authority_of, is_authority};
use crate::span::Span;

/// Method by which the end of a body is determined.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// The message has no body.
    #[default]
    None,
    /// The body has the number of bytes that Content-Length specifies.
    Length(u64),
    /// The chunked coding marks the end of the body.
    Chunked,
    /// The body ends when the connection closes. Only responses can have this framing.
    UntilClose,
}

/// Validates Host, Content-Length and Transfer-Encoding and returns the framing of the request body
/// (RFC 9112 3.2, 6.1, 6.3).
///
/// # Errors
/// One of these fields is invalid, or two implementations could interpret the request differently.
pub fn request_framing(head: &RequestHead, buf: &[u8]) -> Result<Framing, HeadError> {
    check_host(head, buf)?;
    let announced = announced(&head.fields, head.version, buf)?;
    Ok(match announced {
        Announced::Nothing => Framing::None,
        Announced::Length(length) => Framing::Length(length),
        Announced::Chunked => Framing::Chunked,
    })
}

/// Returns the framing of the body of a response to a request with `method` (RFC 9112 6.3).
///
/// For a 101 this is [`Framing::None`], because another protocol follows the head.
///
/// Responses are validated as strictly as requests, with one exception: a 1xx or 204 may have
/// `Content-Length: 0`, which is redundant but unambiguous.
///
/// # Errors
/// The framing fields are invalid or ambiguous, a 1xx or 204 declares a body, or the response is a
/// 2xx to CONNECT.
pub fn response_framing(
    method: Method,
    head: &ResponseHead,
    buf: &[u8],
) -> Result<Framing, HeadError> {
    let announced = announced(&head.fields, head.version, buf)?;
    if method == Method::Connect && (200..=299).contains(&head.status) {
        return Err(HeadError::ConnectAccepted);
    }
    if head.status < 200 || head.status == 204 {
        return match announced {
            Announced::Nothing | Announced::Length(0) => Ok(Framing::None),
            Announced::Length(_) | Announced::Chunked => Err(HeadError::BodyForbidden),
        };
    }
    if method == Method::Head || head.status == 304 {
        return Ok(Framing::None);
    }
    Ok(match announced {
        Announced::Nothing => Framing::UntilClose,
        Announced::Length(length) => Framing::Length(length),
        Announced::Chunked => Framing::Chunked,
    })
}

/// Returns whether the client keeps its connection open after this request (RFC 9112 9.3).
#[must_use]
pub fn request_keeps_alive(head: &RequestHead, buf: &[u8]) -> bool {
    keeps_alive(&head.fields, head.version, buf)
}

/// Returns whether the engine keeps its connection open after this response (RFC 9112 9.3).
#[must_use]
pub fn response_keeps_alive(head: &ResponseHead, buf: &[u8], framing: Framing) -> bool {
    framing != Framing::UntilClose && keeps_alive(&head.fields, head.version, buf)
}

/// Returns whether the client waits for a 100 (Continue) response before it sends the body.
///
/// An expectation in an HTTP/1.0 request is ignored (RFC 9110 10.1.1).
///
/// # Errors
/// An expectation other than `100-continue`.
pub fn expects_continue(head: &RequestHead, buf: &[u8]) -> Result<bool, HeadError> {
    if head.version == Version::Http10 {
        return Ok(false);
    }
    let mut expects = false;
    for field in head.fields_named(Name::Expect) {
        if !field.value.of(buf).eq_ignore_ascii_case(b"100-continue") {
            return Err(HeadError::UnknownExpectation);
        }
        expects = true;
    }
    Ok(expects)
}

/// Returns whether the client requests a switch to the WebSocket protocol on this connection (RFC
/// 9110 7.8): an HTTP/1.1 GET request (RFC 6455 4.1) whose Connection lists `upgrade` and whose
/// Upgrade lists `websocket`.
///
/// No other protocol is ever requested from an engine. A tunnel to `h2c` would carry any number of
/// requests that nothing here inspects.
#[must_use]
pub fn wants_websocket(head: &RequestHead, buf: &[u8]) -> bool {
    head.version == Version::Http11
        && head.method == Method::Get
        && has_connection_option(&head.fields, buf, b"upgrade")
        && head
            .fields_named(Name::Upgrade)
            .flat_map(|field| list_items(buf, field.value))
            .any(|item| item.of(buf).eq_ignore_ascii_case(b"websocket"))
}

/// Returns whether the body of a message with these fields has a content coding (RFC 9110 8.4).
/// `identity` is none.
#[must_use]
pub fn is_coded(fields: &[Field], buf: &[u8]) -> bool {
    fields
        .iter()
        .filter(|field| field.known == Name::ContentEncoding)
        .flat_map(|field| list_items(buf, field.value))
        .any(|item| !item.of(buf).eq_ignore_ascii_case(b"identity"))
}

/// Parses a decimal number of one or more digits that fits into 64 bits. Returns `None` for any
/// other input.
///
/// Unlike the integer parsers of the standard library, it does not accept a sign.
#[must_use]
pub fn parse_decimal(bytes: &[u8]) -> Option<u64> {
    if bytes.is_empty() {
        return None;
    }
    let mut number = 0_u64;
    for &byte in bytes {
        if !byte.is_ascii_digit() {
            return None;
        }
        number = number
            .checked_mul(10)?
            .checked_add(u64::from(byte - b'0'))?;
    }
    Some(number)
}

/// Tracks the progress of a body of any framing while its bytes are forwarded.
#[derive(Clone, Debug)]
pub struct BodyMeter {
    framing: Framing,
    /// Remaining bytes of a body with [`Framing::Length`]; 0 with any other framing.
    left: u64,
    /// Bytes received so far of a body with [`Framing::UntilClose`]; 0 with any other framing.
    open_bytes: u64,
    chunked: Chunked,
}

impl BodyMeter {
    /// Creates a meter for a body of which no byte has been received.
    #[must_use]
    pub fn new(framing: Framing) -> Self {
        let left = match framing {
            Framing::Length(length) => length,
            Framing::None | Framing::Chunked | Framing::UntilClose => 0,
        };
        Self {
            framing,
            left,
            open_bytes: 0,
            chunked: Chunked::new(),
        }
    }

    /// Processes received bytes and returns how many of them, from the front, belong to this body.
    ///
    /// If the result is less than `bytes.len()`, the body has ended and the remaining bytes are not
    /// part of it.
    ///
    /// # Errors
    /// The chunked coding is malformed.
    pub fn take(&mut self, bytes: &[u8]) -> Result<usize, ChunkError> {
        self.decode(bytes, |_| {})
    }

    /// Does the same as [`BodyMeter::take`] and also returns which of the bytes are trailer fields.
    ///
    /// # Errors
    /// The chunked coding is malformed.
    pub fn take_with_trailers(&mut self, bytes: &[u8]) -> Result<Taken, ChunkError> {
        match self.framing {
            Framing::Chunked => self.chunked.take(bytes),
            Framing::None | Framing::Length(_) | Framing::UntilClose => Ok(Taken {
                len: self.take(bytes)?,
                trailers: Span::default(),
            }),
        }
    }

    /// Does the same as [`BodyMeter::take`] and also calls `payload` with each run of body bytes,
    /// as a range of `bytes`.
    ///
    /// # Errors
    /// The chunked coding is malformed.
    pub fn decode(
        &mut self,
        bytes: &[u8],
        mut payload: impl FnMut(Span),
    ) -> Result<usize, ChunkError> {
        let taken = match self.framing {
            Framing::Chunked => return self.chunked.decode(bytes, payload),
            Framing::None => 0,
            Framing::Length(_) => {
                let taken = prefix_len(bytes, self.left);
                self.left -= taken as u64;
                taken
            }
            Framing::UntilClose => {
                self.open_bytes += bytes.len() as u64;
                bytes.len()
            }
        };
        if taken > 0 {
            payload(Span::new(0, taken));
        }
        Ok(taken)
    }

    /// Returns whether the body has ended. Always `false` for [`Framing::UntilClose`].
    #[must_use]
    pub const fn is_done(&self) -> bool {
        match self.framing {
            Framing::None => true,
            Framing::Length(_) => self.left == 0,
            Framing::Chunked => self.chunked.is_done(),
            Framing::UntilClose => false,
        }
    }

    /// Returns whether the end of the connection is the regular end of this body rather than a
    /// truncation.
    #[must_use]
    pub fn ends_at_close(&self) -> bool {
        self.framing == Framing::UntilClose
    }

    /// Returns the number of remaining bytes of a body with [`Framing::Length`], otherwise `None`.
    #[must_use]
    pub const fn remaining(&self) -> Option<u64> {
        match self.framing {
            Framing::Length(_) => Some(self.left),
            Framing::None | Framing::Chunked | Framing::UntilClose => None,
        }
    }

    /// Counts `bytes` bytes of a body with [`Framing::Length`] that were spliced inside the kernel
    /// and not passed to [`BodyMeter::take`].
    ///
    /// Returns `false` and counts nothing if more bytes are given than remain or if the body has
    /// another framing.
    #[must_use]
    pub const fn skip(&mut self, bytes: u64) -> bool {
        if !matches!(self.framing, Framing::Length(_)) || bytes > self.left {
            return false;
        }
        self.left -= bytes;
        true
    }

    /// Returns the number of body bytes counted so far, excluding the chunked coding.
    #[must_use]
    pub const fn payload_bytes(&self) -> u64 {
        match self.framing {
            Framing::None => 0,
            Framing::Length(length) => length - self.left,
            Framing::Chunked => self.chunked.payload_bytes(),
            Framing::UntilClose => self.open_bytes,
        }
    }

    /// Returns the framing passed to [`BodyMeter::new`].
    #[must_use]
    pub const fn framing(&self) -> Framing {
        self.framing
    }
}

/// The framing that the Content-Length and Transfer-Encoding fields of a head declare.
enum Announced {
    Nothing,
    Length(u64),
    Chunked,
}

fn announced(fields: &[Field], version: Version, buf: &[u8]) -> Result<Announced, HeadError> {
    let mut length = None;
    let mut coding = None;
    for field in fields {
        if field.known == Name::ContentLength && length.replace(field.value).is_some() {
            return Err(HeadError::RepeatedLength);
        }
        if field.known == Name::TransferEncoding && coding.replace(field.value).is_some() {
            return Err(HeadError::RepeatedCoding);
        }
    }
    match (length, coding) {
        (None, None) => Ok(Announced::Nothing),
        (Some(_), Some(_)) => Err(HeadError::BothFramings),
        (Some(length), None) => match parse_decimal(length.of(buf)) {
            Some(length) => Ok(Announced::Length(length)),
            None => Err(HeadError::BadLength),
        },
        (None, Some(_)) if version == Version::Http10 => Err(HeadError::CodingInHttp10),
        (None, Some(coding)) if coding.of(buf).eq_ignore_ascii_case(b"chunked") => {
            Ok(Announced::Chunked)
        }
        (None, Some(_)) => Err(HeadError::UnknownCoding),
    }
}

/// Returns an error unless an HTTP/1.1 request has exactly one Host field, or an HTTP/1.0 request
/// at most one, and the field is well-formed (RFC 9112 3.2).
///
/// RFC 9112 3.2.2 gives an absolute-form target precedence over Host. Here the authority of such a
/// target must equal Host, ignoring ASCII case, as clients are required to send it, so that no
/// later hop can pick a different host.
fn check_host(head: &RequestHead, buf: &[u8]) -> Result<(), HeadError> {
    let mut hosts = head.fields_named(Name::Host);
    let Some(host) = hosts.next() else {
        return match head.version {
            Version::Http10 => Ok(()),
            Version::Http11 => Err(HeadError::NoHost),
        };
    };
    if hosts.next().is_some() {
        return Err(HeadError::RepeatedHost);
    }
    let host = host.value.of(buf);
    if !is_authority(host) {
        return Err(HeadError::BadHost);
    }
    match authority_of(head.target.of(buf)) {
        Some(authority) if !authority.eq_ignore_ascii_case(host) => Err(HeadError::HostMismatch),
        Some(_) | None => Ok(()),
    }
}

fn keeps_alive(fields: &[Field], version: Version, buf: &[u8]) -> bool {
    if has_connection_option(fields, buf, b"close") {
        return false;
    }
    match version {
        Version::Http11 => true,
        Version::Http10 => has_connection_option(fields, buf, b"keep-alive"),
    }
}

fn has_connection_option(fields: &[Field], buf: &[u8], option: &[u8]) -> bool {
    fields
        .iter()
        .filter(|field| field.known == Name::Connection)
        .flat_map(|field| list_items(buf, field.value))
        .any(|item| item.of(buf).eq_ignore_ascii_case(option))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(version: &str, fields: &str) -> (RequestHead, Vec<u8>) {
        let data = format!("POST / {version}\r\n{fields}\r\n").into_bytes();
        let mut head = RequestHead::default();
        assert_eq!(head.parse(&data), Ok(true), "{fields}");
        (head, data)
    }

    fn response(line: &str, fields: &str) -> (ResponseHead, Vec<u8>) {
        let data = format!("HTTP/{line} x\r\n{fields}\r\n").into_bytes();
        let mut head = ResponseHead::default();
        assert_eq!(head.parse(&data), Ok(true), "{fields}");
        (head, data)
    }

    /// Returns pairs of header fields and the framing or error that must result from them, which is
    /// the same for requests and responses. The two differ only for a message without both
    /// Content-Length and Transfer-Encoding, which is not in this list.
    fn bodies() -> Vec<(&'static str, Result<Framing, HeadError>)> {
        use HeadError::*;
        vec![
            ("Content-Length: 0\r\n", Ok(Framing::Length(0))),
            ("content-length:5 \r\n", Ok(Framing::Length(5))),
            ("Content-Length: 007\r\n", Ok(Framing::Length(7))),
            (
                "Content-Length: 18446744073709551615\r\n",
                Ok(Framing::Length(u64::MAX)),
            ),
            ("Content-Length: 18446744073709551616\r\n", Err(BadLength)),
            ("Content-Length:\r\n", Err(BadLength)),
            ("Content-Length: +5\r\n", Err(BadLength)),
            ("Content-Length: -5\r\n", Err(BadLength)),
            ("Content-Length: 0x5\r\n", Err(BadLength)),
            ("Content-Length: 5_0\r\n", Err(BadLength)),
            ("Content-Length: 5 5\r\n", Err(BadLength)),
            ("Content-Length: 5, 5\r\n", Err(BadLength)),
            ("Content-Length: 5,\r\n", Err(BadLength)),
            ("Content-Length: 5.0\r\n", Err(BadLength)),
            ("Content-Length: \u{ff15}\r\n", Err(BadLength)),
            (
                "Content-Length: 5\r\nContent-Length: 5\r\n",
                Err(RepeatedLength),
            ),
            (
                "Content-Length: 5\r\nX: y\r\ncontent-length:\r\n",
                Err(RepeatedLength),
            ),
            ("Transfer-Encoding: chunked\r\n", Ok(Framing::Chunked)),
            ("transfer-encoding:\tCHUNKED \r\n", Ok(Framing::Chunked)),
            ("Transfer-Encoding:\r\n", Err(UnknownCoding)),
            ("Transfer-Encoding: identity\r\n", Err(UnknownCoding)),
            ("Transfer-Encoding: gzip, chunked\r\n", Err(UnknownCoding)),
            (
                "Transfer-Encoding: chunked, chunked\r\n",
                Err(UnknownCoding),
            ),
            ("Transfer-Encoding: chunked,\r\n", Err(UnknownCoding)),
            ("Transfer-Encoding: xchunked\r\n", Err(UnknownCoding)),
            ("Transfer-Encoding: chunked;q=1\r\n", Err(UnknownCoding)),
            ("Transfer-Encoding: \"chunked\"\r\n", Err(UnknownCoding)),
            (
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
                Err(RepeatedCoding),
            ),
            (
                "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
                Err(BothFramings),
            ),
            (
                "Transfer-Encoding: chunked\r\nContent-Length: 0\r\n",
                Err(BothFramings),
            ),
            (
                "Transfer-Encoding: x\r\nContent-Length: y\r\n",
                Err(BothFramings),
            ),
        ]
    }

    #[test]
    fn framing_of_requests_and_responses() {
        for (fields, want) in bodies() {
            let (head, data) = request("HTTP/1.1", &format!("Host: a\r\n{fields}"));
            assert_eq!(request_framing(&head, &data), want, "request {fields}");
            let (head, data) = response("1.1 200", fields);
            assert_eq!(
                response_framing(Method::Post, &head, &data),
                want,
                "response {fields}"
            );
        }
        let (head, data) = request("HTTP/1.1", "Host: a\r\n");
        assert_eq!(request_framing(&head, &data), Ok(Framing::None));
        let (head, data) = response("1.1 200", "");
        assert_eq!(
            response_framing(Method::Get, &head, &data),
            Ok(Framing::UntilClose)
        );
        let coding = "Transfer-Encoding: chunked\r\n";
        let (head, data) = request("HTTP/1.0", coding);
        assert_eq!(
            request_framing(&head, &data),
            Err(HeadError::CodingInHttp10)
        );
        let (head, data) = response("1.0 200", coding);
        let got = response_framing(Method::Get, &head, &data);
        assert_eq!(got, Err(HeadError::CodingInHttp10));
    }

    #[test]
    fn hosts() {
        use HeadError::*;
        let cases = [
            ("HTTP/1.1", "", Err(NoHost)),
            ("HTTP/1.0", "", Ok(Framing::None)),
            ("HTTP/1.0", "Host: a\r\n", Ok(Framing::None)),
            ("HTTP/1.0", "Host: a\r\nHost: a\r\n", Err(RepeatedHost)),
            ("HTTP/1.1", "Host: a\r\nhost: a\r\n", Err(RepeatedHost)),
            ("HTTP/1.1", "Host:\r\n", Ok(Framing::None)),
            ("HTTP/1.1", "Host: [::1]:8000\r\n", Ok(Framing::None)),
            ("HTTP/1.1", "Host: a b\r\n", Err(BadHost)),
            ("HTTP/1.1", "Host: a, b\r\n", Err(BadHost)),
            ("HTTP/1.1", "Host: a/b\r\n", Err(BadHost)),
            ("HTTP/1.1", "Host: u@a\r\n", Err(BadHost)),
            ("HTTP/1.1", "Host: a:b\r\n", Err(BadHost)),
        ];
        for (version, fields, want) in cases {
            let (head, data) = request(version, fields);
            assert_eq!(request_framing(&head, &data), want, "{version} {fields}");
        }
        for (host, want) in [("A:1", Ok(Framing::None)), ("b:1", Err(HostMismatch))] {
            let data = format!("GET http://a:1/x HTTP/1.1\r\nHost: {host}\r\n\r\n").into_bytes();
            let mut head = RequestHead::default();
            assert_eq!(head.parse(&data), Ok(true));
            assert_eq!(request_framing(&head, &data), want, "{host}");
        }
    }

    #[test]
    fn responses_without_a_body() {
        use HeadError::*;
        let length = "Content-Length: 5\r\n";
        let zero = "Content-Length: 0\r\n";
        let coding = "Transfer-Encoding: chunked\r\n";
        let none = Ok(Framing::None);
        let cases = [
            (Method::Head, "1.1 200", length, none),
            (Method::Head, "1.1 200", coding, none),
            (Method::Head, "1.1 200", "", none),
            (
                Method::Head,
                "1.1 200",
                "Content-Length: x\r\n",
                Err(BadLength),
            ),
            (Method::Get, "1.1 304", length, none),
            (Method::Get, "1.1 304", coding, none),
            (Method::Get, "1.1 304", "", none),
            (Method::Get, "1.1 204", "", none),
            (Method::Get, "1.1 204", zero, none),
            (Method::Get, "1.1 204", length, Err(BodyForbidden)),
            (Method::Get, "1.1 204", coding, Err(BodyForbidden)),
            (Method::Get, "1.1 100", "", none),
            (Method::Get, "1.1 103", length, Err(BodyForbidden)),
            (Method::Get, "1.1 101", coding, Err(BodyForbidden)),
            (Method::Head, "1.1 204", length, Err(BodyForbidden)),
            (Method::Get, "1.1 205", zero, Ok(Framing::Length(0))),
            (Method::Connect, "1.1 200", "", Err(ConnectAccepted)),
            (Method::Connect, "1.1 204", "", Err(ConnectAccepted)),
            (Method::Connect, "1.1 405", length, Ok(Framing::Length(5))),
            (Method::Get, "1.0 200", "", Ok(Framing::UntilClose)),
        ];
        for (method, line, fields, want) in cases {
            let (head, data) = response(line, fields);
            let got = response_framing(method, &head, &data);
            assert_eq!(got, want, "{method:?} {line} {fields}");
        }
    }

    #[test]
    fn persistence() {
        let cases = [
            ("1.1", "", true),
            ("1.1", "Connection: close\r\n", false),
            ("1.1", "Connection: CLOSE\r\n", false),
            ("1.1", "Connection: x , ,close\r\n", false),
            (
                "1.1",
                "Connection: keep-alive\r\nConnection: close\r\n",
                false,
            ),
            ("1.1", "Connection: closed\r\n", true),
            ("1.1", "X: close\r\n", true),
            ("1.0", "", false),
            ("1.0", "Connection: Keep-Alive\r\n", true),
            ("1.0", "Connection: keep-alive, close\r\n", false),
            ("1.0", "Proxy-Connection: keep-alive\r\n", false),
        ];
        for (version, fields, want) in cases {
            let (head, data) = request(&format!("HTTP/{version}"), fields);
            assert_eq!(
                request_keeps_alive(&head, &data),
                want,
                "{version} {fields}"
            );
            let (head, data) = response(&format!("{version} 200"), fields);
            assert_eq!(response_keeps_alive(&head, &data, Framing::Chunked), want);
            assert!(!response_keeps_alive(&head, &data, Framing::UntilClose));
        }
    }

    #[test]
    fn expectations() {
        let unknown = Err(HeadError::UnknownExpectation);
        let cases = [
            ("1.1", "", Ok(false)),
            ("1.1", "Expect: 100-Continue\r\n", Ok(true)),
            ("1.0", "Expect: 100-continue\r\n", Ok(false)),
            ("1.1", "Expect:\r\n", unknown),
            ("1.1", "Expect: 200-ok\r\n", unknown),
            ("1.1", "Expect: 100-continue\r\nExpect: x\r\n", unknown),
        ];
        for (version, fields, want) in cases {
            let (head, data) = request(&format!("HTTP/{version}"), fields);
            assert_eq!(expects_continue(&head, &data), want, "{version} {fields}");
        }
    }

    #[test]
    fn only_a_websocket_handshake_is_an_upgrade() {
        let upgrade = |method: &str, version: &str, fields: &str| {
            let data = format!("{method} / HTTP/{version}\r\n{fields}\r\n").into_bytes();
            let mut head = RequestHead::default();
            assert_eq!(head.parse(&data), Ok(true));
            wants_websocket(&head, &data)
        };
        let websocket = "Connection: x, Upgrade\r\nUpgrade: websocket\r\n";
        assert!(upgrade("GET", "1.1", websocket));
        assert!(!upgrade("GET", "1.0", websocket));
        assert!(!upgrade("POST", "1.1", websocket));
        for (fields, want) in [
            ("Connection: upgrade\r\nUpgrade: h2c, WebSocket\r\n", true),
            (
                "Connection: upgrade\r\nUpgrade: h2c\r\nUpgrade: websocket\r\n",
                true,
            ),
            ("Connection: upgrade\r\nUpgrade: h2c\r\n", false),
            ("Connection: upgrade\r\nUpgrade: websocket/13\r\n", false),
            ("Connection: upgrade\r\nUpgrade: TLS/1.2\r\n", false),
            (
                "Connection: upgrade, http2-settings\r\nUpgrade: h2c\r\nHTTP2-Settings: A\r\n",
                false,
            ),
            ("Upgrade: websocket\r\n", false),
            ("Connection: upgrade\r\n", false),
            ("Connection: upgrade\r\nUpgrade:\r\n", false),
        ] {
            assert_eq!(upgrade("GET", "1.1", fields), want, "{fields}");
        }
    }

    #[test]
    fn every_coding_but_identity_is_one() {
        for (fields, want) in [
            ("", false),
            ("Content-Encoding: identity\r\n", false),
            ("Content-Encoding: Identity , IDENTITY\r\n", false),
            ("Content-Encoding:\r\n", false),
            ("Content-Encoding: gzip\r\n", true),
            ("Content-Encoding: identity, br\r\n", true),
            (
                "Content-Encoding: identity\r\nContent-Encoding: zstd\r\n",
                true,
            ),
            ("Content-Encoding: unknown\r\n", true),
        ] {
            let (head, data) = request("HTTP/1.1", fields);
            assert_eq!(is_coded(&head.fields, &data), want, "{fields}");
        }
    }

    #[test]
    fn decimals() {
        assert_eq!(parse_decimal(b"18446744073709551615"), Some(u64::MAX));
        assert_eq!(parse_decimal(b"00000000000000000000000001"), Some(1));
        for bad in [
            "",
            "+1",
            "-1",
            " 1",
            "1 ",
            "1a",
            "18446744073709551616",
            "99999999999999999999",
        ] {
            assert_eq!(parse_decimal(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn meters_stop_at_the_end_of_the_body() {
        let data = b"3\r\nabc\r\n0\r\n\r\nmore bytes";
        // Framing, total bytes consumed, payload, done, remaining bytes.
        let cases = [
            (Framing::None, 0, &b""[..], true, None),
            (Framing::Length(0), 0, b"", true, Some(0)),
            (Framing::Length(5), 5, &data[..5], true, Some(0)),
            (
                Framing::Length(u64::MAX),
                23,
                data,
                false,
                Some(u64::MAX - 23),
            ),
            (Framing::Chunked, 13, b"abc", true, None),
            (Framing::UntilClose, 23, data, false, None),
        ];
        for (framing, taken, payload, done, left) in cases {
            for split in 0..=data.len() {
                let mut meter = BodyMeter::new(framing);
                let mut seen = Vec::new();
                let mut total = 0;
                for piece in [&data[..split], &data[split..]] {
                    let got = meter.decode(piece, |run| seen.extend_from_slice(run.of(piece)));
                    total += got.unwrap();
                }
                assert_eq!((total, &seen[..]), (taken, payload), "{framing:?}");
                assert_eq!((meter.is_done(), meter.remaining()), (done, left));
                assert_eq!(meter.payload_bytes(), payload.len() as u64);
                assert_eq!(meter.ends_at_close(), framing == Framing::UntilClose);
                assert_eq!(meter.framing(), framing);
            }
        }
        let mut meter = BodyMeter::new(Framing::Length(5));
        assert!(!meter.skip(6) && meter.skip(4));
        assert_eq!((meter.take(b"xyz"), meter.is_done()), (Ok(1), true));
        assert!(!BodyMeter::new(Framing::UntilClose).skip(1));
        assert_eq!(
            BodyMeter::new(Framing::Chunked).take(b"x"),
            Err(ChunkError::BadSize)
        );
    }
}
