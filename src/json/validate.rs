//! Strict validation of a JSON text, for values that are replaced or forwarded to other engines.
//!
//! Unlike the lexer, it checks everything that RFC 8259 requires: UTF-8, escapes, numbers and the
//! structure at every depth. The outermost value may be of any kind. Escaped lone surrogates are
//! accepted, because the grammar allows them.

use super::error::{JsonError, JsonReason};
use super::grammar::{Nest, Number, digits, unescape};

/// Checks that `bytes` are exactly one JSON value, optionally surrounded by whitespace, and nested
/// no deeper than `JSON_DEPTH_MAX`.
///
/// # Errors
///
/// The error at the first invalid byte.
pub fn validate(bytes: &[u8]) -> Result<(), JsonError> {
    let mut validator = Validator::new();
    validator.feed(bytes)?;
    validator.finish()
}

/// Checks one JSON value that arrives in parts, as [`validate`] does.
#[derive(Clone, Debug)]
pub(crate) struct Validator {
    state: State,
    nest: Nest,
    /// Number of bytes read.
    at: usize,
}

/// Position in the grammar.
#[derive(Clone, Copy, Debug)]
enum State {
    /// A value is expected.
    Value,
    /// After `[`: a value or `]` is expected.
    FirstElement,
    /// After `{`: a member name or `}` is expected.
    FirstName,
    /// After a comma in an object: a member name is expected.
    NextName,
    /// After a member name: its colon is expected.
    Colon,
    /// After a value inside a container: a comma or the closing bracket is expected.
    AfterValue,
    /// After the outermost value: only whitespace may follow.
    End,
    String(Text),
    /// In a member name.
    Name(Text),
    Number(Number),
    /// In a literal, with the number of its letters read.
    Literal(Literal, u8),
}

#[derive(Clone, Copy, Debug)]
enum Literal {
    True,
    False,
    Null,
}

impl Literal {
    const fn letters(self) -> &'static [u8] {
        match self {
            Self::True => b"true",
            Self::False => b"false",
            Self::Null => b"null",
        }
    }
}

/// Position in a string.
#[derive(Clone, Copy, Debug)]
enum Text {
    Plain,
    Backslash,
    /// In `\u`, with the number of hexadecimal digits that are still expected.
    Hex(u8),
    /// In a UTF-8 sequence: the number of bytes that are still expected, and the range of the next
    /// one (RFC 3629 section 4).
    Utf8 {
        left: u8,
        low: u8,
        high: u8,
    },
}

impl Validator {
    /// Creates a validator that has read nothing.
    pub(crate) const fn new() -> Self {
        Self {
            state: State::Value,
            nest: Nest::new(),
            at: 0,
        }
    }

    /// Returns the number of bytes read.
    pub(super) const fn read_bytes(&self) -> usize {
        self.at
    }

    /// Reads the next part of the text.
    ///
    /// # Errors
    ///
    /// The error at the first invalid byte, with its offset in the whole text. The validator must
    /// not be used afterwards.
    pub(crate) fn feed(&mut self, piece: &[u8]) -> Result<(), JsonError> {
        let base = self.at;
        let mut at = 0;
        loop {
            at += self.stride(&piece[at..]);
            let Some(&byte) = piece.get(at) else { break };
            self.at = base + at;
            // Only the byte after a number shows that it has ended.
            if let State::Number(number) = self.state
                && number.is_complete()
                && number.step(byte).is_none()
            {
                self.state = self.after_value();
            }
            self.state = self.step(byte).map_err(|reason| self.error(reason))?;
            at += 1;
        }
        self.at = base + at;
        Ok(())
    }

    /// Checks that the text is complete.
    ///
    /// # Errors
    ///
    /// [`JsonReason::Incomplete`] if it is not.
    pub(crate) const fn finish(&self) -> Result<(), JsonError> {
        match self.state {
            State::End => Ok(()),
            State::Number(number) if number.is_complete() && self.nest.top.depth == 0 => Ok(()),
            _ => Err(self.error(JsonReason::Incomplete)),
        }
    }

    const fn error(&self, reason: JsonReason) -> JsonError {
        JsonError {
            offset: self.at,
            reason,
        }
    }

    /// Reads bytes at the start of `rest` that need no step each, and returns their number: plain
    /// characters up to the closing quote, the rest of a literal, digits, and in an array integers
    /// and the commas between them. These are most bytes of most texts.
    #[inline(always)]
    fn stride(&mut self, rest: &[u8]) -> usize {
        match self.state {
            State::String(Text::Plain) | State::Name(Text::Plain) => {
                let plain = plain_bytes(rest);
                if rest.get(plain) != Some(&b'"') {
                    return plain;
                }
                self.state = match self.state {
                    State::Name(_) => State::Colon,
                    _ => self.after_value(),
                };
                plain + 1
            }
            State::Literal(literal, read) => {
                let letters = &literal.letters()[usize::from(read)..];
                if !rest.starts_with(letters) {
                    return 0;
                }
                self.state = self.after_value();
                letters.len()
            }
            State::Number(Number::Integer) if self.nest.top.inside_array() => integers(rest),
            State::Number(number) => number.run(rest),
            _ => 0,
        }
    }

    #[inline(always)]
    fn step(&mut self, byte: u8) -> Result<State, JsonReason> {
        match self.state {
            State::String(text) => match text.step(byte)? {
                Some(text) => Ok(State::String(text)),
                None => Ok(self.after_value()),
            },
            State::Name(text) => Ok(text.step(byte)?.map_or(State::Colon, State::Name)),
            State::Number(number) => match number.step(byte) {
                Some(number) => Ok(State::Number(number)),
                None => Err(JsonReason::InvalidNumber),
            },
            State::Literal(literal, read) => match literal.letters().get(usize::from(read)..) {
                Some([want]) if byte == *want => Ok(self.after_value()),
                Some([want, ..]) if byte == *want => Ok(State::Literal(literal, read + 1)),
                _ => Err(JsonReason::InvalidLiteral),
            },
            state if matches!(byte, b' ' | b'\t' | b'\n' | b'\r') => Ok(state),
            State::FirstElement if byte == b']' => Ok(self.close()),
            State::Value | State::FirstElement => self.value(byte),
            State::FirstName if byte == b'}' => Ok(self.close()),
            State::FirstName | State::NextName if byte == b'"' => Ok(State::Name(Text::Plain)),
            State::FirstName => Err(JsonReason::ExpectedNameOrBrace),
            State::NextName => Err(JsonReason::ExpectedName),
            State::Colon if byte == b':' => Ok(State::Value),
            State::Colon => Err(JsonReason::ExpectedColon),
            State::AfterValue => {
                let is_object = self.nest.top.inside_object();
                match byte {
                    b',' if is_object => Ok(State::NextName),
                    b',' => Ok(State::Value),
                    b'}' | b']' if (byte == b'}') == is_object => Ok(self.close()),
                    b'}' | b']' => Err(JsonReason::MismatchedBracket),
                    _ => Err(JsonReason::ExpectedCommaOrClose),
                }
            }
            State::End => Err(JsonReason::TrailingBytes),
        }
    }

    fn value(&mut self, byte: u8) -> Result<State, JsonReason> {
        match byte {
            b'"' => Ok(State::String(Text::Plain)),
            b'{' | b'[' => {
                let is_object = byte == b'{';
                if !self.nest.open(is_object) {
                    return Err(JsonReason::TooDeep);
                }
                Ok(if is_object {
                    State::FirstName
                } else {
                    State::FirstElement
                })
            }
            b't' => Ok(State::Literal(Literal::True, 1)),
            b'f' => Ok(State::Literal(Literal::False, 1)),
            b'n' => Ok(State::Literal(Literal::Null, 1)),
            _ => Number::start(byte)
                .map(State::Number)
                .ok_or(JsonReason::ExpectedValue),
        }
    }

    fn close(&mut self) -> State {
        self.nest.close();
        self.after_value()
    }

    const fn after_value(&self) -> State {
        if self.nest.top.depth == 0 {
            State::End
        } else {
            State::AfterValue
        }
    }
}

/// Returns the number of bytes at the start of `text`, which continues an integer in an array, up
/// to the end of the last integer that follows with nothing but a comma, or a comma and a space, in
/// between: the block ids of a handoff. Only integers that do not begin with 0 or a sign count.
fn integers(text: &[u8]) -> usize {
    let mut at = digits(text);
    loop {
        let starts = match text.get(at..) {
            Some([b',', b'1'..=b'9', ..]) => 2,
            Some([b',', b' ', b'1'..=b'9', ..]) => 3,
            _ => return at,
        };
        at += starts;
        at += digits(&text[at..]);
    }
}

/// Returns the number of bytes at the start of `text` that are characters of ASCII in a string:
/// they neither end it nor begin an escape.
fn plain_bytes(text: &[u8]) -> usize {
    const EACH: u64 = u64::MAX / 0xff;
    const HIGH: u64 = EACH * 0x80;
    // Sets the high bit of the first byte below `limit`. A borrow may also set those of later
    // bytes, which `trailing_zeros` ignores.
    let below = |word: u64, limit: u64| word.wrapping_sub(EACH * limit) & !word & HIGH;
    let is = |word: u64, byte: u8| below(word ^ (EACH * u64::from(byte)), 1);
    let (words, rest) = text.as_chunks();
    for (nth, word) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*word);
        let ends = below(word, 0x20) | is(word, b'"') | is(word, b'\\') | (word & HIGH);
        if ends != 0 {
            return nth * size_of::<u64>() + ends.trailing_zeros() as usize / 8;
        }
    }
    let is_plain = |byte: &&u8| matches!(**byte, 0x20..=0x7f) && !matches!(**byte, b'"' | b'\\');
    text.len() - rest.len() + rest.iter().take_while(is_plain).count()
}

impl Text {
    /// Returns the position after one more byte; `None` after the closing quote.
    const fn step(self, byte: u8) -> Result<Option<Self>, JsonReason> {
        let next = match (self, byte) {
            (Self::Plain, b'"') => return Ok(None),
            (Self::Plain, b'\\') => Self::Backslash,
            (Self::Plain, 0..=0x1f) => return Err(JsonReason::ControlCharacter),
            (Self::Plain, 0x20..=0x7f) => Self::Plain,
            (Self::Plain, _) => match Self::utf8(byte) {
                Some(text) => text,
                None => return Err(JsonReason::InvalidUtf8),
            },
            (Self::Backslash, b'u') => Self::Hex(4),
            (Self::Backslash, _) if unescape(byte).is_some() => Self::Plain,
            (Self::Hex(1), _) if byte.is_ascii_hexdigit() => Self::Plain,
            (Self::Hex(left), _) if byte.is_ascii_hexdigit() => Self::Hex(left - 1),
            (Self::Backslash | Self::Hex(_), _) => return Err(JsonReason::InvalidEscape),
            (Self::Utf8 { left, low, high }, _) if low <= byte && byte <= high => match left {
                1 => Self::Plain,
                _ => Self::Utf8 {
                    left: left - 1,
                    low: 0x80,
                    high: 0xbf,
                },
            },
            (Self::Utf8 { .. }, _) => return Err(JsonReason::InvalidUtf8),
        };
        Ok(Some(next))
    }

    /// Returns the position after the first byte of a UTF-8 sequence of several bytes; `None` if no
    /// sequence begins with it.
    const fn utf8(byte: u8) -> Option<Self> {
        let (left, low, high) = match byte {
            0xc2..=0xdf => (1, 0x80, 0xbf),
            0xe0 => (2, 0xa0, 0xbf),
            0xed => (2, 0x80, 0x9f),
            0xe1..=0xef => (2, 0x80, 0xbf),
            0xf0 => (3, 0x90, 0xbf),
            0xf1..=0xf3 => (3, 0x80, 0xbf),
            0xf4 => (3, 0x80, 0x8f),
            _ => return None,
        };
        Some(Self::Utf8 { left, low, high })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::JSON_DEPTH_MAX;

    #[test]
    fn values() {
        use JsonReason as R;
        let valid = [
            " null ",
            "[]",
            r#"{"a":[{},[],"\ud800\/",-0.5e-7]}"#,
            "\"\u{e9}\"",
        ];
        for text in valid {
            assert_eq!(validate(text.as_bytes()), Ok(()), "{text}");
        }
        let cases: [(&[u8], usize, R); 27] = [
            (b"", 0, R::Incomplete),
            (b"[", 1, R::Incomplete),
            (b"{\"a\"", 4, R::Incomplete),
            (b"1 2", 2, R::TrailingBytes),
            (b"[1,]", 3, R::ExpectedValue),
            (b"[,1]", 1, R::ExpectedValue),
            (b"{1:2}", 1, R::ExpectedNameOrBrace),
            (b"{\"a\":1,}", 7, R::ExpectedName),
            (b"{\"a\",1}", 4, R::ExpectedColon),
            (b"[1}", 2, R::MismatchedBracket),
            (b"[1 2]", 3, R::ExpectedCommaOrClose),
            (b"[trux]", 4, R::InvalidLiteral),
            (b"01", 1, R::TrailingBytes),
            (b"1,2", 1, R::TrailingBytes),
            (b"[[],1,2}", 7, R::MismatchedBracket),
            (b"[12,34,]", 7, R::ExpectedValue),
            (b"[1, 2,  3,,4]", 10, R::ExpectedValue),
            (b"[1,2,03]", 6, R::ExpectedCommaOrClose),
            (b"[1,2.,3]", 5, R::InvalidNumber),
            (b"[{\"a\":1,2}]", 8, R::ExpectedName),
            (b"[.5]", 1, R::ExpectedValue),
            (b"[1.]", 3, R::InvalidNumber),
            (b"\"\\u12x4\"", 5, R::InvalidEscape),
            (b"\"\\'\"", 2, R::InvalidEscape),
            (b"\"a\tb\"", 2, R::ControlCharacter),
            (b"\"\xc0\xaf\"", 1, R::InvalidUtf8),
            (b"\xef\xbb\xbf1", 0, R::ExpectedValue),
        ];
        for (text, offset, reason) in cases {
            let want = Err(JsonError { offset, reason });
            assert_eq!(validate(text), want, "{}", text.escape_ascii());
        }
    }

    #[test]
    fn every_byte_at_every_position_is_plain_or_ends_the_run() {
        for byte in 0..=0xff_u8 {
            let is_plain = (0x20..0x80).contains(&byte) && byte != b'"' && byte != b'\\';
            for at in 0..20 {
                let mut text = [b'x'; 20];
                text[at] = byte;
                text[at + 1..].fill(b'!');
                assert_eq!(
                    plain_bytes(&text),
                    if is_plain { 20 } else { at },
                    "{byte:x}"
                );
            }
        }
    }

    #[test]
    fn every_sequence_of_up_to_three_bytes_is_utf8_exactly_if_the_standard_library_says_so() {
        let check = |bytes: &[u8]| {
            let text = [b"\"", bytes, b"\""].concat();
            let fits = std::str::from_utf8(bytes).is_ok();
            assert_eq!(validate(&text).is_ok(), fits, "{}", text.escape_ascii());
        };
        for first in 0x80..=0xff_u8 {
            check(&[first]);
            for second in [
                0x41_u8, 0x7f, 0x80, 0x8f, 0x90, 0x9f, 0xa0, 0xbf, 0xc0, 0xff,
            ] {
                check(&[first, second]);
                for third in [0x41, 0x7f, 0x80, 0xbf, 0xc0, 0xff] {
                    check(&[first, second, third]);
                    for fourth in [0x41, 0x80, 0xbf, 0xc0] {
                        check(&[first, second, third, fourth]);
                    }
                }
            }
        }
    }

    #[test]
    fn the_result_does_not_depend_on_how_the_text_is_split() {
        let texts: [&[u8]; 8] = [
            br#" {"a":[{},[],"\ud800\/",-0.5e-7,true],"b":null} "#,
            "[\"\u{e9}\u{20ac}\u{1f600}\"]".as_bytes(),
            b"12",
            b"-",
            b"[1,]",
            b"\"\xe2\x82\"",
            b"\"\\u12",
            b"tru",
        ];
        for text in texts {
            let whole = validate(text);
            for split in 0..=text.len() {
                let mut validator = Validator::new();
                let parts = [&text[..split], &text[split..]];
                let fed = parts.iter().try_for_each(|part| validator.feed(part));
                let got = fed.and_then(|()| validator.finish());
                assert_eq!(got, whole, "{} at {split}", text.escape_ascii());
            }
        }
    }

    #[test]
    fn nesting_depth_is_limited() {
        let text = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(validate(text(JSON_DEPTH_MAX).as_bytes()).is_ok());
        for depth in [JSON_DEPTH_MAX + 1, 100_000] {
            let error = validate(text(depth).as_bytes()).unwrap_err();
            assert_eq!(
                (error.offset, error.reason),
                (JSON_DEPTH_MAX, JsonReason::TooDeep)
            );
        }
    }
}
