//! The contents of a response, and its body in the format of each API as one JSON object.
//!
//! [`crate::events`] formats the same contents as a stream.

use serde_json::Value;

use crate::api::{Ask, Kind};
use crate::config::{EngineConfig, UsageShape};
use crate::form::Form;
use crate::logprobs;
use crate::token::{FOREIGN_TAG, hash, seed_of, tag_of, text_bytes, text_from, token_id};

/// The contents of one response.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) kind: Kind,
    pub(crate) id: String,
    pub(crate) model: String,
    pub(crate) created: u64,
    pub(crate) tag: String,
    pub(crate) tokens: u32,
    /// Index, from 0, of the first token to generate. Greater than 0 if the request continues an
    /// earlier response and contains that many tokens of it.
    pub(crate) first: u32,
    pub(crate) choices: u32,
    pub(crate) form: Form,
    /// The tokens of the text; `None` if they are numbered words.
    pieces: Option<Vec<String>>,
    /// Number of candidates per token in `logprobs`; `None`: no log-probabilities.
    pub(crate) logprobs: Option<u32>,
    pub(crate) limited: bool,
    /// Whether the response has the finish reason `cache_threshold` and no generated token.
    pub(crate) cold: bool,
    pub(crate) prompt_tokens: u64,
    pub(crate) cached: u64,
    pub(crate) usage: UsageShape,
    pub(crate) null_usage: bool,
    pub(crate) include_usage: bool,
    pub(crate) continuous_usage: bool,
    /// Members to append to the response, such as `kv_transfer_params`, each with a leading comma;
    /// may be empty.
    pub(crate) handoff: String,
    /// The member that [`crate::Fault::LargeJson`] adds, with a leading comma; empty without the
    /// fault.
    pub(crate) pad: String,
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
            pieces: ask.form.pieces(tag),
            form: ask.form.clone(),
            logprobs: ask.logprobs,
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
        let logprobs = self.logprobs_of(0, self.tokens);
        let choices = self.each_choice(|index| match self.kind {
            Kind::Chat => {
                let (content, calls) = match &self.form {
                    Form::Call { name, .. } => ("\"\"", self.tool_call(index, name, &text)),
                    Form::Words | Form::Object(_) | Form::Schema(_) => {
                        (text.as_str(), String::new())
                    }
                };
                format!(
                    "{{\"index\":{index},\"message\":{{\"role\":\"assistant\",\"content\":{content},\
                     \"refusal\":null,\"tool_calls\":[{calls}]}},\"logprobs\":{logprobs},\
                     \"finish_reason\":{},\"stop_reason\":null}}",
                    self.finish()
                )
            }
            Kind::Completions | Kind::Responses | Kind::Messages | Kind::Generate => format!(
                "{{\"index\":{index},\"text\":{text},\"logprobs\":{logprobs},\"finish_reason\":{},\
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
    pub(crate) fn response_object(&self, complete: bool) -> String {
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

    pub(crate) fn output_item(&self) -> String {
        format!(
            "{{\"id\":\"msg_0\",\"type\":\"message\",\"role\":\"assistant\",\
             \"status\":\"completed\",\"content\":[{}]}}",
            self.content_part()
        )
    }

    pub(crate) fn content_part(&self) -> String {
        format!(
            "{{\"type\":\"output_text\",\"text\":{},\"annotations\":[],\"logprobs\":null}}",
            self.text()
        )
    }

    /// Returns a tool call with these arguments (a JSON string).
    fn tool_call(&self, index: u32, name: &str, arguments: &str) -> String {
        format!(
            "{{\"id\":{},\"type\":\"function\",\"function\":{{\"name\":{},\
             \"arguments\":{arguments}}}}}",
            self.call_id(index),
            Value::from(name)
        )
    }

    /// Returns the id of the tool call of choice `index`, as a JSON string.
    pub(crate) fn call_id(&self, index: u32) -> String {
        let hash = hash(format!("{}{index}", self.id).as_bytes());
        format!("\"chatcmpl-tool-{hash:016x}\"")
    }

    /// Returns the generated text as a JSON string.
    pub(crate) fn text(&self) -> String {
        match &self.pieces {
            _ if self.cold => "\"\"".to_owned(),
            // The text contains no characters that need escaping.
            None => format!("\"{}\"", text_from(&self.tag, self.first, self.tokens)),
            Some(pieces) => {
                let part = pieces.get(..self.tokens as usize).unwrap_or(pieces);
                Value::from(part.concat()).to_string()
            }
        }
    }

    /// Returns token `token`, from 0 in this response, as a JSON string.
    pub(crate) fn token_text(&self, token: u32) -> String {
        match &self.pieces {
            _ if self.cold => "\"\"".to_owned(),
            None => format!("\"t{}-{} \"", self.first + token, self.tag),
            Some(pieces) => {
                let piece = pieces.get(token as usize).map_or("", String::as_str);
                Value::from(piece).to_string()
            }
        }
    }

    /// Returns the log-probabilities of `count` tokens from number `token` on, counted from 0 in
    /// this response; `null` if the request asks for none.
    pub(crate) fn logprobs_of(&self, token: u32, count: u32) -> String {
        let Some(candidates) = self.logprobs.filter(|_| !self.cold) else {
            return "null".to_owned();
        };
        let tokens: Vec<String> = match &self.pieces {
            None => (token..token.saturating_add(count))
                .map(|at| text_from(&self.tag, self.first + at, 1))
                .collect(),
            Some(pieces) => pieces
                .iter()
                .skip(token as usize)
                .take(count as usize)
                .cloned()
                .collect(),
        };
        let tokens = tokens.iter().map(String::as_str);
        if self.kind == Kind::Chat {
            return logprobs::chat(tokens, candidates).to_string();
        }
        let offset = match &self.pieces {
            None => text_bytes(&self.tag, self.first, token),
            Some(pieces) => {
                let before = pieces.iter().take(token as usize);
                before.map(|piece| piece.chars().count() as u64).sum()
            }
        };
        logprobs::completions(tokens, candidates, offset).to_string()
    }

    fn each_choice(&self, choice: impl Fn(u32) -> String) -> String {
        let all: Vec<String> = (0..self.choices).map(choice).collect();
        format!("[{}]", all.join(","))
    }

    pub(crate) fn finish(&self) -> &'static str {
        if self.cold {
            "\"cache_threshold\""
        } else if self.limited {
            "\"length\""
        } else if matches!(self.form, Form::Call { named: false, .. }) {
            "\"tool_calls\""
        } else {
            "\"stop\""
        }
    }

    pub(crate) fn stop_reason(&self) -> &'static str {
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
    pub(crate) fn usage_member(&self, tokens: u32) -> String {
        self.usage_of(u64::from(tokens) * u64::from(self.choices))
    }

    /// Returns the same as [`Self::usage_member`] for `done` generated tokens in total.
    pub(crate) fn usage_of(&self, done: u64) -> String {
        match self.usage {
            UsageShape::Missing => String::new(),
            UsageShape::Null => ",\"usage\":null".to_owned(),
            UsageShape::Details
            | UsageShape::EmptyDetails
            | UsageShape::NullDetails
            | UsageShape::WithoutDetails => format!(",\"usage\":{}", self.usage_object(done)),
        }
    }

    fn usage_object(&self, done: u64) -> String {
        let prompt = self.prompt_tokens;
        let done = if self.cold { 0 } else { done };
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
