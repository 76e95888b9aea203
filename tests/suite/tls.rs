//! TLS towards clients and engines: handshakes, certificates and their replacement, and connections
//! that must or must not be closed.
//!
//! With `RINGSIDE_SUITE_TLS`, all other tests also run over TLS.

use std::os::unix::fs::symlink;
use std::time::Duration;

use mock_engine::{Engine, EngineConfig, Fault, HandoffRegistry, Tls};

use crate::certificates::{Authority, Folder, Identity, Offer, engine_tls};
use crate::client::{Client, DEADLINE, Framing, request};
use crate::harness::{CHAT, Launch, PREFILLER, Pair, Sidecar, connections, run_to_exit, wait_for};
use crate::harness_more::{
    ask_for, expect_drained, expect_handoffs_sound, expect_healthy, expect_text, split_request,
};

const HANDSHAKES: &str = "ringside_tls_handshakes_total";
const RELOADS: &str = "ringside_tls_certificate_reloads_total";
const STREAMS: u32 = 20;

/// Starts a sidecar that uses TLS towards clients, in front of a decoder with plain HTTP.
fn listener(args: &[&str]) -> (Engine, Sidecar) {
    let decode = Engine::start(EngineConfig::decode(), 0).unwrap();
    let sidecar = Sidecar::launch(&Launch {
        args,
        decoder_port: decode.port(),
        tls: true,
        ..Launch::default()
    });
    (decode, sidecar)
}

/// Starts a pair whose engines have these TLS configurations, if any. `tls` enables TLS towards
/// clients.
fn engines(prefill: Option<Tls>, decode: Option<Tls>, args: &[&str], tls: bool) -> Pair {
    let handoffs = HandoffRegistry::new();
    let checked = |config, tls| EngineConfig {
        verify_handoff: Some(handoffs.clone()),
        tls,
        ..config
    };
    let prefill = Engine::start(checked(EngineConfig::prefill(), prefill), 0).unwrap();
    let decode = Engine::start(checked(EngineConfig::decode(), decode), 0).unwrap();
    let sidecar = Sidecar::launch(&Launch {
        args,
        decoder_port: decode.port(),
        tls,
        ..Launch::default()
    });
    Pair {
        prefill,
        decode,
        sidecar,
        handoffs,
    }
}

fn tls_of(identity: &Identity) -> Tls {
    Tls::new(identity.chain.as_bytes(), identity.key.as_bytes()).unwrap()
}

/// Returns the flags with which the sidecar uses TLS to both engines and trusts certificates that
/// the engines' test authority has signed.
fn trusting(folder: &Folder) -> Vec<String> {
    let file = folder.write("ca.crt", &Authority::of_engines().pem());
    vec![
        "--enable-tls=prefiller,decoder".to_owned(),
        format!("--tls-ca-file={file}"),
    ]
}

fn flags(flags: &[String]) -> Vec<&str> {
    flags.iter().map(String::as_str).collect()
}

#[test]
fn r1_get_requests_are_sent_to_the_decoder_over_tls() {
    let (decode, sidecar) = listener(&[]);
    let paths = [
        CHAT,
        "/v1/completions",
        "/v1/messages",
        "/v1/embeddings",
        "/score",
        "/healthz",
    ];
    for versions in [&[&rustls::version::TLS12], &[&rustls::version::TLS13]] {
        let offer = Offer {
            versions,
            ..Offer::default()
        };
        let mut client = sidecar.connect_offering(&offer);
        for path in paths {
            let response = client.ask("GET", path, &[], b"").expect(200);
            assert_eq!(response.json()["path"], path);
        }
    }
    assert_eq!(decode.requests().len(), 2 * paths.len());
    let ok = [("peer", "client"), ("outcome", "ok")];
    sidecar.wait_metric(HANDSHAKES, &ok, 2.0);
    sidecar.expect_sound();
}

#[test]
fn the_self_signed_certificate_is_valid_for_every_name_of_the_host() {
    let decode = Engine::start(EngineConfig::decode(), 0).unwrap();
    let sidecar = Sidecar::launch(&Launch {
        env: &[("POD_IP", "192.0.2.7")],
        decoder_port: decode.port(),
        tls: true,
        ..Launch::default()
    });
    let mut first = sidecar.connect_offering(&Offer::default());
    first.shake_hands().unwrap();
    let host = rustix::system::uname()
        .nodename()
        .to_str()
        .unwrap()
        .to_owned();
    for name in ["localhost", "127.0.0.1", "::1", "192.0.2.7", &host] {
        let offer = Offer {
            name,
            root: Some(first.certificate()),
            ..Offer::default()
        };
        let mut client = sidecar.connect_offering(&offer);
        client
            .shake_hands()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        client.ask("GET", "/health", &[], b"").expect(200);
    }
    let stranger = Offer {
        name: "example.com",
        root: Some(first.certificate()),
        ..Offer::default()
    };
    assert!(sidecar.connect_offering(&stranger).shake_hands().is_err());
}

#[test]
fn n1_prefill_and_decode_with_tls_on_both_hops() {
    let folder = Folder::new();
    let args = trusting(&folder);
    let pair = engines(Some(engine_tls()), Some(engine_tls()), &flags(&args), true);
    let mut client = pair.sidecar.connect();
    for (nth, stream) in [(1, true), (2, false), (3, true)] {
        let (prompt, body) = ask_for(40, stream);
        client.send(split_request(&pair, &body));
        let response = client.response().expect(200);
        expect_text(&response, &prompt, 40);
        assert_eq!(pair.decode.requests().len(), nth);
    }
    // TLS messages that concern only the session do not close an idle connection.
    assert_eq!(connections(&pair.prefill), 1);
    assert_eq!(connections(&pair.decode), 1);
    wait_for("a readiness check of the decoder", || {
        let page = pair.sidecar.admin("/readyz?verbose")?.text();
        page.contains(": ready").then_some(())
    });
    expect_handoffs_sound(&pair);
    drop(client);
    expect_drained(&pair.sidecar);
    pair.sidecar.expect_sound();
}

#[test]
fn sessions_with_engines_are_resumed() {
    let folder = Folder::new();
    let args = trusting(&folder);
    let pair = engines(Some(engine_tls()), Some(engine_tls()), &flags(&args), false);
    for _ in 0..3 {
        let (prompt, body) = ask_for(4, false);
        let response = pair.post(CHAT, &body).expect(200);
        expect_text(&response, &prompt, 4);
        // The next request needs a new connection.
        pair.decode.fault(Fault::CloseIdle, 1);
    }
    pair.sidecar.expect_sound();
}

#[test]
fn plain_http_on_the_tls_port_gets_a_plain_text_response() {
    let (decode, sidecar) = listener(&[]);
    let mut client = Client::connect(sidecar.port);
    client.send(request("GET", "/health", &[], b""));
    let response = client.response().expect_error(400, "plain_text");
    assert!(response.text().contains("use https"), "{}", response.text());
    assert_eq!(response.header("connection"), Some("close"));
    client.expect_closed();
    // This also applies to a large request, the rest of which is not read.
    let mut client = Client::connect(sidecar.port);
    let body = vec![b'x'; 300_000];
    client.try_send(request("POST", CHAT, &[], &body));
    client.response().expect_error(400, "plain_text");
    assert!(decode.requests().is_empty());
    sidecar.wait_metric(HANDSHAKES, &[("outcome", "plain_text")], 2.0);
    sidecar.wait_stderr("plain HTTP was sent to the TLS port");
    sidecar.expect_sound();
}

#[test]
fn a_client_that_offers_only_h2_is_refused_by_alert() {
    let (_decode, sidecar) = listener(&[]);
    let offering = |alpn| Offer {
        alpn,
        ..Offer::default()
    };
    let error = sidecar
        .connect_offering(&offering(&["h2"]))
        .shake_hands()
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("NoApplicationProtocol"), "{text}");
    sidecar.wait_stderr("the client does not offer http/1.1 (ALPN)");
    sidecar.wait_metric(HANDSHAKES, &[("outcome", "protocol")], 1.0);
    for alpn in [&["h2", "http/1.1"][..], &["http/1.1"], &[]] {
        let mut client = sidecar.connect_offering(&offering(alpn));
        client.ask("GET", "/health", &[], b"").expect(200);
    }
}

#[test]
fn tls_1_1_is_refused_by_alert() {
    let (_decode, sidecar) = listener(&[]);
    let mut hello = vec![3, 2];
    hello.extend([7; 32]);
    // No session ID, two cipher suites of TLS 1.1, no compression, no extensions.
    hello.extend([0, 0, 4, 0xc0, 0x14, 0x00, 0x2f, 1, 0]);
    let mut record = vec![22, 3, 1, 0, u8::try_from(hello.len() + 4).unwrap()];
    record.extend([1, 0, 0, u8::try_from(hello.len()).unwrap()]);
    record.extend(hello);
    let mut client = Client::connect(sidecar.port);
    client.send(record);
    let (response, _) = client.rest();
    assert_eq!(
        (response[0], response[5]),
        (21, 2),
        "a fatal alert: {response:?}"
    );
    assert!([70, 40].contains(&response[6]), "{response:?}");
    sidecar.wait_metric(HANDSHAKES, &[("outcome", "version")], 1.0);
    sidecar.expect_sound();
}

#[test]
fn a_handshake_is_bounded_by_the_head_timeout_and_blocks_no_other_client() {
    let (_decode, sidecar) = listener(&["--head-timeout=1s"]);
    let mut silent: Vec<_> = (0..20).map(|_| Client::connect(sidecar.port)).collect();
    for (nth, client) in silent.iter_mut().enumerate() {
        // Most clients send only the start of a record.
        client.send(&[22, 3, 1, 2, 0][..nth % 6]);
    }
    sidecar.get("/health", &[]).expect(200);
    for client in &mut silent {
        client.expect_closed();
    }
    sidecar.wait_metric(HANDSHAKES, &[("outcome", "unfinished")], 20.0);
    expect_drained(&sidecar);
    sidecar.expect_sound();
}

#[test]
fn bytes_that_are_not_tls_close_the_connection() {
    let (_decode, sidecar) = listener(&[]);
    for bytes in [
        &[0_u8; 64][..],
        &[22, 3, 1, 0xff, 0xff, 1],
        &[21, 3, 3, 0, 2, 2, 40],
        b"\r\n",
    ] {
        let mut client = Client::connect(sidecar.port);
        client.send(bytes);
        client.rest();
    }
    sidecar.get("/health", &[]).expect(200);
    sidecar.expect_sound();
}

#[test]
fn an_engine_is_trusted_only_with_a_valid_certificate() {
    let folder = Folder::new();
    let trusting = trusting(&folder);
    let wrong_name = || tls_of(&Authority::of_engines().sign(&["elsewhere"]));
    let unknown = || tls_of(&Authority::new("stranger").sign(&["localhost", "127.0.0.1"]));
    for wrong in [wrong_name, unknown] {
        // The prefiller.
        let pair = engines(Some(wrong()), Some(engine_tls()), &flags(&trusting), false);
        pair.post(CHAT, ask_for(4, true).1)
            .expect_error(502, "prefill_connect");
        assert!(pair.prefill.requests().is_empty() && pair.decode.requests().is_empty());
        let log = pair.sidecar.wait_stderr("certificate verification failed");
        assert!(
            log.contains("TLS handshake with prefill engine at 127.0.0.1"),
            "{log}"
        );
        let counted = [("peer", "prefill"), ("outcome", "certificate")];
        pair.sidecar.wait_metric(HANDSHAKES, &counted, 1.0);
        // The decoder.
        let pair = engines(Some(engine_tls()), Some(wrong()), &flags(&trusting), false);
        let response = pair.sidecar.post(CHAT, ask_for(4, true).1, &[]);
        response.expect_error(503, "decode_refused");
        pair.sidecar.expect_sound();
        // Without verification, every certificate is accepted, and a warning is logged.
        let args = [
            "--enable-tls=prefiller,decoder",
            "--tls-insecure-skip-verify=prefiller,decoder",
        ];
        let pair = engines(Some(wrong()), Some(wrong()), &args, false);
        let (prompt, body) = ask_for(4, true);
        expect_text(&pair.post(CHAT, &body).expect(200), &prompt, 4);
        pair.sidecar
            .wait_stderr("certificates of the prefiller are not verified");
    }
}

#[test]
fn the_next_candidate_is_tried_after_a_failed_handshake() {
    let folder = Folder::new();
    let args = trusting(&folder);
    let pair = engines(Some(engine_tls()), Some(engine_tls()), &flags(&args), false);
    let stranger = tls_of(&Authority::new("stranger").sign(&["127.0.0.1"]));
    let stranger = EngineConfig {
        tls: Some(stranger),
        ..EngineConfig::prefill()
    };
    let stranger = Engine::start(stranger, 0).unwrap();
    let targets = format!("{},{}", stranger.host_port(), pair.prefill.host_port());
    let (prompt, body) = ask_for(4, true);
    let response = pair.sidecar.post(CHAT, &body, &[(PREFILLER, &targets)]);
    expect_text(&response.expect(200), &prompt, 4);
    assert!(stranger.requests().is_empty());
}

#[test]
fn an_engine_that_uses_plain_http_is_logged() {
    let folder = Folder::new();
    let args = trusting(&folder);
    let pair = engines(None, None, &flags(&args), false);
    pair.post(CHAT, ask_for(4, true).1)
        .expect_error(502, "prefill_connect");
    pair.sidecar.wait_stderr("remove it from --enable-tls");
    pair.sidecar.expect_sound();
}

#[test]
fn an_engine_may_request_a_client_certificate() {
    let folder = Folder::new();
    let mut args = trusting(&folder);
    let clients = Authority::new("clients");
    let identity = Authority::of_engines().sign(&["localhost", "127.0.0.1"]);
    let strict = || {
        let (chain, key) = (identity.chain.as_bytes(), identity.key.as_bytes());
        Tls::with_clients_of(chain, key, clients.pem().as_bytes()).unwrap()
    };
    let pair = engines(Some(strict()), Some(engine_tls()), &flags(&args), false);
    let response = pair.post(CHAT, ask_for(4, true).1);
    assert_eq!(response.status, 502, "{}", response.text());
    assert!(pair.prefill.requests().is_empty());
    pair.sidecar.wait_stderr("set --tls-client-cert");
    let own = clients.sign(&["ringside"]);
    args.push(format!(
        "--tls-client-cert={}",
        folder.write("own.crt", &own.chain)
    ));
    args.push(format!(
        "--tls-client-key={}",
        folder.write("own.key", &own.key)
    ));
    let pair = engines(Some(strict()), Some(strict()), &flags(&args), false);
    let (prompt, body) = ask_for(4, true);
    expect_text(&pair.post(CHAT, &body).expect(200), &prompt, 4);
}

#[test]
fn a_client_disconnect_aborts_the_request_at_the_engine() {
    let folder = Folder::new();
    let args = trusting(&folder);
    let pair = engines(Some(engine_tls()), Some(engine_tls()), &flags(&args), true);
    for nth in 0..2 {
        let fault = Fault::StallMidStream { after_events: 3 };
        pair.decode.clear();
        pair.decode.fault(fault, 1);
        let mut client = pair.sidecar.connect();
        client.send(split_request(&pair, &ask_for(40, true).1));
        assert_eq!(client.head().status, 200);
        client.chunk().unwrap();
        if nth == 0 {
            client.finish();
        } else {
            client.reset();
        }
        let aborted = |log: &[mock_engine::Seen]| log.iter().any(|seen| seen.state.is_aborted());
        pair.decode.wait_for(DEADLINE, aborted).unwrap();
    }
    expect_drained(&pair.sidecar);
    expect_healthy(&pair);
    pair.sidecar.expect_sound();
}

#[test]
fn a_close_delimited_body_is_complete_only_with_close_notify() {
    let folder = Folder::new();
    let args = trusting(&folder);
    for (tls, is_whole) in [
        (engine_tls(), true),
        (engine_tls().without_close_notify(), false),
    ] {
        let pair = engines(None, Some(tls), &flags(&args), true);
        pair.decode.fault(Fault::NoFraming, 1);
        let mut client = pair.sidecar.connect();
        let (_, body) = ask_for(40, true);
        client.send(request("POST", CHAT, &[], body.as_bytes()));
        let response = client.response();
        assert_eq!(response.framing, Framing::UntilClose);
        let is_clean = response.end == crate::client::End::Complete;
        assert_eq!(is_clean, is_whole, "{:?}", response.end);
    }
}

/// Writes the certificate number `nth` (0 is the first, later ones replace it) as Kubernetes mounts
/// a secret: the files are symlinks through `..data`.
pub(crate) fn write_as_a_secret(folder: &Folder, nth: u32, identity: &Identity) {
    let name = format!("..{nth}");
    let path = folder.path();
    std::fs::create_dir(path.join(&name)).unwrap();
    folder.write(&format!("{name}/tls.crt"), &identity.chain);
    folder.write(&format!("{name}/tls.key"), &identity.key);
    symlink(&name, path.join("..data_tmp")).unwrap();
    std::fs::rename(path.join("..data_tmp"), path.join("..data")).unwrap();
    if nth == 0 {
        for file in ["tls.crt", "tls.key"] {
            symlink(format!("..data/{file}"), path.join(file)).unwrap();
        }
    }
}

/// Connects until the sidecar presents a certificate of that authority.
#[track_caller]
fn wait_shown(sidecar: &Sidecar, authority: &Authority) {
    wait_for("the new certificate", || {
        let offer = Offer {
            root: Some(authority.der()),
            ..Offer::default()
        };
        let mut client = sidecar.connect_offering(&offer);
        client.shake_hands().ok()?;
        client.ask("GET", "/health", &[], b"").expect(200);
        Some(())
    });
}

#[test]
fn streams_survive_a_new_certificate() {
    let folder = Folder::new();
    let authorities = ["first", "second", "third"].map(Authority::new);
    let signed = |nth: usize| authorities[nth].sign(&["localhost"]);
    write_as_a_secret(&folder, 0, &signed(0));
    let engine = EngineConfig {
        itl: Duration::from_millis(5),
        ..EngineConfig::decode()
    };
    let decode = Engine::start(engine, 0).unwrap();
    let sidecar = Sidecar::launch(&Launch {
        args: &[&format!("--cert-path={}", folder.text())],
        decoder_port: decode.port(),
        tls: true,
        ..Launch::default()
    });
    wait_shown(&sidecar, &authorities[0]);
    let tokens = 1200;
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let offer = Offer {
            root: Some(authorities[0].der()),
            ..Offer::default()
        };
        let mut client = sidecar.connect_offering(&offer);
        let (prompt, body) = ask_for(tokens, true);
        client.send(request("POST", CHAT, &[], body.as_bytes()));
        streams.push((client, prompt));
    }
    let running = |counters: &mock_engine::Counters| counters.running == u64::from(STREAMS);
    decode.wait_counters(DEADLINE, running).unwrap();
    for nth in [1, 2] {
        write_as_a_secret(&folder, u32::try_from(nth).unwrap(), &signed(nth));
        wait_shown(&sidecar, &authorities[nth]);
    }
    assert!(
        decode.counters().running > 0,
        "the streams ended before the certificate was replaced"
    );
    for (mut client, prompt) in streams {
        let response = client.response().expect(200);
        expect_text(&response, &prompt, tokens);
        // The connection is still usable.
        client.ask("GET", "/health", &[], b"").expect(200);
    }
    assert!((sidecar.metric(RELOADS, &[("result", "ok")]) - 2.0).abs() < 1e-9);
    sidecar.expect_sound();
}

#[test]
fn an_unusable_certificate_does_not_replace_the_current_one() {
    let folder = Folder::new();
    let (first, second) = (Authority::new("first"), Authority::new("second"));
    folder.write_pair(&first.sign(&["localhost"]));
    let path = format!("--cert-path={}", folder.text());
    let (_decode, sidecar) = listener(&[&path]);
    let failed = [("result", "failed")];
    let new = second.sign(&["localhost"]);
    // A certificate for another key, no certificate, and no file.
    folder.write("tls.crt", &new.chain);
    sidecar.wait_metric(RELOADS, &failed, 1.0);
    wait_shown(&sidecar, &first);
    folder.write("tls.crt", "garbage");
    sidecar.wait_metric(RELOADS, &failed, 2.0);
    std::fs::remove_file(folder.path().join("tls.crt")).unwrap();
    sidecar.wait_metric(RELOADS, &failed, 3.0);
    wait_shown(&sidecar, &first);
    sidecar.wait_stderr("keeping the current one");
    folder.write_pair(&new);
    wait_shown(&sidecar, &second);
    sidecar.expect_sound();
}

#[test]
fn unusable_tls_files_exit_with_3_and_a_message() {
    let folder = Folder::new();
    let (one, other) = (
        Authority::new("a").sign(&["a"]),
        Authority::new("b").sign(&["b"]),
    );
    let empty = Folder::new();
    let mixed = Folder::new();
    mixed.write("tls.crt", &one.chain);
    mixed.write("tls.key", &other.key);
    let text = folder.write("text", "nothing of use");
    let key = folder.write("own.key", &one.key);
    let chain = folder.write("own.crt", &other.chain);
    let table = [
        (
            vec![format!("--cert-path={}/none", folder.text())],
            "none/tls.crt: No such file",
        ),
        (
            vec![format!("--cert-path={}", empty.text())],
            "tls.crt and tls.key (PEM)",
        ),
        (
            vec![format!("--cert-path={}", mixed.text())],
            "the certificate cannot be used with",
        ),
        (
            vec![
                "--enable-tls=decoder".into(),
                format!("--tls-ca-file={text}"),
            ],
            "no certificate found",
        ),
        (
            vec![
                "--enable-tls=decoder".into(),
                "--tls-insecure-skip-verify=decoder".into(),
                format!("--tls-client-cert={chain}"),
                format!("--tls-client-key={key}"),
            ],
            "--tls-client-cert:",
        ),
    ];
    for (args, words) in table {
        let mut all = vec!["sidecar", "--admin-address=off"];
        all.extend(args.iter().map(String::as_str));
        let (code, log) = run_to_exit(&all);
        assert!(code == 3 && log.contains(words), "{args:?}: {code} {log}");
        assert!(!log.contains(" is ready"), "{log}");
    }
}

#[test]
fn a_drain_lets_streams_over_tls_finish() {
    let (decode, mut sidecar) = listener(&[]);
    decode.fault(
        Fault::Slow {
            chunk_bytes: 400,
            delay: Duration::from_millis(5),
        },
        1,
    );
    let (prompt, body) = ask_for(30, true);
    let mut client = sidecar.connect();
    client.send(request("POST", CHAT, &[], body.as_bytes()));
    assert!(decode.wait_for(DEADLINE, |log| !log.is_empty()).is_some());
    let mut idle = sidecar.connect();
    idle.ask("GET", "/health", &[], b"").expect(200);
    sidecar.terminate();
    let response = client.response().expect(200);
    expect_text(&response, &prompt, 30);
    assert!(sidecar.wait_exit().success());
    let (rest, end) = idle.rest();
    assert!(rest.is_empty() && end == crate::client::End::Cut, "{end:?}");
}

#[test]
fn bytes_of_two_requests_in_one_record_are_both_served() {
    let (decode, sidecar) = listener(&[]);
    let mut client = sidecar.connect();
    let get = |path| request("GET", path, &[], b"");
    let two = [get("/score?1"), get("/score?2")].concat();
    client.send(two);
    for nth in 1..=2 {
        let response = client.response().expect(200);
        assert!(
            response.text().contains(&format!("score?{nth}")),
            "{}",
            response.text()
        );
    }
    assert_eq!(decode.requests().len(), 2);
}
