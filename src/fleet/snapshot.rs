//! The state of the fleet at one time, as shards read it.

use std::sync::Arc;

use super::endpoint::{Endpoint, EndpointId, Reservation};
use super::{AllowList, Target};

/// The state of the fleet at one time. Immutable: each change creates a new snapshot.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Number of changes before this snapshot.
    pub epoch: u64,
    /// The local decoders, in rank order.
    pub decoders: Box<[Arc<Endpoint>]>,
    /// The targets that requests may name; `None` allows any.
    pub allow: Option<Arc<Allow>>,
    /// The pods of a `MoRI-IO` deployment, with names resolved; `None` if none is configured by
    /// name.
    pub mori: Option<Arc<MoriHosts>>,
    /// Whether the process accepts requests.
    pub service: Service,
}

impl Snapshot {
    /// Counts a request as in flight at an endpoint. Returns `None` if the snapshot does not
    /// contain the endpoint.
    #[must_use]
    pub fn reserve(&self, id: EndpointId) -> Option<Reservation> {
        let mut decoders = self.decoders.iter();
        decoders
            .find(|endpoint| endpoint.id == id)
            .map(Reservation::new)
    }
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
