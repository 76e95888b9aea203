//! Startup, drain and shutdown: signals, exit codes, health pages and the access log. A panic in
//! one session must not affect another session.

use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use mock_engine::{Fault, expected_text};
use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::client::{Client, End, Response, request};
use crate::harness::{
    CHAT, PREFILLER, Pair, Sidecar, free_ports, poll_interval, ringside, run_to_exit, sha256,
    wait_for,
};
use crate::harness_more::{
    Driver, ask_for, expect_drained, expect_handoffs_sound, expect_text, pair_on, split_request,
    text_of, wait_descriptors,
};

/// Sends a split request for a stream of that many tokens. Returns the client and the prompt.
///
/// Callers must take the framing of the response from its head: on a loaded machine, the whole
/// response may arrive together and be relayed with a `Content-Length`.
fn begin_stream(pair: &Pair, tokens: u32) -> (Client, String) {
    let (prompt, body) = ask_for(tokens, true);
    let mut client = pair.sidecar.connect();
    client.send(split_request(pair, &body));
    (client, prompt)
}

fn refuses(port: u16) -> bool {
    std::net::TcpStream::connect(("127.0.0.1", port)).is_err()
}

#[test]
fn sigterm_lets_streams_finish() {
    sigterm_lets_streams_finish_on(Driver::Ring);
}

#[test]
fn sigterm_lets_streams_finish_on_epoll() {
    sigterm_lets_streams_finish_on(Driver::Epoll);
}

fn sigterm_lets_streams_finish_on(driver: Driver) {
    let mut pair = pair_on(
        driver,
        &[],
        |_| {},
        |decode| decode.itl = Duration::from_millis(10),
    );
    let mut streams: Vec<_> = (0..12).map(|_| begin_stream(&pair, 60)).collect();
    let heads: Vec<_> = streams
        .iter_mut()
        .map(|(client, _)| client.head())
        .collect();
    let mut idle = pair.sidecar.connect();
    idle.ask("GET", "/health", &[], b"").expect(200);
    let mut untouched = pair.sidecar.connect();
    let since = Instant::now();
    pair.sidecar.terminate();
    idle.expect_closed();
    untouched.expect_closed();
    assert!(
        since.elapsed() < Duration::from_millis(500),
        "idle connections must be closed immediately"
    );
    let port = pair.sidecar.port;
    wait_for("new connections to be refused", || {
        refuses(port).then_some(())
    });
    for ((client, prompt), head) in streams.iter_mut().zip(heads) {
        expect_text(&rest_of(client, head), prompt, 60);
    }
    let last = Instant::now();
    // The connection is closed after its stream has finished.
    for (client, _) in &mut streams {
        client.expect_closed();
    }
    let status = pair.sidecar.wait_exit();
    assert_eq!(status.code(), Some(0));
    let took = last.elapsed();
    assert!(
        took < Duration::from_secs(1),
        "{took:?} after the last stream"
    );
    eprintln!("{driver:?}: exit {took:?} after the last stream");
}

#[test]
fn drain_settle_keeps_accepting_while_health_returns_503() {
    let mut pair = Pair::start(&["--drain-settle=1s"]);
    let health = |sidecar: &Sidecar| sidecar.get("/health", &[]).status;
    assert_eq!(health(&pair.sidecar), 200);
    let ready = pair.sidecar.admin("/readyz").unwrap();
    assert_eq!(ready.status, 200);
    let since = Instant::now();
    pair.sidecar.terminate();
    wait_for("/health to return 503", || {
        (health(&pair.sidecar) == 503).then_some(())
    });
    let ready = pair.sidecar.admin("/readyz").unwrap();
    assert_eq!(ready.status, 503, "{}", ready.text());
    assert_eq!(pair.sidecar.admin("/livez").unwrap().status, 200);
    // New requests are still served.
    let (prompt, body) = ask_for(4, true);
    expect_text(&pair.post(CHAT, &body).expect(200), &prompt, 4);
    let port = pair.sidecar.port;
    wait_for("the settle period to end", || refuses(port).then_some(()));
    let took = since.elapsed();
    assert!(took > Duration::from_millis(800), "{took:?}");
    assert_eq!(pair.sidecar.wait_exit().code(), Some(0));
}

#[test]
fn responses_during_a_drain_have_connection_close() {
    let mut pair = Pair::start(&[]);
    pair.prefill.fault(Fault::StallBeforeHead, 1);
    // A request that keeps the process running, and one whose head is incomplete.
    let mut held = pair.sidecar.connect();
    held.send(split_request(&pair, &ask_for(4, true).1));
    let responding = |log: &[mock_engine::Seen]| !log.is_empty();
    pair.prefill
        .wait_for(crate::client::DEADLINE, responding)
        .unwrap();
    let mut half = pair.sidecar.connect();
    half.send("GET /health HTTP/1.1\r\nHo");
    let mut other = pair.sidecar.connect();
    other.ask("GET", "/health", &[], b"").expect(200);
    pair.sidecar
        .wait_metric("ringside_client_connections", &[], 3.0);
    pair.sidecar.terminate();
    other.expect_closed();
    half.send("st: a\r\n\r\n");
    let response = half.response();
    assert_eq!(
        (response.status, response.header("connection")),
        (503, Some("close"))
    );
    half.expect_closed();
    drop(held);
    assert_eq!(pair.sidecar.wait_exit().code(), Some(0));
}

/// Checks that two requests that a drain has cut are logged. monoio drops its tasks only after the
/// end of the shard has been reported.
fn expect_two_cut(pair: &Pair, path: &std::path::Path) {
    pair.sidecar.wait_stderr("2 open requests were cut");
    for line in access_lines(path, 2) {
        assert_eq!(line["status"], 200, "{line}");
        assert_eq!(line["end"], "RS", "{line}");
        assert_eq!(line["reason"], "drained", "{line}");
    }
}

#[test]
fn drain_timeout_aborts_running_streams() {
    let path = std::env::temp_dir().join(format!("ringside-cut-{}.log", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let flag = format!("--access-log={}", path.display());
    let mut pair = Pair::with(
        &["--drain-timeout=500ms", &flag],
        |_| {},
        |decode| decode.itl = Duration::from_millis(50),
    );
    let (mut client, _) = begin_stream(&pair, 10_000);
    assert_eq!(client.head().status, 200);
    // A response that is delimited by the end of its connection must not look complete either.
    let bytes = split_request(&pair, &ask_for(10_000, true).1);
    let mut old = pair.sidecar.connect();
    old.send(
        String::from_utf8(bytes)
            .unwrap()
            .replacen("HTTP/1.1", "HTTP/1.0", 1),
    );
    assert_eq!(old.head().status, 200);
    let since = Instant::now();
    pair.sidecar.terminate();
    let status = pair.sidecar.wait_exit();
    let took = since.elapsed();
    assert!(
        took > Duration::from_millis(400) && took < Duration::from_secs(3),
        "{took:?}"
    );
    assert_eq!(status.code(), Some(0));
    if !cfg!(feature = "monoio") {
        expect_two_cut(&pair, &path);
    }
    std::fs::remove_file(&path).unwrap();
    let (_, end) = client.body(crate::client::Framing::Chunked);
    assert_ne!(end, End::Complete);
    let (_, end) = old.rest();
    assert_eq!(end, End::Reset, "a truncated response looks complete");
    let gone = |log: &[mock_engine::Seen]| log.iter().all(|seen| seen.state.is_aborted());
    pair.decode.wait_for(crate::client::DEADLINE, gone).unwrap();
}

#[test]
fn a_second_sigterm_exits_immediately() {
    let mut pair = Pair::start(&[]);
    pair.decode.fault(Fault::StallBeforeHead, 1);
    let (_client, _) = begin_stream(&pair, 4);
    let responding = |log: &[mock_engine::Seen]| !log.is_empty();
    pair.decode
        .wait_for(crate::client::DEADLINE, responding)
        .unwrap();
    pair.sidecar.terminate();
    pair.sidecar.wait_stderr("draining");
    assert_eq!(pair.sidecar.terminate_again().code(), Some(0));
    let text = pair.sidecar.wait_stderr("ended: cut");
    assert!(text.contains("second signal received"), "{text}");
}

/// Some supervisors send several signals at the same time.
#[test]
fn signals_at_the_same_time_are_one() {
    let mut pair = Pair::start(&[]);
    pair.decode.fault(Fault::Hold, 1);
    let (mut client, _) = begin_stream(&pair, 4);
    let responding = |log: &[mock_engine::Seen]| !log.is_empty();
    pair.decode
        .wait_for(crate::client::DEADLINE, responding)
        .unwrap();
    for signal in [Signal::INT, Signal::TERM, Signal::TERM] {
        kill_process(pair.sidecar.pid(), signal).unwrap();
    }
    pair.sidecar.wait_stderr("draining");
    pair.decode.release();
    client.response().expect(200);
    assert_eq!(pair.sidecar.wait_exit().code(), Some(0));
    let text = pair
        .sidecar
        .wait_stderr("ended: drained requests=1 failed=0");
    assert!(!text.contains("second signal"), "{text}");
}

/// A second signal cuts open requests even if the shards still accept connections.
#[test]
fn a_second_sigterm_during_the_settle_time_cuts_requests() {
    let mut pair = Pair::with(
        &["--drain-settle=60s"],
        |_| {},
        |decode| decode.itl = Duration::from_millis(50),
    );
    let (mut client, _) = begin_stream(&pair, 10_000);
    assert_eq!(client.head().status, 200);
    pair.sidecar.terminate();
    pair.sidecar.wait_stderr("draining");
    assert_eq!(pair.sidecar.terminate_again().code(), Some(0));
    if !cfg!(feature = "monoio") {
        // monoio drops its tasks only after the end of the shard has been reported.
        pair.sidecar.wait_stderr("1 open requests were cut");
    }
    let (_, end) = client.body(crate::client::Framing::Chunked);
    assert_ne!(end, End::Complete);
}

#[test]
fn exit_codes_distinguish_kinds_of_errors() {
    let (code, text) = run_to_exit(&["sidecar", "--no-such-flag"]);
    assert_eq!(code, 2, "{text}");
    let (code, text) = run_to_exit(&["sidecar", "--secure-proxy=false", "--connect-timeout=soon"]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("connect-timeout"), "{text}");
    // A port in use, for each listener.
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken_port = taken.local_addr().unwrap().port();
    let free = free_ports(1);
    for (port, admin) in [
        (taken_port, "off".to_owned()),
        (free, format!("127.0.0.1:{taken_port}")),
    ] {
        let (code, text) = run_to_exit(&[
            "sidecar",
            "--secure-proxy=false",
            &format!("--port={port}"),
            &format!("--admin-address={admin}"),
        ]);
        assert_eq!(code, 4, "{text}");
        assert!(
            text.contains(&format!("port {taken_port} is in use")),
            "{text}"
        );
    }
}

#[test]
fn a_second_sidecar_on_the_same_port_is_refused() {
    let pair = Pair::start(&[]);
    let (code, text) = run_to_exit(&[
        "sidecar",
        "--secure-proxy=false",
        &format!("--port={}", pair.sidecar.port),
        "--admin-address=off",
    ]);
    assert_eq!(code, 4, "{text}");
    for _ in 0..20 {
        let (prompt, body) = ask_for(2, false);
        expect_text(&pair.post(CHAT, &body).expect(200), &prompt, 2);
    }
}

#[test]
fn a_privileged_port_without_permission_exits_with_4() {
    let from = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start");
    let from: u16 = from.unwrap().trim().parse().unwrap();
    if from <= 999 {
        eprintln!("skipped: every port is unprivileged here");
        return;
    }
    let mut command = ringside();
    if rustix::process::geteuid().is_root() {
        // User and group `nobody`. The binary must be readable for them.
        command.uid(65_534).gid(65_534);
    }
    let spawned = command
        .args([
            "sidecar",
            "--secure-proxy=false",
            "--port=999",
            "--admin-address=off",
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    let child = match spawned {
        Ok(child) => child,
        Err(error) => {
            eprintln!("skipped: the binary cannot be started as another user: {error}");
            return;
        }
    };
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{text}");
    assert!(
        text.contains("no permission to listen on port 999"),
        "{text}"
    );
}

#[test]
fn admin_pages_have_the_expected_status_and_content_type() {
    let pair = Pair::start(&[]);
    let page = |path| pair.sidecar.admin(path).unwrap();
    assert_eq!(page("/livez").expect(200).text(), "ok\n");
    assert_eq!(page("/readyz").expect(200).text(), "ok\n");
    let metrics = page("/metrics").expect(200);
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    assert_eq!(metrics.header("content-type"), Some(kind));
    assert!(metrics.text().contains("# TYPE ringside_build_info gauge"));
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let accept = [("accept", kind), ("connection", "close")];
    let metrics = Client::connect(pair.sidecar.admin_port).ask("GET", "/metrics", &accept, b"");
    assert_eq!(metrics.header("content-type"), Some(kind));
    assert!(metrics.text().ends_with("# EOF\n"));
    assert_eq!(page("/nothing").status, 404);
}

/// Waits until the access log has at least `count` lines, and parses them.
fn access_lines(path: &std::path::Path, count: usize) -> Vec<Value> {
    wait_for("the access log", || {
        let text = std::fs::read_to_string(path).ok()?;
        let lines: Vec<_> = text.lines().collect();
        (lines.len() >= count && text.ends_with('\n')).then(|| {
            let parse = |line: &&str| {
                serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
            };
            lines.iter().map(parse).collect()
        })
    })
}

#[test]
fn the_access_log_has_a_json_line_per_request() {
    let path = std::env::temp_dir().join(format!("ringside-access-{}.log", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let flag = format!("--access-log={}", path.display());
    let mut pair = Pair::start(&[&flag]);
    let id = [("x-request-id", "my-request-17")];
    pair.post_with(CHAT, ask_for(2, true).1, &id).expect(200);
    let hostile = [("x-request-id", "quote\"back\\slash")];
    pair.post_with(CHAT, ask_for(2, true).1, &hostile)
        .expect(200);
    let response = pair.sidecar.get("/v1/models", &[]).expect(200);
    let given = response.header("x-request-id").unwrap().to_owned();
    pair.decode.fault(Fault::Garbage, 1);
    pair.sidecar.post(CHAT, ask_for(2, true).1, &[]).expect(502);
    let lines = access_lines(&path, 4);
    let id_of = |line: &Value| line["id"].as_str().map(str::to_owned);
    let ids: Vec<_> = lines.iter().filter_map(id_of).collect();
    assert_eq!(ids[0], "my-request-17");
    assert_eq!(ids[1], "quote\"back\\slash");
    assert_eq!(ids[2], given);
    assert_eq!(lines[3]["status"], 502);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains("question"), "a prompt is in the log: {text}");
    // Records that are still in the rings at shutdown are written.
    pair.post_with(CHAT, ask_for(2, true).1, &[("x-request-id", "the-last")])
        .expect(200);
    pair.sidecar.terminate();
    assert_eq!(pair.sidecar.wait_exit().code(), Some(0));
    let last = access_lines(&path, 5).pop().unwrap();
    assert_eq!(last["id"], "the-last");
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn the_access_log_names_engine_model_and_client() {
    let name = format!("ringside-access-facts-{}.log", std::process::id());
    let path = std::env::temp_dir().join(name);
    let _ = std::fs::remove_file(&path);
    let flag = format!("--access-log={}", path.display());
    let pair = Pair::start(&[&flag]);
    let fields = [
        ("user-agent", "tester/1.0"),
        (
            "traceparent",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        ),
    ];
    pair.post_with(CHAT, ask_for(2, true).1, &fields)
        .expect(200);
    pair.sidecar
        .post(CHAT, ask_for(2, false).1, &fields)
        .expect(200);
    pair.decode.fault(Fault::Garbage, 1);
    pair.sidecar.post(CHAT, "{}", &[]).expect(502);
    let lines = access_lines(&path, 3);
    for (line, is_split) in lines.iter().zip([true, false]) {
        assert_eq!(line["model"], "mock-model", "{line}");
        assert_eq!(line["stream"], is_split);
        assert_eq!(line["agent"], "tester/1.0");
        assert_eq!(line["trace_id"], "0af7651916cd43dd8448eb211c80319c");
        assert_eq!(line["rank"], 0);
        assert_eq!(line["error"], Value::Null);
        assert!(line["client_port"].as_u64().unwrap() > 0);
        assert!(!line["upstream"].as_str().unwrap().is_empty());
        assert_eq!(line["prefill"].is_string(), is_split);
    }
    let failed = &lines[2];
    assert_eq!(failed["error"], "decode_answer", "{failed}");
    for name in ["model", "agent", "trace_id"] {
        assert_eq!(failed[name], Value::Null);
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn a_panic_ends_one_session_and_no_other() {
    if !cfg!(debug_assertions) {
        eprintln!("skipped: this build cannot be made to panic");
        return;
    }
    for driver in [Driver::Ring, Driver::Epoll] {
        let pair = pair_on(
            driver,
            &[],
            |_| {},
            |decode| decode.itl = Duration::from_millis(10),
        );
        let mut streams: Vec<_> = (0..100).map(|_| begin_stream(&pair, 40)).collect();
        let heads: Vec<_> = streams
            .iter_mut()
            .map(|(client, _)| client.head())
            .collect();
        let (_, body) = ask_for(4, true);
        let mut victim = pair.sidecar.connect();
        victim.send(request(
            "POST",
            CHAT,
            &[("x-ringside-test-panic", "1")],
            body.as_bytes(),
        ));
        victim.expect_closed();
        for ((client, prompt), head) in streams.iter_mut().zip(heads) {
            expect_text(&rest_of(client, head), prompt, 40);
        }
        pair.sidecar
            .wait_metric("ringside_session_panics_total", &[], 1.0);
        let (prompt, body) = ask_for(4, true);
        expect_text(&pair.post(CHAT, &body).expect(200), &prompt, 4);
        drop(streams);
        expect_drained(&pair.sidecar);
        expect_handoffs_sound(&pair);
    }
}

/// Reads the body that follows `head`. Fails unless the response is complete and has status 200.
#[track_caller]
fn rest_of(client: &mut Client, head: crate::client::Head) -> Response {
    let framing = head.framing("POST");
    let (body, end) = client.body(framing);
    let response = Response {
        head,
        framing,
        body,
        end,
    };
    response.expect(200)
}

/// A small random number generator. The soak test must depend only on its seed, not on a clock or a
/// crate.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// Outcomes that the clients of the soak test have observed.
#[derive(Debug, Default)]
struct Tally {
    whole: u32,
    refused: u32,
    cut: u32,
    left: u32,
}

#[test]
fn no_client_receives_the_response_of_another() {
    const CLIENTS: u64 = 64;
    const TIME: Duration = Duration::from_secs(8);
    let pair = Pair::with(
        &["--prefill-max-retries=1", "--prefill-retry-backoff=5ms"],
        |prefill| prefill.ttft = Duration::from_millis(1),
        |decode| decode.itl = Duration::from_micros(200),
    );
    // The first request opens the descriptors that stay open.
    let (_, body) = ask_for(2, true);
    pair.post(CHAT, &body).expect(200);
    let before = crate::harness_more::descriptors(&pair.sidecar);
    let since = Instant::now();
    let stop = || since.elapsed() > TIME;
    let mut total = Tally::default();
    std::thread::scope(|scope| {
        let pair = &pair;
        let clients: Vec<_> = (0..CLIENTS)
            .map(|seed| scope.spawn(move || soak_client(pair, seed, stop)))
            .collect();
        scope.spawn(move || {
            // At most one in eight requests to each engine is affected by a fault, regardless of
            // the request rate.
            let mut random = Random(4711);
            let mut armed = [0, 0];
            while !stop() {
                for (armed, engine) in armed.iter_mut().zip([&pair.prefill, &pair.decode]) {
                    if engine.counters().requests >= *armed + 8 {
                        *armed = engine.counters().requests;
                        engine.fault(random_fault(&mut random), 1);
                    }
                }
                poll_interval();
            }
        });
        for client in clients {
            let tally = client.join().unwrap();
            total.whole += tally.whole;
            total.refused += tally.refused;
            total.cut += tally.cut;
            total.left += tally.left;
        }
    });
    eprintln!("soak: {total:?}");
    assert!(total.whole > 50 && total.left > 10, "{total:?}");
    assert!(total.refused > 0 && total.cut > 0, "{total:?}");
    pair.prefill.clear_faults();
    pair.decode.clear_faults();
    expect_drained(&pair.sidecar);
    pair.sidecar.expect_sound();
    expect_handoffs_sound(&pair);
    // Idle connections to engines reach their maximum age and are closed.
    let idle = [("state", "idle")];
    pair.sidecar
        .wait_metric("ringside_upstream_connections", &idle, 0.0);
    wait_descriptors(&pair.sidecar, before);
    crate::harness_more::expect_healthy(&pair);
}

fn random_fault(random: &mut Random) -> Fault {
    let after_events = u32::try_from(random.below(12)).unwrap();
    match random.below(11) {
        0 => Fault::ResetBeforeHead,
        1 => Fault::CloseBeforeHead,
        2 => Fault::ResetMidBody { after_events },
        3 => Fault::TruncateMidBody { after_events },
        4 => Fault::GarbageAfterResponse,
        5 | 6 => Fault::CloseOnNextRequest,
        7 => Fault::Garbage,
        8 => Fault::NoFraming,
        9 => Fault::Interim { count: 3 },
        _ => Fault::Slow {
            chunk_bytes: 40,
            delay: Duration::from_micros(100),
        },
    }
}

/// Runs one client, which sends requests until `stop` returns true, and returns the numbers of
/// outcomes. Fails if a complete response or the text of a truncated stream does not belong to its
/// prompt, or if a response is neither a 200 nor a complete 5xx response.
fn soak_client(pair: &Pair, seed: u64, stop: impl Fn() -> bool) -> Tally {
    let mut random = Random(seed);
    let mut tally = Tally::default();
    let target = pair.prefill.host_port();
    let mut kept: Option<Client> = None;
    while !stop() {
        let tokens = 1 + u32::try_from(random.below(30)).unwrap();
        let (prompt, body) = ask_for(tokens, random.below(2) == 0);
        let routing = [(PREFILLER, target.as_str())];
        let headers = if random.below(4) > 0 {
            &routing[..]
        } else {
            &[]
        };
        let bytes = request("POST", CHAT, headers, body.as_bytes());
        let mut client = kept.take().unwrap_or_else(|| pair.sidecar.connect());
        if random.below(6) == 0 {
            // Disconnect after a random part of the request.
            let cut = usize::try_from(random.below(bytes.len() as u64 + 1)).unwrap();
            client.try_send(&bytes[..cut]);
            for _ in 0..random.below(4) {
                poll_interval();
            }
            if random.below(2) == 0 {
                client.reset();
            }
            tally.left += 1;
            continue;
        }
        if !client.try_send(&bytes) {
            continue;
        }
        // A kept connection may have been closed after a truncated response.
        let Ok(head) = client.try_head() else {
            continue;
        };
        let framing = head.framing("POST");
        let (body, end) = client.body(framing);
        let closes = head.header("connection") == Some("close");
        let response = Response {
            head,
            framing,
            body,
            end,
        };
        match (response.status, response.end) {
            (200, End::Complete) => {
                expect_text(&response, &prompt, tokens);
                tally.whole += 1;
                if !closes {
                    kept = Some(client);
                }
            }
            (200, _) => {
                let want = expected_text(&sha256(prompt.as_bytes()), tokens);
                if response.framing == crate::client::Framing::Chunked {
                    let have = cut_text(&response);
                    assert!(want.starts_with(&have), "{have} is not a prefix of {want}");
                }
                tally.cut += 1;
            }
            (500..=599, End::Complete) => tally.refused += 1,
            other => panic!("{other:?}: {:?} {}", response.head, response.text()),
        }
    }
    tally
}

/// Returns the text of the complete events of a truncated stream. It is empty if the response is
/// not a stream.
fn cut_text(response: &Response) -> String {
    let is_stream = response
        .header("content-type")
        .is_some_and(|kind| kind.contains("event-stream"));
    if !is_stream {
        return String::new();
    }
    let text = response.text();
    let whole = text.rfind("\n\n").map_or("", |at| &text[..at]);
    let mut response = response.clone();
    response.body = whole.as_bytes().to_vec();
    text_of(&response)
}
