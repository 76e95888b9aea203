//! Legs: built by `pd` and carried out by `proxy`.

use super::uuid::Uuid;
use crate::budget::Kept;
use crate::json::transform::UsageShape;
use crate::json::{Handoff, Splices};

/// The function of the server that a leg is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// A prefill engine, which computes the KV cache of the prompt.
    Prefill,
    /// A decode engine, which generates the tokens of the response.
    Decode,
    /// An encoder, which turns images, audio and video into embeddings.
    Encode,
    /// The bootstrap server of a prefiller, which returns the list of its engines (Mooncake).
    Bootstrap,
}

impl Role {
    /// All roles, in the order of `index`.
    pub const ALL: [Self; 4] = [Self::Prefill, Self::Decode, Self::Encode, Self::Bootstrap];

    /// Returns the role's name in metrics and logs.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Encode => "encode",
            Self::Bootstrap => "bootstrap",
        }
    }

    /// Returns the position of the role in `ALL`.
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// The part of a leg's response that is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Take {
    /// The handoff and the cached-token count are read; the rest of the response is discarded.
    Handoff,
    /// As `Handoff`, together with the reason why the prefill ended. It decides whether the KV
    /// cache is kept if the legs share an id.
    Transfer,
    /// The whole response body is read, as JSON.
    Whole,
    /// The whole response body is read, as JSON of at most `PAGE_BYTES_MAX` bytes.
    Page,
    /// Only the success status matters; the response body is read to its end and discarded.
    Nothing,
    /// The whole response is relayed to the client. With a [`UsageShape`], the cached-token count
    /// in it is replaced by the prefiller's.
    Response(Option<UsageShape>),
}

/// The part of a successful response that the leg was sent for.
#[derive(Debug)]
pub enum Collected {
    /// The handoff for the decode leg, extracted from a prefill response.
    Handoff(Box<Handoff>),
    /// The whole response body, validated as JSON.
    Whole(Kept),
    /// No part of the response, because only the success matters.
    Nothing,
}

/// One upstream call: its request body, usually the client's body with edits, and the part of the
/// response that is used.
#[derive(Debug)]
pub struct Leg {
    /// The kind of server that the leg is sent to.
    pub role: Role,
    /// The body of the leg's request, as splices over the client's body or, for the release of
    /// stranded KV cache, over a body that the proxy wrote. Empty for a bootstrap query.
    pub body: Splices,
    /// The part of the leg's response that is used.
    pub take: Take,
    /// Value of `x-data-parallel-rank` in the leg's request, which replaces the client's. `None`
    /// leaves the client's field unchanged.
    pub rank: Option<u32>,
    /// Value of `x-request-id` in the leg's request. If `None`, the id of the client's request is
    /// used.
    pub request_id: Option<Uuid>,
}
