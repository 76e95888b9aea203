//! The one scan of a response that applies all edits.
//!
//! All bytes that no edit changes pass immediately and unmodified. Only a value that is being
//! replaced is held back while it is incomplete.
//!
//! A value longer than `JSON_HELD_BYTES_MAX`, which no engine sends for the members edited here,
//! cannot be held back completely. It passes, and the member is repeated after it with the correct
//! value, because JSON parsers use the last of repeated members.
//!
//! In an event stream, each `data:` line with an object is a separate JSON text ([`DataLines`]). If
//! a text is invalid, the rest of it passes unmodified from the first invalid byte on. Editing
//! never fails and never loses a byte.

use std::sync::LazyLock;

use memchr::{memmem, memrchr2};

use super::action::{Action, Part, Place, REQUIRED_MAX};
use super::{ResponseEdit, ResponseForm};
use crate::h1::{DataLines, LinePart};
use crate::json::lex::{Event, Kind, Lexer};
use crate::limits::{JSON_HELD_BYTES_MAX, RESPONSE_EDITS_MAX};

/// Edits one response while it is forwarded.
#[derive(Clone, Debug)]
pub struct Transforms {
    /// The form that [`Transforms::new`] was given.
    declared: ResponseForm,
    /// The form of the response; [`ResponseForm::Detected`] until its first byte.
    form: ResponseForm,
    edits: Vec<ResponseEdit>,
    lines: DataLines,
    /// Whether the text being read is scanned. Otherwise the rest of it passes, because it is not a
    /// JSON object or because its scan ended with an error.
    is_scanned: bool,
    lexer: Lexer,
    /// The objects of the response that are being read, the outermost first.
    frames: [Frame; DEPTH],
    next: Next,
    value: Value,
    /// The bytes received so far of a value that will be replaced.
    held: [u8; JSON_HELD_BYTES_MAX],
    held_bytes: usize,
    rewritten: u32,
}

/// Searches for an escape, which may represent a letter of a name.
///
/// The finder is static because it is as large as the rest of the state and has a larger alignment.
static ESCAPE: LazyLock<memmem::Finder<'static>> = LazyLock::new(|| memmem::Finder::new(b"\\u"));

/// Maximum number of nested objects that are read, for example the top level, `response`, `usage`
/// and the details object that contains the cached-token count.
const DEPTH: usize = 4;

/// State of one object of the response that is being read.
#[derive(Clone, Copy, Debug)]
struct Frame {
    /// The object as each edit numbers it; `None` for an edit that does not read it.
    places: [Option<Place>; RESPONSE_EDITS_MAX],
    /// Whether the members that each edit requires in the object have been found.
    found: [[bool; REQUIRED_MAX]; RESPONSE_EDITS_MAX],
    /// Whether the object has at least one member, so that an inserted member needs a comma.
    occupied: bool,
}

impl Frame {
    const TOP: Self = Self::new([Some(Place::TOP); RESPONSE_EDITS_MAX]);

    const fn new(places: [Option<Place>; RESPONSE_EDITS_MAX]) -> Self {
        Self {
            places,
            found: [[false; REQUIRED_MAX]; RESPONSE_EDITS_MAX],
            occupied: false,
        }
    }
}

/// A text that an edit writes: the index of the edit, and the text.
#[derive(Clone, Copy, Debug)]
struct Insertion {
    edit: usize,
    part: Part,
}

/// Action for the value of the member whose name was read last.
#[derive(Clone, Copy, Debug)]
enum Next {
    Skip,
    /// An object is read at these places; another value is replaced by `otherwise`, if given.
    Enter {
        places: [Option<Place>; RESPONSE_EDITS_MAX],
        otherwise: Option<Insertion>,
    },
    Replace(Insertion),
}

/// Action for the value being read.
#[derive(Clone, Copy, Debug)]
enum Value {
    Kept,
    /// The value is held back, and replaced by this text when it ends.
    Replaced(Insertion),
    /// The value is to be replaced by this text but is too long to be held back. It passes, and
    /// after it the same member is written a second time with the correct value, because parsers
    /// use the last of several members with the same name.
    Repeated(Insertion),
}

impl Transforms {
    /// Creates the transforms that apply `edits`, of which those after the first
    /// `RESPONSE_EDITS_MAX` are ignored. If two edits replace the same value, the first one counts.
    #[must_use]
    pub fn new(form: ResponseForm, mut edits: Vec<ResponseEdit>) -> Self {
        debug_assert!(edits.len() <= RESPONSE_EDITS_MAX, "too many edits");
        edits.truncate(RESPONSE_EDITS_MAX);
        Self {
            declared: form,
            form,
            edits,
            lines: DataLines::default(),
            is_scanned: form != ResponseForm::Sse,
            lexer: Lexer::new(),
            frames: [Frame::TOP; DEPTH],
            next: Next::Skip,
            value: Value::Kept,
            held: [0; JSON_HELD_BYTES_MAX],
            held_bytes: 0,
            rewritten: 0,
        }
    }

    /// Resets the state to the initial one, to edit the same response again from the start.
    pub fn restart(&mut self) {
        *self = Self::new(self.declared, std::mem::take(&mut self.edits));
    }

    /// Processes `piece`, the next part of the response, and passes the output to `out` as
    /// consecutive slices.
    pub fn feed(&mut self, piece: &[u8], out: &mut impl FnMut(&[u8])) {
        let mut sink = Sink {
            piece,
            done: 0,
            out,
        };
        if self.form == ResponseForm::Detected
            && let Some(first) = piece.first()
        {
            let is_json = *first == b'{' || first.is_ascii_whitespace();
            self.is_scanned = is_json;
            self.form = if is_json {
                ResponseForm::Json
            } else {
                ResponseForm::Sse
            };
        }
        match self.form {
            ResponseForm::Json | ResponseForm::Detected => {
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

    /// Returns how many texts were written into the response so far.
    #[must_use]
    pub const fn rewritten(&self) -> u32 {
        self.rewritten
    }

    fn lines<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>) {
        let piece = sink.piece;
        let mut candidates = Candidates::default();
        let mut at = 0;
        while at < piece.len() {
            if self.lines.is_at_line_start() {
                let candidate = candidates.next(&self.edits, piece, at);
                // Complete lines before the first candidate cannot contain a member to edit.
                at = memrchr2(b'\n', b'\r', &piece[at..candidate]).map_or(at, |end| at + end + 1);
            }
            match self.lines.next(piece, &mut at) {
                None => return,
                Some(LinePart::End { .. }) => {
                    self.release(sink);
                    self.is_scanned = false;
                }
                Some(LinePart::Data { start, end, begins }) => {
                    if begins {
                        self.is_scanned = piece[start] == b'{';
                        self.lexer.reset();
                    }
                    self.data(sink, start, end);
                    if end == piece.len() {
                        self.hold(sink, end);
                    }
                }
            }
        }
    }

    /// Scans `piece[start..end]`, which continues the current JSON text.
    fn data<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>, start: usize, end: usize) {
        if !self.is_scanned {
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
                    self.is_scanned = false;
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
        self.next = Next::Skip;
        let Some(name) = self.lexer.name() else {
            return;
        };
        for (index, edit) in self.edits.iter().enumerate() {
            let Some(place) = frame.places[index] else {
                continue;
            };
            let action = edit.member(place, name);
            if action == Action::Skip {
                continue;
            }
            for (required, found) in edit.required(place).iter().zip(&mut frame.found[index]) {
                *found |= required.is_some_and(|required| required.name == name);
            }
            let insertion = |part| Insertion { edit: index, part };
            match (action, &mut self.next) {
                (Action::Skip, _) | (_, Next::Replace(_)) => {}
                (Action::Replace(part), next) => *next = Next::Replace(insertion(part)),
                (
                    Action::Enter { place, otherwise },
                    Next::Enter {
                        places,
                        otherwise: first,
                    },
                ) => {
                    places[index] = Some(place);
                    *first = first.or(otherwise.map(insertion));
                }
                (Action::Enter { place, otherwise }, next) => {
                    let mut places = [None; RESPONSE_EDITS_MAX];
                    places[index] = Some(place);
                    *next = Next::Enter {
                        places,
                        otherwise: otherwise.map(insertion),
                    };
                }
            }
        }
    }

    fn value_start<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>, at: usize, kind: Kind) {
        self.value = Value::Kept;
        let insertion = match self.next {
            Next::Enter { places, .. } if kind == Kind::Object => {
                self.lexer.enter();
                self.frames[self.lexer.entered() - 1] = Frame::new(places);
                return;
            }
            Next::Skip
            | Next::Enter {
                otherwise: None, ..
            } => return,
            Next::Enter {
                otherwise: Some(insertion),
                ..
            }
            | Next::Replace(insertion) => insertion,
        };
        sink.pass(at);
        self.value = Value::Replaced(insertion);
    }

    fn value_end<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>, at: usize) {
        self.hold(sink, at);
        match self.value {
            Value::Kept => {}
            Value::Replaced(insertion) => {
                self.held_bytes = 0;
                self.emit(sink, insertion);
            }
            Value::Repeated(Insertion { edit, part }) => {
                sink.pass(at);
                (sink.out)(b",");
                let part = self.edits[edit].member_of(part);
                self.emit(sink, Insertion { edit, part });
            }
        }
        self.value = Value::Kept;
    }

    /// Handles the closing brace of an object, at `at` in the current `piece`: inserts before it
    /// the members that the object must have and does not.
    fn close<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>, at: usize) {
        // The lexer has already left the object, so `entered` is the index of its frame.
        let mut frame = self.frames[self.lexer.entered()];
        for edit in 0..self.edits.len() {
            let Some(place) = frame.places[edit] else {
                continue;
            };
            let required = self.edits[edit].required(place).into_iter();
            for (required, found) in required.zip(frame.found[edit]) {
                let Some(required) = required.filter(|_| !found) else {
                    continue;
                };
                sink.pass(at);
                if frame.occupied {
                    (sink.out)(b",");
                }
                frame.occupied = true;
                let part = required.part;
                self.emit(sink, Insertion { edit, part });
            }
        }
    }

    fn emit<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>, insertion: Insertion) {
        self.rewritten = self.rewritten.saturating_add(1);
        self.edits[insertion.edit].write(insertion.part, sink.out);
    }

    /// If the value being read will be replaced, holds back its bytes in `piece` up to position
    /// `end`. If they exceed the capacity of `held`, passes the bytes held so far and changes the
    /// action to [`Value::Repeated`].
    fn hold<F: FnMut(&[u8])>(&mut self, sink: &mut Sink<'_, F>, end: usize) {
        let Value::Replaced(insertion) = self.value else {
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
                self.value = Value::Repeated(insertion);
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

/// Output of one call of [`Transforms::feed`] or [`Transforms::finish`]. Bytes between edits
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

/// Searches for the next position in a piece that may belong to the name of a member to edit: one
/// for which an edit looks, or an escape that may represent one of its letters.
///
/// The last result of each search is cached, so that every byte is searched only once.
#[derive(Default)]
struct Candidates {
    names: [Option<usize>; RESPONSE_EDITS_MAX],
    escape: Option<usize>,
}

impl Candidates {
    fn next(&mut self, edits: &[ResponseEdit], piece: &[u8], from: usize) -> usize {
        let escape = match self.escape {
            Some(at) if at >= from => at,
            _ => ESCAPE
                .find(&piece[from..])
                .map_or(piece.len(), |at| from + at),
        };
        self.escape = Some(escape);
        let names = edits.iter().zip(&mut self.names).map(|(edit, known)| {
            let at = match *known {
                Some(at) if at >= from => at,
                _ => edit.candidate(piece, from),
            };
            *known = Some(at);
            at
        });
        names.fold(escape, usize::min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::transform::{PromptUsage, UsageShape};

    fn cached_tokens(form: ResponseForm, shape: UsageShape, count: u64) -> Transforms {
        let usage = PromptUsage {
            cached: count,
            ..PromptUsage::NONE
        };
        with_usage(form, shape, &usage)
    }

    fn with_usage(form: ResponseForm, shape: UsageShape, usage: &PromptUsage) -> Transforms {
        let edit = ResponseEdit::usage(shape, usage);
        Transforms::new(form, edit.into_iter().collect())
    }

    fn rewrite(form: ResponseForm, shape: UsageShape, text: &str, size: usize) -> (String, u32) {
        apply(cached_tokens(form, shape, 7), text, size)
    }

    fn apply(mut rewriter: Transforms, text: &str, size: usize) -> (String, u32) {
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

    /// The messages API divides the prompt among its counts, so that all of them are set.
    #[test]
    fn messages() {
        let whole = PromptUsage {
            cached: 7,
            created: Some(11),
            other: Some(13),
        };
        let without_created = PromptUsage {
            created: None,
            ..whole
        };
        let cases = [
            (
                &whole,
                r#"{"usage":{"input_tokens":1,"output_tokens":2,"cache_creation_input_tokens":0,"cache_read_input_tokens":3}}"#,
                r#"{"usage":{"input_tokens":13,"output_tokens":2,"cache_creation_input_tokens":11,"cache_read_input_tokens":7}}"#,
                3,
            ),
            (
                &whole,
                r#"{"type":"message_start","message":{"usage":{"input_tokens":31,"output_tokens":0}}}"#,
                r#"{"type":"message_start","message":{"usage":{"input_tokens":13,"output_tokens":0,"cache_read_input_tokens":7,"cache_creation_input_tokens":11}}}"#,
                3,
            ),
            (
                &without_created,
                r#"{"usage":{"cache_creation_input_tokens":5,"x":1}}"#,
                r#"{"usage":{"cache_creation_input_tokens":0,"x":1,"cache_read_input_tokens":7}}"#,
                2,
            ),
            (
                &whole,
                r#"{"usage":{}}"#,
                r#"{"usage":{"cache_read_input_tokens":7,"cache_creation_input_tokens":11}}"#,
                2,
            ),
            (
                &whole,
                r#"{"response":{"usage":{}}}"#,
                r#"{"response":{"usage":{}}}"#,
                0,
            ),
        ];
        for (usage, text, want, count) in cases {
            for size in 1..=text.len() {
                let edit = with_usage(ResponseForm::Json, UsageShape::Messages, usage);
                assert_eq!(apply(edit, text, size), (want.to_owned(), count), "{text}");
            }
        }
        let unknown = PromptUsage {
            other: None,
            ..whole
        };
        assert!(ResponseEdit::usage(UsageShape::Messages, &unknown).is_none());
    }

    #[test]
    fn counts_of_created_tokens_are_replaced() {
        let usage = PromptUsage {
            cached: 7,
            created: Some(11),
            other: None,
        };
        for (shape, text, want) in [
            (
                UsageShape::Chat,
                r#"{"usage":{"prompt_tokens_details":{"cached_tokens":1,"created_cache_tokens":0}}}"#,
                r#"{"usage":{"prompt_tokens_details":{"cached_tokens":7,"created_cache_tokens":11}}}"#,
            ),
            (
                UsageShape::Responses,
                r#"{"response":{"usage":{"input_tokens":9,"input_tokens_details":{"cache_write_tokens":0,"cached_tokens":1}}}}"#,
                r#"{"response":{"usage":{"input_tokens":9,"input_tokens_details":{"cache_write_tokens":11,"cached_tokens":7}}}}"#,
            ),
        ] {
            for size in 1..=text.len() {
                let edit = with_usage(ResponseForm::Json, shape, &usage);
                assert_eq!(apply(edit, text, size), (want.to_owned(), 2), "{text}");
            }
        }
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
        let mut rewriter = cached_tokens(ResponseForm::Sse, UsageShape::Chat, 7);
        for frame in frames {
            let mut slices = Vec::new();
            rewriter.feed(frame.as_bytes(), &mut |bytes| slices.push(bytes.to_vec()));
            assert_eq!(slices, [frame.as_bytes()]);
        }
    }

    #[test]
    fn counts_are_formatted_correctly() {
        for count in [0, 9, 10, 99, 100, 416, u64::MAX - 1, u64::MAX] {
            let mut rewriter = cached_tokens(ResponseForm::Json, UsageShape::Responses, count);
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
