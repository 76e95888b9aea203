//! One finished or running piece of a trace.

use std::borrow::Cow;

use crate::limits::{TRACE_ATTRIBUTES_MAX, TRACE_TEXT_BYTES_MAX};

/// What a span is to its neighbours; the numbers are OTLP's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Work within this program.
    Internal = 1,
    /// A request served.
    Server = 2,
    /// A request made.
    Client = 3,
}

/// The value of an attribute.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Text, [`TRACE_TEXT_BYTES_MAX`] bytes at most.
    Text(Cow<'static, str>),
    /// A count.
    Count(u64),
    /// Whole milliseconds, exported as a floating-point number as pd-sidecar's are.
    Millis(u64),
    /// Yes or no.
    Flag(bool),
}

impl Value {
    /// Text of somebody else's, cut where it is too long. What is not UTF-8 is replaced.
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

/// The beginning of a text, in whole characters.
#[must_use]
pub(crate) fn bounded(bytes: &[u8]) -> String {
    let cut = &bytes[..bytes.len().min(TRACE_TEXT_BYTES_MAX)];
    let text = match std::str::from_utf8(cut) {
        Ok(text) => text,
        // Cut within a character: that one goes.
        Err(error) if cut.len() < bytes.len() && error.error_len().is_none() => {
            std::str::from_utf8(&cut[..error.valid_up_to()]).unwrap_or_default()
        }
        Err(_) => {
            let mut text = String::from_utf8_lossy(cut).into_owned();
            // Replacements are longer than what they replace.
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
    /// The trace it belongs to.
    pub trace_id: u128,
    /// Its own id.
    pub span_id: u64,
    /// The span it is part of; 0 for none.
    pub parent_id: u64,
    /// What it is called.
    pub name: Cow<'static, str>,
    /// What it is to its neighbours.
    pub kind: Kind,
    /// When it began.
    pub begun_ns: u64,
    /// When it ended; 0 while it runs.
    pub ended_ns: u64,
    /// What is known of it, each name once, [`TRACE_ATTRIBUTES_MAX`] at most.
    pub attributes: Vec<(&'static str, Value)>,
    /// What went wrong, if something did.
    pub error: Option<&'static str>,
}

impl Span {
    /// Notes an attribute; a value it had before is replaced.
    pub fn set(&mut self, name: &'static str, value: impl Into<Value>) {
        let value = value.into();
        let count = self.attributes.len();
        match self.attributes.iter_mut().find(|(own, _)| *own == name) {
            Some((_, old)) => *old = value,
            None if count < TRACE_ATTRIBUTES_MAX => {
                self.attributes.push((name, value));
            }
            None => debug_assert!(false, "{name} is one attribute too many"),
        }
    }

    /// Whole milliseconds from its beginning to `now_ns`.
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
    fn texts_are_bounded_in_whole_characters() {
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
