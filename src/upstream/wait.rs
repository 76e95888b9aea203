//! Deadlines of waits, and how a wait ends.

use std::time::Duration;

use crate::fault::Fault;
use crate::net::Instant;

/// The timeout that a deadline belongs to. A wait with several deadlines reports the timeout of the
/// one that passed first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Timeout {
    /// A timeout on the client, which the waiting code names itself.
    Client,
    /// `--connect-timeout`, for a name look-up or a connect.
    Connect,
    /// `--first-byte-timeout`, for the response head.
    FirstByte,
    /// The time limit of a whole leg, such as `--prefill-timeout`.
    Leg,
    /// `--moriio-parallel-decode-wait-timeout`, for the response head of a concurrent prefill leg.
    Pair,
    /// `--handoff-max-age`, for sending a decode leg that carries a handoff.
    Handoff,
    /// A pause between two attempts. Its end is the normal end of the wait.
    Pause,
    /// The limit of a leg that continues after its owner was dropped.
    Detached,
}

/// The deadline of a wait.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deadline {
    at: Option<Instant>,
    timeout: Timeout,
}

impl Deadline {
    /// No deadline: only the awaited event or a disconnect ends the wait.
    pub(crate) const NONE: Self = Self {
        at: None,
        timeout: Timeout::Client,
    };

    /// Returns the deadline `wait` after `now`; none if `wait` is `None`.
    pub(crate) fn of(now: Instant, wait: Option<Duration>, timeout: Timeout) -> Self {
        Self {
            at: wait.map(|wait| now.after(wait)),
            timeout,
        }
    }

    /// The time at which the deadline passes; `None` if there is no deadline.
    pub(crate) const fn at(self) -> Option<Instant> {
        self.at
    }

    /// The timeout that a wait reports when this deadline has passed.
    pub(crate) const fn timeout(self) -> Timeout {
        self.timeout
    }

    /// Returns the deadline that passes first; `self` if both pass at the same time.
    pub(crate) fn or_sooner(self, other: Self) -> Self {
        match (self.at, other.at) {
            (None, _) => other,
            (Some(a), Some(b)) if b < a => other,
            (Some(_), _) => self,
        }
    }
}

/// How a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub(crate) enum Waited<T> {
    /// The awaited event occurred.
    Ready(T),
    /// The client has disconnected, or the result is no longer needed.
    Disconnected,
    /// The deadline passed.
    TimedOut(Timeout),
}

impl<T> Waited<T> {
    /// Returns the awaited value of a wait without a deadline, or `ClientGone` after a disconnect.
    pub(crate) fn or_gone(self) -> Result<T, Fault> {
        debug_assert!(
            !matches!(self, Self::TimedOut(_)),
            "the wait has a deadline"
        );
        self.or_fault(Fault::ClientGone)
    }

    /// Returns the awaited value, `ClientGone` after a disconnect, or `timed_out` after a timeout.
    pub(crate) fn or_fault(self, timed_out: Fault) -> Result<T, Fault> {
        match self {
            Self::Ready(value) => Ok(value),
            Self::Disconnected => Err(Fault::ClientGone),
            Self::TimedOut(_) => Err(timed_out),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sooner_of_two_deadlines_counts() {
        let of = |ms, timeout| {
            let wait = Some(Duration::from_millis(ms));
            Deadline::of(Instant(0), wait, timeout)
        };
        let (early, late) = (of(1, Timeout::Leg), of(2, Timeout::Pair));
        let same = of(1, Timeout::Connect);
        for (one, other, want) in [
            (early, late, Timeout::Leg),
            (late, early, Timeout::Leg),
            (early, same, Timeout::Leg),
            (same, early, Timeout::Connect),
            (Deadline::NONE, late, Timeout::Pair),
            (late, Deadline::NONE, Timeout::Pair),
        ] {
            assert_eq!(one.or_sooner(other).timeout(), want);
        }
        assert_eq!(Deadline::NONE.or_sooner(Deadline::NONE).at(), None);
    }

    #[test]
    fn waits_end_in_a_value_or_in_a_fault() {
        let late = Fault::BodyTimeout;
        assert_eq!(Waited::Ready(7).or_fault(late), Ok(7));
        let gone: Waited<u8> = Waited::Disconnected;
        assert_eq!(gone.or_fault(late), Err(Fault::ClientGone));
        let timed_out: Waited<u8> = Waited::TimedOut(Timeout::Client);
        assert_eq!(timed_out.or_fault(late), Err(late));
    }
}
