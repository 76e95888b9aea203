//! The state of a TLS connection between two calls, and the operations on it that need no socket.

use std::io::{self, IoSlice};

use super::session::{Operation, Processed, Session};
use crate::limits::TLS_SEND_BYTES;

/// Phase of a TLS connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The underlying connection is still being established.
    Connecting,
    Handshaking,
    Open,
    /// The connection has failed: neither direction carries bytes.
    Failed(io::ErrorKind),
    /// The peer sent plain text. Bytes are received and sent without encryption.
    PlainText,
}

pub(super) struct State {
    pub(super) session: Session,
    pub(super) phase: Phase,
    /// Received bytes that do not form a complete record (or handshake message) yet.
    pub(super) held: Vec<u8>,
    /// Decrypted bytes. Those from `plain_at` on have not been returned by a receive yet.
    pub(super) plain: Vec<u8>,
    pub(super) plain_at: usize,
    /// Encrypted records for the peer. Those from `out_at` on were not accepted by the underlying
    /// connection yet.
    pub(super) out: Vec<u8>,
    pub(super) out_at: usize,
    /// Number of plaintext bytes in the records of `out`. They are not reported to the caller as
    /// sent until `out` has been sent completely.
    pub(super) unsent: usize,
    /// Number of plaintext bytes whose records have been sent completely since the last send. The
    /// next send reports them as sent.
    pub(super) sent: usize,
    /// How the receiving side has ended: `Ok` for a clean end (`close_notify`, or a FIN in plain
    /// text), `Err` for any other. `None` while it is open.
    pub(super) ended: Option<Result<(), io::ErrorKind>>,
    /// The error with which sending has failed. `None` if it has not.
    pub(super) broken: Option<io::ErrorKind>,
    /// `Some(true)` once a `close_notify` has been queued, `Some(false)` once it has been sent and
    /// the sending side of the underlying connection has been closed. `None` before.
    pub(super) closing: Option<bool>,
}

impl State {
    /// Creates the state for a session that has not started.
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

    /// Processes received records. Decrypted bytes and records to send are appended to the buffers
    /// of this state.
    pub(super) fn process(&mut self, received: &mut [u8], wish: Operation<'_>) -> Processed {
        let (plain, out) = (&mut self.plain, &mut self.out);
        self.session.process(received, plain, out, wish)
    }

    /// Encrypts `bytes` and appends the records to the argument `out`, after any records that the
    /// session itself must send first (a key update).
    pub(super) fn encrypt(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Processed {
        let wish = Operation::Encrypt(bytes);
        let (held, plain) = (&mut self.held, &mut self.plain);
        let processed = self.session.process(held, plain, out, wish);
        held.drain(..processed.used);
        processed
    }

    /// Appends a `close_notify` alert to the records in `out`, without sending it.
    pub(super) fn queue_close_notify(&mut self) {
        let (held, plain, out) = (&mut self.held, &mut self.plain, &mut self.out);
        self.session
            .process(held, plain, out, Operation::CloseNotify);
    }

    pub(super) fn plain_left(&self) -> usize {
        self.plain.len() - self.plain_at
    }

    /// Returns whether a receive would return immediately with decrypted bytes, the end of the
    /// stream or an error, without a receive from the underlying connection.
    pub(super) fn has_input(&self) -> bool {
        self.plain_left() > 0 || self.ended.is_some() || matches!(self.phase, Phase::Failed(_))
    }

    /// Passes at most `room` decrypted bytes to `give` and returns their number. Without decrypted
    /// bytes returns `Ok(0)` for a clean end or the error of the connection, or `None` if the
    /// connection is still open.
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
                // Free the buffer, so that an idle connection holds none.
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

/// Returns the next bytes to encrypt: those of the concatenated `slices` from the offset `at` on,
/// at most `TLS_SEND_BYTES`. If they are not contiguous in memory, they are copied to `joined`.
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
