//! The engines that one shard calls: their endpoints, idle connections and look-ups in progress.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use super::addresses::{Addresses, Resolved, Resolver};
use super::buffers::Buffers;
use super::engine::Engine;
use super::error::CallError;
use super::pool::{OnIncident, Pools};
use super::scope::Scope;
use super::wait::Deadline;
use crate::budget::Budget;
use crate::config::Config;
use crate::fleet::{Address, SocketPath, Target};
use crate::metrics::ShardMetrics;
use crate::net::Net;
use crate::pd::Role;

/// Called with the path and the error when a connect to an engine's Unix socket fails.
pub type OnSocketFailed = Box<dyn Fn(&SocketPath, &std::io::Error)>;

/// Wraps a new connection to an engine of the given role in TLS if the configuration requires it.
pub type SecureUpstream<C> = Box<dyn Fn(C, Role, &Target) -> C>;

/// Called when an engine does not accept a connection, or when a request is repeated because its
/// connection failed: the engine may have been restarted.
pub type OnEngineLost = Box<dyn Fn(Role, &Target)>;

/// Type of [`UpstreamDeps::is_own`].
pub(crate) type IsOwn = Box<dyn Fn(&Address) -> Option<bool>>;

/// The parts that [`Upstreams`] is constructed from.
pub(crate) struct UpstreamDeps<N: Net> {
    pub(crate) config: Arc<Config>,
    pub(crate) metrics: Arc<ShardMetrics>,
    pub(crate) buffers: Rc<Buffers>,
    /// The budget of the bytes that are kept of responses.
    pub(crate) budget: Arc<Budget>,
    pub(crate) resolver: Resolver,
    pub(crate) secure: SecureUpstream<N::Conn>,
    pub(crate) on_socket_failed: OnSocketFailed,
    pub(crate) on_engine_lost: OnEngineLost,
    pub(crate) on_incident: OnIncident,
    /// Returns whether an address is that of a listener of this process or of a local decoder;
    /// `None` if that is not known yet.
    pub(crate) is_own: IsOwn,
}

/// The engines that one shard calls: their endpoints, idle connections and look-ups in progress.
pub(crate) struct Upstreams<N: Net> {
    pub(super) net: N,
    pub(super) config: Arc<Config>,
    pub(super) metrics: Arc<ShardMetrics>,
    pub(super) buffers: Rc<Buffers>,
    pub(super) budget: Arc<Budget>,
    pub(super) pools: Rc<Pools<N>>,
    addresses: Addresses,
    pub(super) secure: SecureUpstream<N::Conn>,
    pub(super) on_socket_failed: OnSocketFailed,
    pub(super) on_engine_lost: OnEngineLost,
    pub(super) on_incident: OnIncident,
    is_own: IsOwn,
    /// Number of legs that run as separate tasks.
    tasks: Cell<usize>,
}

impl<N: Net> Upstreams<N> {
    /// Creates the pools of a shard that runs on `net`. They have no endpoints yet.
    pub(crate) fn new(net: N, deps: UpstreamDeps<N>) -> Rc<Self> {
        let counted = Arc::clone(&deps.metrics);
        let on_idle = Box::new(move |role, delta| counted.pool_idle(role, delta));
        let upstream = &deps.config.upstream;
        let pools = Pools::new(&net, upstream.idle, upstream.idle_per_rank_max, on_idle);
        Rc::new(Self {
            net,
            config: deps.config,
            metrics: deps.metrics,
            buffers: deps.buffers,
            budget: deps.budget,
            pools,
            addresses: Addresses::new(deps.resolver),
            secure: deps.secure,
            on_socket_failed: deps.on_socket_failed,
            on_engine_lost: deps.on_engine_lost,
            on_incident: deps.on_incident,
            is_own: deps.is_own,
            tasks: Cell::new(0),
        })
    }

    /// Returns the engine at `target` in a role, and adds it to the pool on first use.
    pub(crate) fn engine<'t>(&self, role: Role, target: &'t Target) -> Engine<'t> {
        Engine {
            slot: self.pools.endpoint(role, target),
            target,
            role,
        }
    }

    /// Adds the endpoint of a local decoder with its addresses. It is never replaced.
    pub(crate) fn pin(&self, target: &Target, addresses: &[Address]) {
        let slot = self.pools.pin(Role::Decode, target);
        self.pools.set_addresses(slot, addresses.into());
    }

    /// Stores the result of a name look-up and wakes the tasks that wait for it.
    pub(crate) fn resolved(&self, resolved: Resolved) {
        self.addresses.resolved(&self.pools, resolved);
    }

    /// Returns the addresses of an engine; empty if its name does not resolve.
    pub(crate) async fn addresses<S: Scope<N>>(
        &self,
        scope: &S,
        engine: Engine<'_>,
        deadline: Deadline,
    ) -> Result<Rc<[Address]>, CallError> {
        self.addresses
            .of(&self.pools, scope, engine, deadline)
            .await
    }

    /// Returns whether an engine is this proxy or one of its local decoders. A request must
    /// not be split with such a prefiller: the decoder would be handed its own KV cache (an engine
    /// returns 500), or the request would loop.
    pub(crate) fn is_self(&self, engine: Engine<'_>) -> bool {
        self.pools.is_self(engine.slot, |addresses| {
            any_known(addresses.iter().map(&self.is_own))
        })
    }

    /// Returns the number of legs that run as separate tasks.
    pub(crate) fn tasks(&self) -> usize {
        self.tasks.get()
    }

    /// Includes a leg that runs as a separate task in [`Upstreams::tasks`] for as long as the
    /// returned guard exists, so that a drain waits for it.
    pub(crate) fn count_task(self: &Rc<Self>) -> TaskGuard<N> {
        self.tasks.set(self.tasks.get() + 1);
        TaskGuard {
            upstreams: Rc::clone(self),
        }
    }
}

/// Includes a leg that runs as a separate task in [`Upstreams::tasks`] until dropped.
pub(crate) struct TaskGuard<N: Net> {
    upstreams: Rc<Upstreams<N>>,
}

impl<N: Net> Drop for TaskGuard<N> {
    fn drop(&mut self) {
        self.upstreams.tasks.set(self.upstreams.tasks.get() - 1);
    }
}

/// Returns whether one of the results is `Some(true)`; otherwise `None` if one of them is `None`,
/// not known yet.
pub(crate) fn any_known(results: impl Iterator<Item = Option<bool>>) -> Option<bool> {
    let mut found = Some(false);
    for result in results {
        match result {
            Some(true) => return Some(true),
            Some(false) => {}
            None => found = None,
        }
    }
    found
}
