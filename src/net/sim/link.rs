//! One simulated connection: a bounded pipe per direction, and the state of each side.
//!
//! The rules follow Linux to the extent that they are visible through the traits of `net`. Sent
//! bytes travel for a while before they can be received; each direction limits the sum of the bytes
//! in flight and the bytes not yet received. A FIN arrives after the bytes sent before it. A RST
//! may overtake bytes in flight, which are then lost. Bytes that reach a closed side cause a RST in
//! return, and so does closing a side with unread bytes. A reset is reported once, as `ECONNRESET`,
//! and never after a FIN; receives after that return the end of the stream.
//!
//! Readiness is separate from state. A wait ends some time after the state allows it, and may end
//! although the state no longer allows it (because the bytes were received in the meantime).

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::world::{Action, World};
use crate::net::turn;

/// Behaviour of one simulated connection. A probability of `n` means `n` / 256.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkBehaviour {
    /// Maximum number of bytes in flight or not yet received, per direction: from side 0 (which
    /// connects) to side 1 (which accepts), and back.
    pub capacity: [usize; 2],
    /// Longest time from the send of bytes, a FIN or a RST to their arrival.
    pub delay_max: Duration,
    /// Longest time between a change of state and the readiness event that reports it.
    pub notify_max: Duration,
    /// Probability that a receive or a send moves only a part of the bytes it could move.
    pub partial: u8,
    /// Probability that a receive or a send that could move bytes returns `WouldBlock` instead.
    pub spurious: u8,
}

impl LinkBehaviour {
    /// Returns the behaviour of a connection without delays, partial transfers or spurious errors,
    /// with `capacity` bytes per direction.
    #[must_use]
    pub const fn calm(capacity: usize) -> Self {
        Self {
            capacity: [capacity; 2],
            delay_max: Duration::ZERO,
            notify_max: Duration::ZERO,
            partial: 0,
            spurious: 0,
        }
    }

    /// Draws a behaviour from the seed. Capacities are up to 64 KiB; one direction in 16 has only 1
    /// to 64 bytes. Delays, partial transfers and spurious errors are each absent in about half of
    /// the connections.
    pub(super) fn draw(world: &World) -> Self {
        let capacity = || {
            let bytes = match world.below(16) {
                0 => 1 + world.below(64),
                1..=7 => 64 + world.below(2048),
                _ => 2048 + world.below(62 * 1024 + 1),
            };
            usize::try_from(bytes).unwrap_or(1)
        };
        let delays_us = [0, 0, 50, 500, 3000];
        let delay = || {
            let index = usize::try_from(world.below(5)).unwrap_or(0);
            Duration::from_micros(delays_us.get(index).copied().unwrap_or(0))
        };
        let chances = [0, 0, 16, 96];
        let chance = || {
            let index = usize::try_from(world.below(4)).unwrap_or(0);
            chances.get(index).copied().unwrap_or(0)
        };
        Self {
            capacity: [capacity(), capacity()],
            delay_max: delay(),
            notify_max: delay().min(Duration::from_micros(500)),
            partial: chance(),
            spurious: chance(),
        }
    }
}

/// An event that a side of a connection may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Readable,
    Writable,
    Hangup,
}

const EVENTS: [Event; 3] = [Event::Readable, Event::Writable, Event::Hangup];

/// State of the connect that creates a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Connect {
    Pending,
    Established,
    Failed,
}

#[derive(Default)]
struct Readiness {
    is_ready: bool,
    is_scheduled: bool,
    waker: Option<Waker>,
}

#[derive(Default)]
struct Side {
    ready: [Readiness; 3],
    /// Error that the next receive, send or `connected` of this side returns, once, like
    /// `SO_ERROR`.
    error: Option<io::ErrorKind>,
    /// This side has received a reset or has reset the connection itself: it can no longer send,
    /// and receives only bytes that had arrived before.
    is_dead: bool,
    shut_read: bool,
    shut_write: bool,
    is_closed: bool,
    reset_on_close: bool,
}

/// One direction of a connection.
#[derive(Default)]
struct Pipe {
    capacity: usize,
    /// Bytes in flight, in segments, each with its arrival time in virtual nanoseconds.
    segments: VecDeque<(u64, Vec<u8>)>,
    segment_bytes: usize,
    /// Bytes that have arrived and were not received yet.
    queue: VecDeque<u8>,
    /// Arrival time of the last segment sent, in virtual nanoseconds. Later segments do not arrive
    /// earlier, so bytes stay in order.
    last_at: u64,
    fin_at: Option<u64>,
    fin_arrived: bool,
    reset_sent: bool,
    /// Total bytes accepted from the sender (`sent`) and received by the receiver (`taken`).
    sent: u64,
    taken: u64,
}

impl Pipe {
    fn room(&self) -> usize {
        self.capacity
            .saturating_sub(self.segment_bytes + self.queue.len())
    }

    fn purge_segments(&mut self) {
        self.segments.clear();
        self.segment_bytes = 0;
    }
}

/// A connection. `pipes[side]` carries the bytes that `side` sends.
pub(super) struct Link {
    me: Weak<RefCell<Self>>,
    sides: [Side; 2],
    pipes: [Pipe; 2],
    manner: LinkBehaviour,
    /// State of the connect of side 0. Side 1 accepts and is always connected.
    pub(super) connect: Connect,
}

/// Byte counters of one direction of a connection, for the checks after a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Number of bytes accepted from the sending side.
    pub sent: u64,
    /// Number of the `sent` bytes that the other side has received.
    pub taken: u64,
    /// Capacity of the direction in bytes.
    pub capacity: usize,
}

impl Link {
    pub(super) fn new(manner: LinkBehaviour, connect: Connect) -> Rc<RefCell<Self>> {
        let pipe = |capacity: usize| Pipe {
            capacity: capacity.max(1),
            ..Pipe::default()
        };
        Rc::new_cyclic(|me| {
            RefCell::new(Self {
                me: me.clone(),
                sides: [Side::default(), Side::default()],
                pipes: [pipe(manner.capacity[0]), pipe(manner.capacity[1])],
                manner,
                connect,
            })
        })
    }

    fn schedule(&self, world: &World, at: u64, what: impl FnOnce(Rc<RefCell<Self>>) -> Action) {
        if let Some(me) = self.me.upgrade() {
            world.push(at, what(me));
        }
    }

    fn travel(&self, world: &World) -> u64 {
        world.now() + world.below_duration(self.manner.delay_max)
    }

    const fn is_pending(&self, side: usize) -> bool {
        side == 0 && matches!(self.connect, Connect::Pending)
    }

    /// Returns whether `side` can no longer send: it was shut down or reset, or its connect failed.
    fn cannot_send(&self, side: usize) -> bool {
        let this = &self.sides[side];
        this.is_dead || this.shut_write || (side == 0 && self.connect == Connect::Failed)
    }

    fn holds(&self, side: usize, event: Event) -> bool {
        if self.is_pending(side) {
            return false;
        }
        let (this, inbound) = (&self.sides[side], &self.pipes[1 - side]);
        let failed = side == 0 && self.connect == Connect::Failed;
        let ended = inbound.fin_arrived || this.is_dead || this.shut_read || failed;
        match event {
            Event::Readable => !inbound.queue.is_empty() || ended,
            Event::Writable => self.pipes[side].room() > 0 || self.cannot_send(side),
            Event::Hangup => ended,
        }
    }

    pub(super) fn poll(
        &mut self,
        world: &World,
        side: usize,
        event: Event,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        if event != Event::Hangup {
            std::task::ready!(turn::poll_left(cx));
        }
        if self.sides[side].ready[event as usize].is_ready {
            return Poll::Ready(());
        }
        // epoll may report readiness immediately; io_uring needs an iteration of the event loop.
        if self.holds(side, event) && world.hits(64) {
            self.sides[side].ready[event as usize].is_ready = true;
            return Poll::Ready(());
        }
        self.sides[side].ready[event as usize].waker = Some(cx.waker().clone());
        self.touch(world, side);
        Poll::Pending
    }

    /// Schedules a readiness event for each [`Event`] that a task waits for at `side` and that the
    /// state now allows.
    pub(super) fn touch(&mut self, world: &World, side: usize) {
        for event in EVENTS {
            let holds = self.holds(side, event);
            let ready = &mut self.sides[side].ready[event as usize];
            if !holds || ready.is_ready || ready.is_scheduled || ready.waker.is_none() {
                continue;
            }
            ready.is_scheduled = true;
            let at = world.now() + world.below_duration(self.manner.notify_max);
            self.schedule(world, at, |link| Action::Notify(link, side, event));
        }
    }

    /// Makes `side` ready for `event`. Returns the waker of the task that waits for it, if any.
    /// Does not check whether the state still allows the event.
    pub(super) fn notify(&mut self, side: usize, event: Event) -> Option<Waker> {
        let ready = &mut self.sides[side].ready[event as usize];
        ready.is_scheduled = false;
        ready.is_ready = true;
        ready.waker.take()
    }

    fn clear(&mut self, side: usize, event: Event) {
        self.sides[side].ready[event as usize].is_ready = false;
    }

    /// Moves bytes that have arrived at `side` to `buffer` and returns their number; 0 is the end
    /// of the stream.
    pub(super) fn recv(
        &mut self,
        world: &World,
        side: usize,
        buffer: &mut [u8],
    ) -> io::Result<usize> {
        let would_block = || io::Error::from(io::ErrorKind::WouldBlock);
        if self.is_pending(side) {
            self.clear(side, Event::Readable);
            return Err(would_block());
        }
        let available = self.pipes[1 - side].queue.len().min(buffer.len());
        if available == 0 {
            return self.recv_end(side);
        }
        if world.hits(self.manner.spurious) {
            self.clear(side, Event::Readable);
            return Err(would_block());
        }
        let n = self.part(world, available);
        let inbound = &mut self.pipes[1 - side];
        for (to, from) in buffer.iter_mut().zip(inbound.queue.drain(..n)) {
            *to = from;
        }
        inbound.taken += n as u64;
        if n < buffer.len() {
            self.clear(side, Event::Readable);
        }
        self.touch(world, 1 - side);
        world.trace(3, n as u64);
        Ok(n)
    }

    /// Returns the result of a receive at `side` when no bytes have arrived: 0 for the end of the
    /// stream, the pending error, or `WouldBlock`.
    fn recv_end(&mut self, side: usize) -> io::Result<usize> {
        if self.pipes[1 - side].fin_arrived {
            return Ok(0);
        }
        let failed = side == 0 && self.connect == Connect::Failed;
        let this = &mut self.sides[side];
        if let Some(error) = this.error.take() {
            return Err(error.into());
        }
        if this.is_dead || this.shut_read || failed {
            return Ok(0);
        }
        self.clear(side, Event::Readable);
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Returns whether a receive would return something other than `WouldBlock`. Consumes no bytes,
    /// but clears a pending error.
    pub(super) fn peek(&mut self, side: usize) -> bool {
        if !self.is_pending(side) && !self.pipes[1 - side].queue.is_empty() {
            return true;
        }
        !matches!(self.recv_end(side), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    pub(super) fn send(
        &mut self,
        world: &World,
        side: usize,
        slices: &[io::IoSlice<'_>],
    ) -> io::Result<usize> {
        if self.is_pending(side) {
            self.clear(side, Event::Writable);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        if let Some(error) = self.sides[side].error.take() {
            return Err(error.into());
        }
        if self.cannot_send(side) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let wanted: usize = slices.iter().map(|slice| slice.len()).sum();
        let room = self.pipes[side].room();
        if wanted > 0 && (room == 0 || world.hits(self.manner.spurious)) {
            self.clear(side, Event::Writable);
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let n = self.part(world, wanted.min(room));
        let mut piece = Vec::with_capacity(n);
        for slice in slices {
            let left = n - piece.len();
            piece.extend_from_slice(&slice[..left.min(slice.len())]);
        }
        if n < wanted {
            self.clear(side, Event::Writable);
        }
        world.trace(4, n as u64);
        let at = self.travel(world).max(self.pipes[side].last_at);
        let pipe = &mut self.pipes[side];
        pipe.sent += n as u64;
        pipe.last_at = at;
        pipe.segment_bytes += n;
        pipe.segments.push_back((at, piece));
        self.arrive(world, 1 - side, at);
        Ok(n)
    }

    /// Returns the number of bytes that a receive or a send moves if it could move `n`: all of them
    /// or, with probability `partial`, a random number of at least 1.
    fn part(&self, world: &World, n: usize) -> usize {
        if n > 1 && world.hits(self.manner.partial) {
            1 + usize::try_from(world.below(n as u64)).unwrap_or(0)
        } else {
            n
        }
    }

    /// Makes the bytes or the FIN on the way to `side` arrive at the time `at`, immediately if it
    /// has been reached.
    fn arrive(&mut self, world: &World, side: usize, at: u64) {
        if at <= world.now() {
            self.deliver(world, side);
        } else {
            self.schedule(world, at, |link| Action::Deliver(link, side));
        }
    }

    /// Makes bytes and a FIN whose arrival time has been reached visible to `side`. If `side` is
    /// closed or shut down in both directions, bytes are dropped and a RST is sent back.
    pub(super) fn deliver(&mut self, world: &World, side: usize) {
        let now = world.now();
        let refuses_bytes = {
            let this = &self.sides[side];
            this.is_closed || (this.shut_read && this.shut_write)
        };
        let inbound = &mut self.pipes[1 - side];
        let mut refused = false;
        while let Some((at, _)) = inbound.segments.front()
            && *at <= now
        {
            let Some((_, piece)) = inbound.segments.pop_front() else {
                break;
            };
            inbound.segment_bytes -= piece.len();
            if refuses_bytes {
                refused |= !piece.is_empty();
            } else {
                inbound.queue.extend(piece);
            }
        }
        let is_due = inbound.fin_at.is_some_and(|at| at <= now);
        inbound.fin_arrived |= is_due && inbound.segments.is_empty();
        if refused {
            self.send_reset(world, side);
        }
        self.touch(world, side);
    }

    /// Closes the sending direction of `side`: a FIN follows the bytes sent so far.
    pub(super) fn finish(&mut self, world: &World, side: usize) {
        let this = &mut self.sides[side];
        if this.shut_write || this.is_dead {
            return;
        }
        this.shut_write = true;
        let at = self.travel(world).max(self.pipes[side].last_at);
        self.pipes[side].fin_at = Some(at);
        self.pipes[side].last_at = at;
        self.arrive(world, 1 - side, at);
        self.touch(world, side);
    }

    /// Shuts down both directions of `side`: sends a FIN, and lets receives return the end of the
    /// stream.
    pub(super) fn abort(&mut self, world: &World, side: usize) {
        self.finish(world, side);
        self.sides[side].shut_read = true;
        self.sides[side].shut_write = true;
        self.touch(world, side);
    }

    pub(super) fn set_reset_on_close(&mut self, side: usize, reset: bool) {
        self.sides[side].reset_on_close = reset;
    }

    /// Handles the drop of one end. Sends a FIN, and also a RST if received bytes are unread. With
    /// `reset_on_close` sends only a RST.
    pub(super) fn close(&mut self, world: &World, side: usize) {
        let has_unread = !self.pipes[1 - side].queue.is_empty();
        if self.sides[side].reset_on_close {
            self.send_reset(world, side);
        } else {
            self.finish(world, side);
            if has_unread {
                self.send_reset(world, side);
            }
        }
        let this = &mut self.sides[side];
        this.is_closed = true;
        for ready in &mut this.ready {
            ready.waker = None;
        }
        self.pipes[1 - side].queue.clear();
        self.touch(world, 1 - side);
    }

    fn send_reset(&mut self, world: &World, side: usize) {
        if self.pipes[side].reset_sent || self.sides[side].is_dead {
            return;
        }
        self.pipes[side].reset_sent = true;
        let mut at = self.travel(world);
        // In half of the cases the RST arrives after the bytes in flight. Otherwise it may overtake
        // some of them, which are then lost.
        if world.hits(128) {
            at = at.max(self.pipes[side].last_at);
        }
        self.schedule(world, at, |link| Action::Reset(link, 1 - side));
    }

    /// Resets the connection from `side`: its end is unusable immediately, and a RST is sent to the
    /// other one.
    pub(super) fn reset_now(&mut self, world: &World, side: usize) {
        self.send_reset(world, side);
        self.pipes[1 - side].queue.clear();
        let this = &mut self.sides[side];
        this.is_dead = true;
        this.shut_read = true;
        this.shut_write = true;
        self.touch(world, side);
    }

    /// Handles the arrival of a RST at `side`: bytes in flight in both directions are lost, and so
    /// are those that the other side has not received yet.
    pub(super) fn reset(&mut self, world: &World, side: usize) {
        let inbound = &mut self.pipes[1 - side];
        let had_ended = inbound.fin_arrived;
        inbound.purge_segments();
        inbound.fin_at = None;
        let outbound = &mut self.pipes[side];
        outbound.purge_segments();
        outbound.queue.clear();
        let this = &mut self.sides[side];
        this.is_dead = true;
        if !had_ended {
            this.error = Some(io::ErrorKind::ConnectionReset);
        }
        self.touch(world, side);
    }

    /// Sets the result of the connect of side 0.
    pub(super) fn connected(&mut self, world: &World, outcome: Connect) {
        self.connect = outcome;
        if outcome == Connect::Failed {
            self.sides[0].error = Some(io::ErrorKind::ConnectionRefused);
        }
        self.touch(world, 0);
    }

    /// Returns and clears the pending error of `side`, like `SO_ERROR`.
    pub(super) fn take_error(&mut self, side: usize) -> Option<io::ErrorKind> {
        self.sides[side].error.take()
    }

    pub(super) fn flow(&self, side: usize) -> Flow {
        let pipe = &self.pipes[side];
        Flow {
            sent: pipe.sent,
            taken: pipe.taken,
            capacity: pipe.capacity,
        }
    }

    /// Returns whether the connection was reset, by either side, before a FIN arrived at `side`.
    pub(super) fn was_reset(&self, side: usize) -> bool {
        self.sides[side].is_dead && !self.pipes[1 - side].fin_arrived
    }

    /// Returns whether the end of `side` has been dropped.
    pub(super) fn is_closed(&self, side: usize) -> bool {
        self.sides[side].is_closed
    }

    /// Returns the number of bytes that have arrived at open sides and were not received.
    pub(super) fn unread(&self) -> usize {
        (0..2)
            .filter(|side| !self.sides[*side].is_closed)
            .map(|side| self.pipes[1 - side].queue.len())
            .sum()
    }
}
