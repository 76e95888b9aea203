//! Connectors: the ways in which KV cache passes from a prefiller to a decoder.
//!
//! A [`Connector`] decides in which order the legs of a request run and builds the body of each.
//! All that distinguishes one connector from the others is in its file: its legs and its [`Rules`].
//! The flows in `proxy` carry the legs out and read the rules; they know no connector by name.

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
use super::options::{KvConnector, MoriConfig};
use super::outcome::Reason;
use super::request::PdRequest;
pub use contract::{
    Bootstrap, Commit, Connector, OnDisconnect, Order, PrefixPull, Rules, Sequences, SpanNames,
};

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
    }
}

/// Returns the reason why a request that names a prefiller is served by the decoder alone, or
/// `None` if it is split.
#[must_use]
pub fn keep_local(connector: &dyn Connector, request: &PdRequest<'_>) -> Option<Reason> {
    match connector.rules().sequences {
        Sequences::One => decide::keep_local(request.api, request.document, request.body),
        Sequences::Any => decide::keep_shape_local(request.api, request.document),
    }
}
