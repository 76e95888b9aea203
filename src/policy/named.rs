//! The policy of the sidecar: the decoder of the listener's rank, or the one that the request
//! names.

use super::contract::{Ask, Choose, NoEndpoint};
use crate::fleet::{EndpointIndex, Snapshot};

/// Chooses the decoder of the rank whose listener accepted the connection, or the one that
/// `x-data-parallel-host-port` names. Only rank 0's listener honours the field, as in pd-sidecar
/// (`docs/pd-sidecar.md#data-parallel-ranks`).
#[derive(Clone, Debug)]
pub(super) struct Named {
    /// The value of the field that names each pool, in the order of the pools.
    names: Vec<String>,
}

impl Named {
    /// Creates the policy for pools with these names, in their order.
    pub(super) const fn new(names: Vec<String>) -> Self {
        Self { names }
    }
}

impl Choose for Named {
    fn choose(&self, fleet: &Snapshot, ask: &Ask<'_>) -> Result<EndpointIndex, NoEndpoint> {
        let pool = match ask.named.filter(|_| ask.listener == 0) {
            None => ask.pool,
            Some(wanted) => {
                let mut names = self.names.iter();
                let pool = names.position(|name| name.as_bytes() == wanted);
                pool.ok_or(NoEndpoint::Unknown)?
            }
        };
        let endpoints = fleet.pools.get(pool).map(|pool| &pool.endpoints);
        if endpoints.is_none_or(|endpoints| endpoints.is_empty()) {
            return Err(NoEndpoint::Empty);
        }
        Ok(EndpointIndex { pool, at: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{EndpointSpec, Registry, Target};

    #[test]
    fn only_rank_0_honours_the_field() {
        let pools = [8200, 8201].map(|port| {
            vec![EndpointSpec {
                target: Target::new("localhost", port).unwrap(),
                addresses: Vec::new(),
            }]
        });
        let registry = Registry::new(pools.into());
        let policy = Named::new(vec!["10.0.0.1:8000".to_owned(), "10.0.0.1:8001".to_owned()]);
        let fleet = registry.snapshot();
        let [first, second] = [0, 1].map(|pool| EndpointIndex { pool, at: 0 });
        for (listener, named, want) in [
            (0, None, Ok(first)),
            (1, None, Ok(second)),
            (0, Some("10.0.0.1:8001"), Ok(second)),
            (0, Some("10.0.0.1:8000"), Ok(first)),
            (1, Some("10.0.0.1:8000"), Ok(second)),
            (1, Some("elsewhere"), Ok(second)),
            (0, Some("10.0.0.1:8002"), Err(NoEndpoint::Unknown)),
            (0, Some(""), Err(NoEndpoint::Unknown)),
            (2, None, Err(NoEndpoint::Empty)),
        ] {
            let named = named.map(str::as_bytes);
            let ask = Ask {
                listener,
                pool: listener,
                named,
            };
            assert_eq!(policy.choose(fleet, &ask), want, "{ask:?}");
        }
    }
}
