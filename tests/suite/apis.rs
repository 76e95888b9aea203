//! The five inference APIs: a request to each, the token limits of its prefill leg, and the
//! expected text of its response, streamed or not.

use std::sync::atomic::{AtomicU64, Ordering};

use mock_engine::{expected_text, expected_token_ids};
use serde_json::{Value, json};

use crate::client::Response;
use crate::harness::sha256;

/// An inference API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Api {
    Chat,
    Completions,
    Messages,
    Responses,
    Generate,
}

/// A request to an API, and the data from which its expected response is computed.
#[derive(Clone, Debug)]
pub(crate) struct Question {
    pub(crate) api: Api,
    /// The bytes that the mock engine hashes to generate its response.
    pub(crate) prompt: String,
    pub(crate) body: String,
    pub(crate) tokens: u32,
}

/// When the prefill leg must contain `max_completion_tokens`: always, or only if the client's
/// request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completion {
    Always,
    IfGiven,
}

impl Api {
    pub(crate) const ALL: [Self; 5] = [
        Self::Chat,
        Self::Completions,
        Self::Messages,
        Self::Responses,
        Self::Generate,
    ];

    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Messages => "/v1/messages",
            Self::Responses => "/v1/responses",
            Self::Generate => "/inference/v1/generate",
        }
    }

    /// Returns a request to this API with a unique prompt and a response of `tokens` tokens.
    pub(crate) fn ask(self, tokens: u32, stream: bool) -> Question {
        self.ask_with(tokens, stream, "")
    }

    /// As `ask`, with `more` inserted before the closing brace of the body. `more` consists of JSON
    /// members, each preceded by a comma.
    pub(crate) fn ask_with(self, tokens: u32, stream: bool, more: &str) -> Question {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let nth = NEXT.fetch_add(1, Ordering::Relaxed);
        self.ask_about(&format!("question {nth}"), tokens, stream, more)
    }

    /// As `ask_with`, with `what` as the text of the prompt. For `Generate`, its bytes are the
    /// token IDs.
    pub(crate) fn ask_about(self, what: &str, tokens: u32, stream: bool, more: &str) -> Question {
        let prompt = match self {
            Self::Chat | Self::Messages => format!(r#"[{{"role":"user","content":"{what}"}}]"#),
            Self::Completions | Self::Responses => format!("\"{what}\""),
            Self::Generate => {
                let ids: Vec<String> = what.bytes().map(|byte| byte.to_string()).collect();
                format!("[{}]", ids.join(","))
            }
        };
        let members = match self {
            Self::Chat | Self::Messages => format!(r#""messages":{prompt},"max_tokens":{tokens}"#),
            Self::Completions => format!(r#""prompt":{prompt},"max_tokens":{tokens}"#),
            Self::Responses => format!(r#""input":{prompt},"max_output_tokens":{tokens}"#),
            Self::Generate => format!(
                r#""token_ids":{prompt},"sampling_params":{{"max_tokens":{tokens},"temperature":0.5}}"#
            ),
        };
        let body = format!(r#"{{"model":"mock-model",{members},"stream":{stream}{more}}}"#);
        Question {
            api: self,
            prompt,
            body,
            tokens,
        }
    }

    /// Fails unless `have`, the body of a prefill leg, is the body `client` with the API's token
    /// limits capped at one, the members in `set` set to the values there, those in `removed`
    /// removed, and all others unchanged.
    #[track_caller]
    pub(crate) fn expect_capped(
        self,
        client: &Value,
        have: &Value,
        set: &Value,
        removed: &[&str],
        completion: Completion,
    ) {
        let (mut have_rest, mut want) = (have.clone(), client.clone());
        for (name, value) in set.as_object().unwrap() {
            want[name] = value.clone();
        }
        for name in removed {
            want.as_object_mut().unwrap().remove(*name);
        }
        let limits: &[&str] = match self {
            Self::Chat | Self::Completions | Self::Messages => {
                &["max_tokens", "max_completion_tokens", "min_tokens"]
            }
            Self::Responses => &["max_output_tokens"],
            Self::Generate => &["max_tokens", "min_tokens"],
        };
        let place = match self {
            Self::Generate => "/sampling_params",
            _ => "",
        };
        let given = |name: &str| client.pointer(&format!("{place}/{name}")).is_some();
        for name in limits {
            let own = have.pointer(&format!("{place}/{name}"));
            match *name {
                "max_tokens" | "max_output_tokens" => assert_eq!(own, Some(&json!(1)), "{have}"),
                "max_completion_tokens" if completion == Completion::Always || given(name) => {
                    assert_eq!(own, Some(&json!(1)), "{name}: {have}");
                }
                "max_completion_tokens" => assert_eq!(own, None, "{name}: {have}"),
                // Engines reject a minimum above the cap.
                _ => assert!(own.is_none_or(|own| *own == json!(1)), "{name}: {have}"),
            }
        }
        for body in [&mut have_rest, &mut want] {
            if let Some(place) = body.pointer_mut(place).and_then(Value::as_object_mut) {
                limits.iter().for_each(|name| drop(place.remove(*name)));
            }
        }
        if self == Self::Responses {
            want["store"] = json!(false);
        }
        assert_eq!(have_rest, want);
    }
}

impl Question {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// Fails unless `response` contains exactly the text (or for `Generate`, the token IDs) that
    /// the mock engines generate for this question.
    #[track_caller]
    pub(crate) fn expect(&self, response: &Response) {
        let hash = sha256(self.prompt.as_bytes());
        let (have, want) = if self.api == Api::Generate {
            let ids = expected_token_ids(&hash, self.tokens);
            (ids_of(response), format!("{ids:?}"))
        } else {
            (
                text_of(self.api, response),
                expected_text(&hash, self.tokens),
            )
        };
        assert_eq!(have, want, "{:?}: {}", self.api, response.text());
    }
}

fn pieces(response: &Response) -> Vec<Value> {
    let kind = response.header("content-type").unwrap_or_default();
    if kind.starts_with("text/event-stream") {
        response.events()
    } else {
        vec![response.json()]
    }
}

/// Returns the generated text in a response to a request of `api`, streamed or not. It is empty for
/// `Generate`, whose responses contain token IDs.
pub(crate) fn text_of(api: Api, response: &Response) -> String {
    let places: &[&str] = match api {
        Api::Chat => &["/choices/0/message/content", "/choices/0/delta/content"],
        Api::Completions => &["/choices/0/text"],
        Api::Messages => &["/content/0/text", "/delta/text"],
        Api::Responses => &["/output/0/content/0/text"],
        Api::Generate => &[],
    };
    let text = |piece: &Value| {
        if piece["type"] == "response.output_text.delta" {
            return piece["delta"].as_str().unwrap().to_owned();
        }
        let found = places
            .iter()
            .find_map(|place| piece.pointer(place)?.as_str());
        found.unwrap_or_default().to_owned()
    };
    pieces(response).iter().map(text).collect()
}

/// Returns the token IDs in a response to a `Generate` request, streamed or not, as text like `[1,
/// 2]`.
fn ids_of(response: &Response) -> String {
    let ids = |piece: &Value| {
        let ids = piece.pointer("/choices/0/token_ids").cloned();
        ids.map_or_else(Vec::new, |ids| ids.as_array().unwrap().clone())
    };
    let ids: Vec<u64> = pieces(response)
        .iter()
        .flat_map(ids)
        .map(|id| id.as_u64().unwrap())
        .collect();
    format!("{ids:?}")
}
