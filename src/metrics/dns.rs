//! Counters of `MoRI-IO` name look-ups, with the metric names of pd-sidecar.

use std::fmt::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// Counters of look-ups of `MoRI-IO` host names. A round is one periodic look-up of all names. The
/// look-ups at the start do not count as a round, but their failures are counted.
#[derive(Debug, Default)]
pub struct DnsCounters {
    reresolved: AtomicU64,
    changed: AtomicU64,
    failed: AtomicU64,
}

impl DnsCounters {
    /// Counts a round of look-ups, in which all `MoRI-IO` host names are resolved again.
    pub fn reresolved(&self) {
        self.reresolved.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a round of look-ups in which at least one address has changed.
    pub fn changed(&self) {
        self.changed.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a look-up that failed or timed out.
    pub fn failed(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the numbers of rounds, of rounds with a changed address, and of failed look-ups.
    #[must_use]
    pub fn values(&self) -> [u64; 3] {
        [&self.reresolved, &self.changed, &self.failed].map(|count| count.load(Ordering::Relaxed))
    }
}

/// Collector that adds the counters of `MoRI-IO` name look-ups to the exposition.
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
