//! The counters of one shard.
//!
//! Only the shard's own thread writes them, and the scrape reads them. After `new`, nothing here
//! allocates, locks or reads a clock.

use super::cell::{Bounds, Counter, Gauge, Histogram};
use super::labels::{CodeClass, Direction, LegRole, Named, Phase, Route, Stranded, TlsPeer};
use crate::net::tls;
use crate::pd::{Outcome, Reason};

/// Buckets of the time to first token, in microseconds. The same as vLLM's, so that dashboards can
/// show both in one panel.
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

/// Buckets of the request duration, in microseconds. The same as vLLM's end-to-end latency.
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

/// Buckets of the time that ringside itself adds, in nanoseconds: 1 us to 100 ms.
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

/// The counters of one shard. Aligned so that no two shards write to the same cache line.
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
    /// Creates counters at zero. `faults` is the length of the fault label table.
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

    /// Counts a request whose head was read. Each call must be followed by one call of
    /// `request_done` with the same route.
    pub fn request_started(&self, route: Route) {
        self.started[route.index()].add(1);
    }

    /// Counts a finished request, `micros` after the first byte of its head.
    pub fn request_done(&self, route: Route, code: CodeClass, micros: u64) {
        self.done[route.index()][code.index()].add(1);
        self.duration[route.index()].record(micros);
    }

    /// Records the time until the first body byte of a response was sent to the client.
    pub fn ttft(&self, route: Route, micros: u64) {
        self.first_token[route.index()].record(micros);
    }

    /// Records the duration of one attempt of a leg.
    pub fn leg(&self, role: LegRole, micros: u64) {
        self.legs[role.index()].record(micros);
    }

    /// Records time spent inside ringside.
    pub fn overhead(&self, direction: Direction, nanos: u64) {
        self.overhead[direction.index()].record(nanos);
    }

    /// Counts a failure; `index` is its position in the fault label table.
    pub fn fault(&self, index: usize) {
        debug_assert!(index < self.faults.len());
        if let Some(counter) = self.faults.get(index) {
            counter.add(1);
        }
    }

    /// Counts a client that disconnected before its response was complete.
    pub fn client_left(&self, phase: Phase) {
        self.left[phase.index()].add(1);
    }

    /// Counts a prompt by where it was computed and why.
    pub fn pd(&self, outcome: Outcome, reason: Reason) {
        self.pd[outcome.index()][reason.index()].add(1);
    }

    /// Adds `delta` to the number of idle engine connections.
    pub fn pool_idle(&self, role: LegRole, delta: i64) {
        self.pool_idle[role.index()].add(delta);
    }

    /// Adds `delta` to the number of engine connections in use.
    pub fn pool_active(&self, role: LegRole, delta: i64) {
        self.pool_active[role.index()].add(delta);
    }

    /// Counts a target that a request named and the allowlist does not permit.
    pub fn denied(&self, named: Named) {
        self.denied[named.index()].add(1);
    }

    /// Adds `delta` to the number of client connections.
    pub fn client_connections(&self, delta: i64) {
        self.clients.add(delta);
    }

    /// Counts a repeated prefill attempt.
    pub fn retry(&self) {
        self.retries.add(1);
    }

    /// Counts a leg that was sent again because its reused connection had been closed.
    pub fn replay(&self) {
        self.replays.add(1);
    }

    /// Counts a session that panicked and was closed.
    pub fn panic(&self) {
        self.panics.add(1);
    }

    /// Counts `count` members that were removed from a client's request body, such as
    /// `kv_transfer_params`.
    pub fn masked(&self, count: u64) {
        self.masked.add(count);
    }

    /// Counts a handoff that no decode leg carried.
    pub fn stranded(&self, outcome: Stranded) {
        self.stranded[outcome.index()].add(1);
    }

    /// Counts body bytes that were spliced in the kernel, without a copy to user space.
    pub fn spliced_bytes(&self, count: u64) {
        self.spliced_bytes.add(count);
    }

    /// Counts request body bytes that passed through a buffer in user space.
    pub fn copied_bytes(&self, count: u64) {
        self.copied_bytes.add(count);
    }

    /// Counts an access-log record that was dropped because the ring was full.
    pub fn access_log_dropped(&self) {
        self.access_log_dropped.add(1);
    }

    /// Counts the outcome of a TLS handshake, or a later protocol violation on the connection.
    pub fn tls(&self, peer: TlsPeer, outcome: tls::Outcome) {
        self.tls[peer.index()][outcome.index()].add(1);
    }

    /// Counts spans that were dropped because the ring was full.
    pub fn trace_dropped(&self, count: u64) {
        self.trace_dropped.add(count);
    }

    /// Counts a pause of accepting, caused by a lack of file descriptors or memory.
    pub fn accept_paused(&self) {
        self.accept_paused.add(1);
    }
}
