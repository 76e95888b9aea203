//! The measuring client: one thread with non-blocking sockets and a timestamp after each receive.
//!
//! An iteration of its loop has two parts. First, everything that is ready is received and
//! timestamped. Then the received bytes are parsed, so that parsing one response does not delay the
//! timestamp of another in the same iteration. Nothing is printed while requests are in flight.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::busy::Look;
use crate::limits::{
    CONNECT_MS_MAX, CONNECTIONS_MAX, FAILURES_MAX, GAPS_MAX, LOOK_DURING_MS, LOOK_EVERY_S,
    OPEN_LOOP_CONNECTIONS, RECEIVE_BYTES, REOPENED_MAX, SILENCE_CHECK_MS, SPIN_BEFORE_SEND_US,
    WAITING_MAX,
};
use crate::precision::{SchedStat, nanos};
use crate::response::EventError;
use crate::run::{Done, Run, RunError, Setup};
use crate::schedule::{Ask, Load, Next, Schedule, Side, Until};
use crate::socket::{self, Poll, Received, Watch};
use crate::wire::Wire;
use exchange::{Ended, Exchange};

mod exchange;

const CONNECT_NS_MAX: u64 = CONNECT_MS_MAX * 1_000_000;
const SILENCE_LOOK_NS: u64 = SILENCE_CHECK_MS * 1_000_000;
const OBSERVE_EVERY_NS: u64 = LOOK_EVERY_S * 1_000_000_000;
const SPIN_BEFORE_SEND_NS: u64 = SPIN_BEFORE_SEND_US * 1_000;

enum Phase<'a> {
    /// The TCP connect or the TLS handshake has been in progress since this time, in nanoseconds of
    /// the run's clock.
    Opening(u64),
    Idle,
    Busy(Box<Exchange<'a>>),
}

struct Link<'a> {
    side: Side,
    wire: Wire,
    /// Whether a complete response has been received on this connection.
    used: bool,
    phase: Phase<'a>,
    buffer: Box<[u8]>,
}

struct Client<'a> {
    setup: &'a Setup,
    clock: Instant,
    poll: Poll,
    schedule: Schedule,
    links: Vec<Link<'a>>,
    idle: Vec<VecDeque<usize>>,
    waiting: Vec<VecDeque<(Ask, u64)>>,
    /// Number of requests, to all sides together, that are in flight or wait for a connection.
    open: usize,
    timer_ns: u64,
    looked_ns: u64,
    /// Time at which other programs are to be observed again.
    observe_ns: u64,
    progress: &'a AtomicU64,
    run: Run,
}

/// Sends all requests of the run on the calling thread and measures the responses. `progress`
/// counts the finished requests, including the warm-up.
///
/// # Errors
/// Returns an error if the run cannot be performed. Failed requests are counted, not returned.
pub fn run(setup: &Setup, progress: &AtomicU64) -> Result<Run, RunError> {
    let sides = setup.peers.len();
    let mut client = Client {
        setup,
        clock: Instant::now(),
        poll: Poll::new()?,
        schedule: Schedule::new(sides, setup.load, setup.until, setup.warmup, setup.seed),
        links: Vec::new(),
        idle: vec![VecDeque::new(); sides],
        waiting: vec![VecDeque::new(); sides],
        open: 0,
        timer_ns: u64::MAX,
        looked_ns: 0,
        observe_ns: OBSERVE_EVERY_NS,
        progress,
        run: Run::new(sides)?,
    };
    client.reserve();
    client.open_first()?;
    // Planned times are relative to this instant.
    client.clock = Instant::now();
    client.looked_ns = 0;
    let before = SchedStat::read();
    client.turns()?;
    client.run.lag.sched = SchedStat::read()
        .zip(before)
        .map(|(after, before)| after.since(before));
    let (begun, now) = (client.schedule.begun_ns(), client.now());
    client.run.wall_ns = begun.map_or(0, |begun| now.saturating_sub(begun));
    client.observe()?;
    client.run.rounds = client.schedule.rounds().saturating_sub(setup.warmup);
    Ok(client.run)
}

impl<'a> Client<'a> {
    fn now(&self) -> u64 {
        nanos(self.clock.elapsed())
    }

    /// Reserves memory in advance: growing a vector of millions of elements moves it, which takes
    /// longer than the latencies being measured.
    fn reserve(&mut self) {
        if let Until::Rounds(rounds) = self.setup.until {
            let responses = usize::try_from(rounds)
                .unwrap_or(0)
                .saturating_mul(self.setup.peers.len());
            self.run.done.reserve(responses);
        }
        for gaps in &mut self.run.gaps {
            gaps.reserve(GAPS_MAX / 8);
        }
    }

    /// Opens the initial connections to all sides, each only after the previous one is open.
    fn open_first(&mut self) -> Result<(), RunError> {
        let count = match self.setup.load {
            Load::Closed { concurrency } => concurrency,
            Load::Open { .. } => OPEN_LOOP_CONNECTIONS,
        };
        let mut ready = Vec::new();
        for side in Side::all(self.setup.peers.len()) {
            for _ in 0..count {
                let number = self.open_link(side)?;
                while matches!(self.links[number].phase, Phase::Opening(_)) {
                    ready.clear();
                    self.wait(SILENCE_LOOK_NS, &mut ready)?;
                    for number in ready.drain(..) {
                        self.opened(number)?;
                    }
                    self.look_for_silence()?;
                }
            }
        }
        Ok(())
    }

    fn turns(&mut self) -> Result<(), RunError> {
        let mut ready = Vec::new();
        let mut received = Vec::new();
        loop {
            let wait_ns = self.send_due()?;
            if self.open == 0 && self.schedule.is_held() {
                self.observe()?;
                self.schedule.release();
                continue;
            }
            if self.open == 0 && wait_ns.is_none() {
                return Ok(());
            }
            ready.clear();
            self.wait(wait_ns.unwrap_or(SILENCE_LOOK_NS), &mut ready)?;
            let woke = self.now();
            for number in ready.iter().copied() {
                let link = &mut self.links[number];
                if matches!(link.phase, Phase::Opening(_)) {
                    received.push((number, Received::Nothing, woke));
                    continue;
                }
                let what = link.wire.receive(&mut link.buffer);
                let stamp = nanos(self.clock.elapsed());
                if let Received::Bytes(_) = what {
                    self.run.lag.stamp_ns.saturating_record(stamp - woke);
                }
                received.push((number, what, stamp));
            }
            for (number, what, stamp) in received.drain(..) {
                self.look_at(number, what, stamp)?;
            }
            let now = self.now();
            if !ready.is_empty() {
                self.run.lag.turn_ns.saturating_record(now - woke);
            }
            if now - self.looked_ns > SILENCE_LOOK_NS {
                self.look_for_silence()?;
            }
            if now > self.observe_ns {
                self.schedule.hold();
            }
        }
    }

    /// Observes other programs. No request is in flight, so the servers are idle.
    fn observe(&mut self) -> Result<(), RunError> {
        let time = Duration::from_millis(LOOK_DURING_MS);
        self.run.looks.push(Look::take(time, self.setup.cpu)?);
        self.observe_ns = self.now() + OBSERVE_EVERY_NS;
        Ok(())
    }

    fn wait(&mut self, wait_ns: u64, ready: &mut Vec<usize>) -> Result<(), RunError> {
        let time_max = if self.setup.busy_poll { 0 } else { wait_ns };
        Ok(self.poll.wait(Duration::from_nanos(time_max), ready)?)
    }

    /// Sends the requests that are due. Returns for how many nanoseconds the caller must wait for
    /// socket events before the next call; this is 0 shortly before a planned send. Returns `None`
    /// if no request becomes due before a request in flight ends.
    fn send_due(&mut self) -> Result<Option<u64>, RunError> {
        loop {
            let now = self.now();
            match self.schedule.next(now) {
                Next::Send(ask, planned) => self.start(ask, planned)?,
                Next::Response | Next::Nothing => return Ok(None),
                Next::At(due) => {
                    let sleep = (due - now).saturating_sub(SPIN_BEFORE_SEND_NS);
                    if sleep > 0 && self.timer_ns != due {
                        self.timer_ns = due;
                        self.poll.wake_after(Duration::from_nanos(sleep))?;
                    }
                    return Ok(Some(sleep.min(SILENCE_LOOK_NS)));
                }
            }
        }
    }

    /// Sends the request `ask` on an idle connection, or queues it until a connection is available.
    /// Its latencies are measured from `planned_ns`; if that is `None`, from now if the request is
    /// queued, and otherwise from its send.
    fn start(&mut self, ask: Ask, planned_ns: Option<u64>) -> Result<(), RunError> {
        let side = ask.side.index();
        self.open += 1;
        if let Some(number) = self.idle[side].pop_front() {
            return self.send_first(number, ask, planned_ns);
        }
        self.run.counts[side].waited += 1;
        let start_ns = planned_ns.unwrap_or_else(|| self.now());
        self.waiting[side].push_back((ask, start_ns));
        if self.waiting[side].len() > WAITING_MAX {
            return Err(RunError::TooSlow(self.waiting[side].len()));
        }
        let links = self.links.iter().filter(|link| link.side == ask.side);
        let opening = |link: &&Link<'_>| matches!(link.phase, Phase::Opening(_));
        let (count, opening) = (links.clone().count(), links.filter(opening).count());
        if count < CONNECTIONS_MAX && opening < self.waiting[side].len() {
            self.open_link(ask.side)?;
        }
        Ok(())
    }

    fn send_first(
        &mut self,
        number: usize,
        ask: Ask,
        start_ns: Option<u64>,
    ) -> Result<(), RunError> {
        let setup = self.setup;
        let request = setup.requests.of(ask.round, ask.side, setup.salt);
        let mut exchange = Box::new(Exchange::new(ask, request));
        // Read the clock after the preparations, which take time.
        let now = self.now();
        exchange.start_ns = start_ns.unwrap_or(now);
        exchange.moved_ns = now;
        if matches!(setup.load, Load::Open { .. }) {
            let late_ns = now.saturating_sub(exchange.start_ns);
            self.run.lag.send_ns.saturating_record(late_ns);
        }
        self.links[number].phase = Phase::Busy(exchange);
        self.send_on(number)
    }

    /// Sends as much of the request on connection `number` as the socket accepts. Polls for
    /// writability if a part remains.
    fn send_on(&mut self, number: usize) -> Result<(), RunError> {
        let link = &mut self.links[number];
        let Phase::Busy(exchange) = &mut link.phase else {
            return Ok(());
        };
        let mut full = false;
        while exchange.sent < exchange.request.len() {
            match link.wire.send(&exchange.request[exchange.sent..]) {
                Ok(0) => {
                    full = true;
                    break;
                }
                Ok(len) => exchange.sent += len,
                // The following receive returns the response or the error.
                Err(_) => break,
            }
        }
        // Bytes that remain buffered in the TLS session also wait for writability. As above, the
        // following receive reports an error.
        full |= matches!(link.wire.flush(), Ok(false));
        if full != exchange.full {
            exchange.full = full;
            let watch = if full { Watch::Both } else { Watch::Readable };
            self.poll.change(&link.wire, number, watch)?;
        }
        Ok(())
    }

    /// Handles `what`, the result of a receive on connection `number`, which returned at `stamp` in
    /// nanoseconds of the run's clock. On a connection that is being opened, `what` is ignored and
    /// the opening continues.
    fn look_at(&mut self, number: usize, what: Received, stamp: u64) -> Result<(), RunError> {
        let link = &mut self.links[number];
        let ended = match (&mut link.phase, what) {
            (Phase::Opening(_), _) => return self.opened(number),
            (Phase::Idle, Received::Nothing) => return Ok(()),
            // No request is in flight: the peer closed the idle connection, which it may do, or
            // sent unexpected bytes.
            (Phase::Idle, _) => {
                let side = link.side.index();
                self.idle[side].retain(|idle| *idle != number);
                let reopened = &mut self.run.counts[side].reopened;
                *reopened += 1;
                if *reopened > REOPENED_MAX {
                    return Err(RunError::Closing(self.setup.peers[side].name.clone()));
                }
                return self.reopen(number);
            }
            (Phase::Busy(exchange), Received::Nothing) => {
                if exchange.full {
                    return self.send_on(number);
                }
                return Ok(());
            }
            (Phase::Busy(exchange), Received::Bytes(len)) => {
                exchange.moved_ns = stamp;
                exchange.has_response_bytes = true;
                match exchange.take(&link.buffer[..len], stamp) {
                    None => return Ok(()),
                    Some(ended) => ended,
                }
            }
            // The peer closed the idle connection at the same time as it was reused (RFC 9112,
            // 9.3.1).
            (Phase::Busy(exchange), Received::End | Received::Failed(_))
                if link.used && !exchange.has_response_bytes =>
            {
                return self.send_again(number);
            }
            (Phase::Busy(exchange), Received::End) => exchange.end(),
            (Phase::Busy(_), Received::Failed(error)) => Ended::Failed(format!(
                "the connection failed before the response was complete: {error}"
            )),
        };
        self.ended(number, ended, stamp)
    }

    /// Puts the request of connection `number`, which the peer has closed, at the front of the
    /// queue and opens a new connection. A request that fails on a new connection is not sent
    /// again, since that connection is not marked as used.
    fn send_again(&mut self, number: usize) -> Result<(), RunError> {
        let link = &mut self.links[number];
        if let Phase::Busy(exchange) = std::mem::replace(&mut link.phase, Phase::Idle) {
            let side = link.side.index();
            self.run.counts[side].sent_again += 1;
            self.waiting[side].push_front((exchange.ask, exchange.start_ns));
        }
        self.reopen(number)
    }

    fn ended(&mut self, number: usize, ended: Ended, stamp: u64) -> Result<(), RunError> {
        let link = &mut self.links[number];
        let Phase::Busy(exchange) = std::mem::replace(&mut link.phase, Phase::Idle) else {
            return Ok(());
        };
        let ask = exchange.ask;
        self.open -= 1;
        self.progress.fetch_add(1, Ordering::Relaxed);
        let keep = match ended {
            Ended::Well { keep } => match self.record(*exchange, stamp) {
                Ok(()) => keep,
                Err(error) => self.failed(ask, error.to_string())?,
            },
            Ended::Failed(what) => self.failed(ask, what)?,
        };
        self.schedule.ended(ask);
        if keep {
            self.links[number].used = true;
            self.free(number)
        } else {
            self.reopen(number)
        }
    }

    fn record(&mut self, exchange: Exchange<'_>, stamp: u64) -> Result<(), EventError> {
        let Exchange {
            ask,
            start_ns,
            response,
            splitter,
            reader,
            ..
        } = exchange;
        let server = &mut self.run.counts[ask.side.index()].server;
        if server.is_none() {
            *server = reader.head().and_then(|head| head.server.clone());
        }
        if splitter.is_inside() {
            return Err(EventError::Cut);
        }
        let (first_ns, text) = response.finish()?;
        let Some(round) = ask.round.checked_sub(self.setup.warmup) else {
            return Ok(());
        };
        let gaps = &mut self.run.gaps[ask.side.index()];
        gaps.extend(response.gaps_ns.iter().map(|gap| (*gap, round)));
        if gaps.len() > GAPS_MAX && !self.run.full {
            self.run.full = true;
            self.stop();
        }
        self.run.done.push(Done {
            round,
            side: ask.side,
            start_ns,
            ttft_ns: first_ns.saturating_sub(start_ns),
            total_ns: stamp.saturating_sub(start_ns),
            events: response.events,
            arrivals: response.arrivals,
            text,
        });
        Ok(())
    }

    /// Counts a failed request, and stops the run once there are [`FAILURES_MAX`] of them. Returns
    /// `false`, because its connection must not be reused, or an error if the request belongs to
    /// the warm-up.
    fn failed(&mut self, ask: Ask, what: String) -> Result<bool, RunError> {
        if ask.round < self.setup.warmup {
            let name = self.setup.peers[ask.side.index()].name.clone();
            return Err(RunError::Warmup(name, what));
        }
        let counts = &mut self.run.counts[ask.side.index()];
        counts.failures += 1;
        counts.first_failure.get_or_insert(what);
        if self.run.failures() >= FAILURES_MAX {
            self.stop();
        }
        Ok(false)
    }

    /// Stops starting requests and discards those that wait for a connection. Those in flight may
    /// finish.
    fn stop(&mut self) {
        self.schedule.stop();
        for waiting in &mut self.waiting {
            self.open -= waiting.len();
            waiting.clear();
        }
    }

    /// Sends the next queued request on connection `number`, or adds the connection to the idle
    /// ones if no request is queued.
    fn free(&mut self, number: usize) -> Result<(), RunError> {
        let side = self.links[number].side.index();
        match self.waiting[side].pop_front() {
            Some((ask, start_ns)) => self.send_first(number, ask, Some(start_ns)),
            None => {
                self.idle[side].push_back(number);
                Ok(())
            }
        }
    }

    fn connect(&self, side: Side) -> Result<Wire, RunError> {
        let peer = &self.setup.peers[side.index()];
        socket::connect(&peer.addr)
            .and_then(|socket| Wire::new(socket, peer.secure.as_ref()))
            .map_err(|error| self.no_connection(side, error))
    }

    fn no_connection(&self, side: Side, error: io::Error) -> RunError {
        let peer = &self.setup.peers[side.index()];
        RunError::Connect(peer.name.clone(), peer.addr, error)
    }

    fn open_link(&mut self, side: Side) -> Result<usize, RunError> {
        let number = self.links.len();
        let opening_ns = self.now();
        let wire = self.connect(side)?;
        self.poll.add(&wire, number, Watch::Both)?;
        self.links.push(Link {
            side,
            wire,
            used: false,
            phase: Phase::Opening(opening_ns),
            buffer: vec![0; RECEIVE_BYTES].into_boxed_slice(),
        });
        Ok(number)
    }

    /// Replaces a connection that can no longer be used with a new one.
    fn reopen(&mut self, number: usize) -> Result<(), RunError> {
        let opening_ns = self.now();
        let wire = self.connect(self.links[number].side)?;
        self.poll.add(&wire, number, Watch::Both)?;
        let link = &mut self.links[number];
        link.wire = wire;
        link.used = false;
        link.phase = Phase::Opening(opening_ns);
        Ok(())
    }

    /// Continues the connect or TLS handshake of connection `number`. Once it is complete, uses the
    /// connection for a queued request or adds it to the idle ones.
    fn opened(&mut self, number: usize) -> Result<(), RunError> {
        let now = self.now();
        let link = &mut self.links[number];
        let Phase::Opening(since) = link.phase else {
            return Ok(());
        };
        let side = link.side;
        let is_open = match link.wire.opened() {
            Ok(is_open) => is_open,
            Err(error) => return Err(self.no_connection(side, error)),
        };
        let link = &mut self.links[number];
        if !is_open {
            // The TLS handshake waits for the peer. Do not poll for writability, which would be
            // ready all the time.
            self.poll.change(&link.wire, number, Watch::Readable)?;
            return Ok(());
        }
        let connect_ns = &mut self.run.counts[side.index()].connect_ns;
        connect_ns.saturating_record(now.saturating_sub(since));
        link.phase = Phase::Idle;
        self.poll.change(&link.wire, number, Watch::Readable)?;
        self.free(number)
    }

    /// Fails each request that has received nothing for longer than `--timeout`. Returns an error
    /// if a connection has not been opened in time.
    fn look_for_silence(&mut self) -> Result<(), RunError> {
        let now = self.now();
        self.looked_ns = now;
        let silence_max = self.setup.silence_max;
        for number in 0..self.links.len() {
            let link = &self.links[number];
            match &link.phase {
                Phase::Idle => {}
                Phase::Opening(since) if now.saturating_sub(*since) > CONNECT_NS_MAX => {
                    let error = io::ErrorKind::TimedOut.into();
                    return Err(self.no_connection(link.side, error));
                }
                Phase::Opening(_) => {}
                Phase::Busy(exchange) => {
                    if now.saturating_sub(exchange.moved_ns) > nanos(silence_max) {
                        let what = format!("nothing received for {silence_max:?} (--timeout)");
                        self.ended(number, Ended::Failed(what), now)?;
                    }
                }
            }
        }
        Ok(())
    }
}
