//! Reads the values of a configuration: the settings that personalities share.
//!
//! A reader does not stop at a problem: it records the problem and continues with a placeholder.

mod allowlist;
mod mori;
mod pd;
mod reader;
mod tls;
mod tracing;
mod values;

use std::net::{Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

pub(in crate::config) use reader::Reader;
pub(in crate::config) use tls::TLS_OR_PLAIN_TEXT;

use super::{
    AccessLog, AdminConfig, BodyLimits, Cores, CoresError, LogConfig, LogFile, LogFormat, LogLevel,
    MetricsConfig, Timeouts, UpstreamConfig, flag_table, units,
};

/// Default keep-alive timeout of uvicorn, the HTTP server of the engines. An
/// `--upstream-idle-timeout` that is not shorter causes a warning.
const ENGINE_KEEPALIVE: Duration = Duration::from_secs(5);

/// Longest accepted `--busy-poll`. With more, a shard would never sleep between two tokens, even if
/// almost idle.
const BUSY_POLL_MAX: Duration = Duration::from_secs(1);

impl Reader<'_> {
    /// Records a problem if both `--configuration` and `--configuration-file` are given. The
    /// document itself has already been read.
    pub(in crate::config) fn sources(&mut self) {
        let (inline, file) = (&flag_table::CONFIGURATION, &flag_table::CONFIGURATION_FILE);
        if self.raw.has_flag(inline) && self.raw.has_flag(file) {
            self.problem(
                inline,
                "is given together with --configuration-file; give only one of them",
            );
        }
    }

    pub(in crate::config) fn timeouts(&mut self) -> Timeouts {
        Timeouts {
            connect: self.timeout(&flag_table::CONNECT_TIMEOUT),
            head: self.timeout(&flag_table::HEAD_TIMEOUT),
            body: self.timeout(&flag_table::BODY_TIMEOUT),
            client_stall: self.timeout(&flag_table::CLIENT_STALL_TIMEOUT),
            keepalive: self.timeout(&flag_table::KEEPALIVE_TIMEOUT),
            first_byte: self.timeout(&flag_table::FIRST_BYTE_TIMEOUT),
        }
    }

    pub(in crate::config) fn upstream(&mut self) -> UpstreamConfig {
        let idle = self
            .timeout(&flag_table::UPSTREAM_IDLE_TIMEOUT)
            .unwrap_or(units::DURATION_MAX);
        if idle >= ENGINE_KEEPALIVE {
            self.warnings.push(format!(
                "--upstream-idle-timeout is {}: an engine that closes idle connections sooner \
                 (uvicorn: {}) will reset some requests; set it below the engine's timeout",
                self.text(&flag_table::UPSTREAM_IDLE_TIMEOUT),
                units::format_duration(ENGINE_KEEPALIVE),
            ));
        }
        let idle_per_rank_max = self.count(&flag_table::MAX_IDLE_CONNS_PER_HOST, 0, 1_000_000);
        UpstreamConfig {
            idle,
            idle_per_rank_max: usize::try_from(idle_per_rank_max).unwrap_or(usize::MAX),
        }
    }

    pub(in crate::config) fn limits(&mut self) -> BodyLimits {
        let limits = BodyLimits {
            body_bytes_max: self.size(&flag_table::MAX_BODY),
            body_budget_bytes: self.size(&flag_table::BODY_BUDGET),
            client_connections_max: self.connections(),
        };
        if limits.body_budget_bytes < limits.body_bytes_max {
            let text = format!(
                "{} is below --max-body ({}), so the largest body could never be buffered; raise it, \
                 or lower --max-body",
                units::format_size(limits.body_budget_bytes),
                units::format_size(limits.body_bytes_max),
            );
            self.problem(&flag_table::BODY_BUDGET, &text);
        }
        limits
    }

    fn connections(&mut self) -> Option<usize> {
        let key = &flag_table::MAX_CONNECTIONS;
        if self.text(key) == "auto" {
            return None;
        }
        let most = 10_000_000_u32;
        let count = self.number(key, 1, most, "auto or a number from 1 to 10000000");
        usize::try_from(count).ok()
    }

    pub(in crate::config) fn cores(&mut self) -> Cores {
        let text = self.text(&flag_table::CORES);
        text.parse().unwrap_or_else(|error: CoresError| {
            self.problem(&flag_table::CORES, &error.explain(text));
            Cores::Auto
        })
    }

    pub(in crate::config) fn admin(&mut self) -> Option<AdminConfig> {
        let text = self.text(&flag_table::ADMIN_ADDRESS);
        if text == "off" {
            return None;
        }
        let address = values::address(text);
        if address.is_none() {
            self.wanted(
                &flag_table::ADMIN_ADDRESS,
                "an address and port such as 127.0.0.1:9890, :9890, or off",
            );
        }
        address.map(|address| AdminConfig {
            address,
            may_move: !self.is_given(&flag_table::ADMIN_ADDRESS),
        })
    }

    /// Returns the additional metrics server. `shows_pd_sidecar` is whether it also shows metrics
    /// under pd-sidecar's names.
    pub(in crate::config) fn metrics(&mut self, shows_pd_sidecar: bool) -> Option<MetricsConfig> {
        let key = &flag_table::METRICS_CERT_DIR;
        let cert_dir = self.path(key);
        let Some(address) = self.metrics_address() else {
            if cert_dir.is_some() {
                let text = "--metrics-cert-dir has no effect without --metrics-port";
                self.warnings.push(text.to_owned());
            }
            return None;
        };
        Some(MetricsConfig {
            address,
            cert_dir,
            shows_pd_sidecar,
        })
    }

    /// Returns the address of the additional metrics server: `--metrics-port` on all addresses, or
    /// else the address in `MORIIO_METRICS_ADDR`. Returns `None` if neither enables it.
    fn metrics_address(&mut self) -> Option<SocketAddr> {
        const VARIABLE: &str = "MORIIO_METRICS_ADDR";
        let port = self.number(
            &flag_table::METRICS_PORT,
            0,
            u16::MAX,
            "a port, or 0 for off",
        );
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

    /// Reads the log settings. `port` is the port of the first listener, which distinguishes the
    /// log files of several processes in one directory.
    pub(in crate::config) fn log(&mut self, port: u16) -> LogConfig {
        LogConfig {
            file: self.log_file(port),
            level: self.choice(
                &flag_table::LOG_LEVEL,
                &[
                    ("error", LogLevel::Error),
                    ("warn", LogLevel::Warn),
                    ("info", LogLevel::Info),
                    ("debug", LogLevel::Debug),
                    ("trace", LogLevel::Trace),
                ],
            ),
            format: self.choice(
                &flag_table::LOG_FORMAT,
                &[("text", LogFormat::Text), ("json", LogFormat::Json)],
            ),
            access: match self.text(&flag_table::ACCESS_LOG) {
                "off" => AccessLog::Off,
                "stdout" => AccessLog::Stdout,
                "stderr" => AccessLog::Stderr,
                "" => {
                    self.wanted(&flag_table::ACCESS_LOG, "off, stdout, stderr or a file");
                    AccessLog::Off
                }
                path => AccessLog::File(PathBuf::from(path)),
            },
        }
    }

    fn log_file(&mut self, port: u16) -> Option<LogFile> {
        let folder = self.path(&flag_table::LOG_DIR);
        let file = self.path(&flag_table::LOG_FILE);
        let bytes_max = self.size(&flag_table::LOG_FILE_MAX_SIZE);
        let path = match (file, folder) {
            (Some(_), Some(_)) => {
                let text = "is given together with --log-dir; give only one of them";
                self.problem(&flag_table::LOG_FILE, text);
                return None;
            }
            (Some(file), None) => file,
            (None, Some(folder)) => folder.join(format!("ringside-{port}.log")),
            (None, None) => {
                if self.is_given(&flag_table::LOG_FILE_MAX_SIZE) {
                    let text = "--log-file-max-size has no effect without --log-dir or --log-file";
                    self.warnings.push(text.to_owned());
                }
                return None;
            }
        };
        Some(LogFile { path, bytes_max })
    }

    pub(in crate::config) fn busy_poll(&mut self) -> Option<Duration> {
        let window = self.timeout(&flag_table::BUSY_POLL)?;
        if window > BUSY_POLL_MAX {
            self.wanted(
                &flag_table::BUSY_POLL,
                "a duration of at most 1s, or off: with more, the shard never sleeps between two tokens",
            );
        }
        Some(window)
    }
}
