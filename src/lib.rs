//! ringside: an HTTP/1.1 data-plane proxy for LLM inference engines.
//!
//! The modules are declared in dependency order: a module may use only the modules above it
//! (`tests/tidy.rs` checks that). `ARCHITECTURE.md` has the picture.

pub mod limits;
pub mod span;
// Pure bytes: no socket, no clock, no task.
pub mod h1;
pub mod json;
// Sockets; knows no HTTP.
pub mod net;

// Blank lines keep the dependency order: the formatter sorts what stands together.
pub mod config;

// The kernel, clocks and tasks begin here.
pub mod sys;

pub mod metrics;

pub mod admin;
pub mod cli;
