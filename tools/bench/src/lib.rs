//! Measures what a proxy adds to the latency of an LLM engine, and how far to trust the figure.
//!
//! Modules in dependency order: a module uses only those above it.

pub mod limits;

pub mod units;

pub mod http;
pub mod schedule;
pub mod sse;
pub mod stats;

pub mod answer;

pub mod precision;
pub mod request;
pub mod run;
pub mod socket;

pub mod client;
