//! The heads of requests to engines: forwarded ones, and those that the proxy generates.

use std::net::IpAddr;

use crate::fleet::Target;
use crate::h1::{self, Field, Framing, HeadError, HopFilter, Name, RequestHead};
use crate::trace::TraceHeaders;

/// The parts of a forwarded request head that do not come from the client's fields.
pub(crate) struct Forwarded<'a> {
    pub(crate) request_id: &'a [u8],
    pub(crate) client_ip: Option<IpAddr>,
    /// The engine that the request is sent to, named in `Host` if the client sent none (HTTP/1.0).
    pub(crate) target: &'a Target,
    /// Whether to forward the client's `Accept-Encoding`. It is not forwarded if the proxy must
    /// read the response.
    pub(crate) accept_encoding: bool,
    /// Whether to request a switch to the WebSocket protocol. No other upgrade is forwarded.
    pub(crate) upgrade: bool,
    /// Whether the client connected with TLS, which `x-forwarded-proto` then states.
    pub(crate) is_tls: bool,
    /// Value of `x-data-parallel-rank` that replaces the client's; `None` forwards the client's.
    pub(crate) rank: Option<u32>,
    /// Trace context fields that replace the client's; `None` if tracing is off.
    pub(crate) trace_headers: Option<TraceHeaders>,
}

/// Writes the head of one request. Every head ends with [`HeadWriter::finish`], which frames the
/// body.
pub(crate) struct HeadWriter {
    out: Vec<u8>,
}

impl HeadWriter {
    /// Writes the request line and the fields of a forwarded request, except framing fields.
    ///
    /// The client's fields are forwarded, except those that `extra` replaces or excludes, and
    /// hop-by-hop fields, routing fields and `Expect`, which are dropped on every path. `Host` is
    /// forwarded unchanged
    /// (`docs/engines.md#forwarded-requests`), unless the authority of an absolute-form target
    /// replaces it.
    ///
    /// # Errors
    /// The client's `Connection` fields list too many names.
    pub(crate) fn forwarded(
        mut out: Vec<u8>,
        head: &RequestHead,
        bytes: &[u8],
        extra: &Forwarded<'_>,
    ) -> Result<Self, HeadError> {
        let filter = HopFilter::new(&head.fields, bytes)?;
        let target = head.target.of(bytes);
        h1::push_request_line(
            &mut out,
            head.method_span.of(bytes),
            h1::origin_form(target).unwrap_or(target),
        );
        // RFC 9112 3.2.2: the authority of an absolute-form target replaces Host.
        let absolute = h1::authority_of(target);
        if let Some(authority) = absolute {
            h1::push_field(&mut out, b"host", authority);
        } else if head.field(Name::Host).is_none() {
            h1::push_field(&mut out, b"host", extra.target.authority().as_bytes());
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
                h1::push_field(&mut out, field.name.of(bytes), field.value.of(bytes));
            }
        }
        h1::push_field(&mut out, b"x-request-id", extra.request_id);
        if let Some(trace_headers) = &extra.trace_headers {
            trace_headers.push(&mut out);
        }
        if let Some(rank) = extra.rank {
            push_decimal_field(&mut out, b"x-data-parallel-rank: ", u64::from(rank));
        }
        push_forwarded_for(&mut out, head, bytes, extra.client_ip);
        // A proxy in front, which knows the scheme that the user sees, takes precedence.
        if extra.is_tls && head.field(Name::XForwardedProto).is_none() {
            h1::push_field(&mut out, b"x-forwarded-proto", b"https");
        }
        if extra.upgrade {
            h1::push_field(&mut out, b"connection", b"upgrade");
            h1::push_field(&mut out, b"upgrade", b"websocket");
        }
        Ok(Self { out })
    }

    /// Starts the head of a request that the proxy generates, with its request line and `Host`.
    pub(crate) fn generated(mut out: Vec<u8>, method: &[u8], path: &[u8], target: &Target) -> Self {
        h1::push_request_line(&mut out, method, path);
        h1::push_field(&mut out, b"host", target.authority().as_bytes());
        Self { out }
    }

    /// Appends a field.
    pub(crate) fn field(mut self, name: &[u8], value: &[u8]) -> Self {
        h1::push_field(&mut self.out, name, value);
        self
    }

    /// Appends the client's fields with these names.
    pub(crate) fn client_fields(
        mut self,
        head: &RequestHead,
        bytes: &[u8],
        names: &[Name],
    ) -> Self {
        for field in &head.fields {
            if names.contains(&field.known) {
                h1::push_field(&mut self.out, field.name.of(bytes), field.value.of(bytes));
            }
        }
        self
    }

    /// Appends the trace fields: the proxy's `traceparent`, and the client's `tracestate` and
    /// `baggage` if they belong to this trace. Appends nothing if `trace_headers` is `None`.
    pub(crate) fn trace(
        mut self,
        head: &RequestHead,
        bytes: &[u8],
        trace_headers: Option<TraceHeaders>,
    ) -> Self {
        let Some(trace_headers) = trace_headers else {
            return self;
        };
        trace_headers.push(&mut self.out);
        if trace_headers.replaces(Name::Tracestate) {
            self.client_fields(head, bytes, &[Name::Baggage])
        } else {
            self.client_fields(head, bytes, &[Name::Tracestate, Name::Baggage])
        }
    }

    /// Appends the field that frames the request body (`Content-Length` or `Transfer-Encoding`,
    /// none without a body) and the blank line, and returns the head.
    pub(crate) fn finish(mut self, framing: Framing) -> Vec<u8> {
        match framing {
            Framing::None => {}
            Framing::Length(length) => {
                push_decimal_field(&mut self.out, b"content-length: ", length);
            }
            Framing::Chunked | Framing::UntilClose => {
                h1::push_field(&mut self.out, b"transfer-encoding", b"chunked");
            }
        }
        self.out.extend_from_slice(b"\r\n");
        self.out
    }
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
        | Name::XLlmDPrefillerHostPort
        | Name::XLlmDEncoderHostsPorts
        | Name::XLlmDKvCacheSourceHostPort
        | Name::XSpeculativePrefill
        // SGLang's engines can take these instead of members of the body, which clients must not
        // set.
        | Name::XOverrideBootstrapHost
        | Name::XOverrideBootstrapPort
        | Name::XOverrideBootstrapRoom
        | Name::XOverrideDisaggPrefillDpRank
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

fn push_decimal_field(out: &mut Vec<u8>, name: &[u8], value: u64) {
    out.extend_from_slice(name);
    h1::push_decimal(out, value);
    out.extend_from_slice(b"\r\n");
}
