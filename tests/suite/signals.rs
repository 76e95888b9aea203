//! SIGHUP reads files again and opens logs again. SIGUSR1 and SIGUSR2 have no effect.

use std::fs;

use mock_engine::{Engine, EngineConfig};
use rustix::process::{Signal, kill_process};

use crate::certificates::Folder;
use crate::harness::{CHAT, Sidecar, start_decoder, wait_for};
use crate::harness_more::ask_for;

const SUCCESSFUL: &str = "ringside_config_last_reload_successful";

fn serve_one(sidecar: &Sidecar) {
    let (_, body) = ask_for(4, false);
    sidecar.post(CHAT, &body, &[]).expect(200);
}

#[test]
fn logs_are_opened_again() {
    let (_engine, decoder) = start_decoder(EngineConfig::default());
    let folder = Folder::new();
    let path = |name: &str| folder.path().join(name);
    let log = format!("--log-file={}", path("log").display());
    let access = format!("--access-log={}", path("access").display());
    let sidecar = Sidecar::start(&[&decoder, &log, &access], 0);
    serve_one(&sidecar);
    let read = |name: &str| fs::read_to_string(path(name)).unwrap_or_default();
    wait_for("the access log", || {
        (!read("access").is_empty()).then_some(())
    });
    for name in ["log", "access"] {
        fs::rename(path(name), path(&format!("{name}.old"))).unwrap();
    }
    for signal in [Signal::USR1, Signal::USR2, Signal::HUP] {
        kill_process(sidecar.pid(), signal).unwrap();
    }
    sidecar.wait_stderr("configuration reloaded");
    wait_for("the log to be opened again", || {
        read("log").contains("configuration reloaded").then_some(())
    });
    serve_one(&sidecar);
    wait_for("the access log to be opened again", || {
        (read("access").lines().count() == 1).then_some(())
    });
    assert_eq!(read("access.old").lines().count(), 1);
    assert!(!read("log.old").contains("configuration reloaded"));
    sidecar.expect_sound();
}

#[test]
fn the_level_of_the_log_follows_the_file_and_a_bad_file_changes_nothing() {
    let engine = Engine::start(EngineConfig::default(), 0).unwrap();
    let folder = Folder::new();
    let file = folder.path().join("ringside.yaml");
    let write = |text: &str| fs::write(&file, text).unwrap();
    let flag = format!("--configuration-file={}", file.display());
    write("log-level: info\n");
    let sidecar = Sidecar::start(&[&flag], engine.port());
    let reload = || kill_process(sidecar.pid(), Signal::HUP).unwrap();
    assert_eq!(sidecar.metric(SUCCESSFUL, &[]), 1.0);
    write("log-level: sometimes\n");
    reload();
    // The message has two lines.
    let text = sidecar.wait_stderr("log-level: `sometimes` is not valid");
    assert!(text.contains("configuration not reloaded"), "{text}");
    sidecar.wait_metric(SUCCESSFUL, &[], 0.0);
    write("log-level: warn\ndrain-timeout: 7s\n");
    reload();
    sidecar.wait_stderr("drain: changed, effective after a restart: settle 0s, timeout 7s");
    sidecar.wait_metric(SUCCESSFUL, &[], 1.0);
    // Not logged at the new level.
    assert!(!sidecar.stderr().contains("configuration reloaded"));
    write("log-level: info\n");
    reload();
    sidecar.wait_stderr("configuration reloaded");
    serve_one(&sidecar);
    sidecar.expect_sound();
}

#[test]
fn the_allowlist_file_is_read_again() {
    let (_engine, decoder) = start_decoder(EngineConfig::default());
    let folder = Folder::new();
    let file = folder.write("rules", "10.0.0.1\n");
    let flag = format!("--allow-targets-file={file}");
    let sidecar = Sidecar::start(&[&decoder, "--enable-ssrf-protection", &flag], 0);
    fs::write(&file, "10.0.0.1\n10.0.0.2\n").unwrap();
    kill_process(sidecar.pid(), Signal::HUP).unwrap();
    sidecar.wait_stderr("reloaded: 2 rules");
}
