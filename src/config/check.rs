//! From what was written to a `Config`, or to every problem in it at once.
//!
//! The reader never stops at a problem: it notes it and goes on with a stand-in value, which nobody
//! sees because a draft with problems gives no `Config`.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::units::{self, UnitError};
use super::{
    AccessLog, BodyLimits, Config, ConnectorPorts, Cores, CoresError, Draft, DrainConfig, Key,
    KvConnector, LogConfig, LogFormat, LogLevel, MoriConfig, OnDecodeKvError, OnMissingKv,
    OnPrefillFailure, PdConfig, Timeouts, TlsConfig, UpstreamConfig, keys,
};

/// Connectors pd-sidecar has and this build does not.
const CONNECTORS_ELSEWHERE: [&str; 4] = ["sglang", "shared-storage", "mooncake", "offloading"];
/// More prefill attempts than this only prolong an outage.
const PREFILL_RETRIES_MAX: u32 = 100;
/// Lease of a handoff in the engine (vLLM's NIXL connector): older blocks may be another prompt's.
const ENGINE_LEASE: Duration = Duration::from_secs(30);
/// Keep-alive of uvicorn, the engines' HTTP server.
const ENGINE_KEEPALIVE: Duration = Duration::from_secs(5);

/// A shard that looks for longer never sleeps between two tokens, not even when idle.
const BUSY_POLL_MAX: Duration = Duration::from_secs(1);

/// One thing wrong with the configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The key as it is written, with dashes.
    pub key: String,
    /// What is wrong and what would be right; one or more sentences without the final stop.
    pub text: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.text)
    }
}

/// A checked configuration and what is worth a warning in it.
#[derive(Clone, Debug)]
pub struct Checked {
    /// The configuration.
    pub config: Config,
    /// One sentence each.
    pub warnings: Vec<String>,
}

/// Checks a draft.
///
/// # Errors
/// Every problem found, in the order of `--help` where possible.
pub fn check(draft: &Draft) -> Result<Checked, Vec<Problem>> {
    let mut reader = Reader {
        draft,
        problems: Vec::new(),
        warnings: Vec::new(),
    };
    let ranks = reader.ranks();
    let pd = reader.pd();
    let config = Config {
        ranks,
        pod_ip: draft.pod_ip.clone().filter(|ip| !ip.is_empty()),
        pd,
        tls: TlsConfig::default(),
        guard: None,
        tracing: None,
        metrics: None,
        timeouts: reader.timeouts(),
        upstream: reader.upstream(),
        limits: reader.limits(),
        cores: reader.cores(),
        busy_poll: reader.busy_poll(),
        admin: reader.admin(),
        log: reader.log(),
        drain: DrainConfig {
            timeout: reader.timeout(&keys::DRAIN_TIMEOUT),
            settle: reader.duration(&keys::DRAIN_SETTLE),
        },
    };
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

pub(super) struct Reader<'a> {
    pub(super) draft: &'a Draft,
    pub(super) problems: Vec<Problem>,
    pub(super) warnings: Vec<String>,
}

impl<'a> Reader<'a> {
    fn pd(&mut self) -> PdConfig {
        let connector = self.connector();
        let retries = self.count(&keys::PREFILL_MAX_RETRIES, 0, PREFILL_RETRIES_MAX);
        let backoff = self.duration(&keys::PREFILL_RETRY_BACKOFF);
        if retries > 0 && backoff.is_zero() {
            self.problem(
                &keys::PREFILL_RETRY_BACKOFF,
                "must be above zero when --prefill-max-retries is",
            );
        }
        let handoff_age_max = self.positive(&keys::HANDOFF_MAX_AGE);
        if handoff_age_max >= ENGINE_LEASE {
            self.warnings.push(format!(
                "--handoff-max-age is {}: a handoff older than the engine's lease (vLLM: {}) can \
                 answer with another prompt's text",
                units::show_duration(handoff_age_max),
                units::show_duration(ENGINE_LEASE),
            ));
        }
        PdConfig {
            connector,
            encoder: None,
            ports: ConnectorPorts {
                mooncake_bootstrap: 8998,
                sglang_bootstrap: 8998,
                p2p: 7777,
            },
            p2p_pull: false,
            mori: MoriConfig::default(),
            decode_chunk_tokens: None,
            on_prefill_failure: OnPrefillFailure::Error,
            trust_client_kv: false,
            release_stranded_kv: false,
            prefiller_sampling: self.prefiller_sampling(),
            prefill_retries_max: retries,
            prefill_retry_backoff: backoff,
            prefill_timeout: self.timeout(&keys::PREFILL_TIMEOUT),
            on_missing_kv: self.choice(
                &keys::ON_MISSING_KV,
                &[
                    ("decode", OnMissingKv::Decode),
                    ("error", OnMissingKv::Error),
                ],
            ),
            handoff_age_max,
            hide_prefill_errors: self.switch(&keys::HIDE_PREFILL_ERRORS),
            on_decode_kv_error: self.choice(
                &keys::ON_DECODE_KV_ERROR,
                &[
                    ("recompute", OnDecodeKvError::Recompute),
                    ("error", OnDecodeKvError::Error),
                ],
            ),
            prefill_answer_bytes_max: usize::try_from(self.size(&keys::MAX_PREFILL_ANSWER))
                .unwrap_or(usize::MAX),
            allow_flat_blocks: self.switch(&keys::ALLOW_FLAT_BLOCKS),
        }
    }

    fn connector(&mut self) -> KvConnector {
        let text = self.text(&keys::KV_CONNECTOR);
        if text != KvConnector::Nixlv2.name() {
            let elsewhere = CONNECTORS_ELSEWHERE.join(", ");
            let text = if CONNECTORS_ELSEWHERE.contains(&text) {
                format!("`{text}` is not in this build yet; it has nixlv2")
            } else {
                format!(
                    "`{text}` is not a connector; use nixlv2 (not in this build yet: {elsewhere})"
                )
            };
            self.problem(&keys::KV_CONNECTOR, &text);
        }
        KvConnector::Nixlv2
    }

    /// Flag, then environment, then default.
    fn prefiller_sampling(&mut self) -> bool {
        let key = &keys::ENABLE_PREFILLER_SAMPLING;
        let environment = match &self.draft.prefiller_sampling {
            Some(text) if self.draft.given(key).is_none() && !text.is_empty() => text,
            _ => return self.switch(key),
        };
        units::switch(environment).unwrap_or_else(|| {
            // pd-sidecar ignores what it cannot read in the environment; we say so.
            self.warnings.push(format!(
                "ENABLE_PREFILLER_SAMPLING is `{environment}`, which is neither true nor false; \
                 it is ignored"
            ));
            false
        })
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
                "--upstream-idle-timeout {}: an engine that closes idle connections sooner \
                 (uvicorn: {}) will reset some requests",
                self.text(&keys::UPSTREAM_IDLE_TIMEOUT),
                units::show_duration(ENGINE_KEEPALIVE),
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
                "{} is below --max-body ({}), so the largest body could never be held",
                units::show_size(limits.body_budget_bytes),
                units::show_size(limits.body_bytes_max),
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
        let address = match text.rsplit_once(':') {
            // Go spells "all addresses" as nothing.
            Some(("", port)) => port
                .parse()
                .ok()
                .map(|port| SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))),
            Some(("localhost", port)) => port
                .parse()
                .ok()
                .map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
            _ => text.parse().ok(),
        };
        if address.is_none() {
            self.wanted(
                &keys::ADMIN_ADDRESS,
                "an address and port such as 127.0.0.1:9890, :9890, or off",
            );
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

    /// What is given for `key`, or its default.
    pub(super) fn text(&self, key: &Key) -> &'a str {
        self.draft.given(key).unwrap_or(key.default)
    }

    pub(super) fn switch(&mut self, key: &Key) -> bool {
        units::switch(self.text(key)).unwrap_or_else(|| {
            self.wanted(key, "true or false");
            false
        })
    }

    /// A bound that can be off.
    fn timeout(&mut self, key: &Key) -> Option<Duration> {
        if self.text(key) == "off" {
            return None;
        }
        let value = self.duration(key);
        if value.is_zero() {
            self.problem(key, "is zero, which nothing can meet; `off` turns it off");
        }
        Some(value)
    }

    fn busy_poll(&mut self) -> Option<Duration> {
        let window = self.timeout(&keys::BUSY_POLL)?;
        if window > BUSY_POLL_MAX {
            self.wanted(
                &keys::BUSY_POLL,
                "a duration of 1s at most, or off: a longer one never sleeps between two tokens",
            );
        }
        Some(window)
    }

    fn positive(&mut self, key: &Key) -> Duration {
        let value = self.duration(key);
        if value.is_zero() {
            self.wanted(key, "a duration above zero");
        }
        value
    }

    fn duration(&mut self, key: &Key) -> Duration {
        match units::duration(self.text(key)) {
            Ok(value) => value,
            Err(error) => {
                let why = match error {
                    UnitError::Unit => "has no known unit",
                    UnitError::TooLarge => "is longer than a year",
                    UnitError::Empty
                    | UnitError::Number
                    | UnitError::Range
                    | UnitError::Duplicate => "is not a duration",
                };
                let off = if key.name.ends_with("-timeout") || key.name == keys::BUSY_POLL.name {
                    ", or off"
                } else {
                    ""
                };
                let text = format!(
                    "`{}` {why}; write 250ms, 30s, 5m or 1m30s{off}",
                    self.text(key)
                );
                self.problem(key, &text);
                Duration::from_secs(1)
            }
        }
    }

    /// A size above zero.
    fn size(&mut self, key: &Key) -> u64 {
        match units::size(self.text(key)) {
            Ok(value) if value > 0 => value,
            _ => {
                self.wanted(key, "a size above zero, such as 64KiB, 512MiB or 2GiB");
                1
            }
        }
    }

    fn count(&mut self, key: &Key, min: u32, max: u32) -> u32 {
        match self.text(key).parse::<u32>() {
            Ok(value) if (min..=max).contains(&value) => value,
            _ => {
                self.wanted(key, &format!("a number from {min} to {max}"));
                min
            }
        }
    }

    /// One of `choices`, which is never empty.
    fn choice<T: Copy>(&mut self, key: &Key, choices: &[(&str, T)]) -> T {
        let text = self.text(key);
        if let Some((_, value)) = choices.iter().find(|(name, _)| *name == text) {
            return *value;
        }
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        self.wanted(key, &names.join(" or "));
        choices[0].1
    }

    pub(super) fn wanted(&mut self, key: &Key, wanted: &str) {
        let text = format!("`{}` is not valid; give {wanted}", self.text(key));
        self.problem(key, &text);
    }

    pub(super) fn problem(&mut self, key: &Key, text: &str) {
        self.problems.push(Problem {
            key: format!("--{}", key.name),
            text: text.to_owned(),
        });
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
