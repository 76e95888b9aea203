//! The other clients: an attack is one plan that all its connections repeat, driven by one thread.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::setpriority_process;
use rustls::crypto::ring;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, RootCertStore};

use crate::cli::Attack;
use crate::http::{Reader, ResponseError};
use crate::limits::{
    ATTACK_NICENESS, ATTACK_RETRY_MS, BULK_CONNECTIONS, NEIGHBOURS_RECEIVE_BYTES,
    PIPELINED_REQUESTS, RESET_BODY_BYTES, SMALL_CONNECTIONS, UPLOAD_BYTES,
};
use crate::socket::{self, Poll, Received, Watch, monotonic_ns};

/// The behaviour of a connection after it has sent [`Plan::request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Receives this number of responses and sends the request again.
    Responses(u32),
    /// Receives at least one byte, and is then reset and opened again.
    FirstBytes,
    /// Is reset immediately and opened again.
    Reset,
}

/// The unit in which the work of an attack is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Complete responses with a status of 2xx.
    Responses,
    /// Bytes of response bodies.
    ReceivedBytes,
    /// Bytes of request bodies, as counted by the engine: what this client has sent can still be in
    /// a buffer.
    UploadedBytes,
    /// Complete turns of connections.
    Turns,
}

/// An attack on one address.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Number of concurrent connections.
    pub connections: usize,
    /// The bytes that each connection sends.
    pub request: Vec<u8>,
    /// The behaviour of a connection afterwards.
    pub turn: Turn,
    /// The unit of the work.
    pub unit: Unit,
}

impl Plan {
    /// Returns the plan of `attack` on the server at `addr`; `None` if the attack does nothing.
    ///
    /// # Errors
    /// Returns a message if the TLS library fails.
    pub fn new(attack: Attack, addr: SocketAddr) -> Result<Option<Self>, String> {
        let get = |path: &str| format!("GET {path} HTTP/1.1\r\nhost: {addr}\r\n\r\n").into_bytes();
        Ok(Some(match attack {
            Attack::None => return Ok(None),
            Attack::Uploads => Self {
                connections: BULK_CONNECTIONS,
                request: completion(addr, UPLOAD_BYTES),
                turn: Turn::Responses(1),
                unit: Unit::UploadedBytes,
            },
            Attack::Downloads => Self {
                connections: BULK_CONNECTIONS,
                request: get("/download"),
                turn: Turn::Responses(1),
                unit: Unit::ReceivedBytes,
            },
            Attack::Pipelining => Self {
                connections: SMALL_CONNECTIONS,
                request: get("/v1/models").repeat(PIPELINED_REQUESTS as usize),
                turn: Turn::Responses(PIPELINED_REQUESTS),
                unit: Unit::Responses,
            },
            Attack::Handshakes => Self {
                connections: SMALL_CONNECTIONS,
                request: client_hello().map_err(|error| format!("TLS: {error}"))?,
                turn: Turn::FirstBytes,
                unit: Unit::Turns,
            },
            Attack::Resets => Self {
                connections: SMALL_CONNECTIONS,
                request: completion(addr, RESET_BODY_BYTES),
                turn: Turn::Reset,
                unit: Unit::Turns,
            },
        }))
    }
}

/// Returns a request for a completion with a body of `body_bytes`.
fn completion(addr: SocketAddr, body_bytes: usize) -> Vec<u8> {
    let (open, close) = (r#"{"model":"m","max_tokens":1,"prompt":""#, r#""}"#);
    let prompt = "a".repeat(body_bytes.saturating_sub(open.len() + close.len()));
    let body = [open, &prompt, close].concat();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: {addr}\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n",
        body.len()
    );
    [head, body].concat().into_bytes()
}

/// Returns the first bytes that a TLS client sends. A server cannot know that they are sent more
/// than once, and creating them each time would only load the attack's thread.
fn client_hello() -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(rustls::ALL_VERSIONS)?
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from("localhost")?;
    let mut client = ClientConnection::new(Arc::new(config), name)?;
    let mut hello = Vec::new();
    client.write_tls(&mut hello)?;
    Ok(hello)
}

/// The responses that a piece of received bytes completes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Number of complete responses with a status of 2xx.
    pub succeeded: u32,
    /// Number of complete responses with another status.
    pub refused: u32,
    /// Number of body bytes, including those of incomplete responses.
    pub body_bytes: u64,
    /// Whether the server closes the connection after the last complete response.
    pub closes: bool,
}

/// Counts pipelined responses.
#[derive(Debug, Default)]
pub struct ResponseCounter {
    reader: Reader,
    /// Body bytes of the current piece, which are discarded.
    discarded: Vec<u8>,
}

impl ResponseCounter {
    /// Parses the next received bytes.
    ///
    /// # Errors
    /// Returns the first error; the counter must not be used afterwards.
    pub fn feed(&mut self, mut piece: &[u8]) -> Result<Counted, ResponseError> {
        let mut counted = Counted::default();
        while !piece.is_empty() {
            self.discarded.clear();
            piece = self.reader.feed_response(piece, &mut self.discarded)?;
            counted.body_bytes += self.discarded.len() as u64;
            if let Some(head) = self.reader.head().filter(|_| self.reader.is_done()) {
                match head.status {
                    200..300 => counted.succeeded += 1,
                    _ => counted.refused += 1,
                }
                counted.closes = !head.keep_alive;
                self.reader = Reader::new();
            }
        }
        Ok(counted)
    }
}

/// The work that an attack achieved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    /// Amount of work, in the unit of the attack.
    pub done: u64,
    /// Number of connections that failed, and of responses with a status other than 2xx.
    pub failures: u64,
    /// Duration of the attack.
    pub elapsed_ns: u64,
}

impl Work {
    /// Returns the work per second.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.done as f64 * 1e9 / self.elapsed_ns.max(1) as f64
    }
}

/// The next step of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Wait,
    /// Opened again immediately.
    Reopen,
    /// Opened again after a pause.
    Pause,
}

struct Connection {
    socket: OwnedFd,
    watch: Watch,
    /// Number of bytes of the request that the socket has accepted.
    sent: usize,
    /// Number of responses to the current turn's requests that are not complete.
    missing: u32,
    responses: ResponseCounter,
}

impl Connection {
    /// Sends and receives what the socket allows, one piece of each.
    fn step(&mut self, plan: &Plan, buffer: &mut [u8], work: &mut Work) -> Next {
        if !self.send(plan) {
            work.failures += 1;
            return Next::Pause;
        }
        if plan.turn == Turn::Reset {
            return self.end_reset(plan, work);
        }
        match socket::receive(&self.socket, buffer) {
            Received::Nothing => Next::Wait,
            Received::Bytes(_) if plan.turn == Turn::FirstBytes => {
                work.done += 1;
                Next::Reopen
            }
            Received::Bytes(len) => match self.responses.feed(&buffer[..len]) {
                Ok(counted) => self.end_turn(counted, plan, work),
                Err(_) => fail(work),
            },
            Received::End | Received::Failed(_) => fail(work),
        }
    }

    /// Sends what is left of the request; returns whether the connection still works.
    fn send(&mut self, plan: &Plan) -> bool {
        let left = &plan.request[self.sent..];
        if left.is_empty() {
            return true;
        }
        match socket::send(&self.socket, left) {
            Ok(sent) => {
                self.sent += sent;
                true
            }
            Err(_) => false,
        }
    }

    fn end_reset(&self, plan: &Plan, work: &mut Work) -> Next {
        if self.sent < plan.request.len() {
            return Next::Wait;
        }
        work.done += 1;
        Next::Reopen
    }

    /// Counts responses, and begins the next turn after the last one.
    fn end_turn(&mut self, counted: Counted, plan: &Plan, work: &mut Work) -> Next {
        work.failures += u64::from(counted.refused);
        work.done += match plan.unit {
            Unit::Responses => u64::from(counted.succeeded),
            Unit::ReceivedBytes => counted.body_bytes,
            Unit::UploadedBytes | Unit::Turns => 0,
        };
        let responses = counted.succeeded + counted.refused;
        self.missing = self.missing.saturating_sub(responses);
        if counted.refused > 0 && (counted.closes || self.sent < plan.request.len()) {
            return Next::Pause;
        }
        if counted.closes {
            return Next::Reopen;
        }
        if self.missing > 0 || responses == 0 {
            return Next::Wait;
        }
        self.begin_turn(plan);
        match self.send(plan) {
            true => Next::Wait,
            false => fail(work),
        }
    }

    const fn begin_turn(&mut self, plan: &Plan) {
        self.sent = 0;
        self.missing = match plan.turn {
            Turn::Responses(responses) => responses,
            Turn::FirstBytes | Turn::Reset => 0,
        };
    }
}

const fn fail(work: &mut Work) -> Next {
    work.failures += 1;
    Next::Pause
}

/// A running attack.
struct Load<'a> {
    plan: &'a Plan,
    addr: SocketAddr,
    poll: Poll,
    connections: Vec<Option<Connection>>,
    /// Indexes of failed connections, each with the time at which it is opened again.
    paused: std::collections::VecDeque<(u64, usize)>,
    buffer: Vec<u8>,
    work: Work,
}

impl fmt::Debug for Load<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Load").finish_non_exhaustive()
    }
}

/// Performs an attack on the server at `addr` until `stop` is set, and closes all its connections.
/// Lowers the priority of the calling thread. `uploaded` returns the number of body bytes that the
/// engine has received.
///
/// # Errors
/// Errors that the kernel reports, other than those of a connection.
pub fn run(
    plan: &Plan,
    addr: SocketAddr,
    uploaded: impl Fn() -> u64,
    stop: &AtomicBool,
) -> io::Result<Work> {
    // `None` is the calling thread: on Linux each thread has its own priority.
    setpriority_process(None, ATTACK_NICENESS)?;
    let (begun_ns, uploaded_before) = (monotonic_ns(), uploaded());
    let mut load = Load {
        plan,
        addr,
        poll: Poll::new()?,
        connections: (0..plan.connections).map(|_| None).collect(),
        paused: (0..plan.connections).map(|number| (0, number)).collect(),
        buffer: vec![0; NEIGHBOURS_RECEIVE_BYTES],
        work: Work::default(),
    };
    load.run(stop)?;
    let mut work = load.work;
    work.elapsed_ns = monotonic_ns() - begun_ns;
    if plan.unit == Unit::UploadedBytes {
        work.done = uploaded() - uploaded_before;
    }
    for connection in load.connections.into_iter().flatten() {
        socket::reset(connection.socket)?;
    }
    Ok(work)
}

impl Load<'_> {
    fn run(&mut self, stop: &AtomicBool) -> io::Result<()> {
        let mut ready = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let now_ns = monotonic_ns();
            while let Some((due_ns, number)) = self.paused.pop_front() {
                if due_ns > now_ns {
                    self.paused.push_front((due_ns, number));
                    break;
                }
                self.open(number)?;
            }
            let time_max = Duration::from_millis(ATTACK_RETRY_MS);
            self.poll.wait(time_max, &mut ready)?;
            for number in ready.drain(..) {
                self.step(number)?;
            }
        }
        Ok(())
    }

    fn open(&mut self, number: usize) -> io::Result<()> {
        let Ok(socket) = socket::connect(&self.addr) else {
            // For example, all local ports are in use.
            self.work.failures += 1;
            self.pause(number);
            return Ok(());
        };
        self.poll.add(&socket, number, Watch::Both)?;
        let mut connection = Connection {
            socket,
            watch: Watch::Both,
            sent: 0,
            missing: 0,
            responses: ResponseCounter::default(),
        };
        connection.begin_turn(self.plan);
        self.connections[number] = Some(connection);
        Ok(())
    }

    fn pause(&mut self, number: usize) {
        let due_ns = monotonic_ns() + ATTACK_RETRY_MS * 1_000_000;
        self.paused.push_back((due_ns, number));
    }

    fn step(&mut self, number: usize) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(number).and_then(Option::as_mut) else {
            return Ok(());
        };
        let next = connection.step(self.plan, &mut self.buffer, &mut self.work);
        if next == Next::Wait {
            let watch = match connection.sent < self.plan.request.len() {
                true => Watch::Both,
                false => Watch::Readable,
            };
            if watch != connection.watch {
                connection.watch = watch;
                self.poll.change(&connection.socket, number, watch)?;
            }
            return Ok(());
        }
        if let Some(connection) = self.connections[number].take() {
            // A connection that is closed in order would occupy a local port for a minute.
            socket::reset(connection.socket)?;
        }
        match next {
            Next::Pause => self.pause(number),
            Next::Reopen | Next::Wait => self.open(number)?,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(pieces: &[&[u8]]) -> Result<Counted, ResponseError> {
        let (mut counter, mut sum) = (ResponseCounter::default(), Counted::default());
        for piece in pieces {
            let counted = counter.feed(piece)?;
            sum.succeeded += counted.succeeded;
            sum.refused += counted.refused;
            sum.body_bytes += counted.body_bytes;
            sum.closes |= counted.closes;
        }
        Ok(sum)
    }

    #[test]
    fn pipelined_responses_are_the_same_at_any_split() {
        let bytes: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\nabc\
            HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nde\r\n0\r\n\r\n\
            HTTP/1.1 204 No Content\r\n\r\n\
            HTTP/1.1 503 Unavailable\r\ncontent-length: 1\r\n\r\nf\
            HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        let want = Counted {
            succeeded: 4,
            refused: 1,
            body_bytes: 6,
            closes: true,
        };
        for at in 0..=bytes.len() {
            assert_eq!(count(&[&bytes[..at], &bytes[at..]]), Ok(want), "{at}");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(count(&single), Ok(want));
        let cut = count(&[&bytes[..60]]).unwrap();
        assert_eq!((cut.succeeded, cut.closes), (1, false));
        assert!(count(&[b"220 mail\r\n\r\n"]).is_err());
    }

    #[test]
    fn plans_have_the_sizes_of_the_limits() {
        let addr = SocketAddr::from(([127, 0, 0, 1], 1));
        let plan = |attack| Plan::new(attack, addr).unwrap();
        assert!(plan(Attack::None).is_none());
        for (attack, body_bytes) in [
            (Attack::Uploads, UPLOAD_BYTES),
            (Attack::Resets, RESET_BODY_BYTES),
        ] {
            let request = plan(attack).unwrap().request;
            let text = std::str::from_utf8(&request).unwrap();
            let (head, body) = text.split_once("\r\n\r\n").unwrap();
            assert_eq!(body.len(), body_bytes);
            assert!(head.ends_with(&format!("content-length: {body_bytes}")));
            assert!(serde_json::from_str::<serde_json::Value>(body).is_ok());
        }
        let pipelined = plan(Attack::Pipelining).unwrap();
        let text = String::from_utf8(pipelined.request).unwrap();
        assert_eq!(
            text.matches("GET /v1/models").count(),
            PIPELINED_REQUESTS as usize
        );
        // A handshake record with a ClientHello.
        let hello = plan(Attack::Handshakes).unwrap().request;
        assert_eq!((hello[0], hello[5]), (22, 1));
        assert_eq!(
            usize::from(u16::from_be_bytes([hello[3], hello[4]])),
            hello.len() - 5
        );
    }

    #[test]
    fn a_rate_is_per_second() {
        let work = Work {
            done: 30,
            failures: 0,
            elapsed_ns: 1_500_000_000,
        };
        assert_eq!(work.rate(), 20.0);
    }
}
