//! Tests of the checks. The prefixes `g2_` and `g3_` of test names are rows of the conformance
//! suite (`docs/pd-sidecar.md#conformance`).

use std::time::Duration;

use super::*;
use crate::config::personality::SIDECAR;
use crate::config::{
    AccessLog, Cores, EcConnector, Key, KvConnector, ListenAddress, Listener, OnPrefillFailure,
    PoolConfig, flag_table, units,
};
use crate::fleet::Target;

pub(in crate::config) type Given<'a> = &'a [(&'a Key, &'a str)];

/// Creates an unchecked configuration from environment variables and flags, with
/// `--secure-proxy=false`.
pub(in crate::config) fn draft_in(
    environment: &[(&str, &str)],
    given: &[(&Key, &str)],
) -> RawConfig {
    let find = |name: &str| environment.iter().find(|(other, _)| *other == name);
    let mut raw = RawConfig::new(SIDECAR.table, SIDECAR.variables, &|name| {
        find(name).map(|(_, value)| (*value).to_owned())
    });
    raw.set(&flag_table::SECURE_PROXY, "false");
    for (key, value) in given {
        raw.set(key, *value);
    }
    raw
}

pub(in crate::config) fn checked(given: &[(&Key, &str)]) -> Checked {
    checked_in(&[], given)
}

pub(in crate::config) fn checked_in(
    environment: &[(&str, &str)],
    given: &[(&Key, &str)],
) -> Checked {
    check(&SIDECAR, &draft_in(environment, given))
        .unwrap_or_else(|problems| panic!("{given:?}: {problems:?}"))
}

pub(in crate::config) fn problems(given: &[(&Key, &str)]) -> Vec<String> {
    problems_in(&[], given)
}

pub(in crate::config) fn problems_in(
    environment: &[(&str, &str)],
    given: &[(&Key, &str)],
) -> Vec<String> {
    match check(&SIDECAR, &draft_in(environment, given)) {
        Ok(_) => Vec::new(),
        Err(problems) => problems.iter().map(ToString::to_string).collect(),
    }
}

#[test]
fn defaults_match_pd_sidecar() {
    let Checked { config, warnings } = checked(&[]);
    assert!(warnings.is_empty(), "{warnings:?}");
    assert_eq!(
        config.listeners,
        [Listener {
            address: ListenAddress::DualStack(8000),
            pool: 0,
        }]
    );
    assert_eq!(
        config.pools,
        [PoolConfig {
            endpoints: vec![Target::new("localhost", 8200).unwrap()],
        }]
    );
    assert_eq!(config.pd.prefill_retries_max, 0);
    assert_eq!(config.pd.prefill_retry_backoff, Duration::from_millis(200));
    assert_eq!(config.upstream.idle_per_rank_max, 1024);
    assert_eq!(config.timeouts.connect, Some(Duration::from_secs(2)));
    assert_eq!(config.timeouts.first_byte, None);
    assert_eq!(config.limits.body_bytes_max, 512 << 20);
    assert_eq!(config.cores, Cores::Auto);
    assert_eq!(config.log.access, AccessLog::Off);
    assert_eq!(config.drain.timeout, Some(Duration::from_secs(60)));
}

#[test]
fn g2_ports_ranks_and_connector() {
    use flag_table::{DATA_PARALLEL_SIZE, KV_CONNECTOR, MODEL_SERVER_PORT, PORT, VLLM_PORT};
    let table: &[(Given<'_>, &str)] = &[
        (&[(&DATA_PARALLEL_SIZE, "0")], "--data-parallel-size: `0`"),
        (&[(&DATA_PARALLEL_SIZE, "-1")], "--data-parallel-size: `-1`"),
        (
            &[(&DATA_PARALLEL_SIZE, "two")],
            "--data-parallel-size: `two`",
        ),
        (&[(&PORT, "0")], "--port: `0` is not a port"),
        (&[(&PORT, "-1")], "--port: `-1` is not a port"),
        (&[(&PORT, "65536")], "--port: `65536` is not a port"),
        (&[(&PORT, "http")], "--port: `http` is not a port"),
        (&[(&PORT, "")], "--port: `` is not a port"),
        (&[(&MODEL_SERVER_PORT, "0")], "--model-server-port: `0`"),
        (
            &[(&VLLM_PORT, "70000")],
            "--vllm-port: `70000` is not a port",
        ),
        (
            &[(&PORT, "65535"), (&DATA_PARALLEL_SIZE, "2")],
            "--port: port 65535 with --data-parallel-size 2 needs ports up to 65536",
        ),
        (
            &[(&MODEL_SERVER_PORT, "65533"), (&DATA_PARALLEL_SIZE, "4")],
            "--model-server-port: port 65533",
        ),
        (
            &[(&VLLM_PORT, "65533"), (&DATA_PARALLEL_SIZE, "4")],
            "--vllm-port: port 65533",
        ),
        (
            &[(&KV_CONNECTOR, "")],
            "--kv-connector: `` is not valid; give nixlv2, shared-storage,",
        ),
        (
            &[(&KV_CONNECTOR, "NIXLv3")],
            "--kv-connector: `NIXLv3` is not valid; did you mean `nixlv2`? Give",
        ),
    ];
    for (given, want) in table {
        let got = problems(given);
        assert_eq!(got.len(), 1, "{given:?}: {got:?}");
        assert!(got[0].starts_with(want), "{given:?}: {got:?}");
    }
    let fits = checked(&[(&PORT, "65532"), (&DATA_PARALLEL_SIZE, "4")]);
    assert_eq!(
        fits.config.listeners[3].address,
        ListenAddress::DualStack(65535)
    );
    assert_eq!(
        fits.config.pools[3].endpoints[0].to_string(),
        "localhost:8203"
    );
}

#[test]
fn g2_retries_and_durations() {
    use flag_table::{CONNECT_TIMEOUT, DRAIN_SETTLE, PREFILL_MAX_RETRIES, PREFILL_RETRY_BACKOFF};
    let table: &[(Given<'_>, &str)] = &[
        (
            &[(&PREFILL_MAX_RETRIES, "1"), (&PREFILL_RETRY_BACKOFF, "0s")],
            "--prefill-retry-backoff: must be above zero",
        ),
        (
            &[(&PREFILL_MAX_RETRIES, "-1")],
            "--prefill-max-retries: `-1`",
        ),
        (
            &[(&PREFILL_RETRY_BACKOFF, "200")],
            "--prefill-retry-backoff: `200` has no known unit",
        ),
        (
            &[(&PREFILL_RETRY_BACKOFF, "off")],
            "--prefill-retry-backoff: `off` is not a duration",
        ),
        (&[(&CONNECT_TIMEOUT, "0s")], "--connect-timeout: is zero"),
        (&[(&CONNECT_TIMEOUT, "0ms")], "--connect-timeout: is zero"),
        (
            &[(&CONNECT_TIMEOUT, "soon")],
            "--connect-timeout: `soon` is not a duration",
        ),
        (
            &[(&DRAIN_SETTLE, "")],
            "--drain-settle: `` is not a duration",
        ),
    ];
    for (given, want) in table {
        let got = problems(given);
        assert!(
            got.iter().any(|text| text.starts_with(want)),
            "{given:?}: {got:?}"
        );
    }
    assert!(problems(&[(&PREFILL_MAX_RETRIES, "0"), (&PREFILL_RETRY_BACKOFF, "0s")]).is_empty());
}

#[test]
fn g2_values() {
    use flag_table::{
        ADMIN_ADDRESS, BODY_BUDGET, BUSY_POLL, HANDOFF_MAX_AGE, HIDE_PREFILL_ERRORS, HOST,
        LOG_LEVEL, MAX_BODY, MODEL_SERVER_HOST, ON_MISSING_KV, SECURE_PROXY,
    };
    let table: &[(Given<'_>, &str)] = &[
        (
            &[(&HANDOFF_MAX_AGE, "0s")],
            "--handoff-max-age: `0s` is not valid",
        ),
        (
            &[(&HIDE_PREFILL_ERRORS, "yes")],
            "--hide-prefill-errors: `yes`",
        ),
        (
            &[(&ON_MISSING_KV, "retry")],
            "--on-missing-kv: `retry` is not valid; give decode or error",
        ),
        (&[(&LOG_LEVEL, "loud")], "--log-level: `loud`"),
        (&[(&BUSY_POLL, "2s")], "--busy-poll: `2s` is not valid"),
        (&[(&BUSY_POLL, "50")], "--busy-poll: `50`"),
        (&[(&HOST, "example.org")], "--host: `example.org`"),
        (
            &[(&MODEL_SERVER_HOST, "http://x")],
            "--model-server-host: `http://x`",
        ),
        (
            &[(&MODEL_SERVER_HOST, "x:80")],
            "--model-server-host: `x:80`",
        ),
        (&[(&MAX_BODY, "0")], "--max-body: `0`"),
        (
            &[(&MAX_BODY, "3GiB")],
            "--body-budget: 2GiB is below --max-body (3GiB)",
        ),
        (&[(&BODY_BUDGET, "1M")], "--body-budget: `1M`"),
        (&[(&ADMIN_ADDRESS, "9890")], "--admin-address: `9890`"),
        (&[(&SECURE_PROXY, "maybe")], "--secure-proxy: `maybe`"),
    ];
    for (given, want) in table {
        let got = problems(given);
        assert!(
            got.iter().any(|text| text.starts_with(want)),
            "{given:?}: {got:?}"
        );
    }
}

#[test]
fn invalid_cores_values_are_explained() {
    for (text, want) in [
        ("0-3,2", "`0-3,2` names a CPU twice"),
        ("four", "`four` is not a CPU list; give auto"),
        (
            "naer:gpu0",
            "`naer:gpu0` is not a CPU list; did you mean `near:gpu0`? Give auto",
        ),
        (
            "gpu0-3",
            "`gpu0-3` is not a CPU list; did you mean `near:gpu0-3`?",
        ),
        (
            "near:1",
            "`near:1` does not name a device after `near:`; did you mean `near:gpu1`?",
        ),
        (
            "near:gpu3-1",
            "`near:gpu3-1` has a range that ends before it starts; give auto",
        ),
        ("numa:0,0", "`numa:0,0` names a NUMA node twice"),
        (
            "near:gpu0*0",
            "`near:gpu0*0` needs a number of shards from 1 to 1024 after the `*`",
        ),
    ] {
        let got = problems(&[(&flag_table::CORES, text)]);
        assert_eq!(got.len(), 1, "{got:?}");
        assert!(got[0].starts_with(&format!("--cores: {want}")), "{got:?}");
    }
}

#[test]
fn all_problems_are_reported_together() {
    let got = problems(&[
        (&flag_table::PORT, "0"),
        (&flag_table::KV_CONNECTOR, "x"),
        (&flag_table::DATA_PARALLEL_SIZE, "0"),
        (&flag_table::SECURE_PROXY, "maybe"),
        (&flag_table::HEAD_TIMEOUT, "1"),
    ]);
    assert_eq!(got.len(), 5, "{got:?}");
}

#[test]
fn g3_model_server_port_precedence() {
    use flag_table::{DATA_PARALLEL_SIZE, MODEL_SERVER_PORT, VLLM_PORT};
    let table: &[(Given<'_>, u16, bool)] = &[
        (&[], 8200, false),
        (&[(&VLLM_PORT, "8001")], 8001, true),
        (&[(&MODEL_SERVER_PORT, "8300")], 8300, false),
        (
            &[(&MODEL_SERVER_PORT, "8300"), (&VLLM_PORT, "8001")],
            8300,
            true,
        ),
        (
            &[(&MODEL_SERVER_PORT, "8300"), (&DATA_PARALLEL_SIZE, "2")],
            8300,
            false,
        ),
        (
            &[(&VLLM_PORT, "8101"), (&DATA_PARALLEL_SIZE, "2")],
            8101,
            true,
        ),
    ];
    for (given, port, warned) in table {
        let Checked { config, warnings } = checked(given);
        for (pool, want) in config.pools.iter().zip(*port..) {
            let want = format!("localhost:{want}");
            assert_eq!(pool.endpoints[0].to_string(), want, "{given:?}");
        }
        let deprecated = warnings
            .iter()
            .any(|text| text.contains("--vllm-port is deprecated"));
        assert_eq!(deprecated, *warned, "{given:?}");
    }
}

#[test]
fn sampling_is_flag_then_environment_then_default() {
    for (flag, environment, want, warned) in [
        (None, None, false, false),
        (None, Some("true"), true, false),
        (None, Some("1"), true, false),
        (None, Some(""), false, false),
        (None, Some("yes"), false, true),
        (Some("false"), Some("true"), false, false),
        (Some("true"), Some("false"), true, false),
    ] {
        let environment: Vec<_> = environment
            .map(|text| ("ENABLE_PREFILLER_SAMPLING", text))
            .into_iter()
            .collect();
        let given: Vec<_> = flag
            .map(|flag| (&flag_table::ENABLE_PREFILLER_SAMPLING, flag))
            .into_iter()
            .collect();
        let Checked { config, warnings } = checked_in(&environment, &given);
        assert_eq!(
            config.pd.prefiller_sampling, want,
            "{flag:?} {environment:?}"
        );
        assert_eq!(!warnings.is_empty(), warned, "{flag:?} {environment:?}");
    }
}

#[test]
fn conflicting_ports_are_refused() {
    use flag_table::{
        ADMIN_ADDRESS, DATA_PARALLEL_SIZE, HOST, METRICS_PORT, MODEL_SERVER_HOST, MODEL_SERVER_PORT,
    };
    let near = (&MODEL_SERVER_PORT, "8002");
    let four = (&DATA_PARALLEL_SIZE, "4");
    let table: &[(Given<'_>, usize)] = &[
        (&[(&MODEL_SERVER_PORT, "8000")], 1),
        (&[near, four], 1),
        (&[near, (&DATA_PARALLEL_SIZE, "2")], 0),
        (&[near, four, (&MODEL_SERVER_HOST, "10.1.2.3")], 0),
        (&[near, four, (&MODEL_SERVER_HOST, "10.9.9.9")], 1),
        (&[near, four, (&HOST, "10.9.9.9")], 0),
        (
            &[near, four, (&HOST, "0.0.0.0"), (&MODEL_SERVER_HOST, "::1")],
            1,
        ),
        (
            &[
                near,
                four,
                (&HOST, "10.1.2.3"),
                (&MODEL_SERVER_HOST, "10.1.2.3"),
            ],
            1,
        ),
        (&[(&ADMIN_ADDRESS, "127.0.0.1:8000")], 1),
        (&[(&ADMIN_ADDRESS, "127.0.0.1:8200")], 1),
        (&[(&METRICS_PORT, "8000")], 1),
        (&[(&METRICS_PORT, "8200")], 1),
        (&[(&METRICS_PORT, "9890")], 1),
        (&[(&METRICS_PORT, "9090")], 0),
        (
            &[
                (&ADMIN_ADDRESS, "127.0.0.1:8200"),
                (&MODEL_SERVER_HOST, "gpu-7"),
            ],
            0,
        ),
    ];
    for (given, want) in table {
        let got = problems_in(&[("POD_IP", "10.9.9.9")], given);
        assert_eq!(got.len(), *want, "{given:?}: {got:?}");
    }
}

#[test]
fn addresses() {
    for (text, want) in [
        ("off", None),
        ("127.0.0.1:9890", Some("127.0.0.1:9890")),
        (":9890", Some("[::]:9890")),
        ("localhost:1", Some("127.0.0.1:1")),
        ("[::1]:2", Some("[::1]:2")),
    ] {
        let config = checked(&[(&flag_table::ADMIN_ADDRESS, text)]).config;
        assert_eq!(
            config
                .admin
                .map(|admin| admin.address.to_string())
                .as_deref(),
            want,
            "{text}"
        );
    }
    for (text, want) in [
        ("0.0.0.0", "0.0.0.0:8000"),
        ("[::1]", "[::1]:8000"),
        ("::1", "[::1]:8000"),
        ("localhost", "127.0.0.1:8000"),
    ] {
        let config = checked(&[(&flag_table::HOST, text)]).config;
        assert_eq!(config.listeners[0].address.to_string(), want, "{text}");
    }
    let config = checked(&[(&flag_table::MODEL_SERVER_HOST, "[fd00::1]")]).config;
    assert_eq!(config.pools[0].endpoints[0].to_string(), "[fd00::1]:8200");
}

#[test]
fn decoders_on_unix_sockets() {
    use flag_table::{DATA_PARALLEL_SIZE, MODEL_SERVER_SOCKET};
    let sockets = |given: Given<'_>| -> Vec<String> {
        let config = checked(given).config;
        let decoders = config
            .pools
            .iter()
            .map(|pool| pool.endpoints[0].to_string());
        decoders.collect()
    };
    let one = |path| sockets(&[(&MODEL_SERVER_SOCKET, path)]);
    assert_eq!(one("/run/vllm.sock"), ["unix:/run/vllm.sock"]);
    assert_eq!(one("@vllm"), ["unix:@vllm"]);
    assert_eq!(one("/run/{rank}.sock"), ["unix:/run/0.sock"]);
    let two = |path| sockets(&[(&MODEL_SERVER_SOCKET, path), (&DATA_PARALLEL_SIZE, "2")]);
    assert_eq!(two("/r{rank}/{rank}"), ["unix:/r0/0", "unix:/r1/1"]);
    assert_eq!(two("@vllm-{rank}"), ["unix:@vllm-0", "unix:@vllm-1"]);
}

#[test]
fn invalid_sockets_are_refused() {
    use flag_table::{
        DATA_PARALLEL_SIZE, MODEL_SERVER_HOST, MODEL_SERVER_PORT, MODEL_SERVER_SOCKET, VLLM_PORT,
    };
    let socket = (&MODEL_SERVER_SOCKET, "/run/vllm.sock");
    let longest = format!("/{}", "x".repeat(106));
    let long = format!("{longest}x");
    // The paths of ten ranks fit; the eleventh has one digit more.
    let growing = format!("/{}{{rank}}", "x".repeat(105));
    let ranks = |size| (&DATA_PARALLEL_SIZE, size);
    let table: &[(Given<'_>, &str)] = &[
        (
            &[socket, (&MODEL_SERVER_PORT, "8200")],
            "is given together with --model-server-port: the decoder uses either a socket or a port",
        ),
        (
            &[socket, (&VLLM_PORT, "8001")],
            "is given together with --vllm-port",
        ),
        (
            &[
                socket,
                (&MODEL_SERVER_HOST, "localhost"),
                (&MODEL_SERVER_PORT, "1"),
            ],
            "is given together with --model-server-port and --model-server-host",
        ),
        (
            &[socket, ranks("2")],
            "`/run/vllm.sock` is a single socket for 2 ranks; write {rank} where",
        ),
        (&[(&MODEL_SERVER_SOCKET, "")], "``: the socket has no path"),
        (
            &[(&MODEL_SERVER_SOCKET, "@")],
            "`@`: the socket has no path",
        ),
        (
            &[(&MODEL_SERVER_SOCKET, "run/vllm.sock")],
            "`run/vllm.sock`: the socket's path must start with /",
        ),
        (
            &[(&MODEL_SERVER_SOCKET, "unix:/run/vllm.sock")],
            "`unix:/run/vllm.sock`: the socket's path must start with /",
        ),
        (
            &[(&MODEL_SERVER_SOCKET, "/run/../vllm.sock")],
            "`/run/../vllm.sock`: the socket's path must name a file",
        ),
        (
            &[(&MODEL_SERVER_SOCKET, "/run/vllm sock")],
            "`/run/vllm sock`: the target contains white space",
        ),
        (
            &[(&MODEL_SERVER_SOCKET, &long)],
            &format!("`{long}`: the socket's path is longer than 107 bytes"),
        ),
        (
            &[(&MODEL_SERVER_SOCKET, &growing), ranks("11")],
            &format!("`/{}10`: the socket's path is longer", "x".repeat(105)),
        ),
    ];
    for (given, want) in table {
        let got = problems(given);
        assert_eq!(got.len(), 1, "{given:?}: {got:?}");
        let want = format!("--model-server-socket: {want}");
        assert!(got[0].starts_with(&want), "{given:?}: {got:?}");
    }
    assert!(problems(&[(&MODEL_SERVER_SOCKET, &longest)]).is_empty());
    assert!(problems(&[(&MODEL_SERVER_SOCKET, &growing), ranks("10")]).is_empty());
}

/// If the decoder uses a Unix socket, its default port, 8200, can be used by listeners.
#[test]
fn a_decoder_on_a_unix_socket_reserves_no_port() {
    use flag_table::{ADMIN_ADDRESS, MODEL_SERVER_SOCKET, PORT};
    let socket = (&MODEL_SERVER_SOCKET, "/run/vllm.sock");
    assert!(problems(&[socket, (&PORT, "8200")]).is_empty());
    assert!(problems(&[socket, (&ADMIN_ADDRESS, "127.0.0.1:8200")]).is_empty());
    let ours = problems(&[socket, (&PORT, "8100"), (&ADMIN_ADDRESS, "127.0.0.1:8100")]);
    assert_eq!(ours.len(), 1, "{ours:?}");
}

#[test]
fn risky_values_cause_warnings() {
    for (key, value) in [
        (&flag_table::HANDOFF_MAX_AGE, "30s"),
        (&flag_table::UPSTREAM_IDLE_TIMEOUT, "5s"),
        (&flag_table::UPSTREAM_IDLE_TIMEOUT, "off"),
    ] {
        assert_eq!(checked(&[(key, value)]).warnings.len(), 1, "{value}");
    }
}

#[test]
fn description_contains_the_settings() {
    let config = checked(&[
        (&flag_table::DATA_PARALLEL_SIZE, "2"),
        (&flag_table::CORES, "0-3"),
        (&flag_table::FIRST_BYTE_TIMEOUT, "5m"),
    ])
    .config;
    let text: String = config
        .describe()
        .iter()
        .map(|(name, text)| format!("{name}={text}\n"))
        .collect();
    let config = checked(&[(&flag_table::CORES, "near:3B:00.0*2")]).config;
    assert!(
        config
            .describe()
            .contains(&("cores".to_owned(), "near:0000:3b:00.0*2".to_owned()))
    );
    for want in [
        "listen=[::]:8000 to [::]:8001",
        "decoder=localhost:8200 to localhost:8201",
        "cores=0-3",
        "first-byte 5m",
        "body 512MiB, all bodies 2GiB",
    ] {
        assert!(text.contains(want), "{want} not in\n{text}");
    }
}

#[test]
fn every_timeout_can_be_off() {
    for key in flag_table::ALL {
        if key.name.ends_with("-timeout") {
            checked(&[(key, "off")]);
        }
    }
    let config = checked(&[(&flag_table::UPSTREAM_IDLE_TIMEOUT, "off")]).config;
    assert_eq!(config.upstream.idle, units::DURATION_MAX);
}

#[test]
fn every_key_is_checked() {
    // A key that no check reads would accept any value.
    let free = [
        "access-log",
        // Paths.
        "cert-path",
        "tls-ca-file",
        "allow-targets-file",
        "log-dir",
        "log-file",
        "metrics-cert-dir",
        // Checked only in write mode: an unusual POD_IP must not prevent startup otherwise.
        "moriio-local-pod-ip",
        // Parsed by the command line.
        "configuration",
        "configuration-file",
    ];
    for key in flag_table::ALL {
        let refused = !problems(&[(key, "\u{7f} nonsense")]).is_empty();
        assert_eq!(refused, !free.contains(&key.name), "--{}", key.name);
    }
}

#[test]
fn g2_connectors_and_their_ports() {
    use flag_table::{
        DATA_PARALLEL_SIZE, DECODE_CHUNK_SIZE, EC_CONNECTOR, ENABLE_P2P_PULL, KV_CONNECTOR,
        MOONCAKE_BOOTSTRAP_PORT, P2P_CONNECTOR_PORT,
    };
    let table: &[(Given<'_>, &str)] = &[
        (
            &[(&EC_CONNECTOR, "ec-nixlv2")],
            "--ec-connector: `ec-nixlv2` is not valid; did you mean `ec-nixl`?",
        ),
        (
            &[(&MOONCAKE_BOOTSTRAP_PORT, "0")],
            "--mooncake-bootstrap-port: `0` is not valid; give a port from 1 to 65535",
        ),
        (
            &[(&MOONCAKE_BOOTSTRAP_PORT, "65536")],
            "--mooncake-bootstrap-port: `65536`",
        ),
        (&[(&P2P_CONNECTOR_PORT, "0")], "--p2p-connector-port: `0`"),
        (
            &[(&P2P_CONNECTOR_PORT, "65534"), (&DATA_PARALLEL_SIZE, "3")],
            "--p2p-connector-port: port 65534 with --data-parallel-size 3 needs ports up to 65536",
        ),
        (
            &[(&ENABLE_P2P_PULL, "true"), (&KV_CONNECTOR, "sglang")],
            "--enable-p2p-pull: requires --kv-connector nixlv2, not sglang",
        ),
        (&[(&DECODE_CHUNK_SIZE, "-1")], "--decode-chunk-size: `-1`"),
        (
            &[(&flag_table::METRICS_PORT, "65536")],
            "--metrics-port: `65536`",
        ),
        (
            &[(&flag_table::ON_PREFILL_FAILURE, "retry")],
            "--on-prefill-failure: `retry` is not valid; give error or decode",
        ),
    ];
    for (given, want) in table {
        let got = problems(given);
        assert_eq!(got.len(), 1, "{given:?}: {got:?}");
        assert!(got[0].starts_with(want), "{given:?}: {got:?}");
    }
    for connector in KvConnector::ALL {
        let config = checked(&[(&KV_CONNECTOR, connector.name())]).config;
        assert_eq!(config.pd.kv_connector, connector);
    }
    let encoder = |text| checked(&[(&EC_CONNECTOR, text)]).config.pd.encoder;
    assert_eq!(encoder(""), None);
    assert_eq!(encoder("ec-example"), Some(EcConnector::Example));
    assert_eq!(encoder("ec-nixl"), Some(EcConnector::Nixl));
    let chunk = |text| {
        checked(&[(&DECODE_CHUNK_SIZE, text)])
            .config
            .pd
            .decode_chunk_tokens
    };
    assert_eq!((chunk("0"), chunk("256")), (None, Some(256)));
}

#[test]
fn variables_apply_without_a_flag() {
    let ports = |environment: &[(&str, &str)], given: Given<'_>| {
        let Checked { config, warnings } = checked_in(environment, given);
        let ports = config.pd.ports;
        let ports = (ports.mooncake_bootstrap, ports.p2p, ports.sglang_bootstrap);
        (ports, warnings.len())
    };
    let flags: Given<'_> = &[
        (&flag_table::MOONCAKE_BOOTSTRAP_PORT, "1"),
        (&flag_table::P2P_CONNECTOR_PORT, "2"),
    ];
    let set: &[_] = &[
        ("MOONCAKE_BOOTSTRAP_PORT", "11"),
        ("P2P_CONNECTOR_PORT", "12"),
        ("SGLANG_BOOTSTRAP_PORT", "13"),
    ];
    let unreadable: &[_] = &[
        ("MOONCAKE_BOOTSTRAP_PORT", "tcp://10.0.0.1:80"),
        ("P2P_CONNECTOR_PORT", "x"),
        ("SGLANG_BOOTSTRAP_PORT", "0"),
    ];
    let empty: &[_] = &[
        ("MOONCAKE_BOOTSTRAP_PORT", ""),
        ("SGLANG_BOOTSTRAP_PORT", ""),
    ];
    assert_eq!(ports(&[], &[]), ((8998, 7777, 8998), 0));
    assert_eq!(ports(set, &[]), ((11, 12, 13), 0));
    // The connector is not mooncake, so its flag has no effect.
    assert_eq!(ports(set, flags), ((1, 2, 13), 1));
    assert_eq!(ports(unreadable, &[]), ((8998, 7777, 8998), 3));
    assert_eq!(ports(unreadable, flags), ((1, 2, 8998), 2));
    assert_eq!(ports(empty, &[]), ((8998, 7777, 8998), 0));
    // A number that is not a valid port is an error, not just a warning.
    let got = problems_in(&[("P2P_CONNECTOR_PORT", "70000")], &[]);
    assert_eq!(
        got,
        ["P2P_CONNECTOR_PORT: `70000` is not a port; give a number from 1 to 65535"]
    );
}

#[test]
fn metrics_have_a_port_or_an_address() {
    let metrics = |port, address| {
        let environment = [("MORIIO_METRICS_ADDR", address)];
        let config = checked_in(&environment, &[(&flag_table::METRICS_PORT, port)]).config;
        config.metrics.map(|metrics| metrics.address.to_string())
    };
    for (port, address, want) in [
        ("0", "", None),
        ("0", "0", None),
        ("0", ":9091", Some("[::]:9091")),
        ("0", "127.0.0.1:9091", Some("127.0.0.1:9091")),
        ("9090", ":9091", Some("[::]:9090")),
        ("9090", "nonsense", Some("[::]:9090")),
    ] {
        assert_eq!(metrics(port, address).as_deref(), want, "{port} {address}");
    }
    let got = problems_in(&[("MORIIO_METRICS_ADDR", "9091")], &[]);
    assert_eq!(
        got,
        ["MORIIO_METRICS_ADDR: `9091` is not valid; give an address and port, such as :9090"]
    );
}

#[test]
fn switches_that_pd_sidecar_does_not_have() {
    let config = checked(&[]).config.pd;
    assert!(!config.trust_client_kv && config.release_stranded_kv && !config.p2p_pull);
    assert_eq!(config.on_prefill_failure, OnPrefillFailure::Error);
    let config = checked(&[
        (&flag_table::TRUST_CLIENT_KV, "true"),
        (&flag_table::RELEASE_STRANDED_KV, "false"),
        (&flag_table::ENABLE_P2P_PULL, "true"),
        (&flag_table::ON_PREFILL_FAILURE, "decode"),
    ]);
    let config = config.config.pd;
    assert!(config.trust_client_kv && !config.release_stranded_kv && config.p2p_pull);
    assert_eq!(config.on_prefill_failure, OnPrefillFailure::Decode);
}

#[test]
fn description_contains_enabled_features() {
    let environment = [("OTEL_TRACES_EXPORTER", "otlp"), ("POD_IP", "10.0.0.3")];
    let config = checked_in(
        &environment,
        &[
            (&flag_table::MORIIO_WRITE_MODE, "true"),
            (&flag_table::MORIIO_PARALLEL_DISPATCH, "true"),
            (&flag_table::EC_CONNECTOR, "ec-nixl"),
            (&flag_table::DECODE_CHUNK_SIZE, "64"),
            (&flag_table::SECURE_PROXY, "true"),
            (&flag_table::CERT_PATH, "/certs"),
            (&flag_table::ENABLE_TLS, "decoder,prefiller"),
            (&flag_table::TLS_INSECURE_SKIP_VERIFY, "decoder"),
            (&flag_table::ALLOW_TARGET, "10.0.0.0/8,prefill-0"),
            (&flag_table::INFERENCE_POOL, "ns/pool"),
            (&flag_table::TRACING, "true"),
            (&flag_table::METRICS_PORT, "9090"),
        ],
    )
    .config;
    let lines = config.describe();
    for (name, want) in [
        (
            "kv_connector",
            "nixlv2 with MoRI-IO in write mode, legs concurrent, response held back at most 30s, \
             local pod 10.0.0.3",
        ),
        ("encoder", "ec-nixl"),
        ("decode", "in chunks of 64 tokens"),
        ("tls to clients", "on, certificate in /certs"),
        (
            "tls to engines",
            "prefiller on; decoder on, unverified; encoder off",
        ),
        (
            "targets",
            "only those allowed by 2 rules and the pods of InferencePool ns/pool",
        ),
        ("metrics", "additional listener on [::]:9090"),
        (
            "tracing",
            "100000 of 1000000 traces to http://localhost:4317 over gRPC, service name \
             llm-d-disagg-sidecar",
        ),
    ] {
        let line = (name.to_owned(), want.to_owned());
        assert!(lines.contains(&line), "{line:?} not in {lines:?}");
    }
}
