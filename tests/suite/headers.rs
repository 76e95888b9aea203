//! Header fields that are forwarded to engines, forwarded to clients, or removed.

use mock_engine::{Engine, EngineConfig, Seen};

use crate::client::{Client, head, request};
use crate::harness::{CHAT, Canned, PREFILLER, Pair, Sidecar, is_suite_tls, only};

const BODY: &[u8] = br#"{"messages":[{"role":"user","content":"hi"}],"max_tokens":2}"#;

/// One request per kind of handling: split, decode-only and pass-through. The last member specifies
/// whether the request names a prefill engine.
const WAYS: [(&str, &str, bool); 3] = [
    ("POST", CHAT, true),
    ("POST", CHAT, false),
    ("POST", "/echo", false),
];

/// Sends one request of each kind in [`WAYS`] and passes the requests that the engines received to
/// `check`, together with the response.
fn each_way(
    pair: &Pair,
    headers: &[(&str, &str)],
    mut check: impl FnMut(&[Seen], crate::client::Response),
) {
    let target = pair.prefill.host_port();
    for (method, path, split) in WAYS {
        pair.prefill.clear();
        pair.decode.clear();
        let mut all = headers.to_vec();
        if split {
            all.push((PREFILLER, &target));
        }
        let response = pair.sidecar.ask(method, path, &all, BODY).expect(200);
        let mut seen = pair.prefill.requests();
        seen.extend(pair.decode.requests());
        assert_eq!(seen.len(), 1 + usize::from(split));
        check(&seen, response);
    }
}

#[test]
fn every_leg_and_every_response_has_exactly_one_request_id() {
    let pair = Pair::start(&[]);
    each_way(&pair, &[("X-Request-Id", "gw-17")], |seen, response| {
        for leg in seen {
            assert_eq!(leg.header_all("x-request-id"), ["gw-17"]);
        }
        assert_eq!(response.header_all("x-request-id"), ["gw-17"]);
    });
    let two = [("x-request-id", "first"), ("X-REQUEST-ID", "second")];
    each_way(&pair, &two, |seen, response| {
        for leg in seen {
            assert_eq!(leg.header_all("x-request-id"), ["first"]);
        }
        assert_eq!(response.header_all("x-request-id"), ["first"]);
    });
}

#[test]
fn a_missing_or_invalid_request_id_is_generated() {
    let pair = Pair::start(&[]);
    let long = "x".repeat(257);
    let mut made = Vec::new();
    for headers in [
        &[][..],
        &[("x-request-id", "two words")],
        &[("x-request-id", &long)],
    ] {
        each_way(&pair, headers, |seen, response| {
            let id = response.header("x-request-id").unwrap().to_owned();
            assert_eq!(id.len(), 36);
            for leg in seen {
                assert_eq!(leg.header_all("x-request-id"), [&id]);
            }
            made.push(id);
        });
    }
    let count = made.len();
    made.sort_unstable();
    made.dedup();
    assert_eq!(made.len(), count);
}

#[test]
fn an_engines_request_id_is_not_relayed_as_a_second_one() {
    let pair = Pair::with(&[], |_| {}, |config| config.request_id_header = true);
    each_way(&pair, &[("x-request-id", "mine")], |_, response| {
        assert_eq!(response.header_all("x-request-id"), ["mine"]);
    });
    let response = pair
        .sidecar
        .post(CHAT, "[]", &[("x-request-id", "mine")])
        .expect_error(400, "bad_json");
    assert_eq!(response.header("x-request-id"), Some("mine"));
}

#[test]
fn the_client_address_is_appended_to_x_forwarded_for() {
    let pair = Pair::start(&[]);
    each_way(&pair, &[], |seen, _| {
        for leg in seen {
            assert_eq!(leg.header_all("x-forwarded-for"), ["127.0.0.1"]);
        }
    });
    let came = [
        ("X-Forwarded-For", "10.0.0.1, 10.0.0.2"),
        ("x-forwarded-for", "::1"),
    ];
    each_way(&pair, &came, |seen, _| {
        for leg in seen {
            let want = ["10.0.0.1, 10.0.0.2, ::1, 127.0.0.1"];
            assert_eq!(leg.header_all("x-forwarded-for"), want);
        }
    });
}

#[test]
fn host_and_other_end_to_end_fields_are_kept() {
    let fields = [
        ("Host", "models.example:8443"),
        ("Authorization", "Bearer secret"),
        (
            "traceparent",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        ),
        ("X-Data-Parallel-Rank", "0"),
        ("x-custom", "a"),
        ("x-custom", "b"),
        ("cookie", "k=v"),
    ];
    let pair = Pair::start(&[]);
    each_way(&pair, &fields, |seen, _| {
        for leg in seen {
            for (name, _) in fields {
                let want: Vec<_> = fields
                    .iter()
                    .filter(|(other, _)| *other == name)
                    .map(|(_, value)| *value)
                    .collect();
                assert_eq!(leg.header_all(name), want, "{name}");
            }
            assert_eq!(leg.header("user-agent"), None);
            assert_eq!(leg.header_all("content-length").len(), 1);
        }
    });
}

#[test]
fn routing_fields_are_removed_on_every_path() {
    let names = [
        "x-prefiller-host-port",
        "x-prefiller-url",
        "x-encoder-hosts-ports",
        "x-kv-cache-source-host-port",
        "x-data-parallel-host-port",
        "x-llm-d-prefiller-host-port",
        "x-llm-d-encoder-hosts-ports",
        "x-llm-d-kv-cache-source-host-port",
        "x-speculative-prefill",
    ];
    let pair = Pair::start(&[]);
    let (target, own) = (pair.prefill.host_port(), format!(":{}", pair.sidecar.port));
    let fields = [
        (names[0], target.as_str()),
        (names[1], "http://127.0.0.1:1"),
        (names[2], "127.0.0.1:1"),
        (names[3], "127.0.0.1:1"),
        (names[4], own.as_str()),
        (names[5], "127.0.0.1:1"),
        (names[6], "127.0.0.1:1"),
        (names[7], "127.0.0.1:1"),
        (names[8], "true"),
    ];
    for (method, path) in [
        ("POST", CHAT),
        ("POST", "/echo"),
        ("GET", "/v1/models"),
        ("GET", CHAT),
    ] {
        pair.decode.clear();
        let body = if method == "POST" { BODY } else { b"" };
        pair.sidecar.ask(method, path, &fields, body).expect(200);
        let mut seen = vec![only(&pair.decode)];
        seen.extend(pair.prefill.requests());
        for leg in seen {
            for name in names {
                assert_eq!(leg.header(name), None, "{method} {path}");
            }
        }
    }
    assert_eq!(pair.prefill.requests().len(), 1);
}

#[test]
fn hop_by_hop_request_fields_are_removed() {
    let fields = [
        ("Connection", "keep-alive, X-Private, te"),
        ("Connection", "x-other"),
        ("X-Private", "1"),
        ("X-Other", "1"),
        ("Keep-Alive", "timeout=5"),
        ("TE", "trailers"),
        ("Trailer", "x-sum"),
        ("Proxy-Connection", "keep-alive"),
        ("Proxy-Authorization", "Basic eDp5"),
        ("Upgrade", "h2c"),
    ];
    let pair = Pair::start(&[]);
    each_way(&pair, &fields, |seen, _| {
        for leg in seen {
            for (name, _) in fields {
                assert_eq!(leg.header(name), None, "{name}");
            }
        }
    });
}

#[test]
fn hop_by_hop_response_fields_are_removed() {
    let engine = Canned::start(
        "HTTP/1.1 200 OK\r\nConnection: x-private\r\nX-Private: 1\r\nKeep-Alive: timeout=5\r\n\
         Proxy-Authenticate: Basic\r\nSet-Cookie: a\r\nSet-Cookie: b\r\nX-Kept: 1\r\n\
         Content-Length: 2\r\n\r\n{}",
    );
    let sidecar = Sidecar::start(&[], engine.port);
    let mut client = sidecar.connect();
    for (method, path, body) in [("GET", "/x", &b""[..]), ("POST", CHAT, BODY)] {
        let response = client.ask(method, path, &[], body).expect(200);
        for name in [
            "connection",
            "x-private",
            "keep-alive",
            "proxy-authenticate",
        ] {
            assert_eq!(response.header(name), None, "{name}");
        }
        assert_eq!(response.header_all("set-cookie"), ["a", "b"]);
        assert_eq!(response.header("x-kept"), Some("1"));
        assert_eq!(response.text(), "{}");
    }
}

#[test]
fn accept_encoding_is_forwarded_only_if_ringside_does_not_read_the_response() {
    let pair = Pair::start(&[]);
    each_way(&pair, &[("Accept-Encoding", "gzip, br")], |seen, _| {
        let want = (seen.len() == 1).then_some("gzip, br");
        for leg in seen {
            assert_eq!(leg.header("accept-encoding"), want);
        }
    });
    each_way(&pair, &[], |seen, _| {
        for leg in seen {
            assert_eq!(leg.header("accept-encoding"), None);
        }
    });
}

/// Sends a head with `Expect: 100-continue`, waits for the 100 response, and then sends the body.
#[track_caller]
fn ask_first(client: &mut Client, path: &str, headers: &[(&str, &str)]) -> crate::client::Response {
    let mut all = headers.to_vec();
    all.push(("Expect", "100-continue"));
    let mut bytes = head("POST", path, &all);
    bytes.extend(format!("Content-Length: {}\r\n\r\n", BODY.len()).into_bytes());
    client.send(bytes);
    assert_eq!(client.head().status, 100);
    client.send(BODY);
    // A second 100 response would be read as the final response here.
    let head = client.head();
    let framing = head.framing("POST");
    let (body, end) = client.body(framing);
    crate::client::Response {
        head,
        framing,
        body,
        end,
    }
}

#[test]
fn expect_causes_one_100_response_and_is_not_forwarded() {
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    for (_, path, split) in WAYS {
        let routing = [(PREFILLER, target.as_str())];
        let headers = if split { &routing[..] } else { &[] };
        let mut client = pair.sidecar.connect();
        for _ in 0..2 {
            ask_first(&mut client, path, headers).expect(200);
        }
        // If the body arrives together with the head, no 100 response is sent.
        let mut all = headers.to_vec();
        all.push(("Expect", "100-Continue"));
        client.send(request("POST", path, &all, BODY));
        assert_eq!(client.head().status, 200);
    }
    for seen in pair
        .prefill
        .requests()
        .iter()
        .chain(&pair.decode.requests())
    {
        assert_eq!(seen.header("expect"), None);
    }
}

#[test]
fn an_unknown_expectation_is_refused() {
    let pair = Pair::start(&[]);
    pair.sidecar
        .post(CHAT, BODY, &[("Expect", "the-unexpected")])
        .expect_error(417, "bad_head");
    assert!(pair.decode.requests().is_empty());
}

#[test]
fn request_trailers_reach_no_engine() {
    let long = "y".repeat(200_000);
    for (args, path, body) in [
        (&[][..], "/echo", "x"),
        (&[], "/echo", &*long),
        (&[], CHAT, r#"{"messages":[],"max_tokens":1}"#),
        (
            &["--trust-client-kv"],
            CHAT,
            r#"{"messages":[],"max_tokens":1}"#,
        ),
    ] {
        let decode = Engine::start(EngineConfig::decode(), 0).unwrap();
        let sidecar = Sidecar::start(args, decode.port());
        let mut bytes = head("POST", path, &[]);
        let chunk = format!("{:x}\r\n{body}\r\n", body.len());
        let trailers = "0\r\nX-Request-Id: late\r\nAuthorization: x\r\nX-Sum: 1\r\n\r\n";
        bytes.extend(format!("Transfer-Encoding: chunked\r\n\r\n{chunk}{trailers}").into_bytes());
        // As a whole, and with the trailers one byte at a time.
        let whole = bytes.len() - trailers.len();
        for piece_len in [trailers.len(), 1] {
            decode.clear();
            let mut client = sidecar.connect();
            client.send(&bytes[..whole]);
            for piece in bytes[whole..].chunks(piece_len) {
                client.send(piece);
            }
            client.response().expect(200);
            let seen = only(&decode);
            assert!(seen.trailers.is_empty(), "{args:?} {path}");
            assert_eq!(seen.header("x-sum"), None);
            assert_eq!(seen.header("authorization"), None);
            assert_ne!(seen.header("x-request-id"), Some("late"));
            assert!(seen.body == body.as_bytes());
            // The next request begins after the trailers.
            client.ask("GET", "/health", &[], b"").expect(200);
        }
    }
}

#[test]
fn x_forwarded_proto_states_that_the_client_used_tls() {
    let pair = Pair::start(&[]);
    let want = if is_suite_tls() {
        vec!["https"]
    } else {
        Vec::new()
    };
    each_way(&pair, &[], |seen, _| {
        for leg in seen {
            assert_eq!(leg.header_all("x-forwarded-proto"), want);
        }
    });
    // A proxy in front takes precedence.
    each_way(&pair, &[("X-Forwarded-Proto", "http")], |seen, _| {
        for leg in seen {
            assert_eq!(leg.header_all("x-forwarded-proto"), ["http"]);
        }
    });
}
