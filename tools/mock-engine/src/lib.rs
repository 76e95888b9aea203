//! A mock vLLM server for tests, demos and benchmarks.
//!
//! It imitates the HTTP behaviour of a vLLM server, including response formats and error messages.
//! It logs every request, checks the legs of split requests, and misbehaves on request
//! ([`Fault`]). There is no model: the generated text is a function of the prompt's hash
//! ([`expected_text`]). From any part of a response a test can therefore determine which prompt it
//! belongs to, and whether a part is missing. Each token is one word, in prompts too.
//!
//! The default configuration suits tests of a proxy: it accepts any model and any path
//! ([`EngineConfig::check_model`], [`EngineConfig::echo`]). The command line ([`run_cli`]) is
//! stricter and has more APIs ([`EngineConfig::look_alike`]), so that a tool meets the errors of an
//! engine.
//!
//! ```
//! use mock_engine::{Engine, EngineConfig, HandoffRegistry};
//!
//! # fn main() -> std::io::Result<()> {
//! let handoffs = HandoffRegistry::new();
//! let prefill = Engine::start(
//!     EngineConfig {
//!         verify_handoff: Some(handoffs.clone()),
//!         ..EngineConfig::prefill()
//!     },
//!     0,
//! )?;
//! let decode = Engine::start(
//!     EngineConfig {
//!         verify_handoff: Some(handoffs),
//!         ..EngineConfig::decode()
//!     },
//!     0,
//! )?;
//! assert_ne!(prefill.port(), decode.port());
//! assert!(decode.requests().is_empty());
//! # Ok(())
//! # }
//! ```

mod api;
mod cli;
mod config;
mod continued;
mod engine;
mod events;
mod exchange;
mod extra;
mod fault;
mod fault_page;
mod form;
mod http;
mod infer;
mod json;
mod kv;
mod listener;
mod log;
mod logprobs;
mod metrics;
mod pace;
mod pages;
mod pd;
mod pooling;
mod response;
mod routes;
mod schema;
mod send;
mod stats;
mod sync;
mod tls;
mod token;
mod wire;

pub use cli::run_cli;
pub use config::{CACHED_BY_ROLE, EngineConfig, HandoffShape, Role, UsageShape};
pub use engine::{Engine, Load};
pub use fault::Fault;
pub use kv::{
    BlockBook, EngineIds, KvContract, Meetings, Mooncake, Mori, Push, Returned, Store, dp_rank,
    encoded_params,
};
pub use listener::Place;
pub use log::{AbortPhase, Counters, Framing, Seen, State};
pub use pace::Jitter;
pub use pd::HandoffRegistry;
pub use tls::Tls;
pub use token::{FOREIGN_TAG, expected_text, expected_token_ids, prompt_tokens};
