//! What a run needs and what it yields: plain data between the client and the statistics.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hdrhistogram::Histogram;

use crate::precision::{SchedStat, histogram};
use crate::request::Requests;
use crate::response::Text;
use crate::schedule::{Load, Side, Until};
use crate::wire::Secure;

/// What a run needs.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Where both sides listen, direct first.
    pub addrs: [SocketAddr; 2],
    /// Where TLS is spoken.
    pub secure: [Option<Secure>; 2],
    /// What is asked.
    pub requests: Requests,
    /// When.
    pub load: Load,
    /// Until when.
    pub until: Until,
    /// Pairs at the beginning that do not count.
    pub warmup: u32,
    /// Seed of the order within pairs and of the times between requests.
    pub seed: u64,
    /// Tells the prompts of this run from those of others.
    pub salt: u64,
    /// How long a request may stay without progress.
    pub silence_max: Duration,
    /// Never sleep.
    pub busy_poll: bool,
}

/// One complete answer.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// Its pair, from 0, warm-up not counted.
    pub pair: u32,
    /// Which way it went.
    pub side: Side,
    /// When it was to be sent, in nanoseconds of the run.
    pub start_ns: u64,
    /// From then to the first event with text.
    pub ttft_ns: u64,
    /// From then to the end of the answer.
    pub total_ns: u64,
    /// Events with data, `[DONE]` included.
    pub events: u32,
    /// Receives that completed at least one event with text.
    pub arrivals: u32,
    /// What its text was.
    pub text: Text,
}

/// Requests that failed.
#[derive(Clone, Debug, Default)]
pub struct Failures {
    /// How many per side, warm-up included.
    pub count: [u64; 2],
    /// What the first one per side was.
    pub first: [Option<String>; 2],
}

impl Failures {
    /// Of both sides.
    #[must_use]
    pub const fn total(&self) -> u64 {
        self.count[0] + self.count[1]
    }
}

/// How late the client itself was.
#[derive(Clone, Debug)]
pub struct Lag {
    /// From the planned time of a request to its send (open loop).
    pub send_ns: Histogram<u64>,
    /// From the return of a wait to the stamp on what had come.
    pub stamp_ns: Histogram<u64>,
    /// From the return of a wait to the next wait: as long may a byte lie unseen.
    pub turn_ns: Histogram<u64>,
    /// What the scheduler did to the measuring thread; `None` where the kernel does not say.
    pub sched: Option<SchedStat>,
}

impl Lag {
    /// Nothing measured yet.
    ///
    /// # Errors
    /// As [`histogram`].
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            send_ns: histogram()?,
            stamp_ns: histogram()?,
            turn_ns: histogram()?,
            sched: None,
        })
    }
}

/// What a run yields.
#[derive(Clone, Debug)]
pub struct Run {
    /// Pairs begun, warm-up not counted.
    pub pairs: u32,
    /// Complete answers.
    pub done: Vec<Done>,
    /// Gaps between events with text per side, each with its pair.
    pub gaps: [Vec<(u64, u32)>; 2],
    /// Requests that failed.
    pub failures: Failures,
    /// Time to connect per side.
    pub connect_ns: [Histogram<u64>; 2],
    /// Connections opened again because the other end had closed them, per side.
    pub reopened: [u64; 2],
    /// Requests that had to wait for a connection, per side.
    pub waited: [u64; 2],
    /// Requests sent a second time, because their connection was closed just when it was used again.
    pub sent_again: [u64; 2],
    /// How late the client was.
    pub lag: Lag,
    /// Whether the run ended early because the bound of gaps was reached.
    pub full: bool,
    /// From the first request that counts to the end.
    pub wall_ns: u64,
}

impl Run {
    /// Nothing yet.
    ///
    /// # Errors
    /// As [`histogram`].
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            pairs: 0,
            done: Vec::new(),
            gaps: [Vec::new(), Vec::new()],
            failures: Failures::default(),
            connect_ns: [histogram()?, histogram()?],
            reopened: [0; 2],
            waited: [0; 2],
            sent_again: [0; 2],
            lag: Lag::new()?,
            full: false,
            wall_ns: 0,
        })
    }
}

/// Why there is no run.
#[derive(Debug)]
pub enum RunError {
    /// No connection.
    Connect(Side, SocketAddr, io::Error),
    /// A system call of the client failed.
    Client(io::Error),
    /// A request of the warm-up failed; so will the others.
    Warmup(Side, String),
    /// More requests wait for a connection than the bound.
    TooSlow(usize),
    /// Connections are closed as fast as they are opened.
    Closing(Side),
}

impl fmt::Display for RunError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(side, addr, error) => write!(
                f,
                "{}: cannot connect to {addr}: {error}; is it running, and is --{} right?",
                side.name(),
                side.name()
            ),
            Self::Client(error) => write!(f, "the client failed: {error}"),
            Self::Warmup(side, what) => {
                write!(f, "{}: a warm-up request failed: {what}", side.name())
            }
            Self::TooSlow(waiting) => write!(
                f,
                "{waiting} requests wait for a connection: the upstream or this client cannot keep up \
                 with --rate; lower it"
            ),
            Self::Closing(side) => write!(
                f,
                "{}: it closes every connection before anything is asked; is --{} right?",
                side.name(),
                side.name()
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
