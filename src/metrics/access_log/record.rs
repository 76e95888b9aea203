//! The record of one request in the access log.

use std::net::SocketAddr;

use crate::metrics::labels::{Phase, Route};
use crate::pd::{Outcome, Reason};

/// Text of at most `N` bytes, stored inline; longer text is truncated.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Inline<const N: usize> {
    bytes: [u8; N],
    len: u8,
}

impl<const N: usize> Inline<N> {
    /// Copies the first `N` bytes of `text`.
    #[must_use]
    pub fn new(text: &[u8]) -> Self {
        const { assert!(N <= u8::MAX as usize) };
        let len = text.len().min(N);
        let mut bytes = [0; N];
        bytes[..len].copy_from_slice(&text[..len]);
        Self {
            bytes,
            len: u8::try_from(len).unwrap_or(u8::MAX),
        }
    }

    /// Returns the bytes, which need not be UTF-8.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl<const N: usize> Default for Inline<N> {
    fn default() -> Self {
        Self::new(b"")
    }
}

impl<const N: usize> std::fmt::Debug for Inline<N> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "\"{}\"", self.as_bytes().escape_ascii())
    }
}

/// The party that caused a request to fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EndedBy {
    /// The request did not fail: its response was complete.
    #[default]
    None,
    /// The client caused the failure: it disconnected or stalled, or its request was rejected.
    Client,
    /// The decoder, an encoder or a bootstrap server failed. Also used if the handoff is missing or
    /// a concurrent prefill leg does not respond in time.
    Upstream,
    /// The prefiller failed: it could not be reached, or its response was an error, invalid or
    /// late.
    Prefill,
    /// ringside failed the request: it lacked memory or sockets, its allowlist was incomplete, or
    /// it has a bug.
    Ringside,
    /// ringside aborted the request because it was shutting down. Never recorded at present:
    /// requests that a drain aborts are not logged.
    Drain,
}

/// The phase in which a request failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EndedAt {
    /// The request did not fail: its response was complete.
    #[default]
    Complete,
    /// The request failed while its head or body was being received, checked or forwarded.
    Request,
    /// The request failed while it was queued in ringside. Never recorded at present: ringside
    /// queues no requests.
    Queue,
    /// The request failed while ringside was connecting to an engine.
    Connect,
    /// The request failed before its response was relayed: its encode or prefill legs were running,
    /// or the decoder had not responded.
    FirstByte,
    /// The request failed while its response was being relayed to the client.
    Streaming,
}

impl EndedAt {
    /// Returns the value to log for a request that failed in `phase`.
    #[must_use]
    pub const fn of(phase: Phase) -> Self {
        match phase {
            Phase::Idle | Phase::Upload => Self::Request,
            Phase::Connect => Self::Connect,
            Phase::Encode
            | Phase::Prefill
            | Phase::RetryWait
            | Phase::BetweenLegs
            | Phase::FirstByte => Self::FirstByte,
            Phase::Streaming | Phase::Stalled => Self::Streaming,
        }
    }
}

/// The record of one finished request. Times are in microseconds.
#[derive(Clone, Copy, Debug)]
pub struct Record {
    /// Time of the request's first byte, in microseconds since 1970.
    pub unix_micros: u64,
    /// The request id (`x-request-id`), truncated to 64 bytes.
    pub id: Inline<64>,
    /// Kind of the request, by its path.
    pub route: Route,
    /// Request method, truncated to 16 bytes.
    pub method: Inline<16>,
    /// Status of the response sent to the client; 0 if no response was started.
    pub status: u16,
    /// The party that caused the request to fail, or [`EndedBy::None`].
    pub ended_by: EndedBy,
    /// The phase in which the request failed, or [`EndedAt::Complete`].
    pub ended_at: EndedAt,
    /// IP address and port of the client; `None` if they are unknown.
    pub client: Option<SocketAddr>,
    /// The decoder, as `host:port`; empty if none was chosen.
    pub upstream: Inline<64>,
    /// The data-parallel rank of the decoder.
    pub rank: Option<u16>,
    /// The model that the request names, as it is in the body; empty if it names none, or if the
    /// body was not read.
    pub model: Inline<64>,
    /// Whether the response is an event stream.
    pub is_stream: bool,
    /// The code of the error, as in `x-ringside-error` and `ringside_errors_total`.
    pub error: Option<&'static str>,
    /// The trace id: that of the request's `traceparent` or, with tracing, a new one.
    pub trace_id: Option<u128>,
    /// The `user-agent` of the client, truncated to 64 bytes.
    pub agent: Inline<64>,
    /// The prefill target tried last, as `host:port`; empty if no prefill was attempted. A target
    /// that the allowlist denied is included.
    pub prefill: Inline<64>,
    /// How the request was served: by two legs, by the decoder alone, or, because of a fault,
    /// incompletely or not at all. `None` for a request that is not intercepted.
    pub outcome: Option<Outcome>,
    /// Reason for `outcome`.
    pub reason: Reason,
    /// Number of attempts of all prefill, decode and encode legs. Forwarding a request that is not
    /// split counts as a decode leg.
    pub attempts: u32,
    /// Bytes of the request body received from the client.
    pub bytes_in: u64,
    /// Bytes of the response to the client, including its head. Body bytes that are relayed after
    /// the engine's response head are counted when they arrive from the engine: before ringside
    /// changes them or their framing, and even if the client did not receive them.
    pub bytes_out: u64,
    /// Duration of a prefill leg that ran before the decode leg, including retries; `None` if there
    /// was none.
    pub prefill_micros: Option<u64>,
    /// From the request's first byte to the first body byte of the engine's response that was sent
    /// to the client; `None` if none was sent.
    pub ttft_micros: Option<u64>,
    /// From the request's first byte until the response was sent completely or the request failed.
    pub total_micros: u64,
    /// Time spent in ringside itself: planning the legs of a split request, and forwarding the
    /// response head.
    pub proxy_micros: u64,
}
