//! TLS on top of any connection, itself a [`Conn`].
//!
//! Readiness refers to plaintext. Bytes that have been decrypted are reported before any wait, and
//! a record without payload (a session ticket, a key update) makes nothing ready.
//!
//! Bytes are reported as sent only when the underlying connection has accepted them. Records that
//! it did not accept are kept, in bounded number, and their plaintext counts as sent when the last
//! of them has been accepted. As on a plain connection, callers retry the bytes that were not
//! reported as sent.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::rc::Rc;
use std::task::{Context, Poll};

use rustls::Error;

use super::session::{Operation, Processed, Session};
use super::state::{Phase, State, piece};
use super::{End, Outcome, Report};
use crate::limits::{TLS_HELD_BYTES_MAX, TLS_RECEIVE_BYTES, TLS_STEPS_MAX};
use crate::net::{Conn, Opened, turn, would_block};

/// A TLS connection on top of `C`.
pub struct Tls<C: Conn> {
    inner: C,
    state: RefCell<State>,
    report: Rc<Report>,
    /// Whether the connection must be closed without a `close_notify`, so that the peer does not
    /// mistake the close for a clean end.
    is_abrupt: Cell<bool>,
}

impl<C: Conn> std::fmt::Debug for Tls<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}

/// Buffers of a thread, shared by its TLS connections. A connection uses them only within one call.
struct Scratch {
    received: Vec<u8>,
    joined: Vec<u8>,
    out: Vec<u8>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch { received: Vec::new(), joined: Vec::new(), out: Vec::new() })
    };
}

impl<C: Conn> Tls<C> {
    /// Creates a connection whose handshake starts when `inner` is connected.
    pub(super) fn new(inner: C, session: Session, report: Rc<Report>) -> Self {
        Self {
            inner,
            state: RefCell::new(State::new(session)),
            report,
            is_abrupt: Cell::new(false),
        }
    }

    /// Returns how many bytes the connection holds: received ones that are not decrypted yet, and
    /// encrypted ones that are not sent yet.
    #[cfg(test)]
    pub(super) fn kept(&self) -> [usize; 2] {
        let state = self.state.borrow();
        [state.held.len(), state.out.len() - state.out_at]
    }

    /// Waits until the handshake has succeeded or failed.
    pub(super) fn poll_open(&self, cx: &mut Context<'_>) -> Poll<Opened> {
        let state = &mut *self.state.borrow_mut();
        self.advance(state, cx).map(|()| match state.phase {
            Phase::PlainText => Opened::PlainText,
            Phase::Failed(_) => Opened::Failed,
            Phase::Connecting | Phase::Handshaking | Phase::Open => Opened::Ready,
        })
    }

    /// Continues the handshake as long as the underlying connection makes progress. Ready once it
    /// has succeeded or failed.
    fn advance(&self, state: &mut State, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            if matches!(state.phase, Phase::Connecting | Phase::Handshaking) {
                turn::set_background();
            }
            match state.phase {
                Phase::Open | Phase::Failed(_) | Phase::PlainText => return Poll::Ready(()),
                Phase::Connecting => {
                    std::task::ready!(self.inner.poll_writable(cx));
                    match self.inner.connected() {
                        Ok(()) => self.begin(state),
                        Err(error) => state.phase = Phase::Failed(error.kind()),
                    }
                }
                Phase::Handshaking => {
                    let sent = match self.flush(state) {
                        Ok(sent) => sent,
                        Err(error) => {
                            self.fail(state, Outcome::Unfinished, None, error.kind());
                            continue;
                        }
                    };
                    if !sent && self.inner.poll_writable(cx).is_ready() {
                        continue;
                    }
                    // Receive even while records are kept: the peer may be unable to read until its
                    // own data is read.
                    std::task::ready!(self.inner.poll_readable(cx));
                    if let Err(error) = self.pump(state)
                        && !would_block(&error)
                    {
                        self.fail(state, Outcome::Unfinished, None, error.kind());
                    }
                }
            }
        }
    }

    /// Starts the handshake of a client by sending the first message.
    fn begin(&self, state: &mut State) {
        state.phase = Phase::Handshaking;
        let processed = state.process(&mut [], Operation::Nothing);
        self.after(state, processed);
    }

    /// Receives once from the underlying connection and processes the complete records.
    ///
    /// Returns the errors of the underlying connection, `WouldBlock` included. Errors in the
    /// records are stored in the state.
    fn pump(&self, state: &mut State) -> io::Result<()> {
        SCRATCH.with_borrow_mut(|scratch| {
            let buffer = &mut scratch.received;
            if buffer.is_empty() {
                *buffer = vec![0; TLS_HELD_BYTES_MAX + TLS_RECEIVE_BYTES];
            }
            let held = state.held.len();
            let received = match self
                .inner
                .try_recv(&mut buffer[held..held + TLS_RECEIVE_BYTES])
            {
                Ok(0) => {
                    self.record_end(state);
                    return Ok(());
                }
                Ok(received) => received,
                Err(error) => {
                    if !would_block(&error) {
                        state.ended.get_or_insert(Err(error.kind()));
                    }
                    return Err(error);
                }
            };
            buffer[..held].copy_from_slice(&state.held);
            state.held.clear();
            let received = &mut buffer[..held + received];
            if state.phase == Phase::PlainText || self.is_plain_text(state, received) {
                state.plain.extend_from_slice(received);
                return Ok(());
            }
            let processed = state.process(received, Operation::Nothing);
            let rest = &received[processed.used.min(received.len())..];
            if rest.len() <= TLS_HELD_BYTES_MAX {
                state.held.extend_from_slice(rest);
                if state.held.is_empty() {
                    state.held = Vec::new();
                }
                self.after(state, processed);
            } else {
                let error = Some(Error::General("a handshake message is too long".into()));
                self.after(state, Processed { error, ..processed });
            }
            Ok(())
        })
    }

    /// Returns whether a client's first bytes are not TLS. If so, reports this outcome and changes
    /// the phase to [`Phase::PlainText`]. The first byte decides: a TLS record starts with a byte
    /// from 20 to 24 (RFC 8446, appendix B.1), which no HTTP request contains.
    fn is_plain_text(&self, state: &mut State, received: &[u8]) -> bool {
        let is_plain = state.phase == Phase::Handshaking
            && state.session.is_server()
            && received
                .first()
                .is_some_and(|first| !(20..=24).contains(first));
        if is_plain {
            state.phase = Phase::PlainText;
            self.report_outcome(Outcome::PlainText, None);
        }
        is_plain
    }

    /// Applies the result of processing records: records the end of the peer's data, fails the
    /// connection on an error, and opens it when the handshake is complete. Then sends the records
    /// that the session has produced; during the handshake, `advance` sends them.
    fn after(&self, state: &mut State, processed: Processed) {
        if processed.is_ended {
            state.ended.get_or_insert(Ok(()));
        }
        if let Some(error) = processed.error {
            let outcome = Outcome::of(&error);
            // Send the alert that reports the error to the peer. It does not matter if this fails.
            let _ = self.flush(state);
            self.fail(state, outcome, Some(&error), io::ErrorKind::InvalidData);
        } else if state.phase == Phase::Handshaking && !state.session.is_handshaking() {
            state.phase = Phase::Open;
            self.report_outcome(Outcome::Ok, None);
            // An error is stored in `broken` and returned by the next send.
            let _ = self.flush(state);
        } else if state.phase == Phase::Open && !state.out.is_empty() {
            let _ = self.flush(state);
        }
    }

    fn fail(
        &self,
        state: &mut State,
        outcome: Outcome,
        error: Option<&Error>,
        kind: io::ErrorKind,
    ) {
        self.report_outcome(outcome, error);
        if state.phase == Phase::Open && state.plain_left() > 0 {
            // Bytes received before the error are still delivered.
            state.ended = Some(Err(kind));
            state.broken = Some(kind);
        } else {
            state.phase = Phase::Failed(kind);
        }
        state.held = Vec::new();
    }

    fn report_outcome(&self, outcome: Outcome, error: Option<&Error>) {
        (self.report)(&End {
            outcome,
            error,
            peer: self.inner.peer(),
        });
    }

    /// Handles the end of the underlying connection. During the handshake the connection fails;
    /// afterwards the end is clean only after a `close_notify` or in plain text.
    fn record_end(&self, state: &mut State) {
        match state.phase {
            Phase::Connecting | Phase::Handshaking => {
                self.fail(
                    state,
                    Outcome::Unfinished,
                    None,
                    io::ErrorKind::UnexpectedEof,
                );
            }
            Phase::PlainText => state.ended = Some(Ok(())),
            Phase::Open | Phase::Failed(_) => {
                state.ended.get_or_insert(Err(io::ErrorKind::UnexpectedEof));
            }
        }
    }

    /// Sends the encrypted records that the underlying connection has not accepted yet. Returns
    /// `false` if it does not accept all of them now.
    fn flush(&self, state: &mut State) -> io::Result<bool> {
        if let Some(kind) = state.broken {
            return Err(kind.into());
        }
        while state.out_at < state.out.len() {
            match self.inner.try_send(&state.out[state.out_at..]) {
                Ok(sent) => state.out_at += sent,
                Err(error) if would_block(&error) => return Ok(false),
                Err(error) => {
                    state.broken = Some(error.kind());
                    return Err(error);
                }
            }
        }
        state.out = Vec::new();
        state.out_at = 0;
        state.sent += std::mem::take(&mut state.unsent);
        if state.closing == Some(true) {
            state.closing = Some(false);
            self.inner.finish();
        }
        Ok(true)
    }

    /// Sends the encrypted records that were not accepted yet, while the caller waits for something
    /// else. Wakes the task of `cx` when more can be sent.
    fn flush_while_waiting(&self, state: &mut State, cx: &mut Context<'_>) {
        while !state.out.is_empty() {
            match self.flush(state) {
                Ok(true) | Err(_) => return,
                Ok(false) if self.inner.poll_writable(cx).is_pending() => return,
                Ok(false) => {}
            }
        }
    }

    /// Encrypts and sends bytes of `slices`; see [`Conn::try_send_vectored`].
    fn send(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let state = &mut *self.state.borrow_mut();
        match state.phase {
            Phase::Open => {}
            Phase::PlainText => return self.inner.try_send_vectored(slices),
            Phase::Connecting | Phase::Handshaking => return Err(io::ErrorKind::WouldBlock.into()),
            Phase::Failed(kind) => return Err(kind.into()),
        }
        if !self.flush(state)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        debug_assert!(state.sent <= total, "unsent bytes must be retried");
        let mut at = std::mem::take(&mut state.sent).min(total);
        while at < total {
            let taken = self.send_some(state, slices, at)?;
            at += taken;
            if taken == 0 || turn::is_over() {
                break;
            }
        }
        if at == 0 && total > 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(at)
    }

    /// Encrypts at most `TLS_SEND_BYTES` bytes and sends their records. The bytes start at the
    /// offset `at` in the concatenated `slices`. Returns the number of plaintext bytes, or 0 if the
    /// underlying connection did not accept all of the records; the rest of the records is then
    /// kept in `state`.
    fn send_some(&self, state: &mut State, slices: &[IoSlice<'_>], at: usize) -> io::Result<usize> {
        SCRATCH.with_borrow_mut(|scratch| {
            let Scratch { joined, out, .. } = scratch;
            let bytes = piece(slices, at, joined);
            out.clear();
            let processed = state.encrypt(bytes, out);
            if !processed.is_performed {
                self.after(state, processed);
                let kind = io::ErrorKind::ConnectionAborted;
                state.broken.get_or_insert(kind);
                return Err(kind.into());
            }
            let sent = match self.inner.try_send(out) {
                Ok(sent) => sent,
                Err(error) if would_block(&error) => 0,
                Err(error) => {
                    state.broken = Some(error.kind());
                    return Err(error);
                }
            };
            if sent == out.len() {
                return Ok(bytes.len());
            }
            state.out.extend_from_slice(&out[sent..]);
            state.unsent = bytes.len();
            Ok(0)
        })
    }
}

impl<C: Conn> Conn for Tls<C> {
    type Pipe = C::Pipe;

    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let state = &mut *self.state.borrow_mut();
        std::task::ready!(self.advance(state, cx));
        self.flush_while_waiting(state, cx);
        while !state.has_input() {
            std::task::ready!(self.inner.poll_readable(cx));
            // The result is read from the state.
            let _ = self.pump(state);
        }
        turn::poll_left(cx)
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<()> {
        let state = &mut *self.state.borrow_mut();
        std::task::ready!(self.advance(state, cx));
        if state.broken.is_some() || matches!(state.phase, Phase::Failed(_)) {
            return Poll::Ready(());
        }
        while !state.out.is_empty() {
            match self.flush(state) {
                Ok(true) | Err(_) => return Poll::Ready(()),
                Ok(false) => std::task::ready!(self.inner.poll_writable(cx)),
            }
        }
        if state.sent > 0 {
            return Poll::Ready(());
        }
        self.inner.poll_writable(cx)
    }

    fn poll_hangup(&self, cx: &mut Context<'_>) -> Poll<()> {
        let state = &mut *self.state.borrow_mut();
        if state.ended.is_some() || matches!(state.phase, Phase::Failed(_)) {
            return Poll::Ready(());
        }
        self.inner.poll_hangup(cx)
    }

    fn try_recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let state = &mut *self.state.borrow_mut();
        let room = buffer.len();
        if !state.has_input() && matches!(state.phase, Phase::Open | Phase::PlainText) {
            self.pump(state)?;
        }
        let taken = state.take(room, |bytes| buffer[..bytes.len()].copy_from_slice(bytes));
        taken.unwrap_or_else(|| Err(io::ErrorKind::WouldBlock.into()))
    }

    fn try_recv_append(&self, buffer: &mut Vec<u8>, bytes_max: usize) -> io::Result<usize> {
        let state = &mut *self.state.borrow_mut();
        let room = bytes_max.min(buffer.capacity() - buffer.len());
        if !state.has_input() && matches!(state.phase, Phase::Open | Phase::PlainText) {
            self.pump(state)?;
        }
        let taken = state.take(room, |bytes| buffer.extend_from_slice(bytes));
        taken.unwrap_or_else(|| Err(io::ErrorKind::WouldBlock.into()))
    }

    fn peek_ready(&self) -> bool {
        let state = &mut *self.state.borrow_mut();
        if !matches!(state.phase, Phase::Open | Phase::PlainText) {
            return matches!(state.phase, Phase::Failed(_)) || self.inner.peek_ready();
        }
        for _ in 0..TLS_STEPS_MAX {
            if state.has_input() {
                return true;
            }
            match self.pump(state) {
                Err(error) if would_block(&error) => return false,
                Ok(()) | Err(_) => {}
            }
        }
        // A connection with that many records without payload is not idle.
        true
    }

    fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.send(&[IoSlice::new(bytes)])
    }

    fn try_send_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.send(slices)
    }

    fn try_fill(&self, _: &mut C::Pipe, _: usize) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn try_drain(&self, _: &mut C::Pipe) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn connected(&self) -> io::Result<()> {
        match self.state.borrow().phase {
            Phase::Failed(kind) => Err(kind.into()),
            Phase::Connecting | Phase::Handshaking => Err(io::ErrorKind::NotConnected.into()),
            Phase::Open | Phase::PlainText => Ok(()),
        }
    }

    fn finish(&self) {
        let state = &mut *self.state.borrow_mut();
        if state.phase != Phase::Open || state.broken.is_some() {
            self.inner.finish();
        } else if state.closing.is_none() {
            state.closing = Some(true);
            state.queue_close_notify();
            // Anything the socket does not accept now is flushed by the next poll.
            let _ = self.flush(state);
        }
    }

    fn abort(&self) {
        self.is_abrupt.set(true);
        self.inner.abort();
    }

    fn reset_on_close(&self) {
        self.is_abrupt.set(true);
        self.inner.reset_on_close();
    }

    fn close_cleanly(&self) {
        self.is_abrupt.set(false);
        self.inner.close_cleanly();
    }

    fn peer(&self) -> Option<std::net::SocketAddr> {
        self.inner.peer()
    }

    fn is_encrypted(&self) -> bool {
        true
    }

    fn uses_tls(&self) -> bool {
        self.state.borrow().phase != Phase::PlainText
    }
}

impl<C: Conn> Drop for Tls<C> {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        match state.phase {
            // The handshake was abandoned by this side: it exceeded its time limit, or nothing
            // waits for it any more.
            Phase::Handshaking => {
                let end = End {
                    outcome: Outcome::Unfinished,
                    error: None,
                    peer: self.inner.peer(),
                };
                (self.report)(&end);
            }
            // A `close_notify` cannot be sent after a record that was sent only in part.
            Phase::Open
                if !self.is_abrupt.get()
                    && state.closing.is_none()
                    && state.broken.is_none()
                    && state.out.is_empty() =>
            {
                state.queue_close_notify();
                let _ = self.inner.try_send(&state.out);
            }
            Phase::Open | Phase::Connecting | Phase::Failed(_) | Phase::PlainText => {}
        }
    }
}
