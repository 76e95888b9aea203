//! Stranded KV cache, which no decode leg will fetch (`docs/stranded-kv.md`), is counted, and
//! released unless `--release-stranded-kv=false` is set. A handoff that an engine may have received
//! in a complete request is not sent again, unless the engine has refused that request.

use mock_engine::{Engine, Fault, Seen, State};
use serde_json::Value;

use crate::client::{Client, DEADLINE, request};
use crate::harness::{CHAT, PREFILLER, Pair, json_of, only};
use crate::harness_more::{Leave, ask_for, expect_drained, expect_handoffs_sound};

const KEEP: &str = "--release-stranded-kv=false";
/// Model name in the sidecar's release requests. No engine serves this model.
const MODEL: &str = "ringside-releases-kv-cache";
/// Size of the padding of a long body in bytes: more than the buffers of a connection hold, so that
/// the handoff at the end of the body cannot have been sent.
const LONG_BYTES: usize = 12 << 20;

/// Starts a pair whose decoder rejects requests for a model that it does not serve.
#[track_caller]
fn start(args: &[&str]) -> Pair {
    Pair::with(args, |_| {}, |config| config.check_model = true)
}

/// Returns the body of a chat completion request that is longer than the buffers of a connection.
fn long_chat() -> String {
    let (_, body) = ask_for(4, false);
    let padding = "x".repeat(LONG_BYTES);
    body.replacen('{', &format!("{{\"user\":\"{padding}\","), 1)
}

#[track_caller]
fn expect_counts(pair: &Pair, released: f64, failed: f64, left: f64) {
    for (outcome, want) in [
        ("released", released),
        ("failed", failed),
        ("left_to_lease", left),
    ] {
        let labels = [("outcome", outcome)];
        pair.sidecar
            .wait_metric("ringside_stranded_kv_total", &labels, want);
    }
}

/// Sends a long split request, and waits until the decoder has received the head of the decode leg.
/// The decoder stops reading the leg's body after its first byte. Returns the client's connection.
#[track_caller]
fn begin_unread(pair: &Pair) -> Client {
    pair.decode.fault(Fault::StallRead { after_bytes: 1 }, 1);
    let target = pair.prefill.host_port();
    let headers = [
        (PREFILLER, target.as_str()),
        ("authorization", "Bearer k"),
        ("x-request-id", "gw-17"),
    ];
    let mut client = pair.sidecar.connect();
    client.send(request("POST", CHAT, &headers, long_chat().as_bytes()));
    let has_begun = |log: &[Seen]| !log.is_empty();
    assert!(pair.decode.wait_for(DEADLINE, has_begun).is_some());
    client
}

/// Waits until the decoder has responded to a release request. Fails unless it is the only one,
/// contains `handoff` and the client's authorization and request ID, and arrived on a separate
/// connection.
#[track_caller]
fn expect_refused(pair: &Pair, handoff: &str) {
    let ours = |log: &[Seen]| {
        let mut ours = log.iter().filter(|seen| seen.target == "/v1/completions");
        ours.any(|seen| seen.state == State::Responded)
    };
    let log = pair.decode.wait_for(DEADLINE, ours).unwrap();
    let ours: Vec<&Seen> = log
        .iter()
        .filter(|seen| seen.target == "/v1/completions")
        .collect();
    let [refused] = ours[..] else {
        panic!("{} release requests", ours.len());
    };
    let want = format!(
        "{{\"model\":\"{MODEL}\",\"prompt\":\"x\",\"max_tokens\":1,\"kv_transfer_params\":{handoff}}}"
    );
    assert_eq!(String::from_utf8_lossy(&refused.body), want);
    assert_eq!(refused.header("authorization"), Some("Bearer k"));
    assert_eq!(refused.header_all("x-request-id"), ["gw-17"]);
    for seen in log.iter().filter(|seen| seen.target == CHAT) {
        assert_ne!(
            seen.conn, refused.conn,
            "the release request must use a separate connection"
        );
    }
}

#[test]
fn stranded_kv_is_released_if_the_client_disconnects_while_the_decode_leg_is_sent() {
    for leave in Leave::ALL {
        let pair = start(&[]);
        let client = begin_unread(&pair);
        let (_, _client) = leave.now(client);
        expect_counts(&pair, 1.0, 0.0, 0.0);
        expect_refused(&pair, &pair.handoffs.issued()[0]);
        expect_drained(&pair.sidecar);
        assert_eq!(pair.decode.counters().handoff_used, 0);
        expect_handoffs_sound(&pair);
        pair.sidecar.expect_sound();
    }
}

#[test]
fn stranded_kv_is_left_to_its_lease_if_configured() {
    let pair = start(&[KEEP]);
    let client = begin_unread(&pair);
    let (_, _client) = Leave::Reset.now(client);
    expect_counts(&pair, 0.0, 0.0, 1.0);
    expect_drained(&pair.sidecar);
    assert_eq!(only(&pair.decode).target, CHAT);
}

#[test]
fn stranded_kv_is_not_released_if_the_connector_does_not_support_it() {
    let book = mock_engine::BlockBook::new();
    let pair = crate::kv::Setup {
        args: &["--kv-connector=nixl"],
        contract: mock_engine::KvContract::NixlV1(book),
        ..crate::kv::Setup::default()
    }
    .start();
    pair.decode.refuse(true);
    let (_, body) = ask_for(4, true);
    pair.post(CHAT, body).expect_error(503, "decode_refused");
    expect_counts(&pair, 0.0, 0.0, 1.0);
    assert!(pair.decode.requests().is_empty());
}

#[test]
fn a_release_fails_if_the_decoder_cannot_be_reached() {
    let pair = start(&[]);
    pair.decode.refuse(true);
    let (_, body) = ask_for(4, true);
    pair.post(CHAT, body).expect_error(503, "decode_refused");
    expect_counts(&pair, 0.0, 1.0, 0.0);
    pair.decode.refuse(false);
    expect_drained(&pair.sidecar);
    pair.sidecar.expect_sound();
}

#[test]
fn a_release_fails_if_the_decoder_does_not_reject_it_as_expected() {
    let status = |code| Fault::Status {
        code,
        body: "{}".to_owned(),
        content_type: "application/json".to_owned(),
    };
    for fault in [
        status(200),
        status(500),
        status(301),
        Fault::ResetBeforeHead,
        Fault::Garbage,
    ] {
        let pair = start(&[]);
        let client = begin_unread(&pair);
        pair.decode.fault_with(MODEL, fault, 1);
        let (_, _client) = Leave::Reset.now(client);
        expect_counts(&pair, 0.0, 1.0, 0.0);
        expect_drained(&pair.sidecar);
        pair.sidecar.expect_sound();
    }
}

#[test]
fn a_handoff_sent_in_a_complete_request_is_never_sent_again() {
    let pair = start(&[]);
    for fault in [
        Fault::Hold,
        Fault::StallAfterHead,
        Fault::ResetBeforeHead,
        Fault::CloseBeforeHead,
        Fault::Garbage,
        Fault::ResetMidBody { after_events: 0 },
    ] {
        pair.decode.clear();
        pair.decode.fault(fault.clone(), 1);
        let waits = matches!(fault, Fault::Hold | Fault::StallAfterHead);
        let (_, body) = ask_for(4, true);
        let target = pair.prefill.host_port();
        let mut client = pair.sidecar.connect();
        let headers = [(PREFILLER, target.as_str())];
        client.send(request("POST", CHAT, &headers, body.as_bytes()));
        if waits {
            crate::kv::wait_state(&pair.decode, State::Responding);
            client.reset();
            crate::kv::wait_aborted(&pair.decode);
        } else {
            let _ = client.try_head();
            drop(client);
        }
        expect_drained(&pair.sidecar);
        let handoff = pair.handoffs.issued().last().unwrap().clone();
        let carried = |seen: &Seen| String::from_utf8_lossy(&seen.body).contains(&handoff);
        let log = pair.decode.requests();
        assert_eq!(log.iter().filter(|seen| carried(seen)).count(), 1);
        assert!(log.iter().all(|seen| seen.target == CHAT), "{fault:?}");
    }
    expect_counts(&pair, 0.0, 0.0, 0.0);
    assert_eq!(pair.decode.counters().handoff_reused, 0);
    pair.sidecar.expect_sound();
}

/// The chat completion request itself continues without the handoff, whose blocks are released.
#[test]
fn stranded_kv_is_released_if_its_handoff_becomes_stale_while_it_is_sent() {
    let pair = start(&["--handoff-max-age=300ms"]);
    let mut client = begin_unread(&pair);
    client.response().expect(200);
    drop(client);
    expect_counts(&pair, 1.0, 0.0, 0.0);
    expect_refused(&pair, &pair.handoffs.issued()[0]);
    let without = |seen: &Seen| json_of(seen)["kv_transfer_params"] == Value::Null;
    let log = pair.decode.requests();
    let chats = log.iter().filter(|seen| seen.target == CHAT);
    assert!(chats.skip(1).all(without));
    expect_drained(&pair.sidecar);
}

/// The engine may have freed the blocks by then, so no release is requested.
#[test]
fn stranded_kv_is_not_released_if_its_handoff_is_stale_before_it_is_sent() {
    let pair = start(&["--handoff-max-age=1ms"]);
    // The age is measured from the response head, and the body takes longer than the maximum age.
    let fault = Fault::Slow {
        chunk_bytes: 500,
        delay: std::time::Duration::from_millis(4),
    };
    pair.prefill.fault(fault, 1);
    let (_, body) = ask_for(4, true);
    pair.post(CHAT, body).expect(200);
    expect_counts(&pair, 0.0, 0.0, 1.0);
    assert_eq!(only(&pair.decode).target, CHAT);
}

#[test]
fn a_drain_waits_for_the_release() {
    let mut pair = start(&[]);
    let client = begin_unread(&pair);
    pair.decode.fault_with(MODEL, Fault::Hold, 1);
    let (_, _client) = Leave::Reset.now(client);
    crate::kv::wait_state(&pair.decode, State::Responding);
    pair.sidecar.terminate();
    pair.sidecar.wait_stderr("drain");
    assert_eq!(pair.sidecar.admin("/livez").unwrap().status, 200);
    pair.decode.release();
    expect_refused_late(&pair.decode);
    assert_eq!(pair.sidecar.wait_exit().code(), Some(0));
}

#[track_caller]
fn expect_refused_late(decode: &Engine) {
    let responded = |log: &[Seen]| {
        let mut log = log.iter();
        log.any(|seen| seen.target == "/v1/completions" && seen.state == State::Responded)
    };
    assert!(decode.wait_for(DEADLINE, responded).is_some());
}

#[test]
fn nothing_is_stranded_without_a_handoff() {
    let pair = start(&[]);
    let shapes = [
        mock_engine::HandoffShape::Omit,
        mock_engine::HandoffShape::Null,
        mock_engine::HandoffShape::Empty,
    ];
    for shape in shapes {
        pair.prefill.fault(Fault::Handoff(shape), 1);
        pair.decode.refuse(true);
        let (_, body) = ask_for(4, true);
        pair.post(CHAT, body).expect_error(503, "decode_refused");
        pair.decode.refuse(false);
    }
    expect_counts(&pair, 0.0, 0.0, 0.0);
}

/// The decoder refuses the body by its schema, where it does not release the KV cache.
#[test]
fn stranded_kv_is_released_if_the_decoder_refuses_the_request() {
    for code in [400, 404, 422] {
        let pair = start(&[]);
        let fault = Fault::Status {
            code,
            body: r#"{"error":"refused"}"#.to_owned(),
            content_type: "application/json".to_owned(),
        };
        pair.decode.fault(fault, 1);
        let (_, body) = ask_for(4, true);
        let response = pair.post(CHAT, body).expect(code);
        assert_eq!(response.text(), r#"{"error":"refused"}"#);
        // No decoder has served it.
        pair.sidecar.wait_outcome("failed", "client_error");
        expect_counts(&pair, 1.0, 0.0, 0.0);
        let sent: Vec<Seen> = pair.decode.requests();
        assert_eq!(json_of(&sent[1])["model"], MODEL);
        let params = |seen: &Seen| json_of(seen)["kv_transfer_params"].take();
        assert_eq!(params(&sent[0]), params(&sent[1]));
    }
}

/// Also engines that take any other model refuse a release, so that it does not count as a foreign
/// handoff in the tests that use them.
#[test]
fn a_release_is_no_foreign_handoff() {
    let pair = Pair::start(&[]);
    let fault = Fault::Status {
        code: 400,
        body: "{}".to_owned(),
        content_type: "application/json".to_owned(),
    };
    pair.decode.fault(fault, 1);
    pair.post(CHAT, ask_for(4, true).1).expect(400);
    expect_counts(&pair, 1.0, 0.0, 0.0);
    expect_handoffs_sound(&pair);
}

#[test]
fn no_prefill_is_spent_on_a_decoder_that_is_known_to_be_down() {
    let pair = start(&[]);
    pair.decode.refuse(true);
    let ask = |code: u16| {
        let (_, body) = ask_for(4, true);
        pair.post(CHAT, body).expect(code)
    };
    // The first request finds out.
    ask(503);
    let spent = pair.prefill.requests().len();
    for _ in 0..5 {
        let response = ask(503);
        assert_eq!(response.header("retry-after"), Some("1"));
    }
    assert_eq!(pair.prefill.requests().len(), spent);
    pair.decode.refuse(false);
    ask(200);
    ask(200);
    assert_eq!(pair.decode.counters().handoff_used, 2);
}
