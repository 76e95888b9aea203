//! A descriptor that monoio watches, and its remembered readiness.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll};

use ::monoio::net::TcpStream;

use crate::net::socket;

/// A descriptor that monoio watches. It is wrapped in monoio's stream type regardless of its kind,
/// because only the one-shot poll is used, which works on any pollable descriptor.
pub(super) struct Handle {
    stream: TcpStream,
}

impl Handle {
    /// Passes `fd` to monoio, which closes it after the drop of the handle, when the last wait on
    /// it has ended.
    pub(super) fn watch(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            stream: TcpStream::from_std(std::net::TcpStream::from(fd))?,
        })
    }

    /// Waits until the descriptor is readable, closed or failed.
    pub(super) async fn readable(&self) {
        // An error of the poll operation itself (cancelled, bad descriptor) shows in the next
        // receive. `false`: on epoll, monoio must check again instead of trusting an old event.
        let _ = self.stream.readable(false).await;
    }

    /// Waits until the descriptor is writable, closed or failed.
    pub(super) async fn writable(&self) {
        let _ = self.stream.writable(false).await;
    }

    /// Borrows the descriptor, for a system call.
    #[expect(
        unsafe_code,
        reason = "monoio's stream exposes its descriptor only as a raw number"
    )]
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        let raw: RawFd = self.stream.as_raw_fd();
        // SAFETY: the stream keeps the descriptor open for as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(raw) }
    }

    /// Reads, and thereby resets, the eight-byte counter of an eventfd or timerfd.
    pub(super) fn drain_counter(&self) {
        socket::drain_counter(self.fd());
    }
}

/// Readiness of one direction of a descriptor, remembered until it is cleared.
///
/// The future inside is allocated once and armed again in place. Waiting for the next chunk
/// therefore costs one submission entry and no allocation, and an armed wait survives a move of the
/// connection between tasks (from idle in a pool to active).
pub(super) struct Readiness {
    ready: Rc<Cell<bool>>,
    armed: Pin<Box<dyn Future<Output = ()>>>,
}

impl Readiness {
    pub(super) fn reading(handle: Rc<Handle>) -> Self {
        let ready = Rc::new(Cell::new(false));
        let flag = Rc::clone(&ready);
        let armed = Box::pin(async move {
            loop {
                handle.readable().await;
                flag.set(true);
                Cleared(&flag).await;
            }
        });
        Self { ready, armed }
    }

    pub(super) fn writing(handle: Rc<Handle>) -> Self {
        let ready = Rc::new(Cell::new(false));
        let flag = Rc::clone(&ready);
        let armed = Box::pin(async move {
            loop {
                handle.writable().await;
                flag.set(true);
                Cleared(&flag).await;
            }
        });
        Self { ready, armed }
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.ready.get() {
            let ended = self.armed.as_mut().poll(cx);
            debug_assert!(ended.is_pending(), "the loop never returns");
        }
        if self.ready.get() {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    pub(super) fn clear(&self) {
        self.ready.set(false);
    }
}

/// A future that is ready once the readiness flag is `false`. It stores no waker, because
/// [`Readiness::poll`] polls it again whenever it finds the flag `false`.
struct Cleared<'a>(&'a Cell<bool>);

impl Future for Cleared<'_> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<()> {
        if self.0.get() {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    }
}
