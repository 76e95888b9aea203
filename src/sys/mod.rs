//! Operating system services: CPUs, machine layout, limits, listening sockets.
//!
//! This module contains no HTTP. It needs no unsafe code: `rustix` wraps the system calls, and
//! a library that only `cores` names wraps the one that pins a thread to a CPU.

mod cores;
mod files;
mod listen;
mod near;
pub mod process;
mod topology;

pub use cores::{
    CoreError, CorePlan, Seat, allowed_cpus, claim_cpu, cpu_quota, cpu_quota_in, pin, plan_cores,
};
pub use files::{FileLimit, raise_nofile};
pub use listen::{BindError, bind_alone, bind_shared, has_wildcard_listener, probe, set_keepalive};
pub use near::NearError;
pub use topology::{Locality, Topology};
