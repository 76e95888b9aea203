//! The log has one line about each kind of failure of an engine, which names the engine, and one
//! when the engine serves again.

use mock_engine::Fault;

use crate::client::Client;
use crate::harness::{CHAT, PREFILLER, Pair, Sidecar, free_ports, wait_for};
use crate::harness_more::{ask_for, expect_healthy};

/// Returns the warnings that the sidecar has logged since it was ready.
fn warnings(sidecar: &Sidecar) -> Vec<String> {
    let text = sidecar.stderr();
    let (_, after) = text.split_once(" is ready").unwrap();
    let is_warning = |line: &&str| line.contains(" WARN ");
    after
        .lines()
        .filter(is_warning)
        .map(str::to_owned)
        .collect()
}

/// Fails unless the only warning is about a failure of this kind, in this role.
#[track_caller]
fn expect_one_failure(sidecar: &Sidecar, role: &str, endpoint: &str, kind: &str) {
    sidecar.wait_stderr("an engine has failed");
    let warnings = warnings(sidecar);
    let [line] = &warnings[..] else {
        panic!("{warnings:#?}");
    };
    let fields = [
        format!("role=\"{role}\""),
        format!("endpoint={endpoint}"),
        format!("kind=\"{kind}\""),
        "legs=1".to_owned(),
    ];
    for field in fields {
        assert!(line.contains(&field), "{field} is not in {line}");
    }
}

fn status(code: u16) -> Fault {
    Fault::Status {
        code,
        body: String::new(),
        content_type: String::new(),
    }
}

/// Sends a split request, streamed, and reads until the connection ends.
fn split(pair: &Pair, prefiller: &str) {
    let (_, body) = ask_for(8, true);
    let mut client: Client = pair.sidecar.connect();
    let headers = [(PREFILLER, prefiller), ("connection", "close")];
    client.send(crate::client::request(
        "POST",
        CHAT,
        &headers,
        body.as_bytes(),
    ));
    let _ = client.rest();
}

const QUICK: &[&str] = &["--prefill-timeout=300ms", "--first-byte-timeout=300ms"];

#[test]
fn a_failure_of_a_prefiller_has_one_line() {
    let cases = [
        (status(503), "status"),
        (Fault::StallBeforeHead, "late"),
        (Fault::CloseBeforeHead, "closed"),
        (Fault::ResetBeforeHead, "closed"),
        (Fault::Garbage, "bad_response"),
        (Fault::TruncateMidBody { after_events: 1 }, "bad_response"),
    ];
    for (fault, kind) in cases {
        let pair = Pair::start(QUICK);
        let target = pair.prefill.host_port();
        pair.prefill.fault(fault, 3);
        for _ in 0..3 {
            split(&pair, &target);
        }
        expect_one_failure(&pair.sidecar, "prefill", &target, kind);
        expect_healthy(&pair);
        let text = pair.sidecar.wait_stderr("an engine serves again");
        let line = text.lines().find(|line| line.contains("serves again"));
        let line = line.unwrap();
        assert!(line.contains("INFO") && line.contains("legs=3"), "{line}");
        expect_one_failure(&pair.sidecar, "prefill", &target, kind);
    }
}

#[test]
fn a_prefiller_without_listener_or_address_has_one_line() {
    let pair = Pair::start(&[]);
    let refused = format!("127.0.0.1:{}", free_ports(1));
    split(&pair, &refused);
    split(&pair, &refused);
    expect_one_failure(&pair.sidecar, "prefill", &refused, "refused");
    let pair = Pair::start(&[]);
    let unknown = "no-such-engine.invalid:8000";
    split(&pair, unknown);
    expect_one_failure(&pair.sidecar, "prefill", unknown, "unresolved");
}

#[test]
fn a_failure_of_a_decoder_has_one_line() {
    let cases = [
        (status(500), "status"),
        (Fault::StallBeforeHead, "late"),
        (Fault::Garbage, "bad_response"),
        (Fault::ResetMidBody { after_events: 2 }, "cut"),
        (Fault::TruncateMidBody { after_events: 2 }, "cut"),
    ];
    for is_split in [false, true] {
        for (fault, kind) in cases.clone() {
            let pair = Pair::start(&["--first-byte-timeout=300ms", "--on-decode-kv-error=error"]);
            pair.decode.fault(fault, 2);
            let target = pair.prefill.host_port();
            for _ in 0..2 {
                let (_, body) = ask_for(8, true);
                let mut client = pair.sidecar.connect();
                let headers = [("connection", "close"), (PREFILLER, target.as_str())];
                let headers = &headers[..1 + usize::from(is_split)];
                client.send(crate::client::request(
                    "POST",
                    CHAT,
                    headers,
                    body.as_bytes(),
                ));
                let _ = client.rest();
            }
            let endpoint = wait_for("the decoder's line", || {
                let lines = warnings(&pair.sidecar);
                let line = lines.iter().find(|line| line.contains("has failed"))?;
                let (_, rest) = line.split_once("endpoint=")?;
                Some(rest.split(' ').next()?.to_owned())
            });
            expect_one_failure(&pair.sidecar, "decode", &endpoint, kind);
            expect_healthy(&pair);
            pair.sidecar.wait_stderr("an engine serves again");
        }
    }
}

/// An engine may close an idle connection at any time.
#[test]
fn a_pooled_connection_that_was_closed_is_no_failure() {
    let pair = Pair::start(&[]);
    expect_healthy(&pair);
    pair.prefill.fault(Fault::ResetBeforeHead, 1);
    pair.decode.fault(Fault::CloseBeforeHead, 1);
    expect_healthy(&pair);
    assert_eq!(warnings(&pair.sidecar), [""; 0]);
}

#[test]
fn a_denied_target_has_one_line() {
    let pair = Pair::start(&["--enable-ssrf-protection=true", "--allow-target=10.0.0.0/8"]);
    for _ in 0..3 {
        let (_, body) = ask_for(4, false);
        pair.post(CHAT, &body).expect(403);
    }
    let target = pair.prefill.host_port();
    let line = format!("a request to {target} is refused: the allowlist does not permit it");
    pair.sidecar.wait_stderr(&line);
    assert_eq!(warnings(&pair.sidecar).len(), 1);
}

#[test]
fn kv_cache_that_is_left_to_its_lease_has_one_line() {
    let pair = Pair::start(&["--handoff-max-age=1ms"]);
    // The age is measured from the response head, and the body takes longer.
    let fault = Fault::Slow {
        chunk_bytes: 500,
        delay: std::time::Duration::from_millis(4),
    };
    pair.prefill.fault(fault, 1);
    let (_, body) = ask_for(4, false);
    pair.post(CHAT, &body).expect(200);
    let target = pair.prefill.host_port();
    let text = format!("prefiller {target} keeps the KV cache of a prefill until its lease");
    pair.sidecar.wait_stderr(&text);
}
