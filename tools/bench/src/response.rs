//! Collects one streamed response: the contents of its events and their arrival times.
//!
//! An event counts as content if at least one of its choices contains text; the time to first token
//! is the time to the first such event. The first event of a chat completion, which contains only
//! the role, does not count: some engines send it before they have computed anything.

use std::borrow::Cow;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::Deserialize;
use serde_json::Value;

use crate::limits::TEXT_BYTES_MAX;
use crate::sse::EventTooLarge;

/// The reason why a response is invalid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EventError {
    /// An event is larger than `EVENT_BYTES_MAX`.
    TooLarge,
    /// The text of the response is larger than `TEXT_BYTES_MAX`.
    TextTooLarge,
    /// An event is not the JSON of a completion; contains the beginning of the event.
    NotJson(String),
    /// An event reports an error; contains the beginning of the error's JSON.
    Reported(String),
    /// An event arrived after `[DONE]`.
    AfterDone,
    /// The stream ended without `[DONE]`, or inside an event.
    Cut,
    /// The stream ended without any text.
    Empty,
}

impl fmt::Display for EventError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLarge => f.write_str("an event of the stream is too large"),
            Self::TextTooLarge => f.write_str("the text of the response is too large"),
            Self::NotJson(text) => write!(f, "an event is not the JSON of a completion: {text}"),
            Self::Reported(text) => write!(f, "the stream reports an error: {text}"),
            Self::AfterDone => f.write_str("an event arrived after [DONE]"),
            Self::Cut => f.write_str("the stream ended without [DONE]"),
            Self::Empty => f.write_str("no event of the stream contains text"),
        }
    }
}

impl std::error::Error for EventError {}

impl From<EventTooLarge> for EventError {
    fn from(_: EventTooLarge) -> Self {
        Self::TooLarge
    }
}

/// The members that are read from an event's JSON, of either API.
#[derive(Deserialize)]
struct Wire<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    #[serde(default)]
    error: Option<Value>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow, default)]
    text: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    delta: Option<Delta<'a>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow, default)]
    content: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    reasoning: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    reasoning_content: Option<Cow<'a, str>>,
}

/// Maximum number of received bytes that a message quotes.
const SHOWN_BYTES: usize = 200;

/// One streamed response as received so far. Times are in nanoseconds of the run's clock.
#[derive(Clone, Debug, Default)]
pub struct Response {
    text: String,
    done: bool,
    /// Number of events with data, including `[DONE]`.
    pub events: u32,
    /// Number of receives that completed at least one event with text.
    pub arrivals: u32,
    /// Arrival time of the first event with text; `None` before it.
    pub first_ns: Option<u64>,
    last_ns: u64,
    /// Times between consecutive events with text; 0 for events that arrived in the same receive.
    pub gaps_ns: Vec<u64>,
}

impl Response {
    /// Processes the data of the next event, received at `now_ns`.
    ///
    /// # Errors
    /// If the event is not the JSON of a completion, reports an error or follows `[DONE]`, or the
    /// text is too large.
    pub fn event(&mut self, data: &[u8], now_ns: u64) -> Result<(), EventError> {
        if self.done {
            return Err(EventError::AfterDone);
        }
        self.events += 1;
        if data == b"[DONE]" {
            self.done = true;
            return Ok(());
        }
        let wire: Wire<'_> =
            serde_json::from_slice(data).map_err(|_| EventError::NotJson(shown(data)))?;
        if let Some(error) = wire.error.filter(|error| !error.is_null()) {
            return Err(EventError::Reported(shown(error.to_string().as_bytes())));
        }
        let before = self.text.len();
        for choice in wire.choices {
            let delta = choice.delta.into_iter();
            let parts = delta.flat_map(|it| [it.reasoning, it.reasoning_content, it.content]);
            for part in parts.chain([choice.text]).flatten() {
                self.text.push_str(&part);
            }
        }
        if self.text.len() > TEXT_BYTES_MAX {
            return Err(EventError::TextTooLarge);
        }
        if self.text.len() > before {
            self.content(now_ns);
        }
        Ok(())
    }

    fn content(&mut self, now_ns: u64) {
        if self.first_ns.is_none() {
            self.first_ns = Some(now_ns);
            self.arrivals = 1;
        } else {
            self.gaps_ns.push(now_ns.saturating_sub(self.last_ns));
            self.arrivals += u32::from(now_ns != self.last_ns);
        }
        self.last_ns = now_ns;
    }

    /// Returns the arrival time of the first text and a summary of the whole text, at the end of
    /// the stream.
    ///
    /// # Errors
    /// If the response is incomplete or contains no text.
    pub fn finish(&self) -> Result<(u64, Text), EventError> {
        if !self.done {
            return Err(EventError::Cut);
        }
        let first_ns = self.first_ns.ok_or(EventError::Empty)?;
        let mut hasher = DefaultHasher::new();
        self.text.hash(&mut hasher);
        let text = Text {
            hash: hasher.finish(),
            order: order(&self.text),
        };
        Ok((first_ns, text))
    }
}

/// A summary of a response's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Text {
    /// Hash of the text.
    pub hash: u64,
    /// Whether numbered tokens are in order.
    pub order: Order,
}

/// Whether tokens of a text are missing, duplicated or swapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The text is empty or contains a word that is not a numbered token, as the text of a real
    /// model does.
    Unnumbered,
    /// A mock engine's text in which the tokens are numbered 0, 1, 2 and so on and have the same
    /// tag.
    Kept,
    /// A mock engine's text in which a token is missing, duplicated, swapped or from another
    /// response.
    Broken,
}

/// Returns whether the tokens of a mock engine's text (`t0-89abcdef t1-89abcdef …`) are numbered 0,
/// 1, 2 and so on and have the same tag. Other texts are [`Order::Unnumbered`].
fn order(text: &str) -> Order {
    let mut tag = None;
    let mut kept = true;
    for (nth, word) in text.split_ascii_whitespace().enumerate() {
        let piece = word.strip_prefix('t').and_then(|rest| rest.split_once('-'));
        let Some((number, own)) = piece else {
            return Order::Unnumbered;
        };
        let hex = own.len() == 8 && own.bytes().all(|byte| byte.is_ascii_hexdigit());
        let Some(number) = number.parse::<usize>().ok().filter(|_| hex) else {
            return Order::Unnumbered;
        };
        let same = *tag.get_or_insert(own) == own;
        kept &= same && number == nth;
    }
    match (tag, kept) {
        (None, _) => Order::Unnumbered,
        (Some(_), true) => Order::Kept,
        (Some(_), false) => Order::Broken,
    }
}

/// Returns the beginning of received bytes as text in which control characters, including line
/// breaks, are replaced by spaces.
#[must_use]
pub fn shown(bytes: &[u8]) -> String {
    let part = &bytes[..bytes.len().min(SHOWN_BYTES)];
    let mut text: String = String::from_utf8_lossy(part)
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if part.len() < bytes.len() {
        text.push('\u{2026}');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(events: &[(&str, u64)]) -> Result<Response, EventError> {
        let mut response = Response::default();
        for (data, now) in events {
            response.event(data.as_bytes(), *now)?;
        }
        Ok(response)
    }

    #[test]
    fn ttft_is_the_time_of_the_first_event_with_text() {
        let response = taken(&[
            (
                r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#,
                10,
            ),
            (
                r#"{"choices":[{"delta":{"reasoning_content":"hm"}}],"error":null}"#,
                20,
            ),
            (r#"{"choices":[{"delta":{"content":"a\nb"}}]}"#, 25),
            (r#"{"choices":[{"delta":{"content":"c"}}]}"#, 25),
            (r#"{"choices":[],"usage":{}}"#, 40),
            ("[DONE]", 41),
        ])
        .unwrap();
        assert_eq!((response.events, response.arrivals), (6, 2));
        assert_eq!(response.gaps_ns, [5, 0]);
        let (first, text) = response.finish().unwrap();
        assert_eq!((first, text.order), (20, Order::Unnumbered));
        let same = taken(&[(r#"{"choices":[{"text":"hma\nbc"}]}"#, 1), ("[DONE]", 2)]).unwrap();
        assert_eq!(same.finish().unwrap().1, text);
    }

    #[test]
    fn invalid_streams_return_a_specific_error() {
        let content = (r#"{"choices":[{"text":"a"}]}"#, 1);
        let reported = taken(&[(r#"{"error":{"message":"boom"}}"#, 1)]).unwrap_err();
        assert_eq!(
            reported.to_string(),
            r#"the stream reports an error: {"message":"boom"}"#
        );
        assert_eq!(
            taken(&[("{\u{1}", 1)]).unwrap_err(),
            EventError::NotJson("{ ".to_owned())
        );
        assert_eq!(
            taken(&[("[DONE]", 1), content]).unwrap_err(),
            EventError::AfterDone
        );
        assert_eq!(
            taken(&[content]).unwrap().finish().unwrap_err(),
            EventError::Cut
        );
        assert_eq!(
            taken(&[("[DONE]", 1)]).unwrap().finish().unwrap_err(),
            EventError::Empty
        );
    }

    #[test]
    fn numbered_tokens_are_checked() {
        let expected = mock_engine::expected_text("89abcdef01", 12);
        for (text, want) in [
            ("", Order::Unnumbered),
            ("the t0-89abcdef", Order::Unnumbered),
            ("t0-short", Order::Unnumbered),
            (&*expected, Order::Kept),
            ("t1-89abcdef t2-89abcdef", Order::Broken),
            ("t0-89abcdef t0-89abcdef", Order::Broken),
            ("t0-89abcdef t2-89abcdef", Order::Broken),
            ("t0-89abcdef t1-00000000", Order::Broken),
        ] {
            assert_eq!(order(text), want, "{text}");
        }
    }

    #[test]
    fn shown_bytes_are_truncated_and_without_control_characters() {
        assert_eq!(shown(b"a\x1b[31m\xff"), "a [31m\u{fffd}");
        assert_eq!(shown(&[b'x'; 300]).chars().count(), SHOWN_BYTES + 1);
    }
}
