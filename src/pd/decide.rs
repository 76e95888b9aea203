//! Decides whether a request can be split between a prefiller and the decoder at all.
//!
//! The rules per member are in [`RULES`]. Here are the tests of values, and the rules about whole
//! bodies (`docs/engines.md#requests-that-stay-with-the-decoder`).

use std::ptr;
use std::sync::LazyLock;

use memchr::memmem;

use super::connector::Transfer;
use super::members::{
    CHAT, COMPLETIONS, Classes, GENERATE, MESSAGES, OTHER, RESPONSES, RULES, Row, SAMPLING, Value,
    Verdict, When,
};
use super::outcome::Reason;
use crate::api::Api;
use crate::json::{
    Document, Kind, Level, Member, elements, inner, member, members, string_is, validate,
};

/// Returns the reason why the request must not be split by a connector that transfers KV cache in
/// this way, or `None` if it can be split.
#[must_use]
pub fn keep_local(
    api: Api,
    document: &Document,
    body: &[u8],
    transfer: Transfer,
) -> Option<Reason> {
    let (top, sampling) = match api {
        Api::Chat => (CHAT | OTHER, 0),
        Api::Completions => (COMPLETIONS | OTHER, 0),
        Api::Responses => (RESPONSES | OTHER, 0),
        Api::Messages => (MESSAGES | OTHER, 0),
        Api::Generate => (GENERATE, SAMPLING | OTHER),
        // The engine dispatches such a request by the shape of its body.
        Api::Invocations if is_set(document, "messages") => (CHAT | OTHER, 0),
        Api::Invocations if is_set(document, "prompt") => (COMPLETIONS | OTHER, 0),
        Api::Invocations | Api::Unsplit => return Some(Reason::UnknownShape),
    };
    if transfer == Transfer::Room {
        let several = document
            .last(Level::Top, "n")
            .filter(|_| api != Api::Generate);
        // Engines also read 1.0, "1" and true as 1.
        let is_one = |n: &Member| flag(n.kind, n.value.of(body)) == Some(true);
        let several = several.is_some_and(|n| is_above_one(n, body) && !is_one(n));
        return several.then_some(Reason::SeveralChoices);
    }
    // Required, but set by the prefill leg.
    let is_incomplete = match api {
        Api::Messages => !is_set(document, "max_tokens"),
        Api::Generate => !document.has_object(Level::SamplingParams),
        _ => false,
    };
    if is_incomplete {
        return Some(Reason::InvalidValue);
    }
    let request = Request {
        document,
        body,
        transfer,
    };
    document.members().iter().find_map(|member| {
        let classes = match member.level {
            Level::Top => top,
            Level::SamplingParams => sampling,
            Level::ExtraArgs | Level::Xargs | Level::Parameters => 0,
        };
        let row = row_of(member.name, classes)?;
        // The last of repeated members counts.
        let last = document.last(member.level, member.name)?;
        ptr::eq(last, member)
            .then(|| request.keeps(row, member))
            .flatten()
    })
}

fn row_of(name: &str, classes: Classes) -> Option<&'static Row> {
    RULES
        .iter()
        .find(|row| row.classes & classes != 0 && row.name == name)
}

fn is_set(document: &Document, name: &str) -> bool {
    document
        .last(Level::Top, name)
        .is_some_and(|member| member.kind != Kind::Null)
}

/// Returns whether the request forces the call of a tool, in the APIs where engines up to vLLM 0.31
/// fail on the call of a prefill leg, which is cut after one token (400 or 500,
/// vllm-project/vllm#37258).
#[must_use]
pub fn forces_tool(api: Api, document: &Document, body: &[u8]) -> bool {
    let choice = document.last(Level::Top, "tool_choice");
    let choice = choice.map_or(&b""[..], |choice| choice.value.of(body));
    matches!(api, Api::Chat | Api::Responses | Api::Invocations)
        && (string_is(choice, "required") || type_is(choice, "function"))
}

/// A request whose members are tested.
struct Request<'a> {
    document: &'a Document,
    body: &'a [u8],
    transfer: Transfer,
}

impl Request<'_> {
    /// Returns the reason why a member with this row keeps the request with the decoder.
    fn keeps(&self, row: &Row, member: &Member) -> Option<Reason> {
        match row.verdict {
            Verdict::Harmless | Verdict::Entered | Verdict::Proxy => None,
            Verdict::Capped(value) => {
                (!self.is_valid(value, member)).then_some(Reason::InvalidValue)
            }
            Verdict::Decoder(when, reason) => {
                let counts = match self.transfer {
                    Transfer::Sequence { .. } => true,
                    // A store serves any sequence and any prompt, so only requests count whose
                    // prefill leg would fail or have an effect.
                    Transfer::Store => matches!(
                        reason,
                        Reason::ResponseState
                            | Reason::BuiltInTools
                            | Reason::ThinkingBudget
                            | Reason::ForcedTool
                    ),
                    Transfer::Room => false,
                };
                (counts && self.applies(when, member)).then_some(reason)
            }
        }
    }

    fn is_valid(&self, value: Value, member: &Member) -> bool {
        let bytes = member.value.of(self.body);
        let is_null = member.kind == Kind::Null;
        match value {
            Value::Any => true,
            Value::Limit => is_null || (is_count(bytes) && bytes[0] != b'0'),
            Value::Minimum => is_null || (is_count(bytes) && !self.exceeds_limit(member)),
            Value::Stream => is_null || flag(member.kind, bytes).is_some(),
            Value::StreamOptions => {
                is_null || (member.kind == Kind::Object && self.flag("stream") == Some(true))
            }
        }
    }

    fn applies(&self, when: When, member: &Member) -> bool {
        let bytes = member.value.of(self.body);
        let is_null = member.kind == Kind::Null;
        match when {
            When::NotNull => !is_null,
            When::Set => !is_null && member.kind != Kind::False,
            When::SetWithLogprobs => {
                self.applies(When::Set, member) && is_set(self.document, "logprobs")
            }
            When::AboveOne => is_above_one(member, self.body),
            When::NotCount => !is_null && !is_count(bytes),
            When::NotDisabled => !string_is(bytes, "disabled"),
            When::ListOfSeveral => member.kind == Kind::Array && is_list_of_several(bytes),
            When::BuiltInTool => has_built_in_tool(bytes),
            When::Budget => self.exceeds_budget(bytes),
            When::NamedTool => type_is(bytes, "tool"),
            When::NamelessCall => has_nameless_call(bytes),
            When::NullData => has_null_data(bytes),
            When::UuidOnly => {
                elements(bytes).any(|part| has(part.value, "uuid") && !has(part.value, "url"))
            }
        }
    }

    /// Returns whether a minimum is above the limit of tokens at the same level. Engines refuse
    /// that in their schema, and the prefill leg has other values.
    fn exceeds_limit(&self, minimum: &Member) -> bool {
        let mut limits = ["max_completion_tokens", "max_tokens"]
            .iter()
            .filter_map(|name| self.document.last(minimum.level, name))
            .filter(|limit| limit.kind != Kind::Null);
        let number_of = |member: &Member| number(member.value.of(self.body));
        match (number_of(minimum), limits.next().map(number_of)) {
            (Some(minimum), Some(Some(limit))) => minimum > limit,
            // The rule of the limit applies, or there is none.
            (Some(_), Some(None) | None) => false,
            (None, _) => true,
        }
    }

    /// Returns the value of a member of the top level that engines read as true or false.
    fn flag(&self, name: &str) -> Option<bool> {
        let member = self.document.last(Level::Top, name)?;
        flag(member.kind, member.value.of(self.body))
    }

    /// Returns whether the thinking budget in this object exceeds a limit. vLLM does not compare it
    /// with the limit of a leg that asks for a handoff, so then only the client's limit counts.
    fn exceeds_budget(&self, thinking: &[u8]) -> bool {
        let Some(budget) = member(thinking, "budget_tokens").filter(|value| *value != b"null")
        else {
            return false;
        };
        if !matches!(self.transfer, Transfer::Sequence { is_marked: true }) {
            return true;
        }
        let limit = self.document.last(Level::Top, "max_tokens");
        let limit = limit.and_then(|limit| number(limit.value.of(self.body)));
        match (number(budget), limit) {
            (Some(budget), Some(limit)) => budget >= limit,
            _ => true,
        }
    }
}

/// Returns whether a count (`n`, `best_of`) is neither `null` nor 0 nor 1. An invalid value (a
/// string, a fraction) counts as well: the decoder refuses it.
fn is_above_one(member: &Member, body: &[u8]) -> bool {
    member.kind != Kind::Null && !matches!(member.value.of(body), b"0" | b"1")
}

/// Returns whether a value is an integer without sign, fraction and exponent.
fn is_count(value: &[u8]) -> bool {
    !value.is_empty() && value.iter().all(u8::is_ascii_digit)
}

fn number(value: &[u8]) -> Option<u64> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Returns how engines read a value as true or false (Pydantic's lax mode), or `None` if they
/// refuse it.
fn flag(kind: Kind, value: &[u8]) -> Option<bool> {
    let is_one_of = |words: [&str; 6]| {
        let text = inner(value).unwrap_or_default();
        words
            .iter()
            .any(|word| text.eq_ignore_ascii_case(word.as_bytes()))
    };
    match kind {
        Kind::True => Some(true),
        Kind::False => Some(false),
        Kind::Number if matches!(value, b"1" | b"1.0") => Some(true),
        Kind::Number if matches!(value, b"0" | b"0.0") => Some(false),
        Kind::String if is_one_of(["true", "1", "on", "t", "y", "yes"]) => Some(true),
        Kind::String if is_one_of(["false", "0", "off", "f", "n", "no"]) => Some(false),
        Kind::Null | Kind::Object | Kind::Array | Kind::String | Kind::Number => None,
    }
}

fn has(object: &[u8], name: &str) -> bool {
    member(object, name).is_some_and(|value| value != b"null")
}

fn type_is(object: &[u8], name: &str) -> bool {
    member(object, "type").is_some_and(|value| string_is(value, name))
}

/// Returns whether a list of tools has one that the engine runs itself. Only functions, and what
/// engines treat like them, are left to the client. A list that is no valid JSON goes to the
/// decoder, which refuses it.
fn has_built_in_tool(tools: &[u8]) -> bool {
    validate(tools).is_err()
        || elements(tools).any(|tool| {
            let mut clients = ["function", "custom", "namespace"].iter();
            !clients.any(|name| type_is(tool.value, name))
        })
}

/// Returns whether the `kwargs_data` of `features` is `null` or has a list with `null`.
fn has_null_data(features: &[u8]) -> bool {
    let Some(data) = member(features, "kwargs_data") else {
        return false;
    };
    data == b"null"
        || members(data).any(|list| {
            list.value == b"null" || elements(list.value).any(|item| item.value == b"null")
        })
}

/// Searches for the type of a block that calls a tool. Nearly no conversation has one without id,
/// and most have none at all, so that they need not be read.
static TOOL_USE: LazyLock<memmem::Finder<'static>> =
    LazyLock::new(|| memmem::Finder::new("\"tool_use\""));

/// Returns whether a message has a call of a tool without id.
fn has_nameless_call(messages: &[u8]) -> bool {
    let is_nameless = |block: &[u8]| {
        let id = member(block, "id").unwrap_or(b"null");
        matches!(id, b"null" | b"\"\"") && type_is(block, "tool_use")
    };
    TOOL_USE.find(messages).is_some()
        && elements(messages).any(|message| {
            let content = member(message.value, "content").unwrap_or_default();
            elements(content).any(|block| is_nameless(block.value))
        })
}

/// Returns whether an array starts with a string or an array and has more elements, so that it
/// contains several prompts. An array of numbers is one prompt of token ids. Any other array is
/// left to the engine to refuse.
fn is_list_of_several(array: &[u8]) -> bool {
    let inner = array.get(1..).unwrap_or_default().trim_ascii_start();
    let first_end = match inner.first() {
        Some(b'"') => string_end(inner),
        Some(b'[') => memchr::memchr(b']', inner).map(|at| at + 1),
        Some(_) | None => return false,
    };
    let Some(first_end) = first_end else {
        return false;
    };
    inner[first_end..].trim_ascii_start().first() == Some(&b',')
}

/// Returns the offset after the closing quote of the JSON string at the start of `bytes`, or `None`
/// if it has no closing quote.
fn string_end(bytes: &[u8]) -> Option<usize> {
    let mut at = 1;
    loop {
        at += memchr::memchr2(b'"', b'\\', bytes.get(at..)?)?;
        match bytes[at] {
            b'"' => return Some(at + 1),
            // Skips the backslash and the escaped byte.
            _ => at += 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json::Scanner;
    use crate::pd::request::WATCH;

    const MARKED: Transfer = Transfer::Sequence { is_marked: true };
    const UNMARKED: Transfer = Transfer::Sequence { is_marked: false };

    fn decide(api: Api, body: &str) -> Option<Reason> {
        decide_for(MARKED, api, body)
    }

    fn decide_for(transfer: Transfer, api: Api, body: &str) -> Option<Reason> {
        let mut scanner = Scanner::new(WATCH);
        scanner.feed(body.as_bytes()).unwrap();
        keep_local(api, &scanner.finish().unwrap(), body.as_bytes(), transfer)
    }

    const CASES: [(Api, &str, Option<Reason>); 33] = [
        (Api::Chat, r#"{"messages":[]}"#, None),
        (Api::Chat, r#"{"n":1}"#, None),
        (Api::Chat, r#"{"n":null,"best_of":1}"#, None),
        (Api::Chat, r#"{"n":2}"#, Some(Reason::SeveralChoices)),
        (Api::Chat, r#"{"n":2,"n":1}"#, None),
        (
            Api::Chat,
            r#"{"n":1,"\u006e":3}"#,
            Some(Reason::SeveralChoices),
        ),
        (Api::Chat, r#"{"n":"2"}"#, Some(Reason::SeveralChoices)),
        (Api::Chat, r#"{"n":1.0}"#, Some(Reason::SeveralChoices)),
        (Api::Chat, r#"{"messages":[{"n":4}]}"#, None),
        (Api::Completions, r#"{"best_of":4}"#, Some(Reason::BestOf)),
        (Api::Completions, r#"{"prompt":"a,b"}"#, None),
        (Api::Completions, r#"{"prompt":[1,2,3]}"#, None),
        (Api::Completions, r#"{"prompt":["a\",b"]}"#, None),
        (Api::Completions, r#"{"prompt":[[1,2,3]]}"#, None),
        (Api::Completions, r#"{"prompt":[]}"#, None),
        (
            Api::Completions,
            r#"{"prompt":[ "a\\" , "b"]}"#,
            Some(Reason::SeveralPrompts),
        ),
        (
            Api::Completions,
            r#"{"prompt":[[1,2] ,[3]]}"#,
            Some(Reason::SeveralPrompts),
        ),
        (
            Api::Generate,
            r#"{"sampling_params":{"n":2}}"#,
            Some(Reason::SeveralChoices),
        ),
        (Api::Generate, r#"{"n":2,"sampling_params":{}}"#, None),
        (
            Api::Generate,
            r#"{"sampling_params":{"prompt_logprobs":0}}"#,
            Some(Reason::PromptLogprobs),
        ),
        (
            Api::Generate,
            r#"{"sampling_params":{"prompt_logprobs":null}}"#,
            None,
        ),
        (
            Api::Chat,
            r#"{"messages":[],"prompt_logprobs":0}"#,
            Some(Reason::PromptLogprobs),
        ),
        (Api::Chat, r#"{"prompt_logprobs":null}"#, None),
        (Api::Chat, r#"{"echo":false,"logprobs":true}"#, None),
        (
            Api::Completions,
            r#"{"prompt":"x","echo":true,"logprobs":0}"#,
            Some(Reason::PromptLogprobs),
        ),
        (
            Api::Completions,
            r#"{"prompt":"x","echo":false,"logprobs":0}"#,
            None,
        ),
        (Api::Completions, r#"{"prompt":"x","echo":true}"#, None),
        (
            Api::Invocations,
            r#"{"prompt":"x","prompt_logprobs":1}"#,
            Some(Reason::PromptLogprobs),
        ),
        (Api::Invocations, r#"{"messages":[]}"#, None),
        (Api::Invocations, r#"{"prompt":"x"}"#, None),
        (
            Api::Invocations,
            r#"{"input":"x"}"#,
            Some(Reason::UnknownShape),
        ),
        (
            Api::Unsplit,
            r#"{"messages":[[],[]]}"#,
            Some(Reason::UnknownShape),
        ),
        (
            Api::Invocations,
            r#"{"prompt":["a","b"]}"#,
            Some(Reason::SeveralPrompts),
        ),
    ];

    #[test]
    fn requests_with_several_sequences_are_not_split() {
        for (api, body, want) in CASES {
            assert_eq!(decide(api, body), want, "{api:?} {body}");
        }
    }

    /// Requests that the legs, or one engine alone, would read otherwise, and their neighbours.
    #[rustfmt::skip]
    const READ_DIFFERENTLY: &[(Api, &str, Option<Reason>)] = &[
        (Api::Chat, r#"{"messages":[],"echo":true}"#, Some(Reason::PromptLogprobs)),
        (Api::Chat, r#"{"messages":[],"echo":false}"#, None),
        (Api::Chat, r#"{"messages":[],"use_beam_search":true}"#, Some(Reason::BeamSearch)),
        (Api::Completions, r#"{"prompt":"x","use_beam_search":1}"#, Some(Reason::BeamSearch)),
        (Api::Completions, r#"{"prompt":"x","echo":true}"#, None),
        (Api::Completions, r#"{"prompt":"x","prompt_embeds":"AA"}"#, Some(Reason::PromptEmbeds)),
        (Api::Completions, r#"{"prompt_embeds":["AA","AA"]}"#, Some(Reason::PromptEmbeds)),
        (Api::Completions, r#"{"prompt":"x","prompt_embeds":null}"#, None),
        (Api::Completions, r#"{"prompt":"x","max_tokens":0,"echo":true}"#, Some(Reason::InvalidValue)),
        (Api::Chat, r#"{"messages":[],"truncate_prompt_tokens":-1}"#, Some(Reason::PromptCut)),
        (Api::Chat, r#"{"messages":[],"truncate_prompt_tokens":"-1"}"#, Some(Reason::PromptCut)),
        (Api::Chat, r#"{"messages":[],"truncate_prompt_tokens":100}"#, None),
        (Api::Responses, r#"{"input":"x","truncation":"auto"}"#, Some(Reason::PromptCut)),
        (Api::Responses, r#"{"input":"x","truncation":null}"#, Some(Reason::PromptCut)),
        (Api::Responses, r#"{"input":"x","truncation":"disabled"}"#, None),
        (Api::Responses, r#"{"input":"x","truncate_prompt_tokens":-1}"#, None),
        (Api::Responses, r#"{"input":"x","previous_response_id":"resp_1"}"#, Some(Reason::ResponseState)),
        (Api::Responses, r#"{"input":"x","previous_response_id":null}"#, None),
        (Api::Responses, r#"{"input":"x","background":true}"#, Some(Reason::ResponseState)),
        (Api::Responses, r#"{"input":"x","background":false,"store":true}"#, None),
        (Api::Responses, r#"{"input":"x","tools":[{"type":"function","name":"f"}]}"#, None),
        (Api::Responses, r#"{"input":"x","tools":[]}"#, None),
        (Api::Responses, r#"{"input":"x","tools":[{"type":"function"},{"type":"mcp"}]}"#, Some(Reason::BuiltInTools)),
        (Api::Responses, r#"{"input":"x","tools":[{"type":"web_search_preview"}]}"#, Some(Reason::BuiltInTools)),
        (Api::Responses, r#"{"input":"x","tools":[{"type":"function"},]}"#, Some(Reason::BuiltInTools)),
        (Api::Chat, r#"{"messages":[],"tools":[{"type":"mcp"}]}"#, None),
        (Api::Generate, r#"{"sampling_params":{"prompt_logprob_token_ids":[1]}}"#, Some(Reason::PromptLogprobs)),
        (Api::Generate, r#"{"sampling_params":{"prompt_logprob_start":0}}"#, Some(Reason::PromptLogprobs)),
        (Api::Generate, r#"{"sampling_params":{"skip_reading_prefix_cache":true}}"#, Some(Reason::CacheUnread)),
        (Api::Generate, r#"{"sampling_params":{"skip_reading_prefix_cache":false}}"#, None),
        (Api::Generate, r#"{"skip_reading_prefix_cache":true,"sampling_params":{}}"#, None),
        (Api::Generate, r#"{"sampling_params":{},"features":{"kwargs_data":{"image":[null]}}}"#, Some(Reason::CachedMedia)),
        (Api::Generate, r#"{"sampling_params":{},"features":{"kwargs_data":null}}"#, Some(Reason::CachedMedia)),
        (Api::Generate, r#"{"sampling_params":{},"features":{"kwargs_data":{"image":["AA"]}}}"#, None),
        (Api::Generate, r#"{"sampling_params":{},"content_parts":[{"url":"a","uuid":"b"},{"uuid":"c"}]}"#, Some(Reason::CachedMedia)),
        (Api::Generate, r#"{"sampling_params":{},"content_parts":[{"url":"a","uuid":"b"}]}"#, None),
        (Api::Messages, r#"{"max_tokens":2000,"thinking":{"type":"enabled","budget_tokens":1000}}"#, None),
        (Api::Messages, r#"{"max_tokens":2000,"thinking":{"type":"enabled","budget_tokens":2000}}"#, Some(Reason::ThinkingBudget)),
        (Api::Messages, r#"{"max_tokens":2000,"thinking":{"type":"enabled","budget_tokens":"x"}}"#, Some(Reason::ThinkingBudget)),
        (Api::Messages, r#"{"max_tokens":2000,"thinking":{"type":"disabled"}}"#, None),
        (Api::Messages, r#"{"max_tokens":2000,"tool_choice":{"type":"tool","name":"f"}}"#, Some(Reason::ForcedTool)),
        (Api::Messages, r#"{"max_tokens":2000,"tool_choice":{"type":"auto"}}"#, None),
        (Api::Generate, r#"{"sampling_params":{"min_tokens":5,"max_tokens":4}}"#, Some(Reason::InvalidValue)),
        (Api::Generate, r#"{"sampling_params":{"max_tokens":4,"min_tokens":4}}"#, None),
        (Api::Generate, r#"{"min_tokens":5,"sampling_params":{"max_tokens":4}}"#, None),
        (Api::Chat, r#"{"min_tokens":5,"max_tokens":4}"#, Some(Reason::InvalidValue)),
        (Api::Chat, r#"{"min_tokens":5,"max_tokens":4,"max_completion_tokens":5}"#, None),
        (Api::Chat, r#"{"min_tokens":5,"max_tokens":9,"max_completion_tokens":null}"#, None),
        (Api::Chat, r#"{"min_tokens":5,"max_tokens":null}"#, None),
        (Api::Chat, r#"{"min_tokens":99999999999999999999999,"max_tokens":9}"#, Some(Reason::InvalidValue)),
        (Api::Messages, r#"{"max_tokens":2,"messages":[{"role":"assistant","content":[{"type":"tool_use","id":"t","name":"f"}]}]}"#, None),
        (Api::Messages, r#"{"max_tokens":2,"messages":[{"content":"tool_use"},{"role":"assistant","content":[{"type":"text"},{"type":"tool_use","name":"f"}]}]}"#, Some(Reason::ToolWithoutId)),
        (Api::Messages, r#"{"max_tokens":2,"messages":[{"role":"assistant","content":[{"id":"","type":"tool_use","name":"f"}]}]}"#, Some(Reason::ToolWithoutId)),
        (Api::Messages, r#"{"max_tokens":2,"messages":[{"role":"user","content":[{"type":"text","text":"\"tool_use\""}]}]}"#, None),
        (Api::Chat, r#"{"messages":[{"role":"assistant","content":[{"type":"tool_use","name":"f"}]}]}"#, None),
    ];

    #[test]
    fn a_request_that_the_legs_would_read_differently_is_not_split() {
        for (api, body, want) in READ_DIFFERENTLY {
            assert_eq!(decide(*api, body), *want, "{api:?} {body}");
        }
    }

    #[test]
    fn a_value_that_only_the_decoder_would_refuse_is_not_split() {
        use Api::{Chat, Completions, Generate, Messages, Responses};
        let invalid = Some(Reason::InvalidValue);
        for (api, body, want) in [
            (Chat, r#"{"max_tokens":2.5}"#, invalid),
            (Chat, r#"{"max_tokens":"5"}"#, invalid),
            (Chat, r#"{"max_tokens":[1]}"#, invalid),
            (Chat, r#"{"max_tokens":-3}"#, invalid),
            (Chat, r#"{"max_tokens":0}"#, invalid),
            (Chat, r#"{"max_tokens":0,"max_tokens":5}"#, None),
            (
                Chat,
                r#"{"max_tokens":null,"max_completion_tokens":7}"#,
                None,
            ),
            (Chat, r#"{"max_completion_tokens":true}"#, invalid),
            (Chat, r#"{"max_output_tokens":"x"}"#, None),
            (Responses, r#"{"max_output_tokens":"x"}"#, invalid),
            (Responses, r#"{"max_output_tokens":12}"#, None),
            (Completions, r#"{"min_tokens":"x"}"#, invalid),
            (Completions, r#"{"min_tokens":0}"#, None),
            (Chat, r#"{"stream":"maybe"}"#, invalid),
            (Chat, r#"{"stream":2}"#, invalid),
            (Chat, r#"{"stream":{}}"#, invalid),
            (Chat, r#"{"stream":"Yes"}"#, None),
            (Chat, r#"{"stream":1}"#, None),
            (Chat, r#"{"stream":null}"#, None),
            (
                Chat,
                r#"{"stream_options":{"include_usage":true}}"#,
                invalid,
            ),
            (Chat, r#"{"stream":false,"stream_options":{}}"#, invalid),
            (Chat, r#"{"stream":true,"stream_options":"x"}"#, invalid),
            (Chat, r#"{"stream_options":{},"stream":"on"}"#, None),
            (Chat, r#"{"stream_options":null}"#, None),
            (Messages, r#"{"max_tokens":1}"#, None),
            (Messages, "{}", invalid),
            (Messages, r#"{"max_tokens":null}"#, invalid),
            (Messages, r#"{"max_tokens":-1}"#, invalid),
            (
                Generate,
                r#"{"sampling_params":{"max_tokens":-3}}"#,
                invalid,
            ),
            (Generate, r#"{"sampling_params":null}"#, invalid),
            (Generate, r#"{"token_ids":[1]}"#, invalid),
            (
                Generate,
                r#"{"sampling_params":{"min_tokens":1.5}}"#,
                invalid,
            ),
            (
                Generate,
                r#"{"max_tokens":-3,"sampling_params":{"max_tokens":3}}"#,
                None,
            ),
            (
                Generate,
                r#"{"stream":"maybe","sampling_params":{}}"#,
                invalid,
            ),
        ] {
            assert_eq!(decide(api, body), want, "{api:?} {body}");
        }
    }

    #[test]
    fn the_way_of_the_transfer_decides_what_counts() {
        let thinking = r#"{"max_tokens":2000,"thinking":{"type":"enabled","budget_tokens":1000}}"#;
        for (transfer, api, body, want) in [
            (
                UNMARKED,
                Api::Messages,
                thinking,
                Some(Reason::ThinkingBudget),
            ),
            (
                Transfer::Store,
                Api::Messages,
                thinking,
                Some(Reason::ThinkingBudget),
            ),
            (Transfer::Room, Api::Messages, thinking, None),
            (Transfer::Store, Api::Chat, r#"{"n":2}"#, None),
            (Transfer::Store, Api::Chat, r#"{"prompt_logprobs":1}"#, None),
            (
                Transfer::Store,
                Api::Chat,
                r#"{"max_tokens":"x"}"#,
                Some(Reason::InvalidValue),
            ),
            (
                Transfer::Store,
                Api::Responses,
                r#"{"background":true}"#,
                Some(Reason::ResponseState),
            ),
            (Transfer::Room, Api::Chat, r#"{"max_tokens":"x"}"#, None),
            (
                Transfer::Room,
                Api::Unsplit,
                "{}",
                Some(Reason::UnknownShape),
            ),
            (
                Transfer::Room,
                Api::Chat,
                r#"{"n":2}"#,
                Some(Reason::SeveralChoices),
            ),
            (Transfer::Room, Api::Chat, r#"{"n":1}"#, None),
            (Transfer::Room, Api::Chat, r#"{"n":"1"}"#, None),
            (Transfer::Room, Api::Chat, r#"{"n":1.0}"#, None),
        ] {
            assert_eq!(decide_for(transfer, api, body), want, "{transfer:?} {body}");
        }
    }
}
