//! A handoff is used once, and only while it is fresh.
//!
//! A handoff that was used before, or whose lease has run out, makes an engine answer HTTP 200
//! with *another prompt's text*, without any error counter moving (reference `competitors` 9.1).
//! So the value is taken out of [`SingleUse`] by the only leg that may carry it; there is no way to
//! send it twice.

use std::time::Duration;

use super::outcome::Reason;
use crate::json::{Handoff, Params};

/// The handoff between the prefiller's answer and the one decode leg that carries it.
#[derive(Debug)]
pub struct SingleUse {
    /// The prefiller's bytes, or why there is nothing to carry.
    params: Result<Vec<u8>, Reason>,
    /// The cached-token count the client is told: the prefiller's.
    pub cached_tokens: u64,
}

/// Whether a handoff is still young enough, decided by who has a clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Younger than the bound.
    Fresh,
    /// The engine may have given its blocks away already.
    Stale,
}

impl Freshness {
    /// Judges an age against its bound.
    #[must_use]
    pub fn of(age: Duration, age_max: Duration) -> Self {
        if age <= age_max {
            Self::Fresh
        } else {
            Self::Stale
        }
    }
}

impl SingleUse {
    /// What a prefiller's answer gave.
    #[must_use]
    pub fn new(response: Handoff) -> Self {
        let cached_tokens = response
            .cached_tokens
            .or(response.remote_prefill_cached_tokens)
            .unwrap_or(0);
        let params = match response.params {
            Params::Object(bytes) => Ok(bytes),
            Params::Absent | Params::Null => Err(Reason::MissingKv),
            Params::Malformed(_) => Err(Reason::MalformedKv),
        };
        Self {
            params,
            cached_tokens,
        }
    }

    /// An answer that is handed on as it is.
    #[must_use]
    pub const fn of(response: Vec<u8>) -> Self {
        Self {
            params: Ok(response),
            cached_tokens: 0,
        }
    }

    /// Nothing to hand on, and why.
    #[must_use]
    pub const fn none(reason: Reason) -> Self {
        Self {
            params: Err(reason),
            cached_tokens: 0,
        }
    }

    /// Takes the handoff for the leg that is about to be sent. Every later call gives
    /// [`Reason::UsedKv`].
    ///
    /// # Errors
    /// Why the leg has to go without it.
    pub fn take(&mut self, freshness: Freshness) -> Result<Vec<u8>, Reason> {
        let params = std::mem::replace(&mut self.params, Err(Reason::UsedKv))?;
        match freshness {
            Freshness::Fresh => Ok(params),
            Freshness::Stale => Err(Reason::StaleKv),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(params: Params) -> Handoff {
        Handoff {
            params,
            cached_tokens: None,
            remote_prefill_cached_tokens: Some(3),
        }
    }

    #[test]
    fn taken_once_whatever_happens_to_it() {
        let mut held = SingleUse::new(response(Params::Object(b"{}".to_vec())));
        assert_eq!(held.take(Freshness::Fresh), Ok(b"{}".to_vec()));
        assert_eq!(held.take(Freshness::Fresh), Err(Reason::UsedKv));
        let mut held = SingleUse::new(response(Params::Object(b"{}".to_vec())));
        assert_eq!(held.take(Freshness::Stale), Err(Reason::StaleKv));
        assert_eq!(held.take(Freshness::Fresh), Err(Reason::UsedKv));
    }

    #[test]
    fn absent_null_and_malformed_say_why() {
        for (params, want) in [
            (Params::Absent, Reason::MissingKv),
            (Params::Null, Reason::MissingKv),
            (Params::Malformed("x"), Reason::MalformedKv),
        ] {
            assert_eq!(
                SingleUse::new(response(params)).take(Freshness::Fresh),
                Err(want)
            );
        }
    }

    #[test]
    fn the_cached_tokens_are_usage_then_the_handoff_then_zero() {
        let count = |usage, handoff| {
            SingleUse::new(Handoff {
                params: Params::Null,
                cached_tokens: usage,
                remote_prefill_cached_tokens: handoff,
            })
            .cached_tokens
        };
        assert_eq!(count(Some(7), Some(9)), 7);
        assert_eq!(count(None, Some(9)), 9);
        assert_eq!(count(None, None), 0);
    }

    #[test]
    fn the_bound_itself_is_fresh() {
        let bound = Duration::from_secs(20);
        assert_eq!(Freshness::of(bound, bound), Freshness::Fresh);
        assert_eq!(
            Freshness::of(bound + Duration::from_nanos(1), bound),
            Freshness::Stale
        );
    }
}
