//! Resolves host names with the system's resolver, on threads that may block.
//!
//! Each name is looked up once for all shards, ranks and ports that wait for it. The names of the
//! operator go first and have a separate thread, because the client of a sidecar can name any host,
//! and a look-up takes seconds if no name server responds.

use std::collections::{HashMap, VecDeque};
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::{io, thread};

use super::inbox::{Inbox, Message};
use crate::fleet::{Address, Target};
use crate::limits::{ADDRESSES_MAX, RESOLVE_QUEUE_MAX};
use crate::upstream::{NamedBy, Resolved};

/// Number of resolver threads for all names, and thus of concurrent look-ups.
const THREADS: usize = 4;

/// Handle to the resolver threads, which exit when the last clone is dropped.
#[derive(Clone)]
pub(super) struct Resolver(Arc<Owner>);

/// Ends the threads when dropped.
struct Owner(Arc<Queue>);

impl Drop for Owner {
    fn drop(&mut self) {
        self.0.lock().is_closed = true;
        self.0.changed.notify_all();
    }
}

impl Resolver {
    /// Starts the resolver threads.
    pub(super) fn start() -> io::Result<Self> {
        let queue = Arc::new(Queue::default());
        // Ends the threads that have started if a later one cannot.
        let owner = Arc::new(Owner(Arc::clone(&queue)));
        let lanes = [Lane::All; THREADS];
        for lane in lanes.into_iter().chain([Lane::OperatorOnly]) {
            let queue = Arc::clone(&queue);
            thread::Builder::new()
                .name("resolver".to_owned())
                .spawn(move || work(&queue, lane))?;
        }
        Ok(Self(owner))
    }

    /// Queues a look-up of `name`; the result is sent to `inbox`. Returns `false` if the queue is
    /// full: no result is then sent.
    pub(super) fn ask(&self, name: &str, by: NamedBy, inbox: &Inbox) -> bool {
        let is_queued = self.0.0.lock().ask(name, by, inbox);
        // All, because the one that is woken may not be one that takes such names.
        self.0.0.changed.notify_all();
        is_queued
    }
}

/// The names that one thread looks up.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Lane {
    All,
    OperatorOnly,
}

#[derive(Default)]
struct Queue {
    names: Mutex<Names>,
    changed: Condvar,
}

#[derive(Default)]
struct Names {
    /// Names to look up that the operator has given.
    operator: VecDeque<Arc<str>>,
    /// Names to look up that clients have given.
    client: VecDeque<Arc<str>>,
    /// The shards that wait for each name, from its first request until its result.
    waiting: HashMap<Arc<str>, Vec<Inbox>>,
    is_closed: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next name of a lane. Returns `None` at the end of the process.
    fn next(&self, lane: Lane) -> Option<Arc<str>> {
        let mut names = self.lock();
        loop {
            if names.is_closed {
                return None;
            }
            if let Some(name) = names.next(lane) {
                return Some(name);
            }
            let woken = self.changed.wait(names);
            names = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Names {
    fn ask(&mut self, name: &str, by: NamedBy, inbox: &Inbox) -> bool {
        if let Some(inboxes) = self.waiting.get_mut(name) {
            if !inboxes.iter().any(|known| known.is(inbox)) {
                inboxes.push(inbox.clone());
            }
            // If clients were first, the name does not stay among theirs.
            if by == NamedBy::Operator
                && let Some(at) = self.client.iter().position(|queued| **queued == *name)
            {
                self.operator.extend(self.client.remove(at));
            }
            return true;
        }
        let name: Arc<str> = name.into();
        match by {
            NamedBy::Operator => self.operator.push_back(Arc::clone(&name)),
            NamedBy::Other if self.client.len() >= RESOLVE_QUEUE_MAX => return false,
            NamedBy::Other => self.client.push_back(Arc::clone(&name)),
        }
        self.waiting.insert(name, vec![inbox.clone()]);
        true
    }

    fn next(&mut self, lane: Lane) -> Option<Arc<str>> {
        let operator = self.operator.pop_front();
        operator.or_else(|| {
            let takes_all = lane == Lane::All;
            takes_all.then(|| self.client.pop_front()).flatten()
        })
    }
}

fn work(queue: &Queue, lane: Lane) {
    while let Some(name) = queue.next(lane) {
        let addresses = look_up(&name);
        let waiting = queue.lock().waiting.remove(&name);
        for inbox in waiting.into_iter().flatten() {
            inbox.send(Message::Resolved(Resolved {
                name: name.to_string(),
                addresses: addresses.clone(),
            }));
        }
    }
}

/// Resolves a name with a blocking look-up. Returns at most [`ADDRESSES_MAX`] addresses, with port
/// 0, and none if the name does not resolve. IPv4 addresses come first: engines listen on IPv4 by
/// default, and a refused first attempt would delay every new connection.
pub(super) fn look_up(name: &str) -> Vec<SocketAddr> {
    let Ok(found) = (name, 0).to_socket_addrs() else {
        return Vec::new();
    };
    let mut addresses: Vec<SocketAddr> = found.collect();
    addresses.sort_by_key(SocketAddr::is_ipv6);
    addresses.dedup();
    addresses.truncate(ADDRESSES_MAX);
    addresses
}

/// Returns the addresses of `targets`, in their order. The names among them are looked up at the
/// same time, each once.
pub(super) async fn resolve_all(targets: &[&Target]) -> Vec<Vec<Address>> {
    let mut found: HashMap<&str, _> = HashMap::new();
    for (name, _) in targets.iter().filter_map(|target| target.name()) {
        found.entry(name).or_insert_with(|| {
            let name = name.to_owned();
            tokio::task::spawn_blocking(move || look_up(&name))
        });
    }
    let mut known: HashMap<&str, Vec<SocketAddr>> = HashMap::new();
    for (name, looking_up) in found {
        known.insert(name, looking_up.await.unwrap_or_default());
    }
    let addresses = |target: &&Target| match target.name() {
        Some((name, port)) => Address::all_at(&known[name], port),
        None => target.address().cloned().into_iter().collect(),
    };
    targets.iter().map(addresses).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::Notifier;

    fn inbox() -> Inbox {
        Inbox::new(Notifier::unconnected())
    }

    fn all(names: &mut Names, lane: Lane) -> Vec<String> {
        std::iter::from_fn(|| names.next(lane))
            .map(|name| name.to_string())
            .collect()
    }

    #[test]
    fn one_look_up_serves_all_shards() {
        let (one, two) = (inbox(), inbox());
        let mut names = Names::default();
        for inbox in [&one, &two, &one] {
            assert!(names.ask("a", NamedBy::Other, inbox));
        }
        assert_eq!(all(&mut names, Lane::All), ["a"]);
        assert!(names.ask("a", NamedBy::Operator, &two), "being looked up");
        assert!(all(&mut names, Lane::All).is_empty());
        assert_eq!(names.waiting["a"].len(), 2);
    }

    #[test]
    fn the_names_of_clients_are_limited_and_come_last() {
        let inbox = inbox();
        let mut names = Names::default();
        for nth in 0..RESOLVE_QUEUE_MAX {
            assert!(names.ask(&format!("n{nth}"), NamedBy::Other, &inbox));
        }
        assert!(!names.ask("more", NamedBy::Other, &inbox));
        assert!(names.ask("n7", NamedBy::Other, &inbox), "known already");
        assert!(names.ask("engine", NamedBy::Operator, &inbox));
        assert!(names.ask("n9", NamedBy::Operator, &inbox));
        assert_eq!(all(&mut names, Lane::OperatorOnly), ["engine", "n9"]);
        let rest = all(&mut names, Lane::All);
        assert_eq!(rest.len(), RESOLVE_QUEUE_MAX - 1);
        assert_eq!(rest[..2], ["n0", "n1"]);
    }
}
