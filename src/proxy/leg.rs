//! One upstream call: obtaining a connection, sending a request and receiving the response head.

use std::cell::Cell;
use std::io::IoSlice;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::client::Watch;
use super::dial::Dials;
use super::exchange::Exchange;
use super::shard::Shard;
use super::wait::{Deadline, Timeout, Waited};
use crate::fault::{Cause, Fault};
use crate::fleet::Target;
use crate::h1::{Framing, ResponseHead};
use crate::json::Splices;
use crate::limits::{ADDRESSES_MAX, INTERIM_RESPONSES_MAX, RESOLVED_SECS_MAX, SEND_SLICES_MAX};
use crate::metrics::{Phase, ShardMetrics};
use crate::net::pool::EndpointId;
use crate::net::{Address, Conn, Net, would_block};
use crate::pd::Role;

/// How a call to an engine failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallError {
    /// The engine or the connection to it failed.
    Failed(Cause),
    /// A deadline of the leg passed.
    TimedOut(Timeout),
    /// The client has disconnected, or the leg is no longer needed.
    Disconnected,
    /// A fault that has nothing to do with the engine, such as a malformed request body that is
    /// forwarded as it arrives, or a resource of this machine that is exhausted.
    Other(Fault),
}

impl CallError {
    /// Returns the fault of a leg of `role` whose call failed in this way.
    pub(super) const fn fault(self, role: Role) -> Fault {
        match self {
            Self::Failed(cause) => Fault::leg(role, cause),
            Self::TimedOut(timeout) => Fault::leg(role, Self::cause_of(timeout)),
            Self::Disconnected => Fault::ClientGone,
            Self::Other(fault) => fault,
        }
    }

    /// Returns whether no connection to the engine could be established.
    pub(super) const fn is_refused(self) -> bool {
        matches!(
            self,
            Self::Failed(Cause::Refused) | Self::TimedOut(Timeout::Connect)
        )
    }

    const fn cause_of(timeout: Timeout) -> Cause {
        match timeout {
            Timeout::Connect => Cause::ConnectTimeout,
            Timeout::Pair => Cause::PairTimeout,
            Timeout::Client
            | Timeout::FirstByte
            | Timeout::Leg
            | Timeout::Handoff
            | Timeout::Pause
            | Timeout::Detached => Cause::Timeout,
        }
    }
}

impl From<Fault> for CallError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::ClientGone => Self::Disconnected,
            fault => Self::Other(fault),
        }
    }
}

impl<T> Waited<T> {
    /// Returns the awaited value, or the error of a call that waited for it.
    pub(super) fn or_call_error(self) -> Result<T, CallError> {
        match self {
            Self::Ready(value) => Ok(value),
            Self::Disconnected => Err(CallError::Disconnected),
            Self::TimedOut(timeout) => Err(CallError::TimedOut(timeout)),
        }
    }
}

impl From<Cause> for CallError {
    fn from(cause: Cause) -> Self {
        Self::Failed(cause)
    }
}

/// An engine connection in use. Dropping it closes it, which makes the engine abort the request.
pub(super) struct Upstream<N: Net> {
    conn: N::Conn,
    id: EndpointId,
    /// Whether the connection was taken from the pool, so that the engine may have closed it in the
    /// meantime.
    pub(super) reused: bool,
    /// A send has failed. The kernel reports a reset only once, so no later receive will report it:
    /// an end of stream on this connection may be a reset.
    pub(super) broke: Cell<bool>,
    /// Whether a whole request has been sent on this connection.
    pub(super) is_sent: Cell<bool>,
    _active: Active,
}

impl<N: Net> Upstream<N> {
    pub(super) const fn conn(&self) -> &N::Conn {
        &self.conn
    }

    /// Returns the connection to the pool. The caller must have read the engine's response to its
    /// end, with no bytes after it.
    pub(super) fn release(self, shard: &Shard<N>) {
        shard.pools.checkin(self.id, self.conn);
    }
}

/// Counts an engine connection as in use in the metrics until dropped.
struct Active {
    metrics: Arc<ShardMetrics>,
    role: Role,
}

impl Active {
    fn new(metrics: &Arc<ShardMetrics>, role: Role) -> Self {
        metrics.pool_active(role, 1);
        Self {
            metrics: Arc::clone(metrics),
            role,
        }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.metrics.pool_active(self.role, -1);
    }
}

/// Whether a leg may use a pooled connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reuse {
    /// A pooled connection that has received nothing while idle, if there is one; otherwise a new
    /// one.
    Allowed,
    /// Always a new connection.
    Never,
}

/// The context that a leg runs in: its exchange, or a task. Defines what ends a wait besides the
/// awaited event and its deadline.
pub(super) trait Waits<N: Net> {
    /// The shard that the leg runs on.
    fn shard(&self) -> &Rc<Shard<N>>;

    /// The phase of the request under which the metrics count a client disconnect.
    fn phase(&self) -> &Cell<Phase>;

    /// How to watch for a client disconnect before the leg's request is sent. If the client's
    /// upload has not been read yet, its bytes must remain in the socket, where the upload reads
    /// them.
    fn early_watch(&self) -> Watch;

    /// Called when the head of a successful (2xx) response to the leg has arrived.
    fn on_success(&self) {}

    /// Waits until `ready` is ready, the leg is no longer needed (its client has disconnected or
    /// its owner has cancelled it), or the deadline passes.
    async fn until<T>(
        &self,
        watch: Watch,
        deadline: Deadline,
        ready: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Waited<T>;
}

impl<N: Net> Waits<N> for Exchange<'_, N> {
    fn shard(&self) -> &Rc<Shard<N>> {
        self.shard
    }

    fn phase(&self) -> &Cell<Phase> {
        &self.client.phase
    }

    fn early_watch(&self) -> Watch {
        if self.body_done {
            Watch::Ahead
        } else {
            Watch::Hangup
        }
    }

    async fn until<T>(
        &self,
        watch: Watch,
        deadline: Deadline,
        ready: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Waited<T> {
        self.client.until(self.shard, watch, deadline, ready).await
    }
}

impl<N: Net, W: Waits<N>> Legs<N> for W {}

/// The steps common to all legs.
pub(super) trait Legs<N: Net>: Dials<N> {
    /// Returns a connection to an engine: a pooled one if `reuse` allows it and one is idle,
    /// otherwise a new one. Fails if no address of the engine accepts the connection in time.
    async fn connect(
        &self,
        id: EndpointId,
        target: &Target,
        role: Role,
        reuse: Reuse,
        deadline: Deadline,
    ) -> Result<Upstream<N>, CallError> {
        let active = Active::new(&self.shard().metrics, role);
        if reuse != Reuse::Never
            && let Some(conn) = self.shard().pools.checkout(id)
        {
            return Ok(Upstream {
                conn,
                id,
                reused: true,
                broke: Cell::new(false),
                is_sent: Cell::new(false),
                _active: active,
            });
        }
        let before = self.phase().replace(Phase::Connect);
        // On failure the phase remains `Connect`, so that a disconnect during the connect is
        // counted there.
        let conn = self.connect_new(id, target, role, deadline).await?;
        self.phase().set(before);
        Ok(Upstream {
            conn,
            id,
            reused: false,
            broke: Cell::new(false),
            is_sent: Cell::new(false),
            _active: active,
        })
    }

    async fn connect_new(
        &self,
        id: EndpointId,
        target: &Target,
        role: Role,
        deadline: Deadline,
    ) -> Result<N::Conn, CallError> {
        const TIMED_OUT: CallError = CallError::TimedOut(Timeout::Connect);
        let shard = self.shard();
        let wait = shard.config.timeouts.connect;
        let sooner = || Deadline::of(shard.net.now(), wait, Timeout::Connect).or_sooner(deadline);
        let addresses = self.addresses(id, target, sooner()).await?;
        let mut timed_out = false;
        for address in addresses.iter().take(ADDRESSES_MAX) {
            let conn = match self.begin_connect(address, sooner()).await {
                Ok(Some(conn)) => (shard.secure)(conn, role, target),
                Ok(None) => continue,
                Err(TIMED_OUT) => {
                    timed_out = true;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let waited = self
                .until(self.early_watch(), sooner(), |cx| conn.poll_writable(cx))
                .await;
            match waited.or_call_error() {
                Ok(()) if conn.connected().is_ok() => return Ok(conn),
                Ok(()) => {}
                // Another address of the same engine may accept the connection.
                Err(TIMED_OUT) => timed_out = true,
                Err(error) => return Err(error),
            }
        }
        Err(if timed_out {
            TIMED_OUT
        } else {
            CallError::Failed(Cause::Refused)
        })
    }

    /// Returns the addresses of an engine. A target that is an address needs no look-up. The
    /// addresses of a name come from the pool's table or, if it has none, from the resolver.
    /// Addresses in the table that are older than `RESOLVED_SECS_MAX` are still returned, but also
    /// looked up again for later requests. Empty if the name does not resolve.
    async fn addresses(
        &self,
        id: EndpointId,
        target: &Target,
        deadline: Deadline,
    ) -> Result<Rc<[Address]>, CallError> {
        let shard = self.shard();
        let known = shard.pools.addresses(id);
        if let Some((addresses, at)) = &known {
            let is_young = shard.net.now().since(*at) < Duration::from_secs(RESOLVED_SECS_MAX);
            if target.name().is_none() || is_young {
                return Ok(Rc::clone(addresses));
            }
        }
        let joined = shard.lookups.borrow_mut().join(target);
        let Some(must_start) = joined else {
            return Err(CallError::Other(Fault::Exhausted));
        };
        let _guard = LookupGuard { shard, target };
        if must_start && !(shard.resolver)(target) {
            shard.lookups.borrow_mut().forget(target);
            return Err(CallError::Other(Fault::Exhausted));
        }
        if let Some((addresses, _)) = known {
            // The known addresses are used while the look-up refreshes them, so no request waits
            // for a name server that has responded before.
            return Ok(addresses);
        }
        self.until(self.early_watch(), deadline, |cx| {
            shard.lookups.borrow_mut().poll(target, cx)
        })
        .await
        .or_call_error()
    }

    /// Sends a whole request: `head` (including its blank line) and the spliced body. Returns
    /// `true` if everything was sent.
    ///
    /// Returns `false` without an error if the engine responds or closes the connection before it
    /// has received everything. The response, if there is one, then states the reason.
    async fn send_spliced(
        &self,
        upstream: &Upstream<N>,
        request: &SplicedRequest<'_>,
        response: &mut Response,
        deadline: Deadline,
    ) -> Result<bool, CallError> {
        let conn = upstream.conn();
        let total = request.head.len() + request.splices.len();
        let mut at = 0;
        loop {
            match request.try_send(conn, at) {
                Ok(sent) => at += sent,
                Err(error) if would_block(&error) => {
                    let event = self
                        .until(Watch::Ahead, deadline, |cx| {
                            if conn.poll_readable(cx).is_ready() {
                                return Poll::Ready(false);
                            }
                            conn.poll_writable(cx).map(|()| true)
                        })
                        .await
                        .or_call_error()
                        // The engine would see a FIN only after reading all buffered bytes. A reset
                        // reaches it immediately.
                        .inspect_err(|_| conn.reset_on_close())?;
                    if !event {
                        // An interim (1xx) response does not stop the send.
                        response.receive(self.shard(), conn)?;
                        if response.is_complete {
                            return Ok(false);
                        }
                    }
                }
                Err(_) => {
                    upstream.broke.set(true);
                    return Ok(false);
                }
            }
            if at == total {
                upstream.is_sent.set(true);
                return Ok(true);
            }
        }
    }

    /// Receives until the head of the engine's response is complete in `response`.
    async fn receive_response(
        &self,
        upstream: &Upstream<N>,
        response: &mut Response,
        deadline: Deadline,
    ) -> Result<(), CallError> {
        let conn = upstream.conn();
        while !response.is_complete {
            self.until(Watch::Ahead, deadline, |cx| conn.poll_readable(cx))
                .await
                .or_call_error()?;
            response.receive(self.shard(), conn)?;
        }
        Ok(())
    }
}

/// Unregisters from a name look-up when dropped, including when the wait was cancelled.
struct LookupGuard<'a, N: Net> {
    shard: &'a Shard<N>,
    target: &'a Target,
}

impl<N: Net> Drop for LookupGuard<'_, N> {
    fn drop(&mut self) {
        self.shard.lookups.borrow_mut().unregister(self.target);
    }
}

/// A whole request: its head including the blank line, and the client's body with edits applied.
pub(super) struct SplicedRequest<'a> {
    pub(super) head: &'a [u8],
    pub(super) splices: &'a Splices,
    pub(super) body: &'a [u8],
}

impl SplicedRequest<'_> {
    /// Sends as much as the socket accepts, starting at offset `at` of the request (the head
    /// followed by the edited body). Returns the number of bytes sent.
    fn try_send<C: Conn>(&self, conn: &C, at: usize) -> std::io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); SEND_SLICES_MAX];
        let mut count = 0;
        if at < self.head.len() {
            slices[0] = IoSlice::new(&self.head[at..]);
            count = 1;
        }
        let skip = at.saturating_sub(self.head.len());
        count += self.splices.fill(self.body, skip, &mut slices[count..]);
        conn.try_send_vectored(&slices[..count])
    }
}

/// The head of an engine's response, complete or not, and the body bytes received so far.
#[derive(Default)]
pub(super) struct Response {
    pub(super) bytes: Vec<u8>,
    pub(super) head: ResponseHead,
    pub(super) framing: Framing,
    is_complete: bool,
    interim: u32,
}

impl Response {
    /// Whether the head of the final response (not an interim 1xx one) has arrived completely.
    pub(super) const fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// The body bytes received so far, including framing: those that arrived with the head and any
    /// appended to `bytes` since.
    pub(super) fn rest(&self) -> &[u8] {
        &self.bytes[self.head.len..]
    }

    /// Receives once from the engine and parses the response head if it is complete.
    ///
    /// # Errors
    /// `ConnectionClosed` if the connection ended before any byte of a response, `BadResponse` if
    /// it ended later or the bytes are malformed.
    pub(super) fn receive<N: Net>(
        &mut self,
        shard: &Shard<N>,
        conn: &N::Conn,
    ) -> Result<(), CallError> {
        if self.bytes.capacity() == 0 {
            // Allocated only now, because the engine may have been silent for minutes.
            self.bytes = shard.buffer();
            self.head.fields = shard.fields();
        }
        let received = shard.with_small(|buffer| {
            conn.try_recv(buffer)
                .inspect(|n| self.bytes.extend_from_slice(&buffer[..*n]))
        });
        let nothing_yet = self.bytes.is_empty() && self.interim == 0;
        match received {
            Ok(0) if nothing_yet => Err(CallError::Failed(Cause::ConnectionClosed)),
            Ok(0) => Err(CallError::Failed(Cause::BadResponse)),
            Ok(_) => self.parse(),
            Err(error) if would_block(&error) => Ok(()),
            Err(_) if nothing_yet => Err(CallError::Failed(Cause::ConnectionClosed)),
            Err(_) => Err(CallError::Failed(Cause::BadResponse)),
        }
    }

    /// Parses the response head if it is complete. Interim responses (1xx other than 101, RFC 9110
    /// 15.2) before it are dropped, up to a limit: the proxy itself handles `Expect: 100-continue`,
    /// so none of them is meant for the client.
    fn parse(&mut self) -> Result<(), CallError> {
        while self
            .head
            .parse(&self.bytes)
            .map_err(|_| CallError::Failed(Cause::BadResponse))?
        {
            let is_final = self.head.status >= 200 || self.head.status == 101;
            if is_final {
                self.is_complete = true;
                return Ok(());
            }
            self.interim += 1;
            if self.interim > INTERIM_RESPONSES_MAX {
                return Err(CallError::Failed(Cause::BadResponse));
            }
            self.bytes.drain(..self.head.len);
        }
        Ok(())
    }
}
