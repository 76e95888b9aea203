//! Checks that a response equals the response of a mock engine to the same prompt.
//!
//! The engine's text is a function of the prompt: token `i` is `t{i}-{tag} `, and the tag is the
//! first eight hex digits of the SHA-256 of the prompt's JSON. Each event of a stream carries one
//! token. The bytes before and after the token are the same in every event except the last, which
//! contains the finish reason. Therefore a lost, duplicated or moved event, or an event of another
//! response, is detected when it arrives, and so is a changed byte outside the text.

use std::borrow::Cow;
use std::fmt::{self, Write as _};

use memchr::memmem;
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::response::shown;

/// Number of hex digits of a tag.
const TAG_DIGITS: usize = 8;

/// The kinds of errors in a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A later token of the same response arrived instead of the expected one.
    Lost,
    /// An earlier token of the same response arrived instead of the expected one.
    Duplicated,
    /// A token of another response arrived.
    OtherResponse,
    /// An event without a valid token arrived, the bytes around a token differ from those of
    /// earlier events, or a finish reason is missing or too early.
    Changed,
    /// The response ended without its last token or, in a stream, without `[DONE]`; or the peer
    /// closed the connection before the response was complete.
    Cut,
    /// The response continues after its expected end.
    AfterEnd,
    /// The engine or the proxy reported an error, or the response has another status or media type
    /// than expected.
    Refused,
    /// The bytes are not an HTTP/1.1 response, or bytes arrived that belong to no request.
    Framing,
    /// The connection could not be opened, or it failed before the response was complete.
    Connection,
    /// Nothing was received for `SOAK_SILENCE_S` seconds while a response was expected.
    Silence,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 10] = [
        Self::Lost,
        Self::Duplicated,
        Self::OtherResponse,
        Self::Changed,
        Self::Cut,
        Self::AfterEnd,
        Self::Refused,
        Self::Framing,
        Self::Connection,
        Self::Silence,
    ];

    /// Returns the name used in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lost => "lost or out of order",
            Self::Duplicated => "doubled or out of order",
            Self::OtherResponse => "foreign",
            Self::Changed => "changed",
            Self::Cut => "cut",
            Self::AfterEnd => "behind the end",
            Self::Refused => "refused",
            Self::Framing => "framing",
            Self::Connection => "connection",
            Self::Silence => "silence",
        }
    }
}

/// The first error in a response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mismatch {
    /// The kind of error.
    pub kind: Kind,
    /// Description of the error: usually the position in the response and the expected and actual
    /// values.
    pub text: String,
}

impl Mismatch {
    /// Creates an error of the given kind.
    pub fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
        }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.name(), self.text)
    }
}

/// Returns the tag that a mock engine puts into every token of the response to a prompt. The prompt
/// is given as JSON text.
#[must_use]
pub fn tag(prompt_json: &str) -> String {
    let hash = Sha256::digest(prompt_json.as_bytes());
    let mut tag = String::with_capacity(TAG_DIGITS);
    for byte in &hash[..TAG_DIGITS / 2] {
        // Writing to a string cannot fail.
        let _ = write!(tag, "{byte:02x}");
    }
    tag
}

/// The members that are read from the JSON of a whole response or of an event, of either API.
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
    #[serde(borrow, default, alias = "message")]
    delta: Option<Delta<'a>>,
    #[serde(borrow, default)]
    finish_reason: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Delta<'a> {
    #[serde(borrow, default)]
    content: Option<Cow<'a, str>>,
}

/// Returns the text of a whole response body or of one event, and whether it contains a finish
/// reason. Returns an error if `data` is not the JSON of a completion or reports an error.
fn text_of(data: &[u8]) -> Result<(String, bool), Mismatch> {
    let wire: Wire<'_> = serde_json::from_slice(data).map_err(|_| {
        let came = shown(data);
        Mismatch::new(
            Kind::Changed,
            format!("expected the JSON of a completion, got {came}"),
        )
    })?;
    if let Some(error) = wire.error.filter(|error| !error.is_null()) {
        let error = shown(error.to_string().as_bytes());
        return Err(Mismatch::new(Kind::Refused, error));
    }
    let (mut text, mut ended) = (String::new(), false);
    for choice in wire.choices {
        ended |= choice.finish_reason.is_some();
        let content = choice.delta.and_then(|delta| delta.content);
        for part in [content, choice.text].into_iter().flatten() {
            text.push_str(&part);
        }
    }
    Ok((text, ended))
}

/// Compares one response with the expected one as it arrives.
#[derive(Clone, Debug)]
pub struct Check {
    tag: String,
    tokens: u32,
    /// Number of the next expected token.
    next: u32,
    /// The expected text of token number `next`.
    piece: String,
    /// The bytes before and after the token in the data of an event. They are the same for all
    /// tokens except the last. `None` before the first token.
    around: Option<(Vec<u8>, Vec<u8>)>,
    done: bool,
}

impl Check {
    /// Creates a check of a response that must have `tokens` tokens, at least one, which contain
    /// `tag`.
    #[must_use]
    pub fn new(tag: String, tokens: u32) -> Self {
        let piece = format!("t0-{tag} ");
        Self {
            tag,
            tokens,
            next: 0,
            piece,
            around: None,
            done: false,
        }
    }

    /// Returns the number of correct tokens received so far.
    #[must_use]
    pub const fn came(&self) -> u32 {
        self.next
    }

    /// Checks the data of the next event.
    ///
    /// # Errors
    /// If it is not the expected event.
    pub fn event(&mut self, data: &[u8]) -> Result<(), Mismatch> {
        if self.done {
            let text = format!("expected nothing after [DONE], got {}", shown(data));
            return Err(Mismatch::new(Kind::AfterEnd, text));
        }
        if data == b"[DONE]" {
            self.done = true;
            return self.finish();
        }
        // Fast path without parsing, for all tokens except the first and the last.
        if self.next + 1 < self.tokens
            && let Some((before, behind)) = &self.around
            && let Some(rest) = data.strip_prefix(&**before)
            && rest.strip_prefix(self.piece.as_bytes()) == Some(behind)
        {
            self.advance();
            return Ok(());
        }
        self.event_parsed(data)
    }

    fn event_parsed(&mut self, data: &[u8]) -> Result<(), Mismatch> {
        let (text, ended) = text_of(data).map_err(|wrong| self.at(wrong))?;
        // The first event of a chat completion, which has a role, and the final one with the usage.
        if text.is_empty() && (self.next == 0 || self.next == self.tokens) {
            return Ok(());
        }
        if self.next == self.tokens {
            let text = format!("expected [DONE], got `{text}`");
            return Err(self.at(Mismatch::new(Kind::AfterEnd, text)));
        }
        if text != self.piece {
            return Err(self.differs(&text));
        }
        let changed = |this: &Self, want: &str| {
            let text = format!(
                "the text is correct, but expected {want}, got {}",
                shown(data)
            );
            this.at(Mismatch::new(Kind::Changed, text))
        };
        let last = self.next + 1 == self.tokens;
        if ended != last {
            let want = if last {
                "a finish_reason"
            } else {
                "no finish_reason"
            };
            return Err(changed(self, want));
        }
        let at = memmem::find(data, self.piece.as_bytes()).unwrap_or(0);
        let (before, behind) = (&data[..at], &data[at..]);
        match &self.around {
            Some((prefix, _)) if last && prefix == before => {}
            Some((prefix, _)) => {
                let mut want = shown(prefix);
                want.push_str("\u{2026} as in the events before");
                return Err(changed(self, &want));
            }
            None => {
                let behind = behind.get(self.piece.len()..).unwrap_or_default();
                self.around = Some((before.to_vec(), behind.to_vec()));
            }
        }
        self.advance();
        Ok(())
    }

    fn advance(&mut self) {
        self.next += 1;
        self.piece.clear();
        let _ = write!(self.piece, "t{}-{} ", self.next, self.tag);
    }

    /// Checks the end of the response.
    ///
    /// # Errors
    /// If tokens, or `[DONE]` in a stream, are missing.
    pub fn finish(&self) -> Result<(), Mismatch> {
        if self.done && self.next == self.tokens {
            return Ok(());
        }
        let expected = if self.next < self.tokens {
            self.piece.trim_end()
        } else {
            "[DONE]"
        };
        let came = if self.done { "[DONE]" } else { "the end" };
        let text = format!("expected `{expected}`, got {came}");
        Err(self.at(Mismatch::new(Kind::Cut, text)))
    }

    /// Compares the complete body of a response that is not a stream with the expected one.
    ///
    /// # Errors
    /// If its text differs from the expected one, or it contains no finish reason.
    pub fn whole(&mut self, body: &[u8]) -> Result<(), Mismatch> {
        let (text, ended) = text_of(body)?;
        for piece in text.split_inclusive(' ') {
            if self.next == self.tokens {
                let text = format!("expected the end, got `{piece}`");
                return Err(self.at(Mismatch::new(Kind::AfterEnd, text)));
            }
            if piece != self.piece {
                return Err(self.differs(piece));
            }
            self.advance();
        }
        self.done = ended;
        self.finish()
    }

    /// Returns the error for `came`, text that arrived instead of the expected next token.
    fn differs(&self, came: &str) -> Mismatch {
        let parts = came.strip_prefix('t').and_then(|rest| {
            let (number, tag) = rest.strip_suffix(' ')?.split_once('-')?;
            let is_tag = tag.len() == TAG_DIGITS && tag.bytes().all(|b| b.is_ascii_hexdigit());
            Some((number.parse::<u32>().ok()?, tag)).filter(|_| is_tag)
        });
        let kind = match parts {
            Some((_, tag)) if tag != self.tag => Kind::OtherResponse,
            Some((number, _)) if number > self.next => Kind::Lost,
            Some((number, _)) if number < self.next => Kind::Duplicated,
            Some(_) | None => Kind::Changed,
        };
        let expected = self.piece.trim_end();
        let came = shown(came.trim_end().as_bytes());
        self.at(Mismatch::new(
            kind,
            format!("expected `{expected}`, got `{came}`"),
        ))
    }

    fn at(&self, wrong: Mismatch) -> Mismatch {
        let text = format!("token {} of {}: {}", self.next, self.tokens, wrong.text);
        Mismatch::new(wrong.kind, text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: &str = "89abcdef";

    fn event(text: &str, finish: &str) -> String {
        format!(r#"{{"id":"a","choices":[{{"text":"{text}","finish_reason":{finish}}}]}}"#)
    }

    fn tokens(count: u32) -> Vec<String> {
        let finish = |i| if i + 1 == count { "\"length\"" } else { "null" };
        let mut events: Vec<String> = (0..count)
            .map(|i| event(&format!("t{i}-{TAG} "), finish(i)))
            .collect();
        events.push("[DONE]".to_owned());
        events
    }

    fn taken(events: &[String]) -> Result<(), Mismatch> {
        let mut check = Check::new(TAG.to_owned(), 5);
        for event in events {
            check.event(event.as_bytes())?;
        }
        check.finish()
    }

    #[test]
    fn the_expected_text_equals_the_mock_engines() {
        let prompt = r#""write something""#;
        let hash = Sha256::digest(prompt.as_bytes());
        let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = mock_engine::expected_text(&hash, 5);
        let body = event(&text, "\"stop\"");
        let mut check = Check::new(tag(prompt), 5);
        assert_eq!(check.whole(body.as_bytes()), Ok(()));
        assert_eq!(check.came(), 5);
    }

    #[test]
    fn correct_streams_are_accepted() {
        assert_eq!(taken(&tokens(5)), Ok(()));
        let role = r#"{"choices":[{"delta":{"role":"assistant","content":""}}]}"#.to_owned();
        let usage = r#"{"choices":[],"usage":{}}"#.to_owned();
        let mut events = tokens(5);
        events.insert(0, role);
        events.insert(6, usage);
        assert_eq!(taken(&events), Ok(()));
    }

    #[test]
    fn every_difference_is_reported_with_its_kind() {
        type Edit = fn(&mut Vec<String>);
        let cases: [(Edit, Kind, &str); 12] = [
            (
                |events| drop(events.remove(2)),
                Kind::Lost,
                "token 2 of 5: expected `t2-89abcdef`, got `t3-89abcdef`",
            ),
            (
                |events| drop(events.remove(4)),
                Kind::Cut,
                "token 4 of 5: expected `t4-89abcdef`, got [DONE]",
            ),
            (
                |events| events.insert(2, events[1].clone()),
                Kind::Duplicated,
                "token 2 of 5: expected `t2-89abcdef`, got `t1-89abcdef`",
            ),
            (
                |events| events.insert(5, events[4].clone()),
                Kind::AfterEnd,
                "expected [DONE], got `t4-89abcdef",
            ),
            (|events| events.swap(1, 2), Kind::Lost, "got `t2-"),
            (
                |events| events[3] = event("t3-00000000 ", "null"),
                Kind::OtherResponse,
                "token 3 of 5: expected `t3-89abcdef`, got `t3-00000000`",
            ),
            (
                |events| events[3] = event("t3-89xbcdef ", "null"),
                Kind::Changed,
                "got `t3-89xbcdef`",
            ),
            (
                |events| events[3] = events[3].replace("\"id\":\"a\"", "\"id\":\"b\""),
                Kind::Changed,
                "the text is correct, but expected {\"id\":\"a\"",
            ),
            (
                |events| events[4] = event("t4-89abcdef ", "null"),
                Kind::Changed,
                "a finish_reason",
            ),
            (
                |events| drop(events.pop()),
                Kind::Cut,
                "expected `[DONE]`, got the end",
            ),
            (
                |events| events.push("{}".to_owned()),
                Kind::AfterEnd,
                "after [DONE]",
            ),
            (
                |events| events[2] = r#"{"error":{"message":"boom"}}"#.to_owned(),
                Kind::Refused,
                "boom",
            ),
        ];
        for (edit, kind, part) in cases {
            let mut events = tokens(5);
            edit(&mut events);
            let wrong = taken(&events).unwrap_err();
            assert_eq!(wrong.kind, kind, "{wrong}");
            assert!(wrong.text.contains(part), "{part}: {wrong}");
        }
    }

    #[test]
    fn responses_without_streaming_are_checked() {
        let text = |count: u32| -> String { (0..count).map(|i| format!("t{i}-{TAG} ")).collect() };
        for (body, want) in [
            (event(&text(5), "\"length\""), None),
            (event(&text(4), "\"length\""), Some(Kind::Cut)),
            (event(&text(6), "\"length\""), Some(Kind::AfterEnd)),
            (event(&text(5), "null"), Some(Kind::Cut)),
            (event("", "\"stop\""), Some(Kind::Cut)),
            (
                event(&text(5).replace("t2", "t1"), "\"stop\""),
                Some(Kind::Duplicated),
            ),
            ("nonsense".to_owned(), Some(Kind::Changed)),
        ] {
            let got = Check::new(TAG.to_owned(), 5).whole(body.as_bytes());
            assert_eq!(got.err().map(|wrong| wrong.kind), want, "{body}");
        }
        let message =
            r#"{"choices":[{"message":{"content":"t0-89abcdef "},"finish_reason":"stop"}]}"#;
        let mut check = Check::new(TAG.to_owned(), 1);
        assert_eq!(check.whole(message.as_bytes()), Ok(()));
    }
}
