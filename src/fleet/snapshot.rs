//! The state of the fleet at one time, as shards read it.

use std::sync::Arc;

use super::endpoint::{Endpoint, Reservation};
use super::{AllowList, Target};

/// The state of the fleet at one time. Immutable: each change creates a new snapshot.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Number of changes before this snapshot.
    pub epoch: u64,
    /// The pools, in the order of the configuration.
    pub pools: Box<[Pool]>,
    /// The targets that requests may name; `None` allows any.
    pub allow: Option<Arc<Allow>>,
    /// The pods of a `MoRI-IO` deployment, with names resolved; `None` if none is configured by
    /// name.
    pub mori: Option<Arc<MoriHosts>>,
    /// Whether the process accepts requests.
    pub service: Service,
}

/// A set of endpoints of one role.
#[derive(Clone, Debug, Default)]
pub struct Pool {
    /// The endpoints.
    pub endpoints: Box<[Arc<Endpoint>]>,
}

impl Snapshot {
    /// Returns the endpoints of all pools.
    pub fn endpoints(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.pools.iter().flat_map(|pool| &pool.endpoints)
    }

    /// Counts a request as in flight at the endpoint that was chosen. Returns `None` if the
    /// snapshot does not contain it.
    #[must_use]
    pub fn reserve(&self, chosen: EndpointIndex) -> Option<Reservation> {
        let pool = self.pools.get(chosen.pool)?;
        pool.endpoints.get(chosen.at).map(Reservation::new)
    }
}

/// Position of an endpoint in a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndpointIndex {
    /// Index of the pool in [`Snapshot::pools`].
    pub pool: usize,
    /// Index of the endpoint in [`Pool::endpoints`].
    pub at: usize,
}

/// Whether the process accepts requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Service {
    /// It does.
    #[default]
    Open,
    /// It does, but its health endpoint returns 503: a drain has started, and its settle time
    /// (`--drain-settle`) has not passed.
    Settling,
    /// Shards stop accepting connections and close idle ones, and open ones accept no further
    /// request.
    Draining,
}

/// The pods of a `MoRI-IO` deployment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MoriHosts {
    /// Addresses or names of the prefill pods, in rank order; may be empty.
    pub prefill: Vec<String>,
    /// Addresses or names of the decode pods, in rank order; may be empty.
    pub decode: Vec<String>,
}

/// The targets that requests may name.
#[derive(Clone, Debug, Default)]
pub struct Allow {
    /// The rules of all sources.
    pub list: AllowList,
    /// Name of the source that has not been read yet, for messages; `None` if all have been.
    pub awaited: Option<String>,
}

/// Whether a request may name a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permit {
    /// The target is on the list.
    Allowed,
    /// The target is not on the list.
    Denied,
    /// The target is not on the list, but a source that has not been read yet may allow it.
    Unknown,
}

impl Allow {
    /// Returns whether a request may name this target.
    #[must_use]
    pub fn check(&self, target: &Target) -> Permit {
        if self.list.permits(target) {
            Permit::Allowed
        } else if self.awaited.is_none() {
            Permit::Denied
        } else {
            Permit::Unknown
        }
    }
}
