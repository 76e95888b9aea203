//! TLS over simulated connections, against rustls' own buffered interface at the other end: a
//! mistake of ours is not made twice.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io::{self, IoSlice, Read, Write};
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, Waker};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::ServerConnection;
use rustls::{ClientConnection, Connection, RootCertStore, SupportedProtocolVersion};

use super::*;
use crate::limits::{TLS_RECEIVE_BYTES, TLS_SEND_BYTES};
use crate::net::sim::{Manner, SimConn, SimNet};
use crate::net::would_block;

/// A certificate for `localhost` that is its own authority, and its key.
fn identity() -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
    static MADE: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
    let (certificate, key) = MADE.get_or_init(|| {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".into(), "127.0.0.1".into()]);
        let made = made.unwrap();
        (made.cert.der().to_vec(), made.signing_key.serialize_der())
    });
    (
        certificate.clone().into(),
        PrivatePkcs8KeyDer::from(key.clone()).into(),
    )
}

fn server() -> Arc<ServerConfig> {
    let (certificate, key) = identity();
    let certificate = Certificate::new(vec![certificate], key).unwrap();
    Arc::new(server_config(Arc::new(certificate)).unwrap())
}

fn roots() -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(identity().0).unwrap();
    Arc::new(roots)
}

fn client(trust: Trust) -> ClientConfig {
    client_config(trust, None).unwrap()
}

/// What was reported, in order.
type Heard = Rc<RefCell<Vec<Outcome>>>;

fn listen() -> (Heard, Rc<Report>) {
    let heard = Heard::default();
    let noted = Rc::clone(&heard);
    (
        heard,
        Rc::new(move |end: &End<'_>| noted.borrow_mut().push(end.outcome)),
    )
}

fn accept(conn: SimConn, report: &Rc<Report>) -> Wire<SimConn> {
    Acceptor::new(server(), Rc::clone(report)).accept(conn)
}

fn dial(conn: SimConn, report: &Rc<Report>) -> Wire<SimConn> {
    let dialer = Dialer::new(&client(Trust::Roots(roots())), Rc::clone(report));
    dialer.dial(conn, "localhost")
}

async fn open(wire: &Wire<SimConn>) -> Opened {
    poll_fn(|cx| wire.poll_open(cx)).await
}

async fn send(wire: &Wire<SimConn>, bytes: &[u8]) -> io::Result<()> {
    let mut at = 0;
    while at < bytes.len() {
        // Now and then in two slices.
        let (first, second) = bytes[at..].split_at((bytes.len() - at) / 3);
        match wire.try_send_vectored(&[IoSlice::new(first), IoSlice::new(second)]) {
            Ok(n) => at += n,
            Err(error) if would_block(&error) => poll_fn(|cx| wire.poll_writable(cx)).await,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Everything up to the end, and how it ended.
async fn receive_all(wire: &Wire<SimConn>) -> (Vec<u8>, io::Result<()>) {
    let mut all = Vec::new();
    let mut buffer = vec![0; 7000];
    loop {
        poll_fn(|cx| wire.poll_readable(cx)).await;
        match wire.try_recv(&mut buffer) {
            Ok(0) => return (all, Ok(())),
            Ok(n) => all.extend_from_slice(&buffer[..n]),
            Err(error) if would_block(&error) => {}
            Err(error) => return (all, Err(error)),
        }
    }
}

fn is_quiet(wire: &Wire<SimConn>) -> bool {
    let mut cx = Context::from_waker(Waker::noop());
    loop {
        if wire.poll_readable(&mut cx).is_pending() {
            return true;
        }
        if wire.peek_ready() {
            return false;
        }
    }
}

/// The other end: rustls as most programs use it.
struct Peer {
    session: Connection,
    conn: SimConn,
    /// What came over the wire.
    raw: Vec<u8>,
    /// What was in it and not taken.
    inbox: Vec<u8>,
    /// The session has ended well.
    is_ended: bool,
}

struct Raw<'a>(&'a SimConn, &'a mut Vec<u8>);

impl Read for Raw<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.0.try_recv(buffer)?;
        self.1.extend_from_slice(&buffer[..n]);
        Ok(n)
    }
}

impl Write for Raw<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_send(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Peer {
    fn client(
        conn: SimConn,
        versions: &[&'static SupportedProtocolVersion],
        alpn: &[&str],
    ) -> Self {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider);
        let builder = builder.with_protocol_versions(versions).unwrap();
        let mut config = builder
            .with_root_certificates(roots())
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let name = ServerName::try_from("localhost").unwrap();
        let session = ClientConnection::new(Arc::new(config), name).unwrap();
        Self {
            session: session.into(),
            conn,
            raw: Vec::new(),
            inbox: Vec::new(),
            is_ended: false,
        }
    }

    fn server(conn: SimConn) -> Self {
        let session = ServerConnection::new(server()).unwrap();
        Self {
            session: session.into(),
            conn,
            raw: Vec::new(),
            inbox: Vec::new(),
            is_ended: false,
        }
    }

    fn step_write(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            self.session
                .write_tls(&mut Raw(&self.conn, &mut self.raw))?;
        }
        Ok(())
    }

    /// Sends what the session has to send; reads meanwhile, or both ends wait for each other.
    async fn flush(&mut self) -> io::Result<()> {
        loop {
            match self.step_write() {
                Err(error) if would_block(&error) => {}
                other => return other,
            }
            let is_readable = poll_fn(|cx| {
                if self.conn.poll_writable(cx).is_ready() {
                    return Poll::Ready(false);
                }
                self.conn.poll_readable(cx).map(|()| true)
            });
            if !is_readable.await {
                continue;
            }
            match self.session.read_tls(&mut Raw(&self.conn, &mut self.raw)) {
                Ok(1..) => self.take_in()?,
                Ok(0) => poll_fn(|cx| self.conn.poll_writable(cx)).await,
                Err(error) if would_block(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Receives once; `false` at the end of the connection.
    async fn pump(&mut self) -> io::Result<bool> {
        self.flush().await?;
        poll_fn(|cx| self.conn.poll_readable(cx)).await;
        match self.session.read_tls(&mut Raw(&self.conn, &mut self.raw)) {
            Ok(0) => return Ok(false),
            Ok(_) => {}
            Err(error) if would_block(&error) => return Ok(true),
            Err(error) => return Err(error),
        }
        let taken = self.take_in();
        let _ = self.step_write();
        taken.map(|()| true)
    }

    fn take_in(&mut self) -> io::Result<()> {
        self.session
            .process_new_packets()
            .map_err(io::Error::other)?;
        match self.session.reader().read_to_end(&mut self.inbox) {
            Ok(_) => self.is_ended = true,
            Err(error) if would_block(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn open(&mut self) -> io::Result<()> {
        while self.session.is_handshaking() {
            if !self.pump().await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        self.flush().await
    }

    async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        for piece in bytes.chunks(20_000) {
            self.session.writer().write_all(piece)?;
            self.flush().await?;
        }
        Ok(())
    }

    /// As many bytes, or fewer at the end of the session.
    async fn receive(&mut self, wanted: usize) -> io::Result<Vec<u8>> {
        while self.inbox.len() < wanted && !self.is_ended {
            if !self.pump().await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let wanted = wanted.min(self.inbox.len());
        Ok(self.inbox.drain(..wanted).collect())
    }

    async fn close(&mut self) {
        self.session.send_close_notify();
        let _ = self.flush().await;
        self.conn.finish();
    }

    /// Payload sizes of the records that carry application data, as they came.
    fn record_sizes(&self) -> Vec<usize> {
        let (mut at, mut sizes) = (0, Vec::new());
        while at + 5 <= self.raw.len() {
            let len = usize::from(u16::from_be_bytes([self.raw[at + 3], self.raw[at + 4]]));
            if self.raw[at] == 23 {
                sizes.push(len);
            }
            at += 5 + len;
        }
        sizes
    }
}

fn bytes(net: &SimNet, len: usize) -> Vec<u8> {
    let seed = net.below(251);
    (0..len as u64)
        .map(|i| u8::try_from((i * 7 + i / 251 + seed) % 251).unwrap())
        .collect()
}

fn seeds(count: u64) -> std::ops::Range<u64> {
    match std::env::var("RINGSIDE_SIM_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
    {
        Some(seed) => seed..seed + 1,
        None => 0..count,
    }
}

const VERSIONS: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS12, &rustls::version::TLS13];

/// One exchange as a server: request up, answer down, end; every byte where it belongs.
fn exchange_as_server(net: &SimNet, version: &'static SupportedProtocolVersion, sizes: [usize; 2]) {
    let (near, far) = net.pair();
    let (heard, report) = listen();
    let (up, down) = (bytes(net, sizes[0]), bytes(net, sizes[1]));
    let (up_sent, down_sent) = (up.clone(), down.clone());
    let mut peer = Peer::client(near, &[version], &["http/1.1"]);
    net.spawn(async move {
        peer.open().await.unwrap();
        peer.send(&up_sent).await.unwrap();
        let down = peer.receive(down_sent.len()).await.unwrap();
        assert!(down == down_sent, "other bytes");
        peer.close().await;
        while let Ok(true) = peer.pump().await {}
    });
    let seed = net.seed();
    let run = net.run(async move {
        let wire = accept(far, &report);
        assert_eq!(open(&wire).await, Opened::Ready);
        assert!(wire.connected().is_ok());
        let mut all = Vec::new();
        while all.len() < up.len() {
            poll_fn(|cx| wire.poll_readable(cx)).await;
            all.reserve(up.len() - all.len());
            match wire.try_recv_append(&mut all, 9000) {
                Ok(n) => assert!(n > 0, "ended early"),
                Err(error) => assert!(would_block(&error), "{error}"),
            }
        }
        assert!(all == up, "other bytes");
        send(&wire, &down).await.unwrap();
        let (rest, end) = receive_all(&wire).await;
        assert!(rest.is_empty() && end.is_ok(), "{rest:?} {end:?}");
        // A kept record leaves while something else is waited for.
        wire.finish();
        wire.forget_readable();
        let _ = receive_all(&wire).await;
    });
    let run = run.unwrap_or_else(|stuck| panic!("{stuck}"));
    assert_eq!(run.panics, 0, "seed {seed}");
    assert_eq!(*heard.borrow(), [Outcome::Ok], "seed {seed}");
}

#[test]
fn a_server_under_many_seeds() {
    for seed in seeds(300) {
        let net = SimNet::new(seed);
        let len = |bound| usize::try_from(net.below(bound)).unwrap();
        let bound = if seed % 10 == 0 { 300_000 } else { 5000 };
        let sizes = [1 + len(bound), 1 + len(bound)];
        exchange_as_server(&net, VERSIONS[(seed % 2) as usize], sizes);
    }
}

#[test]
fn a_server_whose_every_byte_comes_alone() {
    for version in VERSIONS {
        let net = SimNet::new(1);
        net.set_manner(Some(Manner::calm(1)));
        exchange_as_server(&net, version, [300, 300]);
    }
}

#[test]
fn a_client_under_many_seeds() {
    for seed in seeds(300) {
        let net = SimNet::new(seed);
        if seed % 16 == 15 {
            net.set_manner(Some(Manner::calm(1)));
        }
        let (near, far) = net.pair();
        let (heard, report) = listen();
        let len =
            usize::try_from(1 + net.below(if seed % 16 == 7 { 300_000 } else { 3000 })).unwrap();
        let payload = bytes(&net, len);
        let wanted = payload.clone();
        net.spawn(async move {
            let mut peer = Peer::server(far);
            peer.open().await.unwrap();
            let got = peer.receive(wanted.len()).await.unwrap();
            assert!(got == wanted, "other bytes");
            peer.send(&got).await.unwrap();
            peer.close().await;
            while let Ok(true) = peer.pump().await {}
        });
        let run = net.run(async move {
            let wire = dial(near, &report);
            poll_fn(|cx| wire.poll_writable(cx)).await;
            assert!(wire.connected().is_ok());
            send(&wire, &payload).await.unwrap();
            let (got, end) = receive_all(&wire).await;
            assert!(got == payload && end.is_ok(), "{} {end:?}", got.len());
        });
        let run = run.unwrap_or_else(|stuck| panic!("{stuck}"));
        assert_eq!(run.panics, 0, "seed {seed}");
        assert_eq!(*heard.borrow(), [Outcome::Ok], "seed {seed}");
    }
}
