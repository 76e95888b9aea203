//! The name look-ups in progress on a shard, which never block its thread.
//!
//! A shard sends the name to the resolver threads and continues; the result arrives through the
//! shard's inbox. Targets that are addresses need no look-up.

use std::collections::HashMap;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use crate::fleet::{Address, Target};
use crate::limits::RESOLVE_QUEUE_MAX;

/// Result of a name look-up.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The name and port looked up.
    pub target: Target,
    /// The addresses of the name, in the order to try them. Empty if the name did not resolve.
    pub addresses: Vec<Address>,
}

/// Queues a name look-up for the resolver threads. Returns `false` if the queue is full.
pub type Resolver = Box<dyn Fn(&Target) -> bool>;

/// The look-ups in progress on one shard.
#[derive(Default)]
pub(crate) struct Lookups {
    waiting: HashMap<Target, Lookup>,
}

#[derive(Default)]
struct Lookup {
    wakers: Vec<Waker>,
    response: Option<Rc<[Address]>>,
    callers: usize,
}

impl Lookups {
    /// Registers the caller for a look-up of `target`. Returns `None` if too many look-ups are in
    /// progress on this shard, `Some(true)` if the caller must start this one, and `Some(false)` if
    /// it is already in progress.
    pub(crate) fn join(&mut self, target: &Target) -> Option<bool> {
        let is_new = !self.waiting.contains_key(target);
        if is_new && self.waiting.len() >= RESOLVE_QUEUE_MAX {
            return None;
        }
        self.waiting.entry(target.clone()).or_default().callers += 1;
        Some(is_new)
    }

    /// Returns the addresses once the look-up of `target` is complete. They are empty if the name
    /// did not resolve or the look-up could not be started.
    pub(crate) fn poll(&mut self, target: &Target, cx: &mut Context<'_>) -> Poll<Rc<[Address]>> {
        let Some(lookup) = self.waiting.get_mut(target) else {
            return Poll::Ready(Rc::from([]));
        };
        if let Some(response) = &lookup.response {
            return Poll::Ready(Rc::clone(response));
        }
        if !lookup
            .wakers
            .iter()
            .any(|waker| waker.will_wake(cx.waker()))
        {
            lookup.wakers.push(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Unregisters the caller from the look-up of `target`. If no caller is left, a complete
    /// look-up is removed; one without a result continues, for the next caller that needs it.
    pub(crate) fn unregister(&mut self, target: &Target) {
        if let Some(lookup) = self.waiting.get_mut(target) {
            lookup.callers -= 1;
            if lookup.callers == 0 && lookup.response.is_some() {
                self.waiting.remove(target);
            }
        }
    }

    /// Removes a look-up that could not be started. Other callers registered for it get no
    /// addresses.
    pub(crate) fn forget(&mut self, target: &Target) {
        self.waiting.remove(target);
    }

    /// Stores the result of a look-up and returns the wakers of the tasks that wait for it. A
    /// result without registered callers is dropped.
    pub(crate) fn response(&mut self, resolved: Resolved) -> Vec<Waker> {
        let Some(lookup) = self.waiting.get_mut(&resolved.target) else {
            return Vec::new();
        };
        if lookup.callers == 0 {
            self.waiting.remove(&resolved.target);
            return Vec::new();
        }
        lookup.response = Some(resolved.addresses.into());
        std::mem::take(&mut lookup.wakers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_look_up_serves_all_waiters_and_is_then_removed() {
        let target = Target::parse(b"engine:1").unwrap();
        let mut cx = Context::from_waker(Waker::noop());
        let mut lookups = Lookups::default();
        assert_eq!(lookups.join(&target), Some(true));
        assert_eq!(lookups.join(&target), Some(false));
        assert!(lookups.poll(&target, &mut cx).is_pending());
        let address = Target::parse(b"127.0.0.1:1").unwrap();
        let address = address.address().unwrap().clone();
        let response = Resolved {
            target: target.clone(),
            addresses: vec![address],
        };
        assert_eq!(lookups.response(response).len(), 1);
        for _ in 0..2 {
            let Poll::Ready(addresses) = lookups.poll(&target, &mut cx) else {
                panic!("pending")
            };
            assert_eq!(addresses[0].to_string(), "127.0.0.1:1");
            lookups.unregister(&target);
        }
        assert!(lookups.waiting.is_empty());
    }

    #[test]
    fn a_result_without_waiters_is_dropped() {
        let target = Target::parse(b"engine:1").unwrap();
        let mut lookups = Lookups::default();
        lookups.join(&target);
        lookups.unregister(&target);
        assert_eq!(lookups.join(&target), Some(false), "still in progress");
        lookups.unregister(&target);
        lookups.response(Resolved {
            target,
            addresses: vec![],
        });
        assert!(lookups.waiting.is_empty());
    }
}
