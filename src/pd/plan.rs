//! Legs and plans: the values that cross from deciding to doing.

use super::outcome::Reason;
use super::uuid::Uuid;
use crate::json::{Splices, UsageShape};

/// What an engine is to a leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Computes the prompt's KV cache and hands it over.
    Prefill,
    /// Generates the tokens.
    Decode,
    /// Turns images, audio and video into embeddings.
    Encode,
    /// Names a prefiller's engines (Mooncake).
    Bootstrap,
}

/// What to take from a leg's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// The handoff and the cached-token count; the rest is thrown away.
    Handoff,
    /// All of it, a JSON text that the proxy looks into.
    Whole,
    /// That it was a success; the body is read to its end and thrown away.
    Nothing,
    /// The whole answer, relayed to the client; its cached-token count is corrected to the
    /// prefiller's where the API has one.
    Response(Option<UsageShape>),
}

/// One upstream call: the client's body with edits, and what its answer is for.
#[derive(Debug)]
pub struct Leg {
    /// Which kind of engine it goes to.
    pub role: Role,
    /// The body, as splices over the client's bytes.
    pub body: Splices,
    /// What the answer gives.
    pub take: Take,
    /// Data-parallel rank named in `x-data-parallel-rank`, in place of the client's.
    pub rank: Option<u32>,
    /// `x-request-id` in place of the request's own.
    pub request_id: Option<Uuid>,
}

/// How a request whose body has been read is served.
#[derive(Debug)]
pub enum Plan {
    /// By the decoder alone.
    Local(Reason, Leg),
    /// By a prefiller and the decoder.
    Split,
}
