//! The response to a split request contains the prefill engine's cached-token count: conformance
//! rows N3 to N5.

use mock_engine::{EngineConfig, Fault, UsageShape};
use serde_json::{Value, json};

use crate::client::Response;
use crate::harness::{CHAT, Pair};

const DETAILS: &str = "/usage/prompt_tokens_details/cached_tokens";

fn chat(stream: bool) -> String {
    json!({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "stream": stream,
        "stream_options": if stream { json!({"include_usage": true}) } else { Value::Null }})
    .to_string()
}

fn pair_of(prefill: impl FnOnce(&mut EngineConfig), decode: UsageShape) -> Pair {
    Pair::with(&[], prefill, |config| config.usage = decode)
}

#[test]
fn n3_a_missing_cached_token_count_is_added() {
    for shape in [
        UsageShape::EmptyDetails,
        UsageShape::NullDetails,
        UsageShape::WithoutDetails,
    ] {
        let pair = pair_of(|_| {}, shape);
        let response = pair.post(CHAT, chat(false)).expect(200).json();
        assert_eq!(response.pointer(DETAILS), Some(&json!(7)), "{shape:?}");
        assert_eq!(response["usage"]["completion_tokens"], 8);
    }
}

#[test]
fn null_or_missing_usage_is_unchanged() {
    for (shape, want) in [
        (UsageShape::Null, Some(Value::Null)),
        (UsageShape::Missing, None),
    ] {
        let pair = pair_of(|_| {}, shape);
        let response = pair.post(CHAT, chat(false)).expect(200).json();
        assert_eq!(response.get("usage"), want.as_ref());
    }
}

#[test]
fn n4_a_prefill_response_without_a_count_results_in_zero() {
    let changes: [fn(&mut EngineConfig); 2] = [
        |config| config.cached_tokens = 0,
        |config| {
            config.usage = UsageShape::Missing;
            config.cached_tokens = 0;
        },
    ];
    for change in changes {
        let pair = pair_of(change, UsageShape::Details);
        let response = pair.post(CHAT, chat(false)).expect(200).json();
        assert_eq!(response.pointer(DETAILS), Some(&json!(0)));
    }
}

#[test]
fn a_cached_token_count_present_only_in_the_handoff_is_used() {
    let missing = |config: &mut EngineConfig| config.usage = UsageShape::Missing;
    let pair = pair_of(missing, UsageShape::Details);
    let response = pair.post(CHAT, chat(false)).expect(200).json();
    assert_eq!(response.pointer(DETAILS), Some(&json!(7)));
}

/// Compares a streamed response line by line with a stream that is requested directly from the
/// decode engine. Fails if anything but the ID, the time and the cached-token count differs, or if
/// a usage object in `response` has a cached-token count other than `count`. Skipped if the decode
/// engine uses a Unix socket or TLS.
#[track_caller]
fn expect_frames(pair: &Pair, response: &Response, count: u64) {
    if pair.decode.port() == 0 || crate::harness::is_suite_tls() {
        eprintln!("skipped: the decoder uses a Unix socket or TLS");
        return;
    }
    let direct = crate::client::Client::connect(pair.decode.port())
        .ask("POST", CHAT, &[], chat(true).as_bytes())
        .expect(200);
    let (direct, response) = (direct.text(), response.text());
    assert_eq!(response.lines().last(), direct.lines().last());
    assert!(response.ends_with("data: [DONE]\n\n"));
    let mut counted = 0;
    for (ours, theirs) in response.lines().zip(direct.lines()) {
        let Some(data) = ours.strip_prefix("data: {") else {
            assert_eq!(ours, theirs);
            continue;
        };
        let mut ours: Value = serde_json::from_str(&format!("{{{data}")).unwrap();
        let mut theirs: Value = serde_json::from_str(&theirs["data: ".len()..]).unwrap();
        if ours["usage"].is_object() {
            counted += 1;
            assert_eq!(ours.pointer(DETAILS), Some(&json!(count)));
            theirs["usage"]["prompt_tokens_details"] = json!({"cached_tokens": count});
        }
        for volatile in ["id", "created"] {
            ours[volatile] = Value::Null;
            theirs[volatile] = Value::Null;
        }
        assert_eq!(ours, theirs);
    }
    assert_eq!(response.lines().count(), direct.lines().count());
    assert!(counted > 0);
}

#[test]
fn n5_the_cached_token_count_of_streams_is_rewritten() {
    for shape in [
        UsageShape::Details,
        UsageShape::EmptyDetails,
        UsageShape::WithoutDetails,
    ] {
        let pair = pair_of(|_| {}, shape);
        let response = pair.post(CHAT, chat(true)).expect(200);
        assert_eq!(
            response.header("content-type"),
            Some("text/event-stream; charset=utf-8")
        );
        expect_frames(&pair, &response, 7);
    }
    let pair = pair_of(|config| config.cached_tokens = 0, UsageShape::Details);
    let response = pair.post(CHAT, chat(true)).expect(200);
    expect_frames(&pair, &response, 0);
}

#[test]
fn null_usage_in_every_chunk_stays_null() {
    let pair = Pair::with(&[], |_| {}, |config| config.null_usage_in_chunks = true);
    let response = pair.post(CHAT, chat(true)).expect(200);
    let events = response.events();
    let (last, others) = events.split_last().unwrap();
    assert_eq!(last.pointer(DETAILS), Some(&json!(7)));
    assert!(others.iter().all(|event| event["usage"].is_null()));
}

#[test]
fn the_count_of_long_responses_is_rewritten_streamed_or_not() {
    for bytes in [3_000, 6_000, 40_000, 400_000] {
        for stream in [false, true] {
            let pair = Pair::start(&[]);
            pair.decode.fault(Fault::LargeJson { bytes }, 1);
            let response = pair.post(CHAT, chat(stream)).expect(200);
            assert!(response.body.len() > bytes);
            let last = if stream {
                response.events().pop().unwrap()
            } else {
                response.json()
            };
            assert_eq!(last.pointer(DETAILS), Some(&json!(7)), "{bytes} {stream}");
            let pad = "A".repeat(bytes);
            assert!(response.text().contains(&pad), "{bytes} {stream}");
        }
    }
}

#[test]
fn the_count_of_responses_in_small_fragments_is_rewritten() {
    for stream in [false, true] {
        for chunk_bytes in [1, 7] {
            let pair = Pair::start(&[]);
            let delay = std::time::Duration::ZERO;
            pair.decode.fault(Fault::Slow { chunk_bytes, delay }, 1);
            let response = pair.post(CHAT, chat(stream)).expect(200);
            let last = if stream {
                response.events().pop().unwrap()
            } else {
                response.json()
            };
            assert_eq!(last.pointer(DETAILS), Some(&json!(7)));
        }
    }
}

#[test]
fn the_responses_api_uses_input_tokens_details() {
    const INPUT: &str = "/input_tokens_details/cached_tokens";
    let body = |stream: bool| json!({"input": "hello", "stream": stream}).to_string();
    let pair = Pair::start(&[]);
    let response = pair.post("/v1/responses", body(false)).expect(200).json();
    assert_eq!(response["usage"].pointer(INPUT), Some(&json!(7)));
    assert!(response["usage"].get("prompt_tokens_details").is_none());
    let response = pair.post("/v1/responses", body(true)).expect(200);
    let events = response.events();
    let completed = events
        .iter()
        .find(|event| event["type"] == "response.completed")
        .unwrap();
    let usage = &completed["response"]["usage"];
    assert_eq!(usage.pointer(INPUT), Some(&json!(7)));
    assert!(usage.get("prompt_tokens_details").is_none());
}

/// Returns the counts of the prompt's tokens in a `usage` of the messages API: cached, added to the
/// cache, and others.
fn divided(usage: &Value) -> [Option<u64>; 3] {
    [
        "cache_read_input_tokens",
        "cache_creation_input_tokens",
        "input_tokens",
    ]
    .map(|name| usage[name].as_u64())
}

#[test]
fn the_messages_api_divides_the_prompt_as_the_prefiller_does() {
    let words = "many words ".repeat(40);
    let body = |stream: bool| {
        let message = json!([{"role": "user", "content": words}]);
        json!({"messages": message, "max_tokens": 8, "stream": stream}).to_string()
    };
    let pair = Pair::start(&[]);
    let whole = pair.post("/v1/messages", body(false)).expect(200).json();
    let counts = divided(&whole["usage"]);
    let [Some(7), Some(created), Some(other)] = counts else {
        panic!("{whole}");
    };
    // The decoder reports 49 cached tokens.
    assert!(created > 0 && 7 + created + other > 49, "{whole}");
    assert_eq!(whole["usage"]["output_tokens"], 8);
    let events = pair.post("/v1/messages", body(true)).expect(200).events();
    let usage_of = |kind: &str, path: &str| {
        let event = events.iter().find(|event| event["type"] == kind);
        divided(event.unwrap().pointer(path).unwrap())
    };
    assert_eq!(usage_of("message_start", "/message/usage"), counts);
    assert_eq!(usage_of("message_delta", "/usage"), counts);
}

#[test]
fn a_prefiller_that_does_not_report_cached_tokens_in_messages_has_those_of_its_handoff() {
    let body = json!({"messages": [{"role": "user", "content": "many words ".repeat(40)}], "max_tokens": 8});
    let plain = |config: &mut EngineConfig| config.usage = UsageShape::WithoutDetails;
    let pair = pair_of(plain, UsageShape::Details);
    let whole = pair
        .post("/v1/messages", body.to_string())
        .expect(200)
        .json();
    let [Some(7), Some(_), Some(other)] = divided(&whole["usage"]) else {
        panic!("{whole}");
    };
    let alone = pair_of(plain, UsageShape::WithoutDetails);
    let plain = alone
        .post("/v1/messages", body.to_string())
        .expect(200)
        .json();
    assert_eq!(divided(&plain["usage"]), [Some(7), None, Some(other)]);
}

#[test]
fn generate_responses_use_the_usage_shape_of_chat() {
    let pair = Pair::start(&[]);
    let body = r#"{"token_ids":[1,2],"sampling_params":{"max_tokens":4}}"#;
    let response = pair.post("/inference/v1/generate", body).expect(200);
    assert_eq!(response.json().pointer(DETAILS), Some(&json!(7)));
}

#[test]
fn a_decode_only_response_keeps_its_count() {
    let pair = Pair::start(&[]);
    let response = pair.sidecar.post(CHAT, chat(false), &[]).expect(200);
    assert_eq!(response.json().pointer(DETAILS), Some(&json!(49)));
}

#[test]
fn a_decoder_error_passes_unmodified() {
    let pair = Pair::start(&[]);
    let body = r#"{"error":"x","usage":{"prompt_tokens":1}}"#;
    let fault = Fault::Status {
        code: 422,
        body: body.to_owned(),
        content_type: "application/json".to_owned(),
    };
    pair.decode.fault(fault, 1);
    assert_eq!(pair.post(CHAT, chat(false)).expect(422).text(), body);
}
