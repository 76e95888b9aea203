//! Spans of requests: what they are, how they leave a shard, how they are written.
//!
//! [`context`] is the W3C trace context and the decision what is recorded: pure. A [`Span`] is what a
//! shard notes. A [`TraceRing`] carries finished spans to the control plane, which exports them: a
//! request never waits for that, and a full ring loses spans and counts them.

pub mod console;
pub mod context;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod ring;
mod span;

pub use context::{Sampler, TraceContext};
pub use ring::{TraceRing, TraceRings, rings};
pub use span::{Kind, Span, Value};
