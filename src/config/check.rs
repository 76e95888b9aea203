//! Checks a `RawConfig` and creates the `Config`, or reports all of its problems together.
//!
//! The reader does not stop at a problem: it records the problem and continues with a placeholder
//! value. Placeholders are never used, because a `RawConfig` with problems does not result in a
//! `Config`.

mod allowlist;
mod mori;
mod pd;
mod spans;
mod tls;
mod values;

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::reader::Reader;
use super::{
    AccessLog, BodyLimits, Config, Cores, CoresError, DrainConfig, LogConfig, LogFormat, LogLevel,
    Problem, RawConfig, Timeouts, UpstreamConfig, keys, units,
};

/// Default keep-alive timeout of uvicorn, the HTTP server of the engines. An
/// `--upstream-idle-timeout` that is not shorter causes a warning.
const ENGINE_KEEPALIVE: Duration = Duration::from_secs(5);

/// Longest accepted `--busy-poll`. With more, a shard would never sleep between two tokens, even if
/// almost idle.
const BUSY_POLL_MAX: Duration = Duration::from_secs(1);

/// A checked configuration with its warnings.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The configuration.
    pub config: Config,
    /// Warnings about the configuration: one sentence each, without the final full stop.
    pub warnings: Vec<String>,
}

/// Checks the values as written and creates the configuration.
///
/// # Errors
/// Returns all problems, mostly in the order of `--help`.
pub fn check(raw: &RawConfig) -> Result<Checked, Vec<Problem>> {
    let mut raw = raw.clone();
    raw.warn_of_unreadable_variables();
    let mut reader = Reader {
        raw: &raw,
        problems: raw.problems.clone(),
        warnings: raw.warnings.clone(),
    };
    let config = reader.config();
    if reader.problems.is_empty() {
        reader.check_overlaps(&config);
    }
    if reader.problems.is_empty() {
        let warnings = reader.warnings;
        Ok(Checked { config, warnings })
    } else {
        Err(reader.problems)
    }
}

impl Reader<'_> {
    fn config(&mut self) -> Config {
        self.sources();
        let size = self.data_parallel_size();
        Config {
            ranks: self.ranks(size),
            pod_ip: self.raw.variable("POD_IP").map(str::to_owned),
            pd: self.pd(size),
            tls: self.tls(),
            allowlist: self.allowlist(),
            tracing: self.tracing(),
            metrics: self.metrics(),
            timeouts: self.timeouts(),
            upstream: self.upstream(),
            limits: self.limits(),
            cores: self.cores(),
            busy_poll: self.busy_poll(),
            admin: self.admin(),
            log: self.log(),
            drain: DrainConfig {
                timeout: self.timeout(&keys::DRAIN_TIMEOUT),
                settle: self.duration(&keys::DRAIN_SETTLE),
            },
        }
    }

    /// Records a problem if both `--configuration` and `--configuration-file` are given. The
    /// document itself has already been read.
    fn sources(&mut self) {
        let (inline, file) = (&keys::CONFIGURATION, &keys::CONFIGURATION_FILE);
        if self.raw.has_flag(inline) && self.raw.has_flag(file) {
            self.problem(
                inline,
                "is given together with --configuration-file; give only one of them",
            );
        }
    }

    fn timeouts(&mut self) -> Timeouts {
        Timeouts {
            connect: self.timeout(&keys::CONNECT_TIMEOUT),
            head: self.timeout(&keys::HEAD_TIMEOUT),
            body: self.timeout(&keys::BODY_TIMEOUT),
            client_stall: self.timeout(&keys::CLIENT_STALL_TIMEOUT),
            keepalive: self.timeout(&keys::KEEPALIVE_TIMEOUT),
            first_byte: self.timeout(&keys::FIRST_BYTE_TIMEOUT),
        }
    }

    fn upstream(&mut self) -> UpstreamConfig {
        let idle = self
            .timeout(&keys::UPSTREAM_IDLE_TIMEOUT)
            .unwrap_or(units::DURATION_MAX);
        if idle >= ENGINE_KEEPALIVE {
            self.warnings.push(format!(
                "--upstream-idle-timeout is {}: an engine that closes idle connections sooner \
                 (uvicorn: {}) will reset some requests; set it below the engine's timeout",
                self.text(&keys::UPSTREAM_IDLE_TIMEOUT),
                units::format_duration(ENGINE_KEEPALIVE),
            ));
        }
        let idle_per_rank_max = self.count(&keys::MAX_IDLE_CONNS_PER_HOST, 0, 1_000_000);
        UpstreamConfig {
            idle,
            idle_per_rank_max: usize::try_from(idle_per_rank_max).unwrap_or(usize::MAX),
        }
    }

    fn limits(&mut self) -> BodyLimits {
        let limits = BodyLimits {
            body_bytes_max: self.size(&keys::MAX_BODY),
            body_budget_bytes: self.size(&keys::BODY_BUDGET),
        };
        if limits.body_budget_bytes < limits.body_bytes_max {
            let text = format!(
                "{} is below --max-body ({}), so the largest body could never be buffered; raise it, \
                 or lower --max-body",
                units::format_size(limits.body_budget_bytes),
                units::format_size(limits.body_bytes_max),
            );
            self.problem(&keys::BODY_BUDGET, &text);
        }
        limits
    }

    fn cores(&mut self) -> Cores {
        let text = self.text(&keys::CORES);
        text.parse().unwrap_or_else(|error: CoresError| {
            self.problem(&keys::CORES, &error.explain(text));
            Cores::Auto
        })
    }

    fn admin(&mut self) -> Option<SocketAddr> {
        let text = self.text(&keys::ADMIN_ADDRESS);
        if text == "off" {
            return None;
        }
        let address = values::address(text);
        if address.is_none() {
            self.wanted(
                &keys::ADMIN_ADDRESS,
                "an address and port such as 127.0.0.1:9890, :9890, or off",
            );
        }
        address
    }

    /// Returns the additional metrics address: `--metrics-port` on all addresses, or else the
    /// address in `MORIIO_METRICS_ADDR`. Returns `None` if neither enables it.
    fn metrics(&mut self) -> Option<SocketAddr> {
        const VARIABLE: &str = "MORIIO_METRICS_ADDR";
        let port = self.number(&keys::METRICS_PORT, 0, u16::MAX, "a port, or 0 for off");
        if port != 0 {
            return Some(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)));
        }
        // In controller-runtime, which reads this variable in pd-sidecar, "0" means off.
        let text = self.raw.variable(VARIABLE).filter(|text| *text != "0")?;
        let address = values::address(text);
        if address.is_none() {
            self.refuse_variable(VARIABLE, "an address and port, such as :9090");
        }
        address
    }

    fn log(&mut self) -> LogConfig {
        LogConfig {
            level: self.choice(
                &keys::LOG_LEVEL,
                &[
                    ("error", LogLevel::Error),
                    ("warn", LogLevel::Warn),
                    ("info", LogLevel::Info),
                    ("debug", LogLevel::Debug),
                    ("trace", LogLevel::Trace),
                ],
            ),
            format: self.choice(
                &keys::LOG_FORMAT,
                &[("text", LogFormat::Text), ("json", LogFormat::Json)],
            ),
            access: match self.text(&keys::ACCESS_LOG) {
                "off" => AccessLog::Off,
                "stdout" => AccessLog::Stdout,
                "stderr" => AccessLog::Stderr,
                "" => {
                    self.wanted(&keys::ACCESS_LOG, "off, stdout, stderr or a file");
                    AccessLog::Off
                }
                path => AccessLog::File(PathBuf::from(path)),
            },
        }
    }

    fn busy_poll(&mut self) -> Option<Duration> {
        let window = self.timeout(&keys::BUSY_POLL)?;
        if window > BUSY_POLL_MAX {
            self.wanted(
                &keys::BUSY_POLL,
                "a duration of at most 1s, or off: with more, the shard never sleeps between two tokens",
            );
        }
        Some(window)
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
