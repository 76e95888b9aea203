//! What an engine saw: one [`Seen`] per request, from the moment its head is
//! complete, updated in place until the answer has left or the client has.
//!
//! Readers take snapshots or wait on a condition; every change wakes them.

use std::sync::{Condvar, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::sync::{Guarded, wait};

/// How the body of a request was delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// Neither a length nor chunks: no body.
    None,
    /// `content-length`.
    ContentLength(u64),
    /// `transfer-encoding: chunked`.
    Chunked,
}

/// Where a request was when its client went away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbortPhase {
    /// The body was not complete.
    Body,
    /// The request was complete, nothing of the answer was written.
    BeforeFirstByte,
    /// Part of the answer was written.
    Streaming,
}

/// How far a request has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The head is complete, the body is not.
    Receiving,
    /// The request is complete, the answer is not.
    Responding,
    /// The answer is complete.
    Responded,
    /// A fault of ours ended the exchange without a complete answer.
    Faulted,
    /// The client closed before the answer was complete.
    Aborted {
        /// When that was noticed.
        at: Instant,
        /// What the engine was doing.
        phase: AbortPhase,
    },
}

impl State {
    /// Whether the client went away.
    #[must_use]
    pub fn is_aborted(&self) -> bool {
        matches!(self, Self::Aborted { .. })
    }

    fn label(self) -> &'static str {
        match self {
            Self::Receiving => "receiving",
            Self::Responding => "answering",
            Self::Responded => "answered",
            Self::Faulted => "faulted",
            Self::Aborted { phase, .. } => match phase {
                AbortPhase::Body => "aborted in body",
                AbortPhase::BeforeFirstByte => "aborted before first byte",
                AbortPhase::Streaming => "aborted while streaming",
            },
        }
    }
}

/// One request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Position in the order of arrival, from 0.
    pub seq: u64,
    /// The connection it came on, from 0 in the order of acceptance.
    pub conn: u64,
    /// Position among the requests of that connection, from 0.
    pub nth_on_conn: u32,
    /// The method.
    pub method: String,
    /// The request target, query included.
    pub target: String,
    /// The minor HTTP version: 1, or 0.
    pub minor_version: u8,
    /// Names as sent, values as text (lossy where they are not UTF-8).
    pub headers: Vec<(String, String)>,
    /// Trailers of a chunked body.
    pub trailers: Vec<(String, String)>,
    /// The body without its framing, up to `keep_body_bytes`.
    pub body: Vec<u8>,
    /// The whole length of the body.
    pub body_bytes: u64,
    /// SHA-256 of the whole body in hex; empty while it is incomplete.
    pub body_sha256: String,
    /// The bytes of the answer as written, once it is over and where they are kept.
    pub response: Option<Vec<u8>>,
    /// How the body was delimited.
    pub framing: Framing,
    /// When the head was complete.
    pub at: Instant,
    /// When the body was complete.
    pub body_at: Option<Instant>,
    /// When the first byte of the answer was written.
    pub first_byte_at: Option<Instant>,
    /// The body as JSON, for the API routes.
    pub json: Option<Value>,
    /// SHA-256 in hex of the bytes of the prompt as received: the value of
    /// `messages`, `prompt`, `input` or `token_ids`.
    pub prompt_sha256: Option<String>,
    /// How far it has come.
    pub state: State,
}

impl Seen {
    /// The first header of that name, in any case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.header_all(name).first().copied()
    }

    /// Every header of that name, in any case.
    #[must_use]
    pub fn header_all(&self, name: &str) -> Vec<&str> {
        self.headers
            .iter()
            .filter(|(have, _)| have.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
            .collect()
    }

    /// The header names in the order of arrival, in lower case.
    #[must_use]
    pub fn header_names_lower(&self) -> Vec<String> {
        self.headers
            .iter()
            .map(|(name, _)| name.to_ascii_lowercase())
            .collect()
    }

    /// The request target without its query.
    #[must_use]
    pub fn path(&self) -> &str {
        path_of(&self.target)
    }

    /// The entry as JSON, with the size and hash of the body in its place.
    #[must_use]
    pub fn summary(&self) -> Value {
        json!({
            "seq": self.seq,
            "conn": self.conn,
            "nth_on_conn": self.nth_on_conn,
            "method": self.method,
            "target": self.target,
            "headers": self.headers,
            "body_bytes": self.body_bytes,
            "body_sha256": self.body_sha256,
            "prompt_sha256": self.prompt_sha256,
            "state": self.state.label(),
        })
    }
}

/// The path of a request target.
pub(crate) fn path_of(target: &str) -> &str {
    target.split('?').next().unwrap_or(target)
}

/// Numbers an engine keeps about itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections accepted.
    pub connections_accepted: u64,
    /// Connections open now.
    pub connections_open: u64,
    /// Request heads received.
    pub requests: u64,
    /// Requests whose head is complete and that have not ended.
    pub running: u64,
    /// Answers completed.
    pub responded: u64,
    /// Requests whose client closed before the answer was complete.
    pub aborted: u64,
    /// Connections closed because they idled past `keepalive`.
    pub idle_closed: u64,
    /// Connections closed under the next request (`CloseOnNextRequest`).
    pub stale_closed: u64,
    /// Heads or bodies that are not valid HTTP.
    pub malformed: u64,
    /// Requests hit by a fault.
    pub faulted: u64,
    /// Requests that broke the contract of their leg (answered 400).
    pub contract_broken: u64,
    /// Handoffs issued.
    pub handoff_issued: u64,
    /// Handoffs verified: known, unaltered, for the same prompt, first use.
    pub handoff_used: u64,
    /// Handoffs used a second time (answered with foreign text).
    pub handoff_reused: u64,
    /// Handoffs used with another prompt (answered with foreign text).
    pub handoff_foreign: u64,
    /// Handoffs whose bytes differ from what was issued (answered 500).
    pub handoff_altered: u64,
    /// Handoffs nobody issued (answered 500).
    pub handoff_unknown: u64,
    /// Requests that would have crashed a real engine (answered 500).
    pub poisoned: u64,
    /// Requests of the other role (answered 500).
    pub wrong_role: u64,
}

#[derive(Debug, Default)]
struct Inner {
    seen: Vec<Seen>,
    next_seq: u64,
    counters: Counters,
}

impl Inner {
    /// The entry of that number, if it has not been cleared away.
    fn find(&mut self, seq: u64) -> Option<&mut Seen> {
        let at = self.seen.binary_search_by_key(&seq, |seen| seen.seq).ok()?;
        self.seen.get_mut(at)
    }
}

/// The log of one engine.
#[derive(Debug)]
pub(crate) struct Log {
    inner: Guarded<Inner>,
    changed: Condvar,
    requests_max: usize,
}

impl Log {
    pub(crate) fn new(requests_max: usize) -> Self {
        Self {
            inner: Guarded::default(),
            changed: Condvar::new(),
            requests_max: requests_max.max(2),
        }
    }

    /// Enters a request whose head is complete and returns its number.
    pub(crate) fn enter(&self, mut seen: Seen) -> u64 {
        let mut inner = self.inner.lock();
        let seq = inner.next_seq;
        inner.next_seq += 1;
        seen.seq = seq;
        if inner.seen.len() >= self.requests_max {
            inner.seen.drain(..self.requests_max / 2);
        }
        inner.seen.push(seen);
        inner.counters.requests += 1;
        inner.counters.running += 1;
        drop(inner);
        self.changed.notify_all();
        seq
    }

    /// Changes an entry.
    pub(crate) fn update(&self, seq: u64, change: impl FnOnce(&mut Seen)) {
        let mut inner = self.inner.lock();
        if let Some(seen) = inner.find(seq) {
            change(seen);
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Ends an entry and counts how.
    pub(crate) fn finish(&self, seq: u64, state: State) {
        self.count(|counters| {
            counters.running -= 1;
            match state {
                State::Responded => counters.responded += 1,
                State::Aborted { .. } => counters.aborted += 1,
                State::Receiving | State::Responding | State::Faulted => {}
            }
        });
        self.update(seq, |seen| seen.state = state);
    }

    /// Runs `write` under the log's lock and, if it reports success, enters
    /// the answer as complete: whoever then has the answer and looks into the
    /// log finds it there. Returns what `write` returned.
    pub(crate) fn finish_with(&self, seq: u64, write: impl FnOnce() -> bool) -> bool {
        let mut inner = self.inner.lock();
        if !write() {
            return false;
        }
        inner.counters.running -= 1;
        inner.counters.responded += 1;
        if let Some(seen) = inner.find(seq) {
            seen.first_byte_at.get_or_insert_with(Instant::now);
            seen.state = State::Responded;
        }
        drop(inner);
        self.changed.notify_all();
        true
    }

    /// Changes the counters.
    pub(crate) fn count(&self, change: impl FnOnce(&mut Counters)) {
        change(&mut self.inner.lock().counters);
        self.changed.notify_all();
    }

    pub(crate) fn counters(&self) -> Counters {
        self.inner.lock().counters
    }

    pub(crate) fn requests(&self) -> Vec<Seen> {
        self.inner.lock().seen.clone()
    }

    pub(crate) fn summaries(&self) -> Vec<Value> {
        self.inner.lock().seen.iter().map(Seen::summary).collect()
    }

    pub(crate) fn clear(&self) {
        self.inner.lock().seen.clear();
    }

    /// Waits until `pred` holds for the log.
    pub(crate) fn wait_for(
        &self,
        deadline: Duration,
        pred: impl Fn(&[Seen]) -> bool,
    ) -> Option<Vec<Seen>> {
        self.wait_until(deadline, |inner| pred(&inner.seen))
            .map(|inner| inner.seen.clone())
    }

    /// Waits until `pred` holds for the counters.
    pub(crate) fn wait_counters(
        &self,
        deadline: Duration,
        pred: impl Fn(&Counters) -> bool,
    ) -> Option<Counters> {
        self.wait_until(deadline, |inner| pred(&inner.counters))
            .map(|inner| inner.counters)
    }

    fn wait_until(
        &self,
        deadline: Duration,
        pred: impl Fn(&Inner) -> bool,
    ) -> Option<MutexGuard<'_, Inner>> {
        let start = Instant::now();
        let mut inner = self.inner.lock();
        while !pred(&inner) {
            let left = deadline.checked_sub(start.elapsed())?;
            inner = wait(&self.changed, inner, left);
        }
        Some(inner)
    }
}
