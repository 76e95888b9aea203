//! The contracts of the connectors other than NIXL version 2: accepted requests, the member that
//! each refusal names, and how the two legs wait for each other.

use mock_engine::{
    BlockBook, Engine, EngineConfig, EngineIds, Fault, HandoffShape, KvContract, Meetings,
    Mooncake, Mori, State, Store, dp_rank, encoded_params, expected_text,
};

use crate::client::{Client, DEADLINE, Response, ask, post, sha256};

const CHAT: &str = "/v1/chat/completions";
const GENERATE: &str = "/inference/v1/generate";
const UUID: &str = "6ba7b810-9dad-41d1-80b4-00c04fd430c8";

/// Starts a prefill and a decode engine with the same contract.
fn pair(contract: &KvContract) -> (Engine, Engine) {
    let start = |config: EngineConfig| {
        let contract = contract.clone();
        let data_parallel_size = 8;
        let config = EngineConfig {
            contract,
            data_parallel_size,
            ..config
        };
        Engine::start(config, 0).unwrap()
    };
    (
        start(EngineConfig::prefill()),
        start(EngineConfig::decode()),
    )
}

fn body(members: &str) -> String {
    format!("{{\"messages\":[\"q\"],{members}}}")
}

fn send(engine: &Engine, members: &str) -> Response {
    ask(engine, &post(CHAT, &body(members)))
}

fn content(response: &Response) -> String {
    let json = response.json();
    let text = &json["choices"][0]["message"]["content"];
    text.as_str().unwrap_or_default().to_owned()
}

#[track_caller]
fn refused(response: &Response, status: u16, field: &str) {
    assert_eq!(response.status, status, "{response:?}");
    let message = response.json()["error"]["message"].to_string();
    assert!(message.contains(field), "{message} / {field}");
}

#[track_caller]
fn admitted(response: &Response, tokens: u32) {
    assert_eq!(response.status, 200, "{response:?}");
    assert_eq!(
        content(response),
        expected_text(&sha256(b"[\"q\"]"), tokens),
        "{response:?}"
    );
}

#[test]
fn shared_storage() {
    let store = Store::new();
    let (prefill, decode) = pair(&KvContract::SharedStorage(store.clone()));
    let capped = r#""max_tokens":1,"max_completion_tokens":1"#;
    refused(&send(&prefill, capped), 400, "cache_hit_threshold");
    refused(
        &send(&prefill, r#""max_tokens":1,"cache_hit_threshold":0"#),
        400,
        "max_completion_tokens",
    );
    let cold = send(&decode, r#""cache_hit_threshold":0.8"#);
    assert_eq!(
        cold.json()["choices"][0]["finish_reason"],
        "cache_threshold"
    );
    assert_eq!(cold.json()["usage"]["completion_tokens"], 0);
    let streamed = send(&decode, r#""cache_hit_threshold":0.8,"stream":true"#).events();
    assert_eq!(streamed.len(), 2);
    assert_eq!(streamed[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(
        streamed[1]["choices"][0]["finish_reason"],
        "cache_threshold"
    );
    let completion = r#"{"prompt":"q","cache_hit_threshold":0.8,"stream":true}"#;
    let streamed = ask(&decode, &post("/v1/completions", completion)).events();
    assert_eq!(streamed.len(), 1);
    assert!(store.is_empty());
    admitted(
        &send(&prefill, &format!("{capped},\"cache_hit_threshold\":0")),
        1,
    );
    assert_eq!(store.len(), 1);
    admitted(
        &send(&decode, r#""cache_hit_threshold":0.8,"max_tokens":3"#),
        3,
    );
    store.set_warm(true);
    let other = r#"{"messages":["other"],"cache_hit_threshold":0.8,"max_tokens":3}"#;
    let other = ask(&decode, &post(CHAT, other));
    assert_eq!(other.json()["choices"][0]["finish_reason"], "length");
    assert_eq!(prefill.counters().contract_broken, 2);
}

fn room(room: &str) -> String {
    format!(
        "\"max_tokens\":3,\"bootstrap_host\":\"127.0.0.1\",\"bootstrap_port\":8998,\
         \"bootstrap_room\":{room}"
    )
}

#[test]
fn sglang_legs_wait_for_each_other_in_their_room() {
    let meetings = Meetings::new();
    let (prefill, decode) = pair(&KvContract::Sglang(meetings.clone()));
    let mut waiting = Client::new(&decode);
    waiting.send(&post(CHAT, &body(&room("7"))));
    let received = |log: &[mock_engine::Seen]| log.iter().any(|s| s.state == State::Responding);
    assert!(decode.wait_for(DEADLINE, received).is_some());
    assert_eq!(decode.counters().responded, 0);
    admitted(&send(&prefill, &room("7")), 3);
    admitted(&waiting.response().unwrap(), 3);
    // A prefill leg that waits as well gets its response after the decode leg has arrived.
    meetings.prefill_waits(true);
    let mut waiting = Client::new(&prefill);
    waiting.send(&post(CHAT, &body(&room("8"))));
    admitted(&send(&decode, &room("8")), 3);
    admitted(&waiting.response().unwrap(), 3);
    for (members, field) in [
        (room("7"), "used twice"),
        (room("9223372036854775808"), "2^63"),
        (room("1.0"), "bootstrap_room"),
        (room("\"1\""), "bootstrap_room"),
        (room("9").replace("8998", "0"), "bootstrap_port"),
        (room("9").replace("\"127.0.0.1\"", "1"), "bootstrap_host"),
        ("\"max_tokens\":3".to_owned(), "bootstrap_host"),
    ] {
        refused(&send(&prefill, &members), 400, field);
    }
    admitted(&send(&decode, "\"max_tokens\":3"), 3);
    assert_eq!(meetings.keys(), ["7", "8"]);
    assert_eq!(meetings.complete(), 2);
}

#[test]
fn a_wait_ends_when_the_client_disconnects() {
    let (_prefill, decode) = pair(&KvContract::Sglang(Meetings::new()));
    let mut client = Client::new(&decode);
    client.send(&post(CHAT, &body(&room("7"))));
    let received = |log: &[mock_engine::Seen]| log.iter().any(|s| s.state == State::Responding);
    assert!(decode.wait_for(DEADLINE, received).is_some());
    drop(client);
    let aborted = |log: &[mock_engine::Seen]| log.iter().any(|s| s.state.is_aborted());
    assert!(decode.wait_for(DEADLINE, aborted).is_some());
}

fn mooncake_prefill(engine: &Engine, rank: &str, members: &str) -> Response {
    let request = post(CHAT, &body(members));
    let line = format!("host: e\r\nx-data-parallel-rank: {rank}");
    ask(engine, &request.replacen("host: e", &line, 1))
}

#[test]
fn mooncake() {
    let terms = Mooncake {
        engines: EngineIds::new(&["e0", "e1"]),
        ..Mooncake::default()
    };
    let bootstrap = Engine::start(
        EngineConfig {
            bootstrap: Some(terms.engines.clone()),
            ..EngineConfig::default()
        },
        0,
    )
    .unwrap();
    let query = "GET /query HTTP/1.1\r\nhost: e\r\n\r\n";
    assert_eq!(ask(&bootstrap, query).json()["1"]["engine_id"], "e1");
    let (prefill, decode) = pair(&KvContract::Mooncake(terms.clone()));
    let first = format!(
        "\"max_tokens\":1,\"stream\":false,\"kv_transfer_params\":{{\"do_remote_decode\":true,\
         \"do_remote_prefill\":false,\"transfer_id\":\"xfer-{UUID}\"}}"
    );
    let second = format!(
        "\"max_tokens\":3,\"kv_transfer_params\":{{\"do_remote_decode\":false,\
         \"do_remote_prefill\":true,\"transfer_id\":\"xfer-{UUID}\",\
         \"remote_bootstrap_addr\":\"http://127.0.0.1:8998\",\"remote_engine_id\":\"e1\"}}"
    );
    for (rank, members, field) in [
        ("5", first.clone(), "x-data-parallel-rank"),
        ("1", first.replace("xfer-", ""), "transfer_id"),
        (
            "1",
            first.replace("\"stream\":false", "\"stream\":true"),
            "stream",
        ),
        ("1", first.replace(":1,", ":2,"), "max_tokens"),
        (
            "1",
            format!("\"max_completion_tokens\":9,{first}"),
            "max_completion_tokens",
        ),
        (
            "1",
            first.replace("\"do_remote_p", "\"x\":1,\"do_remote_p"),
            ".x",
        ),
        ("1", second.clone(), "Decode leg at Prefill"),
        ("1", "\"max_tokens\":1".to_owned(), "Local leg at Prefill"),
    ] {
        refused(&mooncake_prefill(&prefill, rank, &members), 400, field);
    }
    let unknown = second.replace("\"e1\"", "\"e9\"");
    refused(&send(&decode, &unknown), 500, "unknown engine e9");
    admitted(&mooncake_prefill(&prefill, "1", &first), 1);
    refused(
        &send(&decode, &second.replace("\"e1\"", "\"e0\"")),
        400,
        "one leg has e0, one e1",
    );
    admitted(&send(&decode, &second), 3);
    // A restart of the prefill engine.
    terms.engines.set(&["n0", "n1"]);
    refused(&send(&decode, &second), 500, "unknown engine e1");
    assert_eq!(ask(&bootstrap, query).json()["0"]["engine_id"], "n0");
}

#[test]
fn offloading() {
    let (prefill, decode) = pair(&KvContract::Offloading(Meetings::new()));
    let first = format!(
        "\"max_tokens\":1,\"stream\":false,\"kv_transfer_params\":{{\"remote_decoder\":\
         {{\"kv_request_id\":\"{UUID}\"}}}}"
    );
    let peer = format!(
        "{{\"kv_request_id\":\"{UUID}\",\"remote_host\":\"127.0.0.1\",\"remote_port\":7777}}"
    );
    let second = format!("\"max_tokens\":3,\"kv_transfer_params\":{{\"remote_prefiller\":{peer}}}");
    let pull = format!("\"max_tokens\":3,\"kv_transfer_params\":{{\"remote_kv_source\":{peer}}}");
    for (members, field) in [
        (
            first.replace("}}", "},\"remote_kv_source\":{}}"),
            "kv_request_id",
        ),
        (first.replace(UUID, "1"), "kv_request_id"),
        (first.replace("\"stream\":false,", ""), "stream"),
        (second.clone(), "remote_prefiller"),
        ("\"max_tokens\":1".to_owned(), "absent at a prefill"),
    ] {
        refused(&send(&prefill, &members), 400, field);
    }
    refused(
        &send(&decode, &second.replace("7777", "\"7777\"")),
        400,
        "remote_port",
    );
    admitted(&send(&prefill, &first), 1);
    admitted(&send(&decode, &second), 3);
    admitted(&send(&decode, &pull), 3);
    let generate = r#"{"token_ids":[1],"sampling_params":{"max_tokens":9},"stream":false,"kv_transfer_params":"#;
    let generate = format!("{generate}{{\"remote_decoder\":{{\"kv_request_id\":\"{UUID}\"}}}}}}");
    refused(
        &ask(&prefill, &post(GENERATE, &generate)),
        400,
        "max_tokens: want 1, got 9",
    );
}

fn mori_object(more: &str) -> String {
    let rank = dp_rank(UUID, 8);
    format!(
        "\"remote_dp_rank\":{rank},\"remote_dp_rank_override\":true,\
         \"transfer_id\":\"tx{UUID}\",\"tp_size\":1,\"remote_dp_size\":8,{more}"
    )
}

#[test]
fn mori_concurrent() {
    let terms = Mori {
        parallel: true,
        decode_host: "10.0.0.1".to_owned(),
        decode_ports: (61005, 6301),
        prefill_ports: (61006, 6302),
        tp_size: 1,
        dp_size: 8,
        ..Mori::default()
    };
    let (prefill, decode) = pair(&KvContract::Mori(terms));
    let rank = dp_rank(UUID, 8).to_string();
    let object = mori_object(
        "\"do_remote_decode\":true,\"do_remote_prefill\":false,\"remote_engine_id\":null,\
         \"remote_block_ids\":null,\"remote_port\":null,\"remote_host\":\"10.0.0.1\",\
         \"remote_notify_port\":61005,\"remote_handshake_port\":6301",
    );
    let caps = "\"max_tokens\":1,\"max_completion_tokens\":1,\"min_tokens\":1,\"stream\":false";
    let first = format!("{caps},\"kv_transfer_params\":{{{object}}}");
    let object = mori_object(
        "\"do_remote_decode\":false,\"do_remote_prefill\":true,\"remote_block_ids\":[],\
         \"remote_engine_id\":\"127.0.0.1:6302\",\"remote_host\":\"127.0.0.1\",\
         \"remote_port\":6302,\"remote_notify_port\":61006,\"remote_handshake_port\":6302",
    );
    let second = format!("\"max_tokens\":3,\"kv_transfer_params\":{{{object}}}");
    for (members, field) in [
        (first.replace("\"tp_size\":1,", ""), "tp_size"),
        (first.replace("61005", "61006"), "remote_notify_port"),
        (first.replace("10.0.0.1", "10.0.0.2"), "remote_host"),
        (first.replace("\"min_tokens\":1,", ""), "min_tokens"),
        (
            first.replace(
                &format!("\"remote_dp_rank\":{rank}"),
                "\"remote_dp_rank\":0",
            ),
            "x-data-parallel-rank",
        ),
    ] {
        refused(&mooncake_prefill(&prefill, &rank, &members), 400, field);
    }
    refused(&send(&prefill, &first), 400, "x-data-parallel-rank");
    admitted(&mooncake_prefill(&prefill, &rank, &first), 1);
    admitted(&mooncake_prefill(&decode, &rank, &second), 3);
}

#[test]
fn mori_in_sequence_returns_the_configured_object() {
    let terms = Mori {
        decode_host: "10.0.0.1".to_owned(),
        decode_ports: (61005, 6301),
        dp_size: 1,
        ..Mori::default()
    };
    let (prefill, _decode) = pair(&KvContract::Mori(terms.clone()));
    let object = mori_object(
        "\"do_remote_decode\":true,\"do_remote_prefill\":false,\"remote_engine_id\":null,\
         \"remote_block_ids\":null,\"remote_port\":null,\"remote_host\":\"10.0.0.1\",\
         \"remote_notify_port\":61005,\"remote_handshake_port\":6301",
    );
    let object = object.replace("\"remote_dp_size\":8", "\"remote_dp_size\":1");
    let rank = format!("\"remote_dp_rank\":{}", dp_rank(UUID, 8));
    let object = object.replace(&rank, "\"remote_dp_rank\":0");
    let caps = "\"max_tokens\":1,\"max_completion_tokens\":1,\"min_tokens\":1,\"stream\":false";
    let first = format!("{caps},\"kv_transfer_params\":{{{object}}}");
    let response = send(&prefill, &first);
    assert_eq!(
        response.json()["kv_transfer_params"]["remote_host"],
        "127.0.0.1"
    );
    terms.returned.set(Some("{\"remote_dp_rank\":3}"));
    let other = first.replace(UUID, "7ba7b810-9dad-41d1-80b4-00c04fd430c8");
    let response = send(&prefill, &other);
    assert_eq!(response.json()["kv_transfer_params"]["remote_dp_rank"], 3);
}

#[test]
fn nixl_v1() {
    let book = BlockBook::new();
    let (prefill, decode) = pair(&KvContract::NixlV1(book.clone()));
    refused(&send(&prefill, "\"stream\":false"), 400, "do_remote_decode");
    refused(&send(&prefill, "\"do_remote_decode\":true"), 400, "stream");
    let response = send(
        &prefill,
        "\"max_tokens\":1,\"stream\":false,\"do_remote_decode\":true",
    );
    assert_eq!(response.json()["remote_host"], "127.0.0.1");
    let four = format!(
        "\"remote_block_ids\":[0, 9007199254740993],\"remote_engine_id\":\"v1-{port}\",\
         \"remote_host\":\"127.0.0.1\",\"remote_port\":{port}",
        port = prefill.port()
    );
    let second = format!("\"max_tokens\":3,\"do_remote_prefill\":true,{four}");
    refused(
        &send(&decode, &second.replace("[0, ", "[0,")),
        500,
        "unknown or altered",
    );
    admitted(&send(&decode, &second), 3);
    assert_eq!(book.used(), 1);
    assert_ne!(
        content(&send(&decode, &second)),
        expected_text(&sha256(b"[\"q\"]"), 3)
    );
    let nulls = "\"max_tokens\":3,\"do_remote_prefill\":true,\"remote_block_ids\":null,\
                 \"remote_engine_id\":null,\"remote_host\":null,\"remote_port\":null";
    admitted(&send(&decode, nulls), 3);
    refused(
        &send(&decode, &nulls.replace(",\"remote_port\":null", "")),
        400,
        "remote_port",
    );
}

#[test]
fn lmcache() {
    let (prefill, decode) = pair(&KvContract::Lmcache);
    refused(
        &send(&prefill, "\"max_tokens\":1"),
        400,
        "max_completion_tokens",
    );
    admitted(
        &send(&prefill, "\"max_tokens\":1,\"max_completion_tokens\":1"),
        1,
    );
    admitted(&send(&decode, "\"max_tokens\":3"), 3);
}

const ITEM: &str = r#"{"type":"image_url","image_url":{"url":"http://img/1"}}"#;

fn encode(engine: &Engine, items: &str, headers: &str) -> Response {
    let body = format!(
        "{{\"max_tokens\":1,\"stream\":false,\
         \"messages\":[{{\"role\":\"user\",\"content\":[{items}]}}]}}"
    );
    let line = format!("host: e\r\n{headers}");
    ask(engine, &post(CHAT, &body).replacen("host: e", &line, 1))
}

#[test]
fn encoder() {
    let config = EngineConfig {
        authorization: Some("Bearer k".to_owned()),
        keep_response: true,
        ..EngineConfig::encoder()
    };
    let engine = Engine::start(config, 0).unwrap();
    let good = "x-request-id: a-enc-0\r\nauthorization: Bearer k";
    let response = encode(&engine, ITEM, good);
    assert_eq!(response.status, 200, "{response:?}");
    let (key, value) = encoded_params(ITEM, engine.port());
    assert_eq!(
        response.json()["ec_transfer_params"][key].to_string(),
        serde_json::from_str::<serde_json::Value>(&value)
            .unwrap()
            .to_string()
    );
    let both = format!("{ITEM},{ITEM}");
    refused(&encode(&engine, &both, good), 400, "one part, got 2");
    refused(
        &encode(&engine, ITEM, &good.replace("a-enc-0", "a")),
        400,
        "x-request-id",
    );
    assert_eq!(encode(&engine, ITEM, "x-request-id: a-enc-0").status, 401);
    engine.fault_with("img/1", Fault::Handoff(HandoffShape::Omit), 1);
    let json = encode(&engine, ITEM, good).json();
    assert!(json.get("ec_transfer_params").is_none());
    let kept = |log: &[mock_engine::Seen]| {
        log.first()
            .and_then(|seen| seen.response.as_ref())
            .is_some_and(|response| response.starts_with(b"HTTP/1.1 200 OK\r\n"))
    };
    assert!(engine.wait_for(DEADLINE, kept).is_some());
}

#[test]
fn held_requests_get_a_response_after_release() {
    let engine = Engine::start(EngineConfig::default(), 0).unwrap();
    engine.fault(Fault::Hold, 1);
    let mut client = Client::new(&engine);
    client.send(&post(CHAT, &body("\"max_tokens\":3")));
    let received = |log: &[mock_engine::Seen]| log.iter().any(|s| s.state == State::Responding);
    assert!(engine.wait_for(DEADLINE, received).is_some());
    assert_eq!(engine.counters().responded, 0);
    engine.release();
    admitted(&client.response().unwrap(), 3);
}

#[test]
fn continued_responses_add_up_to_the_whole_response() {
    let config = EngineConfig {
        tokens: 7,
        ..EngineConfig::default()
    };
    let engine = Engine::start(config, 0).unwrap();
    let whole = content(&send(&engine, "\"max_tokens\":100"));
    let (mut text, mut finish) = (String::new(), String::new());
    for _ in 0..3 {
        let members = format!(
            "{{\"messages\":[\"q\",{{\"role\":\"assistant\",\"content\":\"{text}\"}}],\
             \"max_tokens\":3,\"continue_final_message\":true,\"add_generation_prompt\":false}}"
        );
        let response = ask(&engine, &post(CHAT, &members));
        text += &content(&response);
        finish = response.json()["choices"][0]["finish_reason"].to_string();
    }
    assert_eq!(text, whole);
    assert_eq!(finish, "\"stop\"");
}
