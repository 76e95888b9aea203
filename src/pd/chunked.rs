//! Chunked decode (`--decode-chunk-size`; reference 7): one chat answered by several requests of a
//! few tokens each, every one going on where the last one stopped.
//!
//! Only what can be cut without changing the answer is cut: one plain text by one assistant. Tool
//! calls, log-probabilities, formats and stop strings reach over the cuts, so requests with them
//! are served whole.

use super::request::{Edits, PdRequest};
use super::route::Api;
use crate::json::{Kind, Level, elements, inner, member, members, string_is};

/// How a chat is cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Tokens of one chunk.
    chunk: u64,
    /// Tokens of the whole answer, if the client limits them.
    budget: Option<u64>,
    /// Fewest tokens of it, if the client wants some.
    min_tokens: u64,
    /// Whether the client wants events.
    pub streams: bool,
    /// Whether it wants to be told the usage in an event.
    pub include_usage: bool,
}

/// Members whose presence keeps a chat whole.
const WHOLE: [&str; 9] = [
    "tools",
    "echo",
    "logprobs",
    "prompt_logprobs",
    "return_token_ids",
    "response_format",
    "structured_outputs",
    "stop",
    "continue_final_message",
];

impl Cut {
    /// How to cut a request into chunks of `chunk` tokens; `None`: it is served whole.
    #[must_use]
    pub fn of(request: &PdRequest<'_>, chunk: u32) -> Option<Self> {
        let (document, body) = (request.document, request.body);
        let last = |name| {
            let member = document.last(Level::Top, name);
            member.filter(|member| !matches!(member.kind, Kind::Null | Kind::False))
        };
        let number = |name| {
            let text = last(name)?.value.of(body);
            std::str::from_utf8(text).ok()?.parse::<u64>().ok()
        };
        let messages = last("messages").filter(|member| member.kind == Kind::Array)?;
        let is_plain = WHOLE.iter().all(|name| last(name).is_none());
        let is_one = last("n").is_none_or(|n| n.value.of(body) == b"1");
        let has_messages = elements(messages.value.of(body)).next().is_some();
        if request.api != Api::Chat || !is_plain || !is_one || !has_messages {
            return None;
        }
        let limit = ["max_completion_tokens", "max_tokens"]
            .into_iter()
            .find(|name| last(name).is_some());
        let chunk = u64::from(chunk);
        let budget = match limit {
            None => None,
            // A limit that is no number of tokens is the engine's to judge.
            Some(name) => Some(number(name).filter(|budget| *budget > chunk)?),
        };
        let options = last("stream_options").map_or(&b""[..], |member| member.value.of(body));
        Some(Self {
            chunk,
            budget,
            min_tokens: number("min_tokens").unwrap_or(0),
            streams: last("stream").is_some_and(|member| member.kind == Kind::True),
            include_usage: member(options, "include_usage") == Some(b"true"),
        })
    }
}

impl Cut {
    /// Tokens of the chunk that follows so many.
    fn tokens_after(&self, used: u64) -> u64 {
        let left = self
            .budget
            .map_or(u64::MAX, |budget| budget.saturating_sub(used));
        left.min(self.chunk)
    }
}

/// What the chunks so far came to.
#[derive(Clone, Debug)]
pub struct Progress {
    cut: Cut,
    /// Tokens so far.
    used: u64,
    /// The text so far, as the inside of a JSON string.
    text: Vec<u8>,
    /// From the first chunk: what the whole answer says of itself.
    first: Option<First>,
    /// Edit values of the next chunk.
    limit: String,
    minimum: String,
    message: Vec<u8>,
}

#[derive(Clone, Debug)]
struct First {
    id: Vec<u8>,
    created: Vec<u8>,
    model: Vec<u8>,
    prompt_tokens: u64,
    prompt_details: Option<Vec<u8>>,
}

/// One chunk's answer, as far as the whole answer needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Its text, as the inside of a JSON string.
    pub text: Vec<u8>,
    /// Its finish reason, a JSON value.
    pub reason: Vec<u8>,
    /// Whether it is the last one.
    pub is_last: bool,
}

/// Why a chunk's answer leads no further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChunkError {
    /// It is not a chat completion.
    Malformed,
    /// It has parts besides its text, or none: no next chunk could go on from there.
    NotPlain,
}

impl Progress {
    /// Nothing so far.
    #[must_use]
    pub fn new(cut: Cut) -> Self {
        let mut progress = Self {
            cut,
            used: 0,
            text: Vec::new(),
            first: None,
            limit: String::new(),
            minimum: String::new(),
            message: Vec::new(),
        };
        progress.prepare();
        progress
    }

    /// How the chat is cut.
    #[must_use]
    pub const fn cut(&self) -> &Cut {
        &self.cut
    }

    /// Tokens of the answer so far.
    #[must_use]
    pub const fn tokens(&self) -> u64 {
        self.used
    }

    fn prepare(&mut self) {
        let tokens = self.cut.tokens_after(self.used);
        self.limit = tokens.to_string();
        let minimum = self.cut.min_tokens.saturating_sub(self.used).min(tokens);
        self.minimum = minimum.to_string();
        self.message.clear();
        self.message
            .extend_from_slice(br#",{"role":"assistant","content":""#);
        self.message.extend_from_slice(&self.text);
        self.message.extend_from_slice(br#""}"#);
    }

    /// Adds what makes a leg's body ask for the next chunk.
    pub(super) fn edit<'a>(&'a self, edits: &mut Edits<'a>) {
        edits.set(Level::Top, "max_tokens", self.limit.as_bytes());
        edits.set(Level::Top, "max_completion_tokens", self.limit.as_bytes());
        if self.cut.min_tokens > 0 {
            edits.set(Level::Top, "min_tokens", self.minimum.as_bytes());
        }
        edits.whole_response();
        if self.first.is_some() {
            edits.set(Level::Top, "continue_final_message", b"true");
            edits.set(Level::Top, "add_generation_prompt", b"false");
            edits.append("messages", &self.message);
        }
    }

    /// Takes a chunk's answer, a valid JSON text.
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn take(&mut self, response: &[u8]) -> Result<Chunk, ChunkError> {
        let malformed = ChunkError::Malformed;
        let choices = member(response, "choices").ok_or(malformed)?;
        let choice = elements(choices).next().ok_or(malformed)?.value;
        let message = member(choice, "message").ok_or(malformed)?;
        if members(message).any(|item| is_other_part(item.key, item.value)) {
            return Err(ChunkError::NotPlain);
        }
        let text = match member(message, "content") {
            None | Some(b"null") => &b""[..],
            Some(content) => inner(content).ok_or(malformed)?,
        };
        let reason = member(choice, "finish_reason").unwrap_or(b"null");
        if text.is_empty() && self.first.is_none() && string_is(reason, "length") {
            return Err(ChunkError::NotPlain);
        }
        let usage = member(response, "usage").unwrap_or_default();
        let count =
            |name| -> Option<u64> { std::str::from_utf8(member(usage, name)?).ok()?.parse().ok() };
        let tokens = count("completion_tokens").ok_or(malformed)?;
        if self.first.is_none() {
            let copy = |name| member(response, name).unwrap_or(b"null").to_vec();
            let details = member(usage, "prompt_tokens_details").filter(|d| *d != b"null");
            self.first = Some(First {
                id: copy("id"),
                created: copy("created"),
                model: copy("model"),
                prompt_tokens: count("prompt_tokens").unwrap_or(0),
                prompt_details: details.map(<[u8]>::to_vec),
            });
        }
        // Cut shorter than asked, there is no room for more in the engine's context: it would
        // refuse to go on, and what has been said would be lost.
        let is_full = tokens < self.cut.tokens_after(self.used);
        self.used = self.used.saturating_add(tokens);
        self.text.extend_from_slice(text);
        let is_spent = self.cut.budget.is_some_and(|budget| self.used >= budget);
        // Without text (hidden reasoning, half a character) the next chunk would begin where this
        // one did, and without a budget that might never end.
        let is_endless = text.is_empty() && self.cut.budget.is_none();
        let is_last = is_spent || is_full || is_endless || !string_is(reason, "length");
        if !is_last {
            self.prepare();
        }
        Ok(Chunk {
            text: text.to_vec(),
            reason: reason.to_vec(),
            is_last,
        })
    }

    /// The usage of the whole answer; `cached_tokens` is the prefiller's count, if there was one.
    #[must_use]
    pub fn usage(&self, cached_tokens: Option<u64>) -> Vec<u8> {
        let prompt = self.first.as_ref().map_or(0, |first| first.prompt_tokens);
        let (used, total) = (self.used, prompt.saturating_add(self.used));
        let mut usage = format!(
            r#"{{"prompt_tokens":{prompt},"total_tokens":{total},"completion_tokens":{used}"#
        )
        .into_bytes();
        let details = self
            .first
            .as_ref()
            .and_then(|first| first.prompt_details.clone());
        let details = match cached_tokens {
            Some(count) => Some(format!(r#"{{"cached_tokens":{count}}}"#).into_bytes()),
            None => details,
        };
        if let Some(details) = details {
            usage.extend_from_slice(br#","prompt_tokens_details":"#);
            usage.extend_from_slice(&details);
        }
        usage.push(b'}');
        usage
    }

    /// The whole answer: the last chunk's, with everything that is said of all.
    #[must_use]
    pub fn whole(&self, last: &[u8], cached_tokens: Option<u64>) -> Vec<u8> {
        let text = [b"\"", &self.text[..], b"\""].concat();
        let choices = member(last, "choices").unwrap_or_default();
        let choice = elements(choices).next().map_or(&b""[..], |item| item.value);
        let message = member(choice, "message").unwrap_or_default();
        let message = with_member(message, "content", &text);
        let choice = with_member(choice, "message", &message);
        let choices = [b"[", &choice[..], b"]"].concat();
        let response = with_member(last, "choices", &choices);
        let response = with_member(&response, "usage", &self.usage(cached_tokens));
        match &self.first {
            Some(first) => with_member(&response, "id", &first.id),
            None => response,
        }
    }

    /// The event of one chunk.
    #[must_use]
    pub fn event(&self, chunk: &Chunk, is_first: bool) -> Vec<u8> {
        let role: &[u8] = if is_first {
            br#""role":"assistant","#
        } else {
            b""
        };
        let reason: &[u8] = if chunk.is_last {
            &chunk.reason
        } else {
            b"null"
        };
        let choice = [
            br#"{"index":0,"delta":{"#,
            role,
            br#""content":""#,
            &chunk.text,
            br#""},"logprobs":null,"finish_reason":"#,
            reason,
            b"}",
        ]
        .concat();
        self.frame(&choice, &[])
    }

    /// The event with the usage.
    #[must_use]
    pub fn usage_event(&self, cached_tokens: Option<u64>) -> Vec<u8> {
        let usage = [br#","usage":"#, &self.usage(cached_tokens)[..]].concat();
        self.frame(b"", &usage)
    }

    fn frame(&self, choice: &[u8], behind: &[u8]) -> Vec<u8> {
        let null = b"null".to_vec();
        let (id, created, model) = match &self.first {
            Some(first) => (&first.id, &first.created, &first.model),
            None => (&null, &null, &null),
        };
        [
            br#"data: {"id":"#,
            &id[..],
            br#","object":"chat.completion.chunk","created":"#,
            created,
            br#","model":"#,
            model,
            br#","choices":["#,
            choice,
            b"]",
            behind,
            b"}\n\n",
        ]
        .concat()
    }
}

/// Whether a member of a message says something besides its text.
fn is_other_part(key: &[u8], value: &[u8]) -> bool {
    let is_other = !string_is(key, "role") && !string_is(key, "content");
    is_other && !matches!(value, b"null" | b"[]" | b"\"\"")
}

/// An object with another value of one member, which it has.
fn with_member(object: &[u8], name: &str, value: &[u8]) -> Vec<u8> {
    let mut out = vec![b'{'];
    for item in members(object) {
        if out.len() > 1 {
            out.push(b',');
        }
        out.extend_from_slice(item.key);
        out.push(b':');
        out.extend_from_slice(if item.is(name) { value } else { item.value });
    }
    out.push(b'}');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pd::testing::{Subject, apply};
    use serde_json::{Value, json};

    fn cut(body: &str) -> Option<Cut> {
        Cut::of(&Subject::new(Api::Chat, body).request(), 8)
    }

    fn response(id: &str, text: &str, reason: &str, tokens: u64) -> String {
        json!({"id": id, "object": "chat.completion", "created": 7, "model": "q3", "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text, "tool_calls": []},
                "finish_reason": reason, "stop_reason": null}],
            "usage": {"prompt_tokens": 5 + tokens, "completion_tokens": tokens},
            "prompt_logprobs": null})
        .to_string()
    }

    #[test]
    fn x1_what_fits_in_one_chunk_or_cannot_be_cut_is_served_whole() {
        let message = r#""messages":[{"role":"user","content":"x"}]"#;
        for (extra, is_cut) in [
            (r#""max_tokens":8"#, false),
            (r#""max_tokens":9"#, true),
            (r#""max_tokens":100,"max_completion_tokens":8"#, false),
            (r#""max_tokens":0"#, false),
            (r#""max_tokens":1e3"#, false),
            (r#""max_tokens":100.0"#, false),
            (r#""max_tokens":100,"max_completion_tokens":-1"#, false),
            (r#""max_tokens":100,"max_completion_tokens":null"#, true),
            (r#""max_tokens":null"#, true),
            (r#""n":2"#, false),
            (r#""n":1"#, true),
            (r#""tools":[{}]"#, false),
            (r#""logprobs":true"#, false),
            (r#""logprobs":false"#, true),
            (r#""stop":["x"]"#, false),
            (r#""stop":null"#, true),
            (r#""response_format":{"type":"json_object"}"#, false),
            (r#""structured_outputs":{"regex":"a+"}"#, false),
            (r#""prompt_logprobs":1"#, false),
            (r#""echo":true"#, false),
            (r#""echo":false"#, true),
            (r#""return_token_ids":true"#, false),
            (r#""continue_final_message":true"#, false),
        ] {
            let body = format!("{{{message},{extra}}}");
            assert_eq!(cut(&body).is_some(), is_cut, "{extra}");
        }
        assert_eq!(cut(r#"{"messages":[]}"#), None);
        assert_eq!(cut(r#"{"prompt":"x"}"#), None);
    }

    #[test]
    fn x2_x4_the_next_chunk_goes_on_behind_the_text_so_far() {
        let body = r#"{"messages":[{"role":"user","content":"x"}],"max_tokens":12,"min_tokens":10,"stream":true,"stream_options":{"include_usage":true}}"#;
        let subject = Subject::new(Api::Chat, body);
        let cut = Cut::of(&subject.request(), 8).unwrap();
        assert!(cut.streams && cut.include_usage);
        let mut progress = Progress::new(cut);
        let asked = |progress: &Progress| {
            let mut request = subject.request();
            request.chunk = Some(progress);
            apply(&request.local_leg().unwrap(), body)
        };
        let mut want: Value = serde_json::from_str(body).unwrap();
        want.as_object_mut().unwrap().remove("stream_options");
        want["stream"] = json!(false);
        want["max_tokens"] = json!(8);
        want["max_completion_tokens"] = json!(8);
        want["min_tokens"] = json!(8);
        assert_eq!(asked(&progress), want);
        let first = response("a", "one \"two\" \u{1}", "length", 8);
        let chunk = progress.take(first.as_bytes()).unwrap();
        assert!(!chunk.is_last);
        want["max_tokens"] = json!(4);
        want["max_completion_tokens"] = json!(4);
        want["min_tokens"] = json!(2);
        want["continue_final_message"] = json!(true);
        want["add_generation_prompt"] = json!(false);
        let said = json!({"role": "assistant", "content": "one \"two\" \u{1}"});
        want["messages"].as_array_mut().unwrap().push(said);
        assert_eq!(asked(&progress), want);
        let event = String::from_utf8(progress.event(&chunk, true)).unwrap();
        let event: Value = serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(event["choices"][0]["delta"]["role"], "assistant");
        assert_eq!(event["choices"][0]["finish_reason"], json!(null));

        let second = response("b", " three", "length", 4);
        let chunk = progress.take(second.as_bytes()).unwrap();
        assert!(chunk.is_last, "the budget is spent");
        let whole: Value =
            serde_json::from_slice(&progress.whole(second.as_bytes(), None)).unwrap();
        assert_eq!(whole["id"], "a");
        let text = &whole["choices"][0]["message"]["content"];
        assert_eq!(*text, "one \"two\" \u{1} three");
        let usage = json!({"prompt_tokens": 13, "completion_tokens": 12, "total_tokens": 25});
        assert_eq!(whole["usage"], usage);
        let usage: Value = serde_json::from_slice(&progress.usage(Some(3))).unwrap();
        assert_eq!(usage["prompt_tokens_details"]["cached_tokens"], 3);
    }

    #[test]
    fn x3_another_finish_reason_or_an_empty_chunk_ends_it() {
        let body = r#"{"messages":[{"role":"user","content":"x"}]}"#;
        let ends = |response: String| {
            Progress::new(cut(body).unwrap())
                .take(response.as_bytes())
                .map(|chunk| chunk.is_last)
        };
        assert_eq!(ends(response("a", "x", "stop", 3)), Ok(true));
        assert_eq!(ends(response("a", "", "stop", 0)), Ok(true));
        assert_eq!(
            ends(response("a", "", "length", 8)),
            Err(ChunkError::NotPlain)
        );
        assert_eq!(ends(response("a", "x", "length", 8)), Ok(false));
        // The engine's context is full.
        assert_eq!(ends(response("a", "x", "length", 7)), Ok(true));
        assert_eq!(ends("{}".to_owned()), Err(ChunkError::Malformed));
        for (limit, is_last) in [("", true), (r#","max_tokens":99"#, false)] {
            let body = format!("{}{limit}}}", body.strip_suffix('}').unwrap());
            let mut progress = Progress::new(cut(&body).unwrap());
            progress
                .take(response("a", "x", "length", 8).as_bytes())
                .unwrap();
            let chunk = progress.take(response("b", "", "length", 8).as_bytes());
            assert_eq!(chunk.unwrap().is_last, is_last, "without text");
        }
        let reasoned = response("a", "x", "length", 8)
            .replace(r#""tool_calls":[]"#, r#""reasoning_content":"hm""#);
        assert_eq!(ends(reasoned), Err(ChunkError::NotPlain));
    }
}
