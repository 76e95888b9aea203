//! Where readiness comes from: the ring, or epoll where the ring is refused.

use std::io;
use std::os::fd::BorrowedFd;

use super::epoll::Epoll;
use super::slot::Readiness;
use super::uring::Uring;
use crate::net::probe::Driver;

/// One thing the kernel told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    /// The key of the watch it is about.
    pub(super) key: u64,
    pub(super) ready: Readiness,
    /// The watch has ended with this; the kernel knows its key no more.
    pub(super) is_last: bool,
    /// The kernel could not watch any longer, for a reason that is not the connection's.
    pub(super) has_failed: bool,
}

/// In a key: the wait for room to write, which is asked for only when a send did not fit.
pub(super) const WRITE_KEY: u64 = 1 << 63;

/// A source of readiness, told once per change.
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

    /// Tells of `fd` becoming readable or ending, as events with `key`, until it is unwatched.
    pub(super) fn watch(&mut self, fd: BorrowedFd<'_>, key: u64) -> io::Result<()> {
        match self {
            Self::Uring(ring) => {
                ring.watch(fd, key);
                Ok(())
            }
            Self::Epoll(set) => set.watch(fd, key),
        }
    }

    /// Tells once when `fd`, which is watched as `key`, can be written to.
    pub(super) fn watch_write(&mut self, fd: BorrowedFd<'_>, key: u64) -> io::Result<()> {
        match self {
            Self::Uring(ring) => {
                ring.watch_write(fd, key);
                Ok(())
            }
            Self::Epoll(set) => set.watch_write(fd, key),
        }
    }

    /// Ends a watch, and the wait for writing if there `is_writing` one. On a ring a last event
    /// follows for each; on epoll nothing comes any more.
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

    /// Whether a watch that was ended is still known to the kernel until its last event.
    pub(super) const fn tells_the_last(&self) -> bool {
        matches!(self, Self::Uring(_))
    }

    /// Whether a turn would find something to do, as far as can be told without a system call.
    pub(super) fn may_have_events(&mut self) -> bool {
        match self {
            Self::Uring(ring) => ring.has_work(),
            Self::Epoll(_) => true,
        }
    }

    /// Hands the kernel what was asked for and takes what it told; waits for a first event if
    /// told to `wait`. Returns without one after a signal.
    pub(super) fn turn(&mut self, wait: bool, events: &mut Vec<Event>) -> io::Result<()> {
        match self {
            Self::Uring(ring) => ring.turn(wait, events),
            Self::Epoll(set) => set.turn(wait, events),
        }
    }
}
