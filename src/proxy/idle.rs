//! The client connections of a shard that wait for a request, the longest idle first.
//!
//! At the limit on client connections, the longest idle ones are closed in favour of new ones.

use std::cell::RefCell;

use crate::net::Timer;

/// No place, or no timer.
pub(super) const NONE: u32 = u32::MAX;

/// A doubly linked list in a vector, so that entering, leaving and closing take constant time. A
/// session is woken by the timer that it waits on anyway: thousands of idle sessions are normal, so
/// each takes only 12 bytes here.
#[derive(Debug)]
pub(super) struct IdleSessions {
    list: RefCell<List>,
    /// Any timer of the shard's wheel, through which those of the sessions are nudged.
    nudger: Timer,
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
    /// The number of the session's timer. `NONE` once the session must close, and for a free entry.
    timer: u32,
}

impl IdleSessions {
    pub(super) const fn new(nudger: Timer) -> Self {
        let list = List {
            entries: Vec::new(),
            free: Vec::new(),
            oldest: NONE,
            newest: NONE,
        };
        Self {
            list: RefCell::new(list),
            nudger,
        }
    }

    /// Adds a session that waits on the timer with this number, as the newest. Returns its place,
    /// which it must leave.
    pub(super) fn enter(&self, timer: u32) -> u32 {
        self.list.borrow_mut().push(timer)
    }

    /// Returns whether the session at a place must close.
    pub(super) fn must_close(&self, at: u32) -> bool {
        self.list.borrow().entries[at as usize].timer == NONE
    }

    /// Removes the session at a place; does nothing for `NONE`.
    pub(super) fn leave(&self, at: u32) {
        if at != NONE {
            self.list.borrow_mut().remove(at);
        }
    }

    /// Makes up to `count` sessions close, the longest idle first. Returns how many.
    pub(super) fn close_oldest(&self, count: usize) -> usize {
        for closed in 0..count {
            let oldest = self.list.borrow_mut().close_oldest();
            let Some(timer) = oldest else {
                return closed;
            };
            self.nudger.nudge(timer);
        }
        count
    }
}

impl List {
    fn push(&mut self, timer: u32) -> u32 {
        let entry = Entry {
            older: self.newest,
            newer: NONE,
            timer,
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

    fn close_oldest(&mut self) -> Option<u32> {
        let oldest = self.oldest;
        let entry = self.entries.get_mut(oldest as usize)?;
        let timer = std::mem::replace(&mut entry.timer, NONE);
        self.unlink(oldest);
        Some(timer)
    }

    fn remove(&mut self, at: u32) {
        let entry = &mut self.entries[at as usize];
        if std::mem::replace(&mut entry.timer, NONE) != NONE {
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
    use crate::net::{Instant, Wheel};
    use std::collections::{BTreeMap, VecDeque};

    /// Compares the list with a queue under random operations.
    #[test]
    fn the_longest_idle_sessions_are_closed_first() {
        let sessions = IdleSessions::new(Wheel::new(Instant(0)).timer());
        let mut places = BTreeMap::new();
        let (mut waiting, mut closed) = (VecDeque::new(), Vec::new());
        let mut random = 7_u64;
        for number in 0..20_000_u32 {
            random = random
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            match (random >> 33) % 5 {
                0 | 1 => {
                    places.insert(number, sessions.enter(number));
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
                    assert_eq!(sessions.must_close(place), closed.contains(&key));
                    sessions.leave(place);
                    waiting.retain(|one| *one != key);
                    closed.retain(|one| *one != key);
                }
                _ => {}
            }
            let waits = |place: &&u32| !sessions.must_close(**place);
            assert_eq!(places.values().filter(waits).count(), waiting.len());
        }
        assert_eq!(sessions.close_oldest(usize::MAX), waiting.len());
        assert_eq!(sessions.close_oldest(1), 0);
        // Entries are used again.
        assert!(sessions.list.borrow().entries.len() < 10_000);
    }
}
