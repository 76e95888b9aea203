//! What a relayed chunk costs in memory: nothing.
//!
//! A binary of its own, because the allocator counts for the whole process, and a single test,
//! because threads of others would be counted along.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use ringside::h1::{BodyMeter, Chunked, Framing, SseEvents, chunk_line};
use ringside::json::{AnswerForm, UsageRewriter, UsageShape};

struct Counting;

thread_local! {
    /// Allocations of this thread; the test harness has threads of its own.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    // Refused only while a thread ends.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: every call goes to the system's allocator with the arguments it came with.
#[expect(unsafe_code, reason = "an allocator cannot be written without")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's duties are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's duties are passed on.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's duties are passed on.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations_of(work: impl FnOnce()) -> usize {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

const EVENT: &[u8] =
    b"data: {\"id\":\"c\",\"choices\":[{\"index\":0,\"delta\":{\"content\":\" token\"}}]}\n\n";
const USAGE: &[u8] = b"data: {\"id\":\"c\",\"choices\":[],\"usage\":{\"prompt_tokens\":9,\
\"prompt_tokens_details\":{\"cached_tokens\":9}}}\n\n";

fn as_chunk(payload: &[u8]) -> Vec<u8> {
    let line = format!("{:x}\r\n", payload.len());
    [line.as_bytes(), payload, b"\r\n"].concat()
}

#[test]
fn a_relayed_chunk_allocates_nothing() {
    assert!(
        allocations_of(|| drop(Box::new(1))) == 1,
        "the allocator counts"
    );
    let chunks = [as_chunk(EVENT), as_chunk(USAGE)];

    let mut verifier = Chunked::new();
    let mut meter = BodyMeter::new(Framing::Chunked);
    let mut events = SseEvents::new();
    let untouched = allocations_of(|| {
        for _ in 0..100 {
            for chunk in &chunks {
                assert_eq!(verifier.verify(chunk), Ok(chunk.len()));
                assert_eq!(meter.take(chunk), Ok(chunk.len()));
                assert!(events.feed(EVENT) == 1);
            }
        }
    });
    assert_eq!(untouched, 0);

    for shape in [UsageShape::Chat, UsageShape::Responses] {
        let mut meter = BodyMeter::new(Framing::Chunked);
        let mut rewriter = UsageRewriter::new(AnswerForm::Sse, shape, 4321);
        let mut out = Vec::with_capacity(1024);
        // Also when a chunk arrives in two parts, cut anywhere.
        let rewritten = allocations_of(|| {
            for cut in 0..chunks[0].len() {
                for chunk in &chunks {
                    out.clear();
                    let (first, second) = chunk.split_at(cut);
                    for part in [first, second] {
                        let taken = meter.decode(part, |span| {
                            rewriter.feed(span.of(part), &mut |piece| out.extend_from_slice(piece));
                        });
                        assert_eq!(taken, Ok(part.len()));
                    }
                    let line = chunk_line(out.len());
                    out.splice(0..0, line.iter().copied());
                }
            }
        });
        assert!(rewriter.rewritten() > 0);
        assert_eq!(rewritten, 0, "{shape:?}");
    }
}
