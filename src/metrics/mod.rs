//! Metrics and the access log.
//!
//! Each shard has its own [`ShardMetrics`] and is its only writer; the [`Registry`] sums them at
//! each scrape. No label value comes from a request, so the number of series is bounded.

pub mod access_log;
mod allowlist;
mod budget;
mod cell;
mod certificate;
mod config_reload;
mod dns;
mod exposition;
mod labels;
mod log_lines;
mod out;
mod pd_sidecar;
mod render;
mod shard;
mod traces;

pub(crate) use access_log::push_text;
pub use access_log::{EndedAt, EndedBy, Inline, Record};
pub use allowlist::AllowlistMetrics;
pub use budget::BudgetShown;
pub use certificate::{Reloads, ReloadsShown};
pub use config_reload::{ReloadResult, ReloadResultShown};
pub use dns::DnsCounters;
pub use exposition::Exposition;
pub use labels::{
    AllowSource, CodeClass, Direction, Disagg, Named, Phase, Push, Route, RoutingDoubt, Stranded,
    TlsPeer, WarmUp,
};
pub use log_lines::LogLinesLost;
pub use render::Registry;
pub use shard::ShardMetrics;
pub use traces::TraceCounters;
