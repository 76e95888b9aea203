//! The shared-storage connector (`docs/pd-sidecar.md#shared-storage`): prefill then decode, or
//! decode-first if the client specifies a minimum cache hit rate. Conformance row N8 in part.

use mock_engine::{Fault, KvContract, Seen, State, Store};
use serde_json::{Value, json};

use crate::apis::{Api, Completion, Question};
use crate::client::Response;
use crate::harness::{CHAT, Pair, json_of, only};
use crate::kv::{
    Rule, Setup, begin, both_legs, client_disconnects, expect_contract_kept, expect_recovered,
    forget, responded, wait_aborted, wait_state,
};

const CONNECTOR: &[&str] = &["--kv-connector=shared-storage"];
const THRESHOLD: &str = r#","cache_hit_threshold":0.8"#;

fn setup(store: &Store) -> Setup<'static> {
    Setup {
        args: CONNECTOR,
        contract: KvContract::SharedStorage(store.clone()),
        ..Setup::default()
    }
}

fn start() -> (Pair, Store) {
    let store = Store::new();
    (setup(&store).start(), store)
}

fn without_threshold(client: &Value) -> Value {
    let mut want = client.clone();
    want["cache_hit_threshold"] = json!(0);
    want
}

/// Returns the requests of both engines in order of arrival: `p` for prefill, `d` for decode.
fn order(pair: &Pair) -> Vec<(char, Seen)> {
    let mut all: Vec<(char, Seen)> = Vec::new();
    all.extend(pair.prefill.requests().into_iter().map(|seen| ('p', seen)));
    all.extend(pair.decode.requests().into_iter().map(|seen| ('d', seen)));
    all.sort_by_key(|(_, seen)| seen.at);
    all
}

fn names(order: &[(char, Seen)]) -> String {
    order.iter().map(|(name, _)| *name).collect()
}

#[test]
fn each_api_is_prefilled_then_decoded() {
    let (pair, store) = start();
    for api in Api::ALL {
        for stream in [false, true] {
            forget(&pair);
            let question = api.ask(6, stream);
            responded(&pair, &question);
            let (prefill, decode) = both_legs(&pair);
            let client = question.json();
            let set = json!({"cache_hit_threshold": 0});
            api.expect_capped(&client, &json_of(&prefill), &set, &[], Completion::Always);
            assert_eq!(json_of(&decode), without_threshold(&client));
            assert!(prefill.at < decode.at);
        }
    }
    assert_eq!(store.len(), 10);
    pair.sidecar.expect_sound();
}

#[test]
fn n8_max_completion_tokens_is_capped_only_in_the_prefill_leg() {
    let (pair, _) = start();
    for (more, decoded) in [
        (r#","max_completion_tokens":100"#, Some(json!(100))),
        ("", None),
    ] {
        forget(&pair);
        let question = Api::Chat.ask_with(100, false, more);
        pair.post(CHAT, &question.body).expect(200);
        let (prefill, decode) = both_legs(&pair);
        assert_eq!(json_of(&prefill)["max_completion_tokens"], 1);
        let decode = json_of(&decode);
        assert_eq!(decode.get("max_completion_tokens"), decoded.as_ref());
        assert_eq!(decode["max_tokens"], 100);
    }
}

#[test]
fn min_tokens_does_not_fail_the_prefill_leg() {
    let (pair, _) = start();
    let chat = Api::Chat.ask_with(9, false, r#","min_tokens":5"#);
    responded(&pair, &chat);
    let (_, decode) = both_legs(&pair);
    assert_eq!(json_of(&decode), without_threshold(&chat.json()));
    let body = r#"{"token_ids":[1],"sampling_params":{"max_tokens":9,"min_tokens":5}}"#;
    pair.post(Api::Generate.path(), body).expect(200);
    expect_contract_kept(&pair);
}

#[test]
fn the_decoders_cached_token_count_is_relayed_and_no_rank_is_sent() {
    let (pair, _) = start();
    let chat = Api::Chat.ask(4, false);
    let response = pair.post(CHAT, &chat.body).expect(200).json();
    // The decoder's count: this connector does not rewrite it.
    assert_eq!(
        response["usage"]["prompt_tokens_details"]["cached_tokens"],
        49
    );
    let (prefill, decode) = both_legs(&pair);
    for name in ["x-data-parallel-rank", "x-prefiller-host-port"] {
        assert!(prefill.header(name).is_none() && decode.header(name).is_none());
    }
    assert_eq!(
        prefill.header_all("x-request-id"),
        decode.header_all("x-request-id")
    );
}

/// Sends a question, checks its response, and returns the engines' requests in order of arrival.
#[track_caller]
fn ask_first(pair: &Pair, question: &Question) -> Vec<(char, Seen)> {
    forget(pair);
    responded(pair, question);
    expect_contract_kept(pair);
    order(pair)
}

#[test]
fn decode_first_with_a_cache_hit_sends_no_prefill_leg() {
    let (pair, store) = start();
    store.set_warm(true);
    for api in Api::ALL {
        for stream in [false, true] {
            let question = api.ask_with(6, stream, THRESHOLD);
            let order = ask_first(&pair, &question);
            assert_eq!(names(&order), "d", "{api:?} {stream}");
            assert_eq!(order[0].1.body, question.body.as_bytes());
        }
    }
    assert!(store.is_empty());
}

#[test]
fn decode_first_with_a_cache_miss_prefills_and_decodes_again() {
    let (pair, _) = start();
    for api in [Api::Chat, Api::Completions, Api::Generate] {
        for stream in [false, true] {
            let question = api.ask_with(6, stream, THRESHOLD);
            let order = ask_first(&pair, &question);
            assert_eq!(names(&order), "dpd", "{api:?} {stream}");
            let client = question.json();
            assert_eq!(order[0].1.body, question.body.as_bytes());
            let set = json!({"cache_hit_threshold": 0});
            let prefill = json_of(&order[1].1);
            api.expect_capped(&client, &prefill, &set, &[], Completion::Always);
            assert_eq!(json_of(&order[2].1), without_threshold(&client));
        }
    }
    // The next time, the store contains the prompt.
    let question = Api::Chat.ask_about("again", 6, true, THRESHOLD);
    assert_eq!(names(&ask_first(&pair, &question)), "dpd");
    assert_eq!(names(&ask_first(&pair, &question)), "d");
}

#[test]
fn decode_first_detects_a_cache_miss_in_a_fragmented_response() {
    for chunk_bytes in [1, 7, 90] {
        for stream in [false, true] {
            let (pair, _) = start();
            let delay = std::time::Duration::ZERO;
            pair.decode.fault(Fault::Slow { chunk_bytes, delay }, 1);
            let question = Api::Chat.ask_with(6, stream, THRESHOLD);
            assert_eq!(names(&ask_first(&pair, &question)), "dpd");
        }
    }
}

/// Reads chunks of a streamed response until they contain `count` complete events, and returns
/// their text.
fn read_events(client: &mut crate::client::Client, count: usize) -> String {
    let mut text = String::new();
    while text.matches("\n\n").count() < count {
        text += &String::from_utf8(client.chunk().unwrap()).unwrap();
    }
    text
}

#[test]
fn decode_first_relays_the_first_token_immediately() {
    let (pair, store) = start();
    store.set_warm(true);
    // The stream stalls after its first token, which has no finish reason.
    for (api, events) in [(Api::Completions, 1), (Api::Chat, 2), (Api::Generate, 1)] {
        forget(&pair);
        let fault = Fault::StallMidStream {
            after_events: events,
        };
        pair.decode.fault(fault, 1);
        let question = api.ask_with(6, true, THRESHOLD);
        let mut client = begin(&pair, &question);
        let head = client.head();
        assert_eq!(head.status, 200);
        assert_eq!(
            head.header("content-type"),
            Some("text/event-stream; charset=utf-8")
        );
        let text = read_events(&mut client, events as usize);
        assert!(text.contains("data: {"), "{text}");
        drop(client);
        wait_aborted(&pair.decode);
    }
    expect_recovered(&pair);
}

fn error(code: u16) -> Fault {
    Fault::Status {
        code,
        body: format!("{{\"said\":{code}}}"),
        content_type: "application/json".to_owned(),
    }
}

#[track_caller]
fn expect_said(response: Response, code: u16) {
    assert_eq!(response.expect(code).text(), format!("{{\"said\":{code}}}"));
}

#[test]
fn a_failure_of_the_first_decode_leg_is_relayed_to_the_client() {
    let (pair, _) = start();
    for stream in [false, true] {
        for code in [400, 429, 500, 503] {
            pair.decode.fault(error(code), 1);
            let question = Api::Chat.ask_with(6, stream, THRESHOLD);
            expect_said(pair.post(CHAT, &question.body), code);
        }
    }
    assert!(pair.prefill.requests().is_empty());
    expect_recovered(&pair);
}

#[test]
fn a_prefill_failure_is_relayed_to_the_client() {
    let (pair, _) = start();
    for (more, decodes) in [("", 0), (THRESHOLD, 1)] {
        for stream in [false, true] {
            forget(&pair);
            pair.prefill.fault(error(503), 1);
            let question = Api::Chat.ask_with(6, stream, more);
            expect_said(pair.post(CHAT, &question.body), 503);
            assert_eq!(pair.prefill.requests().len(), 1, "no retries");
            assert_eq!(pair.decode.requests().len(), decodes);
        }
    }
    // The fault applies twice: to the pooled connection and to the new connection of the retry.
    pair.prefill.fault(Fault::ResetBeforeHead, 2);
    let question = Api::Chat.ask(6, true);
    pair.post(CHAT, &question.body)
        .expect_error(502, "prefill_reset");
    expect_recovered(&pair);
}

#[test]
fn a_truncated_first_decode_leg_affects_only_its_request() {
    let (pair, _) = start();
    for fault in [
        Fault::ResetMidBody { after_events: 1 },
        Fault::TruncateMidBody { after_events: 1 },
        Fault::TruncateMidBody { after_events: 0 },
        Fault::ResetBeforeHead,
        Fault::Html,
        Fault::Gzip,
        Fault::HalfJson,
    ] {
        for stream in [false, true] {
            pair.decode.fault(fault.clone(), 1);
            let question = Api::Chat.ask_with(6, stream, THRESHOLD);
            let mut client = begin(&pair, &question);
            // A response, an error or a closed connection is acceptable, but the next requests must
            // be served.
            let _ = client.try_head();
            drop(client);
            pair.decode.clear_faults();
            responded(&pair, &Api::Chat.ask(4, stream));
        }
    }
    expect_recovered(&pair);
}

/// The proxy only searches a first decode response for the finish reason that reports a cache miss.
/// It does not validate the rest of the response.
#[test]
fn a_first_decode_response_that_is_not_json_passes_unmodified() {
    let (pair, _) = start();
    pair.decode.fault(Fault::HalfJson, 1);
    let question = Api::Chat.ask_with(6, false, THRESHOLD);
    let response = pair.post(CHAT, &question.body);
    assert_eq!(response.status, 200, "{response:?}");
    assert!(response.text().starts_with("{\"id\":\"cmpl-half\""));
    assert!(pair.prefill.requests().is_empty());
}

#[test]
fn a_body_that_is_not_an_object_is_rejected() {
    let (pair, _) = start();
    for body in ["null", "[]", "{", "17", "{\"a\":1}x", "\"x\""] {
        let response = pair.post(CHAT, body);
        response.expect_error(400, "bad_json");
    }
    assert!(pair.prefill.requests().is_empty() && pair.decode.requests().is_empty());
}

#[test]
fn legs_end_as_required_when_the_client_disconnects() {
    client_disconnects(&setup(&Store::new()), Rule::Serial);
}

#[test]
fn a_client_disconnect_during_decode_first_aborts_the_running_leg() {
    let (pair, store) = start();
    for stream in [false, true] {
        forget(&pair);
        pair.decode.fault(Fault::StallBeforeHead, 1);
        let client = begin(&pair, &Api::Chat.ask_with(4, stream, THRESHOLD));
        wait_state(&pair.decode, State::Responding);
        drop(client);
        wait_aborted(&pair.decode);
        assert!(pair.prefill.requests().is_empty());
    }
    // Between the first event and the one that decides.
    forget(&pair);
    let fault = Fault::StallMidStream { after_events: 1 };
    pair.decode.fault(fault, 1);
    let client = begin(&pair, &Api::Chat.ask_with(4, true, THRESHOLD));
    wait_state(&pair.decode, State::Responding);
    drop(client);
    wait_aborted(&pair.decode);
    // During the prefill leg that follows.
    forget(&pair);
    pair.prefill.fault(Fault::StallBeforeHead, 1);
    let client = begin(&pair, &Api::Chat.ask_with(4, true, THRESHOLD));
    wait_state(&pair.prefill, State::Responding);
    drop(client);
    wait_aborted(&pair.prefill);
    assert_eq!(only(&pair.decode).state, State::Responded);
    assert!(store.is_empty());
    expect_recovered(&pair);
}

#[test]
fn decode_only_requests_pass_unmodified() {
    let (pair, _) = start();
    let question = Api::Chat.ask_with(4, true, THRESHOLD);
    let response = pair.sidecar.post(CHAT, &question.body, &[]).expect(200);
    assert!(response.text().contains("cache_threshold"));
    assert_eq!(only(&pair.decode).body, question.body.as_bytes());
}
