//! Serves one request: chooses its engine and the way to serve it, and concludes the exchange.

use std::io::IoSlice;
use std::rc::Rc;

use super::access_log::micros_since;
use super::client::Client;
use super::exchange::{Exchange, Reply};
use super::head::{self, LocalResponse};
use super::inspect::Inspect;
use super::shard::Shard;
use super::{access_log, allowlist, choose, flow, forward, routing, trace};
use crate::api::{Api, Route};
use crate::fault::Fault;
use crate::h1::{self, Framing, Method};
use crate::metrics::CodeClass;
use crate::net::{Conn, Net};
use crate::pd::{Outcome, Reason};

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
    let mut running = Running::begin(&mut exchange);
    let served = serve(running.exchange).await;
    let next = conclude(running.exchange, served).await;
    running.end();
    drop(running);
    shard.buffers.recycle(exchange.request.bytes);
    shard.buffers.recycle_fields(exchange.request.head.fields);
    next
}

/// A request that is being served. If it is dropped without `end`, its shard has ended, usually at
/// the deadline of a drain, and it is recorded as cut by that. After a panic it is only counted.
struct Running<'e, 'a, N: Net> {
    exchange: &'e mut Exchange<'a, N>,
    has_ended: bool,
}

impl<'e, 'a, N: Net> Running<'e, 'a, N> {
    fn begin(exchange: &'e mut Exchange<'a, N>) -> Self {
        let metrics = &exchange.shard.metrics;
        metrics.request_started(exchange.stats.route);
        Self {
            exchange,
            has_ended: false,
        }
    }

    fn end(&mut self) {
        self.has_ended = true;
        let (class, total_us) = record(self.exchange);
        let metrics = &self.exchange.shard.metrics;
        metrics.request_done(self.exchange.stats.route, class, total_us);
    }
}

impl<N: Net> Drop for Running<'_, '_, N> {
    fn drop(&mut self) {
        if self.has_ended {
            return;
        }
        let exchange = &mut *self.exchange;
        if std::thread::panicking() {
            let metrics = &exchange.shard.metrics;
            metrics.request_done(exchange.stats.route, CodeClass::Aborted, 0);
            return;
        }
        if exchange.stats.fault.is_none() {
            exchange.shard.count_fault(Fault::Drained);
            exchange.stats.fault = Some(Fault::Drained);
            exchange.stats.set_failed(Fault::Drained.reason());
        }
        exchange.reply.break_off();
        if !exchange.reply.is_unsent() {
            // The part that has been sent must not look like a complete response.
            exchange.client.conn.reset_on_close();
        }
        self.end();
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
    let body = fault.body(shard.config.errors);
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
    match client.send(shard, &[IoSlice::new(&out)]).await {
        Ok(()) => Next::Linger,
        Err(_) => Next::Close,
    }
}

async fn serve<N: Net>(exchange: &mut Exchange<'_, N>) -> Result<(), Fault> {
    #[cfg(debug_assertions)]
    hang_or_panic_on_request(exchange);
    let request = &exchange.request;
    let route = request.route;
    if matches!(route, Route::Intercepted(_)) {
        // A default, so that every intercepted request is counted. Replaced below once more is
        // known.
        exchange.stats.outcome = Some((Outcome::LocalPolicy, Reason::NoPrefiller));
    }
    if request.head.method == Method::Connect {
        return Err(Fault::Connect);
    }
    let expects = h1::expects_continue(&request.head, &request.bytes).map_err(Fault::Head)?;
    if let Framing::Length(length) = request.framing
        && length > exchange.shard.config.limits.body_bytes_max
    {
        return Err(Fault::BodyTooLarge);
    }
    match route {
        Route::Health => {
            let status = if exchange.shard.is_unhealthy() {
                503
            } else {
                200
            };
            exchange.respond_local(status, b"", None, None).await
        }
        Route::Form | Route::Other => {
            let inspect = match route {
                Route::Form => Inspect::Form,
                _ => Inspect::Nothing,
            };
            let decoder = choose::choose(exchange)?;
            exchange.stats.record_decoder(exchange.shard, &decoder);
            forward::forward(exchange, &decoder, inspect, expects).await
        }
        Route::Intercepted(api) => {
            let decoder = choose::choose(exchange)?;
            exchange.stats.record_decoder(exchange.shard, &decoder);
            trace::trace_forward(exchange, api);
            let mut routing = routing::read(exchange).map_err(|error| {
                exchange.stats.outcome = Some((Outcome::Failed, Reason::BadTarget));
                Fault::Target(error)
            })?;
            trace::trace_routing(exchange, &routing);
            if let Err(fault) = allowlist::admit(exchange.shard, &mut routing.prefillers) {
                exchange.stats.outcome = Some((Outcome::Failed, Reason::TargetDenied));
                exchange
                    .stats
                    .record_prefill_target(exchange.shard, &routing.prefillers[0]);
                trace::trace_denied(exchange, &routing.prefillers[0]);
                return Err(fault);
            }
            let pd = &exchange.shard.config.pd;
            let is_cut = api == Api::Chat && pd.decode_chunk_tokens.is_some();
            let is_passed = routing.is_local() && !is_cut;
            let request = &exchange.request;
            let is_read = !is_passed || !pd.trust_client_kv;
            if is_read && h1::is_coded(&request.head.fields, &request.bytes) {
                return Err(Fault::ContentCoding);
            }
            if is_passed {
                exchange.stats.outcome = Some((Outcome::LocalPolicy, Reason::NoPrefiller));
                forward::forward(exchange, &decoder, Inspect::Json, expects).await
            } else {
                flow::run(exchange, api, &mut routing, &decoder, expects).await
            }
        }
    }
}

/// Panics if the request has the field `x-ringside-test-panic`, and stops the shard forever if it
/// has `x-ringside-test-block`. This is the only way for a test of the whole program to check that
/// a panic ends only one session, and that a shard that does not run is reported. Compiled only
/// with debug assertions.
#[cfg(debug_assertions)]
#[expect(clippy::panic, reason = "the purpose of this function")]
fn hang_or_panic_on_request<N: Net>(exchange: &Exchange<'_, N>) {
    let request = &exchange.request;
    for field in &request.head.fields {
        match field
            .name
            .of(&request.bytes)
            .to_ascii_lowercase()
            .as_slice()
        {
            b"x-ringside-test-panic" => panic!("panic requested by x-ringside-test-panic"),
            b"x-ringside-test-block" => loop {
                std::thread::park();
            },
            _ => {}
        }
    }
}

/// Sends an error response if the request failed before a response was started, and decides what to
/// do with the connection.
async fn conclude<N: Net>(exchange: &mut Exchange<'_, N>, served: Result<(), Fault>) -> Next {
    let Err(fault) = served else {
        return if exchange.keep_alive {
            Next::Request
        } else {
            Next::Linger
        };
    };
    exchange.shard.count_fault(fault);
    exchange.stats.fault = Some(fault);
    if matches!(fault, Fault::ClientGone | Fault::ClientStalled) {
        let client = exchange.client;
        exchange.shard.metrics.client_left(client.phase.get());
        if exchange.reply.is_unsent() {
            exchange.stats.set_failed(Reason::ClientGone);
            client.conn.abort();
        } else {
            // The client may still read what the kernel has buffered. Reset the connection so that
            // this does not look like a complete response.
            client.conn.reset_on_close();
        }
        exchange.reply.break_off();
        return Next::Close;
    }
    exchange.stats.set_failed(fault.reason());
    if !exchange.reply.is_unsent() {
        // The response head has been sent. Only a missing end can now indicate the failure.
        exchange.reply.break_off();
        return Next::Close;
    }
    if matches!(fault, Fault::Head(_)) {
        // After a rejected head, parse nothing more from this connection.
        exchange.keep_alive = false;
    }
    if fault.keeps_framing() {
        exchange.skip_arrived_body();
    }
    let style = exchange.shard.config.errors;
    let body = fault.body_with(style, exchange.detail.as_deref());
    let responded = exchange
        .respond_local(
            fault.status(),
            body.as_bytes(),
            Some(fault.label()),
            fault.retry_after_secs(),
        )
        .await;
    match responded {
        Ok(()) if exchange.keep_alive => Next::Request,
        Ok(()) => Next::Linger,
        Err(_) => Next::Close,
    }
}

/// Records the finished request in the trace, the metrics and the access log. Returns its status
/// class and its duration in microseconds.
fn record<N: Net>(exchange: &mut Exchange<'_, N>) -> (CodeClass, u64) {
    trace::trace_end(exchange);
    let total_us = micros_since(exchange.shard.net.clock(), exchange.stats.started);
    exchange.stats.total_us = total_us;
    let now = exchange.shard.net.clock();
    access_log::record_stages(
        exchange.shard,
        &exchange.stats,
        exchange.reply.status(),
        now,
    );
    let class = match exchange.reply {
        Reply::Done(status) => CodeClass::of(status),
        _ => CodeClass::Aborted,
    };
    if let Some((outcome, reason)) = exchange.stats.outcome {
        exchange.shard.metrics.pd(outcome, reason);
    }
    let status = exchange.reply.status().unwrap_or(0);
    let (shard, client) = (exchange.shard, exchange.client);
    access_log::write(shard, client, &exchange.request, status, &exchange.stats);
    (class, total_us)
}
