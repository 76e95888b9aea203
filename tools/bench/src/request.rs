//! The bytes of the requests to each side.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use crate::schedule::Side;

/// The API of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

impl Api {
    /// Returns the API of a path, which may have any prefix; `None` if the path is of neither API.
    #[must_use]
    pub fn of(path: &str) -> Option<Self> {
        if path.ends_with("/chat/completions") {
            Some(Self::Chat)
        } else if path.ends_with("/completions") {
            Some(Self::Completions)
        } else {
            None
        }
    }
}

/// The parameters of the requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// Path of the requests.
    pub path: String,
    /// The API that `path` belongs to.
    pub api: Api,
    /// The model's name.
    pub model: String,
    /// Prompt of all requests, without the tag of a unique prompt.
    pub prompt: String,
    /// Maximum number of tokens in the response.
    pub tokens_max: u32,
    /// Whether requests set `ignore_eos`, so that every response reaches `tokens_max`.
    pub ignore_eos: bool,
    /// Whether every prompt begins with a unique tag, so that prefix caches do not contain it.
    pub unique: bool,
}

/// Number of hex digits of the tag of a unique prompt. It is fixed, so that all prompts of a run
/// have the same length.
const TAG_DIGITS: usize = 16;
/// Placeholder for the tag in the request body. Its first occurrence in the body is the tag at the
/// start of the prompt, because the prompt is in the body's first member.
const TAG_PLACEHOLDER: &str = "0123456789abcdef";

/// Words that most tokenizers encode as one token each.
const WORDS: [&str; 16] = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world",
    "school", "state", "family", "student", "group",
];

/// Returns a prompt of about `tokens` tokens.
#[must_use]
pub fn prompt_of(tokens: u32) -> String {
    let words = (0..tokens as usize).map(|i| WORDS[(i + i / WORDS.len()) % WORDS.len()]);
    words.collect::<Vec<_>>().join(" ")
}

/// The requests of a run, ready to send.
#[derive(Clone, Debug)]
pub struct Requests {
    sides: Vec<Vec<u8>>,
    /// Byte offset of the tag in the request to each side; `None` if prompts are not unique.
    tags: Option<Vec<usize>>,
}

impl Requests {
    /// Prepares the requests. `hosts` are the values of the `host` field for each side, and
    /// `fields` are as many lists of additional header fields, direct first.
    #[must_use]
    pub fn new(question: &Question, hosts: &[String], fields: &[&[(String, String)]]) -> Self {
        let body = body(question);
        let request = |(host, fields): (&String, &&[(String, String)])| {
            let mut head = format!(
                "POST {} HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\n\
                 accept: text/event-stream\r\ncontent-length: {}\r\n",
                question.path,
                host,
                body.len()
            );
            for (name, value) in *fields {
                head.push_str(&format!("{name}: {value}\r\n"));
            }
            head.push_str("\r\n");
            head.push_str(&body);
            head.into_bytes()
        };
        let sides: Vec<Vec<u8>> = hosts.iter().zip(fields).map(request).collect();
        let tag_in_body = body.find(TAG_PLACEHOLDER).filter(|_| question.unique);
        let tags = tag_in_body.map(|at| {
            let offset = |side: &Vec<u8>| side.len() - body.len() + at;
            sides.iter().map(offset).collect()
        });
        Self { sides, tags }
    }

    /// Returns the request of `round` to `side`. If prompts are unique, its tag occurs in no other
    /// request of the run; `salt` distinguishes runs.
    #[must_use]
    pub fn of(&self, round: u32, side: Side, salt: u64) -> Cow<'_, [u8]> {
        let bytes = &self.sides[side.index()];
        let Some(tags) = &self.tags else {
            return Cow::Borrowed(bytes);
        };
        let number = u64::from(round) * self.sides.len() as u64 + side.index() as u64;
        // The multiplication spreads the number over all digits, so that prompts differ from their
        // first token on.
        let tag = (number ^ salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut bytes = bytes.clone();
        let at = tags[side.index()];
        bytes[at..at + TAG_DIGITS].copy_from_slice(format!("{tag:016x}").as_bytes());
        Cow::Owned(bytes)
    }
}

fn body(question: &Question) -> String {
    let prompt = if question.unique {
        format!("{TAG_PLACEHOLDER} {}", question.prompt)
    } else {
        question.prompt.clone()
    };
    let mut body = Map::new();
    let mut set = |name: &str, value: Value| body.insert(name.to_owned(), value);
    match question.api {
        Api::Completions => set("prompt", json!(prompt)),
        Api::Chat => set("messages", json!([{"role": "user", "content": prompt}])),
    };
    set("model", json!(question.model));
    set("max_tokens", json!(question.tokens_max));
    set("temperature", json!(0));
    set("stream", json!(true));
    if question.ignore_eos {
        set("ignore_eos", json!(true));
    }
    Value::from(body).to_string()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn question() -> Question {
        Question {
            path: "/v1/completions".to_owned(),
            api: Api::Completions,
            model: "a \"b\"".to_owned(),
            prompt: "say\n0123456789abcdef".to_owned(),
            tokens_max: 3,
            ignore_eos: true,
            unique: false,
        }
    }

    fn body_of(request: &[u8]) -> Value {
        let text = std::str::from_utf8(request).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let length = head.split("content-length: ").nth(1).unwrap();
        let length = length.lines().next().unwrap();
        assert_eq!(length, body.len().to_string());
        serde_json::from_str(body).unwrap()
    }

    #[test]
    fn all_sides_get_the_same_body() {
        let fields = [("x-prefiller-host-port".to_owned(), "h:1".to_owned())];
        let requests = Requests::new(
            &question(),
            &["a:1".to_owned(), "b:2".to_owned()],
            &[&[], &fields],
        );
        let [direct, proxy] = [0, 1].map(|i| {
            let side = Side::all(2).nth(i).unwrap();
            requests.of(7, side, 1)
        });
        let want = json!({"prompt": "say\n0123456789abcdef", "model": "a \"b\"", "max_tokens": 3,
                          "temperature": 0, "stream": true, "ignore_eos": true});
        assert_eq!(body_of(&direct), want);
        assert_eq!(body_of(&proxy), want);
        let (direct, proxy) = (direct.escape_ascii(), proxy.escape_ascii());
        assert!(
            direct
                .to_string()
                .starts_with("POST /v1/completions HTTP/1.1\\r\\nhost: a:1")
        );
        assert!(!direct.to_string().contains("x-prefiller"));
        assert!(
            proxy
                .to_string()
                .contains("\\r\\nx-prefiller-host-port: h:1\\r\\n\\r\\n{")
        );
    }

    #[test]
    fn unique_prompts_differ_and_are_equally_long() {
        let question = Question {
            unique: true,
            api: Api::Chat,
            ignore_eos: false,
            ..question()
        };
        let none: &[(String, String)] = &[];
        let hosts = ["a", "b", "c"].map(str::to_owned);
        let requests = Requests::new(&question, &hosts, &[none; 3]);
        let mut seen = BTreeSet::new();
        for round in 0..100 {
            for side in Side::all(3) {
                let body = body_of(&requests.of(round, side, 99));
                let prompt = body["messages"][0]["content"].as_str().unwrap().to_owned();
                assert_eq!(prompt.len(), TAG_DIGITS + 1 + question.prompt.len());
                assert!(prompt.ends_with(&question.prompt));
                assert!(seen.insert(prompt[..TAG_DIGITS].to_owned()));
                assert!(body.get("ignore_eos").is_none());
            }
        }
    }

    #[test]
    fn paths_and_prompts() {
        for (path, want) in [
            ("/v1/completions", Some(Api::Completions)),
            ("/v1/chat/completions", Some(Api::Chat)),
            ("/x/v1/chat/completions", Some(Api::Chat)),
            ("/v1/responses", None),
        ] {
            assert_eq!(Api::of(path), want, "{path}");
        }
        assert_eq!(prompt_of(0), "");
        assert_eq!(prompt_of(300).split(' ').count(), 300);
    }
}
