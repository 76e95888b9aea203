//! The trace of a request: the context received from the client, the fields sent to engines, and
//! the spans that are recorded.
//!
//! With tracing off, each step costs one comparison; it reads no clock and allocates nothing. A
//! request that is not sampled costs reading one field and writing one more line in the head of
//! each leg.

use std::borrow::Cow;
use std::cell::RefCell;
use std::time::{SystemTime, UNIX_EPOCH};

use super::exchange::Exchange;
use super::recorder::{Finish, LegStart, Recorder, Style, WorldClock, finish_detached};
use super::routing::Routing;
use super::shard::Shard;
use super::split::Split;
use crate::fault::Fault;
use crate::fleet::Target;
use crate::h1::{self, Method, Name, RequestHead};
use crate::json::{Kind, Level};
use crate::net::{Instant, Net};
use crate::pd::chunked::Progress;
use crate::pd::connector::SpanNames;
use crate::pd::{Api, Leg, Order, Reason, Role, Uuid};
use crate::trace::{Sampler, Span, TraceContext, TraceHeaders, TraceRing, Value};
use crate::upstream::call::Attempt;
use crate::upstream::error::CallError;

/// The tracing state of a shard: the sampler and the ring for finished spans.
pub(super) struct Tracer {
    sampler: Sampler,
    ring: RefCell<TraceRing>,
}

impl Tracer {
    pub(super) const fn new(sampler: Sampler, ring: TraceRing) -> Self {
        Self {
            sampler,
            ring: RefCell::new(ring),
        }
    }
}

/// The trace of a request.
pub(super) enum Trace {
    /// Tracing is off. The client's trace fields pass through unmodified.
    Off,
    /// The request is not sampled. The `traceparent` sent to the engines has no sampled flag.
    Unrecorded(TraceHeaders),
    /// The request is sampled, and its spans are recorded.
    Recorded(Box<Recording>),
}

const _: () = assert!(size_of::<Trace>() <= 32);

/// The spans of a sampled request, and the clock for their times.
pub(super) struct Recording {
    recorder: RefCell<Recorder>,
    clock: WorldClock,
    keeps_state: bool,
}

impl Trace {
    /// Returns the trace that the client's `traceparent` names, or a new one if it names none;
    /// [`Trace::Off`] if tracing is off. `started` is the time when the request started.
    pub(super) fn begin<N: Net>(
        shard: &Shard<N>,
        head: &RequestHead,
        bytes: &[u8],
        started: Instant,
    ) -> Self {
        let Some(tracer) = &shard.tracer else {
            return Self::Off;
        };
        let net = &shard.net;
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
            recorder: RefCell::new(recorder),
            clock,
            keeps_state,
        }))
    }

    /// Calls `record` with the recorder and the current Unix time in nanoseconds if the request is
    /// sampled. The clock is read only in that case.
    fn record<N: Net>(&self, net: &N, record: impl FnOnce(&mut Recorder, u64)) {
        if let Self::Recorded(recording) = self {
            let now_ns = recording.clock.at(net.clock());
            record(&mut recording.recorder.borrow_mut(), now_ns);
        }
    }

    /// Records that the request uses chunked decode, with `tokens` tokens per chunk.
    pub(super) fn cut(&self, tokens: u32) {
        if let Self::Recorded(recording) = self {
            recording.recorder.borrow_mut().cut(tokens);
        }
    }

    /// Records that a chunk of a chunked decode has finished.
    pub(super) fn chunk(&self, progress: &Progress) {
        if let Self::Recorded(recording) = self {
            recording.recorder.borrow_mut().chunk(progress.tokens());
        }
    }

    /// Records the response status of the open leg, or the error it ended with.
    pub(super) fn responded<N: Net>(&self, net: &N, responded: Result<u16, &'static str>) {
        self.record(net, |recorder, now_ns| match responded {
            Ok(status) => recorder.responded(status),
            Err(error) => recorder.failed(error, now_ns),
        });
    }

    /// Records the result of an attempt of the prefill leg.
    pub(super) fn prefilled<N: Net>(&self, net: &N, ended: &Result<Attempt<N>, CallError>) {
        self.record(net, |recorder, now_ns| {
            recorder.prefilled(end_of(ended, Role::Prefill), now_ns);
        });
    }

    /// Removes the spans of the leg that has just started from the request's, for the task in which
    /// the leg continues.
    pub(super) fn detach(&self) -> Detached {
        let Self::Recorded(recording) = self else {
            return Detached(None);
        };
        let spans = recording.recorder.borrow_mut().detach();
        Detached(Some(Box::new((recording.clock, spans))))
    }
}

/// The spans of a leg that runs as a separate task; `None` if the request is not recorded.
pub(super) struct Detached(Option<Box<(WorldClock, Vec<Span>)>>);

impl Detached {
    /// Ends the spans with the leg's result and pushes them to the ring, separately from those of
    /// the request.
    pub(super) fn end<N: Net>(
        self,
        shard: &Shard<N>,
        role: Role,
        ended: &Result<Attempt<N>, CallError>,
    ) {
        if let Some(detached) = self.0 {
            let (clock, mut spans) = *detached;
            let now_ns = clock.at(shard.net.clock());
            finish_detached(&mut spans, end_of(ended, role), now_ns);
            push(shard, spans);
        }
    }
}

fn end_of<N: Net>(ended: &Result<Attempt<N>, CallError>, role: Role) -> Result<u16, &'static str> {
    match ended {
        Ok(Attempt::Done(_, _, status)) => Ok(*status),
        Ok(Attempt::Status(_, response, _)) => Ok(response.head.status),
        Err(fault) => Err(fault.fault(role).label()),
    }
}

fn push<N: Net>(shard: &Shard<N>, spans: Vec<Span>) {
    if let Some(tracer) = &shard.tracer {
        let lost = tracer.ring.borrow_mut().push(spans);
        shard.metrics.trace_dropped(lost as u64);
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

impl<N: Net> Exchange<'_, N> {
    /// Starts the `forward_request` span of a generation request (one that may be split).
    pub(super) fn trace_forward(&self, api: Api) {
        let (net, pd) = (&self.shard.net, &self.shard.config.pd);
        self.trace.record(net, |recorder, now_ns| {
            let path = path_of(&self.head, &self.bytes);
            recorder.forward(net.random(), now_ns);
            let connector = pd.kv_connector.name();
            recorder.set("llm_d.pd_proxy.connector", connector);
            recorder.set("llm_d.pd_proxy.kv_connector", connector);
            if let Some(encoder) = pd.encoder {
                recorder.set("llm_d.pd_proxy.ec_connector", encoder.name());
            }
            recorder.set("llm_d.pd_proxy.request_path", Value::text(path));
            if let Some(api) = api_name(api) {
                recorder.set("llm_d.openai.api", api);
            }
        });
    }

    /// Records the engines that the request head names as attributes of the `forward_request` span.
    pub(super) fn trace_routing(&self, routing: &Routing) {
        self.trace.record(&self.shard.net, |recorder, _| {
            let first = routing.prefillers.first();
            recorder.set("llm_d.pd_proxy.disaggregation_used", first.is_some());
            if let Some(first) = first {
                recorder.set("llm_d.pd_proxy.prefill_target", shown(first));
                let count = Value::Count(routing.prefillers.len() as u64);
                recorder.set("llm_d.pd_proxy.prefill_candidates", count);
            }
            if let Some(source) = &routing.source {
                recorder.set("llm_d.pd_proxy.kv_cache_source", shown(source));
            }
        });
    }

    /// Records how many encoders the request names, and how many of them are allowed.
    pub(super) fn trace_encoders(&self, named: usize, allowed: usize) {
        if named == 0 {
            return;
        }
        self.trace.record(&self.shard.net, |recorder, _| {
            let count = |count: usize| Value::Count(count as u64);
            recorder.set("llm_d.ec_proxy.encode_disaggregation_used", allowed > 0);
            recorder.set("llm_d.ec_proxy.encoder_candidates", count(named));
            let name = match allowed {
                0 => "llm_d.ec_proxy.encoder_allowed",
                _ => "llm_d.ec_proxy.encoder_count",
            };
            recorder.set(name, count(allowed));
        });
    }

    /// Records that the request names a prefill target that is not allowed.
    pub(super) fn trace_denied(&self, target: &Target) {
        self.trace.record(&self.shard.net, |recorder, _| {
            recorder.set("llm_d.pd_proxy.denied_target", shown(target));
        });
    }

    /// Records how the request is split. Called once its body is known.
    pub(super) fn trace_split(&self, split: &Split) {
        self.trace.record(&self.shard.net, |recorder, _| {
            let pd_request = split.pd_request();
            let connector = split.connector();
            let rules = connector.rules();
            let stream = pd_request.document.last(Level::Top, "stream");
            recorder.split(Style {
                connector: rules.name,
                is_long: rules.span_names == SpanNames::Long,
                is_concurrent: connector.order(&pd_request) == Order::Concurrent,
                is_parallel_dispatch: rules.is_parallel_dispatch,
                streams: stream.is_some_and(|member| member.kind == Kind::True),
                is_data_parallel: self.client.rank == 0
                    && self.head.field(Name::XDataParallelHostPort).is_some(),
            });
        });
    }

    /// Starts the span of a leg to `target` and returns the trace fields for its head. `leg` is
    /// given if the leg belongs to a split request.
    pub(super) fn trace_leg(
        &self,
        role: Role,
        target: &Target,
        leg: Option<&Leg>,
    ) -> Option<TraceHeaders> {
        let recording = match &self.trace {
            Trace::Off => return None,
            Trace::Unrecorded(trace_headers) => return Some(*trace_headers),
            Trace::Recorded(recording) => recording,
        };
        let net = &self.shard.net;
        let uuid = leg.and_then(|leg| leg.request_id).map(Uuid::text);
        let own_id = self.request_id.as_bytes();
        let method = if self.head.method == Method::Post || leg.is_some() {
            Cow::Borrowed("POST")
        } else {
            let method = self.head.method_span.of(&self.bytes);
            Cow::Owned(String::from_utf8_lossy(method).into_owned())
        };
        let context = recording.recorder.borrow_mut().leg(LegStart {
            role,
            method,
            host: target.host(),
            port: target.port(),
            target: target.to_string(),
            request_id: uuid
                .as_ref()
                .map_or(own_id, |uuid| uuid.as_str().as_bytes()),
            has_phase: leg.is_some(),
            now_ns: recording.clock.at(net.clock()),
            ids: [net.random(), net.random(), net.random()],
        });
        Some(TraceHeaders::new(context, recording.keeps_state))
    }

    /// Ends the request's spans and pushes them to the ring. Does nothing if the request is not
    /// sampled.
    pub(super) fn trace_end(&mut self) {
        let Trace::Recorded(recording) = std::mem::replace(&mut self.trace, Trace::Off) else {
            return;
        };
        let outcome = self.stats.outcome.map(|(outcome, reason)| {
            let reason = match reason {
                Reason::None => None,
                // The value that pd-sidecar uses.
                Reason::NoPrefiller => Some("no_prefill_header"),
                reason => Some(reason.label()),
            };
            (outcome.label(), reason)
        });
        let finish = Finish {
            now_ns: recording.clock.at(self.shard.net.clock()),
            status: self.stats.status,
            error: self.stats.fault.map(|fault| match fault {
                // The value that pd-sidecar uses.
                Fault::TargetDenied => "ssrf_protection_denied",
                fault => fault.label(),
            }),
            outcome,
        };
        let spans = recording.recorder.into_inner().finish(&finish);
        push(self.shard, spans);
    }
}

/// Returns the path of the request target without the query, which may contain private data.
fn path_of<'a>(head: &RequestHead, bytes: &'a [u8]) -> &'a [u8] {
    let target = head.target.of(bytes);
    h1::path_of(h1::origin_form(target).unwrap_or(target))
}

fn shown(target: &Target) -> Value {
    Value::text(target.to_string().as_bytes())
}

const fn api_name(api: Api) -> Option<&'static str> {
    match api {
        Api::Chat | Api::Completions | Api::Messages => Some("chat_completions"),
        Api::Responses => Some("responses"),
        Api::Generate => Some("generate"),
        Api::Invocations => Some("invocations"),
        Api::Unsplit => None,
    }
}
