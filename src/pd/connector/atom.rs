//! ATOM, AMD's engine (`--kv-connector atom`, `docs/pd-sidecar.md#atom`).
//!
//! The legs are those of NIXL's serial protocol. The data-parallel rank of a request is a member of
//! both bodies instead of a header field, and the decoder reads it under another name in the
//! handoff than the prefiller writes it.

use std::rc::Rc;

use super::contract::{BASE, Connector, Order, Rules, SpanNames};
use super::mori::rank;
use crate::budget::Kept;
use crate::json::{Edit, EditError, Level, Scanner, Watch};
use crate::pd::edits::{Caps, Edits};
use crate::pd::leg::{Leg, Role, Take};
use crate::pd::peer::Peer;
use crate::pd::request::{CLIENT_OWNED_KV, PdRequest, with_kv};

/// Parameters that make an engine prefill for another engine.
const PREFILL_PARAMS: &[u8] = br#"{"do_remote_decode":true,"do_remote_prefill":false}"#;

/// Members of a request that clients must not set.
const CLIENT_OWNED: Watch = &with_kv::<{ OWN.len() + CLIENT_OWNED_KV.len() }>(OWN);

const OWN: Watch = &[(Level::Top, "data_parallel_rank")];

/// Members of a handoff that are read or edited.
const HANDOFF: Watch = &[
    (Level::Top, "dp_rank"),
    (Level::Top, "remote_dp_rank"),
    (Level::Top, "first_token_id"),
    (Level::Top, "draft_token_ids"),
];

/// The connector `atom`.
pub(super) struct Atom;

const RULES: Rules = Rules {
    name: "atom",
    client_owned: CLIENT_OWNED,
    can_decode_in_chunks: true,
    span_names: SpanNames::Short,
    ..BASE
};

impl Connector for Atom {
    fn rules(&self) -> &'static Rules {
        &RULES
    }

    fn order(&self, _: &PdRequest<'_>) -> Order {
        Order::Serial
    }

    fn prefill_leg(&self, request: &PdRequest<'_>, _: &Peer) -> Result<Leg, EditError> {
        let rank = rank_text(request);
        let mut edits = with_rank(request, &rank);
        edits.set(Level::Top, "kv_transfer_params", PREFILL_PARAMS);
        edits.cap(request.api, Caps::All);
        edits.whole_response();
        request.leg(Role::Prefill, &edits, Take::Handoff)
    }

    fn decode_leg(
        &self,
        request: &PdRequest<'_>,
        _: &Peer,
        handoff: Option<&Rc<Kept>>,
    ) -> Result<Leg, EditError> {
        let params = handoff.map(|handoff| translated(handoff)).transpose()?;
        let rank = rank_text(request);
        let mut edits = with_rank(request, &rank);
        let params = params.as_deref().unwrap_or(b"null");
        edits.set(Level::Top, "kv_transfer_params", params);
        let take = Take::Response(request.api.usage_shape());
        request.leg(Role::Decode, &edits, take)
    }
}

/// Returns the rank of the request in both engines.
fn rank_text(request: &PdRequest<'_>) -> String {
    rank(request.uuid.text().as_str(), request.atom_dp_size).to_string()
}

fn with_rank<'a>(request: &PdRequest<'a>, rank: &'a str) -> Edits<'a> {
    let mut edits = request.edits();
    edits.set(Level::Top, "data_parallel_rank", rank.as_bytes());
    edits
}

/// Returns the handoff as the decoder reads it: with the prefiller's `dp_rank` as `remote_dp_rank`,
/// and without the members that only the prefiller uses.
fn translated(handoff: &[u8]) -> Result<Vec<u8>, EditError> {
    let mut scanner = Scanner::new(HANDOFF);
    let Some(document) = scanner.feed(handoff).and_then(|()| scanner.finish()).ok() else {
        // The handoff is valid JSON, so the scan can only fail at one of the scanner's own limits.
        return Ok(handoff.to_vec());
    };
    let remove = |name| Edit::Remove {
        level: Level::Top,
        name,
    };
    let mut edits = vec![remove("first_token_id"), remove("draft_token_ids")];
    if let Some(rank) = document.last(Level::Top, "dp_rank") {
        edits.push(Edit::Set {
            level: Level::Top,
            name: "remote_dp_rank",
            value: rank.value.of(handoff),
        });
    }
    let spliced = document.edit(&edits)?;
    Ok(spliced.pieces(handoff).flatten().copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Api;
    use crate::pd::testing::{NAME, Subject, apply, kept, peer};
    use serde_json::{Value, json};

    fn legs(api: Api, body: &str, handoff: Option<&str>) -> (Value, Value) {
        let subject = Subject::new(api, body);
        let request = subject.request();
        let prefill = Atom.prefill_leg(&request, &peer()).unwrap();
        let decode = Atom.decode_leg(&request, &peer(), kept(handoff).as_ref());
        let decode = decode.unwrap();
        assert_eq!((prefill.rank, decode.rank), (None, None));
        (apply(&prefill, body), apply(&decode, body))
    }

    #[test]
    fn both_legs_carry_the_rank_in_their_bodies() {
        let body = r#"{"messages":[],"max_tokens":9,"stream":true,"data_parallel_rank":77,"kv_transfer_params":{"x":1}}"#;
        let handoff = r#"{"dp_rank":3,"first_token_id":7,"block_ids":[1,2],"draft_token_ids":[8]}"#;
        let (prefill, decode) = legs(Api::Chat, body, Some(handoff));
        let own = rank(NAME, 8);
        assert_eq!(
            prefill,
            json!({"messages": [], "max_tokens": 1, "max_completion_tokens": 1, "min_tokens": 1,
                "stream": false, "data_parallel_rank": own,
                "kv_transfer_params": {"do_remote_decode": true, "do_remote_prefill": false}})
        );
        assert_eq!(
            decode,
            json!({"messages": [], "max_tokens": 9, "stream": true, "data_parallel_rank": own,
                "kv_transfer_params": {"dp_rank": 3, "block_ids": [1, 2], "remote_dp_rank": 3}})
        );
    }

    #[test]
    fn a_handoff_without_a_rank_or_no_handoff_is_passed_on_as_it_is() {
        let body = r#"{"prompt":"x"}"#;
        let decode =
            |handoff| legs(Api::Completions, body, handoff).1["kv_transfer_params"].clone();
        assert_eq!(decode(Some(r#"{"a":1.0}"#)), json!({"a": 1.0}));
        assert_eq!(decode(Some("{}")), json!({}));
        assert_eq!(decode(None), Value::Null);
        let replaced = decode(Some(r#"{"remote_dp_rank":1,"dp_rank":"2"}"#));
        assert_eq!(replaced, json!({"remote_dp_rank": "2", "dp_rank": "2"}));
    }

    #[test]
    fn every_api_is_capped_where_it_keeps_its_limits() {
        let (prefill, decode) = legs(
            Api::Generate,
            r#"{"token_ids":[1],"sampling_params":{"max_tokens":9}}"#,
            None,
        );
        assert_eq!(prefill["sampling_params"]["max_tokens"], 1);
        assert_eq!(decode["sampling_params"]["max_tokens"], 9);
        let (prefill, decode) = legs(Api::Responses, r#"{"max_output_tokens":9}"#, None);
        assert_eq!(prefill["max_output_tokens"], 1);
        assert_eq!(decode["max_output_tokens"], 9);
    }
}
