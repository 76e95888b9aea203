//! Mooncake's transfer engine (`--kv-connector mooncake`, `docs/pd-sidecar.md#mooncake`).
//!
//! The decoder fetches the KV cache from the engine whose id the prefiller's bootstrap server
//! returned. The legs are serial, although they could run together: a decoder whose prefill is
//! refused, or ends with its first token, waits for 480 s and holds one of the prefiller's 20
//! places for transfers. 22 such requests stopped a prefiller for all others (measured,
//! `docs/engines.md#mooncake`).

use std::borrow::Cow;
use std::rc::Rc;

use super::contract::{BASE, Bootstrap, Connector, OnDisconnect, Order, Rules};
use crate::budget::Kept;
use crate::json::{EditError, Quoted};
use crate::pd::edits::Caps;
use crate::pd::handoff::SingleUse;
use crate::pd::leg::{Collected, Leg, Role, Take};
use crate::pd::options::ConnectorPorts;
use crate::pd::peer::Peer;
use crate::pd::request::PdRequest;

/// The connector `mooncake`.
pub(super) struct Mooncake;

const RULES: Rules = Rules {
    name: "mooncake",
    // A prefiller that is computing a prompt when its request is cancelled keeps the KV cache for
    // 480 s, under an id that only a release can name (7 of 53, measured).
    prefill_on_disconnect: OnDisconnect::RunToEnd,
    // The prefiller writes to the decoder until the transfer is reported as complete.
    decode_on_disconnect: OnDisconnect::UntilFirstByte,
    bootstrap: Bootstrap::Queried,
    ..BASE
};

impl Connector for Mooncake {
    fn rules(&self) -> &'static Rules {
        &RULES
    }

    fn order(&self, _: &PdRequest<'_>) -> Order {
        Order::Serial
    }

    fn prefill_leg(&self, request: &PdRequest<'_>, peer: &Peer) -> Result<Leg, EditError> {
        let params = format!(
            r#"{{"do_remote_decode":true,"do_remote_prefill":false,"transfer_id":"xfer-{}"}}"#,
            request.uuid
        );
        let mut leg =
            request.prefill_leg(params.as_bytes(), Caps::SentAndMinimum, Take::Transfer)?;
        leg.rank = peer.engine.as_ref().map(|engine| engine.rank);
        Ok(leg)
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
        request.decode_leg(&params(request, peer), take)
    }

    /// A decoder that refuses a request notifies the prefiller, as with NIXL (measured).
    fn release_params<'a>(
        &self,
        request: &PdRequest<'_>,
        peer: &Peer,
        _: &'a [u8],
    ) -> Option<Cow<'a, [u8]>> {
        Some(params(request, peer).into())
    }

    fn handoff(&self, collected: Collected) -> Option<SingleUse> {
        match collected {
            Collected::Handoff(response) => Some(SingleUse::of_transfer(*response)),
            Collected::Whole(_) | Collected::Nothing => None,
        }
    }

    fn bootstrap_port(&self, ports: &ConnectorPorts) -> u16 {
        ports.mooncake_bootstrap
    }

    fn describe(&self, ports: &ConnectorPorts) -> String {
        format!(", bootstrap port {}", ports.mooncake_bootstrap)
    }
}

/// Returns the transfer parameters of a decode leg.
fn params(request: &PdRequest<'_>, peer: &Peer) -> Vec<u8> {
    let address = format!("http://{}:{}", peer.url_host(), peer.bootstrap_port);
    let engine = peer
        .engine
        .as_ref()
        .map_or(&b"null"[..], |engine| &engine.id);
    let mut params = format!(
        r#"{{"do_remote_decode":false,"do_remote_prefill":true,"transfer_id":"xfer-{}","remote_bootstrap_addr":{},"remote_engine_id":"#,
        request.uuid,
        Quoted(&address),
    )
    .into_bytes();
    params.extend_from_slice(engine);
    params.push(b'}');
    params
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Api;
    use crate::pd::testing::{NAME, Subject, apply, kept, pair, peer};
    use serde_json::json;

    #[test]
    fn k1_k3_the_legs_share_a_transfer_id_and_use_the_rank_of_the_engine() {
        let body = r#"{"model":"q3","prompt":"hi","max_tokens":32,"stream":true}"#;
        let subject = Subject::new(Api::Completions, body);
        let request = subject.request();
        let [prefill, alone] = pair(&Mooncake, &request, &peer());
        let decode = Mooncake
            .decode_leg(&request, &peer(), kept(Some("")).as_ref())
            .unwrap();
        let transfer = format!("xfer-{NAME}");
        let want = json!({"model": "q3", "prompt": "hi", "max_tokens": 1, "min_tokens": 1,
            "stream": false, "kv_transfer_params": {"do_remote_decode": true, "do_remote_prefill": false,
                "transfer_id": transfer}});
        assert_eq!(apply(&prefill, body), want);
        assert_eq!((prefill.rank, decode.rank), (Some(1), None));
        let want = json!({"model": "q3", "prompt": "hi", "max_tokens": 32, "stream": true,
            "kv_transfer_params": {"do_remote_decode": false, "do_remote_prefill": true,
                "transfer_id": transfer, "remote_bootstrap_addr": "http://10.4.0.7:8998",
                "remote_engine_id": "e1"}});
        assert_eq!(apply(&decode, body), want);
        let own: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(apply(&alone, body), own);
    }
}
