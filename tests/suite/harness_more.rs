//! Additional test support: misbehaving engines and clients, state checks, and time measurements.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mock_engine::{Engine, EngineConfig, HandoffRegistry, expected_text};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use crate::certificates::{Authority, Folder, engine_tls};
use crate::client::{Client, DEADLINE, Response, request};
use crate::harness::{
    CHAT, Launch, PREFILLER, Pair, Sidecar, is_suite_tls, sha256, start_decoder, wait_for,
};

/// The I/O driver of a sidecar: io_uring (`Ring`) or epoll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Driver {
    Ring,
    Epoll,
}

impl Driver {
    pub(crate) fn errno(self) -> Option<i32> {
        (self == Self::Epoll).then_some(libc::EPERM)
    }
}

/// As `Pair::with`, with this driver.
#[track_caller]
pub(crate) fn pair_on(
    driver: Driver,
    args: &[&str],
    change_prefill: impl FnOnce(&mut EngineConfig),
    change_decode: impl FnOnce(&mut EngineConfig),
) -> Pair {
    let launch = Launch {
        args,
        ring_errno: driver.errno(),
        ..Launch::default()
    };
    pair_from(&launch, change_prefill, change_decode)
}

/// As `Pair::with`, with a launch configuration that specifies everything except the decoder.
#[track_caller]
pub(crate) fn pair_from(
    launch: &Launch<'_>,
    change_prefill: impl FnOnce(&mut EngineConfig),
    change_decode: impl FnOnce(&mut EngineConfig),
) -> Pair {
    let handoffs = HandoffRegistry::new();
    let checked = |config| EngineConfig {
        verify_handoff: Some(handoffs.clone()),
        ..config
    };
    let mut prefill = checked(EngineConfig::prefill());
    let mut decode = checked(EngineConfig::decode());
    change_prefill(&mut prefill);
    change_decode(&mut decode);
    let authority = Folder::new();
    let mut flags = Vec::new();
    if is_suite_tls() {
        prefill.tls.get_or_insert_with(engine_tls);
        decode.tls.get_or_insert_with(engine_tls);
        let file = authority.write("engines.crt", &Authority::of_engines().pem());
        flags = vec![
            "--enable-tls=prefiller,decoder".to_owned(),
            format!("--tls-ca-file={file}"),
        ];
    }
    let prefill = Engine::start(prefill, 0).unwrap();
    let (decode, flag) = start_decoder(decode);
    flags.push(flag);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let sidecar = Sidecar::launch(&Launch {
        args: &[&flags, launch.args].concat(),
        ..launch.clone()
    });
    Pair {
        prefill,
        decode,
        sidecar,
        handoffs,
    }
}

/// Returns a unique prompt and the body of a chat completion request that generates exactly
/// `tokens` tokens for it.
pub(crate) fn ask_for(tokens: u32, stream: bool) -> (String, String) {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let nth = NEXT.fetch_add(1, Ordering::Relaxed);
    let prompt = format!("[{{\"role\":\"user\",\"content\":\"question {nth}\"}}]");
    let body = format!(
        "{{\"model\":\"mock-model\",\"messages\":{prompt},\"max_tokens\":{tokens},\
         \"ignore_eos\":true,\"stream\":{stream}}}"
    );
    (prompt, body)
}

/// Returns the generated text in the response to a chat completion request, streamed or not.
pub(crate) fn text_of(response: &Response) -> String {
    let is_stream = response
        .header("content-type")
        .is_some_and(|value| value.starts_with("text/event-stream"));
    if !is_stream {
        let text = &response.json()["choices"][0]["message"]["content"];
        return text.as_str().unwrap_or_default().to_owned();
    }
    let events = response.events();
    let pieces = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
    pieces.collect()
}

/// Fails unless `response` contains exactly the `tokens` tokens of text that the mock engines
/// generate for this prompt.
#[track_caller]
pub(crate) fn expect_text(response: &Response, prompt: &str, tokens: u32) {
    let want = expected_text(&sha256(prompt.as_bytes()), tokens);
    assert_eq!(
        text_of(response),
        want,
        "the text is incomplete or belongs to another prompt"
    );
}

/// Sends one split and one decode-only request and checks both responses.
#[track_caller]
pub(crate) fn expect_healthy(pair: &Pair) {
    for split in [true, false] {
        let (prompt, body) = ask_for(4, split);
        let target = pair.prefill.host_port();
        let routing = [(PREFILLER, target.as_str())];
        let headers = if split { &routing[..] } else { &[] };
        let response = pair.sidecar.post(CHAT, &body, headers).expect(200);
        expect_text(&response, &prompt, 4);
    }
}

/// Returns the bytes of a chat completion request that names the pair's prefill engine, so that it
/// is split between both engines.
pub(crate) fn split_request(pair: &Pair, body: &str) -> Vec<u8> {
    let target = pair.prefill.host_port();
    request("POST", CHAT, &[(PREFILLER, &target)], body.as_bytes())
}

/// Fails unless every handoff reached the decoder at most once, unaltered, and with its prompt, and
/// no engine received a malformed request.
#[track_caller]
pub(crate) fn expect_handoffs_sound(pair: &Pair) {
    let counters = pair.decode.counters();
    let bad = counters.handoff_reused
        + counters.handoff_foreign
        + counters.handoff_altered
        + counters.handoff_unknown
        + counters.poisoned;
    assert_eq!(bad, 0, "{counters:?}");
    assert_eq!(pair.prefill.counters().contract_broken, 0);
    assert_eq!(pair.prefill.counters().malformed, 0);
    assert_eq!(counters.malformed, 0);
}

/// Waits until the sidecar has no client connections, no active upstream connections and no
/// requests in flight.
#[track_caller]
pub(crate) fn expect_drained(sidecar: &Sidecar) {
    sidecar.wait_metric("ringside_client_connections", &[], 0.0);
    let active = [("state", "active")];
    sidecar.wait_metric("ringside_upstream_connections", &active, 0.0);
    sidecar.wait_metric("ringside_in_flight", &[], 0.0);
}

/// How a client disconnects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    Fin,
    Reset,
}

impl Leave {
    pub(crate) const ALL: [Self; 2] = [Self::Fin, Self::Reset];

    /// Disconnects and returns the time directly before that. After a FIN the client is returned
    /// too, because dropping it could send a reset.
    pub(crate) fn now(self, mut client: Client) -> (Instant, Option<Client>) {
        let at = Instant::now();
        match self {
            Self::Fin => {
                client.finish();
                (at, Some(client))
            }
            Self::Reset => {
                client.reset();
                (at, None)
            }
        }
    }
}

/// Measured durations.
#[derive(Debug, Default)]
pub(crate) struct Times(Vec<Duration>);

impl Times {
    pub(crate) fn push(&mut self, time: Duration) {
        self.0.push(time);
    }

    /// Prints the median and the maximum to stderr, and returns the median. Prints nothing and
    /// returns zero if nothing was measured.
    pub(crate) fn print(mut self, what: &str) -> Duration {
        self.0.sort_unstable();
        let (Some(max), Some(median)) = (self.0.last(), self.0.get(self.0.len() / 2)) else {
            return Duration::ZERO;
        };
        eprintln!(
            "{what}: median {:.3} ms, max {:.3} ms ({})",
            median.as_secs_f64() * 1e3,
            max.as_secs_f64() * 1e3,
            self.0.len()
        );
        *median
    }
}

/// Returns the number of bytes in the socket's send queue: those sent but not yet acknowledged by
/// the peer.
#[expect(
    unsafe_code,
    reason = "no safe interface reads the size of the send queue"
)]
pub(crate) fn unsent(stream: &TcpStream) -> usize {
    let mut bytes: libc::c_int = 0;
    // SAFETY: the descriptor is open, and the kernel writes one `int` to `bytes`.
    let asked = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    assert_eq!(asked, 0);
    usize::try_from(bytes).unwrap()
}

/// A listening socket whose accept queue is full, so that further connects hang.
pub(crate) struct FullQueue {
    listener: TcpListener,
    fill: Vec<rustix::fd::OwnedFd>,
    addr: SocketAddr,
}

impl FullQueue {
    pub(crate) fn new() -> Self {
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        rustix::net::bind(&socket, &any).unwrap();
        rustix::net::listen(&socket, 0).unwrap();
        let listener = TcpListener::from(socket);
        let addr = listener.local_addr().unwrap();
        let mut deaf = Self {
            listener,
            fill: Vec::new(),
            addr,
        };
        while deaf.take_one_more() {}
        deaf
    }

    /// Connects to the socket and keeps the connection, which occupies the accept queue. Returns
    /// `false` if the connect hangs for 100 ms, because the queue is full.
    fn take_one_more(&mut self) -> bool {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket =
            rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
        let begun = rustix::net::connect(&socket, &self.addr);
        assert!(matches!(begun, Ok(()) | Err(rustix::io::Errno::INPROGRESS)));
        let wait = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        let mut fds = [PollFd::new(&socket, PollFlags::OUT)];
        let connected = poll(&mut fds, Some(&wait)).unwrap() == 1;
        if connected {
            self.fill.push(socket);
        }
        connected
    }

    pub(crate) fn port(&self) -> u16 {
        self.addr.port()
    }

    pub(crate) fn host_port(&self) -> String {
        self.addr.to_string()
    }

    /// Accepts and drops the connections that fill the accept queue, so that hanging connects
    /// succeed. Accepts and returns the next connection, which is the sidecar's.
    pub(crate) fn hear(mut self) -> TcpStream {
        for _ in self.fill.drain(..) {
            drop(self.listener.accept().unwrap());
        }
        self.listener.accept().unwrap().0
    }
}

/// An engine that sends only the bytes that the test writes, with one thread per connection.
pub(crate) struct RawEngine {
    addr: SocketAddr,
    stop: Arc<Mutex<bool>>,
}

impl RawEngine {
    /// Starts the engine. It calls `serve` in a new thread for each connection, with the number of
    /// the connection, starting at 0.
    pub(crate) fn start(serve: impl Fn(RawConn, usize) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let stop = Arc::new(Mutex::new(false));
        let stopped = Arc::clone(&stop);
        let serve = Arc::new(serve);
        std::thread::spawn(move || {
            for (nth, stream) in listener.incoming().enumerate() {
                if *stopped.lock().unwrap() {
                    return;
                }
                let serve = Arc::clone(&serve);
                let conn = RawConn::new(stream.unwrap());
                std::thread::spawn(move || serve(conn, nth));
            }
        });
        Self { addr, stop }
    }

    pub(crate) fn port(&self) -> u16 {
        self.addr.port()
    }
}

impl Drop for RawEngine {
    fn drop(&mut self) {
        *self.stop.lock().unwrap() = true;
        // Wakes the accepting thread, which then exits.
        drop(TcpStream::connect(self.addr));
    }
}

/// An engine's side of a connection.
pub(crate) struct RawConn {
    pub(crate) stream: TcpStream,
    buffer: Vec<u8>,
}

impl RawConn {
    pub(crate) fn new(stream: TcpStream) -> Self {
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            buffer: Vec::new(),
        }
    }

    /// Reads until `done`, called with all buffered bytes, returns a length. Returns that many
    /// bytes and keeps the others for the next call. Returns `None` if the connection ends or fails
    /// before that.
    fn take(&mut self, done: impl Fn(&[u8]) -> Option<usize>) -> Option<Vec<u8>> {
        loop {
            if let Some(at) = done(&self.buffer) {
                return Some(self.buffer.drain(..at).collect());
            }
            let mut piece = [0; 16 * 1024];
            match self.stream.read(&mut piece) {
                Ok(0) => return None,
                Ok(n) => self.buffer.extend_from_slice(&piece[..n]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
    }

    /// Reads the head of the next request, including the final blank line. Returns `None` if the
    /// connection ends or fails before the head is complete.
    pub(crate) fn head(&mut self) -> Option<String> {
        let end = |bytes: &[u8]| bytes.windows(4).position(|at| at == b"\r\n\r\n");
        let head = self.take(|bytes| end(bytes).map(|at| at + 4))?;
        Some(String::from_utf8_lossy(&head).into_owned())
    }

    /// Reads exactly `count` bytes of a body. Returns `None` if the connection ends or fails before
    /// that.
    pub(crate) fn bytes(&mut self, count: usize) -> Option<Vec<u8>> {
        self.take(|bytes| (bytes.len() >= count).then_some(count))
    }

    /// Reads the next request and returns its head and its body. The body is empty without a
    /// `Content-Length`. Returns `None` if the connection ends or fails before the request is
    /// complete.
    pub(crate) fn request(&mut self) -> Option<(String, Vec<u8>)> {
        let head = self.head()?;
        let length = head
            .lines()
            .find_map(|line| {
                line.to_ascii_lowercase()
                    .strip_prefix("content-length: ")?
                    .parse()
                    .ok()
            })
            .unwrap_or(0);
        let body = self.bytes(length)?;
        Some((head, body))
    }

    /// Writes `text`. Returns `false` if that fails, usually because the peer has disconnected.
    pub(crate) fn say(&mut self, text: &str) -> bool {
        self.stream.write_all(text.as_bytes()).is_ok()
    }

    /// Closes the connection with a reset.
    pub(crate) fn reset(self) {
        rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO)).unwrap();
    }
}

/// Returns the number of open descriptors of the sidecar.
pub(crate) fn descriptors(sidecar: &Sidecar) -> usize {
    let pid = sidecar.pid().as_raw_nonzero();
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

/// Waits until the sidecar has at most `max` open descriptors.
#[track_caller]
pub(crate) fn wait_descriptors(sidecar: &Sidecar, max: usize) {
    wait_for("descriptors to be closed", || {
        (descriptors(sidecar) <= max).then_some(())
    });
}

/// Returns the lines of the sidecar's non-zero metrics, without histogram buckets, for failure
/// messages.
pub(crate) fn nonzero_metrics(sidecar: &Sidecar) -> String {
    let page = sidecar.admin("/metrics").map(|response| response.text());
    let page = page.unwrap_or_default();
    let lines = page.lines().filter(|line| {
        let is_sample = !line.starts_with('#') && !line.contains("_bucket");
        is_sample && !line.ends_with(" 0") && !line.ends_with(" 0.0")
    });
    lines.collect::<Vec<_>>().join("\n")
}
