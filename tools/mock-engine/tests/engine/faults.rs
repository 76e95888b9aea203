//! Each fault has the documented effect.

use std::io::{ErrorKind, Read};
use std::time::Duration;

use mock_engine::{Engine, EngineConfig, Fault, State};

use crate::client::{Client, DEADLINE, ask, post};

const STREAM: &str = r#"{"prompt":"a","max_tokens":4,"stream":true}"#;
const WHOLE: &str = r#"{"prompt":"a","max_tokens":4}"#;

fn engine(fault: Fault) -> Engine {
    let engine = Engine::start(EngineConfig::default(), 0).unwrap();
    engine.fault(fault, 1);
    engine
}

/// Sends a completions request with `body` to a new engine with `fault` set, and reads until the
/// connection ends. Returns all received text, and the read error: `None` after a FIN.
fn raw(fault: Fault, body: &str) -> (String, Option<ErrorKind>) {
    let engine = engine(fault);
    let mut client = Client::new(&engine);
    client.send(&post("/v1/completions", body));
    let (all, error) = client.rest();
    (String::from_utf8_lossy(&all).into_owned(), error)
}

#[test]
fn connections_can_end_without_a_response() {
    let reset = Some(ErrorKind::ConnectionReset);
    assert_eq!(raw(Fault::ResetBeforeHead, WHOLE), (String::new(), reset));
    assert_eq!(raw(Fault::CloseBeforeHead, WHOLE), (String::new(), None));
    let engine = engine(Fault::Refuse);
    let mut client = Client::new(&engine);
    assert_eq!(
        client.0.read(&mut [0]).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    assert_eq!(ask(&engine, &post("/v1/completions", WHOLE)).status, 200);
}

#[test]
fn truncated_bodies() {
    for body in [STREAM, WHOLE] {
        let (all, error) = raw(Fault::TruncateMidBody { after_events: 2 }, body);
        assert!(
            all.starts_with("HTTP/1.1 200") && !all.ends_with("0\r\n\r\n"),
            "{all}"
        );
        assert_eq!(error, None);
        if body == STREAM {
            assert_eq!(all.matches("data: ").count(), 2);
        } else {
            assert!(!all.ends_with('}'));
        }
        let (_, error) = raw(Fault::ResetMidBody { after_events: 1 }, body);
        assert_eq!(error, Some(ErrorKind::ConnectionReset));
    }
}

#[test]
fn framing_faults() {
    let (all, _) = raw(Fault::ExtraLength, WHOLE);
    assert!(all.contains("content-length: ") && all.ends_with('}'));
    let (all, _) = raw(Fault::NoFraming, STREAM);
    assert!(!all.contains("content-length") && !all.contains("transfer-encoding"));
    assert!(all.ends_with("data: [DONE]\n\n"));
    let (all, _) = raw(Fault::Http10Response, WHOLE);
    assert!(all.starts_with("HTTP/1.0 200") && all.contains("content-length"));
    let (all, _) = raw(Fault::Garbage, WHOLE);
    assert!(all.starts_with('\u{16}'));
    let engine = engine(Fault::BothFramings);
    let response = ask(&engine, &post("/v1/completions", WHOLE));
    assert!(response.head.contains("content-length: ") && response.chunks.len() == 1);
}

#[test]
fn substituted_responses() {
    for (fault, status, part) in [
        (
            Fault::Status {
                code: 503,
                body: "busy".to_owned(),
                content_type: "text/plain".to_owned(),
            },
            503,
            "busy",
        ),
        (Fault::Gzip, 200, "opaque"),
        (Fault::Html, 200, "<html>"),
        (Fault::HalfJson, 200, "do_rem"),
        (Fault::LargeJson { bytes: 100_000 }, 200, "AAAAAAAA"),
        (Fault::Interim { count: 0 }, 200, "cmpl-"),
    ] {
        let engine = engine(fault.clone());
        let mut client = Client::new(&engine);
        for times in 0..2 {
            client.send(&post("/v1/completions", WHOLE));
            let response = client.response().unwrap();
            let text = String::from_utf8_lossy(&response.body).into_owned();
            assert_eq!(
                response.status,
                if times == 0 { status } else { 200 },
                "{fault:?}"
            );
            assert!(times > 0 || text.contains(part), "{fault:?}: {text}");
        }
    }
}

#[test]
fn responses_without_a_body_and_interim_responses() {
    for (fault, want) in [
        (Fault::NoContent204, "HTTP/1.1 204"),
        (Fault::NotModified304, "HTTP/1.1 304"),
    ] {
        let engine = engine(fault);
        let mut client = Client::new(&engine);
        client.send(&post("/v1/completions", WHOLE));
        assert!(client.head().unwrap().starts_with(want));
        client.send(&post("/v1/completions", WHOLE));
        assert_eq!(client.response().unwrap().status, 200);
    }
    let engine = engine(Fault::Interim { count: 2 });
    let mut client = Client::new(&engine);
    client.send(&post("/v1/completions", WHOLE));
    for _ in 0..2 {
        assert!(client.head().unwrap().starts_with("HTTP/1.1 103"));
    }
    assert_eq!(client.response().unwrap().status, 200);
}

#[test]
fn bare_line_feeds_and_slow_bytes() {
    let engine = engine(Fault::BareLf);
    let mut client = Client::new(&engine);
    let request = post("/v1/completions", WHOLE).replace("host: e", "connection: close");
    client.send(&request);
    let text = String::from_utf8(client.rest().0).unwrap();
    assert!(text.contains("200 OK\n") && !text.contains('\r'), "{text}");
    engine.fault(
        Fault::Slow {
            chunk_bytes: 100,
            delay: Duration::from_millis(1),
        },
        1,
    );
    assert!(
        ask(&engine, &post("/v1/completions", STREAM))
            .body
            .ends_with(b"[DONE]\n\n")
    );
}

#[test]
fn faults_after_the_response() {
    let engine = engine(Fault::GarbageAfterResponse);
    let mut client = Client::new(&engine);
    client.send(&post("/v1/completions", WHOLE));
    client.response().unwrap();
    assert_eq!(client.response().unwrap().body, b"extra");
    engine.fault(Fault::CloseIdle, 1);
    let mut client = Client::new(&engine);
    client.send(&post("/v1/completions", WHOLE));
    let response = client.response().unwrap();
    assert_eq!(response.header("connection"), None);
    assert_eq!(client.rest(), (Vec::new(), None));
    engine.fault(Fault::CloseOnNextRequest, 1);
    let mut client = Client::new(&engine);
    client.send(&post("/v1/completions", WHOLE));
    client.response().unwrap();
    client.send(&post("/v1/completions", WHOLE));
    assert_eq!(client.rest().0, b"");
    assert_eq!(engine.counters().stale_closed, 1);
    assert_eq!(engine.requests().len(), 3);
}

#[test]
fn early_responses() {
    for keep in [true, false] {
        let engine = engine(Fault::EarlyResponse { status: 413, keep });
        let mut client = Client::new(&engine);
        let request = post("/v1/completions", WHOLE);
        let (head, body) = request.split_at(request.find("\r\n\r\n").unwrap() + 4);
        client.send(head);
        let response = client.response().unwrap();
        assert_eq!(response.status, 413);
        assert_eq!(response.header("connection").is_some(), !keep);
        client.send(body);
        if keep {
            client.send(&post("/v1/completions", WHOLE));
            assert_eq!(client.response().unwrap().status, 200);
        } else {
            assert_eq!(client.rest(), (Vec::new(), None));
        }
    }
}

#[test]
fn an_upgraded_connection_echoes() {
    let engine = engine(Fault::Upgrade101);
    let mut client = Client::new(&engine);
    client.send("GET /v1/realtime HTTP/1.1\r\nupgrade: mock\r\n\r\nearly");
    assert!(client.head().unwrap().starts_with("HTTP/1.1 101"));
    client.send(" late");
    let mut got = [0; 10];
    client.0.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"early late");
    drop(client);
    engine
        .wait_for(DEADLINE, |log| log[0].state == State::Responded)
        .unwrap();
}

#[test]
fn faults_are_set_over_http() {
    let engine = Engine::start(EngineConfig::default(), 0).unwrap();
    let set = r#"{"fault":{"status":{"code":418}},"times":2,"path":"/x"}"#;
    assert_eq!(ask(&engine, &post("/mock/fault", set)).status, 200);
    let status = |path| ask(&engine, &post(path, "")).status;
    assert_eq!((status("/y"), status("/x?q=1")), (200, 418));
    assert_eq!(
        ask(&engine, &post("/mock/fault", r#"{"clear":true}"#)).status,
        200
    );
    assert_eq!(status("/x"), 200);
    assert_eq!(
        ask(&engine, &post("/mock/fault", r#"{"fault":"no"}"#)).status,
        400
    );
}

#[test]
fn an_error_event_mid_stream() {
    let engine = engine(Fault::ErrorMidStream { after_events: 2 });
    let response = ask(&engine, &post("/v1/completions", STREAM));
    assert_eq!(response.chunks.len(), 4);
    assert_eq!(response.events()[2]["error"]["code"], 500);
}
