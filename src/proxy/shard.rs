//! The state of one shard: its network handle, connection pools, buffers and counters.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, Cache};

use super::idle::IdleSessions;
use super::places::{Place, Places};
use super::push_book::PushBook;
use super::target_cache::TargetCache;
use crate::budget::Budget;
use crate::config::Config;
use crate::fault::{Fault, Incident};
use crate::fleet::{Address, EngineVersion, Service, Snapshot, Target};
use crate::limits::{
    BOOTSTRAP_CACHE_BYTES_MAX, BOOTSTRAP_SECS_MAX, BOOTSTRAPS_MAX, IDLE_CLOSED_MAX,
    VERSION_SECS_MAX, VERSIONS_MAX,
};
use crate::metrics::access_log::AccessRing;
use crate::metrics::{ShardMetrics, Stranded};
use crate::net::Net;
use crate::pd::Role;
use crate::pd::bootstrap::ListedEngines;
use crate::policy::{self, Choose};
use crate::trace::{Sampler, TraceRing, Tracer};
use crate::upstream::{
    Buffers, IsOwn, OnSocketFailed, Resolved, Resolver, SecureUpstream, UpstreamDeps, Upstreams,
    any_known,
};

/// The parts that a shard is constructed from.
pub struct ShardDeps<N: Net> {
    /// The configuration of the process.
    pub config: Arc<Config>,
    /// This shard's counters.
    pub metrics: Arc<ShardMetrics>,
    /// The process-wide budget of kept bytes.
    pub budget: Arc<Budget>,
    /// The places for client connections of the process.
    pub places: Arc<Places>,
    /// The index of this shard among those of the process.
    pub index: usize,
    /// The state of the fleet, which the control plane replaces.
    pub fleet: Arc<ArcSwap<Snapshot>>,
    /// Returns whether an address belongs to one of this process's own listeners.
    pub is_own_listener: Box<dyn Fn(&SocketAddr) -> bool>,
    /// Returns whether an address belongs to the listener of a local decoder at another address;
    /// `None` if that is not known yet.
    pub is_same_listener: SameListener,
    /// Queues a name look-up for the resolver threads.
    pub resolver: Resolver,
    /// Called when a connect to an engine's Unix socket fails; must not block.
    pub on_socket_failed: OnSocketFailed,
    /// Called when a decoder does not accept connections or has closed one in use; must not block.
    pub on_decoder_lost: Box<dyn Fn()>,
    /// Called with an incident for the log; must not block. Returns `false` if there is no room for
    /// it.
    pub on_incident: Rc<dyn Fn(Incident) -> bool>,
    /// Ring for this shard's access log records; `None` if the access log is off.
    pub access: Option<AccessRing>,
    /// Wraps a new connection to an engine in TLS if the configuration requires it.
    pub secure: SecureUpstream<N::Conn>,
    /// Ring for this shard's finished trace spans; `None` if tracing is off.
    pub traces: Option<TraceRing>,
}

impl<N: Net> std::fmt::Debug for ShardDeps<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ShardDeps").finish_non_exhaustive()
    }
}

/// Decoders of which a shard remembers that they refused a connection, and for how long.
const REFUSING_MAX: usize = 1024;
const REFUSING_AGE_MAX: Duration = Duration::from_secs(30);

/// The engines of prefill servers, as their bootstrap servers listed them.
type Engines = Rc<RefCell<TargetCache<Rc<ListedEngines>>>>;

/// The versions of engines that a shard has asked for itself.
type Versions = Rc<RefCell<TargetCache<Option<EngineVersion>>>>;

fn cache<T: Clone>(entries_max: usize, age_secs_max: u64) -> Rc<RefCell<TargetCache<T>>> {
    let age_max = Duration::from_secs(age_secs_max);
    Rc::new(RefCell::new(TargetCache::new(entries_max, age_max)))
}

/// The state of one shard. Owned by one thread and never shared.
pub struct Shard<N: Net> {
    pub(super) net: N,
    pub(super) config: Arc<Config>,
    pub(super) metrics: Arc<ShardMetrics>,
    pub(super) budget: Arc<Budget>,
    pub(super) buffers: Rc<Buffers>,
    pub(super) upstreams: Rc<Upstreams<N>>,
    pub(super) policy: Box<dyn Choose>,
    fleet: RefCell<Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>>,
    /// The engines of prefill servers, as their Mooncake bootstrap servers listed them.
    pub(super) engines: Engines,
    /// The versions of prefillers; `None` for one that states none.
    pub(super) versions: Versions,
    /// The decoders that refused the last connection.
    pub(super) refusing: RefCell<TargetCache<()>>,
    /// The prefillers that push KV cache.
    pub(super) push_book: RefCell<PushBook>,
    pub(super) access: RefCell<Option<AccessRing>>,
    pub(super) tracer: Option<Rc<Tracer>>,
    on_incident: Rc<dyn Fn(Incident) -> bool>,
    /// Whether a speculative prefill is running.
    pub(super) is_warming_up: Cell<bool>,
    /// The client connections that wait for a request.
    pub(super) idle: IdleSessions,
    sessions: Cell<usize>,
    places: Arc<Places>,
    index: usize,
}

impl<N: Net> std::fmt::Debug for Shard<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shard")
            .field("sessions", &self.sessions.get())
            .finish_non_exhaustive()
    }
}

impl<N: Net> Shard<N> {
    /// Creates a shard that runs on `net`. It has no listeners: accepted connections are passed to
    /// [`session::begin`](super::session::begin).
    pub fn new(net: N, deps: ShardDeps<N>) -> Rc<Self> {
        let buffers = Rc::new(Buffers::new());
        let snapshot = deps.fleet.load_full();
        let endpoints = snapshot.endpoints();
        let own: Vec<_> = endpoints.flat_map(|one| one.addresses.clone()).collect();
        let versions: Versions = cache(VERSIONS_MAX, VERSION_SECS_MAX);
        let age_max = Duration::from_secs(BOOTSTRAP_SECS_MAX);
        let engines = TargetCache::new(BOOTSTRAPS_MAX, age_max);
        let engines: Engines = Rc::new(RefCell::new(
            engines.with_bytes_max(BOOTSTRAP_CACHE_BYTES_MAX),
        ));
        let (stated, listed) = (Rc::clone(&versions), Rc::clone(&engines));
        let on_decoder_lost = deps.on_decoder_lost;
        let upstreams = Upstreams::new(
            net.clone(),
            UpstreamDeps {
                config: Arc::clone(&deps.config),
                metrics: Arc::clone(&deps.metrics),
                buffers: Rc::clone(&buffers),
                budget: Arc::clone(&deps.budget),
                resolver: deps.resolver,
                secure: deps.secure,
                on_socket_failed: deps.on_socket_failed,
                on_engine_lost: Box::new(move |role, target| match role {
                    Role::Decode => on_decoder_lost(),
                    Role::Prefill => {
                        stated.borrow_mut().forget(target);
                        listed.borrow_mut().forget(target);
                    }
                    Role::Encode | Role::Bootstrap => {}
                }),
                on_incident: Rc::clone(&deps.on_incident),
                is_own: is_own(own, deps.is_own_listener, deps.is_same_listener),
            },
        );
        for decoder in snapshot.endpoints() {
            upstreams.pin(&decoder.target, &decoder.addresses);
        }
        let pod_ip = deps.config.pod_ip.as_deref().unwrap_or_default();
        let listeners = deps.config.listeners.iter();
        let names = listeners.map(|one| format!("{pod_ip}:{}", one.address.port()));
        let policy = policy::policy(names.collect());
        let tracer = deps.config.tracing.as_ref().zip(deps.traces);
        let tracer = tracer.map(|(tracing, ring)| {
            let sampler = Sampler::per_million(tracing.recorded_per_million);
            Rc::new(Tracer::new(sampler, ring, Arc::clone(&deps.metrics)))
        });
        let idle = IdleSessions::new(net.timer());
        Rc::new(Self {
            net,
            config: deps.config,
            metrics: deps.metrics,
            budget: deps.budget,
            buffers,
            upstreams,
            policy,
            fleet: RefCell::new(Cache::new(deps.fleet)),
            engines,
            versions,
            refusing: RefCell::new(TargetCache::new(REFUSING_MAX, REFUSING_AGE_MAX)),
            push_book: RefCell::default(),
            access: RefCell::new(deps.access),
            tracer,
            on_incident: deps.on_incident,
            is_warming_up: Cell::new(false),
            idle,
            sessions: Cell::new(0),
            places: deps.places,
            index: deps.index,
        })
    }

    /// Counts in the metrics that this shard has paused accepting connections.
    pub fn count_accept_paused(&self) {
        self.metrics.accept_paused();
    }

    /// Counts a client connection, which has this place.
    #[must_use]
    pub fn admit(self: &Rc<Self>, mut place: Place) -> SessionGuard<N> {
        place.assign(self.index);
        place.keep();
        SessionGuard::new(self)
    }

    /// Counts in the metrics a client connection that another shard serves.
    pub fn count_handed_over(&self) {
        self.metrics.client_handed_over();
    }

    /// Closes some of the shard's client connections that wait for a request, the longest idle
    /// first, to make room for others. Returns how many.
    pub fn close_idle(&self) -> usize {
        let closed = self.idle.close_oldest(IDLE_CLOSED_MAX);
        self.metrics.idle_closed(closed as u64);
        closed
    }

    /// Returns the number of the shard's open client connections, plus the legs that run as
    /// separate tasks.
    pub fn sessions(&self) -> usize {
        self.sessions.get() + self.upstreams.tasks()
    }

    /// Stores the result of a name look-up and wakes the tasks that wait for it.
    pub fn resolved(&self, resolved: Resolved) {
        self.upstreams.resolved(resolved);
    }

    /// Calls `read` with the latest state of the fleet.
    pub(super) fn with_fleet<T>(&self, read: impl FnOnce(&Snapshot) -> T) -> T {
        read(self.fleet.borrow_mut().load())
    }

    /// Returns whether the settle time of a drain has passed: no further request is started on a
    /// kept-alive connection.
    pub fn is_draining(&self) -> bool {
        self.with_fleet(|fleet| fleet.service == Service::Draining)
    }

    /// Returns whether the health endpoint on the data port must return 503, which it does from the
    /// start of a drain on.
    pub(super) fn is_unhealthy(&self) -> bool {
        self.with_fleet(|fleet| fleet.service != Service::Open)
    }

    /// Returns whether clients may send plain text to the TLS port.
    pub(super) fn accepts_plain_text(&self) -> bool {
        let listener = self.config.tls.listener.as_ref();
        listener.is_some_and(|listener| listener.accepts_plain_text)
    }

    /// Queues an incident for the log. The caller counts it in the metrics.
    pub(super) fn report(&self, incident: Incident) {
        (self.on_incident)(incident);
    }

    /// Counts and reports KV cache that remains with a prefiller until its lease expires.
    pub(super) fn left_to_lease(&self, prefiller: &Target) {
        self.metrics.stranded(Stranded::LeftToLease);
        self.report(Incident::LeftToLease(prefiller.clone()));
    }

    pub(super) fn count_fault(&self, fault: Fault) {
        self.metrics.fault(fault.index());
    }
}

/// Returns the function that determines whether an address is this proxy's or one of `own`, the
/// addresses of its decoders.
fn is_own(
    own: Vec<Address>,
    is_own_listener: Box<dyn Fn(&SocketAddr) -> bool>,
    is_same: SameListener,
) -> IsOwn {
    Box::new(move |address| match address {
        _ if own.contains(address) => Some(true),
        // The proxy's own listeners are TCP.
        Address::Unix(_) => Some(false),
        Address::Tcp(address) if is_own_listener(address) => Some(true),
        Address::Tcp(address) => any_known(own.iter().filter_map(|decoder| match decoder {
            Address::Tcp(decoder) if decoder.port() == address.port() => {
                Some(is_same(decoder, address))
            }
            Address::Tcp(_) | Address::Unix(_) => None,
        })),
    })
}

/// Type of [`ShardDeps::is_same_listener`].
pub type SameListener = Box<dyn Fn(&SocketAddr, &SocketAddr) -> Option<bool>>;

/// Returns whether `ip` is an address of this machine. Tested by binding a socket to it, which
/// avoids listing interfaces. The system call is affordable because a shard's pool caches the
/// result per endpoint.
#[must_use]
pub fn is_local_address(ip: IpAddr) -> bool {
    ip.is_loopback()
        || ip.is_unspecified()
        || std::net::UdpSocket::bind(SocketAddr::new(ip, 0)).is_ok()
}

/// Counts a client connection as open, in [`Shard::sessions`] and in the metrics, and keeps its
/// place, until dropped. That happens during unwinding too, so a panic does not leak the
/// count.
pub struct SessionGuard<N: Net> {
    pub(super) shard: Rc<Shard<N>>,
}

impl<N: Net> std::fmt::Debug for SessionGuard<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SessionGuard").finish_non_exhaustive()
    }
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
        self.shard.places.give_back(self.shard.index);
    }
}
