//! Requests served by legs: the body is read completely, then the legs run in the order that the
//! connector prescribes.
//!
//! [`crate::pd`] decides the contents of each leg. The files here run them: encode legs first, if
//! any (`encode`), then prefill and decode in one of three orders (`serial`, `concurrent`,
//! `decode_first`).

mod bootstrap;
mod concurrent;
mod decode;
mod decode_chunks;
mod decode_first;
mod detach;
mod encode;
mod experts;
mod prefill;
mod push;
mod release;
mod serial;
mod split;
mod versions;
mod warm_up;

use std::mem;
use std::sync::Arc;

use split::Split;

use self::decode::AfterSend;
use super::body::{self, Body};
use super::exchange::Exchange;
use super::relay::{self, PendingResponse};
use super::trace;
use crate::api::Api;
use crate::config::OnPrefillFailure;
use crate::fault::Fault;
use crate::fleet::{Endpoint, Target};
use crate::json::{EditError, Kind, Level};
use crate::metrics::{Direction, Disagg, Inline, Phase};
use crate::net::{Instant, Net};
use crate::pd::connector::Transfer;
use crate::pd::routing_headers::Routing;
use crate::pd::{Leg, Order, Outcome, Reason, Role, connector, request};
use crate::span::Span;
use crate::upstream::{CallError, Deadline, Timeout};

/// Serves an intercepted request whose body must be known before its first leg is sent: reads
/// the body, runs the legs and sends the response.
pub(super) async fn run<N: Net>(
    exchange: &mut Exchange<'_, N>,
    api: Api,
    routing: &mut Routing,
    decoder: &Arc<Endpoint>,
    expects: bool,
) -> Result<(), Fault> {
    let targets = mem::take(&mut routing.prefillers);
    exchange.stats.outcome = Some(if targets.is_empty() {
        (Outcome::LocalPolicy, Reason::NoPrefiller)
    } else {
        (Outcome::Remote, Reason::None)
    });
    if expects && !exchange.request.has_body_arrived() {
        exchange.send_continue().await?;
    }
    // A variable that several waits share adds to the size of all of them. So the body is not kept
    // in one, and `respond` is a separate function.
    let source = routing.source.take();
    let body = body::receive(exchange).await?;
    exchange.stats.disagg = match (targets.is_empty(), routing.encoders.is_empty()) {
        (false, true) => Some(Disagg::PrefillDecode),
        (true, false) => Some(Disagg::EncodeDecode),
        (false, false) => Some(Disagg::EncodePrefillDecode),
        (true, true) => None,
    };
    let mut received = exchange.shard.net.clock();
    let mut split = split_of(exchange, api, body, decoder, source);
    if !routing.encoders.is_empty() {
        exchange.enter(Phase::Encode);
        encode::encode(exchange, &mut split, &routing.encoders).await?;
        // The time spent by the encoders is not overhead of the proxy.
        received = exchange.shard.net.clock();
    }
    let pending = if targets.is_empty() {
        record_request_overhead(exchange, received);
        if split.source.is_none() {
            decode_chunks::cut(exchange, &mut split);
        }
        decode_alone(exchange, &mut split).await?
    } else {
        run_legs(exchange, &mut split, &targets, received).await?
    };
    respond(exchange, split, pending).await
}

/// Returns the split request of a body that has just been received.
fn split_of<N: Net>(
    exchange: &mut Exchange<'_, N>,
    api: Api,
    body: Body,
    decoder: &Arc<Endpoint>,
    source: Option<Target>,
) -> Split {
    let removed = request::client_owned(&body.document, exchange.shard.config.pd.owned());
    if removed > 0 {
        exchange.shard.metrics.masked(removed);
    }
    if let Some(logged) = &mut exchange.stats.logged
        && let Some(model) = body.document.last(Level::Top, "model")
        && model.kind == Kind::String
    {
        let value = model.value;
        let text = Span::new(value.start + 1, value.end - 1);
        logged.model = Inline::new(text.of(body.bytes()));
    }
    let split = Split::new(exchange.shard, api, body, decoder, source);
    trace::trace_split(exchange, split.connector(), &split.pd_request());
    split
}

/// Sends the decoder's response to the client, as it is or with what the request adds to it.
async fn respond<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: Split,
    mut pending: PendingResponse<N>,
) -> Result<(), Fault> {
    if split.chunk.is_some() {
        record_refusal(exchange, pending.response.head.status);
        return Box::pin(decode_chunks::respond_in_chunks(exchange, split, pending)).await;
    }
    // The response may take minutes, and hardly any request still needs the prompt.
    let warm_up = warm_up::prepare(exchange, split, &mut pending);
    record_refusal(exchange, pending.response.head.status);
    if let Some(prompt) = pending.experts.take() {
        return Box::pin(experts::respond(exchange, pending, *prompt)).await;
    }
    Box::pin(relay::relay(exchange, pending)).await?;
    if let Some(warm_up) = warm_up {
        warm_up.begin(exchange);
    }
    Ok(())
}

/// Records that a split request was not served, if the decoder responded with an error.
fn record_refusal<N: Net>(exchange: &mut Exchange<'_, N>, status: u16) {
    match (exchange.stats.outcome, status) {
        (Some((Outcome::Remote, _)), 400..500) => exchange.stats.set_failed(Reason::ClientError),
        (Some((Outcome::Remote, _)), 500..) => exchange.stats.set_failed(Reason::Decode),
        _ => {}
    }
}

async fn run_legs<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &mut Split,
    targets: &[Target],
    received: Instant,
) -> Result<PendingResponse<N>, Fault> {
    let connector = split.connector();
    let mut local = connector::keep_local(connector, &split.pd_request());
    if local.is_none() && names_self(exchange, &targets[0]).await? {
        local = Some(Reason::SelfTarget);
    }
    record_request_overhead(exchange, received);
    if local == Some(Reason::SeveralChoices) && connector.rules().transfer == Transfer::Room {
        // The decoder refuses a request without a room, but for that.
        return Err(Fault::SeveralSequences);
    }
    if let Some(reason) = local {
        exchange.stats.outcome = Some((Outcome::LocalPolicy, reason));
        exchange.stats.disagg = split.encoded.as_ref().map(|_| Disagg::EncodeDecode);
        let leg = split.pd_request().local_leg()?;
        return decode::decode_local(exchange, split, leg, AfterSend::DropBody).await;
    }
    decode::check_refusing(exchange, split).await?;
    let order = connector.order(&split.pd_request());
    let pending = match order {
        Order::Serial => serial::serial(exchange, split, targets).await,
        Order::Concurrent => Box::pin(concurrent::concurrent(exchange, split, targets)).await,
        Order::DecodeFirst => Box::pin(decode_first::decode_first(exchange, split, targets)).await,
    };
    let fault = match pending {
        Err(fault) if may_fall_back(exchange, fault) => fault,
        pending => return pending,
    };
    exchange.shard.count_fault(fault);
    exchange.stats.outcome = Some((Outcome::LocalFallback, fault.reason()));
    let leg = split.pd_request().local_leg()?;
    decode::decode_local(exchange, split, leg, AfterSend::DropBody).await
}

/// Returns whether the decoder serves the request alone after its prefill leg failed with
/// `fault`: if `--on-prefill-failure` is `decode` and no response has been started.
fn may_fall_back<N: Net>(exchange: &Exchange<'_, N>, fault: Fault) -> bool {
    exchange.shard.config.pd.on_prefill_failure == OnPrefillFailure::Decode
        && exchange.reply.is_unsent()
        && fault.is_prefill()
}

/// Sends the request to the decoder without a prefill leg, using the encoders' outputs or a
/// prefix cached by another engine if available. Returns the decoder's response.
async fn decode_alone<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &mut Split,
) -> Result<PendingResponse<N>, Fault> {
    let pd_request = split.pd_request();
    let leg: Result<Leg, EditError> = match split.source.as_deref() {
        Some((_, source)) if split.encoded.is_none() => pd_request.source_leg(&source.params()),
        Some(_) | None => pd_request.local_leg(),
    };
    let leg = leg?;
    decode::decode_local(exchange, split, leg, AfterSend::DropBody).await
}

fn record_request_overhead<N: Net>(exchange: &mut Exchange<'_, N>, since: Instant) {
    let took = exchange.shard.net.clock().since(since).as_nanos();
    let took_ns = u64::try_from(took).unwrap_or(u64::MAX);
    exchange.shard.metrics.overhead(Direction::Request, took_ns);
    exchange.stats.proxy_ns += took_ns;
}

/// Returns whether a prefill target is this proxy or one of its decoders. Returns `false` if a
/// name does not resolve in time; the connect attempt then reports the failure.
async fn names_self<N: Net>(exchange: &Exchange<'_, N>, target: &Target) -> Result<bool, Fault> {
    let upstreams = &exchange.shard.upstreams;
    let engine = upstreams.engine(Role::Prefill, target);
    let wait = exchange.shard.config.timeouts.connect;
    let deadline = Deadline::of(exchange.shard.net.now(), wait, Timeout::Connect);
    match upstreams.addresses(exchange, engine, deadline).await {
        Ok(_) => Ok(upstreams.is_self(engine)),
        Err(CallError::Disconnected) => Err(Fault::ClientGone),
        Err(_) => Ok(false),
    }
}
