//! Bodies: scanned, planned as a prefill and a decode leg, and laid out for vectored writes.

use std::hint::black_box;
use std::io::IoSlice;

use criterion::{Criterion, Throughput};
use ringside::json::{Document, JsonError, Scanner};
use ringside::limits::{RECEIVE_LARGE_BYTES, SEND_SLICES_MAX};
use ringside::pd::nixlv2::{self, WATCH};
use ringside::pd::{Api, Plan};

const HANDOFF: &[u8] = br#"{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1,2,3,4]],"remote_engine_id":"5f4dcc3b-5aa7-65d6-1d83-27deb882cf99","remote_host":"10.4.0.7","remote_port":5600,"tp_size":8}"#;

struct Case {
    name: &'static str,
    api: Api,
    body: Vec<u8>,
}

fn cases() -> [Case; 7] {
    let case = |name, api, body| Case { name, api, body };
    [
        case("text/1KiB", Api::Completions, prompt(1 << 10, TEXT)),
        case("text/32KiB", Api::Completions, prompt(32 << 10, TEXT)),
        case("text/1MiB", Api::Completions, prompt(1 << 20, TEXT)),
        case("source/1MiB", Api::Completions, prompt(1 << 20, SOURCE)),
        case("tokens/32KiB", Api::Completions, tokens(32 << 10)),
        case("tokens/1MiB", Api::Completions, tokens(1 << 20)),
        case("chat/32KiB", Api::Chat, chat(32 << 10)),
    ]
}

const TEXT: &str = "The quick brown fox jumps over the lazy dog, again and again. ";
/// Dense with escapes, as source code in a prompt is.
const SOURCE: &str = r#"fn main() {\n\tprintln!(\"{}\", \"hello\\n\");\n}\n"#;

/// What stands behind the long part: the members that matter come last, which is the worst case.
const TAIL: &str =
    r#","max_tokens":256,"temperature":0.7,"stream":true,"stream_options":{"include_usage":true}}"#;

fn prompt(len: usize, text: &str) -> Vec<u8> {
    let mut body = String::from(r#"{"model":"m","prompt":""#);
    while body.len() + TAIL.len() < len {
        body.push_str(text);
    }
    body.push('"');
    body.push_str(TAIL);
    body.into_bytes()
}

fn tokens(len: usize) -> Vec<u8> {
    let mut body = String::from(r#"{"model":"m","prompt":["#);
    let mut token: u32 = 1;
    while body.len() + TAIL.len() < len {
        token = token.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        body.push_str(&(token % 128_000).to_string());
        body.push(',');
    }
    body.push('1');
    body.push(']');
    body.push_str(TAIL);
    body.into_bytes()
}

fn chat(len: usize) -> Vec<u8> {
    let mut body = String::from(r#"{"model":"m","messages":["#);
    while body.len() + TAIL.len() < len {
        body.push_str(r#"{"role":"user","content":"How do I sort a list?\nIn place."},"#);
        body.push_str(r#"{"role":"assistant","content":"Call \"sort\" on it."},"#);
    }
    body.pop();
    body.push(']');
    body.push_str(TAIL);
    body.into_bytes()
}

/// In pieces as large as one receive.
fn scan(body: &[u8]) -> Result<Document, JsonError> {
    let mut scanner = Scanner::new(WATCH);
    for piece in body.chunks(RECEIVE_LARGE_BYTES) {
        scanner.feed(piece)?;
    }
    scanner.finish()
}

/// Everything between the last byte of a body and the two vectored writes.
fn split(api: Api, body: &[u8]) -> Option<usize> {
    let document = scan(body).ok()?;
    let Plan::Split(prefill) = nixlv2::plan(api, &document, body).ok()? else {
        return None;
    };
    let decode = nixlv2::decode_leg(api, &document, Some(HANDOFF)).ok()?;
    let mut slices = [IoSlice::new(&[]); SEND_SLICES_MAX];
    let first = prefill.body.fill(body, 0, &mut slices);
    let second = decode.body.fill(body, 0, &mut slices);
    black_box(&slices);
    Some(first + second)
}

pub(crate) fn bench(criterion: &mut Criterion) {
    for work in ["scan", "split"] {
        let mut group = criterion.benchmark_group(format!("json/{work}"));
        for Case { name, api, body } in cases() {
            assert!(split(api, &body).is_some(), "{name} is not split");
            group.throughput(Throughput::Bytes(body.len() as u64));
            group.bench_function(name, |bencher| {
                if work == "scan" {
                    bencher.iter(|| scan(black_box(&body)));
                } else {
                    bencher.iter(|| split(api, black_box(&body)));
                }
            });
        }
        group.finish();
    }
}
