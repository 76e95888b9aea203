//! Tests of the engine over its sockets, through the public API.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the helpers of a test fail like a test"
)]

mod aborts;
mod client;
mod faults;
mod handoff;
mod kv;
mod shapes;
mod transport;
mod unix;
