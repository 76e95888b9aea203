//! Integration tests: the real binary on real sockets, between a raw client and mock engines.
//!
//! There is one module per subject. A test whose name starts with an identifier (`n1_...`) covers
//! the row of that name in the conformance table, which is derived from pd-sidecar's own test suite
//! (`docs/pd-sidecar.md#conformance`).

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "test helpers panic on failure, as tests do"
)]

mod abort;
mod allowlist;
mod apis;
mod bodies;
mod certificates;
mod check_config;
mod chunked;
mod cli;
mod client;
mod deploy;
mod driver;
mod encoder;
mod ending;
mod experts;
mod faults;
mod forms;
mod framing;
mod golden;
mod handoff;
mod harness;
mod harness_more;
mod headers;
mod incidents;
#[cfg(feature = "k8s")]
mod kube;
mod kv;
mod legs;
mod lifecycle;
mod limits;
mod llm_d;
mod memory;
mod mooncake;
mod mori;
mod night;
mod nixlv2;
mod offloading;
mod old_connectors;
#[cfg(feature = "otlp")]
mod otlp;
#[cfg(feature = "k8s")]
mod pool;
mod push;
mod ranks;
mod rewriter;
mod routing;
mod seccomp;
mod sglang;
mod shards;
mod shared_storage;
mod signals;
mod soak;
mod splice;
mod stranded;
mod tls;
mod trace;
mod transport;
mod unix;
mod usage;
mod warm_up;
