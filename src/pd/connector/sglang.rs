//! `SGLang`'s bootstrap rooms (`--kv-connector sglang`, `docs/pd-sidecar.md#sglang`).
//!
//! The legs are concurrent and have the same body, which contains the number of the room that the
//! engines use for the transfer.

use std::rc::Rc;

use super::contract::{BASE, Bootstrap, Connector, Order, Rules, SpanNames, Transfer};
use crate::budget::Kept;
use crate::json::{EditError, Level, Quoted, Watch};
use crate::pd::leg::{Leg, Role, Take};
use crate::pd::options::ConnectorPorts;
use crate::pd::peer::Peer;
use crate::pd::request::{CLIENT_OWNED_KV, PdRequest, with_kv};

/// The members that clients must not set: engines find each other by them.
const CLIENT_OWNED: Watch = &with_kv::<{ OWN.len() + CLIENT_OWNED_KV.len() }>(OWN);

const OWN: Watch = &[
    (Level::Top, "bootstrap_host"),
    (Level::Top, "bootstrap_port"),
    (Level::Top, "bootstrap_room"),
    (Level::Top, "bootstrap_pair_key"),
    (Level::Top, "disagg_prefill_dp_rank"),
    (Level::Top, "decode_tp_size"),
    (Level::Parameters, "bootstrap_host"),
    (Level::Parameters, "bootstrap_port"),
    (Level::Parameters, "bootstrap_room"),
    (Level::Parameters, "bootstrap_pair_key"),
    (Level::Parameters, "disagg_prefill_dp_rank"),
    (Level::Parameters, "decode_tp_size"),
];

/// Number of random bits in a room number. Engines accept 63. A request with a list of prompts uses
/// consecutive numbers from the room upwards, so one bit is left for those above the largest room.
const ROOM_BITS: u32 = 62;

/// The connector `sglang`.
pub(super) struct Sglang;

const RULES: Rules = Rules {
    name: "sglang",
    // `SGLang` numbers the rooms of a list of prompts itself.
    client_owned: CLIENT_OWNED,
    transfer: Transfer::Room,
    bootstrap: Bootstrap::Named,
    span_names: SpanNames::Short,
    prefill_needs_decode: true,
    ..BASE
};

impl Connector for Sglang {
    fn rules(&self) -> &'static Rules {
        &RULES
    }

    fn order(&self, _: &PdRequest<'_>) -> Order {
        Order::Concurrent
    }

    fn prefill_leg(&self, request: &PdRequest<'_>, peer: &Peer) -> Result<Leg, EditError> {
        leg(request, peer, Role::Prefill, Take::Nothing)
    }

    fn decode_leg(
        &self,
        request: &PdRequest<'_>,
        peer: &Peer,
        _: Option<&Rc<Kept>>,
    ) -> Result<Leg, EditError> {
        leg(request, peer, Role::Decode, Take::Response(None))
    }

    fn bootstrap_port(&self, ports: &ConnectorPorts) -> u16 {
        ports.sglang_bootstrap
    }

    fn describe(&self, ports: &ConnectorPorts) -> String {
        format!(", bootstrap port {}", ports.sglang_bootstrap)
    }
}

/// Returns the leg of `role`.
fn leg(request: &PdRequest<'_>, peer: &Peer, role: Role, take: Take) -> Result<Leg, EditError> {
    // Engines append the port to it, so an IPv6 address has brackets.
    let host = Quoted(&peer.url_host()).to_string();
    let port = peer.bootstrap_port.to_string();
    // Random rather than the time of day as in pd-sidecar: two proxies must not use the same room
    // because their requests arrive in the same nanosecond.
    let room = request.uuid.number(ROOM_BITS).to_string();
    let mut edits = request.edits();
    edits.set(Level::Top, "bootstrap_host", host.as_bytes());
    edits.set(Level::Top, "bootstrap_port", port.as_bytes());
    edits.set(Level::Top, "bootstrap_room", room.as_bytes());
    request.leg(role, &edits, take)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Api;
    use crate::pd::testing::{Subject, apply, pair, peer};
    use serde_json::json;

    #[test]
    fn s1_both_legs_have_the_same_body_and_room() {
        let body = r#"{"model":"q3","messages":[],"stream":true,"max_tokens":9}"#;
        let subject = Subject::new(Api::Chat, body);
        let [prefill, decode] = pair(&Sglang, &subject.request(), &peer());
        let want = json!({"model": "q3", "messages": [], "stream": true, "max_tokens": 9,
            "bootstrap_host": "10.4.0.7", "bootstrap_port": 8998,
            "bootstrap_room": subject.request().uuid.number(62)});
        assert_eq!(apply(&prefill, body), want);
        assert_eq!(apply(&decode, body), want);
    }
}
