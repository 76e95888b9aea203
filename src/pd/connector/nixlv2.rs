//! The serial NIXL protocol, version 2 (`--kv-connector nixlv2`, `docs/pd-sidecar.md#nixlv2`).
//!
//! A prefill leg computes the prompt and one token. Then a decode leg sends the client's body with
//! the prefiller's `kv_transfer_params`, byte for byte.

use std::borrow::Cow;
use std::rc::Rc;

use super::contract::{BASE, Commit, Connector, Order, PrefixPull, Rules, SpanNames};
use super::mori::read_mode_rank;
use crate::budget::Kept;
use crate::json::EditError;
use crate::pd::edits::Caps;
use crate::pd::leg::{Leg, Take};
use crate::pd::peer::Peer;
use crate::pd::request::PdRequest;

/// Parameters that make an engine prefill for another engine. Deployed engines and the llm-d
/// conformance suite expect all six members.
const PREFILL_PARAMS: &str = r#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;

/// The connector `nixlv2`, without `MoRI-IO`'s write mode.
pub(super) struct Nixlv2;

const RULES: Rules = Rules {
    name: "nixlv2",
    commit: Commit::OnPrefill,
    prefix_pull: PrefixPull::IfEnabled,
    blocks_matter: true,
    releases_refused: true,
    learns_push: true,
    can_decode_in_chunks: true,
    span_names: SpanNames::Short,
    ..BASE
};

impl Connector for Nixlv2 {
    fn rules(&self) -> &'static Rules {
        &RULES
    }

    fn order(&self, _: &PdRequest<'_>) -> Order {
        Order::Serial
    }

    /// Returns the prefill leg, which requests one token and a handoff.
    fn prefill_leg(&self, request: &PdRequest<'_>, peer: &Peer) -> Result<Leg, EditError> {
        let mut leg = match &peer.source {
            None => request.prefill_leg(PREFILL_PARAMS.as_bytes(), Caps::All, Take::Handoff)?,
            Some(source) => {
                let keys = PREFILL_PARAMS.trim_end_matches('}');
                let params = format!(r#"{keys},"remote_kv_source":{}}}"#, source.object());
                request.prefill_leg(params.as_bytes(), Caps::All, Take::Handoff)?
            }
        };
        leg.rank = read_mode_rank(request);
        Ok(leg)
    }

    /// Returns the client's body with the handoff, or with `null` if there is none, so that the
    /// decoder computes the prompt itself.
    fn decode_leg(
        &self,
        request: &PdRequest<'_>,
        _: &Peer,
        handoff: Option<&Rc<Kept>>,
    ) -> Result<Leg, EditError> {
        let take = Take::Response(request.api.usage_shape());
        match handoff {
            Some(handoff) => request.handoff_leg(handoff, take),
            None => request.decode_leg(b"null", take),
        }
    }

    /// Returns a request for a model that does not exist. When a decoder's HTTP server rejects a
    /// request that carries a handoff, it notifies the prefill engine, which then frees the blocks.
    /// Such a request is rejected before its prompt is tokenised, and nothing is transferred (vLLM
    /// 0.32, `_with_kv_transfer_rejection_cleanup`; measured, `docs/stranded-kv.md`).
    fn release_params<'a>(
        &self,
        _: &PdRequest<'_>,
        _: &Peer,
        handoff: &'a [u8],
    ) -> Option<Cow<'a, [u8]>> {
        Some(handoff.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Api;
    use crate::pd::testing::{Subject, apply, kept, peer};
    use serde_json::{Value, json};

    fn legs(api: Api, body: &str, handoff: Option<&str>) -> (Value, Value) {
        let subject = Subject::new(api, body);
        let request = subject.request();
        let prefill = Nixlv2.prefill_leg(&request, &peer()).unwrap();
        let decode = Nixlv2
            .decode_leg(&request, &peer(), kept(handoff).as_ref())
            .unwrap();
        (apply(&prefill, body), apply(&decode, body))
    }

    fn asked() -> Value {
        serde_json::from_str(PREFILL_PARAMS).unwrap()
    }

    #[test]
    fn the_prefill_object_has_exactly_the_six_keys() {
        assert_eq!(
            asked(),
            json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
                "remote_block_ids": null, "remote_host": null, "remote_port": null})
        );
    }

    #[test]
    fn every_api_is_capped_and_restored() {
        let kv = r#"{"do_remote_prefill":true,"x":12345678901234567890}"#;
        let handoff: Value = serde_json::from_str(kv).unwrap();
        let cases = [
            (
                Api::Chat,
                r#"{"messages":[],"max_tokens":100,"min_tokens":5,"stream":true,"stream_options":{}}"#,
                json!({"messages": [], "max_tokens": 1, "min_tokens": 1, "stream": false,
                    "max_completion_tokens": 1, "kv_transfer_params": asked()}),
            ),
            (
                Api::Responses,
                r#"{"input":"x","max_tokens":7}"#,
                json!({"input": "x", "max_tokens": 7, "max_output_tokens": 1, "stream": false,
                    "store": false, "kv_transfer_params": asked()}),
            ),
            (
                Api::Generate,
                r#"{"token_ids":[1],"sampling_params":{"max_tokens":9,"temperature":0.5}}"#,
                json!({"token_ids": [1], "stream": false, "kv_transfer_params": asked(),
                    "sampling_params": {"max_tokens": 1, "temperature": 0.5, "min_tokens": 1}}),
            ),
            (
                Api::Generate,
                r#"{"token_ids":[1],"sampling_params":null}"#,
                json!({"token_ids": [1], "stream": false, "kv_transfer_params": asked(),
                    "sampling_params": {"max_tokens": 1, "min_tokens": 1}}),
            ),
        ];
        for (api, body, want) in cases {
            let (prefill, decode) = legs(api, body, Some(kv));
            assert_eq!(prefill, want, "{api:?}");
            let mut restored: Value = serde_json::from_str(body).unwrap();
            restored["kv_transfer_params"] = handoff.clone();
            assert_eq!(decode, restored, "{api:?}");
            let (_, decode) = legs(api, body, None);
            restored["kv_transfer_params"] = Value::Null;
            assert_eq!(decode, restored, "{api:?} without a handoff");
        }
    }

    #[test]
    fn a_handoff_supplied_by_a_client_reaches_no_leg() {
        let bad = r#"{"remote_block_ids":[1,2,3]}"#;
        let bodies = [
            format!(r#"{{"token_ids":[1],"kv_transfer_params":{bad},"ec_transfer_params":{bad}}}"#),
            format!(
                r#"{{"token_ids":[1],"kv_transfer_params":{bad},"kv_tr\u0061nsfer_params":{bad}}}"#
            ),
            format!(
                r#"{{"token_ids":[1],"sampling_params":{{"extra_args":{{"kv_transfer_params":{bad}}}}}}}"#
            ),
            format!(
                r#"{{"sampling_params":{{"extra_args":{{"ec_transfer_params":{bad}}}}},"sampling_params":null}}"#
            ),
            format!(
                r#"{{"sampling_params":{{}},"vllm_xargs":{{"x":1,"kv_transfer_params":{bad}}}}}"#
            ),
            format!(
                r#"{{"vllm_xargs":{{"kv_transfer_params":{bad},"ec_transfer_params":{bad}}}}}"#
            ),
        ];
        for body in &bodies {
            let subject = Subject::new(Api::Generate, body);
            let request = subject.request();
            let prefill = Nixlv2.prefill_leg(&request, &peer()).unwrap();
            let decode = Nixlv2.decode_leg(&request, &peer(), None).unwrap();
            let local = request.local_leg().unwrap();
            for leg in [prefill, decode, local] {
                let sent: Vec<u8> = leg
                    .body
                    .pieces(body.as_bytes())
                    .flatten()
                    .copied()
                    .collect();
                let sent = String::from_utf8(sent).unwrap();
                assert!(!sent.contains(bad), "{:?} of {body}: {sent}", leg.role);
            }
        }
    }
}
