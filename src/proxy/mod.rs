//! The way of a request: from an accepted connection to the last byte of its answer.
//!
//! [`shard`] owns what one thread has. A session (`session`) reads heads and makes an exchange
//! (`exchange`) of each. Pass-through and decode-only requests are uploaded while they arrive
//! (`upload`); the others are read whole (`body`) and served by legs (`split`): encoders first
//! (`encode`), then `prefill` and `decode`, both `concurrent`, or the decoder first (`decode_first`).
//! A leg is sent and read by `leg` and `run`, in its exchange or as a task beside it (`task`). The
//! answer goes through `relay`, or is put together of chunks (`chunked`). Everything is written
//! against the seam of [`crate::net`] and runs on the simulation unchanged.

mod allowlist;
mod body;
mod bootstrap;
mod budget;
mod chunked;
mod client;
mod concurrent;
mod decode;
mod decode_first;
mod dial;
mod encode;
mod exchange;
mod head;
mod leg;
mod log;
mod prefill;
mod recorder;
mod relay;
mod release;
mod request_id;
mod resolve;
mod routing;
mod run;
mod session;
pub mod shard;
#[cfg(test)]
mod sim_tests;
mod split;
mod task;
mod trace;
mod tunnel;
mod upload;

pub use allowlist::TargetAllowlist;
pub use budget::Budget;
pub use resolve::{Resolved, Resolver};
