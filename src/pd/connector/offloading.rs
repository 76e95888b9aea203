//! vLLM's `OffloadingConnector` with its P2P tier (`--kv-connector offloading`,
//! `docs/pd-sidecar.md#offloading`).
//!
//! Both legs carry a request id that identifies the transfer; the decode leg also carries the
//! address of the prefiller's P2P tier. The prefiller keeps what it has stored under the id for
//! 60 s, so the legs are serial, although they could run together: a decoder that fetches from a
//! prefiller which refused the request keeps memory for 30 s, also after the leg was cancelled
//! (read in vLLM 0.32.0).

use std::rc::Rc;

use super::contract::{BASE, Connector, OnDisconnect, Order, PrefixPull, Rules, Transfer};
use crate::budget::Kept;
use crate::json::{EditError, Quoted};
use crate::pd::edits::Caps;
use crate::pd::handoff::SingleUse;
use crate::pd::leg::{Collected, Leg, Role, Take};
use crate::pd::options::ConnectorPorts;
use crate::pd::peer::Peer;
use crate::pd::request::PdRequest;

/// The connector `offloading`.
pub(super) struct Offloading;

const RULES: Rules = Rules {
    name: "offloading",
    // The decoder reads from the prefiller until the transfer is reported as complete. A prefill
    // leg is over before that.
    decode_on_disconnect: OnDisconnect::UntilFirstByte,
    prefix_pull: PrefixPull::Always,
    transfer: Transfer::Sequence { is_marked: false },
    ..BASE
};

impl Connector for Offloading {
    fn rules(&self) -> &'static Rules {
        &RULES
    }

    fn order(&self, _: &PdRequest<'_>) -> Order {
        Order::Serial
    }

    fn prefill_leg(&self, request: &PdRequest<'_>, peer: &Peer) -> Result<Leg, EditError> {
        let uuid = request.uuid;
        let source = match &peer.source {
            Some(source) => format!(r#","remote_kv_source":{}"#, source.object()),
            None => String::new(),
        };
        let params = format!(r#"{{"remote_decoder":{{"kv_request_id":"{uuid}"}}{source}}}"#);
        request.prefill_leg(params.as_bytes(), Caps::Sent, Take::Transfer)
    }

    fn decode_leg(
        &self,
        request: &PdRequest<'_>,
        peer: &Peer,
        handoff: Option<&Rc<Kept>>,
    ) -> Result<Leg, EditError> {
        let take = Take::Response(request.api.usage_shape());
        if handoff.is_none() {
            return request.leg(Role::Decode, &request.edits(), take);
        }
        let uuid = request.uuid;
        let (host, port) = (peer.host(), peer.p2p_port);
        let host = Quoted(&host);
        let params = format!(
            r#"{{"remote_prefiller":{{"kv_request_id":"{uuid}","remote_host":{host},"remote_port":{port}}}}}"#
        );
        request.decode_leg(params.as_bytes(), take)
    }

    fn handoff(&self, collected: Collected) -> Option<SingleUse> {
        match collected {
            Collected::Handoff(response) => Some(SingleUse::of_transfer(*response)),
            Collected::Whole(_) | Collected::Nothing => None,
        }
    }

    fn describe(&self, ports: &ConnectorPorts) -> String {
        format!(", P2P port {}", ports.p2p)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Api;
    use crate::pd::testing::{NAME, Subject, apply, kept, pair, peer};
    use crate::pd::{KvSource, Uuid};
    use serde_json::json;

    #[test]
    fn p1_p2_the_prefill_leg_is_capped_and_the_decode_leg_is_not() {
        let body = r#"{"prompt":"hi","max_tokens":32,"min_tokens":4,"stream":true,"kv_transfer_params":{"x":1}}"#;
        let subject = Subject::new(Api::Completions, body);
        let (request, peer) = (subject.request(), peer());
        let [prefill, alone] = pair(&Offloading, &request, &peer);
        let decode = Offloading
            .decode_leg(&request, &peer, kept(Some("")).as_ref())
            .unwrap();
        let want = json!({"prompt": "hi", "max_tokens": 32, "min_tokens": 4, "stream": true});
        assert_eq!(
            apply(&alone, body),
            want,
            "without a prefill that can be fetched"
        );
        let want = json!({"prompt": "hi", "max_tokens": 1, "min_tokens": 1, "stream": false,
            "kv_transfer_params": {"remote_decoder": {"kv_request_id": NAME}}});
        assert_eq!(apply(&prefill, body), want);
        let want = json!({"prompt": "hi", "max_tokens": 32, "min_tokens": 4, "stream": true,
            "kv_transfer_params": {"remote_prefiller": {"kv_request_id": NAME,
                "remote_host": "10.4.0.7", "remote_port": 7779}}});
        assert_eq!(apply(&decode, body), want);
    }

    #[test]
    fn p4_a_source_is_added_to_the_prefill_leg_only() {
        let body = r#"{"messages":[],"max_completion_tokens":7}"#;
        let subject = Subject::new(Api::Chat, body);
        let mut peer = peer();
        peer.source = Some(Box::new(KvSource {
            uuid: Uuid::of_digits(7),
            host: "10.4.0.9".to_owned(),
            port: 7777,
        }));
        let [prefill, decode] = pair(&Offloading, &subject.request(), &peer);
        let prefill = apply(&prefill, body);
        let source = json!({"kv_request_id": "00000000-0000-0000-0000-000000000007",
            "remote_host": "10.4.0.9", "remote_port": 7777});
        assert_eq!(prefill["kv_transfer_params"]["remote_kv_source"], source);
        assert_eq!(prefill["max_completion_tokens"], 1);
        let decode = apply(&decode, body);
        assert!(
            decode["kv_transfer_params"]
                .get("remote_kv_source")
                .is_none()
        );
    }
}
