//! A watched descriptor: its readiness and the tasks that wait for it.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, Waker};

use crate::net::turn;

/// The operations that a descriptor is ready for, as a set of bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Readiness(u8);

impl Readiness {
    /// Bytes, the end of the stream or an error can be received, or a connection can be accepted.
    pub(super) const READ: Self = Self(1);
    /// Bytes can be sent, or a connect has finished.
    pub(super) const WRITE: Self = Self(2);
    /// The peer has closed its sending side, or the connection has failed. Never cleared.
    pub(super) const ENDED: Self = Self(4);
    /// The connection has failed or was shut down: no operation needs to wait any more.
    pub(super) const ALL: Self = Self(7);

    pub(super) const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    pub(super) const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

const KINDS: [Readiness; 3] = [Readiness::READ, Readiness::WRITE, Readiness::ENDED];

/// A descriptor and its remembered readiness.
///
/// The kernel reports each change once (edge-triggered), so readiness is cleared only after a call
/// has found the socket empty or full. Any later change is reported again.
pub(super) struct Slot {
    fd: OwnedFd,
    /// The key under which the kernel reports events of this descriptor, assigned by `Watches`.
    key: Cell<u64>,
    ready: Cell<Readiness>,
    /// Whether the thread ends when this descriptor can no longer be watched.
    is_vital: bool,
    /// Wakers of the tasks that wait for `READ`, `WRITE` and `ENDED`, in this order. Kept when
    /// woken, because usually the same task waits again.
    waiting: RefCell<[Option<Waker>; 3]>,
}

impl Slot {
    pub(super) fn new(fd: OwnedFd, ready: Readiness, is_vital: bool) -> Self {
        Self {
            fd,
            is_vital,
            key: Cell::new(0),
            ready: Cell::new(ready),
            waiting: RefCell::default(),
        }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn is_vital(&self) -> bool {
        self.is_vital
    }

    pub(super) fn key(&self) -> u64 {
        self.key.get()
    }

    pub(super) fn set_key(&self, key: u64) {
        self.key.set(key);
    }

    pub(super) fn is(&self, ready: Readiness) -> bool {
        self.ready.get().has(ready)
    }

    /// Adds readiness that the kernel reported, and wakes the tasks that wait for it.
    pub(super) fn record(&self, ready: Readiness) {
        self.ready.set(self.ready.get().with(ready));
        for (kind, waker) in KINDS.iter().zip(&*self.waiting.borrow()) {
            if ready.has(*kind)
                && let Some(waker) = waker
            {
                waker.wake_by_ref();
            }
        }
    }

    /// Clears `kind`, which is `READ` or `WRITE`, because a call found the socket empty or full.
    ///
    /// `READ` is not cleared once the connection has ended, because the end is not reported twice.
    /// `WRITE` is cleared even then: a peer that has only closed its sending side may still have a
    /// full receive window, so that a send must wait.
    pub(super) fn clear(&self, kind: Readiness) {
        let ready = self.ready.get();
        if kind == Readiness::WRITE || !ready.has(Readiness::ENDED) {
            self.ready.set(ready.without(kind));
        }
    }

    /// Waits for `READ`, and for the task's next turn if this one is used up.
    pub(super) fn poll_read(&self, cx: &mut Context<'_>) -> Poll<()> {
        std::task::ready!(self.poll(0, cx));
        turn::poll_left(cx)
    }

    /// Waits for `WRITE`, and for the task's next turn if this one is used up.
    pub(super) fn poll_write(&self, cx: &mut Context<'_>) -> Poll<()> {
        std::task::ready!(self.poll(1, cx));
        turn::poll_left(cx)
    }

    pub(super) fn poll_ended(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll(2, cx)
    }

    fn poll(&self, kind: usize, cx: &mut Context<'_>) -> Poll<()> {
        if self.is(KINDS[kind]) {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.borrow_mut();
        match &mut waiting[kind] {
            Some(waker) if waker.will_wake(cx.waker()) => {}
            waker => *waker = Some(cx.waker().clone()),
        }
        Poll::Pending
    }
}
