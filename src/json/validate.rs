//! Strict validation of a complete JSON text, for values that are forwarded to other engines.
//!
//! Unlike the lexer, it checks everything that RFC 8259 requires: UTF-8, escapes, numbers and the
//! structure at every depth. The outermost value may be of any kind. Escaped lone surrogates are
//! accepted, because the grammar allows them.

use super::error::{JsonError, JsonReason};
use super::grammar::{Nest, Number, unescape};

/// Checks that `bytes` are exactly one JSON value, optionally surrounded by whitespace, and nested
/// no deeper than `JSON_DEPTH_MAX`.
///
/// # Errors
///
/// The error at the first invalid byte. UTF-8 is validated before everything else, so invalid UTF-8
/// takes precedence over an earlier syntax error.
pub fn validate(bytes: &[u8]) -> Result<(), JsonError> {
    if let Err(error) = std::str::from_utf8(bytes) {
        return Err(JsonError {
            offset: error.valid_up_to(),
            reason: JsonReason::InvalidUtf8,
        });
    }
    let mut walk = Walk {
        bytes,
        at: 0,
        nest: Nest::new(),
    };
    walk.text()?;
    match walk.token() {
        None => Ok(()),
        Some(_) => Err(walk.error(JsonReason::TrailingBytes)),
    }
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
    nest: Nest,
}

impl Walk<'_> {
    fn text(&mut self) -> Result<(), JsonError> {
        loop {
            // The current position is at the start of a value.
            match self.token() {
                Some(b'{') => {
                    self.open(true)?;
                    if self.token() != Some(b'}') {
                        self.name(JsonReason::ExpectedNameOrBrace)?;
                        continue;
                    }
                }
                Some(b'[') => {
                    self.open(false)?;
                    if self.token() != Some(b']') {
                        continue;
                    }
                }
                Some(byte) => self.scalar(byte)?,
                None => return Err(self.error(JsonReason::ExpectedValue)),
            }
            if !self.after_value()? {
                return Ok(());
            }
        }
    }

    /// Closes the containers that end at the current position. Then consumes the comma and, in an
    /// object, the next member name. Returns `false` if the outermost value has ended, so that no
    /// value follows.
    fn after_value(&mut self) -> Result<bool, JsonError> {
        while self.nest.top.depth > 0 {
            let object = self.nest.top.inside_object();
            match self.token() {
                Some(b',') => {
                    self.at += 1;
                    if object {
                        self.token();
                        self.name(JsonReason::ExpectedName)?;
                    }
                    return Ok(true);
                }
                Some(close @ (b'}' | b']')) => {
                    if (close == b'}') != object {
                        return Err(self.error(JsonReason::MismatchedBracket));
                    }
                    self.at += 1;
                    self.nest.close();
                }
                _ => return Err(self.error(JsonReason::ExpectedCommaOrClose)),
            }
        }
        Ok(false)
    }

    fn open(&mut self, object: bool) -> Result<(), JsonError> {
        if !self.nest.open(object) {
            return Err(self.error(JsonReason::TooDeep));
        }
        self.at += 1;
        Ok(())
    }

    /// Consumes a member name and its colon. `missing` is the reason of the error if no name begins
    /// at the current position.
    fn name(&mut self, missing: JsonReason) -> Result<(), JsonError> {
        if self.byte() != Some(b'"') {
            return Err(self.error(missing));
        }
        self.string()?;
        if self.token() != Some(b':') {
            return Err(self.error(JsonReason::ExpectedColon));
        }
        self.at += 1;
        Ok(())
    }

    fn scalar(&mut self, byte: u8) -> Result<(), JsonError> {
        match byte {
            b'"' => self.string(),
            b't' => self.literal(b"true"),
            b'f' => self.literal(b"false"),
            b'n' => self.literal(b"null"),
            _ => match Number::start(byte) {
                Some(number) => self.number(number),
                None => Err(self.error(JsonReason::ExpectedValue)),
            },
        }
    }

    fn literal(&mut self, word: &'static [u8]) -> Result<(), JsonError> {
        for want in word {
            match self.byte() {
                Some(byte) if byte == *want => self.at += 1,
                _ => return Err(self.error(JsonReason::InvalidLiteral)),
            }
        }
        Ok(())
    }

    fn number(&mut self, mut number: Number) -> Result<(), JsonError> {
        self.at += 1;
        while let Some(next) = self.byte().and_then(|byte| number.step(byte)) {
            number = next;
            self.at += 1;
        }
        if number.is_complete() {
            Ok(())
        } else {
            Err(self.error(JsonReason::InvalidNumber))
        }
    }

    fn string(&mut self) -> Result<(), JsonError> {
        self.at += 1;
        while let Some(byte) = self.byte() {
            match byte {
                b'"' => {
                    self.at += 1;
                    return Ok(());
                }
                0..=0x1f => return Err(self.error(JsonReason::ControlCharacter)),
                b'\\' => {
                    self.at += 1;
                    self.escape()?;
                }
                _ => self.at += 1,
            }
        }
        Err(self.error(JsonReason::Incomplete))
    }

    fn escape(&mut self) -> Result<(), JsonError> {
        match self.byte() {
            Some(b'u') => {
                self.at += 1;
                for _ in 0..4 {
                    match self.byte() {
                        Some(byte) if byte.is_ascii_hexdigit() => self.at += 1,
                        _ => return Err(self.error(JsonReason::InvalidEscape)),
                    }
                }
                Ok(())
            }
            Some(byte) if unescape(byte).is_some() => {
                self.at += 1;
                Ok(())
            }
            _ => Err(self.error(JsonReason::InvalidEscape)),
        }
    }

    /// Skips whitespace and returns the byte after it without consuming that byte, or `None` at the
    /// end of the text.
    fn token(&mut self) -> Option<u8> {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.byte() {
            self.at += 1;
        }
        self.byte()
    }

    fn byte(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    /// Returns an error at the current position. At the end of the text the reason is always
    /// [`JsonReason::Incomplete`].
    fn error(&self, reason: JsonReason) -> JsonError {
        let reason = if self.at < self.bytes.len() {
            reason
        } else {
            JsonReason::Incomplete
        };
        JsonError {
            offset: self.at,
            reason,
        }
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
        let cases: [(&[u8], usize, R); 20] = [
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
