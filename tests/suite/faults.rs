//! Misbehaving engines on both legs: the responses to the client, the retries and their number, and
//! the isolation of each request from leftovers of the previous one.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mock_engine::{Engine, EngineConfig, Fault};

use crate::client::{Client, DEADLINE, End, Framing, request};
use crate::harness::{CHAT, Launch, PREFILLER, Pair, Sidecar, VERSIONS_OFF, wait_for};
use crate::harness_more::{
    Driver, FullQueue, RawConn, RawEngine, ask_for, expect_drained, expect_handoffs_sound,
    expect_healthy, expect_text, pair_on, split_request, unsent,
};

/// The two ways in which a test sends its request: split (`true`) and decode-only (`false`).
const WAYS: [bool; 2] = [true, false];
const TOKENS: u32 = 8;

fn status(code: u16) -> Fault {
    Fault::Status {
        code,
        body: format!("{{\"error\":{{\"message\":\"engine says {code}\"}}}}"),
        content_type: "application/json".to_owned(),
    }
}

fn headers(split: bool, target: &str) -> Vec<(&str, &str)> {
    if split {
        vec![(PREFILLER, target)]
    } else {
        Vec::new()
    }
}

/// Clears all faults, then checks that the next requests, on new and on pooled connections to the
/// engines, get the correct responses.
#[track_caller]
fn expect_unharmed(pair: &Pair) {
    pair.prefill.clear_faults();
    pair.decode.clear_faults();
    expect_healthy(pair);
    expect_healthy(pair);
    expect_handoffs_sound(pair);
}

#[test]
fn a_decoder_failure_before_the_response_is_502() {
    fails_before_its_response(Driver::Ring);
}

#[test]
fn a_decoder_failure_before_the_response_is_502_on_epoll() {
    fails_before_its_response(Driver::Epoll);
}

fn fails_before_its_response(driver: Driver) {
    let pair = pair_on(driver, &[], |_| {}, |_| {});
    let target = pair.prefill.host_port();
    let cases = [
        (Fault::ResetBeforeHead, 502, "decode_reset"),
        (Fault::CloseBeforeHead, 502, "decode_reset"),
        (Fault::Garbage, 502, "decode_answer"),
        (Fault::BareLf, 502, "decode_answer"),
        (Fault::BothFramings, 502, "decode_answer"),
        (Fault::EndlessHead, 502, "decode_answer"),
        (Fault::Interim { count: 17 }, 502, "decode_answer"),
    ];
    for split in WAYS {
        for (fault, code, label) in &cases {
            let errors = [("code", *label)];
            let before = pair.sidecar.metric("ringside_errors_total", &errors);
            // The fault applies to every attempt, because a pooled connection that is closed is
            // replaced once.
            pair.decode.fault(fault.clone(), u32::MAX);
            let (_, body) = ask_for(TOKENS, true);
            let mut client = pair.sidecar.connect();
            let response = client.ask("POST", CHAT, &headers(split, &target), body.as_bytes());
            pair.decode.clear_faults();
            response.expect_error(*code, label);
            let after = pair.sidecar.metric("ringside_errors_total", &errors);
            assert!(
                (after - before - 1.0).abs() < 0.1,
                "{fault:?}: counted {before} {after}"
            );
            // The client's connection is still usable, because the engine caused the failure.
            let (prompt, body) = ask_for(TOKENS, false);
            let response = client.ask("POST", CHAT, &headers(split, &target), body.as_bytes());
            expect_text(&response.expect(200), &prompt, TOKENS);
            expect_unharmed(&pair);
        }
    }
    expect_drained(&pair.sidecar);
    pair.sidecar.expect_sound();
}

#[test]
fn silent_engines_time_out() {
    let pair = Pair::start(&["--first-byte-timeout=1s", "--prefill-timeout=1s"]);
    let target = pair.prefill.host_port();
    for split in WAYS {
        pair.decode.fault(Fault::StallBeforeHead, 1);
        let (_, body) = ask_for(TOKENS, true);
        let response = pair.sidecar.post(CHAT, &body, &headers(split, &target));
        response.expect_error(504, "first_byte_timeout");
    }
    for fault in [
        Fault::StallBeforeHead,
        Fault::StallAfterHead,
        Fault::StallMidStream { after_events: 1 },
        // Occasional bytes do not extend the timeout.
        Fault::Slow {
            chunk_bytes: 1,
            delay: Duration::from_millis(5),
        },
    ] {
        pair.prefill.fault(fault.clone(), 1);
        let (_, body) = ask_for(TOKENS, true);
        let response = pair.post(CHAT, &body);
        response.expect_error(504, "prefill_timeout");
    }
    assert_eq!(
        pair.decode.requests().len(),
        2,
        "a decode leg was sent after a failed prefill"
    );
    for (engine, aborted) in [(&pair.prefill, 4), (&pair.decode, 2)] {
        let aborted = engine.wait_counters(DEADLINE, |counters| counters.aborted == aborted);
        assert!(aborted.is_some(), "{:?}", engine.counters());
    }
    expect_unharmed(&pair);
}

#[test]
fn a_refusing_decoder_is_503() {
    // A release also connects to the decoder, and could take a fault meant for the next request.
    let pair = Pair::start(&[VERSIONS_OFF, "--release-stranded-kv=false"]);
    let target = pair.prefill.host_port();
    for split in WAYS {
        pair.decode.refuse(true);
        // Pooled connections would be used until their maximum age, so none may be open here.
        let (_, body) = ask_for(TOKENS, true);
        let response = pair.sidecar.post(CHAT, &body, &headers(split, &target));
        let response = response.expect_error(503, "decode_refused");
        assert_eq!(response.header("retry-after"), Some("1"));
        pair.decode.refuse(false);
        // A connection that is accepted and immediately reset; after a refused one, a split request
        // first opens another.
        pair.decode.fault(Fault::Refuse, 1 + u32::from(split));
        let response = pair.sidecar.post(CHAT, &body, &headers(split, &target));
        assert!([502, 503].contains(&response.status), "{response:?}");
        if !split {
            expect_unharmed(&pair);
        }
    }
    pair.sidecar.expect_sound();
}

#[test]
fn surplus_bytes_after_a_decoder_response_are_discarded() {
    let pair = Pair::start(&[VERSIONS_OFF]);
    let target = pair.prefill.host_port();
    let mut accepted = 0;
    for split in WAYS {
        for stream in [true, false] {
            pair.decode.fault(Fault::GarbageAfterResponse, 1);
            let mut client = pair.sidecar.connect();
            let (prompt, body) = ask_for(TOKENS, stream);
            let response = client.ask("POST", CHAT, &headers(split, &target), body.as_bytes());
            expect_text(&response.expect(200), &prompt, TOKENS);
            accepted += 1;
            let connections = pair.decode.counters().connections_accepted;
            assert!(connections <= accepted, "{connections}");
            // The surplus bytes are a complete response, which must not be used for the next
            // request.
            let (prompt, body) = ask_for(TOKENS, stream);
            let response = client.ask("POST", CHAT, &headers(split, &target), body.as_bytes());
            expect_text(&response.expect(200), &prompt, TOKENS);
            // This connection is pooled, and the next fault occurs on it.
            let connections = pair.decode.counters().connections_accepted;
            assert_eq!(
                connections,
                accepted + 1,
                "the connection with surplus bytes was reused"
            );
        }
    }
    expect_unharmed(&pair);
    pair.sidecar.expect_sound();
}

#[test]
fn a_connection_that_receives_bytes_while_idle_is_not_reused() {
    // The engine sends bytes while its connection is idle: that connection must not be reused.
    let (go, gone) = mpsc::channel::<()>();
    let gone = Mutex::new(gone);
    let (aborted, tell) = mpsc::channel::<()>();
    let aborted = Mutex::new(aborted);
    let engine = RawEngine::start(move |mut conn, _| {
        while conn.request().is_some() {
            conn.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
            if gone.lock().unwrap().recv().is_err() {
                return;
            }
            conn.say("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong");
            let _ = aborted.lock().unwrap().send(());
        }
    });
    let sidecar = Sidecar::start(&[VERSIONS_OFF], engine.port());
    let mut client = sidecar.connect();
    for _ in 0..50 {
        let response = client.ask("GET", "/v1/models", &[], b"").expect(200);
        assert_eq!(response.text(), "ok");
        go.send(()).unwrap();
        tell.recv_timeout(Duration::from_secs(10)).unwrap();
    }
    sidecar.expect_sound();
}

/// An engine that gets a second request on its first connection, works on it for `work` and then
/// resets the connection. Also returns how often that request was read.
fn engine_that_dies_after(work: Duration) -> (RawEngine, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&count);
    let engine = RawEngine::start(move |mut conn, nth| {
        while let Some((_, body)) = conn.request() {
            if body.windows(6).any(|part| part == b"second") {
                seen.fetch_add(1, Ordering::SeqCst);
                if nth == 0 {
                    if !work.is_zero() {
                        conn.stream.set_read_timeout(Some(work)).unwrap();
                        assert_eq!(conn.head(), None, "nothing more is sent");
                    }
                    conn.reset();
                    return;
                }
            }
            conn.say("HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{\"choices\":[]}");
        }
    });
    (engine, count)
}

/// A request that is reset immediately may not have been read, and is sent again.
#[test]
fn a_request_that_an_engine_may_have_worked_on_is_not_sent_again() {
    for (work, attempts) in [(Duration::from_millis(1500), 1), (Duration::ZERO, 2)] {
        // Two sequences are decoded alone, from a body that has been read, and is dropped if large.
        for (split, n, pad) in [
            (true, 1, 0),
            (false, 1, 0),
            (false, 2, 0),
            (false, 2, 100_000),
        ] {
            let (engine, count) = engine_that_dies_after(work);
            let decoder = Engine::start(EngineConfig::decode(), 0).unwrap();
            let mut ports = [engine.port(), decoder.port()];
            ports.rotate_right(usize::from(split));
            let sidecar = Sidecar::start(&[VERSIONS_OFF], ports[0]);
            let target = format!("127.0.0.1:{}", ports[1]);
            let headers = headers(split || n == 2, &target);
            let body = |text: &str| {
                let text = text.to_owned() + &"x".repeat(pad);
                format!(r#"{{"messages":[{{"role":"user","content":"{text}"}}],"n":{n}}}"#)
            };
            sidecar.post(CHAT, body("first"), &headers).expect(200);
            let response = sidecar.post(CHAT, body("second"), &headers);
            let case = format!("{work:?}, split {split}, n {n}, {pad} bytes");
            let status = if attempts == 1 { 502 } else { 200 };
            assert_eq!(response.status, status, "{case}: {response:?}");
            assert_eq!(count.load(Ordering::SeqCst), attempts, "{case}");
            sidecar.expect_sound();
        }
    }
}

/// Reads the response that `fault` truncates. Fails if it looks complete to the client, or if its
/// body is not shorter than the `whole` bytes of the complete one.
#[track_caller]
fn expect_cut(fault: &Fault, client: &mut Client, whole: usize) {
    let response = client.response();
    assert_eq!(response.status, 200, "{fault:?}");
    assert_ne!(
        response.end,
        End::Complete,
        "{fault:?}: {:?}",
        response.head
    );
    assert!(response.body.len() < whole, "{fault:?}");
    if response.framing == Framing::UntilClose {
        assert_eq!(response.end, End::Reset, "{fault:?}");
    }
}

#[test]
fn a_truncated_response_does_not_look_complete() {
    cut_short_shows_it(Driver::Ring);
}

#[test]
fn a_truncated_response_does_not_look_complete_on_epoll() {
    cut_short_shows_it(Driver::Epoll);
}

fn cut_short_shows_it(driver: Driver) {
    let pair = pair_on(
        driver,
        &[],
        |_| {},
        |decode| decode.itl = Duration::from_millis(1),
    );
    let target = pair.prefill.host_port();
    let mut cut = 0.0;
    for split in WAYS {
        for stream in [true, false] {
            for fault in [
                Fault::TruncateMidBody { after_events: 3 },
                Fault::ResetMidBody { after_events: 3 },
                Fault::ExtraLength,
            ] {
                pair.decode.fault(fault.clone(), 1);
                let (_, body) = ask_for(64, stream);
                let mut client = pair.sidecar.connect();
                client.send(request(
                    "POST",
                    CHAT,
                    &headers(split, &target),
                    body.as_bytes(),
                ));
                expect_cut(&fault, &mut client, 1 << 20);
                cut += 1.0;
                let truncated = [("code", "decode_truncated")];
                pair.sidecar
                    .wait_metric("ringside_errors_total", &truncated, cut);
                expect_unharmed(&pair);
            }
        }
    }
    expect_drained(&pair.sidecar);
    pair.sidecar.expect_sound();
}

#[test]
fn an_http_1_0_client_sees_a_truncated_response_as_a_reset() {
    // Without chunks, the end of the connection is the end of the response.
    let pair = Pair::with(&[], |_| {}, |decode| decode.itl = Duration::from_millis(1));
    let target = pair.prefill.host_port();
    for split in WAYS {
        for fault in [
            Fault::TruncateMidBody { after_events: 3 },
            Fault::ResetMidBody { after_events: 3 },
        ] {
            pair.decode.fault(fault.clone(), 1);
            let (_, body) = ask_for(64, true);
            let bytes = request("POST", CHAT, &headers(split, &target), body.as_bytes());
            let text = String::from_utf8(bytes).unwrap();
            let mut client = pair.sidecar.connect();
            client.send(text.replacen("HTTP/1.1", "HTTP/1.0", 1));
            let response = client.response();
            assert_eq!(response.framing, Framing::UntilClose, "{:?}", response.head);
            assert_eq!(response.end, End::Reset, "{fault:?} split {split}");
            expect_unharmed(&pair);
        }
    }
}

#[test]
fn a_reset_of_a_close_delimited_response_is_relayed_as_a_reset() {
    let engine = RawEngine::start(|mut conn, _| {
        if conn.request().is_some() {
            conn.say("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\nhalf of");
            conn.reset();
        }
    });
    let sidecar = Sidecar::start(&[VERSIONS_OFF], engine.port());
    for _ in 0..5 {
        let mut client = sidecar.connect();
        client.send(request("GET", "/v1/models", &[], b""));
        // The reset may overtake the head, so that there is no response at all.
        if let Ok(head) = client.try_head() {
            // A reset that is detected before the head has been relayed results in a complete error
            // response.
            if head.status == 502 {
                continue;
            }
            let (_, end) = client.body(head.framing("GET"));
            assert_eq!(end, End::Reset);
        }
    }
}

#[test]
fn unusual_but_complete_responses_are_relayed_completely() {
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    for split in WAYS {
        for stream in [true, false] {
            for fault in [
                Fault::Http10Response,
                Fault::NoFraming,
                Fault::CloseIdle,
                Fault::Interim { count: 16 },
                Fault::Slow {
                    chunk_bytes: 7,
                    delay: Duration::from_micros(50),
                },
            ] {
                pair.decode.fault(fault.clone(), 1);
                let (prompt, body) = ask_for(TOKENS, stream);
                let response = pair.sidecar.post(CHAT, &body, &headers(split, &target));
                expect_text(&response.expect(200), &prompt, TOKENS);
                expect_unharmed(&pair);
            }
        }
    }
    pair.sidecar.expect_sound();
}

#[test]
fn an_idle_connection_closed_by_the_decoder_causes_one_replay() {
    idle_closed_costs_one_replay(Driver::Ring);
}

#[test]
fn an_idle_connection_closed_by_the_decoder_causes_one_replay_on_epoll() {
    idle_closed_costs_one_replay(Driver::Epoll);
}

fn idle_closed_costs_one_replay(driver: Driver) {
    let pair = pair_on(driver, &[], |_| {}, |_| {});
    for nth in 1..=10_u32 {
        pair.decode.fault(Fault::CloseOnNextRequest, 1);
        for _ in 0..2 {
            let (prompt, body) = ask_for(TOKENS, true);
            let response = pair.sidecar.post(CHAT, &body, &[]).expect(200);
            expect_text(&response, &prompt, TOKENS);
        }
        assert_eq!(pair.decode.counters().stale_closed, u64::from(nth));
        pair.sidecar
            .wait_metric("ringside_replays_total", &[], f64::from(nth));
    }
    // Two requests per round have a response. The attempt on the closed connection does not count
    // as a request to the engine.
    assert_eq!(pair.decode.requests().len(), 20);
    expect_drained(&pair.sidecar);
    pair.sidecar.expect_sound();
}

#[test]
fn a_replayed_decode_leg_omits_its_handoff() {
    let pair = Pair::start(&[]);
    pair.decode.fault(Fault::CloseOnNextRequest, 1);
    for _ in 0..2 {
        let (prompt, body) = ask_for(TOKENS, true);
        let response = pair.post(CHAT, &body).expect(200);
        expect_text(&response, &prompt, TOKENS);
    }
    pair.sidecar.wait_outcome("remote", "none");
    pair.sidecar.wait_outcome("local_fallback", "handoff_used");
    pair.sidecar.wait_metric("ringside_replays_total", &[], 1.0);
    let decodes = pair.decode.requests();
    assert_eq!(decodes.len(), 2);
    let params = |nth: usize| &decodes[nth].json.as_ref().unwrap()["kv_transfer_params"];
    assert_eq!(params(0)["do_remote_prefill"], true);
    assert!(params(1).is_null(), "{}", params(1));
    let counters = pair.decode.counters();
    assert_eq!((counters.stale_closed, counters.handoff_used), (1, 1));
    expect_unharmed(&pair);
}

#[test]
fn an_idle_connection_closed_by_the_prefiller_causes_one_replay() {
    let pair = Pair::start(&[]);
    pair.prefill.fault(Fault::CloseOnNextRequest, 1);
    for _ in 0..2 {
        let (prompt, body) = ask_for(TOKENS, true);
        let response = pair.post(CHAT, &body).expect(200);
        expect_text(&response, &prompt, TOKENS);
    }
    let remote = [("outcome", "remote"), ("reason", "none")];
    pair.sidecar
        .wait_metric("ringside_pd_requests_total", &remote, 2.0);
    pair.sidecar.wait_metric("ringside_replays_total", &[], 1.0);
    assert_eq!(pair.prefill.requests().len(), 2);
    assert_eq!(pair.decode.counters().handoff_used, 2);
    expect_unharmed(&pair);
}

#[test]
fn a_failure_on_a_new_connection_is_not_replayed() {
    let pair = Pair::start(&[]);
    pair.decode.fault(Fault::CloseBeforeHead, 1);
    let (_, body) = ask_for(TOKENS, true);
    pair.sidecar
        .post(CHAT, &body, &[])
        .expect_error(502, "decode_reset");
    assert_eq!(pair.decode.requests().len(), 1);
    pair.sidecar.wait_metric("ringside_replays_total", &[], 0.0);
    // On a pooled connection, a second failure is not retried.
    let (_, body) = ask_for(TOKENS, true);
    pair.sidecar.post(CHAT, &body, &[]).expect(200);
    pair.decode.fault(Fault::CloseBeforeHead, u32::MAX);
    pair.sidecar
        .post(CHAT, &body, &[])
        .expect_error(502, "decode_reset");
    assert_eq!(
        pair.decode.requests().len(),
        4,
        "one request and one replay"
    );
    pair.sidecar.wait_metric("ringside_replays_total", &[], 1.0);
    expect_unharmed(&pair);
}

#[test]
fn a_prefiller_failure_is_502_without_a_decode_leg() {
    let pair = Pair::start(&[]);
    let cases = [
        (Fault::ResetBeforeHead, 502, "prefill_reset"),
        (Fault::CloseBeforeHead, 502, "prefill_reset"),
        (Fault::Garbage, 502, "prefill_answer"),
        (Fault::BareLf, 502, "prefill_answer"),
        (Fault::BothFramings, 502, "prefill_answer"),
        (Fault::EndlessHead, 502, "prefill_answer"),
        (Fault::Interim { count: 17 }, 502, "prefill_answer"),
        (
            Fault::ResetMidBody { after_events: 1 },
            502,
            "prefill_answer",
        ),
        (
            Fault::TruncateMidBody { after_events: 1 },
            502,
            "prefill_answer",
        ),
        (
            Fault::ResetMidBody { after_events: 0 },
            502,
            "prefill_answer",
        ),
        (Fault::ExtraLength, 502, "prefill_answer"),
        (Fault::Gzip, 502, "prefill_answer"),
        (Fault::Html, 502, "prefill_answer"),
        (Fault::HalfJson, 502, "prefill_answer"),
    ];
    for (fault, code, label) in &cases {
        let decodes = pair.decode.requests().len();
        pair.prefill.fault(fault.clone(), u32::MAX);
        let mut client = pair.sidecar.connect();
        client.send(split_request(&pair, &ask_for(TOKENS, true).1));
        let response = client.response();
        pair.prefill.clear_faults();
        response.expect_error(*code, label);
        assert_eq!(
            pair.decode.requests().len(),
            decodes,
            "{fault:?}: decode was called"
        );
        let (prompt, body) = ask_for(TOKENS, false);
        client.send(split_request(&pair, &body));
        expect_text(&client.response().expect(200), &prompt, TOKENS);
        expect_unharmed(&pair);
    }
    expect_drained(&pair.sidecar);
    pair.sidecar.expect_sound();
}

#[test]
fn a_refusing_prefiller_is_502() {
    let pair = Pair::start(&[]);
    pair.prefill.refuse(true);
    let (_, body) = ask_for(TOKENS, true);
    pair.post(CHAT, &body).expect_error(502, "prefill_connect");
    assert!(pair.decode.requests().is_empty());
    pair.prefill.refuse(false);
    expect_unharmed(&pair);
}

#[test]
fn a_prefiller_connect_timeout_is_502_unless_another_candidate_exists() {
    let pair = Pair::start(&["--connect-timeout=200ms"]);
    let deaf = FullQueue::new();
    let (_, body) = ask_for(TOKENS, true);
    let target = deaf.host_port();
    let response = pair.sidecar.post(CHAT, &body, &[(PREFILLER, &target)]);
    response.expect_error(502, "prefill_connect");
    // The next candidate is used.
    let (prompt, body) = ask_for(TOKENS, true);
    let both = format!("{target},{}", pair.prefill.host_port());
    let response = pair
        .sidecar
        .post(CHAT, &body, &[(PREFILLER, &both)])
        .expect(200);
    expect_text(&response, &prompt, TOKENS);
    expect_unharmed(&pair);
}

#[test]
fn unusual_but_complete_prefill_responses_are_used() {
    let pair = Pair::start(&[]);
    for fault in [
        Fault::Http10Response,
        Fault::NoFraming,
        Fault::CloseIdle,
        Fault::GarbageAfterResponse,
        Fault::Interim { count: 16 },
        Fault::LargeJson { bytes: 1 << 20 },
        Fault::Slow {
            chunk_bytes: 5,
            delay: Duration::from_micros(50),
        },
    ] {
        pair.prefill.fault(fault.clone(), 1);
        for _ in 0..2 {
            let (prompt, body) = ask_for(TOKENS, true);
            let response = pair.post(CHAT, &body).expect(200);
            expect_text(&response, &prompt, TOKENS);
        }
        expect_unharmed(&pair);
    }
    let remote = [("outcome", "remote")];
    assert!(pair.sidecar.metric("ringside_pd_requests_total", &remote) > 14.0);
}

#[test]
fn prefill_retries_are_counted_and_bounded() {
    let pair = Pair::start(&["--prefill-max-retries=2", "--prefill-retry-backoff=10ms"]);
    pair.prefill.fault(status(503), 2);
    let (prompt, body) = ask_for(TOKENS, true);
    expect_text(&pair.post(CHAT, &body).expect(200), &prompt, TOKENS);
    assert_eq!(pair.prefill.requests().len(), 3);
    pair.prefill.clear();
    pair.prefill.fault(status(503), u32::MAX);
    let response = pair.post(CHAT, &body).expect(503);
    assert_eq!(response.json()["error"]["message"], "engine says 503");
    assert_eq!(
        pair.prefill.requests().len(),
        3,
        "one attempt and two retries"
    );
    pair.prefill.clear_faults();
    pair.prefill.clear();
    pair.prefill.fault(status(500), 1);
    pair.post(CHAT, &body).expect(500);
    assert_eq!(pair.prefill.requests().len(), 1, "500 must not be retried");
    pair.sidecar
        .wait_metric("ringside_prefill_retries_total", &[], 4.0);
    expect_unharmed(&pair);
}

#[test]
fn a_connection_is_not_reused_after_an_early_prefill_response() {
    let pair = Pair::start(&[]);
    let padding = "x".repeat(24 << 20);
    let big = format!(
        "{{\"model\":\"mock-model\",\"messages\":[{{\"role\":\"user\",\"content\":\"{padding}\"}}]}}"
    );
    for keep in [true, false] {
        let early = Fault::EarlyResponse { status: 401, keep };
        pair.prefill.fault(early, 1);
        let response = pair.post(CHAT, &big);
        assert_eq!(response.status, 401, "{response:?}");
        for _ in 0..2 {
            let (prompt, body) = ask_for(TOKENS, true);
            let response = pair.post(CHAT, &body).expect(200);
            expect_text(&response, &prompt, TOKENS);
        }
    }
    assert_eq!(pair.prefill.counters().malformed, 0);
    expect_unharmed(&pair);
}

#[test]
fn a_connection_is_not_reused_after_an_early_decode_response() {
    let pair = Pair::start(&[]);
    let big = vec![b'x'; 24 << 20];
    for keep in [true, false] {
        pair.decode
            .fault(Fault::EarlyResponse { status: 413, keep }, 1);
        let mut client = pair.sidecar.connect();
        // The engine may respond, and the sidecar may close the connection, while this is still
        // being sent.
        client.try_send(request("POST", "/v1/files", &[], &big));
        if let Ok(head) = client.try_head() {
            assert_eq!(head.status, 413);
        }
        expect_unharmed(&pair);
    }
    assert_eq!(pair.decode.counters().malformed, 0);
}

#[test]
fn body_bytes_that_arrive_while_connecting_are_not_lost() {
    let deaf = FullQueue::new();
    let sidecar = Sidecar::launch(&Launch {
        args: &[
            "--connect-timeout=20s",
            "--model-server-host=127.0.0.1",
            VERSIONS_OFF,
        ],
        decoder_port: deaf.port(),
        ..Launch::default()
    });
    let mut client = sidecar.connect();
    client.send("POST /v1/files HTTP/1.1\r\nHost: a\r\nContent-Length: 3000\r\n\r\n");
    let active = [("leg", "decode"), ("state", "active")];
    sidecar.wait_metric("ringside_upstream_connections", &active, 1.0);
    let part = |byte: u8| vec![byte; 1000];
    client.send(part(b'a'));
    wait_for("the first part to arrive", || {
        (unsent(client.socket()) == 0).then_some(())
    });
    // The shard has time to read the first part, although it is still connecting to the engine.
    sidecar.wait_metric("ringside_client_connections", &[], 1.0);
    client.send(part(b'b'));
    let mut engine = RawConn::new(deaf.hear());
    engine.head().unwrap();
    client.send(part(b'c'));
    let body = engine.bytes(3000).unwrap();
    assert_eq!(body, [part(b'a'), part(b'b'), part(b'c')].concat());
    engine.say("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
    assert_eq!(client.response().expect(200).text(), "ok");
    sidecar.expect_sound();
}

#[test]
fn an_engine_restart_affects_only_requests_in_flight() {
    let handoffs = mock_engine::HandoffRegistry::new();
    let config = || EngineConfig {
        verify_handoff: Some(handoffs.clone()),
        ..EngineConfig::decode()
    };
    let first = Engine::start(config(), 0).unwrap();
    let port = first.port();
    let sidecar = Sidecar::start(&[], port);
    let (prompt, body) = ask_for(TOKENS, true);
    expect_text(&sidecar.post(CHAT, &body, &[]).expect(200), &prompt, TOKENS);
    drop(first);
    let _second = Engine::start(config(), port).unwrap();
    let (prompt, body) = ask_for(TOKENS, true);
    expect_text(&sidecar.post(CHAT, &body, &[]).expect(200), &prompt, TOKENS);
    sidecar.expect_sound();
}
