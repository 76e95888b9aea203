//! The APIs other than generation, as the command serves them by default.

use serde_json::{Value, json};

use crate::client::post;
use crate::command::Mock;

/// Sends `body` to `path` and returns the JSON of the response, which must be a 200.
fn ask(mock: &Mock, path: &str, body: &Value) -> Value {
    let response = mock.post(path, body);
    assert_eq!(response.status, 200, "{path} {body}: {response:?}");
    response.json()
}

#[test]
fn tokens_are_words_for_every_api() {
    let mock = Mock::start(&[]);
    let text = "one two  three\nfour ";
    let tokens = ask(&mock, "/tokenize", &json!({"prompt": text}));
    assert_eq!(tokens["count"], 4);
    assert_eq!(tokens["tokens"].as_array().unwrap().len(), 4);
    assert_eq!(tokens["max_model_len"], 131_072);
    assert_eq!(tokens["token_strs"], Value::Null);
    let back = ask(&mock, "/detokenize", &json!({"tokens": tokens["tokens"]}));
    assert_eq!(back, json!({"prompt": text}));
    let named = json!({"prompt": text, "return_token_strs": true});
    let named = ask(&mock, "/tokenize", &named);
    assert_eq!(
        named["token_strs"],
        json!(["one ", "two  ", "three\n", "four "])
    );
    // The same count in the usage of a completion, and for its text.
    let whole = ask(
        &mock,
        "/v1/completions",
        &json!({"prompt": text, "max_tokens": 9}),
    );
    assert_eq!(whole["usage"]["prompt_tokens"], 4);
    assert_eq!(whole["usage"]["completion_tokens"], 9);
    let generated = whole["choices"][0]["text"].as_str().unwrap();
    assert_eq!(generated.split_whitespace().count(), 9);
    let again = ask(&mock, "/tokenize", &json!({"prompt": generated}));
    assert_eq!(again["count"], 9);
    // The mock has no prefix cache.
    let details = &whole["usage"]["prompt_tokens_details"];
    assert_eq!(details["cached_tokens"], 0);

    let messages = json!([
        {"role": "user", "content": "one two"},
        {"role": "user", "content": [{"type": "text", "text": "three"}]},
    ]);
    let chat = json!({"messages": messages, "max_tokens": 1});
    assert_eq!(ask(&mock, "/tokenize", &chat)["count"], 3);
    let whole = ask(&mock, "/v1/chat/completions", &chat);
    assert_eq!(whole["usage"]["prompt_tokens"], 3);
    let counted = json!({"model": "mock-model", "system": "four five", "messages": messages});
    assert_eq!(
        ask(&mock, "/v1/messages/count_tokens", &counted),
        json!({"input_tokens": 5, "context_management": {"original_input_tokens": 5}})
    );
}

#[test]
fn embeddings_are_unit_vectors_that_follow_from_the_text() {
    let mock = Mock::start(&[]);
    let body = json!({"model": "mock-model", "input": ["a b", "c", "a b"]});
    let list = ask(&mock, "/v1/embeddings", &body);
    assert_eq!(list["object"], "list");
    assert_eq!(list["usage"]["prompt_tokens"], 5);
    let vector = |index: usize| -> Vec<f64> {
        assert_eq!(list["data"][index]["index"], index);
        serde_json::from_value(list["data"][index]["embedding"].clone()).unwrap()
    };
    assert_eq!(vector(0).len(), 64);
    let length: f64 = vector(0).iter().map(|value| value * value).sum();
    assert!((length - 1.0).abs() < 1e-5, "{length}");
    assert_eq!(vector(0), vector(2));
    assert_ne!(vector(0), vector(1));
    let body = json!({"input": "a", "dimensions": 3, "encoding_format": "base64"});
    let list = ask(&mock, "/v1/embeddings", &body);
    assert_eq!(list["data"][0]["embedding"].as_str().unwrap().len(), 16);
}

#[test]
fn scores_follow_from_the_shared_words() {
    let mock = Mock::start(&[]);
    let body = json!({"text_1": "red green", "text_2": ["blue", "red green", "red"]});
    let scores = ask(&mock, "/v1/score", &body);
    let score = |index: usize| scores["data"][index]["score"].as_f64().unwrap();
    assert!(score(0) < score(2) && score(2) < score(1));
    assert_eq!(scores["usage"]["total_tokens"], 6);
    let body = json!({"query": "red green", "documents": ["blue", "red green", "red"], "top_n": 2});
    let ranked = ask(&mock, "/v2/rerank", &body);
    let order: Vec<&Value> = ranked["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|result| &result["index"])
        .collect();
    assert_eq!(order, [&json!(1), &json!(2)]);
    assert_eq!(
        ranked["results"][0]["document"],
        json!({"text": "red green", "multi_modal": null})
    );
}

/// Sends `body` to `path`, and checks the status and a part of the message.
fn refused(mock: &Mock, path: &str, body: &Value, status: u16, part: &str) {
    let response = mock.post(path, body);
    assert_eq!(response.status, status, "{path} {response:?}");
    let message = response.json()["error"]["message"].to_string();
    assert!(message.contains(part), "{path}: {message}");
}

#[test]
fn invalid_token_requests_are_refused() {
    let mock = Mock::start(&[]);
    let count = "/v1/messages/count_tokens";
    refused(&mock, "/tokenize", &json!({}), 400, "Field required");
    let other = json!({"model": "x", "prompt": "a"});
    refused(&mock, "/tokenize", &other, 404, "Valid aliases");
    for tokens in [json!(["a"]), json!([-1]), json!("a")] {
        refused(
            &mock,
            "/detokenize",
            &json!({"tokens": tokens}),
            400,
            "valid list",
        );
    }
    refused(
        &mock,
        count,
        &json!({"messages": []}),
        400,
        "Field required",
    );
    let large = format!("{{\"prompt\":\"{}\"}}", "x".repeat(16 << 20));
    assert_eq!(
        mock.try_ask(&post("/tokenize", &large)).unwrap().status,
        413
    );
    assert_eq!(mock.get("/tokenize").header("allow"), Some("POST"));
}

#[test]
fn invalid_pooling_requests_are_refused() {
    let mock = Mock::start(&[]);
    for (body, status, part) in [
        (json!({}), 400, "Field required"),
        (json!({"input": []}), 400, "at least one prompt"),
        (json!({"input": ""}), 400, "cannot be empty"),
        (
            json!({"input": "a", "dimensions": 0}),
            400,
            "from 1 to 4096",
        ),
        (json!({"input": "a", "encoding_format": "x"}), 400, "base64"),
        (json!({"input": vec!["a"; 2_049]}), 400, "more than 2048"),
        (json!({"input": "a ".repeat(600_000)}), 400, "600000 tokens"),
        (json!({"model": "x", "input": "a"}), 404, "does not exist."),
    ] {
        refused(&mock, "/v1/embeddings", &body, status, part);
    }
    let pairs = json!({"text_1": ["a", "b"], "text_2": vec!["c"; 3]});
    refused(&mock, "/score", &pairs, 400, "1:1, 1:N or N:N");
    let none = json!({"query": "a", "documents": []});
    refused(&mock, "/rerank", &none, 400, "At least one");
    refused(
        &mock,
        "/rerank",
        &json!({"query": "a"}),
        400,
        "Field required",
    );
}
