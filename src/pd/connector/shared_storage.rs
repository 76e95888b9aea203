//! KV cache passed through a store that both engines use (`--kv-connector shared-storage`,
//! `docs/pd-sidecar.md#shared-storage`).
//!
//! The store is keyed by content, so the legs carry no handoff: the prefiller computes the prompt
//! and one token, then the decoder finds the prompt in the store. A request in which the client set
//! `cache_hit_threshold` is first sent to the decoder, which stops with the finish reason
//! `cache_threshold` if too little of the prompt is in the store.

use std::rc::Rc;

use super::contract::{BASE, Connector, Order, Rules, Transfer};
use crate::budget::Kept;
use crate::json::{EditError, Kind, Level};
use crate::pd::edits::Caps;
use crate::pd::leg::{Leg, Role, Take};
use crate::pd::peer::Peer;
use crate::pd::request::PdRequest;

/// The connector `shared-storage`.
pub(super) struct SharedStorage;

pub(super) const RULES: Rules = Rules {
    name: "shared-storage",
    transfer: Transfer::Store,
    ..BASE
};

impl Connector for SharedStorage {
    fn rules(&self) -> &'static Rules {
        &RULES
    }

    /// The request is sent to the decoder first if the client set `cache_hit_threshold` and there
    /// was no encoder stage, which replaces the client's threshold.
    fn order(&self, request: &PdRequest<'_>) -> Order {
        let threshold = request.document.last(Level::Top, "cache_hit_threshold");
        let is_set = threshold.is_some_and(|member| member.kind != Kind::Null);
        if is_set && request.encoded.is_none() {
            Order::DecodeFirst
        } else {
            Order::Serial
        }
    }

    /// Returns the prefill leg. Its response is discarded, so it may stream if the client requested
    /// that.
    fn prefill_leg(&self, request: &PdRequest<'_>, _: &Peer) -> Result<Leg, EditError> {
        let mut edits = request.edits();
        edits.cap(request.api, Caps::Maxima);
        edits.set(Level::Top, "cache_hit_threshold", b"0");
        request.leg(Role::Prefill, &edits, Take::Nothing)
    }

    fn decode_leg(
        &self,
        request: &PdRequest<'_>,
        _: &Peer,
        _: Option<&Rc<Kept>>,
    ) -> Result<Leg, EditError> {
        let mut edits = request.edits();
        edits.set(Level::Top, "cache_hit_threshold", b"0");
        request.leg(Role::Decode, &edits, Take::Response(None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Api;
    use crate::pd::Encoded;
    use crate::pd::connector::lmcache::Lmcache;
    use crate::pd::testing::{Subject, apply, peer};
    use serde_json::{Value, json};

    #[test]
    fn n8_prefill_is_capped_and_decode_is_not() {
        let cases = [
            (
                Api::Chat,
                r#"{"messages":[],"max_completion_tokens":100,"stream":true}"#,
                json!({"messages": [], "max_completion_tokens": 1, "max_tokens": 1,
                    "stream": true, "cache_hit_threshold": 0}),
            ),
            (
                Api::Chat,
                r#"{"messages":[],"min_tokens":5}"#,
                json!({"messages": [], "max_completion_tokens": 1, "max_tokens": 1,
                    "min_tokens": 1, "cache_hit_threshold": 0}),
            ),
            (
                Api::Responses,
                r#"{"input":"x"}"#,
                json!({"input": "x", "max_output_tokens": 1, "store": false,
                    "cache_hit_threshold": 0}),
            ),
            (
                Api::Generate,
                r#"{"token_ids":[1],"sampling_params":{"max_tokens":9,"min_tokens":2}}"#,
                json!({"token_ids": [1], "sampling_params": {"max_tokens": 1, "min_tokens": 1},
                    "cache_hit_threshold": 0}),
            ),
            (
                Api::Generate,
                r#"{"token_ids":[1]}"#,
                json!({"token_ids": [1], "sampling_params": {"max_tokens": 1},
                    "cache_hit_threshold": 0}),
            ),
        ];
        for (api, body, want) in cases {
            let subject = Subject::new(api, body);
            let prefill = SharedStorage
                .prefill_leg(&subject.request(), &peer())
                .unwrap();
            assert_eq!(apply(&prefill, body), want, "{body}");
            let mut want: Value = serde_json::from_str(body).unwrap();
            let local = Lmcache.prefill_leg(&subject.request(), &peer()).unwrap();
            assert_eq!(apply(&local, body).get("cache_hit_threshold"), None);
            want["cache_hit_threshold"] = json!(0);
            let decode = SharedStorage
                .decode_leg(&subject.request(), &peer(), None)
                .unwrap();
            assert_eq!(apply(&decode, body), want);
        }
    }

    #[test]
    fn a_threshold_of_the_client_selects_decode_first() {
        let asks = |body: &str, encoded: Option<Encoded>| {
            let mut subject = Subject::new(Api::Chat, body);
            subject.encoded = encoded;
            SharedStorage.order(&subject.request()) == Order::DecodeFirst
        };
        assert!(asks(r#"{"cache_hit_threshold":0.8}"#, None));
        assert!(!asks(r#"{"cache_hit_threshold":null}"#, None));
        assert!(!asks("{}", None));
        let encoded = Some(Encoded::default());
        assert!(!asks(r#"{"cache_hit_threshold":0.8}"#, encoded));
    }
}
