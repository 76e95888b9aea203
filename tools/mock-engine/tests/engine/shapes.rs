//! The format of each API's responses.

use std::time::{Duration, Instant};

use mock_engine::{Engine, EngineConfig, UsageShape, expected_text, expected_token_ids};
use serde_json::{Value, json};

use crate::client::{Client, ask, post, sha256};

const MESSAGES: &str = r#"[ {"role":"user", "content":"h\u00e9"} ]"#;

fn engine() -> Engine {
    Engine::start(EngineConfig::default(), 0).unwrap()
}

#[test]
fn chat_whole() {
    let engine = engine();
    let body = format!(r#"{{"messages":{MESSAGES},"max_completion_tokens":3,"max_tokens":9}}"#);
    let response = ask(&engine, &post("/v1/chat/completions", &body));
    let json = response.json();
    let sha = sha256(MESSAGES.as_bytes());
    assert_eq!(json["object"], "chat.completion");
    assert_eq!(
        json["choices"][0]["message"]["content"],
        expected_text(&sha, 3)
    );
    assert_eq!(json["choices"][0]["finish_reason"], "length");
    assert_eq!(json["usage"]["completion_tokens"], 3);
    assert_eq!(json["usage"]["prompt_tokens_details"]["cached_tokens"], 49);
    let seen = &engine.requests()[0];
    assert_eq!(seen.prompt_sha256.as_deref(), Some(sha.as_str()));
    assert_eq!(seen.body, body.as_bytes());
    assert_eq!(seen.json.as_ref().unwrap()["max_tokens"], 9);
    assert_eq!(
        seen.header_names_lower(),
        ["host", "content-type", "content-length"]
    );
}

#[test]
fn chat_stream() {
    let engine = engine();
    let body = format!(
        r#"{{"messages":{MESSAGES},"max_tokens":3,"stream":true,
            "stream_options":{{"include_usage":true}}}}"#
    );
    let response = ask(&engine, &post("/v1/chat/completions", &body));
    assert_eq!(
        response.header("content-type"),
        Some("text/event-stream; charset=utf-8")
    );
    assert_eq!(response.chunks.len(), 6);
    assert_eq!(response.chunks.last().unwrap(), "data: [DONE]\n\n");
    let events = response.events();
    assert_eq!(
        events[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    let text: String = events[1..4]
        .iter()
        .map(|event| event["choices"][0]["delta"]["content"].as_str().unwrap())
        .collect();
    assert_eq!(text, expected_text(&sha256(MESSAGES.as_bytes()), 3));
    assert_eq!(events[3]["choices"][0]["finish_reason"], "length");
    assert_eq!(events[4]["choices"], json!([]));
    assert_eq!(events[4]["usage"]["completion_tokens"], 3);
}

#[test]
fn completions() {
    let engine = engine();
    let whole = ask(&engine, &post("/v1/completions", r#"{"prompt":"a"}"#)).json();
    let sha = sha256(b"\"a\"");
    assert_eq!(whole["choices"][0]["text"], expected_text(&sha, 16));
    let body = r#"{"prompt":"a","n":2,"max_tokens":2,"stream":true}"#;
    let events = ask(&engine, &post("/invocations", body)).events();
    let index: Vec<_> = events
        .iter()
        .map(|e| e["choices"][0]["index"].clone())
        .collect();
    assert_eq!(index, [0, 1, 0, 1]);
    assert_eq!(
        events[2]["choices"][0]["text"],
        format!("t1-{} ", &sha[..8])
    );
}

#[test]
fn responses() {
    let engine = engine();
    let body = r#"{"input":"a","max_output_tokens":2}"#;
    let whole = ask(&engine, &post("/v1/responses", body)).json();
    let text = expected_text(&sha256(b"\"a\""), 2);
    assert_eq!(whole["output"][0]["content"][0]["text"], text);
    assert_eq!(whole["status"], "incomplete");
    assert_eq!(whole["usage"]["input_tokens_details"]["cached_tokens"], 49);
    let response = ask(
        &engine,
        &post("/v1/responses", r#"{"input":"a","stream":true}"#),
    );
    assert!(
        response
            .chunks
            .iter()
            .all(|chunk| chunk.starts_with("event: response."))
    );
    let events = response.events();
    assert_eq!(events[0]["type"], "response.created");
    for (at, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], at);
    }
    let last = events.last().unwrap();
    assert_eq!(last["type"], "response.completed");
    assert_eq!(last["response"]["status"], "completed");
    assert_eq!(last["response"]["usage"]["output_tokens"], 32);
}

#[test]
fn messages() {
    let engine = engine();
    let body = r#"{"messages":[1],"max_tokens":2}"#;
    let whole = ask(&engine, &post("/v1/messages", body)).json();
    assert_eq!(whole["stop_reason"], "max_tokens");
    assert_eq!(whole["usage"]["output_tokens"], 2);
    let body = r#"{"messages":[1],"max_tokens":2,"stream":true}"#;
    let events = ask(&engine, &post("/v1/messages", body)).events();
    let types: Vec<_> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    assert_eq!(
        types,
        [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop"
        ]
    );
}

#[test]
fn generate() {
    let engine = engine();
    let body = r#"{"token_ids":[5,6,7],"sampling_params":{"max_tokens":3}}"#;
    let request =
        post("/inference/v1/generate", body).replace("host: e", "host: e\r\nX-Request-Id: q");
    let whole = ask(&engine, &request).json();
    let ids = expected_token_ids(&sha256(b"[5,6,7]"), 3);
    assert_eq!(whole["request_id"], "generate-tokens-q");
    assert_eq!(whole["choices"][0]["token_ids"], json!(ids));
    assert_eq!(whole["usage"]["prompt_tokens"], 3);
    let body = body.replace("{\"token_ids", "{\"stream\":true,\"token_ids");
    let response = ask(&engine, &post("/inference/v1/generate", &body));
    let got: Vec<Value> = response
        .events()
        .iter()
        .map(|event| event["choices"][0]["token_ids"][0].clone())
        .collect();
    assert_eq!(got, ids);
    assert_eq!(response.chunks.last().unwrap(), "data: [DONE]\n\n");
}

#[test]
fn usage_takes_each_shape() {
    for (usage, want) in [
        (UsageShape::EmptyDetails, Some(json!({}))),
        (UsageShape::NullDetails, Some(Value::Null)),
        (UsageShape::WithoutDetails, None),
    ] {
        let config = EngineConfig {
            usage,
            ..EngineConfig::default()
        };
        let engine = Engine::start(config, 0).unwrap();
        let json = ask(&engine, &post("/v1/completions", r#"{"prompt":"a"}"#)).json();
        assert_eq!(
            json["usage"].get("prompt_tokens_details"),
            want.as_ref(),
            "{usage:?}"
        );
    }
}

#[test]
fn refusals_have_vllms_error_format() {
    let engine = engine();
    let chat = "/v1/chat/completions";
    let ranked = post(chat, r#"{"messages":[]}"#).replace("host: e", "x-data-parallel-rank: 7");
    let plain = post(chat, r#"{"messages":[]}"#).replace("application/json", "text/plain");
    for (request, param) in [
        (post(chat, "{"), "body"),
        (post(chat, "{}"), "messages"),
        (
            post(chat, r#"{"messages":[],"stream_options":{}}"#),
            "stream_options",
        ),
        (ranked, "data_parallel_rank"),
        (plain, "content-type"),
    ] {
        let response = ask(&engine, &request);
        assert_eq!(response.status, 400, "{param}");
        let error = &response.json()["error"];
        assert_eq!(
            (&error["param"], &error["code"]),
            (&json!(param), &json!(400))
        );
    }
}

#[test]
fn pages() {
    let engine = engine();
    let get = |path: &str| ask(&engine, &format!("GET {path} HTTP/1.1\r\nhost: e\r\n\r\n"));
    assert_eq!((get("/health").status, get("/health").body.len()), (200, 0));
    engine.set_health(503);
    assert_eq!(get("/health").status, 503);
    assert_eq!(get("/v1/models").json()["data"][0]["id"], "mock-model");
    let metrics = String::from_utf8(get("/metrics").body).unwrap();
    assert!(
        metrics.contains("vllm:num_requests_running{engine=\"0\",model_name=\"mock-model\"} 0.0")
    );
    let echo = get("/v1/embeddings?x=1").json();
    assert_eq!(echo["path"], "/v1/embeddings");
    assert_eq!(echo["body_sha256"], sha256(b""));
    let dump = get("/mock/requests").json();
    assert_eq!(dump["requests"][0]["target"], "/health");
    let mut client = Client::new(&engine);
    client.send("HEAD /x HTTP/1.1\r\n\r\nHEAD /health HTTP/1.1\r\n\r\n");
    assert!(client.head().unwrap().starts_with("HTTP/1.1 200"));
    assert!(client.head().unwrap().starts_with("HTTP/1.1 405"));
}

#[test]
fn tokens_are_paced() {
    let config = EngineConfig {
        ttft: Duration::from_millis(30),
        itl: Duration::from_millis(10),
        ..EngineConfig::default()
    };
    let engine = Engine::start(config, 0).unwrap();
    for stream in ["true", "false"] {
        let start = Instant::now();
        let body = format!(r#"{{"prompt":"a","max_tokens":4,"stream":{stream}}}"#);
        ask(&engine, &post("/v1/completions", &body));
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(60), "{took:?}");
    }
}
