//! Which legs a connector has, and in which order.

use super::decide;
use super::options::KvConnector;
use super::peer::Peer;
use super::plan::{Leg, Plan};
use super::request::PdRequest;
use super::{mooncake, mori, nixl, nixlv2, offloading, sglang, shared_storage};
use crate::json::EditError;

/// How the legs of a split request follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The prefill leg, and the decode leg made from its answer.
    Serial,
    /// Both at once.
    Concurrent,
    /// The decoder first; the serial order where it asks for that.
    DecodeFirst,
}

/// What becomes of a leg whose client has left (reference `competitors` 9.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDisconnect {
    /// It is ended at once, which frees the engine.
    Cancel,
    /// It runs on until the decoder's first answer byte: ended before, the engine would keep memory for a
    /// transfer that nobody reports the end of.
    UntilFirstByte,
    /// It runs to its end: the other engine may be reading from it.
    RunToEnd,
}

/// The order of a request's legs.
#[must_use]
pub fn order(connector: KvConnector, request: &PdRequest<'_>) -> Order {
    match connector {
        KvConnector::Nixlv2 if request.mori.write_mode && request.mori.parallel_wait.is_some() => {
            Order::Concurrent
        }
        KvConnector::SharedStorage if shared_storage::asks_decode_first(request) => {
            Order::DecodeFirst
        }
        KvConnector::Nixlv2
        | KvConnector::SharedStorage
        | KvConnector::Nixl
        | KvConnector::Lmcache => Order::Serial,
        KvConnector::Sglang | KvConnector::Mooncake | KvConnector::Offloading => Order::Concurrent,
    }
}

/// What becomes of the two legs of [`Order::Concurrent`] when the client leaves: the prefill leg, and
/// the decode leg before its first byte.
#[must_use]
pub const fn on_disconnect(connector: KvConnector) -> [OnDisconnect; 2] {
    match connector {
        // The decoder tells its side of the room; the prefiller must see the end of its own.
        KvConnector::Sglang => [OnDisconnect::RunToEnd, OnDisconnect::Cancel],
        // The prefiller writes, or is read, until it has reported.
        KvConnector::Mooncake | KvConnector::Offloading => {
            [OnDisconnect::RunToEnd, OnDisconnect::UntilFirstByte]
        }
        KvConnector::Nixlv2 => [OnDisconnect::UntilFirstByte, OnDisconnect::UntilFirstByte],
        KvConnector::SharedStorage | KvConnector::Nixl | KvConnector::Lmcache => {
            [OnDisconnect::Cancel, OnDisconnect::Cancel]
        }
    }
}

/// Whether an answer of the decode leg is the client's before the prefiller has answered well.
#[must_use]
pub const fn commits_on_first_byte(connector: KvConnector) -> bool {
    // MoRI-IO's decoder answers with a head, and with tokens, before the prefiller has failed.
    !matches!(connector, KvConnector::Nixlv2)
}

/// Plans a request that names a prefiller: by both, or by the decoder alone.
///
/// # Errors
/// When the body needs more edits than allowed.
pub fn plan(connector: KvConnector, request: &PdRequest<'_>) -> Result<Plan, EditError> {
    let reason = match connector {
        KvConnector::Nixlv2
        | KvConnector::Nixl
        | KvConnector::Mooncake
        | KvConnector::Offloading => {
            decide::keep_local(request.api, request.document, request.body)
        }
        // A store serves any number of sequences, and SGLang numbers the rooms of a list itself.
        KvConnector::SharedStorage | KvConnector::Lmcache | KvConnector::Sglang => {
            decide::keep_shape_local(request.api, request.document)
        }
    };
    match reason {
        Some(reason) => Ok(Plan::Local(reason, request.local_leg()?)),
        None => Ok(Plan::Split),
    }
}

/// The prefill leg of a serial order: [`order`] has said so, and of the connectors that run side by
/// side none gets here.
///
/// # Errors
/// When the body needs more edits than allowed.
pub fn prefill_leg(
    connector: KvConnector,
    request: &PdRequest<'_>,
    peer: &Peer,
) -> Result<Leg, EditError> {
    match connector {
        KvConnector::Nixl => nixl::prefill_leg(request),
        KvConnector::SharedStorage => shared_storage::prefill_leg(request),
        KvConnector::Lmcache => shared_storage::lmcache_prefill_leg(request),
        KvConnector::Nixlv2
        | KvConnector::Sglang
        | KvConnector::Mooncake
        | KvConnector::Offloading => nixlv2::prefill_leg(request, peer),
    }
}

/// The decode leg of a serial order; `handoff` is what its prefill leg's answer gave, of
/// connectors whose legs hand something on.
///
/// # Errors
/// When the body needs more edits than allowed.
pub fn decode_leg(
    connector: KvConnector,
    request: &PdRequest<'_>,
    peer: &Peer,
    handoff: Option<&[u8]>,
) -> Result<Leg, EditError> {
    match connector {
        KvConnector::Nixl => nixl::decode_leg(request, handoff),
        KvConnector::SharedStorage => shared_storage::decode_leg(request),
        KvConnector::Lmcache => request.local_leg(),
        KvConnector::Nixlv2
        | KvConnector::Sglang
        | KvConnector::Mooncake
        | KvConnector::Offloading => nixlv2::decode_leg(request, peer, handoff),
    }
}

/// Both legs of [`Order::Concurrent`], the prefill leg first.
///
/// # Errors
/// When the body needs more edits than allowed.
pub fn pair(
    connector: KvConnector,
    request: &PdRequest<'_>,
    peer: &Peer,
) -> Result<[Leg; 2], EditError> {
    match connector {
        KvConnector::Sglang => sglang::pair(request, peer),
        KvConnector::Mooncake => mooncake::pair(request, peer),
        KvConnector::Offloading => offloading::pair(request, peer),
        KvConnector::Nixlv2
        | KvConnector::SharedStorage
        | KvConnector::Nixl
        | KvConnector::Lmcache => mori::pair(request, peer),
    }
}
