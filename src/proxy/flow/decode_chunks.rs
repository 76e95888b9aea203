//! Chunked decode: one response assembled from several requests to the decoder
//! (`pd::decode_chunks`).

use std::io::IoSlice;

use super::decode::{self, AfterSend};
use super::split::Split;
use crate::budget::Reserved;
use crate::config::ErrorStyle;
use crate::fault::{Cause, Fault};
use crate::h1;
use crate::json::transform::ResponseEdit;
use crate::metrics::Phase;
use crate::net::Net;
use crate::pd::Role;
use crate::pd::decode_chunks::{ChunkError, Cut, Progress};
use crate::proxy::access_log::micros_since;
use crate::proxy::exchange::Exchange;
use crate::proxy::head;
use crate::proxy::relay::{self, PendingResponse};

/// Enables chunked decode for a request (`split.chunk`) if `--decode-chunk-size` is set and the
/// request allows it.
pub(super) fn cut<N: Net>(exchange: &Exchange<'_, N>, split: &mut Split) {
    if let Some(tokens) = exchange.shard.config.pd.decode_chunk_tokens {
        let cut = Cut::of(split.api, &split.body.document, split.body.bytes(), tokens);
        split.chunk = cut.map(|cut| Box::new(Progress::new(cut)));
        if split.chunk.is_some() {
            exchange
                .trace
                .record(&exchange.shard.net, |recorder, _| recorder.cut(tokens));
        }
    }
}

/// Sends the client one response assembled from all decode chunks. `first` is the response to
/// the first chunk's request, of which only the beginning has been received. This function
/// sends the requests for the other chunks.
pub(super) async fn respond_in_chunks<N: Net>(
    exchange: &mut Exchange<'_, N>,
    mut split: Split,
    first: PendingResponse<N>,
) -> Result<(), Fault> {
    let cached_tokens = first.edits.iter().find_map(ResponseEdit::cached_tokens);
    let mut pending = first;
    let mut is_first = true;
    let mut reserved = Reserved::new(&exchange.shard.budget);
    loop {
        let is_success = (200..300).contains(&pending.response.head.status);
        if !is_success && exchange.reply.is_unsent() {
            drop(split);
            pending.edits.clear();
            return Box::pin(relay::relay(exchange, pending)).await;
        }
        if !is_success {
            return end_with_engine_error(exchange, pending).await;
        }
        let response = match decode::read_whole(exchange, pending).await {
            Ok(response) => response,
            Err(fault) => return end_with(exchange, fault).await,
        };
        let Some(progress) = &mut split.chunk else {
            return Err(Fault::Bug("a chunked decode without its progress"));
        };
        let chunk = match progress.take(&response) {
            Ok(chunk) => chunk,
            // Nothing has been sent to the client yet, so the request can still be decoded in
            // one call.
            Err(ChunkError::NotPlain) if is_first => {
                return respond_unchunked(exchange, split).await;
            }
            Err(_) => {
                return end_with(exchange, Fault::leg(Role::Decode, Cause::Unusable)).await;
            }
        };
        if let Err(spent) = reserved.grow_to(progress.kept_bytes() as u64) {
            return end_with(exchange, spent.into()).await;
        }
        let tokens = progress.tokens();
        exchange
            .trace
            .record(&exchange.shard.net, |recorder, _| recorder.chunk(tokens));
        let (is_last, streams) = (chunk.is_last, progress.cut().streams);
        if streams {
            let mut events = progress.event(&chunk, is_first);
            if is_last {
                if progress.cut().include_usage {
                    events.extend_from_slice(&progress.usage_event(cached_tokens));
                }
                events.extend_from_slice(b"data: [DONE]\n\n");
            }
            send_events(exchange, &events, is_last).await?;
        } else if is_last {
            let whole = progress.whole(&response, cached_tokens);
            return exchange.respond_local(200, &whole, None, None).await;
        }
        if is_last {
            return Ok(());
        }
        is_first = false;
        pending = match next_chunk(exchange, &mut split).await {
            Ok(pending) => pending,
            Err(fault) => return end_with(exchange, fault).await,
        };
    }
}

async fn next_chunk<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &mut Split,
) -> Result<PendingResponse<N>, Fault> {
    let leg = split.pd_request().local_leg()?;
    decode::decode_local(exchange, split, leg, AfterSend::KeepBody).await
}

/// Sends the request again as a single decode call and relays the response. Used if the
/// response to the first chunk's request has content that no further chunk can continue.
async fn respond_unchunked<N: Net>(
    exchange: &mut Exchange<'_, N>,
    mut split: Split,
) -> Result<(), Fault> {
    split.chunk = None;
    let leg = split.pd_request().local_leg()?;
    let pending = decode::decode_local(exchange, &mut split, leg, AfterSend::DropBody).await?;
    drop(split);
    Box::pin(relay::relay(exchange, pending)).await
}

/// Sends server-sent events to the client, preceded by the response head if none has been sent.
/// `is_last` also ends the body.
async fn send_events<N: Net>(
    exchange: &mut Exchange<'_, N>,
    events: &[u8],
    is_last: bool,
) -> Result<(), Fault> {
    let is_http10 = exchange.request.is_http10();
    let mut out = exchange.shard.buffers.buffer();
    let is_first = exchange.reply.is_unsent();
    if is_first {
        exchange.keep_alive = exchange.keeps_alive() && !is_http10;
        let id = exchange.request.id.as_bytes();
        head::push_event_stream(&mut out, id, exchange.keep_alive, is_http10);
        exchange.reply.begin(200);
        exchange.enter(Phase::Streaming);
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
    exchange.stats.bytes_out += out.len() as u64;
    exchange
        .client
        .send(exchange.shard, &[IoSlice::new(&out)])
        .await?;
    exchange.shard.buffers.recycle(out);
    if is_first {
        let now = exchange.shard.net.clock();
        exchange.stats.ttft_us = micros_since(now, exchange.stats.started).max(1);
        exchange
            .shard
            .metrics
            .ttft(exchange.stats.route, exchange.stats.ttft_us);
    }
    if is_last {
        exchange.reply.finish();
    }
    Ok(())
}

/// Ends a stream that has started after the decoder responded to a later chunk with an error:
/// sends the decoder's error body as an event if it is a JSON object, otherwise the proxy's own
/// error.
async fn end_with_engine_error<N: Net>(
    exchange: &mut Exchange<'_, N>,
    pending: PendingResponse<N>,
) -> Result<(), Fault> {
    match decode::read_whole(exchange, pending).await {
        Ok(mut error) if error.first() == Some(&b'{') => {
            // The data of an event must be one line. In JSON, line ends are only whitespace.
            for byte in error.bytes_mut() {
                if matches!(byte, b'\n' | b'\r') {
                    *byte = b' ';
                }
            }
            exchange
                .shard
                .count_fault(Fault::leg(Role::Decode, Cause::Unusable));
            exchange.stats.fault = Some(Fault::leg(Role::Decode, Cause::Unusable));
            let events = [b"data: ", &error[..], b"\n\ndata: [DONE]\n\n"].concat();
            send_events(exchange, &events, true).await
        }
        Ok(_) => end_with(exchange, Fault::leg(Role::Decode, Cause::Unusable)).await,
        Err(fault) => end_with(exchange, fault).await,
    }
}

/// Ends the response with a fault. In a stream that has started, the fault is sent as an error
/// event, as the engines do (`docs/engines.md#event-streams`). Otherwise, or if the client has
/// disconnected, it is returned as `Err` for the caller to report.
async fn end_with<N: Net>(exchange: &mut Exchange<'_, N>, fault: Fault) -> Result<(), Fault> {
    let is_clients = matches!(fault, Fault::ClientGone | Fault::ClientStalled);
    if exchange.reply.is_unsent() || is_clients {
        return Err(fault);
    }
    exchange.shard.count_fault(fault);
    exchange.stats.fault = Some(fault);
    exchange.stats.set_failed(fault.reason());
    let style = exchange.shard.config.errors;
    let body = match style {
        ErrorStyle::PdSidecar => format!("{{\"error\":{}}}", fault.body(style)),
        ErrorStyle::OpenAi => fault.body(style),
    };
    let events = format!("data: {body}\n\ndata: [DONE]\n\n");
    send_events(exchange, events.as_bytes(), true).await
}
