//! `ringside check-config` finds what a start would refuse, without listening.

use std::net::TcpListener;
use std::process::Output;

use serde_json::Value;

use crate::certificates::Folder;
use crate::harness::{free_ports, ringside};

fn check(args: &[&str]) -> Output {
    let mut command = ringside();
    command.arg("check-config").args(args);
    command.output().unwrap()
}

fn text(output: &Output) -> String {
    let [out, err] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    format!("{out}{err}")
}

/// A start with each of these flags is refused. The same must be true of a check, with the same
/// exit code.
#[test]
fn a_check_refuses_what_a_start_refuses() {
    let folder = Folder::new();
    let bad_rules = folder.write("rules", "not a rule!\n");
    let bad_key = folder.write("engine.crt", "no certificate\n");
    let rules = format!("--allow-targets-file={bad_rules}");
    let ca = format!("--tls-ca-file={bad_key}");
    let metrics = format!("--metrics-port={}", free_ports(1));
    let cases: [(i32, &[&str]); 13] = [
        (3, &["--secure-proxy=true", "--cert-path=/no/such/folder"]),
        (3, &["--enable-tls=decoder", "--tls-ca-file=/no/such/file"]),
        (3, &["--enable-tls=decoder", &ca]),
        (3, &["--cores=1023"]),
        (4, &["--host=192.0.2.1"]),
        (4, &["--admin-address=192.0.2.1:9890"]),
        (3, &["--enable-ssrf-protection", &rules]),
        (
            3,
            &["--enable-ssrf-protection", "--allow-targets-file=/no/file"],
        ),
        (3, &["--access-log=/no/such/folder/access.log"]),
        (3, &["--log-file=/no/such/folder/x.log"]),
        (3, &["--access-log=/tmp"]),
        (3, &[&metrics, "--metrics-cert-dir=/no/such/folder"]),
        (3, &["--port=70000"]),
    ];
    for (code, args) in cases {
        let port = format!("--port={}", free_ports(1));
        let own = ["--secure-proxy=false", "--admin-address=off", &port];
        let args = [&own[..], args].concat();
        let output = check(&args);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{args:?}: {}",
            text(&output)
        );
        let mut start = ringside();
        let started = start.arg("sidecar").args(&args).output().unwrap();
        assert_eq!(
            started.status.code(),
            Some(code),
            "{args:?}: {}",
            text(&started)
        );
    }
}

#[test]
fn a_check_reports_all_problems_and_does_not_listen() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = format!("--port={}", taken.local_addr().unwrap().port());
    let args = [
        "--host=127.0.0.1",
        "--secure-proxy=false",
        "--offline",
        &port,
    ];
    // The process that listens may be the one to be replaced.
    let output = check(&args);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(
        text(&output).contains("is in use at present"),
        "{}",
        text(&output)
    );
    let more = [
        "--access-log=/no/folder/a",
        "--cores=1023",
        "--json",
        "--diff",
    ];
    let output = check(&[&args[..], &more].concat());
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["valid"], false);
    assert_eq!(report["problems"].as_array().unwrap().len(), 2, "{report}");
    let keys = report["values"].as_array().unwrap().iter();
    let keys: Vec<_> = keys.map(|value| value["key"].as_str().unwrap()).collect();
    let want = ["port", "host", "secure-proxy", "access-log", "cores"];
    assert_eq!(keys, want);
    let output = check(&["--json", "--port=0", "--cores=x"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(report["problems"].as_array().unwrap().len(), 2, "{report}");
}

#[test]
fn values_that_open_a_guard_are_refused_or_warned_of() {
    for (args, want) in [
        (&["--allow-target="][..], "--allow-target: is empty"),
        (&["--allow-targets-file="], "--allow-targets-file: is empty"),
        (
            &["--configuration={allow-target: []}"],
            "allow-target: is empty",
        ),
        (&["--max-body=1.5"], "--max-body: `1.5`"),
    ] {
        let output = check(&[args, &["--offline"]].concat());
        assert_eq!(output.status.code(), Some(3), "{args:?}");
        assert!(text(&output).contains(want), "{want}: {}", text(&output));
    }
    for (args, want) in [
        (&[][..], "warning: requests may name any target"),
        (
            &["--trust-client-kv"],
            "warning: --trust-client-kv: transfer",
        ),
        (
            &["--enable-tls=decoder", "--tls-insecure-skip-verify=decoder"],
            "warning: --tls-insecure-skip-verify=decoder: the decoder's certificate",
        ),
        (
            &["--mooncake-bootstrap-port=9"],
            "warning: --mooncake-bootstrap-port has no effect without --kv-connector=mooncake",
        ),
    ] {
        let output = check(&[args, &["--offline"]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output));
        assert!(text(&output).contains(want), "{want}: {}", text(&output));
    }
}

#[test]
fn a_file_needs_no_flag() {
    let folder = Folder::new();
    let file = folder.write("ringside.yaml", "secure-serving: false\nmax-body: 3MiB\n");
    let output = check(&[&file, "--diff", "--offline"]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output));
    assert!(
        text(&output).contains(&format!("{file}:2")),
        "{}",
        text(&output)
    );
    let output = check(&["/no/such/file.yaml"]);
    assert_eq!(output.status.code(), Some(3), "{}", text(&output));
}
