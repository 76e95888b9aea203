//! The engines that a process knows: their addresses, the allowlist for them, and their state.
//!
//! Pure, without sockets or clocks. The control plane owns the [`Registry`] and publishes a
//! [`Snapshot`] after each change; shards read the latest one.

mod address;
mod allow_rule;
mod allowlist;
mod endpoint;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod registry;
mod snapshot;
mod target;
mod version;

pub use address::{Address, SOCKET_PATH_BYTES_MAX, SocketPath};
pub use allow_rule::{AllowError, AllowRule};
pub use allowlist::AllowList;
pub use endpoint::{Endpoint, EndpointId, EndpointSpec, Health, Reservation};
pub use error::TargetError;
pub use registry::{Change, Registry, RuleSource};
pub use snapshot::{Allow, EndpointIndex, MoriHosts, Permit, Pool, Service, Snapshot};
pub use target::{HTTP_PORT, HTTPS_PORT, Target};
pub use version::EngineVersion;
