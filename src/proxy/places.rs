//! The places for client connections of a process, and their distribution over its shards.
//!
//! The kernel assigns a connection to one of the listening sockets of a port by a hash of its
//! addresses (`SO_REUSEPORT`). Of four connections to four shards, three then often meet in one
//! shard. So a place belongs to the shard with the fewest connections, and a shard that accepts a
//! connection for another one hands it over.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::limits::PLACES_FEW;

/// The places for client connections of a process. Usable from any thread.
#[derive(Debug)]
pub struct Places {
    taken: AtomicUsize,
    max: usize,
    of_shards: Box<[Taken]>,
}

/// The places that belong to one shard. In a cache line for itself, because shards write them with
/// each connection.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Taken(AtomicUsize);

impl Places {
    /// Returns `max` free places for `shards` shards.
    #[must_use]
    pub fn new(max: usize, shards: usize) -> Arc<Self> {
        Arc::new(Self {
            taken: AtomicUsize::new(0),
            max,
            of_shards: (0..shards).map(|_| Taken::default()).collect(),
        })
    }

    /// Returns the number of places.
    #[must_use]
    pub const fn max(&self) -> usize {
        self.max
    }

    /// Returns whether there are few places left, so that one must not be taken in vain.
    #[must_use]
    pub fn is_nearly_full(&self) -> bool {
        self.taken.load(Ordering::Relaxed) + PLACES_FEW >= self.max
    }

    /// Takes a place for one more connection, which belongs to no shard yet. Returns `None` at the
    /// limit.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Option<Place> {
        let one_more = |taken: usize| (taken < self.max).then_some(taken + 1);
        self.taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more)
            .ok()?;
        Some(Place {
            places: Some(Arc::clone(self)),
            shard: None,
        })
    }

    /// Returns a place of a shard that [`Place::keep`] has kept taken.
    pub(super) fn give_back(&self, shard: usize) {
        self.of_shards[shard].0.fetch_sub(1, Ordering::Relaxed);
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }

    /// Returns the shard that should serve a connection that `accepting` accepts.
    #[must_use]
    pub fn choose(&self, accepting: usize) -> usize {
        let taken = self
            .of_shards
            .iter()
            .map(|one| one.0.load(Ordering::Relaxed));
        choose(accepting, taken)
    }
}

/// Returns the shard with the fewest connections, given the number of each, or `accepting` if it
/// has hardly more: handing a connection over costs two wake-ups.
fn choose(accepting: usize, taken: impl Iterator<Item = usize> + Clone) -> usize {
    let own = taken.clone().nth(accepting).unwrap_or(0);
    match taken.enumerate().min_by_key(|(_, taken)| *taken) {
        Some((shard, least)) if own > least + own / 8 => shard,
        _ => accepting,
    }
}

/// A place for a client connection, which is taken until this is dropped.
#[derive(Debug)]
pub struct Place {
    /// `None` once it is kept.
    places: Option<Arc<Places>>,
    shard: Option<usize>,
}

impl Place {
    /// Makes the place that of a shard, which counts it from now on, instead of the one before.
    pub fn assign(&mut self, shard: usize) {
        self.leave();
        if let Some(places) = &self.places {
            places.of_shards[shard].0.fetch_add(1, Ordering::Relaxed);
            self.shard = Some(shard);
        }
    }

    /// Keeps the place taken, and that of its shard, until [`Places::give_back`]. A session keeps
    /// its place like this because the shard knows both, and idle sessions must be small.
    pub(super) fn keep(mut self) {
        self.places = None;
    }

    fn leave(&mut self) {
        if let (Some(places), Some(shard)) = (&self.places, self.shard.take()) {
            places.of_shards[shard].0.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.leave();
        if let Some(places) = &self.places {
            places.taken.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shard_with_the_fewest_connections_is_chosen() {
        for (accepting, taken, want) in [
            (0, &[0][..], 0),
            (0, &[9], 0),
            (0, &[0, 0], 0),
            (1, &[0, 0], 1),
            // One more than another shard, of few.
            (0, &[1, 0], 1),
            (0, &[7, 6], 1),
            // A small part of many.
            (0, &[8, 7], 0),
            (0, &[8, 6], 1),
            (2, &[800, 701, 800], 2),
            (2, &[800, 699, 800], 1),
            (1, &[3, 0, 2, 0], 1),
            (0, &[3, 2, 1, 0], 3),
        ] {
            let chosen = choose(accepting, taken.iter().copied());
            assert_eq!(chosen, want, "{accepting} of {taken:?}");
        }
    }

    /// However the kernel assigns connections, and whichever of them close.
    #[test]
    fn connections_are_distributed_evenly() {
        for shards in [2, 4, 16] {
            let places = Places::new(usize::MAX, shards);
            let mut open: Vec<Place> = Vec::new();
            let mut random = 7_u64;
            for _ in 0..5_000 {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                // Most arrive at one shard.
                let accepting = (random >> 40) as usize % shards / 2;
                let mut place = places.take().unwrap();
                place.assign(places.choose(accepting));
                open.push(place);
                let mut counts = vec![0; shards];
                let of_shards = open.iter().filter_map(|place| place.shard);
                of_shards.for_each(|shard| counts[shard] += 1);
                let (most, least) = (counts.iter().max().unwrap(), counts.iter().min().unwrap());
                assert!(*most <= least + most / 8 + 1, "{counts:?}");
            }
            open.clear();
            assert!(
                places
                    .of_shards
                    .iter()
                    .all(|one| one.0.load(Ordering::Relaxed) == 0)
            );
        }
    }

    #[test]
    fn there_are_no_more_places_than_the_limit() {
        let places = Places::new(2, 2);
        let (mut first, second) = (places.take().unwrap(), places.take().unwrap());
        assert!(places.take().is_none());
        // A place without a shard is that of no connection.
        assert_eq!((places.choose(0), places.choose(1)), (0, 1));
        first.assign(0);
        assert_eq!(places.choose(0), 1);
        first.assign(1);
        assert_eq!((places.choose(0), places.choose(1)), (0, 0));
        drop(first);
        assert_eq!(places.choose(1), 1);
        assert!(places.take().is_some());
        drop(second);
        assert_eq!(places.taken.load(Ordering::Relaxed), 0);
    }
}
