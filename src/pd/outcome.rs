//! The closed set of outcomes of a request's disaggregation, for metrics and logs.

/// How an intercepted request was served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Served by a prefill leg and a decode leg.
    Remote,
    /// Served by the decoder alone because no prefill leg was requested, needed or possible.
    LocalPolicy,
    /// Served by the decoder alone because the prefill leg failed or its handoff could not be used.
    LocalFallback,
    /// Not served, or not completely, because of a [`Fault`](crate::fault::Fault).
    Failed,
}

impl Outcome {
    /// Every outcome, in index order.
    pub const ALL: [Self; 4] = [
        Self::Remote,
        Self::LocalPolicy,
        Self::LocalFallback,
        Self::Failed,
    ];

    /// Returns the metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Remote => "remote",
            Self::LocalPolicy => "local_policy",
            Self::LocalFallback => "local_fallback",
            Self::Failed => "failed",
        }
    }

    /// Returns the position in [`Outcome::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// Reason for an [`Outcome`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// There is no reason to report: the outcome is [`Outcome::Remote`].
    None,
    /// The request names no prefiller.
    NoPrefiller,
    /// `n` is above 1, and one handoff cannot serve several sequences.
    SeveralChoices,
    /// `best_of` is above 1.
    BestOf,
    /// The request has several prompts.
    SeveralPrompts,
    /// The request needs prompt log-probabilities, which disable the engine's prefix cache.
    PromptLogprobs,
    /// The request is a beam search, which has several sequences.
    BeamSearch,
    /// The request makes the engine ignore its prefix cache, and with it transferred KV cache.
    CacheUnread,
    /// The engine cuts the prompt depending on the token limit.
    PromptCut,
    /// The prompt is given as embeddings, for which no KV cache is transferred.
    PromptEmbeds,
    /// The request uses or creates a response that only the decoder stores.
    ResponseState,
    /// The engine runs tools of the request itself, in several turns.
    BuiltInTools,
    /// The thinking budget would exceed the limit of the prefill leg.
    ThinkingBudget,
    /// The request forces the call of a tool, which fails on engines if it is cut after one token.
    ForcedTool,
    /// A tool call in the conversation has no id, so that each engine makes one from the time,
    /// which is part of the prompt.
    ToolWithoutId,
    /// The request names an image or another item that only one engine may have in its cache.
    CachedMedia,
    /// A value that only the decode leg carries is one that engines refuse.
    InvalidValue,
    /// The body is not of a kind that can be split: `/invocations` without messages or a prompt, a
    /// batch of chat completions, Cohere's chat API.
    UnknownShape,
    /// The request names this proxy or one of its decoders as the prefiller.
    SelfTarget,
    /// The prefill response contained no handoff.
    MissingKv,
    /// The handoff has a shape that can make an engine exit.
    MalformedKv,
    /// The token of the prefill leg ended the text, so the prefiller kept no KV cache.
    PrefillEnded,
    /// The handoff became older than `--handoff-max-age` before it was sent completely.
    StaleKv,
    /// The decode leg had to be repeated, and its handoff had already been sent with the first
    /// attempt.
    UsedKv,
    /// The decoder responded with 500 to a leg that carried the handoff, so the leg was repeated
    /// without it.
    DecodeKvError,
    /// No prefiller accepted a connection.
    PrefillConnect,
    /// The prefiller closed the connection before the first byte of its response.
    PrefillReset,
    /// The prefiller responded with a status other than 2xx.
    PrefillStatus,
    /// The prefiller did not respond within a time limit: `--prefill-timeout`,
    /// `--first-byte-timeout` or `--moriio-parallel-decode-wait-timeout`.
    PrefillTimeout,
    /// The prefiller's response was malformed, truncated or too long.
    PrefillResponse,
    /// The request was first sent to the decoder (decode-first), which did not report that too
    /// little of the prompt was in the store.
    StoreHit,
    /// An encoder was unreachable, failed, or returned an unreadable response.
    Encode,
    /// The prefiller's bootstrap server was unreachable or returned no usable list of engines.
    Bootstrap,
    /// The routing header contains a malformed target.
    BadTarget,
    /// The client's request is invalid, too large or too slow. Also used if the proxy has run out
    /// of a resource or has a defect.
    ClientError,
    /// The client disconnected or stopped reading its response.
    ClientGone,
    /// The decoder was unreachable or too slow, or its response was malformed or truncated.
    Decode,
    /// The prefill target is not on the allowlist, or the allowlist is still incomplete.
    TargetDenied,
    /// The request was open when the time limit of a drain passed.
    Drained,
}

impl Reason {
    /// Every reason, in index order.
    pub const ALL: [Self; 39] = [
        Self::None,
        Self::NoPrefiller,
        Self::SeveralChoices,
        Self::BestOf,
        Self::SeveralPrompts,
        Self::PromptLogprobs,
        Self::BeamSearch,
        Self::CacheUnread,
        Self::PromptCut,
        Self::PromptEmbeds,
        Self::ResponseState,
        Self::BuiltInTools,
        Self::ThinkingBudget,
        Self::ForcedTool,
        Self::ToolWithoutId,
        Self::CachedMedia,
        Self::InvalidValue,
        Self::UnknownShape,
        Self::SelfTarget,
        Self::MissingKv,
        Self::MalformedKv,
        Self::PrefillEnded,
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
        Self::Drained,
    ];

    /// Returns the metric label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::NoPrefiller => "no_prefiller",
            Self::SeveralChoices => "several_choices",
            Self::BestOf => "best_of",
            Self::SeveralPrompts => "several_prompts",
            Self::PromptLogprobs => "prompt_logprobs",
            Self::BeamSearch => "beam_search",
            Self::CacheUnread => "cache_unread",
            Self::PromptCut => "prompt_cut",
            Self::PromptEmbeds => "prompt_embeds",
            Self::ResponseState => "response_state",
            Self::BuiltInTools => "built_in_tools",
            Self::ThinkingBudget => "thinking_budget",
            Self::ForcedTool => "forced_tool",
            Self::ToolWithoutId => "tool_without_id",
            Self::CachedMedia => "cached_media",
            Self::InvalidValue => "invalid_value",
            Self::UnknownShape => "unknown_shape",
            Self::SelfTarget => "self_target",
            Self::MissingKv => "handoff_missing",
            Self::MalformedKv => "handoff_malformed",
            Self::PrefillEnded => "prefill_ended",
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
            Self::Drained => "drained",
        }
    }

    /// Returns the position in [`Reason::ALL`].
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
