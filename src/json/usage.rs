//! Rewrites the cached-token count in a decode engine's response while it is forwarded.
//!
//! A decode engine that pulled the KV cache of a prompt reports the whole prompt as cached. Clients
//! should see the prefill engine's count instead, so `cached_tokens` is set wherever the response
//! has a `usage` object: its value is replaced, or the member or its parent object is inserted. All
//! other bytes pass immediately and unmodified. Only a value that is being replaced is held back
//! while it is incomplete.
//!
//! A value longer than `JSON_HELD_BYTES_MAX`, which no engine sends for this member, cannot be held
//! back completely. It passes, and the member is repeated after it with the correct value, because
//! JSON parsers use the last of repeated members.
//!
//! An event stream is split into lines as in section 9.2.6 of the WHATWG HTML standard: LF, CR and
//! CRLF end a line. Each `data:` line with an object is a separate JSON text. If a text is invalid,
//! the rest of it passes unmodified from the first invalid byte on. Rewriting never fails and never
//! loses a byte.

use std::sync::LazyLock;

use memchr::{memchr2, memmem, memrchr2};

use super::lex::{Event, Kind, Lexer};
use crate::limits::JSON_HELD_BYTES_MAX;

/// Location of `usage` in the responses of an API, and the name of the details object in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum UsageShape {
    /// `usage.prompt_tokens_details` at the top level: chat completions and completions.
    Chat,
    /// `usage.input_tokens_details` at the top level and in the top-level `response`: the responses
    /// API.
    Responses,
}

/// Format of a response body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ResponseForm {
    /// One JSON text.
    Json,
    /// A stream of server-sent events.
    Sse,
}

/// Rewrites the cached-token count in a response while it is forwarded.
#[derive(Clone, Debug)]
pub struct UsageRewriter {
    form: ResponseForm,
    shape: UsageShape,
    line: Line,
    lexer: Lexer,
    /// The objects of the response that are being read, the outermost first.
    frames: [Frame; DEPTH],
    next: Next,
    value: Value,
    /// The bytes received so far of a value that will be replaced.
    held: [u8; JSON_HELD_BYTES_MAX],
    held_bytes: usize,
    text: Text,
    rewritten: u32,
}

/// Searches for `usage`. Lines that contain neither this nor an escape cannot have a usage object.
///
/// The finders are static because one is as large as the rest of the rewriter and has a larger
/// alignment.
static USAGE: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(b"usage"));
static ESCAPE: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(b"\\u"));

/// Maximum number of nested objects that are read: the top level, `response`, `usage`, and the
/// details object that contains the count.
const DEPTH: usize = 4;

/// Position of the next byte in a line of an event stream. A JSON response is always in
/// [`Line::Data`] or [`Line::Pass`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    Start,
    /// After this number of bytes of `data:` at the start of a line.
    Field(usize),
    /// After `data:`, where one space or the `{` of the data is expected.
    Blank,
    /// After `data: `, where the `{` of the data is expected.
    Brace,
    /// In a JSON text that is scanned.
    Data,
    /// In the part of a line or JSON response that is not scanned, because it is not a JSON object
    /// or because its scan ended with an error.
    Pass,
}

/// State of one object of the response that is being read.
#[derive(Clone, Copy, Debug)]
struct Frame {
    place: Place,
    /// Whether the object has at least one member, so that an inserted member needs a comma.
    occupied: bool,
    /// Whether the member that must be set has been found in the object: the details object in
    /// `usage`, or `cached_tokens` in the details object.
    done: bool,
}

impl Frame {
    const fn new(place: Place) -> Self {
        Self {
            place,
            occupied: false,
            done: false,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Top,
    Response,
    Usage,
    Details,
}

/// Action for the value of the member whose name was read last.
#[derive(Clone, Copy, Debug)]
enum Next {
    Skip,
    Enter(Place),
    Replace(Part),
}

/// Action for the value being read.
#[derive(Clone, Copy, Debug)]
enum Value {
    Kept,
    /// The value is held back, and replaced by this part of [`Text`] when it ends.
    Replaced(Part),
    /// The value is to be replaced by this part of [`Text`] but is too long to be held back. It
    /// passes, and after it the same member is written a second time with the correct value,
    /// because parsers use the last of several members with the same name.
    Repeated(Part),
}

impl UsageRewriter {
    /// Creates a rewriter that sets the cached-token count to `cached_tokens`.
    #[must_use]
    pub fn new(form: ResponseForm, shape: UsageShape, cached_tokens: u64) -> Self {
        Self {
            form,
            shape,
            line: match form {
                ResponseForm::Json => Line::Data,
                ResponseForm::Sse => Line::Start,
            },
            lexer: Lexer::new(),
            frames: [Frame::new(Place::Top); DEPTH],
            next: Next::Skip,
            value: Value::Kept,
            held: [0; JSON_HELD_BYTES_MAX],
            held_bytes: 0,
            text: Text::new(shape.details(), cached_tokens),
            rewritten: 0,
        }
    }

    /// Resets the rewriter to its initial state, to rewrite the same response again from the start.
    pub fn restart(&mut self) {
        self.line = match self.form {
            ResponseForm::Json => Line::Data,
            ResponseForm::Sse => Line::Start,
        };
        self.lexer = Lexer::new();
        self.frames = [Frame::new(Place::Top); DEPTH];
        self.next = Next::Skip;
        self.value = Value::Kept;
        self.held_bytes = 0;
        self.rewritten = 0;
    }

    /// Processes `piece`, the next part of the response, and passes the output to `out` as
    /// consecutive slices.
    pub fn feed(&mut self, piece: &[u8], out: &mut impl FnMut(&[u8])) {
        let mut sink = Sink {
            piece,
            done: 0,
            out,
        };
        match self.form {
            ResponseForm::Json => {
                self.data(&mut sink, 0, piece.len());
                self.hold(&mut sink, piece.len());
            }
            ResponseForm::Sse => self.lines(&mut sink),
        }
        sink.pass(piece.len());
    }

    /// Passes the bytes that are held back to `out`. Must be called at the end of the response.
    pub fn finish(&mut self, out: &mut impl FnMut(&[u8])) {
        let mut sink = Sink {
            piece: &[],
            done: 0,
            out,
        };
        self.release(&mut sink);
    }

    /// Returns how many times the cached-token count was set in the response so far.
    #[must_use]
    pub const fn rewritten(&self) -> u32 {
        self.rewritten
    }

    fn lines<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>) {
        let piece = sink.piece;
        let mut suspects = Candidates::default();
        let mut at = 0;
        while let Some(&byte) = piece.get(at) {
            match (self.line, byte) {
                (Line::Start, _) => {
                    let suspect = suspects.next(piece, at);
                    // Complete lines before the first suspect cannot contain a usage object.
                    at = memrchr2(b'\n', b'\r', &piece[at..suspect]).map_or(at, |end| at + end + 1);
                    if at < piece.len() {
                        self.line = Line::Field(0);
                    }
                }
                (Line::Field(known), _) if byte == FIELD[known] => {
                    at += 1;
                    let known = known + 1;
                    self.line = if known < FIELD.len() {
                        Line::Field(known)
                    } else {
                        Line::Blank
                    };
                }
                (Line::Blank, b' ') => {
                    at += 1;
                    self.line = Line::Brace;
                }
                (Line::Blank | Line::Brace, b'{') => {
                    self.line = Line::Data;
                    self.lexer.reset();
                }
                (Line::Field(_) | Line::Blank | Line::Brace, _) => self.line = Line::Pass,
                (Line::Data | Line::Pass, _) => {
                    let end = memchr2(b'\n', b'\r', &piece[at..]).map_or(piece.len(), |n| at + n);
                    self.data(sink, at, end);
                    at = end;
                    if end < piece.len() {
                        self.release(sink);
                        self.line = Line::Start;
                        at += 1;
                    } else {
                        self.hold(sink, end);
                    }
                }
            }
        }
    }

    /// Scans `piece[start..end]`, which continues the current JSON text.
    fn data<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>, start: usize, end: usize) {
        if self.line != Line::Data {
            return;
        }
        let part = &sink.piece[start..end];
        let base = self.lexer.base();
        let place = |at: usize| start + (at - base);
        loop {
            match self.lexer.next(part) {
                Ok(None) => break,
                Err(_) => {
                    self.release(sink);
                    self.line = Line::Pass;
                    return;
                }
                Ok(Some(Event::Name { .. })) => self.name(),
                Ok(Some(Event::Value { at, kind })) => self.value_start(sink, place(at), kind),
                Ok(Some(Event::ValueEnd { at })) => self.value_end(sink, place(at)),
                Ok(Some(Event::Comma { .. })) => {}
                Ok(Some(Event::Close { at })) => self.close(sink, place(at)),
            }
        }
    }

    fn name(&mut self) {
        let frame = &mut self.frames[self.lexer.entered() - 1];
        frame.occupied = true;
        self.next = match (frame.place, self.lexer.name()) {
            (Place::Top | Place::Response, Some(b"usage")) => Next::Enter(Place::Usage),
            (Place::Top, Some(b"response")) if self.shape == UsageShape::Responses => {
                Next::Enter(Place::Response)
            }
            (Place::Usage, Some(name)) if name == self.shape.details() => {
                frame.done = true;
                Next::Enter(Place::Details)
            }
            (Place::Details, Some(b"cached_tokens")) => {
                frame.done = true;
                Next::Replace(Part::Count)
            }
            _ => Next::Skip,
        };
    }

    fn value_start<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>, at: usize, kind: Kind) {
        self.value = Value::Kept;
        let part = match self.next {
            Next::Skip => return,
            Next::Enter(place) if kind == Kind::Object => {
                self.lexer.enter();
                self.frames[self.lexer.entered() - 1] = Frame::new(place);
                return;
            }
            Next::Enter(Place::Details) => Part::Object,
            Next::Enter(_) => return,
            Next::Replace(part) => part,
        };
        sink.pass(at);
        self.value = Value::Replaced(part);
    }

    fn value_end<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>, at: usize) {
        self.hold(sink, at);
        match self.value {
            Value::Kept => {}
            Value::Replaced(part) => {
                self.held_bytes = 0;
                self.emit(sink, part);
            }
            Value::Repeated(part) => {
                sink.pass(at);
                (sink.out)(b",");
                self.emit(sink, part.member());
            }
        }
        self.value = Value::Kept;
    }

    /// Handles the closing brace of an object, at `at` in the current `piece`: inserts the details
    /// object or `cached_tokens` before it if the object must have that member and does not.
    fn close<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>, at: usize) {
        // The lexer has already left the object, so `entered` is the index of its frame.
        let frame = self.frames[self.lexer.entered()];
        if frame.done {
            return;
        }
        let part = match frame.place {
            Place::Top | Place::Response => return,
            Place::Usage => Part::Details,
            Place::Details => Part::Member,
        };
        sink.pass(at);
        if frame.occupied {
            (sink.out)(b",");
        }
        self.emit(sink, part);
    }

    fn emit<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>, part: Part) {
        self.rewritten = self.rewritten.saturating_add(1);
        (sink.out)(self.text.part(part));
    }

    /// If the value being read will be replaced, holds back its bytes in `piece` up to position
    /// `end`. If they exceed the capacity of `held`, passes the bytes held so far and changes the
    /// action to [`Value::Repeated`].
    fn hold<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>, end: usize) {
        let Value::Replaced(part) = self.value else {
            return;
        };
        let bytes = &sink.piece[sink.done..end];
        let held = self.held_bytes;
        match self.held.get_mut(held..held + bytes.len()) {
            Some(place) => {
                place.copy_from_slice(bytes);
                self.held_bytes += bytes.len();
                sink.done = end;
            }
            None => {
                self.release(sink);
                self.value = Value::Repeated(part);
            }
        }
    }

    /// Passes the held bytes of a value unmodified, because the response or the line has ended
    /// within the value, the JSON text is invalid, or the value is too long.
    fn release<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>) {
        if self.held_bytes > 0 {
            (sink.out)(&self.held[..self.held_bytes]);
        }
        self.held_bytes = 0;
        self.value = Value::Kept;
    }
}

/// Start of the lines of an event stream that are scanned.
const FIELD: &[u8; 5] = b"data:";

impl UsageShape {
    const fn details(self) -> &'static [u8] {
        match self {
            Self::Chat => b"prompt_tokens_details",
            Self::Responses => b"input_tokens_details",
        }
    }
}

/// Output of one call of [`UsageRewriter::feed`] or [`UsageRewriter::finish`]. Bytes between edits
/// are passed in as few slices as possible.
struct Sink<'a, F> {
    piece: &'a [u8],
    /// Number of bytes of `piece` that have been passed to `out` or held back.
    done: usize,
    out: &'a mut F,
}

impl<F: FnMut(&[u8])> Sink<'_, F> {
    /// Passes to `out` the bytes of `piece` before `at` that have not been passed or held back.
    fn pass(&mut self, at: usize) {
        if at > self.done {
            (self.out)(&self.piece[self.done..at]);
            self.done = at;
        }
    }
}

/// Searches for the next position in `piece` that may belong to the name of a usage object: the
/// letters `usage`, unless followed by `":null`, or an escape that may represent one of the
/// letters.
///
/// The last result of each search is cached, so that every byte is searched only once.
#[derive(Default)]
struct Candidates {
    usage: Option<usize>,
    escape: Option<usize>,
}

impl Candidates {
    fn next(&mut self, piece: &[u8], from: usize) -> usize {
        let usage = match self.usage {
            Some(at) if at >= from => at,
            _ => find_usage(&USAGE, piece, from),
        };
        let escape = match self.escape {
            Some(at) if at >= from => at,
            _ => ESCAPE
                .find(&piece[from..])
                .map_or(piece.len(), |at| from + at),
        };
        self.usage = Some(usage);
        self.escape = Some(escape);
        usage.min(escape)
    }
}

fn find_usage(finder: &memmem::Finder<'_>, piece: &[u8], mut from: usize) -> usize {
    while let Some(found) = finder.find(&piece[from..]) {
        let behind = from + found + finder.needle().len();
        if !piece[behind..].starts_with(b"\":null") {
            return from + found;
        }
        from = behind;
    }
    piece.len()
}

/// The texts to insert, which are all slices of one text:
/// `"prompt_tokens_details":{"cached_tokens":123}` with the names and count of the response.
#[derive(Clone, Copy, Debug)]
struct Text {
    bytes: [u8; TEXT_BYTES_MAX],
    object: usize,
    member: usize,
    count: usize,
    end: usize,
}

#[derive(Clone, Copy, Debug)]
enum Part {
    /// The details as a member: `"prompt_tokens_details":{"cached_tokens":123}`.
    Details,
    /// The value of the details: `{"cached_tokens":123}`.
    Object,
    /// The count as a member: `"cached_tokens":123`.
    Member,
    /// The value of the count: `123`.
    Count,
}

impl Part {
    /// Returns the member that contains this part as its value. A part that is a member is returned
    /// unchanged.
    const fn member(self) -> Self {
        match self {
            Self::Details | Self::Object => Self::Details,
            Self::Member | Self::Count => Self::Member,
        }
    }
}

/// Capacity of [`Text`] in bytes: the longer details name, 20 digits and the surrounding bytes fit.
const TEXT_BYTES_MAX: usize = 80;

impl Text {
    fn new(details: &[u8], count: u64) -> Self {
        let mut text = Self {
            bytes: [0; TEXT_BYTES_MAX],
            object: 0,
            member: 0,
            count: 0,
            end: 0,
        };
        text.push(b"\"");
        text.push(details);
        text.push(b"\":");
        text.object = text.end;
        text.push(b"{");
        text.member = text.end;
        text.push(b"\"cached_tokens\":");
        text.count = text.end;
        let mut unit = 1_u64;
        while count / unit >= 10 {
            unit *= 10;
        }
        while unit > 0 {
            text.push(&[b'0' + (count / unit % 10) as u8]);
            unit /= 10;
        }
        text.push(b"}");
        text
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes[self.end..self.end + bytes.len()].copy_from_slice(bytes);
        self.end += bytes.len();
    }

    fn part(&self, part: Part) -> &[u8] {
        match part {
            Part::Details => &self.bytes[..self.end],
            Part::Object => &self.bytes[self.object..self.end],
            Part::Member => &self.bytes[self.member..self.end - 1],
            Part::Count => &self.bytes[self.count..self.end - 1],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewrite(form: ResponseForm, shape: UsageShape, text: &str, size: usize) -> (String, u32) {
        let mut rewriter = UsageRewriter::new(form, shape, 7);
        let mut sent = Vec::new();
        for piece in text.as_bytes().chunks(size) {
            rewriter.feed(piece, &mut |bytes| sent.extend_from_slice(bytes));
        }
        rewriter.finish(&mut |bytes| sent.extend_from_slice(bytes));
        (String::from_utf8(sent).unwrap(), rewriter.rewritten())
    }

    fn check(form: ResponseForm, shape: UsageShape, cases: &[(&str, &str, u32)]) {
        for (text, want, count) in cases {
            for size in 1..=text.len() {
                let found = rewrite(form, shape, text, size);
                assert_eq!(
                    found,
                    ((*want).to_owned(), *count),
                    "{text} in parts of {size}"
                );
            }
        }
    }

    #[test]
    fn counts_are_set_in_a_json_response() {
        let set = r#"{"usage":{"prompt_tokens_details":{"cached_tokens":7}}}"#;
        check(
            ResponseForm::Json,
            UsageShape::Chat,
            &[
                (
                    r#"{"usage":{"prompt_tokens_details":{"cached_tokens":16}}}"#,
                    set,
                    1,
                ),
                (
                    r#"{"usage":{"prompt_tokens_details":{"cached_tokens":null}}}"#,
                    set,
                    1,
                ),
                (
                    r#"{"usage":{"prompt_tokens_details":{"cached_tokens":{"a":[1]}}}}"#,
                    set,
                    1,
                ),
                (r#"{"usage":{"prompt_tokens_details":{}}}"#, set, 1),
                (r#"{"usage":{"prompt_tokens_details":null}}"#, set, 1),
                (r#"{"usage":{"prompt_tokens_details":[1,2]}}"#, set, 1),
                (r#"{"usage":{}}"#, set, 1),
                (
                    r#"{"usage" : { "prompt_tokens" : 5 } }"#,
                    r#"{"usage" : { "prompt_tokens" : 5 ,"prompt_tokens_details":{"cached_tokens":7}} }"#,
                    1,
                ),
                (
                    r#"{"usage":{"prompt_tokens_details":{"audio":1}}}"#,
                    r#"{"usage":{"prompt_tokens_details":{"audio":1,"cached_tokens":7}}}"#,
                    1,
                ),
                (
                    r#"{"\u0075sage":{"prompt_tokens_details":{"cached_tokens":1,"cached_tokens":2}},"usage":{}}"#,
                    r#"{"\u0075sage":{"prompt_tokens_details":{"cached_tokens":7,"cached_tokens":7}},"usage":{"prompt_tokens_details":{"cached_tokens":7}}}"#,
                    3,
                ),
            ],
        );
        let same = [
            r#"{"usage":null}"#,
            r#"{"usage":[{"cached_tokens":1}]}"#,
            r#"{"choices":[{"usage":{}}],"x":{"usage":{}},"s":"\"usage\":{}"}"#,
            r#"{"response":{"usage":{}}}"#,
            "[1]",
            r#"{"usage":{"prompt_tokens_details":{"cached_tokens":1x}}"#,
            r#"{"usage":{"prompt_tokens_details":{"cached_tokens":12"#,
            r#"{"usage":{"prompt_tokens_details":{"cached_tokens":"a"#,
        ];
        for text in same {
            let count = u32::from(text.contains("1x"));
            let want = text.replace("1x", "7x");
            check(
                ResponseForm::Json,
                UsageShape::Chat,
                &[(text, &want, count)],
            );
        }
    }

    /// A value of 32 bytes is replaced. A value of 33 bytes passes, followed by the member with the
    /// correct value.
    #[test]
    fn long_values_pass_and_the_member_is_repeated() {
        let long = "0123456789abcdef0123456789abcde";
        let text = |inside: &str| format!("{{\"usage\":{{\"prompt_tokens_details\":{inside}}}}}");
        let set = text("{\"cached_tokens\":7}");
        let cases = [
            (
                format!("{{\"cached_tokens\":\"{}\"}}", &long[1..]),
                set.clone(),
            ),
            (
                format!("{{\"cached_tokens\":\"{long}\"}}"),
                text(&format!(
                    "{{\"cached_tokens\":\"{long}\",\"cached_tokens\":7}}"
                )),
            ),
            (format!("\"{}\"", &long[1..]), set),
            (
                format!("\"{long}\""),
                text(&format!(
                    "\"{long}\",\"prompt_tokens_details\":{{\"cached_tokens\":7}}"
                )),
            ),
        ];
        for (inside, want) in cases {
            check(
                ResponseForm::Json,
                UsageShape::Chat,
                &[(&text(&inside), &want, 1)],
            );
        }
        let broken = format!("{{\"usage\":{{\"prompt_tokens_details\":[\"{long}\"}}}}}}");
        check(
            ResponseForm::Json,
            UsageShape::Chat,
            &[(&broken, &broken, 0)],
        );
    }

    #[test]
    fn responses() {
        check(
            ResponseForm::Json,
            UsageShape::Responses,
            &[
                (
                    r#"{"response":{"usage":{"input_tokens_details":{"cached_tokens":9}}}}"#,
                    r#"{"response":{"usage":{"input_tokens_details":{"cached_tokens":7}}}}"#,
                    1,
                ),
                (
                    r#"{"usage":{"input_tokens":9}}"#,
                    r#"{"usage":{"input_tokens":9,"input_tokens_details":{"cached_tokens":7}}}"#,
                    1,
                ),
                (
                    r#"{"response":{"response":{"usage":{}}}}"#,
                    r#"{"response":{"response":{"usage":{}}}}"#,
                    0,
                ),
                (
                    r#"{"response":null,"usage":null}"#,
                    r#"{"response":null,"usage":null}"#,
                    0,
                ),
            ],
        );
    }

    #[test]
    fn counts_are_set_in_an_event_stream() {
        let set = r#"{"usage":{"prompt_tokens_details":{"cached_tokens":7}}}"#;
        let case = |text: &str| (text.replace('@', r#"{"usage":{}}"#), text.replace('@', set));
        let rewritten = [
            ("data: @\n\n", 1),
            ("data:@\r\n\r\ndata: @", 2),
            (
                "data: @\rdata: {}\r\r: @\rdata:  @\rdata : @\ndata @\nevent: @\n @\n",
                1,
            ),
            ("id: 7\nevent: x\ndata: @\ndata: @\n\ndata: [DONE]\n\n", 2),
            ("data: [@]\ndata\ndata:\ndata: \n\ndata:{\n@\ndata: @\n", 1),
        ];
        for (text, count) in rewritten {
            let (old, _) = case(text);
            for size in 1..=old.len() {
                let (new, found) = rewrite(ResponseForm::Sse, UsageShape::Chat, &old, size);
                assert_eq!(found, count, "{text:?}");
                assert_eq!(new.matches(set).count(), count as usize, "{text:?}");
                assert_eq!(new.replace(set, r#"{"usage":{}}"#), old, "{text:?}");
            }
        }
    }

    #[test]
    fn invalid_lines_pass_unmodified() {
        let text = "data: {\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":\"abc\n\n\
                    data: {\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":5\r\n\
                    data: {\"usage\":{\"prompt_tokens_details\":{\"cached_tokens\":nil}}}\n\
                    data: {\"a\":1}}\n\n";
        check(ResponseForm::Sse, UsageShape::Chat, &[(text, text, 0)]);
    }

    #[test]
    fn events_without_usage_pass_in_one_slice() {
        let frames = [
            "data: {\"choices\":[{\"delta\":{\"content\":\"hi\"}}]}\n\n",
            "data: {\"choices\":[],\"usage\":null}\n\ndata: {\"usage\":null}\n\n",
            ": ping\n\n",
            "data: {\"choices\":[{\"text\":\"\\u00e9\"}],\"usage\" : null}\n\n",
            "data: {\"choi",
        ];
        let mut rewriter = UsageRewriter::new(ResponseForm::Sse, UsageShape::Chat, 7);
        for frame in frames {
            let mut slices = Vec::new();
            rewriter.feed(frame.as_bytes(), &mut |bytes| slices.push(bytes.to_vec()));
            assert_eq!(slices, [frame.as_bytes()]);
        }
    }

    #[test]
    fn counts_are_formatted_correctly() {
        for count in [0, 9, 10, 99, 100, 416, u64::MAX - 1, u64::MAX] {
            let mut rewriter = UsageRewriter::new(ResponseForm::Json, UsageShape::Responses, count);
            let mut sent = Vec::new();
            rewriter.feed(b"{\"usage\":{}}", &mut |bytes| {
                sent.extend_from_slice(bytes)
            });
            let want =
                format!("{{\"usage\":{{\"input_tokens_details\":{{\"cached_tokens\":{count}}}}}}}");
            assert_eq!(String::from_utf8(sent).unwrap(), want);
        }
    }
}
