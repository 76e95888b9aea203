//! Every key of the sidecar's configuration: name, default, help.
//!
//! One table serves the parser, `--help` and the checks, so that a key cannot exist in one of them
//! only. Names are pd-sidecar's where it has the key.

/// Heading a key is listed under in `--help`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Where clients connect.
    Listen,
    /// The local decoder and the connections to engines.
    Engine,
    /// Prefill/decode disaggregation.
    PrefillDecode,
    /// Bounds on bytes.
    Limits,
    /// Bounds on time.
    Timeouts,
    /// Logs, metrics, admin port.
    Observability,
    /// Threads and cores.
    Performance,
}

impl Group {
    /// The heading.
    #[must_use]
    pub const fn heading(self) -> &'static str {
        match self {
            Self::Listen => "Listen",
            Self::Engine => "Engine",
            Self::PrefillDecode => "Prefill/decode",
            Self::Limits => "Limits",
            Self::Timeouts => "Timeouts",
            Self::Observability => "Observability",
            Self::Performance => "Performance",
        }
    }
}

/// What follows the key on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `--key`, `--key=true` or `--key=false`, never `--key true`.
    Switch,
    /// `--key value` or `--key=value`; the name shown for the value.
    Value(&'static str),
}

/// One key.
#[derive(Debug)]
pub struct Key {
    /// Name without dashes.
    pub name: &'static str,
    /// What follows it.
    pub kind: Kind,
    /// What holds when it is not given; empty when that depends on other keys.
    pub default: &'static str,
    /// Heading in `--help`.
    pub group: Group,
    /// Whether `-h` shows it too.
    pub common: bool,
    /// One sentence.
    pub help: &'static str,
}

macro_rules! keys {
    ($($id:ident: $group:ident $kind:ident $(($value:literal))? $name:literal = $default:literal
        $(, $common:ident)? ; $help:literal)*) => {
        $(
            #[doc = concat!("`--", $name, "`: ", $help)]
            pub const $id: Key = Key {
                name: $name,
                kind: Kind::$kind $(($value))?,
                default: $default,
                group: Group::$group,
                common: keys!(@common $($common)?),
                help: $help,
            };
        )*
        /// All keys, in the order of `--help`.
        pub const ALL: &[&Key] = &[$(&$id),*];
    };
    (@common common) => { true };
    (@common) => { false };
}

keys! {
    PORT: Listen Value("PORT") "port" = "8000", common;
        "Port clients connect to; rank r listens on PORT + r"
    HOST: Listen Value("ADDR") "host" = "";
        "Address to listen on [default: all, IPv4 and IPv6]"
    SECURE_PROXY: Listen Switch "secure-proxy" = "true", common;
        "Serve TLS; this build serves plain text only, so pass --secure-proxy=false"
    MODEL_SERVER_PORT: Engine Value("PORT") "model-server-port" = "", common;
        "Port of the local decoder; rank r is on PORT + r [default: 8200]"
    VLLM_PORT: Engine Value("PORT") "vllm-port" = "";
        "Deprecated name of --model-server-port"
    MODEL_SERVER_HOST: Engine Value("HOST") "model-server-host" = "localhost";
        "Host of the local decoder"
    MODEL_SERVER_SOCKET: Engine Value("PATH") "model-server-socket" = "", common;
        "Unix socket of the local decoder in place of a port (vLLM: --uds): a path, or @name for an \
         abstract one; {rank} in it is the rank's number"
    DATA_PARALLEL_SIZE: Engine Value("N") "data-parallel-size" = "1", common;
        "Data-parallel ranks served, each on its own port"
    MAX_IDLE_CONNS_PER_HOST: Engine Value("N") "max-idle-conns-per-host" = "1024";
        "Idle connections kept per engine rank"
    UPSTREAM_IDLE_TIMEOUT: Engine Value("DURATION") "upstream-idle-timeout" = "4s";
        "Close an idle engine connection after this long; keep it below the engine's own \
         keep-alive (uvicorn: 5s)"
    KV_CONNECTOR: PrefillDecode Value("NAME") "kv-connector" = "nixlv2", common;
        "How prefill and decode hand over the KV cache: nixlv2"
    ENABLE_PREFILLER_SAMPLING: PrefillDecode Switch "enable-prefiller-sampling" = "false";
        "Pick a random prefill candidate instead of the first [env: ENABLE_PREFILLER_SAMPLING]"
    PREFILL_MAX_RETRIES: PrefillDecode Value("N") "prefill-max-retries" = "0";
        "Repeat a prefill that answered 502, 503 or 504 this many times"
    PREFILL_RETRY_BACKOFF: PrefillDecode Value("DURATION") "prefill-retry-backoff" = "200ms";
        "Wait between prefill attempts"
    ON_MISSING_KV: PrefillDecode Value("ACTION") "on-missing-kv" = "decode";
        "Prefill answered without a usable handoff: decode (locally) or error"
    HANDOFF_MAX_AGE: PrefillDecode Value("DURATION") "handoff-max-age" = "20s";
        "Never start decode with an older handoff; keep it below the engine's lease (30s)"
    HIDE_PREFILL_ERRORS: PrefillDecode Switch "hide-prefill-errors" = "false";
        "Answer a failed prefill with our own text instead of the engine's"
    ON_DECODE_KV_ERROR: PrefillDecode Value("ACTION") "on-decode-kv-error" = "recompute";
        "Decode could not load the KV cache: recompute (without the handoff) or error"
    ALLOW_FLAT_BLOCKS: PrefillDecode Switch "allow-flat-blocks" = "false";
        "Take handoffs whose block ids are one flat list, as older engines write them"
    MAX_BODY: Limits Value("SIZE") "max-body" = "512MiB";
        "Largest request body"
    BODY_BUDGET: Limits Value("SIZE") "body-budget" = "2GiB";
        "Bytes of all bodies held for prefill/decode together"
    MAX_PREFILL_ANSWER: Limits Value("SIZE") "max-prefill-answer" = "64MiB";
        "Largest prefill answer"
    CONNECT_TIMEOUT: Timeouts Value("DURATION") "connect-timeout" = "2s";
        "Connecting to an engine"
    HEAD_TIMEOUT: Timeouts Value("DURATION") "head-timeout" = "10s";
        "A client's request head, in total"
    BODY_TIMEOUT: Timeouts Value("DURATION") "body-timeout" = "30s";
        "A client's upload without progress"
    CLIENT_STALL_TIMEOUT: Timeouts Value("DURATION") "client-stall-timeout" = "300s";
        "A client that does not take its answer"
    KEEPALIVE_TIMEOUT: Timeouts Value("DURATION") "keepalive-timeout" = "300s";
        "An idle client connection"
    FIRST_BYTE_TIMEOUT: Timeouts Value("DURATION") "first-byte-timeout" = "off";
        "An engine that stays silent before its first answer byte"
    PREFILL_TIMEOUT: Timeouts Value("DURATION") "prefill-timeout" = "off";
        "One prefill attempt, in total"
    DRAIN_TIMEOUT: Timeouts Value("DURATION") "drain-timeout" = "60s";
        "Running requests after SIGTERM"
    DRAIN_SETTLE: Timeouts Value("DURATION") "drain-settle" = "0s";
        "Keep accepting this long after SIGTERM, while load balancers notice"
    ADMIN_ADDRESS: Observability Value("ADDR") "admin-address" = "127.0.0.1:9890";
        "Address of /metrics, /livez and /readyz, or off"
    LOG_LEVEL: Observability Value("LEVEL") "log-level" = "info", common;
        "error, warn, info, debug or trace"
    LOG_FORMAT: Observability Value("FORMAT") "log-format" = "text";
        "text or json, on stderr"
    ACCESS_LOG: Observability Value("TARGET") "access-log" = "off";
        "One JSON line per request: off, stdout, stderr or a file"
    CORES: Performance Value("WHERE") "cores" = "auto";
        "Where shards are pinned. auto: one, beside the GPUs this process can open, else on the last \
         CPU. 1 or 0-3,8: one on each CPU (names, not a count). near:gpu0, near:gpu0-3, near:eth0, \
         near:mlx5_0, near:0000:3b:00.0, numa:1 or numa:0-1: one on the best CPU there; *N behind it \
         gives N, spread over the nodes"
    BUSY_POLL: Performance Value("DURATION") "busy-poll" = "off";
        "Keep looking for events this long after the last one before sleeping, such as 50us; takes \
         the shard's CPU for itself"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_sorted_by_group() {
        let mut names: Vec<_> = ALL.iter().map(|key| key.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
        let mut groups: Vec<_> = ALL.iter().map(|key| key.group).collect();
        groups.dedup();
        assert_eq!(groups.len(), 7, "a group is listed twice");
        assert!(ALL.iter().all(|key| !key.help.ends_with('.')));
    }
}
