//! The table of everything that can go wrong with a request.
//!
//! Every failure of a session or a leg is a [`Fault`]. This file alone maps a fault to the status,
//! message and body that the client receives and to its metric label. Every error response that the
//! proxy generates takes them from here.

use crate::fleet::TargetError;
use crate::h1::HeadError;
use crate::json::{JsonError, Quoted};

/// Reason why a request was not served, or not served completely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request head violates HTTP/1.1 or exceeds a size limit.
    Head(HeadError),
    /// The chunked framing of the request body is malformed.
    Chunk,
    /// The request body is not a valid JSON object, exceeds a limit of the JSON scanner, or sets a
    /// member that clients must not set to a value too short to be overwritten.
    Json(JsonError),
    /// The body needs more edits than one leg may have
    /// ([`JSON_EDITS_MAX`](crate::limits::JSON_EDITS_MAX)).
    TooManyEdits,
    /// The method is `CONNECT`, which this proxy does not support.
    Connect,
    /// The request body is longer than `--max-body`.
    BodyTooLarge,
    /// Buffering the request body would exceed `--body-budget`, the limit for all buffered bodies
    /// of the process, or its memory could not be allocated.
    BudgetSpent,
    /// The request head did not arrive within `--head-timeout`.
    HeadTimeout,
    /// The client sent nothing more of its request body for `--body-timeout`.
    BodyTimeout,
    /// The prefill routing header contains a malformed target.
    Target(TargetError),
    /// `x-data-parallel-host-port` does not match any rank of this proxy.
    UnknownRank,
    /// The client disconnected.
    ClientGone,
    /// The client read nothing of its response for `--client-stall-timeout`.
    ClientStalled,
    /// The decoder refused the connection: it is down or still loading.
    DecodeRefused,
    /// Connecting to the decoder took longer than `--connect-timeout`.
    DecodeConnectTimeout,
    /// The process has no socket, memory or local port left for an engine connection, or too many
    /// name look-ups are in progress.
    Exhausted,
    /// The decoder closed the connection before the first byte of its response.
    DecodeReset,
    /// The decoder's response violates HTTP/1.1, or the connection ended before the response head
    /// was complete.
    DecodeResponse,
    /// The decoder did not start its response within `--first-byte-timeout`.
    FirstByteTimeout,
    /// The body of the decoder's response was truncated or its chunked framing was malformed.
    /// Usually a part of the response had already been forwarded to the client.
    DecodeTruncated,
    /// No prefill candidate accepted a connection.
    PrefillConnect,
    /// The prefiller closed the connection before the first byte of its response.
    PrefillReset,
    /// The prefiller's response violates HTTP/1.1, is truncated, has a content encoding, or is not
    /// JSON.
    PrefillResponse,
    /// The prefiller's response is longer than `--max-prefill-answer`.
    PrefillResponseTooLarge,
    /// One attempt of the prefill leg took longer than `--prefill-timeout`, or the prefiller did
    /// not start its response within `--first-byte-timeout`.
    PrefillTimeout,
    /// The prefiller responded with this status, which is not 2xx. If the response is not relayed
    /// to the client, a status other than 4xx or 5xx is replaced by 502.
    PrefillStatus(u16),
    /// There is no handoff for the decode leg, or it is malformed, too old or already used, and
    /// `--on-missing-kv error` forbids decoding without one.
    HandoffMissing,
    /// An encoder did not accept a connection.
    EncodeConnect,
    /// An encoder closed the connection before the first byte of its response.
    EncodeReset,
    /// An encoder's response violates HTTP/1.1, is truncated, has a content encoding, is not JSON,
    /// or is longer than `--max-prefill-answer`.
    EncodeResponse,
    /// An encoder did not start its response within `--first-byte-timeout`.
    EncodeTimeout,
    /// An encoder responded with this status.
    EncodeStatus(u16),
    /// The request has more image, audio and video parts than
    /// [`ITEMS_MAX`](crate::pd::encode::ITEMS_MAX).
    TooManyItems,
    /// A prefiller's bootstrap server was unreachable, too slow, or did not return a usable list of
    /// engines (Mooncake).
    Bootstrap,
    /// In the concurrent order of `MoRI-IO`, the prefiller did not respond within
    /// `--moriio-parallel-decode-wait-timeout`.
    PairTimeout,
    /// A response to one request of a chunked decode (`--decode-chunk-size`) is unusable: it is not
    /// a chat completion of plain text, is truncated, has a content encoding, is longer than
    /// `--max-prefill-answer`, or is an error after the client's stream has started.
    ChunkResponse,
    /// A defect of the proxy, with a short description.
    Bug(&'static str),
    /// The prefill target is not on the allowlist.
    TargetDenied,
    /// The prefill target is not on the allowlist, but the allowlist is still incomplete.
    AllowlistNotReady,
    /// Plain HTTP was received on a TLS port.
    PlainText,
}

/// The party that caused a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The client caused the fault, for example by an invalid request or by disconnecting.
    Client,
    /// An engine, or the network between the proxy and the engine, caused the fault.
    Upstream,
    /// The proxy itself, its configuration or its environment caused the fault.
    Ours,
}

/// Labels of all faults, ordered by [`Fault::index`].
pub const LABELS: &[&str] = &[
    "bad_head",
    "bad_chunk",
    "bad_json",
    "too_many_edits",
    "connect_method",
    "body_too_large",
    "body_budget",
    "head_timeout",
    "body_timeout",
    "bad_target",
    "unknown_rank",
    "client_gone",
    "client_stalled",
    "decode_refused",
    "decode_connect_timeout",
    "exhausted",
    "decode_reset",
    "decode_answer",
    "first_byte_timeout",
    "decode_truncated",
    "prefill_connect",
    "prefill_reset",
    "prefill_answer",
    "prefill_answer_too_large",
    "prefill_timeout",
    "prefill_status",
    "handoff_missing",
    "encode_connect",
    "encode_reset",
    "encode_answer",
    "encode_timeout",
    "encode_status",
    "too_many_items",
    "bootstrap",
    "pair_timeout",
    "chunk_answer",
    "bug",
    "target_denied",
    "allowlist_not_ready",
    "plain_text",
];

/// Value of `Retry-After` in a 503 response, in seconds.
const RETRY_AFTER_SECS: u32 = 1;

impl Fault {
    /// Returns the position in [`LABELS`].
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Head(_) => 0,
            Self::Chunk => 1,
            Self::Json(_) => 2,
            Self::TooManyEdits => 3,
            Self::Connect => 4,
            Self::BodyTooLarge => 5,
            Self::BudgetSpent => 6,
            Self::HeadTimeout => 7,
            Self::BodyTimeout => 8,
            Self::Target(_) => 9,
            Self::UnknownRank => 10,
            Self::ClientGone => 11,
            Self::ClientStalled => 12,
            Self::DecodeRefused => 13,
            Self::DecodeConnectTimeout => 14,
            Self::Exhausted => 15,
            Self::DecodeReset => 16,
            Self::DecodeResponse => 17,
            Self::FirstByteTimeout => 18,
            Self::DecodeTruncated => 19,
            Self::PrefillConnect => 20,
            Self::PrefillReset => 21,
            Self::PrefillResponse => 22,
            Self::PrefillResponseTooLarge => 23,
            Self::PrefillTimeout => 24,
            Self::PrefillStatus(_) => 25,
            Self::HandoffMissing => 26,
            Self::EncodeConnect => 27,
            Self::EncodeReset => 28,
            Self::EncodeResponse => 29,
            Self::EncodeTimeout => 30,
            Self::EncodeStatus(_) => 31,
            Self::TooManyItems => 32,
            Self::Bootstrap => 33,
            Self::PairTimeout => 34,
            Self::ChunkResponse => 35,
            Self::Bug(_) => 36,
            Self::TargetDenied => 37,
            Self::AllowlistNotReady => 38,
            Self::PlainText => 39,
        }
    }

    /// Returns the label used in metrics, logs and the `x-ringside-error` field.
    #[must_use]
    pub fn label(self) -> &'static str {
        LABELS[self.index()]
    }

    /// Returns the status that the client receives if no status has been sent yet.
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::Head(error) => error.status(),
            Self::Chunk
            | Self::Json(_)
            | Self::TooManyEdits
            | Self::UnknownRank
            | Self::TooManyItems
            | Self::PlainText => 400,
            Self::TargetDenied => 403,
            Self::Connect => 405,
            Self::BodyTooLarge => 413,
            Self::HeadTimeout | Self::BodyTimeout => 408,
            // Never sent, because the client no longer reads. It appears in logs only.
            Self::ClientGone | Self::ClientStalled => 499,
            Self::BudgetSpent | Self::DecodeRefused | Self::Exhausted | Self::AllowlistNotReady => {
                503
            }
            Self::DecodeConnectTimeout
            | Self::FirstByteTimeout
            | Self::PrefillTimeout
            | Self::EncodeTimeout
            | Self::PairTimeout => 504,
            Self::Target(_)
            | Self::DecodeReset
            | Self::DecodeResponse
            | Self::DecodeTruncated
            | Self::PrefillConnect
            | Self::PrefillReset
            | Self::PrefillResponse
            | Self::PrefillResponseTooLarge
            | Self::HandoffMissing
            | Self::EncodeConnect
            | Self::EncodeReset
            | Self::EncodeResponse
            | Self::EncodeStatus(_)
            | Self::Bootstrap => 502,
            Self::PrefillStatus(status) => status,
            Self::ChunkResponse | Self::Bug(_) => 500,
        }
    }

    /// Returns the party that caused the fault.
    #[must_use]
    pub const fn blame(self) -> Blame {
        match self {
            Self::Head(_)
            | Self::Chunk
            | Self::Json(_)
            | Self::TooManyEdits
            | Self::Connect
            | Self::BodyTooLarge
            | Self::HeadTimeout
            | Self::BodyTimeout
            | Self::Target(_)
            | Self::TargetDenied
            | Self::UnknownRank
            | Self::PlainText
            | Self::ClientGone
            | Self::ClientStalled
            | Self::TooManyItems => Blame::Client,
            Self::DecodeRefused
            | Self::DecodeConnectTimeout
            | Self::DecodeReset
            | Self::DecodeResponse
            | Self::FirstByteTimeout
            | Self::DecodeTruncated
            | Self::PrefillConnect
            | Self::PrefillReset
            | Self::PrefillResponse
            | Self::PrefillResponseTooLarge
            | Self::PrefillTimeout
            | Self::PrefillStatus(_)
            | Self::HandoffMissing
            | Self::EncodeConnect
            | Self::EncodeReset
            | Self::EncodeResponse
            | Self::EncodeTimeout
            | Self::EncodeStatus(_)
            | Self::Bootstrap
            | Self::PairTimeout
            | Self::ChunkResponse => Blame::Upstream,
            Self::BudgetSpent | Self::Exhausted | Self::AllowlistNotReady | Self::Bug(_) => {
                Blame::Ours
            }
        }
    }

    /// Returns whether the fault is a failure of the prefill leg, after which the decoder can
    /// compute the prompt itself.
    #[must_use]
    pub const fn is_prefill(self) -> bool {
        matches!(
            self,
            Self::PrefillConnect
                | Self::PrefillReset
                | Self::PrefillResponse
                | Self::PrefillResponseTooLarge
                | Self::PrefillTimeout
                | Self::PrefillStatus(_)
                | Self::Bootstrap
                | Self::PairTimeout
        )
    }

    /// Returns the value of `Retry-After` in seconds, or `None` if the error response has no such
    /// field.
    #[must_use]
    pub const fn retry_after_secs(self) -> Option<u32> {
        match self.status() {
            503 => Some(RETRY_AFTER_SECS),
            _ => None,
        }
    }

    /// Returns the message for the client. It contains no addresses.
    #[must_use]
    pub fn text(self) -> String {
        match self {
            Self::Head(error) => format!("malformed request: {}", error.text()),
            Self::Json(error) => format!("invalid JSON: {error}"),
            Self::Target(error) => format!("bad x-prefiller-host-port: {}", error.text()),
            Self::PrefillStatus(status) => format!("the prefill engine responded with {status}"),
            Self::EncodeStatus(status) => format!("an encode node responded with {status}"),
            Self::Bug(what) => format!("internal error ({what})"),
            other => other.fixed_text().to_owned(),
        }
    }

    const fn fixed_text(self) -> &'static str {
        match self {
            Self::Chunk => "malformed request: invalid chunked body",
            Self::TooManyEdits => "the body has too many duplicates of members that are edited",
            Self::Connect => "CONNECT is not supported",
            Self::BodyTooLarge => "the request body is larger than --max-body allows",
            Self::BudgetSpent => "too many request bytes are buffered; try again",
            Self::HeadTimeout => "the request head did not arrive in time",
            Self::BodyTimeout => "the request body stopped arriving",
            Self::UnknownRank => "x-data-parallel-host-port does not match a rank of this server",
            Self::PlainText => "this port requires TLS; use https",
            Self::ClientGone => "the client disconnected",
            Self::ClientStalled => "the client stopped reading",
            Self::DecodeRefused => "the decode node is not ready",
            Self::DecodeConnectTimeout => "the decode node did not accept a connection in time",
            Self::Exhausted => "the proxy has no socket or memory left; try again",
            Self::DecodeReset => "the decode node closed the connection before its response",
            Self::DecodeResponse => "the decode node's response is not valid HTTP/1.1",
            Self::FirstByteTimeout => "the decode node did not start its response in time",
            Self::DecodeTruncated => "the decode node's response was truncated",
            Self::PrefillConnect => "no prefill node accepted a connection",
            Self::PrefillReset => "the prefill node closed the connection before its response",
            Self::PrefillResponse => "the prefill node's response could not be read",
            Self::PrefillResponseTooLarge => "the prefill node's response is too large",
            Self::PrefillTimeout => "the prefill node did not respond in time",
            Self::TargetDenied => "the prefill target is not on the allowlist",
            Self::AllowlistNotReady => "the allowlist is not complete yet; try again",
            Self::HandoffMissing => "the prefill node returned no usable kv_transfer_params",
            Self::EncodeConnect => "the encode node did not accept a connection",
            Self::EncodeReset => "the encode node closed the connection before its response",
            Self::EncodeResponse => "the encode node's response could not be read",
            Self::EncodeTimeout => "the encode node did not respond in time",
            Self::TooManyItems => "the request has too many images, audio and video parts",
            Self::Bootstrap => "the prefill node's bootstrap server returned no engine",
            Self::PairTimeout => "the prefill node did not confirm the transfer in time",
            Self::ChunkResponse => "the decode node's response could not be read",
            Self::Head(_)
            | Self::Json(_)
            | Self::Target(_)
            | Self::PrefillStatus(_)
            | Self::EncodeStatus(_)
            | Self::Bug(_) => "",
        }
    }

    /// Returns the `type` member of the error body.
    #[must_use]
    pub const fn kind(self) -> &'static str {
        match self.status() {
            400..=499 => "BadRequestError",
            502 => "BadGateway",
            503 => "ServiceUnavailable",
            504 => "GatewayTimeout",
            _ => "InternalServerError",
        }
    }

    /// Returns whether the error response for this fault has no body. pd-sidecar sends none for an
    /// unknown rank.
    #[must_use]
    pub const fn is_bodyless(self) -> bool {
        matches!(self, Self::UnknownRank)
    }

    /// Returns the body of the error response, a JSON object in pd-sidecar's shape
    /// (`docs/pd-sidecar.md#errors`). It is empty if the fault is bodyless.
    #[must_use]
    pub fn body(self) -> String {
        self.body_with(None)
    }

    /// Returns the body of the error response, as [`Fault::body`] does, with `detail` appended to
    /// the message in parentheses if it is given.
    #[must_use]
    pub fn body_with(self, detail: Option<&str>) -> String {
        if self.is_bodyless() {
            return String::new();
        }
        let message = match detail {
            Some(detail) => format!("{} ({detail})", self.text()),
            None => self.text(),
        };
        format!(
            r#"{{"object":"error","message":{},"type":"{}","param":"","code":{}}}"#,
            Quoted(&message),
            self.kind(),
            self.status()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::JsonReason;

    fn all() -> Vec<Fault> {
        vec![
            Fault::Head(HeadError::BareLf),
            Fault::Chunk,
            Fault::Json(JsonError {
                offset: 17,
                reason: JsonReason::NotAnObject,
            }),
            Fault::TooManyEdits,
            Fault::Connect,
            Fault::BodyTooLarge,
            Fault::BudgetSpent,
            Fault::HeadTimeout,
            Fault::BodyTimeout,
            Fault::Target(TargetError::Blank),
            Fault::UnknownRank,
            Fault::ClientGone,
            Fault::ClientStalled,
            Fault::DecodeRefused,
            Fault::DecodeConnectTimeout,
            Fault::Exhausted,
            Fault::DecodeReset,
            Fault::DecodeResponse,
            Fault::FirstByteTimeout,
            Fault::DecodeTruncated,
            Fault::PrefillConnect,
            Fault::PrefillReset,
            Fault::PrefillResponse,
            Fault::PrefillResponseTooLarge,
            Fault::PrefillTimeout,
            Fault::PrefillStatus(429),
            Fault::HandoffMissing,
            Fault::EncodeConnect,
            Fault::EncodeReset,
            Fault::EncodeResponse,
            Fault::EncodeTimeout,
            Fault::EncodeStatus(500),
            Fault::TooManyItems,
            Fault::Bootstrap,
            Fault::PairTimeout,
            Fault::ChunkResponse,
            Fault::Bug("x"),
            Fault::TargetDenied,
            Fault::AllowlistNotReady,
            Fault::PlainText,
        ]
    }

    #[test]
    fn every_fault_has_a_label_a_message_and_a_status() {
        assert_eq!(all().len(), LABELS.len());
        for (index, fault) in all().into_iter().enumerate() {
            assert_eq!(fault.index(), index, "{fault:?}");
            assert!(!fault.text().is_empty(), "{fault:?}");
            assert!((400..600).contains(&fault.status()), "{fault:?}");
            if !fault.is_bodyless() {
                let body: serde_json::Value = serde_json::from_str(&fault.body()).unwrap();
                assert_eq!(body["code"], fault.status());
                assert_eq!(body["object"], "error");
            }
        }
    }
}
