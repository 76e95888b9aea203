//! Engines on Unix sockets: ownership of the socket file, and the same behaviour as over TCP.

use std::io::{ErrorKind, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use mock_engine::{Engine, EngineConfig, Place};

use crate::client::{DEADLINE, post};

/// A temporary directory, removed on drop.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let nth = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("mock-engine-{}-{nth}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self) -> PathBuf {
        self.0.join("engine.sock")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn start(path: &Path) -> std::io::Result<Engine> {
    let place = Place::Unix(path.to_str().unwrap().to_owned());
    Engine::start_on(EngineConfig::default(), place)
}

#[track_caller]
fn expect_serves(stream: std::io::Result<UnixStream>) {
    let mut stream = stream.unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let request = post("/x", "body").replace("\r\n\r\n", "\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).unwrap();
    assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
}

#[test]
fn the_socket_file_is_removed_with_the_engine() {
    let folder = Folder::new();
    let path = folder.path();
    // A killed engine leaves a stale socket file.
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let engine = start(&path).unwrap();
    assert_eq!(
        engine.place().to_string(),
        format!("unix:{}", path.display())
    );
    assert_eq!(engine.port(), 0);
    expect_serves(UnixStream::connect(&path));
    assert_eq!(start(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
    expect_serves(UnixStream::connect(&path));
    // While the engine refuses connects, its socket file remains.
    engine.refuse(true);
    let refused = UnixStream::connect(&path).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    engine.refuse(false);
    expect_serves(UnixStream::connect(&path));
    drop(engine);
    assert!(!path.exists());
}

#[test]
fn files_that_belong_to_others_are_not_removed() {
    let folder = Folder::new();
    let path = folder.path();
    std::fs::write(&path, "precious").unwrap();
    let error = start(&path).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    std::fs::remove_file(&path).unwrap();
    let old = start(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let new = start(&path).unwrap();
    drop(old);
    expect_serves(UnixStream::connect(&path));
    drop(new);
}

#[test]
fn ranks_and_abstract_names() {
    let name = format!("mock-engine-{}-{{rank}}", std::process::id());
    let place = Place::Unix(format!("@{name}"));
    let engines = Engine::start_ranks_on(EngineConfig::default(), place, 2).unwrap();
    for (rank, engine) in engines.iter().enumerate() {
        let name = name.replace("{rank}", &rank.to_string());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        expect_serves(UnixStream::connect_addr(&address));
        assert_eq!(engine.requests().len(), 1);
    }
    let one = Place::Unix("/tmp/one.sock".to_owned());
    let error = Engine::start_ranks_on(EngineConfig::default(), one, 2).unwrap_err();
    assert!(error.to_string().contains("{rank}"), "{error}");
}
