//! The request log of an engine, with one [`Seen`] per request.
//!
//! An entry is added when a request's head is complete, and updated in place until the response has
//! been sent or the client has disconnected. Readers take snapshots or wait for a condition; every
//! change wakes them.

use std::sync::{Condvar, MutexGuard};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::sync::{Guarded, wait};

/// The framing of a request body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// The request has neither `content-length` nor `transfer-encoding`, so it has no body.
    None,
    /// The body is delimited by `content-length`, which has this value.
    ContentLength(u64),
    /// The body has `transfer-encoding: chunked`.
    Chunked,
}

/// The phase a request was in when its client disconnected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AbortPhase {
    /// The request body was incomplete.
    Body,
    /// The request was complete, and no byte of the final response had been written.
    BeforeFirstByte,
    /// Part of the response had been written.
    Streaming,
}

/// The progress of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The request head is complete, the body is not.
    Receiving,
    /// The request is complete, the response is not.
    Responding,
    /// The response is complete.
    Responded,
    /// A [`crate::Fault`] ended the exchange without a complete response. A fault that stalls
    /// results in `Aborted` instead, once the client disconnects.
    Faulted,
    /// The client disconnected before the response was complete.
    Aborted {
        /// The time at which the disconnect was detected.
        at: Instant,
        /// The phase that the request was in.
        phase: AbortPhase,
    },
}

impl State {
    /// Returns whether the client disconnected before the response was complete.
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

/// The log entry of one request.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Number of the request among all requests of the engine, from 0 in the order of arrival.
    pub seq: u64,
    /// Number of the connection, from 0 in the order of acceptance.
    pub conn: u64,
    /// Position among the requests of its connection, from 0.
    pub nth_on_conn: u32,
    /// Request method.
    pub method: String,
    /// Request target, including the query.
    pub target: String,
    /// Minor HTTP version, 0 or 1.
    pub minor_version: u8,
    /// Header fields: names as sent, values as text (lossy if they are not UTF-8).
    pub headers: Vec<(String, String)>,
    /// Trailer fields of a chunked request body.
    pub trailers: Vec<(String, String)>,
    /// The request body without its framing, truncated to `keep_body_bytes`; empty until the body
    /// is complete.
    pub body: Vec<u8>,
    /// Length of the whole request body in bytes; 0 until the body is complete.
    pub body_bytes: u64,
    /// SHA-256 (hex) of the whole request body; empty until the body is complete.
    pub body_sha256: String,
    /// All bytes written in response, including interim responses. Set after the exchange if
    /// `keep_response` is on.
    pub response: Option<Vec<u8>>,
    /// How the request body is delimited.
    pub framing: Framing,
    /// The time at which the request head was complete.
    pub at: Instant,
    /// The time at which the request body was complete; `None` until then.
    pub body_at: Option<Instant>,
    /// The time at which the first byte of the final response was written; `None` until then.
    pub first_byte_at: Option<Instant>,
    /// The request body as JSON, for requests to the inference routes if `keep_json` is on. `None`
    /// if the body is incomplete or not valid JSON.
    pub json: Option<Value>,
    /// SHA-256 (hex) of the prompt's bytes as received: the value of `messages`, `prompt`, `input`
    /// or `token_ids`. `None` if the request has no prompt or the body is incomplete.
    pub prompt_sha256: Option<String>,
    /// Progress of the request.
    pub state: State,
}

impl Seen {
    /// Returns the value of the first header field called `name`, ignoring case.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.header_all(name).first().copied()
    }

    /// Returns the values of all header fields called `name`, ignoring case.
    #[must_use]
    pub fn header_all(&self, name: &str) -> Vec<&str> {
        self.headers
            .iter()
            .filter(|(have, _)| have.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
            .collect()
    }

    /// Returns the names of the header fields in lower case, in the order of arrival.
    #[must_use]
    pub fn header_names_lower(&self) -> Vec<String> {
        self.headers
            .iter()
            .map(|(name, _)| name.to_ascii_lowercase())
            .collect()
    }

    /// Returns the request target without its query.
    #[must_use]
    pub fn path(&self) -> &str {
        path_of(&self.target)
    }

    /// Returns the main parts of the entry as JSON, for `GET /mock/requests`: the request head, the
    /// size and hash of the body instead of its bytes, and the state.
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

/// Returns a request target without its query.
pub(crate) fn path_of(target: &str) -> &str {
    target.split('?').next().unwrap_or(target)
}

/// Counters of an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Connections accepted.
    pub connections_accepted: u64,
    /// Connections currently open.
    pub connections_open: u64,
    /// Complete request heads received.
    pub requests: u64,
    /// Requests whose head is complete and whose exchange has not ended.
    pub running: u64,
    /// Requests whose response was sent completely.
    pub responded: u64,
    /// Requests whose client disconnected before the response was complete.
    pub aborted: u64,
    /// Connections that the engine closed because they were idle for `keepalive` after a response.
    pub idle_closed: u64,
    /// Connections closed when the next request arrived (`CloseOnNextRequest`).
    pub stale_closed: u64,
    /// Request heads or bodies that are not valid HTTP (status 400).
    pub malformed: u64,
    /// Requests for `/version`, which are not in the log.
    pub version_requests: u64,
    /// Requests and connections to which a fault was applied.
    pub faulted: u64,
    /// Requests that violated the contract of the KV connector or of an encoder (status 400).
    pub contract_broken: u64,
    /// New handoffs issued in prefill responses (NIXL version 2 only, like all handoff counters).
    pub handoff_issued: u64,
    /// Decode legs with a valid handoff: known, unaltered, used for the first time, and for the
    /// same prompt.
    pub handoff_used: u64,
    /// Decode legs whose handoff had been used before (the response has another prompt's text).
    pub handoff_reused: u64,
    /// Decode legs whose handoff was issued for another prompt (the response has another prompt's
    /// text).
    pub handoff_foreign: u64,
    /// Decode legs whose handoff has a known id but differs from the issued bytes (status 500).
    pub handoff_altered: u64,
    /// Decode legs whose handoff has a missing or unknown id (status 500).
    pub handoff_unknown: u64,
    /// Requests whose `kv_transfer_params` would crash a real engine (status 500; NIXL version 2
    /// only).
    pub poisoned: u64,
    /// Requests for a leg that the engine's role does not serve (status 500; NIXL version 2 only).
    pub wrong_role: u64,
}

#[derive(Debug, Default)]
struct Inner {
    seen: Vec<Seen>,
    next_seq: u64,
    counters: Counters,
}

impl Inner {
    /// Returns the entry with number `seq`, if it is still in the log.
    fn find(&mut self, seq: u64) -> Option<&mut Seen> {
        let at = self.seen.binary_search_by_key(&seq, |seen| seen.seq).ok()?;
        self.seen.get_mut(at)
    }
}

/// The request log and the counters of one engine.
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

    /// Adds a request whose head is complete and returns its number.
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

    /// Applies `change` to the entry with number `seq`, if it is still in the log.
    pub(crate) fn update(&self, seq: u64, change: impl FnOnce(&mut Seen)) {
        let mut inner = self.inner.lock();
        if let Some(seen) = inner.find(seq) {
            change(seen);
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Sets the final state of request `seq` and updates the counters.
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

    /// Runs `write` while the log is locked and, if it returns true, marks the response to request
    /// `seq` as complete. Returns the value that `write` returned.
    ///
    /// Because of the lock, a client that has read the complete response is guaranteed to find it
    /// marked as complete in the log.
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

    /// Applies `change` to the counters.
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

    /// Waits until `pred` returns true for the log entries. Returns a copy of them, or `None` if
    /// that takes longer than `deadline`.
    pub(crate) fn wait_for(
        &self,
        deadline: Duration,
        pred: impl Fn(&[Seen]) -> bool,
    ) -> Option<Vec<Seen>> {
        self.wait_until(deadline, |inner| pred(&inner.seen))
            .map(|inner| inner.seen.clone())
    }

    /// Waits until `pred` returns true for the counters. Returns them, or `None` if that takes
    /// longer than `deadline`.
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
