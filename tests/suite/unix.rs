//! Engines on Unix sockets: everything works as over TCP, and problems with a socket are logged.
//! (With `RINGSIDE_SUITE_UNIX=1`, all tests of pairs also run over Unix sockets.)

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mock_engine::{Engine, EngineConfig, Fault, HandoffRegistry, Place, State};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::client::{DEADLINE, End, request};
use crate::harness::{
    CHAT, Launch, PREFILLER, Pair, Sidecar, connections, ringside, sha256, wait_for,
};
use crate::harness_more::{
    Driver, Leave, ask_for, expect_drained, expect_handoffs_sound, expect_healthy, expect_text,
    split_request,
};

const DRIVERS: [Driver; 2] = [Driver::Ring, Driver::Epoll];

/// A temporary folder for sockets, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let nth = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ringside-unix-{}-{nth}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn socket(&self) -> String {
        self.0.join("engine.sock").to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn engine_at(config: EngineConfig, path: &str) -> Engine {
    Engine::start_on(config, Place::Unix(path.to_owned())).unwrap()
}

/// Starts a sidecar for a decoder that listens at `path`, now or later.
#[track_caller]
fn sidecar_at(driver: Driver, path: &str, args: &[&str]) -> Sidecar {
    let socket = format!("--model-server-socket={path}");
    Sidecar::launch(&Launch {
        args: &[&[&*socket], args].concat(),
        ring_errno: driver.errno(),
        ..Launch::default()
    })
}

/// Starts a pair with the prefill engine on TCP and the decode engine at `path`.
#[track_caller]
fn pair_at(driver: Driver, path: &str, change_decode: impl FnOnce(&mut EngineConfig)) -> Pair {
    let handoffs = HandoffRegistry::new();
    let checked = |config| EngineConfig {
        verify_handoff: Some(handoffs.clone()),
        ..config
    };
    let mut decode = checked(EngineConfig::decode());
    change_decode(&mut decode);
    Pair {
        prefill: Engine::start(checked(EngineConfig::prefill()), 0).unwrap(),
        decode: engine_at(decode, path),
        sidecar: sidecar_at(driver, path, &[]),
        handoffs,
    }
}

#[test]
fn both_drivers_serve_split_streaming_and_pass_through_requests() {
    for driver in DRIVERS {
        let folder = Folder::new();
        let path = folder.socket();
        let pair = pair_at(driver, &path, |_| {});
        pair.sidecar.wait_stderr(&format!("decoder: unix:{path}"));
        expect_healthy(&pair);
        // Tokens are not held back until more data follows: these three arrive although the engine
        // stalls after them.
        pair.decode
            .fault(Fault::StallMidStream { after_events: 3 }, 1);
        let mut client = pair.sidecar.connect();
        client.send(split_request(&pair, &ask_for(20, true).1));
        assert_eq!(client.head().status, 200);
        let mut text = String::new();
        while text.matches("\n\n").count() < 3 {
            text += &String::from_utf8(client.chunk().unwrap()).unwrap();
        }
        drop(client);
        expect_drained(&pair.sidecar);
        // Request and response bodies that are larger than any buffer.
        let padding = "x".repeat(1 << 20);
        let (prompt, body) = ask_for(20_000, true);
        let body = body.replacen('{', &format!("{{\"user\":\"{padding}\","), 1);
        let response = pair.post(CHAT, &body).expect(200);
        expect_text(&response, &prompt, 20_000);
        pair.decode.clear();
        let upload = "y".repeat(1 << 20);
        let response = pair.sidecar.post("/upload", &upload, &[]).expect(200);
        let seen = pair.decode.requests().pop().unwrap();
        assert_eq!(seen.body_sha256, sha256(upload.as_bytes()));
        assert_eq!(response.json()["body_bytes"], upload.len());
        expect_drained(&pair.sidecar);
        expect_handoffs_sound(&pair);
        pair.sidecar.expect_sound();
    }
}

#[test]
fn one_connection_serves_many_requests() {
    let folder = Folder::new();
    let path = folder.socket();
    let pair = pair_at(Driver::Ring, &path, |_| {});
    for nth in 0..8 {
        let (prompt, body) = ask_for(3, nth % 2 == 0);
        expect_text(&pair.post(CHAT, &body).expect(200), &prompt, 3);
    }
    assert_eq!(connections(&pair.decode), 1);
}

#[test]
fn the_clients_host_field_is_sent_to_an_engine_on_a_socket() {
    let folder = Folder::new();
    let path = folder.socket();
    let pair = pair_at(Driver::Ring, &path, |_| {});
    let body = ask_for(1, false).1;
    let mut client = pair.sidecar.connect();
    let given = request("POST", CHAT, &[("host", "model.example")], body.as_bytes());
    client.send(given);
    client.response_to("POST").expect(200);
    let mut client = pair.sidecar.connect();
    client.send("GET /v1/models HTTP/1.0\r\n\r\n");
    client.response_to("GET").expect(200);
    let seen = pair.decode.requests();
    assert_eq!(seen[0].header_all("host"), ["model.example"]);
    // If the client sends no `Host`, the engine receives `localhost` rather than the socket path.
    assert_eq!(seen[1].header_all("host"), ["localhost"]);
    for seen in seen {
        assert_eq!(seen.header("x-forwarded-for"), Some("127.0.0.1"));
    }
}

#[test]
fn readiness_is_checked_over_the_socket() {
    let folder = Folder::new();
    let path = folder.socket();
    let pair = pair_at(Driver::Ring, &path, |_| {});
    let line = format!("decoder unix:{path}: ready\n");
    wait_for("the decoder to be ready", || {
        let page = pair.sidecar.admin("/readyz?verbose")?.text();
        page.contains(&line).then_some(())
    });
    let asked = pair.decode.requests().pop().unwrap();
    assert_eq!(asked.path(), "/health");
    assert_eq!(asked.header_all("host"), ["localhost"]);
    let silent = sidecar_at(
        Driver::Ring,
        &folder.socket().replace("engine", "none"),
        &[],
    );
    wait_for("the decoder to be unreachable", || {
        let page = silent.admin("/readyz?verbose")?.text();
        page.contains("none.sock: unreachable\n").then_some(())
    });
}

#[test]
fn a_client_disconnect_aborts_the_request_at_an_engine_on_a_socket() {
    for driver in DRIVERS {
        let folder = Folder::new();
        let path = folder.socket();
        let pair = pair_at(driver, &path, |decode| {
            decode.itl = Duration::from_millis(5);
        });
        for leave in Leave::ALL {
            for silent in [true, false] {
                pair.decode.clear();
                if silent {
                    pair.decode.fault(Fault::StallBeforeHead, 1);
                }
                let mut client = pair.sidecar.connect();
                client.send(split_request(&pair, &ask_for(1_000_000, true).1));
                if silent {
                    let responding = State::Responding;
                    let begun = pair
                        .decode
                        .wait_for(DEADLINE, |log| log.iter().any(|s| s.state == responding));
                    begun.unwrap();
                } else {
                    client.head();
                    client.chunk().unwrap();
                }
                let (_, kept) = leave.now(client);
                let left = |log: &[mock_engine::Seen]| log.iter().all(|s| s.state.is_aborted());
                pair.decode.wait_for(DEADLINE, left).unwrap();
                drop(kept);
            }
        }
        expect_drained(&pair.sidecar);
        expect_handoffs_sound(&pair);
        pair.sidecar.expect_sound();
    }
}

#[test]
fn a_truncated_response_never_looks_complete() {
    for driver in DRIVERS {
        let folder = Folder::new();
        let path = folder.socket();
        let pair = pair_at(driver, &path, |_| {});
        for fault in [
            Fault::ResetMidBody { after_events: 2 },
            Fault::TruncateMidBody { after_events: 2 },
        ] {
            pair.decode.fault(fault, 1);
            let mut client = pair.sidecar.connect();
            client.send(split_request(&pair, &ask_for(50, true).1));
            let head = client.head();
            let (_, end) = client.body(head.framing("POST"));
            assert_ne!(end, End::Complete);
        }
        for fault in [Fault::ResetBeforeHead, Fault::CloseBeforeHead] {
            pair.decode.fault(fault, u32::MAX);
            let body = ask_for(5, true).1;
            let response = pair.sidecar.post(CHAT, &body, &[]);
            response.expect_error(502, "decode_reset");
            pair.decode.clear_faults();
        }
        expect_healthy(&pair);
        expect_drained(&pair.sidecar);
    }
}

#[test]
fn a_restarted_engine_is_used_immediately() {
    for driver in DRIVERS {
        let folder = Folder::new();
        let path = folder.socket();
        let sidecar = sidecar_at(driver, &path, &[]);
        for _ in 0..3 {
            let engine = engine_at(EngineConfig::decode(), &path);
            // The second request uses a pooled connection.
            for _ in 0..2 {
                let (prompt, body) = ask_for(3, true);
                let response = sidecar.post(CHAT, &body, &[]).expect(200);
                expect_text(&response, &prompt, 3);
            }
            assert_eq!(engine.requests().len(), 2);
            drop(engine);
            assert!(!Path::new(&path).exists());
            let (_, body) = ask_for(3, true);
            let response = sidecar.post(CHAT, &body, &[]);
            response.expect_error(503, "decode_refused");
        }
        sidecar.expect_sound();
    }
}

#[test]
fn problems_with_a_socket_are_logged() {
    for driver in DRIVERS {
        let folder = Folder::new();
        let path = folder.socket();
        let sidecar = sidecar_at(driver, &path, &[]);
        let refused = |words: &str| {
            let (_, body) = ask_for(3, true);
            let response = sidecar.post(CHAT, &body, &[]);
            let response = response.expect_error(503, "decode_refused");
            assert_eq!(response.header("retry-after"), Some("1"));
            assert!(
                !response.text().contains("engine.sock"),
                "{}",
                response.text()
            );
            sidecar.wait_stderr(&format!("unix:{path}: {words}"));
        };
        refused("no such socket; start the engine with --uds");
        drop(UnixListener::bind(&path).unwrap());
        refused("connection refused");
        // A repeated error is not logged again.
        refused("connection refused");
        std::fs::remove_file(&path).unwrap();
        let datagrams = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        refused("Protocol wrong type for socket");
        drop(datagrams);
        let log = sidecar.stderr();
        assert_eq!(log.matches(": connection refused").count(), 1, "{log}");
        sidecar.expect_sound();
    }
}

/// A listening socket whose accept queue is full, and the connections in that queue.
struct Full {
    listener: UnixListener,
    fill: Vec<rustix::fd::OwnedFd>,
}

impl Full {
    fn at(path: &str) -> Self {
        let socket = |flags| {
            let (family, kind) = (AddressFamily::UNIX, SocketType::STREAM);
            rustix::net::socket_with(family, kind, flags, None).unwrap()
        };
        let address = SocketAddrUnix::new(path).unwrap();
        let listener = socket(SocketFlags::CLOEXEC);
        rustix::net::bind(&listener, &address).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let mut fill = Vec::new();
        loop {
            let one = socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
            match rustix::net::connect(&one, &address) {
                Ok(()) => fill.push(one),
                Err(rustix::io::Errno::AGAIN) => break,
                Err(error) => panic!("{error}"),
            }
        }
        let listener = listener.into();
        Self { listener, fill }
    }

    /// Accepts and drops the connections that fill the accept queue, so that the sidecar's waiting
    /// connect succeeds. Accepts and returns the next connection, which is the sidecar's.
    fn hear(mut self) -> UnixStream {
        for _ in self.fill.drain(..) {
            drop(self.listener.accept().unwrap());
        }
        self.listener.accept().unwrap().0
    }
}

#[test]
fn a_full_accept_queue_is_waited_for_until_the_connect_timeout() {
    use std::io::{Read, Write};
    for driver in DRIVERS {
        let folder = Folder::new();
        let path = folder.socket();
        let full = Full::at(&path);
        let patient = sidecar_at(driver, &path, &["--connect-timeout=1h"]);
        let mut client = patient.connect();
        client.send(request("GET", "/x", &[], b""));
        patient.wait_stderr(&format!("unix:{path}: backlog is full"));
        // A client disconnect during this wait is detected.
        let mut leaver = patient.connect();
        leaver.send(request("GET", "/left", &[], b""));
        patient.wait_metric("ringside_in_flight", &[], 2.0);
        drop(leaver);
        patient.wait_metric("ringside_in_flight", &[], 1.0);
        let hasty = sidecar_at(driver, &path, &["--connect-timeout=50ms"]);
        let response = hasty.get("/x", &[]);
        response.expect_error(504, "decode_connect_timeout");
        // Once the queue has been emptied, the waiting request is served.
        let mut stream = full.hear();
        let mut request = [0; 4096];
        let received = stream.read(&mut request).unwrap();
        assert!(request[..received].starts_with(b"GET /x HTTP/1.1\r\n"));
        let response = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
        stream.write_all(response).unwrap();
        assert_eq!(client.response_to("GET").expect(200).text(), "ok");
        drop(client);
        for sidecar in [patient, hasty] {
            expect_drained(&sidecar);
            sidecar.expect_sound();
        }
    }
}

#[test]
fn each_rank_has_a_separate_socket() {
    let folder = Folder::new();
    let path = folder.0.join("rank-{rank}.sock");
    let path = path.to_str().unwrap();
    let place = Place::Unix(path.to_owned());
    let engines = Engine::start_ranks_on(EngineConfig::decode(), place, 2).unwrap();
    let socket = format!("--model-server-socket={path}");
    let sidecar = Sidecar::launch(&Launch {
        args: &["--data-parallel-size=2", &socket],
        ranks: 2,
        ..Launch::default()
    });
    for rank in [1, 0] {
        let mut client = sidecar.connect_to(rank);
        let (prompt, body) = ask_for(3, true);
        let response = client.ask("POST", CHAT, &[], body.as_bytes()).expect(200);
        expect_text(&response, &prompt, 3);
        assert_eq!(engines[usize::from(rank)].requests().len(), 1);
    }
    sidecar.wait_stderr("rank-0.sock to unix:");
}

#[test]
fn abstract_socket_names_are_supported() {
    for driver in DRIVERS {
        let path = format!("@ringside-suite-{}-abstract-{driver:?}", std::process::id());
        let pair = pair_at(driver, &path, |_| {});
        pair.sidecar.wait_stderr(&format!("decoder: unix:{path}"));
        expect_healthy(&pair);
    }
}

/// Sockets are local to the machine, so a client must not be able to name one.
#[test]
fn clients_cannot_name_sockets() {
    let folder = Folder::new();
    let path = folder.socket();
    let pair = pair_at(Driver::Ring, &path, |_| {});
    let precious = folder.0.join("precious.sock");
    let precious = precious.to_str().unwrap();
    let listener = UnixListener::bind(precious).unwrap();
    listener.set_nonblocking(true).unwrap();
    let abstract_name = path.replacen('/', "@", 1);
    for name in [PREFILLER, "x-prefiller-url"] {
        for target in [
            format!("unix:{precious}"),
            format!("http+unix:{precious}"),
            format!("http://unix:{precious}"),
            format!("unix:{abstract_name}"),
            format!("unix:{path}"),
            precious.to_owned(),
            format!("127.0.0.1:1,unix:{precious}"),
        ] {
            let (_, body) = ask_for(3, true);
            let response = pair.sidecar.post(CHAT, &body, &[(name, &target)]);
            response.expect_error(502, "bad_target");
        }
    }
    let error = listener.accept().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
    assert!(pair.decode.requests().is_empty());
}

#[test]
fn the_mock_removes_its_socket_on_exit() {
    let folder = Folder::new();
    let path = folder.socket();
    drop(UnixListener::bind(&path).unwrap());
    let mut mock = ringside()
        .args(["mock", "--uds", &path])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the mock to listen", || UnixStream::connect(&path).ok());
    let sidecar = sidecar_at(Driver::Ring, &path, &[]);
    let (prompt, body) = ask_for(3, true);
    let response = sidecar.post(CHAT, &body, &[]).expect(200);
    expect_text(&response, &prompt, 3);
    let pid = rustix::process::Pid::from_child(&mock);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let status = wait_for("the mock to exit", || mock.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    assert!(!Path::new(&path).exists());
}
