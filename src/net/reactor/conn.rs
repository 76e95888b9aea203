//! Connections of the reactor.

use std::cell::Cell;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::task::{Context, Poll};

use super::Handle;
use super::slot::Readiness;
use crate::net::socket::{self, Left};
use crate::net::{Conn, Pipe, turn};

/// A stream connection (TCP or Unix) whose readiness comes from the shard's reactor.
pub struct Socket {
    handle: Handle,
    /// The peer's IP address and port. A `SocketAddr` takes 12 bytes more, in each connection.
    peer: Option<(IpAddr, u16)>,
    /// Whether dropping the connection must skip the shutdown of the socket: `abort` has shut it
    /// down already, or the close is a reset.
    is_abrupt: Cell<bool>,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

impl Socket {
    pub(super) fn new(handle: Handle, peer: Option<SocketAddr>) -> Self {
        Self {
            handle,
            peer: peer.map(|peer| (peer.ip(), peer.port())),
            is_abrupt: Cell::new(false),
        }
    }

    fn received(&self, (left, received): (Left, io::Result<usize>)) -> io::Result<usize> {
        turn::charge(*received.as_ref().unwrap_or(&0));
        if left == Left::Exhausted {
            self.handle.slot().clear(Readiness::READ);
        }
        received
    }

    fn sent(&self, (left, sent): (Left, io::Result<usize>)) -> io::Result<usize> {
        turn::charge(*sent.as_ref().unwrap_or(&0));
        if left == Left::Exhausted {
            self.handle.slot().clear(Readiness::WRITE);
        }
        sent
    }
}

impl Conn for Socket {
    type Pipe = Pipe;

    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.handle.slot().poll_read(cx)
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let slot = self.handle.slot();
        let polled = slot.poll_write(cx);
        if polled.is_pending() && !slot.is(Readiness::WRITE) {
            self.handle.request_write();
        }
        polled
    }

    fn poll_hangup(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.handle.slot().poll_ended(cx)
    }

    fn try_recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.received(socket::recv(self.handle.fd(), buffer))
    }

    fn try_recv_append(&self, buffer: &mut Vec<u8>, bytes_max: usize) -> io::Result<usize> {
        self.received(socket::recv_append(self.handle.fd(), buffer, bytes_max))
    }

    fn peek_ready(&self) -> bool {
        let has_input = socket::has_input(self.handle.fd());
        if !has_input {
            self.handle.slot().clear(Readiness::READ);
        }
        has_input
    }

    fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.sent(socket::send(self.handle.fd(), bytes))
    }

    fn try_send_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.sent(socket::send_vectored(self.handle.fd(), slices))
    }

    fn try_fill(&self, pipe: &mut Pipe, bytes_max: usize) -> io::Result<usize> {
        self.received(pipe.fill(self.handle.fd(), bytes_max))
    }

    fn try_drain(&self, pipe: &mut Pipe) -> io::Result<usize> {
        self.sent(pipe.drain(self.handle.fd()))
    }

    fn connected(&self) -> io::Result<()> {
        socket::connected(self.handle.fd())
    }

    fn finish(&self) {
        socket::finish(self.handle.fd());
    }

    fn abort(&self) {
        self.is_abrupt.set(true);
        socket::end(self.handle.fd());
        self.handle.slot().record(Readiness::ALL);
    }

    fn reset_on_close(&self) {
        socket::set_reset_on_close(self.handle.fd(), true);
        self.is_abrupt.set(true);
    }

    fn close_cleanly(&self) {
        socket::set_reset_on_close(self.handle.fd(), false);
        self.is_abrupt.set(false);
    }

    fn peer(&self) -> Option<SocketAddr> {
        self.peer.map(SocketAddr::from)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // io_uring holds the socket until the cancelled watch has completed, one iteration later.
        // The peer must see the end now, so that an engine stops working for a client that has
        // disconnected.
        if !self.is_abrupt.get() {
            socket::end(self.handle.fd());
        }
    }
}
