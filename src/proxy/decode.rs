//! The decode leg, alone or following a prefill leg whose handoff it carries.
//!
//! A handoff can be used once and only while it is fresh; a stale or used one returns another
//! prompt's text with HTTP 200 (`docs/engines.md#handoffs`). A decode leg is repeated at most once,
//! and the repeat never carries the handoff. Reasons for a repeat are a pooled connection that
//! turned out to be closed, a handoff that became stale during the send, and a decoder that failed
//! to load the handed-over KV cache.

use super::exchange::{Exchange, micros_since};
use super::prefill::Prefilled;
use super::relay::Rewrite;
use super::split::{PendingResponse, Split};
use crate::config::{OnDecodeKvError, OnMissingKv};
use crate::fault::{Cause, Fault};
use crate::metrics::{Phase, Stranded};
use crate::net::{Conn, Net};
use crate::pd::{Freshness, Leg, Outcome, Peer, Reason, Role, Take};
use crate::upstream::call::Call;
use crate::upstream::call::Deadlines;
use crate::upstream::connection::Connection;
use crate::upstream::connection::Reuse;
use crate::upstream::error::CallError;
use crate::upstream::response::Response;
use crate::upstream::wait::{Deadline, Timeout};

/// The error label of a failed decode leg in its span.
fn label_of(fault: CallError) -> &'static str {
    match fault {
        CallError::TimedOut(Timeout::Handoff) => Reason::StaleKv.label(),
        fault => fault.fault(Role::Decode).label(),
    }
}

impl<N: Net> Exchange<'_, N> {
    /// Returns a connection to the decoder of the request. Bounded by the connect timeout only.
    pub(super) async fn connect_decoder(
        &self,
        split: &Split,
        reuse: Reuse,
    ) -> Result<Connection<N>, Fault> {
        let id = split.decoder;
        let target = self.shard.decoder_target(id);
        self.shard
            .upstreams
            .connect(self, id, target, Role::Decode, reuse, Deadline::NONE)
            .await
            .map_err(|fault| fault.fault(Role::Decode))
    }

    /// Sends a request to the decoder alone, without a prefill leg, and waits for the response
    /// head. A request on a pooled connection that turns out to be closed is sent once more.
    pub(super) async fn decode_local(
        &mut self,
        split: &Split,
        leg: &Leg,
    ) -> Result<PendingResponse<N>, Fault> {
        let mut reuse = Reuse::Allowed;
        loop {
            let upstream = self.connect_decoder(split, reuse).await?;
            match self
                .decode_once(&upstream, split, leg, Deadline::NONE)
                .await
            {
                Ok(response) => {
                    return Ok(PendingResponse {
                        upstream,
                        response,
                        rewrite: Rewrite::None,
                    });
                }
                Err(CallError::Failed(Cause::ConnectionClosed))
                    if upstream.reused && reuse == Reuse::Allowed =>
                {
                    self.shard.metrics.replay();
                    reuse = Reuse::Never;
                }
                Err(fault) => return Err(fault.fault(Role::Decode)),
            }
        }
    }

    /// Sends the decode leg that follows a prefill leg and waits for the response head. Repeats the
    /// leg at most once (reasons in the module documentation).
    pub(super) async fn decode(
        &mut self,
        split: &Split,
        peer: &Peer,
        prefilled: &mut Prefilled,
    ) -> Result<PendingResponse<N>, Fault> {
        let cached_tokens = prefilled
            .handoff
            .as_ref()
            .map_or(0, |handoff| handoff.cached_tokens);
        let mut reuse = Reuse::Allowed;
        let mut repeated = false;
        loop {
            // Connect first: the handoff must be fresh when it is sent, not when the connect
            // starts.
            let upstream = self.connect_decoder(split, reuse).await?;
            let (leg, carries) = self.decode_leg(split, peer, prefilled, repeated)?;
            let deadline = if carries {
                self.freshness_deadline(prefilled)
            } else {
                Deadline::NONE
            };
            let decoded = self.decode_once(&upstream, split, &leg, deadline).await;
            if upstream.is_sent.get() {
                prefilled.unsent_handoff = None;
            }
            match decoded {
                Ok(response) if carries && self.must_recompute(&response) => {
                    self.stats.outcome = Some((Outcome::LocalFallback, Reason::DecodeKvError));
                    repeated = true;
                }
                Ok(response) => {
                    let rewrite = match leg.take {
                        Take::Response(Some(shape)) => Rewrite::Usage(shape, cached_tokens),
                        Take::Response(None)
                        | Take::Handoff { .. }
                        | Take::Whole
                        | Take::Nothing => Rewrite::None,
                    };
                    return Ok(PendingResponse {
                        upstream,
                        response,
                        rewrite,
                    });
                }
                // The decoder accepted the request too slowly. It has received only part of it.
                Err(CallError::TimedOut(Timeout::Handoff)) => {
                    upstream.conn().reset_on_close();
                    self.decode_without_handoff(Reason::StaleKv)?;
                    repeated = true;
                }
                Err(CallError::Failed(Cause::ConnectionClosed))
                    if upstream.reused && reuse != Reuse::Never =>
                {
                    self.shard.metrics.replay();
                }
                Err(fault) => return Err(fault.fault(Role::Decode)),
            }
            reuse = Reuse::Never;
        }
    }

    /// Returns the deadline for sending a decode leg that carries the handoff: the time when the
    /// handoff becomes stale.
    fn freshness_deadline(&self, prefilled: &Prefilled) -> Deadline {
        let age_max = self.shard.config.pd.handoff_age_max;
        Deadline::of(prefilled.at, Some(age_max), Timeout::Handoff)
    }

    /// Builds the decode leg to send next and returns whether it carries the handoff. Only the
    /// first leg carries it, and only while the handoff is fresh. `repeated` means that the reason
    /// for sending the leg without the handoff has already been recorded.
    fn decode_leg(
        &mut self,
        split: &Split,
        peer: &Peer,
        prefilled: &mut Prefilled,
        repeated: bool,
    ) -> Result<(Leg, bool), Fault> {
        if let Some(handoff) = prefilled.unsent_handoff.take() {
            // The leg that carried it was not sent completely.
            self.count_stranded(split, &handoff);
        }
        let pd = &self.shard.config.pd;
        let handoff = match &mut prefilled.handoff {
            None => None,
            Some(handoff) => {
                let age = self.shard.net.now().since(prefilled.at);
                match handoff.take(Freshness::of(age, pd.handoff_age_max)) {
                    Ok(handoff) => Some(handoff),
                    Err(reason) => {
                        if reason == Reason::StaleKv {
                            // Its lease may have expired and its blocks may hold another request's
                            // KV cache by now, so it must not be released explicitly.
                            self.shard.metrics.stranded(Stranded::LeftToLease);
                        }
                        if !repeated {
                            self.decode_without_handoff(reason)?;
                        }
                        None
                    }
                }
            }
        };
        let leg = split
            .connector()
            .decode_leg(&split.pd_request(), peer, handoff.as_deref());
        let carries = handoff.is_some();
        prefilled.unsent_handoff = handoff;
        Ok((leg?, carries))
    }

    /// Records the reason why the decoder must compute the prompt itself, without a handoff. Fails
    /// if `--on-missing-kv` is `error`.
    fn decode_without_handoff(&mut self, reason: Reason) -> Result<(), Fault> {
        if self.shard.config.pd.on_missing_kv == OnMissingKv::Error {
            self.stats.outcome = Some((Outcome::Failed, reason));
            return Err(Fault::HandoffMissing);
        }
        self.stats.outcome = Some((Outcome::LocalFallback, reason));
        Ok(())
    }

    /// Sends a decode leg on a connection and waits for the response head. The leg's recorded
    /// duration covers exactly this: neither the connect nor the response body.
    pub(super) async fn decode_once(
        &mut self,
        upstream: &Connection<N>,
        split: &Split,
        leg: &Leg,
        send: Deadline,
    ) -> Result<Response, CallError> {
        self.enter(Phase::FirstByte);
        self.stats.attempts += 1;
        let begun = self.shard.net.now();
        let target = self.shard.decoder_target(split.decoder);
        let head = self.spliced_head(target, leg)?;
        let call = Call {
            id: split.decoder,
            target,
            head: &head,
            leg,
            body: &split.body.bytes,
        };
        let mut response = Response::default();
        let deadlines = Deadlines {
            send,
            ..Deadlines::NONE
        };
        let sent = self
            .shard
            .upstreams
            .exchange(self, upstream, &call, &mut response, &deadlines)
            .await;
        let responded = sent.map(|_| response.head.status).map_err(label_of);
        self.trace.responded(&self.shard.net, responded);
        let took = micros_since(self.shard.net.now(), begun);
        self.shard.metrics.leg(Role::Decode, took);
        self.sent_whole = sent?;
        Ok(response)
    }

    /// Returns whether to repeat the leg without the handoff, given the response to a leg that
    /// carried it: yes for a 500 if `--on-decode-kv-error` is `recompute`. A 500 usually means that
    /// the KV cache could not be loaded.
    fn must_recompute(&self, response: &Response) -> bool {
        response.head.status == 500
            && self.shard.config.pd.on_decode_kv_error == OnDecodeKvError::Recompute
    }
}
