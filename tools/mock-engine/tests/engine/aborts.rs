//! A client disconnect is detected immediately in every phase of a request.

use std::net::Shutdown;
use std::time::{Duration, Instant};

use mock_engine::{AbortPhase, Engine, EngineConfig, Fault, Seen, State};

use crate::client::{Client, DEADLINE, post};

const FOREVER: Duration = Duration::from_secs(3_600);
const PROMPT: &str = r#"{"prompt":"a","stream":true}"#;

fn engine(ttft: Duration, itl: Duration) -> Engine {
    let config = EngineConfig {
        ttft,
        itl,
        ..EngineConfig::default()
    };
    Engine::start(config, 0).unwrap()
}

fn wait_state(engine: &Engine, pred: impl Fn(&State) -> bool) -> Seen {
    engine
        .wait_for(DEADLINE, |log| {
            log.first().is_some_and(|seen| pred(&seen.state))
        })
        .unwrap_or_else(|| panic!("{:?}", engine.requests()))
        .remove(0)
}

/// Waits until the engine has detected that the client disconnected, asserts that this was less
/// than 500 ms after `since`, and returns the phase that the request was in.
fn phase(engine: &Engine, since: Instant) -> AbortPhase {
    let seen = wait_state(engine, State::is_aborted);
    let State::Aborted { at, phase } = seen.state else {
        panic!("{seen:?}")
    };
    let took = at.duration_since(since);
    assert!(took < Duration::from_millis(500), "{took:?}");
    assert_eq!(engine.counters().aborted, 1);
    phase
}

#[test]
fn in_the_body() {
    let engine = engine(Duration::ZERO, Duration::ZERO);
    let mut client = Client::new(&engine);
    client.send("POST /v1/completions HTTP/1.1\r\ncontent-length: 99\r\n\r\n{");
    wait_state(&engine, |state| *state == State::Receiving);
    let since = Instant::now();
    drop(client);
    assert_eq!(phase(&engine, since), AbortPhase::Body);
}

#[test]
fn before_the_first_token() {
    for half_close in [false, true] {
        let engine = engine(FOREVER, Duration::ZERO);
        let mut client = Client::new(&engine);
        client.send(&post("/v1/completions", PROMPT));
        wait_state(&engine, |state| *state == State::Responding);
        let since = Instant::now();
        client.0.shutdown(Shutdown::Write).unwrap();
        if !half_close {
            client.0.shutdown(Shutdown::Both).unwrap();
        }
        assert_eq!(phase(&engine, since), AbortPhase::BeforeFirstByte);
    }
}

#[test]
fn after_pipelined_bytes() {
    // Up to the limit of the read-ahead buffer. With many more bytes, the receive window is closed,
    // so the FIN does not arrive and no server can detect the disconnect without reading.
    for bytes in [100, 1 << 20] {
        let engine = engine(FOREVER, Duration::ZERO);
        let mut client = Client::new(&engine);
        client.send(&post("/v1/completions", PROMPT));
        wait_state(&engine, |state| *state == State::Responding);
        let more = "x".repeat(bytes);
        client.send(&more);
        let since = Instant::now();
        drop(client);
        assert_eq!(
            phase(&engine, since),
            AbortPhase::BeforeFirstByte,
            "{bytes}"
        );
    }
}

#[test]
fn between_tokens() {
    let engine = engine(Duration::ZERO, FOREVER);
    let mut client = Client::new(&engine);
    client.send(&post("/v1/completions", PROMPT));
    client.head().unwrap();
    let since = Instant::now();
    drop(client);
    assert_eq!(phase(&engine, since), AbortPhase::Streaming);
}

#[test]
fn while_the_client_does_not_read() {
    let engine = engine(Duration::ZERO, Duration::ZERO);
    let mut client = Client::new(&engine);
    let body = r#"{"prompt":"a","stream":true,"max_tokens":4000000000,"ignore_eos":true}"#;
    client.send(&post("/v1/completions", body));
    client.head().unwrap();
    let since = Instant::now();
    drop(client);
    assert_eq!(phase(&engine, since), AbortPhase::Streaming);
}

#[test]
fn during_each_stall() {
    for (fault, want) in [
        (Fault::StallRead { after_bytes: 1 }, AbortPhase::Body),
        (Fault::StallBeforeHead, AbortPhase::BeforeFirstByte),
        (Fault::StallAfterHead, AbortPhase::Streaming),
        (
            Fault::StallMidStream { after_events: 2 },
            AbortPhase::Streaming,
        ),
        (Fault::EndlessHead, AbortPhase::Streaming),
        (
            Fault::Slow {
                chunk_bytes: 1,
                delay: FOREVER,
            },
            AbortPhase::Streaming,
        ),
    ] {
        let engine = engine(Duration::ZERO, Duration::ZERO);
        engine.fault(fault.clone(), 1);
        let mut client = Client::new(&engine);
        client.send(&post("/v1/completions", PROMPT));
        match want {
            AbortPhase::Body => {
                wait_state(&engine, |state| *state == State::Receiving);
            }
            AbortPhase::BeforeFirstByte => {
                wait_state(&engine, |state| *state == State::Responding);
            }
            AbortPhase::Streaming => {
                let mut byte = [0];
                std::io::Read::read_exact(&mut client.0, &mut byte).unwrap();
            }
        }
        let since = Instant::now();
        drop(client);
        assert_eq!(phase(&engine, since), want, "{fault:?}");
    }
}
