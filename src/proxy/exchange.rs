//! One request and its response: the state that everything which serves the request shares.

use std::cell::Cell;
use std::io::IoSlice;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{SystemTime, UNIX_EPOCH};

use super::access_log::RequestStats;
use super::client::{Client, Watch};
use super::head::{self, LocalResponse};
use super::request::{Request, RequestBody};
use super::request_id::RequestId;
use super::shard::Shard;
use crate::api::{Api, Route};
use crate::fault::Fault;
use crate::h1::{self, BodyMeter, Framing, Name, RequestHead};
use crate::metrics::{self, Phase};
use crate::net::Net;
use crate::pd::Role;
use crate::trace::RequestTrace;
use crate::upstream::{Deadline, Scope, Stage, Timeout, Waited};

/// The state of one request while it is served.
pub(super) struct Exchange<'a, N: Net> {
    pub(super) shard: &'a Rc<Shard<N>>,
    pub(super) client: &'a Client<N>,
    pub(super) request: Request,
    pub(super) reply: Reply,
    /// Whether the client connection stays open for another request. Starts as the client's choice
    /// and is cleared when the response will close the connection.
    pub(super) keep_alive: bool,
    pub(super) stats: RequestStats,
    /// Text about the failure that is added to the message in the error response.
    pub(super) detail: Option<Box<str>>,
    pub(super) trace: RequestTrace,
}

/// How much of the response has been sent to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// Nothing has been sent, so any response is still possible.
    Unsent,
    /// The head with this status has been sent, and perhaps a part of the body.
    Streaming(u16),
    /// The whole response has been sent.
    Done(u16),
    /// The response ended before it was complete. Only its missing end shows that to the client.
    Broken(u16),
}

impl Reply {
    /// Returns whether no part of a response has been sent.
    pub(super) fn is_unsent(self) -> bool {
        self == Self::Unsent
    }

    /// Returns the status of the response; `None` if no part of it has been sent.
    pub(super) const fn status(self) -> Option<u16> {
        match self {
            Self::Unsent => None,
            Self::Streaming(status) | Self::Done(status) | Self::Broken(status) => Some(status),
        }
    }

    /// Records that the head of a response is about to be sent.
    pub(super) fn begin(&mut self, status: u16) {
        debug_assert!(self.is_unsent(), "a second response");
        *self = Self::Streaming(status);
    }

    /// Records that the response has been sent completely.
    pub(super) const fn finish(&mut self) {
        if let Self::Streaming(status) = *self {
            *self = Self::Done(status);
        }
    }

    /// Records that nothing more of the response will be sent.
    pub(super) const fn break_off(&mut self) {
        if let Self::Streaming(status) = *self {
            *self = Self::Broken(status);
        }
    }
}

impl<'a, N: Net> Exchange<'a, N> {
    /// Reads a request head from the client and creates an exchange from it. Fails if the head is
    /// malformed or does not arrive in time, or if the client disconnects.
    pub(super) async fn begin(
        shard: &'a Rc<Shard<N>>,
        client: &'a Client<N>,
    ) -> Result<Self, Fault> {
        let started = shard.net.now();
        let deadline = Deadline::of(started, shard.config.timeouts.head, Timeout::Client);
        let mut head = RequestHead::default();
        head.fields = shard.buffers.fields();
        while !client.parse_head(&mut head).map_err(Fault::Head)? {
            client.receive_head(shard, deadline).await?;
        }
        let framing = {
            let ahead = client.ahead.borrow();
            h1::request_framing(&head, ahead.unread()).map_err(Fault::Head)?
        };
        // The end of a chunked body is not known, so the bytes after it are put back later.
        let body_bytes = match framing {
            Framing::None => 0,
            Framing::Length(length) => usize::try_from(length).unwrap_or(usize::MAX),
            Framing::Chunked | Framing::UntilClose => usize::MAX,
        };
        let bytes_max = head.len.saturating_add(body_bytes);
        let bytes = client.take_ahead(shard, bytes_max);
        let keep_alive = h1::request_keeps_alive(&head, &bytes);
        let client_id = head
            .field(Name::XRequestId)
            .map(|field| field.value.of(&bytes));
        let unix = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let random = [shard.net.random(), shard.net.random()];
        let unix_ms = u64::try_from(unix.as_millis()).unwrap_or(0);
        let id = RequestId::choose(client_id, unix_ms, random);
        let route = shard.config.routes.of(head.method, head.target.of(&bytes));
        let trace = RequestTrace::begin(shard.tracer.as_ref(), &shard.net, &head, &bytes, started);
        let mut stats = RequestStats::new(route_label(route), started);
        if shard.access.borrow().is_some() {
            stats.collect_logged(&trace, &head, &bytes);
        }
        Ok(Self {
            shard,
            client,
            request: Request {
                head,
                bytes,
                framing,
                id,
                route,
                body: match framing {
                    Framing::None => RequestBody::Done,
                    _ => RequestBody::Unread,
                },
            },
            reply: Reply::Unsent,
            keep_alive,
            stats,
            detail: None,
            trace,
        })
    }

    /// If nothing of the body has been read, and it arrived completely with the head, skips it:
    /// the request is refused, and the connection can carry the next one.
    pub(super) fn skip_arrived_body(&mut self) {
        let request = &mut self.request;
        if request.body != RequestBody::Unread {
            return;
        }
        let mut meter = BodyMeter::new(request.framing);
        let arrived = &request.bytes[request.head.len..];
        if let Ok(taken) = meter.take(arrived)
            && meter.is_done()
        {
            self.client.put_back(&arrived[taken..]);
            request.bytes.truncate(request.head.len);
            request.body = RequestBody::Done;
        }
    }

    /// Sends `100 Continue` to a client that waits for it before sending its body (RFC 9110
    /// 10.1.1).
    pub(super) async fn send_continue(&self) -> Result<(), Fault> {
        let line = IoSlice::new(b"HTTP/1.1 100 Continue\r\n\r\n");
        self.client.send(self.shard, &[line]).await
    }

    /// Returns whether the client connection can stay open after the response that is about to be
    /// written. It cannot if part of the request body is still unread or the process is draining.
    pub(super) fn keeps_alive(&self) -> bool {
        self.keep_alive && self.request.body.is_done() && !self.shard.is_draining()
    }

    /// Sends a complete response generated by the proxy. `error` is the label of the fault that the
    /// response reports; `None` if it is not an error.
    pub(super) async fn respond_local(
        &mut self,
        status: u16,
        body: &[u8],
        error: Option<&'static str>,
        retry_after_secs: Option<u32>,
    ) -> Result<(), Fault> {
        let mut out = self.shard.buffers.buffer();
        self.keep_alive = self.keeps_alive();
        head::push_local_response(
            &mut out,
            &LocalResponse {
                status,
                body,
                request_id: self.request.id.as_bytes(),
                error,
                retry_after_secs,
                keep_alive: self.keep_alive,
                http10: self.request.is_http10(),
                is_head: self.request.is_head(),
            },
        );
        self.reply.begin(status);
        self.stats.bytes_out += out.len() as u64;
        self.client.send(self.shard, &[IoSlice::new(&out)]).await?;
        self.reply.finish();
        self.shard.buffers.recycle(out);
        Ok(())
    }

    /// Sets the phase under which the metrics count a disconnect of the client from now on.
    pub(super) fn enter(&self, phase: Phase) {
        self.client.phase.set(phase);
    }
}

const fn route_label(route: Route) -> metrics::Route {
    match route {
        Route::Health => metrics::Route::Health,
        Route::Intercepted(Api::Unsplit) | Route::Form | Route::Other => metrics::Route::Other,
        Route::Intercepted(Api::Chat) => metrics::Route::Chat,
        Route::Intercepted(Api::Completions) => metrics::Route::Completions,
        Route::Intercepted(Api::Messages) => metrics::Route::Messages,
        Route::Intercepted(Api::Responses) => metrics::Route::Responses,
        Route::Intercepted(Api::Generate) => metrics::Route::Generate,
        Route::Intercepted(Api::Invocations) => metrics::Route::Invocations,
    }
}

impl<N: Net> Scope<N> for Exchange<'_, N> {
    fn phase(&self) -> &Cell<Phase> {
        &self.client.phase
    }

    fn record_leg(&self, role: Role, ended: Result<u16, &'static str>) {
        self.trace.leg_ended(&self.shard.net, role, ended);
    }

    async fn until<T>(
        &self,
        stage: Stage,
        deadline: Deadline,
        ready: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Waited<T> {
        let watch = match stage {
            // The upload reads the rest of the body from the socket, so it must stay there.
            Stage::BeforeRequest if !self.request.body.is_done() => Watch::Hangup,
            Stage::BeforeRequest | Stage::AfterRequest => Watch::Ahead,
        };
        self.client.until(self.shard, watch, deadline, ready).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_ends_done_or_broken_once_it_has_begun() {
        let mut reply = Reply::Unsent;
        reply.finish();
        reply.break_off();
        assert_eq!((reply, reply.status()), (Reply::Unsent, None));
        reply.begin(200);
        let mut other = reply;
        reply.finish();
        reply.break_off();
        assert_eq!((reply, reply.status()), (Reply::Done(200), Some(200)));
        other.break_off();
        other.finish();
        assert_eq!((other, other.status()), (Reply::Broken(200), Some(200)));
    }
}
