//! The client connections of a shard that wait for a request, the longest idle first.
//!
//! At the limit on client connections, the longest idle ones are closed in favour of new ones.

use std::cell::RefCell;
use std::task::{Context, Waker};

/// Marks the end of the list.
const NONE: u32 = u32::MAX;

/// A doubly linked list in a vector, so that entering, leaving and closing take constant time.
#[derive(Debug)]
pub(super) struct IdleSessions {
    list: RefCell<List>,
}

#[derive(Debug)]
struct List {
    entries: Vec<Entry>,
    free: Vec<u32>,
    oldest: u32,
    newest: u32,
}

#[derive(Debug)]
struct Entry {
    older: u32,
    newer: u32,
    /// `None` once the session must close, and for a free entry.
    waker: Option<Waker>,
}

/// The place of an idle session in the list, which it leaves when this is dropped.
#[derive(Debug)]
pub(super) struct Idle<'a> {
    sessions: &'a IdleSessions,
    at: u32,
}

impl IdleSessions {
    pub(super) const fn new() -> Self {
        let list = List {
            entries: Vec::new(),
            free: Vec::new(),
            oldest: NONE,
            newest: NONE,
        };
        Self {
            list: RefCell::new(list),
        }
    }

    /// Adds the session whose task is being polled, as the newest.
    pub(super) fn enter(&self, cx: &Context<'_>) -> Idle<'_> {
        let at = self.list.borrow_mut().push(cx.waker().clone());
        Idle { sessions: self, at }
    }

    /// Makes up to `count` sessions close, the longest idle first. Returns how many.
    pub(super) fn close_oldest(&self, count: usize) -> usize {
        let mut closed = 0;
        while closed < count
            && let Some(waker) = self.list.borrow_mut().close_oldest()
        {
            waker.wake();
            closed += 1;
        }
        closed
    }
}

impl Idle<'_> {
    /// Returns whether the session must close.
    pub(super) fn must_close(&self) -> bool {
        let list = self.sessions.list.borrow();
        list.entries[self.at as usize].waker.is_none()
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        self.sessions.list.borrow_mut().remove(self.at);
    }
}

impl List {
    fn push(&mut self, waker: Waker) -> u32 {
        let entry = Entry {
            older: self.newest,
            newer: NONE,
            waker: Some(waker),
        };
        let at = match self.free.pop() {
            Some(at) => {
                self.entries[at as usize] = entry;
                at
            }
            None => {
                self.entries.push(entry);
                // Each session has a descriptor, and descriptors are numbered by an `i32`.
                u32::try_from(self.entries.len() - 1).unwrap_or(NONE)
            }
        };
        match self.newest {
            NONE => self.oldest = at,
            newest => self.entries[newest as usize].newer = at,
        }
        self.newest = at;
        at
    }

    fn close_oldest(&mut self) -> Option<Waker> {
        let oldest = self.oldest;
        let waker = self.entries.get_mut(oldest as usize)?.waker.take();
        self.unlink(oldest);
        waker
    }

    fn remove(&mut self, at: u32) {
        if self.entries[at as usize].waker.take().is_some() {
            self.unlink(at);
        }
        self.free.push(at);
    }

    fn unlink(&mut self, at: u32) {
        let Entry { older, newer, .. } = self.entries[at as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.entries[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.entries[newer as usize].older = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// Compares the list with a queue under random operations.
    #[test]
    fn the_longest_idle_sessions_are_closed_first() {
        let sessions = IdleSessions::new();
        let cx = Context::from_waker(Waker::noop());
        let mut places = std::collections::BTreeMap::new();
        let (mut waiting, mut closed) = (VecDeque::new(), Vec::new());
        let mut random = 7_u64;
        for number in 0..20_000_u32 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            match (random >> 33) % 5 {
                0 | 1 => {
                    places.insert(number, sessions.enter(&cx));
                    waiting.push_back(number);
                }
                2 => {
                    let count = (random >> 40) as usize % 3;
                    let want = waiting.len().min(count);
                    assert_eq!(sessions.close_oldest(count), want);
                    closed.extend(waiting.drain(..want));
                }
                _ if !places.is_empty() => {
                    let nth = (random >> 40) as usize % places.len();
                    let key = *places.keys().nth(nth).unwrap();
                    let place = places.remove(&key).unwrap();
                    assert_eq!(place.must_close(), closed.contains(&key));
                    waiting.retain(|one| *one != key);
                    closed.retain(|one| *one != key);
                }
                _ => {}
            }
            let waits = |place: &&Idle<'_>| !place.must_close();
            assert_eq!(places.values().filter(waits).count(), waiting.len());
        }
        assert_eq!(sessions.close_oldest(usize::MAX), waiting.len());
        assert_eq!(sessions.close_oldest(1), 0);
        // Entries are used again.
        assert!(sessions.list.borrow().entries.len() < 10_000);
    }
}
