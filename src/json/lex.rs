//! The lexer under every reader of this module.
//!
//! It reads one object text (RFC 8259) in pieces cut anywhere, in one forward pass without
//! recursion and without looking back further than a run of backslashes. It reports the members
//! of the outermost object; for a member whose value is an object the reader may [`enter`] it, and
//! its members are reported in turn. Everything else is skipped.
//!
//! What is checked: at the levels it reads everything but UTF-8 and the escapes inside string
//! values; inside skipped containers that brackets match by kind, that strings end and hold no
//! control characters, and the depth. What is skipped beyond that is the engine's to judge.
//!
//! [`enter`]: Lexer::enter

use super::block::{self, Isa, Skip};
use super::error::{JsonError, JsonReason};
use super::grammar::{Number, unescape};
use crate::limits::JSON_NAME_BYTES_MAX;
use crate::span::Span;

/// Kind of a value, from its first byte.
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

/// One step of the lexer; all offsets count from the start of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A member name, `span` with its quotes; [`Lexer::name`] has the text.
    Name { span: Span },
    /// The member's value begins at `at`.
    Value { at: usize, kind: Kind },
    /// The value ended before `at`. Not reported for an object that was entered.
    ValueEnd { at: usize },
    /// The comma between two members.
    Comma { at: usize },
    /// The closing brace of the object being read.
    Close { at: usize },
}

/// The resumable lexer. After an error it must not be used until [`Lexer::reset`].
#[derive(Clone, Debug)]
pub(super) struct Lexer {
    state: State,
    /// Offset of the current piece in the text.
    base: usize,
    /// Position in the current piece.
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

    /// The same with other instructions than the best.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn with_isa(self, isa: Isa) -> Self {
        Self { isa, ..self }
    }

    /// Makes the lexer ready for another text.
    pub(super) fn reset(&mut self) {
        self.state = State::Start;
        self.base = 0;
        self.at = 0;
        self.skip.reset();
    }

    /// Offset of the current piece in the text.
    pub(super) const fn base(&self) -> usize {
        self.base
    }

    /// Objects entered and not closed, the outermost one included.
    pub(super) const fn entered(&self) -> usize {
        self.skip.entered
    }

    /// The unescaped name of the last member; `None` when it is longer than
    /// `JSON_NAME_BYTES_MAX` or holds an escape beyond ASCII, and so matches nothing we look for.
    pub(super) fn name(&self) -> Option<&[u8]> {
        self.name
            .comparable
            .then(|| &self.name.bytes[..usize::from(self.name.len)])
    }

    /// Reads on; `None` when the piece is used up, and then the next call brings the next piece.
    /// Until then every call must bring the same piece.
    #[inline(always)]
    pub(super) fn next(&mut self, piece: &[u8]) -> Result<Option<Event>, JsonError> {
        loop {
            let event = match self.state {
                State::InName(escape) => self.in_name(piece, escape)?,
                State::InString => self.in_string(piece)?.then(|| self.value_end()),
                State::InNumber(number) => self.in_number(piece, number)?,
                State::InLiteral(rest) => self.in_literal(piece, rest)?,
                State::InSkip => self.in_skip(piece)?.then(|| self.value_end()),
                State::Start
                | State::FirstName
                | State::NextName
                | State::Colon
                | State::Value
                | State::AfterValue
                | State::End => match self.next_token(piece) {
                    Some(byte) => match self.token(piece, byte)? {
                        Some(event) => Some(event),
                        None => continue,
                    },
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

    /// Reads the members of the object whose [`Event::Value`] was the last event.
    pub(super) fn enter(&mut self) {
        debug_assert!(matches!(self.state, State::InSkip) && !self.skip.quoted);
        debug_assert_eq!(self.skip.nest.top.depth, self.skip.entered + 1);
        self.skip.entered += 1;
        self.state = State::FirstName;
    }

    /// The text has ended: was it complete?
    pub(super) fn finish(&self) -> Result<(), JsonError> {
        match self.state {
            State::End => Ok(()),
            _ => Err(self.error_at(0, JsonReason::Incomplete)),
        }
    }

    /// The next byte that is no blank, not consumed; the piece is used up when there is none.
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

    /// Takes one byte between names and values.
    #[inline(always)]
    fn token(&mut self, piece: &[u8], byte: u8) -> Result<Option<Event>, JsonError> {
        let at = self.at;
        self.at += 1;
        match (self.state, byte) {
            (State::Start, b'{') => {
                self.skip.nest.open(true);
                self.skip.entered = 1;
                self.state = State::FirstName;
            }
            (State::FirstName | State::NextName, b'"') => {
                self.name_start = self.base + at;
                if let Some(event) = self.plain_name(piece) {
                    return Ok(Some(event));
                }
                self.name.clear();
                self.state = State::InName(Escape::None);
                // The name itself follows in `next`, so there is nothing to report yet.
            }
            (State::FirstName | State::AfterValue, b'}') => return Ok(Some(self.close(at))),
            (State::Colon, b':') => self.state = State::Value,
            (State::AfterValue, b',') => {
                self.state = State::NextName;
                return Ok(Some(Event::Comma { at: self.base + at }));
            }
            (State::Value, _) => return self.value(at, byte).map(Some),
            (state, byte) => return Err(self.error_at(at, state.reason(byte))),
        }
        Ok(None)
    }

    #[inline(always)]
    fn close(&mut self, at: usize) -> Event {
        self.skip.nest.close();
        self.skip.entered -= 1;
        self.state = if self.skip.entered == 0 {
            State::End
        } else {
            State::AfterValue
        };
        Event::Close { at: self.base + at }
    }

    /// Begins a value with its first byte.
    #[inline(always)]
    fn value(&mut self, at: usize, byte: u8) -> Result<Event, JsonError> {
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
            "the string before was read to its end"
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

    /// Reads a member name at once if it is short, without escapes and well inside the piece, as
    /// nearly all are.
    #[inline(always)]
    fn plain_name(&mut self, piece: &[u8]) -> Option<Event> {
        let bytes: &[u8; PLAIN_NAME_BYTES] = piece.get(self.at..)?.first_chunk()?;
        let len = block::plain_text(bytes);
        if bytes.get(len) != Some(&b'"') {
            return None;
        }
        self.name.set(bytes, len);
        self.at += len + 1;
        self.state = State::Colon;
        let span = Span::new(self.name_start, self.base + self.at);
        Some(Event::Name { span })
    }

    /// Reads a member name, unescaping it into `self.name`.
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

    /// Carries over a string's bytes; true when its closing quote was consumed.
    #[inline(always)]
    fn in_string(&mut self, piece: &[u8]) -> Result<bool, JsonError> {
        let end = self.isa.string(piece, self.at, &mut self.skip.escaped);
        self.carried(piece, end)
    }

    /// Carries over a container's bytes; true when its closing bracket was consumed.
    #[inline(always)]
    fn in_skip(&mut self, piece: &[u8]) -> Result<bool, JsonError> {
        let end = self.isa.container(&mut self.skip, piece, self.at);
        self.carried(piece, end)
    }

    #[inline(always)]
    fn carried(
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
        while let Some(&byte) = piece.get(self.at) {
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
        while let [want, behind @ ..] = rest {
            let Some(byte) = piece.get(self.at) else {
                self.state = State::InLiteral(rest);
                return Ok(None);
            };
            if byte != want {
                return Err(self.error_at(self.at, JsonReason::InvalidLiteral));
            }
            self.at += 1;
            rest = behind;
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

/// What the lexer is in the middle of.
#[derive(Clone, Copy, Debug)]
enum State {
    /// Before the outermost object.
    Start,
    /// Behind `{`.
    FirstName,
    /// Behind a comma.
    NextName,
    InName(Escape),
    /// Behind a name.
    Colon,
    /// Behind a colon.
    Value,
    InString,
    InNumber(Number),
    /// With the letters still to come.
    InLiteral(&'static [u8]),
    /// In a container that is not read.
    InSkip,
    /// Behind a value.
    AfterValue,
    /// Behind the outermost object.
    End,
}

impl State {
    /// Why `byte` cannot stand here.
    const fn reason(self, byte: u8) -> JsonReason {
        match self {
            // A first byte of UTF-8, UTF-16 and UTF-32 byte order marks, or of wide text.
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

/// Where an escape sequence of a member name stands.
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
    /// False for a name that is too long, or that an escape took beyond ASCII.
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

    /// Takes the first `len` of `bytes` as the whole name.
    #[inline(always)]
    fn set(&mut self, bytes: &[u8; PLAIN_NAME_BYTES], len: usize) {
        // All are copied: a number of bytes that is known takes two instructions.
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
            // The watched names are ASCII, so the name is none of them.
            _ => self.comparable = false,
        }
    }
}

/// Bytes within which a plain name and its closing quote are looked for.
const PLAIN_NAME_BYTES: usize = 32;

const _: () = assert!(PLAIN_NAME_BYTES <= JSON_NAME_BYTES_MAX);
const _: () = assert!(JSON_NAME_BYTES_MAX <= u8::MAX as usize);
