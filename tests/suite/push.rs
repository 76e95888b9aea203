//! NIXL push (`docs/pd-sidecar.md#nixl-push`): once a prefiller's identity is known, both legs
//! start at the same time. After any failure, the next request runs in the serial order.

use mock_engine::{Engine, Fault, KvContract, Push, State};
use serde_json::json;

use crate::apis::Api;
use crate::harness::{CHAT, PREFILLER, Pair, json_of, only};
use crate::harness_more::Leave;
use crate::kv::{
    Setup, begin, both_legs, engine_error, expect_contract_kept, expect_recovered, forget,
    responded, wait_aborted, wait_state,
};

fn start_with(args: &[&str]) -> (Pair, Push) {
    let terms = Push::new("e-1");
    let setup = Setup {
        args,
        contract: KvContract::NixlPush(terms.clone()),
        ..Setup::default()
    };
    (setup.start(), terms)
}

/// Returns a pair whose sidecar knows the identity of the prefiller.
fn start() -> (Pair, Push) {
    let (pair, terms) = start_with(&[]);
    responded(&pair, &Api::Chat.ask(4, true));
    assert_eq!(terms.concurrent(), 0);
    forget(&pair);
    (pair, terms)
}

fn events(pair: &Pair, event: &str) -> f64 {
    pair.sidecar
        .metric("ringside_nixl_push_total", &[("event", event)])
}

/// Sends a request and returns whether its legs were started together.
#[track_caller]
fn is_concurrent(pair: &Pair, terms: &Push) -> bool {
    let before = terms.concurrent();
    responded(pair, &Api::Chat.ask(4, false));
    terms.concurrent() > before
}

#[test]
fn both_legs_start_together_once_the_prefiller_is_known() {
    let (pair, terms) = start();
    // Each engine responds only after the other one has received its leg.
    terms.meetings.prefill_waits(true);
    for (nth, api) in Api::ALL.into_iter().enumerate() {
        for (more, stream) in [false, true].into_iter().enumerate() {
            forget(&pair);
            let question = api.ask(4, stream);
            responded(&pair, &question);
            let (prefill, decode) = both_legs(&pair);
            assert_eq!(terms.concurrent(), (nth * 2 + more + 1) as u64, "{api:?}");
            let id = prefill.header("x-request-id").unwrap();
            assert_eq!(decode.header("x-request-id"), Some(id));
            let mut want = question.json();
            want["kv_transfer_params"] = json!({"do_remote_prefill": true,
                "do_remote_decode": false, "remote_engine_id": "e-1",
                "remote_host": "127.0.0.1", "remote_port": pair.prefill.port(), "tp_size": 1,
                "pp_size": 1, "remote_request_id": id, "transfer_mode": "push"});
            assert_eq!(json_of(&decode), want, "{api:?}");
            let params = json_of(&prefill)["kv_transfer_params"].take();
            assert_eq!(params["do_remote_decode"], true);
        }
    }
    assert_eq!(events(&pair, "concurrent"), 10.0);
}

#[test]
fn the_clients_request_id_identifies_no_transfer() {
    let (pair, _) = start();
    let question = Api::Chat.ask(4, false);
    for _ in 0..2 {
        let headers = [("x-request-id", "same")];
        let response = pair.post_with(CHAT, &question.body, &headers);
        question.expect(&response.expect(200));
    }
    expect_contract_kept(&pair);
}

#[test]
fn the_client_gets_the_prefillers_count_of_cached_tokens() {
    let (pair, terms) = start();
    let question = Api::Chat.ask(4, false);
    let response = pair.post(CHAT, &question.body).expect(200);
    assert_eq!(terms.concurrent(), 1);
    let usage = response.json()["usage"].take();
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 7);
}

#[test]
fn no_response_is_relayed_before_the_prefiller_has_confirmed() {
    let (pair, terms) = start();
    terms.meetings.decode_waits(false);
    pair.prefill.fault(Fault::Hold, 1);
    let question = Api::Chat.ask(4, true);
    let mut client = begin(&pair, &question);
    wait_state(&pair.prefill, State::Responding);
    wait_state(&pair.decode, State::Responded);
    // The head has arrived at the sidecar: this leg and that of the first request are counted.
    let decode = [("leg", "decode")];
    pair.sidecar
        .wait_metric("ringside_leg_duration_seconds_count", &decode, 2.0);
    if !crate::harness::is_suite_tls() {
        client.socket().set_nonblocking(true).unwrap();
        assert!(client.socket().peek(&mut [0]).is_err());
        client.socket().set_nonblocking(false).unwrap();
    }
    pair.prefill.release();
    question.expect(&client.response());
}

#[test]
fn a_restarted_prefiller_costs_one_more_decode_leg() {
    let (pair, terms) = start();
    terms.set_engine("e-2");
    // The decode leg names the old engine and would wait for it for ever.
    responded(&pair, &Api::Chat.ask(4, true));
    let legs = pair.decode.requests();
    assert_eq!(legs.len(), 2);
    assert!(legs[0].state.is_aborted(), "{legs:?}");
    let params = json_of(&legs[1])["kv_transfer_params"].take();
    assert_eq!(params["remote_engine_id"], "e-2");
    assert_eq!(params["remote_block_ids"], json!([[1, 2, 3]]));
    only(&pair.prefill);
    assert!(is_concurrent(&pair, &terms));
    assert_eq!(events(&pair, "changed"), 1.0);
    expect_recovered(&pair);
}

#[test]
fn a_prefiller_whose_identity_keeps_changing_is_used_serially() {
    let (pair, terms) = start();
    for engine in ["e-2", "e-3"] {
        terms.set_engine(engine);
        responded(&pair, &Api::Chat.ask(4, true));
    }
    for _ in 0..3 {
        assert!(!is_concurrent(&pair, &terms));
    }
    assert_eq!(events(&pair, "serial"), 1.0);
    let line = pair.sidecar.wait_stderr("has changed its engine id");
    assert!(line.contains(&pair.prefill.host_port()), "{line}");
    expect_recovered(&pair);
}

#[test]
fn a_failed_prefill_ends_the_decode_leg_and_the_next_request_is_serial() {
    let (pair, terms) = start();
    for code in [400, 429, 500, 503] {
        assert!(is_concurrent(&pair, &terms));
        forget(&pair);
        pair.prefill.fault(engine_error(code), 1);
        pair.post(CHAT, &Api::Chat.ask(4, true).body).expect(code);
        wait_aborted(&pair.decode);
        assert!(!is_concurrent(&pair, &terms), "{code}");
    }
    for (fault, label) in [
        (Fault::ResetBeforeHead, "prefill_reset"),
        (Fault::Garbage, "prefill_answer"),
    ] {
        assert!(is_concurrent(&pair, &terms));
        forget(&pair);
        pair.prefill.fault(fault, 2);
        let response = pair.post(CHAT, &Api::Chat.ask(4, true).body);
        response.expect_error(502, label);
        pair.prefill.clear_faults();
        wait_aborted(&pair.decode);
        assert!(!is_concurrent(&pair, &terms), "{label}");
    }
    expect_recovered(&pair);
}

#[test]
fn a_retryable_prefill_failure_is_retried_serially() {
    let (pair, terms) = start_with(&["--prefill-max-retries=1"]);
    responded(&pair, &Api::Chat.ask(4, true));
    forget(&pair);
    pair.prefill.fault(engine_error(503), 1);
    responded(&pair, &Api::Chat.ask(4, true));
    assert_eq!(pair.prefill.requests().len(), 2);
    assert_eq!(terms.concurrent(), 1);
    // The retry that led to the serial order counts.
    assert!(is_concurrent(&pair, &terms));
    forget(&pair);
    pair.prefill.fault(engine_error(503), 3);
    pair.post(CHAT, &Api::Chat.ask(4, true).body).expect(503);
    assert_eq!(pair.prefill.requests().len(), 2);
    expect_recovered(&pair);
}

#[test]
fn a_failed_decode_leg_is_relayed_and_the_next_request_is_serial() {
    let (pair, terms) = start_with(&["--on-decode-kv-error=error"]);
    responded(&pair, &Api::Chat.ask(4, true));
    pair.decode.fault(engine_error(500), 1);
    pair.post(CHAT, &Api::Chat.ask(4, true).body).expect(500);
    assert_eq!(terms.concurrent(), 0, "the fault comes before the contract");
    assert!(!is_concurrent(&pair, &terms));
    assert!(is_concurrent(&pair, &terms));
    // The client's fault is none of the prefiller.
    pair.decode.fault(engine_error(422), 1);
    pair.post(CHAT, &Api::Chat.ask(4, true).body).expect(422);
    assert!(is_concurrent(&pair, &terms));
    expect_recovered(&pair);
}

#[test]
fn a_decoder_that_received_no_kv_cache_computes_the_prompt() {
    let (pair, terms) = start_with(&[]);
    responded(&pair, &Api::Chat.ask(4, true));
    forget(&pair);
    pair.decode.fault(engine_error(500), 1);
    responded(&pair, &Api::Chat.ask(4, true));
    let legs = pair.decode.requests();
    assert_eq!(legs.len(), 2);
    assert_eq!(json_of(&legs[1])["kv_transfer_params"], json!(null));
    assert!(!is_concurrent(&pair, &terms));
    expect_recovered(&pair);
}

#[test]
fn a_decode_connection_that_the_engine_has_closed_costs_no_response() {
    let (pair, terms) = start();
    pair.decode.fault(Fault::ResetBeforeHead, 1);
    responded(&pair, &Api::Chat.ask(4, true));
    only(&pair.prefill);
    assert_eq!(terms.concurrent(), 0);
    expect_recovered(&pair);
}

#[test]
fn an_unreachable_prefiller_has_the_rules_of_the_serial_order() {
    // No connection is reused.
    let (pair, terms) = start_with(&["--upstream-idle-timeout=1ms"]);
    responded(&pair, &Api::Chat.ask(4, true));
    let other = Engine::start(
        mock_engine::EngineConfig {
            contract: KvContract::NixlPush(terms),
            ..mock_engine::EngineConfig::prefill()
        },
        0,
    )
    .unwrap();
    pair.prefill.refuse(true);
    let question = Api::Chat.ask(4, true);
    let targets = format!("{},{}", pair.prefill.host_port(), other.host_port());
    let headers = [(PREFILLER, targets.as_str())];
    let response = pair.sidecar.post(CHAT, &question.body, &headers);
    question.expect(&response.expect(200));
    only(&other);
    pair.prefill.refuse(false);
    expect_recovered(&pair);
}

#[test]
fn legs_of_clients_that_leave_end() {
    let (pair, terms) = start();
    for leave in Leave::ALL {
        for hold_decode in [false, true] {
            forget(&pair);
            let held = if hold_decode {
                &pair.decode
            } else {
                &pair.prefill
            };
            held.fault(Fault::Hold, 1);
            let client = begin(&pair, &Api::Chat.ask(4, true));
            wait_state(held, State::Responding);
            let (_, _client) = leave.now(client);
            pair.sidecar
                .wait_metric("ringside_client_connections", &[], 0.0);
            held.release();
            expect_recovered(&pair);
        }
    }
    // The prefiller has done nothing wrong.
    assert!(is_concurrent(&pair, &terms));
}

#[test]
fn a_forced_tool_call_runs_serially_and_is_decoded_alone_if_its_prefill_fails() {
    let (pair, terms) = start();
    for code in [400, 500] {
        forget(&pair);
        pair.prefill.fault(engine_error(code), 1);
        let body = r#"{"messages":[{"role":"user","content":"x"}],"max_tokens":4,"tools":[],"tool_choice":"required"}"#;
        pair.post(CHAT, body).expect(200);
        assert_eq!(
            json_of(&only(&pair.decode))["kv_transfer_params"],
            json!(null)
        );
    }
    let labels = [("outcome", "local_fallback"), ("reason", "forced_tool")];
    pair.sidecar
        .wait_metric("ringside_pd_requests_total", &labels, 2.0);
    assert_eq!(terms.concurrent(), 0);
    // The prefiller is not the one that has failed.
    assert!(is_concurrent(&pair, &terms));
}

#[test]
fn chunked_decode_runs_serially() {
    let (pair, terms) = start_with(&["--decode-chunk-size=2"]);
    for _ in 0..3 {
        let body = r#"{"messages":[{"role":"user","content":"hello"}],"max_tokens":6}"#;
        pair.post(CHAT, body).expect(200);
    }
    assert_eq!(terms.concurrent(), 0);
}
