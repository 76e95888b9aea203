//! The data path: from an accepted client connection to the last byte of the response.
//!
//! [`shard`] holds the state of one thread. A session (`session`) serves one client connection. It
//! reads request heads and runs an exchange (`exchange`) for each.
//!
//! An exchange responds to health checks itself and serves all other requests in one of two ways.
//! Pass-through and decode-only requests are forwarded to the decoder as they arrive (`upload`). A
//! request that involves other engines, or a chunked decode, is read completely (`body`) and served
//! by legs (`split`): encode legs first, if any (`encode`), then prefill and decode. The order of
//! those two depends on the connector: serial (`prefill`, then `decode`), concurrent (`concurrent`)
//! or decode-first (`decode_first`).
//!
//! A leg is one call of [`crate::upstream`]. It runs either inside its exchange or as a separate
//! task. The response is sent to the client by `relay`, or assembled from several decode chunks
//! (`chunked`).
//!
//! All of this is generic over [`crate::net::Net`], so the simulation runs the same code as
//! production.

mod allowlist;
mod body;
mod bootstrap;
mod budget;
mod chunked;
mod client;
mod concurrent;
mod decode;
mod decode_first;
mod encode;
mod exchange;
mod head;
mod log;
mod prefill;
mod recorder;
mod relay;
mod release;
mod request_id;
mod routing;
mod session;
pub mod shard;
#[cfg(test)]
mod sim_tests;
mod split;
mod trace;
mod tunnel;
mod upload;

pub use allowlist::TargetAllowlist;
pub use budget::Budget;
