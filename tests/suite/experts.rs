//! Routed experts (`docs/pd-sidecar.md#routed-experts`): the prefiller's rows of the prompt replace
//! those in the decoder's response.

use mock_engine::Fault;
use serde_json::json;

use crate::harness::{CHAT, Pair, wait_for};

const HANDOFF: &str = r#"{"do_remote_prefill":true,"remote_block_ids":[[1]]}"#;
/// The rows 7 and 8 of two prompt tokens.
const PROMPT: &str = r#"{"data":"Bwg=","shape":[2,1,1],"start":0,"dtype":"uint8"}"#;
/// The rows 0, 0 and 9 of three tokens.
const SEQUENCE: &str = r#"{"data":"AAAJ","shape":[3,1,1],"start":0,"dtype":"uint8"}"#;
const GENERATE: &str = "/inference/v1/generate";
const BODY: &str = r#"{"token_ids":[1,2],"sampling_params":{"max_tokens":1}}"#;

fn responds(content_type: &str, body: String) -> Fault {
    Fault::Status {
        code: 200,
        body,
        content_type: content_type.to_owned(),
    }
}

/// Lets both engines respond with these values of `routed_experts`.
fn prepare(pair: &Pair, prefill: &str, decode: &str) {
    let prefill = format!(
        r#"{{"choices":[{{"index":0,"routed_experts":{prefill},"token_ids":[5]}}],"kv_transfer_params":{HANDOFF}}}"#
    );
    let decode = format!(
        r#"{{"choices":[{{"index":0, "routed_experts":{decode},"x":1.50}}],"usage":{{"prompt_tokens_details":{{"cached_tokens":9}}}}}}"#
    );
    let json = "application/json";
    pair.prefill.fault(responds(json, prefill), 1);
    pair.decode.fault(responds(json, decode), 1);
}

#[test]
fn the_prompts_rows_are_those_of_the_prefiller() {
    let pair = Pair::start(&[]);
    for (path, body) in [(GENERATE, BODY), (CHAT, r#"{"messages":[]}"#)] {
        prepare(&pair, PROMPT, SEQUENCE);
        let response = pair.post(path, body).expect(200);
        let merged = SEQUENCE.replace("AAAJ", "BwgJ");
        let want = format!(
            r#"{{"choices":[{{"index":0, "routed_experts":{merged},"x":1.50}}],"usage":{{"prompt_tokens_details":{{"cached_tokens":0}}}}}}"#
        );
        assert_eq!(response.text(), want, "{path}");
    }
}

#[test]
fn experts_that_do_not_match_are_an_error() {
    let pair = Pair::start(&[]);
    let other = SEQUENCE.replace("[3,1,1]", "[1,1,3]");
    for (prefill, decode, why) in [
        (PROMPT, "null", "only the prefiller returned routed experts"),
        (PROMPT, r#""AAAA""#, "unknown form"),
        (r#""AAAA""#, SEQUENCE, "unknown form"),
        (PROMPT, &other, "do not match"),
    ] {
        prepare(&pair, prefill, decode);
        pair.post(GENERATE, BODY).expect_error(502, "decode_answer");
        pair.sidecar.wait_stderr(why);
    }
}

#[test]
fn other_responses_pass_unchanged() {
    let pair = Pair::start(&[]);
    for prefill in ["null", r#"{"a":1},"routed_experts":null"#] {
        prepare(&pair, prefill, SEQUENCE);
        let response = pair.post(GENERATE, BODY).expect(200);
        assert!(response.text().contains(SEQUENCE), "{}", response.text());
    }
    prepare(&pair, PROMPT, SEQUENCE);
    pair.decode.clear_faults();
    let event = json!({"choices": [{"routed_experts": "AAAA"}]});
    let events = format!("data: {event}\n\n");
    pair.decode
        .fault(responds("text/event-stream", events.clone()), 1);
    let response = pair
        .post(GENERATE, BODY.replace("}}", r#"},"stream":true}"#))
        .expect(200);
    assert_eq!(response.text(), events);
    prepare(&pair, PROMPT, SEQUENCE);
    pair.decode.clear_faults();
    pair.decode.fault(crate::kv::engine_error(422), 1);
    pair.post(GENERATE, BODY).expect(422);
    wait_for("the end", || {
        (pair.sidecar.metric("ringside_in_flight", &[]) == 0.0).then_some(())
    });
}
