//! The closed set of what became of a request's disaggregation, for metrics and logs.

/// How an intercepted request was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Prefilled remotely, and the decoder was given the handoff.
    Remote,
    /// Served by the decoder alone because that is the right way for it.
    LocalPolicy,
    /// Served by the decoder alone because the remote way failed.
    LocalFallback,
    /// Not served.
    Failed,
}

impl Outcome {
    /// Every outcome, in the order of their indices.
    pub const ALL: [Self; 4] = [
        Self::Remote,
        Self::LocalPolicy,
        Self::LocalFallback,
        Self::Failed,
    ];

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Remote => "remote",
            Self::LocalPolicy => "local_policy",
            Self::LocalFallback => "local_fallback",
            Self::Failed => "failed",
        }
    }

    /// Position in [`Outcome::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// Why it was served that way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Nothing to explain.
    None,
    /// The request names no prefiller.
    NoPrefiller,
    /// `n` above 1: one handoff cannot feed several sequences.
    SeveralChoices,
    /// `best_of` above 1.
    BestOf,
    /// Several prompts in one request.
    SeveralPrompts,
    /// Prompt log-probabilities switch the engine's prefix cache off.
    PromptLogprobs,
    /// No chat or completion of one prompt: `/invocations` with another body, batches of chats.
    UnknownShape,
    /// The prefiller named is this decoder or this proxy.
    SelfTarget,
    /// The prefiller's answer carried no handoff.
    MissingKv,
    /// The handoff has a shape that could kill an engine.
    MalformedKv,
    /// The handoff is older than it may be.
    StaleKv,
    /// The handoff had been sent once already when the decode leg had to be repeated.
    UsedKv,
    /// The decoder failed with the handoff in hand.
    DecodeKvError,
    /// No prefiller could be connected to.
    PrefillConnect,
    /// The prefiller ended the connection before its answer.
    PrefillReset,
    /// The prefiller answered with an error.
    PrefillStatus,
    /// The prefiller took longer than allowed.
    PrefillTimeout,
    /// The prefiller's answer could not be read.
    PrefillResponse,
    /// The decoder found enough of the prompt in the store itself.
    StoreHit,
    /// An encoder could not be reached, failed, or gave nothing that can be read.
    Encode,
    /// The prefiller's bootstrap server gave no engine.
    Bootstrap,
    /// The target in the routing header is none.
    BadTarget,
    /// The client sent something that cannot be served.
    ClientError,
    /// The client left.
    ClientGone,
    /// The decoder could not be reached or failed.
    Decode,
    /// The prefiller named is not on the allowlist, or that is not known yet.
    TargetDenied,
}

impl Reason {
    /// Every reason, in the order of their indices.
    pub const ALL: [Self; 26] = [
        Self::None,
        Self::NoPrefiller,
        Self::SeveralChoices,
        Self::BestOf,
        Self::SeveralPrompts,
        Self::PromptLogprobs,
        Self::UnknownShape,
        Self::SelfTarget,
        Self::MissingKv,
        Self::MalformedKv,
        Self::StaleKv,
        Self::UsedKv,
        Self::DecodeKvError,
        Self::PrefillConnect,
        Self::PrefillReset,
        Self::PrefillStatus,
        Self::PrefillTimeout,
        Self::PrefillResponse,
        Self::StoreHit,
        Self::Encode,
        Self::Bootstrap,
        Self::BadTarget,
        Self::ClientError,
        Self::ClientGone,
        Self::Decode,
        Self::TargetDenied,
    ];

    /// The metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::NoPrefiller => "no_prefiller",
            Self::SeveralChoices => "several_choices",
            Self::BestOf => "best_of",
            Self::SeveralPrompts => "several_prompts",
            Self::PromptLogprobs => "prompt_logprobs",
            Self::UnknownShape => "unknown_shape",
            Self::SelfTarget => "self_target",
            Self::MissingKv => "handoff_missing",
            Self::MalformedKv => "handoff_malformed",
            Self::StaleKv => "handoff_stale",
            Self::UsedKv => "handoff_used",
            Self::DecodeKvError => "decode_kv_error",
            Self::PrefillConnect => "prefill_connect",
            Self::PrefillReset => "prefill_reset",
            Self::PrefillStatus => "prefill_status",
            Self::PrefillTimeout => "prefill_timeout",
            Self::PrefillResponse => "prefill_answer",
            Self::StoreHit => "store_hit",
            Self::Encode => "encode",
            Self::Bootstrap => "bootstrap",
            Self::BadTarget => "bad_target",
            Self::ClientError => "client_error",
            Self::ClientGone => "client_gone",
            Self::Decode => "decode",
            Self::TargetDenied => "target_denied",
        }
    }

    /// Position in [`Reason::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn indices_are_positions_and_labels_are_distinct() {
        assert!(
            Outcome::ALL
                .iter()
                .enumerate()
                .all(|(i, outcome)| outcome.index() == i)
        );
        assert!(
            Reason::ALL
                .iter()
                .enumerate()
                .all(|(i, reason)| reason.index() == i)
        );
        let mut labels: Vec<_> = Reason::ALL.iter().map(|reason| reason.label()).collect();
        labels.sort_unstable();
        labels.dedup();
        assert_eq!(labels.len(), Reason::ALL.len());
    }
}
