//! Counters of `MoRI-IO` name look-ups, with the metric names of pd-sidecar.

use std::fmt::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// Counters of name look-ups. Rounds and changes are counted after the start only.
#[derive(Debug, Default)]
pub struct DnsCounters {
    reresolved: AtomicU64,
    changed: AtomicU64,
    failed: AtomicU64,
}

impl DnsCounters {
    /// Counts the start of a round of look-ups.
    pub fn reresolved(&self) {
        self.reresolved.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a round whose addresses differ from the previous ones.
    pub fn changed(&self) {
        self.changed.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a name that did not resolve.
    pub fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the number of rounds, changes and failures.
    #[must_use]
    pub fn values(&self) -> [u64; 3] {
        [&self.reresolved, &self.changed, &self.failed].map(|count| count.load(Ordering::Relaxed))
    }
}

/// Adds these counters to the exposition.
#[derive(Debug)]
pub(super) struct DnsScrape(pub(super) Arc<DnsCounters>);

impl Collector for DnsScrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let [reresolved, changed, failed] = self.0.values();
        let rows = [
            (
                "moriio_dns_reresolve",
                "Rounds of name look-ups of MoRI-IO hosts after the start",
                reresolved,
            ),
            (
                "moriio_dns_ip_changed",
                "Rounds of name look-ups that returned different addresses",
                changed,
            ),
            (
                "moriio_dns_lookup_failures",
                "Name look-ups of MoRI-IO hosts that failed",
                failed,
            ),
        ];
        for (name, help, value) in rows {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            metric.encode_counter::<NoLabelSet, u64, u64>(&value, None)?;
        }
        Ok(())
    }
}
