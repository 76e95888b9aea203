//! Metrics of the span export.

use std::fmt::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::out::Out;
use super::shard::ShardMetrics;

/// Numbers of spans that were exported and that were lost in an export.
#[derive(Debug, Default)]
pub struct TraceCounters {
    exported: AtomicU64,
    failed: AtomicU64,
}

impl TraceCounters {
    /// Counts spans that the destination accepted.
    pub fn exported(&self, spans: u64) {
        self.exported.fetch_add(spans, Ordering::Relaxed);
    }

    /// Counts spans whose export failed or that the destination rejected.
    pub fn failed(&self, spans: u64) {
        self.failed.fetch_add(spans, Ordering::Relaxed);
    }
}

/// Collector that adds the exporter's counters, and the number of spans that the shards dropped, to
/// the exposition.
#[derive(Debug)]
pub(super) struct TraceScrape {
    pub(super) counters: Arc<TraceCounters>,
    pub(super) shards: Vec<Arc<ShardMetrics>>,
}

impl Collector for TraceScrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut out = Out(encoder);
        let full = self.shards.iter().map(|shard| shard.trace_dropped.get());
        let failed = self.counters.failed.load(Ordering::Relaxed);
        out.counter(
            "ringside_trace_exported",
            "Spans accepted by the exporter's destination",
            self.counters.exported.load(Ordering::Relaxed),
        )?;
        out.counters(
            "ringside_trace_dropped",
            "Spans lost because their shard's ring was full or their export failed",
            [
                ([("reason", "ring_full")], full.sum()),
                ([("reason", "export_failed")], failed),
            ]
            .into_iter(),
        )
    }
}
