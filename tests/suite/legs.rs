//! Properties of the legs of every connector and mode: handling of a failed prefill, order of
//! candidates, counters, memory for buffered bodies, and the legs that a drain waits for.

use mock_engine::{Engine, EngineConfig, Fault, Seen, State};
use serde_json::{Value, json};

use crate::apis::{Api, Question};
use crate::client::{Client, DEADLINE};
use crate::harness::{CHAT, PREFILLER, Pair, json_of, only, wait_for};
use crate::harness_more::{Leave, expect_drained};
use crate::kv::{
    Mode, Setup, begin, each_connector, engine_error, expect_contract_kept, expect_recovered,
    forget, responded, wait_aborted, wait_state,
};

const COUNT: &str = "ringside_pd_requests_total";

#[track_caller]
fn wait_count(pair: &Pair, outcome: &str, reason: &str, want: f64) {
    let labels = [("outcome", outcome), ("reason", reason)];
    pair.sidecar.wait_metric(COUNT, &labels, want);
}

#[test]
fn a_failed_prefill_is_decoded_locally_if_configured() {
    each_connector(&["--on-prefill-failure=decode"], |mode, setup| {
        eprintln!("{mode:?}");
        let pair = setup.start();
        // A pooled connection that is closed causes one retry on a new one, so these faults apply
        // twice.
        for (faults, times, reason) in [
            (
                vec![engine_error(500), engine_error(400)],
                1,
                "prefill_status",
            ),
            (
                vec![Fault::ResetBeforeHead, Fault::CloseBeforeHead],
                2,
                "prefill_reset",
            ),
            (
                vec![Fault::Garbage, Fault::EndlessHead],
                2,
                "prefill_answer",
            ),
        ] {
            for (nth, fault) in faults.into_iter().enumerate() {
                forget(&pair);
                pair.prefill.fault(fault.clone(), times);
                for stream in [true, false] {
                    let question = Api::Chat.ask(4, stream);
                    responded(&pair, &question);
                    if !stream {
                        continue;
                    }
                    pair.prefill.clear_faults();
                    expect_alone(&pair, &question);
                }
                wait_count(&pair, "local_fallback", reason, (nth + 1) as f64);
            }
        }
        forget(&pair);
        let (down, question) = (refusing(), Api::Generate.ask(4, true));
        let target = down.host_port();
        let headers = [(PREFILLER, target.as_str())];
        let response = pair
            .sidecar
            .post(question.api.path(), &question.body, &headers);
        question.expect(&response.expect(200));
        expect_alone(&pair, &question);
        wait_count(&pair, "local_fallback", "prefill_connect", 1.0);
        expect_recovered(&pair);
    });
}

/// Starts a prefill engine that refuses connections.
fn refusing() -> Engine {
    let engine = Engine::start(EngineConfig::prefill(), 0).unwrap();
    engine.refuse(true);
    engine
}

/// Checks that the decoder served `question` alone: its last request has the client's body, without
/// members of the connector, and has received a response; all earlier requests were aborted.
#[track_caller]
fn expect_alone(pair: &Pair, question: &Question) {
    let legs = pair.decode.requests();
    let (last, others) = legs.split_last().unwrap();
    assert_eq!(last.state, State::Responded);
    assert_eq!(json_of(last), question.json());
    assert!(
        others.iter().all(|leg| leg.state.is_aborted()),
        "{others:?}"
    );
}

#[test]
fn a_prefill_timeout_is_decoded_locally_if_configured() {
    let more = ["--on-prefill-failure=decode", "--prefill-timeout=200ms"];
    each_connector(&more, |mode, setup| {
        eprintln!("{mode:?}");
        let pair = setup.start();
        pair.prefill.fault(Fault::StallBeforeHead, 1);
        if mode.is_concurrent {
            // The transfer to the decode engine does not arrive either.
            pair.decode.fault(Fault::StallBeforeHead, 1);
        }
        let question = Api::Chat.ask(4, true);
        responded(&pair, &question);
        expect_alone(&pair, &question);
        wait_aborted(&pair.prefill);
        wait_count(&pair, "local_fallback", "prefill_timeout", 1.0);
        expect_recovered(&pair);
    });
}

#[test]
fn hidden_prefill_errors_keep_their_status() {
    each_connector(&["--hide-prefill-errors"], |mode, setup| {
        eprintln!("{mode:?}");
        let pair = setup.start();
        for (code, status) in [(429, 429), (500, 500), (307, 502)] {
            forget(&pair);
            let fault = Fault::Status {
                code,
                body: "the prompt was: secret".to_owned(),
                content_type: "text/plain".to_owned(),
            };
            pair.prefill.fault(fault, 1);
            let response = pair.post(CHAT, Api::Chat.ask(4, true).body);
            let response = response.expect_error(status, "prefill_status");
            assert!(!response.text().contains("secret"));
            expect_drained(&pair.sidecar);
            // The engine finds out after the sidecar has closed the connection.
            let ended = |log: &[Seen]| log.iter().all(|leg| leg.state.is_aborted());
            assert!(pair.decode.wait_for(DEADLINE, ended).is_some());
        }
        wait_count(&pair, "failed", "prefill_status", 3.0);
        expect_recovered(&pair);
    });
}

#[test]
fn the_next_candidate_is_tried_when_one_refuses() {
    each_connector(&[], |mode, setup| {
        eprintln!("{mode:?}");
        let pair = setup.start();
        let down = refusing();
        let targets = [&down, &down, &pair.prefill]
            .map(Engine::host_port)
            .join(",");
        let headers = [(PREFILLER, targets.as_str())];
        for stream in [true, false] {
            forget(&pair);
            let question = Api::Chat.ask(4, stream);
            let response = pair.sidecar.post(CHAT, &question.body, &headers);
            question.expect(&response.expect(200));
            only(&pair.prefill);
            only(&pair.decode);
        }
        wait_count(&pair, "remote", "none", 2.0);
        forget(&pair);
        let targets = format!("{0},{0}", down.host_port());
        let headers = [(PREFILLER, targets.as_str())];
        let question = Api::Chat.ask(4, true);
        let response = pair.sidecar.post(CHAT, &question.body, &headers);
        response.expect_error(502, "prefill_connect");
        assert!(
            pair.decode.requests().is_empty(),
            "no decode leg may be sent"
        );
        expect_contract_kept(&pair);
    });
}

/// A request is counted regardless of its outcome: success, error, truncation or client disconnect.
#[test]
fn every_intercepted_request_is_counted_once() {
    each_connector(&[], |mode, setup| {
        eprintln!("{mode:?}");
        let pair = setup.start();
        let target = pair.prefill.host_port();
        let question = |more: &str| Api::Chat.ask_with(4, true, more).body;
        let mut asked = 0.0;
        let mut ask = |path: &str, body: &str, headers: &[(&str, &str)]| {
            asked += 1.0;
            pair.sidecar.post(path, body, headers)
        };
        let split = [(PREFILLER, target.as_str())];
        for api in Api::ALL {
            ask(api.path(), &api.ask(4, true).body, &split).expect(200);
            ask(api.path(), &api.ask(4, false).body, &[]).expect(200);
        }
        let several = if mode.name == "sglang" { 400 } else { 200 };
        ask(CHAT, &question(r#","n":2"#), &split).expect(several);
        ask(CHAT, "null", &split).expect(400);
        ask(CHAT, &question(""), &[(PREFILLER, "a:b")]).expect(502);
        pair.prefill.fault(engine_error(503), 1);
        ask(CHAT, &question(""), &split).expect(503);
        let down = refusing();
        ask(CHAT, &question(""), &[(PREFILLER, &down.host_port())]).expect(502);
        // On a pooled connection and on a new one.
        pair.decode.fault(Fault::ResetBeforeHead, 2);
        ask(CHAT, &question(""), &split).expect(502);
        pair.decode.clear_faults();
        pair.decode
            .fault(Fault::TruncateMidBody { after_events: 1 }, 1);
        drop(ask(CHAT, &question(""), &split));
        for leave in Leave::ALL {
            asked += 1.0;
            pair.decode
                .fault(Fault::StallMidStream { after_events: 3 }, 1);
            let mut client = begin(&pair, &Api::Chat.ask(64, true));
            client.head();
            client.chunk().unwrap();
            let (_, _client) = leave.now(client);
            expect_drained(&pair.sidecar);
        }
        // None of these is intercepted.
        pair.sidecar.get("/v1/models", &split).expect(200);
        pair.sidecar.get("/health", &[]).expect(200);
        pair.sidecar.wait_metric(COUNT, &[], asked);
        expect_recovered(&pair);
    });
}

const HELD_BYTES: usize = 40_000;

/// Returns a streaming chat completion request with a body of more than 40,000 bytes, of which
/// `--body-budget=60000` has room for only one.
fn long_question(tokens: u32) -> Question {
    let padding = format!(r#","user":"{}""#, "x".repeat(HELD_BYTES));
    Api::Chat.ask_with(tokens, true, &padding)
}

/// The sidecar releases the request body once the response streams, so that the body budget has
/// room for another request.
#[test]
fn a_streaming_response_releases_the_prompt() {
    let more = ["--max-body=60000", "--body-budget=60000"];
    each_connector(&more, |mode, setup| {
        eprintln!("{mode:?}");
        let pair = setup.start();
        let fault = Fault::StallMidStream { after_events: 3 };
        pair.decode.fault(fault, 1);
        let mut client = begin(&pair, &long_question(64));
        assert_eq!(client.head().status, 200);
        client.chunk().unwrap();
        // A concurrent prefill leg has responded by now, or does so soon.
        wait_for("room for another body", || {
            let question = long_question(4);
            let response = pair.post(CHAT, &question.body);
            (response.status == 200).then(|| question.expect(&response))
        });
        client.reset();
        expect_drained(&pair.sidecar);
        pair.sidecar.expect_sound();
    });
}

/// A drain waits for a prefill leg that continues after its client has disconnected, whether or not
/// the client has received its response.
#[test]
fn a_drain_waits_for_legs_that_outlive_their_client() {
    each_connector(&[], |mode, setup| {
        match mode.name {
            // Without a response, both legs are cancelled.
            "sglang" => drain(mode, setup, true),
            "mooncake" => drain(mode, setup, false),
            _ => {}
        }
    });
}

#[track_caller]
fn drain(mode: Mode, setup: &Setup<'_>, has_response: bool) {
    eprintln!("{mode:?}, responded {has_response}");
    let mut pair = setup.start();
    pair.prefill.fault(Fault::Hold, 1);
    let question = Api::Chat.ask(4, true);
    let mut client: Client = begin(&pair, &question);
    wait_state(&pair.prefill, State::Responding);
    if has_response {
        question.expect(&client.response().expect(200));
        drop(client);
    } else {
        client.reset();
    }
    pair.sidecar
        .wait_metric("ringside_client_connections", &[], 0.0);
    pair.sidecar.terminate();
    pair.sidecar.wait_stderr("drain");
    // Only the prefill leg is left, and the process keeps running for it.
    assert_eq!(pair.sidecar.admin("/livez").unwrap().status, 200);
    assert_eq!(only(&pair.prefill).state, State::Responding);
    pair.prefill.release();
    wait_state(&pair.prefill, State::Responded);
    assert_eq!(pair.sidecar.wait_exit().code(), Some(0));
}

/// Returns a handoff for these messages that no decode engine has used.
#[track_caller]
fn unused_handoff(pair: &Pair, messages: &Value) -> String {
    let body = json!({"messages": messages, "max_tokens": 4}).to_string();
    pair.decode.fault(Fault::ResetBeforeHead, 1);
    pair.post(CHAT, body).expect_error(502, "decode_reset");
    assert_eq!(pair.handoffs.unused(), 1);
    forget(pair);
    pair.handoffs.issued().pop().unwrap()
}

#[test]
fn a_handoff_from_the_client_passes_only_if_clients_are_trusted() {
    for trusted in [true, false] {
        let args: &[&str] = if trusted { &["--trust-client-kv"] } else { &[] };
        let pair = Pair::start(args);
        let messages = json!([{"role": "user", "content": "mine"}]);
        let handoff = unused_handoff(&pair, &messages);
        let body = format!(
            r#"{{"messages":{messages},"max_tokens":4,"kv_transfer_params":{handoff},"vllm_xargs":{{"ec_transfer_params":{{}}}}}}"#
        );
        pair.sidecar.post(CHAT, &body, &[]).expect(200);
        let seen = only(&pair.decode);
        assert_eq!(seen.body == body.as_bytes(), trusted);
        assert_eq!(pair.decode.counters().handoff_used, u64::from(trusted));
        let masked = pair
            .sidecar
            .metric("ringside_client_kv_params_masked_total", &[]);
        assert_eq!(masked > 0.0, !trusted);
        // In a split request, the prefill engine's handoff replaces it in either case.
        forget(&pair);
        pair.post(CHAT, &body).expect(200);
        assert_eq!(pair.decode.counters().handoff_reused, 0);
        let sent = json_of(&only(&pair.decode))["kv_transfer_params"].take();
        let issued = pair.handoffs.issued().pop().unwrap();
        assert_eq!(sent, serde_json::from_str::<Value>(&issued).unwrap());
        expect_contract_kept(&pair);
    }
}
