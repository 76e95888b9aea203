//! A vLLM look-alike for tests, demos and benches.
//!
//! It speaks the HTTP of a vLLM server down to the bytes, keeps a log of what
//! it received, checks the two-step prefill/decode exchange, and misbehaves on
//! request. It has no model: the text of an answer is a function of the hash
//! of its prompt ([`expected_text`]), so that a test can tell whose answer it
//! is looking at and whether a piece of it is missing.
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
mod exchange;
mod fault;
mod http;
mod infer;
mod json;
mod kv;
mod listener;
mod log;
mod pages;
mod pd;
mod response;
mod send;
mod sync;
mod tls;
mod wire;

pub use cli::run_cli;
pub use config::{CACHED_BY_ROLE, EngineConfig, HandoffShape, Role, UsageShape};
pub use engine::{Engine, Load};
pub use fault::Fault;
pub use kv::{
    BlockBook, EngineIds, KvContract, Meetings, Mooncake, Mori, Returned, Store, dp_rank,
    encoded_params,
};
pub use listener::Place;
pub use log::{AbortPhase, Counters, Framing, Seen, State};
pub use pd::HandoffRegistry;
pub use response::{FOREIGN_TAG, expected_text, expected_token_ids};
pub use tls::Tls;
