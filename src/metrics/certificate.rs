//! Counters of reloads of the certificate presented to clients.

use std::fmt::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// Counters of certificate reloads, written by the control plane.
#[derive(Debug, Default)]
pub struct Reloads {
    used: AtomicU64,
    failed: AtomicU64,
}

impl Reloads {
    /// Counts a change of the certificate files: a success if the new certificate `is_used`,
    /// otherwise a failure.
    pub fn record(&self, is_used: bool) {
        let counter = if is_used { &self.used } else { &self.failed };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Collector that adds the counters of certificate reloads to the exposition.
#[derive(Debug)]
pub struct ReloadsShown(pub Arc<Reloads>);

impl Collector for ReloadsShown {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut metric = encoder.encode_descriptor(
            "ringside_tls_certificate_reloads",
            "Reloads of the certificate presented to clients, by result",
            None,
            MetricType::Counter,
        )?;
        for (label, counter) in [("ok", &self.0.used), ("failed", &self.0.failed)] {
            let count = counter.load(Ordering::Relaxed);
            metric
                .encode_family(&[("result", label)])?
                .encode_counter::<NoLabelSet, u64, u64>(&count, None)?;
        }
        Ok(())
    }
}
