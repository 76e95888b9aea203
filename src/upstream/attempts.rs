//! Decides what follows an attempt of a leg that did not succeed.
//!
//! Pure: the flows report how an attempt ended and carry out what [`Attempts::next`] returns. These
//! are the only rules about repeating a request to an engine.

use std::time::Duration;

use super::error::CallError;
use super::wait::Timeout;
use crate::fault::Cause;
use crate::limits::REPLAY_MS_MAX;

/// Whether a leg may use a pooled connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reuse {
    /// A pooled connection that has received nothing while idle, if there is one; otherwise a new
    /// one.
    Allowed,
    /// Always a new connection.
    Never,
}

/// The limits of the attempts of one leg.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Number of engines that can serve the leg.
    pub(crate) candidates: usize,
    /// Maximum number of retries.
    pub(crate) retries_max: u32,
    /// Pause before each retry.
    pub(crate) backoff: Duration,
    /// Whether a leg with a handoff to which the engine responds with 500 is repeated without the
    /// handoff. A 500 usually means that the KV cache could not be loaded.
    pub(crate) recomputes: bool,
}

impl Limits {
    /// One engine, no retries: only a request on a closed pooled connection is sent again.
    pub(crate) const ONE: Self = Self {
        candidates: 1,
        retries_max: 0,
        backoff: Duration::ZERO,
        recomputes: false,
    };
}

/// The end of an attempt that is not a success.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    /// The status of the response, or the error.
    pub(crate) result: Result<u16, CallError>,
    /// Whether the attempt used a pooled connection.
    pub(crate) reused: bool,
    /// The time since the whole request was sent; `None` if it was not.
    pub(crate) since_sent: Option<Duration>,
    /// Whether the request may be sent twice even if the engine has worked on it: its method is
    /// idempotent.
    pub(crate) is_idempotent: bool,
    /// Whether the whole request is still at hand, so that it can be sent again.
    pub(crate) can_resend: bool,
    /// Whether the request carried a handoff, which cannot be sent again.
    pub(crate) carries_handoff: bool,
}

impl Ended {
    /// The end of an attempt on a new connection that could be sent again and carries no handoff.
    pub(crate) const fn with(result: Result<u16, CallError>) -> Self {
        Self {
            result,
            reused: false,
            since_sent: None,
            is_idempotent: false,
            can_resend: true,
            carries_handoff: false,
        }
    }
}

impl Ended {
    /// Returns whether the engine has most likely not read the request, or may read it twice. The
    /// connection had been idle, and ended within the time that its end takes to arrive. An engine
    /// that got the whole request earlier may have worked on it until then, so that a request which
    /// is not idempotent must not be repeated (RFC 9110 section 9.2.2).
    fn is_replayable(&self) -> bool {
        let is_soon = |since: Duration| since <= Duration::from_millis(REPLAY_MS_MAX);
        self.reused && (self.is_idempotent || self.since_sent.is_none_or(is_soon))
    }
}

/// The action that follows an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// The request is sent again to the same engine on a new connection. The engine had closed an
    /// idle connection at the moment of its use.
    Replay,
    /// The leg is sent again to the same engine on a new connection, without the handoff.
    WithoutHandoff,
    /// The next candidate is tried.
    Other,
    /// After this pause the leg is sent again, to [`Attempts::candidate`].
    After(Duration),
    /// The result of the attempt is the result of the leg.
    Stop,
}

/// The attempts of one leg.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attempts {
    limits: Limits,
    candidate: usize,
    retries: u32,
    reuse: Reuse,
}

impl Attempts {
    pub(crate) const fn new(limits: Limits) -> Self {
        Self {
            limits,
            candidate: 0,
            retries: 0,
            reuse: Reuse::Allowed,
        }
    }

    /// Returns the index of the engine for the next attempt.
    pub(crate) const fn candidate(&self) -> usize {
        self.candidate
    }

    /// Returns whether the next attempt may use a pooled connection.
    pub(crate) const fn reuse(&self) -> Reuse {
        self.reuse
    }

    /// Returns what follows an attempt that ended so.
    ///
    /// A candidate that does not accept the connection is replaced by the next one. If the last one
    /// does not either, the leg is retried from the first candidate. If a candidate closes the
    /// connection before it responds, or returns 502 to 504, the leg is retried with that
    /// candidate.
    pub(crate) fn next(&mut self, ended: &Ended) -> Next {
        let closed = Err(CallError::Failed(Cause::ConnectionClosed));
        if ended.result == closed
            && ended.is_replayable()
            && ended.can_resend
            && self.reuse == Reuse::Allowed
        {
            self.reuse = Reuse::Never;
            return Next::Replay;
        }
        let failed_handoff = match ended.result {
            Ok(status) => status == 500 && self.limits.recomputes,
            Err(error) => error == CallError::TimedOut(Timeout::Handoff),
        };
        if ended.carries_handoff && failed_handoff {
            self.reuse = Reuse::Never;
            return Next::WithoutHandoff;
        }
        let is_refused = ended.result.is_err_and(CallError::is_refused);
        if is_refused && self.candidate + 1 < self.limits.candidates {
            self.candidate += 1;
            self.reuse = Reuse::Allowed;
            return Next::Other;
        }
        let may_pass =
            is_refused || ended.result == closed || matches!(ended.result, Ok(502..=504));
        if may_pass && self.retries < self.limits.retries_max {
            self.retries += 1;
            self.reuse = Reuse::Allowed;
            if is_refused {
                self.candidate = 0;
            }
            return Next::After(self.limits.backoff);
        }
        Next::Stop
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOSED: Result<u16, CallError> = Err(CallError::Failed(Cause::ConnectionClosed));
    const REFUSED: Result<u16, CallError> = Err(CallError::Failed(Cause::Refused));
    const LATE: Result<u16, CallError> = Err(CallError::TimedOut(Timeout::Connect));
    const STALE: Result<u16, CallError> = Err(CallError::TimedOut(Timeout::Handoff));
    const BACKOFF: Duration = Duration::from_millis(200);

    fn limits(candidates: usize, retries_max: u32) -> Limits {
        Limits {
            candidates,
            retries_max,
            backoff: BACKOFF,
            recomputes: true,
        }
    }

    const fn on_pooled(result: Result<u16, CallError>) -> Ended {
        Ended {
            reused: true,
            ..Ended::with(result)
        }
    }

    /// Returns what follows each of a series of attempts.
    fn series(limits: Limits, ends: &[Ended]) -> Vec<(Next, usize)> {
        let mut attempts = Attempts::new(limits);
        ends.iter()
            .map(|ended| (attempts.next(ended), attempts.candidate()))
            .collect()
    }

    #[test]
    fn a_closed_pooled_connection_is_replayed_once() {
        let reused = on_pooled(CLOSED);
        let new = Ended::with(CLOSED);
        assert_eq!(
            series(Limits::ONE, &[reused, reused]),
            [(Next::Replay, 0), (Next::Stop, 0)]
        );
        assert_eq!(series(Limits::ONE, &[new]), [(Next::Stop, 0)]);
        let gone = Ended {
            can_resend: false,
            ..reused
        };
        assert_eq!(series(Limits::ONE, &[gone]), [(Next::Stop, 0)]);
        let mut attempts = Attempts::new(limits(1, 1));
        assert_eq!(attempts.next(&reused), Next::Replay);
        assert_eq!(attempts.reuse(), Reuse::Never);
        assert_eq!(attempts.next(&new), Next::After(BACKOFF));
        assert_eq!(attempts.reuse(), Reuse::Allowed, "a retry may be replayed");
        assert_eq!(attempts.next(&reused), Next::Replay);
    }

    #[test]
    fn only_what_the_engine_has_hardly_read_is_replayed() {
        for (since_sent_ms, want) in [
            // The request was not sent completely.
            (None, Next::Replay),
            (Some(0), Next::Replay),
            (Some(REPLAY_MS_MAX), Next::Replay),
            (Some(REPLAY_MS_MAX + 1), Next::Stop),
            (Some(u64::MAX), Next::Stop),
        ] {
            let ended = Ended {
                since_sent: since_sent_ms.map(Duration::from_millis),
                ..on_pooled(CLOSED)
            };
            let found = series(Limits::ONE, &[ended]);
            assert_eq!(found, [(want, 0)], "{since_sent_ms:?}");
            let idempotent = Ended {
                is_idempotent: true,
                ..ended
            };
            let found = series(Limits::ONE, &[idempotent]);
            assert_eq!(found, [(Next::Replay, 0)], "{since_sent_ms:?}");
        }
    }

    #[test]
    fn refused_connections_move_to_the_next_candidate_and_then_start_again() {
        let refused = [REFUSED, LATE, REFUSED, REFUSED].map(Ended::with);
        let after = Next::After(BACKOFF);
        assert_eq!(
            series(limits(2, 1), &refused),
            [
                (Next::Other, 1),
                (after, 0),
                (Next::Other, 1),
                (Next::Stop, 1)
            ]
        );
        assert_eq!(series(limits(1, 0), &refused[..1]), [(Next::Stop, 0)]);
    }

    #[test]
    fn failures_that_may_pass_are_retried_with_the_same_candidate() {
        let after = Next::After(BACKOFF);
        let timeout = Err(CallError::TimedOut(Timeout::Leg));
        let malformed = Err(CallError::Failed(Cause::BadResponse));
        for (result, want) in [
            (CLOSED, after),
            (Ok(502), after),
            (Ok(503), after),
            (Ok(504), after),
            (Ok(500), Next::Stop),
            (Ok(501), Next::Stop),
            (Ok(505), Next::Stop),
            (Ok(429), Next::Stop),
            (timeout, Next::Stop),
            (malformed, Next::Stop),
            (Err(CallError::Disconnected), Next::Stop),
        ] {
            let ended = Ended::with(result);
            assert_eq!(series(limits(2, 1), &[ended]), [(want, 0)], "{result:?}");
            assert_eq!(series(limits(2, 0), &[ended]), [(Next::Stop, 0)]);
        }
        let unavailable = Ended::with(Ok(503));
        let twice = series(limits(1, 1), &[unavailable, unavailable]);
        assert_eq!(twice, [(after, 0), (Next::Stop, 0)]);
    }

    #[test]
    fn a_handoff_that_fails_is_left_out_of_the_next_attempt() {
        for (result, want) in [
            (STALE, Next::WithoutHandoff),
            (Ok(500), Next::WithoutHandoff),
            (Ok(400), Next::Stop),
            (Err(CallError::TimedOut(Timeout::FirstByte)), Next::Stop),
        ] {
            let carries = Ended {
                carries_handoff: true,
                ..on_pooled(result)
            };
            let mut attempts = Attempts::new(limits(1, 0));
            assert_eq!(attempts.next(&carries), want, "{result:?}");
            if want == Next::WithoutHandoff {
                assert_eq!(attempts.reuse(), Reuse::Never);
            }
            let without = on_pooled(result);
            assert_eq!(Attempts::new(limits(1, 0)).next(&without), Next::Stop);
        }
        let kept = Limits {
            recomputes: false,
            ..limits(1, 0)
        };
        let carries = Ended {
            carries_handoff: true,
            ..Ended::with(Ok(500))
        };
        assert_eq!(Attempts::new(kept).next(&carries), Next::Stop);
    }
}
