//! The source of readiness: io_uring, or epoll where io_uring is refused.

use std::io;
use std::os::fd::BorrowedFd;

use super::epoll::Epoll;
use super::slot::Readiness;
use super::uring::Uring;
use crate::net::probe::Driver;

/// A readiness event reported by the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    /// The key of the watch that the event belongs to.
    pub(super) key: u64,
    pub(super) ready: Readiness,
    /// Whether this is the last event of the watch: the kernel has ended it and no longer uses its
    /// key. Always `false` on epoll.
    pub(super) is_last: bool,
    /// Whether the kernel failed to watch the descriptor, for a reason not related to the
    /// connection.
    pub(super) has_failed: bool,
}

/// Bit that is set in the key of a write watch, and not in that of the read watch of the same
/// descriptor. A write watch is requested only by a wait to send or to connect.
pub(super) const WRITE_KEY: u64 = 1 << 63;

/// A source of readiness that reports each change once.
pub(super) enum Source {
    Uring(Box<Uring>),
    Epoll(Epoll),
}

impl Source {
    pub(super) fn open(driver: Driver) -> io::Result<Self> {
        Ok(match driver {
            Driver::Uring => Self::Uring(Box::new(Uring::open()?)),
            Driver::Epoll => Self::Epoll(Epoll::open()?),
        })
    }

    /// Makes the kernel report whenever `fd` becomes readable, is closed by its peer or fails, as
    /// events with `key`, until [`Source::unwatch`].
    pub(super) fn watch(&mut self, fd: BorrowedFd<'_>, key: u64) -> io::Result<()> {
        match self {
            Self::Uring(ring) => {
                ring.watch(fd, key);
                Ok(())
            }
            Self::Epoll(set) => set.watch(fd, key),
        }
    }

    /// Makes the kernel report when `fd`, already watched as `key`, becomes writable: once on
    /// io_uring, at every later change on epoll.
    pub(super) fn watch_write(&mut self, fd: BorrowedFd<'_>, key: u64) -> io::Result<()> {
        match self {
            Self::Uring(ring) => {
                ring.watch_write(fd, key);
                Ok(())
            }
            Self::Epoll(set) => set.watch_write(fd, key),
        }
    }

    /// Ends the read watch of `fd`, and its write watch if `is_writing`. On io_uring a last event
    /// follows for each of these watches; on epoll no event follows.
    pub(super) fn unwatch(&mut self, fd: BorrowedFd<'_>, key: u64, is_writing: bool) {
        match self {
            Self::Uring(ring) => {
                ring.unwatch(key);
                if is_writing {
                    ring.unwatch(key | WRITE_KEY);
                }
            }
            Self::Epoll(set) => set.unwatch(fd),
        }
    }

    /// Returns whether the kernel reports a last event after [`Source::unwatch`], and uses the key
    /// until then. `true` on io_uring.
    pub(super) const fn reports_last_event(&self) -> bool {
        matches!(self, Self::Uring(_))
    }

    /// Returns whether [`Source::turn`] may find events. Makes no system call: on epoll, where only
    /// a call could find out, always `true`.
    pub(super) fn may_have_events(&mut self) -> bool {
        match self {
            Self::Uring(ring) => ring.has_work(),
            Self::Epoll(_) => true,
        }
    }

    /// Returns how many events the kernel has lost.
    pub(super) fn lost(&mut self) -> u32 {
        match self {
            Self::Uring(ring) => ring.lost(),
            Self::Epoll(_) => 0,
        }
    }

    /// Submits pending requests to the kernel and collects the events it reported. With `wait`,
    /// sleeps until the first event. May return without an event after a signal.
    pub(super) fn turn(&mut self, wait: bool, events: &mut Vec<Event>) -> io::Result<()> {
        match self {
            Self::Uring(ring) => ring.turn(wait, events),
            Self::Epoll(set) => set.turn(wait, events),
        }
    }
}
