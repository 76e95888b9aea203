//! The clock and the timer descriptor of a shard.

use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::Instant;

/// Returns the current time of the monotonic clock.
pub(super) fn clock() -> Instant {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    Instant(seconds * 1_000_000_000 + nanos)
}

/// A timer descriptor (timerfd) that becomes readable at a given time. The executor watches it like
/// any other descriptor, so a wait for events needs no separate timeout. The timer is set only when
/// the earliest deadline of the shard's timers has moved earlier or has been reached.
#[derive(Clone)]
pub(super) struct Alarm {
    timer: Rc<OwnedFd>,
}

impl Alarm {
    /// Opens a timer descriptor that is not set: it does not become readable.
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = Rc::new(timerfd_create(TimerfdClockId::Monotonic, flags)?);
        Ok(Self { timer })
    }

    /// Returns a duplicate of the timer descriptor, for the executor to watch for readability.
    pub(super) fn watched(&self) -> io::Result<OwnedFd> {
        self.timer.try_clone()
    }

    /// Makes the descriptor become readable once at `instant`, instead of at the time set before.
    pub(super) fn set(&self, instant: Instant) {
        let wait = Duration::from_nanos(instant.0.max(1));
        let value = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(wait.subsec_nanos()),
        };
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let setting = Itimerspec {
            it_interval: zero,
            it_value: value,
        };
        let set = timerfd_settime(&*self.timer, TimerfdTimerFlags::ABSTIME, &setting);
        debug_assert!(set.is_ok(), "the kernel refused a valid time");
    }
}
