//! The configuration.
//!
//! A [`RawConfig`] contains the values as written. [`check()`] turns it into a [`Config`], or
//! returns all problems together. A `Config` is immutable and contains values only; the modules
//! that use it do not depend on flags. This module reads no environment variables, files or
//! sockets: the command line passes everything in.

mod allowlist;
mod check;
mod cores;
mod describe;
mod document;
pub mod flag_table;
mod guards;
mod nearest;
pub mod personality;
mod problem;
mod ranks;
mod raw;
mod read;
mod tls;
mod tracing;
pub mod units;
mod yaml;

use std::fmt;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

pub use allowlist::{AllowlistConfig, PoolGroup, PoolRef};
pub use check::{Checked, check};
pub use cores::{Cores, CoresError, PciAddress, Place};
pub use flag_table::Key;
pub use personality::Personality;
pub use problem::Problem;
pub use raw::{RawConfig, RawValue, Source};
pub use tls::{CIPHER_SUITES, Identity, ListenerTls, TlsConfig, TlsVersion, UpstreamTls};
pub use tracing::{OtlpConfig, OtlpProtocol, TraceExporter, TracingConfig};

use crate::api::Routes;
use crate::fleet::Target;
use crate::json::Watch;
pub use crate::pd::connector::KvConnector;
use crate::pd::connector::{Connector, connector};
pub use crate::pd::options::{ConnectorPorts, EcConnector, MoriConfig};

/// The complete, checked configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The listening addresses for clients; never empty.
    pub listeners: Vec<Listener>,
    /// The engines that serve requests; never empty.
    pub pools: Vec<PoolConfig>,
    /// The requests that the proxy inspects or responds to itself.
    pub routes: &'static Routes,
    /// The form of the error responses that the proxy generates.
    pub errors: ErrorStyle,
    /// Address of this pod (`POD_IP`), as other pods write it in routing header fields; `None` if
    /// it is not known.
    pub pod_ip: Option<String>,
    /// Prefill/decode settings.
    pub pd: PdConfig,
    /// TLS settings.
    pub tls: TlsConfig,
    /// Targets that requests may name; `None` allows any.
    pub allowlist: Option<AllowlistConfig>,
    /// OpenTelemetry tracing; `None` is off.
    pub tracing: Option<TracingConfig>,
    /// Additional server of `/metrics`, besides the admin server; `None` is off.
    pub metrics: Option<MetricsConfig>,
    /// Time limits.
    pub timeouts: Timeouts,
    /// Settings of pooled connections to engines.
    pub upstream: UpstreamConfig,
    /// Size limits of request bodies.
    pub limits: BodyLimits,
    /// CPUs to run shards on.
    pub cores: Cores,
    /// Time for which a shard polls for events after the last one before it sleeps; `None` sleeps
    /// immediately.
    pub busy_poll: Option<Duration>,
    /// The admin server; `None` is off.
    pub admin: Option<AdminConfig>,
    /// Log settings.
    pub log: LogConfig,
    /// Drain settings.
    pub drain: DrainConfig,
}

/// A listening address for clients, and the engines that serve its requests. The sidecar has one
/// per data-parallel rank, in rank order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// The address.
    pub address: ListenAddress,
    /// Index of the pool in [`Config::pools`].
    pub pool: usize,
}

/// A set of engines of one role. A data-parallel rank of the sidecar is one listener and one pool
/// of one decoder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Locations of the engines.
    pub endpoints: Vec<Target>,
}

/// The form of the error responses that the proxy generates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorStyle {
    /// The error is the response object: `{"object":"error","message":...}`, as in pd-sidecar.
    PdSidecar,
    /// The error is the member `error` of the response object, as in the API of OpenAI.
    OpenAi,
}

/// The address a listener binds to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ListenAddress {
    /// All IPv6 and IPv4 addresses with one socket, or all IPv4 addresses if IPv6 is disabled.
    DualStack(u16),
    /// A single address.
    Address(SocketAddr),
}

impl ListenAddress {
    /// Returns the port that the listener binds to.
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

/// The admin server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdminConfig {
    /// Its address.
    pub address: SocketAddr,
    /// Whether another port is used if the one of `address` is taken, because it is the default.
    /// Two sidecars on one host are normal.
    pub may_move: bool,
}

/// The additional server of `/metrics`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Its address.
    pub address: SocketAddr,
    /// Directory with `tls.crt` and `tls.key` (PEM); `None` serves plain text.
    pub cert_dir: Option<PathBuf>,
    /// Whether metrics are also shown under pd-sidecar's names.
    pub shows_pd_sidecar: bool,
}

/// Prefill/decode settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PdConfig {
    /// Protocol for passing the KV cache from prefill to decode.
    pub kv_connector: KvConnector,
    /// Protocol for passing the output of encoders to the other legs; `None` disables encoders.
    pub encoder: Option<EcConnector>,
    /// Ports on which engines listen in addition to their HTTP port: those of bootstrap servers and
    /// P2P tiers.
    pub ports: ConnectorPorts,
    /// Whether the engine that computes a prompt may be instructed to pull a cached prefix from a
    /// peer named in the request (`nixlv2` only).
    pub p2p_pull: bool,
    /// Whether clients may ask for a speculative prefill after a chat turn.
    pub speculative_prefill: bool,
    /// `MoRI-IO` settings.
    pub mori: MoriConfig,
    /// Number of data-parallel ranks of ATOM engines.
    pub atom_dp_size: u32,
    /// Maximum number of tokens that each request of a chunked decode generates; `None` decodes
    /// everything in one request.
    pub decode_chunk_tokens: Option<u32>,
    /// Action after a failed prefill.
    pub on_prefill_failure: OnPrefillFailure,
    /// Whether transfer parameters sent by clients are passed to engines
    /// (`docs/engines.md#client-supplied-parameters`).
    pub trust_client_kv: bool,
    /// Whether the prefiller is made to free KV cache that no decoder will fetch
    /// (`docs/stranded-kv.md`).
    pub release_stranded_kv: bool,
    /// Whether a random one of the prefill targets named by a request is chosen instead of the
    /// first.
    pub prefiller_sampling: bool,
    /// Maximum number of retries, per request, of a prefill whose connection fails or that returns
    /// 502, 503 or 504.
    pub prefill_retries_max: u32,
    /// Pause before each prefill retry.
    pub prefill_retry_backoff: Duration,
    /// Time limit for one prefill attempt, from connecting to the end of the response; `None` is
    /// off.
    pub prefill_timeout: Option<Duration>,
    /// Action when there is no usable handoff: the prefill response has none, or it is malformed or
    /// too old.
    pub on_missing_kv: OnMissingKv,
    /// Maximum age at which a handoff is still sent to the decoder, counted from the prefill
    /// response's head (`docs/engines.md#handoffs`).
    pub handoff_age_max: Duration,
    /// Whether the client receives generic error messages instead of those of prefillers and
    /// encoders.
    pub hide_prefill_errors: bool,
    /// Action when a decoder could not load the KV cache (it responds with 500 to a request with a
    /// handoff).
    pub on_decode_kv_error: OnDecodeKvError,
    /// Maximum size in bytes of a response body that the proxy reads instead of relaying it: of
    /// encode and bootstrap responses, of single decode chunks, and of the kept parts of prefill
    /// responses. In decode-first order,
    /// a longer decode response is no longer withheld.
    pub prefill_response_bytes_max: usize,
    /// Whether a handoff is withheld if its block ids have a form that the decoder's version does
    /// not take. Engines are asked for their versions only then.
    pub check_handoff_versions: bool,
}

impl PdConfig {
    /// Returns the members of request bodies that must not pass from a client to an engine: none if
    /// `trust_client_kv` is set.
    #[must_use]
    pub fn owned(&self) -> Watch {
        if self.trust_client_kv {
            &[]
        } else {
            self.connector().rules().client_owned
        }
    }

    /// Returns whether a handoff can depend on the versions of the engines.
    #[must_use]
    pub fn asks_versions(&self) -> bool {
        self.check_handoff_versions && self.connector().rules().blocks_matter
    }

    /// Returns the connector that the settings select.
    #[must_use]
    pub fn connector(&self) -> &'static dyn Connector {
        connector(self.kv_connector, &self.mori)
    }
}

/// Action when there is no usable handoff: the prefill response has none, or it is malformed or too
/// old.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnMissingKv {
    /// Without a usable handoff, the local decoder processes the prompt itself.
    Decode,
    /// Without a usable handoff, the client receives an error.
    Error,
}

/// Action after a failed prefill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnPrefillFailure {
    /// After a failed prefill, the client receives the error.
    Error,
    /// After a failed prefill, the local decoder processes the prompt itself.
    Decode,
}

/// Action when a decoder could not load the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDecodeKvError {
    /// If the KV cache could not be loaded, decode is repeated once, without the handoff.
    Recompute,
    /// If the KV cache could not be loaded, the client receives the decoder's error.
    Error,
}

/// Time limits; `None` is off.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Time limit for resolving an engine's name, and for connecting to each of its addresses,
    /// including the TLS handshake.
    pub connect: Option<Duration>,
    /// Time limit for receiving a complete request head, from its first byte, and for a client's
    /// TLS handshake.
    pub head: Option<Duration>,
    /// Longest time to wait for more bytes of a client's request body.
    pub body: Option<Duration>,
    /// Longest time a client may go without accepting response data.
    pub client_stall: Option<Duration>,
    /// Idle time between two requests after which a client connection is closed.
    pub keepalive: Option<Duration>,
    /// Longest time from the end of a request sent to an engine to the engine's response head.
    pub first_byte: Option<Duration>,
}

/// Settings of pooled connections to engines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UpstreamConfig {
    /// Idle time after which a pooled connection is closed. `--upstream-idle-timeout off` results
    /// in `units::DURATION_MAX`, one year.
    pub idle: Duration,
    /// Maximum number of idle connections per engine rank in each shard.
    pub idle_per_rank_max: usize,
}

/// Limits on what clients can use: sizes in bytes, and connections.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BodyLimits {
    /// Maximum size of one request body, whether it is buffered or forwarded as it arrives.
    pub body_bytes_max: u64,
    /// Maximum total size of all request bodies buffered by the process at the same time; at least
    /// `body_bytes_max`.
    pub body_budget_bytes: u64,
    /// Maximum number of client connections; `None` derives it from the limit on open files.
    pub client_connections_max: Option<usize>,
}

/// Settings of the control log and the access log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// Least severe level of messages in the control log.
    pub level: LogLevel,
    /// Format of the control log on stderr.
    pub format: LogFormat,
    /// Destination of the access log.
    pub access: AccessLog,
    /// File to which the control log is also written; `None` writes it to stderr only.
    pub file: Option<LogFile>,
}

/// A log file, which is renamed and replaced by a new one when it reaches a size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFile {
    /// Path of the file.
    pub path: PathBuf,
    /// Size in bytes at which it is renamed.
    pub bytes_max: u64,
}

/// Level of a control log message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    /// Messages about failures.
    Error,
    /// Messages about suspicious conditions.
    Warn,
    /// Messages about changes of state.
    Info,
    /// Messages with details for operators.
    Debug,
    /// Messages with details for developers.
    Trace,
}

/// Format of the control log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Log messages are human-readable lines.
    Text,
    /// Log messages are JSON objects, one per line.
    Json,
}

/// Destination of the access log, which has one line per request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AccessLog {
    /// No access log is written.
    Off,
    /// The access log is written to standard output.
    Stdout,
    /// The access log is written to standard error.
    Stderr,
    /// The access log is appended to the file at this path.
    File(PathBuf),
}

/// Behaviour after SIGTERM or SIGINT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DrainConfig {
    /// Longest time to wait for running requests after accepting has stopped; `None` waits until
    /// all are complete.
    pub timeout: Option<Duration>,
    /// Time after the signal for which new connections are still accepted.
    pub settle: Duration,
}
