//! Rings that pass finished spans from the shards to the exporter: wait-free and bounded, like
//! those of the access log.

use super::span::Span;
use crate::limits::TRACE_RING_RECORDS;

/// The sending side of the ring through which one shard passes spans to the exporter.
#[derive(Debug)]
pub struct TraceRing {
    producer: rtrb::Producer<Vec<Span>>,
}

impl TraceRing {
    /// Queues one record without blocking: the spans of a request, or of a leg that ran in its own
    /// task. Returns the number of spans lost because the ring was full.
    pub fn push(&mut self, spans: Vec<Span>) -> usize {
        match self.producer.push(spans) {
            Ok(()) => 0,
            Err(rtrb::PushError::Full(spans)) => spans.len(),
        }
    }
}

/// The receiving sides of all shards' rings.
#[derive(Debug)]
pub struct TraceRings {
    consumers: Vec<rtrb::Consumer<Vec<Span>>>,
    /// Index in `consumers`, modulo its length, of the ring that the next [`TraceRings::take`]
    /// reads first. It advances with every call, so that no ring is always last.
    first: usize,
}

impl TraceRings {
    /// Removes spans from the rings and returns them. Whole records are read until there are
    /// `spans_max` spans or more, or all rings are empty.
    pub fn take(&mut self, spans_max: usize) -> Vec<Span> {
        let mut spans = Vec::new();
        let count = self.consumers.len();
        for turn in 0..count {
            let consumer = &mut self.consumers[(self.first + turn) % count];
            while spans.len() < spans_max
                && let Ok(mut record) = consumer.pop()
            {
                spans.append(&mut record);
            }
        }
        self.first = self.first.wrapping_add(1);
        spans
    }
}

/// Creates one ring for each of `shards` shards. Returns the sending sides, one per shard, and the
/// receiving sides.
#[must_use]
pub fn rings(shards: usize) -> (Vec<TraceRing>, TraceRings) {
    let (producers, consumers) = (0..shards)
        .map(|_| rtrb::RingBuffer::new(TRACE_RING_RECORDS))
        .map(|(producer, consumer)| (TraceRing { producer }, consumer))
        .unzip();
    let first = 0;
    (producers, TraceRings { consumers, first })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::Kind;

    fn spans(count: usize) -> Vec<Span> {
        let span = |span_id| Span {
            trace_id: 1,
            span_id,
            parent_id: 0,
            name: "a".into(),
            kind: Kind::Internal,
            begun_ns: 0,
            ended_ns: 1,
            attributes: Vec::new(),
            error: None,
        };
        (0..count as u64).map(span).collect()
    }

    #[test]
    fn a_full_ring_returns_the_number_of_lost_spans() {
        let (mut ends, mut others) = rings(2);
        for _ in 0..TRACE_RING_RECORDS {
            assert_eq!(ends[0].push(spans(2)), 0);
        }
        assert_eq!(ends[0].push(spans(3)), 3);
        assert_eq!(ends[1].push(spans(1)), 0);
        let mut taken = 0;
        loop {
            let some = others.take(5);
            if some.is_empty() {
                break;
            }
            assert!(some.len() <= 6);
            taken += some.len();
        }
        assert_eq!(taken, 2 * TRACE_RING_RECORDS + 1);
    }
}
