//! Spans, finished or running.

use std::borrow::Cow;

use crate::limits::{TRACE_ATTRIBUTES_MAX, TRACE_TEXT_BYTES_MAX};

/// The kind of a span. The discriminants are OTLP's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Work inside ringside.
    Internal = 1,
    /// A request that ringside receives from a client.
    Server = 2,
    /// A request that ringside sends to an engine.
    Client = 3,
}

/// The value of an attribute of a span.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text of at most [`TRACE_TEXT_BYTES_MAX`] bytes.
    Text(Cow<'static, str>),
    /// A number without a unit, exported as an integer.
    Count(u64),
    /// A duration in whole milliseconds. OTLP exports it as a floating-point number, as pd-sidecar
    /// does.
    Millis(u64),
    /// A boolean value.
    Flag(bool),
}

impl Value {
    /// Creates a text value from untrusted bytes. Truncates it if it is too long, and replaces
    /// invalid UTF-8.
    #[must_use]
    pub fn text(bytes: &[u8]) -> Self {
        Self::Text(Cow::Owned(bounded(bytes)))
    }
}

impl From<&'static str> for Value {
    fn from(text: &'static str) -> Self {
        Self::Text(Cow::Borrowed(text))
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

/// Returns the longest prefix of `bytes` that fits in [`TRACE_TEXT_BYTES_MAX`] and ends at a
/// character boundary. Invalid UTF-8 is replaced by U+FFFD.
#[must_use]
pub(crate) fn bounded(bytes: &[u8]) -> String {
    let cut = &bytes[..bytes.len().min(TRACE_TEXT_BYTES_MAX)];
    let text = match std::str::from_utf8(cut) {
        Ok(text) => text,
        // The limit is inside a character: omit that character.
        Err(error) if cut.len() < bytes.len() && error.error_len().is_none() => {
            std::str::from_utf8(&cut[..error.valid_up_to()]).unwrap_or_default()
        }
        Err(_) => {
            let mut text = String::from_utf8_lossy(cut).into_owned();
            // The replacement character may be longer than the bytes it replaces.
            let end = text.floor_char_boundary(TRACE_TEXT_BYTES_MAX);
            text.truncate(end);
            return text;
        }
    };
    text.to_owned()
}

/// One span. Times are nanoseconds since 1970.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Id of the trace that the span belongs to.
    pub trace_id: u128,
    /// Id of this span.
    pub span_id: u64,
    /// Id of the parent span; 0 if there is none.
    pub parent_id: u64,
    /// Name of the span, such as `forward_request`.
    pub name: Cow<'static, str>,
    /// Kind of the span: internal work, a received request, or a sent request.
    pub kind: Kind,
    /// Start time in nanoseconds since 1970.
    pub begun_ns: u64,
    /// End time in nanoseconds since 1970; 0 while the span is running.
    pub ended_ns: u64,
    /// Attributes with unique names, at most [`TRACE_ATTRIBUTES_MAX`].
    pub attributes: Vec<(&'static str, Value)>,
    /// Short reason for the failure, such as `decode_reset`; `None` if the span has not failed.
    pub error: Option<&'static str>,
}

impl Span {
    /// Sets an attribute. Replaces its previous value, if any. A new attribute is dropped if the
    /// span already has [`TRACE_ATTRIBUTES_MAX`] attributes; debug builds panic in that case.
    pub fn set(&mut self, name: &'static str, value: impl Into<Value>) {
        let value = value.into();
        let count = self.attributes.len();
        match self.attributes.iter_mut().find(|(own, _)| *own == name) {
            Some((_, old)) => *old = value,
            None if count < TRACE_ATTRIBUTES_MAX => {
                self.attributes.push((name, value));
            }
            None => debug_assert!(false, "{name} exceeds the limit on attributes"),
        }
    }

    /// Returns the whole milliseconds from the start of the span to `now_ns`.
    #[must_use]
    pub const fn millis(&self, now_ns: u64) -> u64 {
        now_ns.saturating_sub(self.begun_ns) / 1_000_000
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span() -> Span {
        Span {
            trace_id: 1,
            span_id: 2,
            parent_id: 0,
            name: Cow::Borrowed("a"),
            kind: Kind::Internal,
            begun_ns: 1_500_000,
            ended_ns: 0,
            attributes: Vec::new(),
            error: None,
        }
    }

    #[test]
    fn an_attribute_has_its_last_value() {
        let mut span = span();
        span.set("a", "x");
        span.set("b", true);
        span.set("a", Value::Count(3));
        assert_eq!(
            span.attributes,
            [("a", Value::Count(3)), ("b", Value::Flag(true))]
        );
    }

    #[test]
    fn durations_are_whole_milliseconds() {
        for (now, want) in [(0, 0), (1_500_000, 0), (2_499_999, 0), (2_500_000, 1)] {
            assert_eq!(span().millis(now), want);
        }
    }

    #[test]
    fn texts_are_truncated_at_character_boundaries() {
        let long = "é".repeat(TRACE_TEXT_BYTES_MAX);
        let odd = format!("x{long}");
        for (bytes, want) in [
            (&b""[..], String::new()),
            (b"10.0.0.7:8000", "10.0.0.7:8000".to_owned()),
            (b"a\xffb", "a\u{fffd}b".to_owned()),
            (b"a\xc3", "a\u{fffd}".to_owned()),
            (long.as_bytes(), "é".repeat(TRACE_TEXT_BYTES_MAX / 2)),
            (
                odd.as_bytes(),
                format!("x{}", "é".repeat(TRACE_TEXT_BYTES_MAX / 2 - 1)),
            ),
        ] {
            assert_eq!(bounded(bytes), want);
        }
        let bad = bounded(&[0xff; 2 * TRACE_TEXT_BYTES_MAX]);
        assert!(bad.len() <= TRACE_TEXT_BYTES_MAX);
        assert!(bad.chars().all(|c| c == '\u{fffd}'));
    }
}
