//! The addresses of engines: from the pool's table, or by look-ups that never block a shard's
//! thread.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::engine::Engine;
use super::error::CallError;
use super::pool::Pools;
use super::scope::{Scope, Stage};
use super::wait::Deadline;
use crate::fault::Fault;
use crate::fleet::{Address, Target};
use crate::limits::{RESOLVE_QUEUE_MAX, RESOLVED_SECS_MAX};
use crate::net::Net;

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

/// The addresses of the engines that one shard calls, and the look-ups in progress. It sends a name
/// to the resolver threads and continues; the result arrives through the shard's inbox.
pub(super) struct Addresses {
    resolver: Resolver,
    lookups: RefCell<Lookups>,
}

impl Addresses {
    pub(super) fn new(resolver: Resolver) -> Self {
        Self {
            resolver,
            lookups: RefCell::default(),
        }
    }

    /// Returns the addresses of an engine. A target that is an address needs no look-up. The
    /// addresses of a name come from the pool's table or, if it has none, from the resolver.
    /// Addresses in the table that are older than `RESOLVED_SECS_MAX` are still returned, but also
    /// looked up again for later requests. Empty if the name does not resolve.
    pub(super) async fn of<N: Net, S: Scope<N>>(
        &self,
        pools: &Pools<N>,
        scope: &S,
        engine: Engine<'_>,
        deadline: Deadline,
    ) -> Result<Rc<[Address]>, CallError> {
        let target = engine.target;
        let known = pools.addresses(engine.slot);
        if let Some((addresses, age)) = &known
            && (target.name().is_none() || *age < Duration::from_secs(RESOLVED_SECS_MAX))
        {
            return Ok(Rc::clone(addresses));
        }
        let joined = self.lookups.borrow_mut().join(target);
        let Some(must_start) = joined else {
            return Err(CallError::Other(Fault::Exhausted));
        };
        let _guard = LookupGuard {
            lookups: &self.lookups,
            target,
        };
        if must_start && !(self.resolver)(target) {
            self.lookups.borrow_mut().forget(target);
            return Err(CallError::Other(Fault::Exhausted));
        }
        if let Some((addresses, _)) = known {
            // The known addresses are used while the look-up refreshes them, so no request waits
            // for a name server that has responded before.
            return Ok(addresses);
        }
        scope
            .until(Stage::BeforeRequest, deadline, |cx| {
                self.lookups.borrow_mut().poll(target, cx)
            })
            .await
            .or_call_error()
    }

    /// Stores the result of a name look-up in the pool's table and wakes the tasks that wait for
    /// it.
    pub(super) fn resolved<N: Net>(&self, pools: &Pools<N>, resolved: Resolved) {
        pools.record_addresses(&resolved.target, &resolved.addresses);
        let wakers = self.lookups.borrow_mut().response(resolved);
        for waker in wakers {
            waker.wake();
        }
    }
}

/// Unregisters from a name look-up when dropped, including when the wait was cancelled.
struct LookupGuard<'a> {
    lookups: &'a RefCell<Lookups>,
    target: &'a Target,
}

impl Drop for LookupGuard<'_> {
    fn drop(&mut self) {
        self.lookups.borrow_mut().unregister(self.target);
    }
}

/// The look-ups in progress on one shard.
#[derive(Default)]
struct Lookups {
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
    fn join(&mut self, target: &Target) -> Option<bool> {
        let is_new = !self.waiting.contains_key(target);
        if is_new && self.waiting.len() >= RESOLVE_QUEUE_MAX {
            return None;
        }
        self.waiting.entry(target.clone()).or_default().callers += 1;
        Some(is_new)
    }

    /// Returns the addresses once the look-up of `target` is complete. They are empty if the name
    /// did not resolve or the look-up could not be started.
    fn poll(&mut self, target: &Target, cx: &mut Context<'_>) -> Poll<Rc<[Address]>> {
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
    fn unregister(&mut self, target: &Target) {
        if let Some(lookup) = self.waiting.get_mut(target) {
            lookup.callers -= 1;
            if lookup.callers == 0 && lookup.response.is_some() {
                self.waiting.remove(target);
            }
        }
    }

    /// Removes a look-up that could not be started. Other callers registered for it get no
    /// addresses.
    fn forget(&mut self, target: &Target) {
        self.waiting.remove(target);
    }

    /// Stores the result of a look-up and returns the wakers of the tasks that wait for it. A
    /// result without registered callers is dropped.
    fn response(&mut self, resolved: Resolved) -> Vec<Waker> {
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
