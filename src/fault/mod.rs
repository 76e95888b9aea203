//! Everything that can go wrong with a request, and the error response to it.
//!
//! Every failure of a session or a leg is a [`Fault`].

mod causes;
mod incident;
mod responses;
mod trouble;

pub use causes::{Blame, Cause, Fault};
pub use incident::{Engine, Incident};
pub use responses::LABELS;
pub use trouble::Trouble;
