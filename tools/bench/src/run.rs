//! The parameters and the results of a run: plain data between the client and the statistics.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::busy::Look;
use crate::precision::{SchedStat, histogram};
use crate::request::Requests;
use crate::response::Text;
use crate::schedule::{Load, Side, Until};
use crate::wire::Secure;

/// The server of one side: the engine or a proxy.
#[derive(Clone, Debug)]
pub struct Peer {
    /// Name in messages.
    pub name: String,
    /// Address that the client connects to.
    pub addr: SocketAddr,
    /// TLS configuration; `None` for plain HTTP.
    pub secure: Option<Secure>,
}

/// The parameters of an `overhead` run.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The servers of all sides, direct first.
    pub peers: Vec<Peer>,
    /// The requests to all sides, ready to send.
    pub requests: Requests,
    /// When requests are sent: in a closed loop with a number of concurrent requests, or in an open
    /// loop at a rate.
    pub load: Load,
    /// When the run ends.
    pub until: Until,
    /// Number of rounds that are sent first and not measured.
    pub warmup: u32,
    /// Seed of the order within rounds and of the times between requests.
    pub seed: u64,
    /// Distinguishes the prompts of this run from those of other runs.
    pub salt: u64,
    /// Time without a received byte after which a request fails.
    pub silence_max: Duration,
    /// Whether the client polls without sleeping.
    pub busy_poll: bool,
    /// Number of the CPU that the client is pinned to; `None` if it is not pinned.
    pub cpu: Option<usize>,
}

/// One complete response.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Number of the round that the response belongs to; 0 is the first round after the warm-up.
    pub round: u32,
    /// The side that the request was sent to.
    pub side: Side,
    /// Start of the request, in nanoseconds of the run's clock. In an open loop, this is its
    /// planned send time. In a closed loop, it is the time at which the request was sent, or queued
    /// if no connection was available.
    pub start_ns: u64,
    /// Nanoseconds from `start_ns` to the first event with text.
    pub ttft_ns: u64,
    /// Nanoseconds from `start_ns` to the end of the response.
    pub total_ns: u64,
    /// Number of events with data, including `[DONE]`.
    pub events: u32,
    /// Number of receives that completed at least one event with text.
    pub arrivals: u32,
    /// Hash of the response's text, and whether its numbered tokens are in order.
    pub text: Text,
}

/// Counters of one side.
#[derive(Clone, Debug)]
pub struct Counts {
    /// Number of requests that failed.
    pub failures: u64,
    /// Description of the first failed request; `None` if none failed.
    pub first_failure: Option<String>,
    /// Nanoseconds to open each connection, including the TLS handshake.
    pub connect_ns: Histogram<u64>,
    /// Number of idle connections that were replaced because the peer closed them or sent
    /// unexpected bytes on them.
    pub reopened: u64,
    /// The `server` field of the first response that has one; `None` if no response has.
    pub server: Option<String>,
    /// Requests that had to wait for a connection.
    pub waited: u64,
    /// Requests sent again, because the peer closed the idle connection at the same time as the
    /// request was sent.
    pub sent_again: u64,
}

impl Counts {
    fn new() -> io::Result<Self> {
        Ok(Self {
            failures: 0,
            first_failure: None,
            connect_ns: histogram()?,
            reopened: 0,
            server: None,
            waited: 0,
            sent_again: 0,
        })
    }
}

/// Delays caused by the client.
#[derive(Clone, Debug)]
pub struct Lag {
    /// Nanoseconds from the planned time of each request to its send; empty in a closed loop.
    pub send_ns: Histogram<u64>,
    /// Nanoseconds from each wake-up of the client to the timestamps of the bytes it then receives.
    pub stamp_ns: Histogram<u64>,
    /// Nanoseconds from each wake-up of the client until it has processed everything that was
    /// ready. Bytes that arrive meanwhile may stay unread for this long.
    pub turn_ns: Histogram<u64>,
    /// Scheduler statistics of the measuring thread during the run; `None` if the kernel does not
    /// provide them.
    pub sched: Option<SchedStat>,
}

impl Lag {
    /// Creates empty histograms.
    ///
    /// # Errors
    /// Same as [`histogram`].
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            send_ns: histogram()?,
            stamp_ns: histogram()?,
            turn_ns: histogram()?,
            sched: None,
        })
    }
}

/// The results of a run.
#[derive(Clone, Debug)]
pub struct Run {
    /// Number of rounds started, without the warm-up.
    pub rounds: u32,
    /// Complete responses, without the warm-up.
    pub done: Vec<Done>,
    /// Gaps between events with text per side, in nanoseconds, each with the number of its round.
    pub gaps: Vec<Vec<(u64, u32)>>,
    /// Counters per side.
    pub counts: Vec<Counts>,
    /// Delays caused by the client.
    pub lag: Lag,
    /// CPU time of other programs: at an interval if requests are sent one at a time, while none is
    /// in flight, and at the end.
    pub looks: Vec<Look>,
    /// Whether the run ended early because the maximum number of gaps was reached.
    pub full: bool,
    /// Nanoseconds from the first round after the warm-up to the end of the run.
    pub wall_ns: u64,
}

impl Run {
    /// Creates an empty result of a run with `sides` sides.
    ///
    /// # Errors
    /// Same as [`histogram`].
    pub fn new(sides: usize) -> io::Result<Self> {
        Ok(Self {
            rounds: 0,
            done: Vec::new(),
            gaps: vec![Vec::new(); sides],
            counts: (0..sides)
                .map(|_| Counts::new())
                .collect::<Result<_, _>>()?,
            lag: Lag::new()?,
            looks: Vec::new(),
            full: false,
            wall_ns: 0,
        })
    }

    /// Returns the number of failed requests of all sides.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.counts.iter().map(|counts| counts.failures).sum()
    }
}

/// The reason why a run has no result.
#[derive(Debug)]
pub enum RunError {
    /// A connection to the server with this name, at this address, failed to open or did not open
    /// in time.
    Connect(String, SocketAddr, io::Error),
    /// A system call of the client failed.
    Client(io::Error),
    /// A request of the warm-up to the server with this name failed, so later requests would
    /// probably fail too.
    Warmup(String, String),
    /// This many requests to one side wait for a connection, which is more than `WAITING_MAX`.
    TooSlow(usize),
    /// The server with this name closed more than `REOPENED_MAX` idle connections, or sent
    /// unexpected bytes on them.
    Closing(String),
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(name, addr, error) => write!(
                f,
                "{name}: cannot connect to {addr}: {error}; is it running, and is its URL right?"
            ),
            Self::Client(error) => write!(f, "the client failed: {error}"),
            Self::Warmup(name, what) => write!(f, "{name}: a warm-up request failed: {what}"),
            Self::TooSlow(waiting) => write!(
                f,
                "{waiting} requests wait for a connection: the upstream or this client cannot keep up \
                 with --rate; lower it"
            ),
            Self::Closing(name) => write!(
                f,
                "{name}: the server keeps closing idle connections; is its URL right?"
            ),
        }
    }
}

impl std::error::Error for RunError {}

impl From<io::Error> for RunError {
    fn from(error: io::Error) -> Self {
        Self::Client(error)
    }
}
