//! The engines of prefill servers, as their bootstrap servers listed them.

use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use crate::fleet::Target;
use crate::limits::{BOOTSTRAP_SECS_MAX, BOOTSTRAPS_MAX};
use crate::net::Instant;
use crate::pd::BootstrapEngine;

/// A shard's cache of the engine lists that Mooncake bootstrap servers returned. A list is used for
/// at most `BOOTSTRAP_SECS_MAX` seconds.
#[derive(Debug, Default)]
pub(super) struct EngineCache {
    known: HashMap<Target, Known>,
}

#[derive(Debug)]
struct Known {
    engines: Rc<[BootstrapEngine]>,
    since: Instant,
}

impl EngineCache {
    /// Returns the engine list of a prefill server, if the cache has one that is not too old.
    pub(super) fn get(&self, target: &Target, now: Instant) -> Option<Rc<[BootstrapEngine]>> {
        let known = self.known.get(target)?;
        let is_young = now.since(known.since) < Duration::from_secs(BOOTSTRAP_SECS_MAX);
        is_young.then(|| Rc::clone(&known.engines))
    }

    /// Stores the engine list of a prefill server, instead of the oldest one if the cache is full.
    pub(super) fn put(&mut self, target: &Target, engines: Rc<[BootstrapEngine]>, now: Instant) {
        if self.known.len() >= BOOTSTRAPS_MAX {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.since);
            if let Some(oldest) = oldest.map(|(target, _)| target.clone()) {
                self.known.remove(&oldest);
            }
        }
        let since = now;
        self.known.insert(target.clone(), Known { engines, since });
    }

    /// Removes a prefill server's engine list from the cache, so that the next use queries it
    /// again. The server may have been restarted with new engine ids.
    pub(super) fn forget(&mut self, target: &Target) {
        self.known.remove(target);
    }
}
