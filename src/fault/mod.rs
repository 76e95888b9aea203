//! Everything that can go wrong with a request, and the error response to it.
//!
//! Every failure of a session or a leg is a [`Fault`].

mod error_response;
mod kinds;

pub use error_response::LABELS;
pub use kinds::{Blame, Cause, Fault};
