//! Runs the `ringside-bench overhead` binary against mock engines, directly and through a relay
//! that adds a known delay. Delays are in milliseconds so that a busy machine does not matter, and
//! no assertion depends on speed.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test helpers panic on failure, as tests do"
)]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use mock_engine::{Engine, EngineConfig, Fault};
use serde_json::Value;

const BENCH: &str = env!("CARGO_BIN_EXE_ringside-bench");

fn engine(tokens: u32, itl: Duration) -> Engine {
    let config = EngineConfig {
        tokens,
        itl,
        ..EngineConfig::default()
    };
    Engine::start(config, 0).unwrap()
}

fn url(addr: SocketAddr) -> String {
    format!("http://{addr}")
}

fn bench(direct: SocketAddr, proxy: SocketAddr, more: &[&str]) -> Output {
    let base = [
        "overhead",
        "--seed=1",
        "--timeout=20s",
        "--warmup=2",
        "--allow-busy",
    ];
    let (direct, proxy) = (url(direct), url(proxy));
    Command::new(BENCH)
        .args(base)
        .args(["--direct", &direct, "--proxy", &proxy])
        .args(more)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs `ringside-bench overhead --json=-` with the further arguments `more`. Returns the JSON
/// report and the exit code.
fn report(direct: SocketAddr, proxy: SocketAddr, more: &[&str]) -> (Value, i32) {
    let output = bench(direct, proxy, &[&["--json=-", "--quiet"], more].concat());
    let report = serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", text(&output.stderr)));
    (report, output.status.code().unwrap())
}

/// Returns the estimate of the overhead at `at` (such as `p50`) and the lower end of its interval,
/// in milliseconds. `metric` is an index into the `metrics` of the JSON report.
fn overhead_ms(report: &Value, metric: usize, at: &str) -> (f64, f64) {
    let found = &report["metrics"][metric]["proxies"][0]["overhead"][at];
    let ms = |name: &str| found[name].as_f64().unwrap() / 1e6;
    (ms("estimate_ns"), ms("low_ns"))
}

/// Starts a relay to `to` that forwards responses chunk by chunk, and returns its address. It
/// delays the head with the first chunk by `first` and each later chunk by `each`.
fn relay(to: SocketAddr, first: Duration, each: Duration) -> SocketAddr {
    relay_both_ways(to, NONE, first, each)
}

/// Like `relay`, and also delays each part of a request by `ask`.
fn relay_both_ways(to: SocketAddr, ask: Duration, first: Duration, each: Duration) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    thread::spawn(move || {
        for client in listener.incoming() {
            let (client, engine) = (client.unwrap(), TcpStream::connect(to).unwrap());
            for stream in [&client, &engine] {
                stream.set_nodelay(true).unwrap();
            }
            let both = (client.try_clone().unwrap(), engine.try_clone().unwrap());
            thread::spawn(move || pass(both.0, both.1, ask, ask));
            thread::spawn(move || pass(engine, client, first, each));
        }
    });
    addr
}

#[expect(
    clippy::disallowed_methods,
    reason = "the benchmark measures this delay"
)]
fn pass(mut from: TcpStream, mut to: TcpStream, first: Duration, each: Duration) {
    const CHUNK_END: &[u8] = b"\n\n\r\n";
    let mut buffer = [0; 65_536];
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        let mut rest = &buffer[..len];
        while !rest.is_empty() {
            let end = rest.windows(CHUNK_END.len()).position(|at| at == CHUNK_END);
            let (chunk, more) = rest.split_at(end.map_or(rest.len(), |at| at + CHUNK_END.len()));
            let delay = if chunk.starts_with(b"HTTP/1.1") {
                first
            } else {
                each
            };
            if delay > NONE {
                thread::sleep(delay);
            }
            if to.write_all(chunk).is_err() {
                return;
            }
            rest = more;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

const NONE: Duration = Duration::ZERO;

#[test]
fn a_delay_per_request_is_measured_in_the_first_token() {
    let engine = engine(4, Duration::from_millis(1));
    let relay = relay(engine.addr(), Duration::from_millis(20), NONE);
    let (report, code) = report(engine.addr(), relay, &["--requests=30", "--max-tokens=4"]);
    assert_eq!(code, 0);
    for at in ["p50", "mean"] {
        let (estimate, low) = overhead_ms(&report, 0, at);
        assert!((15.0..500.0).contains(&estimate), "{at}: {estimate}");
        assert!(low > 0.0 && low <= estimate, "{at}: {low}");
    }
    let (total, _) = overhead_ms(&report, 2, "p50");
    assert!((10.0..500.0).contains(&total), "{total}");
    assert_eq!(report["answers"]["wrong"], false);
    assert_eq!(report["answers"]["numbered"], 60);
    assert_eq!(report["rounds_complete"], 30);
}

#[test]
fn several_proxies_are_measured_in_the_same_rounds() {
    let engine = engine(3, NONE);
    let slow = |ms| relay(engine.addr(), Duration::from_millis(ms), NONE);
    let (near, far) = (url(slow(15)), url(slow(60)));
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (json, html) = (folder.join("several.json"), folder.join("several.html"));
    let output = Command::new(BENCH)
        .args([
            "overhead",
            "--allow-busy",
            "--seed=1",
            "--warmup=2",
            "--requests=20",
            "--max-tokens=3",
        ])
        .args([
            &format!("--direct={}", url(engine.addr())),
            &format!("--proxy=near={near}"),
            &format!("--proxy=far={far}"),
            &format!("--proxy=none={}", url(engine.addr())),
            &format!("--json={}", json.display()),
            &format!("--html={}", html.display()),
        ])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    for part in [
        "  near ",
        "  far ",
        "  none ",
        "    minus near",
        "    ratio",
    ] {
        assert!(table.contains(part), "{part} is missing:\n{table}");
    }
    let report: Value = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    let ttft = &report["metrics"][0]["proxies"];
    let ms = |value: &Value| value["p50"]["estimate_ns"].as_f64().unwrap() / 1e6;
    assert!(
        ms(&ttft[1]["overhead"]) > ms(&ttft[0]["overhead"]),
        "{ttft}"
    );
    assert!(
        (20.0..500.0).contains(&ms(&ttft[1]["minus_first"])),
        "{ttft}"
    );
    assert!(ttft[0]["minus_first"].is_null());
    assert!(ms(&ttft[2]["minus_first"]) < 0.0, "{ttft}");
    // Every round has one request to each side, and the rows name them.
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 80);
    for side in ["direct", "near", "far", "none"] {
        let own = rows.iter().filter(|row| row["side"] == side);
        let rounds: Vec<u64> = own.map(|row| row["round"].as_u64().unwrap()).collect();
        assert_eq!(rounds, (0..20).collect::<Vec<_>>(), "{side}");
    }
    let orders: std::collections::BTreeSet<String> = rows
        .chunks(4)
        .map(|round| round.iter().map(|row| row["side"].to_string()).collect())
        .collect();
    assert!(orders.len() > 3, "{orders:?}");
    let page = std::fs::read_to_string(html).unwrap();
    assert!(page.contains("first token, p50, far"), "{page}");
}

#[test]
fn a_delay_per_chunk_is_measured_in_the_gaps() {
    let engine = engine(4, NONE);
    let relay = relay(engine.addr(), NONE, Duration::from_millis(12));
    let more = [
        "--requests=20",
        "--max-tokens=4",
        "--path=/v1/chat/completions",
    ];
    let (report, code) = report(engine.addr(), relay, &more);
    assert_eq!(code, 0);
    let (gap, low) = overhead_ms(&report, 1, "p50");
    assert!((8.0..500.0).contains(&gap), "{gap}");
    assert!(low > 0.0, "{low}");
    assert_eq!(report["metrics"][1]["proxies"][0]["values"]["count"], 60);
}

#[test]
fn the_gate_has_an_exit_code() {
    let engine = engine(2, NONE);
    // Large enough that scheduling delays on a busy machine cannot hide it.
    let slow = relay(engine.addr(), Duration::from_millis(300), NONE);
    let run = ["--concurrency=15", "--requests=15", "--max-tokens=2"];
    let held = [&run[..], &["--max-overhead-p99=1h"]].concat();
    let (report, code) = report(engine.addr(), slow, &held);
    assert_eq!((code, &report["gate"]["verdict"]), (0, &"held".into()));

    let exceeded = [&run[..], &["--max-overhead-p99=1ms"]].concat();
    let output = bench(engine.addr(), slow, &exceeded);
    let (table, said) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1));
    assert!(table.contains("gate: --max-overhead-p99 1.00 ms: exceeded"));
    assert!(
        said.contains("gate not met: --max-overhead-p99: the proxy adds +"),
        "{said}"
    );
    assert!(
        said.contains("the p99 of the time to first token"),
        "{said}"
    );
    assert!(said.contains("the limit is 1.00 ms"), "{said}");
    // Standard error is a pipe here, so the first line of progress is due after ten seconds.
    assert!(!said.contains("left"), "{said}");
}

/// Some members of the JSON report.
const MEMBERS: [&str; 26] = [
    "/schema",
    "/date",
    "/machine/cpu",
    "/machine/host",
    "/connections/1/server_field",
    "/busy/before/cpus_used",
    "/busy/during/0/cpus_used",
    "/machine/kernel",
    "/parameters/load/rate",
    "/parameters/seed",
    "/parameters/header_names/0",
    "/method/resamples",
    "/rounds_complete",
    "/metrics/0/direct/p99_ns",
    "/metrics/1/proxies/0/values/histogram_ns/0/1",
    "/metrics/2/proxies/0/overhead/mean/low_ns",
    "/metrics/0/proxies/0/overhead/p50/resolved",
    "/answers/sides/1/events",
    "/failures/0/count",
    "/connections/0/connect_p50_ns",
    "/client/planned_to_actual_send/p99_ns",
    "/client/busy_share",
    "/gate",
    "/warnings/0",
    "/rows/79/ttft_ns",
    "/rows_left_out",
];

#[test]
fn reports_are_complete_and_self_contained() {
    let engine = engine(3, NONE);
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let (json, html) = (folder.join("reports.json"), folder.join("reports.html"));
    let output = bench(
        engine.addr(),
        engine.addr(),
        &[
            "--requests=40",
            "--max-tokens=3",
            "--rate=500",
            "--unique-prompts",
            "--model=<script>alert(1)</script>",
            "--header=authorization: Bearer secret-word",
            &format!("--json={}", json.display()),
            &format!("--html={}", html.display()),
        ],
    );
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let table = text(&output.stdout);
    for part in [
        "p50",
        "added",
        "bootstrap over 40 rounds",
        "client:",
        "open loop",
    ] {
        assert!(table.contains(part), "{part} is missing:\n{table}");
    }
    let written = std::fs::read_to_string(json).unwrap();
    assert!(!written.contains("secret-word"));
    let report: Value = serde_json::from_str(&written).unwrap();
    for pointer in MEMBERS {
        assert!(report.pointer(pointer).is_some(), "{pointer} is missing");
    }
    assert_eq!(report["metrics"][0]["direct"]["count"], 40);
    let send = &report["client"]["planned_to_actual_send"];
    assert_eq!(send["count"], 84);
    // No request is sent exactly at its planned nanosecond.
    assert!(send["max_ns"].as_u64().unwrap() > 0);
    let page = std::fs::read_to_string(html).unwrap();
    for foreign in [
        "http://", "https://", "href=", "src=", "url(", "@import", "<script",
    ] {
        assert!(!page.contains(foreign), "{foreign}");
    }
    assert!(page.contains("&lt;script&gt;") && page.matches("<svg").count() == 4);
    // Each request reached the engine with a different prompt.
    let prompts = engine.requests().into_iter().filter_map(|seen| seen.json);
    let prompts: Vec<String> = prompts.map(|json| json["prompt"].to_string()).collect();
    let distinct: std::collections::BTreeSet<&String> = prompts.iter().collect();
    assert_eq!((prompts.len(), distinct.len()), (84, 84));
}

#[test]
fn lanes_are_concurrent_and_durations_are_kept() {
    let engine = engine(3, Duration::from_millis(1));
    let more = ["--concurrency=4", "--duration=300ms", "--max-tokens=3"];
    let (report, code) = report(engine.addr(), engine.addr(), &more);
    assert_eq!(code, 0);
    assert!(report["rounds_complete"].as_u64().unwrap() > 0);
    assert!(report["wall_ns"].as_u64().unwrap() >= 300_000_000);
    assert_eq!(report["answers"]["wrong"], false);
    assert_eq!(engine.counters().connections_accepted, 9);
}

#[test]
fn failures_are_counted_and_reported_and_end_with_exit_code_1() {
    let engine = engine(3, NONE);
    let broken = Engine::start(EngineConfig::default(), 0).unwrap();
    let status = |times| {
        broken.fault(
            Fault::Status {
                code: 503,
                body: "{\"error\":\"over\nloaded\"}".to_owned(),
                content_type: "application/json".to_owned(),
            },
            times,
        );
    };
    let more = ["--requests=5", "--max-tokens=3", "--quiet", "--json=-"];
    status(1);
    let output = bench(engine.addr(), broken.addr(), &more);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said.contains("proxy: a warm-up request failed: status 503"),
        "{said}"
    );

    let no_warmup = [&more[..], &["--warmup=0"]].concat();
    let base = [
        "overhead",
        "--allow-busy",
        "--direct",
        &url(engine.addr()),
        "--proxy",
        &url(broken.addr()),
    ];
    for (fault, part) in [
        (None, "status 503: {\"error\":\"over loaded\"}"),
        (Some(Fault::Html), "not an event stream"),
        (
            Some(Fault::ErrorMidStream { after_events: 1 }),
            "reports an error",
        ),
        (
            Some(Fault::TruncateMidBody { after_events: 1 }),
            "ended before the response was complete",
        ),
        (
            Some(Fault::ResetMidBody { after_events: 1 }),
            "connection failed",
        ),
    ] {
        match fault {
            Some(fault) => broken.fault(fault, 1),
            None => status(1),
        }
        let output = Command::new(BENCH)
            .args(base)
            .args(&no_warmup)
            .output()
            .unwrap();
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("1 of 10 requests failed; proxy"), "{said}");
        assert!(said.contains(part), "{part}: {said}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(
            (&report["rounds_complete"], &report["rounds"]),
            (&4.into(), &5.into())
        );
        assert_eq!(report["failures"][1]["count"], 1);
    }
}

#[test]
fn a_lost_event_is_detected() {
    // Two engines that respond to the same prompt, one with a token less.
    let (whole, short) = (engine(5, NONE), engine(4, NONE));
    let more = ["--requests=3", "--max-tokens=9", "--respect-eos"];
    let output = bench(whole.addr(), short.addr(), &more);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said.contains("6 events direct, 5 through the proxy, different text"),
        "{said}"
    );
    let table = text(&output.stdout);
    assert!(table.contains("texts DIFFER in 3 rounds"), "{table}");
}

#[test]
fn missing_servers_files_and_cpus_are_named() {
    let engine = engine(3, NONE);
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    for (direct, proxy, part) in [
        (
            engine.addr(),
            nobody,
            format!("proxy: cannot connect to {nobody}"),
        ),
        (
            nobody,
            engine.addr(),
            format!("direct: cannot request /v1/models from {nobody}"),
        ),
    ] {
        let output = bench(direct, proxy, &["--requests=1"]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1));
        assert!(said.contains(&part), "{said}");
    }
    for (more, code, part) in [
        (&["--json=/nowhere/x.json"][..], 3, "--json: cannot write"),
        (&["--cpu=1023"], 3, "--cpu 1023"),
        (
            &["--requests=500000", "--max-tokens=100"],
            2,
            "gaps that are kept",
        ),
    ] {
        let output = bench(engine.addr(), engine.addr(), more);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert!(said.contains(part), "{said}");
    }
    let https = ["soak", "--proxy=https://a:1"];
    let output = Command::new(BENCH).args(https).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(text(&output.stderr).contains("https is not supported by soak"));
}

#[test]
fn a_large_prompt_is_sent_completely_to_a_slow_reader() {
    let engine = engine(2, NONE);
    // Larger than the socket buffers on the path, and read slowly, so the client must send it in
    // several parts.
    let slow = relay_both_ways(engine.addr(), Duration::from_millis(2), NONE, NONE);
    let more = ["--requests=2", "--max-tokens=2", "--prompt-tokens=1000000"];
    let (report, code) = report(engine.addr(), slow, &more);
    assert_eq!((code, &report["rounds_complete"]), (0, &2.into()));
    let prompt_bytes = report["parameters"]["prompt_bytes"].as_u64().unwrap();
    assert!(prompt_bytes > 4_000_000, "{prompt_bytes}");
    let seen = engine.requests();
    assert_eq!(seen.iter().filter(|seen| seen.json.is_some()).count(), 8);
}

#[test]
fn connections_closed_while_idle_are_reopened() {
    let engine = engine(2, NONE);
    engine.fault_on("/v1/completions", Fault::CloseIdle, u32::MAX);
    let more = ["--requests=20", "--max-tokens=2"];
    let (report, code) = report(engine.addr(), engine.addr(), &more);
    assert_eq!((code, &report["rounds_complete"]), (0, &20.into()));
    for side in 0..2 {
        let found = &report["connections"][side];
        let number = |name: &str| found[name].as_u64().unwrap();
        // The engine closes the connection after each of the 22 responses per side. The client may
        // not notice the last close.
        let again = number("opened_again") + number("requests_sent_again");
        assert!((21..=22).contains(&again), "{found}");
    }
}

#[test]
fn a_connection_closed_while_being_reused_is_not_a_failure() {
    let engine = engine(2, NONE);
    engine.fault_on("/v1/completions", Fault::CloseOnNextRequest, u32::MAX);
    let more = ["--requests=10", "--max-tokens=2"];
    let (report, code) = report(engine.addr(), engine.addr(), &more);
    assert_eq!((code, &report["rounds_complete"]), (0, &10.into()));
    assert!(
        report["connections"][0]["requests_sent_again"]
            .as_u64()
            .unwrap()
            > 0
    );
    assert!(report["warnings"].to_string().contains("sent again"));
}

#[test]
fn a_request_without_progress_fails() {
    let (whole, silent) = (engine(3, NONE), engine(3, NONE));
    silent.fault_on(
        "/v1/completions",
        Fault::StallMidStream { after_events: 1 },
        1,
    );
    let more = [
        "--requests=3",
        "--max-tokens=3",
        "--warmup=0",
        "--timeout=100ms",
    ];
    let (direct, proxy) = (url(whole.addr()), url(silent.addr()));
    let base = [
        "overhead",
        "--allow-busy",
        "--direct",
        &direct,
        "--proxy",
        &proxy,
    ];
    let output = Command::new(BENCH).args(base).args(more).output().unwrap();
    let (table, said) = (text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said.contains("1 of 6 requests failed; proxy: nothing received for 100ms"),
        "{said}"
    );
    assert!(table.contains("2 rounds in"), "{table}");
    assert!(table.contains("FAILED: 1 requests, proxy"), "{table}");
}
