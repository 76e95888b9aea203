//! The facts about a request that metrics, its trace and the access log report, and its record in
//! the access log. Nothing that serves the request reads the facts.

use std::cell::Cell;
use std::time::{SystemTime, UNIX_EPOCH};

use super::client::Client;
use super::request::Request;
use super::shard::Shard;
use crate::fault::{Blame, Cause, Fault};
use crate::fleet::{Endpoint, Target};
use crate::h1::{Name, RequestHead};
use crate::metrics::{Disagg, EndedAt, EndedBy, Inline, Phase, Record, Route};
use crate::net::{Conn, Instant, Net};
use crate::pd::{Outcome, Reason, Role};
use crate::trace::{RequestTrace, TraceContext};
use crate::upstream::Response;

/// The facts about a request, collected while it is served.
pub(super) struct RequestStats {
    pub(super) route: Route,
    pub(super) started: Instant,
    /// How the request was served; `None` if it is not an intercepted one.
    pub(super) outcome: Option<(Outcome, Reason)>,
    /// Facts that only the access log reports; `None` if it is off.
    pub(super) logged: Option<Box<Logged>>,
    /// The last prefill target; only recorded if a speculative prefill may follow.
    pub(super) prefiller: Option<Box<Target>>,
    pub(super) attempts: u32,
    pub(super) bytes_in: u64,
    pub(super) bytes_out: u64,
    pub(super) prefill_us: u64,
    pub(super) ttft_us: u64,
    /// Nanoseconds spent in the proxy itself: from the end of a split request's body (or of its
    /// encode stage) until its legs are planned, and from the arrival of the response head until
    /// that head has been sent to the client.
    pub(super) proxy_ns: u64,
    /// Microseconds from the first byte of the request to its end; 0 until then.
    pub(super) total_us: u64,
    /// The failure of the request; `None` if it has not failed.
    pub(super) fault: Option<Fault>,
    /// The engines among which the request is split; `None` if the decoder alone serves it.
    pub(super) disagg: Option<Disagg>,
    /// When the decode stage of a split request began; `None` before.
    pub(super) decode_started: Cell<Option<Instant>>,
}

/// Facts that only the access log reports.
#[derive(Debug, Default)]
pub(super) struct Logged {
    /// The prefill target that was tried last.
    pub(super) prefill: Inline<64>,
    /// The decoder, and its rank.
    pub(super) upstream: Inline<64>,
    pub(super) rank: Option<u16>,
    /// The model that the body names.
    pub(super) model: Inline<64>,
    /// Whether the response is an event stream.
    pub(super) is_stream: bool,
    pub(super) trace_id: Option<u128>,
}

impl RequestStats {
    pub(super) const fn new(route: Route, started: Instant) -> Self {
        Self {
            route,
            started,
            outcome: None,
            logged: None,
            prefiller: None,
            attempts: 0,
            bytes_in: 0,
            bytes_out: 0,
            prefill_us: 0,
            ttft_us: 0,
            proxy_ns: 0,
            total_us: 0,
            fault: None,
            disagg: None,
            decode_started: Cell::new(None),
        }
    }

    /// Collects the facts that only the access log reports.
    pub(super) fn collect_logged(
        &mut self,
        trace: &RequestTrace,
        head: &RequestHead,
        bytes: &[u8],
    ) {
        let sent = || {
            let values = head.fields_named(Name::Traceparent);
            let context = TraceContext::read(values.map(|field| field.value.of(bytes)))?;
            Some(context.trace_id)
        };
        self.logged = Some(Box::new(Logged {
            trace_id: trace.trace_id().or_else(sent),
            ..Logged::default()
        }));
    }

    /// Records the decoder for the access log, if that is on.
    pub(super) fn record_decoder<N: Net>(&mut self, shard: &Shard<N>, decoder: &Endpoint) {
        if let Some(logged) = &mut self.logged {
            logged.upstream = Inline::new(decoder.target.to_string().as_bytes());
            logged.rank = shard.with_fleet(|fleet| {
                let rank = fleet.endpoints().position(|one| one.id == decoder.id)?;
                u16::try_from(rank).ok()
            });
        }
    }

    /// Records for the access log, if that is on, whether the response is an event stream.
    pub(super) fn record_form(&mut self, response: &Response) {
        if let Some(logged) = &mut self.logged {
            logged.is_stream = response.is_event_stream();
        }
    }

    /// Records the prefill target for the access log, if that is on, and for a speculative prefill.
    pub(super) fn record_prefill_target<N: Net>(&mut self, shard: &Shard<N>, target: &Target) {
        if shard.config.pd.speculative_prefill {
            self.prefiller = Some(Box::new(target.clone()));
        }
        if let Some(logged) = &mut self.logged {
            logged.prefill = Inline::new(target.to_string().as_bytes());
        }
    }

    /// Returns whether the request was split, and nothing has failed so far.
    pub(super) const fn is_remote(&self) -> bool {
        matches!(self.outcome, Some((Outcome::Remote, _)))
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

/// Records the stages of a split request in the metrics. `now` is its end, `status` that of its
/// response.
pub(super) fn record_stages<N: Net>(
    shard: &Shard<N>,
    stats: &RequestStats,
    status: Option<u16>,
    now: Instant,
) {
    let Some(disagg) = stats.disagg else { return };
    shard.metrics.disagg(disagg);
    let failed_role = match stats.fault {
        Some(Fault::Leg { role, .. }) => Some(role),
        None if status.is_some_and(|status| status >= 400) => Some(Role::Decode),
        Some(_) | None => None,
    };
    match failed_role {
        // The bootstrap server is a part of the prefiller.
        Some(Role::Bootstrap) => shard.metrics.stage_error(Role::Prefill),
        Some(role) => shard.metrics.stage_error(role),
        None => {}
    }
    if let Some(started) = stats.decode_started.get() {
        shard
            .metrics
            .stage(Role::Decode, micros_since(now, started));
    }
}

/// Returns the time from `then` to `now` in microseconds.
pub(super) fn micros_since(now: Instant, then: Instant) -> u64 {
    u64::try_from(now.since(then).as_micros()).unwrap_or(u64::MAX)
}

/// Pushes the request's record into the shard's access log ring. If the ring is full, the
/// record is dropped and counted.
pub(super) fn write<N: Net>(
    shard: &Shard<N>,
    client: &Client<N>,
    request: &Request,
    status: u16,
    stats: &RequestStats,
) {
    let mut access = shard.access.borrow_mut();
    let Some(ring) = &mut *access else { return };
    let unix = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let ended = u64::try_from(unix.as_micros()).unwrap_or(0);
    let (ended_by, ended_at) = end_of(stats, client.phase.get());
    let (outcome, reason) = stats.outcome.unzip();
    let unlogged = Logged::default();
    let logged = stats.logged.as_deref().unwrap_or(&unlogged);
    let is_agent = |name: &[u8]| name.eq_ignore_ascii_case(b"user-agent");
    let mut fields = request.head.fields.iter();
    let agent = fields.find(|field| is_agent(field.name.of(&request.bytes)));
    let agent = agent.map(|field| field.value.of(&request.bytes));
    let record = Record {
        unix_micros: ended.saturating_sub(stats.total_us),
        id: Inline::new(request.id.as_bytes()),
        route: stats.route,
        method: Inline::new(request.head.method_span.of(&request.bytes)),
        status,
        ended_by,
        ended_at,
        client: client.conn.peer(),
        upstream: logged.upstream,
        rank: logged.rank,
        prefill: logged.prefill,
        model: logged.model,
        is_stream: logged.is_stream,
        error: stats.fault.map(Fault::label),
        trace_id: logged.trace_id,
        agent: Inline::new(agent.unwrap_or_default()),
        outcome,
        reason: reason.unwrap_or(Reason::None),
        attempts: stats.attempts,
        bytes_in: stats.bytes_in,
        bytes_out: stats.bytes_out,
        prefill_micros: (stats.prefill_us > 0).then_some(stats.prefill_us),
        ttft_micros: (stats.ttft_us > 0).then_some(stats.ttft_us),
        total_micros: stats.total_us,
        proxy_micros: stats.proxy_ns / 1000,
    };
    if ring.push(record) {
        shard.metrics.access_log_line();
    } else {
        shard.metrics.access_log_dropped();
    }
}

fn end_of(stats: &RequestStats, phase: Phase) -> (EndedBy, EndedAt) {
    let Some(fault) = stats.fault else {
        return (EndedBy::None, EndedAt::Complete);
    };
    let by = match (fault.blame(), fault) {
        // A prefiller that is late for its decoder has not failed itself.
        (
            _,
            Fault::Leg {
                cause: Cause::PairTimeout,
                ..
            },
        ) => EndedBy::Upstream,
        (
            _,
            Fault::Leg {
                role: Role::Prefill,
                ..
            },
        ) => EndedBy::Prefill,
        (Blame::Client, _) => EndedBy::Client,
        (Blame::Upstream, _) => EndedBy::Upstream,
        (Blame::Ours, _) => EndedBy::Ringside,
    };
    (by, EndedAt::of(phase))
}
