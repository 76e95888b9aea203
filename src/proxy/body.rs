//! Reads a request body completely, for requests whose first leg depends on it.

use std::sync::Arc;

use super::exchange::Exchange;
use super::request::RequestBody;
use super::shard::Shard;
use crate::budget::{Budget, Reserved};
use crate::fault::Fault;
use crate::h1::{BodyMeter, Framing};
use crate::json::{Document, Scanner};
use crate::limits::{
    BODY_PROGRESS_BYTES_MIN, KEPT_STEP_BYTES, RECEIVE_LARGE_BYTES, RECEIVE_SMALL_BYTES,
};
use crate::metrics::Phase;
use crate::net::{Conn, Instant, Net, would_block};
use crate::pd::request::{self, WATCH};
use crate::upstream::{Deadline, Timeout};

/// A request body without its framing, and the positions of those of its JSON members that legs are
/// built from ([`WATCH`]).
pub(super) struct Body {
    buffer: Vec<u8>,
    /// Where the body begins in `buffer`.
    begin: usize,
    pub(super) document: Document,
    _reserved: Reserved,
}

impl Body {
    /// Returns a body without bytes or members.
    pub(super) fn empty<N: Net>(shard: &Shard<N>) -> Self {
        Self {
            buffer: Vec::new(),
            begin: 0,
            document: Document::empty(WATCH),
            _reserved: Reserved::new(&shard.budget),
        }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.begin..]
    }

    /// Returns a body that the proxy has written. Returns `None` if the budget of kept bytes
    /// is exhausted or `bytes` are not a JSON object.
    pub(super) fn own<N: Net>(shard: &Shard<N>, bytes: Vec<u8>) -> Option<Self> {
        let mut reserved = Reserved::new(&shard.budget);
        let mut scanner = Scanner::new(WATCH);
        reserved.grow_to(bytes.capacity() as u64).ok()?;
        scanner.feed(&bytes).ok()?;
        Some(Self {
            document: scanner.finish().ok()?,
            buffer: bytes,
            begin: 0,
            _reserved: reserved,
        })
    }
}

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        self.bytes()
    }
}

struct Reading {
    buffer: Vec<u8>,
    /// Where the body begins in `buffer`: after the client's head, if it arrived with it.
    begin: usize,
    scanner: Scanner,
    meter: BodyMeter,
    budget: Arc<Budget>,
    reserved: Reserved,
    bytes_max: u64,
    /// When the last `BODY_PROGRESS_BYTES_MIN` of payload were complete. Chunk extensions and
    /// trailers are not payload.
    progress_at: Instant,
    /// The bytes of payload that had arrived then.
    progress_bytes: u64,
    /// Why the body cannot be used, although its framing is intact.
    refused: Option<Fault>,
}

/// Reads and scans the request body.
///
/// # Errors
/// The body is malformed or too large, the budget of kept bytes is exhausted (`BudgetSpent`),
/// or the client disconnected or stalled.
pub(super) async fn receive<N: Net>(exchange: &mut Exchange<'_, N>) -> Result<Body, Fault> {
    exchange.enter(Phase::Upload);
    let mut reading = Reading {
        buffer: Vec::new(),
        begin: 0,
        scanner: Scanner::new(WATCH),
        meter: BodyMeter::new(exchange.request.framing),
        budget: Arc::clone(&exchange.shard.budget),
        reserved: Reserved::new(&exchange.shard.budget),
        bytes_max: exchange.shard.config.limits.body_bytes_max,
        progress_at: exchange.shard.net.now(),
        progress_bytes: 0,
        refused: None,
    };
    take_arrived(exchange, &mut reading)?;
    while !reading.meter.is_done() && reading.refused.is_none() {
        receive_more(exchange, &mut reading).await?;
    }
    exchange.request.body = RequestBody::read(reading.meter.is_done());
    exchange.stats.bytes_in += reading.body().len() as u64;
    if let Some(fault) = reading.refused {
        return Err(fault);
    }
    let body = Body {
        document: reading.scanner.finish().map_err(Fault::Json)?,
        buffer: reading.buffer,
        begin: reading.begin,
        _reserved: reading.reserved,
    };
    request::check_edited(&body.document, body.bytes()).map_err(Fault::Json)?;
    Ok(body)
}

/// Takes what has arrived with the head. If that is the whole body and the request has kept its
/// receive buffer, it stays there.
fn take_arrived<N: Net>(
    exchange: &mut Exchange<'_, N>,
    reading: &mut Reading,
) -> Result<(), Fault> {
    let framing = exchange.request.framing;
    reading.check_room(framing)?;
    let buffers = &exchange.shard.buffers;
    // The copy has the head's size: many requests may wait for their prefill.
    let mut arrived = exchange.request.take_arrived(<[u8]>::to_vec);
    let begin = exchange.request.head.len;
    let missing = |arrived: &[u8]| match framing {
        Framing::Length(length) => length - (arrived.len() - begin) as u64,
        _ => u64::MAX,
    };
    // While `100 Continue` is sent to a slow client, its disconnect is detected by reading ahead.
    let mut ahead = exchange.client.ahead.borrow_mut();
    if !ahead.is_empty() && missing(&arrived) > 0 {
        let bytes_max = usize::try_from(missing(&arrived)).unwrap_or(usize::MAX);
        let later = ahead.take(bytes_max, buffers);
        arrived.extend_from_slice(&later);
        buffers.recycle(later);
    }
    // A smaller buffer is not kept: with the head, which has been copied, it takes more memory than
    // the body. A larger one may take more of the budget.
    if missing(&arrived) == 0
        && arrived.capacity() >= RECEIVE_SMALL_BYTES
        && reading.reserved.grow_to(arrived.capacity() as u64).is_ok()
    {
        (reading.buffer, reading.begin) = (arrived, begin);
        reading.take_in_place(0);
        return Ok(());
    }
    reading.make_room(framing)?;
    let taken = reading.take(&arrived[begin..])?;
    ahead.restore(arrived, begin + taken, buffers);
    Ok(())
}

async fn receive_more<N: Net>(
    exchange: &Exchange<'_, N>,
    reading: &mut Reading,
) -> Result<(), Fault> {
    let (shard, client) = (exchange.shard, exchange.client);
    let wait = shard.config.timeouts.body;
    let deadline = Deadline::of(reading.progress_at, wait, Timeout::Client);
    client
        .until_own(shard, deadline, |cx| client.conn.poll_readable(cx))
        .await
        .or_fault(Fault::BodyTimeout)?;
    let received = match reading.meter.remaining() {
        // The length is known, so bytes are received directly into the body.
        Some(remaining) => {
            // One byte more than the rest: if it does not arrive, the socket is known to be empty.
            let rest = usize::try_from(remaining).unwrap_or(usize::MAX);
            let room = rest.saturating_add(1).min(RECEIVE_LARGE_BYTES);
            let before = reading.body().len();
            let received = client.conn.try_recv_append(&mut reading.buffer, room);
            received.map(|n| {
                if n > rest {
                    client.put_back(&reading.body()[before + rest..]);
                    reading.buffer.truncate(reading.begin + before + rest);
                }
                reading.take_in_place(before);
                (n, Ok(()))
            })
        }
        None => shard.buffers.with_small(|buffer| {
            client.conn.try_recv(buffer).map(|n| {
                let taken = reading.take(&buffer[..n]);
                if let Ok(taken) = taken
                    && taken < n
                {
                    client.put_back(&buffer[taken..n]);
                }
                (n, taken.map(|_| ()))
            })
        }),
    };
    // Fewer bytes are no progress, because what has arrived is kept until the body is complete. A
    // shorter body or rest has the whole time.
    if reading.meter.payload_bytes() >= reading.progress_bytes + BODY_PROGRESS_BYTES_MIN {
        reading.progress_bytes = reading.meter.payload_bytes();
        reading.progress_at = shard.net.now();
    }
    match received {
        Ok((0, _)) => Err(client.record_gone()),
        Ok((_, taken)) => taken,
        Err(error) if would_block(&error) => Ok(()),
        Err(_) => Err(client.record_gone()),
    }
}

impl Reading {
    fn body(&self) -> &[u8] {
        &self.buffer[self.begin..]
    }

    /// Checks that the budget has room for the length that `Content-Length` announces. It is
    /// reserved as it arrives: what a client announces takes no memory, so it must not keep others
    /// from theirs.
    fn check_room(&self, framing: Framing) -> Result<(), Fault> {
        match framing {
            Framing::Length(length) if !self.budget.has_room(length) => Err(Fault::BudgetSpent),
            _ => Ok(()),
        }
    }

    /// Allocates the buffer for the length that `Content-Length` announces, and one byte more.
    fn make_room(&mut self, framing: Framing) -> Result<(), Fault> {
        let Framing::Length(length) = framing else {
            return Ok(());
        };
        let length = usize::try_from(length).map_err(|_| Fault::BodyTooLarge)?;
        self.buffer
            .try_reserve_exact(length.saturating_add(1))
            .map_err(|_| Fault::BudgetSpent)
    }

    /// Decodes received bytes, including their framing, and appends the payload to the body.
    /// Returns how many of them belong to this body; the rest belong to the next request.
    ///
    /// # Errors
    /// The framing is malformed. Any other defect is left in `refused`.
    fn take(&mut self, framed: &[u8]) -> Result<usize, Fault> {
        let before = self.body().len();
        let refused = &mut self.refused;
        let (bytes, reserved, bytes_max) = (&mut self.buffer, &mut self.reserved, self.bytes_max);
        let taken = self.meter.decode(framed, |span| {
            if refused.is_none() {
                *refused = append(bytes, reserved, bytes_max, span.of(framed)).err();
            }
        });
        let taken = taken.map_err(|_| Fault::Chunk)?;
        self.scan(before);
        Ok(taken)
    }

    /// Counts and scans the body bytes that have just been received: those from offset `before` of
    /// the body on. They were received directly into that buffer, because a body with a known
    /// length has no framing to remove.
    fn take_in_place(&mut self, before: usize) {
        let new = self.body().len() - before;
        let counted = self.meter.skip(new as u64);
        debug_assert!(counted, "more bytes were received than remained");
        let (len, room) = (self.buffer.len(), self.buffer.capacity());
        let wanted = len.next_multiple_of(KEPT_STEP_BYTES).min(room.max(len));
        if let Err(spent) = self.reserved.grow_to(wanted as u64) {
            self.refused = self.refused.or(Some(spent.into()));
        }
        self.scan(before);
    }

    fn scan(&mut self, before: usize) {
        let new = &self.buffer[self.begin + before..];
        if let Err(error) = self.scanner.feed(new) {
            self.refused = self.refused.or(Some(Fault::Json(error)));
        }
    }
}

/// Appends `piece` to the body. Fails if the body becomes longer than `bytes_max` or the budget of
/// kept bytes does not allow the larger buffer.
fn append(
    bytes: &mut Vec<u8>,
    reserved: &mut Reserved,
    bytes_max: u64,
    piece: &[u8],
) -> Result<(), Fault> {
    let wanted = bytes.len() + piece.len();
    if wanted as u64 > bytes_max {
        return Err(Fault::BodyTooLarge);
    }
    if wanted > bytes.capacity() {
        // Doubling keeps the total cost of copying linear. The reservation covers the capacity, not
        // the length.
        let capacity = wanted
            .max(bytes.capacity() * 2)
            .next_multiple_of(KEPT_STEP_BYTES);
        // The piece may fit even if a larger buffer does not.
        let capacity = match reserved.grow_to(capacity as u64) {
            Ok(()) => capacity,
            Err(_) => wanted,
        };
        reserved.grow_to(capacity as u64)?;
        bytes
            .try_reserve_exact(capacity - bytes.len())
            .map_err(|_| Fault::BudgetSpent)?;
    }
    // The room for an announced length is not reserved yet.
    reserved.grow_to(wanted as u64)?;
    bytes.extend_from_slice(piece);
    Ok(())
}
