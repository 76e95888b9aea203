//! One upstream call: a connection, a request on it, the head of its answer.

use std::cell::Cell;
use std::io::IoSlice;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use super::client::{Limit, Watch};
use super::dial::Dials;
use super::exchange::Exchange;
use super::shard::{Shard, leg_role};
use crate::fault::Fault;
use crate::fleet::Target;
use crate::h1::{Framing, ResponseHead};
use crate::json::Splices;
use crate::limits::{ADDRESSES_MAX, INTERIM_RESPONSES_MAX, RESOLVED_SECS_MAX, SEND_SLICES_MAX};
use crate::metrics::{Phase, ShardMetrics};
use crate::net::pool::EndpointId;
use crate::net::{Address, Conn, Net, would_block};
use crate::pd::Role;

/// How a leg failed before the head of its answer was there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LegFault {
    /// No address of the engine accepts connections.
    Refused,
    /// None did in time.
    ConnectTimeout,
    /// The connection ended before the first answer byte.
    ConnectionClosed,
    /// The answer is not HTTP/1.1.
    BadResponse,
    /// The answer, which is read here, is longer than `--max-prefill-answer`.
    TooLarge,
    /// Something that has nothing to do with this engine.
    Other(Fault),
}

impl LegFault {
    /// The fault it is for a leg of that role.
    pub(super) const fn fault(self, role: Role) -> Fault {
        match (self, role) {
            (Self::Refused, Role::Decode) => Fault::DecodeRefused,
            (Self::ConnectTimeout, Role::Decode) => Fault::DecodeConnectTimeout,
            (Self::ConnectionClosed, Role::Decode) => Fault::DecodeReset,
            (Self::BadResponse, Role::Decode) => Fault::DecodeResponse,
            (Self::Refused | Self::ConnectTimeout, Role::Prefill) => Fault::PrefillConnect,
            (Self::ConnectionClosed, Role::Prefill) => Fault::PrefillReset,
            (Self::BadResponse, Role::Prefill) => Fault::PrefillResponse,
            (Self::Refused | Self::ConnectTimeout, Role::Encode) => Fault::EncodeConnect,
            (Self::ConnectionClosed, Role::Encode) => Fault::EncodeReset,
            (Self::BadResponse, Role::Encode) => Fault::EncodeResponse,
            (
                Self::Refused | Self::ConnectTimeout | Self::ConnectionClosed | Self::BadResponse,
                Role::Bootstrap,
            ) => Fault::Bootstrap,
            (Self::TooLarge, Role::Prefill) => Fault::PrefillResponseTooLarge,
            (Self::TooLarge, Role::Decode) => Fault::ChunkResponse,
            (Self::TooLarge, Role::Encode) => Fault::EncodeResponse,
            (Self::TooLarge, Role::Bootstrap) => Fault::Bootstrap,
            (Self::Other(fault), _) => fault,
        }
    }
}

impl From<Fault> for LegFault {
    fn from(fault: Fault) -> Self {
        Self::Other(fault)
    }
}

/// A connection to an engine, in use. Dropping it closes it, which makes the engine stop.
pub(super) struct Upstream<N: Net> {
    conn: N::Conn,
    id: EndpointId,
    /// It has served a request before, so the engine may have closed it meanwhile.
    pub(super) reused: bool,
    /// A send failed: the kernel told that reset then, and will tell no receive of it.
    pub(super) broke: Cell<bool>,
    /// The engine has been sent a whole request.
    pub(super) is_sent: Cell<bool>,
    _active: Active,
}

impl<N: Net> Upstream<N> {
    pub(super) const fn conn(&self) -> &N::Conn {
        &self.conn
    }

    /// Gives the connection back for another request. The caller has seen its exchange end
    /// cleanly, with nothing behind the answer.
    pub(super) fn release(self, shard: &Shard<N>) {
        shard.pools.checkin(self.id, self.conn);
    }
}

/// Counts a connection in use.
struct Active {
    metrics: Arc<ShardMetrics>,
    role: Role,
}

impl Active {
    fn new(metrics: &Arc<ShardMetrics>, role: Role) -> Self {
        metrics.pool_active(leg_role(role), 1);
        Self {
            metrics: Arc::clone(metrics),
            role,
        }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.metrics.pool_active(leg_role(self.role), -1);
    }
}

/// Which connection a leg may run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reuse {
    /// A pooled one that was looked at this instant and was silent.
    Allowed,
    /// A new one.
    Never,
}

/// Whoever runs a leg: what its waits end with besides the awaited event.
pub(super) trait Waits<N: Net> {
    /// The shard it runs on.
    fn shard(&self) -> &Rc<Shard<N>>;

    /// What it is doing, for the metric of clients that leave.
    fn phase(&self) -> &Cell<Phase>;

    /// How to look out for the client before a leg has begun: the rest of an upload must stay in
    /// the socket, where the upload looks for it.
    fn early_watch(&self) -> Watch;

    /// The head of a successful answer is there.
    fn on_success(&self) {}

    /// Waits for `ready`, for whoever wants the leg's answer to leave, or for the limit.
    ///
    /// # Errors
    /// `ClientGone`, or the limit's fault.
    async fn until<T>(
        &self,
        watch: Watch,
        limit: Limit,
        ready: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Result<T, Fault>;
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
        limit: Limit,
        ready: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Result<T, Fault> {
        self.client.until(self.shard, watch, limit, ready).await
    }
}

impl<N: Net, W: Waits<N>> Legs<N> for W {}

/// What every leg is made of.
pub(super) trait Legs<N: Net>: Dials<N> {
    /// Gets a connection to an engine.
    async fn connect(
        &self,
        id: EndpointId,
        target: &Target,
        role: Role,
        reuse: Reuse,
        limit: Limit,
    ) -> Result<Upstream<N>, LegFault> {
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
        // A client that leaves meanwhile is counted under this phase.
        let conn = self.connect_new(id, target, role, limit).await?;
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
        limit: Limit,
    ) -> Result<N::Conn, LegFault> {
        const TIMEOUT: Fault = Fault::Bug("connect timeout");
        let shard = self.shard();
        let wait = shard.config.timeouts.connect;
        let connect_limit = || Limit::of(shard.net.now(), wait, TIMEOUT).or_sooner(limit);
        let timed = |fault: Fault| match fault {
            TIMEOUT => LegFault::ConnectTimeout,
            other => LegFault::Other(other),
        };
        let addresses = self.addresses(id, target, connect_limit());
        let addresses = addresses.await.map_err(timed)?;
        let mut timed_out = false;
        for address in addresses.iter().take(ADDRESSES_MAX) {
            let begun = self.begin_connect(address, connect_limit()).await;
            let conn = match begun.map_err(timed) {
                Ok(Some(conn)) => (shard.secure)(conn, role, target),
                Ok(None) => continue,
                Err(LegFault::ConnectTimeout) => {
                    timed_out = true;
                    continue;
                }
                Err(fault) => return Err(fault),
            };
            let ended = self
                .until(self.early_watch(), connect_limit(), |cx| {
                    conn.poll_writable(cx)
                })
                .await;
            match ended.map_err(timed) {
                Ok(()) if conn.connected().is_ok() => return Ok(conn),
                Ok(()) => {}
                // Another address of the same engine may be the one that answers.
                Err(LegFault::ConnectTimeout) => timed_out = true,
                Err(fault) => return Err(fault),
            }
        }
        Err(if timed_out {
            LegFault::ConnectTimeout
        } else {
            LegFault::Refused
        })
    }

    /// The addresses of an engine: an address as it stands, a name through the resolver.
    async fn addresses(
        &self,
        id: EndpointId,
        target: &Target,
        limit: Limit,
    ) -> Result<Rc<[Address]>, Fault> {
        let shard = self.shard();
        let known = shard.pools.addresses(id);
        if let Some((addresses, at)) = &known {
            let is_young = shard.net.now().since(*at) < Duration::from_secs(RESOLVED_SECS_MAX);
            if target.name().is_none() || is_young {
                return Ok(Rc::clone(addresses));
            }
        }
        let joined = shard.lookups.borrow_mut().join(target);
        let Some(must_ask) = joined else {
            return Err(Fault::Exhausted);
        };
        let _leave = Leave { shard, target };
        if must_ask && !(shard.resolver)(target) {
            shard.lookups.borrow_mut().forget(target);
            return Err(Fault::Exhausted);
        }
        if let Some((addresses, _)) = known {
            // What it was is used while the look-up goes on; nobody waits for a name server.
            return Ok(addresses);
        }
        let response = self
            .until(self.early_watch(), limit, |cx| {
                shard.lookups.borrow_mut().poll(target, cx)
            })
            .await?;
        Ok(response)
    }

    /// Sends a whole request: `head` (with its blank line) and the spliced body. Stops early,
    /// without an error, when the engine answers or closes before it has taken everything: the
    /// answer says why. `true` when everything was sent.
    async fn send_spliced(
        &self,
        upstream: &Upstream<N>,
        request: &SplicedRequest<'_>,
        response: &mut Response,
        limit: Limit,
    ) -> Result<bool, LegFault> {
        let conn = upstream.conn();
        let total = request.head.len() + request.splices.len();
        let mut at = 0;
        loop {
            match request.try_send(conn, at) {
                Ok(sent) => at += sent,
                Err(error) if would_block(&error) => {
                    let event = self
                        .until(Watch::Ahead, limit, |cx| {
                            if conn.poll_readable(cx).is_ready() {
                                return Poll::Ready(false);
                            }
                            conn.poll_writable(cx).map(|()| true)
                        })
                        .await
                        // Bytes the engine has not read yet would keep a plain end from it.
                        .inspect_err(|_| conn.reset_on_close())?;
                    if !event {
                        // An interim answer is no reason to stop.
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

    /// Waits for the head of the answer.
    async fn receive_response(
        &self,
        upstream: &Upstream<N>,
        response: &mut Response,
        limit: Limit,
    ) -> Result<(), LegFault> {
        let conn = upstream.conn();
        while !response.is_complete {
            self.until(Watch::Ahead, limit, |cx| conn.poll_readable(cx))
                .await?;
            response.receive(self.shard(), conn)?;
        }
        Ok(())
    }
}

/// Leaves a look-up also when its wait was given up.
struct Leave<'a, N: Net> {
    shard: &'a Shard<N>,
    target: &'a Target,
}

impl<N: Net> Drop for Leave<'_, N> {
    fn drop(&mut self) {
        self.shard.lookups.borrow_mut().leave(self.target);
    }
}

/// A whole request: its head with the blank line, and the client's body with edits.
pub(super) struct SplicedRequest<'a> {
    pub(super) head: &'a [u8],
    pub(super) splices: &'a Splices,
    pub(super) body: &'a [u8],
}

impl SplicedRequest<'_> {
    /// Sends what fits of everything from `at` on.
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

/// An answer's head while it arrives, and the first of its body behind it.
#[derive(Default)]
pub(super) struct Response {
    pub(super) bytes: Vec<u8>,
    pub(super) head: ResponseHead,
    pub(super) framing: Framing,
    is_complete: bool,
    interim: u32,
}

impl Response {
    /// Whether the final head is there.
    pub(super) const fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// The body bytes that came with the head.
    pub(super) fn rest(&self) -> &[u8] {
        &self.bytes[self.head.len..]
    }

    /// Receives once.
    pub(super) fn receive<N: Net>(
        &mut self,
        shard: &Shard<N>,
        conn: &N::Conn,
    ) -> Result<(), LegFault> {
        if self.bytes.capacity() == 0 {
            // Not before: an engine may be silent for minutes.
            self.bytes = shard.buffer();
            self.head.fields = shard.fields();
        }
        let received = shard.with_small(|buffer| {
            conn.try_recv(buffer)
                .inspect(|n| self.bytes.extend_from_slice(&buffer[..*n]))
        });
        let nothing_yet = self.bytes.is_empty() && self.interim == 0;
        match received {
            Ok(0) if nothing_yet => Err(LegFault::ConnectionClosed),
            Ok(0) => Err(LegFault::BadResponse),
            Ok(_) => self.parse(),
            Err(error) if would_block(&error) => Ok(()),
            Err(_) if nothing_yet => Err(LegFault::ConnectionClosed),
            Err(_) => Err(LegFault::BadResponse),
        }
    }

    /// Parses the head; interim answers (RFC 9110 15.2) are dropped, since the client asked us
    /// and not the engine for a 100, and there is a bound on them.
    fn parse(&mut self) -> Result<(), LegFault> {
        while self
            .head
            .parse(&self.bytes)
            .map_err(|_| LegFault::BadResponse)?
        {
            let is_final = self.head.status >= 200 || self.head.status == 101;
            if is_final {
                self.is_complete = true;
                return Ok(());
            }
            self.interim += 1;
            if self.interim > INTERIM_RESPONSES_MAX {
                return Err(LegFault::BadResponse);
            }
            self.bytes.drain(..self.head.len);
        }
        Ok(())
    }
}
