//! Matches the two legs of a split request by the key they share: a room, a transfer id or a
//! request id. A key and the legs that have arrived with it are a *meeting*.
//!
//! Each leg may arrive once. A leg is refused if a leg of its side has already arrived with its
//! key. It is also refused if the other leg has already arrived with another prompt or other
//! *terms*: values that both legs must agree on, such as the address of a bootstrap server.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

use super::fields::broken;
use crate::api::Refusal;
use crate::sync::Guarded;

/// Maximum number of split requests that a [`Meetings`] remembers; beyond it, the oldest is
/// dropped.
const MEETINGS_MAX: usize = 65_536;

/// The leg of a split request that arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Prefill,
    Decode,
}

/// The properties of a leg that has arrived. The other leg of the request must have the same.
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
    decode_does_not_wait: AtomicBool,
}

/// The split requests that a group of engines has received, by key, with the legs that have
/// arrived. Clones share their contents.
#[derive(Clone, Debug, Default)]
pub struct Meetings(Arc<Inner>);

impl Meetings {
    /// Returns a record without split requests, in which the response to a decode leg waits for the
    /// prefill leg.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns a record without split requests, in which the response to a leg never waits for the
    /// other leg. Use it for engines in separate processes.
    pub(crate) fn apart() -> Self {
        let meetings = Self::default();
        meetings.decode_waits(false);
        meetings
    }

    /// Sets whether the response to a prefill leg waits for the decode leg; off by default.
    ///
    /// If both legs wait, only a proxy that sends them concurrently receives a response.
    pub fn prefill_waits(&self, waits: bool) {
        self.0.prefill_waits.store(waits, Ordering::Relaxed);
    }

    /// Sets whether the response to a decode leg waits for the prefill leg; on by default.
    pub fn decode_waits(&self, waits: bool) {
        self.0.decode_does_not_wait.store(!waits, Ordering::Relaxed);
    }

    /// Returns the keys of all recorded split requests, in the order in which their first legs
    /// arrived.
    #[must_use]
    pub fn keys(&self) -> Vec<String> {
        self.0.book.lock().order.iter().cloned().collect()
    }

    /// Returns the number of recorded split requests of which both legs have arrived.
    #[must_use]
    pub fn complete(&self) -> usize {
        let book = self.0.book.lock();
        let complete = |meeting: &&Meeting| meeting.prefill.is_some() && meeting.decode.is_some();
        book.meetings.values().filter(complete).count()
    }

    /// Records the arrival of the leg `side` of the split request `key`. Returns a [`Wait`] if
    /// responses to this side wait for the other leg, otherwise `Ok(None)`.
    ///
    /// Both legs must have the same `terms`; empty terms match any other.
    ///
    /// # Errors
    ///
    /// Returns a 400 if a leg of this side has already arrived, or if the legs have different
    /// prompts or terms.
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
            Side::Decode => !self.0.decode_does_not_wait.load(Ordering::Relaxed),
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

/// Makes a response wait until the other leg of its split request has arrived.
#[derive(Debug)]
pub(crate) struct Wait {
    meetings: Meetings,
    key: String,
}

impl Wait {
    /// Waits until both legs have arrived.
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
    fn each_leg_arrives_once_and_must_agree_with_the_other() {
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
    fn a_wait_ends_when_the_other_leg_arrives() {
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
