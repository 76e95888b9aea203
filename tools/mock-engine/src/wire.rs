//! Responses before they are written, and the effect of faults on writing them.
//!
//! A [`Plan`] contains the response, a [`Wire`] specifies how it is written, and [`head`] formats
//! the response head.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::api::Refusal;
use crate::events::Events;
use crate::fault::Fault;
use crate::kv::Wait;

/// The body of a response.
#[derive(Debug)]
pub(crate) enum Content {
    /// A body of known length, and the number of tokens whose generation time passes before it is
    /// sent (0: none).
    Whole(Vec<u8>, u32),
    /// A stream of events.
    Events(Box<Events>),
    /// No body. Contains the value of `content-length`, if the response has one (304).
    Nothing(Option<u64>),
}

/// A response to send.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) status: u16,
    pub(crate) content_type: String,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) content: Content,
    /// Makes the response wait for the other leg of the split request; `None` if it does not wait.
    pub(crate) wait: Option<Wait>,
}

impl Plan {
    /// A response whose body needs no generation time.
    pub(crate) fn new(status: u16, content_type: &str, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            content_type: content_type.to_owned(),
            headers: Vec::new(),
            content: Content::Whole(body.into(), 0),
            wait: None,
        }
    }

    /// A JSON response that needs no generation time.
    pub(crate) fn json(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self::new(status, JSON, body)
    }

    /// Returns a 200 response with the JSON `body`, which takes the time of generating `tokens`
    /// tokens.
    pub(crate) fn generated(body: String, tokens: u32) -> Self {
        Self {
            content: Content::Whole(body.into(), tokens),
            ..Self::json(200, "")
        }
    }

    /// Returns a 200 response that streams `events`.
    pub(crate) fn stream(events: Events) -> Self {
        Self {
            content: Content::Events(Box::new(events)),
            ..Self::new(200, EVENT_STREAM, "")
        }
    }

    fn nothing(status: u16, length: Option<u64>) -> Self {
        Self {
            content: Content::Nothing(length),
            ..Self::new(status, "", "")
        }
    }

    /// Adds a header field to the response.
    pub(crate) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }
}

impl From<Refusal> for Plan {
    fn from(refusal: Refusal) -> Self {
        Self::json(refusal.status, refusal.body())
    }
}

const JSON: &str = "application/json";
const EVENT_STREAM: &str = "text/event-stream; charset=utf-8";

/// Returns the response that replaces the regular one because of `fault`, or `None` if `fault` does
/// not replace it.
pub(crate) fn substitute(fault: &Fault) -> Option<Plan> {
    Some(match fault {
        Fault::Status {
            code,
            body,
            content_type,
        } => Plan::new(*code, content_type, body.as_str()),
        Fault::HeldStatus { code, body } => Plan::json(*code, body.as_str()),
        Fault::Gzip => Plan::json(200, OPAQUE).with("content-encoding", "gzip"),
        Fault::Html => Plan::new(200, "text/html; charset=utf-8", PAGE),
        Fault::HalfJson => Plan::json(200, HALF),
        Fault::NoContent204 => Plan::nothing(204, None),
        Fault::NotModified304 => Plan::nothing(304, Some(17)).with("etag", "\"mock\""),
        _ => return None,
    })
}

/// The gzip magic number, then bytes that are not a deflate stream.
const OPAQUE: &[u8] = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xff\xfe\x00\x80opaque\r\n\r\n\x00";
const PAGE: &str = "<html><head><title>502 Bad Gateway</title></head><body>nginx</body></html>\n";
const HALF: &str =
    "{\"id\":\"cmpl-half\",\"choices\":[{\"index\":0,\"kv_transfer_params\":{\"do_rem";

/// Action to take on the connection after an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Wait for the next request.
    KeepAlive,
    /// Close when the first byte of the next request arrives.
    KeepUntilNextRequest,
    Close,
    /// Send FIN, then discard what the client still sends before closing.
    CloseGently,
    Reset,
}

/// The way in which a fault ends a response after part of its body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    Reset,
    Truncate,
    Stall,
    /// Send an error event, then end the stream regularly.
    Error,
}

/// How the end of a response body is marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delimiter {
    /// The body is delimited by `content-length` if its length is known, otherwise by chunks
    /// (HTTP/1.1) or by closing the connection (HTTP/1.0).
    Proper,
    /// The response has both `content-length` and chunks, which HTTP forbids.
    Both,
    /// The response has a `content-length` that is larger than the body.
    ExtraLength,
    /// The body is delimited by closing the connection, with neither `content-length` nor chunks.
    Close,
}

/// Specifies how a response is written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wire {
    /// Number of `103 Early Hints` responses sent first.
    pub(crate) interim: u32,
    pub(crate) delimiter: Delimiter,
    pub(crate) bare_lf: bool,
    pub(crate) http10: bool,
    /// Whether nothing is sent after the response head.
    pub(crate) stall_after_head: bool,
    /// Whether the response waits for [`crate::Engine::release`].
    pub(crate) held: bool,
    /// The number of stream events after which the body fails, and how it fails. A body that is not
    /// a stream fails at its start (0) or halfway through (any other number), except with
    /// [`Cut::Error`], which affects streams only. `None` sends the complete body.
    pub(crate) cut: Option<(u32, Cut)>,
    /// Maximum number of bytes per write, and the pause between writes; `None` writes without
    /// limit.
    pub(crate) slow: Option<(usize, Duration)>,
    pub(crate) garbage_after: bool,
    /// Action to take on the connection after the response. `None`: it follows from the request and
    /// from how the body is delimited.
    pub(crate) next: Option<Next>,
}

impl Wire {
    /// Returns how a response is written under `fault`; `None` is the regular way.
    pub(crate) fn of(fault: Option<&Fault>) -> Self {
        let mut wire = Self {
            interim: 0,
            delimiter: Delimiter::Proper,
            bare_lf: false,
            http10: false,
            stall_after_head: false,
            held: false,
            cut: None,
            slow: None,
            garbage_after: false,
            next: None,
        };
        match fault {
            Some(Fault::Interim { count }) => wire.interim = *count,
            Some(Fault::BothFramings) => wire.delimiter = Delimiter::Both,
            Some(Fault::ExtraLength) => wire.delimiter = Delimiter::ExtraLength,
            Some(Fault::NoFraming) => wire.delimiter = Delimiter::Close,
            Some(Fault::BareLf) => wire.bare_lf = true,
            Some(Fault::Http10Response) => wire.http10 = true,
            Some(Fault::Hold | Fault::HeldStatus { .. }) => wire.held = true,
            Some(Fault::StallAfterHead) => wire.stall_after_head = true,
            Some(Fault::ResetMidBody { after_events }) => {
                wire.cut = Some((*after_events, Cut::Reset));
            }
            Some(Fault::TruncateMidBody { after_events }) => {
                wire.cut = Some((*after_events, Cut::Truncate));
            }
            Some(Fault::StallMidStream { after_events }) => {
                wire.cut = Some((*after_events, Cut::Stall));
            }
            Some(Fault::ErrorMidStream { after_events }) => {
                wire.cut = Some((*after_events, Cut::Error));
            }
            Some(Fault::Slow { chunk_bytes, delay }) => wire.slow = Some((*chunk_bytes, *delay)),
            Some(Fault::GarbageAfterResponse) => wire.garbage_after = true,
            Some(Fault::CloseIdle) => wire.next = Some(Next::Close),
            Some(Fault::CloseOnNextRequest) => wire.next = Some(Next::KeepUntilNextRequest),
            _ => {}
        }
        wire
    }

    /// Returns whether a body is sent with chunked transfer coding. `minor_version` is that of the
    /// request.
    pub(crate) fn chunked(&self, content: &Content, minor_version: u8) -> bool {
        match (self.delimiter, content) {
            (Delimiter::Both, _) => true,
            (Delimiter::Proper, Content::Events(_)) => minor_version == 1 && !self.http10,
            (Delimiter::Proper, Content::Whole(..) | Content::Nothing(_))
            | (Delimiter::ExtraLength | Delimiter::Close, _) => false,
        }
    }
}

/// Formats the head of a response. `announce_close` adds `connection: close`.
pub(crate) fn head(plan: &Plan, wire: &Wire, chunked: bool, announce_close: bool) -> String {
    let version = if wire.http10 { "1.0" } else { "1.1" };
    let mut head = format!("HTTP/{version} {} {}\r\n", plan.status, reason(plan.status));
    let mut line = |name: &str, value: &str| {
        let _ = write!(head, "{name}: {value}\r\n");
    };
    line("date", &date(SystemTime::now()));
    line("server", "uvicorn");
    line("vary", "Origin");
    for (name, value) in &plan.headers {
        line(name, value);
    }
    let length = match (&plan.content, wire.delimiter) {
        (Content::Nothing(length), _) => *length,
        (_, Delimiter::Close) => None,
        (Content::Whole(body, _), Delimiter::ExtraLength) => Some(body.len() as u64 + 100),
        (Content::Whole(body, _), Delimiter::Proper | Delimiter::Both) => Some(body.len() as u64),
        (Content::Events(_), Delimiter::ExtraLength) => Some(1 << 20),
        (Content::Events(_), Delimiter::Both) => Some(5),
        (Content::Events(_), Delimiter::Proper) => None,
    };
    if let Some(length) = length {
        line("content-length", &length.to_string());
    }
    if !plan.content_type.is_empty() {
        line("content-type", &plan.content_type);
    }
    if announce_close {
        line("connection", "close");
    }
    if chunked {
        line("transfer-encoding", "chunked");
    }
    head.push_str("\r\n");
    if wire.bare_lf {
        head = head.replace("\r\n", "\n");
    }
    head
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        201 => "Created",
        202 => "Accepted",
        204 => "No Content",
        301 => "Moved Permanently",
        302 => "Found",
        304 => "Not Modified",
        307 => "Temporary Redirect",
        400 => "Bad Request",
        401 => "Unauthorized",
        403 => "Forbidden",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        413 => "Content Too Large",
        422 => "Unprocessable Entity",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        501 => "Not Implemented",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        504 => "Gateway Timeout",
        _ => "Mock",
    }
}

/// Formats a time as an IMF-fixdate (RFC 9110, section 5.6.7).
fn date(now: SystemTime) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let days = seconds / 86_400;
    // Days since 1 March of year 0. An era has 400 years, which are 146097 days.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = (from_march + 2) % 12;
    let year = era * 400 + year_of_era + u64::from(month < 2);
    let name = |names: &[&'static str], at: u64| names.get(at as usize).copied().unwrap_or("");
    format!(
        "{}, {day:02} {} {year} {:02}:{:02}:{:02} GMT",
        name(&DAYS, days % 7),
        name(&MONTHS, month),
        seconds / 3_600 % 24,
        seconds / 60 % 60,
        seconds % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_dates() {
        for (seconds, want) in [
            (0, "Thu, 01 Jan 1970 00:00:00 GMT"),
            (784_111_777, "Sun, 06 Nov 1994 08:49:37 GMT"),
            (951_782_400, "Tue, 29 Feb 2000 00:00:00 GMT"),
            (1_767_225_599, "Wed, 31 Dec 2025 23:59:59 GMT"),
        ] {
            assert_eq!(date(UNIX_EPOCH + Duration::from_secs(seconds)), want);
        }
    }
}
