//! Runs the `ringside-bench soak` binary against a mock engine, directly and through a relay that
//! corrupts one event. Runs are short, and no assertion depends on speed.

#![expect(
    clippy::unwrap_used,
    reason = "test helpers panic on failure, as tests do"
)]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use mock_engine::{Engine, EngineConfig, Fault};
use serde_json::Value;

const BENCH: &str = env!("CARGO_BIN_EXE_ringside-bench");

fn engine() -> Engine {
    let config = EngineConfig {
        ttft: Duration::from_millis(2),
        itl: Duration::from_millis(5),
        keep_body_bytes: 0,
        keep_json: false,
        log_requests_max: 1_000,
        ..EngineConfig::default()
    };
    Engine::start(config, 0).unwrap()
}

fn soak(proxy: SocketAddr, more: &[&str]) -> Output {
    let proxy = format!("http://{proxy}");
    let base = ["soak", "--seed=1", "--proxy", &proxy];
    Command::new(BENCH).args(base).args(more).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A child process that is killed when this value is dropped.
struct ChildProcess(Child);

impl ChildProcess {
    fn start(program: &str, args: &[&str]) -> Self {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null());
        Self(command.spawn().unwrap())
    }

    fn pid(&self) -> String {
        format!("--pid={}", self.0.id())
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        // Fails if the process has already exited.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_correct_engine_passes_with_aborts_pauses_and_pipelining() {
    let engine = engine();
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let more = [
            "--streams=40",
            "--duration=2500ms",
            "--tokens=20",
            "--abort-share=0.3",
            "--json=-",
            &format!("--path={path}"),
        ];
        let output = soak(engine.addr(), &more);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{said}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let number = |pointer: &str| report.pointer(pointer).unwrap().as_u64().unwrap();
        for pointer in [
            "/streams_complete",
            "/wholes_complete",
            "/pipelined_complete",
            "/chunks",
            "/bytes",
            "/requests_unfinished",
            "/slow_readers",
            "/pauses",
            "/aborts/0/fin",
            "/aborts/0/rst",
            "/aborts/2/fin",
            "/aborts/2/rst",
        ] {
            assert!(number(pointer) > 0, "{pointer}: {report:#}");
        }
        let aborts = report["aborts"].as_array().unwrap();
        let each = aborts
            .iter()
            .flat_map(|abort| [&abort["fin"], &abort["rst"]]);
        let given_up: u64 = each.map(|count| count.as_u64().unwrap()).sum();
        let complete = number("/streams_complete") + number("/wholes_complete");
        let (unfinished, again) = (
            number("/requests_unfinished"),
            number("/requests_sent_again"),
        );
        // Every started request is accounted for.
        assert_eq!(
            number("/requests_begun"),
            complete + given_up + unfinished + again
        );
        assert_eq!(report["verdict"].as_array().unwrap().len(), 0);
        assert!(said.contains("errors       none"), "{said}");
    }
    let counters = engine.wait_counters(Duration::from_secs(20), |counters| {
        counters.connections_open == 0
    });
    assert!(counters.is_some(), "the client left connections open");
}

/// Corruption that a relay applies to one event of a connection's first response.
#[derive(Clone, Copy)]
enum Corruption {
    Drop,
    Double,
    /// The event that arrives first on either of the two corrupted connections passes unchanged. On
    /// the other connection, this event then replaces event number `NTH`.
    Swap,
    /// Flips a bit in the first digit of the response's `id`, which is not part of the text.
    Byte,
}

/// Number of the corrupted event in its connection's first response, counted from 1.
const NTH: usize = 3;
const CHUNK_END: &[u8] = b"\n\n\r\n";

/// Starts a relay to `to` that forwards responses chunk by chunk and applies `spoil` to event
/// [`NTH`] of each of the first two connections. Returns the relay's address.
fn relay(to: SocketAddr, spoil: Corruption) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap();
    let held = Arc::new(Mutex::new(None));
    thread::spawn(move || {
        for (number, client) in listener.incoming().enumerate() {
            let (client, engine) = (client.unwrap(), TcpStream::connect(to).unwrap());
            let (mut from, mut up) = (client.try_clone().unwrap(), engine.try_clone().unwrap());
            thread::spawn(move || std::io::copy(&mut from, &mut up));
            let spoil = (number < 2).then_some(spoil);
            let held = Arc::clone(&held);
            thread::spawn(move || pass(engine, client, spoil, &held));
        }
    });
    addr
}

fn pass(
    mut from: TcpStream,
    mut to: TcpStream,
    mut spoil: Option<Corruption>,
    held: &Mutex<Option<Vec<u8>>>,
) {
    let (mut bytes, mut buffer, mut events) = (Vec::new(), [0; 65_536], 0);
    while let Ok(len @ 1..) = from.read(&mut buffer) {
        bytes.extend_from_slice(&buffer[..len]);
        let ends = |bytes: &[u8]| {
            let at = bytes
                .windows(CHUNK_END.len())
                .position(|at| at == CHUNK_END);
            at.map(|at| at + CHUNK_END.len())
        };
        while let Some(end) = ends(&bytes) {
            let mut chunk: Vec<u8> = bytes.drain(..end).collect();
            events += 1;
            if events == NTH {
                chunk = match spoil.take() {
                    None => chunk,
                    Some(Corruption::Drop) => Vec::new(),
                    Some(Corruption::Double) => chunk.repeat(2),
                    Some(Corruption::Swap) => {
                        held.lock().unwrap().replace(chunk.clone()).unwrap_or(chunk)
                    }
                    Some(Corruption::Byte) => {
                        let id = b"\"id\":\"";
                        let at = chunk.windows(id.len()).position(|at| at == id).unwrap();
                        chunk[at + id.len()] ^= 1;
                        chunk
                    }
                };
            }
            if to.write_all(&chunk).is_err() {
                return;
            }
        }
        // The terminating chunk, or a complete response that is not chunked.
        if !bytes.starts_with(b"HTTP/1.1 200 OK\r\n") || bytes.ends_with(b"}") {
            let sent = to.write_all(&bytes);
            bytes.clear();
            if sent.is_err() {
                return;
            }
        }
    }
}

#[test]
fn a_corrupted_event_is_detected() {
    let engine = engine();
    for (spoil, kind, expected, came) in [
        (Corruption::Drop, "lost or out of order", "`t2-", "`t3-"),
        (
            Corruption::Double,
            "doubled or out of order",
            "`t3-",
            "`t2-",
        ),
        (Corruption::Swap, "foreign", "`t2-", "`t2-"),
        (Corruption::Byte, "changed", "in the events before", "got {"),
    ] {
        let proxy = relay(engine.addr(), spoil);
        let more = [
            "--streams=6",
            "--duration=1500ms",
            "--tokens=30",
            "--abort-share=0",
        ];
        let output = soak(proxy, &more);
        let (table, said) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(1), "{table}");
        assert!(table.contains(&format!(" {kind}")), "{table}");
        let line = said.lines().find(|line| line.contains("stream ")).unwrap();
        for part in [": token ", " of 30: ", "request ", kind, expected, came] {
            assert!(line.contains(part), "{part}: {said}");
        }
    }
}

#[test]
fn failures_of_the_proxy_are_named() {
    for (fault, part) in [
        (
            Fault::TruncateMidBody { after_events: 2 },
            "cut: after token 2: the connection ended before the response was complete",
        ),
        (
            Fault::ResetMidBody { after_events: 2 },
            "connection: after token",
        ),
        (
            Fault::ErrorMidStream { after_events: 2 },
            "refused: token 2 of 9: {\"message\":\"EngineCore",
        ),
        (
            Fault::Status {
                code: 503,
                body: "busy".to_owned(),
                content_type: "text/plain".to_owned(),
            },
            "refused: expected status 200, got 503, no stream: busy",
        ),
    ] {
        let engine = engine();
        engine.fault(fault, 1);
        let more = [
            "--streams=1",
            "--duration=1s",
            "--tokens=9",
            "--abort-share=0",
        ];
        let output = soak(engine.addr(), &more);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{part}");
        assert!(said.contains("1 requests failed"), "{said}");
        assert!(said.contains(part), "{part}: {said}");
    }
}

#[test]
fn a_refused_connection_ends_the_run_early() {
    let nobody = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let output = soak(nobody, &["--streams=5", "--duration=1h"]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        said.contains(&format!("cannot connect to {nobody}")),
        "{said}"
    );
}

#[test]
fn growth_and_exit_of_the_process_are_detected() {
    let engine = engine();
    let run = |stand: &ChildProcess, more: &[&str]| {
        let base = ["--streams=4", "--duration=2500ms", "--tokens=10"];
        soak(engine.addr(), &[&base[..], &[&*stand.pid()], more].concat())
    };
    let still = ChildProcess::start("sleep", &["600"]);
    let output = run(&still, &["--progress"]);
    let table = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(table.matches(": flat (at most").count(), 2, "{table}");
    assert!(table.contains("afterwards"), "{table}");

    // The limit on virtual memory ends the process if nothing else does.
    let script = "ulimit -v 2000000; x=$(head -c 200000 /dev/zero | tr '\\0' x); \
                  while :; do y=$y$x; done";
    let grows = ChildProcess::start("sh", &["-c", script]);
    let output = run(&grows, &[]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("the process grows: resident set"), "{said}");
    assert!(text(&output.stdout).contains("NOT FLAT"));

    let ends = ChildProcess::start("sleep", &["1"]);
    let output = run(&ends, &[]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("cannot read the process"), "{said}");

    let output = soak(engine.addr(), &["--duration=2s", "--pid=4294967295"]);
    assert_eq!(output.status.code(), Some(3));
}
