//! Fields that end at this hop (RFC 9110 7.6.1).

use super::error::HeadError;
use super::head::{Field, trim};
use super::name::Name;
use crate::limits::HOP_NAMES_MAX;
use crate::span::Span;

/// Whether a field of this name belongs to the connection and is never forwarded.
///
/// The framing field Transfer-Encoding is among them: whoever forwards the message writes its own.
/// Content-Length is not, and is replaced by the caller as well. The Proxy-Auth fields are meant
/// for the nearest proxy (RFC 9110 11.7), which we are.
#[must_use]
pub const fn is_hop_by_hop(known: Name) -> bool {
    match known {
        Name::Connection
        | Name::KeepAlive
        | Name::ProxyAuthenticate
        | Name::ProxyAuthorization
        | Name::ProxyConnection
        | Name::Te
        | Name::Trailer
        | Name::TransferEncoding
        | Name::Upgrade => true,
        Name::AcceptEncoding
        | Name::Authorization
        | Name::ContentEncoding
        | Name::ContentLength
        | Name::ContentType
        | Name::Date
        | Name::Expect
        | Name::Forwarded
        | Name::Host
        | Name::XDataParallelHostPort
        | Name::XDataParallelRank
        | Name::XEncoderHostsPorts
        | Name::XForwardedFor
        | Name::XKvCacheSourceHostPort
        | Name::XPrefillerHostPort
        | Name::XPrefillerUrl
        | Name::XRequestId
        | Name::Other => false,
    }
}

/// The names that the Connection fields of one head add to the hop-by-hop ones.
///
/// Only names that the proxy does not know are taken: a peer that lists Host, Authorization,
/// Content-Length or X-Forwarded-For there tries to make us lose what the next hop relies on.
#[derive(Clone, Copy, Debug, Default)]
pub struct HopFilter {
    names: [Span; HOP_NAMES_MAX],
    count: usize,
}

impl HopFilter {
    /// The filter for a head with these fields, which lie in `buf`.
    ///
    /// # Errors
    /// More than `HOP_NAMES_MAX` unknown names are listed.
    pub fn new(fields: &[Field], buf: &[u8]) -> Result<Self, HeadError> {
        let mut filter = Self::default();
        for field in fields {
            if field.known != Name::Connection {
                continue;
            }
            for item in list_items(buf, field.value) {
                let name = item.of(buf);
                if name.eq_ignore_ascii_case(b"close") || Name::of(name) != Name::Other {
                    continue;
                }
                let Some(slot) = filter.names.get_mut(filter.count) else {
                    return Err(HeadError::TooManyHopNames);
                };
                *slot = item;
                filter.count += 1;
            }
        }
        Ok(filter)
    }

    /// Whether a Connection field lists this unknown name.
    fn lists(&self, name: &[u8], buf: &[u8]) -> bool {
        self.names[..self.count]
            .iter()
            .any(|listed| listed.of(buf).eq_ignore_ascii_case(name))
    }
}

/// Whether a field must not be forwarded. `buf` is what both the field and the filter came from.
#[must_use]
pub fn drop_field(field: &Field, buf: &[u8], filter: &HopFilter) -> bool {
    match field.known {
        Name::Other => filter.count > 0 && filter.lists(field.name.of(buf), buf),
        known => is_hop_by_hop(known),
    }
}

/// The items of a comma-separated list, empty ones left out (RFC 9110 5.6.1).
pub fn list_items(buf: &[u8], list: Span) -> impl Iterator<Item = Span> {
    let mut start = list.start;
    std::iter::from_fn(move || {
        if start > list.end {
            return None;
        }
        let rest = &buf[start..list.end];
        let len = memchr::memchr(b',', rest).unwrap_or(rest.len());
        let item = trim(buf, Span::new(start, start + len));
        start += len + 1;
        Some(item)
    })
    .filter(|item| !item.is_empty())
}
