//! Response bodies in the format of each API, as one JSON object or as a stream of events.

use serde_json::Value;

use crate::api::{Ask, Kind};
use crate::config::{EngineConfig, UsageShape};
use crate::token::{FOREIGN_TAG, seed_of, tag_of, text_from, token_id};

/// The contents of one response.
#[derive(Debug)]
pub(crate) struct Response {
    kind: Kind,
    id: String,
    model: String,
    created: u64,
    tag: String,
    tokens: u32,
    /// Index, from 0, of the first token to generate. Greater than 0 if the request continues an
    /// earlier response and contains that many tokens of it.
    first: u32,
    choices: u32,
    limited: bool,
    /// Whether the response has the finish reason `cache_threshold` and no generated token.
    cold: bool,
    prompt_tokens: u64,
    cached: u64,
    usage: UsageShape,
    null_usage: bool,
    include_usage: bool,
    continuous_usage: bool,
    /// Members to append to the response, such as `kv_transfer_params`, each with a leading comma;
    /// may be empty.
    handoff: String,
    /// The member that [`crate::Fault::LargeJson`] adds, with a leading comma; empty without the
    /// fault.
    pad: String,
}

/// The inputs of a [`Response`] that follow neither from the members checked in [`Ask`] nor from
/// the configuration.
#[derive(Debug)]
pub(crate) struct ResponseInputs {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) foreign: bool,
    pub(crate) cold: bool,
    pub(crate) cached: u64,
    pub(crate) handoff: String,
    pub(crate) pad_bytes: usize,
}

impl Response {
    pub(crate) fn new(ask: &Ask, config: &EngineConfig, inputs: ResponseInputs) -> Self {
        let pad = match inputs.pad_bytes {
            0 => String::new(),
            bytes => format!(",\"routed_experts\":\"{}\"", "A".repeat(bytes)),
        };
        let tag = if inputs.foreign {
            FOREIGN_TAG
        } else {
            tag_of(&ask.prompt_sha256)
        };
        Self {
            kind: ask.kind,
            id: Value::from(inputs.id).to_string(),
            model: Value::from(config.model.as_str()).to_string(),
            created: inputs.created,
            tag: tag.to_owned(),
            tokens: if inputs.cold { 1 } else { ask.tokens },
            first: ask.first,
            choices: ask.choices,
            limited: ask.limited,
            cold: inputs.cold,
            prompt_tokens: ask.prompt_tokens,
            cached: inputs.cached,
            usage: config.usage,
            null_usage: config.null_usage_in_chunks,
            include_usage: ask.include_usage,
            continuous_usage: ask.continuous_usage,
            handoff: inputs.handoff,
            pad,
        }
    }

    /// Returns the number of tokens per choice, on which the generation time depends; 1 if the
    /// response is `cold`.
    pub(crate) fn tokens(&self) -> u32 {
        self.tokens
    }

    /// Returns the response as one JSON body.
    pub(crate) fn whole(&self) -> String {
        match self.kind {
            Kind::Chat | Kind::Completions => self.whole_openai(),
            Kind::Generate => self.whole_generate(),
            Kind::Responses => self.response_object(true),
            Kind::Messages => self.whole_messages(),
        }
    }

    fn whole_openai(&self) -> String {
        let text = self.text();
        let choices = self.each_choice(|index| match self.kind {
            Kind::Chat => format!(
                "{{\"index\":{index},\"message\":{{\"role\":\"assistant\",\"content\":{text},\
                 \"refusal\":null,\"tool_calls\":[]}},\"logprobs\":null,\"finish_reason\":{},\
                 \"stop_reason\":null}}",
                self.finish()
            ),
            Kind::Completions | Kind::Responses | Kind::Messages | Kind::Generate => format!(
                "{{\"index\":{index},\"text\":{text},\"logprobs\":null,\"finish_reason\":{},\
                 \"stop_reason\":null,\"prompt_logprobs\":null}}",
                self.finish()
            ),
        });
        let object = match self.kind {
            Kind::Chat => "chat.completion",
            Kind::Completions | Kind::Responses | Kind::Messages | Kind::Generate => {
                "text_completion"
            }
        };
        format!(
            "{{\"id\":{},\"object\":\"{object}\",\"created\":{},\"model\":{},\"choices\":{choices},\
             \"service_tier\":null,\"system_fingerprint\":null{}{}{}}}",
            self.id,
            self.created,
            self.model,
            self.pad,
            self.usage_member(self.tokens),
            self.handoff
        )
    }

    fn whole_generate(&self) -> String {
        let seed = seed_of(&self.tag);
        let count = if self.cold { 0 } else { self.tokens };
        let ids: Vec<u32> = (0..count).map(|i| token_id(seed, i)).collect();
        let ids = Value::from(ids);
        let choices = self.each_choice(|index| {
            format!(
                "{{\"index\":{index},\"finish_reason\":{},\"stop_reason\":null,\
                 \"token_ids\":{ids},\"logprobs\":null}}",
                self.finish()
            )
        });
        format!(
            "{{\"request_id\":{},\"model\":{},\"created\":{}{}{},\"prompt_logprobs\":null{},\
             \"output_mode\":\"tokens\",\"choices\":{choices}}}",
            self.id,
            self.model,
            self.created,
            self.pad,
            self.usage_member(self.tokens),
            self.handoff
        )
    }

    fn whole_messages(&self) -> String {
        format!(
            "{{\"id\":{},\"type\":\"message\",\"role\":\"assistant\",\
             \"content\":[{{\"type\":\"text\",\"text\":{}}}],\"model\":{},\
             \"stop_reason\":{},\"stop_sequence\":null{}{}{}}}",
            self.id,
            self.text(),
            self.model,
            self.stop_reason(),
            self.pad,
            self.usage_member(self.tokens),
            self.handoff
        )
    }

    /// Returns the `response` object of the responses API: with the output and usage if `complete`,
    /// otherwise without, as in the first events of a stream.
    fn response_object(&self, complete: bool) -> String {
        let status = match (complete, self.limited || self.cold) {
            (false, _) => "in_progress",
            (true, true) => "incomplete",
            (true, false) => "completed",
        };
        let details = match status {
            "incomplete" if self.cold => "{\"reason\":\"cache_threshold\"}",
            "incomplete" => "{\"reason\":\"max_output_tokens\"}",
            _ => "null",
        };
        let head = format!(
            "{{\"id\":{},\"object\":\"response\",\"created_at\":{},\"model\":{},\
             \"status\":\"{status}\",\"incomplete_details\":{details},\"output\":",
            self.id, self.created, self.model
        );
        if complete {
            let (pad, usage) = (&self.pad, self.usage_member(self.tokens));
            format!(
                "{head}[{}]{pad}{usage}{}}}",
                self.output_item(),
                self.handoff
            )
        } else {
            format!("{head}[],\"usage\":null}}")
        }
    }

    fn output_item(&self) -> String {
        format!(
            "{{\"id\":\"msg_0\",\"type\":\"message\",\"role\":\"assistant\",\
             \"status\":\"completed\",\"content\":[{}]}}",
            self.content_part()
        )
    }

    fn content_part(&self) -> String {
        format!(
            "{{\"type\":\"output_text\",\"text\":{},\"annotations\":[],\"logprobs\":null}}",
            self.text()
        )
    }

    /// Returns the generated text as a JSON string. The text contains no characters that need
    /// escaping.
    fn text(&self) -> String {
        if self.cold {
            return "\"\"".to_owned();
        }
        format!("\"{}\"", text_from(&self.tag, self.first, self.tokens))
    }

    fn each_choice(&self, choice: impl Fn(u32) -> String) -> String {
        let all: Vec<String> = (0..self.choices).map(choice).collect();
        format!("[{}]", all.join(","))
    }

    fn finish(&self) -> &'static str {
        if self.cold {
            "\"cache_threshold\""
        } else if self.limited {
            "\"length\""
        } else {
            "\"stop\""
        }
    }

    fn stop_reason(&self) -> &'static str {
        if self.cold {
            "\"cache_threshold\""
        } else if self.limited {
            "\"max_tokens\""
        } else {
            "\"end_turn\""
        }
    }

    /// Returns `,"usage":…` for `tokens` generated tokens per choice in the configured shape, or an
    /// empty string for [`UsageShape::Missing`].
    fn usage_member(&self, tokens: u32) -> String {
        match self.usage {
            UsageShape::Missing => String::new(),
            UsageShape::Null => ",\"usage\":null".to_owned(),
            UsageShape::Details
            | UsageShape::EmptyDetails
            | UsageShape::NullDetails
            | UsageShape::WithoutDetails => format!(",\"usage\":{}", self.usage_object(tokens)),
        }
    }

    fn usage_object(&self, tokens: u32) -> String {
        let prompt = self.prompt_tokens;
        let tokens = if self.cold { 0 } else { tokens };
        let done = u64::from(tokens) * u64::from(self.choices);
        let total = prompt + done;
        let details = match self.usage {
            UsageShape::Details => Some(format!("{{\"cached_tokens\":{}}}", self.cached)),
            UsageShape::EmptyDetails => Some("{}".to_owned()),
            UsageShape::NullDetails => Some("null".to_owned()),
            UsageShape::WithoutDetails | UsageShape::Null | UsageShape::Missing => None,
        };
        let named = |name| {
            details
                .as_ref()
                .map_or_else(String::new, |details| format!(",\"{name}\":{details}"))
        };
        match self.kind {
            Kind::Chat | Kind::Completions | Kind::Generate => format!(
                "{{\"prompt_tokens\":{prompt},\"total_tokens\":{total},\
                 \"completion_tokens\":{done}{}}}",
                named("prompt_tokens_details")
            ),
            Kind::Responses => format!(
                "{{\"input_tokens\":{prompt}{},\"output_tokens\":{done},\
                 \"output_tokens_details\":{{\"reasoning_tokens\":0}},\"total_tokens\":{total}}}",
                named("input_tokens_details")
            ),
            Kind::Messages => self.messages_usage(prompt, done),
        }
    }

    /// Returns the `usage` of the messages API, which divides the prompt among its counts. Before
    /// the first token, vLLM does not know the cached ones, and omits them.
    fn messages_usage(&self, prompt: u64, done: u64) -> String {
        let (input, details) = match self.usage {
            UsageShape::Details if done > 0 => {
                let cached = self.cached.min(prompt);
                let created = (prompt - cached) / 2;
                let details = format!(
                    ",\"cache_creation_input_tokens\":{created},\
                     \"cache_read_input_tokens\":{cached}"
                );
                (prompt - cached - created, details)
            }
            UsageShape::NullDetails => (prompt, ",\"cache_read_input_tokens\":null".to_owned()),
            UsageShape::Details
            | UsageShape::EmptyDetails
            | UsageShape::WithoutDetails
            | UsageShape::Null
            | UsageShape::Missing => (prompt, String::new()),
        };
        format!("{{\"input_tokens\":{input},\"output_tokens\":{done}{details}}}")
    }
}

/// One event of a stream.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Event {
    pub(crate) text: String,
    /// Index, from 0 in this response, of the token whose generation time the event waits for. An
    /// event before the first token has 0, and an event after the last token has the last index.
    pub(crate) token: u32,
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
            return Some(Event { text, token: 0 });
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
            return Some(Event { text, token });
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
        Some(Event { text, token: last })
    }
}

impl Response {
    /// Returns the events before the first token.
    fn before(&self) -> Vec<String> {
        match self.kind {
            Kind::Chat => (0..self.choices)
                .map(|index| {
                    let role = "{\"role\":\"assistant\",\"content\":\"\"}";
                    let pad = if index == 0 { self.pad.as_str() } else { "" };
                    self.openai_event(
                        &format!(
                            "{{\"index\":{index},\"delta\":{role},\"logprobs\":null,\
                             \"finish_reason\":null}}"
                        ),
                        &format!("{pad}{}", self.chunk_usage(0)),
                    )
                })
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

    /// Returns the event for token `token`, from 0 in this response, of choice `index`.
    fn token_event(&self, token: u32, index: u32) -> String {
        let last = token + 1 == self.tokens;
        let finish = if last { self.finish() } else { "null" };
        let text = match self.cold {
            true => String::new(),
            false => format!("t{}-{} ", self.first + token, self.tag),
        };
        let usage = self.chunk_usage(token + 1);
        match self.kind {
            Kind::Chat if self.cold => self.openai_event(
                &format!(
                    "{{\"index\":{index},\"delta\":{{}},\"logprobs\":null,\
                     \"finish_reason\":{finish}}}"
                ),
                &usage,
            ),
            Kind::Chat => self.openai_event(
                &format!(
                    "{{\"index\":{index},\"delta\":{{\"content\":\"{text}\"}},\"logprobs\":null,\
                     \"finish_reason\":{finish}}}"
                ),
                &usage,
            ),
            Kind::Completions => self.openai_event(
                &format!(
                    "{{\"index\":{index},\"text\":\"{text}\",\"logprobs\":null,\
                     \"finish_reason\":{finish}}}"
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
                     \"delta\":\"{text}\",\"logprobs\":[]"
                ),
            ),
            Kind::Messages => anthropic(
                "content_block_delta",
                &format!("\"index\":0,\"delta\":{{\"type\":\"text_delta\",\"text\":\"{text}\"}}"),
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
    /// comma, or an empty string if the event has none. `tokens` is the number of tokens per choice
    /// so far.
    fn chunk_usage(&self, tokens: u32) -> String {
        if self.continuous_usage {
            self.usage_member(tokens)
        } else if self.null_usage {
            ",\"usage\":null".to_owned()
        } else {
            String::new()
        }
    }
}

fn typed(name: &str, sequence: u64, members: &str) -> String {
    format!(
        "event: {name}\ndata: {{\"type\":\"{name}\",\"sequence_number\":{sequence},{members}}}\n\n"
    )
}

fn anthropic(name: &str, members: &str) -> String {
    format!("event: {name}\ndata: {{\"type\":\"{name}\",{members}}}\n\n")
}
