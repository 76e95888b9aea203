//! The configuration keys of `ringside sidecar`: name, default and help text.
//!
//! The command line parser, `--help` and the checks all use this one table, so a key cannot be
//! missing from one of them. A key that pd-sidecar also has keeps pd-sidecar's name.

/// Heading under which `--help` lists a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Listening addresses for clients.
    Listen,
    /// The local decoder and connections to engines.
    Engine,
    /// Prefill/decode disaggregation.
    PrefillDecode,
    /// `MoRI-IO`, a mode of nixlv2.
    MoriIo,
    /// TLS.
    Tls,
    /// Targets that requests may name.
    Allowlist,
    /// Size limits.
    Limits,
    /// Time limits.
    Timeouts,
    /// Logs, metrics, tracing and the admin server.
    Observability,
    /// Threads and CPUs.
    Performance,
    /// Configuration documents.
    Configuration,
}

impl Group {
    /// Returns the heading text.
    #[must_use]
    pub const fn heading(self) -> &'static str {
        match self {
            Self::Listen => "Listen",
            Self::Engine => "Engine",
            Self::PrefillDecode => "Prefill/decode",
            Self::MoriIo => "MoRI-IO",
            Self::Tls => "TLS",
            Self::Allowlist => "Allowed targets",
            Self::Limits => "Limits",
            Self::Timeouts => "Timeouts",
            Self::Observability => "Observability",
            Self::Performance => "Performance",
            Self::Configuration => "Configuration",
        }
    }
}

/// The form of a key's value on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `--key`, `--key=true` or `--key=false`, never `--key true`.
    Switch,
    /// `--key value` or `--key=value`. Contains the placeholder shown in `--help`.
    Value(&'static str),
    /// Like `Value`, but repeatable; each occurrence has one value or several, separated by commas.
    List(&'static str),
}

/// One configuration key.
#[derive(Debug)]
pub struct Key {
    /// Name without leading dashes.
    pub name: &'static str,
    /// Form of its value.
    pub kind: Kind,
    /// Default value; empty if there is none.
    pub default: &'static str,
    /// Environment variable that takes precedence over the default.
    pub environment: Option<&'static str>,
    /// Heading in `--help`.
    pub group: Group,
    /// Whether the short help (`-h`) lists it.
    pub common: bool,
    /// Help text, without the final full stop.
    pub help: &'static str,
}

macro_rules! keys {
    ($($id:ident: $group:ident $kind:ident $(($value:literal))? $name:literal = $default:literal
        $(or $environment:literal)? $(, $common:ident)? ; $help:literal)*) => {
        $(
            #[doc = concat!("`--", $name, "`: ", $help)]
            pub const $id: Key = Key {
                name: $name,
                kind: Kind::$kind $(($value))?,
                default: $default,
                environment: keys!(@environment $($environment)?),
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
    (@environment $name:literal) => { Some($name) };
    (@environment) => { None };
}

keys! {
    PORT: Listen Value("PORT") "port" = "8000", common;
        "Port clients connect to; rank r listens on PORT + r"
    HOST: Listen Value("ADDR") "host" = "";
        "Address to listen on [default: all, IPv4 and IPv6]"
    MODEL_SERVER_PORT: Engine Value("PORT") "model-server-port" = "8200", common;
        "Port of the local decoder; rank r is on PORT + r"
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
        "How prefill and decode hand over the KV cache: nixlv2, shared-storage, sglang, mooncake, \
         offloading, nixl or lmcache"
    EC_CONNECTOR: PrefillDecode Value("NAME") "ec-connector" = "";
        "How encoders hand over their output: ec-example or ec-nixl; encoders are not used without it"
    ENABLE_PREFILLER_SAMPLING: PrefillDecode Switch "enable-prefiller-sampling" = "false"
        or "ENABLE_PREFILLER_SAMPLING";
        "Pick a random prefill candidate instead of the first"
    MOONCAKE_BOOTSTRAP_PORT: PrefillDecode Value("PORT") "mooncake-bootstrap-port" = "8998"
        or "MOONCAKE_BOOTSTRAP_PORT";
        "Port of Mooncake's bootstrap server on prefillers"
    P2P_CONNECTOR_PORT: PrefillDecode Value("PORT") "p2p-connector-port" = "7777"
        or "P2P_CONNECTOR_PORT";
        "Port of the offloading connector's P2P tier; rank r is on PORT + r"
    ENABLE_P2P_PULL: PrefillDecode Switch "enable-p2p-pull" = "false";
        "Let prefillers pull a cached prefix from a peer that the request names (nixlv2)"
    DECODE_CHUNK_SIZE: PrefillDecode Value("TOKENS") "decode-chunk-size" = "0";
        "Decode in chunks of this many tokens; 0 is off"
    PREFILL_MAX_RETRIES: PrefillDecode Value("N") "prefill-max-retries" = "0";
        "Repeat a prefill that answered 502, 503 or 504 this many times"
    PREFILL_RETRY_BACKOFF: PrefillDecode Value("DURATION") "prefill-retry-backoff" = "200ms";
        "Wait between prefill attempts"
    ON_PREFILL_FAILURE: PrefillDecode Value("ACTION") "on-prefill-failure" = "error";
        "Prefill failed: error (the prefiller's) or decode (locally)"
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
    TRUST_CLIENT_KV: PrefillDecode Switch "trust-client-kv" = "false";
        "Let a client's own transfer parameters reach engines: only where every client is yours"
    RELEASE_STRANDED_KV: PrefillDecode Switch "release-stranded-kv" = "false";
        "Ask the prefiller to give up KV cache that nobody will fetch"
    MORIIO_WRITE_MODE: MoriIo Switch "moriio-write-mode" = "false";
        "Prefillers write into the decoder's memory; without it only --moriio-dp-size has an effect"
    MORIIO_PARALLEL_DISPATCH: MoriIo Switch "moriio-parallel-dispatch" = "false";
        "Start prefill and decode together; needs --moriio-write-mode"
    MORIIO_PARALLEL_DECODE_WAIT_TIMEOUT: MoriIo Value("DURATION")
        "moriio-parallel-decode-wait-timeout" = "30s";
        "Hold an answer back for the prefiller's at most this long"
    MORIIO_LOCAL_POD_IP: MoriIo Value("ADDR") "moriio-local-pod-ip" = "" or "POD_IP";
        "This pod as prefillers reach it; needed for --moriio-write-mode"
    MORIIO_DECODE_NOTIFY_PORT: MoriIo Value("PORT") "moriio-decode-notify-port" = "61005";
        "Notification port of decoders"
    MORIIO_PREFILL_NOTIFY_PORT: MoriIo Value("PORT") "moriio-prefill-notify-port" = "61005";
        "Notification port of prefillers"
    MORIIO_DECODE_HANDSHAKE_PORT: MoriIo Value("PORT") "moriio-decode-handshake-port" = "6301";
        "Handshake port of decoders"
    MORIIO_PREFILL_HANDSHAKE_PORT: MoriIo Value("PORT") "moriio-prefill-handshake-port" = "6301";
        "Handshake port of prefillers"
    MORIIO_TP_SIZE: MoriIo Value("N") "moriio-tp-size" = "1";
        "Tensor-parallel size of the engines"
    MORIIO_DP_SIZE: MoriIo Value("N") "moriio-dp-size" = "1";
        "Data-parallel size of the engines, over all pods"
    MORIIO_DP_SIZE_LOCAL: MoriIo Value("N") "moriio-dp-size-local" = "0";
        "Data-parallel ranks of one pod; 0 when there is one pod"
    MORIIO_REMOTE_HOSTS: MoriIo List("HOSTS") "moriio-remote-hosts" = "";
        "The prefill pods in rank order, addresses or names"
    MORIIO_DECODE_HOSTS: MoriIo List("HOSTS") "moriio-decode-hosts" = "";
        "The decode pods in rank order, addresses or names"
    SECURE_PROXY: Tls Switch "secure-proxy" = "true", common;
        "Serve TLS; --secure-proxy=false serves plain text"
    CERT_PATH: Tls Value("DIR") "cert-path" = "";
        "Directory of tls.crt and tls.key, read again when they change; without it the certificate is \
         self-signed"
    ENABLE_TLS: Tls List("STAGES") "enable-tls" = "";
        "Speak TLS to these: prefiller, decoder, encoder"
    TLS_INSECURE_SKIP_VERIFY: Tls List("STAGES") "tls-insecure-skip-verify" = "";
        "Take any certificate of these: prefiller, decoder, encoder"
    TLS_CA_FILE: Tls Value("FILE") "tls-ca-file" = "";
        "Certificates (PEM) that engines' may be signed by, besides the system's"
    TLS_CLIENT_CERT: Tls Value("FILE") "tls-client-cert" = "";
        "Certificate chain (PEM) shown to engines that ask for one; needs --tls-client-key"
    TLS_CLIENT_KEY: Tls Value("FILE") "tls-client-key" = "";
        "Its key (PEM)"
    ENABLE_SSRF_PROTECTION: Allowlist Switch "enable-ssrf-protection" = "false";
        "Refuse requests that name other engines than those allowed below"
    INFERENCE_POOL: Allowlist Value("[NS/]NAME") "inference-pool" = "" or "INFERENCE_POOL";
        "Allow the pods of this InferencePool; needs --enable-ssrf-protection"
    POOL_GROUP: Allowlist Value("GROUP") "pool-group" = "inference.networking.k8s.io";
        "API group of the pool: this one, or inference.networking.x-k8s.io"
    ALLOW_TARGET: Allowlist List("RULES") "allow-target" = "";
        "Allow HOST or CIDR, with or without :PORT; turns the protection on by itself"
    ALLOW_TARGETS_FILE: Allowlist Value("FILE") "allow-targets-file" = "";
        "Allow what this file says, one rule per line, read again when it changes; turns the \
         protection on by itself"
    MAX_BODY: Limits Value("SIZE") "max-body" = "512MiB";
        "Largest request body"
    BODY_BUDGET: Limits Value("SIZE") "body-budget" = "2GiB";
        "Bytes of all bodies held for prefill/decode together"
    MAX_PREFILL_RESPONSE: Limits Value("SIZE") "max-prefill-answer" = "64MiB";
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
    METRICS_PORT: Observability Value("PORT") "metrics-port" = "0";
        "Serve /metrics on this port of all addresses too; 0 is off [env: MORIIO_METRICS_ADDR, an \
         address, where it is 0]"
    TRACING: Observability Switch "tracing" = "false";
        "Record OpenTelemetry spans; OTEL_* variables say which (a tenth) and where to (stdout)"
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
    CONFIGURATION: Configuration Value("YAML") "configuration" = "";
        "Flags without dashes as YAML or JSON, such as '{port: 8000}'; flags win"
    CONFIGURATION_FILE: Configuration Value("FILE") "configuration-file" = "";
        "The same in a file"
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
        assert_eq!(groups.len(), 11, "a group is listed twice");
        assert!(ALL.iter().all(|key| !key.help.ends_with('.')));
    }
}
