//! What can be wrong with a JSON text, as one small `Copy` enum and a place.

use std::fmt;

/// A JSON text was refused: where and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JsonError {
    /// Offset of the byte that could not be accepted, from the start of the text; the length of
    /// the text when it ended too early.
    pub offset: usize,
    /// What was wrong with that byte.
    pub reason: JsonReason,
}

/// Why a JSON text was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JsonReason {
    /// The text is valid so far but its outermost value is no object.
    NotAnObject,
    /// The text begins like UTF-16, UTF-32 or with a byte order mark (RFC 8259 section 8.1).
    NotUtf8Text,
    /// A byte sequence that is no UTF-8 (only [`validate`](super::validate()) looks for it).
    InvalidUtf8,
    /// A member name in quotes was expected.
    ExpectedName,
    /// A member name or the closing brace was expected.
    ExpectedNameOrBrace,
    /// The colon behind a member name was expected.
    ExpectedColon,
    /// A value was expected.
    ExpectedValue,
    /// A comma or the closing bracket of the container was expected.
    ExpectedCommaOrClose,
    /// A word that is none of `true`, `false` and `null`.
    InvalidLiteral,
    /// A number outside the grammar of RFC 8259 section 6.
    InvalidNumber,
    /// An escape sequence outside the grammar of RFC 8259 section 7.
    InvalidEscape,
    /// A control character that must be escaped, or that may not stand between values.
    ControlCharacter,
    /// A closing bracket of the other kind than the one that is open.
    MismatchedBracket,
    /// More nested containers than `JSON_DEPTH_MAX`.
    TooDeep,
    /// Something other than blanks behind the outermost value.
    TrailingBytes,
    /// The text ended inside a value.
    Incomplete,
    /// More watched members than `JSON_MEMBERS_MAX`.
    TooManyMembers,
    /// More occurrences of the watched objects than `JSON_OBJECTS_MAX`.
    TooManyObjects,
    /// The value to keep is longer than its bound.
    KeptTooLarge,
    /// A client's value for a member that only the proxy may set.
    NotClients,
}

impl JsonReason {
    /// The reason in words, without the place.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::NotAnObject => "expected a JSON object",
            Self::NotUtf8Text => "expected UTF-8 without a byte order mark",
            Self::InvalidUtf8 => "not valid UTF-8",
            Self::ExpectedName => "expected a member name in double quotes",
            Self::ExpectedNameOrBrace => "expected a member name or a closing brace",
            Self::ExpectedColon => "expected a colon",
            Self::ExpectedValue => "expected a value",
            Self::ExpectedCommaOrClose => "expected a comma or a closing bracket",
            Self::InvalidLiteral => "expected true, false or null",
            Self::InvalidNumber => "not a valid number",
            Self::InvalidEscape => "not a valid escape sequence",
            Self::ControlCharacter => "unescaped control character",
            Self::MismatchedBracket => "closing bracket does not match the open one",
            Self::TooDeep => "nested too deeply",
            Self::TrailingBytes => "unexpected bytes behind the value",
            Self::Incomplete => "ended before it was complete",
            Self::TooManyMembers => "too many repetitions of known members",
            Self::TooManyObjects => "too many repetitions of a parameter object",
            Self::KeptTooLarge => "value is too large to keep",
            Self::NotClients => "not a value that a client may set",
        }
    }
}

impl fmt::Display for JsonReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl fmt::Display for JsonError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "byte {}: {}", self.offset, self.reason.text())
    }
}

impl std::error::Error for JsonError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_names_the_place_first() {
        let error = JsonError {
            offset: 17,
            reason: JsonReason::ExpectedValue,
        };
        assert_eq!(error.to_string(), "byte 17: expected a value");
    }
}
