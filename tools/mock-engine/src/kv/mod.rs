//! What each KV connector asks of the requests that an engine gets, one file per contract.
//!
//! A leg that breaks its contract is answered 400 with the field that does; a leg that a real
//! engine would choke on, 500. Where the two legs of a request have to agree on something, they
//! do so in [`Meetings`], which the engines of a test share.
//!
//! NIXL version 2 is older than this folder: its contract is [`crate::pd`].

mod blake2s;
mod encoder;
mod fields;
mod lmcache;
mod meet;
mod mooncake;
mod mori;
mod nixl_v1;
mod offloading;
mod sglang;
mod shared_storage;

use crate::api::{Kind, Refusal};
use crate::config::{HandoffShape, Role};
use crate::http::Head;
use crate::json::Fields;

pub use blake2s::dp_rank;
pub(crate) use encoder::admit as admit_item;
pub use encoder::encoded_params;
pub use meet::Meetings;
pub(crate) use meet::Wait;
pub use mooncake::{EngineIds, Mooncake};
pub use mori::{Mori, Returned};
pub use nixl_v1::BlockBook;
pub use shared_storage::Store;

/// The connector whose legs an engine expects.
///
/// What is shared between the engines of a request is inside: give clones of one value to its
/// prefill and its decode engine.
#[derive(Clone, Debug, Default)]
pub enum KvContract {
    /// NIXL, version 2.
    #[default]
    Nixlv2,
    /// A store both engines read.
    SharedStorage(Store),
    /// `SGLang`'s bootstrap rooms.
    Sglang(Meetings),
    /// Mooncake's transfer engine.
    Mooncake(Mooncake),
    /// The offloading connector's P2P tier.
    Offloading(Meetings),
    /// `MoRI-IO`, both its ways.
    Mori(Mori),
    /// NIXL, version 1.
    NixlV1(BlockBook),
    /// `LMCache` as the first sidecar spoke to it.
    Lmcache,
}

/// A request as a contract sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Call<'a> {
    pub(crate) role: Role,
    pub(crate) kind: Kind,
    pub(crate) fields: &'a Fields<'a>,
    pub(crate) head: &'a Head,
    pub(crate) prompt_sha256: &'a str,
    /// The shape of what a prefill or encode answer hands out.
    pub(crate) shape: HandoffShape,
    pub(crate) port: u16,
}

/// What a contract makes of a request that keeps it.
#[derive(Debug, Default)]
pub(crate) struct Admitted {
    /// Members for the answer, each with a comma before it.
    pub(crate) members: String,
    /// The answer has somebody else's text.
    pub(crate) foreign: bool,
    /// The request is a prefill leg.
    pub(crate) is_prefill: bool,
    /// The answer is the finish reason `cache_threshold`, without a token.
    pub(crate) cold: bool,
    /// What the answer waits for.
    pub(crate) wait: Option<Wait>,
}

impl KvContract {
    /// Judges a request.
    pub(crate) fn admit(&self, call: &Call<'_>) -> Result<Admitted, Refusal> {
        match self {
            // The caller has the engine's issuer and registry, and does it itself.
            Self::Nixlv2 => Ok(Admitted::default()),
            Self::SharedStorage(store) => shared_storage::admit(store, call),
            Self::Sglang(meetings) => sglang::admit(meetings, call),
            Self::Mooncake(terms) => mooncake::admit(terms, call),
            Self::Offloading(meetings) => offloading::admit(meetings, call),
            Self::Mori(terms) => mori::admit(terms, call),
            Self::NixlV1(book) => nixl_v1::admit(book, call),
            Self::Lmcache => lmcache::admit(call),
        }
    }
}

/// Whether a prefill leg of these contracts is one by its engine's role alone.
fn is_prefill_engine(call: &Call<'_>) -> bool {
    call.role == Role::Prefill
}
