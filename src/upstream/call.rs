//! A call to an engine: connects, sends the request, receives the response head and, if the proxy
//! reads the response itself, the part of the body that the call was made for.
//!
//! Timing and the span of a leg are handled here and nowhere else.

use std::time::Duration;

use super::attempts::{Attempts, Limits, Next};
use super::connection::{CleanEnd, Connection};
use super::engine::Engine;
use super::error::CallError;
use super::pool::SlotId;
use super::request::SplicedRequest;
use super::response::Response;
use super::scope::{Scope, Stage};
use super::upstreams::Upstreams;
use super::wait::{Deadline, Timeout};
use crate::budget::{Kept, Reserved};
use crate::fault::{Cause, Fault};
use crate::h1::{self, BodyMeter, Framing, Method};
use crate::json::{JsonReason, PrefillResponse, Validator};
use crate::limits::{PAGE_BYTES_MAX, READ_PAST_BYTES_MAX, REPLAY_MS_MAX, SEND_JOINED_BYTES_MAX};
use crate::net::{Conn, Instant, Net, would_block};
use crate::pd::{Collected, Leg, Role, Take};

/// A leg that is ready to be sent: its engine, head and body.
pub(crate) struct Call<'a> {
    pub(crate) engine: Engine<'a>,
    /// The leg's request head, including the blank line.
    pub(crate) head: &'a [u8],
    pub(crate) leg: &'a Leg,
    /// The client's request body, to which the leg's edits apply.
    pub(crate) body: &'a [u8],
    /// Whether the metrics of legs count the call.
    pub(crate) is_counted: bool,
}

impl<'a> Call<'a> {
    fn request(&self) -> SplicedRequest<'a> {
        SplicedRequest {
            head: self.head,
            splices: &self.leg.body,
            body: self.body,
        }
    }

    const fn kind(&self) -> CallKind {
        CallKind {
            slot: self.engine.slot,
            role: self.leg.role,
            is_counted: self.is_counted,
        }
    }
}

/// The properties of a call that its metrics depend on.
#[derive(Clone, Copy, Debug)]
struct CallKind {
    slot: SlotId,
    role: Role,
    is_counted: bool,
}

/// A call whose request has been sent.
pub(crate) struct Awaited {
    kind: CallKind,
    started: Instant,
    response: Response,
}

impl Awaited {
    /// Returns whether the response head has arrived.
    pub(crate) const fn is_complete(&self) -> bool {
        self.response.is_complete()
    }
}

/// Deadlines of the steps of a leg.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadlines {
    /// Deadline for sending the request.
    pub(crate) send: Deadline,
    /// Deadline for the connect, if one is needed, and for the response head.
    pub(crate) head: Deadline,
    /// Deadline for the end of the response.
    pub(crate) end: Deadline,
}

impl Deadlines {
    pub(crate) const NONE: Self = Self::all(Deadline::NONE);

    pub(crate) const fn all(deadline: Deadline) -> Self {
        Self {
            send: deadline,
            head: deadline,
            end: deadline,
        }
    }
}

/// The end of a call whose response the proxy reads itself.
pub(crate) enum CallEnd<N: Net> {
    /// A successful (2xx) response, which has been read to its end: the part that the leg was sent
    /// for, and the time when the head arrived. A prefill engine's lease on the KV cache starts at
    /// about that time.
    Done(Collected, Instant),
    /// A response with another status, to be relayed or retried. Its body has not been read.
    Status(Connection<N>, Response),
}

impl<N: Net> Upstreams<N> {
    /// Calls an engine and reads its response. If `begun` holds a connection, the request is first
    /// sent on that one. It is a reference, because each level of a future has its own copy of what
    /// it is passed by value, for as long as the engine is silent.
    pub(crate) async fn call<S: Scope<N>>(
        &self,
        scope: &S,
        call: &Call<'_>,
        begun: Option<&mut Option<Connection<N>>>,
        deadlines: &Deadlines,
    ) -> Result<CallEnd<N>, CallError> {
        let started = self.net.now();
        let _room = self.reserve_text(scope, call)?;
        let ended = match self.reach(scope, call, begun, deadlines).await {
            Ok((upstream, response)) => {
                // Boxed so that reading the response does not enlarge the future while the engine
                // is silent.
                let collected = self.collect(scope, upstream, call, response, deadlines);
                Box::pin(collected).await
            }
            Err(error) => Err(error),
        };
        let status = match &ended {
            Ok((status, _)) => Ok(*status),
            Err(error) => Err(*error),
        };
        self.record(scope, call.kind(), started, status);
        self.report_end(call.engine.slot, status);
        ended.map(|(_, end)| end)
    }

    /// Sends a request on an established connection and waits for the response head, for a response
    /// that will be relayed. The recorded duration of the leg covers exactly this.
    pub(crate) async fn respond<S: Scope<N>>(
        &self,
        scope: &S,
        upstream: &Connection<N>,
        call: &Call<'_>,
        deadlines: &Deadlines,
    ) -> Result<Response, CallError> {
        let started = self.net.now();
        let _room = self.reserve_text(scope, call)?;
        let mut response = Response::default();
        let sent = self.exchange(scope, upstream, call, &mut response, deadlines);
        let status = sent.await.map(|()| response.head.status);
        self.record(scope, call.kind(), started, status);
        status.map(|_| response)
    }

    /// As [`Upstreams::respond`], but returns as soon as the request need not be sent again even if
    /// the connection ends, so that its body can be dropped. The rest is
    /// [`Upstreams::respond_after`].
    pub(crate) async fn respond_until_safe<S: Scope<N>>(
        &self,
        scope: &S,
        upstream: &Connection<N>,
        call: &Call<'_>,
    ) -> Result<Awaited, CallError> {
        let _room = self.reserve_text(scope, call)?;
        let mut awaited = Awaited {
            kind: call.kind(),
            started: self.net.now(),
            response: Response::default(),
        };
        let response = &mut awaited.response;
        let mut ended = self
            .send_spliced(scope, upstream, &call.request(), response, Deadline::NONE)
            .await;
        if ended.is_ok() && upstream.is_sent() && upstream.is_reused() {
            let wait = Duration::from_millis(REPLAY_MS_MAX + 1);
            let pause = Deadline::of(self.net.now(), Some(wait), Timeout::Pause);
            let deadline = pause.or_sooner(self.first_byte(upstream));
            let received = self.receive_response(scope, upstream, response, deadline);
            ended = match received.await {
                Err(CallError::TimedOut(Timeout::Pause)) => Ok(()),
                ended => ended,
            };
        }
        match ended {
            Ok(()) => Ok(awaited),
            Err(error) => {
                self.record(scope, awaited.kind, awaited.started, Err(error));
                Err(error)
            }
        }
    }

    /// Waits for the response head to a request that has been sent.
    pub(crate) async fn respond_after<S: Scope<N>>(
        &self,
        scope: &S,
        upstream: &Connection<N>,
        mut awaited: Awaited,
    ) -> Result<Response, CallError> {
        let response = &mut awaited.response;
        let deadline = self.first_byte(upstream);
        let received = self.receive_response(scope, upstream, response, deadline);
        let status = received.await.map(|()| response.head.status);
        self.record(scope, awaited.kind, awaited.started, status);
        status.map(|_| awaited.response)
    }

    /// Returns the deadline for the response head to a request that has been sent.
    fn first_byte(&self, upstream: &Connection<N>) -> Deadline {
        let wait = self.config.timeouts.first_byte;
        let since = upstream.sent_at().unwrap_or_else(|| self.net.now());
        Deadline::of(since, wait, Timeout::FirstByte)
    }

    /// Waits for the response head to a request whose upload has ended. The recorded duration of
    /// the leg covers exactly this.
    pub(crate) async fn await_response<S: Scope<N>>(
        &self,
        scope: &S,
        upstream: &Connection<N>,
        response: &mut Response,
    ) -> Result<(), CallError> {
        let started = upstream.sent_at().unwrap_or_else(|| self.net.now());
        let deadline = self.first_byte(upstream);
        let received = self.receive_response(scope, upstream, response, deadline);
        let ended = received.await;
        self.count(Role::Decode, started);
        if ended.is_ok() {
            self.report_status(upstream.slot(), response.head.status);
        }
        ended
    }

    /// Reserves room in the budget of kept bytes for text that a leg has in addition to the body
    /// and to kept values, such as a handoff that its connector has rewritten. A small text is not
    /// counted.
    fn reserve_text<S: Scope<N>>(
        &self,
        scope: &S,
        call: &Call<'_>,
    ) -> Result<Option<Reserved>, CallError> {
        let bytes = call.leg.body.text_bytes();
        if bytes <= SEND_JOINED_BYTES_MAX {
            return Ok(None);
        }
        let mut room = Reserved::new(&self.budget);
        match room.grow_to(bytes as u64) {
            Ok(()) => Ok(Some(room)),
            Err(spent) => {
                let error = CallError::Other(spent.into());
                self.record(scope, call.kind(), self.net.now(), Err(error));
                Err(error)
            }
        }
    }

    /// Returns a connection on which the request has been sent and the response head received.
    async fn reach<S: Scope<N>>(
        &self,
        scope: &S,
        call: &Call<'_>,
        mut begun: Option<&mut Option<Connection<N>>>,
        deadlines: &Deadlines,
    ) -> Result<(Connection<N>, Response), CallError> {
        let mut attempts = Attempts::new(Limits::ONE);
        loop {
            let upstream = match begun.as_mut().and_then(|begun| begun.take()) {
                Some(upstream) => upstream,
                None => {
                    let reuse = attempts.reuse();
                    self.connect(scope, call.engine, reuse, deadlines.head)
                        .await?
                }
            };
            if call.leg.role == Role::Prefill && self.is_self(call.engine) {
                // Treat a prefill candidate that is this proxy or its decoder like one that
                // refuses, so that the next candidate is tried.
                self.report_itself(call.engine);
                return Err(CallError::Failed(Cause::Refused));
            }
            let mut response = Response::default();
            let sent = self.exchange(scope, &upstream, call, &mut response, deadlines);
            match sent.await {
                Ok(()) => return Ok((upstream, response)),
                Err(error) if self.must_replay(&mut attempts, error, &upstream) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Returns whether a request that failed with `error` is sent once more on a new connection,
    /// and counts it.
    fn must_replay(
        &self,
        attempts: &mut Attempts,
        error: CallError,
        upstream: &Connection<N>,
    ) -> bool {
        let ended = upstream.ended(Err(error), self.net.now());
        let is_replay = attempts.next(&ended) == Next::Replay;
        if is_replay {
            self.metrics.replay();
        }
        is_replay
    }

    /// Records the duration and the end of a leg.
    fn record<S: Scope<N>>(
        &self,
        scope: &S,
        CallKind {
            slot,
            role,
            is_counted,
        }: CallKind,
        started: Instant,
        ended: Result<u16, CallError>,
    ) {
        if is_counted {
            self.count(role, started);
        }
        if let Ok(status) = ended {
            self.report_status(slot, status);
        }
        scope.record_leg(role, ended.map_err(|error| error.label(role)));
    }

    fn count(&self, role: Role, started: Instant) {
        let took = self.net.now().since(started).as_micros();
        let took_us = u64::try_from(took).unwrap_or(u64::MAX);
        self.metrics.leg(role, took_us);
    }

    /// Sends a leg's request and waits for the response head.
    async fn exchange<S: Scope<N>>(
        &self,
        scope: &S,
        upstream: &Connection<N>,
        call: &Call<'_>,
        response: &mut Response,
        deadlines: &Deadlines,
    ) -> Result<(), CallError> {
        self.send_spliced(scope, upstream, &call.request(), response, deadlines.send)
            .await?;
        let deadline = self.first_byte(upstream).or_sooner(deadlines.head);
        self.receive_response(scope, upstream, response, deadline)
            .await
    }

    /// Reads the rest of a response whose head has arrived, and returns its status too. The body of
    /// a response other than 2xx is not read.
    async fn collect<S: Scope<N>>(
        &self,
        scope: &S,
        upstream: Connection<N>,
        call: &Call<'_>,
        mut response: Response,
        deadlines: &Deadlines,
    ) -> Result<(u16, CallEnd<N>), CallError> {
        let (at, status) = (self.net.now(), response.head.status);
        let framing = h1::response_framing(Method::Post, &response.head, &response.bytes);
        response.framing = framing.map_err(|_| CallError::Failed(Cause::BadResponse))?;
        if !(200..300).contains(&status) {
            return Ok((status, CallEnd::Status(upstream, response)));
        }
        scope.on_success();
        let is_read = call.leg.take != Take::Nothing;
        if is_read && response.is_coded() {
            return Err(CallError::Failed(Cause::BadResponse));
        }
        let read = self.read_response(scope, upstream, response, call.leg.take, deadlines.end);
        Ok((status, CallEnd::Done(read.await?, at)))
    }

    /// Reads a response whose framing is known to its end and keeps the part that `take` specifies.
    /// Returns the connection to the pool if it can be reused.
    pub(crate) async fn read_response<S: Scope<N>>(
        &self,
        scope: &S,
        upstream: Connection<N>,
        response: Response,
        take: Take,
        deadline: Deadline,
    ) -> Result<Collected, CallError> {
        let keeps = h1::response_keeps_alive(&response.head, &response.bytes, response.framing);
        let read = self.read_body(scope, &upstream, &response, take, deadline);
        let (collected, has_surplus) = read.await?;
        if let Some(clean) = CleanEnd::of(keeps, upstream.is_sent(), has_surplus) {
            upstream.release(self, clean);
        }
        self.buffers.recycle(response.bytes);
        Ok(collected)
    }

    /// Reads the body of a response as it arrives and keeps the part that `take` specifies. Also
    /// returns whether bytes or the end of the connection followed the response, so that it cannot
    /// be reused.
    async fn read_body<S: Scope<N>>(
        &self,
        scope: &S,
        upstream: &Connection<N>,
        response: &Response,
        take: Take,
        deadline: Deadline,
    ) -> Result<(Collected, bool), CallError> {
        let bytes_max = self.config.pd.prefill_response_bytes_max;
        // Responses with routed experts have 84 MiB and more, of which hardly anything is kept.
        let read_bytes_max = match take {
            Take::Whole => bytes_max as u64,
            Take::Page => PAGE_BYTES_MAX as u64,
            Take::Handoff | Take::Transfer | Take::Nothing | Take::Response(_) => {
                READ_PAST_BYTES_MAX
            }
        };
        let length = match response.framing {
            Framing::Length(length) => length,
            _ => 0,
        };
        let reader = || PrefillResponse::new(bytes_max, &self.budget).of_length(length);
        let whole = || {
            let mut kept = Kept::new(&self.budget);
            kept.announce(usize::try_from(length.min(read_bytes_max)).unwrap_or(0));
            kept
        };
        let mut reading = Reading {
            meter: BodyMeter::new(response.framing),
            collector: match take {
                Take::Handoff => Collector::Handoff(Box::new(reader())),
                Take::Transfer => Collector::Handoff(Box::new(reader().reading_end())),
                Take::Whole | Take::Page => Collector::Whole(whole(), Validator::new()),
                Take::Nothing | Take::Response(_) => Collector::Nothing,
            },
            bytes_max: read_bytes_max,
            has_surplus: false,
        };
        reading.feed(response.rest())?;
        let conn = upstream.conn();
        while !reading.meter.is_done() {
            scope
                .until(Stage::AfterRequest, deadline, |cx| conn.poll_readable(cx))
                .await
                .or_call_error()?;
            let received = self.buffers.with_small(|buffer| {
                conn.try_recv(buffer)
                    .map(|n| (n, reading.feed(&buffer[..n])))
            });
            match received {
                Ok((0, _)) if reading.meter.ends_at_close() => {
                    reading.has_surplus = true;
                    break;
                }
                Ok((0, _)) => return Err(CallError::Failed(Cause::BadResponse)),
                Ok((_, taken)) => taken?,
                Err(error) if would_block(&error) => {}
                Err(_) => return Err(CallError::Failed(Cause::BadResponse)),
            }
        }
        let has_surplus = reading.has_surplus;
        let collected = match reading.collector {
            Collector::Handoff(scan) => {
                let handoff = scan
                    .finish()
                    .map_err(|_| CallError::Failed(Cause::BadResponse))?;
                Collected::Handoff(Box::new(handoff))
            }
            Collector::Whole(mut bytes, validator) => {
                bytes.complete();
                let valid = validator.finish();
                valid.map_err(|_| CallError::Failed(Cause::BadResponse))?;
                Collected::Whole(bytes)
            }
            Collector::Nothing => Collected::Nothing,
        };
        Ok((collected, has_surplus))
    }
}

/// The state of reading a response body.
struct Reading {
    meter: BodyMeter,
    collector: Collector,
    bytes_max: u64,
    has_surplus: bool,
}

enum Collector {
    /// Scans the prefill response as it arrives and keeps only the handoff.
    Handoff(Box<PrefillResponse>),
    /// Keeps everything, which is validated as it arrives, since it can have many MiB.
    Whole(Kept, Validator),
    Nothing,
}

impl Reading {
    fn feed(&mut self, received: &[u8]) -> Result<(), CallError> {
        let mut kept = Ok(());
        let collector = &mut self.collector;
        let taken = self.meter.decode(received, |span| match collector {
            _ if kept.is_err() => {}
            Collector::Handoff(scan) => {
                if let Err(error) = scan.feed(span.of(received)) {
                    kept = Err(error.reason);
                }
            }
            Collector::Whole(bytes, validator) => {
                let piece = span.of(received);
                if bytes.append(piece).is_err() {
                    kept = Err(JsonReason::BudgetSpent);
                } else if let Err(error) = validator.feed(piece) {
                    kept = Err(error.reason);
                }
            }
            Collector::Nothing => {}
        });
        let taken = taken.map_err(|_| CallError::Failed(Cause::BadResponse))?;
        self.has_surplus |= taken < received.len();
        if self.meter.payload_bytes() > self.bytes_max {
            return Err(CallError::Failed(Cause::TooLarge));
        }
        kept.map_err(|reason| match reason {
            JsonReason::KeptTooLarge => CallError::Failed(Cause::TooLarge),
            JsonReason::BudgetSpent => CallError::Other(Fault::BudgetSpent),
            _ => CallError::Failed(Cause::BadResponse),
        })
    }
}
