//! A client's connection and everything an exchange may wait for on it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::IoSlice;
use std::task::{Context, Poll};
use std::time::Duration;

use super::shard::Shard;
use crate::fault::Fault;
use crate::h1::{HeadError, RequestHead};
use crate::limits::{CLIENT_AHEAD_BYTES_MAX, RECEIVE_HEAD_BYTES};
use crate::metrics::Phase;
use crate::net::{Conduit, Conn, Instant, Net, Timer, would_block};

/// A client's connection, for as long as it is open.
pub(super) struct Client<N: Net> {
    pub(super) conn: N::Conn,
    /// The one deadline of this session: its phases follow each other.
    timer: Timer,
    /// Bytes received and not yet claimed by a request.
    ahead: RefCell<Vec<u8>>,
    gone: Cell<bool>,
    /// What the session is doing, for the metric of clients that leave.
    pub(super) phase: Cell<Phase>,
    /// Index of the rank whose listener accepted it.
    pub(super) rank: usize,
}

/// How an exchange looks out for its client while it waits for something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watch {
    /// The request has been received whole: read ahead what the client sends early, up to a
    /// bound, and notice its end behind that.
    Ahead,
    /// The client's bytes must stay in the socket (its upload is held up): notice its end only.
    Hangup,
}

/// How long a wait may take, and what it is when it took longer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limit {
    until: Option<Instant>,
    fault: Fault,
}

impl Limit {
    /// No limit: only the awaited event and the client's departure end the wait.
    pub(super) const NONE: Self = Self {
        until: None,
        fault: Fault::ClientGone,
    };

    /// `wait` from `now` on; `None` is no limit.
    pub(super) fn of(now: Instant, wait: Option<Duration>, fault: Fault) -> Self {
        Self {
            until: wait.map(|wait| now.after(wait)),
            fault,
        }
    }

    /// When it ends.
    pub(super) const fn until(self) -> Option<Instant> {
        self.until
    }

    /// What a wait that took longer comes to.
    pub(super) const fn fault(self) -> Fault {
        self.fault
    }

    /// Whichever of the two ends first.
    pub(super) fn or_sooner(self, other: Self) -> Self {
        match (self.until, other.until) {
            (None, _) => other,
            (Some(a), Some(b)) if b < a => other,
            (Some(_), _) => self,
        }
    }
}

impl<N: Net> Client<N> {
    pub(super) fn new(net: &N, conn: N::Conn, rank: usize) -> Self {
        Self {
            conn,
            timer: net.timer(),
            ahead: RefCell::new(Vec::new()),
            gone: Cell::new(false),
            phase: Cell::new(Phase::Idle),
            rank,
        }
    }

    /// Waits for `ready`, for the client to leave, or for the limit; in this order when several
    /// are due, so that a token that is there is always passed on.
    pub(super) async fn until<T>(
        &self,
        shard: &Shard<N>,
        watch: Watch,
        limit: Limit,
        mut ready: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Result<T, Fault> {
        self.check(shard, limit)?;
        let mut armed = false;
        let result = poll_fn(|cx| {
            if let Poll::Ready(value) = ready(cx) {
                return Poll::Ready(Ok(value));
            }
            if self.poll_gone(shard, watch, cx) {
                return Poll::Ready(Err(Fault::ClientGone));
            }
            let Some(until) = limit.until else {
                return Poll::Pending;
            };
            if !armed {
                armed = true;
                let now = shard.net.now();
                self.timer.set(now, Some(until.since(now)));
            }
            self.timer.poll(cx).map(|()| Err(limit.fault))
        })
        .await;
        if armed {
            self.timer.set(Instant(0), None);
        }
        result
    }

    /// Waits for time alone (and the client's departure).
    pub(super) async fn pause(&self, shard: &Shard<N>, wait: Duration) -> Result<(), Fault> {
        let marker = Fault::Bug("a pause ended");
        let limit = Limit::of(shard.net.now(), Some(wait), marker);
        match self
            .until(shard, Watch::Ahead, limit, |_| Poll::<()>::Pending)
            .await
        {
            Err(fault) if fault == marker => Ok(()),
            other => other,
        }
    }

    /// Waits between requests for the first byte of the next one. `false`: the connection ended,
    /// was idle for too long, or the proxy is draining.
    pub(super) async fn next_request(&self, shard: &Shard<N>) -> bool {
        self.phase.set(Phase::Idle);
        if !self.ahead.borrow().is_empty() {
            return true;
        }
        // Memory of an idle connection: nothing but the connection itself.
        shard.recycle(self.ahead.take());
        self.timer
            .set(shard.net.now(), shard.config.timeouts.keepalive);
        let arrived = poll_fn(|cx| {
            if self.conn.poll_readable(cx).is_ready() {
                return Poll::Ready(true);
            }
            if shard.is_draining() {
                return Poll::Ready(false);
            }
            // Polled also without a keep-alive limit: the wake-up of a drain comes this way.
            self.timer.poll(cx).map(|()| false)
        })
        .await;
        self.timer.set(Instant(0), None);
        arrived
    }

    /// Parses a head from what has been received.
    pub(super) fn parse_head(&self, head: &mut RequestHead) -> Result<bool, HeadError> {
        head.parse(&self.ahead.borrow())
    }

    /// Receives more of a request's head behind what is there.
    ///
    /// # Errors
    /// `ClientGone`, or the limit's fault.
    pub(super) async fn receive_head(&self, shard: &Shard<N>, limit: Limit) -> Result<(), Fault> {
        self.until_own(shard, limit, |cx| self.conn.poll_readable(cx))
            .await?;
        self.receive_ahead(shard, RECEIVE_HEAD_BYTES);
        if self.gone.get() {
            Err(Fault::ClientGone)
        } else {
            Ok(())
        }
    }

    /// Like [`Client::until`], for waits on the client's own bytes.
    pub(super) async fn until_own<T>(
        &self,
        shard: &Shard<N>,
        limit: Limit,
        mut ready: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Result<T, Fault> {
        self.check(shard, limit)?;
        let now = shard.net.now();
        self.timer
            .set(now, limit.until.map(|until| until.since(now)));
        let result = poll_fn(|cx| {
            if let Poll::Ready(value) = ready(cx) {
                return Poll::Ready(Ok(value));
            }
            self.timer.poll(cx).map(|()| Err(limit.fault))
        })
        .await;
        self.timer.set(Instant(0), None);
        result
    }

    /// Fails when the limit has passed before a wait begins: of a wait that is over at once, again
    /// and again, the timer would never hear.
    fn check(&self, shard: &Shard<N>, limit: Limit) -> Result<(), Fault> {
        match limit.until {
            Some(until) if shard.net.now() > until => Err(limit.fault),
            Some(_) | None => Ok(()),
        }
    }

    /// The bytes received and not yet claimed; the caller puts back what it does not use.
    pub(super) fn take_ahead(&self) -> Vec<u8> {
        self.ahead.take()
    }

    /// Puts bytes in front of everything received later.
    pub(super) fn put_back(&self, bytes: &[u8]) {
        let mut ahead = self.ahead.borrow_mut();
        let later = ahead.len();
        ahead.extend_from_slice(bytes);
        ahead.rotate_left(later);
    }

    /// Puts back what was taken before anything later was received.
    pub(super) fn put_back_first(&self, bytes: Vec<u8>) {
        let mut ahead = self.ahead.borrow_mut();
        debug_assert!(ahead.is_empty(), "something was received meanwhile");
        *ahead = bytes;
    }

    /// Sends all of `slices`, which leave in order; waits while the client is slow.
    ///
    /// # Errors
    /// `ClientGone` or `ClientStalled`.
    pub(super) async fn send(&self, shard: &Shard<N>, slices: &[IoSlice<'_>]) -> Result<(), Fault> {
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        let sent = match self.conn.try_send_vectored(slices) {
            Ok(sent) if sent == total => return Ok(()),
            Ok(sent) => sent,
            Err(error) if would_block(&error) => 0,
            Err(_) => return Err(self.record_gone()),
        };
        // The caller's slices may lie in the shard's buffer, which must not live across a wait.
        let mut rest = shard.buffer();
        let mut skip = sent;
        for slice in slices {
            let begin = skip.min(slice.len());
            skip -= begin;
            rest.extend_from_slice(&slice[begin..]);
        }
        self.send_rest(shard, rest).await
    }

    /// Sends the rest of something the client did not take at once.
    pub(super) async fn send_rest(&self, shard: &Shard<N>, rest: Vec<u8>) -> Result<(), Fault> {
        let before = self.phase.replace(Phase::Stalled);
        let mut at = 0;
        while at < rest.len() {
            let stall = shard.config.timeouts.client_stall;
            let limit = Limit::of(shard.net.now(), stall, Fault::ClientStalled);
            self.until(shard, Watch::Ahead, limit, |cx| self.conn.poll_writable(cx))
                .await?;
            match self.conn.try_send(&rest[at..]) {
                Ok(sent) => at += sent,
                Err(error) if would_block(&error) => {}
                Err(_) => return Err(self.record_gone()),
            }
        }
        self.phase.set(before);
        shard.recycle(rest);
        Ok(())
    }

    /// Sends what is in `pipe`; waits while the client is slow.
    ///
    /// # Errors
    /// `ClientGone` or `ClientStalled`.
    pub(super) async fn send_piped(
        &self,
        shard: &Shard<N>,
        pipe: &mut <N::Conn as Conn>::Pipe,
    ) -> Result<(), Fault> {
        while pipe.held() > 0 {
            match self.conn.try_drain(pipe) {
                Ok(_) => {}
                Err(error) if would_block(&error) => {
                    let before = self.phase.replace(Phase::Stalled);
                    let stall = shard.config.timeouts.client_stall;
                    let limit = Limit::of(shard.net.now(), stall, Fault::ClientStalled);
                    self.until(shard, Watch::Ahead, limit, |cx| self.conn.poll_writable(cx))
                        .await?;
                    self.phase.set(before);
                }
                Err(_) => return Err(self.record_gone()),
            }
        }
        Ok(())
    }

    /// Whether the client has left, as far as can be told without waiting.
    pub(super) async fn has_left(&self, shard: &Shard<N>) -> bool {
        poll_fn(|cx| Poll::Ready(self.poll_gone(shard, Watch::Ahead, cx))).await
    }

    /// Notes that the client's side has ended.
    pub(super) fn record_gone(&self) -> Fault {
        self.gone.set(true);
        Fault::ClientGone
    }

    fn poll_gone(&self, shard: &Shard<N>, watch: Watch, cx: &mut Context<'_>) -> bool {
        loop {
            if self.gone.get() {
                return true;
            }
            let room = match watch {
                Watch::Ahead => CLIENT_AHEAD_BYTES_MAX.saturating_sub(self.ahead.borrow().len()),
                Watch::Hangup => 0,
            };
            if room == 0 {
                self.gone.set(self.conn.poll_hangup(cx).is_ready());
                return self.gone.get();
            }
            if self.conn.poll_readable(cx).is_pending() {
                return false;
            }
            self.receive_ahead(shard, room);
        }
    }

    /// Receives once, at most `room` bytes, behind what is there; notes the end of the stream.
    fn receive_ahead(&self, shard: &Shard<N>, room: usize) {
        shard.with_small(|buffer| {
            let room = room.min(buffer.len());
            match self.conn.try_recv(&mut buffer[..room]) {
                Ok(0) => self.gone.set(true),
                Ok(n) => {
                    let mut ahead = self.ahead.borrow_mut();
                    if ahead.capacity() == 0 {
                        *ahead = shard.buffer();
                    }
                    ahead.extend_from_slice(&buffer[..n]);
                }
                Err(error) if would_block(&error) => {}
                Err(_) => self.gone.set(true),
            }
        });
    }
}
