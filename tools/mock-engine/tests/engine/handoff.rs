//! Split requests with NIXL version 2, between a prefill and a decode engine.

use mock_engine::{
    Engine, EngineConfig, FOREIGN_TAG, Fault, HandoffRegistry, HandoffShape, expected_text,
};

use crate::client::{Response, ask, post, sha256};

const CHAT: &str = "/v1/chat/completions";
const PREFILL: &str = r#"{"messages":["a"],"max_tokens":1,"max_completion_tokens":1,
    "min_tokens":1,"stream":false,"kv_transfer_params":{"do_remote_decode":true,
    "do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,
    "remote_host":null,"remote_port":null}}"#;

fn pair() -> (Engine, Engine) {
    let handoffs = HandoffRegistry::new();
    let start = |config: EngineConfig| {
        let verify_handoff = Some(handoffs.clone());
        Engine::start(
            EngineConfig {
                verify_handoff,
                ..config
            },
            0,
        )
        .unwrap()
    };
    (
        start(EngineConfig::prefill()),
        start(EngineConfig::decode()),
    )
}

/// Returns the bytes of `kv_transfer_params`, which must be the last member of the response.
fn handoff(response: &Response) -> String {
    let text = String::from_utf8(response.body.clone()).unwrap();
    let from = text.find("\"kv_transfer_params\":").unwrap() + 21;
    text[from..text.len() - 1].to_owned()
}

fn decode(engine: &Engine, prompt: &str, handoff: &str) -> Response {
    let body =
        format!(r#"{{"messages":["{prompt}"],"max_tokens":2,"kv_transfer_params":{handoff}}}"#);
    ask(engine, &post(CHAT, &body))
}

#[test]
fn a_handoff_can_be_used_only_once() {
    let (prefill, decoder) = pair();
    let response = ask(&prefill, &post(CHAT, PREFILL));
    assert_eq!(response.status, 200, "{response:?}");
    let details = &response.json()["usage"]["prompt_tokens_details"];
    assert_eq!(details["cached_tokens"], 7);
    let raw = handoff(&response);
    assert_eq!(prefill.handoffs().issued(), [raw.as_str()]);
    let content = |response: &Response| response.json()["choices"][0]["message"]["content"].clone();
    let good = decode(&decoder, "a", &raw);
    assert_eq!(content(&good), expected_text(&sha256(b"[\"a\"]"), 2));
    let again = decode(&decoder, "a", &raw);
    assert_eq!(content(&again), expected_text(FOREIGN_TAG, 2));
    let counters = decoder.counters();
    assert_eq!((counters.handoff_used, counters.handoff_reused), (1, 1));
}

#[test]
fn altered_unknown_and_foreign_handoffs() {
    let (prefill, decoder) = pair();
    let raw = handoff(&ask(&prefill, &post(CHAT, PREFILL)));
    assert_eq!(
        decode(&decoder, "a", &raw.replace("1e5", "100000.0")).status,
        500
    );
    let other = r#"{"do_remote_prefill":true,"remote_request_id":"x"}"#;
    assert_eq!(decode(&decoder, "a", other).status, 500);
    assert_eq!(decode(&decoder, "b", &raw).status, 200);
    let counters = decoder.counters();
    assert_eq!(
        (
            counters.handoff_altered,
            counters.handoff_unknown,
            counters.handoff_foreign
        ),
        (1, 1, 1)
    );
}

#[test]
fn contract_violations_poison_and_wrong_roles_are_refused() {
    let (prefill, decoder) = pair();
    let broken = ask(
        &prefill,
        &post(CHAT, &PREFILL.replace("\"stream\":false,", "")),
    );
    assert_eq!(broken.status, 400);
    let message = broken.json()["error"]["message"].to_string();
    assert!(message.contains("stream"), "{message}");
    assert_eq!(decode(&decoder, "a", "{}").status, 500);
    assert_eq!(decode(&decoder, "a", "\"junk\"").status, 500);
    assert_eq!(
        decode(&prefill, "a", r#"{"do_remote_prefill":true}"#).status,
        500
    );
    assert_eq!(ask(&decoder, &post(CHAT, PREFILL)).status, 500);
    assert_eq!(prefill.counters().contract_broken, 1);
    assert_eq!(decoder.counters().poisoned, 2);
    assert_eq!(
        prefill.counters().wrong_role + decoder.counters().wrong_role,
        2
    );
}

#[test]
fn other_shapes_of_handoff() {
    let (prefill, _) = pair();
    for (shape, want) in [
        (HandoffShape::Omit, None),
        (HandoffShape::Null, Some("null")),
        (HandoffShape::Empty, Some("{}")),
    ] {
        prefill.fault(Fault::Handoff(shape), 1);
        let json = ask(&prefill, &post(CHAT, PREFILL)).json();
        let got = json.get("kv_transfer_params").map(ToString::to_string);
        assert_eq!(got.as_deref(), want, "{shape:?}");
    }
    let first = handoff(&ask(&prefill, &post(CHAT, PREFILL)));
    prefill.fault(Fault::Handoff(HandoffShape::Stale), 1);
    assert_eq!(handoff(&ask(&prefill, &post(CHAT, PREFILL))), first);
    assert_ne!(handoff(&ask(&prefill, &post(CHAT, PREFILL))), first);
}

#[test]
fn each_api_returns_a_handoff() {
    let (prefill, decoder) = pair();
    let params = PREFILL[PREFILL.find("\"kv_transfer").unwrap()..].to_owned();
    for (path, prompt, caps, limit) in [
        (
            "/v1/completions",
            r#""prompt":"p""#,
            r#""max_tokens":1,"max_completion_tokens":1,"min_tokens":1"#,
            r#""max_tokens":2"#,
        ),
        (
            "/v1/messages",
            r#""messages":["p"]"#,
            r#""max_tokens":1,"max_completion_tokens":1,"min_tokens":1"#,
            r#""max_tokens":2"#,
        ),
        (
            "/v1/responses",
            r#""input":"p""#,
            r#""max_output_tokens":1"#,
            r#""max_output_tokens":2"#,
        ),
        (
            "/inference/v1/generate",
            r#""token_ids":[1]"#,
            r#""sampling_params":{"max_tokens":1,"min_tokens":1}"#,
            r#""sampling_params":{"max_tokens":2}"#,
        ),
    ] {
        let body = format!("{{{prompt},{caps},\"stream\":false,{params}");
        let response = ask(&prefill, &post(path, &body));
        assert_eq!(response.status, 200, "{response:?}");
        let issued = prefill.handoffs().issued();
        let raw = issued.last().unwrap();
        assert!(
            String::from_utf8(response.body)
                .unwrap()
                .contains(raw.as_str())
        );
        let body = format!("{{{prompt},{limit},\"stream\":true,\"kv_transfer_params\":{raw}}}");
        assert_eq!(ask(&decoder, &post(path, &body)).status, 200);
    }
    assert_eq!(decoder.counters().handoff_used, 4);
}

#[test]
fn a_lenient_engine_accepts_the_objects_of_other_connectors() {
    let config = EngineConfig {
        strict: false,
        ..EngineConfig::default()
    };
    let engine = Engine::start(config, 0).unwrap();
    for params in [
        r#"{"remote_prefiller":{"kv_request_id":"K"}}"#,
        r#"{"do_remote_decode":true,"do_remote_prefill":false,"transfer_id":"x"}"#,
        r#"{"do_remote_decode":false,"do_remote_prefill":true,"transfer_id":"x"}"#,
    ] {
        assert_eq!(decode(&engine, "a", params).status, 200, "{params}");
    }
    assert_eq!(engine.counters().poisoned, 0);
}
