//! Connectors: the ways in which KV cache passes from a prefiller to a decoder.
//!
//! A [`Connector`] decides in which order the legs of a request run and builds the body of each.
//! All that distinguishes one connector from the others is in its file: its legs and its [`Rules`].
//! The flows in `proxy` carry the legs out and read the rules; they know no connector by name.

mod atom;
mod contract;
mod lmcache;
mod mooncake;
mod mori;
mod nixl;
mod nixlv2;
mod offloading;
mod sglang;
mod shared_storage;

use super::decide;
use super::options::MoriConfig;
use super::outcome::Reason;
use super::request::PdRequest;
pub use contract::{
    Bootstrap, Commit, Connector, OnDisconnect, Order, PrefixPull, Rules, SpanNames, Transfer,
};

/// How KV cache is passed from a prefiller to a decoder (`docs/pd-sidecar.md#connectors`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvConnector {
    /// NIXL, protocol version 2, or `MoRI-IO` with [`MoriConfig::write_mode`].
    Nixlv2,
    /// A store that both engines use, such as files or `LMCache`.
    SharedStorage,
    /// `SGLang`'s bootstrap rooms; concurrent legs.
    Sglang,
    /// Mooncake's transfer engine.
    Mooncake,
    /// vLLM's `OffloadingConnector` with its P2P tier.
    Offloading,
    /// NIXL, protocol version 1, for engines from before mid-2025.
    Nixl,
    /// `LMCache` as a shared store, with the legs that the first llm-d sidecar sent.
    Lmcache,
    /// ATOM, AMD's engine.
    Atom,
}

impl KvConnector {
    /// Every connector, in the order of `--help`.
    pub const ALL: [Self; 8] = [
        Self::Nixlv2,
        Self::SharedStorage,
        Self::Sglang,
        Self::Mooncake,
        Self::Offloading,
        Self::Nixl,
        Self::Lmcache,
        Self::Atom,
    ];

    /// Returns the connector's name, which is its value of `--kv-connector`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Nixlv2 => "nixlv2",
            Self::SharedStorage => "shared-storage",
            Self::Sglang => "sglang",
            Self::Mooncake => "mooncake",
            Self::Offloading => "offloading",
            Self::Nixl => "nixl",
            Self::Lmcache => "lmcache",
            Self::Atom => "atom",
        }
    }

    /// Returns whether the connector has the mode [`MoriConfig::write_mode`].
    #[must_use]
    pub const fn has_write_mode(self) -> bool {
        matches!(self, Self::Nixlv2)
    }
}

/// Returns the connector that `--kv-connector` and the `MoRI-IO` settings select.
#[must_use]
pub fn connector(kind: KvConnector, mori: &MoriConfig) -> &'static dyn Connector {
    match kind {
        KvConnector::Nixlv2 => match (mori.write_mode, mori.parallel_wait) {
            (false, _) => &nixlv2::Nixlv2,
            (true, None) => &mori::MoriSerial,
            (true, Some(_)) => &mori::MoriConcurrent,
        },
        KvConnector::SharedStorage => &shared_storage::SharedStorage,
        KvConnector::Sglang => &sglang::Sglang,
        KvConnector::Mooncake => &mooncake::Mooncake,
        KvConnector::Offloading => &offloading::Offloading,
        KvConnector::Nixl => &nixl::Nixl,
        KvConnector::Lmcache => &lmcache::Lmcache,
        KvConnector::Atom => &atom::Atom,
    }
}

/// Returns the reason why a request that names a prefiller is served by the decoder alone, or
/// `None` if it is split.
#[must_use]
pub fn keep_local(connector: &dyn Connector, request: &PdRequest<'_>) -> Option<Reason> {
    let rules = connector.rules();
    let (api, document, body) = (request.api, request.document, request.body);
    let local = decide::keep_local(api, document, body, rules.transfer);
    // The output of the decoder is not held back until such a prefill leg has failed.
    let is_concurrent = || connector.order(request) == Order::Concurrent;
    let is_capped = rules.transfer != Transfer::Room;
    let fails = is_capped && is_concurrent() && decide::forces_tool(api, document, body);
    local.or(fails.then_some(Reason::ForcedTool))
}
