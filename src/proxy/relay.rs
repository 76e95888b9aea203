//! An answer on its way from an engine to the client.
//!
//! Per chunk: one wait, one receive, one look at the framing, one send. The engine's own chunk
//! framing passes unchanged wherever the body does; it is made anew only where the body is
//! edited or the client does not know chunks.

use std::io::IoSlice;

use super::client::{Client, Limit, Watch};
use super::exchange::{Exchange, micros_since};
use super::head::{self, Outgoing, ResponseExtra};
use super::leg::{Response, Upstream};
use super::shard::Shard;
use crate::fault::Fault;
use crate::h1::{self, BodyMeter, Framing, Name};
use crate::json::{ResponseForm, UsageRewriter, UsageShape};
use crate::limits::{SPLICES_PER_TURN_MAX, STEPS_PER_TURN_MAX};
use crate::metrics::{Direction, Phase};
use crate::net::{Conn, Instant, Net, would_block};

/// One chunk in this many is timed for the overhead metric: reading the clock is a noticeable
/// share of a chunk's cost.
const CHUNKS_PER_TIMING: u32 = 16;

/// The last word of a stream of chats, completions or tokens (reference `vllm-api` 7.2).
const DONE: &[u8] = b"[DONE]";
/// Where it is looked for: with its line ends, and the framing that may follow it in one piece.
const DONE_TAIL_BYTES: usize = 24;

/// What is changed in an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rewrite {
    /// Nothing.
    None,
    /// The cached-token count, to this number.
    Usage(UsageShape, u64),
}

/// How payload leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// With the engine's framing, byte for byte.
    Verbatim,
    /// Without framing.
    Bare,
    /// In chunks of our own.
    Chunked,
}

/// The state of one relayed body.
struct Relay {
    meter: BodyMeter,
    form: Form,
    rewriter: Option<UsageRewriter>,
    /// Bytes came behind the end of the answer: the connection is not to be trusted again.
    has_surplus: bool,
    chunks: u32,
    /// Bytes received behind the first, of which the account hears at the end: it lies elsewhere,
    /// and with many streams each look at it is a cache miss.
    received: u64,
    /// When the first token left has been noted.
    has_first_token: bool,
    /// The latest piece ended with the last word of a stream.
    said_done: bool,
}

/// What one receive led to.
enum Step {
    /// All of it has left.
    Sent,
    /// The client was slow: this is still to be sent.
    Rest(Vec<u8>),
    /// Nothing was there after all.
    Nothing,
}

impl<N: Net> Exchange<'_, N> {
    /// Relays an answer whose head is there; the engine's connection is kept if it may be.
    ///
    /// Callers box it: it would double the memory of a request that waits for a silent engine.
    pub(super) async fn relay(
        &mut self,
        upstream: Upstream<N>,
        mut response: Response,
        rewrite: Rewrite,
    ) -> Result<(), Fault> {
        let received = self.shard.net.clock();
        let (head, bytes) = (&response.head, &response.bytes);
        if head.status == 101 {
            // Rare, and large: it must not be part of every exchange.
            return Box::pin(self.relay_upgrade(upstream, response)).await;
        }
        let framing = h1::response_framing(self.head.method, head, bytes);
        response.framing = framing.map_err(|_| Fault::DecodeResponse)?;
        let engine_keeps = h1::response_keeps_alive(head, bytes, response.framing);
        let rewriter = self.rewriter(&response, rewrite);
        let (outgoing, form) = self.outgoing(response.framing, rewriter.is_some());
        self.keep_alive = self.keeps_alive() && outgoing != Outgoing::UntilClose;
        let mut relay = Relay {
            meter: BodyMeter::new(response.framing),
            form,
            rewriter,
            has_surplus: false,
            chunks: 0,
            received: 0,
            has_first_token: false,
            said_done: false,
        };
        let is_open_ended = outgoing == Outgoing::UntilClose;
        self.relay_first(&response, outgoing, &mut relay, received)
            .await?;
        self.shard.recycle(std::mem::take(&mut response.bytes));
        self.shard
            .recycle_fields(std::mem::take(&mut response.head.fields));
        self.enter(Phase::Streaming);
        let relayed = self.relay_body(&upstream, &mut relay).await;
        self.stats.bytes_out += relay.received;
        match relayed {
            // Clients close at `[DONE]` without reading on: they have had their answer.
            Err(Fault::ClientGone) if relay.said_done => {
                self.stats.complete = true;
                self.keep_alive = false;
                return Ok(());
            }
            relayed => relayed?,
        }
        if is_open_ended {
            self.client.conn.close_cleanly();
        }
        self.stats.complete = true;
        if engine_keeps && self.sent_whole && !relay.has_surplus {
            upstream.release(self.shard);
        }
        Ok(())
    }

    /// The rewriter for an answer that has a count to correct: a successful one, in clear.
    fn rewriter(&self, response: &Response, rewrite: Rewrite) -> Option<UsageRewriter> {
        let Rewrite::Usage(shape, cached_tokens) = rewrite else {
            return None;
        };
        let has_body = response.framing != Framing::None;
        let is_encoded = response.head.field(Name::ContentEncoding).is_some();
        if !has_body || is_encoded || !(200..300).contains(&response.head.status) {
            return None;
        }
        let content_type = response.head.field(Name::ContentType);
        let content_type = content_type.map_or(&b""[..], |field| field.value.of(&response.bytes));
        let is_stream =
            content_type.starts_with(b"text/event-stream") || response.rest().starts_with(b"data:");
        let form = if is_stream {
            ResponseForm::Sse
        } else {
            ResponseForm::Json
        };
        Some(UsageRewriter::new(form, shape, cached_tokens))
    }

    /// How the body leaves: its framing in the client's head, and what that does to each piece.
    fn outgoing(&self, framing: Framing, rewritten: bool) -> (Outgoing, Form) {
        match (framing, rewritten, self.is_http10()) {
            (Framing::None, _, _) => (Outgoing::None, Form::Verbatim),
            (Framing::Length(length), false, _) => (Outgoing::Length(length), Form::Verbatim),
            (Framing::Chunked, false, false) => (Outgoing::Chunked, Form::Verbatim),
            (Framing::UntilClose, false, _) => (Outgoing::UntilClose, Form::Verbatim),
            (_, _, true) => (Outgoing::UntilClose, Form::Bare),
            // An edit changes the length, and nothing is held back to find out by how much.
            (_, true, false) => (Outgoing::Chunked, Form::Chunked),
        }
    }

    /// Sends the head together with whatever of the body came with it.
    async fn relay_first(
        &mut self,
        response: &Response,
        outgoing: Outgoing,
        relay: &mut Relay,
        received: Instant,
    ) -> Result<(), Fault> {
        let mut body = self.shard.buffer();
        relay.record_done(response.rest());
        relay.transform(response.rest(), &mut body)?;
        let mut outgoing = outgoing;
        if relay.form == Form::Chunked && relay.meter.is_done() {
            // The whole body is here: its length is known after all.
            body.clear();
            relay.restart(response.framing, Form::Bare);
            relay.transform(response.rest(), &mut body)?;
            outgoing = Outgoing::Length(body.len() as u64);
        }
        let mut out = self.shard.buffer();
        let extra = ResponseExtra {
            request_id: self.request_id.as_bytes(),
            method: self.head.method,
            keep_alive: self.keep_alive,
            http10: self.is_http10(),
            upgrade: None,
        };
        head::push_response(&mut out, &response.head, &response.bytes, outgoing, &extra)
            .map_err(|_| Fault::DecodeResponse)?;
        self.stats.status = response.head.status;
        if outgoing == Outgoing::UntilClose {
            // The end of the connection will be the end of the answer, so whatever ends it early,
            // the end of this process included, must not look like that.
            self.client.conn.reset_on_close();
        }
        self.stats.bytes_out += (out.len() + body.len()) as u64;
        self.client
            .send(self.shard, &[IoSlice::new(&out), IoSlice::new(&body)])
            .await?;
        let sent = self.shard.net.clock();
        if !body.is_empty() {
            relay.has_first_token = true;
            self.record_first_token(sent);
        }
        let took = sent.since(received);
        let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.shard.metrics.overhead(Direction::FirstByte, took_ns);
        self.stats.proxy_ns += took_ns;
        self.shard.recycle(out);
        self.shard.recycle(body);
        Ok(())
    }

    /// Relays the rest of the body, piece by piece as it arrives.
    async fn relay_body(&mut self, upstream: &Upstream<N>, relay: &mut Relay) -> Result<(), Fault> {
        let (shard, client, conn) = (self.shard, self.client, upstream.conn());
        let is_encrypted = conn.is_encrypted() || client.conn.is_encrypted();
        if !is_encrypted && let Some(pipe) = relay.pipe(shard) {
            // Rare, and no part of a stream of tokens.
            return Box::pin(self.relay_spliced(upstream, relay, pipe)).await;
        }
        let mut steps = 0_u32;
        while !relay.meter.is_done() {
            steps = steps.wrapping_add(1);
            if steps.is_multiple_of(STEPS_PER_TURN_MAX) {
                conn.clear_readable();
            }
            client
                .until(shard, Watch::Ahead, Limit::NONE, |cx| {
                    conn.poll_readable(cx)
                })
                .await?;
            let step = shard.with_small(|buffer| match conn.try_recv(buffer) {
                // An end behind a reset that a send was told of may be any point of the body.
                Ok(0) if upstream.broke.get() => Err(Fault::DecodeTruncated),
                Ok(0) => relay.end(shard, client),
                Ok(n) => {
                    relay.received += n as u64;
                    relay.step(shard, client, &buffer[..n])
                }
                Err(error) if would_block(&error) => Ok(Step::Nothing),
                Err(_) => Err(Fault::DecodeTruncated),
            });
            match step? {
                Step::Sent => {}
                Step::Rest(rest) => client.send_rest(shard, rest).await?,
                Step::Nothing => continue,
            }
            if !relay.has_first_token {
                relay.has_first_token = true;
                self.record_first_token(shard.net.clock());
            }
        }
        Ok(())
    }

    /// Relays the rest of a body that nobody looks at, within the kernel.
    async fn relay_spliced(
        &mut self,
        upstream: &Upstream<N>,
        relay: &mut Relay,
        mut pipe: <N::Conn as Conn>::Pipe,
    ) -> Result<(), Fault> {
        let (shard, client, conn) = (self.shard, self.client, upstream.conn());
        relay.said_done = false;
        let mut steps = 0_u32;
        while let Some(remaining) = relay.meter.remaining().filter(|left| *left > 0) {
            steps = steps.wrapping_add(1);
            if steps.is_multiple_of(SPLICES_PER_TURN_MAX) {
                conn.clear_readable();
            }
            client
                .until(shard, Watch::Ahead, Limit::NONE, |cx| {
                    conn.poll_readable(cx)
                })
                .await?;
            let bytes_max = usize::try_from(remaining).unwrap_or(usize::MAX);
            match conn.try_fill(&mut pipe, bytes_max) {
                Ok(0) => return Err(Fault::DecodeTruncated),
                Ok(n) => {
                    let counted = relay.meter.skip(n as u64);
                    debug_assert!(counted, "no more was received than remained");
                    relay.received += n as u64;
                    shard.metrics.spliced_bytes(n as u64);
                }
                Err(error) if would_block(&error) => continue,
                Err(_) => return Err(Fault::DecodeTruncated),
            }
            client.send_piped(shard, &mut pipe).await?;
            if !relay.has_first_token {
                relay.has_first_token = true;
                self.record_first_token(shard.net.clock());
            }
        }
        Ok(())
    }

    fn record_first_token(&mut self, sent: Instant) {
        let waited = micros_since(sent, self.stats.started).max(1);
        self.stats.ttft_us = waited;
        if self.stats.outcome.is_some() && self.stats.status < 300 {
            self.shard.metrics.ttft(self.stats.route, waited);
        }
    }
}

impl Relay {
    /// A pipe for the rest of the body, if it is worth it and there is one.
    fn pipe<N: Net>(&self, shard: &Shard<N>) -> Option<<N::Conn as Conn>::Pipe> {
        let remaining = self.meter.remaining().unwrap_or(0);
        let is_worth_it = self.form == Form::Verbatim && remaining >= N::SPLICE_BYTES_MIN;
        is_worth_it.then(|| shard.net.pipe()).flatten()
    }

    /// Looks for the stream's last word at the end of a piece, where engines put it.
    fn record_done(&mut self, received: &[u8]) {
        let tail = &received[received.len().saturating_sub(DONE_TAIL_BYTES)..];
        self.said_done = tail.windows(DONE.len()).any(|window| window == DONE);
    }

    /// Passes one received piece on.
    fn step<N: Net>(
        &mut self,
        shard: &Shard<N>,
        client: &Client<N>,
        received: &[u8],
    ) -> Result<Step, Fault> {
        self.chunks = self.chunks.wrapping_add(1);
        self.record_done(received);
        let timed = self.chunks.is_multiple_of(CHUNKS_PER_TIMING);
        let begun = if timed { shard.net.clock() } else { Instant(0) };
        let step = if self.form == Form::Verbatim {
            self.step_verbatim(client, received)
        } else {
            self.step_transformed(shard, client, received)
        };
        if timed {
            let took = shard.net.clock().since(begun).as_nanos();
            let took_ns = u64::try_from(took).unwrap_or(u64::MAX);
            shard.metrics.overhead(Direction::Chunk, took_ns);
        }
        step
    }

    fn step_verbatim<N: Net>(
        &mut self,
        client: &Client<N>,
        received: &[u8],
    ) -> Result<Step, Fault> {
        let taken = self
            .meter
            .take(received)
            .map_err(|_| Fault::DecodeTruncated)?;
        self.has_surplus |= taken < received.len();
        send_now(client, &received[..taken])
    }

    fn step_transformed<N: Net>(
        &mut self,
        shard: &Shard<N>,
        client: &Client<N>,
        received: &[u8],
    ) -> Result<Step, Fault> {
        let mut out = shard.buffer();
        self.transform(received, &mut out)?;
        let step = send_now(client, &out);
        shard.recycle(out);
        step
    }

    /// Appends what `received` becomes for the client.
    fn transform(&mut self, received: &[u8], out: &mut Vec<u8>) -> Result<(), Fault> {
        if self.form == Form::Verbatim {
            let taken = self
                .meter
                .take(received)
                .map_err(|_| Fault::DecodeTruncated)?;
            self.has_surplus |= taken < received.len();
            out.extend_from_slice(&received[..taken]);
            return Ok(());
        }
        let start = out.len();
        let rewriter = &mut self.rewriter;
        let taken = self.meter.decode(received, |span| {
            let payload = span.of(received);
            match rewriter {
                Some(rewriter) => rewriter.feed(payload, &mut |piece| out.extend_from_slice(piece)),
                None => out.extend_from_slice(payload),
            }
        });
        let taken = taken.map_err(|_| Fault::DecodeTruncated)?;
        self.has_surplus |= taken < received.len();
        if self.meter.is_done() {
            self.finish_payload(out);
        }
        self.wrap(out, start);
        Ok(())
    }

    /// Emits what the rewriter holds back.
    fn finish_payload(&mut self, out: &mut Vec<u8>) {
        if let Some(rewriter) = &mut self.rewriter {
            rewriter.finish(&mut |piece| out.extend_from_slice(piece));
        }
    }

    /// Puts the payload from `start` on into a chunk, and the last chunk behind it at the end.
    fn wrap(&self, out: &mut Vec<u8>, start: usize) {
        if self.form != Form::Chunked {
            return;
        }
        let size = out.len() - start;
        if size > 0 {
            let line = h1::chunk_line(size);
            out.extend_from_slice(b"\r\n");
            out.splice(start..start, line.iter().copied());
        }
        if self.meter.is_done() {
            out.extend_from_slice(h1::LAST_CHUNK);
        }
    }

    /// Begins again with the same body in another form.
    fn restart(&mut self, framing: Framing, form: Form) {
        self.meter = BodyMeter::new(framing);
        self.form = form;
        self.has_surplus = false;
        if let Some(rewriter) = &mut self.rewriter {
            rewriter.restart();
        }
    }

    /// The engine's stream ended: rightly, where the end of the connection is the end of the
    /// body, else in the middle of it.
    fn end<N: Net>(&mut self, shard: &Shard<N>, client: &Client<N>) -> Result<Step, Fault> {
        if !self.meter.ends_at_close() {
            return Err(Fault::DecodeTruncated);
        }
        self.meter = BodyMeter::new(Framing::None);
        // The connection is used up.
        self.has_surplus = true;
        let mut out = shard.buffer();
        if self.form != Form::Verbatim {
            self.finish_payload(&mut out);
            self.wrap(&mut out, 0);
        }
        if out.is_empty() {
            Ok(Step::Sent)
        } else {
            send_now(client, &out)
        }
    }
}

/// Sends at once what the client takes; the rest is copied.
fn send_now<N: Net>(client: &Client<N>, bytes: &[u8]) -> Result<Step, Fault> {
    match client.conn.try_send(bytes) {
        Ok(sent) if sent == bytes.len() => Ok(Step::Sent),
        Ok(sent) => Ok(Step::Rest(bytes[sent..].to_vec())),
        Err(error) if would_block(&error) => Ok(Step::Rest(bytes.to_vec())),
        Err(_) => Err(client.record_gone()),
    }
}
