//! Order and construction of each connector's legs.

use super::decide;
use super::options::KvConnector;
use super::peer::Peer;
use super::plan::{Leg, Plan};
use super::request::PdRequest;
use super::{mooncake, mori, nixl, nixlv2, offloading, sglang, shared_storage};
use crate::json::EditError;

/// Order of the legs of a split request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The prefill leg, then the decode leg, which is made from the prefill response.
    Serial,
    /// The prefill leg and the decode leg run at the same time.
    Concurrent,
    /// The request is first sent to the decoder. If the decoder reports that too little of the
    /// prompt is in the store, the serial order follows.
    DecodeFirst,
}

/// Fate of a leg whose client has disconnected (`docs/engines.md#client-disconnects`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDisconnect {
    /// The leg is cancelled immediately, which frees the engine.
    Cancel,
    /// A decode leg continues until the first byte of its response body. A prefill leg is cancelled
    /// if that byte has already arrived, and otherwise continues until it has finished. Cancelled
    /// earlier, the engine would hold memory for a transfer whose completion is never reported.
    UntilFirstByte,
    /// The leg continues until it has finished, because the engine of the other leg may still be
    /// exchanging KV cache with the engine of this one.
    RunToEnd,
}

/// Returns the order of a request's legs.
#[must_use]
pub fn order(connector: KvConnector, request: &PdRequest<'_>) -> Order {
    match connector {
        KvConnector::Nixlv2 if request.mori.write_mode && request.mori.parallel_wait.is_some() => {
            Order::Concurrent
        }
        KvConnector::SharedStorage if shared_storage::is_decode_first(request) => {
            Order::DecodeFirst
        }
        KvConnector::Nixlv2
        | KvConnector::SharedStorage
        | KvConnector::Nixl
        | KvConnector::Lmcache => Order::Serial,
        KvConnector::Sglang | KvConnector::Mooncake | KvConnector::Offloading => Order::Concurrent,
    }
}

/// Returns the fate of the two legs of [`Order::Concurrent`] when the client disconnects: that of
/// the prefill leg, and that of the decode leg before the first byte of its response body
/// (`docs/pd-sidecar.md#when-the-client-disconnects`).
#[must_use]
pub const fn on_disconnect(connector: KvConnector) -> [OnDisconnect; 2] {
    match connector {
        // The decoder can abandon its side of the room; the prefiller must complete its own side.
        KvConnector::Sglang => [OnDisconnect::RunToEnd, OnDisconnect::Cancel],
        // The prefiller writes to the decoder, or is read by it, until the transfer is reported
        // as complete.
        KvConnector::Mooncake | KvConnector::Offloading => {
            [OnDisconnect::RunToEnd, OnDisconnect::UntilFirstByte]
        }
        KvConnector::Nixlv2 => [OnDisconnect::UntilFirstByte, OnDisconnect::UntilFirstByte],
        KvConnector::SharedStorage | KvConnector::Nixl | KvConnector::Lmcache => {
            [OnDisconnect::Cancel, OnDisconnect::Cancel]
        }
    }
}

/// Returns whether the decode response may be forwarded to the client once the first byte of its
/// body has arrived, even if the prefiller has not responded successfully yet.
#[must_use]
pub const fn commits_on_first_byte(connector: KvConnector) -> bool {
    // A decoder with MoRI-IO can send the head, and even tokens, before the prefiller fails.
    !matches!(connector, KvConnector::Nixlv2)
}

/// Decides whether a request that names a prefiller is split or served by the decoder alone.
///
/// # Errors
/// If the body needs more than `JSON_EDITS_MAX` edits.
pub fn plan(connector: KvConnector, request: &PdRequest<'_>) -> Result<Plan, EditError> {
    let reason = match connector {
        KvConnector::Nixlv2
        | KvConnector::Nixl
        | KvConnector::Mooncake
        | KvConnector::Offloading => {
            decide::keep_local(request.api, request.document, request.body)
        }
        // A store serves any number of sequences, and SGLang numbers the rooms of a list of
        // prompts itself.
        KvConnector::SharedStorage | KvConnector::Lmcache | KvConnector::Sglang => {
            decide::keep_shape_local(request.api, request.document)
        }
    };
    match reason {
        Some(reason) => Ok(Plan::Local(reason, request.local_leg()?)),
        None => Ok(Plan::Split),
    }
}

/// Returns the prefill leg of [`Order::Serial`]. Connectors whose legs are always concurrent are
/// never passed here.
///
/// # Errors
/// If the body needs more than `JSON_EDITS_MAX` edits.
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

/// Returns the decode leg of [`Order::Serial`]. `handoff` is the part of the prefill response that
/// the decode leg carries. It is `None` if the connector has no such part, or if the decoder must
/// compute the prompt itself.
///
/// # Errors
/// If the body needs more than `JSON_EDITS_MAX` edits.
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

/// Returns both legs of [`Order::Concurrent`], the prefill leg first.
///
/// # Errors
/// If the body needs more than `JSON_EDITS_MAX` edits.
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
