//! Benchmarks for a proxy in front of LLM engines.
//!
//! `overhead` measures the latency that a proxy adds, with confidence intervals. `soak` checks over
//! hours that a proxy relays correctly and that its process does not grow. `neighbours` measures
//! how much several proxies delay quiet streams while other clients of the same proxy load it.
//!
//! Modules are in dependency order: a module uses only those above it.

pub mod limits;

pub mod exit;
pub mod units;

pub mod http;
pub mod schedule;
pub mod sse;
pub mod stats;

pub mod response;

pub mod socket;

pub mod wire;

pub mod busy;
pub mod precision;
pub mod request;
pub mod run;

pub mod cli;
pub mod client;

pub mod range;
pub mod report;
pub mod svg;

pub mod table;

pub mod json;
pub mod models;
pub mod page;
mod progress;

pub mod overhead;

pub mod soak;

pub mod neighbours;
