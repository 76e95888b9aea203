//! Reads the engines that a request names, without those that it may not name.

use super::allowlist;
use super::exchange::Exchange;
use crate::fleet::TargetError;
use crate::metrics::Named;
use crate::net::Net;
use crate::pd::connector::PrefixPull;
use crate::pd::routing_headers::{OwnAddress, Routing, RoutingRules};

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
    let listener = config.listeners.get(exchange.client.rank);
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
    allowlist::drop_denied(shard, Named::Encode, &mut routing.encoders);
    routing.source = routing
        .source
        .filter(|source| allowlist::permits(shard, Named::CacheSource, source));
    Ok(routing)
}
