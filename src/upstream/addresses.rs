//! The addresses of engines: from the pool's table, or by look-ups that never block a shard's
//! thread.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::engine::Engine;
use super::error::CallError;
use super::pool::Pools;
use super::scope::{Scope, Stage};
use super::wait::Deadline;
use crate::fault::Fault;
use crate::fleet::Address;
use crate::limits::{RESOLVE_QUEUE_MAX, RESOLVED_SECS_MAX};
use crate::net::Net;

/// Result of a name look-up.
#[derive(Clone, Debug)]
pub struct Resolved {
    /// The name looked up.
    pub name: String,
    /// The addresses of the name, in the order to try them, with any port. Empty if the name did
    /// not resolve.
    pub addresses: Vec<SocketAddr>,
}

/// The party that has given a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NamedBy {
    /// The operator: the name of a local decoder.
    Operator,
    /// A client, or a source of the fleet: any number of names.
    Other,
}

/// Queues a name look-up for the resolver threads. Returns `false` if the queue is full.
pub type Resolver = Box<dyn Fn(&str, NamedBy) -> bool>;

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
    /// looked up again for later requests, if the queue has room. Empty if the name does not
    /// resolve.
    pub(super) async fn of<N: Net, S: Scope<N>>(
        &self,
        pools: &Pools<N>,
        scope: &S,
        engine: Engine<'_>,
        deadline: Deadline,
    ) -> Result<Rc<[Address]>, CallError> {
        let known = pools.addresses(engine.slot);
        let Some((name, port)) = engine.target.name() else {
            let address = || engine.target.address().cloned().into_iter().collect();
            return Ok(known.map_or_else(address, |(addresses, _)| addresses));
        };
        if let Some((addresses, age)) = &known
            && *age < Duration::from_secs(RESOLVED_SECS_MAX)
        {
            return Ok(Rc::clone(addresses));
        }
        let by = if pools.is_pinned(engine.slot) {
            NamedBy::Operator
        } else {
            NamedBy::Other
        };
        let waiter = self.begin(name, by);
        if let Some((addresses, _)) = known {
            // The known addresses are used while the look-up refreshes them, so no request waits
            // for a name server that has responded before, or for room in the queue.
            return Ok(addresses);
        }
        let Some(waiter) = waiter else {
            return Err(CallError::Other(Fault::Exhausted));
        };
        let found = scope
            .until(Stage::BeforeRequest, deadline, |cx| {
                waiter.lookups.borrow_mut().poll(name, cx)
            })
            .await
            .or_call_error()?;
        Ok(Address::all_at(&found, port).into())
    }

    /// Registers the caller for a look-up of `name`, and starts it unless it is in progress.
    /// Returns `None` if there are too many look-ups.
    fn begin<'a>(&'a self, name: &'a str, by: NamedBy) -> Option<LookupGuard<'a>> {
        let must_start = self.lookups.borrow_mut().join(name, by)?;
        let guard = LookupGuard {
            lookups: &self.lookups,
            name,
        };
        if must_start && !(self.resolver)(name, by) {
            self.lookups.borrow_mut().forget(name);
            return None;
        }
        Some(guard)
    }

    /// Stores the result of a name look-up in the pool's table and wakes the tasks that wait for
    /// it.
    pub(super) fn resolved<N: Net>(&self, pools: &Pools<N>, resolved: Resolved) {
        pools.record_addresses(&resolved.name, &resolved.addresses);
        let wakers = self.lookups.borrow_mut().response(resolved);
        for waker in wakers {
            waker.wake();
        }
    }
}

/// Unregisters from a name look-up when dropped, including when the wait was cancelled.
struct LookupGuard<'a> {
    lookups: &'a RefCell<Lookups>,
    name: &'a str,
}

impl Drop for LookupGuard<'_> {
    fn drop(&mut self) {
        self.lookups.borrow_mut().unregister(self.name);
    }
}

/// The look-ups in progress on one shard.
#[derive(Default)]
struct Lookups {
    waiting: HashMap<String, Lookup>,
}

struct Lookup {
    by: NamedBy,
    wakers: Vec<Waker>,
    response: Option<Rc<[SocketAddr]>>,
    callers: usize,
}

impl Lookups {
    /// Registers the caller for a look-up of `name`. Returns `None` if too many look-ups are in
    /// progress on this shard and the operator has not given the name, `Some(true)` if the caller
    /// must pass the name to the resolver, and `Some(false)` if it is already there.
    fn join(&mut self, name: &str, by: NamedBy) -> Option<bool> {
        if let Some(lookup) = self.waiting.get_mut(name) {
            lookup.callers += 1;
            // The resolver moves a name that it knows already to the front.
            let is_moved = lookup.by == NamedBy::Other && by == NamedBy::Operator;
            if is_moved {
                lookup.by = by;
            }
            return Some(is_moved);
        }
        if by == NamedBy::Other && self.waiting.len() >= RESOLVE_QUEUE_MAX {
            return None;
        }
        let lookup = Lookup {
            by,
            wakers: Vec::new(),
            response: None,
            callers: 1,
        };
        self.waiting.insert(name.to_owned(), lookup);
        Some(true)
    }

    /// Returns the addresses once the look-up of `name` is complete. They are empty if the name
    /// did not resolve or the look-up could not be started.
    fn poll(&mut self, name: &str, cx: &mut Context<'_>) -> Poll<Rc<[SocketAddr]>> {
        let Some(lookup) = self.waiting.get_mut(name) else {
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

    /// Unregisters the caller from the look-up of `name`. If no caller is left, a complete
    /// look-up is removed; one without a result continues, for the next caller that needs it.
    fn unregister(&mut self, name: &str) {
        if let Some(lookup) = self.waiting.get_mut(name) {
            lookup.callers -= 1;
            if lookup.callers == 0 && lookup.response.is_some() {
                self.waiting.remove(name);
            }
        }
    }

    /// Removes a look-up that could not be started.
    fn forget(&mut self, name: &str) {
        self.waiting.remove(name);
    }

    /// Stores the result of a look-up and returns the wakers of the tasks that wait for it. A
    /// result without registered callers is dropped.
    fn response(&mut self, resolved: Resolved) -> Vec<Waker> {
        let Some(lookup) = self.waiting.get_mut(&resolved.name) else {
            return Vec::new();
        };
        if lookup.callers == 0 {
            self.waiting.remove(&resolved.name);
            return Vec::new();
        }
        lookup.response = Some(resolved.addresses.into());
        std::mem::take(&mut lookup.wakers)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::poll_fn;

    use super::*;
    use crate::fleet::Target;
    use crate::metrics::Phase;
    use crate::net::sim::SimNet;
    use crate::pd::Role;
    use crate::upstream::wait::Waited;

    /// A call whose client stays.
    struct Unwatched(Cell<Phase>);

    impl Scope<SimNet> for Unwatched {
        fn phase(&self) -> &Cell<Phase> {
            &self.0
        }

        async fn until<T>(
            &self,
            _: Stage,
            _: Deadline,
            ready: impl FnMut(&mut Context<'_>) -> Poll<T>,
        ) -> Waited<T> {
            Waited::Ready(poll_fn(ready).await)
        }
    }

    #[test]
    fn known_addresses_are_used_even_if_they_cannot_be_looked_up_again() {
        let net = SimNet::new(1);
        let pools = Pools::new(&net, Duration::from_secs(4), 1, Box::new(|_, _| {}));
        let target = Target::parse(b"engine:8000").unwrap();
        let slot = pools.pin(Role::Decode, &target);
        let known: Rc<[Address]> = Address::all_at(&[([127, 0, 0, 1], 0).into()], 8000).into();
        pools.set_addresses(slot, Rc::clone(&known));
        let clock = net.clone();
        let run = net.run(async move {
            let scope = Unwatched(Cell::new(Phase::Connect));
            let (role, target) = (Role::Decode, &target);
            let engine = Engine { slot, target, role };
            clock.sleep(Duration::from_secs(RESOLVED_SECS_MAX)).await;
            for is_queued in [false, true] {
                let addresses = Addresses::new(Box::new(move |_, by| {
                    assert_eq!(by, NamedBy::Operator);
                    is_queued
                }));
                let found = addresses.of(&pools, &scope, engine, Deadline::NONE).await;
                assert_eq!(found.unwrap(), known, "{is_queued}");
            }
        });
        run.unwrap();
    }

    const BY: NamedBy = NamedBy::Other;

    #[test]
    fn one_look_up_serves_all_waiters_and_is_then_removed() {
        let mut cx = Context::from_waker(Waker::noop());
        let mut lookups = Lookups::default();
        assert_eq!(lookups.join("engine", BY), Some(true));
        assert_eq!(lookups.join("engine", BY), Some(false));
        assert!(lookups.poll("engine", &mut cx).is_pending());
        let response = Resolved {
            name: "engine".to_owned(),
            addresses: vec![([127, 0, 0, 1], 0).into()],
        };
        assert_eq!(lookups.response(response).len(), 1);
        for _ in 0..2 {
            let Poll::Ready(addresses) = lookups.poll("engine", &mut cx) else {
                panic!("pending")
            };
            assert_eq!(addresses[0].ip().to_string(), "127.0.0.1");
            lookups.unregister("engine");
        }
        assert!(lookups.waiting.is_empty());
    }

    #[test]
    fn a_result_without_waiters_is_dropped() {
        let mut lookups = Lookups::default();
        lookups.join("engine", BY);
        lookups.unregister("engine");
        assert_eq!(lookups.join("engine", BY), Some(false), "still in progress");
        lookups.unregister("engine");
        lookups.response(Resolved {
            name: "engine".to_owned(),
            addresses: vec![],
        });
        assert!(lookups.waiting.is_empty());
    }

    #[test]
    fn the_names_of_clients_do_not_exclude_the_operators() {
        let mut lookups = Lookups::default();
        for nth in 0..RESOLVE_QUEUE_MAX {
            assert_eq!(lookups.join(&format!("n{nth}"), BY), Some(true));
        }
        assert_eq!(lookups.join("more", BY), None);
        assert_eq!(lookups.join("n3", BY), Some(false));
        for name in ["engine", "n3"] {
            assert_eq!(lookups.join(name, NamedBy::Operator), Some(true), "{name}");
            assert_eq!(lookups.join(name, NamedBy::Operator), Some(false), "{name}");
        }
    }
}
