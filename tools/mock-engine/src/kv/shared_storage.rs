//! The shared-storage contract: the prefill engine fills a store. If a decode leg has a
//! `cache_hit_threshold` above 0 and its prompt is not in the store, the decode engine returns the
//! finish reason `cache_threshold` without generating a token.

use std::collections::HashSet;
use std::sync::Arc;

use super::fields::{Cap, broken, is, one_token};
use super::{Admitted, Call, is_prefill_engine};
use crate::api::Refusal;
use crate::sync::Guarded;

/// Maximum number of prompts in a store; beyond it, the store is cleared.
const PROMPTS_MAX: usize = 65_536;

#[derive(Debug, Default)]
struct Inner {
    prompts: HashSet<String>,
    warm: bool,
}

/// The prompts whose KV cache is in the store. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Store(Arc<Guarded<Inner>>);

impl Store {
    /// Returns an empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether every prompt counts as stored.
    pub fn set_warm(&self, warm: bool) {
        self.0.lock().warm = warm;
    }

    /// Returns the number of prompts that prefill engines have stored.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.lock().prompts.len()
    }

    /// Returns whether no prefill engine has stored a prompt.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn put(&self, prompt_sha256: &str) {
        let mut inner = self.0.lock();
        if inner.prompts.len() >= PROMPTS_MAX {
            inner.prompts.clear();
        }
        inner.prompts.insert(prompt_sha256.to_owned());
    }

    fn has(&self, prompt_sha256: &str) -> bool {
        let inner = self.0.lock();
        inner.warm || inner.prompts.contains(prompt_sha256)
    }
}

pub(super) fn admit(store: &Store, call: &Call<'_>) -> Result<Admitted, Refusal> {
    if is_prefill_engine(call) {
        one_token(call.fields, call.kind, Cap::Set, Cap::IfGiven)?;
        is(call.fields, "cache_hit_threshold", "0")?;
        store.put(call.prompt_sha256);
        return Ok(Admitted {
            is_prefill: true,
            ..Admitted::default()
        });
    }
    let least = match call.fields.some("cache_hit_threshold") {
        None => 0.0,
        Some(raw) => raw
            .parse::<f64>()
            .map_err(|_| broken(format!("cache_hit_threshold: want a number, got {raw}")))?,
    };
    Ok(Admitted {
        cold: least > 0.0 && !store.has(call.prompt_sha256),
        ..Admitted::default()
    })
}
