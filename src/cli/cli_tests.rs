//! Tests of the command line. The exit codes are part of its interface.

use super::*;
use crate::config::{
    Cores, ListenAddress, LogFormat, LogLevel, OnDecodeKvError, OnMissingKv, PoolGroup, flag_table,
};
use std::time::Duration;

fn run(line: &str) -> Result<Command, Exit> {
    run_with(line, &|_| None)
}

fn run_with(line: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<Command, Exit> {
    let args = line.split_whitespace().map(OsString::from);
    match parse_with(args, environment)? {
        // The checks of a start are not made here.
        Command::Check(check) => Err(check.conclude(&[], Vec::new())),
        command => Ok(command),
    }
}

fn sidecar(line: &str) -> (Config, Vec<String>) {
    match run(line) {
        Ok(Command::Proxy(config, warnings)) => (*config, warnings),
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn flags_are_applied() {
    let (config, warnings) = sidecar(
        "ringside sidecar --port 8100 --model-server-port 8300 --data-parallel-size 2 \
         --kv-connector nixlv2 --secure-proxy=false --enable-prefiller-sampling \
         --prefill-max-retries 3 --prefill-retry-backoff 100ms --max-idle-conns-per-host 7 \
         --host 127.0.0.1 --model-server-host 10.0.0.1 --cores 0-1 --admin-address off \
         --log-level debug --log-format json --drain-timeout 1m30s --drain-settle 5s \
         --connect-timeout 1s --head-timeout 2s --body-timeout off --client-stall-timeout 4s \
         --keepalive-timeout 5s --first-byte-timeout 6s --prefill-timeout 7s \
         --on-missing-kv error --handoff-max-age 8s --hide-prefill-errors \
         --on-decode-kv-error error --max-body 1MiB --body-budget 2MiB \
         --max-prefill-answer 3KiB --upstream-idle-timeout 3s --access-log stdout \
         --check-handoff-versions=false",
    );
    assert!(warnings.is_empty(), "{warnings:?}");
    let ports: Vec<_> = config
        .listeners
        .iter()
        .map(|one| {
            let decoder = config.pools[one.pool].endpoints[0].to_string();
            (one.pool, one.address.port(), decoder)
        })
        .collect();
    let decoder = |port| format!("10.0.0.1:{port}");
    assert_eq!(ports, [(0, 8100, decoder(8300)), (1, 8101, decoder(8301))]);
    assert!(config.pd.prefiller_sampling && config.pd.hide_prefill_errors);
    assert!(!config.pd.check_handoff_versions);
    assert_eq!(config.pd.prefill_retries_max, 3);
    assert_eq!(config.pd.on_missing_kv, OnMissingKv::Error);
    assert_eq!(config.pd.on_decode_kv_error, OnDecodeKvError::Error);
    assert_eq!(config.pd.prefill_response_bytes_max, 3 << 10);
    assert_eq!(config.timeouts.body, None);
    assert_eq!(config.timeouts.first_byte, Some(Duration::from_secs(6)));
    assert_eq!(config.pd.prefill_timeout, Some(Duration::from_secs(7)));
    assert_eq!(config.upstream.idle_per_rank_max, 7);
    assert_eq!(config.drain.timeout, Some(Duration::from_secs(90)));
    assert_eq!(config.drain.settle, Duration::from_secs(5));
    assert_eq!(config.cores, Cores::List(vec![0, 1]));
    assert_eq!(config.log.format, LogFormat::Json);
    assert_eq!(config.admin, None);
}

#[test]
fn cores_accepts_devices_and_nodes() {
    for text in ["near:gpu0-3*2", "near:eth0", "near:0000:3b:00.0", "numa:1"] {
        let (config, _) = sidecar(&format!(
            "ringside sidecar --secure-proxy=false --cores {text}"
        ));
        assert_eq!(config.cores, text.parse().unwrap(), "{text}");
    }
}

#[test]
fn equivalent_spellings() {
    let want = sidecar("ringside sidecar --port 8001 --secure-proxy=false").0;
    for line in [
        "ringside sidecar --port=8001 --secure-proxy=false",
        "ringside sidecar -port=8001 -secure-proxy=false",
        "ringside sidecar -port 8001 -secure-proxy=false",
        "ringside sidecar --port 9 --port 8001 --secure-proxy --secure-proxy=f",
        "pd-sidecar --port 8001 --secure-proxy=0",
        "/usr/bin/llm-d-routing-sidecar -port=8001 --secure-proxy=False -vllm-port=8200",
        "ringside sidecar --port 8001 --secure-proxy=false --tracing=false --metrics-port=0 \
         --enable-ssrf-protection=false --decode-chunk-size=0 --ec-connector= -connector=nixlv2 \
         --zap-log-level=info --moriio-dp-size 1 --enable-tls=",
        "ringside sidecar --configuration {'port':8001,'secure-proxy':no}",
        "ringside sidecar --configuration={\"port\":8001,\"secure-proxy\":false}",
        "ringside sidecar --configuration={'port':9,'secure-proxy':false} --port=8001",
    ] {
        assert_eq!(sidecar(line).0, want, "{line}");
    }
}

#[test]
fn switches() {
    for (flag, want) in [
        ("", false),
        ("--hide-prefill-errors", true),
        ("--hide-prefill-errors=true", true),
        ("--hide-prefill-errors=false", false),
        ("--hide-prefill-errors --hide-prefill-errors=false", false),
    ] {
        let (config, _) = sidecar(&format!("ringside sidecar --secure-proxy=false {flag}"));
        assert_eq!(config.pd.hide_prefill_errors, want, "{flag}");
    }
}

fn check_exits(table: &[(&str, u8, &str)]) {
    for (line, code, want) in table {
        let exit = run(line).expect_err(line);
        assert_eq!(exit.code, *code, "{line}: {}", exit.message);
        assert!(exit.message.contains(want), "{line}: {}", exit.message);
        assert_eq!(exit.to_stdout, *code == 0, "{line}");
    }
}

#[test]
fn exits() {
    check_exits(&[
        ("ringside", 2, "Usage: ringside"),
        ("ringside unknown", 2, "unrecognized subcommand 'unknown'"),
        (
            "ringside --version",
            0,
            concat!("ringside ", env!("CARGO_PKG_VERSION")),
        ),
        ("ringside --help", 0, "sidecar"),
        (
            "ringside sidecar --secure-proxy false",
            2,
            "write `--secure-proxy=false`",
        ),
        (
            "ringside sidecar -tracing false",
            2,
            "write `--tracing=false`",
        ),
        (
            "ringside sidecar --secure-proxy=maybe",
            3,
            "give true or false",
        ),
        (
            "ringside sidecar --prefiller-use-tls true",
            2,
            "write `--prefiller-use-tls=true`",
        ),
        ("ringside sidecar --prot 1", 2, "'--port'"),
        ("ringside sidecar -prot=1", 2, "'--port'"),
        ("pd-sidecar --enable-ssl=decoder", 2, "'--enable-tls'"),
        ("ringside check-config --prot 1", 2, "'--port'"),
        ("ringside check-config --port 0", 3, "--port: `0`"),
        ("ringside check-config", 0, "The configuration is valid."),
        ("pd-sidecar check-config", 0, "The configuration is valid."),
        ("ringside sidecar --port", 2, "a value is required"),
        ("ringside sidecar extra", 2, "unexpected argument 'extra'"),
        ("ringside sidecar --port=x --cores=4-1", 3, "has 2 problems"),
        (
            "ringside sidecar --secure-proxy=false --cores=numa1",
            3,
            "did you mean `numa:1`?",
        ),
        (
            "ringside sidecar --secure-proxy=false --port=",
            3,
            "--port: `` is not a port",
        ),
        (
            "ringside sidecar --secure-proxy=false --data-parallel-size -2",
            3,
            "--data-parallel-size: `-2`",
        ),
    ]);
}

#[test]
fn removed_flags_map_to_their_replacements() {
    for (line, same) in [
        ("-connector=lmcache", "--kv-connector=lmcache"),
        ("-connector nixl", "--kv-connector=nixl"),
        (
            "--kv-connector=sglang -connector=nixl",
            "--kv-connector=sglang",
        ),
        ("-prefiller-use-tls", "--enable-tls=prefiller"),
        (
            "-prefiller-use-tls=true -decoder-use-tls=1 -prefiller-tls-insecure-skip-verify",
            "--enable-tls=prefiller,decoder --tls-insecure-skip-verify=prefiller",
        ),
        (
            "-decoder-use-tls --decoder-tls-insecure-skip-verify=true -prefiller-use-tls=false",
            "--enable-tls decoder --tls-insecure-skip-verify decoder",
        ),
        (
            "-enable-ssrf-protection -inference-pool-namespace=a -inference-pool-name=b",
            "--enable-ssrf-protection --inference-pool a/b",
        ),
        (
            "-enable-ssrf-protection -inference-pool-name=b --inference-pool=c/d",
            "--enable-ssrf-protection --inference-pool c/d",
        ),
        ("-v=5", "--log-level=debug"),
        ("-v 4 --log-level=warn", "--log-level=warn"),
        ("-v=2", ""),
        (
            "-logtostderr -vmodule=x=1 --stderrthreshold=2 -skip_headers=true",
            "",
        ),
        (
            "--zap-devel --zap-stacktrace-level=panic --zap-time-encoding=iso8601",
            "",
        ),
    ] {
        let flags = "ringside sidecar --secure-proxy=false";
        let (config, warnings) = sidecar(&format!("{flags} {line}"));
        let (want, others) = sidecar(&format!("{flags} {same}"));
        assert_eq!(config, want, "{line}");
        let dashed = line.split_whitespace().filter(|word| word.starts_with('-'));
        let known = |word: &&str| {
            let name = word.trim_start_matches('-');
            let name = name.split_once('=').map_or(name, |(name, _)| name);
            flag_table::ALL.iter().any(|key| key.name == name)
        };
        let removed = dashed.filter(|word| !known(word)).count();
        assert_eq!(
            warnings.len(),
            removed + others.len(),
            "{line}: {warnings:?}"
        );
    }
}

/// pd-sidecar still supports these `--zap-*` flags and they have an effect here, so they cause no
/// warning.
#[test]
fn zap_flags() {
    for (line, level, format) in [
        ("--zap-log-level=debug", LogLevel::Debug, LogFormat::Text),
        ("--zap-log-level=5", LogLevel::Debug, LogFormat::Text),
        ("--zap-log-level=panic", LogLevel::Error, LogFormat::Text),
        (
            "--zap-log-level=debug --log-level=warn",
            LogLevel::Warn,
            LogFormat::Text,
        ),
        ("--zap-encoder=json", LogLevel::Info, LogFormat::Json),
        ("--zap-encoder=console", LogLevel::Info, LogFormat::Text),
        (
            "--zap-encoder json --log-format text",
            LogLevel::Info,
            LogFormat::Text,
        ),
    ] {
        let (config, warnings) = sidecar(&format!("pd-sidecar --secure-proxy=false {line}"));
        assert_eq!(
            (config.log.level, config.log.format),
            (level, format),
            "{line}"
        );
        assert!(warnings.is_empty(), "{warnings:?}");
    }
}

#[test]
fn exits_of_removed_flags_and_documents() {
    check_exits(&[
        ("pd-sidecar --zap-log-level=0", 3, "--zap-log-level: `0`"),
        ("pd-sidecar --zap-log-level=loud", 3, "give debug, info,"),
        ("pd-sidecar --zap-encoder=xml", 3, "give json or console"),
        ("pd-sidecar -v=x", 3, "--v: `x` is not valid; give a number"),
        (
            "pd-sidecar -connector=nxil",
            3,
            "--connector: `nxil` is not valid; did you mean `nixl`?",
        ),
        ("pd-sidecar -decoder-use-tls=x", 3, "--decoder-use-tls: `x`"),
        (
            "pd-sidecar --configuration={'prot':1}",
            3,
            "--configuration:1:2: `prot` is not a key",
        ),
        (
            "pd-sidecar --configuration={'port':1",
            3,
            "--configuration:1:",
        ),
        (
            "pd-sidecar --configuration={'port':0x}",
            3,
            "--configuration:1: port: `0x`",
        ),
        (
            "pd-sidecar --configuration={} --configuration-file=x",
            3,
            "--configuration: is given together with --configuration-file",
        ),
        (
            "pd-sidecar --configuration-file=/nonexistent/x.yaml",
            3,
            "--configuration-file: `/nonexistent/x.yaml` cannot be read: No such file",
        ),
        (
            "pd-sidecar --configuration-file=/dev/zero",
            3,
            "it is larger than 1048576 bytes",
        ),
        ("ringside demo --port 70000", 2, "70000"),
    ]);
}

#[test]
fn the_first_sidecars_name_selects_its_defaults() {
    for (line, port, group) in [
        ("ringside sidecar", 8200, PoolGroup::Stable),
        ("pd-sidecar", 8200, PoolGroup::Stable),
        ("/app/llm-d-routing-sidecar", 8001, PoolGroup::Experimental),
        (
            "llm-d-routing-sidecar -vllm-port=8300",
            8300,
            PoolGroup::Experimental,
        ),
        (
            "llm-d-routing-sidecar --model-server-port=8400",
            8400,
            PoolGroup::Experimental,
        ),
        (
            "llm-d-routing-sidecar --pool-group=inference.networking.k8s.io",
            8001,
            PoolGroup::Stable,
        ),
    ] {
        let flags = "--enable-ssrf-protection --inference-pool=x --port 8002";
        let (config, _) = sidecar(&format!("{line} {flags}"));
        let decoder = config.pools[0].endpoints[0].to_string();
        assert_eq!(decoder, format!("localhost:{port}"), "{line}");
        let pool = config
            .allowlist
            .and_then(|allowlist| allowlist.pool)
            .unwrap();
        assert_eq!(pool.group, group, "{line}");
    }
    let report = run("llm-d-routing-sidecar check-config").unwrap_err();
    assert!(report.message.contains("  8001 "), "{}", report.message);
}

#[test]
fn check_config_prints_the_source_of_each_value() {
    let environment = |name: &str| (name == "INFERENCE_POOL").then(|| "a/b".to_owned());
    let line = "ringside check-config --configuration={'port':8100,'secure-proxy':no} --host=::1 \
                -connector=nixl --enable-tls=decoder --enable-tls prefiller";
    let exit = run_with(line, &environment).unwrap_err();
    assert!((exit.code, exit.to_stdout) == (0, true), "{exit:?}");
    let row = |name: &str| {
        let row = exit
            .message
            .lines()
            .find(|row| row.split(' ').next() == Some(name));
        let row: Vec<_> = row.unwrap().split_whitespace().collect();
        row[1..].join(" ")
    };
    for (name, want) in [
        ("port", "8100 --configuration:1"),
        ("secure-proxy", "false --configuration:1"),
        ("tls-min-version", "VersionTLS12 default"),
        ("host", "::1 --host"),
        ("kv-connector", "nixl --connector"),
        ("enable-tls", "decoder,prefiller --enable-tls"),
        ("inference-pool", "a/b environment INFERENCE_POOL"),
        ("max-body", "512MiB default"),
        ("cert-path", "- default"),
    ] {
        assert_eq!(row(name), want, "{name}");
    }
    let diff = run_with(&format!("{line} --diff"), &environment).unwrap_err();
    assert!(!diff.message.contains(" default\n"), "{}", diff.message);
    assert!(diff.message.contains("\nhost"), "{}", diff.message);
    for want in [
        "  tls to engines: prefiller on; decoder on; encoder off\n",
        "\nwarning: --inference-pool has no effect",
        "The configuration is valid, with 2 warnings.",
    ] {
        assert!(exit.message.contains(want), "{want}: {}", exit.message);
    }
}

#[test]
fn help_is_grouped_and_short_help_is_short() {
    let long = run("ringside sidecar --help").unwrap_err();
    let short = run("ringside sidecar -h").unwrap_err();
    assert_eq!((long.code, short.code), (0, 0));
    let headings = [
        "Listen:",
        "Engine:",
        "Prefill/decode:",
        "MoRI-IO:",
        "TLS:",
        "Allowed targets:",
        "Limits:",
        "Timeouts:",
        "Observability:",
        "Performance:",
        "Configuration:",
    ];
    let found: Vec<_> = headings
        .iter()
        .map(|heading| {
            long.message
                .find(heading)
                .unwrap_or_else(|| panic!("{heading}"))
        })
        .collect();
    assert!(found.is_sorted(), "{}", long.message);
    assert!(long.message.contains("[default: 512MiB]"));
    for name in [
        "--moriio-write-mode",
        "[env: POD_IP]",
        "[env: INFERENCE_POOL]",
    ] {
        assert!(long.message.contains(name), "{name}");
    }
    for name in ["zap", "--connector", "logtostderr"] {
        assert!(!long.message.contains(name), "{name}");
    }
    assert!(short.message.contains("--model-server-port"));
    assert!(!short.message.contains("--max-body"));
    assert!(short.message.lines().count() <= 40, "{}", short.message);
}

#[test]
fn flags_take_precedence_over_environment() {
    let environment = |name: &str| match name {
        "POD_IP" => Some("10.0.0.9".to_owned()),
        "ENABLE_PREFILLER_SAMPLING" => Some("true".to_owned()),
        _ => None,
    };
    for (flag, want) in [("", true), ("--enable-prefiller-sampling=false", false)] {
        let line = format!("ringside sidecar --secure-proxy=false {flag}");
        let Ok(Command::Proxy(config, _)) = run_with(&line, &environment) else {
            panic!("{line}");
        };
        assert_eq!(config.pd.prefiller_sampling, want, "{flag}");
        assert_eq!(config.pod_ip.as_deref(), Some("10.0.0.9"));
        assert_eq!(config.listeners[0].address, ListenAddress::DualStack(8000));
    }
}

#[cfg(feature = "mock")]
#[test]
fn mock_receives_its_arguments_unchanged() {
    for (line, want) in [
        ("ringside mock", vec![]),
        ("ringside mock --help", vec!["--help"]),
        (
            "ringside mock -p 1 --role=decode x --",
            vec!["-p", "1", "--role=decode", "x", "--"],
        ),
        (
            "ringside mock --version -port 1",
            vec!["--version", "-port", "1"],
        ),
    ] {
        let want = want.into_iter().map(str::to_owned).collect();
        assert_eq!(run(line), Ok(Command::Mock(want)), "{line}");
    }
    let demo = run("ringside demo --once --port 9000 --prompt-tokens 10");
    let want = DemoOptions {
        once: true,
        port: 9000,
        prompt_tokens: 10,
    };
    assert_eq!(demo, Ok(Command::Demo(want)));
}

#[test]
fn arguments_must_be_utf8() {
    use std::os::unix::ffi::OsStringExt;
    let args = [OsString::from("ringside"), OsString::from_vec(vec![0xff])];
    assert_eq!(parse_with(args, &|_| None).unwrap_err().code, Exit::USAGE);
}
