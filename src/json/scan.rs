//! Finds the members of a request body that a plan may read or edit, while the body arrives.
//!
//! The scanner reads the top level, every `sampling_params` object in it, every `extra_args` object
//! in those, and every `vllm_xargs` object at the top level. It records the positions of the
//! watched members there, as offsets; it stores no bytes of the body. Names are compared after
//! unescaping.
//!
//! RFC 8259 section 4 does not define the meaning of repeated names. The engines use the last
//! member of a name, so [`Document::last`] returns that one. All repetitions are recorded.

use std::ops::Range;

#[cfg(any(test, feature = "fuzzing"))]
use super::block::Isa;
use super::error::{JsonError, JsonReason};
use super::lex::{Event, Kind, Lexer};
use crate::limits::{JSON_MEMBERS_MAX, JSON_NAME_BYTES_MAX, JSON_OBJECTS_MAX};
use crate::span::Span;

/// The object of a request body that contains a watched member.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Level {
    /// The outermost object.
    Top,
    /// The `sampling_params` object in the outermost object.
    SamplingParams,
    /// The `extra_args` object in `sampling_params`.
    ExtraArgs,
    /// The `vllm_xargs` object in the outermost object, which engines use as `extra_args` for
    /// bodies without `sampling_params`.
    Xargs,
    /// The `parameters` object in the outermost object, from which SGLang takes the members of a
    /// request of Vertex AI.
    Parameters,
}

impl Level {
    /// Returns the level of an object that is the value of the member `name` of this level, or
    /// `None` if such an object is not read.
    pub(super) fn child(self, name: &[u8]) -> Option<Self> {
        match (self, name) {
            (Self::Top, b"sampling_params") => Some(Self::SamplingParams),
            (Self::SamplingParams, b"extra_args") => Some(Self::ExtraArgs),
            (Self::Top, b"vllm_xargs") => Some(Self::Xargs),
            (Self::Top, b"parameters") => Some(Self::Parameters),
            _ => None,
        }
    }

    /// Returns the enclosing level. The parent of the top level is the top level.
    pub(super) const fn parent(self) -> Self {
        match self {
            Self::Top | Self::SamplingParams | Self::Xargs | Self::Parameters => Self::Top,
            Self::ExtraArgs => Self::SamplingParams,
        }
    }

    /// Returns the range of [`Level::index`] of this level and of all levels inside it.
    pub(super) const fn subtree(self) -> Range<usize> {
        match self {
            Self::Top => 0..LEVELS,
            Self::SamplingParams => 1..3,
            Self::ExtraArgs => 2..3,
            Self::Xargs => 3..4,
            Self::Parameters => 4..5,
        }
    }

    /// Returns the index of this level in arrays of length [`LEVELS`].
    pub(super) const fn index(self) -> usize {
        match self {
            Self::Top => 0,
            Self::SamplingParams => 1,
            Self::ExtraArgs => 2,
            Self::Xargs => 3,
            Self::Parameters => 4,
        }
    }
}

/// Number of values of [`Level`].
pub(super) const LEVELS: usize = 5;

/// Table of the watched members: for each, the level of the object that contains the member, and
/// the name of the member.
///
/// Names must be printable ASCII that needs no escapes, and at most `JSON_NAME_BYTES_MAX` bytes
/// long.
pub type Watch = &'static [(Level, &'static str)];

/// Returns the name from the table `watch` if `name` is watched at `level`, otherwise `None`.
pub(super) fn watched(watch: Watch, level: Level, name: &[u8]) -> Option<&'static str> {
    let found = watch
        .iter()
        .find(|entry| entry.0 == level && entry.1.as_bytes() == name);
    found.map(|entry| entry.1)
}

/// Returns whether the lexer can find all names in `watch` and an edit can insert them without
/// escapes.
pub(super) fn is_valid_watch(watch: Watch) -> bool {
    watch.iter().all(|(_, name)| {
        let plain = |byte: u8| matches!(byte, b' '..=b'~') && !matches!(byte, b'"' | b'\\');
        name.len() <= JSON_NAME_BYTES_MAX && name.bytes().all(plain)
    })
}

/// A watched member that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Level of the object that contains the member.
    pub level: Level,
    /// The unescaped name, from the watch table.
    pub name: &'static str,
    /// Span of the name in the body, including its quotes.
    pub key: Span,
    /// Span of the value in the body.
    pub value: Span,
    /// Kind of the value.
    pub kind: Kind,
    /// Index in [`Document::objects`] of the object that contains the member.
    pub(super) object: usize,
    /// Offset in the body of the comma before the name; `None` for the first member of an object.
    pub(super) comma_before: Option<usize>,
    /// Offset in the body of the comma after the value; `None` for the last member of an object.
    pub(super) comma_after: Option<usize>,
}

/// An object of the body whose members were read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Object {
    pub(super) level: Level,
    /// Offset of the closing brace in the body.
    pub(super) close: usize,
    /// Number of members of the object, watched or not.
    pub(super) members: usize,
}

/// Records the positions of the watched members of a request body while it arrives.
#[derive(Clone, Debug)]
pub struct Scanner {
    lexer: Lexer,
    watch: Watch,
    /// State of the object being read at each level, indexed by [`Level::index`].
    frames: [Frame; LEVELS],
    level: Level,
    members: Vec<Member>,
    objects: Vec<Object>,
    /// For each level, the index in `objects` of the object that an engine would use, given the
    /// input so far; `None` without such an object.
    effective: [Option<usize>; LEVELS],
    /// Between the name and the value of a member: the level of the value if it turns out to be an
    /// object. `None` if an object there would be skipped.
    child: Option<Level>,
    failed: Option<JsonError>,
}

/// State of one object of the body that is being read.
#[derive(Clone, Copy, Debug, Default)]
struct Frame {
    object: usize,
    comma: Option<usize>,
    /// Index in [`Scanner::members`] of the member whose name was read last. `None` if that name is
    /// not watched, and from the next comma to the next name.
    member: Option<usize>,
}

impl Scanner {
    /// Creates a scanner that records the members of `watch`.
    #[must_use]
    pub fn new(watch: Watch) -> Self {
        debug_assert!(is_valid_watch(watch));
        let top = Object {
            level: Level::Top,
            close: 0,
            members: 0,
        };
        Self {
            lexer: Lexer::new(),
            watch,
            frames: [Frame::default(); LEVELS],
            level: Level::Top,
            members: Vec::new(),
            objects: vec![top],
            effective: [Some(0), None, None, None, None],
            child: None,
            failed: None,
        }
    }

    /// Uses the implementation `isa` to skip strings and containers, instead of the fastest one
    /// that this machine supports.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn with_isa(mut self, isa: Isa) -> Self {
        self.lexer = self.lexer.with_isa(isa);
        self
    }

    /// Scans `piece`, the next part of the body.
    ///
    /// # Errors
    ///
    /// The body is not a JSON object, or has more watched members or objects than the limits allow.
    /// Every later call returns the same error.
    pub fn feed(&mut self, piece: &[u8]) -> Result<(), JsonError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.read(piece)
            .inspect_err(|&error| self.failed = Some(error))
    }

    /// Ends the scan at the end of the body and returns the result.
    ///
    /// # Errors
    ///
    /// The body is incomplete, or [`Scanner::feed`] failed earlier, in which case its error is
    /// returned.
    pub fn finish(self) -> Result<Document, JsonError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        self.lexer.finish()?;
        Ok(Document {
            watch: self.watch,
            members: self.members,
            objects: self.objects,
            effective: self.effective,
            bytes: self.lexer.base(),
        })
    }

    fn read(&mut self, piece: &[u8]) -> Result<(), JsonError> {
        while let Some(event) = self.lexer.next(piece)? {
            match event {
                Event::Name { span } => self.name(span)?,
                Event::Value { at, kind } => self.value(at, kind)?,
                Event::ValueEnd { at } => self.value_end(at),
                Event::Comma { at } => {
                    let frame = &mut self.frames[self.level.index()];
                    frame.comma = Some(at);
                    if let Some(member) = frame.member.take() {
                        self.members[member].comma_after = Some(at);
                    }
                }
                Event::Close { at } => self.close(at),
            }
        }
        Ok(())
    }

    fn name(&mut self, key: Span) -> Result<(), JsonError> {
        let frame = &mut self.frames[self.level.index()];
        self.objects[frame.object].members += 1;
        self.child = None;
        frame.member = None;
        let Some(text) = self.lexer.name() else {
            return Ok(());
        };
        self.child = self.level.child(text);
        let Some(name) = watched(self.watch, self.level, text) else {
            return Ok(());
        };
        if self.members.len() == JSON_MEMBERS_MAX {
            return Err(JsonError {
                offset: key.start,
                reason: JsonReason::TooManyMembers,
            });
        }
        frame.member = Some(self.members.len());
        self.members.push(Member {
            level: self.level,
            name,
            key,
            value: Span::new(key.end, key.end),
            kind: Kind::Null,
            object: frame.object,
            comma_before: frame.comma,
            comma_after: None,
        });
        Ok(())
    }

    fn value(&mut self, at: usize, kind: Kind) -> Result<(), JsonError> {
        if let Some(member) = self.frames[self.level.index()].member {
            self.members[member].value = Span::new(at, at);
            self.members[member].kind = kind;
        }
        let Some(child) = self.child.take() else {
            return Ok(());
        };
        // A value of any kind replaces every earlier object of the same name.
        for hidden in &mut self.effective[child.subtree()] {
            *hidden = None;
        }
        if kind != Kind::Object {
            return Ok(());
        }
        if self.objects.len() == JSON_OBJECTS_MAX {
            return Err(JsonError {
                offset: at,
                reason: JsonReason::TooManyObjects,
            });
        }
        let object = self.objects.len();
        self.objects.push(Object {
            level: child,
            close: at,
            members: 0,
        });
        self.effective[child.index()] = Some(object);
        self.frames[child.index()] = Frame {
            object,
            ..Frame::default()
        };
        self.level = child;
        self.lexer.enter();
        Ok(())
    }

    fn value_end(&mut self, at: usize) {
        if let Some(member) = self.frames[self.level.index()].member {
            self.members[member].value.end = at;
        }
    }

    fn close(&mut self, at: usize) {
        self.objects[self.frames[self.level.index()].object].close = at;
        if self.level != Level::Top {
            self.level = self.level.parent();
            self.value_end(at + 1);
        }
    }
}

/// Result of scanning a complete body: the positions of the watched members, without any bytes.
#[derive(Clone, Debug)]
pub struct Document {
    pub(super) watch: Watch,
    pub(super) members: Vec<Member>,
    pub(super) objects: Vec<Object>,
    /// For each level, the index in `objects` of the object that an engine uses; `None` without
    /// such an object.
    pub(super) effective: [Option<usize>; LEVELS],
    /// Length of the body in bytes.
    pub(super) bytes: usize,
}

impl Document {
    /// Returns the document of a body without bytes, which no edit applies to.
    #[must_use]
    pub const fn empty(watch: Watch) -> Self {
        Self {
            watch,
            members: Vec::new(),
            objects: Vec::new(),
            effective: [None; LEVELS],
            bytes: 0,
        }
    }

    /// Returns all watched members, including repetitions, in the order of their names in the body.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Returns the member that an engine uses: the last member of that name in the last object of
    /// that level. Returns `None` without such a member.
    ///
    /// An object does not count if a later member of the same name replaces it, even with a value
    /// that is not an object.
    #[must_use]
    pub fn last(&self, level: Level, name: &str) -> Option<&Member> {
        let object = self.effective[level.index()]?;
        self.members
            .iter()
            .rev()
            .find(|member| member.object == object && member.name == name)
    }

    /// Returns whether an engine finds an object at `level`. An object that a later value replaces
    /// does not count.
    #[must_use]
    pub fn has_object(&self, level: Level) -> bool {
        self.effective[level.index()].is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WATCH: Watch = &[
        (Level::Top, "max_tokens"),
        (Level::SamplingParams, "max_tokens"),
        (Level::ExtraArgs, "max_tokens"),
    ];

    fn scan(text: &[u8]) -> Result<Document, JsonError> {
        let mut scanner = Scanner::new(WATCH);
        scanner.feed(text)?;
        scanner.finish()
    }

    /// Test cases: name, body, level, and the text of the `max_tokens` value that an engine uses at
    /// that level.
    const READ: [(&str, &str, Level, Option<&str>); 15] = [
        ("plain", r#"{"max_tokens":7}"#, Level::Top, Some("7")),
        (
            "blanks",
            "{ \"max_tokens\"\n:\t7\r, \"a\":1}",
            Level::Top,
            Some("7"),
        ),
        ("escaped", r#"{"max\u005ftokens":7}"#, Level::Top, Some("7")),
        (
            "upper case hex",
            r#"{"max\u005Ftokens":7}"#,
            Level::Top,
            Some("7"),
        ),
        (
            "repeated",
            r#"{"max_tokens":1,"max_tokens":"2"}"#,
            Level::Top,
            Some("\"2\""),
        ),
        (
            "in a string",
            r#"{"a":"\"max_tokens\":7"}"#,
            Level::Top,
            None,
        ),
        (
            "deeper",
            r#"{"messages":[{"max_tokens":7}],"b":{"max_tokens":8}}"#,
            Level::Top,
            None,
        ),
        (
            "longer",
            r#"{"max_tokens ":7,"max_tokenss":8}"#,
            Level::Top,
            None,
        ),
        (
            "beyond ASCII",
            r#"{"max_tokens\u00e9":7,"max\u015ftokens":8}"#,
            Level::Top,
            None,
        ),
        ("NUL", r#"{"max_tokens\u0000":7}"#, Level::Top, None),
        (
            "inside",
            r#"{"sampling_params":{"max_tokens":7}}"#,
            Level::SamplingParams,
            Some("7"),
        ),
        (
            "inside repeated",
            r#"{"sampling_params":{"max_tokens":7},"sampling_params":{}}"#,
            Level::SamplingParams,
            None,
        ),
        (
            "inside replaced",
            r#"{"sampling_params":{"max_tokens":7},"sampling_params":null}"#,
            Level::SamplingParams,
            None,
        ),
        (
            "inside arguments",
            r#"{"sampling_params":{"extra_args":{"max_tokens":1e9}}}"#,
            Level::ExtraArgs,
            Some("1e9"),
        ),
        (
            "arguments at the top",
            r#"{"extra_args":{"max_tokens":1}}"#,
            Level::ExtraArgs,
            None,
        ),
    ];

    #[test]
    fn last_returns_the_value_that_an_engine_uses() {
        for (name, text, level, want) in READ {
            let document = scan(text.as_bytes()).unwrap();
            let found = document
                .last(level, "max_tokens")
                .map(|m| m.value.of(text.as_bytes()));
            assert_eq!(found, want.map(str::as_bytes), "{name}");
        }
    }

    #[test]
    fn invalid_bodies_are_refused_with_reason_and_offset() {
        use JsonReason as R;
        let cases: [(&[u8], usize, R); 33] = [
            (b"", 0, R::Incomplete),
            (b"  ", 2, R::Incomplete),
            (b"null", 0, R::NotAnObject),
            (b" [1]", 1, R::NotAnObject),
            (b"\"a\"", 0, R::NotAnObject),
            (b"7", 0, R::NotAnObject),
            (b"\xef\xbb\xbf{}", 0, R::NotUtf8Text),
            (b"\xff\xfe{\0}\0", 0, R::NotUtf8Text),
            (b"\0{\0}", 0, R::NotUtf8Text),
            (b"{\0}\0", 1, R::ExpectedNameOrBrace),
            (b"{\0\0\0}\0\0\0", 1, R::ExpectedNameOrBrace),
            (b"{", 1, R::Incomplete),
            (b"{a:1}", 1, R::ExpectedNameOrBrace),
            (b"{,}", 1, R::ExpectedNameOrBrace),
            (b"{\"a\":1,}", 7, R::ExpectedName),
            (b"{\"a\" 1}", 5, R::ExpectedColon),
            (b"{\"a\":}", 5, R::ExpectedValue),
            (b"{\"a\":+1}", 5, R::ExpectedValue),
            (b"{\"a\":NaN}", 5, R::ExpectedValue),
            (b"{\"a\":nul}", 8, R::InvalidLiteral),
            (b"{\"a\":01}", 6, R::ExpectedCommaOrClose),
            (b"{\"a\":-}", 6, R::InvalidNumber),
            (b"{\"a\":1.}", 7, R::InvalidNumber),
            (b"{\"a\":1e+}", 8, R::InvalidNumber),
            (b"{\"a\":1 \"b\":2}", 7, R::ExpectedCommaOrClose),
            (b"{\"a\":[1,2}}", 9, R::MismatchedBracket),
            (b"{\"a\":{\"b\":1]}", 11, R::MismatchedBracket),
            (b"{\"a\":\"x\ny\"}", 7, R::ControlCharacter),
            (b"{\"a\":[\"x\\\n\"]}", 9, R::ControlCharacter),
            (b"{\"a\":[1,\0]}", 8, R::ControlCharacter),
            (b"{\"a\\x\":1}", 4, R::InvalidEscape),
            (b"{\"\\u00g0\":1}", 6, R::InvalidEscape),
            (b"{} x", 3, R::TrailingBytes),
        ];
        for (text, offset, reason) in cases {
            let error = JsonError { offset, reason };
            assert_eq!(scan(text).err(), Some(error), "{}", text.escape_ascii());
            let mut scanner = Scanner::new(WATCH);
            let fed = text.chunks(1).try_for_each(|piece| scanner.feed(piece));
            let result = fed.and_then(|()| scanner.finish());
            assert_eq!(
                result.err(),
                Some(error),
                "{} by bytes",
                text.escape_ascii()
            );
        }
    }

    #[test]
    fn nesting_depth_is_limited() {
        use crate::limits::JSON_DEPTH_MAX;
        for open in ["[", "{\"a\":"] {
            let close = if open == "[" { "]" } else { "}" };
            let text = |depth: usize| {
                format!("{{\"x\":{}0{}}}", open.repeat(depth), close.repeat(depth)).into_bytes()
            };
            assert!(scan(&text(JSON_DEPTH_MAX - 1)).is_ok());
            let error = scan(&text(JSON_DEPTH_MAX)).unwrap_err();
            assert_eq!(error.reason, JsonReason::TooDeep);
            assert_eq!(scan(&text(100_000)).unwrap_err(), error);
        }
    }

    #[test]
    fn repetitions_are_limited() {
        let body = |member: &str, count: usize| {
            format!("{{{}}}", vec![member; count].join(",")).into_bytes()
        };
        assert!(scan(&body("\"max_tokens\":1", JSON_MEMBERS_MAX)).is_ok());
        let error = scan(&body("\"max_tokens\":1", JSON_MEMBERS_MAX + 1)).unwrap_err();
        assert_eq!(error.reason, JsonReason::TooManyMembers);
        assert!(scan(&body("\"sampling_params\":{}", JSON_OBJECTS_MAX - 1)).is_ok());
        let error = scan(&body("\"sampling_params\":{}", JSON_OBJECTS_MAX)).unwrap_err();
        assert_eq!(error.reason, JsonReason::TooManyObjects);
        assert!(scan(&body("\"sampling_params\":[{}]", 1000)).is_ok());
        assert!(scan(&body("\"other\":{}", 100_000)).is_ok());
    }

    #[test]
    fn names_of_every_length_around_the_limit() {
        const LONG: &str = "nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn";
        const { assert!(LONG.len() == JSON_NAME_BYTES_MAX) };
        const WATCH: Watch = &[(Level::Top, LONG)];
        for extra in ["", "n", "nnnnnnnnnnnnnnnnnnnnn"] {
            let mut scanner = Scanner::new(WATCH);
            scanner
                .feed(format!("{{\"{LONG}{extra}\":1}}").as_bytes())
                .unwrap();
            let found = scanner.finish().unwrap().members().len();
            assert_eq!(found, usize::from(extra.is_empty()), "{extra}");
        }
    }

    #[test]
    fn an_error_is_permanent() {
        let mut scanner = Scanner::new(WATCH);
        let error = scanner.feed(b"{]").unwrap_err();
        assert_eq!(scanner.feed(b"}"), Err(error));
        assert_eq!(scanner.finish().err(), Some(error));
    }
}
