//! The counters of one shard.
//!
//! Only the shard's own thread writes them, and the scrape reads them. After `new`, nothing here
//! allocates, locks or reads a clock.

use super::cell::{Bounds, Counter, Gauge, Histogram};
use super::labels::{
    CodeClass, Direction, Disagg, Named, Phase, Push, Route, RoutingDoubt, Stranded, TlsPeer,
    WarmUp,
};
use crate::net::tls;
use crate::pd::{Outcome, Reason, Role};

/// Buckets of the time to first token and of the leg duration, in microseconds. The same as those
/// of vLLM's time to first token, so that dashboards can show both in one panel.
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

/// Buckets of the duration of a stage, in microseconds: those of pd-sidecar.
pub(super) static STAGE_BOUNDS: Bounds<15> = Bounds {
    upper: [
        5_000,
        10_000,
        25_000,
        50_000,
        100_000,
        250_000,
        500_000,
        1_000_000,
        2_500_000,
        5_000_000,
        10_000_000,
        30_000_000,
        60_000_000,
        120_000_000,
        300_000_000,
    ],
    per_second: 1e6,
};

/// The counters of one shard. Aligned so that no two shards write to the same cache line.
#[derive(Debug)]
#[repr(align(128))]
pub struct ShardMetrics {
    pub(super) started: [Counter; Route::ALL.len()],
    pub(super) done: [[Counter; CodeClass::ALL.len()]; Route::ALL.len()],
    pub(super) duration: [Histogram<21>; Route::ALL.len()],
    pub(super) first_token: [Histogram<22>; Route::ALL.len()],
    pub(super) legs: [Histogram<22>; Role::ALL.len()],
    pub(super) overhead: [Histogram<15>; Direction::ALL.len()],
    pub(super) faults: Box<[Counter]>,
    pub(super) left: [Counter; Phase::ALL.len()],
    pub(super) pd: [[Counter; Reason::ALL.len()]; Outcome::ALL.len()],
    pub(super) disagg: [Counter; Disagg::ALL.len()],
    pub(super) stages: [Histogram<15>; Role::ALL.len()],
    pub(super) stage_errors: [Counter; Role::ALL.len()],
    pub(super) routing_doubts: [Counter; RoutingDoubt::ALL.len()],
    pub(super) pushes: [Counter; Push::ALL.len()],
    pub(super) warm_ups: [Counter; WarmUp::ALL.len()],
    pub(super) pool_idle: [Gauge; Role::ALL.len()],
    pub(super) pool_active: [Gauge; Role::ALL.len()],
    pub(super) denied: [Counter; Named::ALL.len()],
    pub(super) clients: Gauge,
    pub(super) retries: Counter,
    pub(super) replays: Counter,
    pub(super) panics: Counter,
    pub(super) masked: Counter,
    pub(super) stranded: [Counter; Stranded::ALL.len()],
    pub(super) spliced_bytes: Counter,
    pub(super) copied_bytes: Counter,
    pub(super) access_log_lines: Counter,
    pub(super) access_log_dropped: Counter,
    pub(super) trace_dropped: Counter,
    pub(super) accept_paused: Counter,
    pub(super) idle_closed: Counter,
    pub(super) events_lost: Counter,
    pub(super) peers_vanished: Counter,
    pub(super) clients_handed_over: Counter,
    pub(super) tls: [[Counter; tls::Outcome::ALL.len()]; TlsPeer::ALL.len()],
}

impl ShardMetrics {
    /// Creates counters at zero. `faults` is the number of fault labels (`fault::LABELS`).
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
            disagg: each(Counter::default),
            stages: each(|| Histogram::new(&STAGE_BOUNDS)),
            stage_errors: each(Counter::default),
            routing_doubts: each(Counter::default),
            pushes: each(Counter::default),
            warm_ups: each(Counter::default),
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
            access_log_lines: Counter::default(),
            access_log_dropped: Counter::default(),
            trace_dropped: Counter::default(),
            accept_paused: Counter::default(),
            idle_closed: Counter::default(),
            events_lost: Counter::default(),
            peers_vanished: Counter::default(),
            clients_handed_over: Counter::default(),
            tls: each(|| each(Counter::default)),
        }
    }

    /// Counts a request whose head was read. Each call must be followed by one call of
    /// `request_done` with the same route.
    pub fn request_started(&self, route: Route) {
        self.started[route.index()].add(1);
    }

    /// Counts a finished request by the status class of its response, and records its duration:
    /// `micros` since the first byte of its head.
    pub fn request_done(&self, route: Route, code: CodeClass, micros: u64) {
        self.done[route.index()][code.index()].add(1);
        self.duration[route.index()].record(micros);
    }

    /// Returns the number of finished requests.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.done.iter().flatten().map(Counter::get).sum()
    }

    /// Returns the number of finished requests with a 5xx status or without a complete response.
    #[must_use]
    pub fn requests_failed(&self) -> u64 {
        let failed = |codes: &[Counter; CodeClass::ALL.len()]| {
            codes[CodeClass::C5xx.index()].get() + codes[CodeClass::Aborted.index()].get()
        };
        self.done.iter().map(failed).sum()
    }

    /// Records the microseconds from the first byte of a request until the first body byte of its
    /// response was sent to the client.
    pub fn ttft(&self, route: Route, micros: u64) {
        self.first_token[route.index()].record(micros);
    }

    /// Records the duration in microseconds of one attempt of a leg.
    ///
    /// For a decode leg it ends when the response head has arrived. It starts when the connection
    /// is established or, if the request body is forwarded as it arrives, after the upload. For
    /// other roles it covers connecting (except for a concurrent prefill leg), sending, and the
    /// whole response of a successful leg.
    pub fn leg(&self, role: Role, micros: u64) {
        self.legs[role.index()].record(micros);
        // A decode stage includes the whole response, so it is recorded with the request.
        if matches!(role, Role::Encode | Role::Prefill) {
            self.stages[role.index()].record(micros);
        }
    }

    /// Records the nanoseconds that ringside itself spent on one part of an exchange.
    pub fn overhead(&self, direction: Direction, nanos: u64) {
        self.overhead[direction.index()].record(nanos);
    }

    /// Returns how many failures were counted under `index`.
    pub fn faults(&self, index: usize) -> u64 {
        self.faults.get(index).map_or(0, Counter::get)
    }

    /// Counts a failure; `index` is the position of its label in `fault::LABELS`.
    pub fn fault(&self, index: usize) {
        debug_assert!(index < self.faults.len());
        if let Some(counter) = self.faults.get(index) {
            counter.add(1);
        }
    }

    /// Counts a client that disconnected or stalled in `phase`, before its response was complete.
    pub fn client_left(&self, phase: Phase) {
        self.left[phase.index()].add(1);
    }

    /// Counts an intercepted request by how it was served and why.
    pub fn pd(&self, outcome: Outcome, reason: Reason) {
        self.pd[outcome.index()][reason.index()].add(1);
    }

    /// Counts a request that is split among several engines.
    pub fn disagg(&self, disagg: Disagg) {
        self.disagg[disagg.index()].add(1);
    }

    /// Records the duration in microseconds of the decode stage of a split request, from its first
    /// connect to the end of the response. Those of the other stages are the durations of their
    /// legs.
    pub fn stage(&self, role: Role, micros: u64) {
        self.stages[role.index()].record(micros);
    }

    /// Counts a split request that failed in the stage of this role.
    pub fn stage_error(&self, role: Role) {
        self.stage_errors[role.index()].add(1);
    }

    /// Counts a request whose routing headers do not have one clear meaning.
    pub fn routing_doubt(&self, doubt: RoutingDoubt) {
        self.routing_doubts[doubt.index()].add(1);
    }

    /// Counts an event of NIXL push.
    pub fn push(&self, event: Push) {
        self.pushes[event.index()].add(1);
    }

    /// Counts the end of a speculative prefill.
    pub fn warm_up(&self, end: WarmUp) {
        self.warm_ups[end.index()].add(1);
    }

    /// Adds `delta` to the number of idle connections to engines of this role in the shard's pool.
    pub fn pool_idle(&self, role: Role, delta: i64) {
        self.pool_idle[role.index()].add(delta);
    }

    /// Adds `delta` to the number of connections to engines of this role that are in use or being
    /// established.
    pub fn pool_active(&self, role: Role, delta: i64) {
        self.pool_active[role.index()].add(delta);
    }

    /// Counts a target that a request named and the allowlist does not permit.
    pub fn denied(&self, named: Named) {
        self.denied[named.index()].add(1);
    }

    /// Adds `delta` to the number of open client connections.
    pub fn client_connections(&self, delta: i64) {
        self.clients.add(delta);
    }

    /// Counts a retry of a prefill leg. Trying the next prefill candidate after a refused
    /// connection is not a retry.
    pub fn retry(&self) {
        self.retries.add(1);
    }

    /// Counts a leg that was sent again because its reused connection had been closed.
    pub fn replay(&self) {
        self.replays.add(1);
    }

    /// Counts a task of the shard that ended in a panic, usually a client session, which is then
    /// closed.
    pub fn panic(&self) {
        self.panics.add(1);
    }

    /// Counts `count` members of a client's request body, such as `kv_transfer_params`, that were
    /// removed or overwritten before engines received the body.
    pub fn masked(&self, count: u64) {
        self.masked.add(count);
    }

    /// Counts a handoff that no decode leg carried, by the fate of its KV cache.
    pub fn stranded(&self, outcome: Stranded) {
        self.stranded[outcome.index()].add(1);
    }

    /// Counts bytes of request and response bodies that were spliced in the kernel, without a copy
    /// to user space.
    pub fn spliced_bytes(&self, count: u64) {
        self.spliced_bytes.add(count);
    }

    /// Counts bytes of request bodies that were sent to an engine directly from the receive buffer
    /// instead of being spliced. Bodies that are buffered as a whole, bytes kept for a repeat of
    /// the request, and chunks whose framing is regenerated are not counted.
    pub fn copied_bytes(&self, count: u64) {
        self.copied_bytes.add(count);
    }

    /// Counts a record that was queued for the access log.
    pub fn access_log_line(&self) {
        self.access_log_lines.add(1);
    }

    /// Returns the number of records that were queued for the access log.
    pub fn access_log_lines(&self) -> u64 {
        self.access_log_lines.get()
    }

    /// Counts an access-log record that was dropped because the shard's ring was full.
    pub fn access_log_dropped(&self) {
        self.access_log_dropped.add(1);
    }

    /// Counts the outcome of a TLS handshake, or a later protocol violation on the connection.
    pub fn tls(&self, peer: TlsPeer, outcome: tls::Outcome) {
        self.tls[peer.index()][outcome.index()].add(1);
    }

    /// Counts `count` spans that were dropped because the shard's ring was full.
    pub fn trace_dropped(&self, count: u64) {
        self.trace_dropped.add(count);
    }

    /// Counts a pause in accepting connections, caused by a lack of file descriptors or memory or
    /// by the limit on client connections.
    pub fn accept_paused(&self) {
        self.accept_paused.add(1);
    }

    /// Sets the number of events that the kernel has lost.
    pub fn set_events_lost(&self, count: u64) {
        self.events_lost
            .add(count.wrapping_sub(self.events_lost.get()));
    }

    /// Counts a client connection that this shard has accepted and another one serves.
    pub fn client_handed_over(&self) {
        self.clients_handed_over.add(1);
    }

    /// Counts connections that were reset because their peer has vanished.
    pub fn peers_vanished(&self, count: u64) {
        self.peers_vanished.add(count);
    }

    /// Counts idle client connections that were closed in favour of new ones.
    pub fn idle_closed(&self, count: u64) {
        self.idle_closed.add(count);
    }
}
