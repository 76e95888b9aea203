//! Metrics of the budget of kept bytes.

use std::fmt::Error;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;

use crate::budget::Budget;

/// Shows how much of the budget is used.
#[derive(Debug)]
pub struct BudgetShown(pub Arc<Budget>);

impl Collector for BudgetShown {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        for (name, help, bytes) in [
            (
                "ringside_kept_bytes",
                "Bytes kept for requests: bodies, handoffs and other responses that are not relayed",
                self.0.used(),
            ),
            (
                "ringside_kept_bytes_limit",
                "Bytes that may be kept for requests (--body-budget)",
                self.0.bytes_max(),
            ),
        ] {
            let gauge = ConstGauge::new(i64::try_from(bytes).unwrap_or(i64::MAX));
            let encoder = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            gauge.encode(encoder)?;
        }
        Ok(())
    }
}
