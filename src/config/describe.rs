//! A readable summary of the configuration, for the log at startup and for `ringside check-config`.

use std::time::Duration;

use super::units::{DURATION_MAX, format_duration, format_size};
use super::{
    AccessLog, AllowlistConfig, Config, EcConnector, LogFormat, LogLevel, OnDecodeKvError,
    OnMissingKv, OnPrefillFailure, OtlpProtocol, PoolGroup, TlsVersion, TraceExporter,
    TracingConfig, UpstreamTls,
};
use crate::pd::connector::PrefixPull;

impl LogLevel {
    /// Returns the level's name as used in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

impl Config {
    /// Returns the settings as pairs of name and description, in a fixed order.
    #[must_use]
    pub fn describe(&self) -> Vec<(String, String)> {
        let mut lines = Vec::new();
        let mut line = |name: &str, text: String| lines.push((name.to_owned(), text));
        line(
            "listen",
            span(&self.listeners, |one| one.address.to_string()),
        );
        line(
            "decoder",
            span(&self.pools, |pool| pool.endpoints[0].to_string()),
        );
        line("ranks", self.listeners.len().to_string());
        line(
            "pod_ip",
            self.pod_ip.clone().unwrap_or_else(|| "unset".to_owned()),
        );
        line("kv_connector", self.describe_connector());
        line("encoder", self.describe_encoder());
        line("decode", self.describe_decode());
        line("prefill", self.describe_prefill());
        line("handoff", self.describe_handoff());
        line("upstream", self.describe_upstream());
        line("tls to clients", self.describe_listener_tls());
        line("tls to engines", self.describe_upstream_tls());
        line(
            "targets",
            self.allowlist
                .as_ref()
                .map_or_else(|| "any".to_owned(), AllowlistConfig::describe),
        );
        line("limits", self.describe_limits());
        line("timeouts", self.describe_timeouts());
        line(
            "drain",
            format!(
                "settle {}, timeout {}",
                format_duration(self.drain.settle),
                bound(self.drain.timeout)
            ),
        );
        line("cores", self.cores.to_string());
        line("busy poll", bound(self.busy_poll));
        line("admin", self.describe_admin());
        line("metrics", self.describe_metrics());
        line(
            "tracing",
            self.tracing
                .as_ref()
                .map_or_else(|| "off".to_owned(), TracingConfig::describe),
        );
        line("log", self.describe_log());
        lines
    }

    fn describe_admin(&self) -> String {
        match self.admin {
            None => "off".to_owned(),
            Some(admin) if admin.may_move => format!("{} or another port", admin.address),
            Some(admin) => admin.address.to_string(),
        }
    }

    fn describe_metrics(&self) -> String {
        let Some(metrics) = &self.metrics else {
            return "no additional listener".to_owned();
        };
        let tls = if metrics.cert_dir.is_some() {
            " with TLS"
        } else {
            ""
        };
        format!("additional listener on {}{tls}", metrics.address)
    }

    fn describe_connector(&self) -> String {
        let mut text = self.pd.kv_connector.name().to_owned();
        let connector = self.pd.connector();
        let mori = &self.pd.mori;
        if mori.write_mode && self.pd.kv_connector.has_write_mode() {
            text.push_str(" with MoRI-IO in write mode, ");
            text.push_str(&match mori.parallel_wait {
                None => "prefill before decode".to_owned(),
                Some(wait) => format!(
                    "legs concurrent, response held back at most {}",
                    bound(Some(wait).filter(|wait| *wait < DURATION_MAX))
                ),
            });
            text.push_str(&format!(", local pod {}", mori.local_pod_ip));
        } else if self.pd.p2p_pull && connector.rules().prefix_pull == PrefixPull::IfEnabled {
            text.push_str(", cached-prefix pulls");
        }
        text.push_str(&connector.describe(&self.pd.ports));
        if self.pd.trust_client_kv {
            text.push_str(", transfer parameters from clients trusted");
        }
        text
    }

    fn describe_encoder(&self) -> String {
        self.pd.encoder.map_or("off", EcConnector::name).to_owned()
    }

    fn describe_decode(&self) -> String {
        match self.pd.decode_chunk_tokens {
            None => "in one request".to_owned(),
            Some(tokens) => format!("in chunks of {tokens} tokens"),
        }
    }

    fn describe_listener_tls(&self) -> String {
        match &self.tls.listener {
            None => "off (plain text)".to_owned(),
            Some(listener) => {
                let mut text = match &listener.cert_dir {
                    None => "on, self-signed certificate".to_owned(),
                    Some(path) => format!("on, certificate in {}", path.display()),
                };
                if listener.min_version == TlsVersion::Tls13 {
                    text.push_str(", TLS 1.3 only");
                }
                match listener.cipher_suites.len() {
                    0 => {}
                    1 => text.push_str(", 1 cipher suite for TLS 1.2"),
                    count => text.push_str(&format!(", {count} cipher suites for TLS 1.2")),
                }
                if listener.accepts_plain_text {
                    text.push_str(", plain text on the same port");
                }
                text
            }
        }
    }

    fn describe_upstream_tls(&self) -> String {
        let stage = |name: &str, tls: Option<UpstreamTls>| {
            let tls = match tls {
                None => "off",
                Some(UpstreamTls { verify: true }) => "on",
                Some(UpstreamTls { verify: false }) => "on, unverified",
            };
            format!("{name} {tls}")
        };
        let mut text = [
            stage("prefiller", self.tls.prefiller),
            stage("decoder", self.tls.decoder),
            stage("encoder", self.tls.encoder),
        ]
        .join("; ");
        if let Some(path) = &self.tls.ca_file {
            text.push_str(&format!("; additional CA file {}", path.display()));
        }
        if let Some(identity) = &self.tls.client_identity {
            text.push_str(&format!(
                "; client certificate {}",
                identity.cert_file.display()
            ));
        }
        text
    }

    fn describe_prefill(&self) -> String {
        let pick = if self.pd.prefiller_sampling {
            "random candidate"
        } else {
            "first candidate"
        };
        let errors = if self.pd.hide_prefill_errors {
            "hidden"
        } else {
            "relayed"
        };
        let failed = match self.pd.on_prefill_failure {
            OnPrefillFailure::Error => "error",
            OnPrefillFailure::Decode => "decode",
        };
        format!(
            "{pick}, {} retries, backoff {}, timeout {}, on failure {failed}, errors {errors}",
            self.pd.prefill_retries_max,
            format_duration(self.pd.prefill_retry_backoff),
            bound(self.pd.prefill_timeout),
        )
    }

    fn describe_handoff(&self) -> String {
        let missing = match self.pd.on_missing_kv {
            OnMissingKv::Decode => "decode",
            OnMissingKv::Error => "error",
        };
        let failed = match self.pd.on_decode_kv_error {
            OnDecodeKvError::Recompute => "recompute",
            OnDecodeKvError::Error => "error",
        };
        let unchecked = if self.pd.check_handoff_versions {
            ""
        } else {
            ", versions not checked"
        };
        let stranded = if self.pd.release_stranded_kv {
            ""
        } else {
            ", stranded KV cache left to its lease"
        };
        format!(
            "max age {}, if missing {missing}, if decode fails {failed}{unchecked}{stranded}",
            format_duration(self.pd.handoff_age_max)
        )
    }

    fn describe_upstream(&self) -> String {
        format!(
            "idle timeout {}, {} idle connections per rank and shard",
            bound(Some(self.upstream.idle).filter(|idle| *idle < DURATION_MAX)),
            self.upstream.idle_per_rank_max
        )
    }

    fn describe_limits(&self) -> String {
        let response = u64::try_from(self.pd.prefill_response_bytes_max).unwrap_or(u64::MAX);
        format!(
            "body {}, all bodies {}, prefill response {}, client connections {}",
            format_size(self.limits.body_bytes_max),
            format_size(self.limits.body_budget_bytes),
            format_size(response),
            match self.limits.client_connections_max {
                None => "auto".to_owned(),
                Some(max) => max.to_string(),
            },
        )
    }

    fn describe_timeouts(&self) -> String {
        format!(
            "connect {}, head {}, body {}, client-stall {}, keepalive {}, first-byte {}",
            bound(self.timeouts.connect),
            bound(self.timeouts.head),
            bound(self.timeouts.body),
            bound(self.timeouts.client_stall),
            bound(self.timeouts.keepalive),
            bound(self.timeouts.first_byte),
        )
    }

    fn describe_log(&self) -> String {
        let format = match self.log.format {
            LogFormat::Text => "text",
            LogFormat::Json => "json",
        };
        let access = match &self.log.access {
            AccessLog::Off => "off".to_owned(),
            AccessLog::Stdout => "stdout".to_owned(),
            AccessLog::Stderr => "stderr".to_owned(),
            AccessLog::File(path) => path.display().to_string(),
        };
        let file = match &self.log.file {
            None => String::new(),
            Some(file) => format!(
                ", also to {} up to {}",
                file.path.display(),
                format_size(file.bytes_max)
            ),
        };
        format!(
            "level {}, format {format}{file}, access log {access}",
            self.log.level.name()
        )
    }
}

impl AllowlistConfig {
    fn describe(&self) -> String {
        let mut parts = Vec::new();
        match self.rules.len() {
            0 => {}
            1 => parts.push("1 rule".to_owned()),
            count => parts.push(format!("{count} rules")),
        }
        if let Some(path) = &self.rules_file {
            parts.push(format!("the rules in {}", path.display()));
        }
        if let Some(pool) = &self.pool {
            let group = match pool.group {
                PoolGroup::Stable => "",
                PoolGroup::Experimental => " (x-k8s.io)",
            };
            let (namespace, name) = (&pool.namespace, &pool.name);
            parts.push(format!(
                "the pods of InferencePool {namespace}/{name}{group}"
            ));
        }
        format!("only those allowed by {}", parts.join(" and "))
    }
}

impl TracingConfig {
    fn describe(&self) -> String {
        let exporter = match &self.exporter {
            TraceExporter::Console => "standard output".to_owned(),
            TraceExporter::Otlp(collector) => {
                let protocol = match collector.protocol {
                    OtlpProtocol::Grpc => "gRPC",
                    OtlpProtocol::HttpProtobuf => "HTTP",
                };
                format!("{} over {protocol}", collector.endpoint)
            }
        };
        format!(
            "{} of 1000000 traces to {exporter}, service name {}",
            self.recorded_per_million, self.service_name
        )
    }
}

fn bound(value: Option<Duration>) -> String {
    value.map_or_else(|| "off".to_owned(), format_duration)
}

/// Formats a setting of the ranks: that of the first and that of the last, joined by `to`, or that
/// of the only rank. `show` formats the setting of one rank.
fn span<T>(ranks: &[T], show: impl Fn(&T) -> String) -> String {
    match ranks {
        [] => String::new(),
        [only] => show(only),
        [first, .., last] => format!("{} to {}", show(first), show(last)),
    }
}
