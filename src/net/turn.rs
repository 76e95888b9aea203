//! Turns: how much one poll of a task may do before other tasks run.
//!
//! A connection that always has bytes to move would otherwise keep its task, and so its thread,
//! busy for as long as its peers keep up. The work of a poll is estimated from its socket calls,
//! because reading the clock after each of them would cost more. Once a poll has used up its turn,
//! `poll_readable` and `poll_writable` return `Pending` and wake the task, so no loop over a
//! connection has to count what it does. A loop that moves bytes without waiting for readiness
//! calls [`Net::give_way`](super::Net::give_way).
//!
//! An executor calls [`begin`] before each poll of a task, and then polls the task again in the
//! class that [`class`] returns.

use std::cell::Cell;
use std::task::{Context, Poll};

use crate::limits::{TURN_CALL_NANOS, TURN_MICROS_MAX, TURN_NANOS_PER_KIB};

thread_local! {
    static SPENT_NANOS: Cell<u32> = const { Cell::new(0) };
    static IS_BACKGROUND: Cell<bool> = const { Cell::new(false) };
}

const TURN_NANOS_MAX: u32 = TURN_MICROS_MAX * 1000;
/// A task that has used more than this part of its turn moves bulk data.
const RELAY_NANOS_MAX: u32 = TURN_NANOS_MAX / 4;

/// The order in which an executor polls tasks that are woken at the same time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// A task that does little each time it is woken, such as one that relays tokens. Polled first.
    Relay,
    /// A task that moves bulk data.
    Bulk,
    /// A task that accepts connections or performs a TLS handshake. Polled last.
    Background,
}

/// Starts a turn.
pub(super) fn begin() {
    SPENT_NANOS.set(0);
    IS_BACKGROUND.set(false);
}

/// Adds a socket call that moved `bytes` to the work of this turn.
pub(super) fn charge(bytes: usize) {
    let kib = u32::try_from(bytes / 1024).unwrap_or(u32::MAX);
    let nanos = kib
        .saturating_mul(TURN_NANOS_PER_KIB)
        .saturating_add(TURN_CALL_NANOS);
    SPENT_NANOS.set(SPENT_NANOS.get().saturating_add(nanos));
}

/// Uses up this turn.
pub(crate) fn end() {
    SPENT_NANOS.set(u32::MAX);
}

/// Marks the task that is being polled as one of [`Class::Bulk`], at least until its next poll.
pub(crate) fn set_bulk() {
    SPENT_NANOS.set(SPENT_NANOS.get().max(RELAY_NANOS_MAX + 1));
}

/// Marks the task that is being polled as one of [`Class::Background`] until its next poll.
pub(super) fn set_background() {
    IS_BACKGROUND.set(true);
}

/// Returns whether this turn is used up.
pub(crate) fn is_over() -> bool {
    SPENT_NANOS.get() >= TURN_NANOS_MAX
}

/// Returns `Pending` and wakes the task if this turn is used up.
pub(super) fn poll_left(cx: &Context<'_>) -> Poll<()> {
    if is_over() {
        cx.waker().wake_by_ref();
        return Poll::Pending;
    }
    Poll::Ready(())
}

/// Returns the class in which the task that has just been polled waits for its next turn.
pub(super) fn class() -> Class {
    match SPENT_NANOS.get() {
        _ if IS_BACKGROUND.get() => Class::Background,
        spent if spent > RELAY_NANOS_MAX => Class::Bulk,
        _ => Class::Relay,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_bounded_and_decides_the_class() {
        let call = |count: u32, bytes: usize| {
            begin();
            for _ in 0..count {
                charge(bytes);
            }
            (is_over(), class())
        };
        for (count, bytes, want) in [
            (0, 0, (false, Class::Relay)),
            // One token, and a small request.
            (2, 300, (false, Class::Relay)),
            (5, 1500, (false, Class::Relay)),
            // A body of 32 KiB.
            (4, 16 * 1024, (false, Class::Relay)),
            // Many small calls: pipelined requests.
            (20, 300, (false, Class::Bulk)),
            (100, 300, (true, Class::Bulk)),
            (2, 256 * 1024, (false, Class::Bulk)),
            (4, 256 * 1024, (true, Class::Bulk)),
            (1, 1 << 20, (true, Class::Bulk)),
            (1, usize::MAX, (true, Class::Bulk)),
            (2, usize::MAX, (true, Class::Bulk)),
        ] {
            assert_eq!(call(count, bytes), want, "{count} calls of {bytes} bytes");
        }
        begin();
        set_background();
        assert_eq!(class(), Class::Background);
        end();
        assert_eq!((is_over(), class()), (true, Class::Background));
        begin();
        assert_eq!((is_over(), class()), (false, Class::Relay));
    }
}
