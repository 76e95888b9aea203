//! A client connection and the waits that an exchange performs on it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::IoSlice;
use std::task::{Context, Poll};
use std::time::Duration;

use super::ahead::Ahead;
use super::idle::NONE;
use super::shard::Shard;
use crate::fault::Fault;
use crate::h1::{HeadError, RequestHead};
use crate::limits::{CLIENT_AHEAD_BYTES_MAX, RECEIVE_HEAD_BYTES, RECEIVE_SMALL_BYTES};
use crate::metrics::Phase;
use crate::net::{Conduit, Conn, Instant, Net, Timer, would_block};
use crate::upstream::{Deadline, Timeout, Waited};

/// An open client connection.
pub(super) struct Client<N: Net> {
    pub(super) conn: N::Conn,
    /// The only timer of the session. One is enough because the session's phases never overlap.
    pub(super) timer: Timer,
    /// Bytes received from the client that no request has consumed yet.
    pub(super) ahead: RefCell<Ahead>,
    gone: Cell<bool>,
    /// The place of the session in the list of idle ones; `NONE` while it is not idle. It is here
    /// because it fits between other fields: the future of an idle session must stay small.
    pub(super) idle_at: Cell<u32>,
    /// The current phase of the session, reported by the metric of client disconnects.
    pub(super) phase: Cell<Phase>,
    /// Index of the rank whose listener accepted the connection.
    rank: u16,
}

/// How a client disconnect is detected during a wait for something else, such as an engine's
/// response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watch {
    /// For use when the request has been received completely: reads and buffers bytes the client
    /// sends early, up to `CLIENT_AHEAD_BYTES_MAX`, and thereby detects the end of the stream after
    /// them. With a full buffer, works like `Hangup`.
    Ahead,
    /// For use when the request body must remain in the socket because its upload is held up:
    /// detects only the end of the stream and reads nothing.
    Hangup,
}

impl<N: Net> Client<N> {
    pub(super) fn new(net: &N, conn: N::Conn, rank: u16) -> Self {
        Self {
            conn,
            timer: net.timer(),
            ahead: RefCell::default(),
            gone: Cell::new(false),
            idle_at: Cell::new(NONE),
            phase: Cell::new(Phase::Idle),
            rank,
        }
    }

    /// Returns the index of the rank whose listener accepted the connection.
    pub(super) fn rank(&self) -> usize {
        usize::from(self.rank)
    }

    /// Waits until `ready` is ready, the client disconnects, or the deadline passes. If several
    /// apply in the same poll, they take precedence in this order, so a token that has arrived is
    /// always forwarded. A deadline that passed before the call ends the wait immediately.
    pub(super) async fn until<T>(
        &self,
        shard: &Shard<N>,
        watch: Watch,
        deadline: Deadline,
        mut ready: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Waited<T> {
        if Self::has_passed(shard, deadline) {
            return Waited::TimedOut(deadline.timeout());
        }
        let mut armed = false;
        let result = poll_fn(|cx| {
            if let Poll::Ready(value) = ready(cx) {
                return Poll::Ready(Waited::Ready(value));
            }
            if self.poll_gone(shard, watch, cx) {
                return Poll::Ready(Waited::Disconnected);
            }
            let Some(at) = deadline.at() else {
                return Poll::Pending;
            };
            if !armed {
                armed = true;
                let now = shard.net.now();
                self.timer.set(now, Some(at.since(now)));
            }
            self.timer
                .poll(cx)
                .map(|()| Waited::TimedOut(deadline.timeout()))
        })
        .await;
        if armed {
            self.timer.set(Instant(0), None);
        }
        result
    }

    /// Waits for a fixed time. Fails if the client disconnects first.
    pub(super) async fn pause(&self, shard: &Shard<N>, wait: Duration) -> Result<(), Fault> {
        let deadline = Deadline::of(shard.net.now(), Some(wait), Timeout::Pause);
        match self
            .until(shard, Watch::Ahead, deadline, |_| Poll::<()>::Pending)
            .await
        {
            Waited::Ready(()) | Waited::TimedOut(_) => Ok(()),
            Waited::Disconnected => Err(Fault::ClientGone),
        }
    }

    /// Parses a request head from the received bytes. Returns `false` if they do not contain a
    /// complete head.
    pub(super) fn parse_head(&self, head: &mut RequestHead) -> Result<bool, HeadError> {
        head.parse(self.ahead.borrow().unread())
    }

    /// Receives more bytes of a request head and appends them to those already received.
    ///
    /// # Errors
    /// `ClientGone` or `HeadTimeout`.
    pub(super) async fn receive_head(
        &self,
        shard: &Shard<N>,
        deadline: Deadline,
    ) -> Result<(), Fault> {
        self.until_own(shard, deadline, |cx| self.conn.poll_readable(cx))
            .await
            .or_fault(Fault::HeadTimeout)?;
        let room = match self.ahead.borrow().is_empty() {
            true => RECEIVE_SMALL_BYTES,
            false => RECEIVE_HEAD_BYTES,
        };
        self.receive_ahead(shard, room);
        if self.gone.get() {
            Err(Fault::ClientGone)
        } else {
            Ok(())
        }
    }

    /// Like [`Client::until`], for a `ready` that polls the client connection for bytes itself and
    /// so detects its end without a separate watch.
    pub(super) async fn until_own<T>(
        &self,
        shard: &Shard<N>,
        deadline: Deadline,
        mut ready: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Waited<T> {
        if Self::has_passed(shard, deadline) {
            return Waited::TimedOut(deadline.timeout());
        }
        let now = shard.net.now();
        self.timer.set(now, deadline.at().map(|at| at.since(now)));
        let result = poll_fn(|cx| {
            if let Poll::Ready(value) = ready(cx) {
                return Poll::Ready(Waited::Ready(value));
            }
            self.timer
                .poll(cx)
                .map(|()| Waited::TimedOut(deadline.timeout()))
        })
        .await;
        self.timer.set(Instant(0), None);
        result
    }

    /// Returns whether the deadline had already passed before the wait. Without this check, a
    /// series of waits that are each ready immediately would never poll the timer.
    fn has_passed(shard: &Shard<N>, deadline: Deadline) -> bool {
        deadline.at().is_some_and(|at| shard.net.now() > at)
    }

    /// Takes the received bytes that no request has consumed yet, at most `len`. The caller must
    /// put back those it does not use.
    pub(super) fn take_ahead(&self, shard: &Shard<N>, len: usize) -> Vec<u8> {
        self.ahead.borrow_mut().take(len, &shard.buffers)
    }

    /// Puts back bytes that were taken with `take_ahead` but not used, in front of any received
    /// since.
    pub(super) fn put_back(&self, bytes: &[u8]) {
        self.ahead.borrow_mut().put_back(bytes);
    }

    /// Sends all of `slices` to the client, in order. Waits while the socket does not accept more.
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
        // The slices may point into the shard's receive buffer, which must not be in use across an
        // await, so the unsent part is copied.
        let mut rest = shard.buffers.buffer();
        let mut skip = sent;
        for slice in slices {
            let begin = skip.min(slice.len());
            skip -= begin;
            rest.extend_from_slice(&slice[begin..]);
        }
        self.send_rest(shard, rest).await
    }

    /// Sends `rest`, the part of a response that the client's socket did not accept immediately.
    /// Meanwhile a disconnect is counted under the phase `Stalled`.
    ///
    /// # Errors
    /// `ClientGone`, or `ClientStalled` if the socket accepts nothing for the client stall timeout.
    pub(super) async fn send_rest(&self, shard: &Shard<N>, rest: Vec<u8>) -> Result<(), Fault> {
        let before = self.phase.replace(Phase::Stalled);
        let mut at = 0;
        while at < rest.len() {
            let stall = shard.config.timeouts.client_stall;
            let deadline = Deadline::of(shard.net.now(), stall, Timeout::Client);
            self.until(shard, Watch::Ahead, deadline, |cx| {
                self.conn.poll_writable(cx)
            })
            .await
            .or_fault(Fault::ClientStalled)?;
            match self.conn.try_send(&rest[at..]) {
                Ok(sent) => at += sent,
                Err(error) if would_block(&error) => {}
                Err(_) => return Err(self.record_gone()),
            }
        }
        self.phase.set(before);
        shard.buffers.recycle(rest);
        Ok(())
    }

    /// Sends the contents of `pipe` to the client. Waits while the socket does not accept more.
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
                    let deadline = Deadline::of(shard.net.now(), stall, Timeout::Client);
                    self.until(shard, Watch::Ahead, deadline, |cx| {
                        self.conn.poll_writable(cx)
                    })
                    .await
                    .or_fault(Fault::ClientStalled)?;
                    self.phase.set(before);
                }
                Err(_) => return Err(self.record_gone()),
            }
        }
        Ok(())
    }

    /// Returns whether the client has disconnected, as far as this can be detected without waiting.
    pub(super) async fn has_disconnected(&self, shard: &Shard<N>) -> bool {
        // Once the turn is used up, nothing is readable.
        shard.net.give_way().await;
        poll_fn(|cx| Poll::Ready(self.poll_gone(shard, Watch::Ahead, cx))).await
    }

    /// Records that the client disconnected and returns the fault for it.
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
                Watch::Ahead => {
                    let unread = self.ahead.borrow().unread().len();
                    CLIENT_AHEAD_BYTES_MAX.saturating_sub(unread)
                }
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

    /// Receives once from the client, at most `room` bytes, and appends them to `ahead`. At the end
    /// of the stream or on an error, records that the client has disconnected.
    fn receive_ahead(&self, shard: &Shard<N>, room: usize) {
        let buffers = &shard.buffers;
        let received = buffers.receive(|buffer| self.conn.try_recv_append(buffer, room));
        match received {
            Ok(received) if received.is_empty() => self.gone.set(true),
            Ok(received) => self.ahead.borrow_mut().append(received, buffers),
            Err(error) if would_block(&error) => {}
            Err(_) => self.gone.set(true),
        }
    }
}
