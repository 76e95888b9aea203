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
use std::net::SocketAddr;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::fault::{self, Incident, Trouble};
use crate::fleet::{Address, Target};
use crate::limits::{ENDPOINT_SAMPLE, ENDPOINTS_MAX};
use crate::net::{Conn, Instant, Net, Timer, is_turn_over};
use crate::pd::Role;

/// Identifies an endpoint (an engine's target in one role) in a shard's table. The id of an
/// endpoint that has been replaced matches nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotId {
    slot: usize,
    generation: u32,
}

/// Callback that queues an incident for the log. Returns `false` if the queue is full.
pub(crate) type OnIncident = Rc<dyn Fn(Incident) -> bool>;

/// Callback that updates the metric of idle connections. It receives a role and the change in this
/// shard's number of idle connections to engines of that role.
pub(crate) type OnIdle = Box<dyn Fn(Role, i64)>;

struct Endpoint<C> {
    target: Target,
    role: Role,
    generation: u32,
    /// The value of [`Table::uses`] when it was last looked up.
    last_used: u64,
    /// The endpoint's idle connections, the one that became idle most recently last.
    idle: Vec<Idle<C>>,
    addresses: Rc<[Address]>,
    addresses_at: Instant,
    is_self: SelfCheck,
    /// Number of failed legs of each kind that have not been reported yet.
    failed: [u64; Trouble::KINDS],
    /// Whether a leg has failed since one was served.
    is_troubled: bool,
}

/// Whether an endpoint is this proxy itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SelfCheck {
    Due,
    /// It was not known at this time.
    Unsure(Instant),
    Done(bool),
}

/// Time after which it is determined again whether an endpoint is this proxy itself, if that was
/// not known.
const SELF_CHECK_WAIT: Duration = Duration::from_secs(1);

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
    /// The pinned endpoints, followed by the others.
    endpoints: Vec<Endpoint<C>>,
    /// Number of pinned endpoints. They are never replaced.
    pinned: usize,
    /// Number of times that an endpoint was looked up.
    uses: u64,
    /// The slot at which the next search for an endpoint to replace starts.
    hand: usize,
    /// For each role, in the order of [`Role::index`], the slots of its endpoints in `endpoints`.
    by_target: [HashMap<Target, usize>; Role::ALL.len()],
    /// For each role, the slot that was looked up last. A request looks up the same engine several
    /// times, and to compare a target costs a tenth of hashing it.
    recent: [usize; Role::ALL.len()],
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
            pinned: 0,
            uses: 0,
            hand: 0,
            by_target: Default::default(),
            recent: [0; Role::ALL.len()],
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

    /// Adds an endpoint that is never replaced, and returns its id. Pinned endpoints must be added
    /// before all others.
    pub(crate) fn pin(&self, role: Role, target: &Target) -> SlotId {
        let id = self.endpoint(role, target);
        let mut table = self.table.borrow_mut();
        debug_assert!(
            table.pinned + 1 >= table.endpoints.len(),
            "another one was added before"
        );
        table.pinned = table.endpoints.len();
        id
    }

    /// Returns the id of `target` in a role, and adds it to the table on first use.
    pub(crate) fn endpoint(&self, role: Role, target: &Target) -> SlotId {
        let mut table = self.table.borrow_mut();
        table.uses += 1;
        let used = table.uses;
        if let Some(slot) = table.find(role, target) {
            let endpoint = &mut table.endpoints[slot];
            endpoint.last_used = used;
            return SlotId {
                slot,
                generation: endpoint.generation,
            };
        }
        let now = self.net.now();
        let addresses: Rc<[Address]> = target.address().cloned().into_iter().collect();
        let endpoint = Endpoint {
            target: target.clone(),
            role,
            generation: 0,
            last_used: used,
            idle: Vec::new(),
            addresses,
            addresses_at: now,
            is_self: SelfCheck::Due,
            failed: [0; Trouble::KINDS],
            is_troubled: false,
        };
        let (slot, replaced) = table.put(endpoint);
        table.by_target[role.index()].insert(target.clone(), slot);
        let generation = table.endpoints[slot].generation;
        drop(table);
        if let Some(old) = replaced {
            self.count_idle(old.role, 0, old.idle.len());
        }
        SlotId { slot, generation }
    }

    /// Returns the addresses of an endpoint and the time since they were stored. Returns `None` for
    /// a name that has not been resolved yet, or an endpoint that has been replaced.
    pub(crate) fn addresses(&self, id: SlotId) -> Option<(Rc<[Address]>, Duration)> {
        let table = self.table.borrow();
        let endpoint = table.get(id)?;
        (!endpoint.addresses.is_empty()).then(|| {
            let age = self.net.now().since(endpoint.addresses_at);
            (Rc::clone(&endpoint.addresses), age)
        })
    }

    /// Stores the addresses that an endpoint's name resolved to. Does nothing if the endpoint has
    /// been replaced.
    pub(crate) fn set_addresses(&self, id: SlotId, addresses: Rc<[Address]>) {
        if let Some(endpoint) = self.table.borrow_mut().get_mut(id) {
            endpoint.addresses = addresses;
            endpoint.addresses_at = self.net.now();
            endpoint.is_self = SelfCheck::Due;
        }
    }

    /// Stores the addresses that a name resolved to, in the endpoints of all roles and ports that
    /// have this name. Does nothing if `addresses` is empty (the name did not resolve).
    pub(crate) fn record_addresses(&self, name: &str, addresses: &[SocketAddr]) {
        if addresses.is_empty() {
            return;
        }
        let now = self.net.now();
        for endpoint in &mut self.table.borrow_mut().endpoints {
            let Some((_, port)) = endpoint.target.name().filter(|(known, _)| *known == name) else {
                continue;
            };
            let addresses = Address::all_at(addresses, port);
            if *endpoint.addresses != *addresses {
                endpoint.addresses = addresses.into();
                endpoint.is_self = SelfCheck::Due;
            }
            endpoint.addresses_at = now;
        }
    }

    /// Reports a failed leg of an endpoint. What the queue has no room for is included in the next
    /// report.
    pub(super) fn report(&self, id: SlotId, trouble: Trouble, on_incident: &OnIncident) {
        let mut table = self.table.borrow_mut();
        let rank = (id.slot < table.pinned).then_some(id.slot);
        let Some(endpoint) = table.get_mut(id) else {
            return;
        };
        endpoint.is_troubled = true;
        let legs = &mut endpoint.failed[trouble.index()];
        *legs += 1;
        let incident = Incident::Failed {
            engine: endpoint_name(endpoint.role, &endpoint.target, rank),
            trouble,
            legs: *legs,
        };
        if on_incident(incident) {
            endpoint.failed[trouble.index()] = 0;
        }
    }

    /// Reports that an endpoint has served a leg, if one has failed before.
    pub(super) fn report_well(&self, id: SlotId, on_incident: &OnIncident) {
        let mut table = self.table.borrow_mut();
        let rank = (id.slot < table.pinned).then_some(id.slot);
        if let Some(endpoint) = table.get_mut(id)
            && endpoint.is_troubled
        {
            let engine = endpoint_name(endpoint.role, &endpoint.target, rank);
            endpoint.is_troubled = !on_incident(Incident::Recovered(engine));
        }
    }

    /// Returns whether an endpoint is never replaced.
    pub(crate) fn is_pinned(&self, id: SlotId) -> bool {
        id.slot < self.table.borrow().pinned
    }

    /// Returns whether an endpoint is this proxy itself. Returns `false` also if the endpoint's
    /// name has not been resolved yet or the endpoint has been replaced. The result of
    /// `is_own_address` is cached per endpoint and address list; `None`, not known yet, counts as
    /// `false` and is cached for [`SELF_CHECK_WAIT`].
    pub(crate) fn is_self(
        &self,
        id: SlotId,
        is_own_address: impl FnOnce(&[Address]) -> Option<bool>,
    ) -> bool {
        let mut table = self.table.borrow_mut();
        let Some(endpoint) = table.get_mut(id) else {
            return false;
        };
        if endpoint.addresses.is_empty() {
            return false;
        }
        if let SelfCheck::Done(is_self) = endpoint.is_self {
            return is_self;
        }
        let now = self.net.now();
        if let SelfCheck::Unsure(at) = endpoint.is_self
            && now.since(at) < SELF_CHECK_WAIT
        {
            return false;
        }
        let found = is_own_address(&endpoint.addresses);
        endpoint.is_self = found.map_or(SelfCheck::Unsure(now), SelfCheck::Done);
        found.unwrap_or(false)
    }

    /// Removes and returns the newest idle connection of an endpoint on which nothing has arrived,
    /// or `None` if the endpoint has no such connection.
    ///
    /// Checks the socket itself, at a cost of 0.4 us: bytes that have arrived but that the keeper
    /// has not noticed yet would be mistaken for the response to the next request. Closes
    /// connections that fail the check or have reached the idle limit.
    pub(crate) fn checkout(&self, id: SlotId) -> Option<N::Conn> {
        let now = self.net.now();
        let mut table = self.table.borrow_mut();
        let endpoint = table.get_mut(id)?;
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
    pub(crate) fn checkin(&self, id: SlotId, conn: N::Conn) {
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

fn endpoint_name(role: Role, target: &Target, rank: Option<usize>) -> fault::Engine {
    fault::Engine {
        role,
        target: target.clone(),
        rank,
    }
}

impl<C> Table<C> {
    fn get(&self, id: SlotId) -> Option<&Endpoint<C>> {
        self.endpoints
            .get(id.slot)
            .filter(|endpoint| endpoint.generation == id.generation)
    }

    fn get_mut(&mut self, id: SlotId) -> Option<&mut Endpoint<C>> {
        self.endpoints
            .get_mut(id.slot)
            .filter(|endpoint| endpoint.generation == id.generation)
    }

    /// Returns the slot of the endpoint of `target` in a role, if the table has it.
    fn find(&mut self, role: Role, target: &Target) -> Option<usize> {
        let recent = self.recent[role.index()];
        let is_it = |endpoint: &&Endpoint<C>| endpoint.role == role && endpoint.target == *target;
        if self.endpoints.get(recent).filter(is_it).is_some() {
            return Some(recent);
        }
        let slot = *self.by_target[role.index()].get(target)?;
        self.recent[role.index()] = slot;
        Some(slot)
    }

    /// Adds an endpoint to the table, or replaces one if the table is full. Returns its slot and
    /// the endpoint that it replaced.
    fn put(&mut self, mut endpoint: Endpoint<C>) -> (usize, Option<Endpoint<C>>) {
        if self.endpoints.len() < self.pinned + ENDPOINTS_MAX {
            self.endpoints.push(endpoint);
            return (self.endpoints.len() - 1, None);
        }
        let slot = self.replaceable();
        endpoint.generation = self.endpoints[slot].generation.wrapping_add(1);
        let old = std::mem::replace(&mut self.endpoints[slot], endpoint);
        self.by_target[old.role.index()].remove(&old.target);
        (slot, Some(old))
    }

    /// Returns the slot of an endpoint that is not pinned: the least recently used one among the
    /// next `ENDPOINT_SAMPLE` slots. Each search continues where the last one ended, so the cost of
    /// a request does not depend on the number of endpoints.
    fn replaceable(&mut self) -> usize {
        let last = self.endpoints.len() - 1;
        let mut oldest: Option<usize> = None;
        for _ in 0..ENDPOINT_SAMPLE {
            let slot = self.hand.clamp(self.pinned, last);
            self.hand = if slot < last { slot + 1 } else { self.pinned };
            let is_older =
                |oldest: usize| self.endpoints[slot].last_used < self.endpoints[oldest].last_used;
            if oldest.is_none_or(is_older) {
                oldest = Some(slot);
            }
        }
        oldest.unwrap_or(last)
    }
}

/// Returns whether nothing has arrived on a connection, neither bytes nor its end. If so, the task
/// of `cx` is woken when something does.
fn is_quiet(conn: &impl Conn, cx: &mut Context<'_>) -> bool {
    loop {
        if conn.poll_readable(cx).is_pending() {
            // At the end of a turn, a connection with unread bytes is not ready either.
            return !is_turn_over() || !conn.peek_ready();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::sim::SimNet;

    const IDLE: Duration = Duration::from_secs(4);
    const IDLE_PER_ENDPOINT_MAX: usize = 2;

    /// Pools on a simulated network, and the counts of idle connections that they report.
    struct Fixture {
        net: SimNet,
        pools: Rc<Pools<SimNet>>,
        idle: Rc<[Cell<i64>; Role::ALL.len()]>,
    }

    fn fixture() -> Fixture {
        let net = SimNet::new(1);
        let idle: Rc<[Cell<i64>; Role::ALL.len()]> = Rc::default();
        let counts = Rc::clone(&idle);
        let on_idle = move |role: Role, delta| {
            let count = &counts[role.index()];
            count.set(count.get() + delta);
        };
        let pools = Pools::new(&net, IDLE, IDLE_PER_ENDPOINT_MAX, Box::new(on_idle));
        Fixture { net, pools, idle }
    }

    fn target(n: usize) -> Target {
        Target::parse(format!("engine-{n}:8000").as_bytes()).unwrap()
    }

    #[test]
    fn a_target_has_one_endpoint_per_role() {
        let Fixture { pools, .. } = fixture();
        let prefill = pools.endpoint(Role::Prefill, &target(1));
        assert_eq!(pools.endpoint(Role::Prefill, &target(1)), prefill);
        assert_ne!(pools.endpoint(Role::Decode, &target(1)), prefill);
        assert_ne!(pools.endpoint(Role::Prefill, &target(2)), prefill);
    }

    #[test]
    fn idle_connections_are_used_newest_first_within_their_limits() {
        let Fixture { net, pools, idle } = fixture();
        let id = pools.endpoint(Role::Decode, &target(1));
        let clock = net.clone();
        let run = net.run(async move {
            assert!(pools.checkout(id).is_none());
            let (mut own, mut peers) = (Vec::new(), Vec::new());
            for _ in 0..3 {
                let (near, far) = clock.pair();
                own.push(near);
                peers.push(far);
            }
            let newest = own.remove(1);
            pools.checkin(id, own.remove(0));
            pools.checkin(id, newest);
            assert_eq!(idle[Role::Decode.index()].get(), 2);
            // The stack is full.
            pools.checkin(id, own.remove(0));
            assert_eq!(idle[Role::Decode.index()].get(), 2);
            let taken = pools.checkout(id).unwrap();
            taken.try_send(b"x").unwrap();
            clock.sleep(Duration::from_secs(1)).await;
            let mut received = Vec::new();
            assert_eq!(peers[1].recv(&mut received, 1).await.unwrap(), 1);
            drop(taken);
            clock.sleep(IDLE).await;
            assert!(pools.checkout(id).is_none(), "older than the idle limit");
            assert_eq!(idle[Role::Decode.index()].get(), 0);
        });
        run.unwrap();
    }

    #[test]
    fn a_connection_on_which_something_arrives_is_closed() {
        let Fixture { net, pools, idle } = fixture();
        let id = pools.endpoint(Role::Prefill, &target(1));
        let clock = net.clone();
        let run = net.run(async move {
            let (near, far) = clock.pair();
            pools.checkin(id, near);
            assert_eq!(idle[Role::Prefill.index()].get(), 1);
            far.send(b"HTTP/1.1 408 Request Timeout\r\n").await.unwrap();
            clock.sleep(Duration::from_secs(1)).await;
            assert!(pools.checkout(id).is_none());
            assert_eq!(idle[Role::Prefill.index()].get(), 0);
        });
        run.unwrap();
    }

    #[test]
    fn a_full_table_replaces_unused_endpoints_and_never_pinned_ones() {
        let Fixture { net, pools, .. } = fixture();
        let pinned: Vec<_> = (0..3)
            .map(|n| pools.pin(Role::Decode, &target(n)))
            .collect();
        let clock = net.clone();
        let run = net.run(async move {
            let tick = Duration::from_millis(1);
            let first = pools.endpoint(Role::Prefill, &target(100));
            // In use all the time, at positions that a search reaches first, in between and last.
            let used: Vec<_> = (0..ENDPOINTS_MAX - 1)
                .filter_map(|n| {
                    let other = target(1000 + n);
                    let id = pools.endpoint(Role::Prefill, &other);
                    (n % 31 == 0).then_some((other, id))
                })
                .collect();
            for n in 0..3 * ENDPOINTS_MAX {
                clock.sleep(tick).await;
                for (target, id) in &used {
                    assert_eq!(pools.endpoint(Role::Prefill, target), *id, "{n}");
                }
                pools.endpoint(Role::Encode, &target(10_000 + n));
            }
            let table = pools.table.borrow();
            assert_eq!(table.endpoints.len(), pinned.len() + ENDPOINTS_MAX);
            let known: usize = table.by_target.iter().map(HashMap::len).sum();
            assert_eq!(known, table.endpoints.len());
            assert!(table.get(first).is_none(), "it was replaced");
            drop(table);
            for (n, id) in pinned.iter().enumerate() {
                assert_eq!(pools.endpoint(Role::Decode, &target(n)), *id);
            }
            assert_ne!(pools.endpoint(Role::Prefill, &target(100)), first);
        });
        run.unwrap();
    }

    #[test]
    fn a_look_up_sets_the_addresses_of_every_role_and_port() {
        let Fixture { net, pools, .. } = fixture();
        let ids = [Role::Prefill, Role::Encode].map(|role| pools.endpoint(role, &target(1)));
        let rank = pools.endpoint(Role::Decode, &target(1).with_port(8001));
        let other = pools.endpoint(Role::Decode, &target(2));
        assert!(pools.addresses(ids[0]).is_none());
        assert!(!pools.is_self(ids[0], |_| Some(true)), "not resolved yet");
        let found = [SocketAddr::from(([127, 0, 0, 1], 0))];
        pools.record_addresses("engine-1", &found);
        assert!(pools.addresses(other).is_none());
        let [at_rank] = &*pools.addresses(rank).unwrap().0 else {
            panic!()
        };
        assert_eq!(at_rank.to_string(), "127.0.0.1:8001");
        for id in ids {
            assert_eq!(
                *pools.addresses(id).unwrap().0,
                Address::all_at(&found, 8000)
            );
            assert!(!pools.is_self(id, |_| None));
            assert!(!pools.is_self(id, |_| Some(true)), "cached for a second");
        }
        let (clock, later) = (net.clone(), Rc::clone(&pools));
        let run = net.run(async move {
            clock.sleep(SELF_CHECK_WAIT).await;
            for id in ids {
                assert!(later.is_self(id, |_| Some(true)));
                assert!(later.is_self(id, |_| Some(false)), "the result is cached");
            }
        });
        run.unwrap();
        pools.record_addresses("engine-1", &[]);
        assert!(
            pools.addresses(ids[0]).is_some(),
            "a failed look-up changes nothing"
        );
    }
}
