//! The data path: from an accepted client connection to the last byte of the response.
//!
//! The files build on each other in this order, which `tests/tidy.rs` checks:
//!
//! 1. `budget`, `request_id`, `head`, `reply`, `request`, `stats`, `engine_cache`: plain data.
//! 2. [`shard`]: the state of one thread. `client`: a client connection and the waits on it.
//! 3. `exchange`: one request and its response, the state that everything below shares.
//! 4. `choose`, `allowlist`, `trace`, `log`, `routing`, `leg`: the endpoint that serves a request,
//!    the engines it names and may name, the heads of its legs, and the facts recorded about it.
//! 5. `tunnel`, `relay`, `body`, `forward`: the ways of its bytes. `forward` serves a request by
//!    one call, whose body is forwarded as it arrives.
//! 6. `flow`: serves a request by several legs.
//! 7. `serve`: chooses between these, and concludes the exchange. [`session`]: a client connection
//!    from accept to close.
//!
//! A leg is one call of [`crate::upstream`]. It runs either inside its exchange or as a separate
//! task. All of this is generic over [`crate::net::Net`], so the simulation runs the same code as
//! production.

mod allowlist;
mod body;
mod budget;
mod choose;
mod client;
mod engine_cache;
mod exchange;
mod flow;
mod forward;
mod head;
mod leg;
mod log;
mod relay;
mod reply;
mod request;
mod request_id;
mod routing;
mod serve;
pub mod session;
pub mod shard;
#[cfg(test)]
mod sim_tests;
mod stats;
mod trace;
mod tunnel;

pub use budget::Budget;
