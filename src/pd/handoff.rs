//! Ensures that a handoff is used once, and only while it is fresh.
//!
//! With a handoff that was used before, or whose lease has expired, an engine can return HTTP 200
//! and *the text of another prompt*, without incrementing any error counter of the decoder
//! (`docs/engines.md#handoffs`). The leg that carries the handoff therefore takes it out of
//! [`SingleUse`], so it cannot be sent twice.

use std::rc::Rc;
use std::time::Duration;

use super::experts::{ExpertsError, PromptExperts};
use super::outcome::Reason;
use super::push::PushIdentity;
use crate::budget::Kept;
use crate::json::transform::PromptUsage;
use crate::json::{Blocks, Choices, End, Handoff, Params};

/// A handoff, held between the prefill response and the one decode leg that carries it.
#[derive(Debug)]
pub struct SingleUse {
    /// The handoff exactly as the prefiller sent it, or the reason why it is missing, unusable or
    /// already taken.
    params: Result<Rc<Kept>, Reason>,
    /// The prefiller's counts of the prompt's tokens, with 0 cached ones if it sent no count. They
    /// replace the decoder's in the response to the client.
    pub usage: PromptUsage,
    /// The form of the block ids in the handoff.
    blocks: Blocks,
    /// The identity of the prefiller, if it pushes KV cache.
    push: Option<PushIdentity>,
    /// The routed experts of the prompt, or the reason why they cannot be read. `None` if the
    /// prefiller returned none.
    experts: Option<Box<Result<PromptExperts, ExpertsError>>>,
}

/// Whether a handoff is young enough to be used. The caller decides, since `pd` reads no clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// The handoff is not older than `--handoff-max-age`.
    Fresh,
    /// The handoff is older than `--handoff-max-age`: the prefiller may already have freed the KV
    /// cache blocks that it refers to.
    Stale,
}

impl Freshness {
    /// Returns `Fresh` if `age` is at most `age_max`, and `Stale` otherwise.
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
    /// Stores the handoff of a prefill response or, if the response has no usable one, the reason.
    #[must_use]
    pub fn new(response: Handoff) -> Self {
        let usage = usage_of(&response);
        let mut push = None;
        let params = match response.params {
            Params::Object(bytes) => {
                if response.is_push {
                    push = PushIdentity::of(&bytes);
                }
                Ok(Rc::new(bytes))
            }
            Params::Absent | Params::Null => Err(Reason::MissingKv),
            Params::Malformed(_) => Err(Reason::MalformedKv),
        };
        Self {
            params,
            usage,
            blocks: response.blocks,
            push,
            experts: match response.choices {
                Choices::Plain => None,
                Choices::Experts(choices) => PromptExperts::read(choices).transpose(),
                Choices::TooLarge => Some(Err(ExpertsError::TooLarge)),
            }
            .map(Box::new),
        }
    }

    /// Returns the identity of the prefiller, if it pushes KV cache.
    #[must_use]
    pub const fn push(&self) -> Option<&PushIdentity> {
        self.push.as_ref()
    }

    /// Returns the form of the block ids in the handoff, if there still is one.
    #[must_use]
    pub fn blocks(&self) -> Option<Blocks> {
        self.params.is_ok().then_some(self.blocks)
    }

    /// Takes the routed experts of the prompt, for the response to the leg that carries the
    /// handoff.
    pub const fn take_experts(&mut self) -> Option<Box<Result<PromptExperts, ExpertsError>>> {
        self.experts.take()
    }

    /// Drops the handoff, which the decoder cannot take. [`SingleUse::take`] returns
    /// [`Reason::MalformedKv`] afterwards.
    pub fn refuse(&mut self) {
        self.params = Err(Reason::MalformedKv);
    }

    /// Stores a complete prefill response as the handoff, for a connector whose decode leg is built
    /// from all of it.
    #[must_use]
    pub fn of(response: Kept) -> Self {
        Self {
            params: Ok(Rc::new(response)),
            usage: PromptUsage::NONE,
            blocks: Blocks::Other,
            push: None,
            experts: None,
        }
    }

    /// Stores the permission to pull KV cache that no handoff names: the legs share an id. There is
    /// none if the prefiller has not kept the KV cache, because its token ended the text. A decoder
    /// that pulls it would wait for as long as it can.
    #[must_use]
    pub fn of_transfer(response: Handoff) -> Self {
        let is_kept = response.end != End::Token;
        Self {
            params: is_kept.then(no_bytes).ok_or(Reason::PrefillEnded),
            blocks: Blocks::Other,
            push: None,
            ..Self::new(response)
        }
    }

    /// Permits one more leg to pull the KV cache, after one that could not reach it.
    pub fn renew_transfer(&mut self) {
        self.params = Ok(no_bytes());
    }

    /// Stores no handoff, only the reason for its absence. [`SingleUse::take`] returns that reason.
    #[must_use]
    pub const fn none(reason: Reason) -> Self {
        Self {
            params: Err(reason),
            usage: PromptUsage::NONE,
            blocks: Blocks::Other,
            push: None,
            experts: None,
        }
    }

    /// Takes the handoff for the leg that is about to be sent. Every later call returns
    /// [`Reason::UsedKv`].
    ///
    /// # Errors
    /// The reason why the leg must be sent without a handoff.
    pub fn take(&mut self, freshness: Freshness) -> Result<Rc<Kept>, Reason> {
        let params = std::mem::replace(&mut self.params, Err(Reason::UsedKv))?;
        match freshness {
            Freshness::Fresh => Ok(params),
            Freshness::Stale => Err(Reason::StaleKv),
        }
    }
}

/// Returns the handoff of legs that share an id.
fn no_bytes() -> Rc<Kept> {
    Rc::new(Kept::empty())
}

/// Returns the counts of the prompt's tokens in a prefill response. A prefiller can report the
/// cached ones in its handoff alone, and `input_tokens` includes them then.
fn usage_of(response: &Handoff) -> PromptUsage {
    let cached = response
        .cached_tokens
        .or(response.remote_prefill_cached_tokens)
        .unwrap_or(0);
    let included = response.cached_tokens.map_or(cached, |_| 0);
    PromptUsage {
        cached,
        created: response.created_tokens,
        other: response
            .input_tokens
            .map(|tokens| tokens.saturating_sub(included)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(params: Params) -> Handoff {
        Handoff {
            params,
            cached_tokens: None,
            created_tokens: None,
            input_tokens: None,
            remote_prefill_cached_tokens: Some(3),
            blocks: Blocks::Other,
            is_push: false,
            choices: Choices::Plain,
            end: End::Unknown,
        }
    }

    #[test]
    fn a_handoff_can_be_taken_only_once() {
        let mut held = SingleUse::new(response(Params::Object(Kept::unlimited("{}"))));
        assert_eq!(
            held.take(Freshness::Fresh),
            Ok(Rc::new(Kept::unlimited("{}")))
        );
        assert_eq!(held.take(Freshness::Fresh), Err(Reason::UsedKv));
        let mut held = SingleUse::new(response(Params::Object(Kept::unlimited("{}"))));
        assert_eq!(held.take(Freshness::Stale), Err(Reason::StaleKv));
        assert_eq!(held.take(Freshness::Fresh), Err(Reason::UsedKv));
    }

    #[test]
    fn absent_null_and_malformed_params_have_a_reason() {
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
    fn cached_tokens_come_from_the_usage_then_the_handoff_then_zero() {
        let count = |usage, handoff| {
            let held = SingleUse::new(Handoff {
                cached_tokens: usage,
                created_tokens: Some(3),
                input_tokens: Some(30),
                remote_prefill_cached_tokens: handoff,
                ..response(Params::Null)
            });
            assert_eq!(held.usage.created, Some(3));
            (held.usage.cached, held.usage.other.unwrap())
        };
        assert_eq!(count(Some(7), Some(9)), (7, 30));
        assert_eq!(count(None, Some(9)), (9, 21));
        assert_eq!(count(None, Some(31)), (31, 0));
        assert_eq!(count(None, None), (0, 30));
    }

    #[test]
    fn an_age_equal_to_the_bound_is_fresh() {
        let bound = Duration::from_secs(20);
        assert_eq!(Freshness::of(bound, bound), Freshness::Fresh);
        assert_eq!(
            Freshness::of(bound + Duration::from_nanos(1), bound),
            Freshness::Stale
        );
    }
}
