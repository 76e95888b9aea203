//! Policies: which endpoint serves a request.
//!
//! Pure: numbers in, a choice out. A policy is one file. The caller reserves the chosen endpoint in
//! the same step, so that a burst of equal requests does not see the same idle engine.

mod contract;
mod named;

pub use contract::{Ask, Choose, NoEndpoint};
use named::Named;

/// Returns the policy of a shard. `names` are the values of the field that names each pool, in the
/// order of the pools.
#[must_use]
pub fn policy(names: Vec<String>) -> Box<dyn Choose> {
    Box::new(Named::new(names))
}
