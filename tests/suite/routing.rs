//! Routing of requests: conformance rows R1 and H1 to H6, and the targets that a routing header may
//! name.

use std::net::{Ipv6Addr, SocketAddr};

use mock_engine::{Engine, EngineConfig};

use crate::harness::{CHAT, Launch, PREFILLER, Pair, Sidecar, only};

const RESPONSES: &str = "/v1/responses";
const CHAT_BODY: &str = r#"{"model":"mock-model","messages":[{"role":"user","content":"hi"}]}"#;
const RESPONSES_BODY: &str = r#"{"model":"mock-model","input":"hi"}"#;

#[test]
fn r1_get_requests_are_sent_to_the_decoder() {
    let pair = Pair::start(&[]);
    let paths = [
        CHAT,
        "/v1/completions",
        "/v1/messages",
        "/v1/embeddings",
        "/score",
        "/healthz",
    ];
    for path in paths {
        let response = pair.sidecar.get(path, &[]).expect(200);
        assert_eq!(response.json()["path"], path);
    }
    assert_eq!(pair.decode.requests().len(), paths.len());
    assert!(pair.prefill.requests().is_empty());
}

#[test]
fn only_the_exact_path_and_method_are_intercepted() {
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    let routing = [(PREFILLER, target.as_str())];
    for (method, path) in [
        ("POST", "/v1/chat/completions/"),
        ("POST", "/v1//chat/completions"),
        ("POST", "/v1/embeddings"),
        ("PUT", CHAT),
        ("DELETE", "/v1/models/x"),
        ("OPTIONS", CHAT),
        ("POST", "/health"),
    ] {
        pair.decode.clear();
        let response = pair
            .sidecar
            .ask(method, path, &routing, CHAT_BODY.as_bytes());
        let seen = only(&pair.decode);
        assert_eq!((seen.method.as_str(), seen.target.as_str()), (method, path));
        assert_eq!(seen.body, CHAT_BODY.as_bytes());
        assert!([200, 405].contains(&response.status), "{method} {path}");
    }
    assert!(pair.prefill.requests().is_empty());
}

#[test]
fn the_query_is_sent_with_both_legs() {
    let pair = Pair::start(&[]);
    pair.post("/v1/chat/completions?trace=a%2Fb&x", CHAT_BODY)
        .expect(200);
    let (prefill, decode) = pair.legs();
    assert_eq!(prefill.target, "/v1/chat/completions?trace=a%2Fb&x");
    assert_eq!(decode.target, prefill.target);
}

#[test]
fn health_is_served_by_the_sidecar() {
    let pair = Pair::start(&[]);
    for method in ["GET", "HEAD"] {
        let response = pair.sidecar.ask(method, "/health", &[], b"").expect(200);
        assert!(response.body.is_empty());
    }
    assert!(pair.decode.requests().is_empty());
}

/// Path and body of the intercepted requests with which rows H1 to H6 are tested.
const KINDS: [(&str, &str); 2] = [(CHAT, CHAT_BODY), (RESPONSES, RESPONSES_BODY)];

#[test]
fn h1_h6_no_target_is_decode_only() {
    let pair = Pair::start(&[]);
    let headers: [&[(&str, &str)]; 5] = [
        &[],
        &[(PREFILLER, "")],
        &[(PREFILLER, "  ")],
        &[(PREFILLER, ""), (PREFILLER, "")],
        &[(PREFILLER, ",127.0.0.1:1")],
    ];
    for (path, body) in KINDS {
        for headers in headers {
            pair.decode.clear();
            let response = pair.sidecar.post(path, body, headers).expect(200);
            assert_eq!(response.header("x-ringside-error"), None);
            let seen = only(&pair.decode);
            assert_eq!(seen.body, body.as_bytes(), "{headers:?}");
            assert_eq!(seen.header(PREFILLER), None);
        }
    }
    assert!(pair.prefill.requests().is_empty());
    let labels = [("outcome", "local_policy"), ("reason", "no_prefiller")];
    let want = (KINDS.len() * headers.len()) as f64;
    pair.sidecar
        .wait_metric("ringside_pd_requests_total", &labels, want);
}

/// Sends the request `KINDS[kind]` with one routing header line for each value in `lines`. Returns
/// the index in `engines` of the engine that prefilled it.
fn prefilled_by(sidecar: &Sidecar, engines: &[&Engine], lines: &[&str], kind: usize) -> usize {
    let (path, body) = KINDS[kind];
    let headers: Vec<_> = lines.iter().map(|line| (PREFILLER, *line)).collect();
    sidecar.post(path, body, &headers).expect(200);
    let had: Vec<_> = (0..engines.len())
        .filter(|i| !engines[*i].requests().is_empty())
        .collect();
    assert_eq!(had.len(), 1, "{lines:?}");
    let seen = only(engines[had[0]]);
    // H5: engines do not receive the routing header.
    assert_eq!(seen.header(PREFILLER), None);
    engines[had[0]].clear();
    had[0]
}

#[test]
fn h2_h3_h5_h6_the_first_target_is_used() {
    let pair = Pair::start(&[]);
    let tls = crate::harness::is_suite_tls().then(crate::certificates::engine_tls);
    let other = EngineConfig {
        tls,
        ..EngineConfig::prefill()
    };
    let other = Engine::start(other, 0).unwrap();
    let engines = [&pair.prefill, &other];
    let (a, b) = (pair.prefill.host_port(), other.host_port());
    for kind in 0..KINDS.len() {
        for (lines, want) in [
            (vec![a.clone()], 0),
            (vec![format!("{a},{b}")], 0),
            (vec![format!(" {b} , {a}")], 1),
            (vec![format!("{a},{a}")], 0),
            (vec![b.clone(), a.clone()], 1),
        ] {
            let lines: Vec<_> = lines.iter().map(String::as_str).collect();
            assert_eq!(prefilled_by(&pair.sidecar, &engines, &lines, kind), want);
        }
    }
    for seen in pair.decode.requests() {
        assert_eq!(seen.header(PREFILLER), None);
    }
}

#[test]
fn h4_h6_sampling_picks_every_target() {
    // 20 draws miss one of two targets once in about 500,000 runs.
    const DRAWS: usize = 20;
    let decode = Engine::start(EngineConfig::decode(), 0).unwrap();
    let first = Engine::start(EngineConfig::prefill(), 0).unwrap();
    let second = Engine::start(EngineConfig::prefill(), 0).unwrap();
    let engines = [&first, &second];
    let (a, b) = (first.host_port(), second.host_port());
    let by_flag = Sidecar::start(&["--enable-prefiller-sampling"], decode.port());
    let by_environment = Sidecar::launch(&Launch {
        env: &[("ENABLE_PREFILLER_SAMPLING", "true")],
        decoder_port: decode.port(),
        ..Launch::default()
    });
    let one_line = format!(" {a}, {b}");
    for (sidecar, lines, kind) in [
        (&by_flag, vec![one_line.as_str()], 0),
        (&by_environment, vec![a.as_str(), b.as_str()], 1),
    ] {
        let mut draws: Vec<_> = (0..DRAWS)
            .map(|_| prefilled_by(sidecar, &engines, &lines, kind))
            .collect();
        draws.sort_unstable();
        draws.dedup();
        assert_eq!(draws, [0, 1], "{lines:?}");
    }
}

#[test]
fn invalid_targets_are_502_and_no_connection_is_opened() {
    let pair = Pair::start(&[]);
    let good = pair.prefill.host_port();
    let port = pair.prefill.port();
    for target in [
        format!("https://{good}"),
        format!("ftp://{good}"),
        format!("http://http://{good}"),
        format!("{good}/"),
        format!("http://{good}/v1"),
        format!("http://{good}//"),
        format!("{good}/v1"),
        format!("{good}?x"),
        format!("{good}#x"),
        format!("user@{good}"),
        format!("user:pass@{good}"),
        format!("127.0.0.1:{port}0000"),
        "127.0.0.1:".to_owned(),
        "127.0.0.1:0".to_owned(),
        "127.0.0.1:http".to_owned(),
        "127.0.0.1:+80".to_owned(),
        "127.0.0.1:-1".to_owned(),
        "127.0.0.1:65536".to_owned(),
        format!(":{port}"),
        format!("[::1:{port}"),
        format!("[127.0.0.1]:{port}"),
        format!("::1:{port}"),
        format!("[::1%25lo]:{port}"),
        format!("127.0.0.1 :{port}"),
        format!("127.0.0.1\\:{port}"),
        format!("127.0.0%2e1:{port}"),
        format!("{}:{port}", "a".repeat(254)),
        // A list with an invalid target causes no connection attempt.
        format!("{good},user@{good}"),
    ] {
        let routing = [(PREFILLER, target.as_str())];
        let response = pair.sidecar.post(CHAT, CHAT_BODY, &routing);
        assert_eq!(response.status, 502, "{target}: {}", response.text());
        let response = response.expect_error(502, "bad_target");
        assert!(!response.text().contains(&good), "{}", response.text());
    }
    // If the header occurs twice, commas do not separate targets.
    let both = format!("{good},{good}");
    let routing = [(PREFILLER, both.as_str()), (PREFILLER, good.as_str())];
    pair.sidecar
        .post(CHAT, CHAT_BODY, &routing)
        .expect_error(502, "bad_target");
    assert!(pair.prefill.requests().is_empty() && pair.decode.requests().is_empty());
    assert_eq!(pair.prefill.counters().connections_accepted, 0);
}

#[test]
fn the_older_routing_header_is_used_if_the_newer_one_is_absent() {
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    let url = format!("http://{target}");
    let older = [("x-prefiller-url", url.as_str())];
    pair.sidecar.post(CHAT, CHAT_BODY, &older).expect(200);
    assert_eq!(pair.prefill.requests().len(), 1);
    // The older header is ignored if the newer one is present, even if that one is empty.
    for newer in [target.as_str(), ""] {
        let both = [
            ("x-prefiller-url", "http://127.0.0.1:1"),
            (PREFILLER, newer),
        ];
        pair.sidecar.post(CHAT, CHAT_BODY, &both).expect(200);
    }
    assert_eq!(pair.prefill.requests().len(), 2);
}

#[test]
fn either_name_of_the_routing_header_splits_a_request() {
    const LONG: &str = "x-llm-d-prefiller-host-port";
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    let dead = "127.0.0.1:1";
    for (fields, prefills) in [
        (vec![(PREFILLER, &*target)], 1),
        (vec![(LONG, &*target)], 1),
        (vec![("X-LLM-D-Prefiller-Host-Port", &*target)], 1),
        (vec![(PREFILLER, &*target), (LONG, &*target)], 1),
        // The older name counts, also if its value is empty.
        (vec![(LONG, dead), (PREFILLER, &*target)], 1),
        (vec![(PREFILLER, ""), (LONG, dead)], 0),
        (vec![], 0),
    ] {
        pair.prefill.clear();
        pair.decode.clear();
        pair.sidecar.post(CHAT, CHAT_BODY, &fields).expect(200);
        assert_eq!(pair.prefill.requests().len(), prefills, "{fields:?}");
        for leg in pair
            .prefill
            .requests()
            .iter()
            .chain(&pair.decode.requests())
        {
            assert_eq!(leg.header(LONG), None, "{fields:?}");
            assert_eq!(leg.header(PREFILLER), None, "{fields:?}");
        }
    }
    let conflicts = [("doubt", "conflict")];
    let name = "ringside_routing_headers_total";
    pair.sidecar.wait_metric(name, &conflicts, 2.0);
    let log = pair
        .sidecar
        .wait_stderr("the two names of a routing header");
    assert_eq!(log.matches("the two names of a routing header").count(), 1);
}

#[test]
fn an_unknown_routing_header_is_counted_and_logged() {
    let pair = Pair::start(&[]);
    let unknown = [("X-LLM-D-Next-Hop", "127.0.0.1:1")];
    pair.sidecar.post(CHAT, CHAT_BODY, &unknown).expect(200);
    let labels = [("doubt", "unknown")];
    pair.sidecar
        .wait_metric("ringside_routing_headers_total", &labels, 1.0);
    pair.sidecar
        .wait_stderr("x-llm-d-next-hop is not known here");
    // It is end-to-end for all that is known.
    let seen = pair.decode.requests();
    assert_eq!(seen[0].header("x-llm-d-next-hop"), Some("127.0.0.1:1"));
    // Clients choose the names, and cannot fill the log.
    for nth in 0..300 {
        let name = format!("x-llm-d-{nth}");
        pair.sidecar
            .post(CHAT, CHAT_BODY, &[(&name, "x")])
            .expect(200);
    }
    pair.sidecar
        .wait_metric("ringside_routing_headers_total", &labels, 301.0);
    let lines = pair.sidecar.stderr().matches("is not known here").count();
    assert_eq!(lines, 1);
}

#[test]
fn a_target_may_be_a_url_without_a_path() {
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    for url in [
        format!("http://{target}"),
        format!("http://{target}/"),
        format!("HTTP://{target}"),
        format!("Http://{target}/"),
    ] {
        let routing = [(PREFILLER, url.as_str())];
        pair.sidecar.post(CHAT, CHAT_BODY, &routing).expect(200);
    }
    assert_eq!(pair.prefill.requests().len(), 4);
    assert_eq!(pair.prefill.counters().connections_accepted, 1);
}

#[test]
fn a_target_may_be_a_host_name() {
    let pair = Pair::start(&[]);
    for host in ["localhost", "LocalHost", "http://localhost"] {
        let target = format!("{host}:{}", pair.prefill.port());
        let routing = [(PREFILLER, target.as_str())];
        pair.sidecar.post(CHAT, CHAT_BODY, &routing).expect(200);
    }
    assert_eq!(pair.prefill.counters().connections_accepted, 1);
    pair.sidecar
        .post(CHAT, CHAT_BODY, &[(PREFILLER, "no-such-host.invalid:8000")])
        .expect_error(502, "prefill_connect");
}

#[test]
fn a_target_that_is_this_proxy_or_its_decoder_is_decode_only() {
    let pair = Pair::start(&[]);
    if pair.decode.port() == 0 {
        eprintln!("skipped: the decoder is on a Unix socket");
        return;
    }
    for target in [
        format!("127.0.0.1:{}", pair.sidecar.port),
        format!("localhost:{}", pair.sidecar.port),
        format!("[::1]:{}", pair.sidecar.port),
        pair.decode.host_port(),
        format!("localhost:{}", pair.decode.port()),
    ] {
        pair.decode.clear();
        let routing = [(PREFILLER, target.as_str())];
        pair.sidecar.post(CHAT, CHAT_BODY, &routing).expect(200);
        assert_eq!(only(&pair.decode).body, CHAT_BODY.as_bytes(), "{target}");
    }
    let labels = [("outcome", "local_policy"), ("reason", "self_target")];
    pair.sidecar
        .wait_metric("ringside_pd_requests_total", &labels, 5.0);
}

#[test]
fn a_target_that_is_the_decoder_at_another_address_is_decode_only() {
    let everywhere = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0));
    let decode = Engine::start_on(EngineConfig::decode(), everywhere).unwrap();
    let port = decode.port();
    let sidecar = Sidecar::start(&[], port);
    for target in [
        format!("127.0.0.2:{port}"),
        format!("127.0.0.3:{port}"),
        format!("[::ffff:127.0.0.1]:{port}"),
    ] {
        decode.clear();
        let routing = [(PREFILLER, target.as_str())];
        sidecar.post(CHAT, CHAT_BODY, &routing).expect(200);
        assert_eq!(only(&decode).body, CHAT_BODY.as_bytes(), "{target}");
    }
    // An engine on the port of the decoder at its own address is another one.
    let first = Engine::start(EngineConfig::decode(), 0).unwrap();
    let other = SocketAddr::from(([127, 0, 0, 2], first.port()));
    let second = Engine::start_on(EngineConfig::prefill(), other).unwrap();
    let sidecar = Sidecar::start(&[], first.port());
    let target = second.host_port();
    sidecar
        .post(CHAT, CHAT_BODY, &[(PREFILLER, &target)])
        .expect(200);
    assert_eq!(second.requests().len(), 1);
}
