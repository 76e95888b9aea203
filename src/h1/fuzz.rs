//! Bodies of the fuzz targets: properties that must hold for arbitrary input. The unit tests below
//! also run them over the corpus.
//!
//! Each body compares the results of a parser for different splits of the input with each other,
//! and with a slow reference implementation that reads the complete input and is written for
//! simplicity.

use super::{
    ChunkError, Chunked, DataLines, Field, HeadError, HopFilter, LinePart, Method, RequestHead,
    ResponseHead, drop_field, expects_continue, path_is, push_field, push_request_line,
    push_status_line, request_framing, request_keeps_alive, response_framing, response_keeps_alive,
    target_form, wants_websocket,
};
use crate::limits::{
    CHUNK_BYTES_MAX, CHUNK_EXTENSION_BYTES_MAX, CHUNK_SIZE_DIGITS_MAX, HEAD_BYTES_MAX,
    HEAD_FIELDS_MAX, REQUEST_LINE_BYTES_MAX, TRAILER_BYTES_MAX,
};
use crate::span::Span;

/// Asserts that parsing `data` as a request head gives the same result as a whole and byte by byte,
/// that the result agrees with the reference parser, and that a head written from the parsed parts
/// parses to the same parts.
pub fn fuzz_request_head(data: &[u8]) {
    let mut head = RequestHead::default();
    let whole = head.parse(data);
    let mut pieces = RequestHead::default();
    assert_eq!(whole, over_prefixes(data, |prefix| pieces.parse(prefix)));
    let want = reference_head(data, empty_line_len(data), request_line_fits);
    check_against(want, whole, &head.fields, head.len);
    if whole != Ok(true) {
        return;
    }
    assert_eq!((head.len, head.target), (pieces.len, pieces.target));
    assert_eq!(head.fields, pieces.fields);
    for span in [head.method_span, head.target] {
        assert!(span.start < span.end && span.end <= head.len);
    }
    // None of these calls may panic.
    let _ = request_framing(&head, data);
    let _ = expects_continue(&head, data);
    let _ = request_keeps_alive(&head, data);
    let _ = wants_websocket(&head, data);
    let _ = path_is(head.target.of(data), "/v1/chat/completions");
    check_hop_filter(&head.fields, data);

    let mut out = Vec::new();
    push_request_line(&mut out, head.method_span.of(data), head.target.of(data));
    push_fields(&mut out, &head.fields, data);
    if out.len() <= HEAD_BYTES_MAX {
        let mut again = RequestHead::default();
        assert_eq!(again.parse(&out), Ok(true));
        assert_eq!(again.method, head.method);
        assert_eq!(again.target.of(&out), head.target.of(data));
        check_same_fields(&again.fields, &out, &head.fields, data);
    }
}

/// Asserts the same as [`fuzz_request_head`] for `data` as a response head.
pub fn fuzz_response_head(data: &[u8]) {
    let mut head = ResponseHead::default();
    let whole = head.parse(data);
    let mut pieces = ResponseHead::default();
    assert_eq!(whole, over_prefixes(data, |prefix| pieces.parse(prefix)));
    let want = reference_head(data, 0, status_line_fits);
    check_against(want, whole, &head.fields, head.len);
    if whole != Ok(true) {
        return;
    }
    assert_eq!((head.len, head.reason), (pieces.len, pieces.reason));
    assert_eq!(head.fields, pieces.fields);
    assert!(head.reason.end <= head.len);
    assert!((100..=599).contains(&head.status));
    for method in [Method::Get, Method::Head, Method::Connect] {
        if let Ok(framing) = response_framing(method, &head, data) {
            let _ = response_keeps_alive(&head, data, framing);
        }
    }
    check_hop_filter(&head.fields, data);

    let mut out = Vec::new();
    push_status_line(&mut out, head.status, head.reason.of(data));
    push_fields(&mut out, &head.fields, data);
    if out.len() <= HEAD_BYTES_MAX {
        let mut again = ResponseHead::default();
        assert_eq!(again.parse(&out), Ok(true));
        assert_eq!(again.status, head.status);
        assert_eq!(again.reason.of(&out), head.reason.of(data));
        check_same_fields(&again.fields, &out, &head.fields, data);
    }
}

/// Asserts that decoding `data` as a chunked body gives the same result for several splits of
/// `data`, and that the result agrees with the reference decoder. The body may be followed by bytes
/// that are not part of it.
pub fn fuzz_chunked(data: &[u8]) {
    let whole = decode_pieces(data, data.len().max(1));
    for piece_len in [1, 2, 3, 7, 64] {
        assert_eq!(
            whole,
            decode_pieces(data, piece_len),
            "parts of {piece_len}"
        );
    }
    for split in 0..=data.len().min(256) {
        assert_eq!(whole, decode_split(data, split), "split at {split}");
    }
    let mut verifier = Chunked::new();
    assert_eq!(verifier.verify(data), whole.end);
    assert_eq!(verifier.is_done(), whole.done);
    if whole.end.is_ok() {
        assert_eq!(verifier.payload_bytes(), whole.payload.len() as u64);
    }
    let want = reference_chunked(data);
    match want.end {
        ReferenceEnd::Done(len) => {
            assert_eq!(whole.end, Ok(len));
            assert!(whole.done);
            assert_eq!(whole.payload, want.payload);
        }
        ReferenceEnd::More => {
            assert!(!whole.done);
            assert!(whole.end.is_err() || whole.payload == want.payload);
        }
        ReferenceEnd::Refused => assert!(whole.end.is_err()),
    }
}

/// Asserts that the data that [`DataLines`] finds in a stream is the same for several splits of the
/// stream, and that it equals what splitting the whole stream into lines gives.
pub fn fuzz_sse(data: &[u8]) {
    let ends = |byte: &u8| matches!(byte, b'\n' | b'\r');
    let mut lines: Vec<&[u8]> = data.split(ends).collect();
    // The last line has not ended.
    lines.pop();
    let want: Vec<Vec<u8>> = lines
        .iter()
        .filter_map(|line| line.strip_prefix(b"data:"))
        .map(|line| line.strip_prefix(b" ").unwrap_or(line).to_vec())
        .collect();
    for piece_len in [1, 2, 3, 7, 64, data.len().max(1)] {
        assert_eq!(
            data_of(data.chunks(piece_len)),
            want,
            "parts of {piece_len}: {}",
            data.escape_ascii()
        );
    }
    for split in 0..=data.len().min(256) {
        assert_eq!(
            data_of([&data[..split], &data[split..]]),
            want,
            "at {split}: {}",
            data.escape_ascii()
        );
    }
}

/// Returns the data of the `data` lines that have ended in a stream which arrives in these pieces.
fn data_of<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Vec<u8>> {
    let mut lines = DataLines::default();
    let (mut all, mut open) = (Vec::new(), Vec::new());
    for piece in pieces {
        let mut at = 0;
        while let Some(part) = lines.next(piece, &mut at) {
            match part {
                LinePart::Data { start, end, .. } => open.extend_from_slice(&piece[start..end]),
                LinePart::End { is_data: true } => all.push(std::mem::take(&mut open)),
                LinePart::End { is_data: false } => assert!(open.is_empty()),
            }
        }
    }
    all
}

/// Result of decoding a chunked body.
#[derive(Debug, PartialEq)]
struct Decoded {
    payload: Vec<u8>,
    end: Result<usize, ChunkError>,
    done: bool,
}

fn decode_pieces(data: &[u8], piece_len: usize) -> Decoded {
    decode_all(data.chunks(piece_len))
}

fn decode_split(data: &[u8], split: usize) -> Decoded {
    let (first, second) = data.split_at(split);
    decode_all([first, second].into_iter())
}

fn decode_all<'a>(pieces: impl Iterator<Item = &'a [u8]>) -> Decoded {
    let mut reader = Chunked::new();
    let mut payload = Vec::new();
    let mut taken = 0;
    let mut end = Ok(0);
    for piece in pieces {
        match reader.decode(piece, |run| payload.extend_from_slice(run.of(piece))) {
            Ok(len) => {
                assert!(len == piece.len() || reader.is_done());
                taken += len;
                end = Ok(taken);
            }
            Err(error) => {
                assert_eq!(reader.verify(b"0\r\n\r\n"), Err(error));
                end = Err(error);
                break;
            }
        }
    }
    Decoded {
        payload,
        end,
        done: reader.is_done(),
    }
}

/// Calls `parse` with growing prefixes of `data`, one byte longer each time, and returns the first
/// result other than `Ok(false)`, or `Ok(false)` if there is none.
fn over_prefixes(
    data: &[u8],
    mut parse: impl FnMut(&[u8]) -> Result<bool, HeadError>,
) -> Result<bool, HeadError> {
    for len in 0..=data.len() {
        let done = parse(&data[..len]);
        if done != Ok(false) {
            return done;
        }
    }
    Ok(false)
}

fn push_fields(out: &mut Vec<u8>, fields: &[Field], buf: &[u8]) {
    for field in fields {
        push_field(out, field.name.of(buf), field.value.of(buf));
    }
    out.extend_from_slice(b"\r\n");
}

fn check_same_fields(a: &[Field], a_buf: &[u8], b: &[Field], b_buf: &[u8]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert_eq!(a.name.of(a_buf), b.name.of(b_buf));
        assert_eq!(a.value.of(a_buf), b.value.of(b_buf));
        assert_eq!(a.known, b.known);
    }
}

fn check_hop_filter(fields: &[Field], buf: &[u8]) {
    if let Ok(filter) = HopFilter::new(fields, buf) {
        for field in fields {
            let _ = drop_field(field, buf, &filter);
        }
    }
}

/// Result of the reference parser, [`reference_head`].
#[derive(Debug)]
enum Reference {
    /// No blank line has arrived, so the head is incomplete.
    More,
    Refused,
    Head {
        len: usize,
        fields: Vec<[Span; 2]>,
    },
}

fn check_against(want: Reference, got: Result<bool, HeadError>, fields: &[Field], len: usize) {
    match want {
        // A head without a blank line may already be refused, but must not be complete.
        Reference::More => assert_ne!(got, Ok(true)),
        Reference::Refused => assert!(got.is_err(), "{got:?}"),
        Reference::Head {
            len: want_len,
            fields: want_fields,
        } if got.is_err() => {
            // The reference does not enforce the limits of a head.
            let over_limit = match got {
                Err(HeadError::TooManyFields) => want_fields.len() > HEAD_FIELDS_MAX,
                Err(HeadError::TooLong) => want_len > HEAD_BYTES_MAX,
                Err(HeadError::LineTooLong) => want_len > REQUEST_LINE_BYTES_MAX,
                _ => false,
            };
            assert!(over_limit, "{got:?}");
        }
        Reference::Head {
            len: want_len,
            fields: want_fields,
        } => {
            assert_eq!((got, len), (Ok(true), want_len));
            assert!(len <= HEAD_BYTES_MAX && want_fields.len() <= HEAD_FIELDS_MAX);
            let spans: Vec<_> = fields
                .iter()
                .map(|field| [field.name, field.value])
                .collect();
            assert_eq!(spans, want_fields);
        }
    }
}

/// Returns the length in bytes of the one empty line that may precede a request: 2, or 0 without
/// it.
fn empty_line_len(data: &[u8]) -> usize {
    if data.starts_with(b"\r\n") { 2 } else { 0 }
}

fn reference_head(data: &[u8], start: usize, first_line_fits: fn(&[u8]) -> bool) -> Reference {
    let Some(end) = data[start..]
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
    else {
        return Reference::More;
    };
    let end = start + end;
    let mut fields = Vec::new();
    let mut at = start;
    while at < end + 2 {
        let mut line_end = at;
        while data[line_end..line_end + 2] != *b"\r\n" {
            line_end += 1;
        }
        let line = &data[at..line_end];
        if at == start {
            if !first_line_fits(line) {
                return Reference::Refused;
            }
        } else if let Some([name, value]) = reference_field(line, at) {
            fields.push([name, value]);
        } else {
            return Reference::Refused;
        }
        at = line_end + 2;
    }
    Reference::Head {
        len: end + 4,
        fields,
    }
}

fn reference_field(line: &[u8], at: usize) -> Option<[Span; 2]> {
    let colon = line.iter().position(|&byte| byte == b':')?;
    let (name, value) = (&line[..colon], &line[colon + 1..]);
    if !plain_token(name) || !plain_text(value) {
        return None;
    }
    let blank = |byte: &&u8| **byte == b' ' || **byte == b'\t';
    let front = value.iter().take_while(blank).count();
    let back = value[front..].iter().rev().take_while(blank).count();
    Some([
        Span::new(at, at + colon),
        Span::new(at + colon + 1 + front, at + line.len() - back),
    ])
}

fn request_line_fits(line: &[u8]) -> bool {
    let parts: Vec<&[u8]> = line.split(|&byte| byte == b' ').collect();
    let [method, target, version] = parts[..] else {
        return false;
    };
    plain_token(method)
        && target
            .iter()
            .all(|&byte| (0x21..=0x7e).contains(&byte) && byte != b'#')
        && target_form(Method::of(method), target).is_some()
        && (version == b"HTTP/1.0" || version == b"HTTP/1.1")
}

fn status_line_fits(line: &[u8]) -> bool {
    let Some((version, rest)) = line.split_at_checked(9) else {
        return false;
    };
    let code_fits = rest.len() >= 3
        && (b'1'..=b'5').contains(&rest[0])
        && rest[1].is_ascii_digit()
        && rest[2].is_ascii_digit();
    (version == b"HTTP/1.0 " || version == b"HTTP/1.1 ")
        && code_fits
        && rest.get(3).is_none_or(|&byte| byte == b' ')
        && plain_text(rest)
}

fn plain_token(bytes: &[u8]) -> bool {
    !bytes.is_empty()
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(byte))
}

fn plain_text(bytes: &[u8]) -> bool {
    bytes
        .iter()
        .all(|&byte| byte == b'\t' || byte >= b' ' && byte != 0x7f)
}

/// Result of the reference decoder, [`reference_chunked`].
struct ReferenceBody {
    payload: Vec<u8>,
    end: ReferenceEnd,
}

#[derive(Clone, Copy, PartialEq)]
enum ReferenceEnd {
    Done(usize),
    /// The body is incomplete, and its complete lines are valid.
    More,
    Refused,
}

fn reference_chunked(data: &[u8]) -> ReferenceBody {
    let mut payload = Vec::new();
    let end = reference_chunks(data, &mut payload);
    ReferenceBody { payload, end }
}

fn reference_chunks(data: &[u8], payload: &mut Vec<u8>) -> ReferenceEnd {
    let mut at = 0;
    let mut extension_bytes = 0;
    loop {
        let line = match reference_line(data, at) {
            Ok(line) => line,
            Err(end) => return end,
        };
        let digits = line
            .iter()
            .take_while(|byte| byte.is_ascii_hexdigit())
            .count();
        let extension = &line[digits..];
        extension_bytes += extension.len() as u64;
        let extension_fits = extension.is_empty()
            || extension.trim_ascii_start().first() == Some(&b';') && plain_text(extension);
        if !(1..=usize::from(CHUNK_SIZE_DIGITS_MAX)).contains(&digits)
            || !extension_fits
            || extension_bytes > CHUNK_EXTENSION_BYTES_MAX
        {
            return ReferenceEnd::Refused;
        }
        let mut size = 0_u128;
        for &digit in &line[..digits] {
            size = size * 16 + char::from(digit).to_digit(16).map_or(0, u128::from);
        }
        if size > u128::from(CHUNK_BYTES_MAX) {
            return ReferenceEnd::Refused;
        }
        at += line.len() + 2;
        if size == 0 {
            return reference_trailers(data, at);
        }
        let rest = &data[at..];
        if size > rest.len() as u128 {
            payload.extend_from_slice(rest);
            return ReferenceEnd::More;
        }
        let (chunk, rest) = rest.split_at(size as usize);
        payload.extend_from_slice(chunk);
        match rest {
            [b'\r', b'\n', ..] => at += chunk.len() + 2,
            [] | [_] => return ReferenceEnd::More,
            _ => return ReferenceEnd::Refused,
        }
    }
}

fn reference_trailers(data: &[u8], mut at: usize) -> ReferenceEnd {
    let start = at;
    loop {
        let line = match reference_line(data, at) {
            Ok(line) => line,
            Err(end) => return end,
        };
        at += line.len() + 2;
        if line.is_empty() {
            return ReferenceEnd::Done(at);
        }
        if (at - start) as u64 > TRAILER_BYTES_MAX || reference_field(line, 0).is_none() {
            return ReferenceEnd::Refused;
        }
    }
}

/// Returns the line that begins at `at`, without its CRLF.
///
/// If `data` has no complete line there, the error is [`ReferenceEnd::More`]. If the line does not
/// end in CRLF or contains another CR, it is [`ReferenceEnd::Refused`].
fn reference_line(data: &[u8], at: usize) -> Result<&[u8], ReferenceEnd> {
    let rest = &data[at..];
    let Some(end) = rest.iter().position(|&byte| byte == b'\n') else {
        return Err(ReferenceEnd::More);
    };
    match rest[..end].split_last() {
        Some((b'\r', line)) if !line.contains(&b'\r') => Ok(line),
        _ => Err(ReferenceEnd::Refused),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::h1::testing::Random;

    fn replay(target: &str, body: fn(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(target);
        let mut files = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            let data = std::fs::read(entry.unwrap().path()).unwrap();
            body(&data);
            mutate(&data, body);
            files += 1;
        }
        assert!(files >= 10, "{folder:?} has {files} files");
    }

    /// Runs `body` on 200 copies of `data` with one or two random changes each. Two parsers most
    /// likely disagree on input that is almost valid.
    fn mutate(data: &[u8], body: fn(&[u8])) {
        const PARTS: &[&[u8]] = &[
            b"\r\n",
            b"\r",
            b"\n",
            b"\0",
            b" ",
            b"\t",
            b":",
            b";",
            b",",
            b"#",
            b"%",
            b"/",
            b"\x7f",
            b"\x80",
            b"0",
            b"f",
            b"A",
            b"\r\n\r\n",
            b"\r\n ",
            b"A: b\r\n",
            b"http://a",
            b"HTTP/1.1",
        ];
        let mut random = Random::new(data.len() as u64);
        for _ in 0..200 {
            let mut bytes = data.to_vec();
            for _ in 0..=random.below(2) {
                let at = random.below(bytes.len() + 1);
                let part = PARTS[random.below(PARTS.len())];
                let bytes_len = bytes.len();
                match random.below(4) {
                    0 => drop(bytes.splice(at..at, part.iter().copied())),
                    1 => drop(bytes.splice(at..(at + 1).min(bytes_len), part.iter().copied())),
                    2 if at < bytes.len() => drop(bytes.remove(at)),
                    _ => bytes.truncate(at),
                }
            }
            body(&bytes);
        }
    }

    #[test]
    fn corpus_of_requests() {
        replay("h1_request", fuzz_request_head);
    }

    #[test]
    fn corpus_of_responses() {
        replay("h1_response", fuzz_response_head);
    }

    #[test]
    fn corpus_of_chunked_bodies() {
        replay("h1_chunked", fuzz_chunked);
    }

    #[test]
    fn corpus_of_event_streams() {
        replay("sse", fuzz_sse);
    }
}
