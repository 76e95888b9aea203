//! What was decided, in words, for the start of the log.

use std::time::Duration;

use super::units::{DURATION_MAX, show_duration, show_size};
use super::{AccessLog, Config, LogFormat, LogLevel, OnDecodeKvError, OnMissingKv, RankConfig};

impl LogLevel {
    /// The name operators write.
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
    /// Every decision as a name and a text, in the order an operator looks for them.
    #[must_use]
    pub fn describe(&self) -> Vec<(String, String)> {
        let mut lines = Vec::new();
        let mut line = |name: &str, text: String| lines.push((name.to_owned(), text));
        line("listen", span(&self.ranks, |rank| rank.listen.to_string()));
        line(
            "decoder",
            span(&self.ranks, |rank| rank.decoder.to_string()),
        );
        line("ranks", self.ranks.len().to_string());
        line(
            "pod_ip",
            self.pod_ip.clone().unwrap_or_else(|| "unset".to_owned()),
        );
        line("kv_connector", self.pd.connector.name().to_owned());
        line("prefill", self.describe_prefill());
        line("handoff", self.describe_handoff());
        line("upstream", self.describe_upstream());
        line("limits", self.describe_limits());
        line("timeouts", self.describe_timeouts());
        line(
            "drain",
            format!(
                "settle {}, then at most {}",
                show_duration(self.drain.settle),
                bound(self.drain.timeout)
            ),
        );
        line("cores", self.cores.to_string());
        line("busy poll", bound(self.busy_poll));
        line(
            "admin",
            self.admin
                .map_or_else(|| "off".to_owned(), |address| address.to_string()),
        );
        line("log", self.describe_log());
        lines
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
        format!(
            "{pick}, {} retries after {}, timeout {}, errors {errors}",
            self.pd.prefill_retries_max,
            show_duration(self.pd.prefill_retry_backoff),
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
        let flat = if self.pd.allow_flat_blocks {
            ", flat blocks allowed"
        } else {
            ""
        };
        format!(
            "at most {} old, missing: {missing}, decode failed: {failed}{flat}",
            show_duration(self.pd.handoff_age_max)
        )
    }

    fn describe_upstream(&self) -> String {
        format!(
            "idle {}, {} idle connections per rank",
            bound(Some(self.upstream.idle).filter(|idle| *idle < DURATION_MAX)),
            self.upstream.idle_per_rank_max
        )
    }

    fn describe_limits(&self) -> String {
        let answer = u64::try_from(self.pd.prefill_answer_bytes_max).unwrap_or(u64::MAX);
        format!(
            "body {}, all bodies {}, prefill answer {}",
            show_size(self.limits.body_bytes_max),
            show_size(self.limits.body_budget_bytes),
            show_size(answer),
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
        format!("{} as {format}, access log {access}", self.log.level.name())
    }
}

fn bound(value: Option<Duration>) -> String {
    value.map_or_else(|| "off".to_owned(), show_duration)
}

/// First and last of the ranks, or the only one.
fn span(ranks: &[RankConfig], show: impl Fn(&RankConfig) -> String) -> String {
    match ranks {
        [] => String::new(),
        [only] => show(only),
        [first, .., last] => format!("{} to {}", show(first), show(last)),
    }
}
