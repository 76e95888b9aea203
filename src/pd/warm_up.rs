//! Speculative prefill: after a chat turn, a prefiller computes the beginning of the probable next
//! prompt ahead of time (`docs/pd-sidecar.md#speculative-prefill`).
//!
//! The next prompt of a conversation is the last one, the response text, and a new message. A
//! request with all of this but the text of the new message leaves the KV cache of the conversation
//! in the prefix cache of the prefiller.

use super::edits::Caps;
use super::request::PdRequest;
use crate::h1::{DataLines, LinePart};
use crate::json::{Level, elements, inner, member, validate};
use crate::limits::ANSWER_BYTES_MAX;

/// The text of a chat completion, collected while the response is relayed.
#[derive(Debug, Default)]
pub struct Answer {
    form: Form,
    lines: DataLines,
    /// The response, or the current event of a stream, as JSON text.
    json: Vec<u8>,
    /// The text of the events so far, as the content of a JSON string.
    text: Vec<u8>,
    /// Whether the response text cannot be repeated as one message of the assistant: it is too
    /// long, calls tools, or is one of several.
    is_unfit: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Form {
    /// Not known before the first byte.
    #[default]
    Unknown,
    Json,
    Events,
}

impl Answer {
    /// Reads `payload`, the next part of the response body.
    pub fn feed(&mut self, payload: &[u8]) {
        if self.form == Form::Unknown {
            self.form = match payload.iter().find(|byte| !byte.is_ascii_whitespace()) {
                None => return,
                Some(b'{') => Form::Json,
                Some(_) => Form::Events,
            };
        }
        if self.form == Form::Json {
            self.keep(payload);
            return;
        }
        let mut at = 0;
        while !self.is_unfit
            && let Some(part) = self.lines.next(payload, &mut at)
        {
            match part {
                LinePart::Data { start, end, .. } => self.keep(&payload[start..end]),
                LinePart::End { .. } => {
                    let event = std::mem::take(&mut self.json);
                    self.take(&event, "delta");
                    self.json = event;
                    self.json.clear();
                }
            }
        }
    }

    /// Forgets everything, because the response is read again from its start.
    pub fn restart(&mut self) {
        *self = Self::default();
    }

    /// Returns the response text as the content of a JSON string, or `None` if there is none that
    /// can be repeated.
    #[must_use]
    pub fn finish(mut self) -> Option<Vec<u8>> {
        if self.form == Form::Json {
            let response = std::mem::take(&mut self.json);
            self.take(&response, "message");
        }
        let is_usable = !self.is_unfit && !self.text.is_empty();
        is_usable.then_some(self.text)
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.json.len() + self.text.len() + bytes.len() > ANSWER_BYTES_MAX {
            self.is_unfit = true;
            self.json = Vec::new();
        }
        if !self.is_unfit {
            self.json.extend_from_slice(bytes);
        }
    }

    /// Appends the text of the first choice of a response or an event. The name of the message
    /// differs between the two.
    fn take(&mut self, json: &[u8], message: &str) {
        let mut choices = member(json, "choices").into_iter().flat_map(elements);
        let Some(choice) = choices.next() else {
            return;
        };
        let index = member(choice.value, "index");
        let is_only = index.is_none_or(|index| index == b"0") && choices.next().is_none();
        let Some(message) = member(choice.value, message) else {
            self.is_unfit |= !is_only;
            return;
        };
        let calls =
            member(message, "tool_calls").is_some_and(|calls| elements(calls).next().is_some());
        self.is_unfit |= !is_only || calls;
        let content = member(message, "content");
        if let Some(text) = content.and_then(inner) {
            self.text.extend_from_slice(text);
        }
    }
}

impl PdRequest<'_> {
    /// Returns the body of a request that computes the beginning of the next prompt: the client's
    /// messages, a message of the assistant with `text`, and a message of the user with one blank.
    /// `text` is the content of a JSON string, without its quotes. Returns `None` if the request
    /// has no messages or `text` is not valid.
    #[must_use]
    pub fn warm_up_body(&self, text: &[u8]) -> Option<Vec<u8>> {
        validate(&[b"{\"a\":\"", text, b"\"}"].concat()).ok()?;
        let messages = self.document.last(Level::Top, "messages")?;
        elements(messages.value.of(self.body)).next()?;
        let more = [
            &br#",{"role":"assistant","content":""#[..],
            text,
            br#""},{"role":"user","content":" "}"#,
        ]
        .concat();
        let mut edits = self.edits();
        edits.append("messages", &more);
        edits.remove(Level::Top, "kv_transfer_params");
        edits.remove(Level::Top, "continue_final_message");
        edits.remove(Level::Top, "add_generation_prompt");
        edits.cap(self.api, Caps::All);
        edits.whole_response();
        let splices = edits.splices().ok()?;
        Some(splices.pieces(self.body).flatten().copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Api;
    use crate::pd::testing::Subject;
    use serde_json::{Value, json};

    fn answer(response: &str) -> Option<String> {
        let mut found = Vec::new();
        for size in [1, 7, response.len().max(1)] {
            let mut answer = Answer::default();
            for piece in response.as_bytes().chunks(size) {
                answer.feed(piece);
            }
            found.push(answer.finish());
        }
        assert!(found.iter().all(|one| *one == found[0]), "{response}");
        found.remove(0).map(|text| String::from_utf8(text).unwrap())
    }

    #[test]
    fn the_text_of_whole_and_streamed_answers_is_collected() {
        let whole =
            r#"{"choices":[{"index":0,"message":{"role":"assistant","content":"a\n\"b"}}]}"#;
        assert_eq!(answer(whole).as_deref(), Some(r#"a\n\"b"#));
        let stream = concat!(
            r#"data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}"#,
            "\n\n",
            r#"data: {"choices":[{"index":0,"delta":{"content":"a\ud83d"}}]}"#,
            "\r\n\r\n: a comment\n",
            r#"data: {"choices":[{"index":0,"delta":{"content":"\ude00b","tool_calls":[]}}]}"#,
            "\n\n",
            r#"data: {"choices":[{"index":0,"delta":{"content":null},"finish_reason":"stop"}]}"#,
            "\n\n",
            r#"data: {"choices":[],"usage":{}}"#,
            "\n\ndata: [DONE]\n\n",
        );
        assert_eq!(answer(stream).as_deref(), Some(r"a\ud83d\ude00b"));
    }

    #[test]
    fn answers_that_cannot_be_repeated_are_refused() {
        let choice =
            |more: &str| format!(r#"{{"choices":[{{"message":{{"content":"x"{more}}}}}]}}"#);
        assert!(answer(&choice("")).is_some());
        let long = format!(r#","reasoning":"{}""#, "x".repeat(ANSWER_BYTES_MAX));
        for response in [
            String::new(),
            "{}".to_owned(),
            r#"{"choices":[]}"#.to_owned(),
            r#"{"choices":[{"message":{"content":null}}]}"#.to_owned(),
            r#"{"choices":[{"message":{"content":[]}}]}"#.to_owned(),
            r#"{"choices":[{"message":{"content":"x"}},{"message":{"content":"y"}}]}"#.to_owned(),
            r#"{"choices":[{"index":1,"message":{"content":"x"}}]}"#.to_owned(),
            choice(r#","tool_calls":[{"id":"1"}]"#),
            choice(&long),
            "data: {\"choices\":[{\"index\":1,\"delta\":{\"content\":\"x\"}}]}\n\n".to_owned(),
        ] {
            assert_eq!(answer(&response), None, "{response:.200}");
        }
    }

    #[test]
    fn the_request_repeats_the_conversation() {
        let body = r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,
            "stream_options":{"include_usage":true},"max_tokens":9,"temperature":0.5,
            "kv_transfer_params":{"x":1},"continue_final_message":false}"#;
        let subject = Subject::new(Api::Chat, body);
        let sent = subject.request().warm_up_body(br"a\n").unwrap();
        let sent: Value = serde_json::from_slice(&sent).unwrap();
        assert_eq!(
            sent,
            json!({"model": "m", "stream": false, "max_tokens": 1, "max_completion_tokens": 1,
                "min_tokens": 1, "temperature": 0.5, "messages": [
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "a\n"},
                    {"role": "user", "content": " "}]})
        );
        for (body, answer) in [
            (r#"{"messages":[]}"#, &b"a"[..]),
            (r#"{"messages":7}"#, b"a"),
            (r#"{"prompt":"x"}"#, b"a"),
            (body, br#"a"b"#),
            (body, br"\x"),
        ] {
            let subject = Subject::new(Api::Chat, body);
            assert_eq!(subject.request().warm_up_body(answer), None, "{body}");
        }
    }
}
