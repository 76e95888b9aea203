//! ringside: an HTTP/1.1 data-plane proxy for LLM inference engines.
//!
//! The modules are declared in dependency order: a module may use only the modules above it
//! (`tests/tidy.rs` checks this). `ARCHITECTURE.md` gives the overview. The blank lines between the
//! declarations preserve the order: rustfmt sorts adjacent `mod` items.

pub mod limits;
pub mod span;
#[cfg(test)]
mod work;

pub mod budget;

// Pure functions over bytes: no sockets, clocks or tasks.
mod base64;

pub mod h1;
pub mod json;

// Pure decisions: no sockets, clocks or tasks.
pub mod fleet;

pub mod api;

pub mod policy;

pub mod pd;

pub mod config;

// System calls, clocks and tasks are used only from here on.
pub mod sys;

pub mod net;

// Failures, counters and spans.
pub mod fault;

pub mod metrics;

pub mod trace;

// The request path.
pub mod upstream;

pub mod proxy;

// Outside the request path: threads, signals, the admin server and the command line.
pub mod admin;
pub mod cli;

pub mod control;
