//! Chunked decode (`docs/pd-sidecar.md#chunked-decode`), with ringside's corrections
//! (`docs/pd-sidecar.md#deliberate-differences`): a long response is generated in several decode
//! chunks, and the client receives one response. Conformance rows X1 to X6.

use std::sync::atomic::{AtomicUsize, Ordering};

use mock_engine::{EngineConfig, Fault, Seen, State, expected_text};
use serde_json::{Value, json};

use crate::apis::{Api, Question, text_of};
use crate::client::{DEADLINE, End, Response};
use crate::harness::{CHAT, Pair, Sidecar, VERSIONS_OFF, json_of, only, sha256};
use crate::harness_more::{Leave, RawEngine, expect_drained, expect_healthy};
use crate::kv::wait_aborted;

const CHUNK: &str = "--decode-chunk-size=4";

/// Starts a pair that decodes in chunks of 4 tokens, and whose decode engine stops after `tokens`
/// tokens in total.
fn start(tokens: u32) -> Pair {
    Pair::with(
        &[CHUNK],
        |_| {},
        |decode: &mut EngineConfig| decode.tokens = tokens,
    )
}

/// Sends `question` as a decode-only request and returns the response.
fn ask(pair: &Pair, question: &Question) -> Response {
    pair.sidecar.post(CHAT, &question.body, &[])
}

/// Returns the bodies of the decode engine's requests, which must all be chat completion requests.
#[track_caller]
fn bodies(pair: &Pair) -> Vec<Value> {
    let requests = pair.decode.requests();
    assert!(requests.iter().all(|seen| seen.path() == CHAT));
    requests.iter().map(json_of).collect()
}

/// Fails unless `response` contains exactly the first `tokens` tokens for this question.
#[track_caller]
fn expect_tokens(question: &Question, response: &Response, tokens: u32) {
    let want = expected_text(&sha256(question.prompt.as_bytes()), tokens);
    assert_eq!(text_of(Api::Chat, response), want);
}

#[test]
fn x1_a_token_limit_within_one_chunk_is_one_plain_decode_leg() {
    let pair = start(32);
    for tokens in [1, 3, 4] {
        for stream in [false, true] {
            pair.decode.clear();
            let question = Api::Chat.ask(tokens, stream);
            question.expect(&ask(&pair, &question).expect(200));
            assert_eq!(only(&pair.decode).body, question.body.as_bytes());
        }
    }
    // The newer field takes precedence.
    pair.decode.clear();
    let question = Api::Chat.ask_with(100, false, r#","max_completion_tokens":4"#);
    ask(&pair, &question).expect(200);
    assert_eq!(only(&pair.decode).body, question.body.as_bytes());
}

#[test]
fn x2_two_chunks_result_in_one_response() {
    let pair = start(32);
    let question = Api::Chat.ask(6, false);
    let response = ask(&pair, &question).expect(200);
    expect_tokens(&question, &response, 6);
    let bodies = bodies(&pair);
    assert_eq!(bodies.len(), 2);
    let body = response.json();
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["choices"].as_array().unwrap().len(), 1);
    assert_eq!(body["choices"][0]["message"]["role"], "assistant");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
    let usage = &body["usage"];
    // The prompt of the first request, without the tokens that were generated since.
    let prompt = mock_engine::prompt_tokens(&question.prompt);
    assert_eq!(usage["prompt_tokens"], prompt);
    assert_eq!(usage["completion_tokens"], 6);
    assert_eq!(usage["total_tokens"], prompt + 6);
}

#[test]
fn x3_a_stop_before_the_token_limit_ends_the_response() {
    for stream in [false, true] {
        let pair = start(6);
        let question = Api::Chat.ask(100, stream);
        let response = ask(&pair, &question).expect(200);
        expect_tokens(&question, &response, 6);
        assert_eq!(bodies(&pair).len(), 2);
        assert!(response.text().contains("\"finish_reason\":\"stop\""));
        assert!(!response.text().contains("\"finish_reason\":\"length\""));
    }
}

#[test]
fn x3_a_response_without_a_limit_continues_until_a_stop() {
    for stream in [false, true] {
        // 12 is a multiple of the chunk size, so the last chunk is empty.
        for tokens in [10, 12] {
            let pair = start(tokens);
            let prompt = r#"[{"role":"user","content":"no limit"}]"#;
            let body = format!("{{\"messages\":{prompt},\"stream\":{stream}}}");
            let response = pair.sidecar.post(CHAT, &body, &[]).expect(200);
            let want = expected_text(&sha256(prompt.as_bytes()), tokens);
            assert_eq!(text_of(Api::Chat, &response), want);
        }
    }
}

/// A decode chunk that ends with the finish reason `length` below its token limit has filled the
/// engine's context. The engine would reject a request for a further chunk, and the response so far
/// would be lost.
#[test]
fn x3_a_full_context_ends_the_response() {
    for stream in [false, true] {
        let chunk = |text: &str, tokens: u32| {
            let body = json!({"id": "c", "object": "chat.completion", "created": 1, "model": "m",
                "choices": [{"index": 0, "finish_reason": "length",
                    "message": {"role": "assistant", "content": text}}],
                "usage": {"prompt_tokens": 5, "completion_tokens": tokens,
                    "total_tokens": 5 + tokens}})
            .to_string();
            format!(
                "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            )
        };
        let full = "HTTP/1.1 400 Bad Request\r\ncontent-length: 2\r\n\r\n{}";
        let responses = [chunk("a b c d ", 4), chunk("e f", 2), full.to_owned()];
        let next = AtomicUsize::new(0);
        let engine = RawEngine::start(move |mut conn, _| {
            while conn.request().is_some() {
                let nth = next.fetch_add(1, Ordering::Relaxed);
                conn.say(&responses[nth.min(2)]);
            }
        });
        let sidecar = Sidecar::start(&[CHUNK, VERSIONS_OFF], engine.port());
        let body = Api::Chat.ask(100, stream).body;
        let response = sidecar.post(CHAT, body, &[]).expect(200);
        assert_eq!(text_of(Api::Chat, &response), "a b c d e f");
        assert!(response.text().contains(r#""finish_reason":"length""#));
        assert!(!response.text().contains("error"), "{}", response.text());
    }
}

#[test]
fn x4_later_chunks_continue_the_response() {
    let pair = start(32);
    let more = r#","temperature":0.5,"stream_options":{"include_usage":true}"#;
    let question = Api::Chat.ask_with(11, true, more);
    let response = ask(&pair, &question).expect(200);
    expect_tokens(&question, &response, 11);
    let bodies = bodies(&pair);
    assert_eq!(bodies.len(), 3);
    let hash = sha256(question.prompt.as_bytes());
    for (nth, (body, limit)) in bodies.iter().zip([4, 4, 3]).enumerate() {
        let mut want = question.json();
        want["max_tokens"] = json!(limit);
        want["max_completion_tokens"] = json!(limit);
        want["stream"] = json!(false);
        want.as_object_mut().unwrap().remove("stream_options");
        if nth > 0 {
            want["continue_final_message"] = json!(true);
            want["add_generation_prompt"] = json!(false);
            // One assistant message that grows with each chunk.
            let said = expected_text(&hash, 4 * nth as u32);
            let said = json!({"role": "assistant", "content": said});
            want["messages"].as_array_mut().unwrap().push(said);
        }
        assert_eq!(*body, want, "chunk {nth}");
    }
}

#[test]
fn x4_a_split_request_sends_its_handoff_with_the_first_chunk() {
    let pair = start(32);
    let question = Api::Chat.ask(10, false);
    let response = pair.post(CHAT, &question.body).expect(200);
    expect_tokens(&question, &response, 10);
    let bodies = bodies(&pair);
    assert_eq!(bodies.len(), 3);
    let issued: Value = serde_json::from_str(&pair.handoffs.issued()[0]).unwrap();
    assert_eq!(bodies[0]["kv_transfer_params"], issued);
    for body in &bodies[1..] {
        assert_eq!(body.get("kv_transfer_params"), None);
    }
    assert_eq!(pair.prefill.requests().len(), 1);
    assert_eq!(pair.decode.counters().handoff_used, 1);
    let details = &response.json()["usage"]["prompt_tokens_details"];
    assert_eq!(details["cached_tokens"], 7);
}

fn error(code: u16) -> Fault {
    Fault::Status {
        code,
        body: format!("{{\"said\":{code}}}"),
        content_type: "application/problem+json".to_owned(),
    }
}

#[test]
fn x5_an_error_of_the_first_chunk_is_relayed_to_the_client() {
    let pair = start(32);
    for stream in [false, true] {
        for code in [400, 429, 500, 503] {
            pair.decode.fault(error(code), 1);
            let question = Api::Chat.ask(10, stream);
            let response = ask(&pair, &question).expect(code);
            assert_eq!(response.text(), format!("{{\"said\":{code}}}"));
            assert_eq!(
                response.header("content-type"),
                Some("application/problem+json")
            );
        }
    }
}

#[test]
fn x5_an_error_of_a_later_chunk_is_relayed_or_truncates_the_stream() {
    let pair = start(32);
    // Only the bodies of later chunks contain this member.
    let later = "continue_final_message";
    pair.decode.fault_with(later, error(503), 1);
    let question = Api::Chat.ask(10, false);
    let response = ask(&pair, &question).expect(503);
    assert_eq!(response.text(), "{\"said\":503}");
    // Streamed events cannot be withdrawn, so the stream must show that it is incomplete.
    pair.decode.fault_with(later, error(503), 1);
    let question = Api::Chat.ask(10, true);
    let response = ask(&pair, &question);
    assert_eq!(response.status, 200);
    let is_told = response.text().contains("{\"said\":503}");
    assert!(is_told || response.end != End::Complete, "{response:?}");
    expect_healthy(&pair);
}

#[test]
fn x5_a_chunk_that_is_not_json_is_an_error() {
    let pair = start(32);
    for fault in [Fault::Html, Fault::HalfJson, Fault::Gzip] {
        pair.decode.fault(fault.clone(), 1);
        let question = Api::Chat.ask(10, false);
        let response = ask(&pair, &question);
        assert!(response.status >= 500, "{fault:?}: {response:?}");
        pair.decode
            .fault_with("continue_final_message", fault.clone(), 1);
        let question = Api::Chat.ask(10, true);
        let response = ask(&pair, &question);
        let whole = text_of(Api::Chat, &response).len();
        assert!(whole < expected_text("00000000", 10).len(), "{fault:?}");
    }
    pair.sidecar.expect_sound();
    expect_healthy(&pair);
}

#[test]
fn x6_a_stream_has_one_content_event_per_chunk_and_a_single_id() {
    let pair = start(32);
    let usage = r#","stream_options":{"include_usage":true}"#;
    for (more, counted) in [(usage, true), ("", false)] {
        pair.decode.clear();
        let question = Api::Chat.ask_with(10, true, more);
        let response = ask(&pair, &question).expect(200);
        expect_tokens(&question, &response, 10);
        let kind = response.header("content-type").unwrap();
        assert!(kind.starts_with("text/event-stream"), "{kind}");
        assert!(response.text().ends_with("data: [DONE]\n\n"));
        let events = response.events();
        let ids: Vec<&Value> = events.iter().map(|event| &event["id"]).collect();
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        assert!(
            events
                .iter()
                .all(|event| event["object"] == "chat.completion.chunk")
        );
        let tokens = |event: &&Value| {
            let text = event["choices"][0]["delta"]["content"].as_str();
            text.is_some_and(|text| !text.is_empty())
        };
        assert_eq!(events.iter().filter(tokens).count(), 3);
        let finishes: Vec<&Value> = events
            .iter()
            .map(|event| &event["choices"][0]["finish_reason"])
            .filter(|finish| !finish.is_null())
            .collect();
        assert_eq!(finishes, ["length"], "null until the end");
        let last = events.last().unwrap();
        assert_eq!(last["usage"].is_object(), counted, "include_usage");
        if counted {
            assert_eq!(last["choices"], json!([]));
            assert_eq!(last["usage"]["completion_tokens"], 10);
        }
    }
}

#[test]
fn x6_each_chunk_is_forwarded_immediately() {
    let pair = start(32);
    pair.decode
        .fault_with("continue_final_message", Fault::StallBeforeHead, 1);
    let question = Api::Chat.ask(10, true);
    let mut client = pair.sidecar.connect();
    let body = question.body.as_bytes();
    client.send(crate::client::request("POST", CHAT, &[], body));
    assert_eq!(client.head().status, 200);
    let want = expected_text(&sha256(question.prompt.as_bytes()), 4);
    let mut text = String::new();
    while !text.contains(want.trim_end()) {
        text += &String::from_utf8(client.chunk().unwrap()).unwrap();
    }
    drop(client);
    wait_aborted(&pair.decode);
    expect_drained(&pair.sidecar);
}

#[test]
fn requests_that_chunks_cannot_express_are_not_chunked() {
    let pair = start(32);
    for more in [
        r#","tools":[{"type":"function","function":{"name":"f"}}]"#,
        r#","logprobs":true"#,
        r#","n":2"#,
        r#","structured_outputs":{"regex":"a+"}"#,
        r#","return_token_ids":true"#,
        r#","echo":true"#,
        // Invalid limits are forwarded for the engine to judge. They do not mean that there is no
        // limit.
        r#","max_completion_tokens":10.0"#,
        r#","max_completion_tokens":0"#,
        r#","max_completion_tokens":-1"#,
    ] {
        pair.decode.clear();
        let question = Api::Chat.ask_with(10, false, more);
        let response = ask(&pair, &question);
        assert!(matches!(response.status, 200 | 400), "{more}: {response:?}");
        assert_eq!(only(&pair.decode).body, question.body.as_bytes(), "{more}");
    }
}

#[test]
fn requests_to_other_apis_are_not_chunked() {
    let pair = start(32);
    for api in Api::ALL {
        if api == Api::Chat {
            continue;
        }
        pair.decode.clear();
        let question = api.ask(10, true);
        let response = pair.sidecar.post(api.path(), &question.body, &[]);
        question.expect(&response.expect(200));
        assert_eq!(only(&pair.decode).body, question.body.as_bytes());
    }
}

#[test]
fn a_body_that_is_not_an_object_is_rejected() {
    let pair = start(32);
    for body in ["null", "[]", "{", "{}x"] {
        pair.sidecar
            .post(CHAT, body, &[])
            .expect_error(400, "bad_json");
    }
    assert!(pair.decode.requests().is_empty());
}

#[test]
fn text_that_needs_escapes_is_preserved() {
    let pair = start(32);
    let said = r#"a \"b\" \\ \u00e9 \n \ud83d\ude00 </s> \u0000"#;
    let body = format!(
        "{{\"id\":\"x\",\"object\":\"chat.completion\",\"created\":1,\"model\":\"m\",\
         \"choices\":[{{\"index\":0,\"message\":{{\"role\":\"assistant\",\"content\":\"{said}\"}},\
         \"finish_reason\":\"length\"}}],\
         \"usage\":{{\"prompt_tokens\":2,\"completion_tokens\":4,\"total_tokens\":6}}}}"
    );
    let canned = Fault::Status {
        code: 200,
        body,
        content_type: "application/json".to_owned(),
    };
    pair.decode.fault(canned, 2);
    let question = Api::Chat.ask(8, false);
    let response = ask(&pair, &question).expect(200).json();
    let once: String = serde_json::from_str(&format!("\"{said}\"")).unwrap();
    assert_eq!(
        response["choices"][0]["message"]["content"],
        format!("{once}{once}")
    );
    let second = json_of(&pair.decode.requests()[1]);
    assert_eq!(second["messages"][1]["content"], once);
}

#[test]
fn a_client_disconnect_in_a_later_chunk_aborts_it_and_sends_no_other() {
    let pair = start(32);
    for leave in Leave::ALL {
        for stream in [false, true] {
            pair.decode.clear();
            pair.decode
                .fault_with("continue_final_message", Fault::Hold, 1);
            let question = Api::Chat.ask(20, stream);
            let mut client = pair.sidecar.connect();
            let body = question.body.as_bytes();
            client.send(crate::client::request("POST", CHAT, &[], body));
            let second = |log: &[Seen]| {
                log.len() == 2
                    && log
                        .last()
                        .is_some_and(|seen| seen.state == State::Responding)
            };
            assert!(pair.decode.wait_for(DEADLINE, second).is_some());
            let (_, _client) = leave.now(client);
            wait_aborted(&pair.decode);
            expect_drained(&pair.sidecar);
            assert_eq!(
                pair.decode.requests().len(),
                2,
                "a decode chunk was requested after the disconnect"
            );
            pair.decode.release();
        }
    }
    pair.sidecar.expect_sound();
    expect_healthy(&pair);
}
