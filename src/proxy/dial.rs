//! Beginning a connect, and what to do when it cannot even begin.

use std::time::Duration;

use super::client::Limit;
use super::leg::Waits;
use crate::fault::Fault;
use crate::limits::{CONNECT_PAUSE_MS_MAX, CONNECT_PAUSE_MS_MIN, CONNECT_TRIES_MAX};
use crate::net::{Address, Net, would_block};

/// Marks the end of a pause; never shown.
const PAUSE: Fault = Fault::Bug("a pause between connects ended");

/// Pause behind the failed try `nth`, from 0: twice as long each time, up to a bound.
fn pause_after(nth: u32) -> Duration {
    let doubled = CONNECT_PAUSE_MS_MIN << nth.min(CONNECT_PAUSE_MS_MAX.ilog2());
    Duration::from_millis(doubled.min(CONNECT_PAUSE_MS_MAX))
}

impl<N: Net, W: Waits<N>> Dials<N> for W {}

/// How a leg begins to connect.
pub(super) trait Dials<N: Net>: Waits<N> {
    /// Begins a connect. `None`: this address takes none.
    ///
    /// The kernel holds a TCP connect back while the engine's queue is full; of a Unix socket it
    /// says `EAGAIN`, and of the end of that nothing. So that one is tried again within the limit.
    ///
    /// # Errors
    /// `Exhausted`, the limit's fault, or `ClientGone`.
    async fn begin_connect(
        &self,
        address: &Address,
        limit: Limit,
    ) -> Result<Option<N::Conn>, Fault> {
        let shard = self.shard();
        for nth in 0..CONNECT_TRIES_MAX {
            let error = match shard.net.connect(address) {
                Ok(conn) => return Ok(Some(conn)),
                Err(error) => error,
            };
            if is_exhausted(&error) {
                return Err(Fault::Exhausted);
            }
            // The log tells of sockets only: their names are the operator's, where those of hosts
            // may be a client's.
            if let Address::Unix(socket) = address
                && (nth == 0 || !would_block(&error))
            {
                (shard.on_socket_failed)(socket, &error);
            }
            if !would_block(&error) {
                return Ok(None);
            }
            let pause = Limit::of(shard.net.now(), Some(pause_after(nth)), PAUSE);
            let paused = self
                .until(self.early_watch(), pause.or_sooner(limit), |_| {
                    std::task::Poll::<()>::Pending
                })
                .await;
            match paused {
                Ok(()) | Err(PAUSE) => {}
                Err(fault) => return Err(fault),
            }
        }
        Ok(None)
    }
}

/// Whether a connect failed because this machine has run out of something. The numbers are
/// Linux's `ENFILE`, `EMFILE`, `EADDRNOTAVAIL`, `ENOBUFS` and `ENOMEM`.
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
