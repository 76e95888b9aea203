//! The decode leg, alone or following a prefill leg whose handoff it carries.
//!
//! A handoff can be used once and only while it is fresh; a stale or used one returns another
//! prompt's text with HTTP 200 (`docs/engines.md#handoffs`). A decode leg is repeated at most once,
//! and the repeat never carries the handoff. Reasons for a repeat are a pooled connection that
//! turned out to be closed, a handoff that became stale during the send, and a decoder that failed
//! to load the handed-over KV cache.

use std::mem;
use std::rc::Rc;

use super::prefill::Prefilled;
use super::split::Split;
use super::{bootstrap, detach, release};
use crate::budget::Kept;
use crate::config::{OnDecodeKvError, OnMissingKv};
use crate::fault::{Cause, Fault, Trouble};
use crate::h1::{self, Method};
use crate::json::Splices;
use crate::json::transform::ResponseEdit;
use crate::limits::KEPT_STEP_BYTES;
use crate::metrics::Phase;
use crate::net::{Conn, Net};
use crate::pd::connector::Bootstrap;
use crate::pd::{Collected, Freshness, Leg, OnDisconnect, Outcome, Peer, Reason, Role, Take};
use crate::proxy::exchange::Exchange;
use crate::proxy::leg;
use crate::proxy::relay::PendingResponse;
use crate::proxy::shard::Shard;
use crate::upstream::{
    Attempts, Call, CallError, Connection, Deadline, Deadlines, Ended, Limits, Next, Response,
    Reuse, Scope, Stage, Timeout,
};

/// Returns a connection to the decoder of the request. Bounded by the connect timeout only.
pub(super) async fn connect_decoder<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
    reuse: Reuse,
) -> Result<Connection<N>, Fault> {
    let started = &exchange.stats.decode_started;
    started.set(started.get().or(Some(exchange.shard.net.now())));
    dial(exchange, split, reuse).await
}

async fn dial<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
    reuse: Reuse,
) -> Result<Connection<N>, Fault> {
    let shard = exchange.shard;
    let target = &split.decoder.target;
    let engine = shard.upstreams.engine(Role::Decode, target);
    let connected = shard
        .upstreams
        .connect(exchange, engine, reuse, Deadline::NONE);
    let connected = connected.await;
    if let Err(error) = &connected
        && error.is_refused()
    {
        shard.refusing.borrow_mut().put(target, (), shard.net.now());
    }
    connected.map_err(|error| error.fault(Role::Decode))
}

/// Checks, before a prefill is spent on it, that a decoder accepts connections which has refused
/// the last one.
///
/// # Errors
/// It still does not.
pub(super) async fn check_refusing<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
) -> Result<(), Fault> {
    let (shard, target) = (exchange.shard, &split.decoder.target);
    let refused = shard.refusing.borrow().get(target, || shard.net.now());
    if refused.is_none() {
        return Ok(());
    }
    // Boxed, because hardly any request needs it.
    drop(Box::pin(dial(exchange, split, Reuse::Never)).await?);
    shard.refusing.borrow_mut().forget(target);
    Ok(())
}

/// Whether the body of a request is needed after the decoder has received its leg.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AfterSend {
    /// Another leg may be built from it.
    KeepBody,
    /// It is dropped if it is large and the leg need not be sent again: the decoder may take long
    /// to respond, while others need the memory.
    DropBody,
}

impl AfterSend {
    fn of(self, split: &Split) -> Self {
        // The other chunks are built from it.
        if split.chunk.is_some() || split.body.bytes().len() < KEPT_STEP_BYTES {
            Self::KeepBody
        } else {
            self
        }
    }
}

/// Sends a request to the decoder alone, without a prefill leg, and waits for the response head. A
/// request on a pooled connection that turns out to be closed is sent once more.
pub(super) async fn decode_local<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &mut Split,
    mut leg: Leg,
    after_send: AfterSend,
) -> Result<PendingResponse<N>, Fault> {
    let mut attempts = Attempts::new(Limits::ONE);
    loop {
        let upstream = connect_decoder(exchange, split, attempts.reuse()).await?;
        let decoded = match after_send.of(split) {
            AfterSend::KeepBody => {
                decode_once(exchange, &upstream, split, &leg, Deadline::NONE).await
            }
            AfterSend::DropBody => {
                // Boxed, because only large bodies need it.
                Box::pin(decode_and_drop(exchange, &upstream, split, &mut leg)).await
            }
        };
        match decoded {
            Ok(response) => return Ok(PendingResponse::new((upstream, response))),
            Err(error) => {
                let ended = Ended {
                    can_resend: !leg.body.is_empty(),
                    ..upstream.ended(Err(error), exchange.shard.net.now())
                };
                if attempts.next(&ended) != Next::Replay {
                    upstream.report_failed(&exchange.shard.upstreams, error);
                    return Err(error.fault(Role::Decode));
                }
                exchange.shard.metrics.replay();
            }
        }
    }
}

/// Sends the decode leg that follows a prefill leg and waits for the response head. Repeats the leg
/// at most once (reasons in the module documentation), and keeps the body for that until then.
pub(super) async fn decode<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &Split,
    peer: &mut Peer,
    prefilled: &mut Prefilled,
) -> Result<PendingResponse<N>, Fault> {
    let rules = split.connector().rules();
    let mut may_query_again = rules.bootstrap == Bootstrap::Queried;
    let mut attempts = Attempts::new(Limits {
        recomputes: exchange.shard.config.pd.on_decode_kv_error == OnDecodeKvError::Recompute,
        ..Limits::ONE
    });
    let mut repeated = false;
    loop {
        // Connect first: the handoff must be fresh when it is sent, not when the connect starts.
        let upstream = connect_decoder(exchange, split, attempts.reuse()).await?;
        let (leg, carries_handoff) = decode_leg(exchange, split, peer, prefilled, repeated)?;
        let deadline = if carries_handoff {
            freshness_deadline(exchange, prefilled)
        } else {
            Deadline::NONE
        };
        let decoded = decode_once(exchange, &upstream, split, &leg, deadline).await;
        let sent = prefilled.unsent_handoff.take_if(|_| upstream.is_sent());
        if carries_handoff && matches!(decoded, Err(CallError::Disconnected)) {
            let rule = rules.decode_on_disconnect;
            return Err(detach::decode_leg(
                exchange,
                rule,
                upstream,
                Response::default(),
            ));
        }
        let is_failure = decoded
            .as_ref()
            .is_ok_and(|response| response.head.status >= 500);
        if carries_handoff
            && is_failure
            && mem::take(&mut may_query_again)
            && Box::pin(bootstrap::engine_id_changed(exchange, peer)).await?
        {
            // The prefilled KV cache is still there, under the new id of the engine.
            prefilled.renew_transfer();
            continue;
        }
        let result = decoded.as_ref().map(|response| response.head.status);
        let ended = Ended {
            carries_handoff,
            ..upstream.ended(result.map_err(|error| *error), exchange.shard.net.now())
        };
        match (attempts.next(&ended), decoded) {
            (Next::Replay, _) => exchange.shard.metrics.replay(),
            (Next::WithoutHandoff, Ok(_)) => {
                exchange.stats.outcome = Some((Outcome::LocalFallback, Reason::DecodeKvError));
                repeated = true;
            }
            // The decoder accepted the request too slowly. It has received only part of it.
            (Next::WithoutHandoff, Err(_)) => {
                upstream.conn().reset_on_close();
                decode_without_handoff(exchange, Reason::StaleKv)?;
                repeated = true;
            }
            (Next::Other | Next::After(_) | Next::Stop, Ok(response)) => {
                release_refused(exchange, split, peer, sent, &response);
                let mut pending = pending(upstream, response, prefilled.usage_edit(&leg));
                if carries_handoff {
                    pending.experts = prefilled.take_experts();
                }
                return Ok(pending);
            }
            (Next::Other | Next::After(_) | Next::Stop, Err(error)) => {
                upstream.report_failed(&exchange.shard.upstreams, error);
                return Err(error.fault(Role::Decode));
            }
        }
    }
}

/// Waits for the first byte of the body of a successful response, if a transfer to the decoder must
/// not be cancelled before (`rule`). If the client disconnects, the leg continues until then.
pub(super) async fn after_first_byte<N: Net>(
    exchange: &Exchange<'_, N>,
    rule: OnDisconnect,
    pending: PendingResponse<N>,
) -> Result<PendingResponse<N>, Fault> {
    let (upstream, response) = (&pending.upstream, &pending.response);
    let is_success = (200..300).contains(&response.head.status);
    if !is_success || detach::has_begun(upstream, response) {
        return Ok(pending);
    }
    let conn = upstream.conn();
    let begun = exchange
        .until(Stage::AfterRequest, Deadline::NONE, |cx| {
            conn.poll_readable(cx)
        })
        .await;
    match begun.or_gone() {
        Ok(()) => Ok(pending),
        Err(_) => {
            let PendingResponse {
                upstream, response, ..
            } = pending;
            Err(detach::decode_leg(exchange, rule, upstream, response))
        }
    }
}

/// Releases a handoff that was sent with a request which the decoder has refused. A decoder that
/// refuses a body by its schema does not notify the prefiller itself.
fn release_refused<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
    peer: &Peer,
    sent: Option<Rc<Kept>>,
    response: &Response,
) {
    if let Some(handoff) = sent
        && (400..500).contains(&response.head.status)
        && split.connector().rules().releases_refused
    {
        release::count_stranded(exchange, split, peer, &handoff);
    }
}

/// Returns the response to a decode leg for the client, with an edit of its counts, if given.
pub(super) fn pending<N: Net>(
    upstream: Connection<N>,
    response: Response,
    usage: Option<ResponseEdit>,
) -> PendingResponse<N> {
    let mut pending = PendingResponse::new((upstream, response));
    pending.edits.extend(usage);
    pending
}

/// Returns the deadline for sending a decode leg that carries the handoff: the time when the
/// handoff becomes stale.
fn freshness_deadline<N: Net>(exchange: &Exchange<'_, N>, prefilled: &Prefilled) -> Deadline {
    let age_max = exchange.shard.config.pd.handoff_age_max;
    Deadline::of(prefilled.at, Some(age_max), Timeout::Handoff)
}

/// Builds the decode leg to send next and returns whether it carries the handoff. Only the
/// first leg carries it, and only while the handoff is fresh. `repeated` means that the reason
/// for sending the leg without the handoff has already been recorded.
fn decode_leg<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &Split,
    peer: &Peer,
    prefilled: &mut Prefilled,
    repeated: bool,
) -> Result<(Leg, bool), Fault> {
    if let Some(handoff) = prefilled.unsent_handoff.take() {
        // The leg that carried it was not sent completely.
        release::count_stranded(exchange, split, peer, &handoff);
    }
    let pd = &exchange.shard.config.pd;
    let handoff = match &mut prefilled.handoff {
        None => None,
        Some(handoff) => {
            let age = exchange.shard.net.now().since(prefilled.at);
            match handoff.take(Freshness::of(age, pd.handoff_age_max)) {
                Ok(handoff) => Some(handoff),
                Err(reason) => {
                    if reason == Reason::StaleKv {
                        // Its lease may have expired and its blocks may hold another request's
                        // KV cache by now, so it must not be released explicitly.
                        exchange.shard.left_to_lease(&peer.target);
                    }
                    if !repeated {
                        decode_without_handoff(exchange, reason)?;
                    }
                    None
                }
            }
        }
    };
    let leg = split
        .connector()
        .decode_leg(&split.pd_request(), peer, handoff.as_ref());
    let carries = handoff.is_some();
    prefilled.unsent_handoff = handoff;
    Ok((leg?, carries))
}

/// Records the reason why the decoder must compute the prompt itself, without a handoff. Fails
/// if `--on-missing-kv` is `error`.
fn decode_without_handoff<N: Net>(
    exchange: &mut Exchange<'_, N>,
    reason: Reason,
) -> Result<(), Fault> {
    if exchange.shard.config.pd.on_missing_kv == OnMissingKv::Error {
        exchange.stats.outcome = Some((Outcome::Failed, reason));
        return Err(Fault::HandoffMissing);
    }
    exchange.stats.outcome = Some((Outcome::LocalFallback, reason));
    Ok(())
}

/// Counts an attempt to send a decode leg, and returns the head of its request.
fn begin_attempt<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &Split,
    leg: &Leg,
) -> Result<Vec<u8>, CallError> {
    exchange.enter(Phase::FirstByte);
    exchange.stats.attempts += 1;
    Ok(leg::spliced_head(exchange, &split.decoder.target, leg)?)
}

/// Returns the call that sends a decode leg with this head.
fn call<'a, N: Net>(
    shard: &'a Shard<N>,
    split: &'a Split,
    leg: &'a Leg,
    head: &'a [u8],
) -> Call<'a> {
    let target = &split.decoder.target;
    Call {
        engine: shard.upstreams.engine(Role::Decode, target),
        head,
        leg,
        body: split.body.bytes(),
        is_counted: true,
    }
}

/// Sends a decode leg on a connection and waits for the response head.
pub(super) async fn decode_once<N: Net>(
    exchange: &mut Exchange<'_, N>,
    upstream: &Connection<N>,
    split: &Split,
    leg: &Leg,
    send: Deadline,
) -> Result<Response, CallError> {
    let head = begin_attempt(exchange, split, leg)?;
    let call = call(exchange.shard, split, leg, &head);
    let deadlines = Deadlines {
        send,
        ..Deadlines::NONE
    };
    let upstreams = &exchange.shard.upstreams;
    upstreams
        .respond(exchange, upstream, &call, &deadlines)
        .await
}

/// As [`decode_once`], but drops the body once the decoder has received the request and it need not
/// be sent again.
async fn decode_and_drop<N: Net>(
    exchange: &mut Exchange<'_, N>,
    upstream: &Connection<N>,
    split: &mut Split,
    leg: &mut Leg,
) -> Result<Response, CallError> {
    let head = begin_attempt(exchange, split, leg)?;
    let call = call(exchange.shard, split, leg, &head);
    let upstreams = &exchange.shard.upstreams;
    let awaited = upstreams
        .respond_until_safe(exchange, upstream, &call)
        .await?;
    if upstream.is_sent() && !awaited.is_complete() {
        leg.body = Splices::default();
        split.drop_body(exchange.shard);
    }
    upstreams.respond_after(exchange, upstream, awaited).await
}

/// Reads the body of a decode response completely. Fails if it has a content coding or is not valid
/// JSON.
pub(super) async fn read_whole<N: Net>(
    exchange: &Exchange<'_, N>,
    pending: PendingResponse<N>,
) -> Result<Kept, Fault> {
    let PendingResponse {
        upstream,
        mut response,
        ..
    } = pending;
    let upstreams = &exchange.shard.upstreams;
    let slot = upstream.slot();
    let framing = h1::response_framing(Method::Post, &response.head, &response.bytes);
    response.framing = framing.map_err(|_| {
        upstreams.report(slot, Trouble::BadResponse);
        Fault::leg(Role::Decode, Cause::BadResponse)
    })?;
    if response.is_coded() {
        upstreams.report(slot, Trouble::BadResponse);
        return Err(Fault::leg(Role::Decode, Cause::Unusable));
    }
    let status = response.head.status;
    let read = upstreams.read_response(exchange, upstream, response, Take::Whole, Deadline::NONE);
    let read = read.await;
    if status < 500 {
        upstreams.report_end(slot, read.as_ref().map(|_| status).map_err(|error| *error));
    }
    let taken = read.map_err(|fault| match fault {
        CallError::Failed(Cause::BadResponse) => Fault::leg(Role::Decode, Cause::Unusable),
        other => other.fault(Role::Decode),
    })?;
    match taken {
        Collected::Whole(bytes) => Ok(bytes),
        Collected::Handoff(_) | Collected::Nothing => {
            Err(Fault::Bug("a decode response was not collected"))
        }
    }
}
