//! One end of a simulated connection.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::task::{Context, Poll};

use super::link::{Event, Flow, Link};
use super::world::World;
use crate::net::{Conduit, Conn, turn, would_block};

/// Capacity of a simulated pipe in bytes. Small, so that a body takes many fills.
const PIPE_BYTES: usize = 10_000;

/// One end of a simulated connection. Dropping it closes it.
pub struct SimConn {
    world: Rc<World>,
    link: Rc<RefCell<Link>>,
    side: usize,
}

impl std::fmt::Debug for SimConn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimConn")
            .field("side", &self.side)
            .finish_non_exhaustive()
    }
}

impl SimConn {
    pub(super) fn new(world: &Rc<World>, link: &Rc<RefCell<Link>>, side: usize) -> Self {
        Self {
            world: Rc::clone(world),
            link: Rc::clone(link),
            side,
        }
    }

    /// Returns the byte counters of the direction from this end to the other.
    #[must_use]
    pub fn outbound(&self) -> Flow {
        self.link.borrow().flow(self.side)
    }

    /// Returns the byte counters of the direction from the other end to this one.
    #[must_use]
    pub fn inbound(&self) -> Flow {
        self.link.borrow().flow(1 - self.side)
    }

    /// Waits for bytes and appends up to `bytes_max` of them to `buffer`. Returns their number; 0
    /// is the end of the stream.
    ///
    /// # Errors
    /// Fails once if the connection was reset or refused; later calls return 0.
    pub async fn recv(&self, buffer: &mut Vec<u8>, bytes_max: usize) -> io::Result<usize> {
        loop {
            poll_fn(|cx| self.poll_readable(cx)).await;
            buffer.reserve(bytes_max);
            match self.try_recv_append(buffer, bytes_max) {
                Err(error) if would_block(&error) => {}
                received => return received,
            }
        }
    }

    /// Sends all of `bytes`.
    ///
    /// # Errors
    /// Fails if this end was shut down, or the connection was reset or refused.
    pub async fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut at = 0;
        while at < bytes.len() {
            match self.try_send(&bytes[at..]) {
                Ok(n) => at += n,
                Err(error) if would_block(&error) => {
                    poll_fn(|cx| self.poll_writable(cx)).await;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Returns whether the connection was reset, by either end, before the other end closed it
    /// cleanly. As on Linux, the error itself is reported only once, by the next receive or send.
    /// In a scripted peer with a reader and a writer, only one of them gets the error, and the
    /// other can use this method.
    #[must_use]
    pub fn was_reset(&self) -> bool {
        self.link.borrow().was_reset(self.side)
    }

    /// Waits until the other end has closed or reset the connection, even if received bytes are
    /// unread.
    pub async fn hangup(&self) {
        poll_fn(|cx| self.poll_hangup(cx)).await;
    }

    /// Resets the connection immediately: sends a RST without waiting for the drop of this end.
    /// This end cannot be used afterwards.
    pub fn reset(&self) {
        self.link.borrow_mut().reset_now(&self.world, self.side);
    }

    fn poll(&self, event: Event, cx: &mut Context<'_>) -> Poll<()> {
        let mut link = self.link.borrow_mut();
        link.poll(&self.world, self.side, event, cx)
    }
}

/// A buffer for bytes in transit between two simulated connections.
#[derive(Debug, Default)]
pub struct SimPipe(Vec<u8>);

impl Conduit for SimPipe {
    fn held(&self) -> usize {
        self.0.len()
    }
}

impl Conn for SimConn {
    type Pipe = SimPipe;

    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll(Event::Readable, cx)
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll(Event::Writable, cx)
    }

    fn poll_hangup(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll(Event::Hangup, cx)
    }

    fn try_recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let received = self.link.borrow_mut().recv(&self.world, self.side, buffer);
        turn::charge(*received.as_ref().unwrap_or(&0));
        received
    }

    fn try_recv_append(&self, buffer: &mut Vec<u8>, bytes_max: usize) -> io::Result<usize> {
        let before = buffer.len();
        let wanted = bytes_max.min(buffer.capacity() - before);
        debug_assert!(
            wanted > 0,
            "a receive into an empty buffer would look like the end of the stream"
        );
        buffer.resize(before + wanted, 0);
        let received = self.try_recv(&mut buffer[before..]);
        buffer.truncate(before + received.as_ref().copied().unwrap_or(0));
        received
    }

    fn peek_ready(&self) -> bool {
        self.link.borrow_mut().peek(self.side)
    }

    fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.try_send_vectored(&[IoSlice::new(bytes)])
    }

    fn try_send_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let sent = self.link.borrow_mut().send(&self.world, self.side, slices);
        turn::charge(*sent.as_ref().unwrap_or(&0));
        sent
    }

    fn try_fill(&self, pipe: &mut SimPipe, bytes_max: usize) -> io::Result<usize> {
        assert!(pipe.0.is_empty() && bytes_max > 0, "the pipe is not empty");
        pipe.0.reserve(PIPE_BYTES);
        self.try_recv_append(&mut pipe.0, bytes_max.min(PIPE_BYTES))
    }

    fn try_drain(&self, pipe: &mut SimPipe) -> io::Result<usize> {
        assert!(!pipe.0.is_empty(), "an empty pipe has nothing to send");
        let sent = self.try_send(&pipe.0)?;
        pipe.0.drain(..sent);
        Ok(sent)
    }

    fn connected(&self) -> io::Result<()> {
        match self.link.borrow_mut().take_error(self.side) {
            None => Ok(()),
            Some(error) => Err(error.into()),
        }
    }

    fn finish(&self) {
        self.link.borrow_mut().finish(&self.world, self.side);
    }

    fn abort(&self) {
        self.link.borrow_mut().abort(&self.world, self.side);
    }

    fn reset_on_close(&self) {
        self.link.borrow_mut().set_reset_on_close(self.side, true);
    }

    fn close_cleanly(&self) {
        self.link.borrow_mut().set_reset_on_close(self.side, false);
    }

    fn peer(&self) -> Option<SocketAddr> {
        let last = if self.side == 0 { 2 } else { 1 };
        Some(SocketAddr::from((Ipv4Addr::new(192, 0, 2, last), 40_000)))
    }
}

impl Drop for SimConn {
    fn drop(&mut self) {
        self.link.borrow_mut().close(&self.world, self.side);
    }
}
