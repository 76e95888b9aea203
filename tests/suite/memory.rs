//! Memory per idle client connection, per quiet tunnel, and per request that waits for a silent
//! engine.

use std::io::Write;

use mock_engine::{Engine, EngineConfig, Fault};

use crate::client::{Client, DEADLINE, request};
use crate::harness::{CHAT, Launch, PREFILLER, Pair, Sidecar, VERSIONS_OFF, is_suite_tls};
use crate::harness_more::{RawEngine, ask_for, expect_drained};

const IDLE_CONNECTIONS: u32 = 4000;
const IDLE_BYTES_MAX: u64 = 1024;
const IDLE_TLS_CONNECTIONS: u32 = 1000;
/// Limit for the memory per idle TLS connection, in bytes: enough for the keys and the state of a
/// TLS session, but not for a buffer.
const IDLE_TLS_BYTES_MAX: u64 = 6 * 1024;
const TUNNELS: u32 = 200;
const MESSAGE_BYTES: usize = 60_000;
const TUNNEL_BYTES_MAX: u64 = 16 * 1024;
const WAITING_REQUESTS: u32 = 500;
const BODY_BYTES: usize = 16 * 1024;
const WAITING_BYTES_MAX: u64 = 8 * 1024 + BODY_BYTES as u64;

/// Returns the resident anonymous memory of the sidecar's process in bytes. It excludes the pages
/// of the binary.
fn anonymous_bytes(sidecar: &Sidecar) -> u64 {
    let pid = sidecar.pid().as_raw_nonzero();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"))
        .unwrap();
    let kib: u64 = line.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    kib * 1024
}

/// Raises the descriptor limit of the test process, which holds the other ends of all connections
/// of the sidecar.
fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

/// Prints the average growth of memory per item, for `count` items and from `before` to `after`
/// bytes. Fails if it exceeds `bytes_max`.
#[track_caller]
fn expect_at_most(what: &str, bytes_max: u64, before: u64, after: u64, count: u32) {
    let each = after.saturating_sub(before) / u64::from(count);
    eprintln!(
        "{what}: {each} bytes each ({count}), {} KiB in all",
        after / 1024
    );
    assert!(
        each <= bytes_max,
        "{what}: {each} bytes each, at most {bytes_max} allowed"
    );
}

/// Runs a few requests first, so that one-time allocations are not measured.
fn warm_up(pair: &Pair) {
    for _ in 0..20 {
        pair.post(CHAT, ask_for(8, true).1).expect(200);
        pair.sidecar.get("/health", &[]).expect(200);
    }
    expect_drained(&pair.sidecar);
}

#[test]
fn idle_connections_use_little_memory() {
    if is_suite_tls() {
        eprintln!("skipped: the bounds apply to unencrypted connections");
        return;
    }
    raise_descriptors();
    let pair = Pair::start(&[]);
    warm_up(&pair);
    let before = anonymous_bytes(&pair.sidecar);
    let mut clients: Vec<Client> = (0..IDLE_CONNECTIONS)
        .map(|_| pair.sidecar.connect())
        .collect();
    let count = f64::from(IDLE_CONNECTIONS);
    pair.sidecar
        .wait_metric("ringside_client_connections", &[], count);
    let silent = anonymous_bytes(&pair.sidecar);
    expect_at_most(
        "an unused connection",
        IDLE_BYTES_MAX,
        before,
        silent,
        IDLE_CONNECTIONS,
    );
    for client in &mut clients {
        client.ask("GET", "/health", &[], b"").expect(200);
    }
    let used = anonymous_bytes(&pair.sidecar);
    expect_at_most(
        "a connection used once",
        IDLE_BYTES_MAX,
        before,
        used,
        IDLE_CONNECTIONS,
    );
    // Other requests are served while these connections are open.
    pair.post(CHAT, ask_for(8, true).1).expect(200);
    drop(clients);
    expect_drained(&pair.sidecar);
    eprintln!(
        "after all clients have disconnected: {} KiB",
        anonymous_bytes(&pair.sidecar) / 1024
    );
    pair.sidecar.expect_sound();
}

/// A tunnel that has carried large messages and is quiet holds no buffer.
#[test]
fn quiet_tunnels_hold_no_buffer() {
    if is_suite_tls() {
        eprintln!("skipped: the bounds apply to unencrypted connections");
        return;
    }
    let engine = RawEngine::start(|mut conn, _| {
        if conn.head().is_some() {
            conn.say("HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n");
            while let Some(message) = conn.bytes(MESSAGE_BYTES) {
                conn.stream.write_all(&message).unwrap();
            }
        }
    });
    let sidecar = Sidecar::start(&[VERSIONS_OFF], engine.port());
    let headers = [("connection", "upgrade"), ("upgrade", "websocket")];
    let open = || {
        let mut client = sidecar.connect();
        client.send(request("GET", "/v1/realtime", &headers, b""));
        assert_eq!(client.head().status, 101);
        client.send([b'm'; MESSAGE_BYTES]);
        assert_eq!(client.raw(MESSAGE_BYTES), [b'm'; MESSAGE_BYTES]);
        client
    };
    let first = open();
    let before = anonymous_bytes(&sidecar);
    let others: Vec<Client> = (0..TUNNELS).map(|_| open()).collect();
    let after = anonymous_bytes(&sidecar);
    expect_at_most("a quiet tunnel", TUNNEL_BYTES_MAX, before, after, TUNNELS);
    drop((first, others));
    sidecar.expect_sound();
}

#[test]
fn idle_connections_with_tls_hold_no_buffer() {
    raise_descriptors();
    let decode = Engine::start(EngineConfig::decode(), 0).unwrap();
    let sidecar = Sidecar::launch(&Launch {
        decoder_port: decode.port(),
        tls: true,
        ..Launch::default()
    });
    let used = || {
        let mut client = sidecar.connect();
        client.ask("GET", "/score", &[], b"").expect(200);
        client
    };
    drop((0..50).map(|_| used()).collect::<Vec<_>>());
    expect_drained(&sidecar);
    let before = anonymous_bytes(&sidecar);
    let clients: Vec<Client> = (0..IDLE_TLS_CONNECTIONS).map(|_| used()).collect();
    let idle = anonymous_bytes(&sidecar);
    expect_at_most(
        "a connection with TLS used once",
        IDLE_TLS_BYTES_MAX,
        before,
        idle,
        IDLE_TLS_CONNECTIONS,
    );
    drop(clients);
    expect_drained(&sidecar);
    sidecar.expect_sound();
}

#[test]
fn requests_waiting_for_a_silent_engine_use_little_memory() {
    if is_suite_tls() {
        eprintln!("skipped: the bounds apply to unencrypted connections");
        return;
    }
    raise_descriptors();
    // Hundreds of concurrent connects may take long on a loaded machine.
    let pair = Pair::start(&["--connect-timeout=1m"]);
    warm_up(&pair);
    pair.prefill.fault(Fault::StallBeforeHead, u32::MAX);
    let (_, body) = ask_for(8, true);
    let padding = "x".repeat(BODY_BYTES - body.len() - 12);
    let body = body.replacen('{', &format!("{{\"user\":\"{padding}\","), 1);
    assert!(body.len() > BODY_BYTES - 16 && body.len() <= BODY_BYTES);
    let target = pair.prefill.host_port();
    let bytes = request("POST", CHAT, &[(PREFILLER, &target)], body.as_bytes());
    let before = anonymous_bytes(&pair.sidecar);
    let mut clients = Vec::new();
    for _ in 0..WAITING_REQUESTS {
        let mut client = pair.sidecar.connect();
        client.send(&bytes);
        clients.push(client);
    }
    let want = u64::from(WAITING_REQUESTS);
    let running = pair
        .prefill
        .wait_counters(DEADLINE, |counters| counters.running == want);
    assert!(
        running.is_some(),
        "{:?} {}",
        pair.prefill.counters(),
        crate::harness_more::nonzero_metrics(&pair.sidecar)
    );
    let in_body = |log: &[mock_engine::Seen]| {
        log.iter().filter(|seen| seen.body_at.is_some()).count() as u64 >= want
    };
    pair.prefill.wait_for(DEADLINE, in_body).unwrap();
    let waiting = anonymous_bytes(&pair.sidecar);
    expect_at_most(
        "a request waiting for prefill (including 16 KiB of body)",
        WAITING_BYTES_MAX,
        before,
        waiting,
        WAITING_REQUESTS,
    );
    let since = std::time::Instant::now();
    drop(clients);
    let gone = pair
        .prefill
        .wait_counters(DEADLINE, |counters| counters.running == 0);
    assert!(gone.is_some(), "{:?}", pair.prefill.counters());
    eprintln!(
        "{WAITING_REQUESTS} disconnects reached the engine in {:?}",
        since.elapsed()
    );
    expect_drained(&pair.sidecar);
    pair.prefill.clear_faults();
    crate::harness_more::expect_healthy(&pair);
    pair.sidecar.expect_sound();
}
