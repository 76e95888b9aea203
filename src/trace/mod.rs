//! Tracing of requests: trace context, spans and their transfer to the exporter.
//!
//! [`context`] implements the W3C trace context and the sampling decision, without IO. A shard
//! records [`Span`]s. A [`TraceRing`] passes finished spans to the control plane, which exports
//! them. Requests never wait for the export: if a ring is full, spans are dropped and counted.

pub mod console;
pub mod context;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod headers;
mod recorder;
mod request;
mod ring;
mod span;

pub use context::{Sampler, TraceContext};
pub(crate) use headers::TraceHeaders;
pub(crate) use recorder::{Finish, LegStart, Style};
pub(crate) use request::{LegTrace, RequestTrace, Tracer, path_of};
pub use ring::{TraceRing, TraceRings, rings};
pub use span::{Kind, Span, Value};
