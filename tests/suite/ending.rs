//! The process serves requests and ends even if something hangs: a log that is not read, a file
//! that is a named pipe, a shard that does not run.

use std::io::{Read, Write, pipe};
use std::process::{Child, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use mock_engine::{Engine, EngineConfig, Fault};
use rustix::process::{Pid, Signal, kill_process};

use crate::certificates::{Authority, Folder};
use crate::client::{Client, request};
use crate::harness::{CHAT, Launch, Pair, Sidecar, free_ports, ringside, start_decoder, wait_for};

/// Default capacity of a pipe.
const PIPE_BYTES: usize = 64 * 1024;

/// A process that is killed when dropped.
struct Process(Child);

impl Process {
    fn terminate(&mut self) -> ExitStatus {
        kill_process(Pid::from_child(&self.0), Signal::TERM).unwrap();
        let child = &mut self.0;
        wait_for("the process to exit", || child.try_wait().unwrap())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns the write end of a pipe that is full, and the read end.
fn full_pipe() -> (Stdio, std::io::PipeReader) {
    let (reader, mut writer) = pipe().unwrap();
    writer.write_all(&[b'.'; PIPE_BYTES]).unwrap();
    (writer.into(), reader)
}

/// Starts a sidecar whose standard output and error are these, and waits until it serves.
fn serve(decoder: &str, args: &[&str], stdout: Stdio, stderr: Stdio) -> (Process, u16) {
    let port = free_ports(1);
    let child = ringside()
        .args(["sidecar", "--secure-proxy=false", "--admin-address=off"])
        .arg(format!("--port={port}"))
        .arg(decoder)
        .args(args)
        .stdout(stdout)
        .stderr(stderr)
        .spawn();
    let process = Process(child.unwrap());
    wait_for("a listener", || {
        std::net::TcpStream::connect(("127.0.0.1", port)).ok()
    });
    (process, port)
}

#[test]
fn a_full_standard_error_stops_neither_requests_nor_the_end() {
    let (engine, decoder) = start_decoder(EngineConfig::default());
    let (stderr, _unread) = full_pipe();
    let args = ["--log-level=debug", "--drain-timeout=500ms"];
    let (mut process, port) = serve(&decoder, &args, Stdio::null(), stderr);
    Client::connect(port)
        .ask("GET", "/v1/models", &[], b"")
        .expect(200);
    // A request that the drain has to cut.
    engine.fault(Fault::StallBeforeHead, 1);
    let mut held = Client::connect(port);
    held.send(request("GET", "/v1/models", &[], b""));
    engine
        .wait_for(crate::client::DEADLINE, |log| log.len() == 2)
        .unwrap();
    assert_eq!(process.terminate().code(), Some(0));
}

/// The kernel may close the sockets of a killed process after it has reported its end.
#[test]
fn a_port_that_is_in_use_for_a_moment_is_tried_again() {
    let (_engine, decoder) = start_decoder(EngineConfig::default());
    let port = free_ports(1);
    let holder = std::net::TcpListener::bind(("::", port)).unwrap();
    let child = ringside()
        .args(["sidecar", "--secure-proxy=false", "--admin-address=off"])
        .arg(format!("--port={port}"))
        .arg(decoder)
        .stderr(Stdio::null())
        .spawn();
    let mut process = Process(child.unwrap());
    std::thread::park_timeout(Duration::from_millis(100));
    assert!(process.0.try_wait().unwrap().is_none(), "it has ended");
    drop(holder);
    wait_for("a response", || {
        let stream = std::net::TcpStream::connect(("127.0.0.1", port)).ok()?;
        drop(stream);
        Some(())
    });
    assert_eq!(process.terminate().code(), Some(0));
}

#[test]
fn access_log_lines_that_cannot_be_written_are_counted() {
    let (_engine, decoder) = start_decoder(EngineConfig::default());
    let (stdout, _unread) = full_pipe();
    let args = ["--access-log=stdout"];
    let (mut process, port) = serve(&decoder, &args, stdout, Stdio::piped());
    for _ in 0..3 {
        Client::connect(port)
            .ask("GET", "/v1/models", &[], b"")
            .expect(200);
    }
    assert_eq!(process.terminate().code(), Some(0));
    let mut log = String::new();
    process
        .0
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut log)
        .unwrap();
    assert!(log.contains("access log: 3 lines were lost"), "{log}");
}

#[test]
fn a_certificate_that_is_a_named_pipe_stops_nothing() {
    let folder = Folder::new();
    let identity = Authority::new("x").sign(&["localhost"]);
    folder.write_pair(&identity);
    let engine = Engine::start(EngineConfig::default(), 0).unwrap();
    let mut sidecar = Sidecar::launch(&Launch {
        args: &[
            &format!("--cert-path={}", folder.text()),
            "--drain-timeout=500ms",
        ],
        decoder_port: engine.port(),
        tls: true,
        ..Launch::default()
    });
    let at = folder.path().join("tls.key");
    let fifo = folder.path().join("fifo");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    std::fs::rename(fifo, at).unwrap();
    sidecar.wait_stderr("not a regular file");
    assert_eq!(sidecar.admin("/livez").unwrap().status, 200);
    sidecar.terminate();
    assert_eq!(sidecar.wait_exit().code(), Some(0));
}

#[test]
fn a_shard_that_does_not_run_is_not_alive() {
    if !cfg!(debug_assertions) {
        eprintln!("skipped: this build cannot be made to block");
        return;
    }
    let mut pair = Pair::start(&["--cores=1", "--drain-timeout=500ms"]);
    assert_eq!(pair.sidecar.admin("/livez").unwrap().status, 200);
    let block = [("x-ringside-test-block", "1000")];
    let mut client = pair.sidecar.connect();
    client.send(request("POST", CHAT, &block, b"{}"));
    let began = Instant::now();
    let page = loop {
        let page = pair.sidecar.admin("/livez").unwrap();
        if page.status == 503 {
            break page;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "still alive");
        crate::harness::poll_interval();
    };
    assert_eq!(page.text(), "[-]shard 0: does not run\n");
    pair.sidecar.wait_stderr("the shard has not run for 10 s");
    pair.sidecar.terminate();
    assert_eq!(pair.sidecar.wait_exit().code(), Some(0));
}
