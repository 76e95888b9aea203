//! Idle connections to engines, one stack per endpoint (an engine's target in one role).
//!
//! The newest idle connection is used first, so that the others reach the idle limit and are
//! closed. Idle connections are watched: anything that arrives on one, bytes or the end of the
//! stream, closes it, because the only valid event on an idle connection is its close by the
//! engine. The limit on idle time should be below the engine's own keep-alive limit (uvicorn: 5 s),
//! so that the proxy closes first.
//!
//! One keeper task per shard watches all idle connections. The kernel's watch on a connection
//! remains in effect when the connection passes from a session to the keeper or back, so becoming
//! idle and being reused cancel no watch.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::fleet::{Address, Target};
use crate::net::{Conn, Instant, Net, Timer};
use crate::pd::Role;

/// Maximum number of endpoints in a shard's table. When it is full, a new endpoint replaces the
/// least recently used one that is not pinned.
pub(crate) const ENDPOINTS_MAX: usize = 1024;

/// Identifies an endpoint (an engine's target in one role) in a shard's table. The id of an
/// endpoint that has been replaced matches nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct EndpointId {
    slot: usize,
    generation: u32,
}

/// Callback that updates the metric of idle connections. It receives a role and the change in this
/// shard's number of idle connections to engines of that role.
pub(crate) type OnIdle = Box<dyn Fn(Role, i64)>;

struct Endpoint<C> {
    target: Target,
    role: Role,
    generation: u32,
    /// Whether the endpoint is never replaced when the table is full. Set for the configured decode
    /// engines.
    pinned: bool,
    last_used: Instant,
    /// The endpoint's idle connections, the one that became idle most recently last.
    idle: Vec<Idle<C>>,
    addresses: Rc<[Address]>,
    addresses_at: Instant,
    is_self: Option<bool>,
}

struct Idle<C> {
    conn: C,
    since: Instant,
}

/// The endpoints of one shard and their idle connections.
///
/// The same address in two roles has two stacks.
pub(crate) struct Pools<N: Net> {
    net: N,
    idle_max: Duration,
    idle_per_endpoint_max: usize,
    table: RefCell<Table<N::Conn>>,
    keeper: RefCell<Waker>,
    timer: Timer,
    timer_set: Cell<bool>,
    on_idle: OnIdle,
}

struct Table<C> {
    endpoints: Vec<Endpoint<C>>,
    by_target: HashMap<(Role, Target), usize>,
}

impl<N: Net> std::fmt::Debug for Pools<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pools").finish_non_exhaustive()
    }
}

impl<N: Net> Pools<N> {
    /// Creates an empty table and starts its keeper task on `net`. An idle connection is closed
    /// after `idle_max`; each endpoint keeps at most `idle_per_endpoint_max` idle connections.
    pub(crate) fn new(
        net: &N,
        idle_max: Duration,
        idle_per_endpoint_max: usize,
        on_idle: OnIdle,
    ) -> Rc<Self> {
        let table = Table {
            endpoints: Vec::new(),
            by_target: HashMap::new(),
        };
        let pools = Rc::new(Self {
            net: net.clone(),
            idle_max,
            idle_per_endpoint_max,
            table: RefCell::new(table),
            keeper: RefCell::new(Waker::noop().clone()),
            timer: net.timer(),
            timer_set: Cell::new(false),
            on_idle,
        });
        net.spawn_vital(keep(Rc::clone(&pools)));
        pools
    }

    /// Returns the id of `target` in the role `role`, and adds it to the table on first use. A
    /// `pinned` endpoint is never replaced.
    pub(crate) fn endpoint(&self, role: Role, target: &Target, pinned: bool) -> EndpointId {
        let now = self.net.now();
        let mut table = self.table.borrow_mut();
        if let Some(&slot) = table.by_target.get(&(role, target.clone())) {
            let endpoint = &mut table.endpoints[slot];
            endpoint.last_used = now;
            endpoint.pinned |= pinned;
            return EndpointId {
                slot,
                generation: endpoint.generation,
            };
        }
        let addresses: Rc<[Address]> = target.address().cloned().into_iter().collect();
        let mut endpoint = Endpoint {
            target: target.clone(),
            role,
            generation: 0,
            pinned,
            last_used: now,
            idle: Vec::new(),
            addresses,
            addresses_at: now,
            is_self: None,
        };
        let slot = if table.endpoints.len() < ENDPOINTS_MAX {
            table.endpoints.push(endpoint);
            table.endpoints.len() - 1
        } else {
            let slot = table.oldest();
            endpoint.generation = table.endpoints[slot].generation.wrapping_add(1);
            let old = std::mem::replace(&mut table.endpoints[slot], endpoint);
            table.by_target.remove(&(old.role, old.target));
            self.count_idle(old.role, 0, old.idle.len());
            slot
        };
        table.by_target.insert((role, target.clone()), slot);
        EndpointId {
            slot,
            generation: table.endpoints[slot].generation,
        }
    }

    /// Returns the addresses of an endpoint and the time at which they were stored. Returns `None`
    /// for a name that has not been resolved yet, or an endpoint that has been replaced.
    pub(crate) fn addresses(&self, id: EndpointId) -> Option<(Rc<[Address]>, Instant)> {
        let table = self.table.borrow();
        let endpoint = table.get(id)?;
        (!endpoint.addresses.is_empty())
            .then(|| (Rc::clone(&endpoint.addresses), endpoint.addresses_at))
    }

    /// Stores the addresses that an endpoint's name resolved to. Does nothing if the endpoint has
    /// been replaced.
    pub(crate) fn set_addresses(&self, id: EndpointId, addresses: Rc<[Address]>) {
        if let Some(endpoint) = self.table.borrow_mut().get_mut(id) {
            endpoint.addresses = addresses;
            endpoint.addresses_at = self.net.now();
            endpoint.is_self = None;
        }
    }

    /// Stores the addresses that the name of `target` resolved to, in the endpoints of all roles
    /// that have this target. Does nothing if `addresses` is empty (the name did not resolve).
    pub(crate) fn record_addresses(&self, target: &Target, addresses: &[Address]) {
        if addresses.is_empty() {
            return;
        }
        let now = self.net.now();
        let mut table = self.table.borrow_mut();
        for endpoint in table.endpoints.iter_mut().filter(|e| e.target == *target) {
            if *endpoint.addresses != *addresses {
                endpoint.addresses = addresses.into();
                endpoint.is_self = None;
            }
            endpoint.addresses_at = now;
        }
    }

    /// Returns whether an endpoint is this proxy itself. Returns `false` also if the endpoint's
    /// name has not been resolved yet or the endpoint has been replaced. `is_own_address` is called
    /// once per endpoint and address list; its result is cached.
    pub(crate) fn is_self(
        &self,
        id: EndpointId,
        is_own_address: impl FnOnce(&[Address]) -> bool,
    ) -> bool {
        let mut table = self.table.borrow_mut();
        let Some(endpoint) = table.get_mut(id) else {
            return false;
        };
        if endpoint.addresses.is_empty() {
            return false;
        }
        let addresses = Rc::clone(&endpoint.addresses);
        *endpoint
            .is_self
            .get_or_insert_with(|| is_own_address(&addresses))
    }

    /// Removes and returns the newest idle connection of an endpoint on which nothing has arrived,
    /// or `None` if the endpoint has no such connection.
    ///
    /// Checks the socket itself, at a cost of 0.4 us: bytes that have arrived but that the keeper
    /// has not noticed yet would be mistaken for the response to the next request. Closes
    /// connections that fail the check or have reached the idle limit.
    pub(crate) fn checkout(&self, id: EndpointId) -> Option<N::Conn> {
        let now = self.net.now();
        let mut table = self.table.borrow_mut();
        let endpoint = table.get_mut(id)?;
        endpoint.last_used = now;
        let before = endpoint.idle.len();
        let mut found = None;
        while let Some(idle) = endpoint.idle.pop() {
            if now.since(idle.since) >= self.idle_max {
                // All others on the stack are older.
                endpoint.idle.clear();
                break;
            }
            if !idle.conn.peek_ready() {
                found = Some(idle.conn);
                break;
            }
        }
        let (role, left) = (endpoint.role, endpoint.idle.len());
        drop(table);
        self.count_idle(role, left, before);
        found
    }

    /// Puts a connection back on its endpoint's stack after an exchange that ended cleanly. The
    /// connection is closed instead if the stack is full, the endpoint has been replaced, or
    /// something has already arrived on the connection.
    pub(crate) fn checkin(&self, id: EndpointId, conn: N::Conn) {
        let now = self.net.now();
        let keeper = self.keeper.borrow().clone();
        if !is_quiet(&conn, &mut Context::from_waker(&keeper)) {
            return;
        }
        let mut table = self.table.borrow_mut();
        let Some(endpoint) = table.get_mut(id) else {
            return;
        };
        if endpoint.idle.len() >= self.idle_per_endpoint_max {
            return;
        }
        endpoint.idle.push(Idle { conn, since: now });
        let (role, left) = (endpoint.role, endpoint.idle.len());
        drop(table);
        self.count_idle(role, left, left - 1);
        if !self.timer_set.replace(true) {
            self.timer.set(now, Some(self.idle_max));
        }
    }

    fn count_idle(&self, role: Role, now: usize, before: usize) {
        let delta = i64::try_from(now).unwrap_or(0) - i64::try_from(before).unwrap_or(0);
        if delta != 0 {
            (self.on_idle)(role, delta);
        }
    }

    /// Drops every idle connection that received something, ended or reached the idle limit. The
    /// task of `cx`, which is the keeper, is woken when another one receives something, ends or
    /// reaches the limit.
    fn sweep(&self, cx: &mut Context<'_>) {
        let now = self.net.now();
        let mut next: Option<Duration> = None;
        let mut table = self.table.borrow_mut();
        for endpoint in &mut table.endpoints {
            let before = endpoint.idle.len();
            endpoint
                .idle
                .retain(|idle| now.since(idle.since) < self.idle_max && is_quiet(&idle.conn, cx));
            self.count_idle(endpoint.role, endpoint.idle.len(), before);
            // The first connection is the oldest.
            let wait = endpoint
                .idle
                .first()
                .map(|idle| self.idle_max - now.since(idle.since));
            next = [next, wait].into_iter().flatten().min();
        }
        drop(table);
        self.timer_set.set(next.is_some());
        self.timer.set(now, next);
        // Registers the keeper task with the new deadline.
        let _ = self.timer.poll(cx);
    }
}

impl<C> Table<C> {
    fn get(&self, id: EndpointId) -> Option<&Endpoint<C>> {
        self.endpoints
            .get(id.slot)
            .filter(|endpoint| endpoint.generation == id.generation)
    }

    fn get_mut(&mut self, id: EndpointId) -> Option<&mut Endpoint<C>> {
        self.endpoints
            .get_mut(id.slot)
            .filter(|endpoint| endpoint.generation == id.generation)
    }

    fn oldest(&self) -> usize {
        let candidates = self.endpoints.iter().enumerate().filter(|(_, e)| !e.pinned);
        candidates
            .min_by_key(|(_, endpoint)| endpoint.last_used)
            .map_or(0, |(slot, _)| slot)
    }
}

/// Returns whether nothing has arrived on a connection, neither bytes nor its end. If so, the task
/// of `cx` is woken when something does.
fn is_quiet(conn: &impl Conn, cx: &mut Context<'_>) -> bool {
    loop {
        if conn.poll_readable(cx).is_pending() {
            return true;
        }
        // Remembered readiness may date from before the last receive, so check the socket.
        if conn.peek_ready() {
            return false;
        }
    }
}

/// The keeper task: closes idle connections as [`Pools::sweep`] describes until the shard ends.
async fn keep<N: Net>(pools: Rc<Pools<N>>) {
    poll_fn(|cx| {
        if !pools.keeper.borrow().will_wake(cx.waker()) {
            *pools.keeper.borrow_mut() = cx.waker().clone();
        }
        pools.sweep(cx);
        Poll::<()>::Pending
    })
    .await;
}
