//! The engine ranks that a process serves, and the state of each that all shards share.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};

use arc_swap::ArcSwapOption;

use super::{Address, EngineVersion, Target};

/// Identifies an endpoint in the process. The id of a removed endpoint is not used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct EndpointId(pub(super) u32);

/// The description of an engine rank by the configuration or by discovery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSpec {
    /// Location of the engine: a host and a port, or a Unix socket.
    pub target: Target,
    /// The addresses of the engine to try, in order. Empty if its name has not been resolved.
    pub addresses: Vec<Address>,
}

/// An engine rank.
#[derive(Debug)]
pub struct Endpoint {
    /// Identifies the endpoint.
    pub id: EndpointId,
    /// Location of the engine: a host and a port, or a Unix socket.
    pub target: Target,
    /// The addresses of the engine to try, in order, as of the time when it was added. Empty if its
    /// name had not been resolved.
    pub addresses: Vec<Address>,
    state: EndpointState,
}

/// The state of an endpoint that changes while the endpoint exists.
#[derive(Debug, Default)]
// In separate cache lines, because shards write it for each request.
#[repr(align(128))]
struct EndpointState {
    in_flight: AtomicU32,
    health: AtomicU8,
    version: ArcSwapOption<EngineVersion>,
}

/// Result of the latest health check of an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// It has not been checked.
    #[default]
    Unknown,
    /// It responded with 200.
    Ready,
    /// It responded with another status.
    NotReady,
    /// It accepted a connection but did not respond in time.
    Silent,
    /// It did not accept a connection.
    Unreachable,
}

impl Health {
    const ALL: [Self; 5] = [
        Self::Unknown,
        Self::Ready,
        Self::NotReady,
        Self::Silent,
        Self::Unreachable,
    ];

    /// Returns the result as text for the readiness page.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Ready => "ready",
            Self::NotReady => "not ready",
            Self::Silent => "silent",
            Self::Unreachable => "unreachable",
        }
    }
}

impl Endpoint {
    pub(super) fn new(id: EndpointId, spec: EndpointSpec) -> Self {
        Self {
            id,
            target: spec.target,
            addresses: spec.addresses,
            state: EndpointState::default(),
        }
    }

    /// Returns the number of requests that the endpoint is serving, over all shards.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.state.in_flight.load(Relaxed)
    }

    /// Returns the result of the latest health check.
    #[must_use]
    pub fn health(&self) -> Health {
        let index = usize::from(self.state.health.load(Relaxed));
        Health::ALL.get(index).copied().unwrap_or_default()
    }

    /// Returns the version of the engine, or `None` if it is not known.
    #[must_use]
    pub fn version(&self) -> Option<Arc<EngineVersion>> {
        self.state.version.load_full()
    }

    pub(super) fn set_version(&self, version: Option<EngineVersion>) {
        self.state.version.store(version.map(Arc::new));
    }

    pub(super) fn set_health(&self, health: Health) {
        self.state.health.store(health as u8, Relaxed);
    }
}

/// A request counted as in flight at the endpoint that serves it, until dropped.
#[derive(Debug)]
pub struct Reservation {
    endpoint: Arc<Endpoint>,
}

impl Reservation {
    pub(super) fn new(endpoint: &Arc<Endpoint>) -> Self {
        endpoint.state.in_flight.fetch_add(1, Relaxed);
        Self {
            endpoint: Arc::clone(endpoint),
        }
    }
}

impl Deref for Reservation {
    type Target = Arc<Endpoint>;

    fn deref(&self) -> &Arc<Endpoint> {
        &self.endpoint
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.endpoint.state.in_flight.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_selects_the_health_of_that_value() {
        for (index, health) in Health::ALL.into_iter().enumerate() {
            assert_eq!(health as usize, index);
        }
    }
}
