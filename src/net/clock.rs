//! The clock, the timer descriptor and the random numbers of a shard.

use std::cell::Cell;
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

/// A fast random number generator (splitmix64) whose seed comes from the operating system. Not
/// suitable for secrets.
pub(super) struct Random(Cell<u64>);

impl Random {
    pub(super) fn new() -> Self {
        use std::hash::{BuildHasher, Hasher};
        // The standard library seeds its hasher from the operating system.
        let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
        hasher.write_u64(clock().0);
        Self(Cell::new(hasher.finish()))
    }

    pub(super) fn next(&self) -> u64 {
        let state = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(state);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
