//! The contracts of the KV connectors: the requirements that each one places on the requests an
//! engine receives. One file per connector.
//!
//! A leg that violates its contract gets a 400 that names the member; a leg that would make a real
//! engine fail gets a 500. Where the two legs of a request must agree on a value, the agreement is
//! checked in [`Meetings`], which the engines of a test share.
//!
//! The contract of NIXL version 2 is in [`crate::pd`].

mod encoder;
mod fields;
mod lmcache;
mod meet;
mod mooncake;
mod mori;
mod nixl_v1;
mod offloading;
mod push;
mod rank;
mod sglang;
mod shared_storage;

use crate::api::{Kind, Refusal};
use crate::config::{HandoffShape, Role};
use crate::http::Head;
use crate::json::Fields;

pub(crate) use encoder::admit as admit_item;
pub use encoder::encoded_params;
pub use meet::Meetings;
pub(crate) use meet::Wait;
pub use mooncake::{EngineIds, Mooncake};
pub use mori::{Mori, Returned};
pub use nixl_v1::BlockBook;
pub use push::Push;
pub use rank::dp_rank;
pub use shared_storage::Store;

/// The KV connector whose contract an engine checks.
///
/// A value contains the state that the prefill and the decode engine share. Give clones of one
/// value to both.
#[derive(Clone, Debug, Default)]
pub enum KvContract {
    /// NIXL version 2.
    #[default]
    Nixlv2,
    /// The shared-storage connector, with the store that both engines use.
    SharedStorage(Store),
    /// `SGLang`'s connector: both legs identify the same bootstrap room.
    Sglang(Meetings),
    /// Mooncake's connector: both legs have the same transfer id.
    Mooncake(Mooncake),
    /// The P2P tier of the offloading connector: both legs have the same KV request id.
    Offloading(Meetings),
    /// `MoRI-IO` in write mode, with the legs sent in sequence or concurrently.
    Mori(Mori),
    /// NIXL version 1, with the handoffs that have been issued.
    NixlV1(BlockBook),
    /// NIXL push: the prefill engine writes into the decode engine's memory.
    NixlPush(Push),
    /// `LMCache`, as used by the first llm-d sidecar.
    Lmcache,
}

/// The parts of a request that a contract checks, and the settings of the engine that received it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call<'a> {
    pub(crate) role: Role,
    pub(crate) kind: Kind,
    pub(crate) fields: &'a Fields<'a>,
    pub(crate) head: &'a Head,
    pub(crate) prompt_sha256: &'a str,
    /// The shape of the handoff in a prefill or encoder response.
    pub(crate) shape: HandoffShape,
    pub(crate) port: u16,
}

/// How a request that a contract accepts affects its response.
#[derive(Debug, Default)]
pub(crate) struct Admitted {
    /// JSON members to insert into the response, each with a leading comma; may be empty.
    pub(crate) members: String,
    /// Whether the response contains another prompt's text, because the handoff was used before or
    /// was issued for another prompt.
    pub(crate) foreign: bool,
    /// Whether the request is a prefill leg.
    pub(crate) is_prefill: bool,
    /// Whether the response has the finish reason `cache_threshold` and no generated token, because
    /// the prompt is not in the shared store.
    pub(crate) cold: bool,
    /// Makes the response wait for the other leg; `None` if it does not wait.
    pub(crate) wait: Option<Wait>,
}

impl KvContract {
    /// Checks a request against the contract and returns how the request affects the response. For
    /// [`KvContract::Nixlv2`], the caller must check the request instead.
    pub(crate) fn admit(&self, call: &Call<'_>) -> Result<Admitted, Refusal> {
        match self {
            // Not reached: the caller handles it, because it has the engine's issuer and registry.
            Self::Nixlv2 => Ok(Admitted::default()),
            Self::SharedStorage(store) => shared_storage::admit(store, call),
            Self::Sglang(meetings) => sglang::admit(meetings, call),
            Self::Mooncake(terms) => mooncake::admit(terms, call),
            Self::Offloading(meetings) => offloading::admit(meetings, call),
            Self::Mori(terms) => mori::admit(terms, call),
            Self::NixlV1(book) => nixl_v1::admit(book, call),
            Self::NixlPush(terms) => push::admit(terms, call),
            Self::Lmcache => lmcache::admit(call),
        }
    }
}

/// Returns whether the request is a prefill leg, for contracts in which only the role of the engine
/// determines that.
fn is_prefill_engine(call: &Call<'_>) -> bool {
    call.role == Role::Prefill
}
