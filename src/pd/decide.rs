//! Decides whether a request can be split between a prefiller and the decoder at all.
//!
//! One handoff describes the KV cache of one sequence and can be read once. A request that produces
//! several sequences, or that makes the engine ignore cached KV, is therefore served by the decoder
//! alone (`docs/engines.md#requests-that-stay-with-the-decoder`).

use super::outcome::Reason;
use crate::api::Api;
use crate::json::{Document, Kind, Level, Member};

/// Returns the reason why the request must not be split by a connector that passes the KV cache of
/// one sequence only, or `None` if it can be split.
#[must_use]
pub fn keep_local(api: Api, document: &Document, body: &[u8]) -> Option<Reason> {
    let above_one = |level, name| {
        document
            .last(level, name)
            .is_some_and(|member| !is_one_or_unset(member, body))
    };
    let level = match api {
        Api::Generate => Level::SamplingParams,
        Api::Chat
        | Api::Completions
        | Api::Messages
        | Api::Responses
        | Api::Invocations
        | Api::Unsplit => Level::Top,
    };
    if above_one(level, "n") {
        return Some(Reason::SeveralChoices);
    }
    if above_one(level, "best_of") {
        return Some(Reason::BestOf);
    }
    if is_set(document, level, "prompt_logprobs") || echoes_logprobs(api, document) {
        return Some(Reason::PromptLogprobs);
    }
    match api {
        Api::Completions if has_several_prompts(document, body) => Some(Reason::SeveralPrompts),
        Api::Invocations => keep_invocation_local(document, body),
        Api::Unsplit => Some(Reason::UnknownShape),
        Api::Chat | Api::Completions | Api::Messages | Api::Responses | Api::Generate => None,
    }
}

/// Returns the reason why the request must not be split by a connector that supports any number of
/// sequences, or `None` if it can be split. The only reason is a body of a shape that legs cannot
/// be made of.
#[must_use]
pub fn keep_shape_local(api: Api, document: &Document) -> Option<Reason> {
    let has_prompt =
        || is_set(document, Level::Top, "messages") || is_set(document, Level::Top, "prompt");
    match api {
        Api::Unsplit => Some(Reason::UnknownShape),
        Api::Invocations if !has_prompt() => Some(Reason::UnknownShape),
        Api::Chat
        | Api::Completions
        | Api::Messages
        | Api::Responses
        | Api::Generate
        | Api::Invocations => None,
    }
}

/// Returns the reason why the body of a request to `/invocations` rules out splitting it, or `None`
/// if it does not. The engine dispatches such a request by the shape of its body. It can be split
/// if it is a chat completion, or a completion with a single prompt.
fn keep_invocation_local(document: &Document, body: &[u8]) -> Option<Reason> {
    if is_set(document, Level::Top, "messages") {
        None
    } else if !is_set(document, Level::Top, "prompt") {
        Some(Reason::UnknownShape)
    } else if has_several_prompts(document, body) {
        Some(Reason::SeveralPrompts)
    } else {
        None
    }
}

/// Returns whether the request is a completion that echoes its prompt with log-probabilities. The
/// response then includes the log-probabilities of the prompt.
fn echoes_logprobs(api: Api, document: &Document) -> bool {
    let echo = document.last(Level::Top, "echo");
    matches!(api, Api::Completions | Api::Invocations)
        && echo.is_some_and(|echo| !matches!(echo.kind, Kind::Null | Kind::False))
        && is_set(document, Level::Top, "logprobs")
}

fn is_set(document: &Document, level: Level, name: &str) -> bool {
    document
        .last(level, name)
        .is_some_and(|member| member.kind != Kind::Null)
}

/// Returns whether a count (`n` or `best_of`) is `null`, 0 or 1. Any other value counts as more
/// than one: an invalid one (a string, a fraction) goes to the decoder alone, which refuses it.
fn is_one_or_unset(member: &Member, body: &[u8]) -> bool {
    match member.kind {
        Kind::Null => true,
        Kind::Number => matches!(member.value.of(body), b"0" | b"1"),
        Kind::Object | Kind::Array | Kind::String | Kind::True | Kind::False => false,
    }
}

fn has_several_prompts(document: &Document, body: &[u8]) -> bool {
    match document.last(Level::Top, "prompt") {
        Some(member) if member.kind == Kind::Array => is_list_of_several(member.value.of(body)),
        Some(_) | None => false,
    }
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

    fn decide(api: Api, body: &str) -> Option<Reason> {
        let mut scanner = Scanner::new(WATCH);
        scanner.feed(body.as_bytes()).unwrap();
        keep_local(api, &scanner.finish().unwrap(), body.as_bytes())
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
        (Api::Chat, r#"{"echo":true,"logprobs":true}"#, None),
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
}
