//! The serial NIXL protocol, version 2 (`--kv-connector nixlv2`; reference 6.1).
//!
//! First a prefill leg that computes the prompt and one token, then a decode leg with the
//! client's own body and the prefiller's `kv_transfer_params`, byte for byte.

use super::plan::{Leg, Plan, Role, Take};
use super::route::Api;
use crate::json::{Document, Edit, EditError, Kind, Level, Member, Watch};

/// Every member the plan reads or edits.
pub const WATCH: Watch = &[
    (Level::Top, "max_tokens"),
    (Level::Top, "max_completion_tokens"),
    (Level::Top, "max_output_tokens"),
    (Level::Top, "min_tokens"),
    (Level::Top, "stream"),
    (Level::Top, "stream_options"),
    (Level::Top, "n"),
    (Level::Top, "best_of"),
    (Level::Top, "prompt"),
    (Level::Top, "messages"),
    (Level::Top, "sampling_params"),
    (Level::Top, "kv_transfer_params"),
    (Level::Top, "ec_transfer_params"),
    (Level::SamplingParams, "max_tokens"),
    (Level::SamplingParams, "min_tokens"),
    (Level::SamplingParams, "n"),
    (Level::SamplingParams, "best_of"),
    (Level::SamplingParams, "prompt_logprobs"),
    (Level::ExtraArgs, "kv_transfer_params"),
    (Level::ExtraArgs, "ec_transfer_params"),
    (Level::Xargs, "kv_transfer_params"),
    (Level::Xargs, "ec_transfer_params"),
];

/// The members a client must never reach an engine with: a foreign block list kills a decoder, or
/// reads another request's KV cache (reference `vllm-api` 4.2).
pub const CLIENT_OWNED_KV: Watch = &[
    (Level::Top, "kv_transfer_params"),
    (Level::Top, "ec_transfer_params"),
    (Level::ExtraArgs, "kv_transfer_params"),
    (Level::ExtraArgs, "ec_transfer_params"),
    (Level::Xargs, "kv_transfer_params"),
    (Level::Xargs, "ec_transfer_params"),
];

/// How many members of [`CLIENT_OWNED_KV`] a body has: every plan leaves them out.
#[must_use]
pub fn client_owned(document: &Document) -> u64 {
    let is_owned = |member: &&Member| CLIENT_OWNED_KV.contains(&(member.level, member.name));
    let owned = document.members().iter().filter(is_owned);
    owned.filter(|member| member.kind != Kind::Null).count() as u64
}

/// What asks an engine to prefill for somebody else. The six keys are what deployed engines and
/// the llm-d conformance suite expect, all of them.
const PREFILL_PARAMS: &[u8] = br#"{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_host":null,"remote_port":null}"#;

/// Plans a request whose prefiller is known: the prefill leg, or the decoder alone.
///
/// # Errors
/// When the body needs more edits than allowed.
pub fn plan(api: Api, document: &Document, body: &[u8]) -> Result<Plan, EditError> {
    match super::decide::keep_local(api, document, body) {
        Some(reason) => Ok(Plan::Local(reason, local_leg(document)?)),
        None => Ok(Plan::Split(prefill_leg(api, document)?)),
    }
}

/// The decode leg of a request that is not split: the client's body without handoffs of its own.
///
/// # Errors
/// When the body needs more edits than allowed.
pub fn local_leg(document: &Document) -> Result<Leg, EditError> {
    let edits: Vec<Edit<'_>> = CLIENT_OWNED_KV
        .iter()
        .map(|(level, name)| remove(*level, name))
        .collect();
    Ok(Leg {
        role: Role::Decode,
        body: document.edit(&edits)?,
        take: Take::Answer(None),
    })
}

/// The decode leg after a prefill: the client's body with the handoff, or with `null` in its
/// place when there is none, so that the decoder computes the prompt itself.
///
/// # Errors
/// When the body needs more edits than allowed.
pub fn decode_leg(api: Api, document: &Document, handoff: Option<&[u8]>) -> Result<Leg, EditError> {
    let mut edits = Vec::with_capacity(CLIENT_OWNED_KV.len());
    push_other_kv_removals(&mut edits);
    let value = handoff.unwrap_or(b"null");
    edits.push(Edit::Set {
        level: Level::Top,
        name: "kv_transfer_params",
        value,
    });
    let body = document.edit(&edits)?;
    Ok(Leg {
        role: Role::Decode,
        body,
        take: Take::Answer(api.usage_shape()),
    })
}

fn prefill_leg(api: Api, document: &Document) -> Result<Leg, EditError> {
    let mut edits = Vec::with_capacity(16);
    push_caps(&mut edits, api, document);
    edits.push(Edit::Set {
        level: Level::Top,
        name: "stream",
        value: b"false",
    });
    // An engine refuses stream options on a request that does not stream.
    edits.push(remove(Level::Top, "stream_options"));
    if api == Api::Generate && !document.has_object(Level::SamplingParams) {
        // The whole parent is replaced, and whatever an earlier duplicate of it held with it.
        for (level, name) in CLIENT_OWNED_KV {
            let is_set = (*level, *name) == (Level::Top, "kv_transfer_params");
            if *level != Level::ExtraArgs && !is_set {
                edits.push(remove(*level, name));
            }
        }
    } else {
        push_other_kv_removals(&mut edits);
    }
    edits.push(Edit::Set {
        level: Level::Top,
        name: "kv_transfer_params",
        value: PREFILL_PARAMS,
    });
    Ok(Leg {
        role: Role::Prefill,
        body: document.edit(&edits)?,
        take: Take::Handoff,
    })
}

/// Caps every limit of the API at one token, also those the client did not send: engines have
/// defaults, and `min_tokens` above the cap is refused.
fn push_caps(edits: &mut Vec<Edit<'_>>, api: Api, document: &Document) {
    let one = |level, name| Edit::Set {
        level,
        name,
        value: b"1".as_slice(),
    };
    match api {
        Api::Chat | Api::Completions | Api::Messages | Api::Invocations | Api::Unsplit => {
            for name in ["max_tokens", "max_completion_tokens", "min_tokens"] {
                edits.push(one(Level::Top, name));
            }
        }
        Api::Responses => edits.push(one(Level::Top, "max_output_tokens")),
        Api::Generate if document.has_object(Level::SamplingParams) => {
            edits.push(one(Level::SamplingParams, "max_tokens"));
            edits.push(one(Level::SamplingParams, "min_tokens"));
        }
        Api::Generate => edits.push(Edit::Set {
            level: Level::Top,
            name: "sampling_params",
            value: br#"{"max_tokens":1,"min_tokens":1}"#,
        }),
    }
}

/// Every handoff of the client's but the one the caller sets itself. Removing reaches duplicates
/// in objects the engine does not read, too.
fn push_other_kv_removals(edits: &mut Vec<Edit<'_>>) {
    for (level, name) in CLIENT_OWNED_KV {
        if (*level, *name) != (Level::Top, "kv_transfer_params") {
            edits.push(remove(*level, name));
        }
    }
}

const fn remove(level: Level, name: &'static str) -> Edit<'static> {
    Edit::Remove { level, name }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::Scanner;
    use serde_json::{Value, json};

    fn document(body: &str) -> Document {
        let mut scanner = Scanner::new(WATCH);
        scanner.feed(body.as_bytes()).unwrap();
        scanner.finish().unwrap()
    }

    fn apply(leg: &Leg, body: &str) -> Value {
        let bytes: Vec<u8> = leg
            .body
            .pieces(body.as_bytes())
            .flatten()
            .copied()
            .collect();
        assert_eq!(bytes.len(), leg.body.len());
        serde_json::from_slice(&bytes).unwrap()
    }

    fn legs(api: Api, body: &str, handoff: Option<&str>) -> (Value, Value) {
        let document = document(body);
        let Plan::Split(prefill) = plan(api, &document, body.as_bytes()).unwrap() else {
            panic!("{body} was kept local")
        };
        let decode = decode_leg(api, &document, handoff.map(str::as_bytes)).unwrap();
        (apply(&prefill, body), apply(&decode, body))
    }

    fn asked() -> Value {
        serde_json::from_slice(PREFILL_PARAMS).unwrap()
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
                    "kv_transfer_params": asked()}),
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
    fn a_clients_own_handoff_reaches_no_leg() {
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
            let document = document(body);
            let Plan::Split(prefill) = plan(Api::Generate, &document, body.as_bytes()).unwrap()
            else {
                panic!("{body} was kept local")
            };
            let decode = decode_leg(Api::Generate, &document, None).unwrap();
            let local = local_leg(&document).unwrap();
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
