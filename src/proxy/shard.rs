//! What one thread has: its engine, its pools, its buffers, its counters.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;

use super::allowlist::TargetAllowlist;
use super::bootstrap::Engines;
use super::budget::Budget;
use super::resolve::{Lookups, Resolved, Resolver};
use super::session;
use super::trace::Tracer;
use crate::config::{Config, MoriConfig};
use crate::fault::Fault;
use crate::fleet::{Address, SocketPath, Target};
use crate::h1::Field;
use crate::limits::{
    RECEIVE_LARGE_BYTES, RECEIVE_SMALL_BYTES, RECYCLED_BUFFER_BYTES_MAX, RECYCLED_BUFFERS_MAX,
    RECYCLED_FIELDS_MAX,
};
use crate::metrics::access::AccessRing;
use crate::metrics::{LegRole, ShardMetrics};
use crate::net::Net;
use crate::net::pool::{EndpointId, Pools};
use crate::pd::Role;
use crate::trace::{Sampler, TraceRing};

/// Capacity of a new small buffer: a request head as clients send them.
const SMALL_BUFFER_BYTES: usize = 1024;

/// Told that an engine's Unix socket could not be connected to, and why.
pub type OnSocketFailed = Box<dyn Fn(&SocketPath, &std::io::Error)>;

/// Puts TLS on a connection that is being made to an engine of that role, where it is wanted.
pub type SecureUpstream<C> = Box<dyn Fn(C, Role, &Target) -> C>;

/// What a shard is given by whoever starts it.
pub struct Parts<N: Net> {
    /// The configuration.
    pub config: Arc<Config>,
    /// This shard's counters.
    pub metrics: Arc<ShardMetrics>,
    /// The process-wide budget of buffered bodies.
    pub budget: Arc<Budget>,
    /// Set when the process begins to drain.
    pub draining: Arc<AtomicBool>,
    /// Set when the data port's health answer turns 503.
    pub unhealthy: Arc<AtomicBool>,
    /// Decoder of each rank, in rank order.
    pub decoders: Vec<Decoder>,
    /// Whether an address with this port is one of this process's own listeners.
    pub is_own_listener: Box<dyn Fn(&SocketAddr) -> bool>,
    /// Asks for a name to be resolved.
    pub resolver: Resolver,
    /// The pods of a `MoRI-IO` deployment as addresses, where some are configured by name.
    pub mori: Option<Arc<ArcSwap<MoriConfig>>>,
    /// Which targets requests may name; `None` is any.
    pub allowlist: Option<Arc<TargetAllowlist>>,
    /// Told of Unix sockets that could not be connected to; must not wait.
    pub on_socket_failed: OnSocketFailed,
    /// Where finished requests are noted, unless the access log is off.
    pub access: Option<AccessRing>,
    /// What new connections to engines go through.
    pub secure: SecureUpstream<N::Conn>,
    /// Where spans go, if the configuration has tracing on.
    pub traces: Option<TraceRing>,
}

impl<N: Net> std::fmt::Debug for Parts<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").finish_non_exhaustive()
    }
}

/// A rank's decoder: its name and what that resolved to at the start.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Host and port as configured.
    pub target: Target,
    /// The addresses to try, in order.
    pub addresses: Vec<Address>,
}

/// One thread's share of the proxy.
pub struct Shard<N: Net> {
    pub(super) net: N,
    pub(super) config: Arc<Config>,
    pub(super) metrics: Arc<ShardMetrics>,
    pub(super) budget: Arc<Budget>,
    pub(super) pools: Rc<Pools<N, Role>>,
    pub(super) decoders: Vec<(EndpointId, Decoder)>,
    pub(super) is_own_listener: Box<dyn Fn(&SocketAddr) -> bool>,
    pub(super) resolver: Resolver,
    pub(super) mori: Option<Arc<ArcSwap<MoriConfig>>>,
    pub(super) allowlist: Option<Arc<TargetAllowlist>>,
    pub(super) on_socket_failed: OnSocketFailed,
    pub(super) lookups: RefCell<Lookups>,
    pub(super) engines: RefCell<Engines>,
    pub(super) access: RefCell<Option<AccessRing>>,
    pub(super) secure: SecureUpstream<N::Conn>,
    pub(super) tracer: Option<Tracer>,
    draining: Arc<AtomicBool>,
    unhealthy: Arc<AtomicBool>,
    small: RefCell<Box<[u8]>>,
    large: RefCell<Box<[u8]>>,
    spare: RefCell<Vec<Vec<u8>>>,
    spare_fields: RefCell<Vec<Vec<Field>>>,
    sessions: Cell<usize>,
    tasks: Cell<usize>,
}

impl<N: Net> std::fmt::Debug for Shard<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard")
            .field("sessions", &self.sessions.get())
            .finish_non_exhaustive()
    }
}

impl<N: Net> Shard<N> {
    /// A shard on `net`, without listeners.
    pub fn new(net: N, parts: Parts<N>) -> Rc<Self> {
        let counted = Arc::clone(&parts.metrics);
        let on_idle = Box::new(move |role, delta| counted.pool_idle(leg_role(role), delta));
        let upstream = &parts.config.upstream;
        let pools = Pools::new(&net, upstream.idle, upstream.idle_per_rank_max, on_idle);
        let decoders = parts
            .decoders
            .into_iter()
            .map(|decoder| {
                let id = pools.endpoint(Role::Decode, &decoder.target, true);
                pools.set_addresses(id, decoder.addresses.clone().into());
                (id, decoder)
            })
            .collect();
        let tracer = parts.config.tracing.as_ref().zip(parts.traces);
        let tracer = tracer.map(|(tracing, ring)| {
            Tracer::new(Sampler::per_million(tracing.recorded_per_million), ring)
        });
        Rc::new(Self {
            net,
            config: parts.config,
            metrics: parts.metrics,
            budget: parts.budget,
            pools,
            decoders,
            is_own_listener: parts.is_own_listener,
            resolver: parts.resolver,
            mori: parts.mori,
            allowlist: parts.allowlist,
            on_socket_failed: parts.on_socket_failed,
            lookups: RefCell::new(Lookups::default()),
            engines: RefCell::default(),
            access: RefCell::new(parts.access),
            secure: parts.secure,
            tracer,
            draining: parts.draining,
            unhealthy: parts.unhealthy,
            small: RefCell::new(vec![0; RECEIVE_SMALL_BYTES].into_boxed_slice()),
            large: RefCell::new(Box::default()),
            spare: RefCell::new(Vec::new()),
            spare_fields: RefCell::new(Vec::new()),
            sessions: Cell::new(0),
            tasks: Cell::new(0),
        })
    }

    /// Serves an accepted connection until it ends.
    pub fn serve(self: &Rc<Self>, conn: N::Conn, rank: usize) {
        let guard = SessionGuard::new(self);
        self.net.spawn(session::run(guard, conn, rank));
    }

    /// Counts a pause in accepting.
    pub fn count_accept_paused(&self) {
        self.metrics.accept_paused();
    }

    /// Connections being served, and legs that go on without one.
    pub fn sessions(&self) -> usize {
        self.sessions.get() + self.tasks.get()
    }

    /// Counts a leg that runs as a task of its own, for as long as the guard lives.
    pub(super) fn count_task(self: &Rc<Self>) -> TaskGuard<N> {
        self.tasks.set(self.tasks.get() + 1);
        TaskGuard {
            shard: Rc::clone(self),
        }
    }

    /// Takes what a name resolved to.
    pub fn resolved(&self, resolved: Resolved) {
        self.pools
            .record_addresses(&resolved.target, &resolved.addresses);
        let wakers = self.lookups.borrow_mut().response(resolved);
        for waker in wakers {
            waker.wake();
        }
    }

    /// Whether no new request is begun on a kept connection.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Whether the data port's health answer is 503.
    pub(super) fn is_unhealthy(&self) -> bool {
        self.unhealthy.load(Ordering::Relaxed)
    }

    /// Lends the receive buffer for heads and tokens. Never across a wait.
    pub(super) fn with_small<T>(&self, work: impl FnOnce(&mut [u8]) -> T) -> T {
        work(&mut self.small.borrow_mut())
    }

    /// Lends the receive buffer for bodies. Never across a wait. A shard that never sees a body
    /// arrive in pieces never has it.
    pub(super) fn with_large<T>(&self, work: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut large = self.large.borrow_mut();
        if large.is_empty() {
            *large = vec![0; RECEIVE_LARGE_BYTES].into_boxed_slice();
        }
        work(&mut large)
    }

    /// An empty buffer, used before if there is one.
    pub(super) fn buffer(&self) -> Vec<u8> {
        let spare = self.spare.borrow_mut().pop();
        spare.unwrap_or_else(|| Vec::with_capacity(SMALL_BUFFER_BYTES))
    }

    /// Takes a buffer back; a large one is freed.
    pub(super) fn recycle(&self, mut buffer: Vec<u8>) {
        let mut spare = self.spare.borrow_mut();
        let is_small = (1..=RECYCLED_BUFFER_BYTES_MAX).contains(&buffer.capacity());
        if is_small && spare.len() < RECYCLED_BUFFERS_MAX {
            buffer.clear();
            spare.push(buffer);
        }
    }

    /// Room for the fields of a head, used before if there is some.
    pub(super) fn fields(&self) -> Vec<Field> {
        let spare = self.spare_fields.borrow_mut().pop();
        spare.unwrap_or_default()
    }

    /// Takes room for fields back.
    pub(super) fn recycle_fields(&self, mut fields: Vec<Field>) {
        let mut spare = self.spare_fields.borrow_mut();
        if (1..=RECYCLED_FIELDS_MAX).contains(&fields.capacity())
            && spare.len() < RECYCLED_BUFFERS_MAX
        {
            fields.clear();
            spare.push(fields);
        }
    }

    /// The target a local decoder's id stands for.
    pub(super) fn decoder_target(&self, id: EndpointId) -> &Target {
        let found = self.decoders.iter().find(|(decoder, _)| *decoder == id);
        &found.unwrap_or(&self.decoders[0]).1.target
    }

    /// Whether an engine is this proxy or the decoder behind it: splitting a request with it
    /// would hand its own KV cache to itself (an engine answers 500), or loop.
    pub(super) fn is_self(&self, id: EndpointId) -> bool {
        self.pools.is_self(id, |addresses| {
            let decoder = |address: &Address| {
                self.decoders
                    .iter()
                    .any(|(_, decoder)| decoder.addresses.contains(address))
            };
            let own_listener = |address: &Address| match address {
                Address::Tcp(address) => (self.is_own_listener)(address),
                // Ours are TCP.
                Address::Unix(_) => false,
            };
            addresses
                .iter()
                .any(|address| own_listener(address) || decoder(address))
        })
    }

    /// Counts a fault.
    pub(super) fn count_fault(&self, fault: Fault) {
        self.metrics.fault(fault.index());
    }
}

/// The metric's name for a role.
pub(super) const fn leg_role(role: Role) -> LegRole {
    match role {
        Role::Prefill => LegRole::Prefill,
        Role::Decode => LegRole::Decode,
        Role::Encode => LegRole::Encode,
        Role::Bootstrap => LegRole::Bootstrap,
    }
}

/// Whether this machine has `ip` as one of its own addresses: binding a socket to it says so
/// without listing interfaces. Asked once per engine.
#[must_use]
pub fn is_local_address(ip: IpAddr) -> bool {
    ip.is_loopback()
        || ip.is_unspecified()
        || std::net::UdpSocket::bind(SocketAddr::new(ip, 0)).is_ok()
}

/// Counts a leg that goes on by itself, so that a drain waits for it.
pub(super) struct TaskGuard<N: Net> {
    shard: Rc<Shard<N>>,
}

impl<N: Net> Drop for TaskGuard<N> {
    fn drop(&mut self) {
        self.shard.tasks.set(self.shard.tasks.get() - 1);
    }
}

/// Counts a session for as long as it lives, also when it ends in a panic.
pub(super) struct SessionGuard<N: Net> {
    pub(super) shard: Rc<Shard<N>>,
}

impl<N: Net> SessionGuard<N> {
    fn new(shard: &Rc<Shard<N>>) -> Self {
        shard.sessions.set(shard.sessions.get() + 1);
        shard.metrics.client_connections(1);
        Self {
            shard: Rc::clone(shard),
        }
    }
}

impl<N: Net> Drop for SessionGuard<N> {
    fn drop(&mut self) {
        self.shard.sessions.set(self.shard.sessions.get() - 1);
        self.shard.metrics.client_connections(-1);
    }
}
