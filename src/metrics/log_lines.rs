//! The metric of lost lines of the control log.

use std::fmt::Error;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;

/// Shows how many lines of the control log were lost; the function returns their number.
#[derive(Debug)]
pub struct LogLinesLost(pub fn() -> u64);

impl Collector for LogLinesLost {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let counter = ConstCounter::new((self.0)());
        let encoder = encoder.encode_descriptor(
            "ringside_log_lines_lost",
            "Lines of the control log that were lost because it could not be written fast enough",
            None,
            counter.metric_type(),
        )?;
        counter.encode(encoder)
    }
}
