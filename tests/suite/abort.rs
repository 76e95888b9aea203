//! Client disconnects in each phase of a request, by FIN and by reset, with and without unread
//! bytes after the request. The sidecar must then close its connection to the engine.
//!
//! The limit on the median time from the client disconnect to that close is generous, because test
//! machines may be loaded. The measured times are printed.

use std::time::{Duration, Instant};

use mock_engine::{Engine, Fault, Seen, State};

use crate::client::{Client, DEADLINE, head, request};
use crate::harness::{CHAT, PREFILLER, Pair, Sidecar, VERSIONS_OFF, wait_for};
use crate::harness_more::{
    Driver, FullQueue, Leave, Times, ask_for, expect_drained, expect_handoffs_sound,
    expect_healthy, pair_on, split_request, unsent,
};

/// Limit for the median time from a client disconnect until the engine detects that its connection
/// has been closed. A single measurement may be longer, because a loaded machine may not schedule
/// this process.
const ABORT_MAX: Duration = Duration::from_secs(2);
/// Numbers of bytes that the client sends after its request before it disconnects: none, fewer than
/// the sidecar reads ahead while a request is being served (`CLIENT_AHEAD_BYTES_MAX`), and more
/// than that.
const BEHIND: [usize; 3] = [0, 48, 96 * 1024];
/// Number of disconnects per case in the tests whose engine stalls without sending anything more.
const REPETITIONS: u32 = 20;

/// Waits until the engine has recorded an aborted request, and returns when that happened.
#[track_caller]
fn aborted_at(engine: &Engine) -> Instant {
    let is_over = |log: &[Seen]| log.iter().any(|seen| seen.state.is_aborted());
    let log = engine.wait_for(DEADLINE, is_over).unwrap_or_else(|| {
        panic!(
            "never aborted: {:?}",
            engine.requests().first().map(|seen| seen.state)
        )
    });
    let at = log.iter().find_map(|seen| match seen.state {
        State::Aborted { at, .. } => Some(at),
        _ => None,
    });
    at.unwrap()
}

#[track_caller]
fn wait_state(engine: &Engine, want: State) {
    let log = engine.wait_for(DEADLINE, |log| log.iter().any(|seen| seen.state == want));
    assert!(log.is_some(), "not {want:?}: {:?}", engine.requests());
}

/// Disconnects clients and fails unless `engine` records an aborted request each time, after a
/// median time of less than [`ABORT_MAX`]. `begin` returns a client in the tested phase of its
/// request. Each kind of disconnect in [`Leave`] is combined with each number in `behind`, the
/// number of further bytes that the client sends before it disconnects, and repeated `repetitions`
/// times.
#[track_caller]
fn leave_in_each_way(
    what: &str,
    behind: &[usize],
    repetitions: u32,
    engine: &Engine,
    mut begin: impl FnMut() -> Client,
) {
    for leave in Leave::ALL {
        for &bytes in behind {
            let mut times = Times::default();
            for _ in 0..repetitions {
                engine.clear();
                let mut client = begin();
                client.send(vec![b'x'; bytes]);
                let (left_at, _client) = leave.now(client);
                let took = aborted_at(engine).duration_since(left_at);
                times.push(took);
            }
            let what = format!("abort {what}, {leave:?}, {bytes} bytes after the request");
            let median = times.print(&what);
            assert!(median < ABORT_MAX, "{what}: {median:?}");
        }
    }
}

/// Clears all faults, then checks that further requests are served and that no connection or
/// request is left from the disconnects.
#[track_caller]
fn expect_recovered(pair: &Pair) {
    pair.prefill.clear_faults();
    pair.decode.clear_faults();
    expect_healthy(pair);
    expect_drained(&pair.sidecar);
    expect_handoffs_sound(pair);
    pair.sidecar.expect_sound();
}

fn ring_pair(args: &[&str]) -> Pair {
    pair_on(Driver::Ring, args, |_| {}, |_| {})
}

/// Sends a chat completion request without the last part of its body, and returns the open
/// connection.
fn half_upload(sidecar: &Sidecar, headers: &[(&str, &str)]) -> Client {
    let mut client = sidecar.connect();
    let mut bytes = head("POST", CHAT, headers);
    bytes.extend_from_slice(b"Content-Length: 100\r\n\r\n{\"messages\":[");
    client.send(bytes);
    client
}

#[test]
fn aborts_on_disconnect_during_an_upload_that_the_engine_reads() {
    let pair = ring_pair(&[]);
    leave_in_each_way("upload", &[0], 5, &pair.decode, || {
        let client = half_upload(&pair.sidecar, &[]);
        wait_state(&pair.decode, State::Receiving);
        client
    });
    expect_recovered(&pair);
}

#[test]
fn aborts_on_disconnect_during_a_buffered_upload() {
    let pair = ring_pair(&[]);
    let target = pair.prefill.host_port();
    for leave in Leave::ALL {
        let client = half_upload(&pair.sidecar, &[(PREFILLER, &target)]);
        let chat = [("route", "chat")];
        pair.sidecar.wait_metric("ringside_in_flight", &chat, 1.0);
        let (_, _client) = leave.now(client);
        expect_drained(&pair.sidecar);
    }
    let upload = [("phase", "upload")];
    let name = "ringside_client_disconnects_total";
    pair.sidecar.wait_metric(name, &upload, 2.0);
    assert!(pair.prefill.requests().is_empty() && pair.decode.requests().is_empty());
    expect_recovered(&pair);
}

/// Starts an upload of 256 MiB and sends body bytes until all of them have arrived and the sidecar
/// has read none for 150 ms. Returns the open connection.
fn fill_upload(sidecar: &Sidecar) -> Client {
    const PIECE: usize = 64 * 1024;
    let mut client = sidecar.connect();
    let mut bytes = head("POST", "/v1/files", &[]);
    bytes.extend_from_slice(b"Content-Length: 268435456\r\n\r\n");
    client.send(bytes);
    let copied = || sidecar.metric("ringside_copied_bytes_total", &[]);
    let mut before = copied();
    loop {
        client.send(vec![b'x'; PIECE]);
        let since = Instant::now();
        loop {
            let now = copied();
            if now > before {
                before = now;
                break;
            }
            // All bytes have arrived, and the sidecar does not read them.
            if unsent(client.socket()) == 0 && since.elapsed() > Duration::from_millis(150) {
                return client;
            }
        }
    }
}

#[test]
fn aborts_on_disconnect_during_an_upload_that_the_engine_does_not_read() {
    let pair = ring_pair(&[]);
    let fault = Fault::StallRead { after_bytes: 1024 };
    pair.decode.fault(fault, u32::MAX);
    leave_in_each_way("held-up upload", &[0], 1, &pair.decode, || {
        fill_upload(&pair.sidecar)
    });
    expect_recovered(&pair);
}

#[test]
fn aborts_on_disconnect_while_connecting_to_the_prefiller() {
    let pair = ring_pair(&["--connect-timeout=1h"]);
    let deaf = FullQueue::new();
    let mut left = 0.0;
    let mut times = Times::default();
    for leave in Leave::ALL {
        for behind in BEHIND {
            let (_, body) = ask_for(4, true);
            let target = deaf.host_port();
            let mut client = pair.sidecar.connect();
            client.send(request(
                "POST",
                CHAT,
                &[(PREFILLER, &target)],
                body.as_bytes(),
            ));
            let active = [("leg", "prefill"), ("state", "active")];
            let name = "ringside_upstream_connections";
            pair.sidecar.wait_metric(name, &active, 1.0);
            client.send(vec![b'x'; behind]);
            let (at, _client) = leave.now(client);
            expect_drained(&pair.sidecar);
            times.push(at.elapsed());
            left += 1.0;
            let connect = [("phase", "connect")];
            let name = "ringside_client_disconnects_total";
            pair.sidecar.wait_metric(name, &connect, left);
        }
    }
    times.print("abort connecting (seen in the metrics)");
    assert!(pair.decode.requests().is_empty());
    expect_recovered(&pair);
}

#[test]
fn aborts_on_disconnect_while_the_prefiller_is_silent() {
    prefiller_is_silent(Driver::Ring);
}

#[test]
fn aborts_on_disconnect_while_the_prefiller_is_silent_on_epoll() {
    prefiller_is_silent(Driver::Epoll);
}

fn prefiller_is_silent(driver: Driver) {
    let pair = pair_on(driver, &[], |_| {}, |_| {});
    pair.prefill.fault(Fault::StallBeforeHead, u32::MAX);
    let what = format!("prefill silent ({driver:?})");
    leave_in_each_way(&what, &BEHIND, REPETITIONS, &pair.prefill, || {
        let mut client = pair.sidecar.connect();
        client.send(split_request(&pair, &ask_for(4, true).1));
        wait_state(&pair.prefill, State::Responding);
        client
    });
    assert!(
        pair.decode.requests().is_empty(),
        "a decode leg was sent after the disconnect"
    );
    expect_recovered(&pair);
}

#[test]
fn aborts_on_disconnect_while_the_prefill_response_stalls() {
    for fault in [
        Fault::StallAfterHead,
        // Half of the response body, as the response is not a stream.
        Fault::StallMidStream { after_events: 1 },
    ] {
        let pair = ring_pair(&[]);
        pair.prefill.fault(fault.clone(), u32::MAX);
        let what = format!("prefill {fault:?}");
        leave_in_each_way(&what, &BEHIND, 5, &pair.prefill, || {
            let mut client = pair.sidecar.connect();
            client.send(split_request(&pair, &ask_for(4, true).1));
            wait_state(&pair.prefill, State::Responding);
            client
        });
        assert!(
            pair.decode.requests().is_empty(),
            "a decode leg was sent after the disconnect"
        );
        expect_recovered(&pair);
    }
}

#[test]
fn aborts_on_disconnect_while_waiting_for_a_retry() {
    let pair = ring_pair(&["--prefill-max-retries=3", "--prefill-retry-backoff=1h"]);
    let unavailable = Fault::Status {
        code: 502,
        body: "{}".to_owned(),
        content_type: "application/json".to_owned(),
    };
    pair.prefill.fault(unavailable, u32::MAX);
    let mut left = 0.0;
    for leave in Leave::ALL {
        for behind in BEHIND {
            left += 1.0;
            let mut client = pair.sidecar.connect();
            client.send(split_request(&pair, &ask_for(4, true).1));
            let retries = "ringside_prefill_retries_total";
            pair.sidecar.wait_metric(retries, &[], left);
            client.send(vec![b'x'; behind]);
            let (_, _client) = leave.now(client);
            expect_drained(&pair.sidecar);
            let phase = [("phase", "retry_wait")];
            let name = "ringside_client_disconnects_total";
            pair.sidecar.wait_metric(name, &phase, left);
        }
    }
    assert_eq!(
        pair.prefill.requests().len(),
        6,
        "a retry was sent after the disconnect"
    );
    assert!(pair.decode.requests().is_empty());
    expect_recovered(&pair);
}

#[test]
fn aborts_on_disconnect_between_the_legs() {
    let deaf = FullQueue::new();
    let prefill = Engine::start(mock_engine::EngineConfig::prefill(), 0).unwrap();
    let sidecar = Sidecar::start(&["--connect-timeout=1h", VERSIONS_OFF], deaf.port());
    let mut left = 0.0;
    for leave in Leave::ALL {
        for behind in BEHIND {
            left += 1.0;
            let target = prefill.host_port();
            let (_, body) = ask_for(4, true);
            let mut client = sidecar.connect();
            client.send(request(
                "POST",
                CHAT,
                &[(PREFILLER, &target)],
                body.as_bytes(),
            ));
            let active = [("leg", "decode"), ("state", "active")];
            sidecar.wait_metric("ringside_upstream_connections", &active, 1.0);
            client.send(vec![b'x'; behind]);
            let (_, _client) = leave.now(client);
            expect_drained(&sidecar);
            sidecar.wait_metric("ringside_client_disconnects_total", &[], left);
        }
    }
    assert_eq!(prefill.requests().len(), 6);
    sidecar.expect_sound();
}

#[test]
fn aborts_on_disconnect_while_the_decoder_is_silent() {
    decoder_is_silent(Driver::Ring);
}

#[test]
fn aborts_on_disconnect_while_the_decoder_is_silent_on_epoll() {
    decoder_is_silent(Driver::Epoll);
}

fn decoder_is_silent(driver: Driver) {
    let pair = pair_on(driver, &[], |_| {}, |_| {});
    pair.decode.fault(Fault::StallBeforeHead, u32::MAX);
    for split in [true, false] {
        let what = format!("decode silent ({driver:?}, split {split})");
        leave_in_each_way(&what, &BEHIND, REPETITIONS, &pair.decode, || {
            let mut client = pair.sidecar.connect();
            let (_, body) = ask_for(4, true);
            client.send(match split {
                true => split_request(&pair, &body),
                false => request("POST", CHAT, &[], body.as_bytes()),
            });
            wait_state(&pair.decode, State::Responding);
            client
        });
    }
    expect_recovered(&pair);
}

/// Returns a streaming chat completion body that requests 4,000,000 tokens, so that the response
/// does not end during a test.
fn endless_body() -> String {
    ask_for(4_000_000, true).1
}

#[test]
fn aborts_on_disconnect_during_a_stream() {
    tokens_flow(Driver::Ring);
}

#[test]
fn aborts_on_disconnect_during_a_stream_on_epoll() {
    tokens_flow(Driver::Epoll);
}

fn tokens_flow(driver: Driver) {
    let pair = pair_on(
        driver,
        &[],
        |_| {},
        |decode| decode.itl = Duration::from_millis(1),
    );
    let what = format!("streaming ({driver:?})");
    leave_in_each_way(&what, &BEHIND, 5, &pair.decode, || {
        let mut client = pair.sidecar.connect();
        client.send(split_request(&pair, &endless_body()));
        assert_eq!(client.head().status, 200);
        for _ in 0..3 {
            client.chunk().unwrap();
        }
        client
    });
    expect_recovered(&pair);
}

#[test]
fn aborts_on_disconnect_while_a_stream_stalls() {
    stream_stalls(Driver::Ring);
}

#[test]
fn aborts_on_disconnect_while_a_stream_stalls_on_epoll() {
    stream_stalls(Driver::Epoll);
}

fn stream_stalls(driver: Driver) {
    let pair = pair_on(driver, &[], |_| {}, |_| {});
    let fault = Fault::StallMidStream { after_events: 3 };
    pair.decode.fault(fault, u32::MAX);
    let what = format!("stream stalled ({driver:?})");
    leave_in_each_way(&what, &BEHIND, REPETITIONS, &pair.decode, || {
        let mut client = pair.sidecar.connect();
        client.send(split_request(&pair, &ask_for(64, true).1));
        assert_eq!(client.head().status, 200);
        client.chunk().unwrap();
        client
    });
    expect_recovered(&pair);
}

#[test]
fn aborts_on_disconnect_while_the_client_does_not_read() {
    let pair = ring_pair(&[]);
    leave_in_each_way("client not reading", &BEHIND, 3, &pair.decode, || {
        let mut client = pair.sidecar.connect();
        client.send(split_request(&pair, &endless_body()));
        assert_eq!(client.head().status, 200);
        // Every buffer between the engine and the client is full once the sidecar stops relaying.
        let chunks = [("direction", "chunk")];
        let count = || {
            let name = "ringside_proxy_overhead_seconds_count";
            pair.sidecar.metric(name, &chunks)
        };
        let (mut have, mut since) = (count(), Instant::now());
        wait_for("the relaying to stop", || {
            let now = count();
            if now > have || rustix::io::ioctl_fionread(client.socket()).unwrap() < 40_000 {
                (have, since) = (now, Instant::now());
            }
            (since.elapsed() > Duration::from_millis(150)).then_some(())
        });
        client
    });
    // The number of disconnects while the sidecar itself was blocked depends on the machine's
    // buffers.
    let stalled = [("phase", "stalled")];
    let stalled = pair
        .sidecar
        .metric("ringside_client_disconnects_total", &stalled);
    eprintln!("client not reading: {stalled} of 18 disconnected with every buffer full");
    expect_recovered(&pair);
}
