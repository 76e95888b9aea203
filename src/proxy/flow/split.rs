//! A request served by legs: what its legs are built from.

use std::rc::Rc;
use std::sync::Arc;

use crate::api::Api;
use crate::config::Config;
use crate::fleet::{Endpoint, MoriHosts, Target};
use crate::net::Net;
use crate::pd::decide;
use crate::pd::decode_chunks::Progress;
use crate::pd::{Connector, Encoded, KvSource, PdRequest, Peer, Uuid, peer};
use crate::proxy::body::Body;
use crate::proxy::shard::Shard;

/// A request served by legs after its body has been read, and everything its legs are built from.
pub(super) struct Split {
    pub(super) api: Api,
    pub(super) body: Rc<Body>,
    pub(super) decoder: Arc<Endpoint>,
    pub(super) encoded: Option<Encoded>,
    /// Progress of a chunked decode; `None` if the request is decoded in one call.
    pub(super) chunk: Option<Box<Progress>>,
    /// The engine from which a cached prefix is pulled, if the request names one.
    pub(super) source: Option<Box<(Target, KvSource)>>,
    uuid: Uuid,
    config: Arc<Config>,
    /// The pods of `MoRI-IO` with names resolved; `None` if none is configured by name.
    mori: Option<Arc<MoriHosts>>,
}

impl Split {
    /// Returns the split request of a body, with new random transfer ids. `source` is the engine
    /// from which a cached prefix is pulled.
    pub(super) fn new<N: Net>(
        shard: &Shard<N>,
        api: Api,
        body: Body,
        decoder: &Arc<Endpoint>,
        source: Option<Target>,
    ) -> Self {
        let net = &shard.net;
        let mut split = Self {
            api,
            body: Rc::new(body),
            decoder: Arc::clone(decoder),
            encoded: None,
            chunk: None,
            source: None,
            uuid: Uuid::v4([net.random(), net.random()]),
            config: Arc::clone(&shard.config),
            mori: shard.with_fleet(|fleet| fleet.mori.clone()),
        };
        split.source = source.map(|target| {
            let source = KvSource {
                uuid: Uuid::v4([net.random(), net.random()]),
                host: target.host(),
                port: split.p2p_port(&target),
            };
            Box::new((target, source))
        });
        split
    }

    pub(super) fn pd_request(&self) -> PdRequest<'_> {
        PdRequest {
            api: self.api,
            document: &self.body.document,
            body: self.body.bytes(),
            uuid: self.uuid,
            owned: self.config.pd.owned(),
            encoded: self.encoded.as_ref(),
            mori: &self.config.pd.mori,
            atom_dp_size: self.config.pd.atom_dp_size,
            hosts: self.mori.as_deref().unwrap_or(&self.config.pd.mori.hosts),
            chunk: self.chunk.as_deref(),
        }
    }

    /// Drops the body, from which no further leg can be built.
    pub(super) fn drop_body<N: Net>(&mut self, shard: &Shard<N>) {
        self.body = Rc::new(Body::empty(shard));
    }

    /// Returns whether the request forces the call of a tool.
    pub(super) fn forces_tool(&self) -> bool {
        decide::forces_tool(self.api, &self.body.document, self.body.bytes())
    }

    pub(super) fn connector(&self) -> &'static dyn Connector {
        self.config.pd.connector()
    }

    /// Replaces the request's random transfer ids by new ones, so that its legs can be sent again
    /// as a new transfer.
    pub(super) fn rename<N: Net>(&mut self, net: &N) {
        self.uuid = Uuid::v4([net.random(), net.random()]);
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
        let ranks = &self.config.listeners;
        let listen_port = ranks.first().map_or(0, |rank| rank.address.port());
        peer::p2p_port(target, self.config.pd.ports.p2p, listen_port, ranks.len())
    }
}
