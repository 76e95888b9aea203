//! Sockets behind a readiness-shaped seam.
//!
//! `net` knows sockets, deadlines and pools; it knows no HTTP. Everything above it is written
//! against the two traits here, so that the same session code runs on the real engine (`ring`) and
//! on the simulation (`sim`).
//!
//! The invariant of the seam: **no operation ever owns a buffer**. The engine is only ever asked
//! "tell me when this socket is ready"; bytes move in the same call that names the buffer
//! (`try_recv`, `try_send`). So nothing the kernel holds can outlive a dropped future.

use std::future::{Future, poll_fn};
use std::io;
use std::io::IoSlice;
use std::net::IpAddr;
use std::task::{Context, Poll};
use std::time::Duration;

mod clock;
mod notifier;
mod pipe;
mod socket;

#[cfg(feature = "monoio")]
pub mod monoio;
pub mod pool;
pub mod probe;
pub mod reactor;
pub mod sim;
pub mod tls;
pub mod wheel;

/// The executor the shards run on.
#[cfg(feature = "monoio")]
pub use monoio as runtime;
pub use notifier::Notifier;
pub use pipe::Pipe;
#[cfg(not(feature = "monoio"))]
pub use reactor as runtime;
pub use wheel::{Timer, Wheel};

pub use crate::fleet::Address;

/// A point in time of the engine's own clock, in nanoseconds since an arbitrary start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(pub u64);

impl Instant {
    /// The time between `earlier` and `self`; zero when `earlier` is later.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }

    /// The moment `wait` after this one.
    #[must_use]
    pub fn after(self, wait: Duration) -> Self {
        let wait_ns = u64::try_from(wait.as_nanos()).unwrap_or(u64::MAX);
        Self(self.0.saturating_add(wait_ns))
    }
}

/// One stream socket.
///
/// Readiness is remembered: `poll_readable` stays ready until a `try_recv` finds the socket empty
/// (a short read or `WouldBlock`). The same for writing. At most one task waits for each direction;
/// the last one that polled is woken.
pub trait Conn: 'static {
    /// What bytes can pass through on their way to another connection.
    type Pipe: Conduit;

    /// Ready when the connection can carry the first bytes of whoever uses it, or never will: at
    /// once unless there is a handshake before them.
    fn poll_open(&self, _: &mut Context<'_>) -> Poll<tls::Opened> {
        Poll::Ready(tls::Opened::Ready)
    }

    /// Whether bytes are encrypted on it. Such a connection has no way through a pipe.
    fn is_encrypted(&self) -> bool {
        false
    }

    /// Ready when a receive may give bytes, the end of the stream, or an error.
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()>;

    /// Ready when a send may take bytes, or a connect has ended one way or the other.
    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()>;

    /// Ready when the peer has closed its side or the connection has failed, also while received
    /// bytes are still unread.
    fn poll_hangup(&self, cx: &mut Context<'_>) -> Poll<()>;

    /// Receives into `buffer` without waiting. `Ok(0)` is the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; anything else ends the connection.
    fn try_recv(&self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Appends at most `bytes_max` received bytes to `buffer`, within its spare capacity.
    ///
    /// # Errors
    /// As [`Conn::try_recv`].
    fn try_recv_append(&self, buffer: &mut Vec<u8>, bytes_max: usize) -> io::Result<usize>;

    /// Makes the next wait to read let other connections have their turn, also when more is there
    /// already: how a busy relay yields.
    fn clear_readable(&self);

    /// Whether something can be received right now (bytes, end, error), without taking it. Looks
    /// at the socket, and forgets remembered readiness that no longer holds.
    fn peek_ready(&self) -> bool;

    /// Sends what fits from `bytes` without waiting.
    ///
    /// # Errors
    /// `WouldBlock` when nothing fits; anything else ends the connection.
    fn try_send(&self, bytes: &[u8]) -> io::Result<usize>;

    /// Sends what fits from `slices` without waiting, in order.
    ///
    /// # Errors
    /// As [`Conn::try_send`].
    fn try_send_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize>;

    /// Moves at most `bytes_max` received bytes into `pipe`, which is empty. `Ok(0)` is the end of
    /// the stream.
    ///
    /// # Errors
    /// `WouldBlock` when nothing is there; anything else ends the connection.
    fn try_fill(&self, pipe: &mut Self::Pipe, bytes_max: usize) -> io::Result<usize>;

    /// Sends what fits of the bytes in `pipe`, which is not empty.
    ///
    /// # Errors
    /// As [`Conn::try_send`].
    fn try_drain(&self, pipe: &mut Self::Pipe) -> io::Result<usize>;

    /// How a connect that became writable has ended.
    ///
    /// # Errors
    /// The error the connect failed with.
    fn connected(&self) -> io::Result<()>;

    /// Says to the peer that nothing more will be sent (FIN), and keeps receiving.
    fn finish(&self);

    /// Ends both directions now. Pending waits on this socket become ready.
    fn abort(&self);

    /// Makes the coming close a reset (RST), so that the peer cannot mistake it for a clean end.
    fn reset_on_close(&self);

    /// Takes [`Conn::reset_on_close`] back.
    fn close_cleanly(&self);

    /// The peer's address, where it has one.
    fn peer_ip(&self) -> Option<IpAddr>;
}

/// A place for bytes between two connections. Dropping it gives it back.
pub trait Conduit: 'static {
    /// Bytes in it.
    fn held(&self) -> usize;
}

impl Conduit for Pipe {
    fn held(&self) -> usize {
        Self::held(self)
    }
}

/// What an engine offers besides connections.
pub trait Net: Clone + 'static {
    /// The connections it makes.
    type Conn: Conn;

    /// Bytes of a body still to come from which it goes through a pipe.
    const SPLICE_BYTES_MIN: u64 = crate::limits::SPLICE_BYTES_MIN;

    /// Starts a connect; the connection becomes writable when it has ended.
    ///
    /// # Errors
    /// When the socket could not be made or the connect fails at once. `WouldBlock`: the queue of
    /// a Unix socket is full, which no readiness tells the end of; try again later.
    fn connect(&self, address: &Address) -> io::Result<Self::Conn>;

    /// An empty pipe; `None` when there are too many of them: bytes are copied then.
    fn pipe(&self) -> Option<<Self::Conn as Conn>::Pipe>;

    /// Lets everybody else who can run go first, and the kernel be looked at.
    fn yield_now(&self) -> impl Future<Output = ()>;

    /// Runs `task` beside the others. A panic in it ends that task only.
    fn spawn(&self, task: impl Future<Output = ()> + 'static);

    /// Runs a task that a shard cannot do without: a panic in it ends the shard.
    fn spawn_vital(&self, task: impl Future<Output = ()> + 'static) {
        self.spawn(task);
    }

    /// The moment of this turn, for deadlines and ages: it may be as old as the tasks that ran
    /// since the shard last looked for events took, and never goes back.
    fn now(&self) -> Instant;

    /// The present moment, read from the clock (30 ns): for what is measured.
    fn clock(&self) -> Instant;

    /// A new deadline of this engine's wheel, switched off.
    fn timer(&self) -> Timer;

    /// A random number; unpredictable enough for ids and load spreading, not for secrets.
    fn random(&self) -> u64;
}

/// Ready the second time it is polled, having woken its task the first time: on an executor that
/// looks at the kernel between two turns, that lets everybody else go first.
fn next_turn() -> impl Future<Output = ()> {
    let mut is_over = false;
    poll_fn(move |cx| {
        if std::mem::replace(&mut is_over, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
}

/// Whether a failed non-blocking call is worth waiting for readiness.
#[must_use]
pub fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
