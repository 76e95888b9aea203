//! The metric of the last reload of the configuration.

use std::fmt::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;

/// Whether the configuration could be read when it was last read again.
#[derive(Debug, Default)]
pub struct ReloadResult {
    has_failed: AtomicBool,
}

impl ReloadResult {
    /// Records whether a reload was successful.
    pub fn record(&self, is_successful: bool) {
        self.has_failed.store(!is_successful, Ordering::Relaxed);
    }
}

/// Collector that adds the result of the last reload to the exposition.
#[derive(Debug)]
pub struct ReloadResultShown(pub Arc<ReloadResult>);

impl Collector for ReloadResultShown {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let gauge = ConstGauge::new(i64::from(!self.0.has_failed.load(Ordering::Relaxed)));
        let encoder = encoder.encode_descriptor(
            "ringside_config_last_reload_successful",
            "Whether the configuration was valid when it was last read",
            None,
            gauge.metric_type(),
        )?;
        gauge.encode(encoder)
    }
}
