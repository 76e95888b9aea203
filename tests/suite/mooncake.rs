//! Mooncake connector (`docs/pd-sidecar.md#mooncake`): the ranks of a prefill engine are queried
//! once, and both legs have the same transfer ID. Conformance rows K1 and K3.

use std::collections::HashSet;

use mock_engine::{Engine, EngineConfig, EngineIds, Fault, KvContract, Mooncake, Seen, State};
use serde_json::{Value, json};

use crate::apis::{Api, Completion};
use crate::client::DEADLINE;
use crate::harness::{CHAT, PREFILLER, Pair, json_of, only};
use crate::harness_more::{Leave, expect_drained};
use crate::kv::{
    Rule, Setup, begin, both_legs, client_disconnects, engine_error, expect_recovered,
    failed_prefill_cancels_decode, forget, responded, wait_aborted, wait_state,
};

/// A pair and the bootstrap server of its prefill engine.
struct Cluster {
    pair: Pair,
    bootstrap: Engine,
    terms: Mooncake,
}

fn terms() -> Mooncake {
    Mooncake {
        engines: EngineIds::new(&["e0", "e1"]),
        ..Mooncake::default()
    }
}

fn bootstrap_of(terms: &Mooncake) -> Engine {
    let config = EngineConfig {
        bootstrap: Some(terms.engines.clone()),
        ..EngineConfig::default()
    };
    Engine::start(config, 0).unwrap()
}

/// Runs `test` with a setup whose sidecar queries `bootstrap` and whose engines enforce `terms`.
fn with_setup<T>(terms: &Mooncake, bootstrap: &Engine, test: impl FnOnce(&Setup<'_>) -> T) -> T {
    let port = format!("--mooncake-bootstrap-port={}", bootstrap.port());
    test(&Setup {
        args: &["--kv-connector=mooncake", &port],
        contract: KvContract::Mooncake(terms.clone()),
        dp_size: 2,
        ..Setup::default()
    })
}

fn start() -> Cluster {
    let terms = terms();
    let bootstrap = bootstrap_of(&terms);
    let pair = with_setup(&terms, &bootstrap, |setup| setup.start());
    Cluster {
        pair,
        bootstrap,
        terms,
    }
}

/// Checks the bodies of the two legs of a request to `api` with the body `client`, and that the
/// rank of the prefill leg matches the engine ID in the decode leg. Returns that rank and the
/// transfer ID.
#[track_caller]
fn expect_objects(cluster: &Cluster, client: &Value, api: Api) -> (u64, String) {
    let (prefill, decode) = both_legs(&cluster.pair);
    let decoded = json_of(&decode);
    let params = &decoded["kv_transfer_params"];
    let transfer = params["transfer_id"].as_str().unwrap().to_owned();
    let engine = params["remote_engine_id"].as_str().unwrap();
    let rank: u64 = prefill
        .header("x-data-parallel-rank")
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(
        engine,
        format!("e{rank}"),
        "k3: the rank and the engine ID do not match"
    );
    assert_eq!(decode.header("x-data-parallel-rank"), None);
    let addr = format!("http://127.0.0.1:{}", cluster.bootstrap.port());
    let mut want = client.clone();
    want["kv_transfer_params"] = json!({"do_remote_prefill": true, "do_remote_decode": false,
        "transfer_id": transfer, "remote_bootstrap_addr": addr, "remote_engine_id": engine});
    assert_eq!(decoded, want);
    let set = json!({"stream": false, "kv_transfer_params": {"do_remote_prefill": false,
        "do_remote_decode": true, "transfer_id": transfer}});
    let removed = ["stream_options"];
    let prefill = json_of(&prefill);
    api.expect_capped(client, &prefill, &set, &removed, Completion::IfGiven);
    (rank, transfer)
}

#[test]
fn k1_the_bootstrap_server_is_queried_once_and_the_legs_share_a_transfer() {
    let cluster = start();
    let mut transfers = HashSet::new();
    for api in Api::ALL {
        for stream in [false, true] {
            forget(&cluster.pair);
            let more = match (api, stream) {
                (Api::Chat, true) => r#","stream_options":{"include_usage":true}"#,
                (Api::Chat, false) => r#","max_completion_tokens":6,"min_tokens":3"#,
                _ => "",
            };
            let question = api.ask_with(6, stream, more);
            responded(&cluster.pair, &question);
            let (_, transfer) = expect_objects(&cluster, &question.json(), api);
            transfers.insert(transfer);
        }
    }
    assert_eq!(transfers.len(), 10);
    let query = only(&cluster.bootstrap);
    assert_eq!(
        (query.method.as_str(), query.target.as_str()),
        ("GET", "/query")
    );
    for name in ["authorization", "x-forwarded-for", "x-prefiller-host-port"] {
        assert_eq!(query.header(name), None, "{name}");
    }
    cluster.pair.sidecar.expect_sound();
}

/// Lets the next prefill legs respond with this body, which has the usage of a prompt of 9 tokens.
fn ends(pair: &Pair, end: &str) {
    let fault = Fault::Status {
        code: 200,
        body: format!(r#"{{{end},"usage":{{"prompt_tokens_details":{{"cached_tokens":4}}}}}}"#),
        content_type: "application/json".to_owned(),
    };
    pair.prefill.fault(fault, 1);
}

/// A decoder that pulls KV cache which the prefiller has not kept waits for as long as it can.
#[test]
fn a_prefill_that_its_token_ends_is_decoded_alone() {
    let choice = |reason: &str| format!(r#""choices":[{{"finish_reason":{reason}}}]"#);
    for (api, end, pulls) in [
        (Api::Chat, choice("\"length\""), true),
        (Api::Chat, choice("\"stop\""), false),
        (Api::Chat, choice("\"tool_calls\""), false),
        (Api::Chat, choice("null"), true),
        (Api::Completions, choice("\"stop\""), false),
        (Api::Generate, choice("\"stop\""), false),
        (
            Api::Messages,
            r#""stop_reason":"max_tokens""#.to_owned(),
            true,
        ),
        // The front end finds stop strings, and the engine keeps the KV cache.
        (
            Api::Messages,
            r#""stop_reason":"stop_sequence""#.to_owned(),
            true,
        ),
        (
            Api::Messages,
            r#""stop_reason":"end_turn""#.to_owned(),
            false,
        ),
        (Api::Responses, r#""status":"incomplete""#.to_owned(), true),
        (Api::Responses, r#""status":"completed""#.to_owned(), false),
        (
            Api::Responses,
            r#""a":{"status":"completed"}"#.to_owned(),
            true,
        ),
    ] {
        let cluster = start();
        ends(&cluster.pair, &end);
        let question = api.ask(4, false);
        if pulls {
            // No prefill leg has arrived with the transfer id.
            cluster.terms.meetings.decode_waits(false);
        }
        let response = cluster.pair.post(api.path(), &question.body).expect(200);
        question.expect(&response);
        let params = json_of(&only(&cluster.pair.decode))["kv_transfer_params"].take();
        assert_eq!(params["transfer_id"].is_string(), pulls, "{api:?} {end}");
        let (outcome, reason) = if pulls {
            ("remote", "none")
        } else {
            ("local_fallback", "prefill_ended")
        };
        cluster.pair.sidecar.wait_outcome(outcome, reason);
    }
}

/// Engines refuse these values only while they handle a request. A decode leg that is sent at the
/// same time waits for a transfer that does not come, and the prefiller has 20 places for those.
#[test]
fn no_decode_leg_is_sent_before_the_prefiller_has_accepted_the_request() {
    let cluster = start();
    for _ in 0..25 {
        cluster.pair.prefill.fault(engine_error(400), 1);
        let question = Api::Chat.ask(4, true);
        cluster.pair.post(CHAT, &question.body).expect(400);
    }
    assert!(cluster.pair.decode.requests().is_empty());
    expect_recovered(&cluster.pair);
}

/// The blocks of an earlier prefill with the same id would never be freed.
#[test]
fn each_attempt_of_a_prefill_has_another_transfer_id() {
    let terms = terms();
    let bootstrap = bootstrap_of(&terms);
    let port = format!("--mooncake-bootstrap-port={}", bootstrap.port());
    let setup = Setup {
        args: &[
            "--kv-connector=mooncake",
            &port,
            "--prefill-max-retries=2",
            "--prefill-retry-backoff=1ms",
        ],
        contract: KvContract::Mooncake(terms),
        dp_size: 2,
        ..Setup::default()
    };
    let pair = setup.start();
    pair.prefill.fault(engine_error(503), 2);
    responded(&pair, &Api::Chat.ask(4, true));
    let legs = pair.prefill.requests();
    let ids: HashSet<String> = legs
        .iter()
        .map(|leg| json_of(leg)["kv_transfer_params"]["transfer_id"].to_string())
        .collect();
    assert_eq!((legs.len(), ids.len()), (3, 3));
}

/// The prefiller would keep the KV cache for 480 s. A decoder that has never been sent the
/// transfer releases it on request.
#[test]
fn a_prefill_whose_decode_leg_is_not_sent_is_released() {
    let cluster = start();
    cluster.pair.decode.refuse(true);
    let question = Api::Chat.ask(4, true);
    cluster.pair.post(CHAT, &question.body).expect(503);
    let failed = [("outcome", "failed")];
    let name = "ringside_stranded_kv_total";
    cluster.pair.sidecar.wait_metric(name, &failed, 1.0);
    cluster.pair.decode.refuse(false);
    responded(&cluster.pair, &question);
    // A decoder that has refused the request may have released it.
    cluster.pair.decode.clear();
    cluster.pair.decode.fault(engine_error(400), 1);
    cluster.pair.post(CHAT, &question.body).expect(400);
    assert_eq!(only(&cluster.pair.decode).path(), CHAT);
}

#[test]
fn the_count_of_cached_tokens_is_the_prefillers() {
    let cluster = start();
    ends(&cluster.pair, r#""choices":[{"finish_reason":"length"}]"#);
    cluster.terms.meetings.decode_waits(false);
    let question = Api::Chat.ask(4, false);
    let response = cluster.pair.post(CHAT, &question.body).expect(200);
    let usage = &response.json()["usage"];
    assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 4);
}

#[test]
fn k3_both_ranks_are_used_with_their_engine_ids() {
    let cluster = start();
    let mut ranks = [0, 0];
    for _ in 0..40 {
        forget(&cluster.pair);
        let question = Api::Chat.ask(2, false);
        responded(&cluster.pair, &question);
        let (rank, _) = expect_objects(&cluster, &question.json(), Api::Chat);
        ranks[rank as usize] += 1;
    }
    assert!(ranks.iter().all(|count| *count > 0), "{ranks:?}");
    assert_eq!(cluster.bootstrap.requests().len(), 1);
}

#[test]
fn engine_ids_are_queried_again_after_a_prefill_engine_restarts() {
    let cluster = start();
    responded(&cluster.pair, &Api::Chat.ask(4, true));
    for (round, ids) in [["n0", "n1"], ["m0", "m1"]].into_iter().enumerate() {
        cluster.terms.engines.set(&ids);
        forget(&cluster.pair);
        // The decode engine rejects the old ID; the transfer continues with the new one.
        let before = cluster.terms.meetings.complete();
        responded(&cluster.pair, &Api::Chat.ask(4, round == 0));
        let prefill = only(&cluster.pair.prefill);
        let legs = cluster.pair.decode.requests();
        assert_eq!(legs.len(), 2);
        let params: Vec<Value> = legs
            .iter()
            .map(|leg| json_of(leg)["kv_transfer_params"].take())
            .collect();
        let rank = prefill.header("x-data-parallel-rank").unwrap();
        let rank: usize = rank.parse().unwrap();
        assert_eq!(params[1]["remote_engine_id"], ids[rank]);
        assert_ne!(params[0]["remote_engine_id"], params[1]["remote_engine_id"]);
        let transfer = &json_of(&prefill)["kv_transfer_params"]["transfer_id"];
        for params in &params {
            assert_eq!(&params["transfer_id"], transfer);
        }
        assert_eq!(cluster.terms.meetings.complete(), before + 1);
        assert_eq!(cluster.bootstrap.requests().len(), 2 + round);
        for _ in 0..3 {
            responded(&cluster.pair, &Api::Chat.ask(4, true));
        }
        assert_eq!(cluster.bootstrap.requests().len(), 2 + round);
    }
    expect_recovered(&cluster.pair);
}

/// A decoder can read a transfer once, so a leg that is repeated for another reason than an unknown
/// engine ID has none.
#[test]
fn a_decode_leg_that_failed_is_repeated_without_the_transfer() {
    let cluster = start();
    cluster.pair.decode.fault(engine_error(503), 1);
    let question = Api::Chat.ask(4, true);
    cluster.pair.post(CHAT, &question.body).expect(503);
    only(&cluster.pair.decode);
    forget(&cluster.pair);
    cluster.pair.decode.fault(engine_error(500), 1);
    responded(&cluster.pair, &question);
    let legs = cluster.pair.decode.requests();
    let params = |leg: usize| json_of(&legs[leg])["kv_transfer_params"].take();
    assert!(params(0)["transfer_id"].is_string());
    assert_eq!((legs.len(), params(1)), (2, Value::Null));
    let reason = "decode_kv_error";
    cluster.pair.sidecar.wait_outcome("local_fallback", reason);
    expect_recovered(&cluster.pair);
}

#[test]
fn a_candidate_without_a_bootstrap_server_is_skipped() {
    let cluster = start();
    let good = cluster.pair.prefill.host_port();
    // No bootstrap server listens on the first address, and nothing listens on the second.
    let port = cluster.pair.prefill.port();
    let targets = format!("127.0.0.2:{port},127.0.0.3:1,{good}");
    for _ in 0..3 {
        forget(&cluster.pair);
        let question = Api::Chat.ask(4, true);
        let headers = [(PREFILLER, targets.as_str())];
        let response = cluster.pair.sidecar.post(CHAT, &question.body, &headers);
        question.expect(&response.expect(200));
        let (_, decode) = both_legs(&cluster.pair);
        let address = format!("http://127.0.0.1:{}", cluster.bootstrap.port());
        let params = json_of(&decode)["kv_transfer_params"].take();
        assert_eq!(params["remote_bootstrap_addr"], address.as_str());
    }
    // No candidate has a bootstrap server.
    let headers = [(PREFILLER, "127.0.0.2:1,127.0.0.3:1")];
    let question = Api::Chat.ask(4, true);
    let response = cluster.pair.sidecar.post(CHAT, &question.body, &headers);
    response.expect_error(502, "bootstrap");
    cluster.pair.sidecar.wait_outcome("failed", "bootstrap");
    expect_recovered(&cluster.pair);
}

#[test]
fn a_bootstrap_failure_fails_the_request_before_any_leg() {
    let cluster = start();
    let status = |code, body: &str| Fault::Status {
        code,
        body: body.to_owned(),
        content_type: "application/json".to_owned(),
    };
    for fault in [
        status(500, "{}"),
        status(404, "{}"),
        status(200, "{}"),
        status(200, "[]"),
        status(200, "null"),
        status(200, "not json"),
        status(200, r#"{"0":{}}"#),
        status(200, r#"{"0":{"engine_id":""}}"#),
        status(200, r#"{"0":{"engine_id":7}}"#),
        status(200, r#"{"x":{"engine_id":"e0"}}"#),
        Fault::HalfJson,
        Fault::Html,
        Fault::Gzip,
        Fault::Garbage,
        Fault::ResetBeforeHead,
        Fault::CloseBeforeHead,
        Fault::TruncateMidBody { after_events: 1 },
        Fault::EndlessHead,
    ] {
        cluster.bootstrap.fault_on("/query", fault.clone(), 1);
        let question = Api::Chat.ask(4, true);
        let response = cluster.pair.post(CHAT, &question.body);
        assert_eq!(response.status, 502, "{fault:?}: {}", response.text());
        let body = response.expect(502).json();
        assert_eq!(body["type"], "BadGateway", "{fault:?}");
    }
    cluster.bootstrap.refuse(true);
    let question = Api::Chat.ask(4, true);
    let response = cluster.pair.post(CHAT, &question.body);
    assert_eq!(response.expect(502).json()["type"], "BadGateway");
    cluster.bootstrap.refuse(false);
    assert!(cluster.pair.prefill.requests().is_empty());
    assert!(cluster.pair.decode.requests().is_empty());
    // None of the failures was cached.
    expect_recovered(&cluster.pair);
}

#[test]
fn a_silent_bootstrap_server_times_out() {
    let cluster = start();
    let fault = Fault::StallBeforeHead;
    cluster.bootstrap.fault_on("/query", fault, 1);
    let question = Api::Chat.ask(4, true);
    let response = cluster.pair.post(CHAT, &question.body);
    assert!(matches!(response.status, 502 | 504), "{response:?}");
    wait_aborted(&cluster.bootstrap);
    assert!(cluster.pair.decode.requests().is_empty());
    expect_recovered(&cluster.pair);
}

#[test]
fn concurrent_first_requests_send_at_most_one_bootstrap_query_each() {
    let cluster = start();
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| responded(&cluster.pair, &Api::Chat.ask(2, true)));
        }
    });
    let asked = cluster.bootstrap.requests().len();
    assert!((1..=16).contains(&asked), "{asked}");
    assert_eq!(cluster.terms.meetings.complete(), 16);
    responded(&cluster.pair, &Api::Chat.ask(2, true));
    assert_eq!(cluster.bootstrap.requests().len(), asked);
}

#[test]
fn a_failed_prefill_cancels_decode() {
    let terms = terms();
    let bootstrap = bootstrap_of(&terms);
    with_setup(&terms, &bootstrap, failed_prefill_cancels_decode);
}

#[test]
fn legs_end_as_required_when_the_client_disconnects() {
    let terms = terms();
    let bootstrap = bootstrap_of(&terms);
    with_setup(&terms, &bootstrap, |setup| {
        client_disconnects(setup, Rule::SerialToEnd);
    });
}

/// The head of the decode response does not show that the transfer has finished.
#[test]
fn a_client_disconnect_after_the_head_does_not_cancel_the_decode_leg() {
    let cluster = start();
    for leave in Leave::ALL {
        forget(&cluster.pair);
        let fault = Fault::StallMidStream { after_events: 0 };
        cluster.pair.decode.fault(fault, 1);
        let client = begin(&cluster.pair, &Api::Chat.ask(4, true));
        wait_state(&cluster.pair.decode, State::Responding);
        let (_, _client) = leave.now(client);
        cluster
            .pair
            .sidecar
            .wait_metric("ringside_client_connections", &[], 0.0);
        assert_eq!(only(&cluster.pair.decode).state, State::Responding);
    }
}

#[test]
fn a_client_disconnect_during_the_bootstrap_query_sends_no_leg() {
    let cluster = start();
    for leave in Leave::ALL {
        cluster.bootstrap.clear();
        let fault = Fault::Hold;
        cluster.bootstrap.fault_on("/query", fault, 1);
        let client = begin(&cluster.pair, &Api::Chat.ask(4, true));
        wait_state(&cluster.bootstrap, State::Responding);
        let (_, _client) = leave.now(client);
        cluster
            .pair
            .sidecar
            .wait_metric("ringside_client_connections", &[], 0.0);
        cluster.bootstrap.release();
        let over = |log: &[Seen]| log.iter().all(|seen| seen.state != State::Responding);
        assert!(cluster.bootstrap.wait_for(DEADLINE, over).is_some());
        expect_drained(&cluster.pair.sidecar);
    }
    assert!(cluster.pair.prefill.requests().is_empty());
    assert!(cluster.pair.decode.requests().is_empty());
    expect_recovered(&cluster.pair);
}

#[test]
fn transfer_parameters_from_the_client_are_replaced() {
    let cluster = start();
    let more = r#","kv_transfer_params":{"do_remote_prefill":true,"remote_host":"evil"}"#;
    let question = Api::Chat.ask_with(4, true, more);
    responded(&cluster.pair, &question);
    expect_objects(&cluster, &question.json(), Api::Chat);
}
