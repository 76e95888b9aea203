//! Addresses of engines and the allowlist for them: parsing and matching, without sockets or
//! clocks.

mod address;
mod allow;
mod allowlist;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod published;
mod target;

pub use address::{Address, SOCKET_PATH_BYTES_MAX, SocketPath};
pub use allow::{AllowError, AllowRule};
pub use allowlist::AllowList;
pub use published::{Permit, TargetAllowlist};
pub use target::{HTTP_PORT, HTTPS_PORT, Target, TargetError};
