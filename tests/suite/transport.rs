//! Responses and connections conform to HTTP/1.1, regardless of the engine's behaviour.

use mock_engine::{AbortPhase, Fault, State};
use serde_json::json;

use crate::client::{DEADLINE, End, Framing, chunked_request, head, request};
use crate::harness::{CHAT, Canned, PREFILLER, Pair, Sidecar, connections, json_of, only, sha256};

fn chat(stream: bool) -> String {
    json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "stream": stream})
        .to_string()
}

#[test]
fn events_are_relayed_before_the_next_one_arrives() {
    for split in [true, false] {
        let pair = Pair::start(&[]);
        let fault = Fault::StallMidStream { after_events: 2 };
        pair.decode.fault(fault, 1);
        let target = pair.prefill.host_port();
        let routing = [(PREFILLER, target.as_str())];
        let headers = if split { &routing[..] } else { &[] };
        let mut client = pair.sidecar.connect();
        client.send(request("POST", CHAT, headers, chat(true).as_bytes()));
        let head = client.head();
        assert_eq!((head.status, head.framing("POST")), (200, Framing::Chunked));
        let mut received = String::new();
        while received.matches("data: ").count() < 2 {
            received += &String::from_utf8(client.chunk().unwrap()).unwrap();
        }
        assert!(received.ends_with("\n\n"));
        // The engine is still stalled, and must see the client disconnect.
        drop(client);
        let aborted = pair.decode.wait_for(DEADLINE, |seen| {
            matches!(
                seen[0].state,
                State::Aborted {
                    phase: AbortPhase::Streaming,
                    ..
                }
            )
        });
        assert!(aborted.is_some());
    }
}

#[test]
fn a_truncated_stream_does_not_look_complete() {
    for split in [true, false] {
        for fault in [
            Fault::TruncateMidBody { after_events: 3 },
            Fault::ResetMidBody { after_events: 3 },
        ] {
            let pair = Pair::start(&[]);
            pair.decode.fault(fault.clone(), 1);
            let response = if split {
                pair.post(CHAT, chat(true))
            } else {
                pair.sidecar.post(CHAT, chat(true), &[])
            };
            // The head may have been relayed before the break, or the break may have been detected
            // first.
            if response.status == 200 {
                assert_ne!(response.end, End::Complete, "{fault:?}");
                assert!(!response.text().contains("[DONE]"));
            } else {
                assert_eq!(response.status, 502, "{fault:?}");
            }
            pair.sidecar.expect_sound();
        }
    }
}

#[test]
fn an_error_event_is_relayed_and_counted_as_a_failure() {
    for args in [&[][..], &["--kv-connector=shared-storage"]] {
        let pair = Pair::start(args);
        pair.decode
            .fault(Fault::ErrorMidStream { after_events: 2 }, 1);
        let response = pair.post(CHAT, chat(true)).expect(200);
        assert!(response.text().contains("EngineCore encountered an issue."));
        assert!(response.text().ends_with("data: [DONE]\n\n"));
        pair.sidecar.wait_outcome("failed", "decode");
        pair.post(CHAT, chat(true)).expect(200);
        pair.sidecar.wait_outcome("remote", "none");
    }
}

#[test]
fn invalid_decoder_responses_are_502() {
    for fault in [
        Fault::Garbage,
        Fault::BothFramings,
        Fault::BareLf,
        Fault::EndlessHead,
    ] {
        for split in [true, false] {
            let pair = Pair::start(&[]);
            pair.decode.fault(fault.clone(), 1);
            let response = if split {
                pair.post(CHAT, chat(false))
            } else {
                pair.sidecar.post(CHAT, chat(false), &[])
            };
            assert_eq!(response.status, 502, "{fault:?}");
            response.expect_error(502, "decode_answer");
            pair.sidecar.expect_sound();
        }
    }
}

#[test]
fn bytes_after_a_response_are_not_the_next_response() {
    let pair = Pair::start(&[]);
    pair.decode.fault(Fault::GarbageAfterResponse, 1);
    let mut client = pair.sidecar.connect();
    client.ask("GET", "/a", &[], b"").expect(200);
    let response = client.ask("GET", "/b", &[], b"").expect(200);
    assert_eq!(response.json()["path"], "/b");
    assert_ne!(
        pair.decode.requests()[0].conn,
        pair.decode.requests()[1].conn
    );
}

#[test]
fn interim_responses_are_not_relayed() {
    let pair = Pair::start(&[]);
    pair.decode.fault(Fault::Interim { count: 3 }, 1);
    let mut client = pair.sidecar.connect();
    client.send(request("POST", CHAT, &[], chat(false).as_bytes()));
    assert_eq!(client.head().status, 200);
}

#[test]
fn too_many_interim_responses_are_502() {
    let pair = Pair::start(&[]);
    pair.decode.fault(Fault::Interim { count: 200 }, 1);
    pair.post(CHAT, chat(false))
        .expect_error(502, "decode_answer");
}

#[test]
fn a_close_delimited_response_is_relayed_completely() {
    for (split, stream) in [(false, false), (false, true), (true, false), (true, true)] {
        let pair = Pair::start(&[]);
        pair.decode.fault(Fault::NoFraming, 1);
        let response = if split {
            pair.post(CHAT, chat(stream))
        } else {
            pair.sidecar.post(CHAT, chat(stream), &[])
        };
        let response = response.expect(200);
        if stream {
            assert!(response.text().ends_with("data: [DONE]\n\n"));
        } else {
            assert_eq!(response.json()["choices"][0]["finish_reason"], "length");
        }
        assert_eq!(pair.decode.requests().len(), 1);
    }
}

/// Returns an HTTP/1.0 request.
fn old_request(path: &str, headers: &[(&str, &str)], body: &str) -> Vec<u8> {
    let bytes = request("POST", path, headers, body.as_bytes());
    let text = String::from_utf8(bytes).unwrap();
    text.replacen("HTTP/1.1", "HTTP/1.0", 1).into_bytes()
}

#[test]
fn an_http_1_0_client_receives_no_chunked_response() {
    for split in [true, false] {
        let pair = Pair::start(&[]);
        let target = pair.prefill.host_port();
        let routing = [(PREFILLER, target.as_str())];
        let headers = if split { &routing[..] } else { &[] };
        let mut client = pair.sidecar.connect();
        client.send(old_request(CHAT, headers, &chat(true)));
        let response = client.response().expect(200);
        assert_eq!(response.framing, Framing::UntilClose);
        assert_eq!(response.version, "HTTP/1.1");
        assert!(response.text().ends_with("data: [DONE]\n\n"));
        client.expect_closed();
    }
}

#[test]
fn an_http_1_0_connection_is_kept_only_on_request() {
    let pair = Pair::start(&[]);
    let mut client = pair.sidecar.connect();
    for _ in 0..2 {
        client.send(old_request("/echo", &[("Connection", "keep-alive")], "x"));
        let response = client.response().expect(200);
        assert_eq!(response.header("connection"), Some("keep-alive"));
    }
    client.send(old_request("/echo", &[], "x"));
    let response = client.response().expect(200);
    assert_eq!(response.header("connection"), Some("close"));
    client.expect_closed();
}

#[test]
fn an_http_1_0_client_sees_a_truncated_stream_as_a_reset() {
    let pair = Pair::start(&[]);
    pair.decode
        .fault(Fault::TruncateMidBody { after_events: 3 }, 1);
    let mut client = pair.sidecar.connect();
    client.send(old_request(CHAT, &[], &chat(true)));
    // Only a reset can indicate the truncation.
    match client.try_head() {
        Err(end) => assert_eq!(end, End::Reset),
        Ok(head) if head.status == 502 => {}
        Ok(_) => assert_eq!(client.rest().1, End::Reset),
    }
}

#[test]
fn responses_without_a_body_leave_the_connection_usable() {
    let pair = Pair::start(&[]);
    let mut client = pair.sidecar.connect();
    let response = client.ask("HEAD", "/v1/anything", &[], b"").expect(200);
    let length: usize = response.header("content-length").unwrap().parse().unwrap();
    assert!(length > 0);
    for (fault, status) in [(Fault::NoContent204, 204), (Fault::NotModified304, 304)] {
        for (method, path) in [("GET", "/x"), ("POST", CHAT)] {
            pair.decode.fault(fault.clone(), 1);
            let body = if method == "POST" {
                chat(false)
            } else {
                String::new()
            };
            let response = client.ask(method, path, &[], body.as_bytes());
            let response = response.expect(status);
            assert_eq!(response.header("transfer-encoding"), None);
            if status == 304 {
                assert_eq!(response.header("content-length"), Some("17"));
                assert_eq!(response.header("etag"), Some("\"mock\""));
            }
        }
    }
    // All requests use one connection. A misread length would have mixed up the responses.
    let response = client.ask("GET", "/last", &[], b"").expect(200);
    assert_eq!(response.json()["path"], "/last");
}

#[test]
fn a_split_request_may_get_a_response_without_a_body() {
    let pair = Pair::start(&[]);
    pair.decode.fault(Fault::NoContent204, 1);
    pair.post(CHAT, chat(false)).expect(204);
}

const UPGRADE: [(&str, &str); 2] = [("Connection", "Upgrade"), ("Upgrade", "websocket")];

#[test]
fn an_upgrade_becomes_a_tunnel() {
    let pair = Pair::start(&[]);
    pair.decode.fault(Fault::Upgrade101, 1);
    let mut client = pair.sidecar.connect();
    // The first bytes of the new protocol may arrive with the request.
    let mut bytes = request("GET", "/v1/realtime", &UPGRADE, b"");
    bytes.extend_from_slice(b"early;");
    client.send(bytes);
    let head = client.head();
    assert_eq!(head.status, 101);
    assert_eq!(head.header("connection"), Some("upgrade"));
    assert!(head.header("upgrade").is_some());
    assert_eq!(client.raw(6), b"early;");
    for size in [1_usize, 1000, 200_000] {
        let sent: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        let mut client_half = client.share();
        std::thread::scope(|scope| {
            scope.spawn(|| client_half.send(&sent));
            assert!(client.raw(size) == sent);
        });
    }
    client.finish();
    client.expect_closed();
    let seen = only(&pair.decode);
    assert_eq!(seen.header("upgrade"), Some("websocket"));
    assert_eq!(
        seen.header("connection").map(str::to_ascii_lowercase),
        Some("upgrade".to_owned())
    );
}

#[test]
fn only_websocket_is_requested_from_an_engine() {
    let pair = Pair::start(&[]);
    let upgrade = |protocols| {
        [
            ("Connection", "Upgrade, HTTP2-Settings"),
            ("Upgrade", protocols),
        ]
    };
    for (method, protocols, settings, want) in [
        ("GET", "h2c", true, None),
        ("GET", "h2c", false, None),
        ("POST", "h2c", true, None),
        ("GET", "TLS/1.2", false, None),
        ("GET", "websocket/13", false, None),
        ("POST", "websocket", false, None),
        ("GET", "h2c, websocket", true, Some("websocket")),
        ("GET", "WebSocket", false, Some("websocket")),
    ] {
        pair.decode.clear();
        let mut headers = upgrade(protocols).to_vec();
        if settings {
            headers.push(("HTTP2-Settings", "AAMAAABkAAQAoAAAAAIAAAAA"));
        }
        let body: &[u8] = if method == "POST" { b"all of it" } else { b"" };
        let mut client = pair.sidecar.connect();
        client.ask(method, "/echo", &headers, body).expect(200);
        let seen = only(&pair.decode);
        assert_eq!(seen.header("upgrade"), want, "{method} {protocols}");
        assert_eq!(seen.header("http2-settings"), None);
        assert_eq!(seen.header("connection").is_some(), want.is_some());
        assert_eq!(seen.body, body);
        // The connection still carries HTTP/1.1.
        client.ask("GET", "/health", &[], b"").expect(200);
    }
}

#[test]
fn a_switch_to_another_protocol_is_502() {
    let engine = Canned::start(
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n",
    );
    let sidecar = Sidecar::start(&[], engine.port);
    sidecar
        .get("/v1/realtime", &UPGRADE)
        .expect_error(502, "decode_answer");
}

#[test]
fn a_refused_upgrade_is_relayed_as_a_response() {
    let pair = Pair::start(&[]);
    let mut client = pair.sidecar.connect();
    let response = client.ask("GET", "/v1/realtime", &UPGRADE, b"").expect(200);
    assert_eq!(response.json()["path"], "/v1/realtime");
    client.ask("GET", "/health", &[], b"").expect(200);
}

#[test]
fn an_unrequested_upgrade_is_502() {
    for (path, headers) in [("/x", &[][..]), (CHAT, &UPGRADE[..])] {
        let pair = Pair::start(&[]);
        pair.decode.fault(Fault::Upgrade101, 1);
        let response = pair.sidecar.post(path, chat(false), headers);
        response.expect_error(502, "decode_answer");
    }
}

#[test]
fn a_response_may_arrive_before_the_request_is_complete() {
    let total = 4 << 20;
    for keep in [false, true] {
        for path in [CHAT, "/echo"] {
            let pair = Pair::start(&[]);
            let fault = Fault::EarlyResponse { status: 413, keep };
            pair.decode.fault(fault, 1);
            let mut client = pair.sidecar.connect();
            let mut bytes = head("POST", path, &[]);
            bytes.extend(format!("Content-Length: {total}\r\n\r\n{{\"a\":\"").into_bytes());
            client.send(bytes);
            // Like real clients, it continues to send until it has received the response.
            let response = client.response().expect(413);
            assert_eq!(response.header("connection"), Some("close"));
            let _ = client.try_send(vec![b'x'; 100_000]);
            pair.sidecar.expect_sound();
        }
    }
}

#[test]
fn an_early_prefill_response_is_relayed() {
    let pair = Pair::start(&[]);
    let fault = Fault::EarlyResponse {
        status: 413,
        keep: false,
    };
    pair.prefill.fault(fault, 1);
    let body = json!({"messages": ["x".repeat(3 << 20)]}).to_string();
    pair.post(CHAT, body).expect(413);
    assert!(pair.decode.requests().is_empty());
}

#[test]
fn absolute_targets_are_made_relative() {
    let pair = Pair::start(&[]);
    let path = format!("http://api.example{CHAT}?a=b");
    pair.post(&path, chat(false)).expect(200);
    let (prefill, decode) = pair.legs();
    for leg in [prefill, decode] {
        assert_eq!(leg.target, format!("{CHAT}?a=b"));
        assert_eq!(leg.header_all("host"), ["api.example"]);
    }
}

#[test]
fn a_client_disconnect_during_prefill_sends_no_decode_leg() {
    let pair = Pair::start(&[]);
    pair.prefill.fault(Fault::StallBeforeHead, 1);
    let target = pair.prefill.host_port();
    let mut client = pair.sidecar.connect();
    client.send(request(
        "POST",
        CHAT,
        &[(PREFILLER, &target)],
        chat(false).as_bytes(),
    ));
    let came = |seen: &[mock_engine::Seen]| seen.first().is_some_and(|seen| seen.body_at.is_some());
    assert!(pair.prefill.wait_for(DEADLINE, came).is_some());
    drop(client);
    let aborted = |seen: &[mock_engine::Seen]| seen[0].state.is_aborted();
    assert!(pair.prefill.wait_for(DEADLINE, aborted).is_some());
    pair.sidecar.wait_outcome("failed", "client_gone");
    assert!(pair.decode.requests().is_empty());
}

#[test]
fn connections_to_engines_are_reused() {
    let pair = Pair::start(&[]);
    for nth in 0..5 {
        let body = json!({"messages": [nth], "stream": nth % 2 == 1}).to_string();
        pair.post(CHAT, body).expect(200);
        pair.sidecar.get("/v1/models", &[]).expect(200);
    }
    assert_eq!(connections(&pair.prefill), 1);
    assert_eq!(connections(&pair.decode), 1);
    assert_eq!(json_of(&pair.prefill.requests()[4])["messages"], json!([4]));
}

#[test]
fn large_bodies_pass_both_ways() {
    let pair = Pair::start(&[]);
    let body: Vec<u8> = (0..12_u32 << 20)
        .map(|i| (i.wrapping_mul(i) >> 7) as u8)
        .collect();
    let hash = sha256(&body);
    let mut client = pair.sidecar.connect();
    let response = client.ask("POST", "/echo", &[], &body).expect(200);
    assert_eq!(response.json()["body_sha256"], hash);
    let chunks: Vec<&[u8]> = body.chunks(99_991).collect();
    client.send(chunked_request("/echo", &[], &chunks));
    assert_eq!(client.response().expect(200).json()["body_sha256"], hash);
    for split in [false, true] {
        let bytes = 9 << 20;
        pair.decode.fault(Fault::LargeJson { bytes }, 1);
        let response = if split {
            pair.post(CHAT, chat(false))
        } else {
            pair.sidecar.post(CHAT, chat(false), &[])
        };
        let response = response.expect(200).json();
        assert!(response["routed_experts"].as_str().unwrap() == "A".repeat(bytes));
    }
}

#[test]
fn a_request_on_a_stale_connection_is_retried_once() {
    for (method, path, split) in [
        ("GET", "/x", false),
        ("POST", "/x", false),
        ("POST", CHAT, false),
        ("POST", CHAT, true),
    ] {
        let pair = Pair::start(&[]);
        let engine = if split { &pair.prefill } else { &pair.decode };
        let target = pair.prefill.host_port();
        let routing = [(PREFILLER, target.as_str())];
        let headers = if split { &routing[..] } else { &[] };
        let body = if method == "POST" {
            chat(false)
        } else {
            String::new()
        };
        engine.fault(Fault::CloseOnNextRequest, 1);
        for _ in 0..2 {
            pair.sidecar
                .ask(method, path, headers, body.as_bytes())
                .expect(200);
        }
        assert_eq!(engine.counters().stale_closed, 1, "{method} {path}");
        assert_eq!(engine.requests().len(), 2);
        pair.sidecar.wait_metric("ringside_replays_total", &[], 1.0);
    }
}

#[test]
fn a_request_on_a_new_connection_is_never_retried() {
    for fault in [Fault::CloseBeforeHead, Fault::ResetBeforeHead] {
        let pair = Pair::start(&[]);
        pair.decode.fault(fault, 1);
        pair.sidecar
            .post(CHAT, chat(false), &[])
            .expect_error(502, "decode_reset");
        assert_eq!(pair.decode.requests().len(), 1);
    }
}

#[test]
fn a_client_disconnect_during_the_upload_aborts_the_request() {
    for path in [CHAT, "/echo"] {
        for stalled in [false, true] {
            let pair = Pair::start(&[]);
            if stalled {
                pair.decode.fault(Fault::StallRead { after_bytes: 1000 }, 1);
            }
            let mut client = pair.sidecar.connect();
            let body = json!({"messages": ["x".repeat(24 << 20)]}).to_string();
            let bytes = request("POST", path, &[], body.as_bytes());
            // Without a stall, send all but the last byte; with one, send as much as the sockets
            // accept.
            if stalled {
                client.send_some(&bytes);
            } else {
                client.send(&bytes[..bytes.len() - 1]);
            }
            let came = |seen: &[mock_engine::Seen]| !seen.is_empty();
            assert!(pair.decode.wait_for(DEADLINE, came).is_some());
            if stalled {
                client.reset();
            } else {
                drop(client);
            }
            let aborted = |seen: &[mock_engine::Seen]| {
                matches!(
                    seen[0].state,
                    State::Aborted {
                        phase: AbortPhase::Body,
                        ..
                    }
                )
            };
            let waited = pair.decode.wait_for(DEADLINE, aborted);
            assert!(waited.is_some(), "{path}, stalled: {stalled}");
        }
    }
}

#[test]
fn a_client_disconnect_aborts_a_prefill_leg_that_is_not_read() {
    let pair = Pair::start(&[]);
    let fault = Fault::StallRead { after_bytes: 1000 };
    pair.prefill.fault(fault, 1);
    let target = pair.prefill.host_port();
    let mut client = pair.sidecar.connect();
    let body = json!({"messages": ["x".repeat(24 << 20)]}).to_string();
    let routing = [(PREFILLER, target.as_str())];
    client.send(request("POST", CHAT, &routing, body.as_bytes()));
    let came = |seen: &[mock_engine::Seen]| !seen.is_empty();
    assert!(pair.prefill.wait_for(DEADLINE, came).is_some());
    drop(client);
    let aborted = |seen: &[mock_engine::Seen]| seen[0].state.is_aborted();
    assert!(pair.prefill.wait_for(DEADLINE, aborted).is_some());
    pair.sidecar.wait_outcome("failed", "client_gone");
}

#[test]
fn a_half_close_after_the_request_is_a_disconnect() {
    let pair = Pair::start(&[]);
    pair.decode.fault(Fault::StallBeforeHead, 2);
    let mut client = pair.sidecar.connect();
    client.send(request("GET", "/x", &[], b""));
    let came = |seen: &[mock_engine::Seen]| !seen.is_empty();
    assert!(pair.decode.wait_for(DEADLINE, came).is_some());
    client.finish();
    let aborted = |seen: &[mock_engine::Seen]| seen[0].state.is_aborted();
    assert!(pair.decode.wait_for(DEADLINE, aborted).is_some());
    pair.sidecar
        .wait_metric("ringside_client_disconnects_total", &[], 1.0);
    // A client that half-closes directly after its request is detected before the engine is called,
    // or soon afterwards.
    let mut client = pair.sidecar.connect();
    client.send(request("GET", "/x", &[], b""));
    client.finish();
    pair.sidecar
        .wait_metric("ringside_client_disconnects_total", &[], 2.0);
}

/// Returns a response head and a chunked stream whose only event has the data `last`, without the
/// terminating chunk.
fn stream_up_to(last: &str) -> String {
    let head =
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    format!("{head}6\r\ndata: \r\n{:x}\r\n{last}\r\n", last.len())
}

#[test]
fn closing_after_the_last_event_is_not_a_disconnect() {
    for (last, code, left) in [("[DONE]\n\n", "2xx", 0.0), ("[DONE ]\n\n", "aborted", 1.0)] {
        let engine = Canned::start(stream_up_to(last));
        let sidecar = Sidecar::start(&[], engine.port);
        let mut client = sidecar.connect();
        client.send(request("POST", CHAT, &[], b"{}"));
        client.head();
        let mut seen = Vec::new();
        while !seen.ends_with(last.as_bytes()) {
            seen.extend(client.chunk().unwrap());
        }
        drop(client);
        let labels = [("route", "chat"), ("code", code)];
        sidecar.wait_metric("ringside_requests_total", &labels, 1.0);
        let disconnects = sidecar.metric("ringside_client_disconnects_total", &[]);
        assert!((disconnects - left).abs() < 0.5, "{last}: {disconnects}");
    }
}

#[test]
fn malformed_requests_are_rejected_and_the_connection_is_closed() {
    let pair = Pair::start(&[]);
    for (bytes, status) in [
        ("GET / HTTP/1.1\nHost: x\n\n", 400),
        ("GET / HTTP/1.1\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
        ("GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
        ("GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        ("GET / HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            400,
        ),
        (
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
            400,
        ),
        (
            "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\n",
            400,
        ),
        (
            "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            501,
        ),
    ] {
        let mut client = pair.sidecar.connect();
        client.send(bytes);
        client.response().expect_error(status, "bad_head");
        client.expect_closed();
    }
    let mut client = pair.sidecar.connect();
    client.send("CONNECT x:1 HTTP/1.1\r\nHost: x:1\r\n\r\n");
    let response = client.response_to("CONNECT");
    assert_eq!(response.status, 405);
    for (path, headers) in [("/echo", &[][..]), (CHAT, &[])] {
        let mut client = pair.sidecar.connect();
        let mut bytes = head("POST", path, headers);
        bytes.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\nzz\r\n");
        client.send(bytes);
        client.response().expect_error(400, "bad_chunk");
    }
    assert_eq!(pair.decode.counters().responded, 0);
}
