//! The state of one shard: its network handle, connection pools, buffers and counters.

use std::cell::{Cell, RefCell};
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arc_swap::ArcSwap;

use super::budget::Budget;
use super::engine_cache::EngineCache;
use crate::config::{Config, MoriConfig};
use crate::fault::Fault;
use crate::fleet::{Address, Target, TargetAllowlist};
use crate::metrics::ShardMetrics;
use crate::metrics::access::AccessRing;
use crate::net::Net;
use crate::trace::{Sampler, TraceRing, Tracer};
use crate::upstream::{
    Buffers, EndpointId, OnSocketFailed, Resolved, Resolver, SecureUpstream, UpstreamDeps,
    Upstreams,
};

/// Everything a shard is constructed from.
pub struct Parts<N: Net> {
    /// The configuration of the process.
    pub config: Arc<Config>,
    /// This shard's counters.
    pub metrics: Arc<ShardMetrics>,
    /// The process-wide budget of buffered bodies.
    pub budget: Arc<Budget>,
    /// Set for all shards once a drain has started and its settle time (`--drain-settle`) has
    /// passed: client connections then accept no further request.
    pub draining: Arc<AtomicBool>,
    /// Set at the start of a drain, before its settle time: the health endpoint on the data port
    /// returns 503 from then on.
    pub unhealthy: Arc<AtomicBool>,
    /// The local decoder of each rank, in rank order.
    pub decoders: Vec<Decoder>,
    /// Returns whether an address belongs to one of this process's own listeners.
    pub is_own_listener: Box<dyn Fn(&SocketAddr) -> bool>,
    /// Queues a name look-up for the resolver threads.
    pub resolver: Resolver,
    /// The `MoRI-IO` configuration with pod names resolved to addresses; `None` if no pod is
    /// configured by name.
    pub mori: Option<Arc<ArcSwap<MoriConfig>>>,
    /// Targets that requests may name; `None` allows any.
    pub allowlist: Option<Arc<TargetAllowlist>>,
    /// Called when a connect to an engine's Unix socket fails; must not block.
    pub on_socket_failed: OnSocketFailed,
    /// Ring for this shard's access log records; `None` if the access log is off.
    pub access: Option<AccessRing>,
    /// Wraps a new connection to an engine in TLS if the configuration requires it.
    pub secure: SecureUpstream<N::Conn>,
    /// Ring for this shard's finished trace spans; `None` if tracing is off.
    pub traces: Option<TraceRing>,
}

impl<N: Net> std::fmt::Debug for Parts<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parts").finish_non_exhaustive()
    }
}

/// The decoder of one rank: its configured location, and the addresses it resolved to at startup.
#[derive(Clone, Debug)]
pub struct Decoder {
    /// Location of the decoder as configured: a host and a port, or a Unix socket.
    pub target: Target,
    /// The addresses of the decoder to try, in order.
    pub addresses: Vec<Address>,
}

/// The state of one shard. Owned by one thread and never shared.
pub struct Shard<N: Net> {
    pub(super) net: N,
    pub(super) config: Arc<Config>,
    pub(super) metrics: Arc<ShardMetrics>,
    pub(super) budget: Arc<Budget>,
    pub(super) buffers: Rc<Buffers>,
    pub(super) upstreams: Rc<Upstreams<N>>,
    pub(super) decoders: Vec<(EndpointId, Decoder)>,
    pub(super) mori: Option<Arc<ArcSwap<MoriConfig>>>,
    pub(super) allowlist: Option<Arc<TargetAllowlist>>,
    pub(super) engines: RefCell<EngineCache>,
    pub(super) access: RefCell<Option<AccessRing>>,
    pub(super) tracer: Option<Rc<Tracer>>,
    draining: Arc<AtomicBool>,
    unhealthy: Arc<AtomicBool>,
    sessions: Cell<usize>,
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
    pub fn new(net: N, parts: Parts<N>) -> Rc<Self> {
        let buffers = Rc::new(Buffers::new());
        let own: Vec<_> = parts
            .decoders
            .iter()
            .flat_map(|decoder| decoder.addresses.clone())
            .collect();
        let is_own_listener = parts.is_own_listener;
        let upstreams = Upstreams::new(
            net.clone(),
            UpstreamDeps {
                config: Arc::clone(&parts.config),
                metrics: Arc::clone(&parts.metrics),
                buffers: Rc::clone(&buffers),
                resolver: parts.resolver,
                secure: parts.secure,
                on_socket_failed: parts.on_socket_failed,
                is_own: Box::new(move |address| {
                    let is_listener = match address {
                        Address::Tcp(address) => is_own_listener(address),
                        // The proxy's own listeners are TCP.
                        Address::Unix(_) => false,
                    };
                    is_listener || own.contains(address)
                }),
            },
        );
        let decoders = parts
            .decoders
            .into_iter()
            .map(|decoder| {
                let id = upstreams.pin(&decoder.target, &decoder.addresses);
                (id, decoder)
            })
            .collect();
        let tracer = parts.config.tracing.as_ref().zip(parts.traces);
        let tracer = tracer.map(|(tracing, ring)| {
            let sampler = Sampler::per_million(tracing.recorded_per_million);
            Rc::new(Tracer::new(sampler, ring, Arc::clone(&parts.metrics)))
        });
        Rc::new(Self {
            net,
            config: parts.config,
            metrics: parts.metrics,
            budget: parts.budget,
            buffers,
            upstreams,
            decoders,
            mori: parts.mori,
            allowlist: parts.allowlist,
            engines: RefCell::default(),
            access: RefCell::new(parts.access),
            tracer,
            draining: parts.draining,
            unhealthy: parts.unhealthy,
            sessions: Cell::new(0),
        })
    }

    /// Counts in the metrics that this shard has paused accepting connections.
    pub fn count_accept_paused(&self) {
        self.metrics.accept_paused();
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

    /// Returns whether the settle time of a drain has passed: no further request is started on a
    /// kept-alive connection.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Returns whether the health endpoint on the data port must return 503, which it does from the
    /// start of a drain on.
    pub(super) fn is_unhealthy(&self) -> bool {
        self.unhealthy.load(Ordering::Relaxed)
    }

    /// Returns the configured host and port of a local decoder.
    pub(super) fn decoder_target(&self, id: EndpointId) -> &Target {
        let found = self.decoders.iter().find(|(decoder, _)| *decoder == id);
        &found.unwrap_or(&self.decoders[0]).1.target
    }

    pub(super) fn count_fault(&self, fault: Fault) {
        self.metrics.fault(fault.index());
    }
}

/// Returns whether `ip` is an address of this machine. Tested by binding a socket to it, which
/// avoids listing interfaces. The system call is affordable because a shard's pool caches the
/// result per endpoint.
#[must_use]
pub fn is_local_address(ip: IpAddr) -> bool {
    ip.is_loopback()
        || ip.is_unspecified()
        || std::net::UdpSocket::bind(SocketAddr::new(ip, 0)).is_ok()
}

/// Counts a client connection as open, in [`Shard::sessions`] and in the metrics, until dropped.
/// That happens during unwinding too, so a panic does not leak the count.
pub(super) struct SessionGuard<N: Net> {
    pub(super) shard: Rc<Shard<N>>,
}

impl<N: Net> SessionGuard<N> {
    pub(super) fn new(shard: &Rc<Shard<N>>) -> Self {
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
