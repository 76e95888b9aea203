//! The handoff from the prefill response to the decode leg: it is relayed byte for byte, once, and
//! only while it is fresh (`docs/engines.md#handoffs`). Also the behaviour without a usable
//! handoff.

use mock_engine::{Engine, EngineConfig, Fault, HandoffRegistry, HandoffShape};
use serde_json::{Value, json};

use crate::harness::{CHAT, Canned, PREFILLER, Pair, Sidecar, json_of, only, wait_for};

const BODY: &str = r#"{"messages":[{"role":"user","content":"hello"}],"max_tokens":4}"#;

/// Returns the raw value of `kv_transfer_params` in a body that ends with this member.
fn raw_params(body: &[u8]) -> &str {
    let text = std::str::from_utf8(body).unwrap();
    let (_, value) = text.rsplit_once("\"kv_transfer_params\":").unwrap();
    value.strip_suffix('}').unwrap()
}

#[test]
fn the_handoff_is_relayed_byte_for_byte() {
    for (path, body) in [
        (CHAT, BODY),
        ("/v1/responses", r#"{"input":"x"}"#),
        (
            "/inference/v1/generate",
            r#"{"token_ids":[1],"sampling_params":{}}"#,
        ),
        (CHAT, r#"{"messages":[],"kv_transfer_params":null}"#),
    ] {
        let pair = Pair::start(&[]);
        pair.post(path, body).expect(200);
        let (_, decode) = pair.legs();
        assert_eq!(raw_params(&decode.body), pair.handoffs.issued()[0]);
    }
}

#[test]
fn only_a_handoff_at_the_top_level_is_used() {
    let pair = Pair::with(&[], |config| config.handoff = HandoffShape::Decoys, |_| {});
    pair.post(CHAT, BODY).expect(200);
    let (_, decode) = pair.legs();
    assert_eq!(raw_params(&decode.body), pair.handoffs.issued()[0]);
}

#[test]
fn every_request_uses_its_own_handoff() {
    let pair = Pair::start(&[]);
    std::thread::scope(|scope| {
        for client in 0..8 {
            let pair = &pair;
            scope.spawn(move || {
                for nth in 0..5 {
                    let body = json!({"messages": [{"role": "user",
                        "content": format!("{client}/{nth}")}], "stream": nth % 2 == 0});
                    pair.post(CHAT, body.to_string()).expect(200);
                }
            });
        }
    });
    assert_eq!(pair.decode.counters().handoff_used, 40);
    assert_eq!(pair.decode.counters().handoff_foreign, 0);
    assert_eq!(pair.handoffs.unused(), 0);
}

const UNFIT: [(HandoffShape, &str); 5] = [
    (HandoffShape::Omit, "handoff_missing"),
    (HandoffShape::Null, "handoff_missing"),
    (HandoffShape::Empty, "handoff_missing"),
    (HandoffShape::Text, "handoff_malformed"),
    (HandoffShape::List, "handoff_malformed"),
];

#[test]
fn without_a_usable_handoff_the_decoder_computes_the_prompt() {
    for (shape, reason) in UNFIT {
        let pair = Pair::start(&[]);
        pair.prefill.fault(Fault::Handoff(shape), 1);
        pair.post(CHAT, BODY).expect(200);
        let mut want: Value = serde_json::from_str(BODY).unwrap();
        want["kv_transfer_params"] = Value::Null;
        assert_eq!(json_of(&only(&pair.decode)), want, "{shape:?}");
        pair.sidecar.wait_outcome("local_fallback", reason);
    }
}

#[test]
fn without_a_usable_handoff_the_client_gets_an_error_if_configured() {
    for (shape, _) in UNFIT {
        let pair = Pair::start(&["--on-missing-kv=error"]);
        pair.prefill.fault(Fault::Handoff(shape), 1);
        pair.post(CHAT, BODY).expect_error(502, "handoff_missing");
        assert!(pair.decode.requests().is_empty());
        pair.post(CHAT, BODY).expect(200);
    }
}

/// Starts a pair whose engines state these versions, and waits until the decoder's is known. The
/// prefiller's block ids are a flat list if `flat` is set.
fn pair_of(flat: bool, prefill: &str, decode: &str) -> Pair {
    let pair = Pair::with(
        &[],
        |config| {
            config.flat_blocks = flat;
            config.version = prefill.to_owned();
        },
        |config| config.version = decode.to_owned(),
    );
    if !decode.is_empty() {
        pair.sidecar.wait_stderr(&format!("has version {decode}"));
    }
    pair
}

#[test]
fn a_block_list_reaches_only_decoders_that_take_its_form() {
    let (flat, nested) = (true, false);
    for (form, prefill, decode, passes, is_asked) in [
        (flat, "0.32.0", "0.32.0", true, true),
        (flat, "0.17.2.dev1", "0.17.2.dev1", true, true),
        // A release that is known to take flat lists.
        (flat, "0.16.0", "0.16.0", true, false),
        (flat, "0.18.0", "0.17.1", true, false),
        (flat, "0.16.0", "0.18.0", false, true),
        (flat, "0.16.0", "", false, false),
        (flat, "", "", false, false),
        (flat, "", "0.18.0", false, true),
        (nested, "0.32.0", "0.32.0", true, false),
        (nested, "0.32.0", "0.18.0", true, false),
        (nested, "", "", true, false),
        (nested, "0.32.0", "0.17.2.dev1", true, false),
        (nested, "0.32.0", "0.17.1", false, true),
        (nested, "", "0.16.0", false, true),
        // A fork that kept its release's number.
        (nested, "0.17.1", "0.17.1", true, true),
    ] {
        let pair = pair_of(form, prefill, decode);
        for _ in 0..2 {
            pair.post(CHAT, BODY).expect(200);
        }
        let case = format!("flat: {form} {prefill} {decode}");
        let used = pair.decode.counters().handoff_used;
        assert_eq!(used, if passes { 2 } else { 0 }, "{case}");
        // A prefiller is asked once in a while, and only if its version decides.
        let asked = pair.prefill.counters().version_requests;
        assert_eq!(asked, u64::from(is_asked), "{case}");
        if passes {
            let log = pair.sidecar.stderr();
            assert!(!log.contains("is not passed on"), "{log}");
            continue;
        }
        for seen in pair.decode.requests() {
            assert_eq!(json_of(&seen)["kv_transfer_params"], Value::Null);
        }
        let labels = [
            ("outcome", "local_fallback"),
            ("reason", "handoff_malformed"),
        ];
        pair.sidecar
            .wait_metric("ringside_pd_requests_total", &labels, 2.0);
        pair.sidecar.wait_metric(
            "ringside_stranded_kv_total",
            &[("outcome", "left_to_lease")],
            2.0,
        );
        let log = pair.sidecar.wait_stderr("is not passed on");
        for part in [
            "remote_block_ids",
            "--check-handoff-versions=false",
            &pair.prefill.host_port(),
            decode,
        ] {
            assert!(log.contains(part), "{part}: {log}");
        }
    }
}

#[test]
fn a_decoder_that_returns_as_another_release_is_asked_again() {
    let handoffs = HandoffRegistry::new();
    let decoder = |version: &str, port: u16| {
        let config = EngineConfig {
            version: version.to_owned(),
            verify_handoff: Some(handoffs.clone()),
            ..EngineConfig::decode()
        };
        Engine::start(config, port).unwrap()
    };
    let prefill = EngineConfig {
        verify_handoff: Some(handoffs.clone()),
        ..EngineConfig::prefill()
    };
    let prefill = Engine::start(prefill, 0).unwrap();
    let target = prefill.host_port();
    let headers = [(PREFILLER, target.as_str())];
    let first = decoder("0.32.0", 0);
    let port = first.port();
    let sidecar = Sidecar::start(&[], port);
    sidecar.wait_stderr("has version 0.32.0");
    sidecar.post(CHAT, BODY, &headers).expect(200);
    assert_eq!(first.counters().handoff_used, 1);
    drop(first);
    sidecar.post(CHAT, BODY, &headers).expect(503);
    let second = decoder("0.17.1", port);
    sidecar.wait_stderr("has version 0.17.1");
    sidecar.post(CHAT, BODY, &headers).expect(200);
    assert_eq!(second.counters().handoff_used, 0);
    sidecar.wait_stderr("is not passed on");
    drop(second);
    sidecar.post(CHAT, BODY, &headers).expect(503);
    // An engine that states no version may be of any release.
    let third = decoder("", port);
    sidecar.wait_stderr("states no version any more");
    sidecar.post(CHAT, BODY, &headers).expect(200);
    assert_eq!(third.counters().handoff_used, 1);
}

#[test]
fn engines_are_asked_for_versions_only_if_these_matter() {
    for args in [
        &["--check-handoff-versions=false"][..],
        &["--kv-connector=shared-storage"],
    ] {
        let decode = Engine::start(EngineConfig::decode(), 0).unwrap();
        let mut sidecar = Sidecar::start(args, decode.port());
        sidecar.get("/v1/models", &[]).expect(200);
        sidecar.terminate();
        sidecar.wait_exit();
        assert_eq!(decode.counters().version_requests, 0, "{args:?}");
    }
}

#[test]
fn every_object_is_passed_on_as_it_is() {
    for params in [
        // TPU
        r#"{"uuid":123,"remote_block_ids":[],"remote_host":["10.0.0.1","10.0.0.2"],"remote_port":["9100","9101"]}"#,
        r#"{ "remote_port" : "5600", "do_remote_prefill":false,"tp_size":1.0 }"#,
        r#"{"block_table":[[1,2],[3]]}"#,
    ] {
        let body = format!(r#"{{"kv_transfer_params":{params}}}"#);
        let prefill = Canned::start(format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ));
        let config = EngineConfig {
            strict: false,
            ..EngineConfig::decode()
        };
        let decode = Engine::start(config, 0).unwrap();
        let sidecar = Sidecar::start(&[], decode.port());
        let target = format!("127.0.0.1:{}", prefill.port);
        sidecar
            .post(CHAT, BODY, &[(PREFILLER, &target)])
            .expect(200);
        let sent = String::from_utf8(only(&decode).body).unwrap();
        assert!(sent.contains(params), "{sent}");
    }
}

#[test]
fn any_block_list_passes_without_the_check() {
    let pair = Pair::with(
        &["--check-handoff-versions=false"],
        |config| config.flat_blocks = true,
        |_| {},
    );
    pair.post(CHAT, BODY).expect(200);
    pair.legs();
}

/// The prefill engine returns handoffs that are no objects or no valid JSON.
#[test]
fn a_malformed_handoff_never_reaches_the_decoder() {
    let pair = Pair::start(&[]);
    for params in [
        r#"{"do_remote_prefill":true,"remote_block_ids":[[1]],}"#,
        r#"{"do_remote_prefill":true,"remote_block_ids":[[01]]}"#,
        "17",
        "true",
        "[]",
        r#""{}""#,
    ] {
        pair.decode.clear();
        let fault = Fault::Status {
            code: 200,
            body: format!(r#"{{"choices":[],"kv_transfer_params":{params}}}"#),
            content_type: "application/json".to_owned(),
        };
        pair.prefill.fault(fault, 1);
        let response = pair.post(CHAT, BODY);
        if response.status == 502 {
            // A body that is not JSON is an invalid prefill response.
            response.expect_error(502, "prefill_answer");
            assert!(pair.decode.requests().is_empty());
            continue;
        }
        response.expect(200);
        for seen in pair.decode.requests() {
            let sent = json_of(&seen);
            assert_eq!(sent["kv_transfer_params"], Value::Null, "{params}");
        }
    }
    assert_eq!(pair.decode.counters().poisoned, 0);
}

#[test]
fn a_stale_handoff_is_not_used() {
    for (flag, want) in [("decode", 200), ("error", 502)] {
        let missing = format!("--on-missing-kv={flag}");
        let pair = Pair::start(&["--handoff-max-age=1ms", &missing]);
        // The age is measured from the response head, and the body takes longer than the maximum
        // age.
        let fault = Fault::Slow {
            chunk_bytes: 500,
            delay: std::time::Duration::from_millis(4),
        };
        pair.prefill.fault(fault, 1);
        let response = pair.post(CHAT, BODY);
        if want == 502 {
            response.expect_error(502, "handoff_missing");
            assert!(pair.decode.requests().is_empty());
            pair.sidecar.wait_outcome("failed", "handoff_stale");
            continue;
        }
        response.expect(200);
        let sent = json_of(&only(&pair.decode));
        assert_eq!(sent["kv_transfer_params"], Value::Null);
        pair.sidecar.wait_outcome("local_fallback", "handoff_stale");
    }
}

#[test]
fn a_handoff_becomes_stale_while_the_decoder_reads_too_slowly() {
    let pair = Pair::start(&["--handoff-max-age=300ms"]);
    pair.decode.fault(Fault::StallRead { after_bytes: 1 }, 1);
    // More than the socket's buffers hold, so that the end of the body, which contains the handoff,
    // cannot be sent.
    let content = "x".repeat(12 << 20);
    let body = json!({"messages": [{"role": "user", "content": content}], "max_tokens": 2});
    pair.post(CHAT, body.to_string()).expect(200);
    pair.sidecar.wait_outcome("local_fallback", "handoff_stale");
    assert_eq!(pair.decode.counters().handoff_used, 0);
    let requests = pair.decode.requests();
    assert_eq!(raw_params(&requests[1].body), "null");
}

/// Starts a pair whose decoder fails the next request as if it could not load the KV cache.
fn failing(args: &[&str]) -> Pair {
    let pair = Pair::start(args);
    let fault = Fault::Status {
        code: 500,
        body: r#"{"error":{"message":"KV load failed"}}"#.to_owned(),
        content_type: "application/json".to_owned(),
    };
    pair.decode.fault(fault, 1);
    pair
}

#[test]
fn a_decode_failure_with_a_handoff_is_retried_without_it() {
    let pair = failing(&[]);
    pair.post(CHAT, BODY).expect(200);
    let requests = pair.decode.requests();
    assert_eq!(requests.len(), 2);
    assert_eq!(raw_params(&requests[0].body), pair.handoffs.issued()[0]);
    assert_eq!(raw_params(&requests[1].body), "null");
    pair.sidecar
        .wait_outcome("local_fallback", "decode_kv_error");
    assert_eq!(pair.prefill.requests().len(), 1);
}

#[test]
fn a_decode_failure_with_a_handoff_is_relayed_if_configured() {
    let pair = failing(&["--on-decode-kv-error=error"]);
    let response = pair.post(CHAT, BODY).expect(500);
    assert_eq!(response.text(), r#"{"error":{"message":"KV load failed"}}"#);
    assert_eq!(pair.decode.requests().len(), 1);
}

#[test]
fn a_second_decode_failure_is_relayed_to_the_client() {
    let pair = failing(&[]);
    let again = Fault::Status {
        code: 500,
        body: "again".to_owned(),
        content_type: "text/plain".to_owned(),
    };
    pair.decode.fault(again, 1);
    assert_eq!(pair.post(CHAT, BODY).expect(500).text(), "again");
    assert_eq!(pair.decode.requests().len(), 2);
}

#[test]
fn a_handoff_is_never_sent_twice_when_a_pooled_connection_is_closed() {
    for fault in [Fault::CloseOnNextRequest, Fault::CloseIdle] {
        let pair = Pair::start(&[]);
        pair.decode.fault(fault, 1);
        pair.post(CHAT, BODY).expect(200);
        pair.post(CHAT, BODY).expect(200);
        let counters = pair.decode.counters();
        assert_eq!(counters.handoff_reused, 0);
        let issued = pair.handoffs.issued();
        for seen in pair.decode.requests() {
            let raw = raw_params(&seen.body);
            assert!(raw == "null" || issued.iter().any(|known| known == raw));
        }
    }
}

#[test]
fn a_decoder_that_resets_the_connection_is_not_retried() {
    let pair = Pair::start(&[]);
    pair.decode.fault(Fault::ResetBeforeHead, 1);
    pair.post(CHAT, BODY).expect_error(502, "decode_reset");
    assert_eq!(pair.decode.requests().len(), 1);
    assert_eq!(pair.handoffs.unused(), 1);
}

#[test]
fn requests_fail_with_503_while_the_decoder_refuses_connections() {
    let pair = Pair::start(&[]);
    pair.decode.refuse(true);
    let response = pair.post(CHAT, BODY).expect_error(503, "decode_refused");
    assert_eq!(response.header("retry-after"), Some("1"));
    let response = pair.sidecar.post(CHAT, BODY, &[]);
    response.expect_error(503, "decode_refused");
    let response = pair.sidecar.get("/v1/models", &[]);
    response.expect_error(503, "decode_refused");
    pair.decode.refuse(false);
    pair.post(CHAT, BODY).expect(200);
}

/// A request with two sequences is served by the decoder alone. Its first leg is sent on a pooled
/// connection that the decoder resets, and the second connect is refused.
#[test]
fn a_leg_that_was_sent_is_counted_even_if_it_cannot_be_repeated() {
    let pair = Pair::start(&[]);
    let body = r#"{"model":"m","messages":[{"role":"user","content":"x"}],"n":2}"#;
    let legs = || {
        let name = "ringside_leg_duration_seconds_count";
        pair.sidecar.metric(name, &[("leg", "decode")])
    };
    pair.post(CHAT, body).expect(200);
    assert_eq!(legs(), 1.0);
    pair.decode.fault(Fault::ResetBeforeHead, 1);
    pair.decode.refuse(true);
    pair.post(CHAT, body).expect_error(503, "decode_refused");
    assert_eq!(legs(), 2.0);
}

#[test]
fn a_restarted_prefiller_is_used_again() {
    let handoffs = HandoffRegistry::new();
    let checked = |config| EngineConfig {
        verify_handoff: Some(handoffs.clone()),
        ..config
    };
    let decode = Engine::start(checked(EngineConfig::decode()), 0).unwrap();
    let prefill = Engine::start(checked(EngineConfig::prefill()), 0).unwrap();
    let sidecar = Sidecar::start(&[], decode.port());
    let (target, port) = (prefill.host_port(), prefill.port());
    let routing = [(PREFILLER, target.as_str())];
    sidecar.post(CHAT, BODY, &routing).expect(200);
    drop(prefill);
    let _again = wait_for("the port", || {
        Engine::start(checked(EngineConfig::prefill()), port).ok()
    });
    sidecar.post(CHAT, BODY, &routing).expect(200);
    assert_eq!(decode.counters().handoff_used, 2);
}
