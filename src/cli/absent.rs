//! Flags of pd-sidecar that this build does not have yet.
//!
//! Dropping one silently could turn off what an operator relies on (TLS, an allowlist), so each is
//! known by name and refused, unless its value asks for what this build does anyway.

use clap::{Arg, ArgAction, ArgMatches};

use crate::config::Problem;

/// A flag this build only knows by name.
struct Absent {
    name: &'static str,
    /// `None`: a switch. Otherwise the value that changes nothing.
    harmless: Option<&'static str>,
    /// What to do instead, if there is something.
    instead: &'static str,
}

const fn switch(name: &'static str) -> Absent {
    Absent {
        name,
        harmless: None,
        instead: "",
    }
}

const fn value(name: &'static str, harmless: &'static str) -> Absent {
    Absent {
        name,
        harmless: Some(harmless),
        instead: "",
    }
}

impl Absent {
    const fn instead(mut self, text: &'static str) -> Self {
        self.instead = text;
        self
    }
}

const ABSENT: &[Absent] = &[
    value("ec-connector", ""),
    value("enable-tls", ""),
    value("tls-insecure-skip-verify", ""),
    value("cert-path", ""),
    switch("enable-ssrf-protection"),
    value("inference-pool", ""),
    value("pool-group", "inference.networking.k8s.io"),
    switch("tracing"),
    value("decode-chunk-size", "0"),
    value("metrics-port", "0").instead("--admin-address serves /metrics"),
    value("configuration", ""),
    value("configuration-file", ""),
    switch("enable-p2p-pull"),
    value("mooncake-bootstrap-port", "8998"),
    value("p2p-connector-port", "7777"),
    switch("moriio-write-mode"),
    switch("moriio-parallel-dispatch"),
    value("moriio-parallel-decode-wait-timeout", "30s"),
    value("moriio-local-pod-ip", ""),
    value("moriio-decode-notify-port", "61005"),
    value("moriio-prefill-notify-port", "61005"),
    value("moriio-decode-handshake-port", "6301"),
    value("moriio-prefill-handshake-port", "6301"),
    value("moriio-tp-size", "1"),
    value("moriio-dp-size", "1"),
    value("moriio-dp-size-local", "0"),
    value("moriio-remote-hosts", ""),
    value("moriio-decode-hosts", ""),
    value("zap-log-level", "info").instead("use --log-level"),
    switch("zap-devel"),
    value("zap-encoder", "").instead("use --log-format"),
    value("zap-stacktrace-level", ""),
    value("zap-time-encoding", ""),
    // Names pd-sidecar itself has removed; manifests still carry them.
    value("connector", "nixlv2").instead("use --kv-connector"),
    switch("prefiller-use-tls"),
    switch("decoder-use-tls"),
    switch("prefiller-tls-insecure-skip-verify"),
    switch("decoder-tls-insecure-skip-verify"),
    value("inference-pool-namespace", ""),
    value("inference-pool-name", ""),
];

/// Whether `name` is a switch of this table.
pub(super) fn is_switch(name: &str) -> bool {
    ABSENT
        .iter()
        .any(|flag| flag.name == name && flag.harmless.is_none())
}

/// The flags as arguments that no help shows.
pub(super) fn args() -> impl Iterator<Item = Arg> {
    ABSENT.iter().map(|flag| {
        let arg = Arg::new(flag.name)
            .long(flag.name)
            .hide(true)
            .action(ArgAction::Append);
        match flag.harmless {
            Some(_) => arg.num_args(1).allow_negative_numbers(true),
            None => arg
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true"),
        }
    })
}

/// One problem per flag that asks for something this build does not do.
pub(super) fn problems(matches: &ArgMatches) -> Vec<Problem> {
    let asks = |flag: &&Absent| {
        let harmless = |given: &String| match flag.harmless {
            Some(value) => given == value,
            None => crate::config::units::switch(given) == Some(false),
        };
        matches
            .get_many::<String>(flag.name)
            .is_some_and(|mut given| !given.all(harmless))
    };
    ABSENT
        .iter()
        .filter(asks)
        .map(|flag| Problem {
            key: format!("--{}", flag.name),
            text: match flag.instead {
                "" => "this build does not have it yet".to_owned(),
                instead => format!("this build does not have it; {instead}"),
            },
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys;

    #[test]
    fn no_flag_is_both_present_and_absent() {
        for flag in ABSENT {
            assert!(
                keys::ALL.iter().all(|key| key.name != flag.name),
                "{}",
                flag.name
            );
        }
    }
}
