//! Large bodies that ringside does not parse are spliced in the kernel: complete, with bounded
//! buffering, and without leaking bytes from one connection to the next.

use std::io::{Read, Write};
use std::sync::mpsc;

use crate::client::{DEADLINE, End, head, request};
use crate::harness::{Launch, Sidecar, VERSIONS_OFF, is_suite_tls};
use crate::harness_more::{Driver, RawConn, RawEngine, expect_drained, wait_descriptors};

/// Size of a large body in bytes: several times the capacity of a pipe, and not a multiple of any
/// buffer size.
const LARGE: usize = (5 << 20) + 12_345;

fn start(driver: Driver, port: u16) -> Sidecar {
    Sidecar::launch(&Launch {
        args: &[VERSIONS_OFF],
        decoder_port: port,
        ring_errno: driver.errno(),
        ..Launch::default()
    })
}

fn bytes(seed: usize, count: usize) -> Vec<u8> {
    let byte = |i: usize| u8::try_from((i * seed + i / 257) % 251).unwrap();
    (0..count).map(byte).collect()
}

/// Returns the head of an upload of that many bytes.
fn upload_head(count: usize) -> Vec<u8> {
    let mut bytes = head("POST", "/x", &[("content-length", &count.to_string())]);
    bytes.extend_from_slice(b"\r\n");
    bytes
}

/// Responds to every request with the request's body.
fn echo(mut conn: RawConn) {
    while let Some((_, body)) = conn.request() {
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
        if !conn.say(&head) || conn.stream.write_all(&body).is_err() {
            return;
        }
    }
}

#[test]
fn large_bodies_pass_unchanged_both_ways_and_connections_are_reused() {
    for driver in [Driver::Ring, Driver::Epoll] {
        let (engine, connections) = {
            let (sender, connections) = mpsc::channel();
            let engine = RawEngine::start(move |conn, nth| {
                sender.send(nth).unwrap();
                echo(conn);
            });
            (engine, connections)
        };
        let sidecar = start(driver, engine.port());
        let mut client = sidecar.connect();
        for (seed, count) in [(3, LARGE), (5, 100), (7, LARGE + 1), (11, 2 << 20)] {
            let body = bytes(seed, count);
            client.send(request("POST", "/v1/embeddings", &[], &body));
            let response = client.response().expect(200);
            assert!(response.body == body, "the body was changed");
        }
        drop(client);
        expect_drained(&sidecar);
        let spliced = sidecar.metric("ringside_spliced_bytes_total", &[]);
        // Encrypted bodies cannot be spliced.
        let want = if is_suite_tls() {
            0.0
        } else {
            2.0 * LARGE as f64
        };
        assert!(
            spliced >= want && (want > 0.0 || spliced == 0.0),
            "{spliced}"
        );
        assert_eq!(connections.try_iter().count(), 1);
    }
}

/// The rest of the upload, which the engine does not read, must not reach another connection.
#[test]
fn a_response_during_an_upload_is_relayed_and_no_bytes_leak() {
    for driver in [Driver::Ring, Driver::Epoll] {
        let engine = RawEngine::start(|mut conn, nth| {
            if nth > 0 {
                return echo(conn);
            }
            let _ = conn.head();
            let _ = conn.bytes(3 << 20);
            conn.say("HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno");
            // The connection is closed with the rest of the upload unread.
        });
        let sidecar = start(driver, engine.port());
        let mut client = sidecar.connect();
        let mut writer = client.share();
        let upload = std::thread::spawn(move || {
            writer.try_send(request("POST", "/x", &[], &bytes(3, 64 << 20)))
        });
        let response = client.response();
        assert_eq!((response.head.status, &*response.body), (413, &b"no"[..]));
        drop(client);
        assert!(!upload.join().unwrap(), "the whole upload was accepted");
        for seed in [5, 7] {
            let body = bytes(seed, LARGE);
            let response = sidecar.post("/x", &body, &[]).expect(200);
            assert!(response.body == body, "the body was changed");
        }
    }
}

#[test]
fn a_client_disconnect_during_an_upload_closes_the_engine_connection() {
    for driver in [Driver::Ring, Driver::Epoll] {
        let (sender, ended) = mpsc::channel();
        let engine = RawEngine::start(move |mut conn, _| {
            let _ = conn.head();
            let mut sink = vec![0; 1 << 16];
            let mut read = 0;
            while let Ok(n @ 1..) = conn.stream.read(&mut sink) {
                read += n;
            }
            sender.send(read).unwrap();
        });
        let sidecar = start(driver, engine.port());
        let mut client = sidecar.connect();
        let whole = 64 << 20;
        client.send(upload_head(whole));
        client.send(bytes(3, LARGE));
        drop(client);
        let read = ended.recv_timeout(DEADLINE).unwrap();
        assert!(read <= LARGE, "{read} bytes of {LARGE}");
        expect_drained(&sidecar);
    }
}

/// The response is several times as large as the one pipe that it is spliced through. A client that
/// reads slowly must receive every byte.
#[test]
fn a_slow_client_receives_a_large_response_completely() {
    for driver in [Driver::Ring, Driver::Epoll] {
        let body = bytes(13, LARGE * 2);
        let sent = body.clone();
        let engine = RawEngine::start(move |mut conn, _| {
            let _ = conn.request();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", sent.len());
            conn.say(&head);
            let _ = conn.stream.write_all(&sent);
        });
        let sidecar = start(driver, engine.port());
        let mut client = sidecar.connect();
        client.send(request("GET", "/x", &[], b""));
        let response_head = client.head();
        let mut got = Vec::new();
        while got.len() < body.len() {
            let piece = (body.len() - got.len()).min(100_000);
            got.extend(client.raw(piece));
            if got.len() % 1_000_000 < 100_000 {
                crate::harness::poll_interval();
            }
        }
        assert_eq!(response_head.status, 200);
        assert!(got == body, "the body was changed");
    }
}

#[test]
fn a_truncated_response_stays_truncated() {
    for driver in [Driver::Ring, Driver::Epoll] {
        let engine = RawEngine::start(move |mut conn, _| {
            let _ = conn.request();
            conn.say(&format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n",
                LARGE * 2
            ));
            let _ = conn.stream.write_all(&bytes(3, LARGE));
        });
        let sidecar = start(driver, engine.port());
        let mut client = sidecar.connect();
        client.send(request("GET", "/x", &[], b""));
        let response = client.response();
        assert_ne!(response.end, End::Complete);
        assert!(response.body.len() <= LARGE);
    }
}

/// With more concurrent uploads than pipes, the remaining uploads are copied.
#[test]
fn more_uploads_than_pipes_are_all_served() {
    const CLIENTS: usize = 48;
    let engine = RawEngine::start(|conn, _| echo(conn));
    let sidecar = start(Driver::Ring, engine.port());
    let mut clients: Vec<_> = (0..CLIENTS).map(|_| sidecar.connect()).collect();
    let count = (2 << 20) + 100_000;
    let first = 50_000;
    for client in &mut clients {
        client.send(upload_head(count));
    }
    for (seed, client) in clients.iter_mut().enumerate() {
        client.send(&bytes(seed + 1, count)[..first]);
    }
    for (seed, mut client) in clients.into_iter().enumerate() {
        let body = bytes(seed + 1, count);
        client.send(&body[first..]);
        let response = client.response().expect(200);
        assert!(response.body == body, "the body was changed");
    }
    expect_drained(&sidecar);
    // The process's descriptors, those of at most four idle pipes, and the pooled engine
    // connections.
    wait_descriptors(&sidecar, 40 + 8 + CLIENTS);
}

/// Clients that half-close the connection and stop reading while a response fills every buffer must
/// not block other connections of the shard.
#[test]
fn half_closed_clients_that_do_not_read_do_not_block_others() {
    for driver in [Driver::Ring, Driver::Epoll] {
        let engine = RawEngine::start(|mut conn, _| {
            let Some((head, _)) = conn.request() else {
                return;
            };
            let block = [b'x'; 64 * 1024];
            if head.starts_with("GET /chunks") {
                conn.say("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n");
                let chunk = [b"10000\r\n".as_slice(), &block, b"\r\n"].concat();
                while conn.stream.write_all(&chunk).is_ok() {}
            } else if head.starts_with("GET /switch") {
                conn.say(
                    "HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
                );
                while conn.stream.write_all(&block).is_ok() {}
            } else {
                conn.say("HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n");
                while conn.stream.write_all(&block).is_ok() {}
            }
        });
        let sidecar = start(driver, engine.port());
        let upgrade = [("connection", "upgrade"), ("upgrade", "websocket")];
        for path in ["/length", "/chunks", "/switch"] {
            for _ in 0..20 {
                let mut client = sidecar.connect();
                let headers = if path == "/switch" { &upgrade[..] } else { &[] };
                client.send(request("GET", path, headers, b""));
                client.head();
                let mut sink = vec![0; 1 << 20];
                for _ in 0..8 {
                    client.socket().read_exact(&mut sink).unwrap();
                }
                client.finish();
                // The client is still connected, with its buffers full.
                sidecar.get("/health", &[]).expect(200);
            }
        }
        expect_drained(&sidecar);
    }
}
