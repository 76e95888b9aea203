//! The table of everything that can go wrong with a request.
//!
//! Every failure of a session or a leg is a [`Fault`]. Its row in `ROWS` has the metric label, the
//! status and the message that the client receives, and the party to blame. Every error response
//! that the proxy generates takes them from here.

use crate::config::ErrorStyle;
use crate::fleet::TargetError;
use crate::h1::HeadError;
use crate::json::{EditError, JsonError, Quoted};
use crate::pd::{Reason, Role};

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
    /// The process has no socket, memory or local port left for an engine connection, or too many
    /// name look-ups are in progress.
    Exhausted,
    /// A leg failed.
    Leg {
        /// The role of the leg.
        role: Role,
        /// Why it failed.
        cause: Cause,
    },
    /// There is no handoff for the decode leg, or it is malformed, too old or already used, and
    /// `--on-missing-kv error` forbids decoding without one.
    HandoffMissing,
    /// The request has more image, audio and video parts than
    /// [`ITEMS_MAX`](crate::pd::encode::ITEMS_MAX).
    TooManyItems,
    /// A defect of the proxy, with a short description.
    Bug(&'static str),
    /// The prefill target is not on the allowlist.
    TargetDenied,
    /// The prefill target is not on the allowlist, but the allowlist is still incomplete.
    AllowlistNotReady,
    /// Plain HTTP was received on a TLS port.
    PlainText,
}

/// Reason why a leg failed. Together with the leg's role it selects a row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// No address of the engine accepts connections: it is down or still loading.
    Refused,
    /// The look-up of the engine's name, or the connect to at least one of its addresses, took
    /// longer than `--connect-timeout`, and no connect succeeded.
    ConnectTimeout,
    /// The engine closed or reset the connection before the first byte of its response.
    ConnectionClosed,
    /// The response violates HTTP/1.1, or the connection ended before its head was complete. If the
    /// proxy reads the response itself: it is truncated, has a content encoding, or is not JSON.
    BadResponse,
    /// A response that is not relayed to the client is longer than `--max-prefill-answer`.
    TooLarge,
    /// The engine did not start its response within `--first-byte-timeout`, or the leg took longer
    /// than the limit of its role (`--prefill-timeout`).
    Timeout,
    /// In the concurrent order of `MoRI-IO`, the prefiller did not respond within
    /// `--moriio-parallel-decode-wait-timeout`.
    PairTimeout,
    /// The body of the response was truncated or its chunked framing was malformed. Usually a part
    /// of the response had already been forwarded to the client.
    Truncated,
    /// A response to one request of a chunked decode (`--decode-chunk-size`) is unusable: it is not
    /// a chat completion of plain text, is truncated, has a content encoding, is longer than
    /// `--max-prefill-answer`, or is an error after the client's stream has started.
    Unusable,
    /// The engine responded with this status, which is not 2xx. If the response is not relayed to
    /// the client, a status of a prefiller other than 4xx or 5xx is replaced by 502.
    Status(u16),
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
const ROWS: [Row; 40] = rows! {
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
    /// Returns the fault of a leg of `role` that failed with `cause`.
    #[must_use]
    pub const fn leg(role: Role, cause: Cause) -> Self {
        Self::Leg { role, cause }
    }

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
            Self::Exhausted => 15,
            Self::Leg { role, cause } => cause.index(role),
            Self::HandoffMissing => 26,
            Self::TooManyItems => 32,
            Self::Bug(_) => 36,
            Self::TargetDenied => 37,
            Self::AllowlistNotReady => 38,
            Self::PlainText => 39,
        }
    }

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

    /// Returns whether a prefill leg failed, so that the decoder can compute the prompt itself.
    #[must_use]
    pub const fn is_prefill(self) -> bool {
        matches!(
            self,
            Self::Leg {
                role: Role::Prefill | Role::Bootstrap,
                ..
            }
        )
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

impl Cause {
    /// Returns the row of a leg of `role` that failed for this reason. Not every role can fail in
    /// every way: only decode responses are relayed, so only they can be truncated on the way.
    const fn index(self, role: Role) -> usize {
        match (role, self) {
            (Role::Decode, Self::Refused) => 13,
            (Role::Decode, Self::ConnectTimeout) => 14,
            (Role::Decode, Self::ConnectionClosed) => 16,
            (Role::Decode, Self::BadResponse) => 17,
            (Role::Decode, Self::Timeout | Self::PairTimeout) => 18,
            (Role::Decode, Self::Truncated) => 19,
            (Role::Decode, Self::TooLarge | Self::Unusable | Self::Status(_)) => 35,
            (Role::Prefill, Self::Refused | Self::ConnectTimeout) => 20,
            (Role::Prefill, Self::ConnectionClosed) => 21,
            (Role::Prefill, Self::BadResponse | Self::Truncated | Self::Unusable) => 22,
            (Role::Prefill, Self::TooLarge) => 23,
            (Role::Prefill, Self::Timeout) => 24,
            (Role::Prefill, Self::Status(_)) => 25,
            (Role::Prefill, Self::PairTimeout) => 34,
            (Role::Encode, Self::Refused | Self::ConnectTimeout) => 27,
            (Role::Encode, Self::ConnectionClosed) => 28,
            (
                Role::Encode,
                Self::BadResponse | Self::TooLarge | Self::Truncated | Self::Unusable,
            ) => 29,
            (Role::Encode, Self::Timeout | Self::PairTimeout) => 30,
            (Role::Encode, Self::Status(_)) => 31,
            (Role::Bootstrap, _) => 33,
        }
    }
}

impl From<EditError> for Fault {
    /// Only the number of edits depends on the client's body. Every other error is a plan that
    /// contradicts itself.
    fn from(error: EditError) -> Self {
        match error {
            EditError::TooMany => Self::TooManyEdits,
            EditError::NotWatched => Self::Bug("a leg edits a member that is not watched"),
            EditError::Twice => Self::Bug("a leg edits a member twice"),
            EditError::InsideEdited => Self::Bug("a leg edits a member inside a replaced one"),
            EditError::NoObject => Self::Bug("a leg edits a member of an absent object"),
        }
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
    fn only_too_many_edits_are_the_clients_fault() {
        assert_eq!(Fault::from(EditError::TooMany), Fault::TooManyEdits);
        for error in [
            EditError::NotWatched,
            EditError::Twice,
            EditError::InsideEdited,
            EditError::NoObject,
        ] {
            assert!(matches!(Fault::from(error), Fault::Bug(_)), "{error:?}");
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
