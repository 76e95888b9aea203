//! Reads the engines that a request names, without those that it may not name.

use super::allowlist;
use super::exchange::Exchange;
use super::request::Request;
use crate::fault::Incident;
use crate::fleet::TargetError;
use crate::h1::Name;
use crate::metrics::{Named, RoutingDoubt};
use crate::net::Net;
use crate::pd::connector::PrefixPull;
use crate::pd::routing_headers::{OwnAddress, Routing, RoutingRules};

/// Prefix of the names of llm-d's routing headers.
const ROUTING_PREFIX: &[u8] = b"x-llm-d-";
/// Bytes of an unknown header name that the log shows.
const ROUTING_NAME_BYTES_MAX: usize = 64;

/// Reads the prefill candidates, encoders and cache source from the request head, and removes
/// encoders and a cache source that are not allowed. The prefill candidates have yet to be checked.
///
/// # Errors
/// A prefill target is malformed.
pub(super) fn read<N: Net>(exchange: &Exchange<'_, N>) -> Result<Routing, TargetError> {
    let shard = exchange.shard;
    let config = &shard.config;
    let can_pull = match config.pd.connector().rules().prefix_pull {
        PrefixPull::Always => true,
        PrefixPull::IfEnabled => config.pd.p2p_pull,
        PrefixPull::Never => false,
    };
    let listener = config.listeners.get(exchange.client.rank());
    let rules = RoutingRules {
        prefiller_tls: config.tls.prefiller.is_some(),
        encoder_tls: config.tls.encoder.is_some(),
        encodes: config.pd.encoder.is_some(),
        random: config.pd.prefiller_sampling.then(|| shard.net.random()),
        pull_unless: can_pull.then(|| OwnAddress {
            ip: config.pod_ip.as_deref(),
            port: listener.map(|listener| listener.address.port()),
        }),
    };
    let mut routing = Routing::read(|name| exchange.request.values(name), &rules)?;
    if routing.has_conflict {
        shard.metrics.routing_doubt(RoutingDoubt::Conflict);
        shard.report(Incident::RoutingConflict);
    }
    if let Some(name) = unknown_routing_header(&exchange.request) {
        shard.metrics.routing_doubt(RoutingDoubt::Unknown);
        shard.report(Incident::UnknownRoutingHeader(name));
    }
    allowlist::drop_denied(shard, Named::Encode, &mut routing.encoders);
    routing.source = routing
        .source
        .filter(|source| allowlist::permits(shard, Named::CacheSource, source));
    Ok(routing)
}

/// Returns the name of a header field that only a scheduler newer than this proxy sends: one with
/// the prefix of routing headers and an unknown name. Returns `None` if the request has none.
fn unknown_routing_header(request: &Request) -> Option<String> {
    let bytes = &request.bytes;
    let mut unknown = request.head.fields.iter().filter(|field| {
        let name = field.name.of(bytes);
        let prefix = name.get(..ROUTING_PREFIX.len());
        field.known == Name::Other
            && prefix.is_some_and(|prefix| prefix.eq_ignore_ascii_case(ROUTING_PREFIX))
    });
    let name = unknown.next()?.name.of(bytes);
    let name = &name[..name.len().min(ROUTING_NAME_BYTES_MAX)];
    Some(String::from_utf8_lossy(name).to_ascii_lowercase())
}
