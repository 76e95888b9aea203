//! Legs and plans: decisions made by `pd` and carried out by `proxy`.

use super::outcome::Reason;
use super::uuid::Uuid;
use crate::json::{Splices, UsageShape};

/// The function of the engine that a leg is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Computes the KV cache of the prompt and passes it on.
    Prefill,
    /// Generates the tokens.
    Decode,
    /// Turns images, audio and video into embeddings.
    Encode,
    /// Returns the engines of a prefiller (Mooncake).
    Bootstrap,
}

/// The part of a leg's response that is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// The handoff and the cached-token count; the rest is discarded.
    Handoff,
    /// The whole body, which the proxy reads as JSON.
    Whole,
    /// Only the success status; the body is read to its end and discarded.
    Nothing,
    /// The whole response, which is relayed to the client. With a [`UsageShape`], its cached-token
    /// count is replaced by the prefiller's.
    Response(Option<UsageShape>),
}

/// One upstream call: the client's body with edits, and the use of the response.
#[derive(Debug)]
pub struct Leg {
    /// The kind of engine it is sent to.
    pub role: Role,
    /// The body, as splices over the client's bytes.
    pub body: Splices,
    /// The part of the response that is used.
    pub take: Take,
    /// Value of `x-data-parallel-rank`, which replaces the client's.
    pub rank: Option<u32>,
    /// Value of `x-request-id`, which replaces the request's own.
    pub request_id: Option<Uuid>,
}

/// The decision about a request whose body has been read.
#[derive(Debug)]
pub enum Plan {
    /// The decoder serves it alone, for this reason and with this leg.
    Local(Reason, Leg),
    /// A prefiller and the decoder serve it.
    Split,
}
