//! A connection on the real engine.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::task::{Context, Poll};

use rustix::net::{RecvFlags, SendFlags, Shutdown};

use super::handle::{Handle, Readiness};
use super::hangup::{Hangups, Watch};
use crate::net::Conn;

/// A TCP connection whose readiness comes from the shard's ring.
pub struct RingConn {
    // Declared before the handle, so that armed waits are dropped (cancelled) before it.
    reading: RefCell<Readiness>,
    /// Most answers fit the socket's buffer: the waiting half is made when it is first needed.
    writing: RefCell<Option<Readiness>>,
    hangup: RefCell<Option<Watch>>,
    hangups: Rc<Hangups>,
    handle: Rc<Handle>,
    peer_ip: Option<IpAddr>,
    aborted: Cell<bool>,
}

impl std::fmt::Debug for RingConn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RingConn")
            .field("peer_ip", &self.peer_ip)
            .finish_non_exhaustive()
    }
}

impl RingConn {
    pub(super) fn new(
        socket: OwnedFd,
        peer_ip: Option<IpAddr>,
        hangups: Rc<Hangups>,
    ) -> io::Result<Self> {
        let handle = Rc::new(Handle::watch(socket)?);
        Ok(Self {
            reading: RefCell::new(Readiness::reading(Rc::clone(&handle))),
            writing: RefCell::new(None),
            hangup: RefCell::new(None),
            hangups,
            handle,
            peer_ip,
            aborted: Cell::new(false),
        })
    }

    /// A short receive means that the socket is empty. The end of the stream (0) is not: it stays
    /// readable for ever. `EINTR` cannot happen to a non-blocking call, so it is not repeated.
    fn note_received(
        &self,
        received: rustix::io::Result<usize>,
        wanted: usize,
    ) -> io::Result<usize> {
        let empty = match received {
            Ok(n) => n > 0 && n < wanted,
            Err(error) => error == rustix::io::Errno::WOULDBLOCK,
        };
        if empty {
            self.reading.borrow().clear();
        }
        Ok(received?)
    }

    fn note_sent(&self, sent: rustix::io::Result<usize>, wanted: usize) -> io::Result<usize> {
        let clear = match sent {
            Ok(n) => n < wanted,
            Err(error) => error == rustix::io::Errno::WOULDBLOCK,
        };
        if clear && let Some(writing) = &*self.writing.borrow() {
            writing.clear();
        }
        Ok(sent?)
    }
}

impl Conn for RingConn {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.reading.borrow_mut().poll(cx)
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut writing = self.writing.borrow_mut();
        writing
            .get_or_insert_with(|| Readiness::writing(Rc::clone(&self.handle)))
            .poll(cx)
    }

    fn poll_hangup(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut hangup = self.hangup.borrow_mut();
        if let Some(watch) = &*hangup {
            return watch.poll(cx);
        }
        let Ok(watch) = self.hangups.watch(self.handle.fd()) else {
            // No memory for another watch: the client's stall limit still ends the wait.
            return Poll::Pending;
        };
        hangup.insert(watch).poll(cx)
    }

    fn try_recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len();
        let received = rustix::net::recv(self.handle.fd(), buffer, RecvFlags::DONTWAIT);
        self.note_received(received.map(|(n, _)| n), wanted)
    }

    #[expect(
        unsafe_code,
        reason = "a large body is neither zeroed first nor copied again"
    )]
    fn try_recv_append(&self, buffer: &mut Vec<u8>, bytes_max: usize) -> io::Result<usize> {
        let before = buffer.len();
        let spare = buffer.spare_capacity_mut();
        let wanted = bytes_max.min(spare.len());
        debug_assert!(
            wanted > 0,
            "a receive into no room would look like the end of the stream"
        );
        let spare = &mut spare[..wanted];
        let received = rustix::net::recv(self.handle.fd(), spare, RecvFlags::DONTWAIT);
        let received = received.map(|((filled, _), _)| filled.len());
        let n = self.note_received(received, wanted)?;
        // SAFETY: the kernel has just written `n` bytes from `before` on, within the capacity.
        unsafe { buffer.set_len(before + n) };
        Ok(n)
    }

    fn forget_readable(&self) {
        self.reading.borrow().clear();
    }

    fn peek_ready(&self) -> bool {
        let mut byte = [0_u8; 1];
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        let peeked = rustix::net::recv(self.handle.fd(), &mut byte, flags);
        let empty = matches!(peeked, Err(rustix::io::Errno::WOULDBLOCK));
        if empty {
            self.reading.borrow().clear();
        }
        !empty
    }

    fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        self.note_sent(
            rustix::net::send(self.handle.fd(), bytes, flags),
            bytes.len(),
        )
    }

    fn try_send_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let wanted = slices.iter().map(|slice| slice.len()).sum();
        let mut control = rustix::net::SendAncillaryBuffer::default();
        let sent = rustix::net::sendmsg(self.handle.fd(), slices, &mut control, flags);
        self.note_sent(sent, wanted)
    }

    fn connected(&self) -> io::Result<()> {
        match rustix::net::sockopt::socket_error(self.handle.fd())? {
            Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn finish(&self) {
        let _ = rustix::net::shutdown(self.handle.fd(), Shutdown::Write);
    }

    fn abort(&self) {
        self.aborted.set(true);
        let _ = rustix::net::shutdown(self.handle.fd(), Shutdown::Both);
    }

    fn reset_on_close(&self) {
        let linger = Some(std::time::Duration::ZERO);
        let _ = rustix::net::sockopt::set_socket_linger(self.handle.fd(), linger);
        self.aborted.set(true);
    }

    fn close_cleanly(&self) {
        let _ = rustix::net::sockopt::set_socket_linger(self.handle.fd(), None);
        self.aborted.set(false);
    }

    fn peer_ip(&self) -> Option<IpAddr> {
        self.peer_ip
    }
}

impl Drop for RingConn {
    fn drop(&mut self) {
        // The runtime closes the descriptor when its last wait has been cancelled, a turn later.
        // The peer should see the end now: an engine must stop working for a client that left.
        if !self.aborted.get() {
            let _ = rustix::net::shutdown(self.handle.fd(), Shutdown::Both);
        }
    }
}
