//! Where a message ends and whether its connection goes on (RFC 9112 6 and 9).
//!
//! This is the one place that decides. Whoever forwards a message writes new framing fields from
//! the [`Framing`] found here and drops the received ones, so that no later reader can find
//! another end.

use super::chunked::{ChunkError, Chunked};
use super::error::HeadError;
use super::head::{AnswerHead, Field, Method, RequestHead, Version};
use super::hop::list_items;
use super::name::Name;
use super::target::{authority_of, is_authority};
use crate::span::Span;

/// How the end of a body is found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    #[default]
    None,
    /// As many bytes as Content-Length says.
    Length(u64),
    /// The chunked coding says.
    Chunked,
    /// The end of the connection says; answers only.
    UntilClose,
}

/// The framing of a request body, after checking all that decides it: Host, Content-Length and
/// Transfer-Encoding (RFC 9112 3.2, 6.1, 6.3).
///
/// # Errors
/// Anything that two readers could understand differently.
pub fn request_framing(head: &RequestHead, buf: &[u8]) -> Result<Framing, HeadError> {
    check_host(head, buf)?;
    let announced = announced(&head.fields, head.version, buf)?;
    Ok(match announced {
        Announced::Nothing => Framing::None,
        Announced::Length(length) => Framing::Length(length),
        Announced::Chunked => Framing::Chunked,
    })
}

/// The framing of the body of an answer to a request with `method` (RFC 9112 6.3). For a 101 it is
/// [`Framing::None`]: what follows is another protocol.
///
/// Engines are held to the rules as strictly as clients, with one concession: a 1xx or 204 with
/// `Content-Length: 0`, which says the same twice.
///
/// # Errors
/// Anything that two readers could understand differently, and a 2xx to CONNECT.
pub fn answer_framing(method: Method, head: &AnswerHead, buf: &[u8]) -> Result<Framing, HeadError> {
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

/// Whether the client keeps its connection open behind this request (RFC 9112 9.3).
#[must_use]
pub fn request_keeps_alive(head: &RequestHead, buf: &[u8]) -> bool {
    keeps_alive(&head.fields, head.version, buf)
}

/// Whether the engine keeps its connection open behind this answer (RFC 9112 9.3).
#[must_use]
pub fn answer_keeps_alive(head: &AnswerHead, buf: &[u8], framing: Framing) -> bool {
    framing != Framing::UntilClose && keeps_alive(&head.fields, head.version, buf)
}

/// Whether the client waits for a 100 before it sends the body. An HTTP/1.0 client cannot, and
/// its expectation is ignored (RFC 9110 10.1.1).
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

/// Whether the client asks to leave HTTP/1.1 on this connection (RFC 9110 7.8).
#[must_use]
pub fn wants_upgrade(head: &RequestHead, buf: &[u8]) -> bool {
    head.version == Version::Http11
        && has_connection_option(&head.fields, buf, b"upgrade")
        && head
            .fields_named(Name::Upgrade)
            .any(|field| !field.value.is_empty())
}

/// A decimal number: digits only, at least one, within 64 bits. The parsers of the standard
/// library take a sign.
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

/// Tracks a body of any framing while its bytes pass.
#[derive(Clone, Debug)]
pub struct BodyMeter {
    framing: Framing,
    /// Bytes to come, for a length.
    left: u64,
    /// Bytes seen, for a body that ends at the close.
    open_bytes: u64,
    chunked: Chunked,
}

impl BodyMeter {
    /// A meter at the start of a body.
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

    /// Takes bytes as they came: how many from the front belong to this body. Fewer than given
    /// means that the body ended; the rest is somebody else's.
    ///
    /// # Errors
    /// The chunked coding is malformed.
    pub fn take(&mut self, bytes: &[u8]) -> Result<usize, ChunkError> {
        self.decode(bytes, |_| {})
    }

    /// Like [`BodyMeter::take`], and hands `payload` each run of body bytes as a range of `bytes`.
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

    /// Whether the body is known to have ended. A body that ends at the close never is.
    #[must_use]
    pub const fn is_done(&self) -> bool {
        match self.framing {
            Framing::None => true,
            Framing::Length(_) => self.left == 0,
            Framing::Chunked => self.chunked.is_done(),
            Framing::UntilClose => false,
        }
    }

    /// Whether the end of the connection is the end of this body, and not a truncation.
    #[must_use]
    pub fn ends_at_close(&self) -> bool {
        self.framing == Framing::UntilClose
    }

    /// Bytes still to come, where a length was given.
    #[must_use]
    pub const fn remaining(&self) -> Option<u64> {
        match self.framing {
            Framing::Length(_) => Some(self.left),
            Framing::None | Framing::Chunked | Framing::UntilClose => None,
        }
    }

    /// Counts `bytes` that passed unseen, spliced within the kernel, where a length was given;
    /// false, and nothing counted, when that is more than remains or no length was given.
    #[must_use]
    pub const fn skip(&mut self, bytes: u64) -> bool {
        if !matches!(self.framing, Framing::Length(_)) || bytes > self.left {
            return false;
        }
        self.left -= bytes;
        true
    }

    /// Body bytes seen so far, without the chunked coding around them.
    #[must_use]
    pub const fn payload_bytes(&self) -> u64 {
        match self.framing {
            Framing::None => 0,
            Framing::Length(length) => length - self.left,
            Framing::Chunked => self.chunked.payload_bytes(),
            Framing::UntilClose => self.open_bytes,
        }
    }

    /// The framing this meter was made for.
    #[must_use]
    pub const fn framing(&self) -> Framing {
        self.framing
    }
}

/// How many bytes of `bytes` lie within the next `limit`.
pub(super) fn prefix_len(bytes: &[u8], limit: u64) -> usize {
    usize::try_from(limit).map_or(bytes.len(), |limit| limit.min(bytes.len()))
}

/// What the framing fields of a head say.
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

/// RFC 9112 3.2: exactly one Host in HTTP/1.1, at most one in HTTP/1.0, and a well-formed one.
/// RFC 9112 3.2.2 lets an absolute-form target win over Host; here they must agree, as the client
/// is bound to make them, so that nobody behind us can pick the other one.
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
