//! Connections: framing, keep-alive, refused connects, ranks.

use std::io::ErrorKind;
use std::net::TcpStream;
use std::time::Duration;

use mock_engine::{Engine, EngineConfig, Framing};

use crate::client::{Client, DEADLINE, ask, post, sha256};

#[test]
fn pipelined_requests_get_responses_in_order() {
    let engine = Engine::start(EngineConfig::default(), 0).unwrap();
    let mut client = Client::new(&engine);
    let all: String = (0..3).map(|i| post(&format!("/p{i}"), "x")).collect();
    client.send(&all);
    for i in 0..3 {
        assert_eq!(client.response().unwrap().json()["path"], format!("/p{i}"));
    }
    let seen = engine.requests();
    assert!(seen.iter().all(|seen| seen.conn == 0));
    assert_eq!(seen[2].nth_on_conn, 2);
}

#[test]
fn chunked_bodies_trailers_and_expect() {
    let engine = Engine::start(EngineConfig::default(), 0).unwrap();
    let mut client = Client::new(&engine);
    client.send("POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n");
    assert_eq!(client.head().unwrap(), "HTTP/1.1 100 Continue\r\n\r\n");
    client.send("3;e=1\r\nabc\r\nA\r\n0123456789\r\n0\r\nx-t: 1\r\n\r\n");
    let json = client.response().unwrap().json();
    assert_eq!(json["body_sha256"], sha256(b"abc0123456789"));
    let seen = &engine.requests()[0];
    assert_eq!(seen.framing, Framing::Chunked);
    assert_eq!(seen.body, b"abc0123456789");
    assert_eq!(seen.trailers, [("x-t".to_owned(), "1".to_owned())]);
}

#[test]
fn a_large_body_is_hashed_completely_and_kept_in_part() {
    let config = EngineConfig {
        keep_body_bytes: 10,
        ..EngineConfig::default()
    };
    let engine = Engine::start(config, 0).unwrap();
    let body = "abcdefgh".repeat(1 << 18);
    let json = ask(&engine, &post("/x", &body)).json();
    assert_eq!(json["body_sha256"], sha256(body.as_bytes()));
    assert_eq!(json["body_bytes"], body.len());
    assert_eq!(engine.requests()[0].body, b"abcdefghab");
}

#[test]
fn the_engine_closes_connections_on_request_when_idle_and_after_invalid_input() {
    let config = EngineConfig {
        keepalive: Duration::from_millis(50),
        ..EngineConfig::default()
    };
    let engine = Engine::start(config, 0).unwrap();
    for request in [
        "GET /x HTTP/1.0\r\n\r\n",
        "GET /x HTTP/1.1\r\nConnection: Close\r\n\r\n",
    ] {
        let mut client = Client::new(&engine);
        client.send(request);
        let (all, error) = client.rest();
        assert!(
            String::from_utf8(all)
                .unwrap()
                .contains("connection: close")
        );
        assert_eq!(error, None);
    }
    let mut client = Client::new(&engine);
    client.send("GET /x HTTP/1.1\r\n\r\n");
    client.response().unwrap();
    assert_eq!(client.rest(), (Vec::new(), None));
    assert_eq!(engine.counters().idle_closed, 1);
    let mut client = Client::new(&engine);
    client.send("no HTTP\r\n\r\n");
    assert!(client.rest().0.ends_with(b"Invalid HTTP request received."));
    assert_eq!(engine.counters().malformed, 1);
    engine
        .wait_counters(DEADLINE, |counters| counters.connections_open == 0)
        .unwrap();
}

#[test]
fn an_http_1_0_stream_ends_with_the_connection() {
    let engine = Engine::start(EngineConfig::default(), 0).unwrap();
    let mut client = Client::new(&engine);
    let request = post("/v1/completions", r#"{"prompt":"a","stream":true}"#);
    client.send(&request.replace("HTTP/1.1", "HTTP/1.0"));
    let (all, error) = client.rest();
    assert!(!String::from_utf8_lossy(&all).contains("transfer-encoding"));
    assert!(all.ends_with(b"data: [DONE]\n\n"));
    assert_eq!(error, None);
}

#[test]
fn refuse_closes_and_reopens_the_listener() {
    let engine = Engine::start(EngineConfig::default(), 0).unwrap();
    let mut open = Client::new(&engine);
    open.send("GET /x HTTP/1.1\r\n\r\n");
    open.response().unwrap();
    for _ in 0..2 {
        engine.refuse(true);
        let error = TcpStream::connect(engine.addr()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
        open.send("GET /x HTTP/1.1\r\n\r\n");
        open.response().unwrap();
        engine.refuse(false);
        assert_eq!(ask(&engine, "GET /x HTTP/1.1\r\n\r\n").status, 200);
    }
}

#[test]
fn dropping_the_engine_closes_its_connections() {
    let config = EngineConfig {
        ttft: Duration::from_secs(3_600),
        ..EngineConfig::default()
    };
    let engine = Engine::start(config, 0).unwrap();
    let mut client = Client::new(&engine);
    client.send(&post("/v1/completions", r#"{"prompt":"a"}"#));
    engine.wait_for(DEADLINE, |log| log.len() == 1).unwrap();
    let addr = engine.addr();
    drop(engine);
    assert_eq!(client.rest().0, b"");
    assert!(TcpStream::connect(addr).is_err());
}

#[test]
fn each_rank_refuses_ranks_out_of_range() {
    let engines = Engine::start_ranks(EngineConfig::default(), 0, 2).unwrap();
    let request = |rank: u32| {
        post("/v1/completions", r#"{"prompt":"a"}"#)
            .replace("host: e", &format!("X-data-parallel-rank: {rank}"))
    };
    assert_eq!(ask(&engines[1], &request(1)).status, 200);
    assert_eq!(ask(&engines[1], &request(2)).status, 400);
}

#[test]
fn an_engine_can_be_shared_between_threads() {
    let engine = Engine::start(EngineConfig::default(), 0).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(ask(&engine, &post("/x", "x")).status, 200));
        }
    });
    assert_eq!(engine.counters().responded, 4);
}

#[test]
fn an_engine_can_be_restarted_on_its_port() {
    let mut port = 0;
    for _ in 0..3 {
        let engine = Engine::start(EngineConfig::default(), port).unwrap();
        port = engine.port();
        let mut client = Client::new(&engine);
        client.send("GET /x HTTP/1.1\r\n\r\n");
        assert_eq!(client.response().unwrap().status, 200);
    }
}

#[test]
fn bodies_that_are_too_large_or_malformed_are_refused() {
    let engine = Engine::start(EngineConfig::default(), 0).unwrap();
    for (rest, want) in [
        ("content-length: 600000000\r\n\r\n", 413),
        ("transfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        ("transfer-encoding: chunked\r\n\r\n1\r\nab\r\n", 400),
        (
            "content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
            400,
        ),
    ] {
        let mut client = Client::new(&engine);
        client.send(&format!("POST /x HTTP/1.1\r\n{rest}"));
        let response = client.response().unwrap();
        assert_eq!(response.status, want, "{rest}");
        assert_eq!(response.header("connection"), Some("close"));
    }
    assert_eq!(engine.counters().malformed, 3);
}
