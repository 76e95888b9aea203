//! Benchmarks of the processing per head, body and chunk, without sockets:
//! `cargo bench --bench micro`. Append `-- json/scan` to run only the benchmarks whose names match.
//!
//! All benchmarks are in one binary, because linking dominates the compile time of a benchmark.

mod allow;
mod chunk;
mod head;
mod json;
mod sse;

use std::time::Duration;

use criterion::Criterion;

fn main() {
    // Short runs, because figures are only compared within one run, and longer measurements were
    // not more stable on a shared machine.
    let mut criterion = Criterion::default()
        .sample_size(50)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    allow::bench(&mut criterion);
    head::bench(&mut criterion);
    json::bench(&mut criterion);
    chunk::bench(&mut criterion);
    sse::bench(&mut criterion);
    criterion.final_summary();
}

/// Returns one event of a chat completion stream, which is 200 bytes long as a chunk.
fn chat_event() -> Vec<u8> {
    let mut event = Vec::from(
        br#"data: {"id":"chatcmpl-6f1c","object":"chat.completion.chunk","created":1763630000,"model":"m","choices":[{"index":0,"delta":{"content":" token"},"finish_reason":null}]"#,
    );
    // 194 bytes, and 6 of chunk framing.
    event.resize(194 - 3, b' ');
    event.extend_from_slice(b"}\n\n");
    event
}

/// Returns the same event as one chunk of a chunked body.
fn chat_chunk() -> Vec<u8> {
    [b"c2\r\n", &chat_event()[..], b"\r\n"].concat()
}
