//! Metrics of the allowlist: its size and the state of its sources.
//!
//! Written by the control plane's thread only, and read at a scrape.

use std::fmt::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::cell::{Counter, Gauge};
use super::labels::AllowSource;
use super::out::Out;

/// Metrics of the allowlist and its sources.
#[derive(Debug, Default)]
pub struct AllowlistMetrics {
    entries: AtomicUsize,
    sources: [Source; AllowSource::ALL.len()],
}

#[derive(Debug, Default)]
struct Source {
    is_used: AtomicBool,
    is_up: AtomicBool,
    /// Time at which the source was last read successfully or reported no change, in seconds since
    /// 1970; 0 if never.
    heard: Gauge,
    failures: Counter,
}

impl AllowlistMetrics {
    /// Sets the number of distinct rules in the allowlist.
    pub fn set_entries(&self, entries: usize) {
        self.entries.store(entries, Relaxed);
    }

    /// Marks a source as configured. The exposition contains only configured sources.
    pub fn uses(&self, source: AllowSource) {
        self.sources[source.index()].is_used.store(true, Relaxed);
    }

    /// Records a successful read of a source, or a sign that it is alive and unchanged.
    pub fn heard(&self, source: AllowSource) {
        let source = &self.sources[source.index()];
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(0));
        source.heard.add(now - source.heard.get());
        source.is_up.store(true, Relaxed);
    }

    /// Counts a failed read of a source. The entries last read from it remain in effect.
    pub fn failed(&self, source: AllowSource) {
        let source = &self.sources[source.index()];
        source.failures.add(1);
        source.is_up.store(false, Relaxed);
    }
}

/// Collector that adds the metrics of the allowlist to the exposition.
#[derive(Debug)]
pub(super) struct Allowlist(pub(super) Arc<AllowlistMetrics>);

impl Collector for Allowlist {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut out = Out(encoder);
        let entries = self.0.entries.load(Relaxed);
        out.gauge(
            "ringside_allowlist_entries",
            "Distinct rules in the allowlist of targets that requests may name",
            i64::try_from(entries).unwrap_or(i64::MAX),
        )?;
        let used = || {
            let all = AllowSource::ALL.iter().zip(&self.0.sources);
            all.filter(|(_, source)| source.is_used.load(Relaxed))
                .map(|(name, source)| ([("source", name.label())], source))
        };
        out.gauges(
            "ringside_allowlist_source_up",
            "Whether the last attempt to read the source of the allowlist succeeded (1) or not (0)",
            used().map(|(labels, source)| (labels, i64::from(source.is_up.load(Relaxed)))),
        )?;
        out.gauges(
            "ringside_allowlist_source_heard_timestamp_seconds",
            "Time at which the source was last read successfully or reported no change, in seconds since 1970; 0 if never",
            used().map(|(labels, source)| (labels, source.heard.get())),
        )?;
        out.counters(
            "ringside_allowlist_source_failures",
            "Failed attempts to read the source; its previous entries were kept",
            used().map(|(labels, source)| (labels, source.failures.get())),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Registry;

    #[test]
    fn only_the_sources_in_use_are_shown() {
        let metrics = Arc::new(AllowlistMetrics::default());
        let mut registry = Registry::new(vec![], vec![], &[]);
        registry.add_allowlist(Arc::clone(&metrics));
        metrics.set_entries(7);
        metrics.uses(AllowSource::File);
        let up = |text: &str, value: u8| {
            let line = format!("ringside_allowlist_source_up{{source=\"file\"}} {value}\n");
            assert!(text.contains(&line), "{text}");
        };
        let text = registry.render();
        assert!(text.contains("ringside_allowlist_entries 7\n"), "{text}");
        assert!(text.contains("_heard_timestamp_seconds{source=\"file\"} 0\n"));
        assert!(!text.contains("source=\"pods\""), "{text}");
        up(&text, 0);
        metrics.heard(AllowSource::File);
        up(&registry.render(), 1);
        assert!(!registry.render().contains("_seconds{source=\"file\"} 0\n"));
        metrics.failed(AllowSource::File);
        up(&registry.render(), 0);
        let failures = "ringside_allowlist_source_failures_total{source=\"file\"} 1\n";
        assert!(registry.render().contains(failures));
    }
}
