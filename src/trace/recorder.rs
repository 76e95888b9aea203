//! The spans of one request while it runs: which are open, how they nest, and when they ended.
//!
//! Names, nesting and attributes are those of pd-sidecar, so that its dashboards keep working. One
//! of its quirks is that the decode span is a child of the prefill span. Times and ids are supplied
//! by the caller.

use std::borrow::Cow;

use super::context::TraceContext;
use super::span::{Kind, Span, Value};
use crate::limits::TRACE_LEGS_MAX;
use crate::net::Instant;
use crate::pd::Role;

/// A pair of simultaneous readings of the shard's clock and of Unix time, which converts later
/// instants of the shard's clock to Unix time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WorldClock {
    pub(crate) instant: Instant,
    /// Unix time when the shard's clock showed `instant`, in nanoseconds.
    pub(crate) unix_ns: u64,
}

impl WorldClock {
    pub(crate) fn at(self, instant: Instant) -> u64 {
        let since = u64::try_from(instant.since(self.instant).as_nanos()).unwrap_or(0);
        self.unix_ns.saturating_add(since)
    }
}

/// How the legs of a split request are named and described in a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Style {
    pub(crate) connector: &'static str,
    /// Whether the phase spans have the long names, prefixed with `llm_d.pd_proxy.`.
    pub(crate) is_long: bool,
    /// Whether the prefill and decode legs run concurrently.
    pub(crate) is_concurrent: bool,
    /// Whether the legs run concurrently because of MoRI-IO's parallel dispatch.
    pub(crate) is_parallel_dispatch: bool,
    /// Whether the client requested a stream.
    pub(crate) streams: bool,
    /// Whether the client selected the decoder by rank, with `x-data-parallel-host-port`.
    pub(crate) is_data_parallel: bool,
}

/// The description of a leg that starts.
#[derive(Debug)]
pub(crate) struct LegStart<'a> {
    pub(crate) role: Role,
    pub(crate) method: Cow<'static, str>,
    pub(crate) host: String,
    pub(crate) port: Option<u16>,
    pub(crate) target: String,
    pub(crate) request_id: &'a [u8],
    /// Whether the leg belongs to a split request. If so, a prefill or decode leg is part of a
    /// phase, whose span encloses the leg's span.
    pub(crate) has_phase: bool,
    pub(crate) now_ns: u64,
    /// Random span ids: the first for the leg's span, the other two for enclosing spans that the
    /// leg starts, if any.
    pub(crate) ids: [u64; 3],
}

/// A prefill phase that has ended, or that continues in a separate task.
#[derive(Clone, Copy, Debug)]
struct Prefilled {
    id: u64,
    /// The end of the phase as Unix time in nanoseconds, and its duration in milliseconds; `None`
    /// while it has not ended.
    ended: Option<(u64, u64)>,
}

/// The spans of a request that is sampled.
#[derive(Debug)]
pub(crate) struct Recorder {
    context: TraceContext,
    root: Span,
    forward: Option<Span>,
    prefill: Option<Span>,
    decode: Option<Span>,
    chunked: Option<Span>,
    leg: Option<Span>,
    done: Vec<Span>,
    legs: usize,
    prefilled: Option<Prefilled>,
    style: Option<Style>,
    chunk_tokens: Option<u32>,
    chunks: u64,
    /// Unix time in nanoseconds when the first prefill leg of the concurrent order started; `None`
    /// in the other orders.
    pair_ns: Option<u64>,
}

/// The result of a request, as the spans record it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Finish {
    pub(crate) now_ns: u64,
    /// HTTP status sent to the client; 0 if none was.
    pub(crate) status: u16,
    pub(crate) error: Option<&'static str>,
    /// Labels of the outcome and of its reason, if it has one; `None` for a request that was not
    /// intercepted.
    pub(crate) outcome: Option<(&'static str, Option<&'static str>)>,
}

impl Recorder {
    /// Creates a recorder and starts the span of the whole request, whose id is that of `context`.
    pub(crate) fn new(
        context: TraceContext,
        parent_id: u64,
        (method, path): (&[u8], &[u8]),
        now_ns: u64,
    ) -> Self {
        let (method, path) = (Value::text(method), Value::text(path));
        let mut root = Span {
            trace_id: context.trace_id,
            span_id: context.span_id,
            parent_id,
            name: format!("llm_d.pd_proxy.{} {}", shown(&method), shown(&path)).into(),
            kind: Kind::Server,
            begun_ns: now_ns,
            ended_ns: 0,
            attributes: Vec::new(),
            error: None,
        };
        root.set("http.request.method", method);
        root.set("url.path", path);
        Self {
            context,
            root,
            forward: None,
            prefill: None,
            decode: None,
            chunked: None,
            leg: None,
            done: Vec::new(),
            legs: 0,
            prefilled: None,
            style: None,
            chunk_tokens: None,
            chunks: 0,
            pair_ns: None,
        }
    }

    pub(crate) const fn trace_id(&self) -> u128 {
        self.context.trace_id
    }

    /// Starts the `forward_request` span, which only a generation request has. [`Recorder::set`]
    /// sets its attributes.
    pub(crate) fn forward(&mut self, id: u64, now_ns: u64) {
        let span = self.begin(
            "forward_request",
            Kind::Server,
            self.root.span_id,
            id,
            now_ns,
        );
        self.forward = Some(span);
    }

    /// Sets an attribute of the `forward_request` span.
    pub(crate) fn set(&mut self, name: &'static str, value: impl Into<Value>) {
        if let Some(forward) = &mut self.forward {
            forward.set(name, value);
        }
    }

    /// Records how the legs of the request are named and described, which applies to those started
    /// later.
    pub(crate) fn split(&mut self, style: Style) {
        self.style = Some(style);
    }

    /// Records that the request uses chunked decode, with `tokens` tokens per chunk.
    pub(crate) fn cut(&mut self, tokens: u32) {
        self.chunk_tokens = Some(tokens);
    }

    /// Records that a chunk of a chunked decode has finished. `tokens` is the total of all chunks
    /// so far.
    pub(crate) fn chunk(&mut self, tokens: u64) {
        self.chunks += 1;
        let chunks = self.chunks;
        if let Some(chunked) = &mut self.chunked {
            chunked.set("llm_d.pd_proxy.chunked_decode.chunks", Value::Count(chunks));
            let name = "llm_d.pd_proxy.chunked_decode.total_tokens";
            chunked.set(name, Value::Count(tokens));
        }
    }

    /// Starts the span of a leg, and that of its phase if it is not open yet. Ends the previous
    /// leg's span if that is still open. Returns the trace context to send to the engine. After
    /// `TRACE_LEGS_MAX` legs, further legs get no span, and their context is that of the enclosing
    /// span.
    pub(crate) fn leg(&mut self, start: LegStart<'_>) -> TraceContext {
        let now_ns = start.now_ns;
        self.end_leg(now_ns, None);
        if start.has_phase {
            match start.role {
                Role::Prefill => self.enter_prefill(&start),
                Role::Decode => self.enter_decode(&start),
                Role::Encode | Role::Bootstrap => {}
            }
        }
        let phases = [&self.chunked, &self.decode, &self.prefill, &self.forward];
        let parent = phases.into_iter().flatten().next().unwrap_or(&self.root);
        let parent_id = parent.span_id;
        if self.legs >= TRACE_LEGS_MAX {
            return self.context.child(parent_id);
        }
        self.legs += 1;
        let name = match &*start.method {
            "POST" => Cow::Borrowed("HTTP POST"),
            method => Cow::Owned(format!("HTTP {method}")),
        };
        let mut span = self.begin(name, Kind::Client, parent_id, start.ids[0], now_ns);
        span.set("http.request.method", Value::Text(start.method));
        span.set("server.address", Value::text(start.host.as_bytes()));
        if let Some(port) = start.port {
            span.set("server.port", Value::Count(u64::from(port)));
        }
        let context = self.context.child(span.span_id);
        self.leg = Some(span);
        context
    }

    fn enter_prefill(&mut self, start: &LegStart<'_>) {
        let now_ns = start.now_ns;
        // In the decode-first order, a decode phase is still open.
        self.end_phases(now_ns, None);
        let parent_id = self.forward.as_ref().unwrap_or(&self.root).span_id;
        let mut span = match self.prefill.take() {
            // A further attempt continues the phase.
            Some(span) => Span {
                ended_ns: 0,
                ..span
            },
            None => {
                let name = self.phase_name("prefill", "llm_d.pd_proxy.prefill");
                self.begin(name, Kind::Internal, parent_id, start.ids[1], now_ns)
            }
        };
        let target = Value::text(start.target.as_bytes());
        span.set("llm_d.pd_proxy.prefill_target", target);
        self.describe(&mut span, start);
        if self.style.is_some_and(|style| style.is_concurrent) {
            span.set("llm_d.pd_proxy.prefill.async", true);
            self.pair_ns.get_or_insert(now_ns);
        }
        let (id, ended) = (span.span_id, None);
        self.prefilled = Some(Prefilled { id, ended });
        self.prefill = Some(span);
    }

    fn enter_decode(&mut self, start: &LegStart<'_>) {
        let now_ns = start.now_ns;
        if self.decode.is_some() || self.chunked.is_some() {
            // A repeat or a further decode chunk continues the phase.
            return;
        }
        if let Some(prefill) = self.prefill.take() {
            self.prefilled = Some(Prefilled {
                id: prefill.span_id,
                ended: Some((prefill.ended_ns, prefill.millis(prefill.ended_ns))),
            });
            self.end(prefill, now_ns, None);
        }
        let forward_id = self.forward.as_ref().unwrap_or(&self.root).span_id;
        let mut parent_id = forward_id;
        if self.chunk_tokens.is_none() || self.prefilled.is_some() {
            if let Some(prefilled) = self.prefilled {
                parent_id = prefilled.id;
            }
            let name = self.phase_name("decode", "llm_d.pd_proxy.decode");
            let span = self.begin(name, Kind::Internal, parent_id, start.ids[2], now_ns);
            let span = self.describe_decode(span, start);
            parent_id = span.span_id;
            self.decode = Some(span);
        }
        if let (Some(tokens), Some(style)) = (self.chunk_tokens, self.style) {
            let id = start.ids[1];
            let mut span = self.begin("chunked_decode", Kind::Internal, parent_id, id, now_ns);
            let size = Value::Count(u64::from(tokens));
            span.set("llm_d.pd_proxy.chunked_decode.chunk_size", size);
            let name = "llm_d.pd_proxy.chunked_decode.streaming";
            span.set(name, style.streams);
            self.chunked = Some(span);
        }
    }

    fn describe_decode(&self, mut span: Span, start: &LegStart<'_>) -> Span {
        self.describe(&mut span, start);
        let target = Value::text(start.target.as_bytes());
        span.set("llm_d.pd_proxy.decode.target", target);
        let until_decode = Value::Millis(self.root.millis(span.begun_ns));
        span.set("llm_d.pd_proxy.true_ttft_ms", until_decode);
        if let Some((ended_ns, millis)) = self.prefilled.and_then(|prefilled| prefilled.ended) {
            let name = "llm_d.pd_proxy.prefill_duration_ms";
            span.set(name, Value::Millis(millis));
            let between = span.begun_ns.saturating_sub(ended_ns) / 1_000_000;
            let name = "llm_d.pd_proxy.coordinator_overhead_ms";
            span.set(name, Value::Millis(between));
        }
        if let Some(style) = self.style {
            span.set("llm_d.pd_proxy.decode.streaming", style.streams);
            let name = "llm_d.pd_proxy.decode.data_parallel";
            span.set(name, style.is_data_parallel);
            if style.is_concurrent {
                span.set("llm_d.pd_proxy.decode.concurrent_with_prefill", true);
            }
            span.set("llm_d.pd_proxy.concurrent_pd", style.is_concurrent);
        }
        span
    }

    /// Sets the attributes that the spans of the prefill and of the decode phase share.
    fn describe(&self, span: &mut Span, start: &LegStart<'_>) {
        span.set("llm_d.pd_proxy.request_id", Value::text(start.request_id));
        if let Some(style) = self.style {
            span.set("llm_d.pd_proxy.connector", style.connector);
            if style.is_parallel_dispatch {
                span.set("llm_d.pd_proxy.parallel_dispatch", true);
            }
        }
    }

    fn phase_name(&self, short: &'static str, long: &'static str) -> &'static str {
        match self.style {
            Some(style) if style.is_long => long,
            Some(_) | None => short,
        }
    }

    /// Records the response status in the span of the leg that is open.
    pub(crate) fn responded(&mut self, status: u16) {
        if let Some(leg) = &mut self.leg {
            record_status(leg, status);
        }
    }

    /// Ends the span of the open leg with an error.
    pub(crate) fn failed(&mut self, error: &'static str, now_ns: u64) {
        self.end_leg(now_ns, Some(error));
    }

    /// Records the result of an attempt of the prefill leg and ends the attempt's span.
    pub(crate) fn prefilled(&mut self, ended: Result<u16, &'static str>, now_ns: u64) {
        if let Some(leg) = &mut self.leg {
            record_end(leg, ended);
        }
        self.end_leg(now_ns, None);
        if let Some(prefill) = &mut self.prefill {
            record_prefill(prefill, ended, now_ns);
        }
    }

    /// Removes and returns the spans of the leg that has just started (its own and that of a
    /// prefill phase), because the leg continues in a separate task.
    pub(crate) fn detach(&mut self) -> Vec<Span> {
        let mut spans: Vec<_> = self.leg.take().into_iter().collect();
        spans.extend(self.prefill.take());
        spans
    }

    /// Ends the spans still open and returns all spans of the request except detached ones.
    pub(crate) fn finish(mut self, ending: &Finish) -> Vec<Span> {
        let Finish { now_ns, error, .. } = *ending;
        self.end_leg(now_ns, error);
        let total_ms = Value::Millis(self.root.millis(now_ns));
        if let Some(decode) = &mut self.decode {
            let millis = decode.millis(now_ns);
            decode.set("llm_d.pd_proxy.decode.duration_ms", Value::Millis(millis));
            decode.set("llm_d.pd_proxy.decode_duration_ms", Value::Millis(millis));
            decode.set("llm_d.pd_proxy.total_duration_ms", total_ms.clone());
        }
        self.end_phases(now_ns, error);
        if let Some(prefill) = self.prefill.take() {
            self.end(prefill, now_ns, error);
        }
        if let Some(mut forward) = self.forward.take() {
            if let Some((outcome, reason)) = ending.outcome {
                forward.set("llm_d.pd_proxy.outcome", outcome);
                if let Some(reason) = reason {
                    forward.set("llm_d.pd_proxy.reason", reason);
                }
            }
            if let Some(error) = error {
                forward.set("llm_d.pd_proxy.error", error);
            }
            if let (Some(true), Some(pair_ns)) = (
                self.style.map(|style| style.is_parallel_dispatch),
                self.pair_ns,
            ) {
                forward.set("llm_d.pd_proxy.parallel_dispatch", true);
                let window_ms = now_ns.saturating_sub(pair_ns) / 1_000_000;
                let name = "llm_d.pd_proxy.parallel_window_ms";
                forward.set(name, Value::Millis(window_ms));
                forward.set("llm_d.pd_proxy.total_duration_ms", total_ms);
            }
            self.end(forward, now_ns, error);
        }
        let mut root = self.root.clone();
        if ending.status > 0 {
            let status = Value::Count(u64::from(ending.status));
            root.set("http.response.status_code", status);
        }
        let bad_status = (ending.status >= 500).then_some("status");
        self.end(root, now_ns, error.or(bad_status));
        self.done
    }

    fn begin(
        &self,
        name: impl Into<Cow<'static, str>>,
        kind: Kind,
        parent_id: u64,
        id: u64,
        now_ns: u64,
    ) -> Span {
        let context = self.context.child(id);
        Span {
            trace_id: context.trace_id,
            span_id: context.span_id,
            parent_id,
            name: name.into(),
            kind,
            begun_ns: now_ns,
            ended_ns: 0,
            attributes: Vec::new(),
            error: None,
        }
    }

    fn end_leg(&mut self, now_ns: u64, error: Option<&'static str>) {
        if let Some(leg) = self.leg.take() {
            self.end(leg, now_ns, error);
        }
    }

    /// Ends the span of the decode phase and that of the chunked decode, if they are open.
    fn end_phases(&mut self, now_ns: u64, error: Option<&'static str>) {
        if let Some(mut chunked) = self.chunked.take() {
            let millis = Value::Millis(chunked.millis(now_ns));
            chunked.set("llm_d.pd_proxy.chunked_decode.duration_ms", millis);
            self.end(chunked, now_ns, error);
        }
        if let Some(decode) = self.decode.take() {
            self.end(decode, now_ns, error);
        }
    }

    fn end(&mut self, mut span: Span, now_ns: u64, error: Option<&'static str>) {
        end(&mut span, now_ns, error);
        self.done.push(span);
    }
}

/// Ends the spans of a leg that ran as a separate task, with the leg's status or error: its own,
/// and that of its phase if it has one.
pub(crate) fn finish_detached(spans: &mut [Span], ended: Result<u16, &'static str>, now_ns: u64) {
    for span in spans {
        match span.kind {
            Kind::Client => record_end(span, ended),
            Kind::Internal | Kind::Server => record_prefill(span, ended, now_ns),
        }
        end(span, now_ns, None);
    }
}

fn end(span: &mut Span, now_ns: u64, error: Option<&'static str>) {
    if span.ended_ns == 0 {
        span.ended_ns = now_ns;
    }
    span.error = span.error.or(error);
}

fn record_status(leg: &mut Span, status: u16) {
    leg.set("http.response.status_code", Value::Count(u64::from(status)));
    leg.error = (status >= 400).then_some("status");
}

fn record_end(leg: &mut Span, ended: Result<u16, &'static str>) {
    match ended {
        Ok(status) => record_status(leg, status),
        Err(error) => leg.error = Some(error),
    }
}

/// Records the result of an attempt of the prefill leg in the span of the prefill phase. The last
/// attempt determines the span's end, status and error.
fn record_prefill(prefill: &mut Span, ended: Result<u16, &'static str>, now_ns: u64) {
    prefill.ended_ns = now_ns;
    let millis = Value::Millis(prefill.millis(now_ns));
    prefill.set("llm_d.pd_proxy.prefill.duration_ms", millis);
    prefill.error = match ended {
        Ok(status) => {
            let code = Value::Count(u64::from(status));
            prefill.set("llm_d.pd_proxy.prefill.status_code", code);
            (status >= 300).then_some("prefill request failed")
        }
        Err(error) => Some(error),
    };
}

fn shown(value: &Value) -> &str {
    match value {
        Value::Text(text) => text,
        Value::Count(_) | Value::Millis(_) | Value::Flag(_) => "",
    }
}

#[cfg(test)]
#[path = "recorder_tests.rs"]
mod tests;
