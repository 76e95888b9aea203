//! The control plane: one unpinned thread that runs alongside the shards.
//!
//! It starts the shards, resolves names for them, serves the admin port, handles signals and shuts
//! the process down. No request passes through it, so it may use general-purpose libraries.

mod allowlist;
mod certificate;
mod decoders;
#[cfg(feature = "mock")]
pub mod demo;
mod handshakes;
mod inbox;
mod mori;
#[cfg(feature = "otlp")]
mod otlp;
#[cfg(feature = "k8s")]
mod pool;
#[cfg(feature = "k8s")]
mod reflect;
mod resolver;
mod shards;
mod sidecar;
mod sockets;
mod tls;
mod traces;
mod watch;

pub use sidecar::{Running, run_sidecar};
