//! NIXL push with legs that start together, for prefillers whose identity is known.
//!
//! The decoder gets the identity of the prefiller instead of a handoff and registers its blocks
//! with it while the prompt is computed. Its response is relayed once the prefiller has confirmed
//! the identity. After any failure, the identity is not used until another handoff confirms it.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::task::Poll;

use super::decode::{self, AfterSend};
use super::prefill::{self, Prefill, Prefilled};
use super::split::Split;
use super::{concurrent, detach};
use crate::config::OnDecodeKvError;
use crate::fault::{Fault, Incident};
use crate::fleet::Target;
use crate::metrics::{Phase, Push};
use crate::net::{Conn, Instant, Net};
use crate::pd::push::PushIdentity;
use crate::pd::{Leg, OnDisconnect, Outcome, Peer, Reason, Role, SingleUse};
use crate::proxy::access_log::micros_since;
use crate::proxy::exchange::Exchange;
use crate::proxy::push_book::Learned;
use crate::proxy::relay::PendingResponse;
use crate::upstream::{
    Attempts, CallEnd, CallError, CallTask, Connection, Deadline, Ended, Limits, Next, Response,
    Reuse, Scope, Stage,
};

/// Fate of both legs when the client disconnects, as with other connectors that write into the
/// decoder's memory: a decoder does not reuse blocks that it has registered until they are written.
const ON_DISCONNECT: OnDisconnect = OnDisconnect::UntilFirstByte;

/// Returns the identity of the first prefill candidate, if the legs of the request can be started
/// together.
pub(super) fn identity<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
    targets: &[Target],
) -> Option<PushIdentity> {
    let shard = exchange.shard;
    // Later chunks of a chunked decode follow a handoff that they no longer carry.
    let is_chunked = shard.config.pd.decode_chunk_tokens.is_some();
    if !split.connector().rules().learns_push || is_chunked {
        return None;
    }
    let now = || shard.net.now();
    let identity = shard.push_book.borrow().get(&targets[0], now);
    // The serial order decodes a forced tool call alone that its prefiller cannot compute.
    identity.filter(|_| !split.forces_tool())
}

/// Stores the identity in a handoff, if it has one.
pub(super) fn learn<N: Net>(exchange: &Exchange<'_, N>, prefiller: &Target, handoff: &SingleUse) {
    let shard = exchange.shard;
    let Some(identity) = handoff.push() else {
        return;
    };
    let now = shard.net.now();
    let mut book = shard.push_book.borrow_mut();
    match book.learn(prefiller, identity, now) {
        Learned::Plain => {}
        Learned::Changed => shard.metrics.push(Push::Changed),
        Learned::Unstable => {
            shard.metrics.push(Push::Changed);
            shard.metrics.push(Push::Serial);
            shard.report(Incident::PushUnstable(prefiller.clone()));
        }
    }
}

/// Result of the legs that were to start together.
enum Pushed<N: Net> {
    /// The response for the client, or the result of the prefill leg if the decode leg must be sent
    /// afterwards.
    Ended(Box<Prefill<N>>),
    /// The legs must run in the serial order, beginning with the prefill leg, of which this number
    /// of retries has been used.
    Serial { retries: u32 },
}

impl<N: Net> Pushed<N> {
    fn ended(prefill: Prefill<N>) -> Self {
        Self::Ended(Box::new(prefill))
    }
}

/// The legs of a request whose prefill leg has been started.
struct Begun<N: Net> {
    peer: Peer,
    decoder: Connection<N>,
    decode_leg: Leg,
    task: CallTask<N>,
    /// Start of the prefill leg.
    started: Instant,
}

/// Result of a prefill leg that ran concurrently with its decode leg.
enum Checked<N: Net> {
    /// The prefill succeeded, and its handoff has the expected identity.
    Confirmed(Prefilled),
    /// The prefill succeeded, but the decode leg has another identity than its handoff.
    Other(Prefilled),
    /// The prefill failed.
    Failed(Result<CallEnd<N>, CallError>),
}

/// Runs the prefill leg, and the decode leg at the same time if the prefiller can be reached.
/// Returns the response for the client, or the result of the prefill leg if the decode leg must be
/// sent afterwards.
pub(super) async fn prefill<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &mut Split,
    targets: &[Target],
    identity: &PushIdentity,
) -> Result<Prefill<N>, Fault> {
    match push(exchange, split, targets, identity).await? {
        Pushed::Ended(prefill) => Ok(*prefill),
        Pushed::Serial { retries } => prefill::prefill(exchange, split, targets, retries).await,
    }
}

/// Runs both legs at the same time.
async fn push<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &mut Split,
    targets: &[Target],
    identity: &PushIdentity,
) -> Result<Pushed<N>, Fault> {
    let target = &targets[0];
    let Some(begun) = begin(exchange, split, target, identity).await? else {
        return Ok(Pushed::Serial { retries: 0 });
    };
    let Begun {
        peer,
        decoder,
        decode_leg,
        mut task,
        started,
    } = begun;
    let mut confirmed = None;
    let sent = decode::decode_once(exchange, &decoder, split, &decode_leg, Deadline::NONE);
    let ended = |ended| check(split, identity, ended);
    let sent = unless_other(sent, &task, ended, &mut confirmed);
    let response = match sent.await {
        Ok(Ok(response)) => response,
        Ok(Err(CallError::Disconnected)) => {
            let response = Response::default();
            return Err(leave(exchange, decoder, response, &task));
        }
        Ok(Err(error)) => {
            let ended = decoder.ended(Err(error), exchange.shard.net.now());
            if Attempts::new(Limits::ONE).next(&ended) != Next::Replay {
                distrust(exchange, target);
                task.on_drop(OnDisconnect::Cancel);
                decoder.report_failed(&exchange.shard.upstreams, error);
                return Err(error.fault(Role::Decode));
            }
            // The decoder has registered nothing. Its leg is sent again with the handoff.
            exchange.shard.metrics.replay();
            task.on_drop(OnDisconnect::Cancel);
            let checked = match confirmed {
                Some(prefilled) => Checked::Confirmed(prefilled),
                None => check(split, identity, ended_prefill(exchange, &task).await?),
            };
            return after_prefill(exchange, targets, peer, checked, started).await;
        }
        Err(checked) => {
            decoder.conn().reset_on_close();
            return after_prefill(exchange, targets, peer, checked, started).await;
        }
    };
    let status = response.head.status;
    if !(200..300).contains(&status) {
        // The decoder does not take what the prefiller computes.
        cancel(task);
        return refused(exchange, split, &peer, (decoder, response)).await;
    }
    let mut prefilled = match confirmed {
        Some(prefilled) => prefilled,
        None => match ended_prefill(exchange, &task).await {
            Ok(ended) => match check(split, identity, ended) {
                Checked::Confirmed(prefilled) => prefilled,
                checked => {
                    decoder.conn().reset_on_close();
                    return after_prefill(exchange, targets, peer, checked, started).await;
                }
            },
            Err(_) => return Err(leave(exchange, decoder, response, &task)),
        },
    };
    exchange.stats.prefill_us = micros_since(prefilled.at, started);
    let usage = prefilled.usage_edit(&decode_leg);
    let mut pending = decode::pending(decoder, response, usage);
    pending.experts = prefilled.take_experts();
    Ok(Pushed::ended(Prefill::Response(pending)))
}

/// Connects to both engines and starts the prefill leg. Returns `None` if the prefiller cannot be
/// reached: the serial order has the rules for that.
async fn begin<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &Split,
    target: &Target,
    identity: &PushIdentity,
) -> Result<Option<Begun<N>>, Fault> {
    exchange.enter(Phase::Prefill);
    let prefiller = match concurrent::connect(exchange, target).await {
        Ok(prefiller) => prefiller,
        Err(CallError::Disconnected) => return Err(Fault::ClientGone),
        Err(_) => return Ok(None),
    };
    let started = exchange.shard.net.now();
    exchange.stats.record_prefill_target(exchange.shard, target);
    let peer = split.peer(target);
    let request = split.pd_request();
    let mut leg = split.connector().prefill_leg(&request, &peer)?;
    leg.request_id = Some(request.uuid);
    let decode_leg = request.push_leg(identity)?;
    let decoder = decode::connect_decoder(exchange, split, Reuse::Allowed).await?;
    exchange.shard.metrics.push(Push::Concurrent);
    let task = concurrent::begin_prefill(exchange, split, target, leg, prefiller, ON_DISCONNECT)?;
    Ok(Some(Begun {
        peer,
        decoder,
        decode_leg,
        task,
        started,
    }))
}

/// Waits for the result of the decode leg, `sent`. If the prefill leg ends first and confirms the
/// identity, stores its result in `confirmed` and continues to wait. If it ends otherwise, returns
/// that as the outer `Err`, and the decode leg ends.
async fn unless_other<N: Net>(
    sent: impl Future<Output = Result<Response, CallError>>,
    task: &CallTask<N>,
    check: impl Fn(Result<CallEnd<N>, CallError>) -> Checked<N>,
    confirmed: &mut Option<Prefilled>,
) -> Result<Result<Response, CallError>, Checked<N>> {
    let mut sent = pin!(sent);
    poll_fn(|cx| {
        if let Poll::Ready(response) = sent.as_mut().poll(cx) {
            return Poll::Ready(Ok(response));
        }
        if confirmed.is_some() {
            return Poll::Pending;
        }
        let ended = match task.poll(cx) {
            Poll::Ready(Ok(ended)) => ended,
            Poll::Ready(Err(fault)) => Err(fault.into()),
            Poll::Pending => return Poll::Pending,
        };
        match check(ended) {
            Checked::Confirmed(prefilled) => {
                *confirmed = Some(prefilled);
                Poll::Pending
            }
            checked => Poll::Ready(Err(checked)),
        }
    })
    .await
}

/// Waits for the end of the prefill leg. Fails if the client disconnects.
async fn ended_prefill<N: Net>(
    exchange: &Exchange<'_, N>,
    task: &CallTask<N>,
) -> Result<Result<CallEnd<N>, CallError>, Fault> {
    let ended = exchange
        .until(Stage::AfterRequest, Deadline::NONE, |cx| task.poll(cx))
        .await
        .or_gone()?;
    Ok(ended.unwrap_or_else(|fault| Err(fault.into())))
}

fn check<N: Net>(
    split: &Split,
    identity: &PushIdentity,
    ended: Result<CallEnd<N>, CallError>,
) -> Checked<N> {
    match ended {
        Ok(CallEnd::Done(collected, at)) => {
            let handoff = split.connector().handoff(collected);
            let has_identity = handoff.as_ref().and_then(SingleUse::push) == Some(identity);
            let prefilled = Prefilled::new(handoff, at);
            if has_identity {
                Checked::Confirmed(prefilled)
            } else {
                Checked::Other(prefilled)
            }
        }
        failed => Checked::Failed(failed),
    }
}

/// Continues after a prefill leg whose decode leg has ended without a response.
async fn after_prefill<N: Net>(
    exchange: &mut Exchange<'_, N>,
    targets: &[Target],
    peer: Peer,
    checked: Checked<N>,
    started: Instant,
) -> Result<Pushed<N>, Fault> {
    if !matches!(checked, Checked::Confirmed(_)) {
        // Another identity is learned by the serial order, from the handoff.
        distrust(exchange, &targets[0]);
    }
    let ended = match checked {
        Checked::Confirmed(prefilled) | Checked::Other(prefilled) => {
            exchange.stats.prefill_us = micros_since(prefilled.at, started);
            exchange.enter(Phase::BetweenLegs);
            return Ok(Pushed::ended(Prefill::Done(prefilled, peer)));
        }
        Checked::Failed(ended) => ended,
    };
    let pd = &exchange.shard.config.pd;
    let mut attempts = Attempts::new(Limits {
        candidates: targets.len(),
        retries_max: pd.prefill_retries_max,
        backoff: pd.prefill_retry_backoff,
        ..Limits::ONE
    });
    let result = match &ended {
        Ok(CallEnd::Status(_, response)) => Ok(response.head.status),
        Ok(CallEnd::Done(..)) => return Err(Fault::Bug("a prefill that succeeded")),
        Err(error) => Err(*error),
    };
    match attempts.next(&Ended::with(result)) {
        Next::Stop => {}
        Next::After(backoff) => {
            drop(ended);
            exchange.shard.metrics.retry();
            exchange.enter(Phase::RetryWait);
            exchange.client.pause(exchange.shard, backoff).await?;
            return Ok(Pushed::Serial { retries: 1 });
        }
        _ => return Ok(Pushed::Serial { retries: 0 }),
    }
    match ended {
        Ok(CallEnd::Status(upstream, response)) => {
            let pending = prefill::prefill_refused(exchange, upstream, response)?;
            Ok(Pushed::ended(Prefill::Response(pending)))
        }
        Ok(CallEnd::Done(..)) => Err(Fault::Bug("a prefill that succeeded")),
        Err(error) => Err(error.fault(Role::Prefill)),
    }
}

/// Returns the decoder's error response; or, if it means that the KV cache was not received and
/// `--on-decode-kv-error` is `recompute`, the response to the request without transfer parameters.
async fn refused<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &mut Split,
    peer: &Peer,
    refusal: (Connection<N>, Response),
) -> Result<Pushed<N>, Fault> {
    let pd = &exchange.shard.config.pd;
    let mut attempts = Attempts::new(Limits {
        recomputes: pd.on_decode_kv_error == OnDecodeKvError::Recompute,
        ..Limits::ONE
    });
    let status = refusal.1.head.status;
    if status >= 500 {
        distrust(exchange, &peer.target);
    }
    let ended = Ended {
        carries_handoff: true,
        ..refusal.0.ended(Ok(status), exchange.shard.net.now())
    };
    if attempts.next(&ended) != Next::WithoutHandoff {
        let pending = PendingResponse::new(refusal);
        return Ok(Pushed::ended(Prefill::Response(pending)));
    }
    drop(refusal);
    exchange.stats.outcome = Some((Outcome::LocalFallback, Reason::DecodeKvError));
    let leg = split
        .connector()
        .decode_leg(&split.pd_request(), peer, None)?;
    let pending = decode::decode_local(exchange, split, leg, AfterSend::DropBody).await?;
    Ok(Pushed::ended(Prefill::Response(pending)))
}

fn cancel<N: Net>(mut task: CallTask<N>) {
    task.on_drop(OnDisconnect::Cancel);
}

fn distrust<N: Net>(exchange: &Exchange<'_, N>, prefiller: &Target) {
    let shard = exchange.shard;
    shard.push_book.borrow_mut().distrust(prefiller);
    shard.metrics.push(Push::Failed);
}

fn leave<N: Net>(
    exchange: &Exchange<'_, N>,
    decoder: Connection<N>,
    response: Response,
    task: &CallTask<N>,
) -> Fault {
    if detach::has_begun(&decoder, &response) {
        task.record_first_byte();
    }
    detach::decode_leg(exchange, ON_DISCONNECT, decoder, response)
}
