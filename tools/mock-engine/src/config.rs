//! Settings of an engine: its role, its timing, and its deviations from a well-behaved vLLM.
//!
//! They are fixed while the engine runs. A test changes behaviour at run time with a
//! [`crate::Fault`] or a method of [`crate::Engine`].

use std::time::Duration;

use serde::Deserialize;

use crate::kv::{EngineIds, KvContract};
use crate::pace::Jitter;
use crate::pd::HandoffRegistry;

/// The `cached_tokens` value that means "7 for a prefill request, 49 for any other".
///
/// These are the two numbers that pd-sidecar's own test engines report.
pub const CACHED_BY_ROLE: u64 = u64::MAX;

/// Selects which legs of a split request an engine accepts.
///
/// With [`KvContract::Nixlv2`], the roles other than `Encoder` also serve every request without
/// `kv_transfer_params`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Accepts prefill legs only. With [`KvContract::Nixlv2`], these are the requests with
    /// `do_remote_decode: true`, and a request with `do_remote_prefill: true` gets a 500.
    Prefill,
    /// Accepts decode legs only. With [`KvContract::Nixlv2`], these are the requests with
    /// `do_remote_prefill: true`, and a request with `do_remote_decode: true` gets a 500.
    Decode,
    /// Accepts prefill and decode legs. If only the role identifies a prefill leg
    /// ([`KvContract::SharedStorage`], [`KvContract::Sglang`], [`KvContract::Lmcache`]), every leg
    /// is treated as a decode leg.
    Both,
    /// Accepts chat completion requests with one item, such as an image, and returns the
    /// `ec_transfer_params` for it.
    Encoder,
}

/// The shape of the `usage` member of a response. The names below are those of the chat completions
/// API; other APIs use their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UsageShape {
    /// `usage` has `prompt_tokens_details: {"cached_tokens": n}`.
    Details,
    /// `usage` has `prompt_tokens_details: {}`.
    EmptyDetails,
    /// `usage` has `prompt_tokens_details: null`, as vLLM sends it by default.
    NullDetails,
    /// `usage` has no `prompt_tokens_details` member.
    WithoutDetails,
    /// The response has `usage: null`.
    Null,
    /// No `usage` member, and no usage event in a stream.
    Missing,
}

/// The shape of `kv_transfer_params` in a prefill response, or of `ec_transfer_params` in an
/// encoder's response. Contracts other than [`KvContract::Nixlv2`] distinguish only some of the
/// shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HandoffShape {
    /// A new handoff object with numbers, escapes and whitespace that no JSON library reproduces
    /// when it parses and prints the object again.
    Fresh,
    /// A new handoff object like `Fresh`, but with `remote_block_ids` as a flat list.
    Flat,
    /// The response has no handoff member.
    Omit,
    /// The handoff is `null`.
    Null,
    /// The handoff is the empty object `{}`.
    Empty,
    /// The handoff is a string instead of an object.
    Text,
    /// The handoff is a list instead of an object.
    List,
    /// The most recent handoff object that the engine issued (`Fresh`, `Flat` or `Decoys`), sent
    /// again; a new one if it has not issued any.
    Stale,
    /// A new handoff object, preceded by a `metadata` member that contains another
    /// `kv_transfer_params` object and a string with the text `"kv_transfer_params":{`.
    Decoys,
}

/// The configuration of an [`crate::Engine`]; see [`EngineConfig::default`].
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// The role of the engine: the legs of split requests that it accepts.
    pub role: Role,
    /// Time from the complete request to the first token.
    pub ttft: Duration,
    /// Time from one token to the next. With zero, tokens are written as fast as the socket accepts
    /// them.
    pub itl: Duration,
    /// Largest random deviation of `ttft` and of each `itl`.
    pub jitter: Jitter,
    /// Seed of the random deviations.
    pub seed: u64,
    /// Tokens per choice in a response. A lower token limit in the request lowers this number, and
    /// a higher `min_tokens` raises it. With `ignore_eos`, the response has as many tokens as the
    /// limit.
    pub tokens: u32,
    /// The model name in responses and in `/v1/models`.
    pub model: String,
    /// The data-parallel rank, for the `engine` label in `/metrics`.
    pub rank: u32,
    /// The number of data-parallel ranks. An inference request whose `X-data-parallel-rank` header
    /// field is negative or not below this number gets a 400. The responses API ignores the field.
    pub data_parallel_size: u32,
    /// The version that `GET /version` states; if empty, it gets a 404.
    pub version: String,
    /// The `remote_engine_id` of NIXL version 2 handoffs, and part of the engine's thread name.
    pub name: String,
    /// The number of cached tokens that `usage` reports. [`CACHED_BY_ROLE`]: 7 for a prefill leg,
    /// 49 for any other request.
    pub cached_tokens: u64,
    /// Whether to check prefill legs against pd-sidecar's contract, to verify handoffs (if
    /// `verify_handoff` is set), and to respond 500 to a `kv_transfer_params` that crashes a real
    /// engine: one that is not an object, or in which neither or both of `do_remote_decode` and
    /// `do_remote_prefill` are `true`.
    ///
    /// Only [`KvContract::Nixlv2`] uses this setting. Turn it off to let such an engine accept the
    /// `kv_transfer_params` of other connectors.
    pub strict: bool,
    /// The KV connector whose requests the engine expects.
    pub contract: KvContract,
    /// The engine ids that Mooncake's `GET /query` returns. `None`: `/query` is an unknown path.
    pub bootstrap: Option<EngineIds>,
    /// The `authorization` value that inference requests must have; requests with another value or
    /// none get a 401. `None` accepts every request.
    pub authorization: Option<String>,
    /// Sends `remote_block_ids` as a flat list, as older vLLM releases did. Affects
    /// [`HandoffShape::Fresh`] only.
    pub flat_blocks: bool,
    /// The shape of `kv_transfer_params` in prefill responses, or of `ec_transfer_params` in an
    /// encoder's responses.
    pub handoff: HandoffShape,
    /// The registry that records issued handoffs and verifies them when a decode leg returns them.
    /// `None`: the engine records handoffs in a private registry and verifies nothing.
    pub verify_handoff: Option<HandoffRegistry>,
    /// The shape of the `usage` member in responses.
    pub usage: UsageShape,
    /// Puts `"usage": null` into every event of a chat or completions stream except the final usage
    /// event. Has no effect on a request with `continuous_usage_stats`.
    pub null_usage_in_chunks: bool,
    /// Responds to unknown paths with a description of the request. If off, the response is vLLM's
    /// 404 or 405.
    pub echo: bool,
    /// Serves the APIs other than generation (embeddings, tokens, scores); if off, their paths are
    /// unknown. Reports at most as many cached tokens as the prompt has and, for
    /// [`CACHED_BY_ROLE`], all of them for the decode leg of NIXL version 2 and none for any other
    /// request. Refuses invalid tool choices and response formats.
    pub look_alike: bool,
    /// The HTTP status of `GET /health` and `GET /ping` until [`crate::Engine::set_health`] changes
    /// it.
    pub health: u16,
    /// Responds 404 to inference requests that name a model other than `model`.
    pub check_model: bool,
    /// Adds `x-request-id` to every successful inference response.
    pub request_id_header: bool,
    /// Sends the head of a stream as soon as the request is complete, not with the first token.
    pub early_head: bool,
    /// Maximum idle time of a connection after a response.
    pub keepalive: Duration,
    /// Maximum number of bytes of each request body that the log keeps.
    pub keep_body_bytes: usize,
    /// Whether the log keeps the body of each inference request as parsed JSON. Benchmarks turn it
    /// off.
    pub keep_json: bool,
    /// Whether the log keeps the bytes of each response.
    pub keep_response: bool,
    /// Maximum number of requests in the log; when it is reached, the older half is dropped.
    pub log_requests_max: usize,
    /// TLS configuration for TCP connections; `None` serves plain text.
    pub tls: Option<crate::Tls>,
}

impl Default for EngineConfig {
    /// Returns a configuration with [`Role::Both`], no delays, 32 tokens, and all checks of
    /// `strict`.
    fn default() -> Self {
        Self {
            role: Role::Both,
            ttft: Duration::ZERO,
            itl: Duration::ZERO,
            jitter: Jitter::None,
            seed: 0,
            tokens: 32,
            model: "mock-model".to_owned(),
            rank: 0,
            data_parallel_size: 1,
            version: "0.32.0".to_owned(),
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
            look_alike: false,
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
    /// Returns the default configuration with [`Role::Prefill`] and the name `mock-prefill`.
    #[must_use]
    pub fn prefill() -> Self {
        Self {
            role: Role::Prefill,
            name: "mock-prefill".to_owned(),
            ..Self::default()
        }
    }

    /// Returns the default configuration with [`Role::Encoder`] and the name `mock-encoder`.
    #[must_use]
    pub fn encoder() -> Self {
        Self {
            role: Role::Encoder,
            name: "mock-encoder".to_owned(),
            ..Self::default()
        }
    }

    /// Returns the default configuration with [`Role::Decode`] and the name `mock-decode`.
    #[must_use]
    pub fn decode() -> Self {
        Self {
            role: Role::Decode,
            name: "mock-decode".to_owned(),
            ..Self::default()
        }
    }
}
