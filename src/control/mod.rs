//! The control plane: one unpinned thread beside the shards.
//!
//! It starts the shards, resolves names for them, serves the admin port, listens to signals and
//! ends the process. It may use ordinary libraries: no request passes through it.

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
