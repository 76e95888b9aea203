//! `ringside sidecar`: a replacement for llm-d's pd-sidecar and its predecessor.

use super::contract::{Alias, Personality};
use super::removed;
use crate::api::PD_SIDECAR;
use crate::config::flag_table;
use crate::config::read::{Reader, TLS_OR_PLAIN_TEXT};
use crate::config::{Config, DrainConfig, ErrorStyle};

/// The personality of pd-sidecar.
pub const SIDECAR: Personality = Personality {
    name: "sidecar",
    about: "Run as a replacement for llm-d's pd-sidecar, with the same flags",
    examples: EXAMPLES,
    notes: NOTES,
    aliases: &[
        Alias {
            program: "pd-sidecar",
            defaults: &[],
        },
        // The predecessor of pd-sidecar.
        Alias {
            program: "llm-d-routing-sidecar",
            defaults: &[
                (&flag_table::MODEL_SERVER_PORT, "8001"),
                (&flag_table::POOL_GROUP, "inference.networking.x-k8s.io"),
                (&flag_table::SECURE_SERVING, TLS_OR_PLAIN_TEXT),
            ],
        },
    ],
    table: flag_table::ALL,
    variables: &VARIABLES,
    removed: removed::ALL,
    apply_removed: removed::apply,
    read,
    routes: &PD_SIDECAR,
    errors: ErrorStyle::PdSidecar,
};

/// Environment variables that do not correspond to a single key.
const VARIABLES: [&str; 24] = [
    "POD_IP",
    "INFERENCE_POOL_NAMESPACE",
    "INFERENCE_POOL_NAME",
    "SGLANG_BOOTSTRAP_PORT",
    "MORIIO_METRICS_ADDR",
    "MORIIO_DNS_RESOLVE_TTL_SECONDS",
    "MORIIO_DNS_RESOLVE_TIMEOUT_SECONDS",
    "OTEL_TRACES_EXPORTER",
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
    "OTEL_SERVICE_NAME",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_EXPORTER_OTLP_TIMEOUT",
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
    "OTEL_EXPORTER_OTLP_INSECURE",
    "OTEL_EXPORTER_OTLP_TRACES_INSECURE",
    "OTEL_EXPORTER_OTLP_CERTIFICATE",
    "OTEL_EXPORTER_OTLP_TRACES_CERTIFICATE",
];

const EXAMPLES: &str = "\
Examples:
  Replace pd-sidecar next to a decoder on port 8200:
    ringside sidecar --port 8000 --model-server-port 8200
  Serve four data-parallel ranks (ports 8000-8003 to 8200-8203) with two shards near GPUs 0 to 3:
    ringside sidecar --data-parallel-size 4 --cores 'near:gpu0-3*2' --secure-serving=false
  Print every value with its source:
    ringside check-config --configuration-file /etc/ringside.yaml";

const NOTES: &str = "\
Switches take =true or =false. The last of a repeated flag takes effect; lists are concatenated.
Precedence: flags, YAML, environment, defaults. Flags removed from pd-sidecar are still accepted.
Durations: 250ms, 30s, 5m, 1m30s, 1h; any timeout can be `off`. Sizes: 65536, 64KiB, 512MiB, 1MB.
Other variables: POD_IP, SGLANG_BOOTSTRAP_PORT, MORIIO_METRICS_ADDR, MORIIO_DNS_RESOLVE_*, OTEL_*.
Exit codes: 0 success, 1 runtime error, 2 usage, 3 configuration, 4 port or permission, 5 kernel.";

fn read(reader: &mut Reader<'_>) -> Config {
    reader.sources();
    let size = reader.data_parallel_size();
    let (listeners, pools) = reader.ranks(size);
    let port = listeners.first().map_or(0, |one| one.address.port());
    Config {
        listeners,
        pools,
        routes: SIDECAR.routes,
        errors: SIDECAR.errors,
        pod_ip: reader.raw.variable("POD_IP").map(str::to_owned),
        pd: reader.pd(size),
        tls: reader.tls(),
        allowlist: reader.allowlist(),
        tracing: reader.tracing(),
        metrics: reader.metrics(true),
        timeouts: reader.timeouts(),
        upstream: reader.upstream(),
        limits: reader.limits(),
        cores: reader.cores(),
        busy_poll: reader.busy_poll(),
        admin: reader.admin(),
        log: reader.log(port),
        drain: DrainConfig {
            timeout: reader.timeout(&flag_table::DRAIN_TIMEOUT),
            settle: reader.duration(&flag_table::DRAIN_SETTLE),
        },
    }
}
