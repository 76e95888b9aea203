//! Latency of requests and of single chunks through ringside on loopback, with the mock engine and
//! without ringside (`direct`): `cargo bench --bench overhead`. Append `-- plain/1KiB` to run only
//! the benchmarks whose names match.
//!
//! The real program serves the requests, with one shard, as a child process. The client, the
//! engines and ringside share the machine's cores, so a row is the time of one request in sequence,
//! including the wake-ups of four threads; only the differences between rows of one run mean
//! something. CPU time and many connections are measured by `ringside-bench overhead`.

#![expect(clippy::unwrap_used, reason = "a benchmark that fails has no result")]

mod chunks;
mod client;
mod stage;

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use mock_engine::Engine;

use client::Client;
use stage::{Stage, Wire};

/// Sizes of the request bodies, in bytes.
const BODIES: [(&str, usize); 2] = [("1KiB", 1 << 10), ("32KiB", 32 << 10)];

/// Bytes of a body that are not its prompt.
const BODY_FRAME_BYTES: usize = r#"{"model":"mock-model","max_tokens":1,"prompt":""}"#.len();

fn main() {
    let mut criterion = Criterion::default()
        .sample_size(50)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    for wire in [Wire::Plain, Wire::Tls] {
        let stage = Stage::start(wire);
        requests(&mut criterion, &stage);
        one_chunk(&mut criterion, &stage);
    }
    criterion.final_summary();
}

/// Whole requests, each sent after the response to the one before.
fn requests(criterion: &mut Criterion, stage: &Stage) {
    for (size, bytes) in BODIES {
        let mut group = criterion.benchmark_group(format!("{}/{size}", stage.wire.name()));
        for (row, port, prefiller) in [
            ("direct", stage.decoder.port(), None),
            ("pass-through", stage.passing.port, None),
            ("decode-only", stage.inspecting.port, None),
            (
                "prefill-decode",
                stage.inspecting.port,
                Some(&stage.prefiller),
            ),
        ] {
            let field = prefiller.map_or_else(String::new, |engine| {
                format!("x-prefiller-host-port: {}\r\n", engine.host_port())
            });
            let request = request(&field, bytes);
            group.bench_function(BenchmarkId::from_parameter(row), |bencher| {
                let mut client = Client::connect(stage, port);
                // Criterion connects for each sample. The handshake is not part of the time.
                client.exchange(&request);
                let is_split = |engine: &Engine| !engine.requests().is_empty();
                assert!(prefiller.is_none_or(is_split), "no prefill leg");
                bencher.iter_custom(|count| {
                    let begun = Instant::now();
                    for _ in 0..count {
                        client.exchange(&request);
                    }
                    begun.elapsed()
                });
            });
        }
        group.finish();
    }
}

/// One chunk of a stream: from the command to the engine until the client has received it.
fn one_chunk(criterion: &mut Criterion, stage: &Stage) {
    let mut group = criterion.benchmark_group(format!("{}/chunk", stage.wire.name()));
    for (row, port) in [
        ("direct", stage.chunks.port()),
        ("decode-only", stage.streaming.port),
    ] {
        let (request, chunk_bytes) = (request("", BODIES[0].1), chunks::chunk().len());
        group.bench_function(BenchmarkId::from_parameter(row), |bencher| {
            let mut client = Client::connect(stage, port);
            client.begin_stream(&request);
            bencher.iter_custom(|count| {
                let begun = Instant::now();
                for _ in 0..count {
                    stage.chunks.send_one();
                    client.receive_chunk(chunk_bytes);
                }
                begun.elapsed()
            });
            stage.chunks.end_stream();
        });
    }
    group.finish();
}

/// Returns a completion request with a body of `bytes` bytes.
fn request(field: &str, bytes: usize) -> Vec<u8> {
    let prompt = "a".repeat(bytes - BODY_FRAME_BYTES);
    let body = format!(r#"{{"model":"mock-model","max_tokens":1,"prompt":"{prompt}"}}"#);
    format!(
        "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n\
         {field}content-length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}
