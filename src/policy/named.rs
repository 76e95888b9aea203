//! The policy of the sidecar: the decoder of the listener's rank, or the one that the request
//! names.

use super::{Ask, Choice, Choose, Needs, NoEndpoint};
use crate::fleet::Snapshot;

/// Chooses the decoder of the rank whose listener accepted the connection, or the one that
/// `x-data-parallel-host-port` names. Only rank 0's listener honours the field, as in pd-sidecar
/// (`docs/pd-sidecar.md#data-parallel-ranks`).
#[derive(Clone, Debug)]
pub struct Named {
    /// The value of the field that names each rank, in rank order.
    names: Vec<String>,
}

impl Named {
    /// Creates the policy for ranks with these names, in rank order.
    #[must_use]
    pub const fn new(names: Vec<String>) -> Self {
        Self { names }
    }
}

impl Choose for Named {
    fn needs(&self) -> Needs {
        Needs::Head
    }

    fn choose(&self, fleet: &Snapshot, ask: &Ask<'_>) -> Result<Choice, NoEndpoint> {
        let (rank, branch) = match ask.named.filter(|_| ask.listener_rank == 0) {
            None => (ask.listener_rank, "listener"),
            Some(wanted) => {
                let mut names = self.names.iter();
                let rank = names.position(|name| name.as_bytes() == wanted);
                (rank.ok_or(NoEndpoint::Unknown)?, "named")
            }
        };
        let endpoint = fleet.decoders.get(rank).ok_or(NoEndpoint::Empty)?.id;
        Ok(Choice { endpoint, branch })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{EndpointSpec, Registry, Target};

    #[test]
    fn only_rank_0_honours_the_field() {
        let ports = [8200, 8201];
        let registry = Registry::new(
            ports
                .map(|port| EndpointSpec {
                    target: Target::new("localhost", port).unwrap(),
                    addresses: Vec::new(),
                })
                .into(),
        );
        let policy = Named::new(vec!["10.0.0.1:8000".to_owned(), "10.0.0.1:8001".to_owned()]);
        let fleet = registry.snapshot();
        let [first, second] = [0, 1].map(|rank| fleet.decoders[rank].id);
        for (listener_rank, named, want) in [
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
                listener_rank,
                named,
            };
            let chosen = policy.choose(fleet, &ask).map(|choice| choice.endpoint);
            assert_eq!(chosen, want, "{ask:?}");
        }
    }
}
