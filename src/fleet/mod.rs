//! Engines as the proxy knows them: pure state, no socket, no clock.

mod address;
mod allow;
mod allowlist;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod target;

pub use address::{Address, SOCKET_PATH_BYTES_MAX, SocketPath};
pub use allow::{AllowError, AllowRule};
pub use allowlist::AllowList;
pub use target::{HTTP_PORT, HTTPS_PORT, Target, TargetError};
