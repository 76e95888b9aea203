//! The interface of policies: a request for an endpoint, and its result.

use crate::fleet::{EndpointIndex, Snapshot};

/// A request for an endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Index of the listener that accepted the client connection.
    pub listener: usize,
    /// Index of the pool that serves the listener's requests.
    pub pool: usize,
    /// Value of the first `x-data-parallel-host-port` field; `None` without one.
    pub named: Option<&'a [u8]>,
}

/// Reason why a policy returned no endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoEndpoint {
    /// The request names an endpoint that does not exist.
    Unknown,
    /// The fleet has no endpoint for the request.
    Empty,
}

/// A policy.
pub trait Choose: Send + Sync {
    /// Returns the endpoint that serves a request.
    ///
    /// # Errors
    /// There is no such endpoint.
    fn choose(&self, fleet: &Snapshot, ask: &Ask<'_>) -> Result<EndpointIndex, NoEndpoint>;
}
