//! Events that an operator must learn of although the client may get a normal response.
//!
//! A fault ends a request; an incident changes how it is served. The log shows each kind once per
//! engine in a while, with a count.

use super::Trouble;
use crate::fleet::Target;
use crate::pd::{ExpertsError, Role};

/// An event for the log of the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incident {
    /// Legs to an engine have failed.
    Failed {
        /// The engine.
        engine: Engine,
        /// How the last one failed.
        trouble: Trouble,
        /// Number of legs that have failed in this way since the last report.
        legs: u64,
    },
    /// An engine has served a leg after others had failed.
    Recovered(Engine),
    /// A request names an engine that the allowlist does not permit.
    TargetDenied {
        /// The engine.
        target: Target,
        /// Whether the allowlist is complete, so that it will not permit the engine later.
        is_ready: bool,
    },
    /// The KV cache of a prefill remains with the prefiller until its lease expires, because no
    /// decoder will fetch it and it cannot be released.
    LeftToLease(Target),
    /// The two names of a routing header have different values.
    RoutingConflict,
    /// A request has a header with the prefix of routing headers and an unknown name, which is
    /// kept.
    UnknownRoutingHeader(String),
    /// The identity of a prefiller that pushes KV cache has changed twice in a short time.
    PushUnstable(Target),
    /// The routed experts in the responses of prefiller and decoder could not be merged.
    ExpertsNotMerged(ExpertsError),
    /// A prefiller's handoff was not passed to the decoder.
    HandoffRefused {
        /// The prefiller.
        prefiller: Target,
        /// The reason, which names the member and the remedy.
        why: String,
    },
}

/// An engine, as the log names it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Engine {
    /// Its role in the legs.
    pub role: Role,
    /// Its location.
    pub target: Target,
    /// Its data-parallel rank, if it is a local decoder.
    pub rank: Option<usize>,
}

impl Incident {
    /// Returns the key of incidents that share a log line: the kind, and the engine or the reason.
    #[must_use]
    pub fn key(&self) -> (&'static str, String) {
        match self {
            Self::Failed {
                engine, trouble, ..
            } => (
                trouble.label(),
                format!("{} {}", engine.role.label(), engine.target),
            ),
            Self::Recovered(engine) => (
                "recovered",
                format!("{} {}", engine.role.label(), engine.target),
            ),
            // Clients choose the target, so it does not count.
            Self::TargetDenied { is_ready, .. } => ("target_denied", is_ready.to_string()),
            Self::LeftToLease(prefiller) => ("left_to_lease", prefiller.to_string()),
            Self::RoutingConflict => ("routing_conflict", String::new()),
            // Clients choose the name, so it does not count.
            Self::UnknownRoutingHeader(_) => ("unknown_routing_header", String::new()),
            Self::PushUnstable(prefiller) => ("push_unstable", prefiller.to_string()),
            Self::ExpertsNotMerged(error) => ("experts_not_merged", error.to_string()),
            Self::HandoffRefused { prefiller, .. } => ("handoff_refused", prefiller.to_string()),
        }
    }
}

impl std::fmt::Display for Incident {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Failed { trouble, .. } => write!(f, "an engine has failed: {trouble}"),
            Self::Recovered(_) => f.write_str("an engine serves again"),
            Self::TargetDenied {
                target,
                is_ready: true,
            } => write!(
                f,
                "a request to {target} is refused: the allowlist does not permit it"
            ),
            Self::TargetDenied { target, .. } => write!(
                f,
                "a request to {target} is refused: the allowlist is not complete yet"
            ),
            Self::LeftToLease(prefiller) => write!(
                f,
                "prefiller {prefiller} keeps the KV cache of a prefill until its lease expires, \
                 because no decoder will fetch it"
            ),
            Self::RoutingConflict => f.write_str(
                "the two names of a routing header (x-llm-d-... and x-...) have different values; \
                 the one without llm-d counts; the scheduler in front should send equal values and \
                 remove both from what clients send",
            ),
            Self::UnknownRoutingHeader(name) => write!(
                f,
                "the request header {name} is not known here and has no effect; a newer scheduler \
                 may expect one"
            ),
            Self::PushUnstable(prefiller) => write!(
                f,
                "prefiller {prefiller} has changed its engine id or address twice within 5 \
                 minutes, so for 10 minutes its legs run one after the other; name each engine \
                 and each data-parallel rank by its own port"
            ),
            Self::ExpertsNotMerged(error) => write!(
                f,
                "a response got 502, because its routed experts could not be merged: {error}; run \
                 prefillers and decoders with the same settings of --enable-return-routed-experts"
            ),
            Self::HandoffRefused { prefiller, why } => {
                write!(
                    f,
                    "the handoff of prefiller {prefiller} is not passed on: {why}"
                )
            }
        }
    }
}
