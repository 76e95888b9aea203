//! Starts connects to engines, and retries those that fail because the accept queue of a Unix
//! socket is full.

use std::time::Duration;

use super::error::CallError;
use super::scope::{Scope, Stage};
use super::upstreams::Upstreams;
use super::wait::{Deadline, Timeout, Waited};
use crate::fault::Fault;
use crate::limits::{CONNECT_PAUSE_MS_MAX, CONNECT_PAUSE_MS_MIN, CONNECT_TRIES_MAX};
use crate::net::{Address, Net, would_block};

/// The pause before the next connect attempt after failed attempt `nth`, counted from 0. Doubles
/// with each attempt, up to `CONNECT_PAUSE_MS_MAX`.
fn pause_after(nth: u32) -> Duration {
    let doubled = CONNECT_PAUSE_MS_MIN << nth.min(CONNECT_PAUSE_MS_MAX.ilog2());
    Duration::from_millis(doubled.min(CONNECT_PAUSE_MS_MAX))
}

impl<N: Net> Upstreams<N> {
    /// Starts a connect to `address` and returns the connection, which may not be established yet.
    /// Returns `None` if the address does not accept connections, or if its accept queue is still
    /// full after `CONNECT_TRIES_MAX` attempts.
    ///
    /// If a TCP listener's accept queue is full, the kernel delays the connect. For a Unix socket
    /// it returns `EAGAIN` and does not report when the queue has room again, so that connect is
    /// retried, with pauses, until the deadline.
    ///
    /// # Errors
    /// This machine has run out of a resource, the deadline passed, or the leg is no longer needed.
    pub(super) async fn begin_connect<S: Scope<N>>(
        &self,
        scope: &S,
        address: &Address,
        deadline: Deadline,
    ) -> Result<Option<N::Conn>, CallError> {
        for nth in 0..CONNECT_TRIES_MAX {
            let error = match self.net.connect(address) {
                Ok(conn) => return Ok(Some(conn)),
                Err(error) => error,
            };
            if is_exhausted(&error) {
                return Err(CallError::Other(Fault::Exhausted));
            }
            // Only failures of Unix sockets are logged. Their paths are set by the operator,
            // whereas host names may come from a client.
            if let Address::Unix(socket) = address
                && (nth == 0 || !would_block(&error))
            {
                (self.on_socket_failed)(socket, &error);
            }
            if !would_block(&error) {
                return Ok(None);
            }
            let pause = Deadline::of(self.net.now(), Some(pause_after(nth)), Timeout::Pause);
            let paused = scope
                .until(Stage::BeforeRequest, pause.or_sooner(deadline), |_| {
                    std::task::Poll::<()>::Pending
                })
                .await;
            match paused {
                Waited::Ready(()) | Waited::TimedOut(Timeout::Pause) => {}
                other => other.or_call_error()?,
            }
        }
        Ok(None)
    }
}

/// Whether a connect failed because this machine has run out of a resource. The numbers are Linux's
/// `ENFILE`, `EMFILE`, `EADDRNOTAVAIL`, `ENOBUFS` and `ENOMEM`.
fn is_exhausted(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(23 | 24 | 99 | 105 | 12))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_their_bound() {
        let ms: Vec<_> = (0..8).map(|nth| pause_after(nth).as_millis()).collect();
        assert_eq!(ms, [1, 2, 4, 8, 16, 32, 32, 32]);
        assert_eq!(pause_after(u32::MAX).as_millis(), 32);
    }
}
