//! Engines as the proxy knows them: pure state, no socket, no clock.

#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod target;

pub use target::{Target, TargetError};
