//! The control plane: one unpinned thread that runs alongside the shards.
//!
//! It starts the shards, resolves names for them, serves the admin port, handles signals and shuts
//! the process down. No request passes through it, so it may use general-purpose libraries.

mod accept;
mod certificate;
#[cfg(feature = "mock")]
pub mod demo;
mod discovery;
mod engine_page;
mod handshakes;
mod health;
mod heartbeat;
mod inbox;
mod incidents;
mod memory;
mod metrics_port;
#[cfg(feature = "otlp")]
mod otlp;
mod page_listener;
mod preflight;
mod publish;
mod reload;
mod resolver_threads;
mod shards;
mod signals;
mod sockets;
mod startup;
mod supervise;
mod tls;
mod traces;
mod versions;
mod watch;

pub use preflight::check;
pub use startup::{run, start};
pub use supervise::Running;
