//! A night with incidents. After each one, the log has exactly one warning, which names the engine,
//! and the metrics and the access log agree.

use std::io::Write;

use mock_engine::{Engine, EngineConfig, Fault};
use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::certificates::{Authority, Folder};
use crate::client::{End, Framing, request};
use crate::harness::{CHAT, Launch, PREFILLER, Sidecar, free_ports, start_ranks, wait_for};
use crate::harness_more::ask_for;
use crate::tls::write_as_a_secret;

/// A sidecar in front of two ranks, with a full disk for its log file.
struct Night {
    sidecar: Sidecar,
    decoders: Vec<Engine>,
    folder: Folder,
    /// Number of warnings and of access-log lines so far.
    warnings: usize,
    lines: usize,
}

impl Night {
    fn begin() -> Self {
        let folder = Folder::new();
        let identity = Authority::new("evening").sign(&["localhost"]);
        write_as_a_secret(&folder, 0, &identity);
        let decoders = start_ranks(&EngineConfig::decode(), 2);
        let flags = [
            format!("--cert-path={}", folder.text()),
            format!("--access-log={}", folder.path().join("access").display()),
            "--log-file=/dev/full".to_owned(),
            "--prefill-timeout=300ms".to_owned(),
            "--data-parallel-size=2".to_owned(),
            "--drain-timeout=300ms".to_owned(),
        ];
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let sidecar = Sidecar::launch(&Launch {
            args: &flags,
            decoder_port: decoders[0].port(),
            ranks: 2,
            tls: true,
            ..Launch::default()
        });
        let mut night = Self {
            sidecar,
            decoders,
            folder,
            warnings: 0,
            lines: 0,
        };
        night.warnings = night.all_warnings().len();
        night
    }

    fn all_warnings(&self) -> Vec<String> {
        let text = self.sidecar.stderr();
        let warnings = text.lines().filter(|line| line.contains(" WARN "));
        warnings.map(str::to_owned).collect()
    }

    /// Sends a request for a stream to a rank, and reads until the connection ends.
    fn ask(&self, rank: u16, prefiller: Option<&str>) {
        let (_, body) = ask_for(8, true);
        let mut headers = vec![("connection", "close")];
        headers.extend(prefiller.map(|target| (PREFILLER, target)));
        let mut client = self.sidecar.connect_to(rank);
        client.send(request("POST", CHAT, &headers, body.as_bytes()));
        let head = client.head();
        let _ = client.body(head.framing("POST"));
    }

    /// Waits for the access-log line of the request that follows the last one.
    fn line(&mut self) -> Value {
        let path = self.folder.path().join("access");
        let nth = self.lines;
        self.lines += 1;
        wait_for("the access log", || {
            let text = std::fs::read_to_string(&path).ok()?;
            serde_json::from_str(text.split_inclusive('\n').nth(nth)?).ok()
        })
    }

    /// Fails unless there is exactly one new warning, and it has all of these parts.
    #[track_caller]
    fn expect_warning(&mut self, parts: &[&str]) {
        let warnings = wait_for("a warning", || {
            let warnings = self.all_warnings();
            (warnings.len() > self.warnings).then_some(warnings)
        });
        let new = &warnings[self.warnings..];
        assert_eq!(new.len(), 1, "{new:#?}");
        for part in parts {
            assert!(new[0].contains(part), "{part} is not in {}", new[0]);
        }
        self.warnings += 1;
    }

    #[track_caller]
    fn expect_no_warning(&self) {
        let warnings = self.all_warnings();
        assert_eq!(warnings[self.warnings..], [""; 0]);
    }

    /// Fails unless the incident of a prefiller has left its traces.
    #[track_caller]
    fn expect_prefill_failure(&mut self, prefiller: &str, kind: &str, code: &str) {
        let endpoint = format!("endpoint={prefiller} ");
        let kind = format!("kind=\"{kind}\"");
        self.expect_warning(&["role=\"prefill\"", &endpoint, &kind]);
        let line = self.line();
        assert_eq!(line["prefill"], prefiller);
        assert_eq!(line["error"], code, "{line}");
        self.sidecar
            .wait_metric("ringside_errors_total", &[("code", code)], 1.0);
    }
}

/// A prefiller is killed, another one does not resolve, is slow, and responds 500.
fn prefillers_fail(night: &mut Night, prefill: &Engine) {
    let prefiller = prefill.host_port();
    let dead = format!("127.0.0.1:{}", free_ports(1));
    night.ask(0, Some(&dead));
    night.expect_prefill_failure(&dead, "refused", "prefill_connect");
    let unknown = "no-such-engine.invalid:8000";
    night.ask(0, Some(unknown));
    night.expect_warning(&["role=\"prefill\"", unknown, "kind=\"unresolved\""]);
    assert_eq!(night.line()["error"], "prefill_connect");
    prefill.fault(Fault::StallBeforeHead, 1);
    night.ask(0, Some(&prefiller));
    night.expect_prefill_failure(&prefiller, "late", "prefill_timeout");
    let broken = Engine::start(EngineConfig::prefill(), 0).unwrap();
    let status = Fault::Status {
        code: 500,
        body: "{}".to_owned(),
        content_type: "application/json".to_owned(),
    };
    broken.fault(status, 1);
    night.ask(0, Some(&broken.host_port()));
    night.expect_prefill_failure(&broken.host_port(), "status", "prefill_status");
}

#[test]
fn each_incident_of_a_night_leaves_one_warning() {
    let mut night = Night::begin();
    let prefill = Engine::start(EngineConfig::prefill(), 0).unwrap();
    let prefiller = prefill.host_port();
    night.ask(0, Some(&prefiller));
    assert_eq!(night.line()["error"], Value::Null);
    night.expect_no_warning();

    prefillers_fail(&mut night, &prefill);

    // A decoder's stream is cut.
    night.decoders[1].fault(Fault::ResetMidBody { after_events: 2 }, 1);
    night.ask(1, None);
    night.expect_warning(&["role=\"decode\"", "rank=1", "kind=\"cut\""]);
    let line = night.line();
    assert_eq!((&line["rank"], &line["stream"]), (&1.into(), &true.into()));
    assert_eq!(
        (&line["error"], &line["end"]),
        (&"decode_truncated".into(), &"US".into())
    );

    // Both recover: lines, but no warnings.
    night.ask(1, None);
    night.ask(0, Some(&prefiller));
    for _ in 0..2 {
        assert_eq!(night.line()["error"], Value::Null);
    }
    let serves_again = |role: &str| format!("an engine serves again role=\"{role}\"");
    night.sidecar.wait_stderr(&serves_again("decode"));
    night.sidecar.wait_stderr(&serves_again("prefill"));
    night.expect_no_warning();

    // The certificate is renewed, and the process reads its files again.
    write_as_a_secret(
        &night.folder,
        1,
        &Authority::new("morning").sign(&["localhost"]),
    );
    night.sidecar.wait_stderr("certificate reloaded");
    kill_process(night.sidecar.pid(), Signal::HUP).unwrap();
    night.sidecar.wait_stderr("configuration reloaded");
    night.expect_no_warning();

    // A client does not read, and its decoder never ends.
    night.decoders[0].fault(Fault::StallMidStream { after_events: 1 }, 1);
    let (_, body) = ask_for(8, true);
    let mut stuck = night.sidecar.connect();
    stuck.send(request("POST", CHAT, &[], body.as_bytes()));
    assert_eq!(stuck.head().status, 200);
    night.sidecar.terminate();
    assert_eq!(night.sidecar.wait_exit().code(), Some(0));
    night.expect_warning(&["drain incomplete", "open requests were cut"]);
    assert_ne!(stuck.body(Framing::Chunked).1, End::Complete);
    let mut text = night.sidecar.wait_stderr("ended: cut");
    if !cfg!(feature = "monoio") {
        // monoio drops its tasks only after the end of the shard has been reported.
        let line = night.line();
        assert_eq!(
            (&line["error"], &line["end"]),
            (&"drained".into(), &"RS".into()),
            "{line}"
        );
        text = night.sidecar.wait_stderr("ended: cut requests=9 failed=");
        assert!(text.contains(": 1 open requests were cut"), "{text}");
    }
    assert!(
        text.contains("log file /dev/full"),
        "the full disk is not reported: {text}"
    );
}

/// The reader of the log goes away, and the disk of the access log is full.
#[test]
fn logs_without_reader_and_disk_stop_nothing() {
    let folder = Folder::new();
    let rules = folder.write("rules", "127.0.0.1\n");
    let decoder = Engine::start(EngineConfig::decode(), 0).unwrap();
    let flags = [
        "--access-log=/dev/full".to_owned(),
        "--enable-ssrf-protection".to_owned(),
        format!("--allow-targets-file={rules}"),
    ];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let mut sidecar = Sidecar::start(&flags, decoder.port());
    let ask = |sidecar: &Sidecar| {
        let (_, body) = ask_for(4, false);
        sidecar.post(CHAT, &body, &[]).expect(200);
    };
    ask(&sidecar);
    sidecar.wait_stderr("access log write failed");
    sidecar.close_stderr();
    // Each of these writes to the log.
    let dead = format!("127.0.0.1:{}", free_ports(1));
    let (_, body) = ask_for(4, false);
    sidecar
        .post(CHAT, &body, &[(PREFILLER, dead.as_str())])
        .expect(502);
    kill_process(sidecar.pid(), Signal::HUP).unwrap();
    // The file is still followed.
    let mut file = std::fs::File::create(&rules).unwrap();
    writeln!(file, "10.0.0.1").unwrap();
    drop(file);
    wait_for("the new rules", || {
        let response = sidecar.post(CHAT, &body, &[(PREFILLER, dead.as_str())]);
        (response.status == 403).then_some(())
    });
    let up = sidecar.metric("ringside_allowlist_source_up", &[("source", "file")]);
    assert!((up - 1.0).abs() < 1e-9, "{up}");
    ask(&sidecar);
    sidecar.expect_sound();
    sidecar.terminate();
    let status = wait_for("the process to exit", || sidecar.try_exit());
    assert_eq!(status.code(), Some(0));
}
