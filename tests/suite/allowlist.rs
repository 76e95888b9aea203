//! Targets that a request may name: conformance rows A1, A3 and E1 to E3, and the allowlist sources
//! without Kubernetes. The module `pool` tests the Kubernetes source.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mock_engine::{Engine, EngineConfig};

use crate::client::{Response, request};
use crate::harness::{
    CHAT, PREFILLER, Pair, Sidecar, free_ports, json_of, only, run_to_exit, start_decoder,
};
use crate::harness_more::{ask_for, expect_handoffs_sound, expect_text};

pub(crate) const ON: &str = "--enable-ssrf-protection";
pub(crate) const DENIED: &str = "ringside_targets_denied_total";
pub(crate) const BODY: &str =
    r#"{"model":"mock-model","messages":[{"role":"user","content":"hi"}]}"#;

/// A temporary folder, removed when dropped.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let nth = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ringside-suite-{}-folder-{nth}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Writes a file and returns its path.
    pub(crate) fn write(&self, name: &str, text: &str) -> String {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Sends a chat completion request that names `target` as the prefiller, and returns the status of
/// the response.
pub(crate) fn status(sidecar: &Sidecar, target: &str) -> u16 {
    sidecar.post(CHAT, BODY, &[(PREFILLER, target)]).status
}

#[test]
fn a1_without_protection_everything_is_allowed() {
    let pair = Pair::start(&[]);
    let port = pair.prefill.port();
    for host in ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "127.0.0.2"] {
        let target = format!("{host}:{port}");
        let response = pair.sidecar.post(CHAT, BODY, &[(PREFILLER, &target)]);
        assert_ne!(response.status, 403, "{host}");
    }
    let page = pair.sidecar.admin("/metrics").unwrap().text();
    assert!(!page.contains("ringside_allowlist"), "{page}");
    assert_eq!(pair.sidecar.metric(DENIED, &[]), 0.0);
}

#[test]
fn a3_only_listed_hosts_are_allowed_on_any_port() {
    // Every engine of the pair is on 127.0.0.1.
    let pair = Pair::start(&[ON, "--allow-target=127.0.0.1,localhost"]);
    let port = pair.prefill.port();
    for target in [
        format!("127.0.0.1:{port}"),
        format!("http://127.0.0.1:{port}"),
        format!("[::ffff:127.0.0.1]:{port}"),
        format!("[0:0:0:0:0:FFFF:7f00:1]:{port}"),
        format!("localhost:{port}"),
        format!("LocalHost:{port}"),
    ] {
        assert_eq!(status(&pair.sidecar, &target), 200, "{target}");
    }
    // Listed hosts are allowed on any port. Nothing listens on this one, so the connection attempt
    // fails.
    assert_eq!(status(&pair.sidecar, "127.0.0.1:1"), 502);
    assert_eq!(pair.sidecar.metric(DENIED, &[]), 0.0);
    let denied = [
        format!("127.0.0.2:{port}"),
        format!("[::1]:{port}"),
        format!("[::127.0.0.1]:{port}"),
        format!("localhost.:{port}"),
        format!("127.0.0.1.nip.example:{port}"),
        "169.254.169.254".to_owned(),
    ];
    for target in &denied {
        let response = pair.sidecar.post(CHAT, BODY, &[(PREFILLER, target)]);
        response.expect_error(403, "target_denied");
    }
    #[expect(clippy::cast_precision_loss, reason = "a handful")]
    let count = denied.len() as f64;
    pair.sidecar
        .wait_metric(DENIED, &[("named", "prefill")], count);
    let labels = [("outcome", "failed"), ("reason", "target_denied")];
    pair.sidecar
        .wait_metric("ringside_pd_requests_total", &labels, count);
    assert_eq!(pair.decode.requests().len(), 6);
    // A value that is not a valid target is rejected before the allowlist is checked.
    let odd = pair.sidecar.post(CHAT, BODY, &[(PREFILLER, "127.1:80")]);
    odd.expect_error(502, "bad_target");
    // The allowlist does not apply to requests without a target or to other paths.
    pair.sidecar.post(CHAT, BODY, &[]).expect(200);
    let other = [(PREFILLER, "169.254.169.254")];
    pair.sidecar.get("/v1/models", &other).expect(200);
    pair.sidecar.expect_sound();
}

#[test]
fn a_denied_request_gets_its_response_before_its_body() {
    let pair = Pair::start(&[ON, "--allow-target=10.0.0.0/8"]);
    let mut client = pair.sidecar.connect();
    client.send(format!(
        "POST {CHAT} HTTP/1.1\r\nhost: x\r\n{PREFILLER}: 192.168.0.1:80\r\n\
         expect: 100-continue\r\ncontent-length: 100000\r\n\r\n"
    ));
    assert_eq!(client.head().status, 403);
    assert!(pair.decode.requests().is_empty());
}

#[test]
fn rules_may_contain_prefixes_and_ports() {
    let prefill = Engine::start(EngineConfig::prefill(), 0).unwrap();
    let port = prefill.port();
    let rule = format!("--allow-target=127.0.0.0/8:{port}");
    let (_decode, decoder) = start_decoder(EngineConfig::decode());
    let sidecar = Sidecar::start(&[ON, &rule, &decoder], 0);
    assert_eq!(status(&sidecar, &prefill.host_port()), 200);
    assert_eq!(status(&sidecar, &format!("127.0.0.1:{}", port ^ 1)), 403);
    // The sidecar's port is denied although it accepts connections.
    let own = format!("127.0.0.1:{}", sidecar.port);
    assert_eq!(status(&sidecar, &own), 403);
}

#[test]
fn a_denied_first_candidate_is_403_and_later_denied_ones_are_dropped() {
    let pair = Pair::start(&[ON, "--allow-target=127.0.0.1"]);
    let denied = Engine::start(EngineConfig::prefill(), 0).unwrap();
    let good = pair.prefill.host_port();
    let bad = format!("localhost:{}", denied.port());
    assert_eq!(status(&pair.sidecar, &format!("{bad},{good}")), 403);
    assert_eq!(status(&pair.sidecar, &format!("{good},{bad}")), 200);
    let labels = [("named", "prefill")];
    pair.sidecar.wait_metric(DENIED, &labels, 2.0);
    // Nothing listens at the first candidate, and the second one is denied and must not be tried.
    assert_eq!(status(&pair.sidecar, &format!("127.0.0.1:1,{bad}")), 502);
    assert_eq!(
        status(&pair.sidecar, &format!("127.0.0.1:1,{bad},{good}")),
        200
    );
    assert!(denied.requests().is_empty());
}

#[test]
fn e1_e2_e3_only_allowed_encoders_receive_requests() {
    let body = r#"{"model":"mock-model","messages":[{"role":"user","content":[
        {"type":"image_url","image_url":{"url":"http://img/1"}},
        {"type":"image_url","image_url":{"url":"http://img/2"}}]}]}"#;
    let pair = Pair::start(&[ON, "--allow-target=127.0.0.1", "--ec-connector=ec-example"]);
    let encoders = [0; 2].map(|_| Engine::start(EngineConfig::default(), 0).unwrap());
    let allowed = encoders.each_ref().map(Engine::host_port);
    let denied = encoders
        .each_ref()
        .map(|engine| format!("localhost:{}", engine.port()));
    let prefiller = pair.prefill.host_port();
    let mut denials = 0.0;
    for (list, asked) in [
        (format!("{},{}", allowed[0], allowed[1]), [1, 1]),
        (format!("{},{}", denied[0], allowed[1]), [0, 2]),
        (format!("{},{}", denied[0], denied[1]), [0, 0]),
    ] {
        for is_split in [false, true] {
            let mut headers = vec![("x-encoder-hosts-ports", list.as_str())];
            if is_split {
                headers.push((PREFILLER, prefiller.as_str()));
            }
            pair.sidecar.post(CHAT, body, &headers).expect(200);
            let counts = encoders.each_ref().map(|engine| engine.requests().len());
            assert_eq!(counts, asked, "{list}");
            let legs = [&pair.prefill, &pair.decode].map(|engine| engine.requests().len());
            assert_eq!(legs, [usize::from(is_split), 1], "{list}");
            for engine in encoders.iter().chain([&pair.prefill, &pair.decode]) {
                engine.clear();
            }
            denials += if list.starts_with("127") { 0.0 } else { 1.0 };
            denials += if list.ends_with(&denied[1]) { 1.0 } else { 0.0 };
        }
    }
    let named = |name| [("named", name)];
    pair.sidecar.wait_metric(DENIED, &named("encode"), denials);
    assert_eq!(pair.sidecar.metric(DENIED, &named("prefill")), 0.0);
    pair.sidecar.expect_sound();
}

#[test]
fn a_denied_cache_source_is_omitted() {
    let pair = Pair::start(&[ON, "--allow-target=127.0.0.1", "--enable-p2p-pull"]);
    let prefiller = pair.prefill.host_port();
    for (source, is_taken) in [("127.0.0.1:9", true), ("127.0.0.2:9", false)] {
        let headers = [
            (PREFILLER, prefiller.as_str()),
            ("x-kv-cache-source-host-port", source),
        ];
        pair.sidecar.post(CHAT, BODY, &headers).expect(200);
        let seen = only(&pair.prefill);
        let params = &json_of(&seen)["kv_transfer_params"];
        assert_eq!(
            params.get("remote_kv_source").is_some(),
            is_taken,
            "{params}"
        );
        pair.prefill.clear();
    }
    let labels = [("named", "cache_source")];
    pair.sidecar.wait_metric(DENIED, &labels, 1.0);
}

#[test]
fn changes_of_the_rules_file_apply_unless_it_is_invalid() {
    let folder = Folder::new();
    let file = folder.write("rules", "# nobody yet\n192.168.0.0/16\n");
    let flag = format!("--allow-targets-file={file}");
    let pair = Pair::start(&[ON, &flag]);
    let target = pair.prefill.host_port();
    let entries = |count: f64| {
        pair.sidecar
            .wait_metric("ringside_allowlist_entries", &[], count);
    };
    let source = [("source", "file")];
    let page = pair.sidecar.admin("/readyz?verbose").unwrap().text();
    assert!(page.contains("[+]allowlist: 1 entries\n"), "{page}");
    assert_eq!(status(&pair.sidecar, &target), 403);

    folder.write("rules", "192.168.0.0/16\n127.0.0.1 # this host\n");
    entries(2.0);
    assert_eq!(status(&pair.sidecar, &target), 200);

    // An invalid file leaves the rules unchanged and is reported once.
    folder.write("rules", "127.0.0.2\nnot a rule\n[::1\n");
    let failures = "ringside_allowlist_source_failures_total";
    pair.sidecar.wait_metric(failures, &source, 1.0);
    pair.sidecar
        .wait_metric("ringside_allowlist_source_up", &source, 0.0);
    pair.sidecar
        .wait_stderr("line 2: `not a rule`: neither a name nor an address");
    pair.sidecar
        .wait_stderr("line 3: `[::1`: neither a name nor an address");
    assert_eq!(status(&pair.sidecar, &target), 200);
    fs::remove_file(&file).unwrap();
    pair.sidecar.wait_metric(failures, &source, 2.0);
    assert_eq!(status(&pair.sidecar, &target), 200);

    // Replaced by a rename, as editors do.
    let new = folder.write("new", "192.168.0.0/16\n10.0.0.0/8\nsome-host:80\n");
    fs::rename(new, &file).unwrap();
    entries(3.0);
    assert_eq!(status(&pair.sidecar, &target), 403);
    pair.sidecar
        .wait_metric("ringside_allowlist_source_up", &source, 1.0);
    pair.sidecar.expect_sound();
}

#[test]
fn a_config_map_symlink_is_followed() {
    let folder = Folder::new();
    let at = |name: &str| folder.0.join(name);
    for (version, rules) in [("..1", "10.0.0.1"), ("..2", "127.0.0.1")] {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("rules"), rules).unwrap();
    }
    symlink("..1", at("..data")).unwrap();
    symlink("..data/rules", at("rules")).unwrap();
    let flag = format!("--allow-targets-file={}", at("rules").display());
    let pair = Pair::start(&[ON, &flag]);
    let target = pair.prefill.host_port();
    assert_eq!(status(&pair.sidecar, &target), 403);
    symlink("..2", at("..data_tmp")).unwrap();
    fs::rename(at("..data_tmp"), at("..data")).unwrap();
    pair.sidecar.wait_stderr("reloaded: 1 rules");
    assert_eq!(status(&pair.sidecar, &target), 200);
}

#[test]
fn an_invalid_rules_file_at_startup_is_a_configuration_error() {
    let folder = Folder::new();
    let file = folder.write("rules", "a\nb c\n\n10.0.0.1/8\n");
    let missing = folder.0.join("missing").display().to_string();
    for (file, wants) in [
        (
            &file,
            &[
                "has 2 invalid lines",
                "line 2: `b c`:",
                "line 4: `10.0.0.1/8`:",
            ][..],
        ),
        (&missing, &["cannot be read: No such file"][..]),
    ] {
        let flag = format!("--allow-targets-file={file}");
        let port = free_ports(1);
        let (code, text) = run_to_exit(&[
            "sidecar",
            "--secure-proxy=false",
            "--admin-address=off",
            &format!("--port={port}"),
            ON,
            &flag,
        ]);
        assert_eq!(code, 3, "{text}");
        for want in wants {
            assert!(text.contains(want), "{want} is not in {text}");
        }
    }
}

#[cfg(not(feature = "k8s"))]
#[test]
fn an_inference_pool_needs_the_feature_k8s() {
    let port = free_ports(1);
    let port = format!("--port={port}");
    let start = [
        "sidecar",
        "--secure-proxy=false",
        "--admin-address=off",
        &port,
    ];
    let (code, text) = run_to_exit(&[&start[..], &[ON, "--inference-pool=prod/pool"]].concat());
    assert_eq!(code, 3, "{text}");
    assert!(
        text.contains("--inference-pool: this build cannot"),
        "{text}"
    );
    assert!(text.contains("the feature `k8s`"), "{text}");
}

/// Runs streams and calls `change` repeatedly until all of them have ended. `change` receives the
/// number of previous calls and returns once its change has taken effect. Every stream must be
/// complete.
pub(crate) fn expect_streams_whole(pair: &Pair, mut change: impl FnMut(usize)) {
    const STREAMS: usize = 20;
    const TOKENS: u32 = 100;
    let target = pair.prefill.host_port();
    let running: Vec<_> = (0..STREAMS)
        .map(|_| {
            let (prompt, body) = ask_for(TOKENS, true);
            let mut client = pair.sidecar.connect();
            let headers = [(PREFILLER, target.as_str())];
            client.send(request("POST", CHAT, &headers, body.as_bytes()));
            let head = client.head();
            assert_eq!(head.status, 200);
            std::thread::spawn(move || {
                let framing = head.framing("POST");
                let (body, end) = client.body(framing);
                let response = Response {
                    head,
                    framing,
                    body,
                    end,
                };
                expect_text(&response.expect(200), &prompt, TOKENS);
            })
        })
        .collect();
    let mut changes = 0;
    while running.iter().any(|stream| !stream.is_finished()) {
        change(changes);
        changes += 1;
        if changes == 1 {
            let in_flight = pair.sidecar.metric("ringside_in_flight", &[]);
            assert!(
                in_flight >= 20.0,
                "the streams ended before the first change"
            );
        }
    }
    for stream in running {
        stream.join().unwrap();
    }
    eprintln!("{STREAMS} streams of {TOKENS} tokens were complete despite {changes} changes");
}

/// Starts a pair whose decode engine waits 40 ms between tokens, so that a stream of 100 tokens
/// lasts several seconds.
pub(crate) fn slow_pair(args: &[&str]) -> Pair {
    let slow = |config: &mut EngineConfig| config.itl = Duration::from_millis(40);
    Pair::with(args, |_| {}, slow)
}

#[test]
fn running_streams_survive_changes_of_the_allowlist() {
    let folder = Folder::new();
    let file = folder.write("rules", "127.0.0.1\n");
    let flag = format!("--allow-targets-file={file}");
    let pair = slow_pair(&[ON, &flag]);
    let target = pair.prefill.host_port();
    expect_streams_whole(&pair, |changes| {
        // The prefiller of all streams is removed and added again, in an ever longer list.
        let is_listed = changes % 2 == 1;
        let mut rules: String = (0..2 * changes).map(|i| format!("10.0.0.{i}\n")).collect();
        if is_listed {
            rules += "127.0.0.1\n";
        }
        folder.write("rules", &rules);
        let entries = 2 * changes + usize::from(is_listed);
        #[expect(clippy::cast_precision_loss, reason = "a handful")]
        pair.sidecar
            .wait_metric("ringside_allowlist_entries", &[], entries as f64);
        let want = if is_listed { 200 } else { 403 };
        assert_eq!(status(&pair.sidecar, &target), want);
    });
    expect_handoffs_sound(&pair);
    pair.sidecar.expect_sound();
}
