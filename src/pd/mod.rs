//! Prefill/decode disaggregation as pure functions.
//!
//! From a client's request, `pd` determines which legs to run and how the body of each leg differs
//! from the client's bytes. It opens no sockets and reads no clock: a connector consists of one
//! file of edits in this module and a set of golden files in `tests/golden`.

pub mod bootstrap;
pub mod compat;
pub mod connector;
pub mod decide;
pub mod decode_chunks;
pub mod decode_first;
mod edits;
pub mod encode;
pub mod experts;
pub mod handoff;
pub mod leg;
pub mod members;
pub mod options;
pub mod outcome;
pub mod peer;
pub mod push;
pub mod request;
pub mod routing_headers;
#[cfg(test)]
mod testing;
mod uuid;
pub mod warm_up;
#[cfg(test)]
mod work_tests;

pub use bootstrap::BootstrapEngine;
pub use connector::{Connector, OnDisconnect, Order};
pub use experts::{ExpertsError, PromptExperts};
pub use handoff::{Freshness, SingleUse};
pub use leg::{Collected, Leg, Role, Take};
pub use outcome::{Outcome, Reason};
pub use peer::{KvSource, Peer};
pub use request::{Encoded, PdRequest};
pub use uuid::{Uuid, UuidText};
