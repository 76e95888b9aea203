//! The flags of `ringside sidecar`, which are also keys of documents: name, default and help text.
//!
//! The command line parser, `--help` and the checks all use this one table, so a key cannot be
//! missing from one of them. A key that pd-sidecar also has keeps pd-sidecar's name.

/// Heading under which `--help` lists a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Keys for the addresses on which clients are served.
    Listen,
    /// Keys for the local decoder and for connections to engines.
    Engine,
    /// Keys for prefill/decode disaggregation.
    PrefillDecode,
    /// Keys for `MoRI-IO`, a mode of nixlv2.
    MoriIo,
    /// Keys for TLS towards clients and engines.
    Tls,
    /// Keys for the allowlist of targets that requests may name.
    Allowlist,
    /// Keys for size limits.
    Limits,
    /// Keys for time limits.
    Timeouts,
    /// Keys for logs, metrics, tracing and the admin server.
    Observability,
    /// Keys for threads and CPUs.
    Performance,
    /// Keys that specify a configuration document.
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
    /// Name of the flag without leading dashes, which is also the key in a document.
    pub name: &'static str,
    /// Form of the key's value on the command line.
    pub kind: Kind,
    /// Default value; empty if there is none.
    pub default: &'static str,
    /// Environment variable that takes precedence over the default; `None` if the key has none.
    pub environment: Option<&'static str>,
    /// Heading under which `--help` lists the key.
    pub group: Group,
    /// Whether the short help (`-h`) lists the key.
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
        "Listening port for clients; rank r listens on PORT + r"
    HOST: Listen Value("ADDR") "host" = "";
        "IP address to listen on [default: all addresses, IPv4 and IPv6]"
    MODEL_SERVER_PORT: Engine Value("PORT") "model-server-port" = "8200", common;
        "Port of the local decoder; the decoder of rank r uses PORT + r"
    VLLM_PORT: Engine Value("PORT") "vllm-port" = "";
        "Deprecated name of --model-server-port"
    MODEL_SERVER_HOST: Engine Value("HOST") "model-server-host" = "localhost";
        "Host name or IP address of the local decoder"
    MODEL_SERVER_SOCKET: Engine Value("PATH") "model-server-socket" = "", common;
        "Unix socket of the local decoder instead of a port (vLLM: --uds): a path, or @NAME for an \
         abstract socket; {rank} is replaced by the rank number"
    DATA_PARALLEL_SIZE: Engine Value("N") "data-parallel-size" = "1", common;
        "Number of data-parallel ranks to serve, each on its own port"
    MAX_IDLE_CONNS_PER_HOST: Engine Value("N") "max-idle-conns-per-host" = "1024";
        "Idle connections that each shard keeps per engine rank"
    UPSTREAM_IDLE_TIMEOUT: Engine Value("DURATION") "upstream-idle-timeout" = "4s";
        "Close an engine connection after this idle time; keep it below the engine's keep-alive \
         timeout (uvicorn: 5s)"
    KV_CONNECTOR: PrefillDecode Value("NAME") "kv-connector" = "nixlv2", common;
        "Protocol for passing the KV cache from prefill to decode: nixlv2, shared-storage, sglang, \
         mooncake, offloading, nixl, lmcache or atom"
    EC_CONNECTOR: PrefillDecode Value("NAME") "ec-connector" = "";
        "Protocol for passing encoder output: ec-example or ec-nixl; without it, no encoders \
         are used"
    ENABLE_PREFILLER_SAMPLING: PrefillDecode Switch "enable-prefiller-sampling" = "false"
        or "ENABLE_PREFILLER_SAMPLING";
        "Choose a random prefill candidate instead of the first"
    ATOM_DP_SIZE: PrefillDecode Value("N") "atom-dp-size" = "1";
        "Data-parallel size of ATOM engines (atom only)"
    MOONCAKE_BOOTSTRAP_PORT: PrefillDecode Value("PORT") "mooncake-bootstrap-port" = "8998"
        or "MOONCAKE_BOOTSTRAP_PORT";
        "Port of the Mooncake bootstrap server on prefillers"
    P2P_CONNECTOR_PORT: PrefillDecode Value("PORT") "p2p-connector-port" = "7777"
        or "P2P_CONNECTOR_PORT";
        "Port of the offloading connector's P2P tier; rank r uses PORT + r"
    ENABLE_P2P_PULL: PrefillDecode Switch "enable-p2p-pull" = "false";
        "Let prefillers pull a cached prefix from the peer named in the request (nixlv2 only)"
    ENABLE_SPECULATIVE_PREFILL: PrefillDecode Switch "enable-speculative-prefill" = "false";
        "After a chat turn whose request has `x-speculative-prefill: true`, let the prefiller compute \
         the conversation for the next turn"
    DECODE_CHUNK_SIZE: PrefillDecode Value("TOKENS") "decode-chunk-size" = "0";
        "Decode in chunks of this many tokens; 0 decodes in one request"
    PREFILL_MAX_RETRIES: PrefillDecode Value("N") "prefill-max-retries" = "0";
        "Number of retries of a prefill whose connection fails or that returns 502, 503 or 504"
    PREFILL_RETRY_BACKOFF: PrefillDecode Value("DURATION") "prefill-retry-backoff" = "200ms";
        "Pause before each prefill retry"
    ON_PREFILL_FAILURE: PrefillDecode Value("ACTION") "on-prefill-failure" = "error";
        "After a failed prefill: error (return the error) or decode (process the prompt locally)"
    ON_MISSING_KV: PrefillDecode Value("ACTION") "on-missing-kv" = "decode";
        "If there is no usable handoff: decode (process the prompt locally) or error"
    HANDOFF_MAX_AGE: PrefillDecode Value("DURATION") "handoff-max-age" = "20s";
        "Maximum age of a handoff; keep it below the engine's lease (vLLM: 30s)"
    HIDE_PREFILL_ERRORS: PrefillDecode Switch "hide-prefill-errors" = "false";
        "Replace the engine's error message for a failed prefill or encode leg with a generic one"
    ON_DECODE_KV_ERROR: PrefillDecode Value("ACTION") "on-decode-kv-error" = "recompute";
        "If decode cannot load the KV cache: recompute (retry without the handoff) or error"
    CHECK_HANDOFF_VERSIONS: PrefillDecode Switch "check-handoff-versions" = "true";
        "Ask engines for their versions and withhold handoffs whose block ids would make a decoder \
         of that version exit (nixlv2 only)"
    TRUST_CLIENT_KV: PrefillDecode Switch "trust-client-kv" = "false";
        "Pass transfer parameters sent by clients to engines; unsafe unless all clients are trusted"
    RELEASE_STRANDED_KV: PrefillDecode Switch "release-stranded-kv" = "true";
        "Make the prefiller free KV cache that no decoder will fetch (nixlv2 and mooncake only)"
    MORIIO_WRITE_MODE: MoriIo Switch "moriio-write-mode" = "false";
        "Let prefillers write into the decoder's memory (nixlv2 only); without it, only --moriio-dp-size \
         and --moriio-dp-size-local have an effect"
    MORIIO_PARALLEL_DISPATCH: MoriIo Switch "moriio-parallel-dispatch" = "false";
        "Run prefill and decode concurrently; requires --moriio-write-mode"
    MORIIO_PARALLEL_DECODE_WAIT_TIMEOUT: MoriIo Value("DURATION")
        "moriio-parallel-decode-wait-timeout" = "30s";
        "Longest time to hold back a decode response until prefill has succeeded"
    MORIIO_LOCAL_POD_IP: MoriIo Value("ADDR") "moriio-local-pod-ip" = "" or "POD_IP";
        "Address of this pod for prefillers; required with --moriio-write-mode"
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
        "Data-parallel size of the engines, across all pods"
    MORIIO_DP_SIZE_LOCAL: MoriIo Value("N") "moriio-dp-size-local" = "0";
        "Data-parallel ranks per pod; 0 if there is only one pod"
    MORIIO_REMOTE_HOSTS: MoriIo List("HOSTS") "moriio-remote-hosts" = "";
        "Prefill pods in rank order, as IP addresses or host names"
    MORIIO_DECODE_HOSTS: MoriIo List("HOSTS") "moriio-decode-hosts" = "";
        "Decode pods in rank order, as IP addresses or host names"
    SECURE_SERVING: Tls Switch "secure-serving" = "true", common;
        "Serve TLS to clients; --secure-serving=false serves plain text"
    SECURE_PROXY: Tls Switch "secure-proxy" = "", common;
        "Older name of --secure-serving"
    CERT_PATH: Tls Value("DIR") "cert-path" = "";
        "Directory with tls.crt and tls.key, reloaded when they change; without it, a self-signed \
         certificate is used"
    TLS_MIN_VERSION: Tls Value("VERSION") "tls-min-version" = "VersionTLS12";
        "Lowest TLS version for clients: VersionTLS12 or VersionTLS13"
    TLS_CIPHER_SUITES: Tls List("SUITES") "tls-cipher-suites" = "";
        "Cipher suites for clients with TLS 1.2, by their IANA names; without it, all that are \
         supported [those of TLS 1.3 are always enabled]"
    ENABLE_TLS: Tls List("STAGES") "enable-tls" = "";
        "Connect with TLS to these engines: prefiller, decoder, encoder"
    TLS_INSECURE_SKIP_VERIFY: Tls List("STAGES") "tls-insecure-skip-verify" = "";
        "Do not verify the certificates of these engines: prefiller, decoder, encoder"
    TLS_CA_FILE: Tls Value("FILE") "tls-ca-file" = "";
        "CA certificates (PEM) to trust for engines, in addition to the system's"
    TLS_CLIENT_CERT: Tls Value("FILE") "tls-client-cert" = "";
        "Client certificate chain (PEM) for engines that request one; requires --tls-client-key"
    TLS_CLIENT_KEY: Tls Value("FILE") "tls-client-key" = "";
        "Private key (PEM) of --tls-client-cert"
    ENABLE_SSRF_PROTECTION: Allowlist Switch "enable-ssrf-protection" = "false";
        "Refuse requests that name a target not allowed by the flags below"
    INFERENCE_POOL: Allowlist Value("[NS/]NAME") "inference-pool" = "" or "INFERENCE_POOL";
        "Allow the pods of this InferencePool; requires --enable-ssrf-protection"
    POOL_GROUP: Allowlist Value("GROUP") "pool-group" = "inference.networking.k8s.io";
        "API group of the pool: inference.networking.k8s.io or inference.networking.x-k8s.io"
    ALLOW_TARGET: Allowlist List("RULES") "allow-target" = "";
        "Allow HOST or CIDR, optionally with :PORT; implies --enable-ssrf-protection"
    ALLOW_TARGETS_FILE: Allowlist Value("FILE") "allow-targets-file" = "";
        "Allow the rules in this file, one per line, reloaded when it changes; implies \
         --enable-ssrf-protection"
    MAX_BODY: Limits Value("SIZE") "max-body" = "512MiB";
        "Maximum size of a request body"
    BODY_BUDGET: Limits Value("SIZE") "body-budget" = "2GiB";
        "Maximum total size of what is kept for prefill/decode: request bodies, handoffs, and other \
         responses that ringside reads"
    MAX_PREFILL_RESPONSE: Limits Value("SIZE") "max-prefill-answer" = "128MiB";
        "Maximum size of what is kept of a prefill response, and of any other response that ringside \
         reads instead of relaying it"
    MAX_CONNECTIONS: Limits Value("N") "max-connections" = "auto";
        "Maximum number of client connections; at the limit, idle ones are closed in favour of new \
         ones. auto: half of the file descriptors, since each request needs one to an engine too"
    CONNECT_TIMEOUT: Timeouts Value("DURATION") "connect-timeout" = "2s";
        "Time limit for connecting to an engine"
    HEAD_TIMEOUT: Timeouts Value("DURATION") "head-timeout" = "10s";
        "Time limit for receiving a complete request head"
    BODY_TIMEOUT: Timeouts Value("DURATION") "body-timeout" = "30s";
        "Longest time between two reads of a request body; of one that is kept, in which 16 KiB must \
         arrive"
    CLIENT_STALL_TIMEOUT: Timeouts Value("DURATION") "client-stall-timeout" = "300s";
        "Longest time a client may go without accepting response data"
    KEEPALIVE_TIMEOUT: Timeouts Value("DURATION") "keepalive-timeout" = "300s";
        "Close a client connection after this idle time"
    FIRST_BYTE_TIMEOUT: Timeouts Value("DURATION") "first-byte-timeout" = "off";
        "Longest time an engine may take to send its first response byte"
    PREFILL_TIMEOUT: Timeouts Value("DURATION") "prefill-timeout" = "off";
        "Time limit for one prefill attempt"
    DRAIN_TIMEOUT: Timeouts Value("DURATION") "drain-timeout" = "60s";
        "Longest time to wait for running requests after SIGTERM"
    DRAIN_SETTLE: Timeouts Value("DURATION") "drain-settle" = "0s";
        "Keep accepting connections this long after SIGTERM, so that load balancers can react"
    ADMIN_ADDRESS: Observability Value("ADDR") "admin-address" = "127.0.0.1:9890";
        "Address of the admin server (/metrics, /livez, /readyz), or off"
    METRICS_PORT: Observability Value("PORT") "metrics-port" = "0";
        "Also serve /metrics on this port of all addresses; 0 is off [env: MORIIO_METRICS_ADDR, an \
         address, used if this is 0]"
    METRICS_CERT_DIR: Observability Value("DIR") "metrics-cert-dir" = "";
        "Directory with tls.crt and tls.key for TLS on --metrics-port, reloaded when they change; \
         without it, that port serves plain text"
    TRACING: Observability Switch "tracing" = "false";
        "Record OpenTelemetry spans; OTEL_* variables set the share of traces (default: 10 %) and the \
         destination (default: stdout)"
    LOG_LEVEL: Observability Value("LEVEL") "log-level" = "info", common;
        "Log messages of this level and above: error, warn, info, debug or trace"
    LOG_FORMAT: Observability Value("FORMAT") "log-format" = "text";
        "Format of the log on stderr: text or json"
    LOG_DIR: Observability Value("DIR") "log-dir" = "";
        "Also write the log to a file in this directory, ringside-PORT.log"
    LOG_FILE: Observability Value("FILE") "log-file" = "";
        "Also write the log to this file"
    LOG_FILE_MAX_SIZE: Observability Value("SIZE") "log-file-max-size" = "1800MiB";
        "Size at which the log file is renamed to FILE.1, and older ones up to FILE.4, and a new one \
         is begun"
    ACCESS_LOG: Observability Value("TARGET") "access-log" = "off";
        "Write one JSON line per request to stdout, stderr or a file; off disables it"
    CORES: Performance Value("WHERE") "cores" = "auto";
        "CPUs to run shards on. auto: one shard, on the CPUs near the GPUs this process can open, \
         pinned to one of them if they are reserved for it. any: one shard that is not pinned, \
         any*N: N such shards. 1 or 0-3,8: one shard on each listed CPU (CPU numbers, not a count). \
         near:gpu0, near:gpu0-3, near:eth0, near:mlx5_0, near:0000:3b:00.0, numa:1 or numa:0-1: \
         one shard on the best CPU there; a suffix *N starts N shards, spread over the NUMA nodes"
    BUSY_POLL: Performance Value("DURATION") "busy-poll" = "off";
        "Poll for events this long after the last one before sleeping, for example 50us; keeps the \
         shard's CPU fully busy"
    CONFIGURATION: Configuration Value("YAML") "configuration" = "";
        "YAML or JSON document whose keys are flag names without dashes, such as '{port: 8000}'; flags \
         override it"
    CONFIGURATION_FILE: Configuration Value("FILE") "configuration-file" = "";
        "File with a YAML or JSON document whose keys are flag names without dashes"
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
        assert_eq!(groups.len(), 11, "the keys of a group are not adjacent");
        assert!(ALL.iter().all(|key| !key.help.ends_with('.')));
    }
}
