//! The error of all JSON readers: a reason and a byte offset.

use std::fmt;

/// Error for a JSON text that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JsonError {
    /// Offset from the start of the text: of the invalid byte, or of the name or value that was
    /// refused. If the text is incomplete, this is its length.
    pub offset: usize,
    /// Reason why the text was refused.
    pub reason: JsonReason,
}

/// Reason why a JSON text was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JsonReason {
    /// The outermost value is not an object.
    NotAnObject,
    /// The text begins with a byte order mark or appears to be UTF-16 or UTF-32 (RFC 8259
    /// section 8.1).
    NotUtf8Text,
    /// A byte sequence in a string that is not UTF-8. Only [`validate`](super::validate()) checks
    /// this.
    InvalidUtf8,
    /// A member name in quotes was expected.
    ExpectedName,
    /// A member name or the closing brace was expected.
    ExpectedNameOrBrace,
    /// The colon after a member name was expected.
    ExpectedColon,
    /// A value was expected.
    ExpectedValue,
    /// A comma or the closing bracket of the container was expected.
    ExpectedCommaOrClose,
    /// A literal other than `true`, `false` and `null`.
    InvalidLiteral,
    /// A number outside the grammar of RFC 8259 section 6.
    InvalidNumber,
    /// An escape sequence outside the grammar of RFC 8259 section 7.
    InvalidEscape,
    /// A control character that must be escaped in a string, or that is not allowed between values.
    ControlCharacter,
    /// A closing bracket of a different kind than the innermost open one.
    MismatchedBracket,
    /// More nested containers than `JSON_DEPTH_MAX`.
    TooDeep,
    /// The outermost value is followed by bytes other than whitespace.
    TrailingBytes,
    /// The text ended before its outermost value did.
    Incomplete,
    /// A request body has more than `JSON_MEMBERS_MAX` watched members, repetitions included.
    TooManyMembers,
    /// A request body has more than `JSON_OBJECTS_MAX` objects that are read: the outermost one,
    /// `sampling_params`, `extra_args` and `vllm_xargs`, repetitions included.
    TooManyObjects,
    /// The `kv_transfer_params` of a prefill engine's response are larger than the reader may keep.
    KeptTooLarge,
    /// The budget of kept bytes does not allow a part of the response to be kept.
    BudgetSpent,
    /// A client supplied a value for a member that only the proxy may set, and the value is too
    /// short to be overwritten with `null`.
    NotClients,
}

impl JsonError {
    /// Returns the error of a text that begins at `offset` of a longer one.
    #[must_use]
    pub const fn after(self, offset: usize) -> Self {
        Self {
            offset: offset + self.offset,
            ..self
        }
    }
}

impl JsonReason {
    /// Returns a description of the reason, without the offset.
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
            Self::TrailingBytes => "unexpected bytes after the value",
            Self::Incomplete => "ended before it was complete",
            Self::TooManyMembers => "too many repetitions of known members",
            Self::TooManyObjects => "too many repetitions of a parameter object",
            Self::KeptTooLarge => "value is too large to keep",
            Self::BudgetSpent => "too many bytes are kept",
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
    fn display_begins_with_the_offset() {
        let error = JsonError {
            offset: 17,
            reason: JsonReason::ExpectedValue,
        };
        assert_eq!(error.to_string(), "byte 17: expected a value");
    }
}
