//! The bytes of a forwarded request on their way from the client to the engine.

use std::io::IoSlice;

use super::client::Client;
use super::exchange::Exchange;
use super::inspect::BodyMask;
use super::shard::Shard;
use crate::fault::Fault;
use crate::h1::{self, BodyMeter, Framing, Taken};
use crate::limits::REPLAY_BYTES_MAX;
use crate::net::{Conduit, Conn, Instant, Net, would_block};
use crate::upstream::Buffers;

/// A request being forwarded from the client to one engine.
pub(super) struct Upload<N: Net> {
    /// Request head for the engine, including the blank line.
    pub(super) head: Vec<u8>,
    /// Body bytes in the form that the engine gets. While `whole` is set, all of them received so
    /// far; otherwise those not sent yet. They begin at `out_begin`: the buffer that the request
    /// was received into is used as it is, including the client's head.
    pub(super) out: Vec<u8>,
    pub(super) out_begin: usize,
    /// Number of bytes of `head` and the body in `out` together that have been sent on the current
    /// connection.
    pub(super) at: usize,
    /// Whether `out` contains the body from its start, so that the request can be sent again.
    pub(super) whole: bool,
    pub(super) meter: BodyMeter,
    pub(super) mask: Option<BodyMask>,
    pub(super) bytes_max: u64,
    /// Pipe for the remaining body, which follows `out`; `None` while the body is copied.
    pub(super) pipe: Option<<N::Conn as Conn>::Pipe>,
    /// Whether a pipe was requested for the remaining body but none was available. The remaining
    /// body is then copied.
    pub(super) is_copied: bool,
    /// Whether `head` requests a switch to the WebSocket protocol.
    pub(super) upgrade_sent: bool,
    /// When the body last made progress: when the client last sent payload, or the engine last
    /// accepted bytes that it had held up.
    pub(super) progress_at: Instant,
}

impl<N: Net> Upload<N> {
    /// Takes a pipe for the rest of a body that is not scanned, if splicing is worthwhile and a
    /// pipe is available. Spliced bytes are not kept, so the request can no longer be sent again.
    pub(super) fn begin_splice(&mut self, shard: &Shard<N>) {
        let remaining = self.meter.remaining().unwrap_or(0);
        let is_worth_it = self.mask.is_none() && remaining >= N::SPLICE_BYTES_MIN;
        if self.pipe.is_none() && is_worth_it && !self.is_copied {
            self.pipe = shard.net.pipe();
            // Avoids another attempt on every receive.
            self.is_copied = self.pipe.is_none();
        }
    }

    /// Returns the bytes of the body that are in `out`.
    fn body(&self) -> &[u8] {
        &self.out[self.out_begin..]
    }

    /// Returns the unsent bytes of `head` and the body.
    fn unsent(&self) -> [&[u8]; 2] {
        let in_body = self.at.saturating_sub(self.head.len());
        let head = self.head.get(self.at..).unwrap_or_default();
        [head, &self.body()[in_body..]]
    }

    /// Returns whether nothing of `head` and the body is unsent.
    fn is_sent(&self) -> bool {
        self.at == self.head.len() + self.body().len()
    }

    /// Drops the bytes of `out` if all of them have been sent.
    fn drop_sent(&mut self) {
        if self.is_sent() {
            self.out.clear();
            self.out_begin = 0;
            self.at = self.head.len();
        }
    }

    /// Drops the body, sent or not, and its buffer.
    pub(super) fn drop_body(&mut self, buffers: &Buffers) {
        buffers.recycle(std::mem::take(&mut self.out));
        self.out_begin = 0;
        self.at = self.head.len();
    }

    /// Sends the unsent bytes of `head`, `out` and the pipe. Returns `true` if the kernel accepted
    /// all of them.
    pub(super) fn flush(&mut self, conn: &N::Conn) -> std::io::Result<bool> {
        loop {
            if self.is_sent() {
                return self.drain(conn);
            }
            let slices = self.unsent().map(IoSlice::new);
            match conn.try_send_vectored(&slices) {
                Ok(sent) => self.at += sent,
                Err(error) if would_block(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends the contents of the pipe to the engine. Returns `true` if the pipe is empty
    /// afterwards.
    fn drain(&mut self, conn: &N::Conn) -> std::io::Result<bool> {
        while let Some(pipe) = self.pipe.as_mut().filter(|pipe| pipe.held() > 0) {
            match conn.try_drain(pipe) {
                Ok(_) => {}
                Err(error) if would_block(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// Forwards received client bytes. While the body received so far is no longer than
    /// `REPLAY_BYTES_MAX`, they are appended to `out`, which keeps them in case the request must be
    /// sent again. After that they are sent directly from the receive buffer, unless their chunk
    /// framing must be regenerated. Returns how many of them belong to this body, and `false` if
    /// the engine accepts no more bytes.
    pub(super) fn pass(
        &mut self,
        shard: &Shard<N>,
        conn: &N::Conn,
        client: &Client<N>,
        received: &mut [u8],
    ) -> Result<(usize, bool), Fault> {
        let keep = self.whole && self.body().len() + received.len() <= REPLAY_BYTES_MAX;
        if !keep {
            self.whole = false;
            self.drop_sent();
        }
        if keep || self.is_regenerated() {
            let taken = self.transform(received)?;
            if taken < received.len() {
                client.put_back(&received[taken..]);
            }
            return Ok((taken, true));
        }
        let (taken, kept) = self.take(received)?;
        if taken < received.len() {
            client.put_back(&received[taken..]);
        }
        self.check_size()?;
        shard.metrics.copied_bytes(taken as u64);
        Ok((taken, self.send_direct(conn, &mut received[..kept])?))
    }

    /// Returns whether the engine gets bytes other than the client's, at other positions: chunk
    /// framing is regenerated around a scanned body, and a form is withheld across receives.
    fn is_regenerated(&self) -> bool {
        match self.mask {
            None => false,
            Some(BodyMask::Json(_)) => self.meter.framing() == Framing::Chunked,
            Some(BodyMask::Form(_)) => true,
        }
    }

    /// Takes the body, or its first part, from `arrived`, the buffer that contains it after the
    /// client's head. Uses the buffer itself as `out` unless bytes of the next request follow.
    /// Returns the number of its bytes that belong to the body.
    pub(super) fn take_over(
        &mut self,
        exchange: &Exchange<'_, N>,
        mut arrived: Vec<u8>,
    ) -> Result<usize, Fault> {
        let begin = exchange.request.head.len;
        if self.is_regenerated() || exchange.request.framing == Framing::Chunked {
            return self.take_copy(exchange, arrived, begin);
        }
        let taken = self.meter.take(&arrived[begin..]);
        let taken = taken.map_err(|_| Fault::Chunk)?;
        debug_assert_eq!(
            begin + taken,
            arrived.len(),
            "the request was taken by its length"
        );
        let mut ready = taken;
        if let Some(BodyMask::Json(mask)) = &mut self.mask {
            // `finish_if_done` reports an error. No earlier call can have held bytes back.
            ready = mask.feed(&mut arrived[begin..]).map_or(0, |one| one.ready);
        }
        arrived.truncate(begin + ready);
        let unused = std::mem::replace(&mut self.out, arrived);
        self.out_begin = begin;
        exchange.shard.buffers.recycle(unused);
        Ok(taken)
    }

    /// Copies the body, or a part of it, from `bytes[begin..]` to `out`, and puts back what follows
    /// it. Returns the number of bytes that belong to the body.
    pub(super) fn take_copy(
        &mut self,
        exchange: &Exchange<'_, N>,
        mut bytes: Vec<u8>,
        begin: usize,
    ) -> Result<usize, Fault> {
        let taken = self.transform(&mut bytes[begin..])?;
        let (buffers, ahead) = (&exchange.shard.buffers, &exchange.client.ahead);
        ahead.borrow_mut().restore(bytes, begin + taken, buffers);
        Ok(taken)
    }

    /// Counts received bytes as bytes of the body, and removes trailer fields from them: an engine
    /// may treat those as header fields, which nothing here has inspected (RFC 9110 6.5.1). Returns
    /// how many of the bytes belong to this body, and how many of those are left, at the front.
    fn take(&mut self, received: &mut [u8]) -> Result<(usize, usize), Fault> {
        let taken = self.meter.take_with_trailers(received);
        let Taken { len, trailers } = taken.map_err(|_| Fault::Chunk)?;
        if !trailers.is_empty() {
            received.copy_within(trailers.end..len, trailers.start);
        }
        Ok((len, len - trailers.len()))
    }

    /// Sends body bytes from the buffer they were received into, after masking them there if the
    /// body is scanned, together with the unsent bytes before them. Bytes that the socket does not
    /// accept are copied to `out`. Returns `false` if the connection has failed.
    fn send_direct(&mut self, conn: &N::Conn, bytes: &mut [u8]) -> Result<bool, Fault> {
        let (held, ready) = match &mut self.mask {
            None => (None, bytes.len()),
            Some(BodyMask::Form(_)) => return Err(Fault::Bug("a form was not copied")),
            Some(BodyMask::Json(mask)) => match mask.feed(bytes) {
                Ok(masked) => (Some(masked.held), masked.ready),
                // `finish_if_done` reports the error.
                Err(_) => return Ok(true),
            },
        };
        let held: &[u8] = held.as_deref().unwrap_or_default();
        let [head, out] = self.unsent();
        let unsent = head.len() + out.len();
        let slices = [head, out, held, &bytes[..ready]].map(IoSlice::new);
        let sent = match conn.try_send_vectored(&slices) {
            Ok(sent) => sent,
            Err(error) if would_block(&error) => 0,
            Err(_) => return Ok(false),
        };
        self.at += sent.min(unsent);
        self.drop_sent();
        let sent = sent.saturating_sub(unsent);
        self.out
            .extend_from_slice(held.get(sent..).unwrap_or_default());
        self.out
            .extend_from_slice(&bytes[sent.saturating_sub(held.len()).min(ready)..ready]);
        Ok(true)
    }

    /// Converts received client bytes to the form that the engine gets and appends them to `out`.
    /// Returns how many of them belong to this body. [`Upload::finish_if_done`] reports an error of
    /// the scan, so that the caller can record first how much of the body has been read.
    fn transform(&mut self, received: &mut [u8]) -> Result<usize, Fault> {
        let Some(mask) = &mut self.mask else {
            let (taken, kept) = self.take(received)?;
            self.out.extend_from_slice(&received[..kept]);
            return self.check_size().map(|()| taken);
        };
        if self.meter.framing() != Framing::Chunked {
            let taken = self.meter.take(received).map_err(|_| Fault::Chunk)?;
            // `finish_if_done` reports the error.
            mask.append(&mut received[..taken], &mut self.out);
            return self.check_size().map(|()| taken);
        }
        // The mask may withhold bytes across the end of a chunk, so the chunk framing is
        // regenerated.
        let mut spans = Vec::new();
        let taken = self.meter.decode(received, |span| spans.push(span));
        let taken = taken.map_err(|_| Fault::Chunk)?;
        let mut payload = Vec::new();
        for span in spans {
            payload.clear();
            let piece = &mut received[span.start..span.end];
            if mask.append(piece, &mut payload).is_none() {
                break;
            }
            if !payload.is_empty() {
                self.out.extend_from_slice(&h1::chunk_line(payload.len()));
                self.out.extend_from_slice(&payload);
                self.out.extend_from_slice(b"\r\n");
            }
        }
        self.check_size().map(|()| taken)
    }

    /// If the body is being scanned, reports an error of the scan. If the body is also complete,
    /// checks that it is a complete document or form and, if its chunk framing is regenerated,
    /// appends the last chunk to `out`.
    pub(super) fn finish_if_done(&mut self) -> Result<(), Fault> {
        let Some(mask) = &mut self.mask else {
            return Ok(());
        };
        mask.check(self.meter.is_done())?;
        if !self.meter.is_done() {
            return Ok(());
        }
        if self.meter.framing() == Framing::Chunked {
            self.out.extend_from_slice(h1::LAST_CHUNK);
        }
        Ok(())
    }

    fn check_size(&self) -> Result<(), Fault> {
        let is_over = self.meter.payload_bytes() > self.bytes_max;
        if is_over {
            Err(Fault::BodyTooLarge)
        } else {
            Ok(())
        }
    }
}
