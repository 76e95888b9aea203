//! Event streams: counting events and rewriting the cached-token count.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use ringside::h1::DataLines;
use ringside::json::transform::{PromptUsage, ResponseEdit, ResponseForm, Transforms, UsageShape};

/// The event of a chat completion stream that contains `usage`.
const USAGE: &[u8] = b"data: {\"id\":\"chatcmpl-6f1c\",\"object\":\"chat.completion.chunk\",\"created\":1763630000,\"model\":\"m\",\"choices\":[],\"usage\":{\"prompt_tokens\":5000,\"total_tokens\":5100,\"completion_tokens\":100,\"prompt_tokens_details\":{\"cached_tokens\":4999}}}\n\n";

pub(crate) fn bench(criterion: &mut Criterion) {
    let event = super::chat_event();
    // Sixteen events that arrive in one receive.
    let burst = event.repeat(16);
    let mut group = criterion.benchmark_group("sse");
    for (name, bytes) in [
        ("event", &event),
        ("burst", &burst),
        ("usage", &USAGE.to_vec()),
    ] {
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        let mut lines = DataLines::default();
        group.bench_function(format!("lines/{name}"), |bencher| {
            bencher.iter(|| {
                let (bytes, mut at) = (black_box(bytes), 0);
                while let Some(part) = lines.next(bytes, &mut at) {
                    black_box(part);
                }
            });
        });
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
        let mut out = Vec::with_capacity(bytes.len() + 64);
        group.bench_function(format!("rewrite/{name}"), |bencher| {
            bencher.iter(|| {
                out.clear();
                rewriter.feed(black_box(bytes), &mut |piece| out.extend_from_slice(piece));
                black_box(&out);
            });
        });
    }
    group.finish();
}
