//! Generation features of the command: log-probabilities, tool calls, JSON, usage in a stream.

use serde_json::{Value, json};

use crate::client::post;
use crate::command::Mock;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// Returns a chat request with these members.
fn chat(members: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "hello there"}]});
    let all = body.as_object_mut().unwrap();
    all.extend(members.as_object().unwrap().clone());
    body
}

fn whole(mock: &Mock, path: &str, body: &Value) -> Value {
    let response = mock.post(path, body);
    assert_eq!(response.status, 200, "{response:?}");
    response.json()
}

/// Sends `body` with `stream` and `include_usage`, and returns the events.
fn stream(mock: &Mock, path: &str, body: &Value) -> Vec<Value> {
    let mut body = body.clone();
    body["stream"] = json!(true);
    if body["stream_options"].is_null() {
        body["stream_options"] = json!({"include_usage": true});
    }
    let response = mock.try_ask(&post(path, &body.to_string())).unwrap();
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(response.chunks.last().unwrap(), "data: [DONE]\n\n");
    response.events()
}

/// Concatenates the texts at `pointer` in the events.
fn text(events: &[Value], pointer: &str) -> String {
    let texts = events
        .iter()
        .filter_map(|event| event.pointer(pointer)?.as_str());
    texts.collect()
}

/// Returns the last finish reason in the events.
fn finish(events: &[Value]) -> Value {
    let reasons = events
        .iter()
        .filter_map(|event| event.pointer("/choices/0/finish_reason"));
    reasons.fold(Value::Null, |_, reason| reason.clone())
}

fn tools() -> Value {
    let parameters = json!({
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
            "unit": {"enum": ["C", "F"]},
        },
        "required": ["city", "days"],
    });
    json!([
        {"type": "function", "function": {"name": "time"}},
        {"type": "function", "function": {"name": "weather", "parameters": parameters}},
    ])
}

#[test]
fn completions_have_log_probabilities() {
    let mock = Mock::start(&[]);
    let body = json!({"prompt": "a b", "max_tokens": 12, "logprobs": 2});
    let choice = &whole(&mock, COMPLETIONS, &body)["choices"][0];
    let generated = choice["text"].as_str().unwrap();
    let logprobs = &choice["logprobs"];
    let tokens: Vec<&str> = logprobs["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .map(|token| token.as_str().unwrap())
        .collect();
    assert_eq!(tokens.concat(), generated);
    for (at, token) in tokens.iter().enumerate() {
        let offset = logprobs["text_offset"][at].as_u64().unwrap() as usize;
        assert!(generated[offset..].starts_with(token));
        let top = logprobs["top_logprobs"][at].as_object().unwrap();
        assert_eq!(
            (top.len(), &top[*token]),
            (2, &logprobs["token_logprobs"][at])
        );
    }
    let events = stream(&mock, COMPLETIONS, &body);
    assert_eq!(text(&events, "/choices/0/text"), generated);
    for (at, event) in events.iter().take(12).enumerate() {
        for name in ["tokens", "token_logprobs", "text_offset", "top_logprobs"] {
            let one = &event["choices"][0]["logprobs"][name][0];
            assert_eq!(one, &logprobs[name][at], "{name} {at}");
        }
    }
    let many = json!({"prompt": "a", "logprobs": 21});
    assert_eq!(mock.post(COMPLETIONS, &many).status, 400);
    let huge = json!({"prompt": "a", "max_tokens": 100_000, "ignore_eos": true, "logprobs": 20});
    assert_eq!(mock.post(COMPLETIONS, &huge).status, 400);
}

#[test]
fn chat_completions_have_log_probabilities() {
    let mock = Mock::start(&[]);
    let body = chat(&json!({"max_tokens": 3, "logprobs": true, "top_logprobs": 2}));
    let choice = &whole(&mock, CHAT, &body)["choices"][0];
    let content = choice["logprobs"]["content"].as_array().unwrap();
    let generated: String = content
        .iter()
        .map(|one| one["token"].as_str().unwrap())
        .collect();
    assert_eq!(choice["message"]["content"], generated);
    for one in content {
        assert_eq!(one["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(one["top_logprobs"][0]["token"], one["token"]);
        assert_eq!(
            one["bytes"],
            json!(one["token"].as_str().unwrap().as_bytes())
        );
    }
    let events = stream(&mock, CHAT, &body);
    for (event, one) in events[1..4].iter().zip(content) {
        assert_eq!(&event["choices"][0]["logprobs"]["content"][0], one);
    }
    let plain = whole(&mock, CHAT, &chat(&json!({"max_tokens": 1})));
    assert_eq!(plain["choices"][0]["logprobs"], Value::Null);
    let alone = chat(&json!({"top_logprobs": 2}));
    assert_eq!(mock.post(CHAT, &alone).status, 400);
}

#[test]
fn a_required_tool_is_called() {
    let mock = Mock::start(&[]);
    let named = json!({"type": "function", "function": {"name": "weather"}});
    for (choice, name, reason) in [
        (json!("required"), "time", "tool_calls"),
        (named, "weather", "stop"),
    ] {
        let body = chat(&json!({"tools": tools(), "tool_choice": choice}));
        let whole = whole(&mock, CHAT, &body);
        let of_choice = &whole["choices"][0];
        assert_eq!(of_choice["finish_reason"], reason);
        assert_eq!(of_choice["message"]["content"], "");
        let call = &of_choice["message"]["tool_calls"][0];
        assert_eq!(
            (&call["type"], &call["function"]["name"]),
            (&json!("function"), &json!(name))
        );
        let arguments = call["function"]["arguments"].as_str().unwrap();
        let value: Value = serde_json::from_str(arguments).unwrap();
        if name == "weather" {
            assert!(value["city"].is_string() && value["days"] == 1 && value["unit"] == "C");
        }
        let tokens = arguments.split_whitespace().count();
        assert_eq!(whole["usage"]["completion_tokens"], tokens);

        let events = stream(&mock, CHAT, &body);
        let delta = "/choices/0/delta/tool_calls/0";
        assert_eq!(text(&events, &format!("{delta}/function/name")), name);
        assert_eq!(
            text(&events, &format!("{delta}/function/arguments")),
            arguments
        );
        let ids = text(&events, &format!("{delta}/id"));
        assert!(ids.starts_with("chatcmpl-tool-"), "{ids}");
        assert_eq!(finish(&events), reason);
        assert_eq!(events.last().unwrap()["usage"]["completion_tokens"], tokens);
    }
    let body = chat(&json!({"tools": tools(), "tool_choice": "auto", "max_tokens": 2}));
    let auto = whole(&mock, CHAT, &body);
    assert_eq!(auto["choices"][0]["message"]["tool_calls"], json!([]));
    let unknown = json!({"type": "function", "function": {"name": "x"}});
    let body = chat(&json!({"tools": tools(), "tool_choice": unknown}));
    assert_eq!(mock.post(CHAT, &body).status, 400);
}

#[test]
fn json_mode_produces_json() {
    let mock = Mock::start(&[]);
    let schema = json!({
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
    });
    let schema = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    for format in [json!({"type": "json_object"}), schema] {
        let body = chat(&json!({"response_format": format}));
        let whole = whole(&mock, CHAT, &body);
        let content = whole["choices"][0]["message"]["content"].as_str().unwrap();
        let value: Value = serde_json::from_str(content).unwrap();
        assert!(value.is_object());
        if format["type"] == "json_schema" {
            assert!(
                value["name"].is_string() && value["age"].is_i64(),
                "{value}"
            );
        }
        assert_eq!(whole["choices"][0]["finish_reason"], "stop");
        let tokens = content.split_whitespace().count();
        assert_eq!(whole["usage"]["completion_tokens"], tokens);
        let events = stream(&mock, CHAT, &body);
        assert_eq!(text(&events, "/choices/0/delta/content"), content);
        let short = chat(&json!({"response_format": format, "max_tokens": 1}));
        let short = &mock.post(CHAT, &short).json()["choices"][0];
        assert_eq!(short["finish_reason"], "length");
    }
    let body = json!({"prompt": "a", "response_format": {"type": "json_object"}});
    let completion = whole(&mock, COMPLETIONS, &body);
    let content = completion["choices"][0]["text"].as_str().unwrap();
    assert!(serde_json::from_str::<Value>(content).unwrap().is_object());
    let body = chat(&json!({"response_format": {"type": "x"}}));
    assert_eq!(mock.post(CHAT, &body).status, 400);
}

#[test]
fn json_texts_are_bounded() {
    let mock = Mock::start(&[]);
    let object = json!({"type": "json_object"});
    let body = chat(&json!({
        "response_format": object, "max_tokens": u32::MAX, "ignore_eos": true,
    }));
    let tokens = whole(&mock, CHAT, &body)["usage"]["completion_tokens"].clone();
    assert_eq!(tokens, 65_537);
    let schema = json!({"const": "x".repeat(60_000)});
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    let body = chat(&json!({"response_format": format, "n": 10_000}));
    assert_eq!(mock.post(CHAT, &body).status, 400);
}

#[test]
fn usage_is_in_every_event_on_request() {
    let mock = Mock::start(&[]);
    let both = json!({"include_usage": true, "continuous_usage_stats": true});
    let body = chat(&json!({"max_tokens": 3, "n": 2, "stream_options": both}));
    let events = stream(&mock, CHAT, &body);
    let counts: Vec<u64> = events
        .iter()
        .map(|event| event["usage"]["completion_tokens"].as_u64().unwrap())
        .collect();
    // Those of the event's choice, then the total.
    assert_eq!(counts, [0, 0, 1, 1, 2, 2, 3, 3, 6]);
    assert_eq!(events.last().unwrap()["choices"], json!([]));
    let alone = json!({"continuous_usage_stats": true});
    let body = chat(&json!({"max_tokens": 3, "stream_options": alone}));
    let events = stream(&mock, CHAT, &body);
    assert!(events.iter().all(|event| event.get("usage").is_none()));
}
