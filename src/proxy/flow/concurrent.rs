//! The concurrent order: prefill and decode legs at the same time, for connectors whose engines
//! exchange data while both requests run.
//!
//! The prefill leg runs as a separate task ([`CallTask`]), the decode leg in the exchange. If the
//! prefill leg fails before the decode response is committed to the client, the decode leg is
//! cancelled and the client gets the prefill engine's error, instead of waiting for a transfer that
//! will not happen.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use super::split::Split;
use super::{decode, detach, prefill};
use crate::fault::{Cause, Fault};
use crate::fleet::Target;
use crate::metrics::Phase;
use crate::net::{Conn, Net};
use crate::pd::connector::Commit;
use crate::pd::{Leg, OnDisconnect, Peer, Role};
use crate::proxy::exchange::Exchange;
use crate::proxy::leg;
use crate::proxy::relay::PendingResponse;
use crate::upstream::{
    Attempts, CallEnd, CallError, CallTask, Connection, Deadline, Deadlines, Ended, Limits, Next,
    OwnedCall, Response, Reuse, Scope, Stage, Timeout,
};

type PrefillEnd<N> = Result<CallEnd<N>, CallError>;

/// Result of the decode leg of the concurrent order.
enum Decoded<N: Net> {
    /// The response that may now be relayed to the client, and the engine connection it arrives on.
    Responded(Connection<N>, Response),
    /// The pooled connection that the request was sent on had been closed by the engine. Both legs
    /// must be sent again.
    WasClosed,
}

/// Runs the prefill and the decode leg at the same time. Returns the decode leg's response, or the
/// prefill engine's error response if the prefill leg fails first.
pub(super) async fn concurrent<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &mut Split,
    targets: &[Target],
) -> Result<PendingResponse<N>, Fault> {
    let mut attempts = Attempts::new(Limits::ONE);
    loop {
        exchange.enter(Phase::Prefill);
        let (peer, upstream) = reach(exchange, split, targets).await?;
        exchange
            .stats
            .record_prefill_target(exchange.shard, &peer.target);
        let connector = split.connector();
        let prefill = connector.prefill_leg(&split.pd_request(), &peer)?;
        let decode = connector.decode_leg(&split.pd_request(), &peer, None)?;
        let mut task = begin_prefill(
            exchange,
            split,
            &peer.target,
            prefill,
            upstream,
            connector.rules().prefill_on_disconnect,
        )?;
        let decoded = decode_leg(exchange, split, decode, &task, &mut attempts);
        match unless_prefill_fails(decoded, &task).await {
            Ok(Ok(Decoded::Responded(upstream, response))) => {
                // The response to the prefill leg can follow later. Without a successful decode
                // leg, no decoder will fetch the prefilled KV cache.
                task.on_drop(if (200..300).contains(&response.head.status) {
                    OnDisconnect::RunToEnd
                } else {
                    OnDisconnect::Cancel
                });
                return Ok(PendingResponse::new((upstream, response)));
            }
            // The engines may have started the transfer, so the next try needs new transfer ids.
            Ok(Ok(Decoded::WasClosed)) => {
                task.on_drop(OnDisconnect::Cancel);
                exchange.shard.metrics.replay();
                split.rename(&exchange.shard.net);
            }
            Ok(Err(fault)) => {
                if !matches!(fault, Fault::ClientGone | Fault::ClientStalled) {
                    task.on_drop(OnDisconnect::Cancel);
                }
                return Err(fault);
            }
            Err(Ok(CallEnd::Status(upstream, response))) => {
                return prefill::prefill_refused(exchange, upstream, response);
            }
            Err(Ok(CallEnd::Done(..))) => return Err(Fault::Bug("a prefill that succeeded")),
            Err(Err(error)) => return Err(error.fault(Role::Prefill)),
        }
    }
}

/// Connects to the first prefill candidate that is reachable and is not this proxy or one of its
/// decoders. No engine has been sent any part of the request yet, so trying the next candidate has
/// no side effects. Fails if no candidate qualifies.
async fn reach<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
    targets: &[Target],
) -> Result<(Peer, Connection<N>), Fault> {
    let mut attempts = Attempts::new(Limits {
        candidates: targets.len(),
        ..Limits::ONE
    });
    loop {
        let target = &targets[attempts.candidate()];
        let error = match connect(exchange, target).await {
            Ok(upstream) => return Ok((split.peer(target), upstream)),
            Err(error) => error,
        };
        if attempts.next(&Ended::with(Err(error))) != Next::Other {
            return Err(error.fault(Role::Prefill));
        }
    }
}

/// Connects to a prefiller that is not this proxy or one of its decoders.
pub(super) async fn connect<N: Net>(
    exchange: &Exchange<'_, N>,
    target: &Target,
) -> Result<Connection<N>, CallError> {
    let shard = exchange.shard;
    let engine = shard.upstreams.engine(Role::Prefill, target);
    let connected = shard
        .upstreams
        .connect(exchange, engine, Reuse::Allowed, Deadline::NONE)
        .await;
    match connected {
        Ok(_) if shard.upstreams.is_self(engine) => {
            shard.upstreams.report_itself(engine);
            Err(CallError::Failed(Cause::Refused))
        }
        connected => connected,
    }
}

/// Starts the prefill leg as a task, on a connection that is already established. The recorded
/// duration of the leg therefore does not include the connect.
pub(super) fn begin_prefill<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &Split,
    target: &Target,
    leg: Leg,
    upstream: Connection<N>,
    on_disconnect: OnDisconnect,
) -> Result<CallTask<N>, Fault> {
    exchange.stats.attempts += 1;
    let shard = exchange.shard;
    let head = leg::spliced_head(exchange, target, &leg)?;
    let trace = exchange.trace.detach();
    let pd = &shard.config.pd;
    let now = shard.net.now();
    let deadline = Deadline::of(now, pd.prefill_timeout, Timeout::Leg);
    let connector = split.connector();
    let pair_wait = connector.prefill_head_wait(&pd.mori);
    let deadlines = Deadlines {
        head: deadline.or_sooner(Deadline::of(now, pair_wait, Timeout::Pair)),
        ..Deadlines::all(deadline)
    };
    let call = OwnedCall {
        target: target.clone(),
        head,
        leg,
        body: Rc::clone(&split.body),
        begun: Some(upstream),
        deadlines,
        is_counted: true,
    };
    Ok(CallTask::call(&shard.upstreams, on_disconnect, trace, call))
}

/// Returns the result of `decoded`, the decode leg, once its response may be relayed. If the
/// prefill leg fails or returns a status other than 2xx first, returns that result as the outer
/// `Err`.
async fn unless_prefill_fails<N: Net>(
    decoded: impl Future<Output = Result<Decoded<N>, Fault>>,
    task: &CallTask<N>,
) -> Result<Result<Decoded<N>, Fault>, PrefillEnd<N>> {
    let mut prefill_succeeded = false;
    let mut decoded = pin!(decoded);
    poll_fn(|cx| {
        if let Poll::Ready(decoded) = decoded.as_mut().poll(cx) {
            return Poll::Ready(Ok(decoded));
        }
        if prefill_succeeded {
            return Poll::Pending;
        }
        match task.poll(cx) {
            Poll::Ready(Ok(Ok(CallEnd::Done(..)))) => {
                prefill_succeeded = true;
                // Poll the decode leg again, because it may be waiting for this success.
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Poll::Ready(Ok(ended)) => Poll::Ready(Err(ended)),
            Poll::Ready(Err(fault)) => Poll::Ready(Err(Err(fault.into()))),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Runs the decode leg until its response may be relayed.
async fn decode_leg<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &Split,
    leg: Leg,
    task: &CallTask<N>,
    attempts: &mut Attempts,
) -> Result<Decoded<N>, Fault> {
    let rule = split.connector().rules().decode_on_disconnect;
    let upstream = decode::connect_decoder(exchange, split, attempts.reuse()).await?;
    let sent = decode::decode_once(exchange, &upstream, split, &leg, Deadline::NONE);
    let response = match sent.await {
        Ok(response) => response,
        Err(CallError::Disconnected) => {
            let response = Response::default();
            return Err(detach::decode_leg(exchange, rule, upstream, response));
        }
        Err(error) => {
            let ended = upstream.ended(Err(error), exchange.shard.net.now());
            return match attempts.next(&ended) {
                Next::Replay => Ok(Decoded::WasClosed),
                _ => {
                    upstream.report_failed(&exchange.shard.upstreams, error);
                    Err(error.fault(Role::Decode))
                }
            };
        }
    };
    match commit(exchange, split, &upstream, &response, task).await {
        Ok(()) => Ok(Decoded::Responded(upstream, response)),
        Err(Fault::ClientGone) => {
            if detach::has_begun(&upstream, &response) {
                task.record_first_byte();
            }
            Err(detach::decode_leg(exchange, rule, upstream, response))
        }
        Err(fault) => Err(fault),
    }
}

/// Waits until the decode response, whose head has arrived, may be relayed to the client:
/// immediately if it is an error response; otherwise once the prefill leg has succeeded or, for
/// connectors that allow it, the first body byte has arrived.
async fn commit<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
    upstream: &Connection<N>,
    response: &Response,
    task: &CallTask<N>,
) -> Result<(), Fault> {
    let by_first_byte = split.connector().rules().commit == Commit::OnFirstByte;
    if !response.rest().is_empty() {
        task.record_first_byte();
    }
    let is_success = (200..300).contains(&response.head.status);
    if !is_success || (by_first_byte && !response.rest().is_empty()) {
        return Ok(());
    }
    let conn = upstream.conn();
    exchange
        .until(Stage::AfterRequest, Deadline::NONE, |cx| {
            let has_succeeded = task.has_succeeded(cx);
            let has_byte = by_first_byte && conn.poll_readable(cx).is_ready();
            if has_succeeded || has_byte {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await
        .or_gone()
}
