//! Serves the requests of one connection in sequence: reads and logs each request, sends the
//! response, and keeps or closes the connection as the response requires.
//!
//! Every wait goes through [`Conn`], which ends the wait when the client disconnects.

use std::time::{Duration, Instant};

use crate::api::{self, Refusal, Route};
use crate::engine::Shared;
use crate::extra::{self, Extra};
use crate::fault::Fault;
use crate::fault_page;
use crate::http::{BODY_BYTES_MAX, Body, BodyError, Conn, Disconnected, Head, HeadError};
use crate::json::Fields;
use crate::listener::Stream;
use crate::log::{AbortPhase, Seen, State, path_of};
use crate::pages::page;
use crate::routes;
use crate::stats::{Finish, Observation};
use crate::wire::{Content, Next, Plan, Wire, head, substitute};

/// How long the engine keeps discarding data from the client after it has sent FIN.
const LINGER: Duration = Duration::from_millis(500);

/// Serves one connection until it ends.
pub(crate) async fn serve(stream: Stream, shared: &Shared, number: u64) {
    let mut conn = Conn::new(stream);
    let mut nth = 0;
    loop {
        let idle = (nth > 0).then_some(shared.config.keepalive);
        let head = match conn.read_head(idle).await {
            Ok(head) => head,
            Err(HeadError::Disconnected) => return,
            Err(HeadError::Idle) => {
                shared.log.count(|counters| counters.idle_closed += 1);
                return;
            }
            Err(HeadError::Malformed) => return respond_malformed(&mut conn, shared).await,
        };
        if head.method == "GET" && path_of(&head.target) == "/version" {
            return state_version(&mut conn, shared).await;
        }
        let seq = shared.log.enter(entry(&head, number, nth));
        nth += 1;
        let mut exchange = Exchange {
            conn: &mut conn,
            shared,
            head: &head,
            seq,
            received: false,
            finished: false,
            status: None,
            request_bytes: 0,
            response_bytes: 0,
            running: false,
            observed: None,
        };
        let start = Instant::now();
        exchange.conn.recording = shared.config.keep_response.then(Vec::new);
        let ended = exchange.run().await;
        let (state, next) = match ended {
            Ok(Ended::Responded(next)) => (State::Responded, next),
            Ok(Ended::Cut(next)) => (State::Faulted, next),
            Err(Disconnected) => (exchange.aborted(), Next::Close),
        };
        exchange.measure(state, start);
        if !exchange.finished {
            shared.log.finish(seq, state);
        }
        if let Some(recording) = conn.recording.take() {
            shared
                .log
                .update(seq, |seen| seen.response = Some(recording));
        }
        match next {
            Next::KeepAlive => {}
            Next::KeepUntilNextRequest => {
                if conn.first_byte(Some(shared.config.keepalive)).await.is_ok() {
                    shared.log.count(|counters| counters.stale_closed += 1);
                }
                return;
            }
            Next::Close => return,
            Next::CloseGently => return conn.close_gently(LINGER).await,
            Next::Reset => return conn.reset(),
        }
    }
}

/// Responds to `GET /version`. A proxy may send it at any time, so it is not logged as a request
/// and no fault applies to it.
async fn state_version(conn: &mut Conn, shared: &Shared) {
    shared.log.count(|counters| counters.version_requests += 1);
    let version = &shared.config.version;
    let plan = if version.is_empty() {
        Plan::json(404, "{\"detail\":\"Not Found\"}")
    } else {
        Plan::json(200, serde_json::json!({"version": version}).to_string())
    };
    respond_and_close(conn, &plan).await;
}

/// Sends uvicorn's response to input that is not valid HTTP.
async fn respond_malformed(conn: &mut Conn, shared: &Shared) {
    shared.log.count(|counters| counters.malformed += 1);
    let plan = Plan::new(
        400,
        "text/plain; charset=utf-8",
        "Invalid HTTP request received.",
    );
    respond_and_close(conn, &plan).await;
}

async fn respond_and_close(conn: &mut Conn, plan: &Plan) {
    let wire = Wire::of(None);
    conn.out
        .extend_from_slice(head(plan, &wire, false, true).as_bytes());
    if let Content::Whole(body, _) = &plan.content {
        conn.out.extend_from_slice(body);
    }
    if conn.flush().await.is_ok() {
        conn.close_gently(LINGER).await;
    }
}

fn entry(head: &Head, conn: u64, nth_on_conn: u32) -> Seen {
    Seen {
        seq: 0,
        conn,
        nth_on_conn,
        method: head.method.clone(),
        target: head.target.clone(),
        minor_version: head.minor_version,
        headers: head.headers.clone(),
        trailers: Vec::new(),
        body: Vec::new(),
        body_bytes: 0,
        body_sha256: String::new(),
        response: None,
        framing: head.framing,
        at: Instant::now(),
        body_at: None,
        first_byte_at: None,
        json: None,
        prompt_sha256: None,
        state: State::Receiving,
    }
}

/// The end of an exchange for a reason other than a client disconnect.
pub(crate) enum Ended {
    /// The response was sent completely. Contains the action to take on the connection.
    Responded(Next),
    /// A fault ended the exchange before the response was complete. Contains the action to take on
    /// the connection.
    Cut(Next),
}

/// One request and its response.
pub(crate) struct Exchange<'a> {
    pub(crate) conn: &'a mut Conn,
    pub(crate) shared: &'a Shared,
    pub(crate) head: &'a Head,
    pub(crate) seq: u64,
    /// Whether the request body has been read completely.
    received: bool,
    /// Whether the log already has the request in its final state.
    pub(crate) finished: bool,
    /// The status of the response, once its head has been formatted.
    pub(crate) status: Option<u16>,
    /// Sizes of the bodies: 0 for a stream.
    request_bytes: u64,
    pub(crate) response_bytes: u64,
    /// Whether the request counts as a running generation request.
    running: bool,
    /// The measurements of a generation request that was not refused.
    pub(crate) observed: Option<Observation>,
}

impl Exchange<'_> {
    fn aborted(&self) -> State {
        let phase = match (self.received, self.conn.wrote) {
            (false, _) => AbortPhase::Body,
            (true, false) => AbortPhase::BeforeFirstByte,
            (true, true) => AbortPhase::Streaming,
        };
        State::Aborted {
            at: Instant::now(),
            phase,
        }
    }

    /// Adds the exchange, which has ended in this state, to the engine's measurements.
    fn measure(&mut self, state: State, start: Instant) {
        let stats = &self.shared.stats;
        if self.running {
            let reason = match state {
                State::Aborted { .. } => Some(Finish::Abort),
                State::Faulted => Some(Finish::Error),
                State::Receiving | State::Responding | State::Responded => None,
            };
            stats.leave(self.observed.as_ref(), reason);
        }
        if let Some(status) = self.status {
            let path = path_of(&self.head.target);
            if let Some(handler) = routes::handler(path, &self.shared.config) {
                let key = (handler, routes::method(&self.head.method));
                let sizes = (self.request_bytes, self.response_bytes);
                stats.http(key, status, sizes, start.elapsed());
            }
        }
    }

    async fn run(&mut self) -> Result<Ended, Disconnected> {
        let path = path_of(&self.head.target);
        let route = api::route(path).filter(|_| self.head.method == "POST");
        let fault = if path.starts_with("/mock/") {
            None
        } else {
            self.shared.faults.take(path)
        };
        if let Some(fault) = &fault
            && let Some(ended) = self.without_body(fault).await?
        {
            return Ok(ended);
        }
        let mut fault = fault;
        let extra = extra::extra(path, &self.shared.config);
        let body = match self.read_body(route, extra).await {
            Ok(body) => body,
            Err(BodyError::Disconnected) => return Err(Disconnected),
            Err(BodyError::Malformed) => {
                self.shared.log.count(|counters| counters.malformed += 1);
                return self
                    .refuse_body(400, "Invalid HTTP request received.")
                    .await;
            }
            Err(BodyError::TooLarge) => return self.refuse_body(413, "Body too large.").await,
        };
        self.received = true;
        self.request_bytes = body.bytes;
        if route.is_some() {
            self.running = true;
            self.shared.stats.enter();
        }
        self.conn.wrote = false;
        if fault.is_none() && !path.starts_with("/mock/") {
            fault = self.shared.faults.take_for_body(&body.kept);
            if fault.is_some() {
                self.shared.log.count(|counters| counters.faulted += 1);
            }
        }
        let fields = route.map(|route| (route, Fields::parse(&body.kept)));
        let prompt = match &fields {
            Some((route, Ok(fields))) => api::prompt_of(*route, fields),
            Some((_, Err(_))) | None => None,
        };
        self.record_body(&body, route, prompt.as_ref().map(|(sha, _)| sha.clone()));
        let early_end = match &fault {
            Some(fault) => self.without_response(fault).await?,
            None => None,
        };
        if let Some(ended) = early_end {
            return Ok(ended);
        }
        let plan = match (fault.as_ref().and_then(substitute), fields) {
            (Some(plan), _) => plan,
            (None, None) => match extra.filter(|_| self.head.method == "POST") {
                Some(extra) => self.extra(extra, &body).unwrap_or_else(Plan::from),
                None => page(self.shared, self.head, &body),
            },
            (None, Some((_, Err(error)))) => {
                Refusal::bad("body", format!("JSON decode error: {error}")).into()
            }
            (None, Some((route, Ok(fields)))) => self
                .infer(route, &fields, prompt, fault.as_ref())
                .unwrap_or_else(Plan::from),
        };
        self.send(plan, Wire::of(fault.as_ref())).await
    }

    /// Counts a fault and applies it if it acts before the body is read. Returns how the exchange
    /// ended, or `Ok(None)` for any other fault.
    async fn without_body(&mut self, fault: &Fault) -> Result<Option<Ended>, Disconnected> {
        self.shared.log.count(|counters| counters.faulted += 1);
        match fault {
            Fault::EarlyResponse { status, keep } => {
                self.response_early(*status, *keep).await.map(Some)
            }
            Fault::StallRead { after_bytes } => Err(self.conn.stall_after(*after_bytes).await),
            _ => Ok(None),
        }
    }

    async fn read_body(
        &mut self,
        route: Option<Route>,
        extra: Option<Extra>,
    ) -> Result<Body, BodyError> {
        if self.head.expects_continue {
            self.conn
                .out
                .extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
            self.conn.flush().await?;
        }
        let keep_max = match (route, extra) {
            (Some(_), _) => BODY_BYTES_MAX as usize,
            (None, Some(_)) => extra::BODY_BYTES_MAX,
            (None, None) if self.head.target.starts_with("/mock/") => fault_page::BODY_BYTES_MAX,
            (None, None) => self.shared.config.keep_body_bytes,
        };
        self.conn.read_body(self.head.framing, keep_max).await
    }

    async fn refuse_body(&mut self, status: u16, text: &str) -> Result<Ended, Disconnected> {
        let plan = Plan::new(status, "text/plain; charset=utf-8", text);
        let mut wire = Wire::of(None);
        wire.next = Some(Next::CloseGently);
        self.send(plan, wire).await
    }

    fn record_body(&self, body: &Body, route: Option<Route>, prompt_sha256: Option<String>) {
        let config = &self.shared.config;
        let json = route
            .filter(|_| config.keep_json)
            .and_then(|_| serde_json::from_slice(&body.kept).ok());
        let kept = body.kept.get(..config.keep_body_bytes);
        let kept = kept.unwrap_or(&body.kept).to_vec();
        self.shared.log.update(self.seq, |seen| {
            seen.body = kept;
            seen.body_bytes = body.bytes;
            seen.body_sha256.clone_from(&body.sha256);
            seen.trailers.clone_from(&body.trailers);
            seen.body_at = Some(Instant::now());
            seen.json = json;
            seen.prompt_sha256 = prompt_sha256;
            seen.state = State::Responding;
        });
    }

    async fn response_early(&mut self, status: u16, keep: bool) -> Result<Ended, Disconnected> {
        let message = "response sent before the request body was read".to_owned();
        let refusal = Refusal::plain(status, message);
        let mut wire = Wire::of(None);
        wire.next = Some(if keep {
            Next::KeepAlive
        } else {
            Next::CloseGently
        });
        let ended = self.send(refusal.into(), wire).await?;
        if keep {
            let framing = self.head.framing;
            if self.conn.read_body(framing, 0).await.is_err() {
                return Ok(Ended::Responded(Next::Close));
            }
        }
        Ok(ended)
    }

    /// Applies a fault that sends no regular HTTP response at all: it resets, closes or stalls the
    /// connection, or sends garbage, an endless head, or a 101 and then an echo. Returns how the
    /// exchange ended, or `Ok(None)`, without any effect, for any other fault.
    async fn without_response(&mut self, fault: &Fault) -> Result<Option<Ended>, Disconnected> {
        match fault {
            Fault::ResetBeforeHead => Ok(Some(Ended::Cut(Next::Reset))),
            Fault::CloseBeforeHead => Ok(Some(Ended::Cut(Next::Close))),
            Fault::StallBeforeHead => Err(self.conn.stall().await),
            Fault::Garbage => {
                self.conn
                    .out
                    .extend_from_slice(b"\x16\x03\x01\x00\x02\x02\x16 not HTTP\r\n\r\n");
                self.flush().await?;
                Ok(Some(Ended::Cut(Next::Close)))
            }
            Fault::EndlessHead => {
                self.conn.out.extend_from_slice(b"HTTP/1.1 200 OK\r\n");
                loop {
                    let line = format!("x-endless: {}\r\n", "e".repeat(1_000));
                    self.conn.out.extend_from_slice(line.as_bytes());
                    self.flush().await?;
                    self.conn.yield_and_check().await?;
                }
            }
            Fault::Upgrade101 => {
                let head = "HTTP/1.1 101 Switching Protocols\r\n\
                            connection: upgrade\r\nupgrade: websocket\r\n\r\n";
                self.conn.out.extend_from_slice(head.as_bytes());
                self.flush().await?;
                self.conn.echo().await;
                Ok(Some(Ended::Responded(Next::Close)))
            }
            _ => Ok(None),
        }
    }

    /// Writes the buffered output. If it contains the response's first byte, records the time in
    /// the log.
    pub(crate) async fn flush(&mut self) -> Result<(), Disconnected> {
        let first = !self.conn.wrote;
        self.conn.flush().await?;
        if first && self.conn.wrote {
            self.shared.log.update(self.seq, |seen| {
                seen.first_byte_at = Some(Instant::now());
            });
        }
        Ok(())
    }
}
