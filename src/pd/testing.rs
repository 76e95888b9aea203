//! A request and helpers for the unit tests of the connectors.

use std::rc::Rc;

use serde_json::Value;

use super::bootstrap::BootstrapEngine;
use super::connector::Connector;
use super::leg::Leg;
use super::options::MoriConfig;
use super::peer::Peer;
use super::request::{CLIENT_OWNED_KV, Encoded, PdRequest, WATCH};
use super::uuid::Uuid;
use crate::api::Api;
use crate::budget::Kept;
use crate::fleet::Target;
use crate::json::{Document, Scanner, Watch};

/// The data that a [`PdRequest`] borrows. A test creates it from a request body.
pub(super) struct Subject {
    pub(super) api: Api,
    pub(super) body: String,
    pub(super) document: Document,
    pub(super) mori: MoriConfig,
    pub(super) encoded: Option<Encoded>,
    pub(super) owned: Watch,
}

/// Text form of the UUID of [`Subject::request`].
pub(super) const NAME: &str = "01234567-89ab-cdef-0123-456789abcdef";

impl Subject {
    pub(super) fn new(api: Api, body: &str) -> Self {
        let mut scanner = Scanner::new(WATCH);
        scanner.feed(body.as_bytes()).unwrap();
        Self {
            api,
            body: body.to_owned(),
            document: scanner.finish().unwrap(),
            mori: MoriConfig::default(),
            encoded: None,
            owned: CLIENT_OWNED_KV,
        }
    }

    pub(super) fn request(&self) -> PdRequest<'_> {
        PdRequest {
            api: self.api,
            document: &self.document,
            body: self.body.as_bytes(),
            uuid: Uuid::of_digits(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef),
            owned: self.owned,
            encoded: self.encoded.as_ref(),
            mori: &self.mori,
            hosts: &self.mori.hosts,
            atom_dp_size: 8,
            chunk: None,
        }
    }
}

pub(super) fn peer() -> Peer {
    Peer {
        target: Target::parse(b"10.4.0.7:8000").unwrap(),
        p2p_port: 7779,
        bootstrap_port: 8998,
        engine: Some(BootstrapEngine {
            rank: 1,
            id: (*b"\"e1\"").into(),
        }),
        source: None,
    }
}

/// Returns the prefill leg and the decode leg of a concurrent connector, in this order.
pub(super) fn pair(connector: &dyn Connector, request: &PdRequest<'_>, peer: &Peer) -> [Leg; 2] {
    [
        connector.prefill_leg(request, peer).unwrap(),
        connector.decode_leg(request, peer, None).unwrap(),
    ]
}

/// Returns the body that a leg sends, as parsed JSON.
pub(super) fn apply(leg: &Leg, body: &str) -> Value {
    let pieces = leg.body.pieces(body.as_bytes());
    let bytes: Vec<u8> = pieces.flatten().copied().collect();
    assert_eq!(bytes.len(), leg.body.len());
    serde_json::from_slice(&bytes).unwrap()
}

/// Returns a handoff with this text.
pub(super) fn kept(text: Option<&str>) -> Option<Rc<Kept>> {
    text.map(|text| Rc::new(Kept::unlimited(text)))
}
