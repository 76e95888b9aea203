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
    /// The bytes that all values together may have.
    bytes_max: usize,
    /// The bytes that they have.
    bytes: usize,
}

#[derive(Debug)]
struct Known<T> {
    value: T,
    bytes: usize,
    since: Instant,
}

impl<T: Clone> TargetCache<T> {
    /// Creates a cache of at most `entries_max` values.
    pub(super) fn new(entries_max: usize, age_max: Duration) -> Self {
        Self {
            known: HashMap::new(),
            entries_max,
            age_max,
            bytes_max: usize::MAX,
            bytes: 0,
        }
    }

    /// Limits the bytes of all values together.
    pub(super) fn with_bytes_max(self, bytes_max: usize) -> Self {
        Self { bytes_max, ..self }
    }

    /// Returns the value of an engine, if the cache has one that is not too old. Calls `now` only
    /// if it has one.
    pub(super) fn get(&self, target: &Target, now: impl Fn() -> Instant) -> Option<T> {
        let known = self.known.get(target)?;
        (now().since(known.since) < self.age_max).then(|| known.value.clone())
    }

    /// Stores the value of an engine, instead of the oldest one if the cache is full.
    pub(super) fn put(&mut self, target: &Target, value: T, now: Instant) {
        self.put_sized(target, value, 0, now);
    }

    /// Stores the value of an engine, which has `bytes` bytes, instead of the oldest one if the
    /// cache is full. Forgets those that are too old and, if the others have too many bytes
    /// together, all of them.
    pub(super) fn put_sized(&mut self, target: &Target, value: T, bytes: usize, now: Instant) {
        self.forget(target);
        let age_max = self.age_max;
        self.known
            .retain(|_, known| now.since(known.since) < age_max);
        self.bytes = self.known.values().map(|known| known.bytes).sum();
        if self.known.len() >= self.entries_max {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.since);
            if let Some(oldest) = oldest.map(|(target, _)| target.clone()) {
                self.forget(&oldest);
            }
        }
        if bytes > self.bytes_max - self.bytes {
            self.known.clear();
            self.bytes = 0;
        }
        if bytes <= self.bytes_max {
            let since = now;
            let known = Known {
                value,
                bytes,
                since,
            };
            self.known.insert(target.clone(), known);
            self.bytes += bytes;
        }
    }

    /// Removes the value of an engine, so that the next use asks it again. It may have been
    /// restarted.
    pub(super) fn forget(&mut self, target: &Target) {
        if let Some(known) = self.known.remove(target) {
            self.bytes -= known.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_all_values_are_limited() {
        let target = |nth: u32| Target::parse(format!("h{nth}:80").as_bytes()).unwrap();
        let at = |secs: u64| Instant(secs * 1_000_000_000);
        let age = Duration::from_secs(30);
        let mut cache = TargetCache::new(10, age).with_bytes_max(100);
        let has = |cache: &TargetCache<u32>, nth| cache.get(&target(nth), || at(40)).is_some();
        cache.put_sized(&target(0), 0, 40, at(0));
        cache.put_sized(&target(1), 1, 40, at(20));
        cache.put_sized(&target(1), 1, 60, at(20));
        assert_eq!(cache.bytes, 100);
        // The first value is too old.
        cache.put_sized(&target(2), 2, 40, at(40));
        assert_eq!([0, 1, 2].map(|nth| has(&cache, nth)), [false, true, true]);
        assert_eq!(cache.bytes, 100);
        // None is too old.
        cache.put_sized(&target(3), 3, 1, at(41));
        assert_eq!(
            [1, 2, 3].map(|nth| has(&cache, nth)),
            [false, false, true],
            "all others are forgotten"
        );
        cache.put_sized(&target(4), 4, 101, at(41));
        assert!(!has(&cache, 4), "too large");
        cache.forget(&target(3));
        assert_eq!(cache.bytes, 0);
    }
}
