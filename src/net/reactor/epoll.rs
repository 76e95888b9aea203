//! Readiness from an edge-triggered epoll set, for kernels and containers that refuse io_uring.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::event::Timespec;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;

use super::slot::Readiness;
use super::source::Event;
use crate::limits::TURN_EVENTS_MAX;

pub(super) struct Epoll {
    set: OwnedFd,
    room: Box<[MaybeUninit<epoll::Event>]>,
}

impl Epoll {
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self {
            set: epoll::create(CreateFlags::CLOEXEC)?,
            room: vec![MaybeUninit::uninit(); TURN_EVENTS_MAX].into_boxed_slice(),
        })
    }

    pub(super) fn watch(&self, fd: BorrowedFd<'_>, key: u64) -> io::Result<()> {
        let wanted = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        Ok(epoll::add(&self.set, fd, EventData::new_u64(key), wanted)?)
    }

    /// Makes the epoll set report whenever `fd`, already in the set, becomes writable. Modifying
    /// the set checks the socket, so a socket that is already writable is reported immediately.
    pub(super) fn watch_write(&self, fd: BorrowedFd<'_>, key: u64) -> io::Result<()> {
        let wanted = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        Ok(epoll::modify(
            &self.set,
            fd,
            EventData::new_u64(key),
            wanted,
        )?)
    }

    /// Removes `fd` from the epoll set. Closing `fd` would not be enough: the set watches the file
    /// as long as a duplicate of the descriptor is open.
    pub(super) fn unwatch(&self, fd: BorrowedFd<'_>) {
        let _ = epoll::delete(&self.set, fd);
    }

    pub(super) fn turn(&mut self, wait: bool, events: &mut Vec<Event>) -> io::Result<()> {
        let no_wait = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let timeout = if wait { None } else { Some(&no_wait) };
        let reported = match epoll::wait(&self.set, &mut *self.room, timeout) {
            Ok((reported, _)) => reported,
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        events.extend(reported.iter().map(|event| Event {
            key: { event.data }.u64(),
            ready: ready(event.flags),
            is_last: false,
            has_failed: false,
        }));
        Ok(())
    }
}

/// Converts epoll event flags to readiness.
fn ready(flags: EventFlags) -> Readiness {
    let mut ready = Readiness::default();
    if flags.contains(EventFlags::IN) {
        ready = ready.with(Readiness::READ);
    }
    if flags.contains(EventFlags::OUT) {
        ready = ready.with(Readiness::WRITE);
    }
    if flags.contains(EventFlags::RDHUP) {
        ready = ready.with(Readiness::READ).with(Readiness::ENDED);
    }
    if flags.intersects(EventFlags::HUP | EventFlags::ERR) {
        ready = Readiness::ALL;
    }
    ready
}
