//! The identities of prefillers that push KV cache, as a shard has learned them.
//!
//! An identity that changes repeatedly is not that of one engine: a load balancer or several
//! data-parallel ranks share one port. Such a prefiller is used in the serial order for some time,
//! where every request has the identity from its own handoff.

use std::collections::HashMap;
use std::time::Duration;

use crate::fleet::Target;
use crate::limits::{PUSH_CHANGES_SECS, PUSH_PREFILLERS_MAX, PUSH_SERIAL_SECS};
use crate::net::Instant;
use crate::pd::push::PushIdentity;

/// The prefillers of a shard that push.
#[derive(Debug, Default)]
pub(super) struct PushBook {
    known: HashMap<Target, Entry>,
}

#[derive(Debug)]
struct Entry {
    identity: PushIdentity,
    /// Whether requests may rely on the identity. They may not after a failure, until the identity
    /// has been confirmed.
    is_usable: bool,
    learned_at: Instant,
    changed_at: Option<Instant>,
    serial_until: Option<Instant>,
}

/// The news in a handoff about the identity of its prefiller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Learned {
    /// Nothing that was not known, or the first identity.
    Plain,
    /// The identity is not the previous one.
    Changed,
    /// The identity has changed twice within `PUSH_CHANGES_SECS`, so the serial order is used.
    Unstable,
}

impl PushBook {
    /// Returns the identity with which the legs of a request to this prefiller can start together;
    /// `None` if the legs must run one after the other. Calls `now` only for a known prefiller.
    pub(super) fn get(
        &self,
        prefiller: &Target,
        now: impl Fn() -> Instant,
    ) -> Option<PushIdentity> {
        let entry = self.known.get(prefiller)?;
        let is_serial = entry.serial_until.is_some_and(|until| now() < until);
        (entry.is_usable && !is_serial).then(|| entry.identity.clone())
    }

    /// Stores the identity in a handoff of this prefiller.
    pub(super) fn learn(
        &mut self,
        prefiller: &Target,
        identity: &PushIdentity,
        now: Instant,
    ) -> Learned {
        let Some(entry) = self.known.get_mut(prefiller) else {
            self.make_room();
            let entry = Entry {
                identity: identity.clone(),
                is_usable: true,
                learned_at: now,
                changed_at: None,
                serial_until: None,
            };
            self.known.insert(prefiller.clone(), entry);
            return Learned::Plain;
        };
        entry.learned_at = now;
        entry.is_usable = true;
        if entry.identity == *identity {
            return Learned::Plain;
        }
        entry.identity = identity.clone();
        if entry.serial_until.is_some_and(|until| now < until) {
            return Learned::Changed;
        }
        let previous = entry.changed_at.replace(now);
        let window = Duration::from_secs(PUSH_CHANGES_SECS);
        if previous.is_some_and(|at| now.since(at) < window) {
            entry.serial_until = Some(now.after(Duration::from_secs(PUSH_SERIAL_SECS)));
            return Learned::Unstable;
        }
        Learned::Changed
    }

    /// Requires that the identity of this prefiller is confirmed by a handoff before it is used
    /// again.
    pub(super) fn distrust(&mut self, prefiller: &Target) {
        if let Some(entry) = self.known.get_mut(prefiller) {
            entry.is_usable = false;
        }
    }

    fn make_room(&mut self) {
        if self.known.len() < PUSH_PREFILLERS_MAX {
            return;
        }
        let oldest = self.known.iter().min_by_key(|(_, entry)| entry.learned_at);
        if let Some(oldest) = oldest.map(|(target, _)| target.clone()) {
            self.known.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(engine: &str) -> PushIdentity {
        let handoff = format!(
            r#"{{"transfer_mode":"push","remote_engine_id":"{engine}","remote_host":"h","remote_port":1,"tp_size":1}}"#
        );
        PushIdentity::of(handoff.as_bytes()).unwrap()
    }

    fn target(port: usize) -> Target {
        Target::parse(format!("10.0.0.1:{port}").as_bytes()).unwrap()
    }

    fn at(seconds: u64) -> Instant {
        Instant::default().after(Duration::from_secs(seconds))
    }

    #[test]
    fn an_identity_is_used_until_a_failure_and_again_once_confirmed() {
        let mut book = PushBook::default();
        let one = target(1);
        assert_eq!(book.get(&one, || at(0)), None);
        assert_eq!(book.learn(&one, &identity("a"), at(0)), Learned::Plain);
        assert_eq!(book.get(&one, || at(1)), Some(identity("a")));
        assert_eq!(book.get(&target(2), || at(1)), None);
        book.distrust(&one);
        assert_eq!(book.get(&one, || at(2)), None);
        assert_eq!(book.learn(&one, &identity("a"), at(3)), Learned::Plain);
        assert_eq!(book.get(&one, || at(3)), Some(identity("a")));
    }

    #[test]
    fn two_changes_within_five_minutes_end_the_use_for_ten() {
        let mut book = PushBook::default();
        let one = target(1);
        let learn =
            |book: &mut PushBook, engine, seconds| book.learn(&one, &identity(engine), at(seconds));
        assert_eq!(learn(&mut book, "a", 0), Learned::Plain);
        assert_eq!(learn(&mut book, "b", 10), Learned::Changed);
        assert_eq!(learn(&mut book, "c", 309), Learned::Unstable);
        assert_eq!(book.get(&one, || at(310)), None);
        assert_eq!(learn(&mut book, "d", 400), Learned::Changed);
        assert_eq!(book.get(&one, || at(908)), None);
        assert_eq!(book.get(&one, || at(909)), Some(identity("d")));
    }

    #[test]
    fn restarts_that_are_far_apart_do_not_count_as_unstable() {
        let mut book = PushBook::default();
        let one = target(1);
        for (round, engine) in ["a", "b", "c", "d"].into_iter().enumerate() {
            let now = at(300 * round as u64);
            let learned = book.learn(&one, &identity(engine), now);
            assert_ne!(learned, Learned::Unstable, "{engine}");
            assert_eq!(book.get(&one, || now), Some(identity(engine)));
        }
    }

    #[test]
    fn a_distrusted_identity_that_has_changed_counts_as_a_change() {
        let mut book = PushBook::default();
        let one = target(1);
        let learned = ["a", "b", "c"].map(|engine| {
            book.distrust(&one);
            book.learn(&one, &identity(engine), at(1))
        });
        assert_eq!(
            learned,
            [Learned::Plain, Learned::Changed, Learned::Unstable]
        );
    }

    #[test]
    fn the_book_has_a_bound() {
        let mut book = PushBook::default();
        for port in 0..PUSH_PREFILLERS_MAX + 10 {
            book.learn(&target(port + 1), &identity("a"), at(port as u64));
        }
        assert_eq!(book.known.len(), PUSH_PREFILLERS_MAX);
        assert_eq!(book.get(&target(1), || at(9999)), None);
        assert!(
            book.get(&target(PUSH_PREFILLERS_MAX + 10), || at(9999))
                .is_some()
        );
    }
}
