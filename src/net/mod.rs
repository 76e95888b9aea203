//! Non-blocking sockets, deadlines and connection pools.
//!
//! This module contains no HTTP. The modules that use it are generic over the traits [`Net`] and
//! [`Conn`], so that the same session code runs on a real executor (`reactor` or `monoio`) and in
//! the in-memory simulation (`sim`).
//!
//! Invariant: **no operation owns a buffer**. An executor only reports that a socket is ready.
//! Bytes move in synchronous calls that borrow the buffer (`try_recv`, `try_send`), so nothing the
//! kernel holds can outlive a dropped future.

use std::future::{Future, poll_fn};
use std::io;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::task::{Context, Poll};

mod clock;
mod notifier;
mod pipe;
mod random;
mod socket;
mod turn;

mod instant;
#[cfg(feature = "monoio")]
pub mod monoio;
pub mod probe;
pub mod reactor;
pub mod sim;
pub mod tls;
pub mod wheel;

pub use instant::Instant;
/// The executor that runs the shards: `monoio` with the feature `monoio`, otherwise `reactor`.
#[cfg(feature = "monoio")]
pub use monoio as runtime;
pub use notifier::Notifier;
pub use pipe::Pipe;
#[cfg(not(feature = "monoio"))]
pub use reactor as runtime;
pub use socket::Accepted;
pub(crate) use turn::{end as end_turn, is_over as is_turn_over, set_bulk};
pub use wheel::{Timer, Wheel};

pub use crate::fleet::Address;

/// The state of a connection after its TLS handshake, if it has one; returned by
/// [`Conn::poll_open`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// The connection carries application bytes. With TLS, the handshake has succeeded.
    Ready,
    /// The peer sent plain text on a TLS port. It can be sent a response in plain text.
    PlainText,
    /// The connection or its TLS handshake has failed.
    Failed,
}

/// A stream socket.
///
/// Readiness is remembered: `poll_readable` stays ready until a `try_recv` finds the socket empty
/// (a short read or `WouldBlock`). Writing works the same way. At most one task waits for each
/// direction; the task that polled last is woken.
///
/// Once a poll of a task has moved so many bytes that other tasks must run (see [`Net::give_way`]),
/// `poll_readable` and `poll_writable` return `Pending` and wake the task, even if the connection
/// is ready.
pub trait Conn: 'static {
    /// The kind of pipe that carries bytes from this connection to another one.
    type Pipe: Conduit;

    /// Waits until the connection can carry application bytes or has failed. Immediately ready
    /// unless the protocol starts with a handshake.
    fn poll_open(&self, _: &mut Context<'_>) -> Poll<Opened> {
        Poll::Ready(Opened::Ready)
    }

    /// Returns whether the connection is encrypted. An encrypted connection cannot use a pipe.
    fn is_encrypted(&self) -> bool {
        false
    }

    /// Returns whether the peer uses TLS. Unlike [`Conn::is_encrypted`], `false` for a client that
    /// sent plain text to a TLS port.
    fn uses_tls(&self) -> bool {
        false
    }

    /// Waits until a receive may return bytes, the end of the stream, or an error.
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()>;

    /// Waits until a send may accept bytes, or until a connect has succeeded or failed.
    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()>;

    /// Waits until the peer has closed its sending side or the connection has failed. Ready even
    /// while received bytes are still unread.
    fn poll_hangup(&self, cx: &mut Context<'_>) -> Poll<()>;

    /// Receives into `buffer` without blocking. `Ok(0)` is the end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` if nothing has been received; any other error ends the connection.
    fn try_recv(&self, buffer: &mut [u8]) -> io::Result<usize>;

    /// Receives at most `bytes_max` bytes into the spare capacity of `buffer` and appends them.
    /// Returns their number; `Ok(0)` is the end of the stream. Neither `bytes_max` nor the spare
    /// capacity may be zero.
    ///
    /// # Errors
    /// As [`Conn::try_recv`].
    fn try_recv_append(&self, buffer: &mut Vec<u8>, bytes_max: usize) -> io::Result<usize>;

    /// Returns whether a receive would succeed or fail now (bytes, end of the stream, error),
    /// without consuming anything. Checks the socket itself, and clears remembered readiness that
    /// no longer applies.
    fn peek_ready(&self) -> bool;

    /// Sends as much of `bytes` as fits into the send buffer, without blocking, and returns the
    /// number of bytes.
    ///
    /// # Errors
    /// `WouldBlock` if the send buffer is full; any other error ends the connection.
    fn try_send(&self, bytes: &[u8]) -> io::Result<usize>;

    /// Sends as much of `slices` as fits into the send buffer, in order, without blocking, and
    /// returns the number of bytes.
    ///
    /// # Errors
    /// As [`Conn::try_send`].
    fn try_send_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize>;

    /// Moves at most `bytes_max` received bytes into `pipe`, which must be empty. `Ok(0)` is the
    /// end of the stream.
    ///
    /// # Errors
    /// `WouldBlock` if nothing has been received; any other error ends the connection.
    fn try_fill(&self, pipe: &mut Self::Pipe, bytes_max: usize) -> io::Result<usize>;

    /// Sends as much of the contents of `pipe` as fits into the send buffer, and returns the number
    /// of bytes. `pipe` must not be empty.
    ///
    /// # Errors
    /// As [`Conn::try_send`].
    fn try_drain(&self, pipe: &mut Self::Pipe) -> io::Result<usize>;

    /// Returns `Ok` if the connect has succeeded and, with TLS, the handshake after it. Call it
    /// once `poll_writable` is ready.
    ///
    /// # Errors
    /// The error with which the connect or the handshake failed.
    fn connected(&self) -> io::Result<()>;

    /// Closes the sending side with a FIN, which on a TLS connection follows a `close_notify`.
    /// Receiving continues to work.
    fn finish(&self);

    /// Shuts down both directions immediately. Pending waits on this socket become ready.
    fn abort(&self);

    /// Makes the close of this socket a reset (RST), so that the peer cannot mistake it for a clean
    /// end.
    fn reset_on_close(&self);

    /// Reverts [`Conn::reset_on_close`]: closing the socket sends a FIN again.
    fn close_cleanly(&self);

    /// Returns the IP address and port of the peer, or `None` if the peer is connected over a Unix
    /// socket.
    fn peer(&self) -> Option<SocketAddr>;
}

/// A buffer for bytes in transit between two connections, such as a kernel pipe.
pub trait Conduit: 'static {
    /// Returns the number of bytes in the buffer.
    fn held(&self) -> usize;
}

impl Conduit for Pipe {
    fn held(&self) -> usize {
        Self::held(self)
    }
}

/// The services of an executor: connects, pipes, tasks, time and random numbers.
pub trait Net: Clone + 'static {
    /// The type of the executor's connections.
    type Conn: Conn;

    /// Minimum number of body bytes that must remain to be relayed for the body to be spliced
    /// through a pipe instead of copied.
    const SPLICE_BYTES_MIN: u64 = crate::limits::SPLICE_BYTES_MIN;

    /// Starts a connect to `address`. The returned connection becomes writable when the connect has
    /// succeeded or failed; [`Conn::connected`] returns which.
    ///
    /// # Errors
    /// Fails if the socket cannot be created or the connect fails immediately. `WouldBlock` means
    /// that the accept queue of a Unix socket is full. No readiness event reports when it has room
    /// again, so the caller must retry later.
    fn connect(&self, address: &Address) -> io::Result<Self::Conn>;

    /// Returns an empty pipe, or `None` if the limit on pipes is reached and the caller should copy
    /// instead.
    fn pipe(&self) -> Option<<Self::Conn as Conn>::Pipe>;

    /// Lets all other runnable tasks run first, and the executor poll the kernel, if the current
    /// poll of this task has used up its turn (`TURN_MICROS_MAX`). A loop that can continue without
    /// waiting for readiness calls it in each iteration, which counts as a socket call.
    fn give_way(&self) -> impl Future<Output = ()>;

    /// Runs `task` concurrently with the other tasks. A panic in it ends only that task.
    fn spawn(&self, task: impl Future<Output = ()> + 'static);

    /// Runs a task that the shard cannot work without. On a real executor, a panic in it ends the
    /// shard's thread.
    fn spawn_vital(&self, task: impl Future<Output = ()> + 'static) {
        self.spawn(task);
    }

    /// Returns the time of the current iteration of the event loop, for deadlines and ages. It can
    /// lag by as long as the tasks of this iteration have been running, and never goes backwards.
    fn now(&self) -> Instant;

    /// Returns the current time, for measurements. Reading the clock costs 30 ns.
    fn clock(&self) -> Instant;

    /// Returns a new, disarmed timer on this executor's timer wheel.
    fn timer(&self) -> Timer;

    /// Returns a random number of the operating system, which cannot be computed from others.
    fn random(&self) -> u64;
}

/// Returns a future that is ready in the current turn of the task or, if that is used up, in the
/// next one.
fn give_way() -> impl Future<Output = ()> {
    turn::charge(0);
    poll_fn(|cx| turn::poll_left(cx))
}

/// Returns whether a failed non-blocking call should be retried once the socket is ready.
#[must_use]
pub fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}
