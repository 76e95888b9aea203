//! Connections to engines, pooled or new.

use std::cell::Cell;
use std::sync::Arc;

use super::attempts::{Ended, Reuse};
use super::engine::Engine;
use super::error::CallError;
use super::pool::SlotId;
use super::scope::{Scope, Stage};
use super::upstreams::Upstreams;
use super::wait::{Deadline, Timeout};
use crate::fault::Cause;
use crate::limits::ADDRESSES_MAX;
use crate::metrics::{Phase, ShardMetrics};
use crate::net::{Conn, Instant, Net};
use crate::pd::Role;

/// An engine connection in use. Dropping it closes it, which makes the engine abort the request.
pub(crate) struct Connection<N: Net> {
    conn: N::Conn,
    slot: SlotId,
    /// Whether the connection was taken from the pool, so that the engine may have closed it in the
    /// meantime.
    reused: bool,
    /// A send has failed. The kernel reports a reset only once, so no later receive will report it:
    /// an end of stream on this connection may be a reset.
    pub(crate) broke: Cell<bool>,
    /// When the whole of the latest request had been sent on this connection.
    sent_at: Cell<Option<Instant>>,
    _active: Active,
}

impl<N: Net> Connection<N> {
    pub(crate) const fn conn(&self) -> &N::Conn {
        &self.conn
    }

    /// Returns the endpoint of the engine.
    pub(crate) const fn slot(&self) -> SlotId {
        self.slot
    }

    /// Returns whether the connection was taken from the pool.
    pub(super) const fn is_reused(&self) -> bool {
        self.reused
    }

    /// Records that the whole request has been sent.
    pub(crate) fn record_sent(&self, now: Instant) {
        self.sent_at.set(Some(now));
    }

    /// Returns when the whole of the latest request had been sent; `None` if it has not.
    pub(super) const fn sent_at(&self) -> Option<Instant> {
        self.sent_at.get()
    }

    /// Returns whether the whole of the latest request has been sent.
    pub(crate) const fn is_sent(&self) -> bool {
        self.sent_at.get().is_some()
    }

    /// Returns the end of an attempt on this connection, as of `now`.
    pub(crate) fn ended(&self, result: Result<u16, CallError>, now: Instant) -> Ended {
        Ended {
            reused: self.reused,
            since_sent: self.sent_at.get().map(|at| now.since(at)),
            ..Ended::with(result)
        }
    }

    /// Returns the connection to the pool.
    pub(crate) fn release(self, upstreams: &Upstreams<N>, _: CleanEnd) {
        upstreams.pools.checkin(self.slot, self.conn);
    }
}

/// Proof that an exchange on a connection has ended cleanly, so that the connection can serve
/// another request. Without one, a connection cannot be returned to the pool.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct CleanEnd(());

impl CleanEnd {
    /// Returns the proof for an exchange whose response has been read to its end. The engine must
    /// keep the connection open (`keeps_alive`), it must have been sent the whole request
    /// (`is_sent`), and neither bytes nor the end of the connection may have followed the response
    /// (`has_surplus`).
    pub(crate) fn of(keeps_alive: bool, is_sent: bool, has_surplus: bool) -> Option<Self> {
        (keeps_alive && is_sent && !has_surplus).then_some(Self(()))
    }
}

/// Counts an engine connection as in use in the metrics until dropped.
struct Active {
    metrics: Arc<ShardMetrics>,
    role: Role,
}

impl Active {
    fn new(metrics: &Arc<ShardMetrics>, role: Role) -> Self {
        metrics.pool_active(role, 1);
        Self {
            metrics: Arc::clone(metrics),
            role,
        }
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.metrics.pool_active(self.role, -1);
    }
}

impl<N: Net> Upstreams<N> {
    /// Returns a connection to an engine: a pooled one if `reuse` allows it and one is idle,
    /// otherwise a new one. Fails if no address of the engine accepts the connection in time.
    pub(crate) async fn connect<S: Scope<N>>(
        &self,
        scope: &S,
        engine: Engine<'_>,
        reuse: Reuse,
        deadline: Deadline,
    ) -> Result<Connection<N>, CallError> {
        let active = Active::new(&self.metrics, engine.role);
        let connection = |conn, reused| Connection {
            conn,
            slot: engine.slot,
            reused,
            broke: Cell::new(false),
            sent_at: Cell::new(None),
            _active: active,
        };
        if reuse == Reuse::Allowed
            && let Some(conn) = self.pools.checkout(engine.slot)
        {
            return Ok(connection(conn, true));
        }
        let before = scope.phase().replace(Phase::Connect);
        // On failure the phase remains `Connect`, so that a disconnect during the connect is
        // counted there.
        let connected = self.connect_new(scope, engine, deadline).await;
        if reuse == Reuse::Never || connected.as_ref().is_err_and(|error| error.is_refused()) {
            (self.on_engine_lost)(engine.role, engine.target);
        }
        if let Err(error) = &connected {
            self.report_unconnected(engine.slot, *error);
        }
        let conn = connected?;
        scope.phase().set(before);
        Ok(connection(conn, false))
    }

    async fn connect_new<S: Scope<N>>(
        &self,
        scope: &S,
        engine: Engine<'_>,
        deadline: Deadline,
    ) -> Result<N::Conn, CallError> {
        const TIMED_OUT: CallError = CallError::TimedOut(Timeout::Connect);
        let Engine { target, role, .. } = engine;
        let wait = self.config.timeouts.connect;
        let sooner = || Deadline::of(self.net.now(), wait, Timeout::Connect).or_sooner(deadline);
        let addresses = self.addresses(scope, engine, sooner()).await?;
        let mut timed_out = false;
        for address in addresses.iter().take(ADDRESSES_MAX) {
            let conn = match self.begin_connect(scope, address, sooner()).await {
                Ok(Some(conn)) => (self.secure)(conn, role, target),
                Ok(None) => continue,
                Err(TIMED_OUT) => {
                    timed_out = true;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let waited = scope
                .until(Stage::BeforeRequest, sooner(), |cx| conn.poll_writable(cx))
                .await;
            match waited.or_call_error() {
                Ok(()) if conn.connected().is_ok() => return Ok(conn),
                Ok(()) => {}
                // Another address of the same engine may accept the connection.
                Err(TIMED_OUT) => timed_out = true,
                Err(error) => return Err(error),
            }
        }
        Err(if timed_out {
            TIMED_OUT
        } else {
            CallError::Failed(Cause::Refused)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_complete_exchange_without_surplus_ends_cleanly() {
        for bits in 0..8_u8 {
            let [keeps_alive, is_sent, has_surplus] = [1, 2, 4].map(|bit| bits & bit != 0);
            let is_clean = CleanEnd::of(keeps_alive, is_sent, has_surplus).is_some();
            assert_eq!(is_clean, bits == 3, "{bits:03b}");
        }
    }
}
