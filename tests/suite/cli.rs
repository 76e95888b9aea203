//! Command line and configuration: exit codes, messages, sources and precedence of values, and the
//! names of the binary (conformance rows G1 to G4).

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mock_engine::{Engine, EngineConfig};

use crate::harness::{Launch, Sidecar, free_ports, ringside, run_to_exit};

/// A temporary folder of one test, removed when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let name = format!("ringside-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Writes a file and returns its path.
    fn file(&self, name: &str, text: &str) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Links the binary under another name and returns the path of the link.
    fn program(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        symlink(ringside().get_program(), &path).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// Returns the output of `ringside check-config`, which must exit with 0.
#[track_caller]
fn report(args: &[&str], environment: &[(&str, &str)]) -> String {
    let mut command = ringside();
    command.arg("check-config").args(args);
    let output = command.envs(environment.iter().copied()).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {stderr}");
    assert_eq!(stderr, "");
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the value of a key and its source, like `8001 default`, from the output of `ringside
/// check-config`.
#[track_caller]
fn row(report: &str, key: &str) -> String {
    let row = report
        .lines()
        .find(|line| line.split(' ').next() == Some(key));
    let words: Vec<_> = row.unwrap().split_whitespace().skip(1).collect();
    words.join(" ")
}

#[track_caller]
fn expect_exit(args: &[&str], code: i32, message: &str) {
    let (got, stderr) = run_to_exit(args);
    assert_eq!(got, code, "{args:?}: {stderr}");
    assert!(stderr.contains(message), "{args:?}: {stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

#[track_caller]
fn expect_refusal(args: &[&str], message: &str) {
    let mut all = vec!["sidecar", "--secure-proxy=false"];
    all.extend_from_slice(args);
    expect_exit(&all, 3, message);
}

#[test]
fn g2_invalid_values_exit_with_3_and_name_the_flag() {
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
        (&["--cores=naer:gpu0"], "did you mean `near:gpu0`?"),
        // No test machine has these.
        (
            &["--cores=near:nosuchdevice"],
            "--cores: near:nosuchdevice: ",
        ),
        (&["--cores=numa:1023"], "--cores: numa:1023: "),
    ] {
        expect_refusal(args, message);
    }
}

#[test]
fn g2_invalid_connectors_exit_with_3_and_name_the_flag() {
    for (args, message) in [
        (&["--kv-connector=nope"][..], "--kv-connector: `nope`"),
        (&["--kv-connector=sglagn"], "did you mean `sglang`?"),
        (&["-connector=nope"], "--connector: `nope`"),
        (&["--ec-connector=ec"], "--ec-connector: `ec` is not valid"),
        (
            &["--mooncake-bootstrap-port=0"],
            "--mooncake-bootstrap-port: `0`",
        ),
        (
            &["--p2p-connector-port=65535", "--data-parallel-size=2"],
            "--p2p-connector-port: port 65535",
        ),
        (
            &["--enable-p2p-pull", "--kv-connector=mooncake"],
            "--enable-p2p-pull: requires --kv-connector nixlv2",
        ),
        (&["--decode-chunk-size=-1"], "--decode-chunk-size: `-1`"),
        (&["--moriio-write-mode"], "or set POD_IP"),
        (
            &["--moriio-parallel-dispatch"],
            "--moriio-parallel-dispatch: requires --moriio-write-mode",
        ),
        (
            &["--moriio-remote-hosts=a,b"],
            "names 2 pods, which requires --moriio-dp-size-local",
        ),
        (
            &[
                "--moriio-decode-hosts=a,b",
                "--moriio-dp-size=3",
                "--moriio-dp-size-local=2",
            ],
            "--moriio-dp-size-local: 2 does not divide",
        ),
    ] {
        expect_refusal(args, message);
    }
}

#[test]
fn g2_invalid_tls_and_targets_exit_with_3_and_name_the_flag() {
    for (args, message) in [
        (
            &["--enable-tls=decoder,prefill"][..],
            "--enable-tls: `prefill` is not valid; did you mean `prefiller`?",
        ),
        (
            &["--tls-insecure-skip-verify=all"],
            "--tls-insecure-skip-verify: `all`",
        ),
        (&["--tls-client-cert=x"], "requires --tls-client-key"),
        (
            &["--enable-ssrf-protection"],
            "--enable-ssrf-protection: allows no target at all",
        ),
        (
            &["--enable-ssrf-protection", "--inference-pool=a/b/c"],
            "--inference-pool: `a/b/c`",
        ),
        (&["--inference-pool=/b"], "--inference-pool: `/b`"),
        (
            &["--allow-target=10.0.0.0/40"],
            "--allow-target: `10.0.0.0/40`",
        ),
        (&["--pool-group=x.k8s.io"], "--pool-group: `x.k8s.io`"),
        (&["--secure-proxy=maybe"], "--secure-proxy: `maybe`"),
    ] {
        expect_refusal(args, message);
    }
}

#[test]
fn g2_all_problems_are_reported_together() {
    let args = [
        "sidecar",
        "--port=0",
        "--max-body=x",
        "--kv-connector=y",
        "--enable-tls=z",
    ];
    let (code, stderr) = run_to_exit(&args);
    assert_eq!(code, 3);
    for flag in ["--port", "--max-body", "--kv-connector", "--enable-tls"] {
        assert!(
            stderr.contains(&format!("\n  {flag}: ")),
            "{flag}: {stderr}"
        );
    }
}

#[test]
fn g2_an_invalid_command_line_exits_with_2() {
    expect_exit(&["sidecar", "--no-such-flag"], 2, "--no-such-flag");
    expect_exit(&["sidecar", "--port"], 2, "--port");
    expect_exit(
        &["sidecar", "--kv-conector=nixlv2"],
        2,
        "a similar argument exists: '--kv-connector'",
    );
    expect_exit(
        &["check-config", "-prot=1"],
        2,
        "a similar argument exists: '--port'",
    );
    expect_exit(&["frobnicate"], 2, "frobnicate");
    expect_exit(&[], 2, "Usage");
}

#[test]
fn help_and_version_exit_with_0() {
    for args in [&["--help"][..], &["--version"], &["sidecar", "--help"]] {
        assert_eq!(run_to_exit(args), (0, String::new()));
    }
}

#[test]
fn g2_a_port_in_use_exits_with_4() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap();
    let free = free_ports(1);
    let (port, admin) = (
        format!("--port={}", taken.port()),
        format!("--admin-address={taken}"),
    );
    let message = format!("port {} is in use", taken.port());
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
    expect_exit(&args, 4, "is in use");
    sidecar.expect_sound();
}

#[test]
fn g3_the_newer_flag_of_the_decoder_port_takes_precedence() {
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
fn g1_values_are_read_from_a_document() {
    let engine = Engine::start(EngineConfig::decode(), 0).unwrap();
    let good = format!("model-server-port: {}", engine.port());
    let json = format!("{{\"model-server-port\": {}}}", engine.port());
    let flag = format!("--model-server-port={}", engine.port());
    let folder = Folder::new("g1-values");
    let file = folder.file(
        "pd.yaml",
        &format!("# the decoder\n{good}\nmax-body: 1MiB\n"),
    );
    let wrong = folder.file("wrong.yaml", "model-server-port: 1\nvllm-port: 1\n");
    for args in [
        &["--configuration", good.as_str()][..],
        &["--configuration", &json],
        &["--configuration-file", &file],
        &["-configuration-file", &file],
        // A flag takes precedence, also under its old name.
        &["--configuration-file", &wrong, &flag],
        &[
            "--configuration-file",
            &wrong,
            &flag.replace("model-server", "vllm"),
        ],
    ] {
        let sidecar = Sidecar::launch(&Launch {
            args,
            ..Launch::default()
        });
        sidecar.get("/v1/models", &[]).expect(200);
    }
}

#[test]
fn g1_problems_of_a_document_are_reported_with_their_position() {
    let folder = Folder::new("g1-wrong");
    let broken = folder.file("broken.yaml", "port: 8000\nenable-tls: [decoder\n");
    let unknown = folder.file("unknown.yaml", "port: 8000\n\nprefil-max-retries: 1\n");
    let removed = folder.file("removed.yaml", "connector: nixlv2\n");
    let value = folder.file("value.yaml", "port: 8000\nprefill-retry-backoff: fast\n");
    let missing = folder.0.join("missing.yaml");
    for (args, message) in [
        (
            &["--configuration-file", &broken][..],
            format!("\n  {broken}:2:13: unclosed bracket"),
        ),
        (
            &["--configuration-file", &unknown],
            format!(
                "\n  {unknown}:3:1: `prefil-max-retries` is not a key; did you mean \
                 `prefill-max-retries`?\n     3 | prefil-max-retries: 1\n       | ^"
            ),
        ),
        (
            &["--configuration-file", &removed],
            format!("{removed}:1:1: `connector` is no longer a key; use `kv-connector`"),
        ),
        (
            &["--configuration-file", &value],
            format!("{value}:2: prefill-retry-backoff: `fast` is not a duration"),
        ),
        (
            &["--configuration={}", "--configuration-file", &value],
            "--configuration: is given together with --configuration-file".to_owned(),
        ),
        (
            &["--configuration-file", missing.to_str().unwrap()],
            "missing.yaml` cannot be read: No such file".to_owned(),
        ),
    ] {
        for command in ["sidecar", "check-config"] {
            let mut all = vec![command, "--secure-proxy=false"];
            all.extend_from_slice(args);
            expect_exit(&all, 3, &message);
        }
    }
}

#[test]
fn g4_tls_is_configured_per_stage() {
    for (args, want) in [
        (&[][..], "prefiller off; decoder off; encoder off"),
        (
            &["--enable-tls=prefiller"],
            "prefiller on; decoder off; encoder off",
        ),
        (
            &["--enable-tls=decoder", "--enable-tls=encoder"],
            "prefiller off; decoder on; encoder on",
        ),
        (
            &[
                "--enable-tls=prefiller,decoder,encoder",
                "--tls-insecure-skip-verify=decoder",
            ],
            "prefiller on; decoder on, unverified; encoder on",
        ),
        (
            &[
                "-prefiller-use-tls",
                "-prefiller-tls-insecure-skip-verify=true",
            ],
            "prefiller on, unverified; decoder off; encoder off",
        ),
        (
            &["--configuration={enable-tls: [prefiller, encoder]}"],
            "prefiller on; decoder off; encoder on",
        ),
        (
            &[
                "--configuration={enable-tls: [prefiller]}",
                "--enable-tls=decoder",
            ],
            "prefiller off; decoder on; encoder off",
        ),
    ] {
        let report = report(args, &[]);
        assert!(
            report.contains(&format!("tls to engines: {want}\n")),
            "{args:?}: {report}"
        );
    }
}

#[test]
fn check_config_shows_the_effective_values_and_their_sources() {
    let folder = Folder::new("check-config");
    let file = folder.file(
        "pd.yaml",
        "port: 8100\nkv-connector: sglang\ndecode-chunk-size: 7\n",
    );
    let args = [
        "--configuration-file",
        &file,
        "-connector=mooncake",
        "--max-body=1MiB",
    ];
    let environment = [
        ("MOONCAKE_BOOTSTRAP_PORT", "9000"),
        ("P2P_CONNECTOR_PORT", "soon"),
    ];
    let report = report(&args, &environment);
    for (key, want) in [
        ("port", format!("8100 {file}:1")),
        ("decode-chunk-size", format!("7 {file}:3")),
        ("kv-connector", "mooncake --connector".to_owned()),
        ("max-body", "1MiB --max-body".to_owned()),
        (
            "mooncake-bootstrap-port",
            "9000 environment MOONCAKE_BOOTSTRAP_PORT".to_owned(),
        ),
        ("p2p-connector-port", "7777 default".to_owned()),
        ("secure-serving", "true default".to_owned()),
    ] {
        assert_eq!(row(&report, key), want, "{report}");
    }
    for want in [
        "\n  kv_connector: mooncake, bootstrap port 9000\n",
        "\nwarning: --connector was removed from pd-sidecar",
        "\nwarning: P2P_CONNECTOR_PORT is `soon`, which is not a number; it is ignored",
        "\nwarning: requests may name any target",
        "\nThe configuration is valid, with ",
    ] {
        assert!(report.contains(want), "{want}: {report}");
    }
}

/// Runs `program`, a link to the binary, until it logs the address of its decoder, and returns that
/// address.
fn decoder_of(program: &Path, args: &[&str]) -> String {
    // Another test may take the port in the meantime.
    let started = (0..5).find_map(|_| try_decoder_of(program, args));
    started.unwrap()
}

fn try_decoder_of(program: &Path, args: &[&str]) -> Option<String> {
    let (port, admin) = (free_ports(1), "--admin-address=off");
    let mut child = Command::new(program)
        .args([&format!("--port={port}"), admin, "-secure-proxy=false"])
        .args(args)
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = BufReader::new(child.stderr.take().unwrap());
    let line = stderr
        .lines()
        .map_while(Result::ok)
        .find_map(|line| Some(line.split_once("decoder: ")?.1.to_owned()));
    child.kill().unwrap();
    child.wait().unwrap();
    line
}

#[test]
fn binaries_named_like_the_replaced_programs_need_no_subcommand() {
    let folder = Folder::new("names");
    let today = folder.program("pd-sidecar");
    let first = folder.program("llm-d-routing-sidecar");
    assert_eq!(decoder_of(&today, &[]), "localhost:8200");
    assert_eq!(decoder_of(&first, &[]), "localhost:8001");
    let args = ["-vllm-port=8300", "-connector=nixlv2"];
    assert_eq!(decoder_of(&first, &args), "localhost:8300");
    let output = Command::new(first).arg("check-config").output().unwrap();
    let report = String::from_utf8(output.stdout).unwrap();
    assert_eq!(row(&report, "model-server-port"), "8001 default");
    let other = folder.program("routing-sidecar");
    let output = Command::new(other).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn sigterm_drains_and_exits_with_0() {
    let engine = Engine::start(EngineConfig::decode(), 0).unwrap();
    let mut sidecar = Sidecar::start(&[], engine.port());
    let mut client = sidecar.connect();
    client.ask("GET", "/v1/models", &[], b"").expect(200);
    sidecar.terminate();
    assert_eq!(sidecar.wait_exit().code(), Some(0));
    client.expect_closed();
}
