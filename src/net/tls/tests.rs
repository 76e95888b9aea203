//! Tests of TLS over simulated connections. The other end is rustls' own buffered interface, so
//! that an error in the code under test is not repeated in its peer.

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
use crate::config::TlsVersion;
use crate::limits::TLS_SEND_BYTES;
use crate::net::sim::{LinkBehaviour, SimConn, SimNet};
use crate::net::would_block;

/// Returns a self-signed certificate for `localhost`, usable as its own root, and its key.
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
    Arc::new(server_config(Arc::new(certificate), TlsVersion::default(), &[]).unwrap())
}

fn roots() -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add(identity().0).unwrap();
    Arc::new(roots)
}

fn client(trust: Trust) -> ClientConfig {
    client_config(trust, None).unwrap()
}

/// The outcomes that were passed to the [`Report`] callback, in order.
type Outcomes = Rc<RefCell<Vec<Outcome>>>;

fn listen() -> (Outcomes, Rc<Report>) {
    let heard = Outcomes::default();
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
        // In two slices.
        let (first, second) = bytes[at..].split_at((bytes.len() - at) / 3);
        match wire.try_send_vectored(&[IoSlice::new(first), IoSlice::new(second)]) {
            Ok(n) => at += n,
            Err(error) if would_block(&error) => poll_fn(|cx| wire.poll_writable(cx)).await,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Receives until the end of the stream or an error. Returns all received bytes and how the stream
/// ended.
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

/// The other end of the connection under test: a rustls session with the buffered interface that
/// most programs use.
struct Peer {
    session: Connection,
    conn: SimConn,
    /// All bytes received from the connection so far, still encrypted.
    raw: Vec<u8>,
    /// Decrypted bytes that [`Peer::receive`] has not returned yet.
    inbox: Vec<u8>,
    /// Whether the connection under test has sent a `close_notify`.
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

    /// Sends the pending output of the session. Reads in the meantime, otherwise both ends could
    /// wait for each other to read.
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

    /// Sends the pending output, then receives and decrypts once. Returns `false` at the end of the
    /// connection.
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

    /// Receives `wanted` bytes, or fewer if the session ends with a `close_notify` before. Fails if
    /// the connection ends without one.
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

    /// Returns the lengths in the headers of the received application data records (their encrypted
    /// payloads), in order.
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

/// Runs one exchange with the code under test as the server: a request of `sizes[0]` bytes, a
/// response of `sizes[1]` bytes, and a clean close. Every byte must arrive unchanged.
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
        assert!(down == down_sent, "the bytes differ");
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
        assert!(all == up, "the bytes differ");
        send(&wire, &down).await.unwrap();
        let (rest, end) = receive_all(&wire).await;
        assert!(rest.is_empty() && end.is_ok(), "{rest:?} {end:?}");
        // A kept record is sent while the connection waits for something else.
        wire.finish();
        let _ = receive_all(&wire).await;
    });
    let run = run.unwrap_or_else(|stuck| panic!("{stuck}"));
    assert_eq!(run.panics, 0, "seed {seed}");
    assert_eq!(*heard.borrow(), [Outcome::Ok], "seed {seed}");
}

#[test]
fn a_server_exchange_succeeds_under_many_seeds() {
    for seed in seeds(300) {
        let net = SimNet::new(seed);
        let len = |bound| usize::try_from(net.below(bound)).unwrap();
        let bound = if seed % 10 == 0 { 300_000 } else { 5000 };
        let sizes = [1 + len(bound), 1 + len(bound)];
        exchange_as_server(&net, VERSIONS[(seed % 2) as usize], sizes);
    }
}

#[test]
fn a_server_exchange_succeeds_when_bytes_arrive_one_at_a_time() {
    for version in VERSIONS {
        let net = SimNet::new(1);
        net.set_manner(Some(LinkBehaviour::calm(1)));
        exchange_as_server(&net, version, [300, 300]);
    }
}

#[test]
fn a_client_exchange_succeeds_under_many_seeds() {
    for seed in seeds(300) {
        let net = SimNet::new(seed);
        if seed % 16 == 15 {
            net.set_manner(Some(LinkBehaviour::calm(1)));
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
            assert!(got == wanted, "the bytes differ");
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

/// Runs `main`, and fails with the seed if it deadlocks or a task panics.
fn run(net: &SimNet, main: impl Future<Output = ()> + 'static) {
    let run = net.run(main);
    let run = run.unwrap_or_else(|stuck| panic!("{stuck}"));
    assert_eq!(run.panics, 0, "seed {}", net.seed());
}

/// Returns a simulation whose connections have a large capacity and no delays.
fn calm(seed: u64) -> SimNet {
    let net = SimNet::new(seed);
    net.set_manner(Some(LinkBehaviour::calm(1 << 20)));
    net
}

#[test]
fn bytes_kept_for_a_slow_peer_are_bounded_and_sent_in_order() {
    for seed in seeds(40) {
        let net = SimNet::new(seed);
        let capacity = usize::try_from(2048 + net.below(6000)).unwrap();
        net.set_manner(Some(LinkBehaviour::calm(capacity)));
        let (near, far) = net.pair();
        let (_, report) = listen();
        let mut peer = Peer::client(near, &[&rustls::version::TLS13], &[]);
        let payload = bytes(&net, 400_000);
        let wanted = payload.clone();
        let (go, gone) = (Rc::new(std::cell::Cell::new(false)), net.clone());
        let may_read = Rc::clone(&go);
        net.spawn(async move {
            peer.open().await.unwrap();
            while !may_read.get() {
                gone.sleep(std::time::Duration::from_millis(1)).await;
            }
            assert!(peer.receive(wanted.len()).await.unwrap() == wanted);
            peer.close().await;
        });
        run(&net, async move {
            let wire = accept(far, &report);
            assert_eq!(open(&wire).await, Opened::Ready);
            let Wire::Tls(tls) = &wire else {
                unreachable!()
            };
            let mut at = 0;
            let refused = loop {
                match wire.try_send(&payload[at..]) {
                    Ok(sent) => at += sent,
                    Err(error) => break error,
                }
            };
            assert!(would_block(&refused));
            let kept = || tls.kept()[1];
            assert!(kept() > 0 && kept() < TLS_SEND_BYTES + 4096, "{}", kept());
            // Further sends are refused, and nothing more is kept.
            for _ in 0..10 {
                let before = kept();
                assert!(
                    wire.try_send(&payload[at..])
                        .is_err_and(|error| would_block(&error))
                );
                assert!(kept() <= before);
            }
            let mut cx = Context::from_waker(Waker::noop());
            assert!(wire.poll_writable(&mut cx).is_pending());
            go.set(true);
            send(&wire, &payload[at..]).await.unwrap();
            assert_eq!(kept(), 0, "all sent bytes were accepted");
            let (rest, end) = receive_all(&wire).await;
            assert!(rest.is_empty() && end.is_ok(), "{end:?}");
        });
    }
}

#[test]
fn an_end_without_close_notify_is_an_error() {
    for seed in seeds(40) {
        for has_close_notify in [true, false] {
            let net = SimNet::new(seed);
            let (near, far) = net.pair();
            let (_, report) = listen();
            let mut peer = Peer::client(near, &[VERSIONS[(seed % 2) as usize]], &[]);
            net.spawn(async move {
                peer.open().await.unwrap();
                peer.send(b"the whole or a part").await.unwrap();
                if has_close_notify {
                    peer.close().await;
                } else {
                    peer.conn.finish();
                }
                while let Ok(true) = peer.pump().await {}
            });
            run(&net, async move {
                let wire = accept(far, &report);
                assert_eq!(open(&wire).await, Opened::Ready);
                let (got, end) = receive_all(&wire).await;
                assert_eq!(got, b"the whole or a part");
                assert_eq!(end.is_ok(), has_close_notify, "seed {seed}: {end:?}");
                poll_fn(|cx| wire.poll_hangup(cx)).await;
            });
        }
    }
}

#[test]
fn a_drop_sends_close_notify_unless_the_close_is_abrupt() {
    for (abrupt, wanted) in [(false, true), (true, false)] {
        let net = calm(3);
        let (near, far) = net.pair();
        let (_, report) = listen();
        let heard = Rc::new(std::cell::Cell::new(None));
        let noted = Rc::clone(&heard);
        let mut peer = Peer::client(near, &[&rustls::version::TLS13], &[]);
        let waiting = net.clone();
        net.spawn(async move {
            peer.open().await.unwrap();
            while let Ok(true) = peer.pump().await {}
            noted.set(Some(peer.is_ended));
        });
        run(&net, async move {
            let wire = accept(far, &report);
            assert_eq!(open(&wire).await, Opened::Ready);
            send(&wire, b"an answer").await.unwrap();
            if abrupt {
                wire.reset_on_close();
            }
            drop(wire);
            while heard.get().is_none() {
                waiting.sleep(std::time::Duration::from_millis(1)).await;
            }
            assert_eq!(heard.get(), Some(wanted));
        });
    }
}

#[test]
fn an_idle_connection_becomes_ready_only_for_bytes_or_the_end() {
    for last in ["bytes", "end"] {
        let net = calm(5);
        let (near, far) = net.pair();
        let (_, report) = listen();
        let step = Rc::new(std::cell::Cell::new(0));
        let stepped = Rc::clone(&step);
        let waiting = net.clone();
        net.spawn(async move {
            let ms = std::time::Duration::from_millis(1);
            // Session tickets follow the handshake.
            let mut peer = Peer::server(far);
            peer.open().await.unwrap();
            stepped.set(1);
            while stepped.get() < 2 {
                waiting.sleep(ms).await;
            }
            let Connection::Server(session) = &mut peer.session else {
                unreachable!()
            };
            session.refresh_traffic_keys().unwrap();
            peer.flush().await.unwrap();
            stepped.set(3);
            while stepped.get() < 4 {
                waiting.sleep(ms).await;
            }
            if last == "bytes" {
                peer.send(b"!").await.unwrap();
            } else {
                peer.close().await;
            }
            stepped.set(5);
            while let Ok(true) = peer.pump().await {}
        });
        let waiting = net.clone();
        run(&net, async move {
            let ms = std::time::Duration::from_millis(1);
            let reach = async |wanted: i32| {
                while step.get() < wanted {
                    waiting.sleep(ms).await;
                }
            };
            let wire = dial(near, &report);
            poll_fn(|cx| wire.poll_writable(cx)).await;
            reach(1).await;
            assert!(is_quiet(&wire), "a ticket");
            assert!(
                wire.try_recv(&mut [0; 9])
                    .is_err_and(|error| would_block(&error))
            );
            step.set(2);
            reach(3).await;
            assert!(is_quiet(&wire), "a key update");
            // The peer also requested an update of our keys, which is sent together with the next
            // bytes.
            send(&wire, b"later").await.unwrap();
            step.set(4);
            reach(5).await;
            assert!(!is_quiet(&wire), "{last}");
        });
    }
}

#[test]
fn a_send_is_a_single_record_if_it_fits() {
    let net = calm(7);
    let (near, far) = net.pair();
    let (_, report) = listen();
    let mut peer = Peer::client(near, &[&rustls::version::TLS13], &[]);
    let sizes = [1, 200, 16 * 1024, 16 * 1024 + 1, 64 * 1024, 70_000];
    let heard = Rc::new(RefCell::new(Vec::new()));
    let noted = Rc::clone(&heard);
    let waiting = net.clone();
    net.spawn(async move {
        peer.open().await.unwrap();
        peer.receive(sizes.iter().sum()).await.unwrap();
        *noted.borrow_mut() = peer.record_sizes();
    });
    run(&net, async move {
        let wire = accept(far, &report);
        assert_eq!(open(&wire).await, Opened::Ready);
        for size in sizes {
            let bytes = vec![b'x'; size];
            let (head, rest) = bytes.split_at(size / 5);
            let slices = [IoSlice::new(head), IoSlice::new(rest), IoSlice::new(b"")];
            assert_eq!(wire.try_send_vectored(&slices).unwrap(), size);
        }
        while heard.borrow().is_empty() {
            waiting.sleep(std::time::Duration::from_millis(1)).await;
        }
        // Each record has 17 extra bytes for content type and tag. The records of the handshake and
        // its tickets come first.
        let full = 16 * 1024 + 17;
        let wanted = [18, 217, full, full, 18, full, full, full, full];
        let heard = heard.borrow();
        let start = heard.len() - wanted.len() - 5;
        assert_eq!(heard[start..][..wanted.len()], wanted, "{heard:?}");
        assert_eq!(
            heard[start + wanted.len()..]
                .iter()
                .map(|size| size - 17)
                .sum::<usize>(),
            70_000
        );
    });
}

#[test]
fn a_plain_text_client_receives_a_plain_text_response() {
    for seed in seeds(40) {
        let net = SimNet::new(seed);
        let (near, far) = net.pair();
        let (heard, report) = listen();
        net.spawn(async move {
            near.send(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
            let mut response = Vec::new();
            while response.len() < 4 {
                assert!(near.recv(&mut response, 4).await.unwrap() > 0);
            }
            assert_eq!(response, b"HTTP");
            near.finish();
        });
        run(&net, async move {
            let wire = accept(far, &report);
            assert_eq!(open(&wire).await, Opened::PlainText);
            send(&wire, b"HTTP").await.unwrap();
            wire.finish();
            let (got, _) = receive_all(&wire).await;
            assert_eq!(got, b"GET / HTTP/1.1\r\n\r\n");
        });
        assert_eq!(*heard.borrow(), [Outcome::PlainText]);
    }
}

#[test]
fn a_client_without_http11_in_its_alpn_receives_an_alert() {
    for (alpn, wanted) in [
        (&["h2"][..], Outcome::Protocol),
        (&["h2", "http/1.1"], Outcome::Ok),
        (&[], Outcome::Ok),
    ] {
        let net = calm(11);
        let (near, far) = net.pair();
        let (heard, report) = listen();
        let mut peer = Peer::client(near, rustls::ALL_VERSIONS, alpn);
        net.spawn(async move {
            let opened = peer.open().await;
            let text = opened
                .as_ref()
                .err()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert_eq!(opened.is_ok(), wanted == Outcome::Ok);
            assert!(
                opened.is_ok() || text.contains("NoApplicationProtocol"),
                "{text}"
            );
            while let Ok(true) = peer.pump().await {}
        });
        run(&net, async move {
            let wire = accept(far, &report);
            let opened = open(&wire).await;
            assert_eq!(opened == Opened::Ready, wanted == Outcome::Ok);
            let error = wire.try_send(b"x").is_err();
            assert_eq!(error, wanted != Outcome::Ok);
            wire.finish();
        });
        assert_eq!(*heard.borrow(), [wanted]);
    }
}

#[test]
fn an_engine_certificate_must_match_the_dialled_host() {
    let known = || Trust::Roots(roots());
    let nobody = || Trust::Roots(Arc::new(RootCertStore::empty()));
    for (host, trust, wanted) in [
        ("localhost", known(), Outcome::Ok),
        ("127.0.0.1", known(), Outcome::Ok),
        ("127.0.0.2", known(), Outcome::Certificate),
        ("example.com", known(), Outcome::Certificate),
        ("not a name", known(), Outcome::Certificate),
        ("localhost", nobody(), Outcome::Certificate),
        ("example.com", Trust::AnyCertificate, Outcome::Ok),
        ("not a name", Trust::AnyCertificate, Outcome::Ok),
    ] {
        let net = SimNet::new(13);
        let (near, far) = net.pair();
        let (heard, report) = listen();
        net.spawn(async move {
            let mut peer = Peer::server(far);
            let _ = peer.open().await;
            while let Ok(true) = peer.pump().await {}
        });
        run(&net, async move {
            let wire = Dialer::new(&client(trust), report).dial(near, host);
            poll_fn(|cx| wire.poll_writable(cx)).await;
            assert_eq!(wire.connected().is_ok(), wanted == Outcome::Ok, "{host}");
        });
        assert_eq!(*heard.borrow(), [wanted], "{host}");
    }
}

#[test]
fn a_dialer_resumes_only_its_own_sessions() {
    let net = calm(17);
    let (_, report) = listen();
    let dialer = Dialer::new(&client(Trust::Roots(roots())), Rc::clone(&report));
    let stranger = Dialer::new(&client(Trust::Roots(roots())), report);
    let config = server();
    let kinds = Rc::new(RefCell::new(Vec::new()));
    let noted = Rc::clone(&kinds);
    let inside = net.clone();
    run(&net, async move {
        for dialer in [&dialer, &dialer, &stranger] {
            let (near, far) = inside.pair();
            let session = ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut peer = Peer::server(far);
            peer.session = session.into();
            let noted = Rc::clone(&noted);
            inside.spawn(async move {
                peer.open().await.unwrap();
                peer.send(b"hi").await.unwrap();
                noted
                    .borrow_mut()
                    .push(peer.session.handshake_kind().unwrap());
                peer.close().await;
            });
            let wire = dialer.dial(near, "localhost");
            poll_fn(|cx| wire.poll_writable(cx)).await;
            assert_eq!(receive_all(&wire).await.0, b"hi");
        }
    });
    use rustls::HandshakeKind::{Full, FullWithHelloRetryRequest, Resumed};
    let is_full = |kind| matches!(kind, Full | FullWithHelloRetryRequest);
    let kinds = kinds.borrow();
    assert!(
        is_full(kinds[0]) && kinds[1] == Resumed && is_full(kinds[2]),
        "{kinds:?}"
    );
}

#[test]
fn a_certificate_chain_of_many_records_is_read() {
    for seed in seeds(20) {
        let net = SimNet::new(seed);
        let (near, far) = net.pair();
        let (heard, report) = listen();
        let (leaf, key) = identity();
        // The certificates after the leaf have no effect, but must be read.
        let chain = vec![leaf; 140];
        let size: usize = chain.iter().map(|one| one.len()).sum();
        assert!(size > 2 * 16 * 1024 && size < 60 * 1024, "{size}");
        let certificate = Arc::new(Certificate::new(chain, key).unwrap());
        let config = Arc::new(server_config(certificate, TlsVersion::default(), &[]).unwrap());
        net.spawn(async move {
            let mut peer = Peer::server(far);
            peer.session = ServerConnection::new(config).unwrap().into();
            peer.open().await.unwrap();
            peer.send(b"hi").await.unwrap();
            peer.close().await;
            while let Ok(true) = peer.pump().await {}
        });
        run(&net, async move {
            let wire = dial(near, &report);
            poll_fn(|cx| wire.poll_writable(cx)).await;
            assert!(wire.connected().is_ok());
            assert_eq!(receive_all(&wire).await.0, b"hi");
        });
        assert_eq!(*heard.borrow(), [Outcome::Ok], "seed {seed}");
    }
}

/// Forwards bytes from `from` to `to` until the end of the stream. `changed` contains the offset of
/// one byte in the stream, and a mask of the bits to flip in that byte.
async fn pass(from: Rc<SimConn>, to: Rc<SimConn>, changed: Option<(usize, u8)>) {
    let mut passed = 0;
    loop {
        let mut bytes = Vec::new();
        match from.recv(&mut bytes, 500).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => break,
        }
        if let Some((at, mask)) = changed
            && let Some(byte) = at.checked_sub(passed).and_then(|at| bytes.get_mut(at))
        {
            *byte ^= mask;
        }
        passed += bytes.len();
        if to.send(&bytes).await.is_err() {
            break;
        }
    }
    to.finish();
}

#[test]
fn a_changed_byte_results_in_an_error_and_never_in_other_text() {
    for seed in seeds(400) {
        let net = SimNet::new(seed);
        let ((near, middle), (other, far)) = (net.pair(), net.pair());
        let (heard, report) = listen();
        let at = usize::try_from(net.below(3500)).unwrap();
        let mask = 1 << net.below(8);
        let payload = bytes(&net, 2500);
        let wanted = payload.clone();
        let mut peer = Peer::client(near, &[VERSIONS[(seed % 2) as usize]], &["http/1.1"]);
        let (back, forth) = (Rc::new(middle), Rc::new(other));
        net.spawn(async move {
            if peer.open().await.is_ok() && peer.send(&payload).await.is_ok() {
                peer.close().await;
            }
            while let Ok(true) = peer.pump().await {}
            peer.conn.finish();
        });
        net.spawn(pass(Rc::clone(&forth), Rc::clone(&back), None));
        // A changed length field makes both ends wait for more bytes, so limit the time.
        let (limit, cut) = (net.clone(), Rc::clone(&forth));
        net.spawn(async move {
            limit.sleep(std::time::Duration::from_secs(2)).await;
            cut.finish();
        });
        net.spawn(pass(back, forth, Some((at, mask))));
        let seen = Rc::clone(&heard);
        run(&net, async move {
            let wire = accept(far, &report);
            if open(&wire).await != Opened::Ready {
                assert!(wire.try_send(b"x").is_err() || at == 0);
                return;
            }
            let (got, end) = receive_all(&wire).await;
            assert!(wanted.starts_with(&got), "seed {seed}: the text differs");
            assert_eq!(
                end.is_ok(),
                got.len() == wanted.len() && seen.borrow().len() == 1,
                "seed {seed}: {end:?}"
            );
        });
        assert!(!heard.borrow().is_empty(), "seed {seed}");
    }
}

#[test]
fn random_bytes_end_a_handshake() {
    for seed in seeds(400) {
        let net = SimNet::new(seed);
        let (near, far) = net.pair();
        let (_, report) = listen();
        let len = usize::try_from(net.below(3000)).unwrap();
        let mut noise: Vec<u8> = (0..len)
            .map(|_| u8::try_from(net.below(256)).unwrap())
            .collect();
        // Some start like a record with a long handshake message.
        if seed % 2 == 0 && len > 16 {
            let size = [0x40, 0x00];
            noise[..9].copy_from_slice(&[22, 3, 1, size[0], size[1], 1, 0, 0xff, 0xf0]);
        }
        let both = seed % 4 < 2;
        net.spawn(async move {
            let _ = near.send(&noise).await;
            near.finish();
            let mut rest = Vec::new();
            while let Ok(1..) = near.recv(&mut rest, 1000).await {}
        });
        run(&net, async move {
            let wire = if both {
                accept(far, &report)
            } else {
                dial(far, &report)
            };
            assert_ne!(open(&wire).await, Opened::Ready);
            let Wire::Tls(tls) = &wire else {
                unreachable!()
            };
            assert!(tls.kept()[0] <= crate::limits::TLS_HELD_BYTES_MAX);
            poll_fn(|cx| wire.poll_readable(cx)).await;
        });
    }
}
