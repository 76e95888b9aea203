//! Clients that violate HTTP/1.1, whose requests are rejected and reach no engine, and clients that
//! are only slow.

use std::time::{Duration, Instant};

use crate::client::{Client, request};
use crate::harness::{CHAT, PREFILLER, Pair, Sidecar, poll_interval};
use crate::harness_more::{ask_for, expect_drained, expect_handoffs_sound, expect_healthy};

/// Requests that the sidecar must refuse: the name of the case, the status of the response, and the
/// bytes of the request.
#[expect(clippy::too_many_lines, reason = "a table")]
fn refused() -> Vec<(&'static str, u16, Vec<u8>)> {
    let post = |fields: &str, body: &str| {
        format!("POST {CHAT} HTTP/1.1\r\nHost: a\r\n{fields}\r\n{body}").into_bytes()
    };
    let hidden = "GET /hidden HTTP/1.1\r\nHost: a\r\n\r\n";
    let chunked = |body: &str| post("Transfer-Encoding: chunked\r\n", &format!("{body}{hidden}"));
    let long = |n: usize| "x".repeat(n);
    let hop_names: String = (0..20).map(|n| format!("x{n}, ")).collect();
    vec![
        (
            "length and chunks",
            400,
            post(
                "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
                "0\r\n\r\n",
            ),
        ),
        (
            "chunks and length",
            400,
            post(
                "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
                "0\r\n\r\n",
            ),
        ),
        (
            "two lengths",
            400,
            post("Content-Length: 2\r\nContent-Length: 3\r\n", "{}"),
        ),
        (
            "two equal lengths",
            400,
            post("Content-Length: 2\r\nContent-Length: 2\r\n", "{}"),
        ),
        (
            "a list of lengths",
            400,
            post("Content-Length: 2, 2\r\n", "{}"),
        ),
        ("a signed length", 400, post("Content-Length: +2\r\n", "{}")),
        (
            "a negative length",
            400,
            post("Content-Length: -2\r\n", "{}"),
        ),
        (
            "a hexadecimal length",
            400,
            post("Content-Length: 0x2\r\n", "{}"),
        ),
        ("an empty length", 400, post("Content-Length:\r\n", "{}")),
        (
            "a length beyond 64 bits",
            400,
            post("Content-Length: 18446744073709551618\r\n", "{}"),
        ),
        (
            "a length with a space",
            400,
            post("Content-Length: 1 2\r\n", "{}"),
        ),
        (
            "chunked twice",
            501,
            post("Transfer-Encoding: chunked, chunked\r\n", "0\r\n\r\n"),
        ),
        ("a chunk near 2^63", 400, chunked("7fffffffffffffff\r\nx")),
        ("a chunk near 2^64", 400, chunked("fffffffffffffffe\r\nx")),
        ("a chunk of 2^64", 400, chunked("10000000000000000\r\nx")),
        ("a chunk above 2^53", 400, chunked("20000000000001\r\nx")),
        (
            "a chunk with 21 digits",
            400,
            chunked("000000000000000000001\r\nx\r\n0\r\n\r\n"),
        ),
        (
            "two codings",
            400,
            post(
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
                "0\r\n\r\n",
            ),
        ),
        (
            "gzip, chunked",
            501,
            post("Transfer-Encoding: gzip, chunked\r\n", "0\r\n\r\n"),
        ),
        (
            "identity",
            501,
            post("Transfer-Encoding: identity\r\n", "{}"),
        ),
        (
            "a coding with a vertical tab",
            400,
            post("Transfer-Encoding: \x0bchunked\r\n", "0\r\n\r\n"),
        ),
        (
            "a coding with a parameter",
            501,
            post("Transfer-Encoding: chunked;a=b\r\n", "0\r\n\r\n"),
        ),
        (
            "an empty coding",
            501,
            post("Transfer-Encoding:\r\n", "0\r\n\r\n"),
        ),
        (
            "chunks in HTTP/1.0",
            400,
            format!(
                "POST {CHAT} HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            )
            .into_bytes(),
        ),
        (
            "a space before a colon",
            400,
            post("Content-Length : 2\r\n", "{}"),
        ),
        (
            "a tab before a colon",
            400,
            post("Transfer-Encoding\t: chunked\r\n", "0\r\n\r\n"),
        ),
        (
            "a folded line",
            400,
            post("X-A: b\r\n c\r\nContent-Length: 2\r\n", "{}"),
        ),
        (
            "a folded first line",
            400,
            format!("POST {CHAT} HTTP/1.1\r\n Host: a\r\n\r\n").into_bytes(),
        ),
        (
            "a line without a colon",
            400,
            post("X-A\r\nContent-Length: 2\r\n", "{}"),
        ),
        (
            "an empty name",
            400,
            post(": b\r\nContent-Length: 2\r\n", "{}"),
        ),
        (
            "a name with a bracket",
            400,
            post("X(A): b\r\nContent-Length: 2\r\n", "{}"),
        ),
        (
            "a name with a high byte",
            400,
            post("X\u{e4}: b\r\nContent-Length: 2\r\n", "{}"),
        ),
        (
            "NUL in a value",
            400,
            post("X-A: a\0b\r\nContent-Length: 2\r\n", "{}"),
        ),
        (
            "a control byte in a value",
            400,
            post("X-A: a\x01b\r\nContent-Length: 2\r\n", "{}"),
        ),
        (
            "DEL in a value",
            400,
            post("X-A: a\x7fb\r\nContent-Length: 2\r\n", "{}"),
        ),
        (
            "a bare CR in a value",
            400,
            post("X-A: a\rb\r\nContent-Length: 2\r\n", "{}"),
        ),
        (
            "a bare LF in a value",
            400,
            post("X-A: a\nX-B: b\r\nContent-Length: 2\r\n", "{}"),
        ),
        (
            "bare LF throughout",
            400,
            b"GET / HTTP/1.1\nHost: a\n\n".to_vec(),
        ),
        (
            "a bare LF at the end",
            400,
            b"GET / HTTP/1.1\r\nHost: a\r\n\n".to_vec(),
        ),
        ("no Host", 400, b"GET / HTTP/1.1\r\n\r\n".to_vec()),
        (
            "two Hosts",
            400,
            b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n".to_vec(),
        ),
        (
            "a Host with a path",
            400,
            b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n".to_vec(),
        ),
        (
            "a Host with a user",
            400,
            b"GET / HTTP/1.1\r\nHost: u@a\r\n\r\n".to_vec(),
        ),
        (
            "a Host with spaces",
            400,
            b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n".to_vec(),
        ),
        (
            "another Host than the target",
            400,
            b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        ),
        (
            "two spaces in the request line",
            400,
            b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        ),
        (
            "a tab in the request line",
            400,
            b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        ),
        ("no version", 400, b"GET /\r\nHost: a\r\n\r\n".to_vec()),
        (
            "lower-case http",
            400,
            b"GET / http/1.1\r\nHost: a\r\n\r\n".to_vec(),
        ),
        (
            "HTTP/2.0",
            505,
            b"GET / HTTP/2.0\r\nHost: a\r\n\r\n".to_vec(),
        ),
        (
            "HTTP/1.2",
            505,
            b"GET / HTTP/1.2\r\nHost: a\r\n\r\n".to_vec(),
        ),
        (
            "an HTTP/2 preface",
            505,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        ),
        (
            "a method with a bracket",
            400,
            b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        ),
        (
            "a space before the method",
            400,
            b" GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        ),
        (
            "a TLS greeting",
            400,
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        ),
        (
            "a control byte in the target",
            400,
            b"GET /\x01 HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        ),
        (
            "a high byte in the target",
            400,
            b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        ),
        (
            "a relative target",
            400,
            b"GET v1/models HTTP/1.1\r\nHost: a\r\n\r\n".to_vec(),
        ),
        (
            "CONNECT",
            405,
            b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n".to_vec(),
        ),
        (
            "an unknown expectation",
            417,
            post("Expect: tea\r\nContent-Length: 2\r\n", "{}"),
        ),
        (
            "a long request line",
            414,
            format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", long(17_000)).into_bytes(),
        ),
        (
            "a request line without end",
            414,
            format!("GET /{}", long(17_000)).into_bytes(),
        ),
        (
            "a long field",
            431,
            post(&format!("X-A: {}\r\n", long(70_000)), ""),
        ),
        ("many fields", 431, post(&"X-A: b\r\n".repeat(130), "")),
        (
            "many hop names",
            431,
            post(
                &format!("Connection: {hop_names}\r\nContent-Length: 2\r\n"),
                "{}",
            ),
        ),
        (
            "a body above --max-body",
            413,
            post("Content-Length: 1048577\r\n", "{"),
        ),
        (
            "a chunk size of text",
            400,
            chunked("zz\r\n{}\r\n0\r\n\r\n"),
        ),
        (
            "a negative chunk size",
            400,
            chunked("-2\r\n{}\r\n0\r\n\r\n"),
        ),
        ("a signed chunk size", 400, chunked("+2\r\n{}\r\n0\r\n\r\n")),
        (
            "a prefixed chunk size",
            400,
            chunked("0x2\r\n{}\r\n0\r\n\r\n"),
        ),
        ("an empty chunk size", 400, chunked("\r\n{}\r\n0\r\n\r\n")),
        (
            "a chunk size beyond 64 bits",
            400,
            chunked("10000000000000002\r\n{}\r\n0\r\n\r\n"),
        ),
        (
            "a space before a chunk size",
            400,
            chunked(" 2\r\n{}\r\n0\r\n\r\n"),
        ),
        (
            "a space after a chunk size",
            400,
            chunked("2 \r\n{}\r\n0\r\n\r\n"),
        ),
        (
            "a chunk longer than its size",
            400,
            chunked("2\r\n{}}\r\n0\r\n\r\n"),
        ),
        (
            "a chunk line that ends in LF",
            400,
            chunked("2\n{}\r\n0\r\n\r\n"),
        ),
        (
            "a chunk that ends in LF",
            400,
            chunked("2\r\n{}\n0\r\n\r\n"),
        ),
        (
            "a NUL in a chunk extension",
            400,
            chunked("2;a=\0\r\n{}\r\n0\r\n\r\n"),
        ),
        (
            "a long chunk extension",
            400,
            chunked(&format!("2;a={}\r\n{{}}\r\n0\r\n\r\n", long(20_000))),
        ),
        (
            "many chunk extensions",
            400,
            chunked(&format!(
                "{}0\r\n\r\n",
                format!("1;a={}\r\n \r\n", long(400)).repeat(60)
            )),
        ),
        (
            "long trailers",
            400,
            chunked(&format!("2\r\n{{}}\r\n0\r\nX-A: {}\r\n\r\n", long(20_000))),
        ),
        (
            "many trailers",
            400,
            chunked(&format!(
                "2\r\n{{}}\r\n0\r\n{}\r\n",
                "X-A: b\r\n".repeat(3000)
            )),
        ),
        (
            "a trailer without a colon",
            400,
            chunked("2\r\n{}\r\n0\r\nX-A\r\n\r\n"),
        ),
        (
            "a folded trailer",
            400,
            chunked("2\r\n{}\r\n0\r\nX-A: b\r\n c\r\n\r\n"),
        ),
    ]
}

/// Checks that the sidecar responds to the invalid request `name` with an error of this status and,
/// unless the status is 405, closes the connection after it. `routed` (whether the request names a
/// prefill engine) is only used in messages.
#[track_caller]
fn expect_refusal(name: &str, status: u16, client: &mut Client, routed: bool) {
    let response = client.response();
    // A decode-only body is forwarded while it arrives. The other cases are rejected before a leg
    // starts.
    assert_eq!(
        response.status,
        status,
        "{name} (routed {routed}): {}",
        response.text()
    );
    assert!(
        response.header("x-ringside-error").is_some(),
        "{name}: not generated by ringside"
    );
    if status == 405 {
        // The request is complete but its method is not supported, so the connection stays open.
        return;
    }
    assert_eq!(response.header("connection"), Some("close"), "{name}");
    let (rest, _) = client.rest();
    assert!(
        rest.is_empty(),
        "{name}: {}",
        String::from_utf8_lossy(&rest)
    );
}

#[test]
fn invalid_requests_are_rejected_and_reach_no_engine() {
    let pair = Pair::start(&["--max-body=1MiB", "--body-budget=1GiB"]);
    let mut judged = 0;
    let target = pair.prefill.host_port();
    for (name, status, bytes) in refused() {
        for routed in [false, true] {
            let mut bytes = bytes.clone();
            if routed {
                // Insert the header after the first line, if the case has one.
                let Some(at) = bytes.windows(2).position(|at| at == b"\r\n") else {
                    continue;
                };
                let line = format!("\r\n{PREFILLER}: {target}").into_bytes();
                if name != "a folded first line" {
                    bytes.splice(at..at, line);
                }
            }
            let mut client = pair.sidecar.connect();
            client.try_send(&bytes);
            expect_refusal(name, status, &mut client, routed);
        }
        let response = pair.sidecar.post(CHAT, ask_for(1, false).1, &[]);
        assert_eq!(
            response.status, 200,
            "{name}: a clean request on a fresh connection"
        );
        judged += 1;
    }
    let seen: Vec<_> = pair.decode.requests();
    // A chunked decode-only body is not buffered, so the request may have reached the decoder
    // before its framing was found to be invalid. It must not become complete, and nothing after it
    // may be read.
    let whole = seen.iter().filter(|seen| seen.body_at.is_some()).count();
    assert_eq!(
        whole, judged,
        "complete requests at the decoder, and checked cases"
    );
    assert!(
        seen.iter()
            .all(|seen| seen.target == CHAT && seen.method == "POST")
    );
    assert!(pair.prefill.requests().is_empty());
    assert_eq!(pair.decode.counters().malformed, 0);
    expect_healthy(&pair);
    expect_drained(&pair.sidecar);
    expect_handoffs_sound(&pair);
    pair.sidecar.expect_sound();
}

#[test]
fn every_fragmentation_of_a_request_results_in_the_same_legs() {
    let pair = Pair::start(&[]);
    let (_, body) = ask_for(2, false);
    let target = pair.prefill.host_port();
    let headers = [(PREFILLER, target.as_str()), ("x-request-id", "same")];
    let whole = request("POST", CHAT, &headers, body.as_bytes());
    let mut chunked = crate::client::chunked_request(CHAT, &headers, &[&body[..9], &body[9..]]);
    for bytes in [&whole, &mut chunked] {
        let mut client = pair.sidecar.connect();
        for at in 0..=bytes.len() {
            if at == bytes.len() {
                for byte in bytes.iter() {
                    client.send([*byte]);
                }
            } else {
                client.send(&bytes[..at]);
                if at % 8 == 0 {
                    // Waits for the shard in between; otherwise it may receive both parts together.
                    pair.sidecar.admin("/livez");
                }
                client.send(&bytes[at..]);
            }
            client.response().expect(200);
        }
    }
    let prefills = pair.prefill.requests();
    let decodes = pair.decode.requests();
    assert_eq!(
        (prefills.len(), decodes.len()),
        (whole.len() + chunked.len() + 2, prefills.len())
    );
    for seen in &prefills {
        assert_eq!(seen.body, prefills[0].body);
        assert_eq!(seen.headers, prefills[0].headers);
    }
    for seen in &decodes {
        let mut json = seen.json.clone().unwrap();
        // The handoff differs each time. The engine checks that it arrives unaltered.
        json.as_object_mut()
            .unwrap()
            .remove("kv_transfer_params")
            .unwrap();
        let want: serde_json::Value = serde_json::from_str(&body).unwrap();
        assert_eq!(json, want);
    }
    expect_handoffs_sound(&pair);
    assert_eq!(pair.decode.counters().handoff_used, decodes.len() as u64);
}

/// Reads the response to a request that timed out: an error with the status `want` and the code
/// `label`, after which the connection must be closed. Returns the time from `since` to the
/// response.
#[track_caller]
fn expect_timeout(client: &mut Client, since: Instant, want: u16, label: &str) -> Duration {
    let response = client.response().expect_error(want, label);
    let took = since.elapsed();
    assert_eq!(response.header("connection"), Some("close"));
    client.expect_closed();
    took
}

#[test]
fn an_incomplete_head_times_out() {
    let pair = Pair::start(&["--head-timeout=300ms"]);
    for start in ["G", "GET / HTTP/1.1\r\nHost: a\r\n", "\r\n"] {
        let mut client = pair.sidecar.connect();
        let since = Instant::now();
        client.send(start);
        let took = expect_timeout(&mut client, since, 408, "head_timeout");
        assert!(took >= Duration::from_millis(300), "{took:?}");
    }
    // Byte by byte: the limit applies to the whole head, and progress does not extend it.
    let mut client = pair.sidecar.connect();
    let since = Instant::now();
    client.send("GET / HTTP/1.1\r\nX-Slow: ");
    let arrived = |client: &Client| rustix::io::ioctl_fionread(client.socket()).unwrap() > 0;
    while since.elapsed() < Duration::from_secs(3) && !arrived(&client) && client.try_send("x") {
        poll_interval();
    }
    let took = expect_timeout(&mut client, since, 408, "head_timeout");
    assert!(took < Duration::from_secs(2), "{took:?}");
    eprintln!("slow head refused after {took:?}");
    // Connections without a first byte are subject to the keep-alive timeout instead.
    expect_healthy(&pair);
    pair.sidecar.expect_sound();
}

#[test]
fn what_cannot_become_a_request_line_is_refused_at_once() {
    // Without a limit, so that only the refusal itself can end the wait.
    let pair = Pair::start(&["--head-timeout=off"]);
    for (start, status) in [
        ("SSH-2.0-OpenSSH_9.6\r\n", 400),
        ("EHLO mail\r\n", 400),
        ("GET /index.html\r\n", 400),
        ("GET / FTP", 400),
        ("PRI * HTTP/2.0\r\n", 505),
        ("GET / HTTP/3", 505),
        ("GET ftp://a/ HTTP/1.1\r\n", 400),
        ("{\"jsonrpc\"", 400),
        ("get\t/", 400),
        ("GET /\0", 400),
    ] {
        let mut client = pair.sidecar.connect();
        client.send(start);
        let response = client.response().expect_error(status, "bad_head");
        assert_eq!(response.header("connection"), Some("close"), "{start:?}");
        client.expect_closed();
    }
    expect_healthy(&pair);
}

#[test]
fn chunk_extensions_and_trailers_alone_are_no_progress() {
    let pair = Pair::start(&["--body-timeout=1s"]);
    let target = pair.prefill.host_port();
    let routing = [(PREFILLER, target.as_str())];
    for (headers, path) in [(&routing[..], CHAT), (&[], CHAT), (&[], "/echo")] {
        for start in ["3;", "3\r\n{ }\r\n0\r\nX: "] {
            let mut client = pair.sidecar.connect();
            let mut bytes = crate::client::head("POST", path, headers);
            bytes.extend(format!("Transfer-Encoding: chunked\r\n\r\n{start}").into_bytes());
            let since = Instant::now();
            client.send(&bytes);
            let arrived =
                |client: &Client| rustix::io::ioctl_fionread(client.socket()).unwrap() > 0;
            let is_slow = || since.elapsed() < Duration::from_secs(20);
            while is_slow() && !arrived(&client) && client.try_send("x") {
                poll_interval();
            }
            assert!(arrived(&client), "{path}: `{start}` is no progress");
            expect_timeout(&mut client, since, 408, "body_timeout");
        }
    }
    expect_healthy(&pair);
    expect_drained(&pair.sidecar);
}

#[test]
fn an_upload_without_progress_times_out() {
    let pair = Pair::start(&["--body-timeout=1s"]);
    let target = pair.prefill.host_port();
    for routed in [true, false] {
        let mut client = pair.sidecar.connect();
        let routing = [(PREFILLER, target.as_str())];
        let headers = if routed { &routing[..] } else { &[] };
        let mut bytes = crate::client::head("POST", CHAT, headers);
        bytes.extend_from_slice(b"Content-Length: 400000000\r\n\r\n{\"a\":");
        let since = Instant::now();
        client.send(&bytes);
        // Progress extends the limit. Of a body that is kept, single bytes are none.
        let piece = " ".repeat(if routed { 16 * 1024 } else { 1 });
        let mut last = Instant::now();
        let mut gap_max = Duration::ZERO;
        while since.elapsed() < Duration::from_millis(1500) {
            client.try_send(&piece);
            gap_max = gap_max.max(last.elapsed());
            last = Instant::now();
            poll_interval();
        }
        let took = expect_timeout(&mut client, last, 408, "body_timeout");
        // An early timeout is acceptable only if this process was not scheduled for that long.
        let is_early = took < Duration::from_millis(900) && gap_max < Duration::from_millis(500);
        assert!(!is_early, "{took:?}");
    }
    let aborted = pair
        .decode
        .wait_counters(crate::client::DEADLINE, |counters| counters.aborted == 1);
    assert!(aborted.is_some(), "the decoder still waits for the upload");
    assert!(pair.prefill.requests().is_empty());
    expect_healthy(&pair);
    expect_drained(&pair.sidecar);
    pair.sidecar.expect_sound();
}

#[test]
fn an_idle_connection_is_closed() {
    let pair = Pair::start(&["--keepalive-timeout=300ms"]);
    let mut never_used = pair.sidecar.connect();
    let mut used = pair.sidecar.connect();
    used.ask("GET", "/health", &[], b"").expect(200);
    let since = Instant::now();
    never_used.expect_closed();
    used.expect_closed();
    let took = since.elapsed();
    assert!(took > Duration::from_millis(150), "{took:?}");
    eprintln!("idle connections closed after {took:?}");
    expect_drained(&pair.sidecar);
}

#[test]
fn a_client_that_does_not_read_times_out() {
    let pair = Pair::start(&["--client-stall-timeout=300ms"]);
    let (_, body) = ask_for(4_000_000, true);
    let mut client = pair.sidecar.connect();
    client.send(request("POST", CHAT, &[], body.as_bytes()));
    let stalled = [("code", "client_stalled")];
    pair.sidecar
        .wait_metric("ringside_errors_total", &stalled, 1.0);
    let aborted = pair
        .decode
        .wait_counters(crate::client::DEADLINE, |counters| counters.aborted == 1);
    assert!(aborted.is_some(), "the decoder still writes");
    // Buffered bytes may still arrive, but the response must not look complete.
    let response = client.response();
    assert_ne!(response.end, crate::client::End::Complete);
    expect_drained(&pair.sidecar);
}

#[test]
fn a_stalled_http_1_0_client_receives_no_complete_response() {
    let pair = Pair::start(&["--client-stall-timeout=300ms"]);
    let (_, body) = ask_for(4_000_000, true);
    let bytes = String::from_utf8(request("POST", CHAT, &[], body.as_bytes())).unwrap();
    let mut client = pair.sidecar.connect();
    client.send(bytes.replacen("HTTP/1.1", "HTTP/1.0", 1));
    let stalled = [("code", "client_stalled")];
    pair.sidecar
        .wait_metric("ringside_errors_total", &stalled, 1.0);
    let response = client.response();
    assert_eq!(
        response.end,
        crate::client::End::Reset,
        "{:?}",
        response.framing
    );
}

#[test]
fn pipelined_requests_get_their_responses_in_order() {
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    let mut all = Vec::new();
    let mut prompts = Vec::new();
    for nth in 0..30 {
        let (prompt, body) = ask_for(3, nth % 3 == 0);
        let routing = [(PREFILLER, target.as_str())];
        let headers = if nth % 2 == 0 { &routing[..] } else { &[] };
        all.extend(request("POST", CHAT, headers, body.as_bytes()));
        prompts.push(prompt);
    }
    let mut client = pair.sidecar.connect();
    client.send(&all);
    for prompt in &prompts {
        crate::harness_more::expect_text(&client.response().expect(200), prompt, 3);
    }
    expect_handoffs_sound(&pair);
}

#[test]
fn many_abandoned_connections_leave_no_state() {
    let sidecar_and = Pair::start(&[]);
    let sidecar: &Sidecar = &sidecar_and.sidecar;
    for nth in 0..300 {
        let mut client = sidecar.connect();
        match nth % 4 {
            0 => {}
            1 => client.send("GET /he"),
            2 => client.send("GET /health HTTP/1.1\r\nHost: a\r\n\r\n"),
            _ => client.send("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nabc"),
        }
        if nth % 2 == 0 {
            client.reset();
        }
    }
    expect_drained(sidecar);
    expect_healthy(&sidecar_and);
    sidecar.expect_sound();
}
