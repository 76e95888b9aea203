//! Limits on sizes and durations, and the response when one is exceeded.

use std::io::{Read, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use mock_engine::{Engine, EngineConfig, Fault, Seen};
use serde_json::json;

use crate::client::{DEADLINE, chunked_request, head, request};
use crate::harness::{CHAT, PREFILLER, Pair, wait_for};
use crate::harness_more::{ask_for, descriptors, expect_text, split_request, wait_descriptors};

const ENCODERS: &str = "x-encoder-hosts-ports";
const BODY: &str = r#"{"messages":[],"max_tokens":2}"#;

/// Returns a chat completion body of exactly that many bytes.
fn chat_of(bytes: usize) -> String {
    let frame = json!({"messages": [""]}).to_string();
    let body = json!({"messages": ["x".repeat(bytes - frame.len())]}).to_string();
    assert_eq!(body.len(), bytes);
    body
}

/// A successful response with this body instead of the regular one.
fn success(body: String) -> Fault {
    Fault::Status {
        code: 200,
        body,
        content_type: "application/json".to_owned(),
    }
}

#[test]
fn a_body_above_the_limit_is_413() {
    let pair = Pair::start(&["--max-body=1000"]);
    let target = pair.prefill.host_port();
    let routing = [(PREFILLER, target.as_str())];
    for headers in [&routing[..], &[]] {
        pair.sidecar.post(CHAT, chat_of(1000), headers).expect(200);
        pair.sidecar
            .post(CHAT, chat_of(1001), headers)
            .expect_error(413, "body_too_large");
        let text = chat_of(1001);
        let pieces: Vec<&[u8]> = text.as_bytes().chunks(100).collect();
        let mut client = pair.sidecar.connect();
        client.send(chunked_request(CHAT, headers, &pieces));
        client.response().expect_error(413, "body_too_large");
    }
    // A client that sends `Expect: 100-continue` receives 413 instead of 100.
    let mut client = pair.sidecar.connect();
    let mut bytes = head("POST", CHAT, &[("Expect", "100-continue")]);
    bytes.extend_from_slice(b"Content-Length: 99999999\r\n\r\n");
    client.send(bytes);
    assert_eq!(client.head().status, 413);
    pair.sidecar.expect_sound();
}

#[test]
fn bodies_beyond_the_budget_are_503() {
    let pair = Pair::start(&["--max-body=60000", "--body-budget=60000"]);
    let target = pair.prefill.host_port();
    let routing = [(PREFILLER, target.as_str())];
    let mut holder = pair.sidecar.connect();
    let body = chat_of(50_000);
    let mut bytes = head("POST", CHAT, &routing);
    bytes.extend(format!("Content-Length: {}\r\n\r\n", body.len()).into_bytes());
    let (most, rest) = body.as_bytes().split_at(body.len() - 1);
    bytes.extend_from_slice(most);
    holder.send(bytes);
    let refused = wait_for("a refusal", || {
        let response = pair.sidecar.post(CHAT, chat_of(20_000), &routing);
        (response.status != 200).then_some(response)
    });
    let refused = refused.expect_error(503, "body_budget");
    assert_eq!(refused.header("retry-after"), Some("1"));
    // A smaller body fits, and a body that is not buffered does not count towards the budget.
    pair.sidecar
        .post(CHAT, chat_of(5_000), &routing)
        .expect(200);
    pair.sidecar.post(CHAT, chat_of(20_000), &[]).expect(200);
    holder.send(rest);
    holder.response().expect(200);
    wait_for("free body budget", || {
        // The handoff needs some room, too.
        let response = pair.sidecar.post(CHAT, chat_of(55_000), &routing);
        (response.status == 200).then_some(())
    });
}

/// Clients that announce long bodies and send hardly anything of them do not keep others from the
/// budget, and do not stay for as long as they send a byte now and then.
#[test]
fn announced_lengths_hold_nothing_of_the_budget() {
    let args = [
        "--max-body=60000",
        "--body-budget=60000",
        "--body-timeout=1s",
    ];
    let pair = Pair::start(&args);
    let target = pair.prefill.host_port();
    let routing = [(PREFILLER, target.as_str())];
    let announced = |_| {
        let mut client = pair.sidecar.connect();
        let mut bytes = head("POST", CHAT, &routing);
        bytes.extend(b"Content-Length: 50000\r\n\r\n{");
        client.send(bytes);
        client
    };
    let mut clients: Vec<_> = (0..4).map(announced).collect();
    pair.sidecar
        .post(CHAT, chat_of(50_000), &routing)
        .expect(200);
    let mut writer = clients[0].share();
    let (end, ended) = mpsc::channel::<()>();
    let trickle = std::thread::spawn(move || {
        let pause = Duration::from_millis(50);
        while ended
            .recv_timeout(pause)
            .is_err_and(|e| e == RecvTimeoutError::Timeout)
        {
            writer.try_send(b" ");
        }
    });
    clients[0].response().expect_error(408, "body_timeout");
    drop(end);
    trickle.join().unwrap();
    pair.sidecar.expect_sound();
}

/// A silent decoder holds the handoffs of the requests before it. They are counted: what exceeds
/// the budget is refused, and what a client leaves is returned.
#[test]
fn handoffs_count_against_the_budget() {
    let pair = Pair::start(&["--max-body=1MB", "--body-budget=5MB"]);
    let handoff = format!(
        r#"{{"kv_transfer_params":{{"remote_host":"{}"}}}}"#,
        "x".repeat(3_000_000)
    );
    pair.prefill.fault(success(handoff), u32::MAX);
    pair.decode.fault(Fault::StallBeforeHead, 1);
    let target = pair.prefill.host_port();
    let mut waiting = pair.sidecar.connect();
    waiting.send(request(
        "POST",
        CHAT,
        &[(PREFILLER, &target)],
        BODY.as_bytes(),
    ));
    let has_begun = |seen: &[Seen]| seen.first().is_some_and(|seen| seen.body_bytes > 3_000_000);
    assert!(pair.decode.wait_for(DEADLINE, has_begun).is_some());
    for _ in 0..5 {
        pair.post(CHAT, BODY).expect_error(503, "body_budget");
    }
    drop(waiting);
    wait_for("room in the budget", || {
        let response = pair.post(CHAT, BODY);
        (response.status == 200).then_some(())
    });
    pair.sidecar.expect_sound();
}

#[test]
fn a_body_that_the_decoder_has_received_is_not_kept() {
    let pair = Pair::start(&["--max-body=1MB", "--body-budget=1MB"]);
    let target = pair.prefill.host_port();
    let text = "x".repeat(700_000);
    // Several sequences are decoded alone.
    let body = json!({"messages": [{"role": "user", "content": text}], "n": 2}).to_string();
    let head = [(PREFILLER, target.as_str())];
    // A request on a pooled connection may have to be sent again for a moment.
    for round in 1..=2 {
        pair.decode.fault(Fault::Hold, 1);
        let mut waiting = pair.sidecar.connect();
        waiting.send(request("POST", CHAT, &head, body.as_bytes()));
        assert!(
            pair.decode
                .wait_for(DEADLINE, |seen| seen.len() == 2 * round - 1)
                .is_some()
        );
        pair.sidecar.wait_metric("ringside_kept_bytes", &[], 0.0);
        pair.sidecar.post(CHAT, &*body, &head).expect(200);
        pair.decode.release();
        waiting.response().expect(200);
    }
    pair.sidecar.expect_sound();
}

/// The responses of all encoders of a request are kept together.
#[test]
fn responses_of_encoders_count_against_the_budget() {
    let encoder = Engine::start(EngineConfig::prefill(), 0).unwrap();
    let text = format!(
        r#"{{"ec_transfer_params":{{"a":"{}"}}}}"#,
        "x".repeat(1_000_000)
    );
    encoder.fault(success(text), u32::MAX);
    let args = [
        "--max-body=1MB",
        "--body-budget=5MB",
        "--ec-connector=ec-nixl",
    ];
    let pair = Pair::start(&args);
    let body = |items: usize| {
        let item =
            |nth| format!(r#"{{"type":"image_url","image_url":{{"url":"http://i/{nth}"}}}}"#);
        let items: Vec<_> = (0..items).map(item).collect();
        let content = items.join(",");
        format!(r#"{{"messages":[{{"role":"user","content":[{content}]}}],"max_tokens":1}}"#)
    };
    let target = encoder.host_port();
    let headers = [(ENCODERS, target.as_str())];
    pair.post_with(CHAT, body(2), &headers).expect(200);
    pair.post_with(CHAT, body(8), &headers)
        .expect_error(503, "body_budget");
    pair.post_with(CHAT, body(2), &headers).expect(200);
    pair.sidecar.expect_sound();
}

#[test]
fn items_for_encoders_are_not_copied_and_their_texts_count() {
    let encoder = Engine::start(EngineConfig::encoder(), 0).unwrap();
    let args = [
        "--max-body=1MB",
        "--body-budget=1MB",
        "--ec-connector=ec-example",
    ];
    let pair = Pair::start(&args);
    let target = encoder.host_port();
    let headers = [(ENCODERS, target.as_str())];
    let url = |bytes: usize| "data:image/png;base64,".to_owned() + &"x".repeat(bytes);
    let source = |media: &str, bytes: usize| {
        let source = json!({"type": "base64", "media_type": media, "data": "x".repeat(bytes)});
        json!({"max_tokens": 1, "messages": [{"role": "user", "content": [
            {"type": "image", "source": source}]}]})
    };
    for (path, body) in [
        (
            CHAT,
            json!({"max_tokens": 1, "messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": url(700_000)}}]}]}),
        ),
        ("/v1/messages", source("image/png", 700_000)),
        (
            "/v1/responses",
            json!({"input": [{"role": "user", "content": [
                {"type": "input_image", "image_url": url(700_000)}]}]}),
        ),
    ] {
        pair.post_with(path, body.to_string(), &headers).expect(200);
    }
    assert_eq!(encoder.requests().len(), 3);
    let large = source(&"x".repeat(700_000), 10).to_string();
    pair.post_with("/v1/messages", large, &headers)
        .expect_error(503, "body_budget");
    // The start that all requests to encoders share, and the text of each of them.
    let mut common = source("image/png", 10);
    common["chat_template_kwargs"] = json!({"x": "x".repeat(700_000)});
    pair.post_with("/v1/messages", common.to_string(), &headers)
        .expect_error(503, "body_budget");
    pair.sidecar.wait_metric("ringside_kept_bytes", &[], 0.0);
}

/// Connectors that rewrite the handoff have a copy of it.
#[test]
fn rewritten_handoffs_count_against_the_budget() {
    let large = "x".repeat(3_000_000);
    let params = format!(r#"{{"remote_host":"{large}","dp_rank":0,"remote_block_ids":[1]}}"#);
    let handoff = format!(r#"{{"kv_transfer_params":{params},"remote_host":"{large}"}}"#);
    let mori = &["--moriio-write-mode", "--moriio-local-pod-ip=10.0.0.1"][..];
    for (connector, args, is_copied) in [
        ("nixlv2", &[][..], false),
        ("nixlv2", mori, true),
        ("atom", &[], true),
        ("nixl", &[], true),
    ] {
        let connector = format!("--kv-connector={connector}");
        let limits = ["--max-body=1MB", "--body-budget=5MB", &connector];
        let pair = Pair::start(&[&limits, args].concat());
        pair.prefill.fault(success(handoff.clone()), 1);
        pair.decode.fault(success("{}".to_owned()), 1);
        match is_copied {
            true => drop(pair.post(CHAT, BODY).expect_error(503, "body_budget")),
            false => drop(pair.post(CHAT, BODY).expect(200)),
        }
        pair.sidecar.wait_metric("ringside_kept_bytes", &[], 0.0);
    }
}

#[test]
fn only_what_is_kept_of_a_prefill_response_is_limited() {
    let pair = Pair::start(&["--max-prefill-answer=20KiB"]);
    let large = "x".repeat(30_000);
    let handoff = format!(r#"{{"kv_transfer_params":{{"remote_host":"{large}"}}}}"#);
    pair.prefill.fault(success(handoff), 1);
    pair.post(CHAT, BODY)
        .expect_error(502, "prefill_answer_too_large");
    assert!(pair.decode.requests().is_empty());
    for bytes in [10_000, 30_000, 9 << 20] {
        pair.prefill.fault(Fault::LargeJson { bytes }, 1);
        pair.post(CHAT, BODY).expect(200);
    }
    assert_eq!(pair.decode.counters().handoff_used, 3);
    // Choices without experts, such as those with the log-probabilities of many tokens.
    let text = format!(
        r#"{{"choices":[{{"logprobs":"{large}"}}],"kv_transfer_params":{{"remote_block_ids":[]}}}}"#
    );
    pair.prefill.fault(success(text.clone()), 1);
    pair.decode.fault(success("{}".to_owned()), 1);
    assert_eq!(pair.post(CHAT, BODY).expect(200).text(), "{}");
    // The decoder's experts lack the rows of the prompt.
    pair.prefill
        .fault(success(text.replace("logprobs", "routed_experts")), 1);
    let experts = r#"{"choices":[{"routed_experts":"AAAA"}]}"#;
    pair.decode.fault(success(experts.to_owned()), 1);
    pair.post(CHAT, BODY).expect_error(502, "decode_answer");
    pair.sidecar.wait_stderr("larger than --max-prefill-answer");
}

#[test]
fn a_prefill_that_takes_too_long_is_504() {
    for fault in [Fault::StallBeforeHead, Fault::StallAfterHead] {
        let pair = Pair::start(&["--prefill-timeout=50ms"]);
        pair.prefill.fault(fault.clone(), 1);
        pair.post(CHAT, BODY).expect_error(504, "prefill_timeout");
        assert!(pair.decode.requests().is_empty());
        let aborted = pair
            .prefill
            .wait_for(DEADLINE, |seen| seen[0].state.is_aborted());
        assert!(aborted.is_some(), "{fault:?}");
        pair.sidecar.wait_outcome("failed", "prefill_timeout");
    }
}

#[test]
fn an_engine_that_does_not_respond_is_504() {
    let pair = Pair::start(&["--first-byte-timeout=200ms"]);
    pair.decode.fault(Fault::StallBeforeHead, 3);
    pair.post(CHAT, BODY)
        .expect_error(504, "first_byte_timeout");
    pair.sidecar
        .post(CHAT, BODY, &[])
        .expect_error(504, "first_byte_timeout");
    pair.sidecar
        .get("/v1/models", &[])
        .expect_error(504, "first_byte_timeout");
    pair.prefill.fault(Fault::StallBeforeHead, 1);
    pair.post(CHAT, BODY).expect_error(504, "prefill_timeout");
    // The timeout does not apply to a response that has started.
    let fault = Fault::Slow {
        chunk_bytes: 300,
        delay: Duration::from_millis(60),
    };
    pair.decode.fault(fault, 1);
    let stream = json!({"messages": [], "max_tokens": 8, "stream": true}).to_string();
    let response = pair.sidecar.post(CHAT, stream, &[]).expect(200);
    assert!(response.text().ends_with("[DONE]\n\n"));
}

#[test]
fn an_incomplete_request_is_408() {
    let pair = Pair::start(&["--head-timeout=100ms", "--body-timeout=100ms"]);
    let mut client = pair.sidecar.connect();
    client.send("GET / HTTP/1.1\r\nHost: x\r\n");
    client.response().expect_error(408, "head_timeout");
    client.expect_closed();
    let target = pair.prefill.host_port();
    let routing = [(PREFILLER, target.as_str())];
    for headers in [&routing[..], &[]] {
        let mut client = pair.sidecar.connect();
        let mut bytes = head("POST", CHAT, headers);
        bytes.extend_from_slice(b"Content-Length: 50\r\n\r\n{\"a\":");
        client.send(bytes);
        client.response().expect_error(408, "body_timeout");
        client.expect_closed();
    }
    assert!(pair.prefill.requests().is_empty());
}

#[test]
fn an_idle_client_connection_is_closed_without_a_response() {
    let pair = Pair::start(&["--keepalive-timeout=50ms"]);
    let mut client = pair.sidecar.connect();
    client.ask("GET", "/health", &[], b"").expect(200);
    client.expect_closed();
    // A connection that never sent anything is closed, too.
    pair.sidecar.connect().expect_closed();
}

/// Opens `count` connections to a port and sends half a request head on each.
fn half_requests(port: u16, count: usize) -> Vec<std::net::TcpStream> {
    let half = |_| {
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
        // The other side may have closed it.
        let _ = stream.write_all(b"GET /livez HTTP/1.1\r\nHos");
        stream
    };
    (0..count).map(half).collect()
}

/// At the limit, the connections that have been idle for the longest time are closed, and no other.
#[test]
fn idle_connections_give_way_to_new_ones() {
    let pair = Pair::start(&["--max-connections=40", "--cores=1"]);
    let mut clients: Vec<_> = (0..40).map(|_| pair.sidecar.connect()).collect();
    for client in &mut clients {
        client.ask("GET", "/health", &[], b"").expect(200);
    }
    // The first one has just been used.
    clients[0].ask("GET", "/health", &[], b"").expect(200);
    for _ in 0..3 {
        let mut new = pair.sidecar.connect();
        new.ask("GET", "/health", &[], b"").expect(200);
        clients.push(new);
    }
    clients[0].ask("GET", "/health", &[], b"").expect(200);
    clients[1].expect_closed();
    clients[2].expect_closed();
    let closed = pair
        .sidecar
        .metric("ringside_idle_connections_closed_total", &[]);
    assert!((1.0..=32.0).contains(&closed), "{closed}");
    pair.sidecar.wait_stderr("40 client connections are open");
    let (prompt, body) = ask_for(4, true);
    expect_text(&pair.post(CHAT, &body).expect(200), &prompt, 4);
}

/// Idle connections of one shard give way to clients of another one.
#[test]
fn idle_connections_of_other_shards_give_way() {
    let pair = Pair::start(&["--max-connections=6", "--cores=any*4"]);
    for _ in 0..20 {
        pair.sidecar
            .wait_metric("ringside_client_connections", &[], 0.0);
        // All places are taken by idle clients, of several shards.
        let mut clients: Vec<_> = (0..6).map(|_| pair.sidecar.connect()).collect();
        for client in &mut clients {
            client.ask("GET", "/health", &[], b"").expect(200);
        }
        pair.sidecar
            .connect()
            .ask("GET", "/health", &[], b"")
            .expect(200);
    }
}

/// At the limit, with no idle connection, new ones wait until a request has ended. Nothing of the
/// running ones is lost, and the admin port works.
#[test]
fn new_connections_wait_while_all_others_are_in_use() {
    let pair = Pair::with(
        &["--max-connections=4", "--cores=1"],
        |_| {},
        |decode| decode.itl = Duration::from_millis(5),
    );
    let mut running: Vec<_> = (0..4)
        .map(|_| {
            let (prompt, body) = ask_for(100, true);
            let mut client = pair.sidecar.connect();
            client.send(split_request(&pair, &body));
            (client, prompt)
        })
        .collect();
    pair.sidecar
        .wait_metric("ringside_client_connections", &[], 4.0);
    let mut waiting = pair.sidecar.connect();
    waiting.send(request("GET", "/health", &[], b""));
    assert_eq!(pair.sidecar.admin("/livez").unwrap().status, 200);
    for (client, prompt) in &mut running {
        expect_text(&client.response().expect(200), prompt, 100);
    }
    assert_eq!(waiting.response().status, 200);
}

/// Half requests to the admin port neither keep a probe out nor use up descriptors.
#[test]
fn half_requests_to_the_admin_port_stop_nothing() {
    let pair = Pair::start(&[]);
    let before = descriptors(&pair.sidecar);
    let mut half = half_requests(pair.sidecar.admin_port, 400);
    assert_eq!(pair.sidecar.admin("/livez").unwrap().status, 200);
    let (prompt, body) = ask_for(4, true);
    expect_text(&pair.post(CHAT, &body).expect(200), &prompt, 4);
    wait_descriptors(&pair.sidecar, before + 80);
    // The last ones have the places, and their heads are late.
    let mut last = half.pop().unwrap();
    last.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut response = Vec::new();
    let _ = last.read_to_end(&mut response);
    wait_descriptors(&pair.sidecar, before + 10);
    assert_eq!(pair.sidecar.admin("/livez").unwrap().status, 200);
}
