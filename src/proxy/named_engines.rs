//! Reads the engines that a request names from its head.

use super::allowlist;
use super::exchange::Exchange;
use crate::fleet::{Target, TargetError};
use crate::h1::Name;
use crate::metrics::Named;
use crate::net::Net;
use crate::pd::connector::PrefixPull;
use crate::pd::routing_headers::{Candidates, list};

/// The engines that a request names in addition to its decoder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Routing {
    /// Prefill candidates in the order to try them. If empty, the decoder computes the prompt.
    pub(super) prefillers: Vec<Target>,
    /// Encoders among which the request's multimodal items are distributed. If empty, there is no
    /// encode stage.
    pub(super) encoders: Vec<Target>,
    /// Number of encoders that the request names, including those that are not allowed.
    pub(super) encoders_named: usize,
    /// The engine from which the prefill engine (or, without a prefill leg, the decoder) pulls a
    /// cached prefix of the prompt; `None` if the request names no usable one.
    pub(super) source: Option<Target>,
}

impl Routing {
    /// Whether the request involves no engine other than its decoder.
    pub(super) fn is_local(&self) -> bool {
        self.prefillers.is_empty() && self.encoders.is_empty() && self.source.is_none()
    }
}

/// Reads the prefill candidates, encoders and cache source from the request head.
///
/// # Errors
/// A prefill target is malformed. Malformed encoders and cache sources are ignored, because
/// without them the request is served correctly, only more slowly.
pub(super) fn read<N: Net>(exchange: &Exchange<'_, N>) -> Result<Routing, TargetError> {
    let prefillers = prefillers(exchange)?;
    let mut encoders = encoders(exchange);
    let encoders_named = encoders.len();
    allowlist::drop_denied(exchange.shard, Named::Encode, &mut encoders);
    Ok(Routing {
        prefillers,
        encoders,
        encoders_named,
        source: cache_source(exchange),
    })
}

fn prefillers<N: Net>(exchange: &Exchange<'_, N>) -> Result<Vec<Target>, TargetError> {
    let new = exchange.request.values(Name::XPrefillerHostPort);
    let old = exchange.request.values(Name::XPrefillerUrl);
    let sampling = exchange.shard.config.pd.prefiller_sampling;
    let random = sampling.then(|| exchange.shard.net.random());
    let is_tls = exchange.shard.config.tls.prefiller.is_some();
    Candidates::read(new, old, is_tls).choose(random)
}

fn encoders<N: Net>(exchange: &Exchange<'_, N>) -> Vec<Target> {
    if exchange.shard.config.pd.encoder.is_none() {
        return Vec::new();
    }
    let is_tls = exchange.shard.config.tls.encoder.is_some();
    list(exchange.request.values(Name::XEncoderHostsPorts), is_tls)
}

/// Returns the engine to pull a cached prefix from, or `None` if the request names none, it is
/// not allowed, or the connector does not support it. Only the first field line counts, and a
/// source that is this rank itself is ignored (`docs/pd-sidecar.md#cached-prefix-pulls`).
fn cache_source<N: Net>(exchange: &Exchange<'_, N>) -> Option<Target> {
    let value = exchange
        .request
        .values(Name::XKvCacheSourceHostPort)
        .next()?;
    let config = &exchange.shard.config;
    let can_pull = match config.pd.connector().rules().prefix_pull {
        PrefixPull::Always => true,
        PrefixPull::IfEnabled => config.pd.p2p_pull,
        PrefixPull::Never => false,
    };
    if !can_pull {
        return None;
    }
    let source = Target::parse_with_port(value.trim_ascii()).ok()?;
    let own_port = config
        .listeners
        .get(exchange.client.rank)
        .map(|listener| listener.address.port());
    let own_ip = config.pod_ip.as_deref();
    let is_own = own_ip.is_some_and(|ip| source.host() == ip) && source.port() == own_port;
    (!is_own && allowlist::permits(exchange.shard, Named::CacheSource, &source)).then_some(source)
}
