//! Forms of the audio paths: transfer parameters from a client reach no engine in these either.

use mock_engine::Seen;

use crate::client::{Response, chunked_request, request};
use crate::harness::{Pair, only};

const PATH: &str = "/v1/audio/transcriptions";
const FORM: (&str, &str) = ("content-type", "multipart/form-data; boundary=----x7");
const EVIL: &str = r#"{"a":1,"kv_transfer_par\u0061ms":"evil-evil","ec_transfer_params":[1,2]}"#;

/// Returns a form with a file and `vllm_xargs`.
fn form(file: &[u8], xargs: &str) -> Vec<u8> {
    let part = |head: &str, value: &[u8]| {
        let head = format!("------x7\r\nContent-Disposition: form-data; {head}\r\n\r\n");
        [head.as_bytes(), value, b"\r\n"].concat()
    };
    [
        part("name=\"model\"", b"m"),
        part("name=\"file\"; filename=\"a.wav\"", file),
        part("name=\"vllm_xargs\"", xargs.as_bytes()),
        b"------x7--\r\n".to_vec(),
    ]
    .concat()
}

/// Sends `body` in one piece or, if `chunk_bytes` is above 0, in chunks of this size.
fn ask(pair: &Pair, fields: &[(&str, &str)], body: &[u8], chunk_bytes: usize) -> Response {
    let mut client = pair.sidecar.connect();
    if chunk_bytes == 0 {
        client.send(request("POST", PATH, fields, body));
    } else {
        let pieces: Vec<&[u8]> = body.chunks(chunk_bytes).collect();
        client.send(chunked_request(PATH, fields, &pieces));
    }
    client.response()
}

fn sent(pair: &Pair, body: &[u8], chunk_bytes: usize) -> Seen {
    pair.decode.clear();
    ask(pair, &[FORM], body, chunk_bytes);
    only(&pair.decode)
}

#[test]
fn transfer_parameters_in_a_form_are_overwritten() {
    let pair = Pair::start(&[]);
    let masked = EVIL
        .replace("\"evil-evil\"", "null       ")
        .replace("[1,2]", "null ");
    for (file, chunk_bytes) in [
        (&b"RIFF\r\n------x"[..], 0),
        (b"RIFF\r\n------x", 1),
        (&[b'\r'; 300_000], 0),
        (&[7; 5_000_000], 0),
        (&[7; 300_000], 4099),
    ] {
        let seen = sent(&pair, &form(file, EVIL), chunk_bytes);
        assert!(
            seen.body == form(file, &masked),
            "{} {chunk_bytes}",
            file.len()
        );
    }
    pair.sidecar
        .wait_metric("ringside_client_kv_params_masked_total", &[], 10.0);
}

#[test]
fn other_bodies_on_the_path_of_a_form_pass_unmodified() {
    let pair = Pair::start(&[]);
    let body = form(b"RIFF", EVIL);
    for kind in [
        "application/octet-stream",
        "multipart/mixed; boundary=----x7",
    ] {
        pair.decode.clear();
        ask(&pair, &[("content-type", kind)], &body, 0);
        assert_eq!(only(&pair.decode).body, body, "{kind}");
    }
    let trusting = Pair::start(&["--trust-client-kv"]);
    assert_eq!(sent(&trusting, &body, 0).body, body);
}

#[test]
fn forms_that_parsers_read_differently_are_refused() {
    let pair = Pair::start(&[]);
    let good = form(b"RIFF", "{}");
    let text = String::from_utf8(good.clone()).unwrap();
    for bad in [
        text.replace("name=\"vllm_xargs\"", "name*=utf-8''vllm_xargs"),
        text.replace("name=\"vllm_xargs\"", "name=x; name=\"vllm_xargs\""),
        text.replace(
            "name=\"vllm_xargs\"",
            "name=x; a=\"\\\\\"; b=\"; name=vllm_xargs; c=\"",
        ),
        text.replace("------x7--", ""),
        format!("x{text}"),
        text.replace("form-data; name=\"m", "form-data;\r\n name=\"m"),
    ] {
        ask(&pair, &[FORM], bad.as_bytes(), 0).expect_error(400, "invalid_form");
    }
    for kind in [
        "multipart/form-data",
        "multipart/form-data; boundary=----x7; charset=utf-16",
        "multipart/form-data; boundary=a; boundary=----x7",
    ] {
        let kind = ("content-type", kind);
        ask(&pair, &[kind], &good, 0).expect_error(400, "invalid_form");
    }
    ask(&pair, &[FORM, ("content-type", "text/plain")], &good, 0).expect_error(400, "invalid_form");
    ask(&pair, &[FORM, ("content-encoding", "gzip")], &good, 0).expect_error(415, "content_coding");
    ask(
        &pair,
        &[FORM],
        &form(b"RIFF", r#"{"kv_transfer_params":7}"#),
        0,
    )
    .expect_error(400, "bad_json");
    assert!(
        pair.decode
            .requests()
            .iter()
            .all(|seen| seen.body.len() < good.len()),
        "no engine has received a whole form"
    );
}
