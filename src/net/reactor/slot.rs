//! One watched descriptor: what it is ready for, and who waits for that.

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, Waker};

/// What a descriptor can be ready for, a set of bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Readiness(u8);

impl Readiness {
    /// Bytes, the end of the stream or an error may be received; a connection may be taken.
    pub(super) const READ: Self = Self(1);
    /// Something may be sent, or a connect has ended.
    pub(super) const WRITE: Self = Self(2);
    /// The peer has closed its side, or the connection has failed. Never taken back.
    pub(super) const ENDED: Self = Self(4);
    /// The connection is of no use any more.
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
/// The kernel tells of a change once (edge-triggered), so readiness is only taken back when a
/// call has found the socket empty or full: whatever comes later is told again.
pub(super) struct Slot {
    fd: OwnedFd,
    /// What completions and events of this descriptor are marked with.
    key: Cell<u64>,
    ready: Cell<Readiness>,
    /// The next wait lets the others go first.
    yields: Cell<bool>,
    /// Nobody can do without it: when it cannot be watched any more, the thread ends.
    is_vital: bool,
    /// By kind. Kept when woken: mostly the same task comes back.
    waiting: RefCell<[Option<Waker>; 3]>,
}

impl Slot {
    pub(super) fn new(fd: OwnedFd, ready: Readiness, is_vital: bool) -> Self {
        Self {
            fd,
            is_vital,
            key: Cell::new(0),
            ready: Cell::new(ready),
            yields: Cell::new(false),
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

    /// Notes what the kernel told, and wakes whoever waits for that.
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

    /// A call found nothing more to do. That an ended connection can be read is not taken back: the
    /// end is not told twice. That it can be written to is: a peer that only said it will send no
    /// more may well have a full window.
    pub(super) fn clear(&self, kind: Readiness) {
        let ready = self.ready.get();
        if kind == Readiness::WRITE || !ready.has(Readiness::ENDED) {
            self.ready.set(ready.without(kind));
        }
    }

    /// The next wait to read lets every other task that can run go first.
    pub(super) fn yield_once(&self) {
        self.yields.set(true);
    }

    pub(super) fn poll_read(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.yields.get() {
            self.yields.set(false);
            if self.is(Readiness::READ) {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        self.poll(0, cx)
    }

    pub(super) fn poll_write(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll(1, cx)
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
