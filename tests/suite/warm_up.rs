//! Speculative prefill (`docs/pd-sidecar.md#speculative-prefill`).

use mock_engine::{Fault, KvContract, Meetings, State};
use serde_json::json;

use crate::client::DEADLINE;
use crate::harness::{CHAT, PREFILLER, Pair, json_of};
use crate::kv::{Setup, wait_state};

const ON: &str = "--enable-speculative-prefill";
const NAME: &str = "x-speculative-prefill";
const BODY: &str = r#"{"model":"mock-model","messages":[{"role":"user","content":"hello"}],"max_tokens":3,"stream":false}"#;

fn ended(pair: &Pair, result: &str) -> f64 {
    let labels = [("result", result)];
    pair.sidecar
        .metric("ringside_speculative_prefills_total", &labels)
}

fn wait_ended(pair: &Pair, result: &str, count: f64) {
    let labels = [("result", result)];
    pair.sidecar
        .wait_metric("ringside_speculative_prefills_total", &labels, count);
}

#[test]
fn the_prefiller_computes_the_conversation_after_a_turn() {
    let pair = Pair::start(&[ON]);
    for (nth, stream) in [false, true].into_iter().enumerate() {
        pair.prefill.clear();
        pair.decode.clear();
        let body = BODY.replace("false", &stream.to_string());
        let headers = [(NAME, "true"), ("authorization", "Bearer x")];
        let response = pair.post_with(CHAT, &body, &headers).expect(200);
        let text: String = if stream {
            let events = response.events();
            let texts = events
                .iter()
                .filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
            texts.collect()
        } else {
            let message = response.json()["choices"][0]["message"].take();
            message["content"].as_str().unwrap().to_owned()
        };
        assert!(!text.is_empty());
        wait_ended(&pair, "done", nth as f64 + 1.0);
        let seen = pair.prefill.requests();
        assert_eq!(seen.len(), 2);
        assert_eq!(
            json_of(&seen[1]),
            json!({"model": "mock-model", "max_tokens": 1, "max_completion_tokens": 1,
                "min_tokens": 1, "stream": false, "messages": [
                    {"role": "user", "content": "hello"},
                    {"role": "assistant", "content": text},
                    {"role": "user", "content": " "}]})
        );
        assert_eq!(seen[1].header("authorization"), Some("Bearer x"));
        for seen in seen.iter().chain(&pair.decode.requests()) {
            assert_eq!(seen.header(NAME), None);
        }
        assert_eq!(pair.decode.requests().len(), 1);
    }
}

#[test]
fn the_prefiller_that_has_served_the_turn_is_used() {
    let pair = Pair::start(&[ON]);
    let targets = format!("127.0.0.3:1,{}", pair.prefill.host_port());
    let headers = [(NAME, "true"), (PREFILLER, &*targets)];
    pair.sidecar.post(CHAT, BODY, &headers).expect(200);
    wait_ended(&pair, "done", 1.0);
}

#[test]
fn only_split_chat_turns_that_ask_for_it_are_followed_by_one() {
    let pair = Pair::start(&[ON]);
    pair.post(CHAT, BODY).expect(200);
    pair.post_with(CHAT, BODY, &[(NAME, "false")]).expect(200);
    let headers = [(NAME, "true")];
    pair.post_with("/v1/completions", r#"{"prompt":"x"}"#, &headers)
        .expect(200);
    pair.sidecar.post(CHAT, BODY, &headers).expect(200);
    let off = Pair::start(&[]);
    off.post_with(CHAT, BODY, &headers).expect(200);
    for pair in [&pair, &off] {
        for result in ["done", "failed", "skipped"] {
            assert_eq!(ended(pair, result), 0.0, "{result}");
        }
    }
    // A response without text.
    pair.decode.fault(Fault::NoContent204, 1);
    pair.post_with(CHAT, BODY, &headers).expect(204);
    wait_ended(&pair, "skipped", 1.0);
    pair.decode.fault(crate::kv::engine_error(422), 1);
    pair.post_with(CHAT, BODY, &headers).expect(422);
    wait_ended(&pair, "skipped", 2.0);
}

#[test]
fn a_shard_runs_one_at_a_time() {
    let pair = Pair::start(&[ON, "--cores=1"]);
    let headers = [(NAME, "true")];
    pair.prefill.fault_with(r#""content":" ""#, Fault::Hold, 1);
    pair.post_with(CHAT, BODY, &headers).expect(200);
    wait_state(&pair.prefill, State::Responding);
    pair.post_with(CHAT, BODY, &headers).expect(200);
    wait_ended(&pair, "skipped", 1.0);
    pair.prefill.release();
    wait_ended(&pair, "done", 1.0);
    pair.prefill
        .fault_with(r#""content":" ""#, crate::kv::engine_error(500), 1);
    pair.post_with(CHAT, BODY, &headers).expect(200);
    wait_ended(&pair, "failed", 1.0);
}

#[test]
fn a_prefiller_that_needs_a_decoder_gets_both_legs() {
    let meetings = Meetings::new();
    let pair = Setup {
        args: &["--kv-connector=sglang", ON],
        contract: KvContract::Sglang(meetings.clone()),
        ..Setup::default()
    }
    .start();
    pair.post_with(CHAT, BODY, &[(NAME, "true")]).expect(200);
    wait_ended(&pair, "done", 1.0);
    let both = pair.decode.wait_for(DEADLINE, |log| {
        log.len() == 2 && log[1].state == State::Responded
    });
    assert!(both.is_some(), "{:?}", pair.decode.requests());
    assert_eq!(meetings.complete(), 2);
}
