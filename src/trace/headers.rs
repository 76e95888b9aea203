//! The trace fields that the head of a request to an engine gets.

use super::TraceContext;
use crate::h1::{self, Name};

/// The trace fields that the head of a leg gets. Stored as plain integers because a request holds
/// this during every wait, so its size matters.
#[derive(Clone, Copy)]
pub(crate) struct TraceHeaders {
    trace_id: u128,
    span_id: u64,
    flags: u8,
    /// Whether the client's `tracestate` belongs to this trace and is forwarded.
    keeps_state: bool,
}

impl TraceHeaders {
    pub(crate) const fn new(context: TraceContext, keeps_state: bool) -> Self {
        Self {
            trace_id: context.trace_id,
            span_id: context.span_id,
            flags: context.flags,
            keeps_state,
        }
    }

    pub(crate) const fn trace_id(&self) -> u128 {
        self.trace_id
    }

    /// Returns whether the client's field with this name must not be forwarded: `traceparent`,
    /// which the proxy writes itself, and a `tracestate` that does not belong to this trace.
    pub(crate) fn replaces(&self, known: Name) -> bool {
        match known {
            Name::Traceparent => true,
            Name::Tracestate => !self.keeps_state,
            _ => false,
        }
    }

    /// Appends the `traceparent` field to `out`.
    pub(crate) fn push(&self, out: &mut Vec<u8>) {
        let context = TraceContext {
            trace_id: self.trace_id,
            span_id: self.span_id,
            flags: self.flags,
        };
        h1::push_field(out, b"traceparent", &context.traceparent());
    }
}
