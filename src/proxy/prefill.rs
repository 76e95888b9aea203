//! The prefill leg of the serial order, with its candidates and retries.

use std::ops::ControlFlow;
use std::time::Duration;

use super::exchange::{Exchange, micros_since};
use super::relay::Rewrite;
use super::split::{PendingResponse, Split};
use crate::config::OnPrefillFailure;
use crate::fault::{Cause, Fault};
use crate::fleet::Target;
use crate::h1::Framing;
use crate::metrics::Phase;
use crate::net::{Instant, Net};
use crate::pd::{Freshness, Leg, Outcome, Peer, Reason, Role, SingleUse, Take};
use crate::upstream::call::Attempt;
use crate::upstream::call::Call;
use crate::upstream::call::Deadlines;
use crate::upstream::connection::Connection;
use crate::upstream::error::CallError;
use crate::upstream::response::Response;
use crate::upstream::wait::{Deadline, Timeout};

/// Buffer capacity in bytes reserved for the fields that a leg's head has in addition to the
/// client's: ids, addresses and the body length. More than these fields need.
const LEG_HEAD_EXTRA_BYTES: usize = 192;

/// The parts of the prefill response that the decode leg needs.
pub(super) struct Prefilled {
    /// The handoff; `None` if the connector does not hand anything over.
    pub(super) handoff: Option<SingleUse>,
    /// Time when the head of the prefill response arrived. The engine's lease on the KV cache
    /// starts at about that time.
    pub(super) at: Instant,
    /// The handoff in the body of a decode leg that is being sent; `None` once that leg's request
    /// has been sent completely.
    pub(super) unsent_handoff: Option<Vec<u8>>,
}

impl Prefilled {
    fn new(handoff: Option<SingleUse>, at: Instant) -> Self {
        Self {
            handoff,
            at,
            unsent_handoff: None,
        }
    }

    /// Returns the handoff if no engine was sent a whole request that carries it; otherwise `None`.
    fn stranded(mut self) -> Option<Vec<u8>> {
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
    /// The prefill engine's error response, to be relayed to the client.
    Refused(PendingResponse<N>),
}

impl<N: Net> Exchange<'_, N> {
    /// Runs a prefill leg, then a decode leg built from its response. Returns the decoder's
    /// response, or the prefill engine's error response.
    pub(super) async fn serial(
        &mut self,
        split: &mut Split,
        targets: &[Target],
    ) -> Result<PendingResponse<N>, Fault> {
        let (mut prefilled, peer) = match self.prefill(split, targets).await? {
            Prefill::Done(prefilled, peer) => (prefilled, peer),
            Prefill::Refused(pending) => return Ok(pending),
        };
        if split.connector().rules().can_decode_in_chunks {
            self.cut(split);
        }
        let pending = if self.client.has_disconnected(self.shard).await {
            Err(Fault::ClientGone)
        } else {
            self.decode(split, &peer, &mut prefilled).await
        };
        if pending.is_err()
            && let Some(handoff) = prefilled.stranded()
        {
            self.count_stranded(split, &handoff);
        }
        pending
    }

    /// Runs the prefill leg, with its retries, and returns its last result.
    ///
    /// If a candidate does not accept the connection, the next one is tried. If the last one does
    /// not either, the leg is retried from the first candidate. If a candidate closes the
    /// connection before it responds, or returns 502 to 504, the leg is retried with that
    /// candidate. The number of retries is limited by `config.pd.prefill_retries_max`.
    pub(super) async fn prefill(
        &mut self,
        split: &Split,
        targets: &[Target],
    ) -> Result<Prefill<N>, Fault> {
        let config = self.shard.config.clone();
        let started = self.shard.net.now();
        let (mut candidate, mut retries) = (0, 0);
        loop {
            self.enter(Phase::Prefill);
            let target = &targets[candidate];
            self.record_prefill_target(target);
            self.stats.attempts += 1;
            let begun = self.shard.net.now();
            let peer = split.peer(target);
            let attempt = self.prefill_once(split, target, &peer).await;
            let now = self.shard.net.now();
            self.stats.prefill_us = micros_since(now, started);
            let took = micros_since(now, begun);
            self.shard.metrics.leg(Role::Prefill, took);
            self.trace.prefilled(&self.shard.net, &attempt);
            let may_retry = retries < config.pd.prefill_retries_max;
            // The result of an attempt is large, so it must not be kept across an await.
            let fault = match self.attempted(attempt, peer, may_retry) {
                ControlFlow::Break(ended) => return ended,
                ControlFlow::Continue(fault) => fault,
            };
            let refused = fault.is_refused();
            if refused && candidate + 1 < targets.len() {
                candidate += 1;
                continue;
            }
            let may_retry = refused
                || matches!(
                    fault,
                    CallError::Failed(Cause::ConnectionClosed | Cause::Status(_))
                );
            if !may_retry || retries >= config.pd.prefill_retries_max {
                return Err(fault.fault(Role::Prefill));
            }
            retries += 1;
            self.shard.metrics.retry();
            if refused {
                candidate = 0;
            }
            self.wait_for_retry(config.pd.prefill_retry_backoff).await?;
        }
    }

    /// Evaluates the result of one attempt of the prefill leg. `Break` ends the leg with a result;
    /// `Continue` returns a failure that the caller may retry. If `may_retry`, a status of 502 to
    /// 504 is such a failure; otherwise it is an error response like any other.
    fn attempted(
        &mut self,
        attempt: Result<Attempt<N>, CallError>,
        peer: Peer,
        may_retry: bool,
    ) -> ControlFlow<Result<Prefill<N>, Fault>, CallError> {
        match attempt {
            Ok(Attempt::Done(collected, at, _)) => {
                self.enter(Phase::BetweenLegs);
                let handoff = self.shard.config.pd.connector().handoff(collected);
                ControlFlow::Break(Ok(Prefill::Done(Prefilled::new(handoff, at), peer)))
            }
            Ok(Attempt::Status(upstream, response, sent)) => {
                let status = response.head.status;
                if may_retry && matches!(status, 502..=504) {
                    return ControlFlow::Continue(CallError::Failed(Cause::Status(status)));
                }
                self.sent_whole = sent;
                let refused = self.prefill_refused(upstream, response);
                ControlFlow::Break(refused.map(Prefill::Refused))
            }
            Err(fault) => ControlFlow::Continue(fault),
        }
    }

    async fn wait_for_retry(&self, backoff: Duration) -> Result<(), Fault> {
        self.enter(Phase::RetryWait);
        self.client.pause(self.shard, backoff).await
    }

    async fn prefill_once(
        &self,
        split: &Split,
        target: &Target,
        peer: &Peer,
    ) -> Result<Attempt<N>, CallError> {
        let pd = &self.shard.config.pd;
        let leg = split.connector().prefill_leg(&split.pd_request(), peer);
        let leg = leg.map_err(Fault::from)?;
        let deadline = Deadline::of(self.shard.net.now(), pd.prefill_timeout, Timeout::Leg);
        let head = self.spliced_head(target, &leg)?;
        let call = Call {
            id: self.shard.upstreams.endpoint(Role::Prefill, target),
            target,
            head: &head,
            leg: &leg,
            body: &split.body.bytes,
        };
        self.shard
            .upstreams
            .call(self, &call, &mut None, &Deadlines::all(deadline))
            .await
    }

    /// Writes the head of a leg whose body is spliced. `Accept-Encoding` is omitted if the proxy
    /// must read or edit the response.
    pub(super) fn spliced_head(&self, target: &Target, leg: &Leg) -> Result<Vec<u8>, Fault> {
        let accept_encoding = leg.take == Take::Response(None);
        // Close to the final size, because the head is held for as long as the engine is silent.
        let out = Vec::with_capacity(self.head.len + LEG_HEAD_EXTRA_BYTES);
        let head = self.leg_head(out, target, accept_encoding, false, Some(leg))?;
        Ok(head.finish(Framing::Length(leg.body.len() as u64)))
    }

    /// Turns a prefill engine's error response into the response to the client.
    ///
    /// Usually the engine's response itself is relayed. If prefill errors are hidden (they can
    /// quote prompts), the decoder is to take over, or the status is below 200, only the status is
    /// kept: it is returned as the error `Cause::Status`, with 502 instead of a status that is not
    /// 4xx or 5xx.
    pub(super) fn prefill_refused(
        &mut self,
        upstream: Connection<N>,
        response: Response,
    ) -> Result<PendingResponse<N>, Fault> {
        let status = response.head.status;
        let pd = &self.shard.config.pd;
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
        self.stats.outcome = Some((Outcome::Failed, Reason::PrefillStatus));
        self.stats.fault = Some(fault);
        self.shard.count_fault(fault);
        Ok(PendingResponse {
            upstream,
            response,
            rewrite: Rewrite::None,
        })
    }
}
