//! Tests of single scenarios that the random runs reach too rarely. Each is run with many seeds.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use super::stage::{DECODER, Scenario, Stage, config, ms};
use super::wire::{Broken, Message, Wire};
use super::{client, seeds};
use crate::net::sim::{ConnectBehaviour, LinkBehaviour, SimConn, SimNet};
use crate::net::{Conn, Net};

/// Runs `scene` once per seed, with timeouts short enough to expire, and checks that no task
/// panicked and no body bytes stayed reserved.
fn each<F: Future<Output = ()> + 'static>(count: u64, scene: impl Fn(Rc<Stage>) -> F) {
    let plot = Scenario {
        engines_fail: true,
        ..Scenario::default()
    };
    for seed in seeds(count) {
        let net = SimNet::new(seed);
        let stage = Stage::new(&net, plot, config(plot));
        let run = net.run(scene(Rc::clone(&stage)));
        let run = run.unwrap_or_else(|stuck| panic!("{stuck}"));
        assert_eq!(run.panics, 0, "seed {seed}: a task panicked");
        assert_eq!(stage.budget.used(), 0, "seed {seed}");
    }
}

/// Opens a client connection that the proxy serves, and returns the client's end.
fn connect(stage: &Stage) -> Wire {
    let (near, far) = stage.net.pair();
    crate::proxy::session::begin(stage.admit(), far, 0);
    Wire::new(Rc::new(near))
}

/// Waits until the proxy has no open session. Fails the test after 60 ms.
async fn no_session_left(stage: &Stage) {
    let end = async {
        while stage.shard.sessions() > 0 {
            stage.net.sleep(ms(1)).await;
        }
    };
    let ended = client::within(stage, ms(60), end).await;
    stage.check(ended, "a session is still open");
}

/// Starts a scripted decoder that runs `act` on the first connection it accepts.
fn engine<F: Future<Output = ()> + 'static>(
    stage: &Rc<Stage>,
    act: impl FnOnce(Rc<Stage>, Wire) -> F + 'static,
) {
    let listener = stage.net.listen(DECODER.parse::<SocketAddr>().unwrap());
    let owned = Rc::clone(stage);
    stage.net.spawn(async move {
        let conn = Rc::new(listener.accept().await);
        act(owned, Wire::new(conn)).await;
    });
}

async fn post(wire: &Wire, target: &str, fields: &str, body: &[u8]) {
    let length = body.len();
    let head =
        format!("POST {target} HTTP/1.1\r\nhost: s\r\ncontent-length: {length}\r\n{fields}\r\n");
    wire.conn.send(head.as_bytes()).await.unwrap();
    wire.conn.send(body).await.unwrap();
}

fn echo(request: &Message) -> Vec<u8> {
    let length = request.body.len();
    let mut out = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n").into_bytes();
    out.extend_from_slice(&request.body);
    out
}

/// No byte of a body is lost, whichever part arrives while the proxy connects to the engine or
/// sends `100 Continue`.
#[test]
fn a_body_that_arrives_during_the_connect_is_not_lost() {
    each(150, |stage| async move {
        let listener = stage.net.listen(DECODER.parse::<SocketAddr>().unwrap());
        listener.on_connect(ConnectBehaviour::Accept, ms(5));
        stage.net.spawn(async move {
            let mut wire = Wire::new(Rc::new(listener.accept().await));
            let request = wire.read(false).await.unwrap();
            wire.conn.send(&echo(&request)).await.unwrap();
            wire.conn.hangup().await;
        });
        let mut wire = connect(&stage);
        let body = stage.text("body").into_bytes();
        let (first, rest) = body.split_at(body.len() / 2);
        let expects = stage.net.once_in(2);
        let expect = if expects {
            "expect: 100-continue\r\n"
        } else {
            ""
        };
        let length = body.len();
        let head =
            format!("POST /x HTTP/1.1\r\nhost: s\r\n{expect}content-length: {length}\r\n\r\n");
        wire.conn.send(head.as_bytes()).await.unwrap();
        for piece in [first, rest] {
            stage.net.sleep(stage.random_delay()).await;
            wire.conn.send(piece).await.unwrap();
        }
        let response = loop {
            let response = wire.read(true).await.unwrap();
            if response.status() != 100 {
                break response;
            }
        };
        stage.check(response.body == body, format!("{response:?}"));
        drop(wire);
        no_session_left(&stage).await;
    });
}

/// A connect to an engine whose accept queue is full is retried, with pauses, until the engine
/// accepts it, the client disconnects or the connect timeout expires.
#[test]
fn a_connect_to_a_full_queue_is_retried() {
    each(100, |stage| async move {
        let listener = stage.net.listen(DECODER.parse::<SocketAddr>().unwrap());
        let full = ConnectBehaviour::Fail(io::ErrorKind::WouldBlock);
        listener.on_connect(full, Duration::ZERO);
        let (opens, leaves) = (stage.net.once_in(2), stage.net.once_in(3));
        let door = listener.clone();
        let owned = Rc::clone(&stage);
        stage.net.spawn(async move {
            owned.net.sleep(ms(1 + owned.net.below(250))).await;
            if opens {
                door.on_connect(ConnectBehaviour::Accept, Duration::ZERO);
            }
            let mut wire = Wire::new(Rc::new(door.accept().await));
            let request = wire.read(false).await.unwrap();
            wire.conn.send(&echo(&request)).await.unwrap();
            wire.conn.hangup().await;
        });
        let mut wire = connect(&stage);
        let began = stage.net.now();
        post(&wire, "/x", "", b"body").await;
        if leaves && !opens {
            stage.net.sleep(ms(stage.net.below(250))).await;
        } else {
            let response = wire.read(true).await.unwrap();
            let waited = stage.net.now().since(began);
            let expected = if opens { 200 } else { 504 };
            stage.check(response.status() == expected, format!("{response:?}"));
            stage.check(
                opens || waited >= ms(300),
                format!("stopped after {waited:?}"),
            );
            stage.check(waited < ms(400), format!("{waited:?}"));
        }
        drop(wire);
        no_session_left(&stage).await;
    });
}

/// While a client does not read, the proxy receives no more of the response than the pipes and its
/// own buffer hold.
#[test]
fn a_client_that_does_not_read_stops_the_engine() {
    each(20, |stage| async move {
        let sent = Rc::new(std::cell::Cell::new(None));
        let flow = Rc::clone(&sent);
        engine(&stage, move |_, mut wire| async move {
            wire.read(false).await.unwrap();
            let head = b"HTTP/1.1 200 OK\r\ncontent-length: 10000000\r\n\r\n";
            wire.conn.send(head).await.unwrap();
            let piece = vec![b'x'; 9000];
            loop {
                flow.set(Some(wire.conn.outbound()));
                if wire.conn.send(&piece).await.is_err() {
                    return;
                }
            }
        });
        let wire = connect(&stage);
        wire.conn
            .send(b"GET /x HTTP/1.1\r\nhost: s\r\n\r\n")
            .await
            .unwrap();
        stage.net.sleep(ms(500)).await;
        let from_engine = sent.get().unwrap();
        let held = from_engine.taken - wire.conn.inbound().taken;
        let bound = (64 * 1024 + wire.conn.inbound().capacity) as u64;
        stage.check(
            held <= bound,
            format!("{held} bytes are held; the limit is {bound}"),
        );
        wire.conn.abort();
        drop(wire);
        no_session_left(&stage).await;
    });
}

/// The proxy closes the connection of a client that has stopped reading. The part of the response
/// that the client can still read must not look complete.
#[test]
fn a_stalled_client_never_sees_a_truncated_response_end_cleanly() {
    each(40, |stage| async move {
        stage.net.set_manner(Some(LinkBehaviour::calm(2000)));
        engine(&stage, |_, mut wire| async move {
            wire.read(false).await.unwrap();
            let _ = wire.conn.send(b"HTTP/1.1 200 OK\r\n\r\n").await;
            let _ = wire.conn.send(&[b'x'; 20_000]).await;
        });
        let mut wire = connect(&stage);
        wire.conn
            .send(b"GET /x HTTP/1.1\r\nhost: s\r\n\r\n")
            .await
            .unwrap();
        stage.net.sleep(ms(1500)).await;
        match wire.read(true).await {
            Ok(message) => stage.check(
                message.body.len() == 20_000,
                format!("{} bytes look whole", message.body.len()),
            ),
            Err(broken) => stage.check(broken == Broken::Cut, "no part of the response arrived"),
        }
        drop(wire);
        no_session_left(&stage).await;
    });
}

/// A response that an engine sends before it has read the request is relayed, and the connection is
/// not reused.
#[test]
fn an_early_response_reaches_the_client() {
    each(100, |stage| async move {
        engine(&stage, |stage, wire| async move {
            let mut head = Vec::new();
            while wire.conn.recv(&mut head, 64).await.unwrap_or(0) > 0 && head.len() < 200 {}
            stage.net.sleep(stage.random_delay()).await;
            let response = b"HTTP/1.1 413 No\r\ncontent-length: 3\r\n\r\nbig";
            wire.conn.send(response).await.unwrap();
            // Reads on, as uvicorn does, so that no reset destroys the response.
            while wire.conn.recv(&mut head, 4096).await.unwrap_or(0) > 0 {}
            stage.check(
                super::wire::find(&head, b"GET").is_none(),
                "the connection was reused",
            );
        });
        let mut wire = connect(&stage);
        let conn = Rc::clone(&wire.conn);
        stage.net.spawn(async move {
            let head = b"POST /x HTTP/1.1\r\nhost: s\r\ncontent-length: 90000\r\n\r\n";
            let _ = conn.send(head).await;
            let _ = conn.send(&[b'x'; 90_000]).await;
        });
        let response = wire.read(true).await.unwrap();
        stage.check(
            response.status() == 413 && response.body == b"big",
            format!("{response:?}"),
        );
        wire.conn.abort();
        drop(wire);
        no_session_left(&stage).await;
    });
}

/// A client that has sent more bytes than the proxy reads ahead disconnects while its engine is
/// silent. The engine must see the disconnect within 50 ms.
#[test]
fn a_disconnect_after_unread_pipelined_bytes_is_detected() {
    each(40, |stage| async move {
        stage.net.set_manner(Some(LinkBehaviour {
            capacity: [40_000, 5000],
            ..LinkBehaviour::calm(1)
        }));
        let gone = Rc::new(std::cell::Cell::new(None));
        let noted = Rc::clone(&gone);
        engine(&stage, move |stage, mut wire| async move {
            wire.read(false).await.unwrap();
            wire.conn.hangup().await;
            noted.set(Some(stage.net.now()));
        });
        let wire = connect(&stage);
        let request = b"GET /x HTTP/1.1\r\nhost: s\r\n\r\n";
        let pipelined = request.repeat(4000);
        let until = stage.net.now().after(ms(200));
        let mut at = 0;
        while stage.net.now() < until {
            at += wire.conn.try_send(&pipelined[at..]).unwrap_or(0);
            stage.net.sleep(ms(1)).await;
        }
        stage.check(at > 64 * 1024, format!("{at} bytes were taken"));
        let left = stage.net.now();
        if stage.net.once_in(2) {
            wire.conn.reset();
        } else {
            wire.conn.finish();
        }
        stage.net.sleep(ms(50)).await;
        let gone = gone.get();
        stage.check(gone.is_some(), "the engine did not see the disconnect");
        let took = gone.map(|gone| gone.since(left)).unwrap_or_default();
        stage.check(took <= Duration::from_millis(50), format!("after {took:?}"));
        no_session_left(&stage).await;
    });
}

/// A panic in one session ends only that session. Its client sees the end of the connection; other
/// clients are not affected.
#[test]
fn a_panic_ends_one_session_only() {
    for seed in seeds(20) {
        let net = SimNet::new(seed);
        let stage = Stage::with_defect(&net);
        let kept = Rc::clone(&stage);
        let run = net.run(async move {
            engine(&stage, |_, mut wire| async move {
                let request = wire.read(false).await.unwrap();
                wire.conn.send(&echo(&request)).await.unwrap();
                wire.conn.hangup().await;
            });
            let (mut other, mut wire) = (connect(&stage), connect(&stage));
            let prefiller = "x-prefiller-host-port: 192.0.2.66:1\r\n";
            let body = br#"{"messages":[]}"#;
            post(&wire, "/v1/chat/completions", prefiller, body).await;
            stage.check(wire.read(true).await.is_err(), "a response");
            post(&other, "/x", "", b"abc").await;
            let response = other.read(true).await.unwrap();
            stage.check(response.body == b"abc", format!("{response:?}"));
            stage.check(stage.shard.sessions() == 1, "the session is still counted");
            drop((other, wire));
            no_session_left(&stage).await;
        });
        let run = run.unwrap_or_else(|stuck| panic!("{stuck}"));
        assert_eq!((run.panics, kept.budget.used()), (1, 0), "seed {seed}");
    }
}

/// Large bodies, which are spliced through pipes in both directions, pass unchanged. The sockets
/// accept them in parts of random sizes.
#[test]
fn large_bodies_pass_unchanged() {
    each(60, |stage| async move {
        let listener = stage.net.listen(DECODER.parse::<SocketAddr>().unwrap());
        let net = stage.net.clone();
        stage.net.spawn(async move {
            loop {
                let mut wire = Wire::new(Rc::new(listener.accept().await));
                net.spawn(async move {
                    while let Ok(request) = wire.read(false).await {
                        if wire.conn.send(&echo(&request)).await.is_err() {
                            break;
                        }
                    }
                });
            }
        });
        let mut wire = connect(&stage);
        for _ in 0..2 {
            let length = 60_000 + stage.net.below(150_000) as usize;
            let seed = stage.net.below(251) as usize + 1;
            let body: Vec<u8> = (0..length).map(|i| (i * seed % 253) as u8).collect();
            let head = format!("POST /x HTTP/1.1\r\nhost: s\r\ncontent-length: {length}\r\n\r\n");
            wire.conn.send(head.as_bytes()).await.unwrap();
            wire.conn.send(&body).await.unwrap();
            let response = wire.read(true).await.unwrap();
            stage.check(response.status() == 200, response.line.clone());
            stage.check(response.body == body, "the body was changed".to_owned());
        }
        drop(wire);
        no_session_left(&stage).await;
    });
}

/// If a pooled connection turns out to be closed while the client is still uploading, the complete
/// request is sent again, and the client sees no failure.
#[test]
fn an_upload_on_a_closed_pooled_connection_is_repeated() {
    each(300, |stage| async move {
        let listener = stage.net.listen(DECODER.parse::<SocketAddr>().unwrap());
        let owned = Rc::clone(&stage);
        stage.net.spawn(async move {
            let first = Rc::new(listener.accept().await);
            let mut wire = Wire::new(first);
            let request = wire.read(false).await.unwrap();
            wire.conn.send(&echo(&request)).await.unwrap();
            reset_later(&owned, &wire.conn).await;
            loop {
                let mut wire = Wire::new(Rc::new(listener.accept().await));
                while let Ok(request) = wire.read(false).await {
                    wire.conn.send(&echo(&request)).await.unwrap();
                }
            }
        });
        let mut wire = connect(&stage);
        post(&wire, "/x", "", b"first").await;
        let response = wire.read(true).await.unwrap();
        stage.check(response.body == b"first", format!("{response:?}"));
        stage.net.sleep(ms(17)).await;
        let body = stage.text("body").into_bytes();
        let length = body.len();
        let head = format!("POST /x HTTP/1.1\r\nhost: s\r\ncontent-length: {length}\r\n\r\n");
        wire.conn.send(head.as_bytes()).await.unwrap();
        for piece in body.chunks(length / 5 + 1) {
            wire.conn.send(piece).await.unwrap();
            stage
                .net
                .sleep(Duration::from_micros(stage.net.below(400)))
                .await;
        }
        let response = wire.read(true).await.unwrap();
        stage.check(
            response.status() == 200 && response.body == body,
            format!("{response:?}"),
        );
        drop(wire);
        no_session_left(&stage).await;
    });
}

async fn reset_later(stage: &Stage, conn: &SimConn) {
    let jitter = Duration::from_micros(stage.net.below(2000));
    stage.net.sleep(ms(20) + jitter).await;
    conn.reset();
}

/// An engine responds early, without framing, and then resets the connection. The reset may be
/// reported to a send of the upload; the end of the response then looks like a clean one.
#[test]
fn a_truncated_early_response_never_looks_complete() {
    each(300, |stage| async move {
        engine(&stage, |stage, wire| async move {
            let mut head = Vec::new();
            while wire.conn.recv(&mut head, 64).await.unwrap_or(0) > 0 && head.len() < 200 {}
            let _ = wire.conn.send(b"HTTP/1.1 413 No\r\n\r\na part").await;
            stage.net.sleep(stage.random_delay()).await;
            wire.conn.reset();
        });
        let mut wire = connect(&stage);
        let conn = Rc::clone(&wire.conn);
        stage.net.spawn(async move {
            let head = b"POST /x HTTP/1.1\r\nhost: s\r\ncontent-length: 90000\r\n\r\n";
            let _ = conn.send(head).await;
            let _ = conn.send(&[b'x'; 90_000]).await;
        });
        if let Ok(response) = wire.read(true).await {
            let is_own = response.field("x-ringside-error").is_some();
            stage.check(is_own, format!("{response:?}"));
        }
        wire.conn.abort();
        drop(wire);
        no_session_left(&stage).await;
    });
}
