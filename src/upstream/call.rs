//! One call to an engine whose response the proxy reads itself: sends the request, reads the
//! response, and keeps the part the call was made for.

use super::Upstreams;
use super::connection::{CleanEnd, Connection, Reuse};
use super::error::CallError;
use super::pool::EndpointId;
use super::request::SplicedRequest;
use super::response::Response;
use super::scope::{Scope, Stage};
use super::wait::{Deadline, Timeout};
use crate::fault::Cause;
use crate::fleet::Target;
use crate::h1::{self, BodyMeter, Method, Name};
use crate::json::PrefillResponse;
use crate::net::{Conn, Instant, Net, would_block};
use crate::pd::{Collected, Leg, Role, Take};

/// A leg that is ready to be sent: its target, head and body.
pub(crate) struct Call<'a> {
    pub(crate) id: EndpointId,
    pub(crate) target: &'a Target,
    /// The leg's request head, including the blank line.
    pub(crate) head: &'a [u8],
    pub(crate) leg: &'a Leg,
    /// The client's request body, to which the leg's edits apply.
    pub(crate) body: &'a [u8],
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

/// Result of one attempt of a leg.
pub(crate) enum Attempt<N: Net> {
    /// A successful (2xx) response, which has been read to its end: the part that the leg was sent
    /// for, the time when the head arrived, and the status. A prefill engine's lease on the KV
    /// cache starts at about that time.
    Done(Collected, Instant, u16),
    /// A response with another status, to be relayed or retried. Its body has not been read. The
    /// flag states whether the whole request had been sent.
    Status(Connection<N>, Response, bool),
}

impl<N: Net> Upstreams<N> {
    /// Runs one attempt of a leg. If a pooled connection turns out to be closed, the request is
    /// sent once more on a new connection, which is safe because no response had started. If
    /// `begun` holds a connection, the request is first sent on that one.
    pub(crate) async fn call<S: Scope<N>>(
        &self,
        scope: &S,
        call: &Call<'_>,
        begun: &mut Option<Connection<N>>,
        deadlines: &Deadlines,
    ) -> Result<Attempt<N>, CallError> {
        let role = call.leg.role;
        let mut reuse = Reuse::Allowed;
        loop {
            let upstream = match begun.take() {
                Some(upstream) => upstream,
                None => {
                    self.connect(scope, call.id, call.target, role, reuse, deadlines.head)
                        .await?
                }
            };
            if role == Role::Prefill && self.is_self(call.id) {
                // Treat a prefill candidate that is this proxy or its decoder like one that
                // refuses, so that the next candidate is tried.
                return Err(CallError::Failed(Cause::Refused));
            }
            let mut response = Response::default();
            match self
                .exchange(scope, &upstream, call, &mut response, deadlines)
                .await
            {
                Ok(sent) => {
                    // Boxed so that reading the response does not enlarge the future while the
                    // engine is silent.
                    let collected =
                        self.collect_response(scope, upstream, call, response, sent, deadlines);
                    return Box::pin(collected).await;
                }
                Err(CallError::Failed(Cause::ConnectionClosed))
                    if upstream.reused && reuse == Reuse::Allowed =>
                {
                    self.metrics.replay();
                    reuse = Reuse::Never;
                }
                Err(fault) => return Err(fault),
            }
        }
    }

    /// Sends a leg's request and waits for the response head. Returns whether the whole request was
    /// sent.
    pub(crate) async fn exchange<S: Scope<N>>(
        &self,
        scope: &S,
        upstream: &Connection<N>,
        call: &Call<'_>,
        response: &mut Response,
        deadlines: &Deadlines,
    ) -> Result<bool, CallError> {
        let request = SplicedRequest {
            head: call.head,
            splices: &call.leg.body,
            body: call.body,
        };
        let sent = self
            .send_spliced(scope, upstream, &request, response, deadlines.send)
            .await?;
        let wait = self.config.timeouts.first_byte;
        let first_byte = Deadline::of(self.net.now(), wait, Timeout::FirstByte);
        let deadline = first_byte.or_sooner(deadlines.head);
        self.receive_response(scope, upstream, response, deadline)
            .await?;
        Ok(sent)
    }

    /// Reads the rest of a response whose head has arrived. A status other than 2xx is returned
    /// without reading the body.
    async fn collect_response<S: Scope<N>>(
        &self,
        scope: &S,
        upstream: Connection<N>,
        call: &Call<'_>,
        mut response: Response,
        sent: bool,
        deadlines: &Deadlines,
    ) -> Result<Attempt<N>, CallError> {
        let at = self.net.now();
        let framing = h1::response_framing(Method::Post, &response.head, &response.bytes);
        response.framing = framing.map_err(|_| CallError::Failed(Cause::BadResponse))?;
        if !(200..300).contains(&response.head.status) {
            return Ok(Attempt::Status(upstream, response, sent));
        }
        scope.on_success();
        let is_read = call.leg.take != Take::Nothing;
        if is_read && response.head.field(Name::ContentEncoding).is_some() {
            return Err(CallError::Failed(Cause::BadResponse));
        }
        let keeps = h1::response_keeps_alive(&response.head, &response.bytes, response.framing);
        let read = self.read_body(scope, &upstream, &response, call.leg.take, deadlines.end);
        let (collected, has_surplus) = read.await?;
        if let Some(clean) = CleanEnd::of(keeps, sent, has_surplus) {
            upstream.release(self, clean);
        }
        self.buffers.recycle(response.bytes);
        Ok(Attempt::Done(collected, at, response.head.status))
    }

    /// Reads the body of a response as it arrives and keeps the part that `take` specifies. Also
    /// returns whether bytes or the end of the connection followed the response, so that it cannot
    /// be reused.
    pub(crate) async fn read_body<S: Scope<N>>(
        &self,
        scope: &S,
        upstream: &Connection<N>,
        response: &Response,
        take: Take,
        deadline: Deadline,
    ) -> Result<(Collected, bool), CallError> {
        let pd = &self.config.pd;
        let bytes_max = pd.prefill_response_bytes_max;
        let mut reading = Reading {
            meter: BodyMeter::new(response.framing),
            collector: match take {
                Take::Handoff { allow_flat_blocks } => {
                    let is_allowed = allow_flat_blocks || pd.allow_flat_blocks;
                    let scan = PrefillResponse::new(bytes_max).allow_flat_blocks(is_allowed);
                    Collector::Handoff(Box::new(scan))
                }
                Take::Whole => Collector::Whole(Vec::new()),
                Take::Nothing | Take::Response(_) => Collector::Nothing,
            },
            bytes_max: bytes_max as u64,
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
            Collector::Whole(bytes) => {
                crate::json::validate(&bytes).map_err(|_| CallError::Failed(Cause::BadResponse))?;
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
    Whole(Vec<u8>),
    Nothing,
}

impl Reading {
    fn feed(&mut self, received: &[u8]) -> Result<(), CallError> {
        let mut malformed = false;
        let collector = &mut self.collector;
        let taken = self.meter.decode(received, |span| match collector {
            Collector::Handoff(scan) => malformed |= scan.feed(span.of(received)).is_err(),
            Collector::Whole(bytes) => bytes.extend_from_slice(span.of(received)),
            Collector::Nothing => {}
        });
        let taken = taken.map_err(|_| CallError::Failed(Cause::BadResponse))?;
        self.has_surplus |= taken < received.len();
        if self.meter.payload_bytes() > self.bytes_max {
            return Err(CallError::Failed(Cause::TooLarge));
        }
        if malformed {
            return Err(CallError::Failed(Cause::BadResponse));
        }
        Ok(())
    }
}
