//! The data path: from an accepted client connection to the last byte of the response.
//!
//! The files build on each other in this order, which `tests/tidy.rs` checks:
//!
//! 1. `request_id`, `head`, `request`, `ahead`, `target_cache`, [`places`]: plain data.
//! 2. [`shard`]: the state of one thread. `client`: a client connection and the waits on it.
//! 3. `access_log`: the facts about a request, and its record in the access log.
//! 4. `exchange`: one request and its response, the state that everything below shares.
//! 5. `choose`, `allowlist`, `routing`, `trace`, `leg`: the endpoint that serves a request,
//!    the engines it may name and names, its spans, the heads of its legs.
//! 6. `tunnel`, `relay`, `body`, `forward`: the ways of its bytes. `forward` serves a request by
//!    one call, whose body is forwarded as it arrives; `upload` is that body.
//! 7. `flow`: serves a request by several legs.
//! 8. `serve`: chooses between these, and concludes the exchange. [`session`]: a client connection
//!    from accept to close, keep-alive and drain included.
//!
//! A leg is one call of [`crate::upstream`]. It runs either inside its exchange or as a separate
//! task. All of this is generic over [`crate::net::Net`], so the simulation runs the same code as
//! production.

mod access_log;
mod ahead;
mod allowlist;
mod body;
mod choose;
mod client;
mod exchange;
mod flow;
mod forward;
mod head;
mod idle;
mod inspect;
mod leg;
pub mod places;
mod push_book;
mod relay;
mod request;
mod request_id;
mod routing;
mod serve;
pub mod session;
pub mod shard;
#[cfg(test)]
mod sim_tests;
mod target_cache;
mod trace;
mod tunnel;
mod upload;
