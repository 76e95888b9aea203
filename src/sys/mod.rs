//! Operating system services: CPUs, machine layout, limits, listening sockets.
//!
//! This module contains no HTTP. Unsafe code here only calls the allocator and
//! `getsockopt`; `rustix` wraps the other system calls.

mod cgroup;
mod cores;
mod files;
mod listen;
mod memory;
mod near;
pub mod process;
mod tcp;
mod topology;

pub use cores::{CoreError, CorePlan, ProcessCpus, Seat, allowed_cpus, claim_cpu, pin, plan_cores};
pub use files::{FileLimit, ReadError, raise_nofile, read_regular};
pub use listen::{
    BindError, bind_alone, bind_shared, check_address, has_wildcard_listener, probe, set_keepalive,
};
pub use memory::{keep_freed_memory, release_free_memory};
pub use near::NearError;
pub use tcp::{Silence, has_vanished};
pub use topology::{Locality, Topology};
