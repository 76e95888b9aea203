//! JSON bodies: scanning a request body, planning its prefill and decode legs up to the vectored
//! writes, masking it, and extracting the handoff from a prefill response. For comparison, the full
//! parse of the same bodies by `simd-json`.

use std::hint::black_box;
use std::io::IoSlice;
use std::rc::Rc;

use criterion::{BatchSize, Criterion, Throughput};
use ringside::api::Api;
use ringside::budget::{Budget, Kept};
use ringside::fleet::Target;
use ringside::json::{Document, Handoff, JsonError, Level, Mask, PrefillResponse, Scanner, Watch};
use ringside::limits::{RECEIVE_LARGE_BYTES, SEND_SLICES_MAX};
use ringside::pd::connector::KvConnector;
use ringside::pd::options::MoriConfig;
use ringside::pd::request::{CLIENT_OWNED_KV, WATCH};
use ringside::pd::{PdRequest, Peer, Uuid, connector};
use simd_json::Buffers;

const HANDOFF: &[u8] = br#"{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1,2,3,4]],"remote_engine_id":"5f4dcc3b-5aa7-65d6-1d83-27deb882cf99","remote_host":"10.4.0.7","remote_port":5600,"tp_size":8}"#;

struct Case {
    name: String,
    api: Api,
    body: Vec<u8>,
}

fn cases() -> Vec<Case> {
    let mut cases = vec![Case {
        name: String::from("text/1KiB"),
        api: Api::Completions,
        body: prompt(1 << 10, TEXT),
    }];
    for (size, len) in [("32KiB", 32 << 10), ("1MiB", 1 << 20)] {
        for (name, api, body) in [
            ("text", Api::Completions, prompt(len, TEXT)),
            ("source", Api::Completions, prompt(len, SOURCE)),
            ("tokens", Api::Completions, tokens(len)),
            ("chat", Api::Chat, chat(len, CHAT)),
            ("escaped", Api::Chat, chat(len, ESCAPED)),
        ] {
            let name = format!("{name}/{size}");
            cases.push(Case { name, api, body });
        }
    }
    cases
}

const TEXT: &str = "The quick brown fox jumps over the lazy dog, again and again. ";
/// Text with many escapes, like source code in a prompt.
const SOURCE: &str = r#"fn main() {\n\tprintln!(\"{}\", \"hello\\n\");\n}\n"#;

/// The end of each body. The watched members are at the end, which is the worst case.
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

/// The shortest realistic messages, with brackets and quotes in every block of 64 bytes.
const CHAT: &str = concat!(
    r#"{"role":"user","content":"How do I sort a list?\nIn place."},"#,
    r#"{"role":"assistant","content":"Call \"sort\" on it."},"#,
);
/// Short messages whose texts are mostly escapes: quoted JSON, paths, runs of backslashes.
const ESCAPED: &str = concat!(
    r#"{"role":"user","content":"{\"path\":\"C:\\\\a\\\\b\",\"re\":\"\\\\\\\\d+\"}\n"},"#,
    r#"{"role":"tool","content":"\"\\\"x\\\"\"\t\\\\\\\\ \"a\": [\"b\", {\"c\": \"\\\\\"}]"},"#,
);

fn chat(len: usize, messages: &str) -> Vec<u8> {
    let mut body = String::from(r#"{"model":"m","messages":["#);
    while body.len() + TAIL.len() < len {
        body.push_str(messages);
    }
    body.pop();
    body.push(']');
    body.push_str(TAIL);
    body.into_bytes()
}

/// Scans `body` in parts of the size of one receive.
fn scan(body: &[u8]) -> Result<Document, JsonError> {
    let mut scanner = Scanner::new(WATCH);
    for piece in body.chunks(RECEIVE_LARGE_BYTES) {
        scanner.feed(piece)?;
    }
    scanner.finish()
}

/// Parses `body` to a tape of values, which no part of the proxy needs. Returns the number of
/// nodes, or `None` if the body is invalid.
fn parse(body: &mut [u8], buffers: &mut Buffers) -> Option<usize> {
    let tape = simd_json::to_tape_with_buffers(body, buffers);
    Some(black_box(tape.ok()?).0.len())
}

/// Scans `body` and builds both legs up to the slices of the two vectored writes.
fn split(api: Api, body: &[u8]) -> Option<usize> {
    let document = scan(body).ok()?;
    let mori = MoriConfig::default();
    let request = PdRequest {
        api,
        document: &document,
        body,
        uuid: Uuid::v4([1, 2]),
        owned: CLIENT_OWNED_KV,
        encoded: None,
        mori: &mori,
        hosts: &mori.hosts,
        atom_dp_size: 1,
        chunk: None,
    };
    let peer = Peer {
        target: Target::parse(b"10.4.0.7:8000").ok()?,
        p2p_port: 7777,
        bootstrap_port: 8998,
        engine: None,
        source: None,
    };
    let connector = connector::connector(KvConnector::Nixlv2, &mori);
    if connector::keep_local(connector, &request).is_some() {
        return None;
    }
    let prefill = connector.prefill_leg(&request, &peer).ok()?;
    let kept = Kept::of(&Budget::new(64 << 10), &[HANDOFF]).ok()?;
    let kept = Rc::new(kept);
    let decode = connector.decode_leg(&request, &peer, Some(&kept)).ok()?;
    let mut slices = [IoSlice::new(&[]); SEND_SLICES_MAX];
    let first = prefill.body.fill(body, 0, &mut slices);
    let second = decode.body.fill(body, 0, &mut slices);
    black_box(&slices);
    Some(first + second)
}

/// The members that a decode-only body must not contain.
const MASKED: Watch = &[
    (Level::Top, "kv_transfer_params"),
    (Level::ExtraArgs, "kv_transfer_params"),
    (Level::Xargs, "kv_transfer_params"),
];

fn mask(body: &mut [u8]) -> Result<u32, JsonError> {
    let mut mask = Mask::new(MASKED);
    for piece in body.chunks_mut(RECEIVE_LARGE_BYTES) {
        mask.feed(piece)?;
    }
    mask.finish()?;
    Ok(mask.masked())
}

/// Returns a prefill response that echoes a prompt of token ids before the handoff.
fn prefill_response(len: usize) -> Vec<u8> {
    let mut response = tokens(len);
    response.pop();
    response.extend_from_slice(br#","kv_transfer_params":"#);
    response.extend_from_slice(HANDOFF);
    response.push(b'}');
    response
}

/// Returns a prefill response whose handoff lists `blocks` KV blocks.
fn blocks_response(blocks: usize) -> Vec<u8> {
    let ids: Vec<String> = (0..blocks)
        .map(|nth| (nth * 37 % 60_000).to_string())
        .collect();
    let ids = ids.join(",");
    format!(r#"{{"choices":[],"kv_transfer_params":{{"remote_block_ids":[[{ids}]]}}}}"#).into()
}

fn read_response(response: &[u8]) -> Result<Handoff, JsonError> {
    let mut reader = PrefillResponse::new(64 << 10, &Budget::new(64 << 10));
    for piece in response.chunks(RECEIVE_LARGE_BYTES) {
        reader.feed(piece)?;
    }
    reader.finish()
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
    let mut group = criterion.benchmark_group("json/simd-json");
    for Case { name, body, .. } in cases() {
        group.throughput(Throughput::Bytes(body.len() as u64));
        let mut buffers = Buffers::new(body.len());
        assert!(parse(&mut body.clone(), &mut buffers).is_some(), "{name}");
        // The parser changes its input. The time for the copy is not included.
        let (copy, size) = (|| body.clone(), BatchSize::LargeInput);
        group.bench_function(name, |bencher| {
            bencher.iter_batched_ref(copy, |body| parse(black_box(body), &mut buffers), size);
        });
    }
    group.finish();
    let mut group = criterion.benchmark_group("json/mask");
    for Case { name, body, .. } in cases() {
        group.throughput(Throughput::Bytes(body.len() as u64));
        // The bodies have no value to overwrite, so every iteration processes the same body.
        let mut body = body;
        assert_eq!(mask(&mut body), Ok(0), "{name} is masked");
        group.bench_function(name, |bencher| bencher.iter(|| mask(black_box(&mut body))));
    }
    group.finish();
    let mut group = criterion.benchmark_group("json/response");
    let responses = [
        ("1KiB", prefill_response(1 << 10)),
        ("1MiB", prefill_response(1 << 20)),
        ("4096 blocks", blocks_response(4096)),
    ];
    for (name, response) in responses {
        assert!(read_response(&response).is_ok(), "{name} is not read");
        group.throughput(Throughput::Bytes(response.len() as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| read_response(black_box(&response)));
        });
    }
    group.finish();
}
