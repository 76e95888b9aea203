//! What the operating system offers: CPUs, limits, listening sockets.
//!
//! Knows the kernel and nothing of HTTP. Unsafe code is allowed here, one operation per block; so
//! far rustix has made it unnecessary.

mod cores;
mod files;
mod listen;
pub mod process;

pub use cores::{CoreError, CorePlan, allowed_cpus, cpu_quota, cpu_quota_in, pin, plan_cores};
pub use files::{FileLimit, raise_nofile};
pub use listen::{BindError, bind_alone, bind_shared, probe, set_keepalive};
