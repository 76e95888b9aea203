//! The one table of what can go wrong with a request.
//!
//! Every failure of a session or a leg is a [`Fault`]. This file alone says which status the
//! client gets, in which words, under which metric label, and whether the client's connection
//! survives. Nothing else writes an error answer.

use crate::fleet::TargetError;
use crate::h1::HeadError;
use crate::json::{JsonError, Quoted};

/// Why a request was not served, or not to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The request's head breaks HTTP/1.1.
    Head(HeadError),
    /// The request's chunked framing is broken.
    Chunk,
    /// The body is not the JSON it has to be.
    Json(JsonError),
    /// The body needs more edits than a request may have.
    TooManyEdits,
    /// `CONNECT`: this proxy opens no tunnels to other places.
    Connect,
    /// The body is longer than `--max-body`.
    BodyTooLarge,
    /// The process holds as many body bytes as `--body-budget` allows.
    BudgetSpent,
    /// The head did not arrive in `--head-timeout`.
    HeadTimeout,
    /// The upload made no progress for `--body-timeout`.
    BodyTimeout,
    /// The routing header names no usable target.
    Target(TargetError),
    /// `x-data-parallel-host-port` names no rank of this proxy.
    UnknownRank,
    /// The client closed its connection.
    ClientGone,
    /// The client took nothing of its answer for `--client-stall-timeout`.
    ClientStalled,
    /// The decoder refuses connections: it is down or still loading.
    DecodeRefused,
    /// The decoder could not be connected to in time.
    DecodeConnectTimeout,
    /// No socket, no memory or no port to reach an engine with.
    Exhausted,
    /// The decoder ended the connection before its answer.
    DecodeReset,
    /// The decoder's answer breaks HTTP/1.1.
    DecodeResponse,
    /// The decoder was silent for `--first-byte-timeout`.
    FirstByteTimeout,
    /// The decoder's answer ended before its end; part of it has been sent on.
    DecodeTruncated,
    /// No candidate prefiller could be connected to.
    PrefillConnect,
    /// The prefiller ended the connection before its answer.
    PrefillReset,
    /// The prefiller's answer breaks HTTP/1.1, is cut short, is encoded, or is no JSON.
    PrefillResponse,
    /// The prefiller's answer is longer than `--max-prefill-answer`.
    PrefillResponseTooLarge,
    /// The prefill leg took longer than `--prefill-timeout`.
    PrefillTimeout,
    /// The prefiller answered with this status.
    PrefillStatus(u16),
    /// No usable handoff came, and `--on-missing-kv error` says not to go on without one.
    HandoffMissing,
    /// No encoder could be connected to.
    EncodeConnect,
    /// An encoder ended the connection before its answer.
    EncodeReset,
    /// An encoder's answer breaks HTTP/1.1, is cut short, is encoded, or is no JSON.
    EncodeResponse,
    /// An encoder was silent for `--first-byte-timeout`.
    EncodeTimeout,
    /// An encoder answered with this status.
    EncodeStatus(u16),
    /// The request has more images, audio and video than one may have.
    TooManyItems,
    /// A prefiller's bootstrap server could not be asked for its engines.
    Bootstrap,
    /// The prefiller did not answer in `--moriio-parallel-decode-wait-timeout`.
    PairTimeout,
    /// A decoder's answer that the proxy has to read is not the JSON it should be.
    ChunkResponse,
    /// A defect of the proxy, named.
    Bug(&'static str),
    /// The allowlist does not have the prefill target.
    TargetDenied,
    /// The allowlist does not have the prefill target, but is not whole yet.
    AllowlistNotReady,
    /// Plain HTTP where TLS is spoken.
    PlainText,
}

/// Whose fault it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The client's.
    Client,
    /// An engine's, or the way to it.
    Upstream,
    /// Ours.
    Ours,
}

/// Labels of all faults, in the order of [`Fault::index`].
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

/// Seconds a client is asked to wait before it tries again.
const RETRY_AFTER_SECS: u32 = 1;

impl Fault {
    /// Position in [`LABELS`].
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

    /// The label in metrics, logs and the `x-ringside-error` field.
    #[must_use]
    pub fn label(self) -> &'static str {
        LABELS[self.index()]
    }

    /// The status the client gets, as long as none has been sent.
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
            // Never sent: nobody is there to read it.
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

    /// Whose fault it was.
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

    /// Whether it is a prefill leg that failed: the decoder can compute the prompt itself.
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

    /// Whether the client is told when to try again.
    #[must_use]
    pub const fn retry_after_secs(self) -> Option<u32> {
        match self.status() {
            503 => Some(RETRY_AFTER_SECS),
            _ => None,
        }
    }

    /// The text for the client: what happened and what to do, without addresses.
    #[must_use]
    pub fn text(self) -> String {
        match self {
            Self::Head(error) => format!("malformed request: {}", error.text()),
            Self::Json(error) => format!("invalid JSON: {error}"),
            Self::Target(error) => format!("bad x-prefiller-host-port: {}", error.text()),
            Self::PrefillStatus(status) => format!("the prefill engine answered {status}"),
            Self::EncodeStatus(status) => format!("an encode node answered {status}"),
            Self::Bug(what) => format!("internal error ({what})"),
            other => other.fixed_text().to_owned(),
        }
    }

    const fn fixed_text(self) -> &'static str {
        match self {
            Self::Chunk => "malformed request: the chunked body is broken",
            Self::TooManyEdits => "the body repeats the fields the proxy edits too many times",
            Self::Connect => "CONNECT is not offered here",
            Self::BodyTooLarge => "the request body is larger than --max-body allows",
            Self::BudgetSpent => "too many request bytes are being held; try again",
            Self::HeadTimeout => "the request head did not arrive in time",
            Self::BodyTimeout => "the request body stopped arriving",
            Self::UnknownRank => "x-data-parallel-host-port names no rank of this server",
            Self::PlainText => "this port speaks TLS; use https",
            Self::ClientGone => "the client left",
            Self::ClientStalled => "the client stopped reading",
            Self::DecodeRefused => "the decode node is not ready",
            Self::DecodeConnectTimeout => "the decode node did not accept a connection in time",
            Self::Exhausted => "the proxy has no socket or memory left; try again",
            Self::DecodeReset => "the decode node closed the connection before its answer",
            Self::DecodeResponse => "the decode node's answer is not valid HTTP/1.1",
            Self::FirstByteTimeout => "the decode node did not begin its answer in time",
            Self::DecodeTruncated => "the decode node's answer was cut short",
            Self::PrefillConnect => "no prefill node could be connected to",
            Self::PrefillReset => "the prefill node closed the connection before its answer",
            Self::PrefillResponse => "the prefill node's answer could not be read",
            Self::PrefillResponseTooLarge => "the prefill node's answer is too large",
            Self::PrefillTimeout => "the prefill node did not answer in time",
            Self::TargetDenied => "the prefill target is not on the allowlist",
            Self::AllowlistNotReady => "the list of allowed targets is not complete yet; try again",
            Self::HandoffMissing => "the prefill node gave no usable kv_transfer_params",
            Self::EncodeConnect => "the encode node could not be connected to",
            Self::EncodeReset => "the encode node closed the connection before its answer",
            Self::EncodeResponse => "the encode node's answer could not be read",
            Self::EncodeTimeout => "the encode node did not answer in time",
            Self::TooManyItems => "the request has too many images, audio and video parts",
            Self::Bootstrap => "the prefill node's bootstrap server gave no engine",
            Self::PairTimeout => "the prefill node did not confirm the transfer in time",
            Self::ChunkResponse => "the decode node's answer could not be read",
            Self::Head(_)
            | Self::Json(_)
            | Self::Target(_)
            | Self::PrefillStatus(_)
            | Self::EncodeStatus(_)
            | Self::Bug(_) => "",
        }
    }

    /// The `type` member of the error body.
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

    /// Whether the answer has no body at all, as pd-sidecar's for an unknown rank.
    #[must_use]
    pub const fn is_bodyless(self) -> bool {
        matches!(self, Self::UnknownRank)
    }

    /// The error body in pd-sidecar's shape (reference 8), as `application/json`.
    #[must_use]
    pub fn body(self) -> String {
        self.body_with(None)
    }

    /// The same with a detail behind the text.
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
    fn every_fault_has_its_row() {
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
