//! Runs a sidecar, alone or between a prefill and a decode engine.
//!
//! Nothing sleeps for a fixed time: readiness, engine logs and counters are waited for, with a
//! deadline. Ports are chosen below the kernel's ephemeral range, so that neither an engine of a
//! test nor an outgoing connection can take one between its selection and the bind.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv6Addr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use mock_engine::{Engine, EngineConfig, HandoffRegistry, Place, Seen};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::certificates::{Offer, session};
use crate::client::{Client, DEADLINE, Response};
use crate::harness_more::Driver;

/// Name of the routing header, with which a request names its prefill engine.
pub(crate) const PREFILLER: &str = "x-prefiller-host-port";
/// Path of the chat completion API, which most tests use.
pub(crate) const CHAT: &str = "/v1/chat/completions";

const PORT_MIN: u16 = 10_000;
const PORT_MAX: u16 = 32_000;
/// Launch attempts before a test fails because it finds no free ports.
const STARTS_MAX: u32 = 5;
/// ringside's exit code if an address on which it must listen is already in use.
const EXIT_ADDRESS: i32 = 4;
/// Polling interval for conditions that cannot be waited for otherwise.
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// Returns the first of `count` consecutive ports on which nothing listens.
pub(crate) fn free_ports(count: u16) -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Each process starts at a different port, in case two suites run concurrently.
    let offset = (std::process::id() % 173) as u16 * 127;
    loop {
        let at = NEXT
            .fetch_add(count, Ordering::Relaxed)
            .wrapping_add(offset);
        let first = PORT_MIN + at % (PORT_MAX - PORT_MIN - count);
        let free = (first..first + count)
            .all(|port| TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).is_ok());
        if free {
            return first;
        }
    }
}

/// Starts one engine per rank, on consecutive ports. Tries others if one is already in use.
pub(crate) fn start_ranks(config: &EngineConfig, ranks: u16) -> Vec<Engine> {
    for _ in 0..STARTS_MAX {
        let port = free_ports(ranks);
        match Engine::start_ranks(config.clone(), port, u32::from(ranks)) {
            Ok(engines) => return engines,
            Err(error) => assert_eq!(error.kind(), ErrorKind::AddrInUse, "{error}"),
        }
    }
    panic!("no free ports in {STARTS_MAX} attempts")
}

/// Waits for one polling interval.
pub(crate) fn poll_interval() {
    std::thread::park_timeout(LOOK_AGAIN);
}

/// Calls `ask` until it returns a value; fails at the deadline.
#[track_caller]
pub(crate) fn wait_for<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(response) = ask() {
            return response;
        }
        assert!(start.elapsed() < DEADLINE, "timed out waiting for {what}");
        poll_interval();
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Returns a command that runs the binary under test, without the environment variables that could
/// change its configuration.
pub(crate) fn ringside() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ringside"));
    command
        .env_remove("POD_IP")
        .env_remove("ENABLE_PREFILLER_SAMPLING")
        .env_remove("MOONCAKE_BOOTSTRAP_PORT")
        .env_remove("P2P_CONNECTOR_PORT")
        .env_remove("SGLANG_BOOTSTRAP_PORT")
        .env_remove("HTTPS_PROXY")
        .env_remove("https_proxy")
        .stdin(Stdio::null());
    command
}

/// Runs the binary until it exits. Returns the exit code and the text written to stderr.
pub(crate) fn run_to_exit(args: &[&str]) -> (i32, String) {
    let mut child = ringside()
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let log = Log::follow(child.stderr.take().unwrap());
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > DEADLINE {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{args:?} still runs: {}", log.text());
        }
        poll_interval();
    };
    (status.code().unwrap(), log.whole())
}

/// Collects the stderr of a child process line by line.
#[derive(Clone, Debug, Default)]
struct Log(Arc<(Mutex<Lines>, Condvar)>);

#[derive(Debug, Default)]
struct Lines {
    text: String,
    ended: bool,
    /// Whether the reader goes away after the next line.
    closes: bool,
}

impl Log {
    fn follow(stderr: ChildStderr) -> Self {
        let log = Self::default();
        let writer = log.clone();
        std::thread::spawn(move || {
            let mut stderr = BufReader::new(stderr);
            let mut line = Vec::new();
            while stderr.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                writer.lines().text += &String::from_utf8_lossy(&line);
                writer.0.1.notify_all();
                line.clear();
                if writer.lines().closes {
                    break;
                }
            }
            writer.lines().ended = true;
            writer.0.1.notify_all();
        });
        log
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.0.0.lock().unwrap()
    }

    fn text(&self) -> String {
        self.lines().text.clone()
    }

    /// Waits until `pred` is true for the text received so far, stderr is closed, or the deadline
    /// has passed. Returns that text and whether `pred` is true for it.
    fn wait(&self, pred: impl Fn(&str) -> bool) -> (String, bool) {
        let waited = self
            .0
            .1
            .wait_timeout_while(self.lines(), DEADLINE, |lines| {
                !lines.ended && !pred(&lines.text)
            });
        let lines = waited.unwrap().0;
        (lines.text.clone(), pred(&lines.text))
    }

    /// Waits until stderr is closed and returns the complete text.
    fn whole(&self) -> String {
        self.wait(|_| false).0
    }
}

/// Flag for tests in which every connection to the decoder counts: the control plane opens none.
pub(crate) const VERSIONS_OFF: &str = "--check-handoff-versions=false";

/// Launch configuration of a [`Sidecar`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Launch<'a> {
    /// Flags in addition to the ports and `--secure-proxy`.
    pub(crate) args: &'a [&'a str],
    pub(crate) env: &'a [(&'a str, &'a str)],
    /// Port of the decoder; 0 omits the flag, so that `args` can specify the decoder.
    pub(crate) decoder_port: u16,
    /// Number of consecutive ports on which the sidecar listens for clients, one per data-parallel
    /// rank; 0 counts as 1.
    pub(crate) ranks: u16,
    /// File that receives the sidecar's standard output. With `None`, the output is discarded.
    pub(crate) stdout: Option<&'a std::path::Path>,
    /// Error code with which a seccomp filter refuses io_uring to the sidecar. With `None`, there
    /// is no filter.
    pub(crate) ring_errno: Option<i32>,
    /// Whether to wait until `/readyz` returns 503 instead of 200, for a sidecar that is not
    /// ready at first.
    pub(crate) is_unready: bool,
    /// Whether clients use TLS to the sidecar.
    pub(crate) tls: bool,
    /// Name under which the program is run, with `args` alone. In these, `{port}`, `{admin}`,
    /// `{metrics}` and `{decoder}` are replaced by the ports. With `None`, the program is run as
    /// `ringside sidecar`, with flags for all ports.
    pub(crate) program: Option<&'a str>,
}

/// Returns whether `RINGSIDE_SUITE_TLS` is set. With it, clients use TLS to every sidecar, and the
/// sidecar of a pair uses TLS to its engines, so that all tests also run encrypted.
pub(crate) fn is_suite_tls() -> bool {
    std::env::var_os("RINGSIDE_SUITE_TLS").is_some()
}

/// A running sidecar, killed when dropped.
#[derive(Debug)]
pub(crate) struct Sidecar {
    child: Child,
    log: Log,
    tls: bool,
    pub(crate) port: u16,
    pub(crate) admin_port: u16,
}

impl Sidecar {
    /// Starts a sidecar with these flags in front of the decoder that listens on `decoder_port` of
    /// this host, and waits until the sidecar is ready.
    #[track_caller]
    pub(crate) fn start(args: &[&str], decoder_port: u16) -> Self {
        Self::launch(&Launch {
            args,
            decoder_port,
            ..Launch::default()
        })
    }

    /// As `start`, with a complete launch configuration.
    #[track_caller]
    pub(crate) fn launch(launch: &Launch<'_>) -> Self {
        for _ in 0..STARTS_MAX {
            if let Some(sidecar) = Self::try_launch(launch) {
                return sidecar;
            }
        }
        panic!("no free ports in {STARTS_MAX} attempts")
    }

    /// Makes one attempt to launch a sidecar. Returns `None` if a port is already in use.
    fn try_launch(launch: &Launch<'_>) -> Option<Self> {
        let ranks = launch.ranks.max(1);
        let port = free_ports(ranks + 2);
        let admin_port = port + ranks;
        let tls = launch.tls || (is_suite_tls() && launch.program.is_none());
        let mut command = ringside();
        if let Some(errno) = launch.ring_errno {
            crate::seccomp::refuse_ring(&mut command, errno);
        }
        match launch.program {
            Some(program) => {
                let fill = |arg: &&str| {
                    arg.replace("{port}", &port.to_string())
                        .replace("{admin}", &admin_port.to_string())
                        .replace("{metrics}", &(admin_port + 1).to_string())
                        .replace("{decoder}", &launch.decoder_port.to_string())
                };
                command.arg0(program).args(launch.args.iter().map(fill));
            }
            None => {
                command
                    .arg("sidecar")
                    .arg(format!("--port={port}"))
                    .arg(format!("--admin-address=127.0.0.1:{admin_port}"))
                    .arg(format!("--secure-proxy={tls}"))
                    .args(
                        (launch.decoder_port != 0)
                            .then(|| format!("--model-server-port={}", launch.decoder_port)),
                    )
                    .args(launch.args);
            }
        }
        let mut child = command
            .envs(launch.env.iter().copied())
            .stdout(launch.stdout.map_or_else(Stdio::null, |path| {
                std::fs::File::create(path).unwrap().into()
            }))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Log::follow(child.stderr.take().unwrap());
        let mut sidecar = Self {
            child,
            log,
            tls,
            port,
            admin_port,
        };
        // The child logs this after it has bound its ports, so any response on them comes from this
        // child.
        let (text, serves) = sidecar.log.wait(|text| text.contains(" is ready"));
        if !serves {
            let status = sidecar.wait_exit();
            assert_eq!(status.code(), Some(EXIT_ADDRESS), "{launch:?}: {text}");
            return None;
        }
        if launch.program.is_some() {
            // The address of the admin server is not known.
            for rank in 0..ranks {
                let address = ("127.0.0.1", port + rank);
                wait_for("a listener", || TcpStream::connect(address).ok());
            }
            return Some(sidecar);
        }
        let status = if launch.is_unready { 503 } else { 200 };
        wait_for("readiness", || {
            (sidecar.admin("/readyz")?.status == status).then_some(())
        });
        Some(sidecar)
    }

    /// Returns the process ID, for sending signals.
    pub(crate) fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(&self.child)
    }

    /// Sends SIGTERM.
    pub(crate) fn terminate(&self) {
        rustix::process::kill_process(self.pid(), rustix::process::Signal::TERM).unwrap();
    }

    /// Ends a drain: sends SIGTERM until the process has exited. A signal within a second of the
    /// first one counts as its repetition.
    #[track_caller]
    pub(crate) fn terminate_again(&mut self) -> ExitStatus {
        let pid = self.pid();
        wait_for("the process to exit", || {
            // Fails once the process has exited.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            self.try_exit()
        })
    }

    /// Returns the exit status, if the process has exited.
    pub(crate) fn try_exit(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until the process has exited.
    #[track_caller]
    pub(crate) fn wait_exit(&mut self) -> ExitStatus {
        let Self { child, .. } = self;
        wait_for("the process to exit", || child.try_wait().unwrap())
    }

    /// Returns the text written to stderr so far.
    pub(crate) fn stderr(&self) -> String {
        self.log.text()
    }

    /// Waits until stderr contains `needle`, and returns the text written to stderr so far. Fails
    /// at the deadline, or if stderr is closed before that.
    #[track_caller]
    pub(crate) fn wait_stderr(&self, needle: &str) -> String {
        let (text, found) = self.log.wait(|text| text.contains(needle));
        assert!(found, "`{needle}` is not in {text}");
        text
    }

    /// Closes the reading end of stderr once the sidecar has written one more line.
    pub(crate) fn close_stderr(&self) {
        self.log.lines().closes = true;
    }

    /// Returns a page of the admin port, or `None` if nothing listens there.
    pub(crate) fn admin(&self, path: &str) -> Option<Response> {
        drop(TcpStream::connect(("127.0.0.1", self.admin_port)).ok()?);
        let close = [("connection", "close")];
        Some(Client::connect(self.admin_port).ask("GET", path, &close, b""))
    }

    /// Returns the sum of the metric's samples that carry all of these labels.
    pub(crate) fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let page = self.admin("/metrics").unwrap().expect(200).text();
        let labels: Vec<_> = labels
            .iter()
            .map(|(label, value)| format!("{label}=\"{value}\""))
            .collect();
        page.lines()
            .filter_map(|line| line.strip_prefix(name))
            .filter(|rest| rest.starts_with(['{', ' ']))
            .filter(|rest| labels.iter().all(|label| rest.contains(label)))
            .map(|rest| rest.rsplit_once(' ').unwrap().1)
            .map(|value| value.parse::<f64>().unwrap())
            .sum()
    }

    /// Waits until the samples of a metric with these labels add up to `want`; fails at the
    /// deadline. The wait is necessary because a request is counted only after its response has
    /// been sent.
    #[track_caller]
    pub(crate) fn wait_metric(&self, name: &str, labels: &[(&str, &str)], want: f64) {
        let mut have = f64::NAN;
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            have = self.metric(name, labels);
            if (have - want).abs() < 1e-9 {
                return;
            }
            poll_interval();
        }
        panic!("{name} {labels:?} is {have}, not {want}");
    }

    /// Waits until exactly one request with this outcome and reason has been counted.
    #[track_caller]
    pub(crate) fn wait_outcome(&self, outcome: &str, reason: &str) {
        let labels = [("outcome", outcome), ("reason", reason)];
        self.wait_metric("ringside_pd_requests_total", &labels, 1.0);
    }

    /// Fails unless the process is alive and no session has panicked or reported a bug.
    #[track_caller]
    pub(crate) fn expect_sound(&self) {
        assert_eq!(self.admin("/livez").unwrap().status, 200);
        let panics = self.metric("ringside_session_panics_total", &[]);
        let bugs = self.metric("ringside_errors_total", &[("code", "bug")]);
        assert!(panics + bugs == 0.0, "{panics} panics, {bugs} bugs");
    }

    pub(crate) fn connect(&self) -> Client {
        self.connect_to(0)
    }

    /// Connects to the listener of a rank.
    pub(crate) fn connect_to(&self, rank: u16) -> Client {
        if self.tls {
            return Client::secure(self.port + rank, session(&Offer::default()));
        }
        Client::connect(self.port + rank)
    }

    /// Connects with TLS, with the parameters in `offer`.
    pub(crate) fn connect_offering(&self, offer: &Offer<'_>) -> Client {
        Client::secure(self.port, session(offer))
    }

    /// Sends one request on a new connection and returns the response.
    #[track_caller]
    pub(crate) fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        self.connect().ask(method, path, headers, body)
    }

    #[track_caller]
    pub(crate) fn get(&self, path: &str, headers: &[(&str, &str)]) -> Response {
        self.ask("GET", path, headers, b"")
    }

    #[track_caller]
    pub(crate) fn post(
        &self,
        path: &str,
        body: impl AsRef<[u8]>,
        headers: &[(&str, &str)],
    ) -> Response {
        self.ask("POST", path, headers, body.as_ref())
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        // An error means that the process has already exited.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!(
                "--- stderr of the sidecar on {}:\n{}",
                self.port,
                self.log.whole()
            );
        }
    }
}

/// Starts a decode engine. Returns it with the flag that specifies its address. If
/// `RINGSIDE_SUITE_UNIX` is set, the engine listens on a Unix socket, so that all tests of pairs
/// also run over Unix sockets.
pub(crate) fn start_decoder(config: EngineConfig) -> (Engine, String) {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    if std::env::var_os("RINGSIDE_SUITE_UNIX").is_none() {
        let engine = Engine::start(config, 0).unwrap();
        let flag = format!("--model-server-port={}", engine.port());
        return (engine, flag);
    }
    let nth = NEXT.fetch_add(1, Ordering::Relaxed);
    let path = format!("@ringside-suite-{}-{nth}", std::process::id());
    let flag = format!("--model-server-socket={path}");
    let engine = Engine::start_on(config, Place::Unix(path)).unwrap();
    (engine, flag)
}

/// A prefill engine, a decode engine that verifies the handoffs of the prefill engine, and a
/// sidecar in front of the decode engine.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) prefill: Engine,
    pub(crate) decode: Engine,
    pub(crate) sidecar: Sidecar,
    pub(crate) handoffs: HandoffRegistry,
}

impl Pair {
    #[track_caller]
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::with(args, |_| {}, |_| {})
    }

    /// As `start`, with changes to the configuration of the prefill and the decode engine.
    #[track_caller]
    pub(crate) fn with(
        args: &[&str],
        change_prefill: impl FnOnce(&mut EngineConfig),
        change_decode: impl FnOnce(&mut EngineConfig),
    ) -> Self {
        crate::harness_more::pair_on(Driver::Ring, args, change_prefill, change_decode)
    }

    /// Sends a POST whose routing field names the prefill engine.
    #[track_caller]
    pub(crate) fn post(&self, path: &str, body: impl AsRef<[u8]>) -> Response {
        self.post_with(path, body, &[])
    }

    /// As `post`, with additional header fields.
    #[track_caller]
    pub(crate) fn post_with(
        &self,
        path: &str,
        body: impl AsRef<[u8]>,
        headers: &[(&str, &str)],
    ) -> Response {
        let target = self.prefill.host_port();
        let mut all = vec![(PREFILLER, target.as_str())];
        all.extend_from_slice(headers);
        self.sidecar.post(path, body, &all)
    }

    /// Returns the requests of the prefill and the decode leg. Fails unless each engine has
    /// received exactly one request, the handoff was used exactly once, and the prefill leg kept
    /// the connector's contract.
    #[track_caller]
    pub(crate) fn legs(&self) -> (Seen, Seen) {
        let (prefill, decode) = (only(&self.prefill), only(&self.decode));
        let counters = self.decode.counters();
        assert_eq!(counters.handoff_used, 1, "{counters:?}");
        assert_eq!(self.prefill.counters().contract_broken, 0);
        (prefill, decode)
    }
}

/// Returns the only request that an engine has received. Fails if it has received none or several.
#[track_caller]
pub(crate) fn only(engine: &Engine) -> Seen {
    let requests = engine.requests();
    assert_eq!(requests.len(), 1, "{:?}", engine.port());
    requests.into_iter().next().unwrap()
}

/// Returns the number of connections on which an engine has received requests.
pub(crate) fn connections(engine: &Engine) -> usize {
    let requests = engine.requests();
    let mut connections: Vec<_> = requests.iter().map(|seen| seen.conn).collect();
    connections.sort_unstable();
    connections.dedup();
    connections.len()
}

/// Parses the body of a request as JSON.
#[track_caller]
pub(crate) fn json_of(seen: &Seen) -> Value {
    serde_json::from_slice(&seen.body)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&seen.body)))
}

/// Returns the `kv_transfer_params` of a prefill leg with the nixlv2 connector, which request a
/// handoff for a decode engine.
pub(crate) fn prefill_params() -> Value {
    serde_json::json!({"do_remote_decode": true, "do_remote_prefill": false,
        "remote_engine_id": null, "remote_block_ids": null, "remote_host": null,
        "remote_port": null})
}

/// An engine that sends the same bytes in response to every request, for responses that a mock
/// engine would not send.
#[derive(Debug)]
pub(crate) struct Canned {
    pub(crate) port: u16,
}

impl Canned {
    /// Starts the engine, which serves until the test process exits.
    pub(crate) fn start(response: impl Into<Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let response = Arc::new(response.into());
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let response = Arc::clone(&response);
                std::thread::spawn(move || respond_to_all(stream?, &response));
            }
        });
        Self { port }
    }
}

/// Sends `response` to each request on a connection until the client disconnects. A request's body
/// must have a `Content-Length`.
fn respond_to_all(mut stream: TcpStream, response: &[u8]) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let (mut line, mut length) = (String::new(), 0);
        while line != "\r\n" {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
        }
        std::io::copy(&mut reader.by_ref().take(length), &mut std::io::sink())?;
        stream.write_all(response)?;
    }
}
