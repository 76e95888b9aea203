//! Request bodies: accepted contents, and edits that leave all other bytes unchanged.

use mock_engine::Seen;
use serde_json::{Value, json};

use crate::client::{Client, Response, chunked_request};
use crate::harness::{CHAT, PREFILLER, Pair, json_of, only, sha256};

const GENERATE: &str = "/inference/v1/generate";
const INTERCEPTED: [&str; 6] = [
    CHAT,
    "/v1/completions",
    "/v1/messages",
    "/v1/responses",
    GENERATE,
    "/invocations",
];

const NOT_OBJECTS: [&[u8]; 14] = [
    b"null",
    b"[]",
    b"17",
    b"\"text\"",
    b"true",
    b"",
    b" ",
    b"{",
    b"{\"messages\":[]",
    b"{\"messages\":[]}x",
    b"{\"messages\":[]}{}",
    b"\xef\xbb\xbf{\"messages\":[]}",
    b"{\"messages\":[]}\0",
    b"{\"a\":\"\0\"}",
];

#[test]
fn a_body_that_is_not_a_json_object_is_400_before_any_leg() {
    let pair = Pair::start(&[]);
    for path in INTERCEPTED {
        for body in NOT_OBJECTS {
            let response = pair.post(path, body);
            let text = String::from_utf8_lossy(body).into_owned();
            assert_eq!(response.status, 400, "{path} {text}");
            let response = response.expect_error(400, "bad_json");
            let message = response.json()["message"].as_str().unwrap().to_owned();
            assert!(message.starts_with("invalid JSON: "), "{message}");
        }
    }
    assert!(pair.prefill.requests().is_empty() && pair.decode.requests().is_empty());
    pair.sidecar.expect_sound();
}

#[test]
fn a_decode_only_body_that_is_not_a_json_object_is_400() {
    let pair = Pair::start(&[]);
    for path in INTERCEPTED {
        for body in NOT_OBJECTS {
            pair.sidecar
                .post(path, body, &[])
                .expect_error(400, "bad_json");
        }
    }
    assert_eq!(pair.decode.counters().responded, 0);
    pair.sidecar.expect_sound();
    // Bodies of other paths are not parsed.
    pair.sidecar
        .post("/v1/embeddings", b"null", &[])
        .expect(200);
    assert_eq!(pair.decode.requests().last().unwrap().body, b"null");
}

#[test]
fn an_error_found_before_the_end_of_a_body_closes_the_connection() {
    let pair = Pair::start(&[]);
    let mut client = pair.sidecar.connect();
    let mut bytes = crate::client::head("POST", CHAT, &[]);
    bytes.extend_from_slice(b"Content-Length: 100\r\n\r\n[]");
    client.send(bytes);
    let response = client.response().expect_error(400, "bad_json");
    assert_eq!(response.header("connection"), Some("close"));
    client.expect_closed();
}

#[test]
fn a_refused_request_that_was_read_whole_keeps_the_connection_open() {
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    let own = [(PREFILLER, &*target)];
    let gzip = [("Content-Encoding", "gzip")];
    let good: &[u8] = br#"{"messages":[]}"#;
    let mut client = pair.sidecar.connect();
    for (headers, body, status) in [
        (&[][..], &b"[]"[..], 400),
        (&own, b"[]", 400),
        (&[], b"{\"a\":1", 400),
        (&own, b"{\"a\" 1}", 400),
        (&own, b"", 400),
        (&gzip, b"\x1f\x8b", 415),
        (&[(PREFILLER, "a b")], good, 502),
        (&[("x-data-parallel-host-port", "nowhere:1")], good, 400),
    ] {
        for is_chunked in [false, true] {
            let response = if is_chunked {
                let chunks: Vec<_> = body.chunks(64).collect();
                client.send(chunked_request(CHAT, headers, &chunks));
                client.response()
            } else {
                client.ask("POST", CHAT, headers, body)
            };
            let response = response.expect(status);
            assert_eq!(response.header("connection"), None, "{headers:?} {body:?}");
            // The next request is not confused by the rest of this one.
            client.ask("POST", CHAT, &[], good).expect(200);
        }
    }
    // Pipelined after the refused one.
    let mut bytes = crate::client::request("POST", CHAT, &own, b"[]");
    bytes.extend(crate::client::request("POST", CHAT, &[], good));
    client.send(bytes);
    client.response().expect_error(400, "bad_json");
    client.response().expect(200);
}

#[test]
fn a_compressed_body_is_415_where_it_would_be_read() {
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    for routing in [&[(PREFILLER, &*target)][..], &[]] {
        for coding in ["gzip", "br", "identity, zstd", "unknown"] {
            let headers = [routing, &[("content-encoding", coding)]].concat();
            let response = pair.sidecar.post(CHAT, b"\x1f\x8b\x08", &headers);
            let response = response.expect_error(415, "content_coding");
            assert_eq!(response.header("accept-encoding"), Some("identity"));
        }
        let headers = [routing, &[("Content-Encoding", "Identity")]].concat();
        pair.sidecar
            .post(CHAT, br#"{"messages":[]}"#, &headers)
            .expect(200);
    }
    // Elsewhere the engine decides.
    pair.decode.clear();
    let headers = [("content-encoding", "gzip")];
    pair.sidecar
        .post("/v1/embeddings", b"\x1f\x8b", &headers)
        .expect(200);
    assert_eq!(only(&pair.decode).body, b"\x1f\x8b");
    let pair = Pair::start(&["--trust-client-kv"]);
    pair.sidecar.post(CHAT, b"\x1f\x8b", &headers);
    assert_eq!(only(&pair.decode).body, b"\x1f\x8b");
}

#[test]
fn an_invalid_value_that_an_edit_would_replace_is_400() {
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    let routed = [(PREFILLER, &*target)];
    let broken = [
        r#""kv_transfer_params":{"a":[1,]}"#,
        r#""kv_transfer_params":{"a" 1}"#,
        r#""kv_transfer_params":"\x""#,
        r#""ec_transfer_params":[01]"#,
    ];
    let replaced = [
        r#""stream_options":{"include_usage":tru}"#,
        r#""stream_options":[}"#,
        r#""max_tokens":"\u12""#,
        r#""max_completion_tokens":[1,]"#,
        r#""min_tokens":{"a":1,}"#,
        r#""stream":"\q""#,
    ];
    for member in broken.iter().chain(&replaced) {
        let body = format!(r#"{{"messages":[],{member},"max_tokens":2}}"#);
        pair.sidecar
            .post(CHAT, &body, &routed)
            .expect_error(400, "bad_json");
    }
    // Without a prefiller, only transfer parameters are replaced.
    for member in broken {
        let body = format!(r#"{{"messages":[],{member},"max_tokens":2}}"#);
        pair.sidecar
            .post(CHAT, &body, &[])
            .expect_error(400, "bad_json");
    }
    assert!(pair.prefill.requests().is_empty());
    assert_eq!(pair.decode.counters().responded, 0);
}

#[test]
fn an_error_found_at_the_end_of_a_body_keeps_the_connection_open() {
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    let mut client = pair.sidecar.connect();
    for _ in 0..3 {
        let response = client.ask("POST", CHAT, &[(PREFILLER, &target)], b"{\"a\":1");
        let response = response.expect_error(400, "bad_json");
        assert_eq!(response.header("connection"), None);
        client
            .ask("POST", CHAT, &[], br#"{"messages":[]}"#)
            .expect(200);
    }
}

/// A body with many values that a JSON library would not serialize in the same way again.
const ODD: &str = "{ \"messages\" : [ {\"role\":\"user\",\"content\":\"\\u003c\\u00e9\\/\\ud83d\\ude00 <é>\"} ] ,\r\n\
    \"seed\":9007199254740993, \"big\" : 12345678901234567890,\"floats\":[1.0,1e5,0.1e-7,-0.0,1E+2],\
    \"z\":1,\"a\":{\t},\"dup\":1,\"dup\":2,\"metadata\":{\"max_tokens\":5,\"kv_transfer_params\":{\"a\":1}},\
    \"trap\":\"\\\"max_tokens\\\":9}\",\"max_tokens\" : 16 }  ";

/// Undoes an edit in a text: replaces `edited`, which must occur exactly once, with `original`.
#[track_caller]
fn undo(body: &str, edited: &str, original: &str) -> String {
    assert_eq!(body.matches(edited).count(), 1, "{edited} in {body:.300}");
    body.replacen(edited, original, 1)
}

const ASKED: &str = "\"kv_transfer_params\":{\"do_remote_decode\":true,\"do_remote_prefill\":false,\
    \"remote_engine_id\":null,\"remote_block_ids\":null,\"remote_host\":null,\"remote_port\":null}";

/// Returns `body` without `members`, which the proxy appended before the last brace. Fails unless
/// each of them occurs exactly once and all of them directly precede the brace.
#[track_caller]
fn cut_appended(body: &str, members: &[&str]) -> String {
    let mut appended = Vec::new();
    let mut rest = body.to_owned();
    for member in members {
        let with_comma = format!(",{member}");
        rest = undo(&rest, &with_comma, "");
        appended.push(with_comma);
    }
    // The appended members are contiguous and directly precede the brace.
    let tail = &body[rest.trim_end().len() - 1..];
    let tail_bytes: usize = appended.iter().map(String::len).sum();
    assert!(tail[tail_bytes..].starts_with('}'), "{tail}");
    rest
}

fn text(seen: &Seen) -> String {
    String::from_utf8(seen.body.clone()).unwrap()
}

#[test]
fn only_edited_bytes_change() {
    let pair = Pair::start(&[]);
    pair.post(CHAT, ODD).expect(200);
    let (prefill, decode) = pair.legs();
    let handoff = format!("\"kv_transfer_params\":{}", pair.handoffs.issued()[0]);
    assert_eq!(cut_appended(&text(&decode), &[&handoff]), ODD);
    let prefill = undo(
        &text(&prefill),
        "\"max_tokens\" : 1 ",
        "\"max_tokens\" : 16 ",
    );
    let appended = [
        "\"max_completion_tokens\":1",
        "\"min_tokens\":1",
        "\"stream\":false",
        ASKED,
    ];
    assert_eq!(cut_appended(&prefill, &appended), ODD);
}

#[test]
fn a_megabyte_of_token_ids_is_the_same_on_both_legs() {
    let ids: Vec<String> = (0..190_000_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) % 152_064).to_string())
        .collect();
    let ids = format!("[{}]", ids.join(","));
    assert!(ids.len() > 1 << 20);
    let client = format!(
        "{{\"request_id\":\"r\",\"token_ids\":{ids},\"sampling_params\":{{\"max_tokens\":9}},\
         \"stream\":true,\"priority\":0}}"
    );
    let pair = Pair::start(&[]);
    pair.post(GENERATE, &client).expect(200);
    let (prefill, decode) = pair.legs();
    for leg in [&prefill, &decode] {
        assert_eq!(leg.prompt_sha256.as_deref(), Some(&*sha256(ids.as_bytes())));
    }
    let handoff = format!("\"kv_transfer_params\":{}", pair.handoffs.issued()[0]);
    let undone = cut_appended(&text(&decode), &[&handoff]);
    assert!(undone == client, "the decode leg differs");
    let undone = undo(
        &text(&prefill),
        "{\"max_tokens\":1,\"min_tokens\":1}",
        "{\"max_tokens\":9}",
    );
    let undone = undo(&undone, "\"stream\":false", "\"stream\":true");
    assert!(
        cut_appended(&undone, &[ASKED]) == client,
        "the prefill leg differs"
    );
}

#[test]
fn a_chunked_body_is_forwarded_with_a_content_length() {
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    let pieces: Vec<&[u8]> = ODD.as_bytes().chunks(7).collect();
    let mut client = pair.sidecar.connect();
    client.send(chunked_request(CHAT, &[(PREFILLER, &target)], &pieces));
    client.response().expect(200);
    let (prefill, decode) = pair.legs();
    for leg in [&prefill, &decode] {
        assert_eq!(
            leg.framing,
            mock_engine::Framing::ContentLength(leg.body_bytes)
        );
    }
    let handoff = format!("\"kv_transfer_params\":{}", pair.handoffs.issued()[0]);
    assert_eq!(cut_appended(&text(&decode), &[&handoff]), ODD);
}

#[test]
fn a_long_chunked_body_reaches_both_legs_completely() {
    let ids: Vec<String> = (0..300_000_u32).map(|id| id.to_string()).collect();
    let ids = format!("[{}]", ids.join(", "));
    let body = format!(r#"{{"token_ids":{ids},"sampling_params":{{"max_tokens":3}}}}"#);
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    for chunk_bytes in [16_384, 70_001] {
        pair.prefill.clear();
        pair.decode.clear();
        let pieces: Vec<&[u8]> = body.as_bytes().chunks(chunk_bytes).collect();
        let mut client = pair.sidecar.connect();
        client.send(chunked_request(GENERATE, &[(PREFILLER, &target)], &pieces));
        client.response().expect(200);
        for leg in [only(&pair.prefill), only(&pair.decode)] {
            assert_eq!(leg.prompt_sha256.as_deref(), Some(&*sha256(ids.as_bytes())));
        }
    }
    assert_eq!(pair.decode.counters().handoff_used, 2);
}

#[test]
fn decode_only_bodies_pass_unmodified() {
    let pair = Pair::start(&[]);
    pair.sidecar.post(CHAT, ODD, &[]).expect(200);
    let seen = only(&pair.decode);
    assert_eq!(text(&seen), ODD);
    assert_eq!(
        seen.framing,
        mock_engine::Framing::ContentLength(ODD.len() as u64)
    );
    pair.decode.clear();
    let pieces: Vec<&[u8]> = ODD.as_bytes().chunks(5).collect();
    let mut client = pair.sidecar.connect();
    client.send(chunked_request(CHAT, &[], &pieces));
    client.response().expect(200);
    let seen = only(&pair.decode);
    assert_eq!(text(&seen), ODD);
    assert_eq!(seen.framing, mock_engine::Framing::Chunked);
}

#[test]
fn all_duplicates_of_a_member_are_edited() {
    let client = r#"{"max_tokens":5,"messages":[],"max_tokens":6,"m\u0061x_tokens":7,"stream":true,"stream":true,"stream_options":{},"stream_options":null}"#;
    let pair = Pair::start(&[]);
    pair.post(CHAT, client).expect(400);
    // The mock engine rejects duplicate members on a prefill leg; only the body it received is
    // checked.
    let sent = text(&only(&pair.prefill));
    assert!(sent.starts_with(
        r#"{"max_tokens":1,"messages":[],"max_tokens":1,"m\u0061x_tokens":1,"stream":false,"stream":false,"#
    ), "{sent}");
    assert!(!sent.contains("stream_options"));
}

#[test]
fn a_member_with_an_escaped_name_is_recognised() {
    let client = r#"{"messages":[],"m\u0061x_tokens":64,"\u0073tream":true}"#;
    let pair = Pair::start(&[]);
    let response = pair.post(CHAT, client).expect(200);
    assert!(response.text().starts_with("data: "));
    let (prefill, decode) = pair.legs();
    let sent = json_of(&prefill);
    assert_eq!(
        (&sent["max_tokens"], &sent["stream"]),
        (&json!(1), &json!(false))
    );
    assert_eq!(text(&prefill).matches("tokens\":").count(), 3);
    assert!(text(&decode).starts_with(client.strip_suffix('}').unwrap()));
}

const FOREIGN: &str =
    r#"{"do_remote_prefill":true,"remote_block_ids":[[1]],"remote_engine_id":"x"}"#;

/// Requests with a client-supplied handoff: the path, the body, and the number of values in the
/// body that the proxy must mask.
fn poisoned() -> Vec<(&'static str, String, usize)> {
    let bad = FOREIGN;
    vec![
        (
            CHAT,
            format!(r#"{{"messages":[],"kv_transfer_params":{bad}}}"#),
            1,
        ),
        (
            CHAT,
            format!(r#"{{"kv_transfer_params":{bad},"messages":[]}}"#),
            1,
        ),
        (
            CHAT,
            format!(r#"{{"messages":[],"ec_transfer_params":{bad}}}"#),
            1,
        ),
        (
            CHAT,
            format!(r#"{{"messages":[],"kv_tr\u0061nsfer_params":{bad}}}"#),
            1,
        ),
        (
            CHAT,
            format!(r#"{{"kv_transfer_params":{bad},"messages":[],"kv_transfer_params":{bad}}}"#),
            2,
        ),
        (
            CHAT,
            format!(
                r#"{{"messages":[],"kv_transfer_params":"text","ec_transfer_params":[{bad}]}}"#
            ),
            2,
        ),
        (
            GENERATE,
            format!(
                r#"{{"token_ids":[1],"sampling_params":{{"max_tokens":4,"extra_args":{{"kv_transfer_params":{bad},"ec_transfer_params":{bad},"x":1}}}}}}"#
            ),
            2,
        ),
    ]
}

/// Returns the values in a request body that an engine would read as handoffs for the KV cache or
/// the encoder cache. Null values are omitted.
fn handoffs_of(seen: &Seen) -> Vec<Value> {
    let body = json_of(seen);
    let extra = &body["sampling_params"]["extra_args"];
    ["kv_transfer_params", "ec_transfer_params"]
        .iter()
        .flat_map(|name| [&body[*name], &extra[*name]])
        .filter(|value| !value.is_null())
        .cloned()
        .collect()
}

#[test]
fn a_client_supplied_handoff_is_masked_in_a_decode_only_body() {
    let pair = Pair::start(&[]);
    for (path, body, values) in poisoned() {
        pair.decode.clear();
        let before = pair
            .sidecar
            .metric("ringside_client_kv_params_masked_total", &[]);
        pair.sidecar.post(path, &body, &[]).expect(200);
        let seen = only(&pair.decode);
        assert_eq!(seen.body.len(), body.len(), "{body}");
        assert_eq!(handoffs_of(&seen), Vec::<Value>::new(), "{body}");
        let blank = format!("null{}", " ".repeat(FOREIGN.len() - 4));
        let want = body
            .replace(&format!("[{FOREIGN}]"), &format!("{blank}  "))
            .replace("\"text\"", "null  ")
            .replace(FOREIGN, &blank);
        assert_eq!(text(&seen), want);
        let masked = pair
            .sidecar
            .metric("ringside_client_kv_params_masked_total", &[])
            - before;
        assert!(
            (masked - values as f64).abs() < 1e-9,
            "{masked} of {values} in {body}"
        );
    }
    assert_eq!(pair.decode.counters().poisoned, 0);
}

/// An engine with `--root-path` has its routes below a prefix, too.
#[test]
fn a_client_supplied_handoff_is_masked_below_any_prefix() {
    let pair = Pair::start(&[]);
    let body = r#"{"messages":[],"kv_transfer_params":{"remote_host":"evil"}}"#;
    for path in [
        "/prefix/v1/chat/completions",
        "/a/b/v1/complet%69ons?x",
        "//v1/messages",
        "/generate",
    ] {
        pair.decode.clear();
        pair.sidecar.post(path, body, &[]).expect(200);
        pair.post(path, body).expect(200);
        for seen in pair.decode.requests() {
            assert!(
                !String::from_utf8_lossy(&seen.body).contains("evil"),
                "{path}"
            );
        }
        assert_eq!(pair.decode.requests().len(), 2);
    }
    assert!(pair.prefill.requests().is_empty());
}

#[test]
fn a_client_supplied_handoff_is_masked_in_a_fragmented_body() {
    let pair = Pair::start(&[]);
    for (path, body, _) in poisoned() {
        // Split the body at several offsets, including some inside the name or the value.
        for at in [1, body.len() / 3, body.len() / 2, body.len() - 12] {
            pair.decode.clear();
            let (head, tail) = body.as_bytes().split_at(at);
            let mut client = pair.sidecar.connect();
            let mut bytes = crate::client::head("POST", path, &[]);
            bytes.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
            client.send(bytes);
            for piece in [head, tail] {
                client.send(format!("{:x}\r\n", piece.len()));
                client.send(piece);
                client.send("\r\n");
            }
            client.send("0\r\n\r\n");
            client.response().expect(200);
            let seen = only(&pair.decode);
            assert_eq!(seen.body.len(), body.len());
            assert_eq!(handoffs_of(&seen), Vec::<Value>::new(), "{body} at {at}");
        }
        let mut bytes = Vec::new();
        for at in 0..body.len() {
            bytes.push(&body.as_bytes()[at..=at]);
        }
        pair.decode.clear();
        let mut client = pair.sidecar.connect();
        client.send(chunked_request(path, &[], &bytes));
        client.response().expect(200);
        let seen = only(&pair.decode);
        assert_eq!(seen.body.len(), body.len());
        assert_eq!(handoffs_of(&seen), Vec::<Value>::new(), "{body}");
    }
}

#[test]
fn a_client_supplied_handoff_is_masked_in_a_long_body() {
    let prompt = json!(["x".repeat(300_000)]).to_string();
    let bodies = [
        format!(r#"{{"messages":{prompt},"kv_transfer_params":{FOREIGN},"z":1}}"#),
        format!(r#"{{"kv_transfer_params":{FOREIGN},"messages":{prompt},"z":1}}"#),
        format!(
            r#"{{"kv_transfer_params":{FOREIGN},"messages":{prompt},"kv_transfer_params":{FOREIGN}}}"#
        ),
        format!(r#"{{"messages":{prompt},"kv_transfer_params":[{prompt}]}}"#),
    ];
    let pair = Pair::start(&[]);
    for body in &bodies {
        for chunk_bytes in [0, 997, 64 * 1024] {
            pair.decode.clear();
            let mut client = pair.sidecar.connect();
            if chunk_bytes == 0 {
                client.send(crate::client::request("POST", CHAT, &[], body.as_bytes()));
            } else {
                let pieces: Vec<&[u8]> = body.as_bytes().chunks(chunk_bytes).collect();
                client.send(chunked_request(CHAT, &[], &pieces));
            }
            client.response().expect(200);
            let seen = only(&pair.decode);
            assert_eq!(seen.body.len(), body.len());
            assert_eq!(handoffs_of(&seen), Vec::<Value>::new());
            let hash = sha256(prompt.as_bytes());
            assert_eq!(seen.prompt_sha256.as_deref(), Some(&*hash));
        }
    }
}

#[test]
fn a_client_supplied_handoff_is_sent_with_neither_leg() {
    for (path, body, _) in poisoned() {
        let pair = Pair::start(&[]);
        let response = pair.post(path, &body);
        let duplicate = body.matches("transfer_params").count() > 1 && path == CHAT;
        let decoded = pair.decode.requests();
        for seen in pair.prefill.requests().iter().chain(&decoded) {
            assert!(!text(seen).contains(FOREIGN), "{}", text(seen));
            assert!(!text(seen).contains("\"text\""));
        }
        if !duplicate {
            response.expect(200);
            let (_, decode) = pair.legs();
            assert_eq!(handoffs_of(&decode).len(), 1);
        }
    }
}

#[test]
fn requests_that_one_handoff_cannot_serve_are_decode_only() {
    for (path, body, reason) in [
        (CHAT, json!({"messages": [], "n": 2}), "several_choices"),
        (
            "/v1/completions",
            json!({"prompt": "x", "n": 3}),
            "several_choices",
        ),
        (
            "/v1/completions",
            json!({"prompt": "x", "best_of": 2}),
            "best_of",
        ),
        (
            "/v1/completions",
            json!({"prompt": ["a", "b"]}),
            "several_prompts",
        ),
        (
            "/v1/completions",
            json!({"prompt": [[1, 2], [3]]}),
            "several_prompts",
        ),
        (
            GENERATE,
            json!({"token_ids": [1], "sampling_params": {"n": 2}}),
            "several_choices",
        ),
        (
            GENERATE,
            json!({"token_ids": [1], "sampling_params": {"prompt_logprobs": 0}}),
            "prompt_logprobs",
        ),
        (
            CHAT,
            json!({"messages": [], "prompt_logprobs": 1}),
            "prompt_logprobs",
        ),
        (
            "/v1/completions",
            json!({"prompt": "x", "echo": true, "logprobs": 1}),
            "prompt_logprobs",
        ),
        (
            "/invocations",
            json!({"prompt": ["a", "b"]}),
            "several_prompts",
        ),
    ] {
        let pair = Pair::start(&[]);
        let body = body.to_string();
        pair.post(path, &body).expect(200);
        assert!(pair.prefill.requests().is_empty(), "{body}");
        assert_eq!(text(&only(&pair.decode)), body);
        pair.sidecar.wait_outcome("local_policy", reason);
    }
}

#[test]
fn invocations_of_an_unknown_shape_are_decode_only() {
    let pair = Pair::start(&[]);
    let response = pair.post("/invocations", r#"{"input":"x"}"#);
    assert_eq!(response.status, 400, "the engine rejects the unknown shape");
    assert_eq!(response.header("x-ringside-error"), None);
    assert!(pair.prefill.requests().is_empty());
    assert_eq!(pair.decode.requests().len(), 1);
    pair.sidecar.wait_outcome("local_policy", "unknown_shape");
}

#[test]
fn pipelined_requests_get_their_responses_in_order() {
    let pair = Pair::start(&[]);
    let target = pair.prefill.host_port();
    let mut client: Client = pair.sidecar.connect();
    let mut bytes = Vec::new();
    for nth in 0..6 {
        let body = format!(
            r#"{{"messages":["{nth}"],"max_tokens":2,"stream":{}}}"#,
            nth == 2
        );
        let routing = [(PREFILLER, target.as_str()), ("x-request-id", "p")];
        let headers = if nth % 2 == 0 {
            &routing[..]
        } else {
            &routing[1..]
        };
        bytes.extend(crate::client::request(
            "POST",
            CHAT,
            headers,
            body.as_bytes(),
        ));
        bytes.extend(crate::client::request("GET", "/health", &[], b""));
        bytes.extend(chunked_request("/echo", &[], &[format!("{nth}")]));
    }
    client.send(bytes);
    let responses: Vec<Response> = (0..18).map(|_| client.response().expect(200)).collect();
    for nth in 0..6 {
        let prompt = format!(r#"["{nth}"]"#);
        let words = mock_engine::expected_text(&sha256(prompt.as_bytes()), 2);
        let said = responses[nth * 3].text();
        let first = words.split_whitespace().next().unwrap();
        assert!(said.contains(first), "{first} in {said}");
        assert!(responses[nth * 3 + 1].body.is_empty());
        let echoed = responses[nth * 3 + 2].json();
        assert_eq!(echoed["body_sha256"], sha256(nth.to_string().as_bytes()));
    }
}
