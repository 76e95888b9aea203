//! The counters of one shard.
//!
//! Written by the shard's own thread only; read by the scrape. Nothing here allocates after `new`,
//! locks or reads a clock.

use super::cell::{Bounds, Counter, Gauge, Histogram};
use super::labels::{CodeClass, Direction, LegRole, Named, Phase, Route, Stranded, TlsPeer};
use crate::net::tls;
use crate::pd::{Outcome, Reason};

/// vLLM's buckets of time to first token, so that our panels lie over the engines'. Microseconds.
pub(super) static FIRST_TOKEN_BOUNDS: Bounds<22> = Bounds {
    upper: [
        1_000,
        5_000,
        10_000,
        20_000,
        40_000,
        60_000,
        80_000,
        100_000,
        250_000,
        500_000,
        750_000,
        1_000_000,
        2_500_000,
        5_000_000,
        7_500_000,
        10_000_000,
        20_000_000,
        40_000_000,
        80_000_000,
        160_000_000,
        640_000_000,
        2_560_000_000,
    ],
    per_second: 1e6,
};

/// vLLM's buckets of end-to-end latency. Microseconds.
pub(super) static REQUEST_BOUNDS: Bounds<21> = Bounds {
    upper: [
        300_000,
        500_000,
        800_000,
        1_000_000,
        1_500_000,
        2_000_000,
        2_500_000,
        5_000_000,
        10_000_000,
        15_000_000,
        20_000_000,
        30_000_000,
        40_000_000,
        50_000_000,
        60_000_000,
        120_000_000,
        240_000_000,
        480_000_000,
        960_000_000,
        1_920_000_000,
        7_680_000_000,
    ],
    per_second: 1e6,
};

/// Our own cost: 1 us to 100 ms. Nanoseconds.
pub(super) static OVERHEAD_BOUNDS: Bounds<15> = Bounds {
    upper: [
        1_000,
        2_000,
        5_000,
        10_000,
        20_000,
        50_000,
        100_000,
        200_000,
        500_000,
        1_000_000,
        2_000_000,
        5_000_000,
        10_000_000,
        50_000_000,
        100_000_000,
    ],
    per_second: 1e9,
};

/// The counters of one shard. Padded, so that two shards never write one cache line.
#[derive(Debug)]
#[repr(align(128))]
pub struct ShardMetrics {
    pub(super) started: [Counter; Route::ALL.len()],
    pub(super) done: [[Counter; CodeClass::ALL.len()]; Route::ALL.len()],
    pub(super) duration: [Histogram<21>; Route::ALL.len()],
    pub(super) first_token: [Histogram<22>; Route::ALL.len()],
    pub(super) legs: [Histogram<22>; LegRole::ALL.len()],
    pub(super) overhead: [Histogram<15>; Direction::ALL.len()],
    pub(super) faults: Box<[Counter]>,
    pub(super) left: [Counter; Phase::ALL.len()],
    pub(super) pd: [[Counter; Reason::ALL.len()]; Outcome::ALL.len()],
    pub(super) pool_idle: [Gauge; LegRole::ALL.len()],
    pub(super) pool_active: [Gauge; LegRole::ALL.len()],
    pub(super) denied: [Counter; Named::ALL.len()],
    pub(super) clients: Gauge,
    pub(super) retries: Counter,
    pub(super) replays: Counter,
    pub(super) panics: Counter,
    pub(super) masked: Counter,
    pub(super) stranded: [Counter; Stranded::ALL.len()],
    pub(super) spliced_bytes: Counter,
    pub(super) copied_bytes: Counter,
    pub(super) access_log_dropped: Counter,
    pub(super) trace_dropped: Counter,
    pub(super) accept_paused: Counter,
    pub(super) tls: [[Counter; tls::Outcome::ALL.len()]; TlsPeer::ALL.len()],
}

impl ShardMetrics {
    /// Counters at zero; `faults` is the length of the fault label table.
    #[must_use]
    pub fn new(faults: usize) -> Self {
        fn each<T, const N: usize>(make: impl Fn() -> T) -> [T; N] {
            std::array::from_fn(|_| make())
        }
        Self {
            started: each(Counter::default),
            done: each(|| each(Counter::default)),
            duration: each(|| Histogram::new(&REQUEST_BOUNDS)),
            first_token: each(|| Histogram::new(&FIRST_TOKEN_BOUNDS)),
            legs: each(|| Histogram::new(&FIRST_TOKEN_BOUNDS)),
            overhead: each(|| Histogram::new(&OVERHEAD_BOUNDS)),
            faults: (0..faults).map(|_| Counter::default()).collect(),
            left: each(Counter::default),
            pd: each(|| each(Counter::default)),
            pool_idle: each(Gauge::default),
            pool_active: each(Gauge::default),
            denied: each(Counter::default),
            clients: Gauge::default(),
            retries: Counter::default(),
            replays: Counter::default(),
            panics: Counter::default(),
            masked: Counter::default(),
            stranded: each(Counter::default),
            spliced_bytes: Counter::default(),
            copied_bytes: Counter::default(),
            access_log_dropped: Counter::default(),
            trace_dropped: Counter::default(),
            accept_paused: Counter::default(),
            tls: each(|| each(Counter::default)),
        }
    }

    /// A request's head was read. Each call is followed by one `request_done` of the same route.
    pub fn request_started(&self, route: Route) {
        self.started[route.index()].add(1);
    }

    /// A request is over, `micros` after its head began.
    pub fn request_done(&self, route: Route, code: CodeClass, micros: u64) {
        self.done[route.index()][code.index()].add(1);
        self.duration[route.index()].record(micros);
    }

    /// The first body byte of an answer went to the client.
    pub fn ttft(&self, route: Route, micros: u64) {
        self.first_token[route.index()].record(micros);
    }

    /// An attempt at an engine is over.
    pub fn leg(&self, role: LegRole, micros: u64) {
        self.legs[role.index()].record(micros);
    }

    /// Time that passed inside this program.
    pub fn overhead(&self, direction: Direction, nanos: u64) {
        self.overhead[direction.index()].record(nanos);
    }

    /// A failure; `index` is its position in the fault label table.
    pub fn fault(&self, index: usize) {
        debug_assert!(index < self.faults.len());
        if let Some(counter) = self.faults.get(index) {
            counter.add(1);
        }
    }

    /// The client went away.
    pub fn client_left(&self, phase: Phase) {
        self.left[phase.index()].add(1);
    }

    /// Where a prompt was computed, and why there.
    pub fn pd(&self, outcome: Outcome, reason: Reason) {
        self.pd[outcome.index()][reason.index()].add(1);
    }

    /// Idle engine connections came or went.
    pub fn pool_idle(&self, role: LegRole, delta: i64) {
        self.pool_idle[role.index()].add(delta);
    }

    /// Engine connections in use came or went.
    pub fn pool_active(&self, role: LegRole, delta: i64) {
        self.pool_active[role.index()].add(delta);
    }

    /// A target that a request named is not allowed.
    pub fn denied(&self, named: Named) {
        self.denied[named.index()].add(1);
    }

    /// Client connections came or went.
    pub fn client_connections(&self, delta: i64) {
        self.clients.add(delta);
    }

    /// A prefill was attempted again.
    pub fn retry(&self) {
        self.retries.add(1);
    }

    /// A leg was sent again because its reused connection had died.
    pub fn replay(&self) {
        self.replays.add(1);
    }

    /// A session panicked and was closed.
    pub fn panic(&self) {
        self.panics.add(1);
    }

    /// `kv_transfer_params` a client sent were taken out of `count` places.
    pub fn masked(&self, count: u64) {
        self.masked.add(count);
    }

    /// A handoff was carried by no decode leg.
    pub fn stranded(&self, outcome: Stranded) {
        self.stranded[outcome.index()].add(1);
    }

    /// Body bytes that never entered user memory.
    pub fn spliced_bytes(&self, count: u64) {
        self.spliced_bytes.add(count);
    }

    /// Body bytes that went through a buffer.
    pub fn copied_bytes(&self, count: u64) {
        self.copied_bytes.add(count);
    }

    /// An access-log record found its ring full.
    pub fn access_log_dropped(&self) {
        self.access_log_dropped.add(1);
    }

    /// A TLS handshake ended, or what was begun with one ended against the rules.
    pub fn tls(&self, peer: TlsPeer, outcome: tls::Outcome) {
        self.tls[peer.index()][outcome.index()].add(1);
    }

    /// Spans found their ring full.
    pub fn trace_dropped(&self, count: u64) {
        self.trace_dropped.add(count);
    }

    /// Accepting stopped for want of file descriptors or memory.
    pub fn accept_paused(&self) {
        self.accept_paused.add(1);
    }
}
