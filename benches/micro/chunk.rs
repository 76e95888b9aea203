//! Processing of one received chunk of 200 bytes in the relay, without sockets.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use ringside::h1::{BodyMeter, Chunked, Framing, chunk_line};
use ringside::json::transform::{PromptUsage, ResponseEdit, ResponseForm, Transforms, UsageShape};

pub(crate) fn bench(criterion: &mut Criterion) {
    let chunk = super::chat_chunk();
    let mut group = criterion.benchmark_group("chunk");
    group.throughput(Throughput::Bytes(chunk.len() as u64));

    let mut chunked = Chunked::new();
    group.bench_function("verify", |bencher| {
        bencher.iter(|| chunked.verify(black_box(&chunk)));
    });

    let mut meter = BodyMeter::new(Framing::Chunked);
    group.bench_function("take", |bencher| {
        bencher.iter(|| meter.take(black_box(&chunk)));
    });

    let mut out = Vec::with_capacity(1024);
    let mut meter = BodyMeter::new(Framing::Chunked);
    let usage = PromptUsage {
        cached: 4321,
        ..PromptUsage::NONE
    };
    let mut rewriter = Transforms::new(
        ResponseForm::Sse,
        ResponseEdit::usage(UsageShape::Chat, &usage)
            .into_iter()
            .collect(),
    );
    group.bench_function("rewrite", |bencher| {
        bencher.iter(|| {
            let received = black_box(&chunk[..]);
            out.clear();
            let taken = meter.decode(received, |span| {
                rewriter.feed(span.of(received), &mut |piece| out.extend_from_slice(piece));
            });
            let line = chunk_line(out.len());
            out.splice(0..0, line.iter().copied());
            out.extend_from_slice(b"\r\n");
            black_box(&out);
            taken
        });
    });
    group.finish();
}
