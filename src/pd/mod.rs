//! Prefill/decode disaggregation as pure functions.
//!
//! From a client's request, `pd` determines which legs to run and how the body of each leg differs
//! from the client's bytes. It opens no sockets and reads no clock: a connector consists of one
//! file of edits in this module and a set of golden files in `tests/golden`.

pub mod candidate;
pub mod chunked;
pub mod connector;
pub mod decide;
pub mod encode;
pub mod handoff;
pub mod mooncake;
pub mod mori;
pub mod nixl;
pub mod nixlv2;
pub mod offloading;
pub mod options;
pub mod outcome;
pub mod peer;
pub mod plan;
pub mod request;
pub mod route;
pub mod sglang;
pub mod shared_storage;
#[cfg(test)]
mod testing;
mod uuid;

pub use connector::{OnDisconnect, Order};
pub use handoff::{Freshness, SingleUse};
pub use outcome::{Outcome, Reason};
pub use peer::{BootstrapEngine, KvSource, Peer};
pub use plan::{Leg, Plan, Role, Take};
pub use request::{Encoded, PdRequest};
pub use route::{Api, Route};
pub use uuid::{Uuid, UuidText};
