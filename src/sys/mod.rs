//! What the operating system offers: CPUs, limits, listening sockets.
//!
//! Knows the kernel and nothing of HTTP. Unsafe code is allowed here, one operation per block; so
//! far rustix has made it unnecessary.

pub mod process;
