//! Writes the access log record of a request.

use std::time::{SystemTime, UNIX_EPOCH};

use super::exchange::Exchange;
use crate::fault::{Blame, Cause, Fault};
use crate::fleet::Target;
use crate::metrics::{EndedAt, EndedBy, Inline, Record};
use crate::net::{Conn, Net};
use crate::pd::{Reason, Role};

/// Pushes the request's record into the shard's access log ring. If the ring is full, the
/// record is dropped and counted.
pub(super) fn log_access<N: Net>(exchange: &Exchange<'_, N>, total_us: u64) {
    let mut access = exchange.shard.access.borrow_mut();
    let Some(ring) = &mut *access else { return };
    let stats = &exchange.stats;
    let unix = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let ended = u64::try_from(unix.as_micros()).unwrap_or(0);
    let (ended_by, ended_at) = end_of(exchange);
    let (outcome, reason) = stats.outcome.unzip();
    let record = Record {
        unix_micros: ended.saturating_sub(total_us),
        id: Inline::new(exchange.request.id.as_bytes()),
        route: stats.route,
        method: Inline::new(
            exchange
                .request
                .head
                .method_span
                .of(&exchange.request.bytes),
        ),
        status: exchange.reply.status().unwrap_or(0),
        ended_by,
        ended_at,
        client: exchange.client.conn.peer_ip(),
        prefill: Inline::new(stats.prefill_target.as_bytes()),
        outcome,
        reason: reason.unwrap_or(Reason::None),
        attempts: stats.attempts,
        bytes_in: stats.bytes_in,
        bytes_out: stats.bytes_out,
        prefill_micros: (stats.prefill_us > 0).then_some(stats.prefill_us),
        ttft_micros: (stats.ttft_us > 0).then_some(stats.ttft_us),
        total_micros: total_us,
        proxy_micros: stats.proxy_ns / 1000,
    };
    if !ring.push(record) {
        exchange.shard.metrics.access_log_dropped();
    }
}

/// Stores the prefill target for the access log record, if the access log is on.
pub(super) fn record_prefill_target<N: Net>(exchange: &mut Exchange<'_, N>, target: &Target) {
    if exchange.shard.access.borrow().is_some() {
        exchange.stats.prefill_target = target.to_string();
    }
}

fn end_of<N: Net>(exchange: &Exchange<'_, N>) -> (EndedBy, EndedAt) {
    let Some(fault) = exchange.stats.fault else {
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
    (by, EndedAt::of(exchange.client.phase.get()))
}
