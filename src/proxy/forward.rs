//! Pass-through and decode-only requests: the body is forwarded to the engine as it arrives.

use std::future::poll_fn;
use std::io::IoSlice;
use std::task::Poll;

use super::client::{Client, Watch};
use super::exchange::Exchange;
use super::inspect::{BodyMask, Inspect};
use super::leg;
use super::relay::{self, PendingResponse};
use super::request::RequestBody;
use super::shard::Shard;
use crate::fault::Fault;
use crate::fleet::{Endpoint, Target};
use crate::h1::{self, BodyMeter, Framing, Taken};
use crate::limits::{RECEIVE_LARGE_BYTES, REPLAY_BYTES_MAX};
use crate::metrics::Phase;
use crate::net::{Conduit, Conn, Instant, Net, would_block};
use crate::pd::Role;
use crate::upstream::{
    Attempts, CallError, Connection, Deadline, Ended, Limits, Next, Response, Scope, Timeout,
};

/// A request being forwarded from the client to one engine.
struct Upload<N: Net> {
    /// Request head for the engine, including the blank line.
    head: Vec<u8>,
    /// Body bytes in the form that the engine gets. While `whole` is set, all of them received so
    /// far; otherwise those not sent yet.
    out: Vec<u8>,
    /// Number of bytes of `head` and `out` together that have been sent on the current connection.
    at: usize,
    /// Whether `out` contains the body from its start, so that the request can be sent again.
    whole: bool,
    meter: BodyMeter,
    mask: Option<BodyMask>,
    bytes_max: u64,
    /// Pipe for the remaining body, which follows `out`; `None` while the body is copied.
    pipe: Option<<N::Conn as Conn>::Pipe>,
    /// Whether a pipe was requested for the remaining body but none was available. The remaining
    /// body is then copied.
    is_copied: bool,
    /// Whether `head` requests a switch to the WebSocket protocol.
    upgrade_sent: bool,
    /// When the body last made progress: when the client last sent payload, or the engine last
    /// accepted bytes that it had held up.
    progress_at: Instant,
}

/// An event that ends a wait of an upload.
enum Event {
    Response,
    Writable,
    Received,
}

/// Forwards the request to `decoder` as it arrives, and relays the response. Unless
/// `--trust-client-kv` is set, the body is inspected as it passes, and transfer parameters set by
/// the client are overwritten in place.
pub(super) async fn forward<N: Net>(
    exchange: &mut Exchange<'_, N>,
    decoder: &Endpoint,
    inspect: Inspect,
    expects: bool,
) -> Result<(), Fault> {
    let shard = exchange.shard;
    let target = &decoder.target;
    let engine = shard.upstreams.engine(Role::Decode, target);
    let mut upload = begin_upload(exchange, target, inspect)?;
    let mut attempts = Attempts::new(Limits::ONE);
    let mut continued = false;
    loop {
        let reuse = attempts.reuse();
        let connected = shard
            .upstreams
            .connect(exchange, engine, reuse, Deadline::NONE);
        let upstream = connected.await.map_err(|leg| leg.fault(Role::Decode))?;
        if expects && !exchange.request.body.is_done() && upload.out.is_empty() && !continued {
            continued = true;
            exchange.send_continue().await?;
        }
        take_read_ahead(exchange, &mut upload)?;
        let mut response = Response::default();
        let ended = run_upload(exchange, &upstream, &mut upload, &mut response).await;
        if let Err(error) = ended {
            let last = Ended {
                can_resend: upload.whole,
                is_idempotent: exchange.request.head.method.is_idempotent(),
                ..upstream.ended(Err(error), shard.net.now())
            };
            if attempts.next(&last) == Next::Replay {
                shard.metrics.replay();
                upload.at = 0;
                continue;
            }
            exchange.record_leg(Role::Decode, Err(error.label(Role::Decode)));
            // The engine would see a FIN only after reading all buffered bytes. A reset reaches it
            // immediately.
            upstream.conn().reset_on_close();
            return Err(error.fault(Role::Decode));
        }
        exchange.record_leg(Role::Decode, Ok(response.head.status));
        record_masked(exchange, &upload);
        // The pipe is returned too, because the response may take minutes.
        drop(upload.pipe.take());
        shard.buffers.recycle(upload.head);
        shard.buffers.recycle(upload.out);
        let pending = PendingResponse {
            upgrade_sent: upload.upgrade_sent,
            ..PendingResponse::new((upstream, response))
        };
        return Box::pin(relay::relay(exchange, pending)).await;
    }
}

fn begin_upload<N: Net>(
    exchange: &mut Exchange<'_, N>,
    target: &Target,
    inspect: Inspect,
) -> Result<Upload<N>, Fault> {
    let mask = BodyMask::new(exchange, inspect)?;
    let request = &exchange.request;
    let has_no_body = matches!(request.framing, Framing::None | Framing::Length(0));
    let upgrade_sent = inspect == Inspect::Nothing
        && has_no_body
        && h1::wants_websocket(&request.head, &request.bytes);
    let out = exchange.shard.buffers.buffer();
    let head = leg::head(exchange, out, target, None, upgrade_sent)?;
    let head = head.finish(exchange.request.framing);
    let mut upload = Upload {
        head,
        out: exchange.shard.buffers.buffer(),
        at: 0,
        whole: true,
        meter: BodyMeter::new(exchange.request.framing),
        mask,
        bytes_max: exchange.shard.config.limits.body_bytes_max,
        pipe: None,
        is_copied: false,
        upgrade_sent,
        progress_at: exchange.shard.net.now(),
    };
    if exchange.request.body.is_done() {
        upload.finish_if_done()?;
    } else {
        let mut bytes = std::mem::take(&mut exchange.request.bytes);
        let taken = take_early(
            exchange,
            &mut upload,
            &mut bytes[exchange.request.head.len..],
        );
        bytes.truncate(exchange.request.head.len);
        exchange.request.bytes = bytes;
        taken?;
    }
    Ok(upload)
}

/// Consumes bytes of this body that have been read ahead. Two waits read ahead to detect a
/// client disconnect: the wait for a slow client to accept the `100 Continue`, and the wait for
/// the response on a connection that turned out to be closed.
fn take_read_ahead<N: Net>(
    exchange: &mut Exchange<'_, N>,
    upload: &mut Upload<N>,
) -> Result<(), Fault> {
    if upload.meter.is_done() {
        return Ok(());
    }
    let mut early = exchange.client.take_ahead();
    let taken = take_early(exchange, upload, &mut early);
    exchange.shard.buffers.recycle(early);
    taken
}

fn take_early<N: Net>(
    exchange: &mut Exchange<'_, N>,
    upload: &mut Upload<N>,
    early: &mut [u8],
) -> Result<(), Fault> {
    let taken = upload.transform(early)?;
    if taken < early.len() {
        exchange.client.put_back(&early[taken..]);
    }
    exchange.stats.bytes_in += taken as u64;
    exchange.request.body = RequestBody::read(upload.meter.is_done());
    upload.finish_if_done()
}

/// Sends the request as its body arrives, then waits for the response head. Stops sending early
/// if the head arrives first or the engine accepts no more bytes. The recorded duration of this
/// leg starts when the upload has ended and covers only the wait for the head.
async fn run_upload<N: Net>(
    exchange: &mut Exchange<'_, N>,
    upstream: &Connection<N>,
    upload: &mut Upload<N>,
    response: &mut Response,
) -> Result<(), CallError> {
    exchange.enter(Phase::Upload);
    upload.progress_at = exchange.shard.net.now();
    if send_upload(exchange, upstream, upload, response).await? {
        upstream.record_sent(exchange.shard.net.now());
    }
    exchange.enter(Phase::FirstByte);
    exchange.stats.attempts += 1;
    let upstreams = &exchange.shard.upstreams;
    upstreams.await_response(exchange, upstream, response).await
}

/// Sends the request as its body arrives. Returns whether all of it was sent.
async fn send_upload<N: Net>(
    exchange: &mut Exchange<'_, N>,
    upstream: &Connection<N>,
    upload: &mut Upload<N>,
    response: &mut Response,
) -> Result<bool, CallError> {
    let conn = upstream.conn();
    if !receive_arrived(exchange, conn, upload).await? {
        upstream.broke.set(true);
        return Ok(false);
    }
    let mut was_flushed = true;
    loop {
        // The engine has closed its read side. A response that it sent before states the
        // reason.
        let Ok(flushed) = upload.flush(conn) else {
            upstream.broke.set(true);
            return Ok(false);
        };
        if flushed && !was_flushed {
            // The engine has held the upload up, so the client's time starts now.
            upload.progress_at = exchange.shard.net.now();
        }
        was_flushed = flushed;
        if flushed && upload.meter.is_done() {
            return Ok(true);
        }
        match upload_event(exchange, conn, flushed, upload.progress_at).await? {
            Event::Writable => {}
            Event::Received => {
                let payload_bytes = upload.meter.payload_bytes();
                if !receive_upload(exchange, conn, upload)? {
                    upstream.broke.set(true);
                    return Ok(false);
                }
                if upload.meter.payload_bytes() > payload_bytes {
                    upload.progress_at = exchange.shard.net.now();
                }
            }
            Event::Response => {
                response.receive(&exchange.shard.buffers, conn)?;
                if response.is_complete() {
                    return Ok(false);
                }
            }
        }
    }
}

/// Receives more of the body, if it has arrived, so that it is sent together with the head. For a
/// body of 32 KiB, that saves a third of the CPU time, for one of 128 KiB a tenth; for 1 MiB it
/// gains nothing. Returns `false` if the engine accepts no more bytes.
async fn receive_arrived<N: Net>(
    exchange: &mut Exchange<'_, N>,
    conn: &N::Conn,
    upload: &mut Upload<N>,
) -> Result<bool, Fault> {
    let client = exchange.client;
    let rest = upload.meter.remaining();
    if upload.meter.is_done()
        || rest.is_some_and(|rest| rest > RECEIVE_LARGE_BYTES as u64)
        || poll_fn(|cx| Poll::Ready(client.conn.poll_readable(cx).is_pending())).await
    {
        return Ok(true);
    }
    receive_upload(exchange, conn, upload)
}

/// Waits until the engine responds or one more step of the upload is possible. If everything
/// received has been sent (`flushed`), that is when the client sends more; otherwise, when the
/// engine accepts more. The client must send payload within the body timeout, counted from
/// `progress_at`: chunk extensions and trailers alone are no progress.
async fn upload_event<N: Net>(
    exchange: &Exchange<'_, N>,
    conn: &N::Conn,
    flushed: bool,
    progress_at: Instant,
) -> Result<Event, Fault> {
    let (shard, client) = (exchange.shard, exchange.client);
    let body = shard.config.timeouts.body;
    if flushed {
        let deadline = Deadline::of(progress_at, body, Timeout::Client);
        return client
            .until_own(shard, deadline, |cx| {
                if conn.poll_readable(cx).is_ready() {
                    return Poll::Ready(Event::Response);
                }
                client.conn.poll_readable(cx).map(|()| Event::Received)
            })
            .await
            .or_fault(Fault::BodyTimeout);
    }
    // The engine does not accept the bytes already received. The client is not responsible for
    // that, so no client timeout runs. Unread bytes of the body remain in the client's socket,
    // and a disconnect is detected.
    let watch = if exchange.request.body.is_done() {
        Watch::Ahead
    } else {
        Watch::Hangup
    };
    client
        .until(shard, watch, Deadline::NONE, |cx| {
            if conn.poll_readable(cx).is_ready() {
                return Poll::Ready(Event::Response);
            }
            conn.poll_writable(cx).map(|()| Event::Writable)
        })
        .await
        .or_gone()
}

/// Receives once from the client and forwards the bytes, or fills the pipe with them. Returns
/// `false` if the engine accepts no more bytes.
fn receive_upload<N: Net>(
    exchange: &mut Exchange<'_, N>,
    conn: &N::Conn,
    upload: &mut Upload<N>,
) -> Result<bool, Fault> {
    let (shard, client) = (exchange.shard, exchange.client);
    if !conn.is_encrypted() && !client.conn.is_encrypted() {
        upload.begin_splice(shard);
    }
    if let Some(pipe) = &mut upload.pipe {
        let remaining = upload.meter.remaining().unwrap_or(0);
        let bytes_max = usize::try_from(remaining).unwrap_or(usize::MAX);
        match client.conn.try_fill(pipe, bytes_max) {
            Ok(0) => return Err(client.record_gone()),
            Ok(n) => {
                upload.whole = false;
                record_spliced(exchange, upload, n);
            }
            Err(error) if would_block(&error) => {}
            Err(_) => return Err(client.record_gone()),
        }
        // The next flush sends the contents of the pipe.
        return Ok(true);
    }
    let received = shard.buffers.with_large(|buffer| {
        // One byte more than the rest: if it does not arrive, the socket is known to be empty.
        let room = upload.meter.remaining().map_or(buffer.len(), |remaining| {
            usize::try_from(remaining)
                .unwrap_or(usize::MAX)
                .saturating_add(1)
                .min(buffer.len())
        });
        let n = client.conn.try_recv(&mut buffer[..room])?;
        Ok((n, upload.pass(shard, conn, client, &mut buffer[..n])))
    });
    match received {
        Ok((0, _)) => Err(client.record_gone()),
        Ok((n, passed)) => {
            let taken = passed.as_ref().map_or(n, |(taken, _)| *taken);
            exchange.stats.bytes_in += taken as u64;
            let (_, passed) = passed?;
            exchange.request.body = RequestBody::read(upload.meter.is_done());
            upload.finish_if_done()?;
            Ok(passed)
        }
        Err(error) if would_block(&error) => Ok(true),
        Err(_) => Err(client.record_gone()),
    }
}

fn record_spliced<N: Net>(exchange: &mut Exchange<'_, N>, upload: &mut Upload<N>, bytes: usize) {
    let counted = upload.meter.skip(bytes as u64);
    debug_assert!(counted, "more bytes were received than remained");
    exchange.stats.bytes_in += bytes as u64;
    exchange.shard.metrics.spliced_bytes(bytes as u64);
    exchange.request.body = RequestBody::read(upload.meter.is_done());
}

fn record_masked<N: Net>(exchange: &Exchange<'_, N>, upload: &Upload<N>) {
    if let Some(mask) = &upload.mask
        && mask.masked() > 0
    {
        exchange.shard.metrics.masked(u64::from(mask.masked()));
    }
}

impl<N: Net> Upload<N> {
    /// Takes a pipe for the rest of a body that is not scanned, if splicing is worthwhile and a
    /// pipe is available. Spliced bytes are not kept, so the request can no longer be sent again.
    fn begin_splice(&mut self, shard: &Shard<N>) {
        let remaining = self.meter.remaining().unwrap_or(0);
        let is_worth_it = self.mask.is_none() && remaining >= N::SPLICE_BYTES_MIN;
        if self.pipe.is_none() && is_worth_it && !self.is_copied {
            self.pipe = shard.net.pipe();
            // Avoids another attempt on every receive.
            self.is_copied = self.pipe.is_none();
        }
    }

    /// Returns the unsent bytes of `head` and `out`.
    fn unsent(&self) -> [&[u8]; 2] {
        let in_out = self.at.saturating_sub(self.head.len());
        let head = self.head.get(self.at..).unwrap_or_default();
        [head, &self.out[in_out..]]
    }

    /// Drops the bytes of `out` if all of them have been sent.
    fn drop_sent(&mut self) {
        if self.at == self.head.len() + self.out.len() {
            self.out.clear();
            self.at = self.head.len();
        }
    }

    /// Sends the unsent bytes of `head`, `out` and the pipe. Returns `true` if the kernel accepted
    /// all of them.
    fn flush(&mut self, conn: &N::Conn) -> std::io::Result<bool> {
        loop {
            if self.at == self.head.len() + self.out.len() {
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
    fn pass(
        &mut self,
        shard: &Shard<N>,
        conn: &N::Conn,
        client: &Client<N>,
        received: &mut [u8],
    ) -> Result<(usize, bool), Fault> {
        let keep = self.whole && self.out.len() + received.len() <= REPLAY_BYTES_MAX;
        // Bytes that are withheld across receives can be more than those of one receive.
        let is_copied = match self.mask {
            None => false,
            Some(BodyMask::Json(_)) => self.framing() == Framing::Chunked,
            Some(BodyMask::Form(_)) => true,
        };
        if !keep {
            self.whole = false;
            self.drop_sent();
        }
        if keep || is_copied {
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
    fn finish_if_done(&mut self) -> Result<(), Fault> {
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

    const fn framing(&self) -> Framing {
        self.meter.framing()
    }
}
