//! One simulated connection: two bounded pipes and what each side knows about them.
//!
//! The rules are Linux's, as far as a user of the seam can see them. Sent bytes travel for a while
//! before they can be received; sender and receiver share one bound per direction. A FIN travels
//! behind the bytes, a RST may overtake them and then takes what was under way with it. Bytes
//! that reach a closed side come back as a RST, and so does closing with bytes unread. A reset is
//! reported once, as `ECONNRESET`, and never after a FIN; after that a receive finds the end.
//!
//! Readiness is apart from state: a wait that was begun ends some time after the state allows it,
//! and may end when the state no longer does (the bytes were taken meanwhile).

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::{Rc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::world::{What, World};

/// How a connection behaves. Chances are out of 256.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    /// Bytes each direction holds, from the first side to the second and back.
    pub capacity: [usize; 2],
    /// Longest time bytes, FIN and RST travel.
    pub delay_max: Duration,
    /// Longest time between "could go on" and being told so.
    pub notify_max: Duration,
    /// Chance that a call moves only a part of what it could.
    pub partial: u8,
    /// Chance that a call that could move something says `WouldBlock`.
    pub spurious: u8,
}

impl Manner {
    /// A connection without surprises: no delay, everything at once, `capacity` bytes each way.
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

    /// A connection as the seed has it: mostly ordinary, now and then with room for a few bytes.
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

/// What a side may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Readable,
    Writable,
    Hangup,
}

const EVENTS: [Event; 3] = [Event::Readable, Event::Writable, Event::Hangup];

/// How far a connect has come.
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
    /// Reported once by the next call, as `SO_ERROR` is.
    error: Option<io::ErrorKind>,
    /// A reset came in: nothing goes either way any more.
    is_dead: bool,
    shut_read: bool,
    shut_write: bool,
    is_closed: bool,
    reset_on_close: bool,
}

/// Bytes from one side to the other.
#[derive(Default)]
struct Pipe {
    capacity: usize,
    /// Under way, with the moment each piece arrives.
    segments: VecDeque<(u64, Vec<u8>)>,
    segment_bytes: usize,
    /// Arrived and not taken.
    queue: VecDeque<u8>,
    /// When the last piece arrives: bytes stay in order.
    last_at: u64,
    fin_at: Option<u64>,
    fin_arrived: bool,
    reset_sent: bool,
    /// Bytes ever accepted from the sender, and ever taken by the receiver.
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

/// A connection. `pipes[side]` carries what `side` sends.
pub(super) struct Link {
    me: Weak<RefCell<Self>>,
    sides: [Side; 2],
    pipes: [Pipe; 2],
    manner: Manner,
    /// Only side 0 connects.
    pub(super) connect: Connect,
}

/// A link's counters, for the judge of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Bytes this side's sends have accepted.
    pub sent: u64,
    /// Of those, bytes the other side has received.
    pub taken: u64,
    /// How many bytes the direction holds.
    pub capacity: usize,
}

impl Link {
    pub(super) fn new(manner: Manner, connect: Connect) -> Rc<RefCell<Self>> {
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

    fn schedule(&self, world: &World, at: u64, what: impl FnOnce(Rc<RefCell<Self>>) -> What) {
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

    /// Whether nothing can be sent any more, whatever room there is.
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
        if self.sides[side].ready[event as usize].is_ready {
            return Poll::Ready(());
        }
        // epoll may know at once; a ring needs a turn.
        if self.holds(side, event) && world.hits(64) {
            self.sides[side].ready[event as usize].is_ready = true;
            return Poll::Ready(());
        }
        self.sides[side].ready[event as usize].waker = Some(cx.waker().clone());
        self.touch(world, side);
        Poll::Pending
    }

    /// Starts telling a side what it waits for and now holds.
    pub(super) fn touch(&mut self, world: &World, side: usize) {
        for event in EVENTS {
            let holds = self.holds(side, event);
            let ready = &mut self.sides[side].ready[event as usize];
            if !holds || ready.is_ready || ready.is_scheduled || ready.waker.is_none() {
                continue;
            }
            ready.is_scheduled = true;
            let at = world.now() + world.below_duration(self.manner.notify_max);
            self.schedule(world, at, |link| What::Notify(link, side, event));
        }
    }

    /// A wait has ended. The state is not looked at again: it may have changed back.
    pub(super) fn notify(&mut self, side: usize, event: Event) -> Option<Waker> {
        let ready = &mut self.sides[side].ready[event as usize];
        ready.is_scheduled = false;
        ready.is_ready = true;
        ready.waker.take()
    }

    pub(super) fn clear_readable(&mut self, side: usize) {
        self.clear(side, Event::Readable);
    }

    fn clear(&mut self, side: usize, event: Event) {
        self.sides[side].ready[event as usize].is_ready = false;
    }

    /// Takes what has arrived, as a list of pieces through `take`.
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

    /// What a receive finds when no bytes are there.
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

    /// Looks without taking.
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

    /// How much of `n` a call moves.
    fn part(&self, world: &World, n: usize) -> usize {
        if n > 1 && world.hits(self.manner.partial) {
            1 + usize::try_from(world.below(n as u64)).unwrap_or(0)
        } else {
            n
        }
    }

    /// Has whatever is due at `at` delivered to `side` then.
    fn arrive(&mut self, world: &World, side: usize, at: u64) {
        if at <= world.now() {
            self.deliver(world, side);
        } else {
            self.schedule(world, at, |link| What::Deliver(link, side));
        }
    }

    /// Makes what is due visible to `side`.
    pub(super) fn deliver(&mut self, world: &World, side: usize) {
        let now = world.now();
        let is_deaf = {
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
            if is_deaf {
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

    /// Sends a FIN behind everything sent so far.
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

    /// Ends both directions.
    pub(super) fn abort(&mut self, world: &World, side: usize) {
        self.finish(world, side);
        self.sides[side].shut_read = true;
        self.sides[side].shut_write = true;
        self.touch(world, side);
    }

    pub(super) fn set_reset_on_close(&mut self, side: usize, reset: bool) {
        self.sides[side].reset_on_close = reset;
    }

    /// The side lets go of the connection.
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
        // Usually behind what was sent; what the network or the window held back is lost.
        if world.hits(128) {
            at = at.max(self.pipes[side].last_at);
        }
        self.schedule(world, at, |link| What::Reset(link, 1 - side));
    }

    /// Resets the connection at once, also while others still hold this end.
    pub(super) fn reset_now(&mut self, world: &World, side: usize) {
        self.send_reset(world, side);
        self.pipes[1 - side].queue.clear();
        let this = &mut self.sides[side];
        this.is_dead = true;
        this.shut_read = true;
        this.shut_write = true;
        self.touch(world, side);
    }

    /// A reset has arrived.
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

    /// Ends a connect.
    pub(super) fn connected(&mut self, world: &World, outcome: Connect) {
        self.connect = outcome;
        if outcome == Connect::Failed {
            self.sides[0].error = Some(io::ErrorKind::ConnectionRefused);
        }
        self.touch(world, 0);
    }

    /// `SO_ERROR`.
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

    /// Whether a side was reset by the other before it saw an end.
    pub(super) fn was_reset(&self, side: usize) -> bool {
        self.sides[side].is_dead && !self.pipes[1 - side].fin_arrived
    }

    /// Whether a side has been closed by its owner.
    pub(super) fn is_closed(&self, side: usize) -> bool {
        self.sides[side].is_closed
    }

    /// Bytes that have arrived at open sides and were not taken.
    pub(super) fn unread(&self) -> usize {
        (0..2)
            .filter(|side| !self.sides[*side].is_closed)
            .map(|side| self.pipes[1 - side].queue.len())
            .sum()
    }
}
