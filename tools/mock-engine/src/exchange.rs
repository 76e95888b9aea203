//! One request after the other on one connection: read it, log it, decide the
//! answer, write it as the fault of the day demands.
//!
//! Every wait goes through [`Conn`], which ends it when the client goes.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::net::TcpStream;

use crate::answer::{Answer, Circumstances, Events};
use crate::api::{self, Ask, Kind, Refusal, Route};
use crate::config::{CACHED_BY_ROLE, HandoffShape, Role};
use crate::engine::Shared;
use crate::fault::Fault;
use crate::http::{BODY_BYTES_MAX, Body, Conn, Gone, Head, NoBody, NoHead, after};
use crate::json::Fields;
use crate::log::{AbortPhase, Seen, State, path_of};
use crate::pages::page;
use crate::pd::{self, Leg, Terms, Verdict};
use crate::wire::{Content, Cut, Delimiter, Next, Plan, Wire, head, substitute};

/// Output gathered before it is written when nothing has to be waited for.
const GATHER_BYTES: usize = 16 << 10;
/// How long a close after an early answer takes what the client still sends.
const LINGER: Duration = Duration::from_millis(500);

/// Serves one connection until it ends.
pub(crate) async fn serve(stream: TcpStream, shared: &Shared, number: u64) {
    let mut conn = Conn::new(stream);
    let mut nth = 0;
    loop {
        let idle = (nth > 0).then_some(shared.config.keepalive);
        let head = match conn.read_head(idle).await {
            Ok(head) => head,
            Err(NoHead::Gone) => return,
            Err(NoHead::Idle) => {
                shared.log.count(|counters| counters.idle_closed += 1);
                return;
            }
            Err(NoHead::Malformed) => return refuse_malformed(&mut conn, shared).await,
        };
        let seq = shared.log.enter(entry(&head, number, nth));
        nth += 1;
        let mut exchange = Exchange {
            conn: &mut conn,
            shared,
            head: &head,
            seq,
            received: false,
            finished: false,
        };
        let ended = exchange.run().await;
        let (state, next) = match ended {
            Ok(Ended::Answered(next)) => (State::Answered, next),
            Ok(Ended::Cut(next)) => (State::Faulted, next),
            Err(Gone) => (exchange.aborted(), Next::Close),
        };
        if !exchange.finished {
            shared.log.finish(seq, state);
        }
        match next {
            Next::Keep => {}
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

/// uvicorn's answer to what is not HTTP.
async fn refuse_malformed(conn: &mut Conn, shared: &Shared) {
    shared.log.count(|counters| counters.malformed += 1);
    let plan = Plan::new(
        400,
        "text/plain; charset=utf-8",
        "Invalid HTTP request received.",
    );
    let wire = Wire::of(None);
    conn.out
        .extend_from_slice(head(&plan, &wire, false, true).as_bytes());
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
        framing: head.framing,
        at: Instant::now(),
        body_at: None,
        first_byte_at: None,
        json: None,
        prompt_sha256: None,
        state: State::Receiving,
    }
}

/// How an exchange ended, other than by the client.
enum Ended {
    /// With a complete answer.
    Answered(Next),
    /// By a fault.
    Cut(Next),
}

/// One request and its answer.
struct Exchange<'a> {
    conn: &'a mut Conn,
    shared: &'a Shared,
    head: &'a Head,
    seq: u64,
    /// Whether the request is complete.
    received: bool,
    /// Whether the log has it as answered.
    finished: bool,
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

    async fn run(&mut self) -> Result<Ended, Gone> {
        let path = path_of(&self.head.target);
        let route = api::route(path).filter(|_| self.head.method == "POST");
        let fault = if path.starts_with("/mock/") {
            None
        } else {
            self.shared.faults.take(path)
        };
        match &fault {
            None => {}
            Some(fault) => {
                self.shared.log.count(|counters| counters.faulted += 1);
                if let Fault::EarlyAnswer { status, keep } = fault {
                    return self.answer_early(*status, *keep).await;
                }
                if let Fault::StallRead { after_bytes } = fault {
                    return Err(self.conn.stall_after(*after_bytes).await);
                }
            }
        }
        let body = match self.read_body(route).await {
            Ok(body) => body,
            Err(NoBody::Gone) => return Err(Gone),
            Err(NoBody::Malformed) => {
                self.shared.log.count(|counters| counters.malformed += 1);
                return self
                    .refuse_body(400, "Invalid HTTP request received.")
                    .await;
            }
            Err(NoBody::TooLarge) => return self.refuse_body(413, "Body too large.").await,
        };
        self.received = true;
        self.conn.wrote = false;
        let fields = route.map(|route| (route, Fields::parse(&body.kept)));
        let prompt = match &fields {
            Some((route, Ok(fields))) => api::prompt_of(*route, fields),
            Some((_, Err(_))) | None => None,
        };
        self.note_body(&body, route, prompt.as_ref().map(|(sha, _)| sha.clone()));
        let answer_at_once = match &fault {
            Some(fault) => self.without_answer(fault).await?,
            None => None,
        };
        if let Some(ended) = answer_at_once {
            return Ok(ended);
        }
        let plan = match (fault.as_ref().and_then(substitute), fields) {
            (Some(plan), _) => plan,
            (None, None) => page(self.shared, self.head, &body),
            (None, Some((_, Err(error)))) => {
                Refusal::bad("body", format!("JSON decode error: {error}")).into()
            }
            (None, Some((route, Ok(fields)))) => self
                .infer(route, &fields, prompt, fault.as_ref())
                .unwrap_or_else(Plan::from),
        };
        self.send(plan, Wire::of(fault.as_ref())).await
    }

    async fn read_body(&mut self, route: Option<Route>) -> Result<Body, NoBody> {
        if self.head.expects_continue {
            self.conn
                .out
                .extend_from_slice(b"HTTP/1.1 100 Continue\r\n\r\n");
            self.conn.flush().await?;
        }
        let keep_max = match route {
            Some(_) => BODY_BYTES_MAX as usize,
            None => self.shared.config.keep_body_bytes,
        };
        self.conn.read_body(self.head.framing, keep_max).await
    }

    async fn refuse_body(&mut self, status: u16, text: &str) -> Result<Ended, Gone> {
        let plan = Plan::new(status, "text/plain; charset=utf-8", text);
        let mut wire = Wire::of(None);
        wire.next = Some(Next::CloseGently);
        self.send(plan, wire).await
    }

    fn note_body(&self, body: &Body, route: Option<Route>, prompt_sha256: Option<String>) {
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
            seen.state = State::Answering;
        });
    }

    async fn answer_early(&mut self, status: u16, keep: bool) -> Result<Ended, Gone> {
        let message = "answered before the body was read".to_owned();
        let refusal = Refusal {
            status,
            param: None,
            message,
        };
        let mut wire = Wire::of(None);
        wire.next = Some(if keep { Next::Keep } else { Next::CloseGently });
        let ended = self.send(refusal.into(), wire).await?;
        if keep {
            let framing = self.head.framing;
            if self.conn.read_body(framing, 0).await.is_err() {
                return Ok(Ended::Answered(Next::Close));
            }
        }
        Ok(ended)
    }

    /// The faults that leave no answer at all.
    async fn without_answer(&mut self, fault: &Fault) -> Result<Option<Ended>, Gone> {
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
                    self.conn.breathe().await?;
                }
            }
            Fault::Upgrade101 => {
                let head = "HTTP/1.1 101 Switching Protocols\r\n\
                            connection: upgrade\r\nupgrade: mock\r\n\r\n";
                self.conn.out.extend_from_slice(head.as_bytes());
                self.flush().await?;
                self.conn.echo().await;
                Ok(Some(Ended::Answered(Next::Close)))
            }
            _ => Ok(None),
        }
    }

    /// Writes what is gathered and notes the first byte.
    async fn flush(&mut self) -> Result<(), Gone> {
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

// Inference: from a request to the plan of its answer.
impl Exchange<'_> {
    fn infer(
        &self,
        route: Route,
        fields: &Fields<'_>,
        prompt: Option<(String, u64)>,
        fault: Option<&Fault>,
    ) -> Result<Plan, Refusal> {
        self.check_head(route)?;
        let ask = api::check(route, fields, prompt, &self.shared.config)?;
        let (handoff, foreign, leg) = self.legs(&ask, fields, fault)?;
        let cached = self.cached(leg);
        let answer = Answer::new(
            &ask,
            &self.shared.config,
            Circumstances {
                id: self.id(ask.kind, fields),
                created: SystemTime::now()
                    .duration_since(UNIX_EPOCH)
                    .map_or(0, |now| now.as_secs()),
                foreign,
                cached,
                handoff,
                pad_bytes: match fault {
                    Some(Fault::LargeJson { bytes }) => *bytes,
                    _ => 0,
                },
            },
        );
        let mut plan = if ask.stream {
            Plan::stream(Events::new(answer))
        } else {
            let tokens = answer.tokens();
            Plan::generated(answer.whole(), tokens)
        };
        if self.shared.config.request_id_header {
            let sent = self.head.header("x-request-id");
            let id = sent.map_or_else(|| format!("{:032x}", self.seq), str::to_owned);
            plan = plan.with("x-request-id", id);
        }
        Ok(plan)
    }

    fn check_head(&self, route: Route) -> Result<(), Refusal> {
        let media = self.head.header("content-type").unwrap_or_default();
        let media = media.split(';').next().unwrap_or_default().trim();
        if !media.eq_ignore_ascii_case("application/json") {
            let message = "Unsupported Media Type: Only 'application/json' is allowed";
            return Err(Refusal::bad("content-type", message));
        }
        let rank = self.head.header("x-data-parallel-rank");
        let rank: Option<i64> = rank.and_then(|rank| rank.trim().parse().ok());
        let size = i64::from(self.shared.config.data_parallel_size);
        match rank {
            // The responses route does not read the header.
            Some(rank) if route != Route::Api(Kind::Responses) && !(0..size).contains(&rank) => {
                let message = format!("data_parallel_rank {rank} is out of range [0, {size}).");
                Err(Refusal::bad("data_parallel_rank", message))
            }
            _ => Ok(()),
        }
    }

    /// The two-step exchange: handoff members for the answer, and whether the
    /// answer has somebody else's text.
    fn legs(
        &self,
        ask: &Ask,
        fields: &Fields<'_>,
        fault: Option<&Fault>,
    ) -> Result<(String, bool, Leg), Refusal> {
        let log = &self.shared.log;
        let params = fields.value("kv_transfer_params");
        let leg = pd::leg(params);
        match (leg, self.shared.config.role) {
            (Leg::Local, _) => Ok((String::new(), false, leg)),
            (Leg::Poison, _) => {
                log.count(|counters| counters.poisoned += 1);
                Err(Refusal::internal(
                    "EngineCore encountered an issue. See stack trace (above) for the root cause.",
                ))
            }
            (Leg::Prefill, Role::Decode) | (Leg::Decode, Role::Prefill) => {
                log.count(|counters| counters.wrong_role += 1);
                Err(Refusal::internal("Internal server error"))
            }
            (Leg::Prefill, Role::Prefill | Role::Both) => {
                if let Some(params) = params.filter(|_| self.shared.config.strict) {
                    pd::check_contract(ask.kind, fields, params).map_err(|message| {
                        log.count(|counters| counters.contract_broken += 1);
                        Refusal::bad("kv_transfer_params", message)
                    })?;
                }
                Ok((self.hand_out(ask, fault), false, leg))
            }
            (Leg::Decode, Role::Decode | Role::Both) => {
                let raw = params.map_or("", serde_json::value::RawValue::get);
                Ok((String::new(), self.redeem(ask, raw)?, leg))
            }
        }
    }

    fn hand_out(&self, ask: &Ask, fault: Option<&Fault>) -> String {
        // A stream carries the object only in the last event of a response.
        if ask.stream && ask.kind != Kind::Responses {
            return String::new();
        }
        let config = &self.shared.config;
        let shape = match fault {
            Some(Fault::Handoff(shape)) => *shape,
            _ if config.flat_blocks && config.handoff == HandoffShape::Fresh => HandoffShape::Flat,
            _ => config.handoff,
        };
        match shape {
            HandoffShape::Fresh | HandoffShape::Flat | HandoffShape::Decoys => {
                self.shared
                    .log
                    .count(|counters| counters.handoff_issued += 1);
            }
            HandoffShape::Omit
            | HandoffShape::Null
            | HandoffShape::Empty
            | HandoffShape::Text
            | HandoffShape::List
            | HandoffShape::Stale => {}
        }
        let terms = Terms {
            engine_id: &config.name,
            port: self.shared.port,
            prompt_sha256: &ask.prompt_sha256,
            prompt_tokens: ask.prompt_tokens,
            cached_tokens: self.cached(Leg::Prefill),
        };
        self.shared
            .issuer
            .members(shape, &self.shared.registry, terms)
    }

    /// Whether the answer has somebody else's text.
    fn redeem(&self, ask: &Ask, raw: &str) -> Result<bool, Refusal> {
        let config = &self.shared.config;
        if !config.strict || config.verify_handoff.is_none() {
            return Ok(false);
        }
        let verdict = self.shared.registry.redeem(raw, &ask.prompt_sha256);
        self.shared.log.count(|counters| match verdict {
            Verdict::Good => counters.handoff_used += 1,
            Verdict::Reused => counters.handoff_reused += 1,
            Verdict::Foreign => counters.handoff_foreign += 1,
            Verdict::Altered => counters.handoff_altered += 1,
            Verdict::Unknown => counters.handoff_unknown += 1,
        });
        match verdict {
            Verdict::Good => Ok(false),
            Verdict::Reused | Verdict::Foreign => Ok(true),
            Verdict::Altered => Err(Refusal::internal("Internal server error (handoff altered)")),
            Verdict::Unknown => Err(Refusal::internal("Internal server error (handoff unknown)")),
        }
    }

    fn cached(&self, leg: Leg) -> u64 {
        match (self.shared.config.cached_tokens, leg) {
            (CACHED_BY_ROLE, Leg::Prefill) => 7,
            (CACHED_BY_ROLE, Leg::Local | Leg::Decode | Leg::Poison) => 49,
            (configured, _) => configured,
        }
    }

    fn id(&self, kind: Kind, fields: &Fields<'_>) -> String {
        let nth = self.shared.answers.fetch_add(1, Ordering::Relaxed);
        let sent = self.head.header("x-request-id").map(str::to_owned);
        let id = sent
            .or_else(|| fields.string("request_id"))
            .unwrap_or_else(|| format!("{nth:016x}"));
        match kind {
            Kind::Chat | Kind::Messages => format!("chatcmpl-{id}"),
            Kind::Completions => format!("cmpl-{id}"),
            Kind::Generate => format!("generate-tokens-{id}"),
            Kind::Responses => format!("resp_{nth:016x}"),
        }
    }
}

// Writing: from the plan to the bytes.
impl Exchange<'_> {
    async fn send(&mut self, plan: Plan, wire: Wire) -> Result<Ended, Gone> {
        let start = Instant::now();
        self.conn.slow = wire.slow;
        for _ in 0..wire.interim {
            let hints = "HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n";
            self.conn.out.extend_from_slice(hints.as_bytes());
        }
        if wire.interim > 0 {
            self.conn.flush().await?;
            self.conn.wrote = false;
        }
        let minor = self.head.minor_version;
        let chunked = wire.chunked(&plan.content, minor);
        let announce = wire.http10
            || (wire.next.is_none() && !self.head.keep_alive)
            || wire.next == Some(Next::CloseGently);
        let head = head(&plan, &wire, chunked, announce);
        self.conn.out.extend_from_slice(head.as_bytes());
        self.wait_for_first_token(&plan.content, start).await?;
        if wire.stall_after_head {
            self.flush().await?;
            return Err(self.conn.stall().await);
        }
        let delimited = chunked || matches!(wire.delimiter, Delimiter::Proper);
        let open_ended = matches!(plan.content, Content::Events(_)) && !chunked;
        let cut = if self.head.method == "HEAD" {
            None
        } else {
            self.send_content(plan.content, &wire, chunked, start)
                .await?
        };
        match cut {
            Some(Cut::Reset) => return Ok(Ended::Cut(Next::Reset)),
            Some(Cut::Truncate) => return Ok(Ended::Cut(Next::Close)),
            Some(Cut::Stall) => return Err(self.conn.stall().await),
            None => {}
        }
        if wire.garbage_after {
            self.conn
                .out
                .extend_from_slice(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nextra");
        }
        let conn = &mut *self.conn;
        self.finished = self.shared.log.finish_with(self.seq, || conn.write_now());
        if !self.finished {
            self.flush().await?;
        }
        self.conn.slow = None;
        let must_close = announce || open_ended || !delimited;
        let next = wire
            .next
            .unwrap_or(if must_close { Next::Close } else { Next::Keep });
        Ok(Ended::Answered(next))
    }

    /// A whole answer waits for all of its tokens, a stream for its first.
    async fn wait_for_first_token(
        &mut self,
        content: &Content,
        start: Instant,
    ) -> Result<(), Gone> {
        let config = &self.shared.config;
        let wait = match content {
            Content::Whole(_, 0) | Content::Nothing(_) => return Ok(()),
            Content::Whole(_, tokens) => config
                .ttft
                .saturating_add(config.itl.saturating_mul(tokens.saturating_sub(1))),
            Content::Events(_) => config.ttft,
        };
        if config.early_head && matches!(content, Content::Events(_)) {
            self.flush().await?;
        }
        self.conn.pause_until(after(start, wait)).await
    }

    async fn send_content(
        &mut self,
        content: Content,
        wire: &Wire,
        chunked: bool,
        start: Instant,
    ) -> Result<Option<Cut>, Gone> {
        match content {
            Content::Nothing(_) => Ok(None),
            Content::Events(events) => self.send_events(*events, wire, chunked, start).await,
            Content::Whole(body, _) => {
                let kept = match wire.cut {
                    Some((0, _)) => 0,
                    Some(_) => body.len() / 2,
                    None => body.len(),
                };
                let part = body.get(..kept).unwrap_or_default();
                if chunked {
                    self.push_chunk(part);
                } else {
                    self.conn.out.extend_from_slice(part);
                }
                self.flush_cut(wire.cut.map(|(_, cut)| cut), chunked).await
            }
        }
    }

    /// Writes what is gathered; a body that is not cut gets its terminator.
    async fn flush_cut(&mut self, cut: Option<Cut>, chunked: bool) -> Result<Option<Cut>, Gone> {
        match cut {
            Some(_) => self.flush().await?,
            None if chunked => self.conn.out.extend_from_slice(b"0\r\n\r\n"),
            None => {}
        }
        Ok(cut)
    }

    async fn send_events(
        &mut self,
        mut events: Events,
        wire: &Wire,
        chunked: bool,
        start: Instant,
    ) -> Result<Option<Cut>, Gone> {
        let (ttft, itl) = (self.shared.config.ttft, self.shared.config.itl);
        let mut sent = 0;
        loop {
            if let Some((after, cut)) = wire.cut
                && after == sent
            {
                return self.flush_cut(Some(cut), chunked).await;
            }
            let Some(event) = events.next() else {
                // An answer with fewer events is cut before its terminator.
                return self.flush_cut(wire.cut.map(|(_, cut)| cut), chunked).await;
            };
            if !itl.is_zero() && event.token > 0 {
                let due = after(start, ttft.saturating_add(itl.saturating_mul(event.token)));
                if due > Instant::now() {
                    self.flush().await?;
                    self.conn.pause_until(due).await?;
                }
            }
            if chunked {
                self.push_chunk(event.text.as_bytes());
            } else {
                self.conn.out.extend_from_slice(event.text.as_bytes());
            }
            sent += 1;
            if self.conn.out.len() >= GATHER_BYTES {
                self.flush().await?;
                self.conn.breathe().await?;
            }
        }
    }

    fn push_chunk(&mut self, bytes: &[u8]) {
        let size = format!("{:x}\r\n", bytes.len());
        self.conn.out.extend_from_slice(size.as_bytes());
        self.conn.out.extend_from_slice(bytes);
        self.conn.out.extend_from_slice(b"\r\n");
    }
}
