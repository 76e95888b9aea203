//! Chunked decode: one response assembled from several requests to the decoder (`pd::chunked`).

use std::io::IoSlice;

use super::exchange::{Exchange, micros_since};
use super::head;
use super::relay::Rewrite;
use super::split::{PendingResponse, Split};
use crate::fault::{Cause, Fault};
use crate::h1::{self, Method, Name};
use crate::metrics::Phase;
use crate::net::Net;
use crate::pd::chunked::{ChunkError, Cut, Progress};
use crate::pd::{Collected, Role, Take};
use crate::upstream::connection::CleanEnd;
use crate::upstream::error::CallError;
use crate::upstream::wait::Deadline;

impl<N: Net> Exchange<'_, N> {
    /// Enables chunked decode for a request (`split.chunk`) if `--decode-chunk-size` is set and the
    /// request allows it.
    pub(super) fn cut(&self, split: &mut Split) {
        if let Some(tokens) = self.shard.config.pd.decode_chunk_tokens {
            let cut = Cut::of(&split.pd_request(), tokens);
            split.chunk = cut.map(|cut| Box::new(Progress::new(cut)));
            if split.chunk.is_some() {
                self.trace.cut(tokens);
            }
        }
    }

    /// Sends the client one response assembled from all decode chunks. `first` is the response to
    /// the first chunk's request, of which only the beginning has been received. This function
    /// sends the requests for the other chunks.
    pub(super) async fn respond_in_chunks(
        &mut self,
        mut split: Split,
        first: PendingResponse<N>,
    ) -> Result<(), Fault> {
        let cached_tokens = match first.rewrite {
            Rewrite::Usage(_, count) => Some(count),
            Rewrite::None => None,
        };
        let mut pending = first;
        let mut is_first = true;
        loop {
            let is_success = (200..300).contains(&pending.response.head.status);
            if !is_success && self.stats.status == 0 {
                drop(split);
                return Box::pin(self.relay(pending.upstream, pending.response, Rewrite::None))
                    .await;
            }
            if !is_success {
                return self.end_with_engine_error(pending).await;
            }
            let response = match self.read_chunk(pending).await {
                Ok(response) => response,
                Err(fault) => return self.end_with(fault).await,
            };
            let Some(progress) = &mut split.chunk else {
                return Err(Fault::Bug("a chunked decode without its progress"));
            };
            let chunk = match progress.take(&response) {
                Ok(chunk) => chunk,
                // Nothing has been sent to the client yet, so the request can still be decoded in
                // one call.
                Err(ChunkError::NotPlain) if is_first => {
                    return self.respond_unchunked(split).await;
                }
                Err(_) => {
                    return self
                        .end_with(Fault::leg(Role::Decode, Cause::Unusable))
                        .await;
                }
            };
            self.trace.chunk(progress);
            let (is_last, streams) = (chunk.is_last, progress.cut().streams);
            if streams {
                let mut events = progress.event(&chunk, is_first);
                if is_last {
                    if progress.cut().include_usage {
                        events.extend_from_slice(&progress.usage_event(cached_tokens));
                    }
                    events.extend_from_slice(b"data: [DONE]\n\n");
                }
                self.send_events(&events, is_last).await?;
            } else if is_last {
                let whole = progress.whole(&response, cached_tokens);
                return self.respond_local(200, &whole, None, None).await;
            }
            if is_last {
                return Ok(());
            }
            is_first = false;
            pending = match self.next_chunk(&split).await {
                Ok(pending) => pending,
                Err(fault) => return self.end_with(fault).await,
            };
        }
    }

    async fn next_chunk(&mut self, split: &Split) -> Result<PendingResponse<N>, Fault> {
        let leg = split.pd_request().local_leg()?;
        self.decode_local(split, &leg).await
    }

    /// Sends the request again as a single decode call and relays the response. Used if the
    /// response to the first chunk's request has content that no further chunk can continue.
    async fn respond_unchunked(&mut self, mut split: Split) -> Result<(), Fault> {
        split.chunk = None;
        let leg = split.pd_request().local_leg()?;
        let pending = self.decode_local(&split, &leg).await?;
        drop(split);
        Box::pin(self.relay(pending.upstream, pending.response, Rewrite::None)).await
    }

    /// Reads the body of the response to one decode chunk completely. Fails if it has a content
    /// encoding or is not valid JSON.
    async fn read_chunk(&self, pending: PendingResponse<N>) -> Result<Vec<u8>, Fault> {
        let PendingResponse {
            upstream,
            mut response,
            ..
        } = pending;
        let framing = h1::response_framing(Method::Post, &response.head, &response.bytes);
        response.framing = framing.map_err(|_| Fault::leg(Role::Decode, Cause::BadResponse))?;
        if response.head.field(Name::ContentEncoding).is_some() {
            return Err(Fault::leg(Role::Decode, Cause::Unusable));
        }
        let keeps = h1::response_keeps_alive(&response.head, &response.bytes, response.framing);
        let read =
            self.shard
                .upstreams
                .read_body(self, &upstream, &response, Take::Whole, Deadline::NONE);
        let read = read.await.map_err(|fault| match fault {
            CallError::Failed(Cause::BadResponse) => Fault::leg(Role::Decode, Cause::Unusable),
            other => other.fault(Role::Decode),
        });
        let (taken, has_surplus) = read?;
        if let Some(clean) = CleanEnd::of(keeps, self.sent_whole, has_surplus) {
            upstream.release(&self.shard.upstreams, clean);
        }
        match taken {
            Collected::Whole(bytes) => Ok(bytes),
            Collected::Handoff(_) | Collected::Nothing => {
                Err(Fault::Bug("a decode chunk was not collected"))
            }
        }
    }

    /// Sends server-sent events to the client, preceded by the response head if none has been sent.
    /// `is_last` also ends the body.
    async fn send_events(&mut self, events: &[u8], is_last: bool) -> Result<(), Fault> {
        let is_http10 = self.is_http10();
        let mut out = self.shard.buffers.buffer();
        let is_first = self.stats.status == 0;
        if is_first {
            self.keep_alive = self.keeps_alive() && !is_http10;
            let id = self.request_id.as_bytes();
            head::push_event_stream(&mut out, id, self.keep_alive, is_http10);
            self.stats.status = 200;
            self.enter(Phase::Streaming);
        }
        if is_http10 {
            out.extend_from_slice(events);
        } else {
            out.extend_from_slice(&h1::chunk_line(events.len()));
            out.extend_from_slice(events);
            out.extend_from_slice(b"\r\n");
            if is_last {
                out.extend_from_slice(h1::LAST_CHUNK);
            }
        }
        self.stats.bytes_out += out.len() as u64;
        self.client.send(self.shard, &[IoSlice::new(&out)]).await?;
        self.shard.buffers.recycle(out);
        if is_first {
            let now = self.shard.net.clock();
            self.stats.ttft_us = micros_since(now, self.stats.started).max(1);
            self.shard
                .metrics
                .ttft(self.stats.route, self.stats.ttft_us);
        }
        self.stats.complete |= is_last;
        Ok(())
    }

    /// Ends a stream that has started after the decoder responded to a later chunk with an error:
    /// sends the decoder's error body as an event if it is a JSON object, otherwise the proxy's own
    /// error.
    async fn end_with_engine_error(&mut self, pending: PendingResponse<N>) -> Result<(), Fault> {
        match self.read_chunk(pending).await {
            Ok(mut error) if error.first() == Some(&b'{') => {
                // The data of an event must be one line. In JSON, line ends are only whitespace.
                for byte in &mut error {
                    if matches!(byte, b'\n' | b'\r') {
                        *byte = b' ';
                    }
                }
                self.shard
                    .count_fault(Fault::leg(Role::Decode, Cause::Unusable));
                self.stats.fault = Some(Fault::leg(Role::Decode, Cause::Unusable));
                let events = [b"data: ", &error[..], b"\n\ndata: [DONE]\n\n"].concat();
                self.send_events(&events, true).await
            }
            Ok(_) => {
                self.end_with(Fault::leg(Role::Decode, Cause::Unusable))
                    .await
            }
            Err(fault) => self.end_with(fault).await,
        }
    }

    /// Ends the response with a fault. In a stream that has started, the fault is sent as an error
    /// event, as the engines do (`docs/engines.md#event-streams`). Otherwise, or if the client has
    /// disconnected, it is returned as `Err` for the caller to report.
    async fn end_with(&mut self, fault: Fault) -> Result<(), Fault> {
        let is_clients = matches!(fault, Fault::ClientGone | Fault::ClientStalled);
        if self.stats.status == 0 || is_clients {
            return Err(fault);
        }
        self.shard.count_fault(fault);
        self.stats.fault = Some(fault);
        self.set_failed(fault.reason());
        let body = fault.body();
        let events = format!("data: {{\"error\":{body}}}\n\ndata: [DONE]\n\n");
        self.send_events(events.as_bytes(), true).await
    }
}
