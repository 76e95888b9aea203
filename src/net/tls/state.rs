//! What a connection with TLS keeps between two calls, and what can be said of it without a socket.

use std::io::{self, IoSlice};

use super::session::{Processed, Session, Wish};
use crate::limits::TLS_SEND_BYTES;

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The connect below has not ended.
    Connecting,
    Handshaking,
    Open,
    /// It is of no use: nothing goes either way.
    Failed(io::ErrorKind),
    /// The peer speaks plain text: it is heard and answered in plain text.
    PlainText,
}

pub(super) struct State {
    pub(super) session: Session,
    pub(super) phase: Phase,
    /// Received bytes that are no whole record (or handshake message) yet.
    pub(super) held: Vec<u8>,
    /// Decrypted and not taken.
    pub(super) plain: Vec<u8>,
    pub(super) plain_at: usize,
    /// Records that the connection below did not take.
    pub(super) out: Vec<u8>,
    pub(super) out_at: usize,
    /// Bytes in the records of `out` that were not reported as sent.
    pub(super) unsent: usize,
    /// Such bytes whose records have left since.
    pub(super) sent: usize,
    /// The peer's end: its word for it, or what came instead.
    pub(super) ended: Option<Result<(), io::ErrorKind>>,
    /// Sending has failed.
    pub(super) broken: Option<io::ErrorKind>,
    /// A `close_notify` was made; with `true` the end below follows it.
    pub(super) closing: Option<bool>,
}

impl State {
    /// Of a session that has not begun.
    pub(super) const fn new(session: Session) -> Self {
        let phase = if session.is_server() {
            Phase::Handshaking
        } else {
            Phase::Connecting
        };
        Self {
            session,
            phase,
            held: Vec::new(),
            plain: Vec::new(),
            plain_at: 0,
            out: Vec::new(),
            out_at: 0,
            unsent: 0,
            sent: 0,
            ended: None,
            broken: None,
            closing: None,
        }
    }

    /// Processes received records; what it makes of them is kept.
    pub(super) fn process(&mut self, received: &mut [u8], wish: Wish<'_>) -> Processed {
        let (plain, out) = (&mut self.plain, &mut self.out);
        self.session.process(received, plain, out, wish)
    }

    /// Encrypts `bytes` to the end of `out`, behind whatever the session itself has to say.
    pub(super) fn encrypt(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Processed {
        let wish = Wish::Encrypt(bytes);
        let (held, plain) = (&mut self.held, &mut self.plain);
        let processed = self.session.process(held, plain, out, wish);
        held.drain(..processed.used);
        processed
    }

    /// Makes the record that says that nothing more will be sent.
    pub(super) fn say_end(&mut self) {
        let (held, plain, out) = (&mut self.held, &mut self.plain, &mut self.out);
        self.session.process(held, plain, out, Wish::CloseNotify);
    }

    pub(super) fn plain_left(&self) -> usize {
        self.plain.len() - self.plain_at
    }

    /// Whether a receive gives something at once: bytes, the end, an error.
    pub(super) fn has_input(&self) -> bool {
        self.plain_left() > 0 || self.ended.is_some() || matches!(self.phase, Phase::Failed(_))
    }

    /// Takes decrypted bytes, at most as many as `room`; `None` when there is nothing to tell.
    pub(super) fn take(
        &mut self,
        room: usize,
        give: impl FnOnce(&[u8]),
    ) -> Option<io::Result<usize>> {
        let n = self.plain_left().min(room);
        if n > 0 {
            give(&self.plain[self.plain_at..self.plain_at + n]);
            self.plain_at += n;
            if self.plain_at == self.plain.len() {
                // An idle connection holds no buffer.
                self.plain = Vec::new();
                self.plain_at = 0;
            }
            return Some(Ok(n));
        }
        match (self.phase, self.ended) {
            (Phase::Failed(kind), _) | (_, Some(Err(kind))) => Some(Err(kind.into())),
            (_, Some(Ok(()))) => Some(Ok(0)),
            (_, None) => None,
        }
    }
}

/// The bytes of `slices` from `at` on, as many as are encrypted at once: where they lie if they lie
/// together, else put together in `joined`.
pub(super) fn piece<'a>(slices: &'a [IoSlice<'_>], at: usize, joined: &'a mut Vec<u8>) -> &'a [u8] {
    let mut skip = at;
    let mut rest = slices.iter().map(|slice| {
        let begin = skip.min(slice.len());
        skip -= begin;
        &slice[begin..]
    });
    let first = rest.find(|slice| !slice.is_empty()).unwrap_or_default();
    let mut rest = rest.filter(|slice| !slice.is_empty()).peekable();
    if first.len() >= TLS_SEND_BYTES || rest.peek().is_none() {
        return &first[..first.len().min(TLS_SEND_BYTES)];
    }
    joined.clear();
    joined.extend_from_slice(first);
    for slice in rest {
        let room = TLS_SEND_BYTES - joined.len();
        joined.extend_from_slice(&slice[..slice.len().min(room)]);
    }
    joined
}
