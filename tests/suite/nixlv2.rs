//! The two legs of a split request with the nixlv2 connector (`docs/pd-sidecar.md#nixlv2`):
//! conformance rows N1, N2 and N6 to N15, and the members that are capped for each API.

use std::time::Duration;

use mock_engine::{Engine, EngineConfig, Fault, HandoffRegistry};
use serde_json::{Value, json};

use crate::harness::{CHAT, PREFILLER, Pair, Sidecar, connections, json_of, only, prefill_params};

/// Checks that the decode body is the client's body with the prefill engine's handoff added.
#[track_caller]
fn expect_decode(pair: &Pair, client: &Value, seen: &mock_engine::Seen) {
    let issued = pair.handoffs.issued();
    assert_eq!(issued.len(), 1);
    let mut want = client.clone();
    want["kv_transfer_params"] = serde_json::from_str(&issued[0]).unwrap();
    assert_eq!(json_of(seen), want);
}

/// Checks that the body of the prefill leg is the client's body with `kv_transfer_params` and
/// `"stream": false` added, the members in `set` set, and those in `removed` removed.
#[track_caller]
fn expect_prefill(client: &Value, seen: &mock_engine::Seen, set: &Value, removed: &[&str]) {
    let mut want = client.clone();
    want["kv_transfer_params"] = prefill_params();
    want["stream"] = json!(false);
    for (name, value) in set.as_object().unwrap() {
        want[name] = value.clone();
    }
    for name in removed {
        want.as_object_mut().unwrap().remove(*name);
    }
    assert_eq!(json_of(seen), want);
}

/// Sends one split request with the body `client` and checks both legs against it; `set` and
/// `removed` are those of [`expect_prefill`].
#[track_caller]
fn check(path: &str, client: &Value, set: &Value, removed: &[&str]) -> Pair {
    let pair = Pair::start(&[]);
    pair.post(path, client.to_string()).expect(200);
    let (prefill, decode) = pair.legs();
    assert_eq!((prefill.path(), decode.path()), (path, path));
    expect_prefill(client, &prefill, set, removed);
    expect_decode(&pair, client, &decode);
    pair.sidecar.wait_outcome("remote", "none");
    pair
}

fn chat_caps() -> Value {
    json!({"max_tokens": 1, "max_completion_tokens": 1, "min_tokens": 1})
}

fn chat() -> Value {
    json!({"model": "mock-model", "messages": [{"role": "user", "content": "hello"}]})
}

fn with(mut body: Value, more: Value) -> Value {
    let Value::Object(more) = more else {
        panic!("not an object")
    };
    body.as_object_mut().unwrap().extend(more);
    body
}

#[test]
fn n1_a_split_chat_request_has_the_exact_prefill_object() {
    let client = with(
        chat(),
        json!({"max_tokens": 64, "stream": false, "temperature": 0.5}),
    );
    let pair = Pair::start(&[]);
    let response = pair.post(CHAT, client.to_string()).expect(200);
    assert_eq!(
        response.json()["usage"]["prompt_tokens_details"]["cached_tokens"],
        7
    );
    let (prefill, decode) = pair.legs();
    expect_prefill(&client, &prefill, &chat_caps(), &[]);
    expect_decode(&pair, &client, &decode);
    assert!(json_of(&decode).get("max_completion_tokens").is_none());
}

#[test]
fn n1_a_streamed_chat_is_prefilled_without_streaming() {
    let client = with(
        chat(),
        json!({"stream": true, "stream_options": {"include_usage": true}}),
    );
    check(CHAT, &client, &chat_caps(), &["stream_options"]);
}

#[test]
fn n2_a_target_with_scheme_is_the_same_target() {
    let pair = Pair::start(&[]);
    let target = format!("http://{}", pair.prefill.host_port());
    // Five requests use one connection: the pool must find it despite the scheme.
    for nth in 0..5 {
        let response = pair
            .sidecar
            .post(CHAT, chat().to_string(), &[(PREFILLER, &target)]);
        response.expect(200);
        let seen = &pair.prefill.requests()[nth];
        assert_eq!((seen.conn, seen.nth_on_conn), (0, nth as u32));
    }
    let bare = pair.prefill.host_port();
    let response = pair
        .sidecar
        .post(CHAT, chat().to_string(), &[(PREFILLER, &bare)]);
    response.expect(200);
    assert_eq!(connections(&pair.prefill), 1);
    assert_eq!(connections(&pair.decode), 1);
    assert_eq!(pair.decode.counters().handoff_used, 6);
}

#[test]
fn n6_limits_are_capped_only_in_the_prefill_leg() {
    let client = with(chat(), json!({"max_tokens": 100, "min_tokens": 5}));
    check(CHAT, &client, &chat_caps(), &[]);
}

#[test]
fn n7_absent_limits_are_added_only_to_the_prefill_leg() {
    check(CHAT, &chat(), &chat_caps(), &[]);
}

#[test]
fn n8_max_completion_tokens_is_capped_only_in_the_prefill_leg() {
    let sent = with(chat(), json!({"max_completion_tokens": 100}));
    check(CHAT, &sent, &chat_caps(), &[]);
    let pair = check(CHAT, &chat(), &chat_caps(), &[]);
    let decode = json_of(&only(&pair.decode));
    assert!(decode.get("max_completion_tokens").is_none());
}

#[test]
fn n9_messages_requests_are_split_and_capped() {
    let client = json!({"model": "mock-model", "max_tokens": 9, "system": "s",
        "messages": [{"role": "user", "content": "hello"}]});
    let pair = check("/v1/messages", &client, &chat_caps(), &[]);
    pair.decode.clear();
    pair.sidecar
        .post("/v1/messages", client.to_string(), &[])
        .expect(200);
    assert_eq!(only(&pair.decode).body, client.to_string().as_bytes());
    assert_eq!(pair.prefill.requests().len(), 1);
}

#[test]
fn n10_responses_requests_are_split_and_capped() {
    let path = "/v1/responses";
    let cap = json!({"max_output_tokens": 1, "store": false});
    let plain = json!({"model": "mock-model", "input": "hello"});
    for more in [
        json!({"max_output_tokens": 50, "store": true}),
        json!({"max_output_tokens": 100, "max_tokens": 3}),
        json!({}),
        json!({"stream": true}),
    ] {
        check(path, &with(plain.clone(), more), &cap, &[]);
    }
    let pair = Pair::start(&[]);
    pair.sidecar.post(path, plain.to_string(), &[]).expect(200);
    assert_eq!(only(&pair.decode).body, plain.to_string().as_bytes());
}

#[test]
fn n11_generate_requests_are_split_and_capped() {
    let path = "/inference/v1/generate";
    let prompt = json!({"token_ids": [1, 2, 3]});
    for (sampling, capped) in [
        (
            json!({"max_tokens": 50}),
            json!({"max_tokens": 1, "min_tokens": 1}),
        ),
        (
            json!({"max_tokens": 100, "min_tokens": 5}),
            json!({"max_tokens": 1, "min_tokens": 1}),
        ),
        (
            json!({"temperature": 0.5}),
            json!({"temperature": 0.5, "max_tokens": 1, "min_tokens": 1}),
        ),
    ] {
        let client = with(prompt.clone(), json!({"sampling_params": sampling}));
        check(path, &client, &json!({"sampling_params": capped}), &[]);
    }
    let pair = Pair::start(&[]);
    let client = json!({"token_ids": [1], "sampling_params": {}});
    pair.sidecar.post(path, client.to_string(), &[]).expect(200);
    assert_eq!(only(&pair.decode).body, client.to_string().as_bytes());
}

#[test]
fn n11_generate_without_sampling_params_is_refused_by_the_decoder_before_any_prefill() {
    let path = "/inference/v1/generate";
    for client in [
        json!({"token_ids": [1, 2]}),
        json!({"token_ids": [1, 2], "sampling_params": null}),
    ] {
        let pair = Pair::start(&[]);
        // A prefill leg would have the object, because its limits are in it.
        pair.post(path, client.to_string()).expect(400);
        assert!(pair.prefill.requests().is_empty());
        assert_eq!(json_of(&only(&pair.decode)), client);
        pair.sidecar.wait_outcome("local_policy", "invalid_value");
    }
}

#[test]
fn completions_and_invocations_are_split_and_capped() {
    let client = json!({"model": "mock-model", "prompt": [5, 6, 7], "echo": true, "best_of": 1});
    check("/v1/completions", &client, &chat_caps(), &[]);
    check("/invocations", &client, &chat_caps(), &[]);
    check("/invocations", &chat(), &chat_caps(), &[]);
}

/// Sends a split request to a prefill engine whose first responses have these statuses, in this
/// order. `retries` is the maximum number of prefill retries. Returns the pair and the response.
#[track_caller]
fn retried(statuses: &[u16], retries: &str) -> (Pair, crate::client::Response) {
    let retries = format!("--prefill-max-retries={retries}");
    let pair = Pair::start(&[&retries, "--prefill-retry-backoff=1ms"]);
    for status in statuses {
        let fault = Fault::Status {
            code: *status,
            body: format!("{{\"said\":{status}}}"),
            content_type: "application/problem+json".to_owned(),
        };
        pair.prefill.fault(fault, 1);
    }
    let response = pair.post(CHAT, chat().to_string());
    (pair, response)
}

#[test]
fn n12_a_prefill_that_fails_once_is_retried() {
    for status in [502, 503, 504] {
        let (pair, response) = retried(&[status], "2");
        response.expect(200);
        assert_eq!(pair.prefill.requests().len(), 2);
        expect_decode(&pair, &chat(), &only(&pair.decode));
        assert_eq!(pair.decode.counters().handoff_used, 1);
        let bodies: Vec<_> = pair
            .prefill
            .requests()
            .into_iter()
            .map(|r| r.body)
            .collect();
        assert_eq!(bodies[0], bodies[1]);
    }
}

/// Checks that the client received the prefill engine's last response, which is an error with this
/// status, that there were `prefills` prefill legs, and that no decode leg was sent.
#[track_caller]
fn expect_relayed(pair: &Pair, response: crate::client::Response, status: u16, prefills: usize) {
    let response = response.expect(status);
    assert_eq!(response.text(), format!("{{\"said\":{status}}}"));
    assert_eq!(
        response.header("content-type"),
        Some("application/problem+json")
    );
    assert_eq!(pair.prefill.requests().len(), prefills);
    assert!(pair.decode.requests().is_empty());
    pair.sidecar.wait_outcome("failed", "prefill_status");
}

#[test]
fn n13_without_retries_the_error_is_relayed_to_the_client() {
    let (pair, response) = retried(&[502], "0");
    expect_relayed(&pair, response, 502, 1);
}

#[test]
fn n14_retries_are_bounded() {
    let (pair, response) = retried(&[502, 502, 502], "2");
    expect_relayed(&pair, response, 502, 3);
}

#[test]
fn n15_other_statuses_are_not_retried() {
    for status in [500, 501, 400, 404, 429, 307] {
        let (pair, response) = retried(&[status], "2");
        expect_relayed(&pair, response, status, 1);
    }
}

#[test]
fn a_prefill_reset_is_retried_only_as_often_as_configured() {
    for fault in [Fault::ResetBeforeHead, Fault::CloseBeforeHead] {
        let pair = Pair::start(&["--prefill-max-retries=1", "--prefill-retry-backoff=1ms"]);
        pair.prefill.fault(fault.clone(), 1);
        pair.post(CHAT, chat().to_string()).expect(200);
        assert_eq!(pair.prefill.requests().len(), 2);
        pair.prefill.clear();
        pair.decode.clear();
        pair.prefill.fault(fault, 9);
        pair.post(CHAT, chat().to_string())
            .expect_error(502, "prefill_reset");
        assert!(pair.decode.requests().is_empty());
    }
}

#[test]
fn hidden_prefill_errors_keep_their_status() {
    let pair = Pair::start(&["--hide-prefill-errors"]);
    for (code, status) in [(429, 429), (500, 500), (307, 502)] {
        let fault = Fault::Status {
            code,
            body: "the prompt was: secret".to_owned(),
            content_type: "text/plain".to_owned(),
        };
        pair.prefill.fault(fault, 1);
        let response = pair.post(CHAT, chat().to_string());
        let response = response.expect_error(status, "prefill_status");
        assert!(!response.text().contains("secret"));
    }
    assert!(pair.decode.requests().is_empty());
}

#[test]
fn the_next_target_is_tried_when_one_refuses() {
    let handoffs = HandoffRegistry::new();
    let checked = |config| EngineConfig {
        verify_handoff: Some(handoffs.clone()),
        ..config
    };
    let down = Engine::start(checked(EngineConfig::prefill()), 0).unwrap();
    let up = Engine::start(checked(EngineConfig::prefill()), 0).unwrap();
    let decode = Engine::start(checked(EngineConfig::decode()), 0).unwrap();
    down.refuse(true);
    let sidecar = Sidecar::start(&[], decode.port());
    let targets = format!("{},{}", down.host_port(), up.host_port());
    let routing = [(PREFILLER, targets.as_str())];
    sidecar.post(CHAT, chat().to_string(), &routing).expect(200);
    assert_eq!(decode.counters().handoff_used, 1);
    assert_eq!((down.requests().len(), up.requests().len()), (0, 1));
    sidecar.wait_outcome("remote", "none");
    // Once a target has accepted the connection, no other target is tried, even after a reset.
    down.refuse(false);
    down.fault(Fault::ResetBeforeHead, 1);
    sidecar
        .post(CHAT, chat().to_string(), &routing)
        .expect_error(502, "prefill_reset");
    assert_eq!(up.requests().len(), 1);
}

#[test]
fn refusing_targets_are_502() {
    let pair = Pair::start(&[]);
    pair.prefill.refuse(true);
    pair.post(CHAT, chat().to_string())
        .expect_error(502, "prefill_connect");
    pair.sidecar.wait_outcome("failed", "prefill_connect");
    assert!(pair.decode.requests().is_empty());
    pair.sidecar.expect_sound();
}

#[test]
fn a_reset_while_connecting_is_502() {
    let pair = Pair::start(&[]);
    pair.prefill.fault(Fault::Refuse, 1);
    let response = pair.post(CHAT, chat().to_string());
    // The reset may have arrived before the result of the connect is read.
    let code = match response.header("x-ringside-error") {
        Some("prefill_connect") => "prefill_connect",
        _ => "prefill_reset",
    };
    response.expect_error(502, code);
    assert!(pair.decode.requests().is_empty());
}

#[test]
fn unusable_prefill_responses_are_502() {
    let pair = Pair::start(&[]);
    for fault in [
        Fault::Gzip,
        Fault::Html,
        Fault::HalfJson,
        Fault::Garbage,
        Fault::BareLf,
        Fault::BothFramings,
        Fault::ExtraLength,
        Fault::TruncateMidBody { after_events: 1 },
        Fault::TruncateMidBody { after_events: 0 },
        Fault::ResetMidBody { after_events: 1 },
        Fault::EndlessHead,
        Fault::NoContent204,
    ] {
        pair.prefill.fault(fault.clone(), 1);
        let response = pair.post(CHAT, chat().to_string());
        assert_eq!(response.status, 502, "{fault:?}: {}", response.text());
        response.expect_error(502, "prefill_answer");
    }
    assert!(pair.decode.requests().is_empty());
    pair.sidecar.expect_sound();
    pair.post(CHAT, chat().to_string()).expect(200);
}

#[test]
fn unusual_prefill_responses_are_read() {
    for fault in [
        Fault::NoFraming,
        Fault::Http10Response,
        Fault::Interim { count: 3 },
        Fault::GarbageAfterResponse,
        Fault::CloseIdle,
        Fault::LargeJson { bytes: 300_000 },
        Fault::Slow {
            chunk_bytes: 40,
            delay: Duration::ZERO,
        },
    ] {
        let pair = Pair::start(&[]);
        pair.prefill.fault(fault, 1);
        pair.post(CHAT, chat().to_string()).expect(200);
        pair.legs();
        // The next request is not affected by leftovers of the first one.
        pair.post(CHAT, chat().to_string()).expect(200);
        assert_eq!(pair.decode.counters().handoff_used, 2);
    }
}

/// Engines before vLLM 0.32 parse the forced call, which the prefill leg cuts after one token.
#[test]
fn a_forced_tool_call_that_fails_on_the_prefill_leg_is_decoded_alone() {
    for (choice, code, falls_back) in [
        (r#""required""#, 500, true),
        (r#""required""#, 400, true),
        (r#"{"type":"function","function":{"name":"f"}}"#, 500, true),
        (r#""required""#, 429, false),
        (r#""auto""#, 500, false),
        (r#""none""#, 400, false),
    ] {
        let pair = Pair::start(&[]);
        pair.prefill.fault(crate::kv::engine_error(code), 1);
        let body = format!(
            r#"{{"model":"mock-model","messages":[{{"role":"user","content":"x"}}],"max_tokens":4,"tools":[],"tool_choice":{choice}}}"#
        );
        let response = pair.post(CHAT, &body);
        let want = if falls_back { 200 } else { code };
        response.expect(want);
        if falls_back {
            let sent = json_of(&only(&pair.decode));
            assert_eq!(sent["kv_transfer_params"], Value::Null);
            pair.sidecar.wait_outcome("local_fallback", "forced_tool");
        } else {
            assert!(pair.decode.requests().is_empty());
        }
    }
}
