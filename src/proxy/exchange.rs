//! One request and its response.

use std::cell::Cell;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{SystemTime, UNIX_EPOCH};

use super::client::{Client, Watch};
use super::head::{self, LocalResponse};
use super::request_id::RequestId;
use super::shard::Shard;
use super::trace::Trace;
use crate::fault::Fault;
use crate::fleet::Target;
use crate::h1::{self, Framing, Method, Name, RequestHead, Version};
use crate::metrics::{self, CodeClass, Phase, ShardMetrics};
use crate::net::{Conn, Instant, Net};
use crate::pd::{Api, Leg, Outcome, Reason, Role, Route, Uuid};
use crate::upstream::head::{Forwarded, HeadWriter};
use crate::upstream::pool::EndpointId;
use crate::upstream::scope::{Scope, Stage};
use crate::upstream::wait::{Deadline, Timeout, Waited};

/// Action to take on the client connection after an exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Keep the connection open: another request may follow.
    Request,
    /// Close the connection immediately.
    Close,
    /// Close the connection in a way that lets the client read the response first.
    Linger,
}

/// The state of one request while it is served.
pub(super) struct Exchange<'a, N: Net> {
    pub(super) shard: &'a Rc<Shard<N>>,
    pub(super) client: &'a Client<N>,
    pub(super) head: RequestHead,
    /// The bytes of the request head. Until the body is read, they are followed by the bytes that
    /// were received with the head.
    pub(super) bytes: Vec<u8>,
    pub(super) framing: Framing,
    /// Whether the client connection stays open for another request. Starts as the client's choice
    /// and is cleared when the response will close the connection.
    pub(super) keep_alive: bool,
    /// Whether the request body has been read from the client connection completely.
    pub(super) body_done: bool,
    /// Whether the engine whose response is relayed to the client was sent the whole request.
    /// Otherwise the engine connection cannot be reused.
    pub(super) sent_whole: bool,
    /// Whether the client's `Upgrade` field was forwarded to the engine.
    pub(super) upgrade_sent: bool,
    pub(super) request_id: RequestId,
    pub(super) stats: RequestStats,
    pub(super) trace: Trace,
}

/// The facts about a request that metrics and the access log report.
pub(super) struct RequestStats {
    pub(super) route: metrics::Route,
    pub(super) started: Instant,
    /// Status sent to the client; 0 while none has been sent.
    pub(super) status: u16,
    /// Whether the response was sent completely.
    pub(super) complete: bool,
    pub(super) outcome: Option<(Outcome, Reason)>,
    pub(super) prefill_target: String,
    pub(super) attempts: u32,
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
    pub(super) prefill_us: u64,
    pub(super) ttft_us: u64,
    /// Nanoseconds spent in the proxy itself: from the end of a split request's body (or of its
    /// encode stage) until its legs are planned, and from the arrival of the response head until
    /// that head has been sent to the client.
    pub(super) proxy_ns: u64,
    /// The failure of the request; `None` if it has not failed.
    pub(super) fault: Option<Fault>,
    /// Text about the failure that is added to the message in the error response.
    pub(super) detail: Option<String>,
}

/// Reads one request from the connection, serves it and records its result.
pub(super) async fn run<N: Net>(shard: &Rc<Shard<N>>, client: &Client<N>) -> Next {
    let mut exchange = match Exchange::begin(shard, client).await {
        Ok(exchange) => exchange,
        Err(Fault::ClientGone) => return Next::Close,
        Err(fault) => {
            shard.count_fault(fault);
            return refuse_head(shard, client, fault).await;
        }
    };
    let running = Running::begin(&shard.metrics, exchange.stats.route);
    let served = exchange.serve().await;
    let next = exchange.conclude(served).await;
    running.end(exchange.record_request());
    shard.buffers.recycle(exchange.bytes);
    shard.buffers.recycle_fields(exchange.head.fields);
    next
}

/// Counts a request as running in the metrics. If it is dropped without `end`, which a panic
/// causes, the request is counted as aborted.
struct Running<'a> {
    metrics: &'a ShardMetrics,
    route: metrics::Route,
    ended: bool,
}

impl<'a> Running<'a> {
    fn begin(metrics: &'a ShardMetrics, route: metrics::Route) -> Self {
        metrics.request_started(route);
        Self {
            metrics,
            route,
            ended: false,
        }
    }

    fn end(mut self, (class, total_us): (CodeClass, u64)) {
        self.ended = true;
        self.metrics.request_done(self.route, class, total_us);
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.metrics.request_done(self.route, CodeClass::Aborted, 0);
        }
    }
}

/// Sends an error response to a client whose request head is malformed or did not arrive in time,
/// or that sent plain text to a TLS port. No exchange exists, and the connection is closed
/// afterwards.
pub(super) async fn refuse_head<N: Net>(
    shard: &Rc<Shard<N>>,
    client: &Client<N>,
    fault: Fault,
) -> Next {
    let body = fault.body();
    let mut out = shard.buffers.buffer();
    head::push_local_response(
        &mut out,
        &LocalResponse {
            status: fault.status(),
            body: body.as_bytes(),
            request_id: b"",
            error: Some(fault.label()),
            retry_after_secs: fault.retry_after_secs(),
            keep_alive: false,
            http10: false,
            is_head: false,
        },
    );
    match client.send(shard, &[std::io::IoSlice::new(&out)]).await {
        Ok(()) => Next::Linger,
        Err(_) => Next::Close,
    }
}

impl<'a, N: Net> Exchange<'a, N> {
    /// Reads a request head from the client and creates an exchange from it. Fails if the head is
    /// malformed or does not arrive in time, or if the client disconnects.
    async fn begin(shard: &'a Rc<Shard<N>>, client: &'a Client<N>) -> Result<Self, Fault> {
        let started = shard.net.now();
        let deadline = Deadline::of(started, shard.config.timeouts.head, Timeout::Client);
        let mut head = RequestHead::default();
        head.fields = shard.buffers.fields();
        while !client.parse_head(&mut head).map_err(Fault::Head)? {
            client.receive_head(shard, deadline).await?;
        }
        let bytes = client.take_ahead();
        let framing = h1::request_framing(&head, &bytes).map_err(Fault::Head)?;
        let keep_alive = h1::request_keeps_alive(&head, &bytes);
        let client_id = head
            .field(Name::XRequestId)
            .map(|field| field.value.of(&bytes));
        let unix = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let random = [shard.net.random(), shard.net.random()];
        let unix_ms = u64::try_from(unix.as_millis()).unwrap_or(0);
        let request_id = RequestId::choose(client_id, unix_ms, random);
        let route = route_label(Route::of(head.method, head.target.of(&bytes)));
        let trace = Trace::begin(shard, &head, &bytes, started);
        let stats = RequestStats {
            route,
            started,
            status: 0,
            complete: false,
            outcome: None,
            prefill_target: String::new(),
            attempts: 0,
            bytes_in: 0,
            bytes_out: 0,
            prefill_us: 0,
            ttft_us: 0,
            proxy_ns: 0,
            fault: None,
            detail: None,
        };
        let mut exchange = Self {
            shard,
            client,
            head,
            bytes,
            framing,
            keep_alive,
            body_done: false,
            sent_whole: false,
            upgrade_sent: false,
            request_id,
            stats,
            trace,
        };
        if framing == Framing::None {
            exchange.finish_body_early();
        }
        Ok(exchange)
    }

    /// Marks the body of a request without one as read. The request ends with its head, so bytes
    /// received after the head are put back for the next request.
    fn finish_body_early(&mut self) {
        self.body_done = true;
        if self.bytes.len() > self.head.len {
            let mut head = self.shard.buffers.buffer();
            head.extend(self.bytes.drain(..self.head.len));
            let next = std::mem::replace(&mut self.bytes, head);
            self.client.put_back_first(next);
        }
    }

    async fn serve(&mut self) -> Result<(), Fault> {
        #[cfg(debug_assertions)]
        self.panic_on_request();
        let route = Route::of(self.head.method, self.head.target.of(&self.bytes));
        if matches!(route, Route::Intercepted(_)) {
            // A default, so that every intercepted request is counted. Replaced below once more is
            // known.
            self.stats.outcome = Some((Outcome::LocalPolicy, Reason::NoPrefiller));
        }
        if self.head.method == Method::Connect {
            return Err(Fault::Connect);
        }
        let expects = h1::expects_continue(&self.head, &self.bytes).map_err(Fault::Head)?;
        if let Framing::Length(length) = self.framing
            && length > self.shard.config.limits.body_bytes_max
        {
            return Err(Fault::BodyTooLarge);
        }
        let decoder = self.decoder()?;
        match route {
            Route::Health => self.respond_health().await,
            Route::Other => self.forward(decoder, None, expects).await,
            Route::Intercepted(api) => {
                self.trace_forward(api);
                let mut routing = self.routing().map_err(|error| {
                    self.stats.outcome = Some((Outcome::Failed, Reason::BadTarget));
                    Fault::Target(error)
                })?;
                self.trace_routing(&routing);
                if let Err(fault) = self.shard.admit(&mut routing.prefillers) {
                    self.stats.outcome = Some((Outcome::Failed, Reason::TargetDenied));
                    self.record_prefill_target(&routing.prefillers[0]);
                    self.trace_denied(&routing.prefillers[0]);
                    return Err(fault);
                }
                let is_cut = api == Api::Chat && self.shard.config.pd.decode_chunk_tokens.is_some();
                if routing.is_local() && !is_cut {
                    self.stats.outcome = Some((Outcome::LocalPolicy, Reason::NoPrefiller));
                    self.forward(decoder, Some(api), expects).await
                } else {
                    self.split(api, routing, decoder, expects).await
                }
            }
        }
    }

    /// Panics if the request has the field `x-ringside-test-panic`. This is the only way for a test
    /// of the whole program to check that a panic ends only one session. Compiled only with debug
    /// assertions.
    #[cfg(debug_assertions)]
    #[expect(clippy::panic, reason = "the purpose of this function")]
    fn panic_on_request(&self) {
        let name = b"x-ringside-test-panic".as_slice();
        let mut fields = self.head.fields.iter();
        if fields.any(|field| field.name.of(&self.bytes).eq_ignore_ascii_case(name)) {
            panic!("panic requested by x-ringside-test-panic");
        }
    }

    /// Returns the decoder to use: that of the listener's rank, or the one named by
    /// `x-data-parallel-host-port`. Only rank 0's listener honours the field, as pd-sidecar does
    /// (`docs/pd-sidecar.md#data-parallel-ranks`). Fails if the field names no rank of this proxy.
    fn decoder(&self) -> Result<EndpointId, Fault> {
        let decoders = &self.shard.decoders;
        let field = self.head.field(Name::XDataParallelHostPort);
        let Some(field) = field.filter(|_| self.client.rank == 0) else {
            return Ok(decoders[self.client.rank].0);
        };
        let wanted = field.value.of(&self.bytes);
        let pod_ip = self.shard.config.pod_ip.as_deref().unwrap_or_default();
        let ranks = self.shard.config.ranks.iter();
        let rank = ranks.map(|rank| format!("{pod_ip}:{}", rank.listen.port()));
        rank.zip(decoders)
            .find(|(key, _)| key.as_bytes() == wanted)
            .map(|(_, (id, _))| *id)
            .ok_or(Fault::UnknownRank)
    }

    async fn respond_health(&mut self) -> Result<(), Fault> {
        let status = if self.shard.is_unhealthy() { 503 } else { 200 };
        self.respond_local(status, b"", None, None).await
    }

    /// Writes the request head of a leg to `out`, without framing fields. `leg` is `None` for a
    /// request whose body is forwarded as it arrives.
    pub(super) fn leg_head(
        &self,
        out: Vec<u8>,
        target: &Target,
        accept_encoding: bool,
        upgrade: bool,
        leg: Option<&Leg>,
    ) -> Result<HeadWriter, Fault> {
        let uuid = leg.and_then(|leg| leg.request_id).map(Uuid::text);
        let uuid = uuid.as_ref();
        let role = leg.map_or(Role::Decode, |leg| leg.role);
        let extra = Forwarded {
            request_id: uuid.map_or(self.request_id.as_bytes(), |uuid| uuid.as_str().as_bytes()),
            rank: leg.and_then(|leg| leg.rank),
            trace_headers: self.trace_leg(role, target, leg),
            client_ip: self.client.conn.peer_ip(),
            target,
            accept_encoding,
            upgrade,
        };
        HeadWriter::forwarded(out, &self.head, &self.bytes, &extra).map_err(Fault::Head)
    }

    /// Sends `100 Continue` to a client that waits for it before sending its body (RFC 9110
    /// 10.1.1).
    pub(super) async fn send_continue(&self) -> Result<(), Fault> {
        let line = std::io::IoSlice::new(b"HTTP/1.1 100 Continue\r\n\r\n");
        self.client.send(self.shard, &[line]).await
    }

    /// Returns whether the client connection can stay open after the response that is about to be
    /// written. It cannot if part of the request body is still unread or the process is draining.
    pub(super) fn keeps_alive(&self) -> bool {
        self.keep_alive && self.body_done && !self.shard.is_draining()
    }

    pub(super) fn is_http10(&self) -> bool {
        self.head.version == Version::Http10
    }

    /// Sends a complete response generated by the proxy. `error` is the label of the fault that the
    /// response reports; `None` if it is not an error.
    pub(super) async fn respond_local(
        &mut self,
        status: u16,
        body: &[u8],
        error: Option<&'static str>,
        retry_after_secs: Option<u32>,
    ) -> Result<(), Fault> {
        let mut out = self.shard.buffers.buffer();
        self.keep_alive = self.keeps_alive();
        head::push_local_response(
            &mut out,
            &LocalResponse {
                status,
                body,
                request_id: self.request_id.as_bytes(),
                error,
                retry_after_secs,
                keep_alive: self.keep_alive,
                http10: self.is_http10(),
                is_head: self.head.method == Method::Head,
            },
        );
        self.stats.status = status;
        self.stats.bytes_out += out.len() as u64;
        self.client
            .send(self.shard, &[std::io::IoSlice::new(&out)])
            .await?;
        self.stats.complete = true;
        self.shard.buffers.recycle(out);
        Ok(())
    }

    /// Sends an error response if the request failed before a response was started, and decides
    /// what to do with the connection.
    async fn conclude(&mut self, served: Result<(), Fault>) -> Next {
        let Err(fault) = served else {
            return if self.keep_alive {
                Next::Request
            } else {
                Next::Linger
            };
        };
        self.shard.count_fault(fault);
        self.stats.fault = Some(fault);
        if matches!(fault, Fault::ClientGone | Fault::ClientStalled) {
            self.shard.metrics.client_left(self.client.phase.get());
            if self.stats.status == 0 {
                self.set_failed(Reason::ClientGone);
            }
            if self.stats.status == 0 {
                self.client.conn.abort();
            } else {
                // The client may still read what the kernel has buffered. Reset the connection so
                // that this does not look like a complete response.
                self.client.conn.reset_on_close();
            }
            return Next::Close;
        }
        self.set_failed(fault.reason());
        if self.stats.status != 0 {
            // The response head has been sent. Only a missing end can now indicate the failure.
            return Next::Close;
        }
        if matches!(fault, Fault::Head(_)) {
            // After a rejected head, parse nothing more from this connection.
            self.keep_alive = false;
        }
        let body = fault.body_with(self.stats.detail.as_deref());
        let responded = self
            .respond_local(
                fault.status(),
                body.as_bytes(),
                Some(fault.label()),
                fault.retry_after_secs(),
            )
            .await;
        match responded {
            Ok(()) if self.keep_alive => Next::Request,
            Ok(()) => Next::Linger,
            Err(_) => Next::Close,
        }
    }

    /// Sets the outcome of an intercepted request to failed, with `reason`. If it was already
    /// failed, the first reason is kept. Other requests have no outcome.
    pub(super) fn set_failed(&mut self, reason: Reason) {
        if let Some((outcome, noted)) = &mut self.stats.outcome {
            if *outcome != Outcome::Failed {
                *noted = reason;
            }
            *outcome = Outcome::Failed;
        }
    }

    /// Records the finished request in the trace, the metrics and the access log. Returns its
    /// status class and its duration in microseconds.
    fn record_request(&mut self) -> (CodeClass, u64) {
        self.trace_end();
        let stats = &self.stats;
        let total_us = micros_since(self.shard.net.clock(), stats.started);
        let metrics = &self.shard.metrics;
        let class = if stats.complete {
            CodeClass::of(stats.status)
        } else {
            CodeClass::Aborted
        };
        if let Some((outcome, reason)) = stats.outcome {
            metrics.pd(outcome, reason);
        }
        self.log_access(total_us);
        (class, total_us)
    }

    /// Sets the phase under which the metrics count a disconnect of the client from now on.
    pub(super) fn enter(&self, phase: Phase) {
        self.client.phase.set(phase);
    }
}

pub(super) fn micros_since(now: Instant, then: Instant) -> u64 {
    u64::try_from(now.since(then).as_micros()).unwrap_or(u64::MAX)
}

const fn route_label(route: Route) -> metrics::Route {
    match route {
        Route::Health => metrics::Route::Health,
        Route::Intercepted(Api::Unsplit) | Route::Other => metrics::Route::Other,
        Route::Intercepted(Api::Chat) => metrics::Route::Chat,
        Route::Intercepted(Api::Completions) => metrics::Route::Completions,
        Route::Intercepted(Api::Messages) => metrics::Route::Messages,
        Route::Intercepted(Api::Responses) => metrics::Route::Responses,
        Route::Intercepted(Api::Generate) => metrics::Route::Generate,
        Route::Intercepted(Api::Invocations) => metrics::Route::Invocations,
    }
}

impl<N: Net> Scope<N> for Exchange<'_, N> {
    fn phase(&self) -> &Cell<Phase> {
        &self.client.phase
    }

    async fn until<T>(
        &self,
        stage: Stage,
        deadline: Deadline,
        ready: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Waited<T> {
        let watch = match stage {
            // The upload reads the rest of the body from the socket, so it must stay there.
            Stage::BeforeRequest if !self.body_done => Watch::Hangup,
            Stage::BeforeRequest | Stage::AfterRequest => Watch::Ahead,
        };
        self.client.until(self.shard, watch, deadline, ready).await
    }
}
