//! Starting: exit codes, messages, and which port the decoder is looked for on (rows G2 and G3).

use std::net::TcpListener;

use mock_engine::{Engine, EngineConfig};

use crate::harness::{Launch, Sidecar, free_ports, run_to_exit};

#[track_caller]
fn expect_exit(args: &[&str], code: i32, message: &str) {
    let (got, stderr) = run_to_exit(args);
    assert_eq!(got, code, "{args:?}: {stderr}");
    assert!(stderr.contains(message), "{args:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

#[test]
fn g2_bad_configurations_end_with_3_and_name_the_flag() {
    for (args, message) in [
        (&["--port=0"][..], "--port: `0` is not a port"),
        (&["--port=65536"], "--port: `65536` is not a port"),
        (&["--port=-1"], "--port: `-1` is not a port"),
        (&["--model-server-port=0"], "--model-server-port: `0`"),
        (&["--vllm-port=70000"], "--vllm-port: `70000`"),
        (&["--data-parallel-size=0"], "--data-parallel-size: `0`"),
        (
            &["--model-server-socket=/run/x.sock", "--vllm-port=8001"],
            "--model-server-socket: is given together with --vllm-port",
        ),
        (
            &[
                "--model-server-socket=/run/x.sock",
                "--data-parallel-size=2",
            ],
            "write {rank} where the rank's number goes",
        ),
        (
            &["--port=65535", "--data-parallel-size=2"],
            "needs ports up to 65536",
        ),
        (
            &["--model-server-port=65535", "--data-parallel-size=2"],
            "--model-server-port: port 65535",
        ),
        (&["--kv-connector=nope"], "--kv-connector: `nope`"),
        (&["--kv-connector=sglang"], "not in this build yet"),
        (
            &["--prefill-max-retries=1", "--prefill-retry-backoff=0s"],
            "--prefill-retry-backoff",
        ),
        (&["--max-body=0"], "--max-body: `0`"),
        (
            &["--max-body=2MiB", "--body-budget=1MiB"],
            "--body-budget: 1MiB is below --max-body",
        ),
        (
            &["--first-byte-timeout=soon"],
            "--first-byte-timeout: `soon`",
        ),
        (&["--enable-tls=decoder"], "--enable-tls"),
        (&["--enable-ssrf-protection"], "--enable-ssrf-protection"),
        (&["--secure-proxy=true"], "pass --secure-proxy=false"),
        (&["--cores=naer:gpu0"], "did you mean `near:gpu0`?"),
        // Not on this machine, whatever it is.
        (
            &["--cores=near:nosuchdevice"],
            "--cores: near:nosuchdevice: ",
        ),
        (&["--cores=numa:1023"], "--cores: numa:1023: "),
    ] {
        let mut all = vec!["sidecar", "--secure-proxy=false"];
        all.extend_from_slice(args);
        expect_exit(&all, 3, message);
    }
}

#[test]
fn g2_all_problems_are_named_at_once() {
    let args = ["sidecar", "--port=0", "--max-body=x", "--kv-connector=y"];
    let (code, stderr) = run_to_exit(&args);
    assert_eq!(code, 3);
    for flag in ["--port", "--max-body", "--kv-connector", "--secure-proxy"] {
        assert!(
            stderr.contains(&format!("\n  {flag}: ")),
            "{flag}: {stderr}"
        );
    }
}

#[test]
fn g2_what_is_no_command_line_ends_with_2() {
    expect_exit(&["sidecar", "--no-such-flag"], 2, "--no-such-flag");
    expect_exit(&["sidecar", "--port"], 2, "--port");
    expect_exit(&["frobnicate"], 2, "frobnicate");
    expect_exit(&[], 2, "Usage");
}

#[test]
fn help_and_version_end_with_0() {
    for args in [&["--help"][..], &["--version"], &["sidecar", "--help"]] {
        assert_eq!(run_to_exit(args), (0, String::new()));
    }
}

#[test]
fn g2_a_port_that_is_taken_ends_with_4() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap();
    let free = free_ports(1);
    let (port, admin) = (
        format!("--port={}", taken.port()),
        format!("--admin-address={taken}"),
    );
    let message = format!("port {} is taken", taken.port());
    let plain = ["sidecar", "--secure-proxy=false", "--model-server-port=1"];
    let mut args = plain.to_vec();
    args.extend([port.as_str(), "--admin-address=off"]);
    expect_exit(&args, 4, &message);
    let free = format!("--port={free}");
    let mut args = plain.to_vec();
    args.extend([free.as_str(), admin.as_str()]);
    expect_exit(&args, 4, &message);
}

#[test]
fn g2_two_sidecars_do_not_share_a_port() {
    let sidecar = Sidecar::start(&[], 1);
    let port = format!("--port={}", sidecar.port);
    let args = [
        "sidecar",
        "--secure-proxy=false",
        "--admin-address=off",
        "--model-server-port=1",
        &port,
    ];
    expect_exit(&args, 4, "is taken");
    sidecar.expect_sound();
}

#[test]
fn g3_precedence_of_the_decoders_port() {
    let engine = Engine::start(EngineConfig::decode(), 0).unwrap();
    let good = engine.port().to_string();
    let new = format!("--model-server-port={good}");
    let old = format!("--vllm-port={good}");
    for args in [
        &[new.as_str()][..],
        &[&old],
        &[&new, "--vllm-port=1"],
        &["--vllm-port=1", &new],
        &["--vllm-port=1", &old],
        &["--model-server-port=1", &new],
    ] {
        let sidecar = Sidecar::launch(&Launch {
            args,
            ..Launch::default()
        });
        sidecar.get("/v1/models", &[]).expect(200);
        let warns = args.iter().any(|arg| arg.starts_with("--vllm-port"));
        let warned = sidecar.stderr().contains("--vllm-port is deprecated");
        assert_eq!(warned, warns, "{args:?}");
    }
    let sidecar = Sidecar::launch(&Launch::default());
    sidecar.wait_stderr("decoder: localhost:8200");
}

#[test]
fn a_signal_ends_it_with_0_after_what_runs() {
    let engine = Engine::start(EngineConfig::decode(), 0).unwrap();
    let mut sidecar = Sidecar::start(&[], engine.port());
    let mut client = sidecar.connect();
    client.ask("GET", "/v1/models", &[], b"").expect(200);
    sidecar.terminate();
    assert_eq!(sidecar.wait_exit().code(), Some(0));
    client.expect_closed();
}
