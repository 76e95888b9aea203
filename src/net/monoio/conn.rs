//! Connections of the monoio executor.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::{Context, Poll};

use super::handle::{Handle, Readiness};
use super::hangup::{Hangups, Watch};
use crate::net::socket::{self, Left};
use crate::net::{Conn, Pipe, turn};

/// A stream connection (TCP or Unix) whose readiness comes from the shard's monoio runtime.
pub struct Socket {
    // Declared before `handle`, so that armed waits are dropped (cancelled) before it.
    reading: RefCell<Readiness>,
    /// Readiness to send. Created by the first wait for it: most responses fit into the socket's
    /// send buffer and never wait.
    writing: RefCell<Option<Readiness>>,
    hangup: RefCell<Option<Watch>>,
    hangups: Rc<Hangups>,
    handle: Rc<Handle>,
    /// The peer's IP address and port. A `SocketAddr` takes 12 bytes more, in each connection.
    peer: Option<(IpAddr, u16)>,
    aborted: Cell<bool>,
}

impl std::fmt::Debug for Socket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Socket")
            .field("peer", &self.peer)
            .finish_non_exhaustive()
    }
}

impl Socket {
    pub(super) fn new(
        socket: OwnedFd,
        peer: Option<SocketAddr>,
        hangups: Rc<Hangups>,
    ) -> io::Result<Self> {
        let handle = Rc::new(Handle::watch(socket)?);
        Ok(Self {
            reading: RefCell::new(Readiness::reading(Rc::clone(&handle))),
            writing: RefCell::new(None),
            hangup: RefCell::new(None),
            hangups,
            handle,
            peer: peer.map(|peer| (peer.ip(), peer.port())),
            aborted: Cell::new(false),
        })
    }

    fn received(&self, (left, received): (Left, io::Result<usize>)) -> io::Result<usize> {
        turn::charge(*received.as_ref().unwrap_or(&0));
        if left == Left::Exhausted {
            self.reading.borrow().clear();
        }
        received
    }

    fn sent(&self, (left, sent): (Left, io::Result<usize>)) -> io::Result<usize> {
        turn::charge(*sent.as_ref().unwrap_or(&0));
        if left == Left::Exhausted
            && let Some(writing) = &*self.writing.borrow()
        {
            writing.clear();
        }
        sent
    }
}

impl Conn for Socket {
    type Pipe = Pipe;

    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut reading = self.reading.borrow_mut();
        if turn::is_over() {
            // Waits for the kernel's next event: see `Inner::always`.
            reading.clear();
        }
        reading.poll(cx)
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut writing = self.writing.borrow_mut();
        let writing = writing.get_or_insert_with(|| Readiness::writing(Rc::clone(&self.handle)));
        if turn::is_over() {
            writing.clear();
        }
        writing.poll(cx)
    }

    fn poll_hangup(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut hangup = self.hangup.borrow_mut();
        if let Some(watch) = &*hangup {
            return watch.poll(cx);
        }
        let Ok(watch) = self.hangups.watch(self.handle.fd()) else {
            // Out of memory or descriptors. The client's stall limit still ends the wait.
            return Poll::Pending;
        };
        hangup.insert(watch).poll(cx)
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
            self.reading.borrow().clear();
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
        self.aborted.set(true);
        socket::end(self.handle.fd());
    }

    fn reset_on_close(&self) {
        socket::set_reset_on_close(self.handle.fd(), true);
        self.aborted.set(true);
    }

    fn close_cleanly(&self) {
        socket::set_reset_on_close(self.handle.fd(), false);
        self.aborted.set(false);
    }

    fn peer(&self) -> Option<SocketAddr> {
        self.peer.map(SocketAddr::from)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // monoio closes the descriptor when its last wait has been cancelled, one iteration later.
        // The peer must see the end now, so that an engine stops working for a client that has
        // disconnected.
        if !self.aborted.get() {
            socket::end(self.handle.fd());
        }
    }
}
