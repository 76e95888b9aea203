//! Properties of engines that a shard has asked for, kept for a limited time.

use std::collections::HashMap;
use std::time::Duration;

use crate::fleet::Target;
use crate::net::Instant;

/// A cache with one value per engine. A value is used for at most `age_max`.
#[derive(Debug)]
pub(super) struct TargetCache<T> {
    known: HashMap<Target, Known<T>>,
    entries_max: usize,
    age_max: Duration,
}

#[derive(Debug)]
struct Known<T> {
    value: T,
    since: Instant,
}

impl<T: Clone> TargetCache<T> {
    /// Creates a cache of at most `entries_max` values.
    pub(super) fn new(entries_max: usize, age_max: Duration) -> Self {
        Self {
            known: HashMap::new(),
            entries_max,
            age_max,
        }
    }

    /// Returns the value of an engine, if the cache has one that is not too old. Calls `now` only
    /// if it has one.
    pub(super) fn get(&self, target: &Target, now: impl Fn() -> Instant) -> Option<T> {
        let known = self.known.get(target)?;
        (now().since(known.since) < self.age_max).then(|| known.value.clone())
    }

    /// Stores the value of an engine, instead of the oldest one if the cache is full.
    pub(super) fn put(&mut self, target: &Target, value: T, now: Instant) {
        if self.known.len() >= self.entries_max && !self.known.contains_key(target) {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.since);
            if let Some(oldest) = oldest.map(|(target, _)| target.clone()) {
                self.known.remove(&oldest);
            }
        }
        self.known
            .insert(target.clone(), Known { value, since: now });
    }

    /// Removes the value of an engine, so that the next use asks it again. It may have been
    /// restarted.
    pub(super) fn forget(&mut self, target: &Target) {
        self.known.remove(target);
    }
}
