//! Tests of the engine over its sockets, through the public API.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test helpers panic on failure, as tests do"
)]

mod aborts;
mod client;
mod command;
mod extra;
mod faults;
mod generation;
mod handoff;
mod kv;
mod metrics;
mod shapes;
mod transport;
mod unix;
