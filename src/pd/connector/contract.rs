//! The contract of a connector: the trait [`Connector`], and the rules that are data.

use std::borrow::Cow;
use std::rc::Rc;
use std::time::Duration;

use crate::budget::Kept;
use crate::json::{EditError, Watch};
use crate::pd::handoff::SingleUse;
use crate::pd::leg::{Collected, Leg};
use crate::pd::options::{ConnectorPorts, MoriConfig};
use crate::pd::peer::Peer;
use crate::pd::request::{CLIENT_OWNED_KV, PdRequest};

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

/// When the decode response of [`Order::Concurrent`] may be forwarded to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// Once the prefiller has responded successfully: the decoder can send the head, and even
    /// tokens, before the prefiller fails.
    OnPrefill,
    /// Once the prefiller has responded successfully or the first byte of the decode response's
    /// body has arrived.
    OnFirstByte,
}

/// How KV cache gets from a prefiller to a decoder, which determines the requests that can be
/// split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// By a transfer of one sequence.
    Sequence {
        /// Whether prefill legs have `do_remote_decode`, by which engines know that the limit of
        /// one token is not the client's.
        is_marked: bool,
    },
    /// Through a store, keyed by content.
    Store,
    /// Between two engines that get the same body, and of which none serves a request alone.
    Room,
}

/// Whether the engine that computes a prompt can pull a cached prefix from a peer
/// (`docs/pd-sidecar.md#cached-prefix-pulls`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixPull {
    /// It cannot.
    Never,
    /// It can if `--enable-p2p-pull` is set.
    IfEnabled,
    /// It can.
    Always,
}

/// The role of the prefiller's bootstrap server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bootstrap {
    /// The connector has none.
    None,
    /// The legs name its port.
    Named,
    /// The proxy queries it for the prefiller's engines, and the legs name its port and one of
    /// them.
    Queried,
}

/// The names of the phase spans in a trace, which are those of pd-sidecar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpanNames {
    /// `prefill` and `decode`.
    Short,
    /// The same, prefixed with `llm_d.pd_proxy.`.
    Long,
}

/// The rules of a connector that are data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The connector's name, which is its value of `--kv-connector`.
    pub name: &'static str,
    /// How KV cache is transferred.
    pub transfer: Transfer,
    /// The members of a request body that the connector's engines act on and that clients must not
    /// set.
    pub client_owned: Watch,
    /// Fate of the prefill leg when the client disconnects
    /// (`docs/pd-sidecar.md#when-the-client-disconnects`). In the serial order, the KV cache of a
    /// leg that continues is released afterwards.
    pub prefill_on_disconnect: OnDisconnect,
    /// Fate of the decode leg of [`Order::Concurrent`] when the client disconnects before the first
    /// byte of its response body.
    pub decode_on_disconnect: OnDisconnect,
    /// When the decode response of [`Order::Concurrent`] may be forwarded.
    pub commit: Commit,
    /// The role of the prefiller's bootstrap server.
    pub bootstrap: Bootstrap,
    /// Whether a cached prefix can be pulled from a peer.
    pub prefix_pull: PrefixPull,
    /// Whether a decoder exits if the block ids of a handoff do not have the form that it expects.
    pub blocks_matter: bool,
    /// Whether the KV cache of a decode leg that the decoder has refused is released. With
    /// Mooncake, the decoder may have done so itself, and would wait for a second transfer.
    pub releases_refused: bool,
    /// Whether a prefill leg finishes only together with a decode leg.
    pub prefill_needs_decode: bool,
    /// Whether the decode leg can start together with the prefill leg if the prefiller is known to
    /// push KV cache (`crate::pd::push`).
    pub learns_push: bool,
    /// Whether the decode leg that follows a prefill leg may be a chunked decode.
    pub can_decode_in_chunks: bool,
    /// The names of the phase spans.
    pub span_names: SpanNames,
    /// Whether spans mark the request as a parallel dispatch, as those of `MoRI-IO` do.
    pub is_parallel_dispatch: bool,
}

/// The rules of a connector that differs from others in its legs alone.
pub(super) const BASE: Rules = Rules {
    name: "",
    transfer: Transfer::Sequence { is_marked: true },
    client_owned: CLIENT_OWNED_KV,
    prefill_on_disconnect: OnDisconnect::Cancel,
    decode_on_disconnect: OnDisconnect::Cancel,
    commit: Commit::OnFirstByte,
    bootstrap: Bootstrap::None,
    prefix_pull: PrefixPull::Never,
    blocks_matter: false,
    releases_refused: false,
    prefill_needs_decode: false,
    learns_push: false,
    can_decode_in_chunks: false,
    span_names: SpanNames::Long,
    is_parallel_dispatch: false,
};

/// A way to pass KV cache from a prefiller to a decoder.
///
/// The errors of the functions that build a leg mean that the body needs more than `JSON_EDITS_MAX`
/// edits.
pub trait Connector: Sync {
    /// Returns the connector's rules.
    fn rules(&self) -> &'static Rules;

    /// Returns the order of a request's legs.
    fn order(&self, request: &PdRequest<'_>) -> Order;

    /// Returns the prefill leg of a request.
    ///
    /// # Errors
    /// As for all legs.
    fn prefill_leg(&self, request: &PdRequest<'_>, peer: &Peer) -> Result<Leg, EditError>;

    /// Returns the decode leg of a request that has a prefill leg. `handoff` is the part of the
    /// prefill response that the decode leg carries. It is `None` if the connector has no such
    /// part, in the concurrent order, and if the decoder must compute the prompt itself.
    ///
    /// # Errors
    /// As for all legs.
    fn decode_leg(
        &self,
        request: &PdRequest<'_>,
        peer: &Peer,
        handoff: Option<&Rc<Kept>>,
    ) -> Result<Leg, EditError>;

    /// Returns the handoff in the collected part of a prefill response; `None` if the connector
    /// hands nothing over.
    fn handoff(&self, collected: Collected) -> Option<SingleUse> {
        match collected {
            Collected::Handoff(handoff) => Some(SingleUse::new(*handoff)),
            Collected::Whole(_) | Collected::Nothing => None,
        }
    }

    /// Returns the transfer parameters of a request to the decoder that makes it release the KV
    /// cache of a handoff which no decode leg will carry; `None` if the connector's engines know no
    /// such request (`docs/stranded-kv.md`).
    fn release_params<'a>(
        &self,
        _request: &PdRequest<'_>,
        _peer: &Peer,
        _handoff: &'a [u8],
    ) -> Option<Cow<'a, [u8]>> {
        None
    }

    /// Returns the port of the prefiller's bootstrap server. 0 if the connector has none.
    fn bootstrap_port(&self, _ports: &ConnectorPorts) -> u16 {
        0
    }

    /// Returns the time limit from the start of a concurrent prefill leg to the head of its
    /// response; `None` if there is none besides those of every prefill leg.
    fn prefill_head_wait(&self, _mori: &MoriConfig) -> Option<Duration> {
        None
    }

    /// Returns the connector's own settings as text for the summary of the configuration. Starts
    /// with a comma or a space unless it is empty.
    fn describe(&self, _ports: &ConnectorPorts) -> String {
        String::new()
    }
}

impl std::fmt::Debug for dyn Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.rules().name)
    }
}
