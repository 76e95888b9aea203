//! The lexer that all readers of this module use.
//!
//! It reads one text whose outermost value is an object (RFC 8259), in parts that may be split at
//! any byte. It makes one forward pass without recursion, and never backtracks further than over a
//! run of backslashes. It reports the members of the outermost object. If the value of a member is
//! an object, the reader may [`enter`] it, and its members are then reported as well. Everything
//! else is skipped.
//!
//! In the objects that are read, the lexer checks everything except UTF-8 and the escapes inside
//! string values. In skipped containers it checks that brackets match by kind, that strings end and
//! contain no control characters, and the depth limit. Any other error inside skipped containers is
//! left for the engine to detect.
//!
//! [`enter`]: Lexer::enter

use super::block::{self, Isa, Skip};
use super::error::{JsonError, JsonReason};
use super::grammar::{Number, unescape};
use crate::limits::JSON_NAME_BYTES_MAX;
use crate::span::Span;

/// Kind of a JSON value, determined from its first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `{...}`
    Object,
    /// `[...]`
    Array,
    /// `"..."`
    String,
    /// A number.
    Number,
    /// `true`
    True,
    /// `false`
    False,
    /// `null`
    Null,
}

/// One event of the lexer. All offsets are relative to the start of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A member name. `span` includes its quotes; [`Lexer::name`] returns the unescaped name.
    Name { span: Span },
    /// The value of the member whose name was reported last begins at `at`.
    Value { at: usize, kind: Kind },
    /// The value of a member has ended, and `at` is the offset after its last byte. Not reported
    /// for an object that was entered.
    ValueEnd { at: usize },
    /// The comma between two members is at `at`.
    Comma { at: usize },
    /// The closing brace of an object that was entered, or of the outermost object, is at `at`.
    Close { at: usize },
}

/// Lexer for a JSON text that arrives in parts. After an error, [`Lexer::reset`] must be called
/// before further use.
#[derive(Clone, Debug)]
pub(super) struct Lexer {
    state: State,
    /// Offset in the text of the start of the `piece` that is passed to [`Lexer::next`].
    base: usize,
    /// Number of bytes consumed of the `piece` that is passed to [`Lexer::next`].
    at: usize,
    isa: Isa,
    skip: Skip,
    name_start: usize,
    name: Name,
}

impl Lexer {
    pub(super) fn new() -> Self {
        Self {
            state: State::Start,
            base: 0,
            at: 0,
            isa: Isa::best(),
            skip: Skip::new(),
            name_start: 0,
            name: Name::new(),
        }
    }

    /// Uses the implementation `isa` to skip strings and containers, instead of the fastest one
    /// that this machine supports.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn with_isa(self, isa: Isa) -> Self {
        Self { isa, ..self }
    }

    /// Prepares the lexer for another text.
    pub(super) fn reset(&mut self) {
        self.state = State::Start;
        self.base = 0;
        self.at = 0;
        self.skip.reset();
    }

    /// Returns the offset in the text of the start of the `piece` that is passed to
    /// [`Lexer::next`]. Once that `piece` is exhausted, this is the number of bytes read so far,
    /// which is the offset of the next `piece`.
    pub(super) const fn base(&self) -> usize {
        self.base
    }

    /// Returns the number of objects entered and not yet closed, including the outermost one.
    pub(super) const fn entered(&self) -> usize {
        self.skip.entered
    }

    /// Returns the unescaped name of the member whose name was read last.
    ///
    /// Returns `None` if the name is longer than `JSON_NAME_BYTES_MAX` bytes or contains an escaped
    /// character outside of ASCII. No reader looks for such a name.
    pub(super) fn name(&self) -> Option<&[u8]> {
        self.name
            .comparable
            .then(|| &self.name.bytes[..usize::from(self.name.len)])
    }

    /// Returns the next event, or `None` once `piece` is exhausted.
    ///
    /// Every call must pass the same `piece` until `None` is returned. The call after that must
    /// pass the next part of the text.
    #[inline(always)]
    pub(super) fn next(&mut self, piece: &[u8]) -> Result<Option<Event>, JsonError> {
        loop {
            let event = match self.state {
                State::InName(escape) => self.in_name(piece, escape)?,
                State::InString => self.in_string(piece)?.then(|| self.value_end()),
                State::InNumber(number) => self.in_number(piece, number)?,
                State::InLiteral(rest) => self.in_literal(piece, rest)?,
                State::InSkip => self.in_skip(piece)?.then(|| self.value_end()),
                State::Start => match self.next_token(piece) {
                    Some(b'{') => {
                        self.at += 1;
                        self.skip.nest.open(true);
                        self.skip.entered = 1;
                        self.state = State::FirstName;
                        continue;
                    }
                    Some(byte) => return Err(self.unexpected(byte)),
                    None => None,
                },
                State::FirstName | State::NextName => match self.next_token(piece) {
                    Some(b'"') => match self.plain_name(piece) {
                        Some(event) => Some(event),
                        None => {
                            self.start_name();
                            continue;
                        }
                    },
                    Some(b'}') if matches!(self.state, State::FirstName) => Some(self.close()),
                    Some(byte) => return Err(self.unexpected(byte)),
                    None => None,
                },
                State::Colon => match self.next_token(piece) {
                    Some(b':') => {
                        self.at += 1;
                        self.state = State::Value;
                        continue;
                    }
                    Some(byte) => return Err(self.unexpected(byte)),
                    None => None,
                },
                State::Value => match self.next_token(piece) {
                    Some(byte) => Some(self.value(byte)?),
                    None => None,
                },
                State::AfterValue => match self.next_token(piece) {
                    Some(b',') => Some(self.comma()),
                    Some(b'}') => Some(self.close()),
                    Some(byte) => return Err(self.unexpected(byte)),
                    None => None,
                },
                State::End => match self.next_token(piece) {
                    Some(byte) => return Err(self.unexpected(byte)),
                    None => None,
                },
            };
            if event.is_none() {
                debug_assert_eq!(self.at, piece.len());
                self.base += piece.len();
                self.at = 0;
            }
            return Ok(event);
        }
    }

    /// Enters the object whose [`Event::Value`] was the last event, so that its members are
    /// reported.
    pub(super) fn enter(&mut self) {
        debug_assert!(matches!(self.state, State::InSkip) && !self.skip.quoted);
        debug_assert_eq!(self.skip.nest.top.depth, self.skip.entered + 1);
        self.skip.entered += 1;
        self.state = State::FirstName;
    }

    /// Checks that the text is complete, and fails with [`JsonReason::Incomplete`] if it is not.
    /// Must be called after the last part was read.
    pub(super) fn finish(&self) -> Result<(), JsonError> {
        match self.state {
            State::End => Ok(()),
            _ => Err(self.error_at(0, JsonReason::Incomplete)),
        }
    }

    /// Skips whitespace and returns the byte after it without consuming that byte, or `None` if
    /// `piece` is exhausted.
    #[inline(always)]
    fn next_token(&mut self, piece: &[u8]) -> Option<u8> {
        while let Some(&byte) = piece.get(self.at) {
            if !matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
                return Some(byte);
            }
            self.at += 1;
        }
        None
    }

    /// Returns the error for `byte`, the next byte of the piece, which the state does not allow.
    #[cold]
    fn unexpected(&self, byte: u8) -> JsonError {
        self.error_at(self.at, self.state.reason(byte))
    }

    #[inline(always)]
    fn comma(&mut self) -> Event {
        let at = self.base + self.at;
        self.at += 1;
        self.state = State::NextName;
        Event::Comma { at }
    }

    #[inline(always)]
    fn close(&mut self) -> Event {
        let at = self.base + self.at;
        self.at += 1;
        self.skip.nest.close();
        self.skip.entered -= 1;
        self.state = if self.skip.entered == 0 {
            State::End
        } else {
            State::AfterValue
        };
        Event::Close { at }
    }

    /// Starts the value of a member at its first byte, `byte`, and returns the event for it.
    #[inline(always)]
    fn value(&mut self, byte: u8) -> Result<Event, JsonError> {
        let at = self.at;
        self.at += 1;
        let (state, kind) = match byte {
            b'"' => (State::InString, Kind::String),
            b'{' => (State::InSkip, Kind::Object),
            b'[' => (State::InSkip, Kind::Array),
            b't' => (State::InLiteral(b"rue"), Kind::True),
            b'f' => (State::InLiteral(b"alse"), Kind::False),
            b'n' => (State::InLiteral(b"ull"), Kind::Null),
            _ => match Number::start(byte) {
                Some(number) => (State::InNumber(number), Kind::Number),
                None => return Err(self.error_at(at, JsonReason::ExpectedValue)),
            },
        };
        if matches!(kind, Kind::Object | Kind::Array) && !self.skip.nest.open(kind == Kind::Object)
        {
            return Err(self.error_at(at, JsonReason::TooDeep));
        }
        debug_assert!(
            !self.skip.quoted && !self.skip.escaped,
            "the previous string has been read completely"
        );
        self.state = state;
        Ok(Event::Value {
            at: self.base + at,
            kind,
        })
    }

    #[inline(always)]
    fn value_end(&mut self) -> Event {
        self.state = State::AfterValue;
        Event::ValueEnd {
            at: self.base + self.at,
        }
    }

    /// Reads a member name in one step if possible, at its opening quote: if it ends within
    /// [`PLAIN_NAME_BYTES`] bytes, has no escapes, and `piece` has that many bytes left. Nearly all
    /// names meet this. Also reads the colon if it is the next byte. Otherwise returns `None` and
    /// consumes nothing.
    #[inline(always)]
    fn plain_name(&mut self, piece: &[u8]) -> Option<Event> {
        let (_, text) = piece.get(self.at..)?.split_first()?;
        let bytes: &[u8; PLAIN_NAME_BYTES] = text.first_chunk()?;
        let len = block::plain_text(bytes);
        if bytes.get(len) != Some(&b'"') {
            return None;
        }
        self.name.set(bytes, len);
        let start = self.base + self.at;
        self.at += len + 2;
        let span = Span::new(start, self.base + self.at);
        self.state = State::Colon;
        if text.get(len + 1) == Some(&b':') {
            self.at += 1;
            self.state = State::Value;
        }
        Some(Event::Name { span })
    }

    /// Starts to read a member name that [`Lexer::plain_name`] cannot, at its opening quote.
    fn start_name(&mut self) {
        self.name_start = self.base + self.at;
        self.at += 1;
        self.name.clear();
        self.state = State::InName(Escape::None);
    }

    /// Reads a member name and stores it unescaped in `self.name`. Returns `None` if `piece` ends
    /// first; the next call then continues the name.
    #[inline(always)]
    fn in_name(&mut self, piece: &[u8], mut escape: Escape) -> Result<Option<Event>, JsonError> {
        while let Some(&byte) = piece.get(self.at) {
            match (escape, byte) {
                (_, 0..=0x1f) => return Err(self.error_at(self.at, JsonReason::ControlCharacter)),
                (Escape::None, b'"') => {
                    self.at += 1;
                    self.state = State::Colon;
                    let span = Span::new(self.name_start, self.base + self.at);
                    return Ok(Some(Event::Name { span }));
                }
                (Escape::None, b'\\') => escape = Escape::Backslash,
                (Escape::None, _) => self.name.push(byte),
                (Escape::Backslash, b'u') => escape = Escape::Hex { digits: 0, code: 0 },
                (Escape::Backslash, _) => {
                    let Some(plain) = unescape(byte) else {
                        return Err(self.error_at(self.at, JsonReason::InvalidEscape));
                    };
                    self.name.push(plain);
                    escape = Escape::None;
                }
                (Escape::Hex { digits, code }, _) => {
                    let Some(digit) = char::from(byte).to_digit(16) else {
                        return Err(self.error_at(self.at, JsonReason::InvalidEscape));
                    };
                    let code = code * 16 + digit;
                    escape = Escape::Hex {
                        digits: digits + 1,
                        code,
                    };
                    if digits == 3 {
                        self.name.push_code(code);
                        escape = Escape::None;
                    }
                }
            }
            self.at += 1;
        }
        self.state = State::InName(escape);
        Ok(None)
    }

    /// Skips the rest of a string, at most up to the end of `piece`. Returns whether its closing
    /// quote was consumed.
    #[inline(always)]
    fn in_string(&mut self, piece: &[u8]) -> Result<bool, JsonError> {
        let end = self.isa.string(piece, self.at, &mut self.skip.escaped);
        self.skipped(piece, end)
    }

    /// Skips the rest of a container, at most up to the end of `piece`. Returns whether its closing
    /// bracket was consumed.
    #[inline(always)]
    fn in_skip(&mut self, piece: &[u8]) -> Result<bool, JsonError> {
        let end = self.isa.container(&mut self.skip, piece, self.at);
        self.skipped(piece, end)
    }

    #[inline(always)]
    fn skipped(
        &mut self,
        piece: &[u8],
        end: Result<Option<usize>, JsonError>,
    ) -> Result<bool, JsonError> {
        match end {
            Ok(end) => {
                self.at = end.unwrap_or(piece.len());
                Ok(end.is_some())
            }
            Err(error) => Err(self.error_at(error.offset, error.reason)),
        }
    }

    #[inline(always)]
    fn in_number(&mut self, piece: &[u8], mut number: Number) -> Result<Option<Event>, JsonError> {
        loop {
            self.at += number.run(&piece[self.at..]);
            let Some(&byte) = piece.get(self.at) else {
                break;
            };
            match number.step(byte) {
                Some(next) => number = next,
                None if number.is_complete() => return Ok(Some(self.value_end())),
                None => return Err(self.error_at(self.at, JsonReason::InvalidNumber)),
            }
            self.at += 1;
        }
        self.state = State::InNumber(number);
        Ok(None)
    }

    #[inline(always)]
    fn in_literal(
        &mut self,
        piece: &[u8],
        mut rest: &'static [u8],
    ) -> Result<Option<Event>, JsonError> {
        while let [want, following @ ..] = rest {
            let Some(byte) = piece.get(self.at) else {
                self.state = State::InLiteral(rest);
                return Ok(None);
            };
            if byte != want {
                return Err(self.error_at(self.at, JsonReason::InvalidLiteral));
            }
            self.at += 1;
            rest = following;
        }
        Ok(Some(self.value_end()))
    }

    const fn error_at(&self, at: usize, reason: JsonReason) -> JsonError {
        JsonError {
            offset: self.base + at,
            reason,
        }
    }
}

/// Position of the lexer in the grammar.
#[derive(Clone, Copy, Debug)]
enum State {
    /// Before the outermost object.
    Start,
    /// After the `{` of an object that is read: a member name or `}` is expected.
    FirstName,
    /// After the comma between two members: a member name is expected.
    NextName,
    InName(Escape),
    /// After a member name: its colon is expected.
    Colon,
    /// After the colon: the value of the member is expected.
    Value,
    InString,
    InNumber(Number),
    /// In `true`, `false` or `null`, with the letters that are still expected.
    InLiteral(&'static [u8]),
    /// In a container that is skipped, or at the start of one that may still be entered.
    InSkip,
    /// After the value of a member: a comma or `}` is expected.
    AfterValue,
    /// After the outermost object: only whitespace may follow.
    End,
}

impl State {
    /// Returns the reason why `byte` is not allowed in this state.
    const fn reason(self, byte: u8) -> JsonReason {
        match self {
            // The first byte of a byte order mark in UTF-8, UTF-16 or UTF-32, or of an ASCII
            // character in big-endian UTF-16 or UTF-32.
            Self::Start if matches!(byte, 0 | 0xef | 0xfe | 0xff) => JsonReason::NotUtf8Text,
            Self::Start => JsonReason::NotAnObject,
            Self::FirstName => JsonReason::ExpectedNameOrBrace,
            Self::NextName => JsonReason::ExpectedName,
            Self::Colon => JsonReason::ExpectedColon,
            Self::AfterValue => JsonReason::ExpectedCommaOrClose,
            Self::End => JsonReason::TrailingBytes,
            Self::InName(_)
            | Self::Value
            | Self::InString
            | Self::InNumber(_)
            | Self::InLiteral(_)
            | Self::InSkip => JsonReason::ExpectedValue,
        }
    }
}

/// State of an escape sequence in a member name.
#[derive(Clone, Copy, Debug)]
enum Escape {
    None,
    Backslash,
    Hex { digits: u8, code: u32 },
}

/// A member name after unescaping.
#[derive(Clone, Debug)]
struct Name {
    bytes: [u8; JSON_NAME_BYTES_MAX],
    len: u8,
    /// Whether the name can equal one that a reader looks for. `false` if the name is too long or
    /// contains an escaped character outside of ASCII.
    comparable: bool,
}

impl Name {
    const fn new() -> Self {
        Self {
            bytes: [0; JSON_NAME_BYTES_MAX],
            len: 0,
            comparable: true,
        }
    }

    const fn clear(&mut self) {
        self.len = 0;
        self.comparable = true;
    }

    /// Sets the name to the first `len` bytes of `bytes`, which contain no escapes.
    #[inline(always)]
    fn set(&mut self, bytes: &[u8; PLAIN_NAME_BYTES], len: usize) {
        // Copy all bytes: a copy of constant length takes two instructions.
        self.bytes[..PLAIN_NAME_BYTES].copy_from_slice(bytes);
        self.len = len as u8;
        self.comparable = true;
    }

    fn push(&mut self, byte: u8) {
        match self.bytes.get_mut(usize::from(self.len)) {
            Some(place) => {
                *place = byte;
                self.len += 1;
            }
            None => self.comparable = false,
        }
    }

    fn push_code(&mut self, code: u32) {
        match u8::try_from(code) {
            Ok(byte) if byte.is_ascii() => self.push(byte),
            // Watched names are ASCII, so this name cannot match one.
            _ => self.comparable = false,
        }
    }
}

/// Maximum length of a name that [`Lexer::plain_name`] reads, in bytes including the closing quote.
const PLAIN_NAME_BYTES: usize = 32;

const _: () = assert!(PLAIN_NAME_BYTES <= JSON_NAME_BYTES_MAX);
const _: () = assert!(JSON_NAME_BYTES_MAX <= u8::MAX as usize);
