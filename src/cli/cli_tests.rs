//! Tables of the command line; the exit codes are what scripts rely on.

use super::*;
use crate::config::{Cores, ListenAddress, LogFormat, OnDecodeKvError, OnMissingKv};
use std::time::Duration;

fn run(line: &str) -> Result<Command, Exit> {
    run_with(line, &|_| None)
}

fn run_with(line: &str, environment: &dyn Fn(&str) -> Option<String>) -> Result<Command, Exit> {
    parse_with(line.split_whitespace().map(OsString::from), environment)
}

fn sidecar(line: &str) -> (Config, Vec<String>) {
    match run(line) {
        Ok(Command::Sidecar(config, warnings)) => (*config, warnings),
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn every_flag_of_the_contract() {
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
         --allow-flat-blocks",
    );
    assert!(warnings.is_empty(), "{warnings:?}");
    let ports: Vec<_> = config
        .ranks
        .iter()
        .map(|rank| (rank.rank, rank.listen.port(), rank.decoder.to_string()))
        .collect();
    let decoder = |port| format!("10.0.0.1:{port}");
    assert_eq!(ports, [(0, 8100, decoder(8300)), (1, 8101, decoder(8301))]);
    assert!(config.pd.prefiller_sampling && config.pd.hide_prefill_errors);
    assert!(config.pd.allow_flat_blocks);
    assert_eq!(config.pd.prefill_retries_max, 3);
    assert_eq!(config.pd.on_missing_kv, OnMissingKv::Error);
    assert_eq!(config.pd.on_decode_kv_error, OnDecodeKvError::Error);
    assert_eq!(config.pd.prefill_answer_bytes_max, 3 << 10);
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
fn a_place_for_the_shards() {
    for text in ["near:gpu0-3*2", "near:eth0", "near:0000:3b:00.0", "numa:1"] {
        let (config, _) = sidecar(&format!(
            "ringside sidecar --secure-proxy=false --cores {text}"
        ));
        assert_eq!(config.cores, text.parse().unwrap(), "{text}");
    }
}

#[test]
fn spellings_that_mean_the_same() {
    let want = sidecar("ringside sidecar --port 8001 --secure-proxy=false").0;
    for line in [
        "ringside sidecar --port=8001 --secure-proxy=false",
        "ringside sidecar -port=8001 -secure-proxy=false",
        "ringside sidecar -port 8001 -secure-proxy=false",
        "ringside sidecar --port 9 --port 8001 --secure-proxy --secure-proxy=f",
        "pd-sidecar --port 8001 --secure-proxy=0",
        "/usr/bin/llm-d-routing-sidecar -port=8001 --secure-proxy=False",
        "ringside sidecar --port 8001 --secure-proxy=false --tracing=false --metrics-port=0 \
         --enable-ssrf-protection=false --decode-chunk-size=0 --ec-connector= -connector=nixlv2 \
         --zap-log-level=info --moriio-dp-size 1",
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
            "ringside sidecar",
            3,
            "--secure-proxy: this build serves plain text only",
        ),
        (
            "ringside sidecar --secure-proxy",
            3,
            "pass --secure-proxy=false",
        ),
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
        ("ringside sidecar --prot 1", 2, "'--port'"),
        ("ringside sidecar --port", 2, "a value is required"),
        ("ringside sidecar extra", 2, "unexpected argument 'extra'"),
        ("ringside sidecar --port=x --cores=4-1", 3, "has 3 problems"),
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
fn flags_this_build_only_knows_by_name() {
    check_exits(&[
        (
            "ringside sidecar --secure-proxy=false --tracing",
            3,
            "--tracing: this build does not have it yet",
        ),
        (
            "ringside sidecar --secure-proxy=false --ec-connector=ec-nixl",
            3,
            "--ec-connector: this build",
        ),
        (
            "ringside sidecar --secure-proxy=false --enable-tls=decoder",
            3,
            "--enable-tls: this build",
        ),
        (
            "ringside sidecar --secure-proxy=false --enable-tls decoder --enable-tls=",
            3,
            "--enable-tls: this build",
        ),
        (
            "ringside sidecar --secure-proxy=false --metrics-port=9090",
            3,
            "--admin-address serves /metrics",
        ),
        (
            "ringside sidecar --secure-proxy=false --configuration-file x --port 0",
            3,
            "has 2 problems",
        ),
        (
            "ringside sidecar --secure-proxy=false --enable-ssrf-protection",
            3,
            "--enable-ssrf-protection",
        ),
        (
            "ringside sidecar --secure-proxy=false --moriio-write-mode",
            3,
            "--moriio-write-mode",
        ),
        (
            "ringside sidecar --secure-proxy=false --zap-log-level=debug",
            3,
            "use --log-level",
        ),
        (
            "ringside sidecar --secure-proxy=false -connector=lmcache",
            3,
            "use --kv-connector",
        ),
        ("ringside demo --port 70000", 2, "70000"),
    ]);
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
        "Limits:",
        "Timeouts:",
        "Observability:",
        "Performance:",
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
    assert!(!long.message.contains("moriio"));
    assert!(short.message.contains("--model-server-port"));
    assert!(!short.message.contains("--max-body"));
    assert!(short.message.lines().count() <= 40, "{}", short.message);
}

#[test]
fn environment_comes_after_flags() {
    let environment = |name: &str| match name {
        "POD_IP" => Some("10.0.0.9".to_owned()),
        "ENABLE_PREFILLER_SAMPLING" => Some("true".to_owned()),
        _ => None,
    };
    for (flag, want) in [("", true), ("--enable-prefiller-sampling=false", false)] {
        let line = format!("ringside sidecar --secure-proxy=false {flag}");
        let Ok(Command::Sidecar(config, _)) = run_with(&line, &environment) else {
            panic!("{line}");
        };
        assert_eq!(config.pd.prefiller_sampling, want, "{flag}");
        assert_eq!(config.pod_ip.as_deref(), Some("10.0.0.9"));
        assert_eq!(config.ranks[0].listen, ListenAddress::DualStack(8000));
    }
}

#[cfg(feature = "mock")]
#[test]
fn mock_keeps_its_arguments() {
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
fn arguments_are_utf8() {
    use std::os::unix::ffi::OsStringExt;
    let args = [OsString::from("ringside"), OsString::from_vec(vec![0xff])];
    assert_eq!(parse_with(args, &|_| None).unwrap_err().code, Exit::USAGE);
}
