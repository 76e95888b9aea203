//! ringside: an HTTP/1.1 data-plane proxy for LLM inference engines.
//!
//! The modules are declared in dependency order: a module may use only the modules above it
//! (`tests/tidy.rs` checks that). `ARCHITECTURE.md` has the picture. Blank lines keep the order:
//! the formatter sorts what stands together.

pub mod limits;
pub mod span;

// Pure bytes: no socket, no clock, no task.
pub mod h1;
pub mod json;

// Pure decisions: no socket, no clock, no task.
pub mod fleet;

pub mod pd;

pub mod config;

// The kernel, clocks and tasks begin here.
pub mod sys;

pub mod net;

// What went wrong and what was counted.
pub mod fault;

pub mod metrics;

pub mod trace;

// The way of a request.
pub mod proxy;

// Beside it: processes, threads, signals, the admin server, the command line.
pub mod admin;
pub mod cli;

pub mod control;
