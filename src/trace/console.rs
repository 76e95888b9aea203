//! Formats a span as a line of JSON, for the exporter that writes to standard output.

use std::io::Write;

use super::context::put_hex;
use super::span::{Kind, Span, Value};
use crate::metrics::push_text;

/// Appends the span and a line feed to `out`. `service` is the configured service name.
pub fn write(span: &Span, service: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(b"{\"service\":");
    push_text(service.as_bytes(), out);
    out.extend_from_slice(b",\"trace_id\":\"");
    id::<32>(span.trace_id, out);
    out.extend_from_slice(b"\",\"span_id\":\"");
    id::<16>(u128::from(span.span_id), out);
    out.extend_from_slice(b"\",\"parent_id\":");
    if span.parent_id == 0 {
        out.extend_from_slice(b"null");
    } else {
        out.push(b'"');
        id::<16>(u128::from(span.parent_id), out);
        out.push(b'"');
    }
    out.extend_from_slice(b",\"name\":");
    push_text(span.name.as_bytes(), out);
    let kind = match span.kind {
        Kind::Internal => "internal",
        Kind::Server => "server",
        Kind::Client => "client",
    };
    let (begun, ended) = (span.begun_ns, span.ended_ns);
    // Writing to a vector cannot fail.
    drop(write!(
        out,
        ",\"kind\":\"{kind}\",\"start_unix_ns\":{begun},\"end_unix_ns\":{ended},\"error\":"
    ));
    match span.error {
        Some(error) => push_text(error.as_bytes(), out),
        None => out.extend_from_slice(b"null"),
    }
    out.extend_from_slice(b",\"attributes\":{");
    for (nth, (name, value)) in span.attributes.iter().enumerate() {
        if nth > 0 {
            out.push(b',');
        }
        push_text(name.as_bytes(), out);
        out.push(b':');
        match value {
            Value::Text(text) => push_text(text.as_bytes(), out),
            Value::Count(number) | Value::Millis(number) => drop(write!(out, "{number}")),
            Value::Flag(flag) => drop(write!(out, "{flag}")),
        }
    }
    out.extend_from_slice(b"}}\n");
}

fn id<const DIGITS: usize>(id: u128, out: &mut Vec<u8>) {
    let mut digits = [0; DIGITS];
    put_hex(&mut digits, id);
    out.extend_from_slice(&digits);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_formatted_as_one_line() {
        let mut span = Span {
            trace_id: 0xabc,
            span_id: 0x1,
            parent_id: 0,
            name: "decode".into(),
            kind: Kind::Internal,
            begun_ns: 5,
            ended_ns: 7,
            attributes: Vec::new(),
            error: None,
        };
        let line = |span: &Span| {
            let mut out = Vec::new();
            write(span, "s\"", &mut out);
            String::from_utf8(out).unwrap()
        };
        assert_eq!(
            line(&span),
            "{\"service\":\"s\\\"\",\"trace_id\":\"00000000000000000000000000000abc\",\"span_id\":\
             \"0000000000000001\",\"parent_id\":null,\"name\":\"decode\",\"kind\":\"internal\",\
             \"start_unix_ns\":5,\"end_unix_ns\":7,\"error\":null,\"attributes\":{}}\n"
        );
        span.parent_id = 2;
        span.error = Some("decode_reset");
        span.set("a", Value::text(b"x\ny"));
        span.set("b", Value::Millis(12));
        span.set("c", false);
        let line = line(&span);
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(json["parent_id"], "0000000000000002");
        assert_eq!(json["error"], "decode_reset");
        let attributes = serde_json::json!({"a": "x\ny", "b": 12, "c": false});
        assert_eq!(json["attributes"], attributes);
        assert_eq!(line.matches('\n').count(), 1);
    }
}
