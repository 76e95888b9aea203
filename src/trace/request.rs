//! The trace of one request: the context received from the client, the fields sent to engines, and
//! the spans that are recorded.
//!
//! With tracing off, each step costs one comparison; it reads no clock and allocates nothing. A
//! request that is not sampled costs reading one field and writing one more line in the head of
//! each leg.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::context::{Sampler, TraceContext};
use super::headers::TraceHeaders;
use super::recorder::{Finish, LegStart, Recorder, WorldClock, finish_detached};
use super::ring::TraceRing;
use super::span::Span;
use crate::h1::{self, Name, RequestHead};
use crate::metrics::ShardMetrics;
use crate::net::{Instant, Net};
use crate::pd::Role;

/// The tracing state of a shard: the sampler and the ring for finished spans.
pub(crate) struct Tracer {
    sampler: Sampler,
    ring: RefCell<TraceRing>,
    metrics: Arc<ShardMetrics>,
}

impl Tracer {
    pub(crate) const fn new(sampler: Sampler, ring: TraceRing, metrics: Arc<ShardMetrics>) -> Self {
        Self {
            sampler,
            ring: RefCell::new(ring),
            metrics,
        }
    }

    fn push(&self, spans: Vec<Span>) {
        let lost = self.ring.borrow_mut().push(spans);
        self.metrics.trace_dropped(lost as u64);
    }
}

/// The trace of a request.
pub(crate) enum RequestTrace {
    /// Tracing is off. The client's trace fields pass through unmodified.
    Off,
    /// The request is not sampled. The `traceparent` sent to the engines has no sampled flag.
    Unrecorded(TraceHeaders),
    /// The request is sampled, and its spans are recorded.
    Recorded(Box<Recording>),
}

const _: () = assert!(size_of::<RequestTrace>() <= 32);

/// The spans of a sampled request, and the clock for their times.
pub(crate) struct Recording {
    tracer: Rc<Tracer>,
    recorder: RefCell<Recorder>,
    clock: WorldClock,
    keeps_state: bool,
}

impl RequestTrace {
    /// Returns the trace that the client's `traceparent` names, or a new one if it names none;
    /// [`RequestTrace::Off`] without a tracer. `started` is the time when the request started.
    pub(crate) fn begin<N: Net>(
        tracer: Option<&Rc<Tracer>>,
        net: &N,
        head: &RequestHead,
        bytes: &[u8],
        started: Instant,
    ) -> Self {
        let Some(tracer) = tracer else {
            return Self::Off;
        };
        let values = head.fields_named(Name::Traceparent);
        let received = TraceContext::read(values.map(|field| field.value.of(bytes)));
        let context = received.unwrap_or_else(|| {
            let new = TraceContext::new([net.random(), net.random()], net.random());
            if tracer.sampler.takes(new.trace_id) {
                new.sampled()
            } else {
                new
            }
        });
        let keeps_state = received.is_some();
        if !context.is_sampled() {
            return Self::Unrecorded(TraceHeaders::new(context, keeps_state));
        }
        let (parent_id, context) = match received {
            Some(received) => (received.span_id, received.child(net.random())),
            None => (0, context),
        };
        let clock = world_clock(net);
        // The request started slightly before the clock was read.
        let begun_ns = clock.unix_ns.saturating_sub(nanos(clock.instant, started));
        let request = (head.method_span.of(bytes), path_of(head, bytes));
        let recorder = Recorder::new(context, parent_id, request, begun_ns);
        Self::Recorded(Box::new(Recording {
            tracer: Rc::clone(tracer),
            recorder: RefCell::new(recorder),
            clock,
            keeps_state,
        }))
    }

    /// Returns the trace id; `None` without a tracer.
    pub(crate) fn trace_id(&self) -> Option<u128> {
        match self {
            Self::Off => None,
            Self::Unrecorded(headers) => Some(headers.trace_id()),
            Self::Recorded(recording) => Some(recording.recorder.borrow().trace_id()),
        }
    }

    /// Calls `record` with the recorder and the current Unix time in nanoseconds if the request is
    /// sampled. The clock is read only in that case.
    pub(crate) fn record<N: Net>(&self, net: &N, record: impl FnOnce(&mut Recorder, u64)) {
        if let Self::Recorded(recording) = self {
            let now_ns = recording.clock.at(net.clock());
            record(&mut recording.recorder.borrow_mut(), now_ns);
        }
    }

    /// Records how the call of a leg ended: with a response of this status, or with this error.
    pub(crate) fn leg_ended<N: Net>(&self, net: &N, role: Role, ended: Result<u16, &'static str>) {
        self.record(net, |recorder, now_ns| match (role, ended) {
            (Role::Prefill, _) => recorder.prefilled(ended, now_ns),
            // The span of a decode leg ends with the response body.
            (Role::Decode, Ok(status)) => recorder.responded(status),
            (Role::Decode, Err(error)) => recorder.failed(error, now_ns),
            (Role::Encode | Role::Bootstrap, _) => {}
        });
    }

    /// Starts the span of a leg, which `start` describes given the current Unix time in
    /// nanoseconds, and returns the trace fields for the leg's head; `None` if tracing is off.
    pub(crate) fn leg<'a, N: Net>(
        &self,
        net: &N,
        start: impl FnOnce(u64) -> LegStart<'a>,
    ) -> Option<TraceHeaders> {
        match self {
            Self::Off => None,
            Self::Unrecorded(trace_headers) => Some(*trace_headers),
            Self::Recorded(recording) => {
                let start = start(recording.clock.at(net.clock()));
                let context = recording.recorder.borrow_mut().leg(start);
                Some(TraceHeaders::new(context, recording.keeps_state))
            }
        }
    }

    /// Removes the spans of the leg that has just started from the request's, for the task in which
    /// the leg continues.
    pub(crate) fn detach(&self) -> LegTrace {
        let Self::Recorded(recording) = self else {
            return LegTrace(None);
        };
        let spans = recording.recorder.borrow_mut().detach();
        LegTrace(Some(Box::new(Detached {
            tracer: Rc::clone(&recording.tracer),
            clock: recording.clock,
            spans,
        })))
    }

    /// Ends the request's spans and pushes them to the ring. `finish` returns the request's result,
    /// given the current Unix time in nanoseconds. Does nothing if the request is not sampled.
    pub(crate) fn finish<N: Net>(self, net: &N, finish: impl FnOnce(u64) -> Finish) {
        if let Self::Recorded(recording) = self {
            let finish = finish(recording.clock.at(net.clock()));
            let spans = recording.recorder.into_inner().finish(&finish);
            recording.tracer.push(spans);
        }
    }
}

/// The spans of a leg that runs as a separate task; `None` if the request is not recorded.
pub(crate) struct LegTrace(Option<Box<Detached>>);

struct Detached {
    tracer: Rc<Tracer>,
    clock: WorldClock,
    spans: Vec<Span>,
}

impl LegTrace {
    /// The trace of a call that has no span.
    pub(crate) const NONE: Self = Self(None);

    /// Ends the spans with the leg's result and pushes them to the ring, separately from those of
    /// the request.
    pub(crate) fn end<N: Net>(self, net: &N, ended: Result<u16, &'static str>) {
        if let Some(mut detached) = self.0 {
            let now_ns = detached.clock.at(net.clock());
            finish_detached(&mut detached.spans, ended, now_ns);
            detached.tracer.push(detached.spans);
        }
    }
}

fn world_clock<N: Net>(net: &N) -> WorldClock {
    let unix = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    WorldClock {
        instant: net.clock(),
        unix_ns: u64::try_from(unix.as_nanos()).unwrap_or(0),
    }
}

fn nanos(now: Instant, then: Instant) -> u64 {
    u64::try_from(now.since(then).as_nanos()).unwrap_or(0)
}

/// Returns the path of the request target without the query, which may contain private data.
pub(crate) fn path_of<'a>(head: &RequestHead, bytes: &'a [u8]) -> &'a [u8] {
    let target = head.target.of(bytes);
    h1::path_of(h1::origin_form(target).unwrap_or(target))
}
