//! Properties that hold for any `traceparent`: the body of a fuzz target, also run by `cargo test`.

use super::context::{TRACEPARENT_BYTES, TraceContext};

/// Parses `data` as a `traceparent`. Checks that this does not panic, that it accepts the same
/// values as a straightforward implementation of section 3.2.2 of the W3C trace context, and that
/// an accepted value is written with the ids that were read.
pub fn fuzz_traceparent(data: &[u8]) {
    let read = TraceContext::parse(data);
    assert_eq!(read.is_some(), is_valid(data));
    let Some(context) = read else { return };
    let written = context.traceparent();
    assert_eq!(TraceContext::parse(&written), Some(context));
    assert_eq!(written[2..53], data[2..53]);
}

fn is_valid(data: &[u8]) -> bool {
    let Ok(text) = std::str::from_utf8(&data[..data.len().min(TRACEPARENT_BYTES)]) else {
        return false;
    };
    let is_hex = |text: &str| {
        let mut bytes = text.bytes();
        bytes.all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let parts: Vec<_> = text.split('-').collect();
    let [version, trace_id, span_id, flags] = parts[..] else {
        return false;
    };
    let lengths = [version, trace_id, span_id, flags].map(str::len);
    let behind = &data[text.len()..];
    lengths == [2, 32, 16, 2]
        && parts.iter().all(|part| is_hex(part))
        && version != "ff"
        && trace_id.bytes().any(|byte| byte != b'0')
        && span_id.bytes().any(|byte| byte != b'0')
        && (behind.is_empty() || version != "00" && behind[0] == b'-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_corpus() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/corpus/traceparent");
        let mut count = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let data = std::fs::read(entry.unwrap().path()).unwrap();
            fuzz_traceparent(&data);
            // Also all prefixes, and inputs with one byte changed or inserted.
            for at in 0..data.len() {
                fuzz_traceparent(&data[..at]);
                for byte in [b'0', b'f', b'F', b'-', b'g', 0, 0xff] {
                    let mut near = data.clone();
                    near[at] = byte;
                    fuzz_traceparent(&near);
                    near.insert(at, byte);
                    fuzz_traceparent(&near);
                }
            }
            count += 1;
        }
        assert!(count > 2);
    }
}
