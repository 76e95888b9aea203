//! The causes for which a request is not served, or not served completely.

use crate::budget::BudgetSpent;
use crate::fleet::TargetError;
use crate::h1::{FormError, HeadError};
use crate::json::{EditError, JsonError};
use crate::pd::Role;

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
    /// The request body is a form that parsers could read in different ways, or one with a value
    /// above a limit.
    Form(FormError),
    /// The request body has a content coding, such as gzip, and would have to be read.
    ContentCoding,
    /// The body needs more edits than one leg may have
    /// ([`JSON_EDITS_MAX`](crate::limits::JSON_EDITS_MAX)).
    TooManyEdits,
    /// The method is `CONNECT`, which this proxy does not support.
    Connect,
    /// The request body is longer than `--max-body`.
    BodyTooLarge,
    /// Keeping a request body or a part of an engine's response would exceed `--body-budget`, the
    /// limit for all kept bytes of the process, or the memory could not be allocated.
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
    /// The engines cannot serve a request with several sequences.
    SeveralSequences,
    /// Plain HTTP was received on a TLS port.
    PlainText,
    /// The request was open when the time limit of a drain passed.
    Drained,
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

impl Fault {
    /// Returns the fault of a leg of `role` that failed with `cause`.
    #[must_use]
    pub const fn leg(role: Role, cause: Cause) -> Self {
        Self::Leg { role, cause }
    }

    /// Returns the position in [`LABELS`](super::LABELS).
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
            Self::ContentCoding => 40,
            Self::SeveralSequences => 41,
            Self::Form(_) => 42,
            Self::Drained => 43,
        }
    }

    /// Returns whether the fault leaves the end of the request's body known, so that the connection
    /// can carry another request once the body has been read.
    #[must_use]
    pub const fn keeps_framing(self) -> bool {
        !matches!(
            self,
            Self::Head(_) | Self::Chunk | Self::BodyTimeout | Self::Bug(_)
        )
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

impl From<BudgetSpent> for Fault {
    fn from(_: BudgetSpent) -> Self {
        Self::BudgetSpent
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
}
