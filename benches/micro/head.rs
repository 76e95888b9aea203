//! Heads: parsing, framing and writing for the next hop.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use ringside::h1::{
    Field, HopFilter, Method, RequestHead, ResponseHead, drop_field, expects_continue, push_field,
    push_request_line, push_status_line, request_framing, request_keeps_alive, response_framing,
    response_keeps_alive,
};

/// A request of an OpenAI client through a gateway, about 400 bytes.
const REQUEST: &[u8] = b"POST /v1/chat/completions HTTP/1.1\r\n\
Host: inference.example.internal:8000\r\n\
Accept: application/json\r\n\
Accept-Encoding: gzip, deflate\r\n\
Content-Type: application/json\r\n\
User-Agent: OpenAI/Python 1.54.0\r\n\
Authorization: Bearer sk-0123456789abcdef0123456789abcd\r\n\
X-Request-Id: 6f1c2d3e-4a5b-6c7d-8e9f-0a1b2c3d4e5f\r\n\
x-prefiller-host-port: 10.4.0.7:8000\r\n\
Connection: keep-alive\r\n\
Content-Length: 1234\r\n\r\n";

/// The response head of a stream from uvicorn, about 200 bytes.
const RESPONSE: &[u8] = b"HTTP/1.1 200 OK\r\n\
date: Fri, 20 Nov 2026 10:00:00 GMT\r\n\
server: uvicorn\r\n\
content-type: text/event-stream; charset=utf-8\r\n\
x-request-id: 6f1c2d3e-4a5b\r\n\
cache-control: no-cache\r\n\
transfer-encoding: chunked\r\n\r\n";

fn push_fields(out: &mut Vec<u8>, fields: &[Field], bytes: &[u8], filter: &HopFilter) {
    for field in fields {
        if !drop_field(field, bytes, filter) {
            push_field(out, field.name.of(bytes), field.value.of(bytes));
        }
    }
    push_field(
        out,
        b"x-request-id",
        b"6f1c2d3e-4a5b-6c7d-8e9f-0a1b2c3d4e5f",
    );
    out.extend_from_slice(b"\r\n");
}

fn request(head: &mut RequestHead, bytes: &[u8], out: &mut Vec<u8>) {
    head.reset();
    assert_eq!(head.parse(bytes), Ok(true));
    assert!(request_framing(head, bytes).is_ok() && expects_continue(head, bytes) == Ok(false));
    black_box(request_keeps_alive(head, bytes));
    let Ok(filter) = HopFilter::new(&head.fields, bytes) else {
        return;
    };
    out.clear();
    push_request_line(out, head.method_span.of(bytes), head.target.of(bytes));
    push_fields(out, &head.fields, bytes, &filter);
}

fn response(head: &mut ResponseHead, bytes: &[u8], out: &mut Vec<u8>) {
    head.reset();
    assert_eq!(head.parse(bytes), Ok(true));
    let (Ok(framing), Ok(filter)) = (
        response_framing(Method::Post, head, bytes),
        HopFilter::new(&head.fields, bytes),
    ) else {
        return;
    };
    black_box(response_keeps_alive(head, bytes, framing));
    out.clear();
    push_status_line(out, head.status, head.reason.of(bytes));
    push_fields(out, &head.fields, bytes, &filter);
}

pub(crate) fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("head");
    let mut out = Vec::with_capacity(1024);

    let mut head = RequestHead::default();
    group.throughput(Throughput::Bytes(REQUEST.len() as u64));
    group.bench_function("request/parse", |bencher| {
        bencher.iter(|| {
            head.reset();
            head.parse(black_box(REQUEST))
        });
    });
    group.bench_function("request/rewrite", |bencher| {
        bencher.iter(|| request(&mut head, black_box(REQUEST), black_box(&mut out)));
    });

    let mut head = ResponseHead::default();
    group.throughput(Throughput::Bytes(RESPONSE.len() as u64));
    group.bench_function("response/parse", |bencher| {
        bencher.iter(|| {
            head.reset();
            head.parse(black_box(RESPONSE))
        });
    });
    group.bench_function("response/rewrite", |bencher| {
        bencher.iter(|| response(&mut head, black_box(RESPONSE), black_box(&mut out)));
    });
    group.finish();
}
