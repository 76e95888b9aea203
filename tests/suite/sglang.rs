//! The `SGLang` connector (`docs/pd-sidecar.md#sglang`): both legs are sent concurrently with the
//! same body, which contains the bootstrap room of the transfer. Conformance row S1.

use std::collections::HashSet;

use mock_engine::{Fault, KvContract, Meetings, State};
use serde_json::json;

use crate::apis::Api;
use crate::harness::{CHAT, PREFILLER, Pair, json_of, only};
use crate::kv::{
    Rule, Setup, begin, both_legs, client_disconnects, expect_recovered,
    failed_prefill_after_the_head, failed_prefill_cancels_decode, forget, legs_are_concurrent,
    responded, wait_state,
};

const CONNECTOR: &[&str] = &["--kv-connector=sglang"];

fn setup(meetings: &Meetings) -> Setup<'static> {
    Setup {
        args: CONNECTOR,
        contract: KvContract::Sglang(meetings.clone()),
        ..Setup::default()
    }
}

fn start() -> (Pair, Meetings) {
    let meetings = Meetings::new();
    (setup(&meetings).start(), meetings)
}

#[test]
fn s1_both_legs_have_the_same_body_with_the_bootstrap_room() {
    let (pair, _) = start();
    for api in Api::ALL {
        for stream in [false, true] {
            forget(&pair);
            let more = match api {
                Api::Chat => r#","min_tokens":2,"max_completion_tokens":6"#,
                _ => "",
            };
            let question = api.ask_with(6, stream, more);
            responded(&pair, &question);
            let (prefill, decode) = both_legs(&pair);
            assert_eq!(prefill.body, decode.body, "the bodies of the legs differ");
            let have = json_of(&decode);
            let room = have["bootstrap_room"].as_u64().unwrap();
            assert!(room < 1 << 63);
            let mut want = question.json();
            want["bootstrap_host"] = json!("127.0.0.1");
            want["bootstrap_port"] = json!(8998);
            want["bootstrap_room"] = json!(room);
            assert_eq!(have, want, "nothing must be capped or added otherwise");
        }
    }
    pair.sidecar.expect_sound();
}

#[test]
fn s1_a_late_prefill_response_is_harmless() {
    let (pair, _) = start();
    for stream in [true, false] {
        forget(&pair);
        pair.prefill.fault(Fault::Hold, 1);
        responded(&pair, &Api::Chat.ask(6, stream));
        assert_eq!(only(&pair.prefill).state, State::Responding);
        pair.prefill.release();
        wait_state(&pair.prefill, State::Responded);
    }
    expect_recovered(&pair);
}

#[test]
fn s1_the_content_of_a_prefill_response_is_ignored() {
    let (pair, _) = start();
    for fault in [
        Fault::LargeJson { bytes: 300_000 },
        Fault::NoFraming,
        Fault::CloseIdle,
        Fault::Http10Response,
    ] {
        pair.prefill.fault(fault, 1);
        responded(&pair, &Api::Chat.ask(6, true));
        responded(&pair, &Api::Chat.ask(6, false));
    }
    expect_recovered(&pair);
}

#[test]
fn the_legs_are_concurrent() {
    let meetings = Meetings::new();
    legs_are_concurrent(&setup(&meetings), &meetings);
}

#[test]
fn rooms_are_unique() {
    let (pair, meetings) = start();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..25 {
                    responded(&pair, &Api::Chat.ask(2, false));
                }
            });
        }
    });
    let rooms: HashSet<String> = meetings.keys().into_iter().collect();
    assert_eq!((rooms.len(), meetings.complete()), (200, 200));
    // Rooms are not derived from a clock, so those of consecutive requests are far apart.
    let mut numbers: Vec<u64> = rooms.iter().map(|room| room.parse().unwrap()).collect();
    numbers.sort_unstable();
    let spread = numbers.last().unwrap() - numbers.first().unwrap();
    assert!(spread > 1 << 60, "{spread}");
}

#[test]
fn the_port_comes_from_the_environment_and_the_host_from_the_target() {
    let meetings = Meetings::new();
    let pair = Setup {
        env: &[("SGLANG_BOOTSTRAP_PORT", "9001")],
        ..setup(&meetings)
    }
    .start();
    let port = pair.prefill.port();
    for (target, host) in [
        (format!("localhost:{port}"), "localhost"),
        (format!("http://127.0.0.1:{port}"), "127.0.0.1"),
    ] {
        forget(&pair);
        let question = Api::Chat.ask(4, true);
        let headers = [(PREFILLER, target.as_str())];
        let response = pair.sidecar.post(CHAT, &question.body, &headers);
        question.expect(&response.expect(200));
        let body = json_of(&both_legs(&pair).0);
        assert_eq!(body["bootstrap_host"], host);
        assert_eq!(body["bootstrap_port"], 9001);
    }
}

#[test]
fn bootstrap_members_from_the_client_are_replaced() {
    let (pair, _) = start();
    let more = r#","bootstrap_host":"evil","bootstrap_port":1,"bootstrap_room":5"#;
    responded(&pair, &Api::Chat.ask_with(4, true, more));
    let body = json_of(&both_legs(&pair).1);
    assert_eq!(body["bootstrap_host"], "127.0.0.1");
    assert_ne!(body["bootstrap_room"], 5);
}

/// Engines use these members to find each other, on SGLang's own API as well.
#[test]
fn members_of_peers_from_the_client_reach_no_engine() {
    let pair = Pair::with(CONNECTOR, |_| {}, |config| config.strict = false);
    let peers = [
        r#""bootstrap_host":["evil","evil"]"#,
        r#""bootstrap_room":[12345,12346]"#,
        r#""bootstrap_pair_key":"evil""#,
        r#""disagg_prefill_dp_rank":12345"#,
        r#""bootstrap_host":"evil","bootstrap_host":"evil""#,
        r#""bootstrap\u005fhost":"evil""#,
        r#""decode_tp_size":12345"#,
    ];
    for path in ["/generate", CHAT, "/prefix/generate"] {
        for member in peers {
            let body = format!(r#"{{"text":"x","messages":[],{member}}}"#);
            pair.decode.clear();
            pair.sidecar.post(path, &body, &[]).expect(200);
            let seen = String::from_utf8(only(&pair.decode).body).unwrap();
            assert!(!seen.contains("evil") && !seen.contains("1234"), "{seen}");
        }
    }
    for member in peers {
        // The path of Vertex AI has the members of a request in `parameters`.
        let body = format!(r#"{{"instances":[{{"text":"x"}}],"parameters":{{{member}}}}}"#);
        pair.decode.clear();
        pair.sidecar.post("/vertex_generate", &body, &[]);
        let seen = String::from_utf8(only(&pair.decode).body).unwrap();
        assert!(!seen.contains("evil") && !seen.contains("1234"), "{seen}");
    }
    for name in [
        "x-override-bootstrap-host",
        "X-Override-Bootstrap-Room",
        "x-override-bootstrap-port",
        "x-override-disagg-prefill-dp-rank",
    ] {
        pair.decode.clear();
        pair.sidecar
            .post(CHAT, r#"{"messages":[]}"#, &[(name, "1")]);
        assert_eq!(only(&pair.decode).header(name), None);
    }
    let (pair, _) = start();
    // The mock refuses repetitions, each of which has the proxy's value.
    let single = |member: &&str| member.matches("bootstrap_host").count() < 2;
    for member in peers.into_iter().filter(single) {
        forget(&pair);
        responded(&pair, &Api::Chat.ask_with(4, true, &format!(",{member}")));
        let (prefill, decode) = both_legs(&pair);
        for leg in [prefill, decode] {
            let seen = String::from_utf8(leg.body).unwrap();
            assert!(!seen.contains("evil") && !seen.contains("1234"), "{seen}");
        }
    }
}

/// With several sequences, the engines would not finish until the client disconnects.
#[test]
fn several_sequences_are_refused() {
    let (pair, _) = start();
    for api in [Api::Chat, Api::Completions] {
        let question = api.ask_with(4, false, r#","n":2"#);
        pair.post(api.path(), &question.body)
            .expect_error(400, "several_sequences");
    }
    assert!(pair.prefill.requests().is_empty() && pair.decode.requests().is_empty());
    responded(&pair, &Api::Chat.ask_with(4, false, r#","n":1"#));
}

#[test]
fn a_body_that_is_not_an_object_is_rejected() {
    let (pair, _) = start();
    for body in ["null", "[]", "{", "{}x"] {
        pair.post(CHAT, body).expect_error(400, "bad_json");
    }
    assert!(pair.prefill.requests().is_empty() && pair.decode.requests().is_empty());
}

#[test]
fn a_failed_prefill_cancels_decode() {
    failed_prefill_cancels_decode(&setup(&Meetings::new()));
}

#[test]
fn a_prefill_failure_after_the_decode_head_leaves_no_complete_response() {
    failed_prefill_after_the_head(&setup(&Meetings::new()));
}

#[test]
fn a_decode_failure_is_relayed_to_the_client() {
    let (pair, _) = start();
    pair.decode.refuse(true);
    let question = Api::Chat.ask(4, true);
    pair.post(CHAT, &question.body)
        .expect_error(503, "decode_refused");
    pair.decode.refuse(false);
    let fault = Fault::Status {
        code: 503,
        body: "{\"said\":503}".to_owned(),
        content_type: "application/json".to_owned(),
    };
    pair.decode.fault(fault, 1);
    let question = Api::Chat.ask(4, true);
    let response = pair.post(CHAT, &question.body).expect(503);
    assert_eq!(response.text(), "{\"said\":503}");
    expect_recovered(&pair);
}

#[test]
fn legs_end_as_required_when_the_client_disconnects() {
    client_disconnects(&setup(&Meetings::new()), Rule::Room);
}

#[test]
fn a_client_disconnect_before_the_body_is_complete_sends_no_leg() {
    let (pair, meetings) = start();
    let target = pair.prefill.host_port();
    let mut client = pair.sidecar.connect();
    let mut bytes = crate::client::head("POST", CHAT, &[(PREFILLER, &target)]);
    bytes.extend_from_slice(b"Content-Length: 100\r\n\r\n{\"messages\":[");
    client.send(bytes);
    let chat = [("route", "chat")];
    pair.sidecar.wait_metric("ringside_in_flight", &chat, 1.0);
    drop(client);
    crate::harness_more::expect_drained(&pair.sidecar);
    assert!(meetings.keys().is_empty());
    drop(begin(&pair, &Api::Chat.ask(4, true)));
    expect_recovered(&pair);
}
