//! Response bodies in the format of each API, as a stream of events.

use serde_json::Value;

use crate::api::Kind;
use crate::config::UsageShape;
use crate::form::Form;
use crate::response::Response;
use crate::token::{seed_of, token_id};

/// One event of a stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) text: String,
    /// Index, from 0 in this response, of the token whose generation time the event waits for. An
    /// event before the first token has 0, and an event after the last token has the last index.
    pub(crate) token: u32,
    /// Whether the event contains this token.
    pub(crate) has_token: bool,
}

/// The events of a stream, created one at a time.
#[derive(Debug)]
pub(crate) struct Events {
    response: Response,
    /// Remaining events before the first token, in reverse order.
    before: Vec<String>,
    token: u32,
    choice: u32,
    /// Remaining events after the last token, in reverse order; `None` until the events of all
    /// tokens have been returned.
    after: Option<Vec<String>>,
}

impl Events {
    pub(crate) fn new(response: Response) -> Self {
        let mut before = response.before();
        before.reverse();
        Self {
            response,
            before,
            token: 0,
            choice: 0,
            after: None,
        }
    }

    /// Returns the next event, or `None` after the last one.
    pub(crate) fn next(&mut self) -> Option<Event> {
        if let Some(text) = self.before.pop() {
            return Some(Event {
                text,
                token: 0,
                has_token: false,
            });
        }
        let last = self.response.tokens.saturating_sub(1);
        if self.token <= last {
            let (token, choice) = (self.token, self.choice);
            self.choice += 1;
            if self.choice >= self.response.choices {
                self.choice = 0;
                self.token += 1;
            }
            let text = self.response.token_event(token, choice);
            return Some(Event {
                text,
                token,
                has_token: !self.response.cold,
            });
        }
        let response = &self.response;
        let text = self
            .after
            .get_or_insert_with(|| {
                let mut after = response.after();
                after.reverse();
                after
            })
            .pop()?;
        Some(Event {
            text,
            token: last,
            has_token: false,
        })
    }
}

impl Response {
    /// Returns the events before the first token.
    fn before(&self) -> Vec<String> {
        match self.kind {
            Kind::Chat => (0..self.choices)
                .flat_map(|index| {
                    let role = "{\"role\":\"assistant\",\"content\":\"\"}";
                    let pad = if index == 0 { self.pad.as_str() } else { "" };
                    let first = self.openai_event(
                        &choice(index, role, "null", "null"),
                        &format!("{pad}{}", self.chunk_usage(0)),
                    );
                    [Some(first), self.call_event(index)]
                })
                .flatten()
                .collect(),
            Kind::Completions | Kind::Generate => Vec::new(),
            Kind::Responses => {
                let part = "\"item_id\":\"msg_0\",\"output_index\":0,\"content_index\":0";
                let object = self.response_object(false);
                vec![
                    typed("response.created", 0, &format!("\"response\":{object}")),
                    typed("response.in_progress", 1, &format!("\"response\":{object}")),
                    typed(
                        "response.output_item.added",
                        2,
                        "\"output_index\":0,\"item\":{\"id\":\"msg_0\",\"type\":\"message\",\
                         \"role\":\"assistant\",\"status\":\"in_progress\",\"content\":[]}",
                    ),
                    typed(
                        "response.content_part.added",
                        3,
                        &format!(
                            "{part},\"part\":{{\"type\":\"output_text\",\"text\":\"\",\
                             \"annotations\":[],\"logprobs\":[]}}"
                        ),
                    ),
                ]
            }
            Kind::Messages => vec![
                anthropic(
                    "message_start",
                    &format!(
                        "\"message\":{{\"id\":{},\"type\":\"message\",\"role\":\"assistant\",\
                         \"content\":[],\"model\":{},\"stop_reason\":null,\
                         \"stop_sequence\":null{}}}",
                        self.id,
                        self.model,
                        self.usage_member(0)
                    ),
                ),
                anthropic(
                    "content_block_start",
                    "\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}",
                ),
            ],
        }
    }

    /// Returns the event that starts the tool call of choice `index`, or `None` if the response is
    /// no tool call.
    fn call_event(&self, index: u32) -> Option<String> {
        let Form::Call { name, .. } = &self.form else {
            return None;
        };
        let call = format!(
            "{{\"content\":null,\"tool_calls\":[{{\"id\":{},\"type\":\"function\",\"index\":0,\
             \"function\":{{\"name\":{}}}}}]}}",
            self.call_id(index),
            Value::from(name.as_str())
        );
        Some(self.openai_event(&choice(index, &call, "null", "null"), &self.chunk_usage(0)))
    }

    /// Returns the event for token `token`, from 0 in this response, of choice `index`.
    fn token_event(&self, token: u32, index: u32) -> String {
        let last = token + 1 == self.tokens;
        let is_call = matches!(self.form, Form::Call { .. });
        // A tool call ends with a separate event.
        let finish = if last && !is_call {
            self.finish()
        } else {
            "null"
        };
        let text = self.token_text(token);
        let usage = self.chunk_usage(token + 1);
        match self.kind {
            Kind::Chat => {
                let delta = match self.cold {
                    true => "{}".to_owned(),
                    false if is_call => format!(
                        "{{\"content\":null,\"tool_calls\":[{{\"index\":0,\
                         \"function\":{{\"arguments\":{text}}}}}]}}"
                    ),
                    false => format!("{{\"content\":{text}}}"),
                };
                let logprobs = self.logprobs_of(token, 1);
                self.openai_event(&choice(index, &delta, &logprobs, finish), &usage)
            }
            Kind::Completions => self.openai_event(
                &format!(
                    "{{\"index\":{index},\"text\":{text},\"logprobs\":{},\
                     \"finish_reason\":{finish}}}",
                    self.logprobs_of(token, 1)
                ),
                &usage,
            ),
            Kind::Generate => {
                let id = token_id(seed_of(&self.tag), token);
                let ids = if self.cold {
                    String::new()
                } else {
                    id.to_string()
                };
                let usage = if usage.is_empty() {
                    ",\"usage\":null"
                } else {
                    &usage
                };
                format!(
                    "data: {{\"request_id\":{}{usage},\"output_mode\":\"tokens\",\"choices\":\
                     [{{\"index\":{index},\"finish_reason\":{finish},\"token_ids\":[{ids}],\
                     \"logprobs\":null}}]}}\n\n",
                    self.id
                )
            }
            Kind::Responses => typed(
                "response.output_text.delta",
                u64::from(token) + 4,
                &format!(
                    "\"item_id\":\"msg_0\",\"output_index\":0,\"content_index\":0,\
                     \"delta\":{text},\"logprobs\":[]"
                ),
            ),
            Kind::Messages => anthropic(
                "content_block_delta",
                &format!("\"index\":0,\"delta\":{{\"type\":\"text_delta\",\"text\":{text}}}"),
            ),
        }
    }

    /// Returns the events after the last token.
    fn after(&self) -> Vec<String> {
        match self.kind {
            Kind::Chat | Kind::Completions | Kind::Generate => self.after_openai(),
            Kind::Responses => self.after_responses(),
            Kind::Messages => {
                let usage = self.usage_member(self.tokens);
                let delta = format!(
                    "\"delta\":{{\"stop_reason\":{},\"stop_sequence\":null}}{usage}",
                    self.stop_reason()
                );
                vec![
                    anthropic("content_block_stop", "\"index\":0"),
                    anthropic("message_delta", &delta),
                    "event: message_stop\ndata: {\"type\":\"message_stop\"}\n\n".to_owned(),
                ]
            }
        }
    }

    fn after_openai(&self) -> Vec<String> {
        let mut events = Vec::new();
        if self.kind == Kind::Chat && matches!(self.form, Form::Call { .. }) {
            let usage = self.chunk_usage(self.tokens);
            events.extend((0..self.choices).map(|index| {
                self.openai_event(&choice(index, "{}", "null", self.finish()), &usage)
            }));
        }
        if self.include_usage && self.usage != UsageShape::Missing {
            let usage = self.usage_member(self.tokens);
            events.push(match self.kind {
                Kind::Generate => format!(
                    "data: {{\"request_id\":{}{usage},\"output_mode\":\"tokens\",\
                     \"choices\":[]}}\n\n",
                    self.id
                ),
                Kind::Chat | Kind::Completions | Kind::Responses | Kind::Messages => {
                    self.openai_event("", &usage)
                }
            });
        }
        events.push("data: [DONE]\n\n".to_owned());
        events
    }

    fn after_responses(&self) -> Vec<String> {
        let seq = u64::from(self.tokens) + 4;
        let part = "\"item_id\":\"msg_0\",\"output_index\":0,\"content_index\":0";
        vec![
            typed(
                "response.output_text.done",
                seq,
                &format!("{part},\"text\":{},\"logprobs\":[]", self.text()),
            ),
            typed(
                "response.content_part.done",
                seq + 1,
                &format!("{part},\"part\":{}", self.content_part()),
            ),
            typed(
                "response.output_item.done",
                seq + 2,
                &format!("\"output_index\":0,\"item\":{}", self.output_item()),
            ),
            typed(
                "response.completed",
                seq + 3,
                // Handoffs contain line breaks, which would end the `data:` line.
                &format!(
                    "\"response\":{}",
                    self.response_object(true).replace(['\r', '\n'], " ")
                ),
            ),
        ]
    }

    /// Returns an event of a chat or completions stream with these choices. `members` follow the
    /// choices, each with a leading comma.
    fn openai_event(&self, choices: &str, members: &str) -> String {
        let object = match self.kind {
            Kind::Chat => "chat.completion.chunk",
            Kind::Completions | Kind::Responses | Kind::Messages | Kind::Generate => {
                "text_completion"
            }
        };
        format!(
            "data: {{\"id\":{},\"object\":\"{object}\",\"created\":{},\"model\":{},\
             \"choices\":[{choices}]{members}}}\n\n",
            self.id, self.created, self.model
        )
    }

    /// Returns the `usage` member of an event other than the final usage event, with a leading
    /// comma, or an empty string if the event has none. It counts only the tokens of the event's
    /// choice, as vLLM does: `tokens` so far.
    fn chunk_usage(&self, tokens: u32) -> String {
        if self.continuous_usage {
            self.usage_of(u64::from(tokens))
        } else if self.null_usage {
            ",\"usage\":null".to_owned()
        } else {
            String::new()
        }
    }
}

/// Returns a choice of a chat completion event.
fn choice(index: u32, delta: &str, logprobs: &str, finish: &str) -> String {
    format!(
        "{{\"index\":{index},\"delta\":{delta},\"logprobs\":{logprobs},\"finish_reason\":{finish}}}"
    )
}

fn typed(name: &str, sequence: u64, members: &str) -> String {
    format!(
        "event: {name}\ndata: {{\"type\":\"{name}\",\"sequence_number\":{sequence},{members}}}\n\n"
    )
}

fn anthropic(name: &str, members: &str) -> String {
    format!("event: {name}\ndata: {{\"type\":\"{name}\",{members}}}\n\n")
}
