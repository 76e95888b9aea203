//! Readiness from io_uring by multishot poll: one submission per connection instead of one per
//! chunk. The kernel is never given a buffer.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use io_uring::squeue::Flags;
use io_uring::{EnterFlags, IoUring, cqueue, opcode, squeue, types};
use rustix::event::PollFlags;
use rustix::io::Errno;

use super::slot::Readiness;
use super::source::{Event, WRITE_KEY};
use crate::limits::TURN_EVENTS_MAX;
use crate::net::probe::{RING_ENTRIES, ring_builder};

/// User data of every cancellation request. Their completions are ignored.
const CANCEL_KEY: u64 = u64::MAX;
/// Makes `io_uring_enter` run the kernel's deferred work, which posts the completions.
const GETEVENTS: u32 = EnterFlags::GETEVENTS.bits();

pub(super) struct Uring {
    ring: IoUring,
    /// Requests that did not fit into the submission queue, in the order in which they were made.
    backlog: Vec<squeue::Entry>,
}

impl Uring {
    /// Creates a ring for this thread.
    pub(super) fn open() -> io::Result<Self> {
        Ok(Self {
            ring: ring_builder().build(RING_ENTRIES)?,
            backlog: Vec::new(),
        })
    }

    pub(super) fn watch(&mut self, fd: BorrowedFd<'_>, key: u64) {
        // Multishot poll is edge-triggered. Requesting `RDHUP` in addition to `IN` costs nothing,
        // and reports the peer's end while received bytes are still unread.
        let wanted = PollFlags::IN | PollFlags::RDHUP;
        let poll = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), bits(wanted)).multi(true);
        self.queue(poll.build().user_data(key));
    }

    pub(super) fn watch_write(&mut self, fd: BorrowedFd<'_>, key: u64) {
        let poll = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), bits(PollFlags::OUT));
        self.queue(poll.build().user_data(key | WRITE_KEY));
    }

    pub(super) fn unwatch(&mut self, key: u64) {
        // Not `PollRemove`: it fails while an event of the poll is in flight, and the poll would
        // then keep the socket open forever. If the poll has just ended the cancellation finds
        // nothing, which is harmless.
        let cancel = opcode::AsyncCancel::new(key).build();
        self.queue(cancel.flags(Flags::SKIP_SUCCESS).user_data(CANCEL_KEY));
    }

    pub(super) fn has_work(&mut self) -> bool {
        self.must_enter() || !self.ring.completion().is_empty()
    }

    /// Returns how many completions the kernel has dropped. It keeps those that do not fit into the
    /// queue, unless it has no memory for them.
    pub(super) fn lost(&mut self) -> u32 {
        self.ring.completion().overflow()
    }

    /// Returns whether the kernel has work that it does only in a call: requests to accept, or
    /// completions to post.
    fn must_enter(&mut self) -> bool {
        let queue = self.ring.submission();
        !queue.is_empty() || queue.taskrun() || queue.cq_overflow()
    }

    pub(super) fn turn(&mut self, wait: bool, events: &mut Vec<Event>) -> io::Result<()> {
        self.flush()?;
        let entered = if wait {
            self.ring.submit_and_wait(1)
        } else if self.must_enter() {
            self.enter_without_wait()
        } else {
            Ok(0)
        };
        ok_if_retryable(entered)?;
        let mut completions = self.ring.completion();
        let some = completions.by_ref().take(TURN_EVENTS_MAX);
        events.extend(some.filter_map(|entry| event(&entry)));
        Ok(())
    }

    /// Submits the queued entries and makes the kernel run the work that it has deferred, without
    /// sleeping.
    #[expect(
        unsafe_code,
        reason = "the safe call requests no events of the entries that it submits"
    )]
    fn enter_without_wait(&mut self) -> io::Result<usize> {
        let queue = self.ring.submission();
        let count = u32::try_from(queue.len()).unwrap_or(u32::MAX);
        drop(queue);
        let submitter = self.ring.submitter();
        // SAFETY: no argument is passed, and the entries in the queue refer to no memory.
        unsafe { submitter.enter::<()>(count, 0, GETEVENTS, None) }
    }

    /// Queues an entry. Every entry is a poll or a cancellation, so it refers to no memory.
    fn queue(&mut self, entry: squeue::Entry) {
        if !self.backlog.is_empty() || !self.push(&entry) {
            self.backlog.push(entry);
        }
    }

    #[expect(unsafe_code, reason = "the submission queue takes raw entries")]
    fn push(&mut self, entry: &squeue::Entry) -> bool {
        let mut queue = self.ring.submission();
        // SAFETY: polls and cancellations refer to no memory, only to a descriptor and a number.
        unsafe { queue.push(entry) }.is_ok()
    }

    /// Moves the backlog into the submission queue, submitting as often as needed to make room.
    fn flush(&mut self) -> io::Result<()> {
        while !self.backlog.is_empty() {
            let backlog = std::mem::take(&mut self.backlog);
            let pushed = backlog.iter().take_while(|entry| self.push(entry)).count();
            self.backlog = backlog;
            self.backlog.drain(..pushed);
            if self.backlog.is_empty() {
                return Ok(());
            }
            if ok_if_retryable(self.ring.submit())? == 0 {
                // The kernel accepted nothing: completions must be collected first.
                return Ok(());
            }
        }
        Ok(())
    }
}

/// Turns the errors of a submit call that can be repeated later into `Ok(0)`: it was interrupted,
/// or completions must be collected first.
fn ok_if_retryable(entered: io::Result<usize>) -> io::Result<usize> {
    match entered {
        Err(error)
            if [Errno::INTR, Errno::BUSY, Errno::AGAIN]
                .iter()
                .any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) =>
        {
            Ok(0)
        }
        other => other,
    }
}

fn bits(flags: PollFlags) -> u32 {
    u32::from(flags.bits())
}

fn event(entry: &cqueue::Entry) -> Option<Event> {
    let key = entry.user_data();
    if key == CANCEL_KEY {
        return None;
    }
    let is_last = !cqueue::more(entry.flags());
    let Ok(result) = u32::try_from(entry.result()) else {
        let is_cancelled = entry.result() == -Errno::CANCELED.raw_os_error();
        return Some(Event {
            key,
            ready: if is_cancelled {
                Readiness::default()
            } else {
                Readiness::ALL
            },
            is_last,
            has_failed: !is_cancelled,
        });
    };
    let flags = PollFlags::from_bits_truncate(u16::try_from(result & 0xffff).unwrap_or(0));
    Some(Event {
        key,
        ready: ready(flags),
        is_last,
        has_failed: false,
    })
}

/// Converts poll flags to readiness.
fn ready(flags: PollFlags) -> Readiness {
    let mut ready = Readiness::default();
    if flags.contains(PollFlags::IN) {
        ready = ready.with(Readiness::READ);
    }
    if flags.contains(PollFlags::OUT) {
        ready = ready.with(Readiness::WRITE);
    }
    if flags.contains(PollFlags::RDHUP) {
        ready = ready.with(Readiness::READ).with(Readiness::ENDED);
    }
    if flags.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
        ready = Readiness::ALL;
    }
    ready
}
