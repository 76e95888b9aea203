//! Checks that relaying a chunk allocates no memory.
//!
//! This is a separate binary with a single test: the allocator counts for the whole process, so
//! tests running in other threads would be counted too.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "test helpers panic on failure, as tests do"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use ringside::cli::{self, Command};
use ringside::control;
use ringside::h1::{BodyMeter, Chunked, DataLines, Framing, LinePart, chunk_line};
use ringside::json::transform::{PromptUsage, ResponseEdit, ResponseForm, Transforms, UsageShape};

struct Counting;

thread_local! {
    /// Number of allocations by the current thread. Counted per thread, because the test harness
    /// runs further threads.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

/// Number of allocations by all threads of this process, including those of the sidecar under test.
static OF_ALL: AtomicUsize = AtomicUsize::new(0);

fn count() {
    OF_ALL.fetch_add(1, Ordering::Relaxed);
    // Fails only while the thread exits, when the thread-local has already been destroyed.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: every call is forwarded to the system allocator with unchanged arguments.
#[expect(unsafe_code, reason = "`GlobalAlloc` is an unsafe trait")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller upholds the contract of `GlobalAlloc`, and `System` has the same
        // contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract of `GlobalAlloc`, and `System` has the same
        // contract.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: the caller upholds the contract of `GlobalAlloc`, and `System` has the same
        // contract.
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
    framing_and_rewriting();
    for split in [false, true] {
        relaying(split);
    }
}

fn framing_and_rewriting() {
    assert!(
        allocations_of(|| drop(Box::new(1))) == 1,
        "allocations are not counted"
    );
    let chunks = [as_chunk(EVENT), as_chunk(USAGE)];

    let mut verifier = Chunked::new();
    let mut meter = BodyMeter::new(Framing::Chunked);
    let mut lines = DataLines::default();
    let untouched = allocations_of(|| {
        for _ in 0..100 {
            for chunk in &chunks {
                assert_eq!(verifier.verify(chunk), Ok(chunk.len()));
                assert_eq!(meter.take(chunk), Ok(chunk.len()));
                let mut at = 0;
                let mut ended = 0;
                while let Some(part) = lines.next(EVENT, &mut at) {
                    ended += u32::from(part == LinePart::End { is_data: true });
                }
                assert!(ended == 1);
            }
        }
    });
    assert_eq!(untouched, 0);

    let usage = PromptUsage {
        cached: 4321,
        created: Some(5),
        other: Some(6),
    };
    for shape in [
        UsageShape::Chat,
        UsageShape::Responses,
        UsageShape::Messages,
    ] {
        let mut meter = BodyMeter::new(Framing::Chunked);
        let mut rewriter = Transforms::new(
            ResponseForm::Sse,
            ResponseEdit::usage(shape, &usage).into_iter().collect(),
        );
        let mut out = Vec::with_capacity(1024);
        // A chunk that arrives in two parts, split at any offset, does not allocate either.
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

/// Number of chunks relayed while allocations are counted. Other threads of the process may
/// allocate a little, so the test allows fewer than one allocation per ten chunks.
const CHUNKS: usize = 2000;

/// Reads once from `stream` and returns the number of bytes, which is 0 at the end of the
/// connection. Retries if a signal interrupts the call.
fn read(stream: &mut TcpStream, into: &mut [u8]) -> usize {
    loop {
        match stream.read(into) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            read => return read.unwrap(),
        }
    }
}

/// Reads a request up to the end of its body.
fn take_request(stream: &mut TcpStream) {
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let n = read(stream, &mut piece);
        assert!(n > 0, "the request was truncated");
        bytes.extend_from_slice(&piece[..n]);
        // Every body sent to these engines ends with `}`.
        if bytes.ends_with(b"}") {
            return;
        }
    }
}

/// Starts two engines and returns their ports. The prefill engine responds to one request; the
/// decode engine sends one chunk of its stream per message from `requested`, without allocating.
fn engines(requested: mpsc::Receiver<()>) -> (u16, u16) {
    let prefill = TcpListener::bind("127.0.0.1:0").unwrap();
    let decode = TcpListener::bind("127.0.0.1:0").unwrap();
    let ports = (
        prefill.local_addr().unwrap().port(),
        decode.local_addr().unwrap().port(),
    );
    thread::spawn(move || {
        let (mut stream, _) = prefill.accept().unwrap();
        take_request(&mut stream);
        let body = r#"{"kv_transfer_params":{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[[1]],"remote_engine_id":"e","remote_host":"h","remote_port":1},"usage":{"prompt_tokens_details":{"cached_tokens":7}}}"#;
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
        stream.write_all((head + body).as_bytes()).unwrap();
        // Keep the connection open while the decode engine streams.
        thread::park();
    });
    thread::spawn(move || {
        let (mut stream, _) = decode.accept().unwrap();
        take_request(&mut stream);
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
        stream.write_all(head.as_bytes()).unwrap();
        stream.set_nodelay(true).unwrap();
        let chunk = as_chunk(EVENT);
        while requested.recv().is_ok() {
            stream.write_all(&chunk).unwrap();
        }
    });
    ports
}

/// Relays a stream through a sidecar in this process, sending each chunk after the client has
/// received the previous one. Fails if one or more allocations per ten chunks are counted. With
/// `split`, the request names the prefill engine; otherwise it is decode-only.
fn relaying(split: bool) {
    let (request_chunk, requested) = mpsc::channel();
    let (prefill, decode) = engines(requested);
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let args = format!(
        "ringside sidecar --host=127.0.0.1 --port={port} --model-server-host=127.0.0.1 \
         --model-server-port={decode} --secure-proxy=false --admin-address=off \
         --check-handoff-versions=false"
    );
    let args = args.split_whitespace().map(Into::into);
    let Ok(Command::Proxy(config, _)) = cli::parse_with(args, &|_| None) else {
        panic!("the flags are valid");
    };
    let control = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut running = control.block_on(control::start(*config)).unwrap();
    let mut client = TcpStream::connect(("127.0.0.1", port)).unwrap();
    client
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let routing = if split {
        format!("x-prefiller-host-port: 127.0.0.1:{prefill}\r\n")
    } else {
        String::new()
    };
    let body = r#"{"model":"m","messages":[],"stream":true}"#;
    let request = format!(
        "POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\n{routing}content-length: {}\r\n\r\n{body}",
        body.len()
    );
    client.write_all(request.as_bytes()).unwrap();
    let chunk = as_chunk(EVENT);
    let mut got = vec![0; 4096];
    let mut before = 0;
    for nth in 0..CHUNKS + 100 {
        if nth == 100 {
            before = OF_ALL.load(Ordering::Relaxed);
        }
        request_chunk.send(()).unwrap();
        let mut seen = 0;
        // The response head precedes the first chunk.
        while !got[..seen].ends_with(&chunk) {
            let n = read(&mut client, &mut got[seen..]);
            assert!(n > 0, "the stream was truncated");
            seen += n;
        }
    }
    let allocations = OF_ALL.load(Ordering::Relaxed) - before;
    assert!(
        allocations < CHUNKS / 10,
        "{allocations} allocations for {CHUNKS} chunks, split: {split}"
    );
    drop(client);
    control.block_on(running.drain(Duration::ZERO, Some(Duration::from_secs(10))));
}
