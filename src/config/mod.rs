//! The checked configuration.
//!
//! `RawConfig` is what was written, `check` turns it into a `Config` or into all of its problems at
//! once. A `Config` is immutable and holds values only: nothing downstream knows a flag. Reads no
//! environment, no file and no socket; the command line hands everything in.

mod allowlist;
mod check;
mod cores;
mod describe;
mod document;
pub mod keys;
mod nearest;
mod ranks;
mod raw;
pub mod removed;
mod tls;
mod tracing;
pub mod units;
mod yaml;

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

pub use allowlist::{AllowlistConfig, PoolGroup, PoolRef};
pub use check::{Checked, Problem, check};
pub use cores::{Cores, CoresError, PciAddress, Place};
pub use keys::Key;
pub use raw::{RawConfig, RawValue, Source};
pub use tls::{Identity, ListenerTls, TlsConfig, UpstreamTls};
pub use tracing::{OtlpConfig, OtlpProtocol, TraceExporter, TracingConfig};

use crate::fleet::Target;
use crate::json::Watch;
pub use crate::pd::options::{ConnectorPorts, EcConnector, KvConnector, MoriConfig};
use crate::pd::request::owned;

/// Everything the program was told, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// One entry per data-parallel rank, in rank order; never empty.
    pub ranks: Vec<RankConfig>,
    /// Address of this pod as others name it; part of the rank lookup key.
    pub pod_ip: Option<String>,
    /// Prefill/decode.
    pub pd: PdConfig,
    /// Encryption.
    pub tls: TlsConfig,
    /// Which engines requests may name; `None` is any.
    pub allowlist: Option<AllowlistConfig>,
    /// OpenTelemetry; `None` is off.
    pub tracing: Option<TracingConfig>,
    /// Where metrics are served besides the admin server.
    pub metrics: Option<SocketAddr>,
    /// Bounds on time.
    pub timeouts: Timeouts,
    /// Connections to engines.
    pub upstream: UpstreamConfig,
    /// Bounds on held bodies.
    pub limits: BodyLimits,
    /// Where to run.
    pub cores: Cores,
    /// How long a shard keeps looking for events after the last one before it sleeps.
    pub busy_poll: Option<Duration>,
    /// Where the admin server listens; `None` is off.
    pub admin: Option<SocketAddr>,
    /// Logs.
    pub log: LogConfig,
    /// What happens on SIGTERM.
    pub drain: DrainConfig,
}

/// One local rank: where clients reach it and where its decoder is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankConfig {
    /// Rank number, from 0.
    pub rank: u32,
    /// Where clients connect.
    pub listen: ListenAddress,
    /// Its decoder.
    pub decoder: Target,
}

/// Where a listener binds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ListenAddress {
    /// All addresses, IPv6 and IPv4 through one socket; IPv4 only where IPv6 is disabled.
    DualStack(u16),
    /// This address only.
    Address(SocketAddr),
}

impl ListenAddress {
    /// The port.
    #[must_use]
    pub const fn port(self) -> u16 {
        match self {
            Self::DualStack(port) => port,
            Self::Address(address) => address.port(),
        }
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DualStack(port) => {
                write!(f, "{}", SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port)))
            }
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

/// Prefill/decode settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PdConfig {
    /// How KV cache is handed over.
    pub connector: KvConnector,
    /// How an encoder's output is handed over; `None`: encoders are not used.
    pub encoder: Option<EcConnector>,
    /// Ports the connectors use.
    pub ports: ConnectorPorts,
    /// Whether nixlv2 prefillers may be told to pull a cached prefix from a peer.
    pub p2p_pull: bool,
    /// `MoRI-IO`.
    pub mori: MoriConfig,
    /// Tokens decoded per request to the engine in chunked decode; `None`: all in one.
    pub decode_chunk_tokens: Option<u32>,
    /// What a failed prefill leads to.
    pub on_prefill_failure: OnPrefillFailure,
    /// Whether a client's own transfer parameters reach engines.
    pub trust_client_kv: bool,
    /// Whether the prefiller is asked to give up KV cache that nobody will fetch.
    pub release_stranded_kv: bool,
    /// Random prefill candidate instead of the first.
    pub prefiller_sampling: bool,
    /// Repeats of a prefill that answered 502, 503 or 504.
    pub prefill_retries_max: u32,
    /// Wait between prefill attempts.
    pub prefill_retry_backoff: Duration,
    /// Total bound of one prefill attempt.
    pub prefill_timeout: Option<Duration>,
    /// What a prefill answer without a usable handoff leads to.
    pub on_missing_kv: OnMissingKv,
    /// Oldest handoff that is still used.
    pub handoff_age_max: Duration,
    /// Our own text instead of the prefiller's for a failed prefill.
    pub hide_prefill_errors: bool,
    /// What a decoder that could not load the KV cache leads to.
    pub on_decode_kv_error: OnDecodeKvError,
    /// Largest prefill answer in bytes.
    pub prefill_response_bytes_max: usize,
    /// Whether a flat list of block ids is a valid handoff.
    pub allow_flat_blocks: bool,
}

impl PdConfig {
    /// The members of a body that clients must not write.
    #[must_use]
    pub const fn owned(&self) -> Watch {
        if self.trust_client_kv {
            &[]
        } else {
            owned(self.connector)
        }
    }
}

/// What a prefill answer without a usable handoff leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnMissingKv {
    /// The decoder computes the prompt itself.
    Decode,
    /// The client gets an error.
    Error,
}

/// What a failed prefill leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnPrefillFailure {
    /// The client gets the prefiller's error.
    Error,
    /// The decoder computes the prompt itself.
    Decode,
}

/// What a decoder that could not load the KV cache leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDecodeKvError {
    /// One more decode, without the handoff.
    Recompute,
    /// The client gets the error.
    Error,
}

/// Bounds on time; `None` is off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Connecting to an engine.
    pub connect: Option<Duration>,
    /// A client's request head, in total.
    pub head: Option<Duration>,
    /// A client's upload without progress.
    pub body: Option<Duration>,
    /// A client that does not take its answer.
    pub client_stall: Option<Duration>,
    /// An idle client connection.
    pub keepalive: Option<Duration>,
    /// An engine that is silent before its first answer byte.
    pub first_byte: Option<Duration>,
}

/// Connections to engines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamConfig {
    /// An idle connection is closed after this long; `units::DURATION_MAX` if never.
    pub idle: Duration,
    /// Idle connections kept per engine rank.
    pub idle_per_rank_max: usize,
}

/// Bounds on held bodies, in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BodyLimits {
    /// One request body.
    pub body_bytes_max: u64,
    /// All held request bodies together; at least `body_bytes_max`.
    pub body_budget_bytes: u64,
}

/// Logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// Least severe level written.
    pub level: LogLevel,
    /// Shape of the control log on stderr.
    pub format: LogFormat,
    /// Where one line per request goes.
    pub access: AccessLog,
}

/// Severity of control log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Something failed.
    Error,
    /// Something looks wrong.
    Warn,
    /// Something changed.
    Info,
    /// Details for an operator who is looking.
    Debug,
    /// Details for a developer who is looking.
    Trace,
}

/// Shape of control log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

/// Where one line per request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessLog {
    /// Nowhere.
    Off,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// Appended to this file.
    File(PathBuf),
}

/// What happens on SIGTERM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainConfig {
    /// How long running requests may take; `None` waits for all of them.
    pub timeout: Option<Duration>,
    /// How long new connections are still accepted.
    pub settle: Duration,
}
