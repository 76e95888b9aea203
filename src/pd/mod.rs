//! Prefill/decode disaggregation as pure plans.
//!
//! `pd` reads what the client sent and says which legs to run and how each leg's body differs from
//! the client's bytes. It opens no socket and reads no clock: a connector is a file of edits here
//! and a set of golden wire files.

pub mod candidate;
pub mod decide;
pub mod handoff;
pub mod nixlv2;
pub mod outcome;
pub mod plan;
pub mod route;

pub use handoff::{Freshness, Held};
pub use outcome::{Outcome, Reason};
pub use plan::{Leg, Plan, Role, Take};
pub use route::{Api, Route};
