//! Where the two legs of a request find each other: rooms, transfer ids, request ids.
//!
//! Each leg arrives once; a second arrival on the same side, another prompt, or other terms than
//! the other leg's are told to whoever comes later.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

use super::fields::broken;
use crate::api::Refusal;
use crate::sync::Guarded;

/// Meetings that are remembered; the oldest is forgotten first.
const MEETINGS_MAX: usize = 65_536;

/// A side of a meeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Prefill,
    Decode,
}

/// What a leg says when it arrives.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Arrival {
    prompt_sha256: String,
    terms: String,
}

#[derive(Debug, Default)]
struct Meeting {
    prefill: Option<Arrival>,
    decode: Option<Arrival>,
}

#[derive(Debug, Default)]
struct Book {
    meetings: HashMap<String, Meeting>,
    order: VecDeque<String>,
}

#[derive(Debug, Default)]
struct Inner {
    book: Guarded<Book>,
    changed: Notify,
    prefill_waits: AtomicBool,
    decode_hastens: AtomicBool,
}

/// The meetings of the engines that share it. Clones share one book.
#[derive(Clone, Debug, Default)]
pub struct Meetings(Arc<Inner>);

impl Meetings {
    /// None yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// None yet, and no leg waits for another: for engines in processes of their own.
    pub(crate) fn apart() -> Self {
        let meetings = Self::default();
        meetings.decode_waits(false);
        meetings
    }

    /// Whether a prefill leg's answer waits for the decode leg, as a decode leg's always waits for
    /// the prefill leg. Then only a proxy that sends both at once gets an answer at all.
    pub fn prefill_waits(&self, waits: bool) {
        self.0.prefill_waits.store(waits, Ordering::Relaxed);
    }

    /// Whether a decode leg's answer waits for the prefill leg; it does unless told otherwise.
    pub fn decode_waits(&self, waits: bool) {
        self.0.decode_hastens.store(!waits, Ordering::Relaxed);
    }

    /// The keys of all meetings, in the order of their first arrivals.
    #[must_use]
    pub fn keys(&self) -> Vec<String> {
        self.0.book.lock().order.iter().cloned().collect()
    }

    /// How many meetings both legs have come to.
    #[must_use]
    pub fn complete(&self) -> usize {
        let book = self.0.book.lock();
        let complete = |meeting: &&Meeting| meeting.prefill.is_some() && meeting.decode.is_some();
        book.meetings.values().filter(complete).count()
    }

    /// A leg arrives, and may wait for the other.
    ///
    /// `terms` is what both legs must agree on; empty agrees with anything.
    pub(crate) fn arrive(
        &self,
        side: Side,
        key: &str,
        prompt_sha256: &str,
        terms: &str,
    ) -> Result<Option<Wait>, Refusal> {
        let arrival = Arrival {
            prompt_sha256: prompt_sha256.to_owned(),
            terms: terms.to_owned(),
        };
        let mut book = self.0.book.lock();
        if !book.meetings.contains_key(key) {
            if book.order.len() >= MEETINGS_MAX
                && let Some(oldest) = book.order.pop_front()
            {
                book.meetings.remove(&oldest);
            }
            book.order.push_back(key.to_owned());
        }
        let meeting = book.meetings.entry(key.to_owned()).or_default();
        let (own, other) = match side {
            Side::Prefill => (&mut meeting.prefill, &meeting.decode),
            Side::Decode => (&mut meeting.decode, &meeting.prefill),
        };
        if own.is_some() {
            return Err(broken(format!("{key}: used twice by {side:?} legs")));
        }
        if let Some(other) = other {
            agree(key, &arrival, other)?;
        }
        *own = Some(arrival);
        drop(book);
        self.0.changed.notify_waiters();
        let waits = match side {
            Side::Prefill => self.0.prefill_waits.load(Ordering::Relaxed),
            Side::Decode => !self.0.decode_hastens.load(Ordering::Relaxed),
        };
        Ok(waits.then(|| Wait {
            meetings: self.clone(),
            key: key.to_owned(),
        }))
    }

    fn is_complete(&self, key: &str) -> bool {
        let book = self.0.book.lock();
        book.meetings
            .get(key)
            .is_some_and(|meeting| meeting.prefill.is_some() && meeting.decode.is_some())
    }
}

fn agree(key: &str, own: &Arrival, other: &Arrival) -> Result<(), Refusal> {
    if own.prompt_sha256 != other.prompt_sha256 {
        return Err(broken(format!("{key}: the legs have different prompts")));
    }
    if own.terms != other.terms && !own.terms.is_empty() && !other.terms.is_empty() {
        let (own, other) = (&own.terms, &other.terms);
        return Err(broken(format!("{key}: one leg has {own}, one {other}")));
    }
    Ok(())
}

/// What an answer waits for: the other leg.
#[derive(Debug)]
pub(crate) struct Wait {
    meetings: Meetings,
    key: String,
}

impl Wait {
    /// Returns once both legs are there.
    pub(crate) async fn met(&self) {
        loop {
            let changed = self.meetings.0.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if self.meetings.is_complete(&self.key) {
                return;
            }
            changed.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn legs_meet_once_and_agree() {
        let meetings = Meetings::new();
        let arrive = |side, key, sha, terms| {
            meetings
                .arrive(side, key, sha, terms)
                .map(|wait| wait.is_some())
                .map_err(|refusal| refusal.message)
        };
        assert_eq!(arrive(Side::Decode, "1", "a", ""), Ok(true));
        assert_eq!(arrive(Side::Prefill, "1", "a", "x"), Ok(false));
        assert!(
            arrive(Side::Decode, "1", "a", "")
                .unwrap_err()
                .contains("twice")
        );
        assert_eq!(arrive(Side::Prefill, "2", "a", "x"), Ok(false));
        let terms = arrive(Side::Decode, "2", "a", "y").unwrap_err();
        assert!(terms.contains("one leg has y, one x"), "{terms}");
        let prompt = arrive(Side::Decode, "2", "b", "x").unwrap_err();
        assert!(prompt.contains("different prompts"), "{prompt}");
        assert_eq!(meetings.complete(), 1);
        assert_eq!(meetings.keys(), ["1", "2"]);
        meetings.prefill_waits(true);
        assert_eq!(arrive(Side::Prefill, "3", "a", ""), Ok(true));
    }

    #[test]
    fn a_wait_ends_with_the_other_leg() {
        let meetings = Meetings::new();
        let wait = meetings
            .arrive(Side::Decode, "1", "a", "")
            .unwrap()
            .unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let thread = std::thread::spawn(move || {
            meetings
                .arrive(Side::Prefill, "1", "a", "")
                .map(drop)
                .unwrap();
        });
        runtime.block_on(wait.met());
        thread.join().unwrap();
    }
}
