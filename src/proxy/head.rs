//! Writes request heads for engines and response heads for clients.

use std::net::IpAddr;

use super::trace::TraceHeaders;
use crate::fleet::Target;
use crate::h1::{
    self, Field, Framing, HeadError, HopFilter, Method, Name, RequestHead, ResponseHead,
};
use crate::pd::Leg;

/// The parts of a forwarded request head that do not come from the client's fields.
pub(super) struct Forwarded<'a> {
    pub(super) request_id: &'a [u8],
    pub(super) client_ip: Option<IpAddr>,
    /// The engine that the request is sent to, named in `Host` if the client sent none (HTTP/1.0).
    pub(super) target: &'a Target,
    /// Whether to forward the client's `Accept-Encoding`. It is not forwarded if the proxy must
    /// read the response.
    pub(super) accept_encoding: bool,
    /// Whether to forward the client's `Upgrade`.
    pub(super) upgrade: bool,
    /// Value of `x-data-parallel-rank` that replaces the client's; `None` forwards the client's.
    pub(super) rank: Option<u32>,
    /// Trace context fields that replace the client's; `None` if tracing is off.
    pub(super) trace_headers: Option<TraceHeaders>,
}

/// Writes the request line and all fields except framing fields, without the blank line.
///
/// The client's fields are forwarded, except those that `extra` replaces or excludes, and
/// hop-by-hop fields, routing fields and `Expect`, which are dropped on every path. `Upgrade` is
/// forwarded if `extra.upgrade`. `Host` is forwarded unchanged
/// (`docs/engines.md#forwarded-requests`), unless the authority of an absolute-form target replaces
/// it.
///
/// # Errors
/// The client's `Connection` fields list too many names.
pub(super) fn push_request(
    out: &mut Vec<u8>,
    head: &RequestHead,
    bytes: &[u8],
    extra: &Forwarded<'_>,
) -> Result<(), HeadError> {
    let filter = HopFilter::new(&head.fields, bytes)?;
    let target = head.target.of(bytes);
    h1::push_request_line(
        out,
        head.method_span.of(bytes),
        h1::origin_form(target).unwrap_or(target),
    );
    // RFC 9112 3.2.2: the authority of an absolute-form target replaces Host.
    let absolute = h1::authority_of(target);
    if let Some(authority) = absolute {
        h1::push_field(out, b"host", authority);
    } else if head.field(Name::Host).is_none() {
        h1::push_field(out, b"host", extra.target.authority().as_bytes());
    }
    for field in &head.fields {
        let is_replaced = (extra.rank.is_some() && field.known == Name::XDataParallelRank)
            || extra
                .trace_headers
                .is_some_and(|trace_headers| trace_headers.replaces(field.known));
        if is_forwarded(field, absolute.is_some(), extra.accept_encoding)
            && !is_replaced
            && !h1::drop_field(field, bytes, &filter)
        {
            h1::push_field(out, field.name.of(bytes), field.value.of(bytes));
        }
    }
    h1::push_field(out, b"x-request-id", extra.request_id);
    if let Some(trace_headers) = &extra.trace_headers {
        trace_headers.push(out);
    }
    if let Some(rank) = extra.rank {
        push_decimal_field(out, b"x-data-parallel-rank: ", u64::from(rank));
    }
    push_forwarded_for(out, head, bytes, extra.client_ip);
    if extra.upgrade
        && let Some(upgrade) = head.field(Name::Upgrade)
    {
        h1::push_field(out, b"connection", b"upgrade");
        h1::push_field(out, b"upgrade", upgrade.value.of(bytes));
    }
    Ok(())
}

fn is_forwarded(field: &Field, host_replaced: bool, accept_encoding: bool) -> bool {
    match field.known {
        Name::ContentLength
        | Name::TransferEncoding
        | Name::Expect
        | Name::XRequestId
        | Name::XForwardedFor
        | Name::XPrefillerHostPort
        | Name::XPrefillerUrl
        | Name::XEncoderHostsPorts
        | Name::XKvCacheSourceHostPort
        | Name::XDataParallelHostPort => false,
        Name::AcceptEncoding => accept_encoding,
        Name::Host => !host_replaced,
        _ => true,
    }
}

/// Appends an `x-forwarded-for` field with the values received from the client, followed by the
/// client's address. Appends nothing if there is neither.
fn push_forwarded_for(
    out: &mut Vec<u8>,
    head: &RequestHead,
    bytes: &[u8],
    client_ip: Option<IpAddr>,
) {
    let start = out.len();
    out.extend_from_slice(b"x-forwarded-for: ");
    let values = out.len();
    for field in head.fields_named(Name::XForwardedFor) {
        if out.len() > values {
            out.extend_from_slice(b", ");
        }
        out.extend_from_slice(field.value.of(bytes));
    }
    if let Some(ip) = client_ip {
        if out.len() > values {
            out.extend_from_slice(b", ");
        }
        push_ip(out, ip);
    }
    if out.len() == values {
        out.truncate(start);
    } else {
        out.extend_from_slice(b"\r\n");
    }
}

fn push_ip(out: &mut Vec<u8>, ip: IpAddr) {
    match ip {
        IpAddr::V4(ip) => {
            for (i, octet) in ip.octets().into_iter().enumerate() {
                if i > 0 {
                    out.push(b'.');
                }
                h1::push_decimal(out, u64::from(octet));
            }
        }
        // IPv6 is rare on the nodes this runs on, and the formatter costs less than a microsecond.
        IpAddr::V6(ip) => out.extend_from_slice(ip.to_string().as_bytes()),
    }
}

/// Appends the field that frames the request body (`Content-Length` or `Transfer-Encoding`, none
/// without a body) and the blank line that ends the head.
pub(super) fn push_request_framing(out: &mut Vec<u8>, framing: Framing) {
    match framing {
        Framing::None => {}
        Framing::Length(length) => push_length(out, length),
        Framing::Chunked | Framing::UntilClose => {
            h1::push_field(out, b"transfer-encoding", b"chunked");
        }
    }
    out.extend_from_slice(b"\r\n");
}

/// Appends the `Content-Length` of the leg's edited body and the blank line to the leg's head.
pub(super) fn finish_leg_head(head: &mut Vec<u8>, leg: &Leg) {
    push_request_framing(head, Framing::Length(leg.body.len() as u64));
}

fn push_length(out: &mut Vec<u8>, length: u64) {
    push_decimal_field(out, b"content-length: ", length);
}

fn push_decimal_field(out: &mut Vec<u8>, name: &[u8], value: u64) {
    out.extend_from_slice(name);
    h1::push_decimal(out, value);
    out.extend_from_slice(b"\r\n");
}

/// Framing of a response body towards the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outgoing {
    /// No body. The head of a response to HEAD, or of a 304, may still state a length.
    None,
    /// A body of this many bytes.
    Length(u64),
    /// Chunked transfer coding.
    Chunked,
    /// The end of the connection marks the end of the body.
    UntilClose,
}

/// Writes a response head for the client, including the blank line.
///
/// # Errors
/// The engine's `Connection` fields list too many names.
pub(super) fn push_response(
    out: &mut Vec<u8>,
    head: &ResponseHead,
    bytes: &[u8],
    outgoing: Outgoing,
    response: &ResponseExtra<'_>,
) -> Result<(), HeadError> {
    let filter = HopFilter::new(&head.fields, bytes)?;
    h1::push_status_line(out, head.status, head.reason.of(bytes));
    for field in &head.fields {
        let ours = matches!(
            field.known,
            Name::ContentLength | Name::TransferEncoding | Name::XRequestId
        );
        if !ours && !h1::drop_field(field, bytes, &filter) {
            h1::push_field(out, field.name.of(bytes), field.value.of(bytes));
        }
    }
    h1::push_field(out, b"x-request-id", response.request_id);
    match outgoing {
        Outgoing::None => push_stated_length(out, head, bytes, response.method),
        Outgoing::Length(length) => push_length(out, length),
        Outgoing::Chunked => h1::push_field(out, b"transfer-encoding", b"chunked"),
        Outgoing::UntilClose => {}
    }
    if let Some(upgrade) = response.upgrade {
        h1::push_field(out, b"connection", b"upgrade");
        h1::push_field(out, b"upgrade", upgrade);
    } else if !response.keep_alive {
        h1::push_field(out, b"connection", b"close");
    } else if response.http10 {
        h1::push_field(out, b"connection", b"keep-alive");
    }
    out.extend_from_slice(b"\r\n");
    Ok(())
}

/// The parts of a response head that do not come from the engine's fields.
pub(super) struct ResponseExtra<'a> {
    pub(super) request_id: &'a [u8],
    pub(super) method: Method,
    pub(super) keep_alive: bool,
    /// The client uses HTTP/1.0, so a connection that stays open must be announced.
    pub(super) http10: bool,
    /// The protocol that a 101 response switches the connection to; `None` in all other responses.
    pub(super) upgrade: Option<&'a [u8]>,
}

/// Appends the `Content-Length` that the engine sent in a response that has no body but may state
/// its length: a response to HEAD, or a 304.
fn push_stated_length(out: &mut Vec<u8>, head: &ResponseHead, bytes: &[u8], method: Method) {
    if (method == Method::Head || head.status == 304)
        && let Some(field) = head.field(Name::ContentLength)
        && let Some(length) = h1::parse_decimal(field.value.of(bytes))
    {
        push_length(out, length);
    }
}

/// Writes a complete response generated by the proxy.
pub(super) fn push_local_response(out: &mut Vec<u8>, own: &LocalResponse<'_>) {
    h1::push_status_line(out, own.status, h1::reason_phrase(own.status).as_bytes());
    if !own.body.is_empty() {
        h1::push_field(out, b"content-type", b"application/json");
    }
    push_length(out, own.body.len() as u64);
    if !own.request_id.is_empty() {
        h1::push_field(out, b"x-request-id", own.request_id);
    }
    if let Some(label) = own.error {
        h1::push_field(out, b"x-ringside-error", label.as_bytes());
    }
    if let Some(secs) = own.retry_after_secs {
        push_decimal_field(out, b"retry-after: ", u64::from(secs));
    }
    if own.status == 405 {
        h1::push_field(
            out,
            b"allow",
            b"GET, HEAD, POST, PUT, DELETE, OPTIONS, PATCH",
        );
    }
    if !own.keep_alive {
        h1::push_field(out, b"connection", b"close");
    } else if own.http10 {
        h1::push_field(out, b"connection", b"keep-alive");
    }
    out.extend_from_slice(b"\r\n");
    if !own.is_head {
        out.extend_from_slice(own.body);
    }
}

/// Writes the head of an event stream generated by the proxy, including the blank line.
pub(super) fn push_event_stream(
    out: &mut Vec<u8>,
    request_id: &[u8],
    keep_alive: bool,
    http10: bool,
) {
    h1::push_status_line(out, 200, h1::reason_phrase(200).as_bytes());
    h1::push_field(out, b"content-type", b"text/event-stream; charset=utf-8");
    h1::push_field(out, b"x-request-id", request_id);
    if !http10 {
        h1::push_field(out, b"transfer-encoding", b"chunked");
    }
    if !keep_alive {
        h1::push_field(out, b"connection", b"close");
    }
    out.extend_from_slice(b"\r\n");
}

/// The parts of a response generated by the proxy.
pub(super) struct LocalResponse<'a> {
    pub(super) status: u16,
    pub(super) body: &'a [u8],
    pub(super) request_id: &'a [u8],
    /// Label of the fault that the response reports, sent in `x-ringside-error`; `None` if the
    /// response is not an error.
    pub(super) error: Option<&'static str>,
    pub(super) retry_after_secs: Option<u32>,
    pub(super) keep_alive: bool,
    pub(super) http10: bool,
    /// The request was a HEAD: the length of the body is stated, but the body is not sent.
    pub(super) is_head: bool,
}
