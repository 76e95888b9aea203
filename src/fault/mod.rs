//! Everything that can go wrong with a request, and the error response to it.
//!
//! Every failure of a session or a leg is a [`Fault`].

mod causes;
mod incident;
mod responses;

pub use causes::{Blame, Cause, Fault};
pub use incident::Incident;
pub use responses::LABELS;
