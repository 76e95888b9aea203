//! Prefill on one engine, then decode on another.
//!
//! What each leg sends is decided in [`crate::pd`]; this file runs the legs: attempts and
//! candidates of the prefill leg, the freshness of the handoff, and the two repeats a decode leg
//! may have, both without the handoff (design 4, `competitors` 9.1).

use std::time::Duration;

use super::body::{self, Body};
use super::client::Limit;
use super::exchange::{Exchange, micros_since};
use super::head::push_request_framing;
use super::leg::{Answer, Fresh, LegFault, SplicedRequest, Upstream};
use super::relay::Rewrite;
use super::shard::leg_role;
use crate::config::{OnDecodeKvError, OnMissingKv};
use crate::fault::Fault;
use crate::fleet::Target;
use crate::h1::{self, BodyMeter, Framing, Name};
use crate::json::{Document, EditError, Handoff, PrefillAnswer};
use crate::metrics::{Direction, Phase};
use crate::net::pool::EndpointId;
use crate::net::{Conn, Moment, Net, would_block};
use crate::pd::{Api, Freshness, Held, Leg, Outcome, Plan, Reason, Role, Take, nixlv2};

/// The prefiller's answer, as far as the decode leg needs it.
struct Prefilled {
    held: Held,
    /// When the head of the answer was there: the engine's lease runs from about then.
    at: Moment,
}

/// What one prefill attempt came to.
enum Attempt<N: Net> {
    Done(Box<Handoff>, Moment),
    /// An answer that is no success, to be relayed or tried again, and whether the engine had
    /// taken the whole request before it.
    Status(Upstream<N>, Answer, bool),
}

/// Marks the end of a send that took longer than the handoff in it stays fresh; never shown.
const WENT_STALE: Fault = Fault::Bug("the handoff went stale while it was sent");

fn too_many(_: EditError) -> Fault {
    Fault::TooManyEdits
}

impl<N: Net> Exchange<'_, N> {
    /// Serves an intercepted request that names prefill targets.
    pub(super) async fn split(
        &mut self,
        api: Api,
        targets: &[Target],
        decoder: EndpointId,
        expects: bool,
    ) -> Result<(), Fault> {
        self.account.outcome = Some((Outcome::Remote, Reason::None));
        let arrived = self.body_done || self.bytes.len() > self.head.len;
        if expects && !arrived {
            self.send_continue().await?;
        }
        let body = body::receive(self).await?;
        let received = self.shard.net.clock();
        let removed = nixlv2::client_owned(&body.document);
        if removed > 0 {
            self.shard.metrics.masked(removed);
        }
        let mut plan = nixlv2::plan(api, &body.document, &body.bytes).map_err(too_many)?;
        if matches!(plan, Plan::Split(_)) && self.names_self(&targets[0]).await? {
            let leg = nixlv2::local_leg(&body.document).map_err(too_many)?;
            plan = Plan::Local(Reason::SelfTarget, leg);
        }
        match plan {
            Plan::Local(reason, leg) => {
                self.account.outcome = Some((Outcome::LocalPolicy, reason));
                self.note_request_overhead(received);
                self.decode_local(decoder, &leg, body).await
            }
            Plan::Split(leg) => {
                self.note_request_overhead(received);
                let Some(prefilled) = self.prefill(targets, &leg, &body).await? else {
                    return Ok(());
                };
                self.decode(api, decoder, prefilled, body).await
            }
        }
    }

    fn note_request_overhead(&mut self, since: Moment) {
        let took = self.shard.net.clock().since(since).as_nanos();
        let took_ns = u64::try_from(took).unwrap_or(u64::MAX);
        self.shard.metrics.overhead(Direction::Request, took_ns);
        self.account.proxy_ns += took_ns;
    }

    /// Whether a target is this proxy or its own decoder. A name that does not resolve in time is
    /// not: the attempt to connect will tell.
    async fn names_self(&self, target: &Target) -> Result<bool, Fault> {
        let id = self.shard.pools.endpoint(Role::Prefill, target, false);
        let wait = self.shard.config.timeouts.connect;
        let limit = Limit::of(self.shard.net.now(), wait, Fault::PrefillConnect);
        match self.addresses(id, target, limit).await {
            Ok(_) => Ok(self.shard.is_self(id)),
            Err(Fault::PrefillConnect | Fault::Exhausted) => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// Runs the prefill leg until it gave an answer to go on with. `None`: its error has been
    /// relayed to the client.
    async fn prefill(
        &mut self,
        targets: &[Target],
        leg: &Leg,
        body: &Body,
    ) -> Result<Option<Prefilled>, Fault> {
        let config = self.shard.config.clone();
        let started = self.shard.net.now();
        let (mut candidate, mut retries) = (0, 0);
        loop {
            self.enter(Phase::Prefill);
            let target = &targets[candidate];
            self.note_prefill_target(target);
            self.account.attempts += 1;
            let begun = self.shard.net.now();
            let attempt = self.prefill_once(target, leg, body).await;
            let now = self.shard.net.now();
            self.account.prefill_us = micros_since(now, started);
            let took = micros_since(now, begun);
            self.shard.metrics.leg(leg_role(Role::Prefill), took);
            let fault = match attempt {
                Ok(Attempt::Done(handoff, at)) => {
                    self.enter(Phase::BetweenLegs);
                    return Ok(Some(Prefilled {
                        held: Held::new(*handoff),
                        at,
                    }));
                }
                Ok(Attempt::Status(upstream, answer, sent)) => {
                    let status = answer.head.status;
                    let may_retry = matches!(status, 502..=504);
                    if !may_retry || retries >= config.pd.prefill_retries_max {
                        self.sent_whole = sent;
                        return self
                            .relay_prefill_error(upstream, answer)
                            .await
                            .map(|()| None);
                    }
                    LegFault::Other(Fault::PrefillStatus(status))
                }
                Err(fault) => fault,
            };
            let refused = matches!(fault, LegFault::Refused | LegFault::ConnectTimeout);
            if refused && candidate + 1 < targets.len() {
                candidate += 1;
                continue;
            }
            let may_retry = refused
                || matches!(
                    fault,
                    LegFault::Died | LegFault::Other(Fault::PrefillStatus(_))
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

    async fn wait_for_retry(&self, backoff: Duration) -> Result<(), Fault> {
        self.enter(Phase::RetryWait);
        self.client.pause(self.shard, backoff).await
    }

    /// One attempt, with one safe repeat on a new connection when a pooled one was dead.
    async fn prefill_once(
        &self,
        target: &Target,
        leg: &Leg,
        body: &Body,
    ) -> Result<Attempt<N>, LegFault> {
        let id = self.shard.pools.endpoint(Role::Prefill, target, false);
        let wait = self.shard.config.pd.prefill_timeout;
        let limit = Limit::of(self.shard.net.now(), wait, Fault::PrefillTimeout);
        let head = self.spliced_head(target, leg)?;
        let mut fresh = Fresh::Pooled;
        let attempt = loop {
            let upstream = self
                .connect(id, target, Role::Prefill, fresh, limit)
                .await?;
            if self.shard.is_self(id) {
                // A later candidate that is this node's own is passed over.
                break Err(LegFault::Refused);
            }
            let mut answer = Answer::default();
            match self
                .exchange_leg(&upstream, &head, leg, body, &mut answer, [limit; 2])
                .await
            {
                Ok(sent) => break self.finish_prefill(upstream, answer, sent, limit).await,
                Err(LegFault::Died) if upstream.reused && fresh == Fresh::Pooled => {
                    self.shard.metrics.replay();
                    fresh = Fresh::New;
                }
                Err(fault) => break Err(fault),
            }
        };
        self.shard.recycle(head);
        attempt
    }

    /// The head of a leg whose body is spliced. Its answer has to be readable by the proxy, so
    /// no encoding of it is asked for.
    fn spliced_head(&self, target: &Target, leg: &Leg) -> Result<Vec<u8>, Fault> {
        let accept_encoding = leg.take == Take::Answer(None);
        let mut head = self.leg_head(target, accept_encoding, false)?;
        push_request_framing(&mut head, Framing::Length(leg.body.len() as u64));
        Ok(head)
    }

    /// Sends a leg's request and waits for the head of its answer, within a limit for each.
    /// `true`: the engine took all.
    async fn exchange_leg(
        &self,
        upstream: &Upstream<N>,
        head: &[u8],
        leg: &Leg,
        body: &Body,
        answer: &mut Answer,
        [send_limit, limit]: [Limit; 2],
    ) -> Result<bool, LegFault> {
        let request = SplicedRequest {
            head,
            splices: &leg.body,
            body: &body.bytes,
        };
        let sent = self
            .send_spliced(upstream, &request, answer, send_limit)
            .await?;
        let wait = self.shard.config.timeouts.first_byte;
        let silent = match leg.role {
            Role::Prefill => Fault::PrefillTimeout,
            Role::Decode => Fault::FirstByteTimeout,
        };
        let limit = Limit::of(self.shard.net.now(), wait, silent).or_sooner(limit);
        self.receive_answer(upstream, answer, limit).await?;
        Ok(sent)
    }

    /// Reads a prefiller's answer: its handoff, or a status that is none of success.
    async fn finish_prefill(
        &self,
        upstream: Upstream<N>,
        mut answer: Answer,
        sent: bool,
        limit: Limit,
    ) -> Result<Attempt<N>, LegFault> {
        let at = self.shard.net.now();
        let (head, bytes) = (&answer.head, &answer.bytes);
        let framing = h1::answer_framing(self.head.method, head, bytes);
        answer.framing = framing.map_err(|_| LegFault::BadAnswer)?;
        if !(200..300).contains(&answer.head.status) {
            return Ok(Attempt::Status(upstream, answer, sent));
        }
        if answer.head.field(Name::ContentEncoding).is_some() {
            return Err(Fault::PrefillAnswer.into());
        }
        let keeps = h1::answer_keeps_alive(&answer.head, &answer.bytes, answer.framing);
        let handoff = self.receive_handoff(&upstream, &answer, limit).await?;
        let (handoff, is_clean) = handoff;
        if keeps && sent && is_clean {
            upstream.keep(self.shard);
        }
        self.shard.recycle(answer.bytes);
        Ok(Attempt::Done(Box::new(handoff), at))
    }

    /// Scans the body of a prefiller's answer as it arrives; nothing else of it is kept. Also
    /// says whether the connection ended the exchange cleanly.
    async fn receive_handoff(
        &self,
        upstream: &Upstream<N>,
        answer: &Answer,
        limit: Limit,
    ) -> Result<(Handoff, bool), LegFault> {
        let pd = &self.shard.config.pd;
        let mut reading = ReadHandoff {
            meter: BodyMeter::new(answer.framing),
            scan: PrefillAnswer::new(pd.prefill_answer_bytes_max)
                .allow_flat_blocks(pd.allow_flat_blocks),
            bytes_max: pd.prefill_answer_bytes_max as u64,
            is_clean: true,
        };
        reading.take(answer.rest())?;
        let conn = upstream.conn();
        while !reading.meter.is_done() {
            let watch = super::client::Watch::Ahead;
            self.client
                .until(self.shard, watch, limit, |cx| conn.poll_readable(cx))
                .await?;
            let received = self.shard.with_small(|buffer| {
                conn.try_recv(buffer)
                    .map(|n| (n, reading.take(&buffer[..n])))
            });
            match received {
                Ok((0, _)) if reading.meter.ends_at_close() => {
                    reading.is_clean = false;
                    break;
                }
                Ok((0, _)) => return Err(Fault::PrefillAnswer.into()),
                Ok((_, taken)) => taken?,
                Err(error) if would_block(&error) => {}
                Err(_) => return Err(Fault::PrefillAnswer.into()),
            }
        }
        let handoff = reading.scan.finish().map_err(|_| Fault::PrefillAnswer)?;
        Ok((handoff, reading.is_clean))
    }

    /// Passes a prefiller's error on: its status always, its own words unless they are to be
    /// hidden (error texts can quote prompts).
    async fn relay_prefill_error(
        &mut self,
        upstream: Upstream<N>,
        answer: Answer,
    ) -> Result<(), Fault> {
        let status = answer.head.status;
        let fault = Fault::PrefillStatus(status);
        // Below 400 there is no error to show, and a redirect is not followed.
        if self.shard.config.pd.hide_prefill_errors || status < 200 {
            let status = if (400..600).contains(&status) {
                status
            } else {
                502
            };
            return Err(Fault::PrefillStatus(status));
        }
        self.account.outcome = Some((Outcome::Failed, Reason::PrefillStatus));
        self.account.fault = Some(fault);
        self.shard.note_fault(fault);
        Box::pin(self.relay(upstream, answer, Rewrite::None)).await
    }

    /// Serves a request by the decoder alone.
    async fn decode_local(
        &mut self,
        decoder: EndpointId,
        leg: &Leg,
        body: Body,
    ) -> Result<(), Fault> {
        let target = self.shard.decoder_target(decoder);
        let mut fresh = Fresh::Pooled;
        loop {
            let connected = self
                .connect(decoder, target, Role::Decode, fresh, Limit::NONE)
                .await;
            let upstream = connected.map_err(|fault| fault.fault(Role::Decode))?;
            let limit = Limit::NONE;
            match self.decode_once(&upstream, target, leg, &body, limit).await {
                Ok(answer) => {
                    drop(body);
                    return Box::pin(self.relay(upstream, answer, Rewrite::None)).await;
                }
                Err(LegFault::Died) if upstream.reused && fresh == Fresh::Pooled => {
                    self.shard.metrics.replay();
                    fresh = Fresh::New;
                }
                Err(fault) => return Err(fault.fault(Role::Decode)),
            }
        }
    }

    /// Runs the decode leg after a prefill.
    async fn decode(
        &mut self,
        api: Api,
        decoder: EndpointId,
        mut prefilled: Prefilled,
        body: Body,
    ) -> Result<(), Fault> {
        let target = self.shard.decoder_target(decoder);
        let cached_tokens = prefilled.held.cached_tokens;
        let mut fresh = Fresh::Pooled;
        let mut repeated = false;
        loop {
            // The connection first: the handoff must be fresh when it leaves, not before.
            let connected = self
                .connect(decoder, target, Role::Decode, fresh, Limit::NONE)
                .await;
            let upstream = connected.map_err(|fault| fault.fault(Role::Decode))?;
            let (leg, carries) = self.decode_leg(api, &body.document, &mut prefilled, repeated)?;
            let limit = if carries {
                self.freshness_limit(&prefilled)
            } else {
                Limit::NONE
            };
            match self
                .decode_once(&upstream, target, &leg, &body, limit)
                .await
            {
                Ok(answer) if carries && self.must_recompute(&answer) => {
                    self.account.outcome = Some((Outcome::LocalFallback, Reason::DecodeKvError));
                    repeated = true;
                }
                Ok(answer) => {
                    drop(body);
                    let rewrite = match leg.take {
                        Take::Answer(Some(shape)) => Rewrite::Usage(shape, cached_tokens),
                        Take::Answer(None) | Take::Handoff => Rewrite::None,
                    };
                    return Box::pin(self.relay(upstream, answer, rewrite)).await;
                }
                // The decoder took the request too slowly: what it has of it is no whole request.
                Err(LegFault::Other(WENT_STALE)) => {
                    upstream.conn().reset_on_close();
                    self.account.outcome = Some((Outcome::LocalFallback, Reason::StaleKv));
                    if self.shard.config.pd.on_missing_kv == OnMissingKv::Error {
                        return Err(Fault::HandoffMissing);
                    }
                    repeated = true;
                }
                Err(LegFault::Died) if upstream.reused && fresh != Fresh::New => {
                    self.shard.metrics.replay();
                }
                Err(fault) => return Err(fault.fault(Role::Decode)),
            }
            fresh = Fresh::New;
        }
    }

    /// Until when a leg that carries the handoff may be on its way.
    fn freshness_limit(&self, prefilled: &Prefilled) -> Limit {
        let age_max = self.shard.config.pd.handoff_age_max;
        Limit::of(prefilled.at, Some(age_max), WENT_STALE)
    }

    /// The decode leg to send now, and whether it carries the handoff. The handoff is taken by
    /// the first leg that asks; every later one goes without.
    fn decode_leg(
        &mut self,
        api: Api,
        document: &Document,
        prefilled: &mut Prefilled,
        repeated: bool,
    ) -> Result<(Leg, bool), Fault> {
        let pd = &self.shard.config.pd;
        let age = self.shard.net.now().since(prefilled.at);
        let taken = prefilled.held.take(Freshness::of(age, pd.handoff_age_max));
        let handoff = match taken {
            Ok(handoff) => Some(handoff),
            Err(reason) => {
                if !repeated {
                    self.account.outcome = Some((Outcome::LocalFallback, reason));
                    if pd.on_missing_kv == OnMissingKv::Error {
                        return Err(Fault::HandoffMissing);
                    }
                }
                None
            }
        };
        let leg = nixlv2::decode_leg(api, document, handoff.as_deref()).map_err(too_many)?;
        Ok((leg, handoff.is_some()))
    }

    async fn decode_once(
        &mut self,
        upstream: &Upstream<N>,
        target: &Target,
        leg: &Leg,
        body: &Body,
        send_limit: Limit,
    ) -> Result<Answer, LegFault> {
        self.enter(Phase::FirstByte);
        self.account.attempts += 1;
        let begun = self.shard.net.now();
        let head = self.spliced_head(target, leg)?;
        let mut answer = Answer::default();
        let limits = [send_limit, Limit::NONE];
        self.sent_whole = self
            .exchange_leg(upstream, &head, leg, body, &mut answer, limits)
            .await?;
        let took = micros_since(self.shard.net.now(), begun);
        self.shard.metrics.leg(leg_role(Role::Decode), took);
        self.shard.recycle(head);
        Ok(answer)
    }

    /// A 500 with a handoff in hand mostly means that its KV cache could not be loaded.
    fn must_recompute(&self, answer: &Answer) -> bool {
        answer.head.status == 500
            && self.shard.config.pd.on_decode_kv_error == OnDecodeKvError::Recompute
    }
}

/// A prefiller's answer while it is scanned.
struct ReadHandoff {
    meter: BodyMeter,
    scan: PrefillAnswer,
    bytes_max: u64,
    is_clean: bool,
}

impl ReadHandoff {
    fn take(&mut self, received: &[u8]) -> Result<(), Fault> {
        let mut fault = None;
        let scan = &mut self.scan;
        let taken = self.meter.decode(received, |span| {
            if fault.is_none() {
                fault = scan.feed(span.of(received)).err();
            }
        });
        let taken = taken.map_err(|_| Fault::PrefillAnswer)?;
        self.is_clean &= taken == received.len();
        if self.meter.payload_bytes() > self.bytes_max {
            return Err(Fault::PrefillAnswerTooLarge);
        }
        match fault {
            Some(_) => Err(Fault::PrefillAnswer),
            None => Ok(()),
        }
    }
}
