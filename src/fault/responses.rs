//! The error response to each fault: one table of statuses and texts.
//!
//! The row of a [`Fault`] in `ROWS` has the metric label, the status and the message that the
//! client receives, and the party to blame. Every error response that the proxy generates takes
//! them from here.

use super::causes::{Blame, Cause, Fault};
use crate::config::ErrorStyle;
use crate::json::Quoted;
use crate::pd::{Reason, Role};

/// Everything that a kind of fault determines.
struct Row {
    /// The label in metrics, logs and the `x-ringside-error` field.
    label: &'static str,
    /// The status of the response, unless the fault carries one.
    status: u16,
    blame: Blame,
    /// The reason in metrics and in the access log.
    reason: Reason,
    /// The message for the client, or its beginning if the fault carries details.
    text: &'static str,
}

/// Builds the table from lines of label, status, blame, reason and text.
macro_rules! rows {
    ($($label:literal $status:literal $blame:ident $reason:ident $text:literal;)*) => {
        [$(Row {
            label: $label,
            status: $status,
            blame: Blame::$blame,
            reason: Reason::$reason,
            text: $text,
        }),*]
    };
}

/// One row for each kind of fault, in the order in which metrics list them.
#[rustfmt::skip]
const ROWS: [Row; 44] = rows! {
    "bad_head" 400 Client ClientError "malformed request";
    "bad_chunk" 400 Client ClientError "malformed request: invalid chunked body";
    "bad_json" 400 Client ClientError "invalid JSON";
    "too_many_edits" 400 Client ClientError
        "the body has too many duplicates of members that are edited";
    "connect_method" 405 Client ClientError "CONNECT is not supported";
    "body_too_large" 413 Client ClientError "the request body is larger than --max-body allows";
    "body_budget" 503 Ours ClientError "too many request bytes are buffered; try again";
    "head_timeout" 408 Client ClientError "the request head did not arrive in time";
    "body_timeout" 408 Client ClientError "the request body stopped arriving";
    "bad_target" 502 Client BadTarget "bad x-prefiller-host-port";
    "unknown_rank" 400 Client ClientError
        "x-data-parallel-host-port does not match a rank of this server";
    "client_gone" 499 Client ClientGone "the client disconnected";
    "client_stalled" 499 Client ClientGone "the client stopped reading";
    "decode_refused" 503 Upstream Decode "the decode node is not ready";
    "decode_connect_timeout" 504 Upstream Decode
        "the decode node did not accept a connection in time";
    "exhausted" 503 Ours ClientError "the proxy has no socket or memory left; try again";
    "decode_reset" 502 Upstream Decode "the decode node closed the connection before its response";
    "decode_answer" 502 Upstream Decode "the decode node's response is not valid HTTP/1.1";
    "first_byte_timeout" 504 Upstream Decode "the decode node did not start its response in time";
    "decode_truncated" 502 Upstream Decode "the decode node's response was truncated";
    "prefill_connect" 502 Upstream PrefillConnect "no prefill node accepted a connection";
    "prefill_reset" 502 Upstream PrefillReset
        "the prefill node closed the connection before its response";
    "prefill_answer" 502 Upstream PrefillResponse "the prefill node's response could not be read";
    "prefill_answer_too_large" 502 Upstream PrefillResponse
        "the prefill node's response is too large";
    "prefill_timeout" 504 Upstream PrefillTimeout "the prefill node did not respond in time";
    "prefill_status" 502 Upstream PrefillStatus "the prefill engine responded with";
    "handoff_missing" 502 Upstream MissingKv
        "the prefill node returned no usable kv_transfer_params";
    "encode_connect" 502 Upstream Encode "the encode node did not accept a connection";
    "encode_reset" 502 Upstream Encode "the encode node closed the connection before its response";
    "encode_answer" 502 Upstream Encode "the encode node's response could not be read";
    "encode_timeout" 504 Upstream Encode "the encode node did not respond in time";
    "encode_status" 502 Upstream Encode "an encode node responded with";
    "too_many_items" 400 Client ClientError
        "the request has too many images, audio and video parts";
    "bootstrap" 502 Upstream Bootstrap "the prefill node's bootstrap server returned no engine";
    "pair_timeout" 504 Upstream PrefillTimeout
        "the prefill node did not confirm the transfer in time";
    "chunk_answer" 500 Upstream Decode "the decode node's response could not be read";
    "bug" 500 Ours ClientError "internal error";
    "target_denied" 403 Client TargetDenied "the prefill target is not on the allowlist";
    "allowlist_not_ready" 503 Ours TargetDenied "the allowlist is not complete yet; try again";
    "plain_text" 400 Client ClientError "this port requires TLS; use https";
    "content_coding" 415 Client ClientError
        "the request body must not be compressed; send it without Content-Encoding";
    "several_sequences" 400 Client ClientError
        "n above 1 is not supported: these engines do not finish a request with several sequences";
    "invalid_form" 400 Client ClientError "invalid multipart/form-data";
    "drained" 503 Ours Drained "the proxy is shutting down";
};

/// Labels of all faults, ordered by [`Fault::index`].
pub const LABELS: &[&str] = &{
    let mut labels = [""; ROWS.len()];
    let mut at = 0;
    while at < labels.len() {
        labels[at] = ROWS[at].label;
        at += 1;
    }
    labels
};

/// Value of `Retry-After` in a 503 response, in seconds.
const RETRY_AFTER_SECS: u32 = 1;

impl Fault {
    const fn row(self) -> &'static Row {
        &ROWS[self.index()]
    }

    /// Returns the label used in metrics, logs and the `x-ringside-error` field.
    #[must_use]
    pub const fn label(self) -> &'static str {
        self.row().label
    }

    /// Returns the status that the client receives if no status has been sent yet. A 499 is never
    /// sent, because the client no longer reads; it appears in logs only.
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::Head(error) => error.status(),
            Self::Leg {
                role: Role::Prefill,
                cause: Cause::Status(status),
            } => status,
            _ => self.row().status,
        }
    }

    /// Returns the party that caused the fault.
    #[must_use]
    pub const fn blame(self) -> Blame {
        self.row().blame
    }

    /// Returns the reason that metrics and the access log report for a request that failed so.
    #[must_use]
    pub const fn reason(self) -> Reason {
        self.row().reason
    }

    /// Returns the value of `Retry-After`, if the response has one.
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
        let text = self.row().text;
        match self {
            Self::Head(error) => format!("{text}: {}", error.text()),
            Self::Json(error) => format!("{text}: {error}"),
            Self::Form(error) => format!("{text}: {}", error.text()),
            Self::Target(error) => format!("{text}: {}", error.text()),
            Self::Leg {
                role: Role::Prefill | Role::Encode,
                cause: Cause::Status(status),
            } => format!("{text} {status}"),
            Self::Bug(what) => format!("{text} ({what})"),
            _ => text.to_owned(),
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

    /// Returns whether the response has no body. pd-sidecar sends none for an unknown rank.
    #[must_use]
    pub const fn is_bodyless(self, style: ErrorStyle) -> bool {
        matches!((style, self), (ErrorStyle::PdSidecar, Self::UnknownRank))
    }

    /// Returns the error body, a JSON object in the given style (`docs/pd-sidecar.md#errors`).
    #[must_use]
    pub fn body(self, style: ErrorStyle) -> String {
        self.body_with(style, None)
    }

    /// Returns the error body with `detail` appended to the message in parentheses.
    #[must_use]
    pub fn body_with(self, style: ErrorStyle, detail: Option<&str>) -> String {
        if self.is_bodyless(style) {
            return String::new();
        }
        let message = match detail {
            Some(detail) => format!("{} ({detail})", self.text()),
            None => self.text(),
        };
        let (message, kind, status) = (Quoted(&message), self.kind(), self.status());
        match style {
            ErrorStyle::PdSidecar => format!(
                r#"{{"object":"error","message":{message},"type":"{kind}","param":"","code":{status}}}"#
            ),
            ErrorStyle::OpenAi => format!(
                r#"{{"error":{{"message":{message},"type":"{kind}","param":null,"code":{status}}}}}"#
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::TargetError;
    use crate::h1::{FormError, HeadError};
    use crate::json::{JsonError, JsonReason};

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
            Fault::leg(Role::Decode, Cause::Refused),
            Fault::leg(Role::Decode, Cause::ConnectTimeout),
            Fault::Exhausted,
            Fault::leg(Role::Decode, Cause::ConnectionClosed),
            Fault::leg(Role::Decode, Cause::BadResponse),
            Fault::leg(Role::Decode, Cause::Timeout),
            Fault::leg(Role::Decode, Cause::Truncated),
            Fault::leg(Role::Prefill, Cause::Refused),
            Fault::leg(Role::Prefill, Cause::ConnectionClosed),
            Fault::leg(Role::Prefill, Cause::BadResponse),
            Fault::leg(Role::Prefill, Cause::TooLarge),
            Fault::leg(Role::Prefill, Cause::Timeout),
            Fault::leg(Role::Prefill, Cause::Status(429)),
            Fault::HandoffMissing,
            Fault::leg(Role::Encode, Cause::ConnectTimeout),
            Fault::leg(Role::Encode, Cause::ConnectionClosed),
            Fault::leg(Role::Encode, Cause::TooLarge),
            Fault::leg(Role::Encode, Cause::Timeout),
            Fault::leg(Role::Encode, Cause::Status(500)),
            Fault::TooManyItems,
            Fault::leg(Role::Bootstrap, Cause::Refused),
            Fault::leg(Role::Prefill, Cause::PairTimeout),
            Fault::leg(Role::Decode, Cause::Unusable),
            Fault::Bug("x"),
            Fault::TargetDenied,
            Fault::AllowlistNotReady,
            Fault::PlainText,
            Fault::ContentCoding,
            Fault::SeveralSequences,
            Fault::Form(FormError::Boundary),
            Fault::Drained,
        ]
    }

    #[test]
    fn every_fault_has_a_label_a_message_and_a_status() {
        assert_eq!(all().len(), LABELS.len());
        for (index, fault) in all().into_iter().enumerate() {
            assert_eq!(fault.index(), index, "{fault:?}");
            assert!(!fault.text().is_empty(), "{fault:?}");
            assert!((400..600).contains(&fault.status()), "{fault:?}");
            if fault != Fault::UnknownRank {
                let body = fault.body(ErrorStyle::PdSidecar);
                let body: serde_json::Value = serde_json::from_str(&body).unwrap();
                assert_eq!(body["code"], fault.status());
                assert_eq!(body["object"], "error");
            }
            let body = fault.body(ErrorStyle::OpenAi);
            let body: serde_json::Value = serde_json::from_str(&body).unwrap();
            assert_eq!(body["error"]["code"], fault.status());
            assert_eq!(body["error"]["message"], fault.text());
        }
    }

    #[test]
    fn every_cause_of_a_leg_is_reported_under_its_role() {
        for role in [Role::Prefill, Role::Decode, Role::Encode, Role::Bootstrap] {
            for cause in [
                Cause::Refused,
                Cause::ConnectTimeout,
                Cause::ConnectionClosed,
                Cause::BadResponse,
                Cause::TooLarge,
                Cause::Timeout,
                Cause::PairTimeout,
                Cause::Truncated,
                Cause::Unusable,
                Cause::Status(500),
            ] {
                let fault = Fault::leg(role, cause);
                let label = fault.label();
                let is_own = match role {
                    Role::Prefill => label.starts_with("prefill_") || label == "pair_timeout",
                    Role::Decode => {
                        let others = ["first_byte_timeout", "chunk_answer"];
                        label.starts_with("decode_") || others.contains(&label)
                    }
                    Role::Encode => label.starts_with("encode_"),
                    Role::Bootstrap => label == "bootstrap",
                };
                assert!(is_own, "{fault:?}: {label}");
                assert_eq!(fault.blame(), Blame::Upstream, "{fault:?}");
            }
        }
    }
}
