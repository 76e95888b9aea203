//! The facts about a request that metrics, the access log and its trace report. Nothing that serves
//! the request reads them.

use crate::fault::Fault;
use crate::metrics::Route;
use crate::net::Instant;
use crate::pd::{Outcome, Reason};

/// The facts about a request, collected while it is served.
pub(super) struct RequestStats {
    pub(super) route: Route,
    pub(super) started: Instant,
    /// How the request was served; `None` if it is not an intercepted one.
    pub(super) outcome: Option<(Outcome, Reason)>,
    pub(super) prefill_target: String,
    pub(super) attempts: u32,
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
    pub(super) prefill_us: u64,
    pub(super) ttft_us: u64,
    /// Nanoseconds spent in the proxy itself: from the end of a split request's body (or of its
    /// encode stage) until its legs are planned, and from the arrival of the response head until
    /// that head has been sent to the client.
    pub(super) proxy_ns: u64,
    /// The failure of the request; `None` if it has not failed.
    pub(super) fault: Option<Fault>,
}

impl RequestStats {
    pub(super) const fn new(route: Route, started: Instant) -> Self {
        Self {
            route,
            started,
            outcome: None,
            prefill_target: String::new(),
            attempts: 0,
            bytes_in: 0,
            bytes_out: 0,
            prefill_us: 0,
            ttft_us: 0,
            proxy_ns: 0,
            fault: None,
        }
    }

    /// Sets the outcome of an intercepted request to failed, with `reason`. If it was already
    /// failed, the first reason is kept. Other requests have no outcome.
    pub(super) fn set_failed(&mut self, reason: Reason) {
        if let Some((outcome, recorded)) = &mut self.outcome {
            if *outcome != Outcome::Failed {
                *recorded = reason;
            }
            *outcome = Outcome::Failed;
        }
    }
}

/// Returns the time from `then` to `now` in microseconds.
pub(super) fn micros_since(now: Instant, then: Instant) -> u64 {
    u64::try_from(now.since(then).as_micros()).unwrap_or(u64::MAX)
}
