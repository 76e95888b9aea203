//! Hop-by-hop fields, which are not forwarded (RFC 9110 7.6.1).

use super::error::HeadError;
use super::head::{Field, trim};
use super::name::Name;
use crate::limits::HOP_NAMES_MAX;
use crate::span::Span;

/// Returns whether a field of this name applies to a single connection and is never forwarded.
///
/// Transfer-Encoding is one of these fields; the code that forwards a message writes its own.
/// Content-Length is not one of them, but the caller replaces it as well. Proxy-Authenticate and
/// Proxy-Authorization are intended for the nearest proxy (RFC 9110 11.7), which is this one.
/// HTTP2-Settings is part of an upgrade to h2c (RFC 7540 3.2), which is not forwarded.
#[must_use]
pub const fn is_hop_by_hop(known: Name) -> bool {
    match known {
        Name::Connection
        | Name::Http2Settings
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
        | Name::Baggage
        | Name::ContentEncoding
        | Name::ContentLength
        | Name::ContentType
        | Name::Date
        | Name::Expect
        | Name::Forwarded
        | Name::Host
        | Name::Traceparent
        | Name::Tracestate
        | Name::XDataParallelHostPort
        | Name::XDataParallelRank
        | Name::XEncoderHostsPorts
        | Name::XForwardedFor
        | Name::XForwardedProto
        | Name::XKvCacheSourceHostPort
        | Name::XLlmDEncoderHostsPorts
        | Name::XLlmDKvCacheSourceHostPort
        | Name::XLlmDPrefillerHostPort
        | Name::XOverrideBootstrapHost
        | Name::XOverrideBootstrapPort
        | Name::XOverrideBootstrapRoom
        | Name::XOverrideDisaggPrefillDpRank
        | Name::XPrefillerHostPort
        | Name::XPrefillerUrl
        | Name::XRequestId
        | Name::XSpeculativePrefill
        | Name::Other => false,
    }
}

/// The field names that the Connection fields of one head declare as hop-by-hop.
///
/// Only names that map to [`Name::Other`] are recorded, and all other listed names are ignored: a
/// peer that lists Host, Authorization, Content-Length or X-Forwarded-For attempts to make the
/// proxy drop a field that the next hop relies on.
#[derive(Clone, Copy, Debug, Default)]
pub struct HopFilter {
    names: [Span; HOP_NAMES_MAX],
    count: usize,
}

impl HopFilter {
    /// Creates the filter for a head with these fields, whose spans refer to `buf`.
    ///
    /// # Errors
    /// The Connection fields list more than `HOP_NAMES_MAX` names that map to [`Name::Other`], not
    /// counting `close`.
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

    /// Returns whether a Connection field lists `name`, which must map to [`Name::Other`].
    fn lists(&self, name: &[u8], buf: &[u8]) -> bool {
        self.names[..self.count]
            .iter()
            .any(|listed| listed.of(buf).eq_ignore_ascii_case(name))
    }
}

/// Returns whether a field must not be forwarded, because it is hop-by-hop by definition or because
/// a Connection field lists it. `buf` must be the buffer that both the field and the filter refer
/// to.
#[must_use]
pub fn drop_field(field: &Field, buf: &[u8], filter: &HopFilter) -> bool {
    match field.known {
        Name::Other => filter.count > 0 && filter.lists(field.name.of(buf), buf),
        known => is_hop_by_hop(known),
    }
}

/// Returns the spans of the items of a comma-separated list, which is at `list` in `buf`. Empty
/// items are skipped (RFC 9110 5.6.1).
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::h1::RequestHead;

    fn kept(fields: &str) -> Result<Vec<String>, HeadError> {
        let data = format!("GET / HTTP/1.1\r\n{fields}\r\n").into_bytes();
        let mut head = RequestHead::default();
        assert_eq!(head.parse(&data), Ok(true));
        let filter = HopFilter::new(&head.fields, &data)?;
        Ok(head
            .fields
            .iter()
            .filter(|field| !drop_field(field, &data, &filter))
            .map(|field| String::from_utf8_lossy(field.name.of(&data)).into_owned())
            .collect())
    }

    #[test]
    fn hop_by_hop_fields_are_dropped() {
        let fields = "Host: a\r\nConnection: close\r\nKeep-Alive: x\r\nProxy-Connection: x\r\n\
            TE: trailers\r\nTrailer: x\r\nTransfer-Encoding: chunked\r\nUpgrade: x\r\n\
            Proxy-Authenticate: x\r\nPROXY-AUTHORIZATION: x\r\nHTTP2-Settings: AAM\r\n\
            Cookie: x\r\nX: y\r\n";
        assert_eq!(kept(fields).unwrap(), ["Host", "Cookie", "X"]);
    }

    #[test]
    fn fields_listed_in_connection_are_dropped_unless_known() {
        let fields = "Connection: X-Hop, host,content-length , authorization\r\n\
            connection: ,, close, keep-alive,x-forwarded-for, x-two, Content-Type\r\n\
            Host: a\r\nx-hop: 1\r\nX-HOP: 2\r\nX-Two: 3\r\nX-Tw: 4\r\nAuthorization: b\r\n\
            X-Forwarded-For: c\r\nContent-Length: 0\r\nContent-Type: d\r\n";
        let want = [
            "Host",
            "X-Tw",
            "Authorization",
            "X-Forwarded-For",
            "Content-Length",
            "Content-Type",
        ];
        assert_eq!(kept(fields).unwrap(), want);
    }

    #[test]
    fn the_limit_is_exact() {
        let list = |count: usize| {
            let names: Vec<_> = (0..count).map(|number| format!("x-{number}")).collect();
            format!(
                "Connection: close, {}, upgrade\r\nX-0: a\r\n",
                names.join(", ")
            )
        };
        assert_eq!(kept(&list(HOP_NAMES_MAX)), Ok(vec![]));
        assert_eq!(
            kept(&list(HOP_NAMES_MAX + 1)),
            Err(HeadError::TooManyHopNames)
        );
    }

    #[test]
    fn lists_are_split() {
        let buf = b"__ a,b\t, ,,c d ,__";
        let items: Vec<_> = list_items(buf, Span::new(2, buf.len() - 2))
            .map(|item| item.of(buf))
            .collect();
        assert_eq!(items, [&b"a"[..], b"b", b"c d"]);
        assert_eq!(list_items(buf, Span::new(2, 2)).count(), 0);
    }
}
