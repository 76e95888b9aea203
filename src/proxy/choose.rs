//! Chooses the endpoint that serves a request, and counts the request as in flight there.

use super::exchange::Exchange;
use crate::api::Route;
use crate::fault::Fault;
use crate::fleet::Reservation;
use crate::h1::Name;
use crate::net::Net;
use crate::policy::{Ask, NoEndpoint};

/// Asks the policy for the decoder of a request and reserves it. Both are one step on one snapshot.
///
/// # Errors
/// `UnknownRank` if the request is a generation request and names a rank that does not exist. For
/// any other request, such a name does not count, as in pd-sidecar, which does not read it there.
pub(super) fn choose<N: Net>(exchange: &Exchange<'_, N>) -> Result<Reservation, Fault> {
    let shard = exchange.shard;
    let request = &exchange.request;
    let named = request.values(Name::XDataParallelHostPort).next();
    let mut ask = Ask {
        listener: exchange.client.rank(),
        pool: shard.config.listeners[exchange.client.rank()].pool,
        named: named.filter(|named| !named.is_empty()),
    };
    let must_exist = matches!(request.route, Route::Intercepted(_));
    shard.with_fleet(|fleet| {
        let mut chosen = shard.policy.choose(fleet, &ask);
        if chosen == Err(NoEndpoint::Unknown) && !must_exist {
            ask.named = None;
            chosen = shard.policy.choose(fleet, &ask);
        }
        match chosen {
            Ok(chosen) => fleet.reserve(chosen).ok_or(Fault::Bug(
                "the policy chose an endpoint that does not exist",
            )),
            Err(NoEndpoint::Unknown) => Err(Fault::UnknownRank),
            Err(NoEndpoint::Empty) => Err(Fault::Bug("a listener without a decoder")),
        }
    })
}
