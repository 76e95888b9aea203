//! What an engine is told before it starts: its role, its timing, and the
//! places where it may deviate from a well-behaved vLLM.
//!
//! Nothing here changes while the engine runs; what a test wants to change at
//! run time is a [`crate::Fault`] or a method of [`crate::Engine`].

use std::time::Duration;

use serde::Deserialize;

use crate::kv::{EngineIds, KvContract};
use crate::pd::HandoffRegistry;

/// The `cached_tokens` value that stands for "7 for a prefill request, 49 for
/// any other", the two numbers the sidecar's own test engines report.
pub const CACHED_BY_ROLE: u64 = u64::MAX;

/// Which requests of the two-step exchange an engine accepts.
///
/// A request without `kv_transfer_params` is served by every role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Answers `do_remote_decode` requests; `do_remote_prefill` is a 500.
    Prefill,
    /// Answers `do_remote_prefill` requests; `do_remote_decode` is a 500.
    Decode,
    /// Answers both.
    Both,
    /// Encodes one item of a chat and answers with its `ec_transfer_params`.
    Encoder,
}

/// How the `usage` member of an answer looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageShape {
    /// `prompt_tokens_details: {"cached_tokens": n}`.
    Details,
    /// `prompt_tokens_details: {}`.
    EmptyDetails,
    /// `prompt_tokens_details: null`, what vLLM sends by default.
    NullDetails,
    /// No `prompt_tokens_details` member.
    WithoutDetails,
    /// `usage: null`.
    Null,
    /// No `usage` member, and no usage event in a stream.
    Missing,
}

/// What a prefill answer carries as `kv_transfer_params`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HandoffShape {
    /// A fresh object with numbers, escapes and whitespace that no JSON
    /// library would print again in the same way.
    Fresh,
    /// As `Fresh`, with `remote_block_ids` as a flat list.
    Flat,
    /// The member is absent.
    Omit,
    /// `null`.
    Null,
    /// `{}`.
    Empty,
    /// A string in place of the object.
    Text,
    /// A list in place of the object.
    List,
    /// The object that the answer before this one carried.
    Stale,
    /// A fresh object after nested decoys of the same name.
    Decoys,
}

/// How an [`crate::Engine`] behaves; see [`EngineConfig::default`].
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Which half of the two-step exchange is accepted.
    pub role: Role,
    /// From the complete request to the first token.
    pub ttft: Duration,
    /// From one token to the next. Zero writes as fast as the socket takes it.
    pub itl: Duration,
    /// Tokens in an answer. The request's limit lowers it; `ignore_eos` makes
    /// the answer run up to the limit, and `min_tokens` raises it.
    pub tokens: u32,
    /// The model name in answers and in `/v1/models`.
    pub model: String,
    /// The data-parallel rank, for `/metrics` and logs.
    pub rank: u32,
    /// Ranks behind this port; `X-data-parallel-rank` must be below it.
    pub data_parallel_size: u32,
    /// The name in logs and the `remote_engine_id` of handoffs.
    pub name: String,
    /// What usage reports as cached; [`CACHED_BY_ROLE`] for 7 and 49.
    pub cached_tokens: u64,
    /// Checks the prefill request against the sidecar's contract, answers 500
    /// to a `kv_transfer_params` without either flag, and verifies handoffs.
    /// Off for connectors whose objects look different.
    pub strict: bool,
    /// The KV connector whose legs it expects.
    pub contract: KvContract,
    /// Mooncake's `GET /query` answers with these.
    pub bootstrap: Option<EngineIds>,
    /// The `authorization` that API requests must have; 401 otherwise.
    pub authorization: Option<String>,
    /// Sends `remote_block_ids` as a flat list, as older releases did.
    pub flat_blocks: bool,
    /// What prefill answers carry.
    pub handoff: HandoffShape,
    /// Where handoffs are recorded when they are issued and verified when they
    /// come back. `None`: handoffs are recorded in a registry of the engine's
    /// own, and not verified.
    pub verify_handoff: Option<HandoffRegistry>,
    /// How usage looks.
    pub usage: UsageShape,
    /// Puts `"usage": null` into every chunk of a stream.
    pub null_usage_in_chunks: bool,
    /// Answers paths it does not know with a description of the request;
    /// otherwise with vLLM's 404 or 405.
    pub echo: bool,
    /// The status of `GET /health`.
    pub health: u16,
    /// Answers 404 to a model name other than `model`.
    pub check_model: bool,
    /// Puts `x-request-id` on every answer.
    pub request_id_header: bool,
    /// Sends a stream's head as soon as the request is complete, not with the
    /// first token.
    pub early_head: bool,
    /// How long a connection may stay idle after an answer.
    pub keepalive: Duration,
    /// How many bytes of each body the log keeps.
    pub keep_body_bytes: usize,
    /// Whether the log holds each body as parsed JSON. Benches turn it off.
    pub keep_json: bool,
    /// Whether the log holds the bytes of each answer.
    pub keep_response: bool,
    /// How many requests the log holds; the oldest half goes first.
    pub log_requests_max: usize,
    /// TLS on a TCP port.
    pub tls: Option<crate::Tls>,
}

impl Default for EngineConfig {
    /// Both roles, no delays, 32 tokens, every check on.
    fn default() -> Self {
        Self {
            role: Role::Both,
            ttft: Duration::ZERO,
            itl: Duration::ZERO,
            tokens: 32,
            model: "mock-model".to_owned(),
            rank: 0,
            data_parallel_size: 1,
            name: "mock-engine".to_owned(),
            cached_tokens: CACHED_BY_ROLE,
            strict: true,
            contract: KvContract::Nixlv2,
            bootstrap: None,
            authorization: None,
            flat_blocks: false,
            handoff: HandoffShape::Fresh,
            verify_handoff: None,
            usage: UsageShape::Details,
            null_usage_in_chunks: false,
            echo: true,
            health: 200,
            check_model: false,
            request_id_header: false,
            early_head: false,
            keepalive: Duration::from_secs(5),
            keep_body_bytes: 64 << 20,
            keep_json: true,
            keep_response: false,
            log_requests_max: 100_000,
            tls: None,
        }
    }
}

impl EngineConfig {
    /// The default with [`Role::Prefill`].
    #[must_use]
    pub fn prefill() -> Self {
        Self {
            role: Role::Prefill,
            name: "mock-prefill".to_owned(),
            ..Self::default()
        }
    }

    /// The default with [`Role::Encoder`].
    #[must_use]
    pub fn encoder() -> Self {
        Self {
            role: Role::Encoder,
            name: "mock-encoder".to_owned(),
            ..Self::default()
        }
    }

    /// The default with [`Role::Decode`].
    #[must_use]
    pub fn decode() -> Self {
        Self {
            role: Role::Decode,
            name: "mock-decode".to_owned(),
            ..Self::default()
        }
    }
}
