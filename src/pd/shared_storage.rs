//! KV cache by way of a store that both engines use: `--kv-connector shared-storage` (reference
//! 6.2) and, as the first llm-d sidecar did it, `lmcache` (6.10).
//!
//! The store is keyed by content, so the legs carry no handoff: the prefiller computes the prompt
//! and one token, then the decoder finds the prompt in the store. A request with a
//! `cache_hit_threshold` of its own goes to the decoder first, which answers with the finish reason
//! `cache_threshold` when too little of the prompt is there.

use super::plan::{Leg, Role, Take};
use super::request::{Caps, PdRequest};
use crate::json::{EditError, Kind, Level, elements, member, string_is};

/// Whether the client asks for the decoder to be tried first.
#[must_use]
pub fn asks_decode_first(request: &PdRequest<'_>) -> bool {
    // After an encoder stage the threshold is no longer the client's.
    let threshold = request.document.last(Level::Top, "cache_hit_threshold");
    request.encoded.is_none() && threshold.is_some_and(|member| member.kind != Kind::Null)
}

/// The prefill leg. Its answer may stream, as the client asked; nothing of it is needed.
///
/// # Errors
/// When the body needs more edits than allowed.
pub fn prefill_leg(request: &PdRequest<'_>) -> Result<Leg, EditError> {
    let mut edits = request.edits();
    edits.cap(request, Caps::Maxima);
    edits.set(Level::Top, "cache_hit_threshold", b"0");
    request.leg(Role::Prefill, &edits, Take::Nothing)
}

/// The decode leg after it.
///
/// # Errors
/// When the body needs more edits than allowed.
pub fn decode_leg(request: &PdRequest<'_>) -> Result<Leg, EditError> {
    let mut edits = request.edits();
    edits.set(Level::Top, "cache_hit_threshold", b"0");
    request.leg(Role::Decode, &edits, Take::Response(None))
}

/// `LMCache`'s prefill leg.
///
/// # Errors
/// When the body needs more edits than allowed.
pub fn lmcache_prefill_leg(request: &PdRequest<'_>) -> Result<Leg, EditError> {
    let mut edits = request.edits();
    edits.cap(request, Caps::Maxima);
    request.leg(Role::Prefill, &edits, Take::Nothing)
}

/// What the decoder's own try came to, as far as its answer has been read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Not to be told yet.
    Open,
    /// It computes the answer: what has been held back may go out.
    Served,
    /// Too little was in the store: a prefiller is needed.
    BelowThreshold,
}

/// Reads the beginning of an answer that streams: `bytes` from its first one on.
///
/// The decoder says `cache_threshold` before any token, in the first event or, of a chat, in the
/// one behind the event with the role. So a token, another finish reason or a second event
/// without either tells that it serves.
#[must_use]
pub fn verdict_of_stream(bytes: &[u8]) -> Verdict {
    let mut events = 0;
    let mut rest = bytes;
    while let Some(end) = memchr::memchr(b'\n', rest) {
        let line = rest[..end].trim_ascii();
        rest = &rest[end + 1..];
        let Some(data) = line.strip_prefix(b"data:") else {
            continue;
        };
        match verdict_of_event(data.trim_ascii()) {
            Verdict::Open => {}
            known => return known,
        }
        events += 1;
        if events == 2 {
            return Verdict::Served;
        }
    }
    Verdict::Open
}

/// Reads one event, or an answer that is whole.
fn verdict_of_event(event: &[u8]) -> Verdict {
    let choices = member(event, "choices").unwrap_or_default();
    let Some(choice) = elements(choices).next() else {
        // `[DONE]`, an error, an event of another API: no threshold was met.
        return Verdict::Served;
    };
    let is_set = |value: Option<&[u8]>| {
        value.is_some_and(|value| !matches!(value, b"null" | b"\"\"" | b"[]"))
    };
    match member(choice.value, "finish_reason") {
        Some(reason) if string_is(reason, "cache_threshold") => return Verdict::BelowThreshold,
        reason if is_set(reason) => return Verdict::Served,
        _ => {}
    }
    let delta = member(choice.value, "delta").unwrap_or(choice.value);
    let has_token = [
        "content",
        "text",
        "reasoning_content",
        "reasoning",
        "tool_calls",
        "token_ids",
    ]
    .iter()
    .any(|name| is_set(member(delta, name)) || is_set(member(choice.value, name)));
    if has_token {
        Verdict::Served
    } else {
        Verdict::Open
    }
}

/// Reads a whole answer.
#[must_use]
pub fn verdict_of_whole(response: &[u8]) -> Verdict {
    match verdict_of_event(response) {
        Verdict::BelowThreshold => Verdict::BelowThreshold,
        Verdict::Open | Verdict::Served => Verdict::Served,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pd::testing::{Subject, apply};
    use crate::pd::{Api, Encoded};
    use serde_json::{Value, json};

    #[test]
    fn n8_prefill_is_capped_and_decode_is_not() {
        let cases = [
            (
                Api::Chat,
                r#"{"messages":[],"max_completion_tokens":100,"stream":true}"#,
                json!({"messages": [], "max_completion_tokens": 1, "max_tokens": 1,
                    "stream": true, "cache_hit_threshold": 0}),
            ),
            (
                Api::Chat,
                r#"{"messages":[],"min_tokens":5}"#,
                json!({"messages": [], "max_completion_tokens": 1, "max_tokens": 1,
                    "min_tokens": 1, "cache_hit_threshold": 0}),
            ),
            (
                Api::Responses,
                r#"{"input":"x"}"#,
                json!({"input": "x", "max_output_tokens": 1, "cache_hit_threshold": 0}),
            ),
            (
                Api::Generate,
                r#"{"token_ids":[1],"sampling_params":{"max_tokens":9,"min_tokens":2}}"#,
                json!({"token_ids": [1], "sampling_params": {"max_tokens": 1, "min_tokens": 1},
                    "cache_hit_threshold": 0}),
            ),
            (
                Api::Generate,
                r#"{"token_ids":[1]}"#,
                json!({"token_ids": [1], "sampling_params": {"max_tokens": 1},
                    "cache_hit_threshold": 0}),
            ),
        ];
        for (api, body, want) in cases {
            let subject = Subject::new(api, body);
            let prefill = prefill_leg(&subject.request()).unwrap();
            assert_eq!(apply(&prefill, body), want, "{body}");
            let mut want: Value = serde_json::from_str(body).unwrap();
            let local = lmcache_prefill_leg(&subject.request()).unwrap();
            assert_eq!(apply(&local, body).get("cache_hit_threshold"), None);
            want["cache_hit_threshold"] = json!(0);
            let decode = decode_leg(&subject.request()).unwrap();
            assert_eq!(apply(&decode, body), want);
        }
    }

    #[test]
    fn the_decoder_goes_first_where_the_client_says_so() {
        let asks = |body: &str, encoded: Option<Encoded>| {
            let mut subject = Subject::new(Api::Chat, body);
            subject.encoded = encoded;
            asks_decode_first(&subject.request())
        };
        assert!(asks(r#"{"cache_hit_threshold":0.8}"#, None));
        assert!(!asks(r#"{"cache_hit_threshold":null}"#, None));
        assert!(!asks("{}", None));
        let encoded = Some(Encoded::default());
        assert!(!asks(r#"{"cache_hit_threshold":0.8}"#, encoded));
    }

    #[test]
    fn the_verdict_falls_as_soon_as_it_can() {
        let role = r#"data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;
        let token =
            r#"data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}"#;
        let met = r#"data: {"choices":[{"index":0,"delta":{},"finish_reason":"cache_threshold"}]}"#;
        let text = r#"data: {"choices":[{"text":"a","finish_reason":null}]}"#;
        let text_met = r#"data: {"choices":[{"text":"","finish_reason":"cache_thresho\u006cd"}]}"#;
        let stop = r#"data: {"choices":[{"text":"","finish_reason":"stop"}]}"#;
        let ids = r#"data: {"choices":[{"token_ids":[7],"finish_reason":null}]}"#;
        let cases: [(&[&str], Verdict); 12] = [
            (&[], Verdict::Open),
            (&[role], Verdict::Open),
            (&[role, ""], Verdict::Open),
            (&[role, "", token], Verdict::Served),
            (&[role, "", met], Verdict::BelowThreshold),
            (&[role, "", role], Verdict::Served),
            (&[": keep-alive", "", role], Verdict::Open),
            (&[text], Verdict::Served),
            (&[text_met], Verdict::BelowThreshold),
            (&[stop], Verdict::Served),
            (&[ids], Verdict::Served),
            (&["data: [DONE]"], Verdict::Served),
        ];
        for (lines, want) in cases {
            let mut stream: String = lines.iter().map(|line| format!("{line}\n")).collect();
            assert_eq!(verdict_of_stream(stream.as_bytes()), want, "{stream}");
            stream.push_str("data: {\"choi");
            assert_eq!(verdict_of_stream(stream.as_bytes()), want, "{stream}");
        }
    }

    #[test]
    fn a_whole_response_is_served_unless_it_says_otherwise() {
        let response = |reason: &str| format!(r#"{{"choices":[{{"finish_reason":{reason}}}]}}"#);
        let verdict = |reason| verdict_of_whole(response(reason).as_bytes());
        assert_eq!(verdict("\"cache_threshold\""), Verdict::BelowThreshold);
        assert_eq!(verdict("\"length\""), Verdict::Served);
        assert_eq!(verdict("null"), Verdict::Served);
        assert_eq!(verdict_of_whole(b"no json"), Verdict::Served);
    }
}
