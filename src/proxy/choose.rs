//! Chooses the endpoint that serves a request, and counts the request as in flight there.

use super::exchange::Exchange;
use crate::fault::Fault;
use crate::fleet::Reservation;
use crate::h1::Name;
use crate::net::Net;
use crate::policy::{Ask, NoEndpoint};

/// Asks the policy for the decoder of a request and reserves it. Both are one step on one snapshot.
///
/// # Errors
/// `UnknownRank` if the request names a rank that does not exist.
pub(super) fn choose<N: Net>(exchange: &Exchange<'_, N>) -> Result<Reservation, Fault> {
    let shard = exchange.shard;
    let ask = Ask {
        listener: exchange.client.rank,
        pool: shard.config.listeners[exchange.client.rank].pool,
        named: exchange.request.values(Name::XDataParallelHostPort).next(),
    };
    shard.with_fleet(|fleet| match shard.policy.choose(fleet, &ask) {
        Ok(chosen) => fleet.reserve(chosen).ok_or(Fault::Bug(
            "the policy chose an endpoint that does not exist",
        )),
        Err(NoEndpoint::Unknown) => Err(Fault::UnknownRank),
        Err(NoEndpoint::Empty) => Err(Fault::Bug("a listener without a decoder")),
    })
}
