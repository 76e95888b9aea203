//! The decode-first order (`shared-storage` with a `cache_hit_threshold`): the decoder's response
//! is withheld until it is known whether a prefill leg is needed, and no longer.

use super::decode::AfterSend;
use super::split::Split;
use super::{decode, serial};
use crate::budget::Reserved;
use crate::fault::{Cause, Fault};
use crate::fleet::Target;
use crate::h1::{self, BodyMeter, Method};
use crate::net::{Conn, Net, would_block};
use crate::pd::decode_first::{StreamVerdict, Verdict, verdict_of_whole};
use crate::pd::{Leg, Outcome, Reason, Role, Take};
use crate::proxy::exchange::Exchange;
use crate::proxy::relay::PendingResponse;
use crate::upstream::{Deadline, Scope, Stage};

/// The part of the decoder's response received so far. It is withheld from the client until it is
/// known whether a prefill leg is needed.
struct Holding {
    meter: BodyMeter,
    /// `None` if the response is not a stream.
    events: Option<StreamVerdict>,
    /// Number of bytes of the response body, including framing, that `meter` has decoded so far.
    seen: usize,
    payload: Vec<u8>,
    bytes_max: usize,
}

/// Sends the request to the decoder first. Continues with the serial order if the decoder
/// reports that too little of the prompt is in the store.
pub(super) async fn decode_first<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &mut Split,
    targets: &[Target],
) -> Result<PendingResponse<N>, Fault> {
    let leg = split.pd_request().local_leg()?;
    // The proxy reads the response itself, so it must not have a content encoding.
    let take = Take::Whole;
    let pending = decode::decode_local(exchange, split, Leg { take, ..leg }, AfterSend::KeepBody);
    let mut pending = pending.await?;
    let mut reserved = Reserved::new(&exchange.shard.budget);
    match verdict(exchange, &mut pending, &mut reserved).await? {
        Verdict::BelowThreshold => {
            drop(pending);
            drop(reserved);
            serial::serial(exchange, split, targets).await
        }
        Verdict::Undecided | Verdict::Served => {
            exchange.stats.outcome = Some((Outcome::LocalPolicy, Reason::StoreHit));
            pending.reserved = Some(Box::new(reserved));
            Ok(pending)
        }
    }
}

/// Reads the decoder's response until it shows whether a prefill leg is needed, and no further.
/// The bytes read remain in `pending`; if no prefill leg is needed, they are relayed from
/// there. Their memory is reserved in `reserved`.
async fn verdict<N: Net>(
    exchange: &Exchange<'_, N>,
    pending: &mut PendingResponse<N>,
    reserved: &mut Reserved,
) -> Result<Verdict, Fault> {
    let response = &mut pending.response;
    let is_encoded = response.is_coded();
    if !(200..300).contains(&response.head.status) || is_encoded {
        return Ok(Verdict::Served);
    }
    let framing = h1::response_framing(Method::Post, &response.head, &response.bytes);
    let framing = framing.map_err(|_| Fault::leg(Role::Decode, Cause::BadResponse))?;
    let mut holding = Holding {
        meter: BodyMeter::new(framing),
        events: response.is_event_stream().then(StreamVerdict::default),
        seen: 0,
        payload: Vec::new(),
        bytes_max: exchange.shard.config.pd.prefill_response_bytes_max,
    };
    let conn = pending.upstream.conn();
    loop {
        let held_bytes = response.bytes.capacity() + holding.payload.capacity();
        reserved.grow_to(held_bytes as u64)?;
        match holding.read(response.rest()) {
            Verdict::Undecided => {}
            known => return Ok(known),
        }
        exchange
            .until(Stage::AfterRequest, Deadline::NONE, |cx| {
                conn.poll_readable(cx)
            })
            .await
            .or_gone()?;
        let received = exchange.shard.buffers.with_small(|buffer| {
            conn.try_recv(buffer)
                .inspect(|n| response.bytes.extend_from_slice(&buffer[..*n]))
        });
        match received {
            // The relay sees the end of the connection again and judges whether the response is
            // complete.
            Ok(0) => return Ok(holding.at_end()),
            Ok(_) => {}
            Err(error) if would_block(&error) => {}
            Err(_) => {
                return Err(Fault::leg(Role::Decode, Cause::BadResponse));
            }
        }
    }
}

impl Holding {
    /// Consumes the body bytes received since the previous call and returns the verdict on the
    /// response so far. `body` is the whole body received so far, including framing.
    fn read(&mut self, body: &[u8]) -> Verdict {
        let new = &body[self.seen..];
        let payload = &mut self.payload;
        let taken = self
            .meter
            .decode(new, |span| payload.extend_from_slice(span.of(new)));
        let Ok(taken) = taken else {
            // The relay reports the malformed framing.
            return Verdict::Served;
        };
        self.seen += taken;
        let is_done = self.meter.is_done();
        let verdict = if let Some(events) = &mut self.events {
            events.read(&self.payload)
        } else if is_done {
            verdict_of_whole(&self.payload)
        } else {
            Verdict::Undecided
        };
        let is_decided = is_done || self.payload.len() > self.bytes_max;
        match verdict {
            Verdict::Undecided if is_decided => Verdict::Served,
            verdict => verdict,
        }
    }

    /// Returns the verdict after the engine has closed the connection.
    fn at_end(&self) -> Verdict {
        if self.meter.ends_at_close() && self.events.is_none() {
            verdict_of_whole(&self.payload)
        } else {
            Verdict::Served
        }
    }
}
