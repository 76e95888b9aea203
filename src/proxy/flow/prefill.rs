//! The prefill leg of the serial order, with its candidates and retries.

use std::rc::Rc;

use super::split::Split;
use super::{bootstrap, detach};
use crate::budget::Kept;
use crate::config::OnPrefillFailure;
use crate::fault::{Cause, Fault};
use crate::fleet::Target;
use crate::json::transform::{PromptUsage, ResponseEdit};
use crate::limits::KEPT_BYTES_MIN;
use crate::metrics::Phase;
use crate::net::{Instant, Net};
use crate::pd::connector::Bootstrap;
use crate::pd::{
    ExpertsError, Freshness, Leg, OnDisconnect, Outcome, Peer, PromptExperts, Reason, Role,
    SingleUse, Take,
};
use crate::proxy::access_log::micros_since;
use crate::proxy::body::Body;
use crate::proxy::exchange::Exchange;
use crate::proxy::leg;
use crate::proxy::relay::PendingResponse;
use crate::trace::LegTrace;
use crate::upstream::{
    Attempts, Call, CallEnd, CallError, CallTask, Connection, Deadline, Deadlines, Ended, Limits,
    Next, OwnedCall, Response, Scope, Stage, Timeout,
};

/// The parts of the prefill response that the decode leg needs.
pub(super) struct Prefilled {
    /// The handoff; `None` if the connector does not hand anything over.
    pub(super) handoff: Option<SingleUse>,
    /// Time when the head of the prefill response arrived. The engine's lease on the KV cache
    /// starts at about that time.
    pub(super) at: Instant,
    /// The handoff in the body of a decode leg that is being sent; `None` once that leg's request
    /// has been sent completely.
    pub(super) unsent_handoff: Option<Rc<Kept>>,
}

impl Prefilled {
    pub(super) fn new(handoff: Option<SingleUse>, at: Instant) -> Self {
        Self {
            handoff,
            at,
            unsent_handoff: None,
        }
    }

    /// Returns the edit that puts the prefiller's counts of the prompt's tokens into the response
    /// to a decode leg, if the leg asks for that.
    pub(super) fn usage_edit(&self, leg: &Leg) -> Option<ResponseEdit> {
        let Take::Response(Some(shape)) = leg.take else {
            return None;
        };
        let usage = self.handoff.as_ref().map(|handoff| handoff.usage);
        ResponseEdit::usage(shape, &usage.unwrap_or(PromptUsage::NONE))
    }

    /// Permits one more leg to pull the KV cache, after one that could not reach it.
    pub(super) fn renew_transfer(&mut self) {
        if let Some(handoff) = &mut self.handoff {
            handoff.renew_transfer();
        }
    }

    /// Takes the routed experts of the prompt, if the prefiller returned any.
    pub(super) fn take_experts(&mut self) -> Option<Box<Result<PromptExperts, ExpertsError>>> {
        self.handoff.as_mut()?.take_experts()
    }

    /// Returns the handoff if no engine was sent a whole request that carries it; otherwise `None`.
    pub(super) fn stranded(mut self) -> Option<Rc<Kept>> {
        let handoff = self.handoff.as_mut();
        let handoff = handoff.and_then(|handoff| handoff.take(Freshness::Fresh).ok());
        self.unsent_handoff.take().or(handoff)
    }
}

/// Result of the prefill leg.
pub(super) enum Prefill<N: Net> {
    /// The prefill succeeded: the parts of its response for the decode leg, and the engine that
    /// computed it.
    Done(Prefilled, Peer),
    /// The response for the client: the prefill engine's error response or, if both legs ran
    /// together, the decoder's response.
    Response(PendingResponse<N>),
}

/// Runs the prefill leg, with the retries that [`Attempts`] allows, and returns its last result.
/// `retries` have been used before.
pub(super) async fn prefill<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &mut Split,
    targets: &[Target],
    retries: u32,
) -> Result<Prefill<N>, Fault> {
    let shard = exchange.shard;
    let pd = &shard.config.pd;
    // No prefill is spent on a request whose handoff could not be kept.
    if !shard.budget.has_room(KEPT_BYTES_MIN as u64) {
        return Err(Fault::BudgetSpent);
    }
    let started = shard.net.now();
    let mut attempts = Attempts::new(Limits {
        candidates: targets.len(),
        retries_max: pd.prefill_retries_max.saturating_sub(retries),
        backoff: pd.prefill_retry_backoff,
        recomputes: false,
    });
    loop {
        exchange.enter(Phase::Prefill);
        let target = &targets[attempts.candidate()];
        exchange.stats.record_prefill_target(exchange.shard, target);
        exchange.stats.attempts += 1;
        let mut peer = split.peer(target);
        let ended = prefill_once(exchange, split, target, &mut peer).await;
        exchange.stats.prefill_us = micros_since(shard.net.now(), started);
        // The result of an attempt is large, so it must not be kept across an await.
        let next = match ended {
            Ok(CallEnd::Done(collected, at)) => {
                exchange.enter(Phase::BetweenLegs);
                let handoff = split.connector().handoff(collected);
                return Ok(Prefill::Done(Prefilled::new(handoff, at), peer));
            }
            Ok(CallEnd::Status(upstream, response)) => {
                let status = response.head.status;
                match attempts.next(&Ended::with(Ok(status))) {
                    Next::Stop if matches!(status, 400 | 500) && split.forces_tool() => {
                        shard.count_fault(Fault::leg(Role::Prefill, Cause::Status(status)));
                        return Ok(Prefill::Done(without_tool(shard.net.now()), peer));
                    }
                    Next::Stop => {
                        return prefill_refused(exchange, upstream, response)
                            .map(Prefill::Response);
                    }
                    next => next,
                }
            }
            Err(CallError::Other(Fault::BudgetSpent)) => {
                // Its handoff has been dropped, unless it was the list of engines.
                if split.connector().rules().bootstrap != Bootstrap::Queried {
                    shard.left_to_lease(target);
                }
                return Err(Fault::BudgetSpent);
            }
            Err(error) => match attempts.next(&Ended::with(Err(as_candidate(error)))) {
                Next::Stop => return Err(error.fault(Role::Prefill)),
                next => next,
            },
        };
        // An engine that has been sent the leg may keep its KV cache under the transfer id.
        split.rename(&shard.net);
        if let Next::After(backoff) = next {
            shard.metrics.retry();
            exchange.enter(Phase::RetryWait);
            exchange.client.pause(shard, backoff).await?;
        }
    }
}

/// Returns the result of a prefill that failed because its tool call was cut: no handoff.
fn without_tool(at: Instant) -> Prefilled {
    Prefilled::new(Some(SingleUse::none(Reason::ForcedTool)), at)
}

/// Returns the error that decides what follows: a prefiller whose bootstrap server does not respond
/// is like one that accepts no connection.
fn as_candidate(error: CallError) -> CallError {
    match error {
        CallError::Other(Fault::Leg {
            role: Role::Bootstrap,
            ..
        }) => CallError::Failed(Cause::Refused),
        other => other,
    }
}

async fn prefill_once<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
    target: &Target,
    peer: &mut Peer,
) -> Result<CallEnd<N>, CallError> {
    let pd = &exchange.shard.config.pd;
    if split.connector().rules().bootstrap == Bootstrap::Queried {
        // Boxed, because a request that waits for its prefill would be larger.
        let engine = Box::pin(bootstrap::pick_engine(
            exchange,
            target,
            peer.bootstrap_port,
        ));
        peer.engine = Some(engine.await?);
    }
    let leg = split.connector().prefill_leg(&split.pd_request(), peer);
    let leg = leg.map_err(Fault::from)?;
    let deadline = Deadline::of(exchange.shard.net.now(), pd.prefill_timeout, Timeout::Leg);
    let head = leg::spliced_head(exchange, target, &leg)?;
    let deadlines = Deadlines::all(deadline);
    if split.connector().rules().prefill_on_disconnect == OnDisconnect::RunToEnd {
        // Boxed, because hardly any connector needs it.
        let call = OwnedCall {
            target: target.clone(),
            head,
            leg,
            body: Rc::clone(&split.body),
            begun: None,
            deadlines,
            is_counted: true,
        };
        return Box::pin(run_to_end(exchange, split, peer, call)).await;
    }
    let call = Call {
        engine: exchange.shard.upstreams.engine(Role::Prefill, target),
        head: &head,
        leg: &leg,
        body: split.body.bytes(),
        is_counted: true,
    };
    let upstreams = &exchange.shard.upstreams;
    upstreams.call(exchange, &call, None, &deadlines).await
}

/// Runs a prefill leg that continues when the client disconnects.
async fn run_to_end<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
    peer: &Peer,
    call: OwnedCall<N, Body>,
) -> Result<CallEnd<N>, CallError> {
    let upstreams = &exchange.shard.upstreams;
    // The trace of the request has the leg's span, which ends here.
    let task = CallTask::call(upstreams, OnDisconnect::Cancel, LegTrace::NONE, call);
    let ended = exchange
        .until(Stage::AfterRequest, Deadline::NONE, |cx| task.poll(cx))
        .await;
    match ended.or_gone() {
        Ok(ended) => {
            if let Some(recorded) = task.recorded() {
                exchange.record_leg(Role::Prefill, recorded);
            }
            ended.unwrap_or_else(|fault| Err(fault.into()))
        }
        Err(fault) => {
            exchange.record_leg(Role::Prefill, Err(fault.label()));
            detach::prefill_leg(exchange, split, peer, task);
            Err(CallError::Disconnected)
        }
    }
}

/// Turns a prefill engine's error response into the response to the client.
///
/// Usually the engine's response itself is relayed. If prefill errors are hidden (they can
/// quote prompts), the decoder is to take over, or the status is below 200, only the status is
/// kept: it is returned as the error `Cause::Status`, with 502 instead of a status that is not
/// 4xx or 5xx.
pub(super) fn prefill_refused<N: Net>(
    exchange: &mut Exchange<'_, N>,
    upstream: Connection<N>,
    response: Response,
) -> Result<PendingResponse<N>, Fault> {
    let status = response.head.status;
    let pd = &exchange.shard.config.pd;
    let is_hidden = pd.hide_prefill_errors || pd.on_prefill_failure == OnPrefillFailure::Decode;
    // A status below 200 does not carry an error body.
    if is_hidden || status < 200 {
        let status = if (400..600).contains(&status) {
            status
        } else {
            502
        };
        return Err(Fault::leg(Role::Prefill, Cause::Status(status)));
    }
    let fault = Fault::leg(Role::Prefill, Cause::Status(status));
    exchange.stats.outcome = Some((Outcome::Failed, Reason::PrefillStatus));
    exchange.stats.fault = Some(fault);
    exchange.shard.count_fault(fault);
    Ok(PendingResponse::new((upstream, response)))
}
