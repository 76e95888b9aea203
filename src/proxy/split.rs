//! Requests served by legs: the body is read completely, then the legs run in the order that the
//! connector prescribes.
//!
//! [`crate::pd`] decides the contents of each leg. This file and those of the orders run them:
//! `prefill` and `decode` (serial), `concurrent`, and `decode_first`.

use std::rc::Rc;
use std::sync::Arc;

use super::body::{self, Body};
use super::exchange::Exchange;
use super::relay::Rewrite;
use super::routing::Routing;
use crate::config::{Config, MoriConfig, OnPrefillFailure};
use crate::fault::Fault;
use crate::fleet::Target;
use crate::json::EditError;
use crate::metrics::{Direction, Phase};
use crate::net::{Instant, Net};
use crate::pd::chunked::Progress;
use crate::pd::{
    Api, Connector, Encoded, KvSource, Leg, Order, Outcome, PdRequest, Peer, Reason, Role, Uuid,
    connector, peer, request,
};
use crate::upstream::connection::Connection;
use crate::upstream::error::CallError;
use crate::upstream::pool::EndpointId;
use crate::upstream::response::Response;
use crate::upstream::wait::{Deadline, Timeout};

/// A request served by legs after its body has been read, and everything its legs are built from.
pub(super) struct Split {
    pub(super) api: Api,
    pub(super) body: Rc<Body>,
    pub(super) decoder: EndpointId,
    pub(super) encoded: Option<Encoded>,
    /// Progress of a chunked decode; `None` if the request is decoded in one call.
    pub(super) chunk: Option<Box<Progress>>,
    source: Option<Box<(Target, KvSource)>>,
    uuid: Uuid,
    random: u64,
    config: Arc<Config>,
    /// `config.pd.mori` with pod names resolved; `None` if no pod is configured by name.
    mori: Option<Arc<MoriConfig>>,
}

impl Split {
    pub(super) fn pd_request(&self) -> PdRequest<'_> {
        PdRequest {
            api: self.api,
            document: &self.body.document,
            body: &self.body.bytes,
            uuid: self.uuid,
            random: self.random,
            owned: self.config.pd.owned(),
            encoded: self.encoded.as_ref(),
            mori: self.mori.as_deref().unwrap_or(&self.config.pd.mori),
            chunk: self.chunk.as_deref(),
        }
    }

    pub(super) fn connector(&self) -> &'static dyn Connector {
        self.config.pd.connector()
    }

    /// Replaces the request's random transfer ids by new ones, so that its legs can be sent again
    /// as a new transfer.
    pub(super) fn rename<N: Net>(&mut self, net: &N) {
        self.uuid = Uuid::v4([net.random(), net.random()]);
        self.random = net.random();
    }

    /// Returns the prefill engine at `target` in the form that transfer parameters need.
    pub(super) fn peer(&self, target: &Target) -> Peer {
        let bootstrap_port = self.connector().bootstrap_port(&self.config.pd.ports);
        Peer {
            target: target.clone(),
            p2p_port: self.p2p_port(target),
            bootstrap_port,
            engine: None,
            source: self.source_for(target),
        }
    }

    /// Returns the source from which the prefill engine at `target` pulls a cached prefix. Returns
    /// `None` if the request names none, or names `target` itself: an engine does not pull from
    /// itself.
    fn source_for(&self, target: &Target) -> Option<Box<KvSource>> {
        let (from, source) = self.source.as_deref()?;
        (from != target).then(|| Box::new(source.clone()))
    }

    fn p2p_port(&self, target: &Target) -> u16 {
        let ranks = &self.config.ranks;
        let listen_port = ranks.first().map_or(0, |rank| rank.listen.port());
        peer::p2p_port(target, self.config.pd.ports.p2p, listen_port, ranks.len())
    }
}

/// An engine's response that the client is to receive. Its head has arrived, and the rest must be
/// relayed.
pub(super) struct PendingResponse<N: Net> {
    pub(super) upstream: Connection<N>,
    pub(super) response: Response,
    pub(super) rewrite: Rewrite,
}

impl<N: Net> Exchange<'_, N> {
    /// Serves an intercepted request whose body must be known before its first leg is sent: reads
    /// the body, runs the legs and sends the response.
    pub(super) async fn split(
        &mut self,
        api: Api,
        routing: Routing,
        decoder: EndpointId,
        expects: bool,
    ) -> Result<(), Fault> {
        let targets = routing.prefillers;
        self.stats.outcome = Some(if targets.is_empty() {
            (Outcome::LocalPolicy, Reason::NoPrefiller)
        } else {
            (Outcome::Remote, Reason::None)
        });
        let arrived = self.body_done || self.bytes.len() > self.head.len;
        if expects && !arrived {
            self.send_continue().await?;
        }
        let body = Rc::new(body::receive(self).await?);
        let mut received = self.shard.net.clock();
        let config = Arc::clone(&self.shard.config);
        let removed = request::client_owned(&body.document, config.pd.owned());
        if removed > 0 {
            self.shard.metrics.masked(removed);
        }
        let net = &self.shard.net;
        let mut split = Split {
            api,
            body,
            decoder,
            encoded: None,
            chunk: None,
            source: None,
            uuid: Uuid::v4([net.random(), net.random()]),
            random: net.random(),
            config,
            mori: self.shard.mori.as_ref().map(|mori| mori.load_full()),
        };
        split.source = routing.source.map(|target| {
            let source = KvSource {
                uuid: Uuid::v4([net.random(), net.random()]),
                host: target.host(),
                port: split.p2p_port(&target),
            };
            Box::new((target, source))
        });
        self.trace_split(&split);
        if !routing.encoders.is_empty() {
            self.enter(Phase::Encode);
            self.encode(&mut split, &routing.encoders).await?;
            // The time spent by the encoders is not overhead of the proxy.
            received = self.shard.net.clock();
        }
        let pending = if targets.is_empty() {
            self.record_request_overhead(received);
            if split.source.is_none() {
                self.cut(&mut split);
            }
            self.decode_alone(&split).await?
        } else {
            self.run_legs(&mut split, &targets, received).await?
        };
        if split.chunk.is_some() {
            return Box::pin(self.respond_in_chunks(split, pending)).await;
        }
        // The response may take minutes, and the prompt is no longer needed.
        drop(split);
        let PendingResponse {
            upstream,
            response,
            rewrite,
        } = pending;
        Box::pin(self.relay(upstream, response, rewrite)).await
    }

    async fn run_legs(
        &mut self,
        split: &mut Split,
        targets: &[Target],
        received: Instant,
    ) -> Result<PendingResponse<N>, Fault> {
        let connector = split.connector();
        let mut local = connector::keep_local(connector, &split.pd_request());
        if local.is_none() && self.names_self(&targets[0]).await? {
            local = Some(Reason::SelfTarget);
        }
        self.record_request_overhead(received);
        if let Some(reason) = local {
            self.stats.outcome = Some((Outcome::LocalPolicy, reason));
            let leg = split.pd_request().local_leg()?;
            return self.decode_local(split, &leg).await;
        }
        let order = connector.order(&split.pd_request());
        let pending = match order {
            Order::Serial => self.serial(split, targets).await,
            Order::Concurrent => Box::pin(self.concurrent(split, targets)).await,
            Order::DecodeFirst => Box::pin(self.decode_first(split, targets)).await,
        };
        let fault = match pending {
            Err(fault) if self.may_fall_back(fault) => fault,
            pending => return pending,
        };
        self.shard.count_fault(fault);
        self.stats.outcome = Some((Outcome::LocalFallback, fault.reason()));
        let leg = split.pd_request().local_leg()?;
        self.decode_local(split, &leg).await
    }

    /// Returns whether the decoder serves the request alone after its prefill leg failed with
    /// `fault`: if `--on-prefill-failure` is `decode` and no response has been started.
    fn may_fall_back(&self, fault: Fault) -> bool {
        self.shard.config.pd.on_prefill_failure == OnPrefillFailure::Decode
            && self.stats.status == 0
            && fault.is_prefill()
    }

    /// Sends the request to the decoder without a prefill leg, using the encoders' outputs or a
    /// prefix cached by another engine if available. Returns the decoder's response.
    async fn decode_alone(&mut self, split: &Split) -> Result<PendingResponse<N>, Fault> {
        let pd_request = split.pd_request();
        let leg: Result<Leg, EditError> = match split.source.as_deref() {
            Some((_, source)) if split.encoded.is_none() => pd_request.source_leg(&source.params()),
            Some(_) | None => pd_request.local_leg(),
        };
        let leg = leg?;
        self.decode_local(split, &leg).await
    }

    fn record_request_overhead(&mut self, since: Instant) {
        let took = self.shard.net.clock().since(since).as_nanos();
        let took_ns = u64::try_from(took).unwrap_or(u64::MAX);
        self.shard.metrics.overhead(Direction::Request, took_ns);
        self.stats.proxy_ns += took_ns;
    }

    /// Returns whether a prefill target is this proxy or one of its decoders. Returns `false` if a
    /// name does not resolve in time; the connect attempt then reports the failure.
    async fn names_self(&self, target: &Target) -> Result<bool, Fault> {
        let id = self.shard.upstreams.endpoint(Role::Prefill, target);
        let wait = self.shard.config.timeouts.connect;
        let deadline = Deadline::of(self.shard.net.now(), wait, Timeout::Connect);
        match self
            .shard
            .upstreams
            .addresses(self, id, target, deadline)
            .await
        {
            Ok(_) => Ok(self.shard.upstreams.is_self(id)),
            Err(CallError::Disconnected) => Err(Fault::ClientGone),
            Err(_) => Ok(false),
        }
    }
}
