//! The client of a soak run: one thread that keeps many connections busy and compares the responses
//! with the expected ones.
//!
//! Each connection has one request in progress, or two if one is pipelined; the next request
//! follows immediately after the response. Deadlines of all connections are checked in one pass
//! every [`SOAK_CHECK_MS`]: they need not be exact, and a pass over thousands of connections takes
//! time.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::limits::{
    CONNECT_MS_MAX, NARROW_BUFFER_BYTES, RECEIVE_BYTES, SOAK_CHECK_MS, SOAK_ERRORS_MAX,
    SOAK_SILENCE_S,
};
use crate::precision::nanos;
use crate::response::shown;
use crate::soak::ask::RequestTemplate;
use crate::soak::check::{Kind, Mismatch};
use crate::soak::exchange::Exchange;
use crate::soak::plan::{How, Pause, Plan, Point};
use crate::soak::tally::{Stage, Tally};
use crate::socket::{self, Poll, Received, Watch};

const LOOK_NS: u64 = SOAK_CHECK_MS * 1_000_000;
const CONNECT_NS_MAX: u64 = CONNECT_MS_MAX * 1_000_000;
const SILENCE_NS_MAX: u64 = SOAK_SILENCE_S * 1_000_000_000;
/// If the periodic check of all connections is late by more than this many nanoseconds, because the
/// client was stalled, the run is extended by the delay.
const STALL_NS: u64 = 1_000_000_000;
/// Maximum number of receives whose bytes are discarded before an aborted connection is closed by
/// FIN. Without them, unread bytes would make the kernel send a reset instead.
const DRAINS_MAX: usize = 64;

/// The parameters of a run.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Address of the proxy.
    pub addr: SocketAddr,
    /// Generates the requests.
    pub asking: RequestTemplate,
    /// Number of concurrent connections, each of which sends one request after another.
    pub streams: usize,
    /// Number of tokens requested in each response.
    pub tokens: u32,
    /// Duration of the run.
    pub duration: Duration,
    /// Share of requests that the client aborts, from 0 to 1.
    pub abort_share: f64,
    /// Seed from which requests, aborts and pauses are drawn.
    pub seed: u64,
}

/// The reason why a run ended without a result.
#[derive(Debug)]
pub enum SoakError {
    /// A system call of the client failed.
    Io(io::Error),
    /// The `tick` callback of [`run`] returned an error.
    Tick(String),
}

impl fmt::Display for SoakError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(f, "the client cannot continue: {error}"),
            Self::Tick(text) => f.write_str(text),
        }
    }
}

impl std::error::Error for SoakError {}

impl From<io::Error> for SoakError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

enum Phase {
    /// Not connected: no connect has been tried, the last connect failed, or the last request
    /// failed. The next periodic check opens a new connection.
    Closed,
    /// The connect has been in progress since this time, in nanoseconds of the run.
    Opening(OwnedFd, u64),
    Open(OwnedFd),
}

struct Link {
    phase: Phase,
    /// Whether the client reads slowly from this connection: with a small receive buffer and with
    /// pauses.
    narrow: bool,
    /// Whether a response has been completed on this connection.
    used: bool,
    /// Bytes of the current request, or of two pipelined ones; the first `sent` bytes have been
    /// sent.
    out: Vec<u8>,
    sent: usize,
    watch: Watch,
    moved_ns: u64,
    abort_ns: Option<u64>,
    pause: Option<Pause>,
    paused_until_ns: Option<u64>,
    queue: VecDeque<Exchange>,
}

impl Link {
    const fn new() -> Self {
        Self {
            phase: Phase::Closed,
            narrow: false,
            used: false,
            out: Vec::new(),
            sent: 0,
            watch: Watch::Both,
            moved_ns: 0,
            abort_ns: None,
            pause: None,
            paused_until_ns: None,
            queue: VecDeque::new(),
        }
    }

    /// Extends the connect timeout and the silence timeout of this connection by `late_ns`, the
    /// time by which the client's own check is late. Bytes that arrived meanwhile may still be
    /// unread, so the peer must not be blamed for the delay.
    fn extend_deadlines(&mut self, late_ns: u64) {
        self.moved_ns += late_ns;
        if let Phase::Opening(_, since) = &mut self.phase {
            *since += late_ns;
        }
    }

    fn watch(&mut self, poll: &Poll, number: usize, watch: Watch) -> io::Result<()> {
        if let Phase::Open(socket) = &self.phase
            && self.watch != watch
        {
            poll.change(socket, number, watch)?;
            self.watch = watch;
        }
        Ok(())
    }
}

struct Client<'a> {
    setup: &'a Setup,
    clock: Instant,
    poll: Poll,
    plan: Plan,
    links: Vec<Link>,
    buffer: Vec<u8>,
    next: u64,
    tally: Tally,
}

/// Performs the whole run on the calling thread, closes all connections and returns the counters.
/// `tick` is called about every [`SOAK_CHECK_MS`] milliseconds with the nanoseconds since the start
/// and the counters so far.
///
/// # Errors
/// If a system call of the client fails or `tick` returns an error. Failed requests are counted,
/// not returned.
pub fn run(
    setup: &Setup,
    tick: &mut dyn FnMut(u64, &Tally) -> Result<(), String>,
) -> Result<Tally, SoakError> {
    let mut client = Client {
        setup,
        clock: Instant::now(),
        poll: Poll::new()?,
        plan: Plan::new(setup.seed, setup.abort_share, setup.tokens),
        links: Vec::new(),
        buffer: vec![0; RECEIVE_BYTES],
        next: 0,
        tally: Tally::default(),
    };
    client.links.resize_with(setup.streams, Link::new);
    let mut end_ns = nanos(setup.duration);
    let mut ready = Vec::new();
    let mut look_ns = 0;
    loop {
        let now = client.now();
        if now >= look_ns {
            let late = now - look_ns;
            client.tally.late_ns = client.tally.late_ns.max(late);
            if late > STALL_NS {
                end_ns += late;
            }
            if now >= end_ns || client.tally.failures() >= SOAK_ERRORS_MAX {
                break;
            }
            for number in 0..client.links.len() {
                client.links[number].extend_deadlines(late);
                client.look(number, now)?;
            }
            tick(now, &client.tally).map_err(SoakError::Tick)?;
            look_ns = now + LOOK_NS;
        }
        ready.clear();
        let wait = look_ns.saturating_sub(client.now());
        client.poll.wait(Duration::from_nanos(wait), &mut ready)?;
        for number in ready.iter().copied() {
            client.ready(number)?;
        }
    }
    let open = client.links.iter().map(|link| link.queue.len() as u64);
    client.tally.unfinished = open.sum();
    Ok(client.tally)
}

impl Client<'_> {
    fn now(&self) -> u64 {
        nanos(self.clock.elapsed())
    }

    /// Performs the actions of a connection that are due at `now`: a new connection, a planned
    /// abort, the end of a pause, or a timeout.
    fn look(&mut self, number: usize, now: u64) -> io::Result<()> {
        let link = &mut self.links[number];
        let since = match &link.phase {
            Phase::Closed => return self.open(number),
            Phase::Opening(_, since) if now.saturating_sub(*since) > CONNECT_NS_MAX => {
                let text = format!("no connection to {} in time", self.setup.addr);
                return self.failed(number, &Mismatch::new(Kind::Connection, text));
            }
            Phase::Opening(..) => return Ok(()),
            Phase::Open(_) => link.moved_ns,
        };
        if link.abort_ns.is_some_and(|due| due <= now) {
            return self.abort(number);
        }
        if let Some(until) = link.paused_until_ns {
            return if until <= now {
                self.unpause(number, now)
            } else {
                Ok(())
            };
        }
        if now.saturating_sub(since) > SILENCE_NS_MAX {
            let came = link.queue.front().map_or(0, Exchange::came);
            let text = format!("after token {came}: nothing received for {SOAK_SILENCE_S} s");
            return self.failed(number, &Mismatch::new(Kind::Silence, text));
        }
        Ok(())
    }

    fn unpause(&mut self, number: usize, now: u64) -> io::Result<()> {
        let link = &mut self.links[number];
        link.paused_until_ns = None;
        link.moved_ns = now;
        self.send_on(number)
    }

    /// Starts opening a new connection, which replaces the previous one if there is any. A connect
    /// that fails immediately is counted as a failed request.
    fn open(&mut self, number: usize) -> io::Result<()> {
        let now = self.now();
        let link = &mut self.links[number];
        *link = Link::new();
        link.narrow = self.plan.narrow();
        let addr = &self.setup.addr;
        let socket = if link.narrow {
            socket::connect_narrow(addr, NARROW_BUFFER_BYTES)
        } else {
            socket::connect(addr)
        };
        match socket {
            Ok(socket) => {
                self.poll.add(&socket, number, Watch::Both)?;
                link.phase = Phase::Opening(socket, now);
                self.tally.connections += 1;
                self.tally.narrow += u64::from(link.narrow);
            }
            Err(error) => {
                let text = format!("cannot connect to {addr}: {error}");
                let wrong = Mismatch::new(Kind::Connection, text);
                self.tally.wrong(&format!("stream {number}"), &wrong);
            }
        }
        Ok(())
    }

    /// Handles a connection that epoll reports as ready.
    fn ready(&mut self, number: usize) -> io::Result<()> {
        let link = &mut self.links[number];
        match std::mem::replace(&mut link.phase, Phase::Closed) {
            Phase::Closed => return Ok(()),
            Phase::Opening(socket, _) => {
                let connected = socket::connected(&socket);
                link.phase = Phase::Open(socket);
                return match connected {
                    Ok(()) => self.begin(number),
                    Err(error) => {
                        let text = format!("cannot connect to {}: {error}", self.setup.addr);
                        self.failed(number, &Mismatch::new(Kind::Connection, text))
                    }
                };
            }
            Phase::Open(socket) => link.phase = Phase::Open(socket),
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        let taken = self.receive(number, &mut buffer);
        self.buffer = buffer;
        taken
    }

    fn receive(&mut self, number: usize, buffer: &mut [u8]) -> io::Result<()> {
        let now = self.now();
        let link = &mut self.links[number];
        let Phase::Open(socket) = &link.phase else {
            return Ok(());
        };
        let received = socket::receive(socket, buffer);
        // A paused connection is woken only by its failure.
        match received {
            Received::Bytes(len) => {
                link.moved_ns = now;
                self.tally.bytes += len as u64;
                self.take(number, &buffer[..len], now)
            }
            Received::Nothing if link.sent < link.out.len() => self.send_on(number),
            Received::Nothing => Ok(()),
            Received::End => self.ended(number, None),
            Received::Failed(error) => self.ended(number, Some(error)),
        }
    }

    /// Checks bytes received on a connection. Also performs an abort, starts a pause or starts the
    /// next request if it is now due.
    fn take(&mut self, number: usize, mut piece: &[u8], now: u64) -> io::Result<()> {
        while !piece.is_empty() {
            let link = &mut self.links[number];
            let Some(exchange) = link.queue.front_mut() else {
                let text = format!("received bytes that belong to no request: {}", shown(piece));
                return self.failed(number, &Mismatch::new(Kind::Framing, text));
            };
            let before = exchange.came();
            let taken = exchange.take(piece);
            let came = exchange.came();
            self.tally.chunks += u64::from(came - before);
            match taken {
                Ok(rest) => piece = rest,
                Err(wrong) => return self.failed(number, &wrong),
            }
            if let Some((Point::Tokens(tokens), _)) = exchange.abort
                && exchange.has_head()
                && came >= tokens
            {
                return self.abort(number);
            }
            let (done, stream) = (exchange.is_done(), exchange.stream);
            if !done
                && stream
                && let Some(pause) = link.pause.take_if(|pause| came >= pause.tokens)
            {
                self.tally.pauses += 1;
                link.paused_until_ns = Some(now + pause.time_ms * 1_000_000);
                link.watch(&self.poll, number, Watch::Failure)?;
            }
            if done && !self.complete(number) {
                return self.open(number);
            }
        }
        let link = &self.links[number];
        if link.queue.is_empty() {
            return self.begin(number);
        }
        if link.sent < link.out.len() && link.paused_until_ns.is_none() {
            return self.send_on(number);
        }
        Ok(())
    }

    /// Removes the correct and complete response at the front of the connection's queue and counts
    /// it. Returns whether the connection can be used again.
    fn complete(&mut self, number: usize) -> bool {
        let link = &mut self.links[number];
        let Some(exchange) = link.queue.pop_front() else {
            return false;
        };
        let count = if exchange.stream {
            &mut self.tally.streams
        } else {
            &mut self.tally.unstreamed
        };
        *count += 1;
        self.tally.pipelined += u64::from(exchange.second);
        link.used = true;
        // The connection is unusable if the response was complete before the request was sent.
        if exchange.is_reusable() && link.sent == link.out.len() {
            return true;
        }
        self.tally.closed += 1;
        self.tally.again += link.queue.len() as u64;
        false
    }

    /// Handles a connection that the peer closed (`error` is `None`) or that failed.
    fn ended(&mut self, number: usize, error: Option<io::Error>) -> io::Result<()> {
        let link = &mut self.links[number];
        let Some(exchange) = link.queue.front_mut() else {
            return self.open(number);
        };
        // The peer closed the idle connection at the same time as the client sent the next request
        // on it (RFC 9112, section 9.3.1), so the request has not failed.
        if link.used && !exchange.has_response_bytes {
            self.tally.again += link.queue.len() as u64;
            return self.open(number);
        }
        let ended = match error {
            Some(error) => {
                let came = exchange.came();
                let text = format!("after token {came}: the connection failed: {error}");
                Err(Mismatch::new(Kind::Connection, text))
            }
            None => exchange.end(),
        };
        match ended {
            Ok(()) => {
                self.complete(number);
                self.open(number)
            }
            Err(wrong) => self.failed(number, &wrong),
        }
    }

    /// Draws the next request of a connection and starts sending it.
    fn begin(&mut self, number: usize) -> io::Result<()> {
        let draw = self.plan.draw();
        let asked = (self.setup.asking).of(self.next, draw.stream, draw.prompt_bytes);
        let mut first = Exchange::new(self.next, draw.stream, asked.tag, self.setup.tokens);
        first.abort = draw.abort;
        let link = &mut self.links[number];
        link.out = asked.bytes;
        link.sent = 0;
        link.abort_ns = None;
        link.paused_until_ns = None;
        link.pause = (link.narrow && draw.stream).then(|| self.plan.pause());
        if let Some((Point::Sending(part), _)) = draw.abort {
            let len = link.out.len() * usize::from(part) / 1000;
            link.out.truncate(len);
        }
        link.queue.push_back(first);
        if draw.second {
            let asked = self.setup.asking.of(self.next + 1, true, 0);
            let mut second = Exchange::new(self.next + 1, true, asked.tag, self.setup.tokens);
            second.second = true;
            link.out.extend_from_slice(&asked.bytes);
            link.queue.push_back(second);
        }
        let begun = link.queue.len() as u64;
        self.next += begun;
        self.tally.begun += begun;
        self.links[number].moved_ns = self.now();
        self.send_on(number)
    }

    /// Sends as much of the connection's requests as the socket accepts, and watches for room to
    /// send if bytes are left. Once all are sent, performs an abort planned for this point, or sets
    /// the time of an abort planned after a delay.
    fn send_on(&mut self, number: usize) -> io::Result<()> {
        let now = self.now();
        let link = &mut self.links[number];
        let Phase::Open(socket) = &link.phase else {
            return Ok(());
        };
        let mut watch = Watch::Readable;
        while link.sent < link.out.len() {
            match socket::send(socket, &link.out[link.sent..]) {
                Ok(0) => {
                    watch = Watch::Both;
                    break;
                }
                Ok(len) => link.sent += len,
                // The next receive returns the response or the error.
                Err(_) => break,
            }
        }
        link.watch(&self.poll, number, watch)?;
        if link.sent < link.out.len() {
            return Ok(());
        }
        match link.queue.front().and_then(|exchange| exchange.abort) {
            Some((Point::Sending(_), _)) => self.abort(number),
            Some((Point::AfterMs(time_ms), _)) if link.abort_ns.is_none() => {
                link.abort_ns = Some(now + time_ms * 1_000_000);
                Ok(())
            }
            Some(_) | None => Ok(()),
        }
    }

    /// Aborts the request of a connection as planned and opens a new connection.
    fn abort(&mut self, number: usize) -> io::Result<()> {
        let link = &mut self.links[number];
        let phase = std::mem::replace(&mut link.phase, Phase::Closed);
        let front = link.queue.front();
        if let (Phase::Open(socket), Some(exchange)) = (phase, front)
            && let Some((point, how)) = exchange.abort
        {
            let stage = match point {
                _ if exchange.has_response_bytes => Stage::Within,
                Point::Sending(_) => Stage::Sending,
                Point::AfterMs(_) | Point::Tokens(_) => Stage::BeforeHead,
            };
            self.tally.aborts[stage as usize][how as usize] += 1;
            match how {
                How::Rst => socket::reset(socket)?,
                How::Fin => {
                    for _ in 0..DRAINS_MAX {
                        let Received::Bytes(_) = socket::receive(&socket, &mut [0; RECEIVE_BYTES])
                        else {
                            break;
                        };
                    }
                }
            }
        }
        self.open(number)
    }

    /// Counts a failed request and closes its connection. The next periodic check opens a new one.
    fn failed(&mut self, number: usize, wrong: &Mismatch) -> io::Result<()> {
        let link = &mut self.links[number];
        let request = match link.queue.front() {
            Some(exchange) => format!(", {}", exchange.name()),
            None => String::new(),
        };
        let slow = if link.narrow { ", reads slowly" } else { "" };
        let what = format!("stream {number}{request}{slow}");
        self.tally.wrong(&what, wrong);
        link.phase = Phase::Closed;
        // The next check opens a new connection. Opening it here would flood a proxy that refuses
        // connections.
        link.queue.clear();
        Ok(())
    }
}
