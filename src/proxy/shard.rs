//! The state of one shard: its network handle, connection pools, buffers and counters.

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
use crate::metrics::ShardMetrics;
use crate::metrics::access::AccessRing;
use crate::net::Net;
use crate::net::pool::{EndpointId, Pools};
use crate::pd::Role;
use crate::trace::{Sampler, TraceRing};

/// Initial capacity in bytes of a buffer from [`Shard::buffer`]; enough for a typical request head.
const SMALL_BUFFER_BYTES: usize = 1024;

/// Called with the path and the error when a connect to an engine's Unix socket fails.
pub type OnSocketFailed = Box<dyn Fn(&SocketPath, &std::io::Error)>;

/// Wraps a new connection to an engine of the given role in TLS if the configuration requires it.
pub type SecureUpstream<C> = Box<dyn Fn(C, Role, &Target) -> C>;

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
    /// Creates a shard that runs on `net`. It has no listeners: accepted connections are passed to
    /// [`Shard::serve`].
    pub fn new(net: N, parts: Parts<N>) -> Rc<Self> {
        let counted = Arc::clone(&parts.metrics);
        let on_idle = Box::new(move |role, delta| counted.pool_idle(role, delta));
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

    /// Serves an accepted client connection in a new task until the connection ends. `rank` is the
    /// index of the rank whose listener accepted it.
    pub fn serve(self: &Rc<Self>, conn: N::Conn, rank: usize) {
        let guard = SessionGuard::new(self);
        self.net.spawn(session::run(guard, conn, rank));
    }

    /// Counts in the metrics that this shard has paused accepting connections.
    pub fn count_accept_paused(&self) {
        self.metrics.accept_paused();
    }

    /// Returns the number of the shard's open client connections, plus the legs that run as
    /// separate tasks.
    pub fn sessions(&self) -> usize {
        self.sessions.get() + self.tasks.get()
    }

    /// Includes a leg that runs as a separate task in [`Shard::sessions`] for as long as the
    /// returned guard exists.
    pub(super) fn count_task(self: &Rc<Self>) -> TaskGuard<N> {
        self.tasks.set(self.tasks.get() + 1);
        TaskGuard {
            shard: Rc::clone(self),
        }
    }

    /// Stores the result of a name look-up and wakes the tasks that wait for it.
    pub fn resolved(&self, resolved: Resolved) {
        self.pools
            .record_addresses(&resolved.target, &resolved.addresses);
        let wakers = self.lookups.borrow_mut().response(resolved);
        for waker in wakers {
            waker.wake();
        }
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

    /// Calls `work` with the shard's receive buffer for heads and tokens. `work` is synchronous, so
    /// the buffer is never in use across an await.
    pub(super) fn with_small<T>(&self, work: impl FnOnce(&mut [u8]) -> T) -> T {
        work(&mut self.small.borrow_mut())
    }

    /// Calls `work` with the shard's receive buffer for bodies, under the same rule as
    /// [`Shard::with_small`]. The buffer is allocated on first use: a shard whose bodies always
    /// arrive with their heads does not need it.
    pub(super) fn with_large<T>(&self, work: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut large = self.large.borrow_mut();
        if large.is_empty() {
            *large = vec![0; RECEIVE_LARGE_BYTES].into_boxed_slice();
        }
        work(&mut large)
    }

    /// Returns an empty buffer, a recycled one if available.
    pub(super) fn buffer(&self) -> Vec<u8> {
        let spare = self.spare.borrow_mut().pop();
        spare.unwrap_or_else(|| Vec::with_capacity(SMALL_BUFFER_BYTES))
    }

    /// Keeps a buffer for reuse. It is freed instead if it is larger than
    /// `RECYCLED_BUFFER_BYTES_MAX` or enough buffers are kept.
    pub(super) fn recycle(&self, mut buffer: Vec<u8>) {
        let mut spare = self.spare.borrow_mut();
        let is_small = (1..=RECYCLED_BUFFER_BYTES_MAX).contains(&buffer.capacity());
        if is_small && spare.len() < RECYCLED_BUFFERS_MAX {
            buffer.clear();
            spare.push(buffer);
        }
    }

    /// Returns an empty list of header fields, a recycled one if available.
    pub(super) fn fields(&self) -> Vec<Field> {
        let spare = self.spare_fields.borrow_mut().pop();
        spare.unwrap_or_default()
    }

    /// Keeps a list of header fields for reuse. It is freed instead if its capacity is larger than
    /// `RECYCLED_FIELDS_MAX` or enough lists are kept.
    pub(super) fn recycle_fields(&self, mut fields: Vec<Field>) {
        let mut spare = self.spare_fields.borrow_mut();
        if (1..=RECYCLED_FIELDS_MAX).contains(&fields.capacity())
            && spare.len() < RECYCLED_BUFFERS_MAX
        {
            fields.clear();
            spare.push(fields);
        }
    }

    /// Returns the configured host and port of a local decoder.
    pub(super) fn decoder_target(&self, id: EndpointId) -> &Target {
        let found = self.decoders.iter().find(|(decoder, _)| *decoder == id);
        &found.unwrap_or(&self.decoders[0]).1.target
    }

    /// Returns whether the endpoint `id` is this proxy or one of its local decoders. A request must
    /// not be split with such a prefiller: the decoder would be handed its own KV cache (an engine
    /// returns 500), or the request would loop.
    pub(super) fn is_self(&self, id: EndpointId) -> bool {
        self.pools.is_self(id, |addresses| {
            let decoder = |address: &Address| {
                self.decoders
                    .iter()
                    .any(|(_, decoder)| decoder.addresses.contains(address))
            };
            let own_listener = |address: &Address| match address {
                Address::Tcp(address) => (self.is_own_listener)(address),
                // The proxy's own listeners are TCP.
                Address::Unix(_) => false,
            };
            addresses
                .iter()
                .any(|address| own_listener(address) || decoder(address))
        })
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

/// Includes a leg that runs as a separate task in [`Shard::sessions`] until dropped, so that a
/// drain waits for it.
pub(super) struct TaskGuard<N: Net> {
    shard: Rc<Shard<N>>,
}

impl<N: Net> Drop for TaskGuard<N> {
    fn drop(&mut self) {
        self.shard.tasks.set(self.shard.tasks.get() - 1);
    }
}

/// Counts a client connection as open, in [`Shard::sessions`] and in the metrics, until dropped.
/// That happens during unwinding too, so a panic does not leak the count.
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
