//! The encoder stage (`docs/pd-sidecar.md#encoders`): each multimodal item is sent to an encoder in
//! a separate request, and the parameters that the encoders return are sent with the legs.
//! Conformance rows E1 to E5, and C1 to C4 to the extent that they are visible from outside.

use mock_engine::{
    BlockBook, Counters, Engine, EngineConfig, EngineIds, Fault, HandoffShape, KvContract,
    Meetings, Mooncake, Seen, State, Store, encoded_params,
};
use serde_json::{Value, json};

use crate::apis::Api;
use crate::client::{Client, DEADLINE, Response, request};
use crate::harness::{CHAT, Launch, PREFILLER, Pair, Sidecar, json_of, only, start_ranks};
use crate::harness_more::{Leave, expect_drained};
use crate::kv::{Setup, wait_aborted, wait_state};

const ENCODERS: &str = "x-encoder-hosts-ports";
const PARAMS: &str = "ec_transfer_params";
const NIXL: &[&str] = &["--ec-connector=ec-nixl"];
const EXAMPLE: &[&str] = &["--ec-connector=ec-example"];
const HEADERS: [(&str, &str); 1] = [("authorization", "Bearer k")];

fn image(nth: usize) -> String {
    format!(r#"{{"type":"image_url","image_url":{{"url":"http://img/{nth}"}}}}"#)
}

const AUDIO: &str = r#"{"type":"input_audio","input_audio":{"data":"UklGRg==","format":"wav"}}"#;
const VIDEO: &str = r#"{"type":"video_url","video_url":{"url":"http://vid/1"}}"#;
const TEXT: &str = r#"{"type":"text","text":"what?"}"#;

/// Returns a chat completion body whose only message has these parts.
fn chat(parts: &[impl AsRef<str>], stream: bool) -> String {
    chat_with(parts, stream, "")
}

fn chat_with(parts: &[impl AsRef<str>], stream: bool, more: &str) -> String {
    let parts: Vec<&str> = parts.iter().map(AsRef::as_ref).collect();
    format!(
        r#"{{"model":"mock-model","max_tokens":8,"messages":[{{"role":"user","content":[{}]}}],"stream":{stream}{more}}}"#,
        parts.join(",")
    )
}

/// A test's encoders, and a pair to which it sends requests that name all of these encoders.
struct Stage {
    encoders: Vec<Engine>,
    pair: Pair,
}

impl Stage {
    fn start(encoders: usize, args: &[&str], contract: KvContract) -> Self {
        let config = EngineConfig {
            authorization: Some("Bearer k".to_owned()),
            ..EngineConfig::encoder()
        };
        let start = |_| Engine::start(config.clone(), 0).unwrap();
        let encoders = (0..encoders).map(start).collect();
        let pair = Setup {
            args,
            contract,
            ..Setup::default()
        }
        .start();
        Self { encoders, pair }
    }

    fn line(&self) -> String {
        let all: Vec<String> = self.encoders.iter().map(Engine::host_port).collect();
        all.join(", ")
    }

    /// Sends a request that names all encoders and, if `split` is set, the prefill engine.
    fn ask_on(&self, path: &str, body: &str, split: bool) -> Response {
        self.begin(path, body, split).response()
    }

    fn begin(&self, path: &str, body: &str, split: bool) -> Client {
        let (line, target) = (self.line(), self.pair.prefill.host_port());
        let mut headers = HEADERS.to_vec();
        headers.push((ENCODERS, &line));
        if split {
            headers.push((PREFILLER, &target));
        }
        let mut client = self.pair.sidecar.connect();
        client.send(request("POST", path, &headers, body.as_bytes()));
        client
    }

    fn ask(&self, body: &str, split: bool) -> Response {
        self.ask_on(CHAT, body, split)
    }

    /// Returns a list of received requests for each encoder, with the same indices as `encoders`
    /// and in order of arrival. Fails if any of these requests breaks the encoder's contract.
    #[track_caller]
    fn encoded(&self) -> Vec<Vec<Seen>> {
        let seen = |engine: &Engine| {
            assert_eq!(engine.counters().contract_broken, 0);
            engine.requests()
        };
        self.encoders.iter().map(seen).collect()
    }

    fn clear(&self) {
        self.encoders.iter().for_each(Engine::clear);
        self.pair.prefill.clear();
        self.pair.decode.clear();
    }

    fn engines(&self) -> impl Iterator<Item = &Engine> {
        self.encoders
            .iter()
            .chain([&self.pair.prefill, &self.pair.decode])
    }

    /// Clears all faults, then checks that a decode-only and a split request succeed, and that then
    /// no client connection and no active connection to an engine is left.
    #[track_caller]
    fn expect_recovered(&self) {
        for engine in self.engines() {
            engine.clear_faults();
            engine.release();
        }
        for split in [false, true] {
            self.ask(&chat(&[image(1), TEXT.to_owned()], true), split)
                .expect(200);
        }
        expect_drained(&self.pair.sidecar);
        self.pair.sidecar.expect_sound();
    }
}

/// Returns the `ec_transfer_params` that a leg must contain for `items`: the parameters that their
/// encoders return, merged into one object.
fn merged(items: &[(&str, &Engine)]) -> Value {
    let mut merged = json!({});
    for (item, encoder) in items {
        let (key, value) = encoded_params(item, encoder.port());
        merged[key] = serde_json::from_str(&value).unwrap();
    }
    merged
}

fn staged(body: &str, params: Option<Value>) -> Value {
    let mut want: Value = serde_json::from_str(body).unwrap();
    want["cache_hit_threshold"] = json!(0);
    if let Some(params) = params {
        want[PARAMS] = params;
    }
    want
}

#[test]
fn e1_items_are_distributed_over_one_or_two_encoders() {
    for count in [1, 2] {
        let stage = Stage::start(count, NIXL, KvContract::Nixlv2);
        let items = [image(1), image(2), image(3)];
        let body = chat(&[items.as_slice(), &[TEXT.to_owned()]].concat(), true);
        let response = stage.ask(&body, false).expect(200);
        assert!(response.text().ends_with("data: [DONE]\n\n"));
        let encoded = stage.encoded();
        assert_eq!(encoded.iter().map(Vec::len).sum::<usize>(), 3);
        // Item i goes to encoder i modulo the number of encoders.
        let mut places = Vec::new();
        for (nth, item) in items.iter().enumerate() {
            let encoder = nth % count;
            let mut bodies = encoded[encoder].iter().map(json_of);
            let item_json: Value = serde_json::from_str(item).unwrap();
            assert!(bodies.any(|body| body["messages"][0]["content"] == json!([item_json])));
            places.push((item.as_str(), &stage.encoders[encoder]));
        }
        let decode = only(&stage.pair.decode);
        assert_eq!(json_of(&decode), staged(&body, Some(merged(&places))));
        assert_eq!(decode.header(ENCODERS), None);
        assert!(stage.pair.prefill.requests().is_empty());
    }
}

#[test]
fn items_of_other_apis_are_sent_to_the_encoders() {
    let sent = json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,QQ=="}});
    for (path, body, item) in [
        (
            "/v1/responses",
            json!({"model": "mock-model", "max_output_tokens": 8, "input": [{"role": "user",
                "content": [{"type": "input_image", "image_url": "http://img/1"}]}]}),
            json!({"type": "image_url", "image_url": {"url": "http://img/1"}}),
        ),
        (
            "/v1/messages",
            json!({"model": "mock-model", "max_tokens": 8, "messages": [{"role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t", "content": [
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                        "data": "QQ=="}}]}]}]}),
            sent,
        ),
        (
            CHAT,
            json!({"model": "mock-model", "max_tokens": 8, "messages": [{"role": "user",
                "content": [{"image_url": {"url": "http://img/1"}}]}]}),
            json!({"image_url": {"url": "http://img/1"}}),
        ),
    ] {
        for split in [false, true] {
            let stage = Stage::start(1, NIXL, KvContract::Nixlv2);
            stage.ask_on(path, &body.to_string(), split).expect(200);
            let encoded = stage.encoded();
            let [seen] = encoded[0].as_slice() else {
                panic!("{path}: {encoded:?}");
            };
            let want = json!({"model": "mock-model", "max_tokens": 1, "stream": false,
                "messages": [{"role": "user", "content": [item]}]});
            assert_eq!(json_of(seen), want, "{path}");
            let decode = json_of(&only(&stage.pair.decode));
            assert!(decode[PARAMS].is_object(), "{path}: {decode}");
            assert_eq!(stage.pair.prefill.requests().len(), usize::from(split));
        }
    }
}

#[test]
fn e2_denied_encoders_receive_no_items() {
    let stage = Stage::start(
        2,
        &["--ec-connector=ec-nixl", "--allow-target=127.0.0.1:1"],
        KvContract::Nixlv2,
    );
    let body = chat(&[image(1)], false);
    stage.ask(&body, false).expect(200);
    assert!(stage.encoded().iter().all(Vec::is_empty));
    assert_eq!(only(&stage.pair.decode).body, body.as_bytes());
}

/// Starts a stage with `of` encoders. Its sidecar allows only the pair's prefill engine and the
/// encoders whose indices are in `encoders`.
fn allowing(encoders: &[usize], of: usize) -> Stage {
    let mut stage = Stage::start(of, NIXL, KvContract::Nixlv2);
    let mut rules = vec![stage.pair.prefill.host_port()];
    rules.extend(encoders.iter().map(|nth| stage.encoders[*nth].host_port()));
    let mut args: Vec<String> = rules
        .iter()
        .map(|rule| format!("--allow-target={rule}"))
        .collect();
    args.push("--ec-connector=ec-nixl".to_owned());
    if stage.pair.decode.port() == 0 {
        args.push(format!(
            "--model-server-socket={}",
            stage
                .pair
                .decode
                .place()
                .to_string()
                .trim_start_matches("unix:")
        ));
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    stage.pair.sidecar = Sidecar::start(&args, stage.pair.decode.port());
    stage
}

#[test]
fn e2_denied_encoders_receive_no_items_of_a_split_request() {
    let stage = allowing(&[], 2);
    stage.ask(&chat(&[image(1)], false), true).expect(200);
    assert!(stage.encoded().iter().all(Vec::is_empty));
    only(&stage.pair.prefill);
    assert_eq!(stage.pair.decode.counters().handoff_used, 1);
}

#[test]
fn e3_the_allowed_one_of_two_encoders_receives_all_items() {
    let stage = allowing(&[1], 2);
    stage
        .ask(&chat(&[image(1), image(2)], true), false)
        .expect(200);
    let encoded = stage.encoded();
    assert_eq!((encoded[0].len(), encoded[1].len()), (0, 2));
}

#[test]
fn e4_encoder_parameters_are_sent_with_both_legs() {
    let stage = Stage::start(2, NIXL, KvContract::Nixlv2);
    for stream in [false, true] {
        stage.clear();
        let items = [image(1), AUDIO.to_owned()];
        let body = chat(&items, stream);
        stage.ask(&body, true).expect(200);
        assert_eq!(stage.encoded().iter().map(Vec::len).sum::<usize>(), 2);
        let params = merged(&[
            (&items[0], &stage.encoders[0]),
            (&items[1], &stage.encoders[1]),
        ]);
        let prefill = json_of(&only(&stage.pair.prefill));
        assert_eq!(prefill[PARAMS], params);
        assert_eq!(prefill["cache_hit_threshold"], 0);
        assert_eq!(prefill["max_tokens"], 1);
        let mut decode = json_of(&only(&stage.pair.decode));
        assert!(decode["kv_transfer_params"].is_object());
        decode.as_object_mut().unwrap().remove("kv_transfer_params");
        assert_eq!(decode, staged(&body, Some(params)));
    }
    assert_eq!(stage.pair.decode.counters().handoff_used, 2);
    assert_eq!(stage.pair.prefill.counters().contract_broken, 0);
}

#[test]
fn e5_encoders_without_a_connector_are_ignored() {
    let stage = Stage::start(1, &[], KvContract::Nixlv2);
    let body = chat(&[image(1)], true);
    stage.ask(&body, false).expect(200);
    let decode = only(&stage.pair.decode);
    assert_eq!(decode.body, body.as_bytes());
    assert_eq!(decode.header(ENCODERS), None);
    stage.pair.decode.clear();
    stage.ask(&body, true).expect(200);
    assert_eq!(stage.pair.decode.counters().handoff_used, 1);
    assert!(stage.encoded().iter().all(Vec::is_empty));
}

#[test]
fn c1_images_audio_and_videos_are_items() {
    let stage = Stage::start(1, NIXL, KvContract::Nixlv2);
    let (one, text) = (image(1), TEXT.to_owned());
    for (parts, count) in [
        (vec![text.clone()], 0),
        (vec![one.clone()], 1),
        (vec![one.clone(), text, image(2), image(3)], 3),
        (vec![AUDIO.to_owned()], 1),
        (vec![VIDEO.to_owned(), one], 2),
    ] {
        stage.clear();
        stage.ask(&chat(&parts, false), false).expect(200);
        assert_eq!(stage.encoded()[0].len(), count, "{parts:?}");
    }
    // Items are found in all messages, regardless of their roles.
    stage.clear();
    let body = format!(
        r#"{{"max_tokens":4,"messages":[{{"role":"system","content":"s"}},{{"role":"user","content":[{}]}},{{"role":"assistant","content":"a"}},{{"role":"user","content":[{}]}}]}}"#,
        image(1),
        image(2)
    );
    stage.ask(&body, false).expect(200);
    assert_eq!(stage.encoded()[0].len(), 2);
}

#[test]
fn c2_an_encoder_request_contains_one_item_and_is_capped() {
    let stage = Stage::start(1, NIXL, KvContract::Nixlv2);
    for (more, completion) in [
        ("", None),
        (r#","max_completion_tokens":9"#, Some(json!(1))),
        (
            r#","stream_options":{"include_usage":true},"temperature":0.5"#,
            None,
        ),
    ] {
        stage.clear();
        let item = image(7);
        let body = chat_with(&[item.as_str(), TEXT], true, more);
        stage.ask(&body, false).expect(200);
        let seen = stage.encoded()[0][0].clone();
        let mut want: Value = serde_json::from_str(&body).unwrap();
        let item: Value = serde_json::from_str(&item).unwrap();
        want["messages"] = json!([{"role": "user", "content": [item]}]);
        want["max_tokens"] = json!(1);
        want["stream"] = json!(false);
        want.as_object_mut().unwrap().remove("stream_options");
        if let Some(cap) = completion {
            want["max_completion_tokens"] = cap;
        }
        assert_eq!(json_of(&seen), want);
        assert_eq!((seen.method.as_str(), seen.target.as_str()), ("POST", CHAT));
        assert_eq!(seen.header("content-type"), Some("application/json"));
        assert_eq!(seen.header("authorization"), Some("Bearer k"));
        assert_eq!(
            seen.header("host"),
            Some(stage.encoders[0].host_port().as_str())
        );
        for name in ["x-forwarded-for", ENCODERS, PREFILLER] {
            assert_eq!(seen.header(name), None, "{name}");
        }
    }
}

#[test]
fn c2_the_request_ids_of_encoder_requests_are_numbered() {
    let stage = Stage::start(2, NIXL, KvContract::Nixlv2);
    let (line, target) = (stage.line(), stage.pair.prefill.host_port());
    for own in [Some("gw-17"), None] {
        stage.clear();
        let mut headers = HEADERS.to_vec();
        headers.extend([(ENCODERS, line.as_str()), (PREFILLER, target.as_str())]);
        headers.extend(own.map(|id| ("x-request-id", id)));
        let body = chat(&[image(1), image(2), image(3)], true);
        stage.pair.sidecar.post(CHAT, &body, &headers).expect(200);
        let prefill = only(&stage.pair.prefill);
        let ids = prefill.header_all("x-request-id");
        assert_eq!(ids.len(), 1);
        assert!(own.is_none_or(|own| own == ids[0]));
        assert_eq!(only(&stage.pair.decode).header_all("x-request-id"), ids);
        let mut have: Vec<String> = stage
            .encoded()
            .iter()
            .flatten()
            .flat_map(|seen| seen.header_all("x-request-id"))
            .map(str::to_owned)
            .collect();
        have.sort();
        let want = [0, 1, 2].map(|nth| format!("{}-enc-{nth}", ids[0]));
        assert_eq!(have, want);
    }
}

#[test]
fn c3_repeated_urls_are_encoded_once() {
    let stage = Stage::start(1, NIXL, KvContract::Nixlv2);
    let detailed = r#"{"type":"image_url","image_url":{"url":"http://img/1","detail":"low"}}"#;
    for (parts, count) in [
        (vec![image(1), image(1), image(2)], 2),
        (vec![image(1), detailed.to_owned()], 1),
        (vec![VIDEO.to_owned(), VIDEO.to_owned()], 1),
        (vec![AUDIO.to_owned(), AUDIO.to_owned()], 2),
    ] {
        stage.clear();
        stage.ask(&chat(&parts, false), false).expect(200);
        assert_eq!(stage.encoded()[0].len(), count, "{parts:?}");
        // The request itself keeps all items.
        let body = json_of(&only(&stage.pair.decode));
        let content = body["messages"][0]["content"].as_array().unwrap().len();
        assert_eq!(content, parts.len());
    }
}

#[test]
fn c4_responses_without_parameters_are_skipped() {
    let stage = Stage::start(2, NIXL, KvContract::Nixlv2);
    let items = [image(1), image(2)];
    for shape in [
        HandoffShape::Omit,
        HandoffShape::Null,
        HandoffShape::Empty,
        HandoffShape::Text,
        HandoffShape::List,
    ] {
        stage.clear();
        let body = chat(&items, true);
        stage.encoders[0].fault(Fault::Handoff(shape), 1);
        stage.ask(&body, false).expect(200);
        let partial = merged(&[(&items[1], &stage.encoders[1])]);
        let have = json_of(&only(&stage.pair.decode));
        assert_eq!(have, staged(&body, Some(partial)), "{shape:?}");
        stage.clear();
        stage.encoders[0].fault(Fault::Handoff(shape), 1);
        stage.encoders[1].fault(Fault::Handoff(shape), 1);
        stage.ask(&body, false).expect(200);
        let have = json_of(&only(&stage.pair.decode));
        assert_eq!(have, staged(&body, None), "{shape:?}");
    }
}

#[test]
fn c4_a_request_without_items_calls_no_encoder() {
    let stage = Stage::start(1, NIXL, KvContract::Nixlv2);
    for split in [false, true] {
        stage.clear();
        let body = chat(&[TEXT], false);
        stage.ask(&body, split).expect(200);
        assert!(stage.encoded()[0].is_empty());
        let have = json_of(&only(&stage.pair.decode));
        assert_eq!(have["cache_hit_threshold"], 0);
        assert_eq!(have.get(PARAMS), None);
        assert_eq!(stage.pair.prefill.requests().len(), usize::from(split));
    }
}

#[test]
fn c4_the_stage_is_skipped_if_no_encoder_is_named() {
    let stage = Stage::start(1, NIXL, KvContract::Nixlv2);
    let body = chat(&[image(1)], true);
    let target = stage.pair.prefill.host_port();
    for line in [None, Some(""), Some(" , "), Some("https://e:1, user@e:1")] {
        for split in [false, true] {
            stage.clear();
            let mut headers: Vec<_> = line.map(|line| (ENCODERS, line)).into_iter().collect();
            headers.extend(split.then_some((PREFILLER, target.as_str())));
            stage.pair.sidecar.post(CHAT, &body, &headers).expect(200);
            let have = json_of(&only(&stage.pair.decode));
            assert_eq!(have.get("cache_hit_threshold"), None, "{line:?}");
            assert_eq!(have.get(PARAMS), None, "{line:?}");
            assert_eq!(stage.pair.prefill.requests().len(), usize::from(split));
        }
    }
    assert!(stage.encoded()[0].is_empty());
}

#[test]
fn too_many_items_are_400_before_any_leg() {
    let stage = Stage::start(1, NIXL, KvContract::Nixlv2);
    for (count, status) in [(256, 200), (257, 400)] {
        stage.clear();
        let items: Vec<String> = (0..count).map(image).collect();
        let response = stage.ask(&chat(&items, true), false);
        match status {
            200 => drop(response.expect(200)),
            _ => drop(response.expect_error(400, "too_many_items")),
        }
        let legs = if status == 200 { count } else { 0 };
        assert_eq!(stage.encoded()[0].len(), legs);
        let decodes = stage.pair.decode.requests().len();
        assert_eq!(decodes, usize::from(status == 200));
    }
    stage.pair.sidecar.expect_sound();
}

#[test]
fn c4_a_failing_encoder_fails_the_request() {
    let stage = Stage::start(2, NIXL, KvContract::Nixlv2);
    let fault = Fault::Status {
        code: 507,
        body: "out of vision".to_owned(),
        content_type: "text/plain".to_owned(),
    };
    for split in [false, true] {
        stage.clear();
        // The request for the second item fails, so the one for the first item is cancelled.
        stage.encoders[0].fault(Fault::StallBeforeHead, 1);
        stage.encoders[1].fault(fault.clone(), 1);
        let response = stage.ask(&chat(&[image(1), image(2)], true), split);
        let response = response.expect(502).json();
        assert_eq!(response["type"], "BadGateway");
        let message = response["message"].as_str().unwrap();
        assert!(message.contains("507"), "{message}");
        let over = |log: &[Seen]| log.iter().all(|seen| seen.state.is_aborted());
        assert!(stage.encoders[0].wait_for(DEADLINE, over).is_some());
        assert!(stage.pair.prefill.requests().is_empty());
        assert!(stage.pair.decode.requests().is_empty());
    }
    stage.expect_recovered();
}

#[test]
fn c4_the_error_names_the_item_that_failed() {
    let stage = Stage::start(1, NIXL, KvContract::Nixlv2);
    for nth in 0..3_usize {
        // Each round uses different items, because a cancelled request may reach its encoder late.
        let items = [0, 1, 2].map(|item| image(10 * (nth + 1) + item));
        let fault = Fault::Status {
            code: 500,
            body: "x".to_owned(),
            content_type: "text/plain".to_owned(),
        };
        stage.encoders[0].fault_with(&items[nth], fault, 1);
        let response = stage.ask(&chat(&items, true), false);
        let message = response.expect(502).json()["message"].to_string();
        assert!(message.contains(&nth.to_string()), "{message}");
    }
    stage.expect_recovered();
}

/// In pd-sidecar, a truncated encoder response terminated the process.
#[test]
fn c4_a_truncated_encoder_response_fails_only_its_request() {
    for args in [NIXL, EXAMPLE] {
        let stage = Stage::start(2, args, KvContract::Nixlv2);
        for fault in [
            Fault::TruncateMidBody { after_events: 1 },
            Fault::TruncateMidBody { after_events: 0 },
            Fault::ResetMidBody { after_events: 1 },
            Fault::ResetBeforeHead,
            Fault::CloseBeforeHead,
            Fault::Garbage,
            Fault::EndlessHead,
        ] {
            for split in [false, true] {
                stage.clear();
                // The fault applies twice: to the pooled connection and to the new connection of
                // the retry.
                stage.encoders[1].fault(fault.clone(), 2);
                let body = chat(&[image(1), image(2)], true);
                let response = stage.ask(&body, split);
                stage.encoders[1].clear_faults();
                assert_eq!(response.status, 502, "{fault:?}: {}", response.text());
                assert_eq!(response.expect(502).json()["type"], "BadGateway");
                assert!(stage.pair.decode.requests().is_empty());
            }
        }
        stage.expect_recovered();
        let stage = Stage::start(1, args, KvContract::Nixlv2);
        stage.encoders[0].refuse(true);
        let response = stage.ask(&chat(&[image(1)], true), false);
        assert_eq!(response.expect(502).json()["type"], "BadGateway");
        stage.encoders[0].refuse(false);
        stage.expect_recovered();
    }
}

#[test]
fn c4_an_encoder_response_that_is_not_json_fails_only_with_ec_nixl() {
    for fault in [Fault::Html, Fault::HalfJson, Fault::Gzip] {
        // One connector needs the response, the other one ignores it.
        let stage = Stage::start(1, NIXL, KvContract::Nixlv2);
        stage.encoders[0].fault(fault.clone(), 1);
        let response = stage.ask(&chat(&[image(1)], true), false);
        assert_eq!(response.status, 502, "{fault:?}");
        stage.expect_recovered();
        let stage = Stage::start(1, EXAMPLE, KvContract::Nixlv2);
        stage.encoders[0].fault(fault.clone(), 1);
        let body = chat(&[image(1)], true);
        stage.ask(&body, false).expect(200);
        let have = json_of(&only(&stage.pair.decode));
        assert_eq!(have, staged(&body, None), "{fault:?}");
    }
}

#[test]
fn fragmented_and_long_encoder_responses_are_read() {
    let stage = Stage::start(1, NIXL, KvContract::Nixlv2);
    let item = image(1);
    for fault in [
        Fault::Slow {
            chunk_bytes: 1,
            delay: std::time::Duration::ZERO,
        },
        Fault::LargeJson { bytes: 300_000 },
        Fault::NoFraming,
        Fault::Interim { count: 2 },
    ] {
        stage.clear();
        stage.encoders[0].fault(fault.clone(), 1);
        let body = chat(&[item.as_str()], true);
        stage.ask(&body, false).expect(200);
        let params = merged(&[(&item, &stage.encoders[0])]);
        let have = json_of(&only(&stage.pair.decode));
        assert_eq!(have, staged(&body, Some(params)), "{fault:?}");
    }
}

#[test]
fn the_example_connector_ignores_encoder_responses() {
    let stage = Stage::start(1, EXAMPLE, KvContract::Nixlv2);
    let body = chat(&[image(1)], true);
    stage.ask(&body, false).expect(200);
    assert_eq!(stage.encoded()[0].len(), 1);
    let have = json_of(&only(&stage.pair.decode));
    assert_eq!(have, staged(&body, None));
}

#[test]
fn items_are_encoded_concurrently_and_before_any_leg() {
    let stage = Stage::start(2, NIXL, KvContract::Nixlv2);
    for encoder in &stage.encoders {
        encoder.fault(Fault::Hold, 2);
    }
    let items = [image(1), image(2), image(3), image(4)];
    let mut client = stage.begin(CHAT, &chat(&items, true), true);
    for encoder in &stage.encoders {
        let both = |counters: &Counters| counters.running == 2;
        assert!(encoder.wait_counters(DEADLINE, both).is_some());
    }
    assert!(stage.pair.prefill.requests().is_empty());
    assert!(stage.pair.decode.requests().is_empty());
    stage.encoders.iter().for_each(Engine::release);
    client.response().expect(200);
    only(&stage.pair.prefill);
    only(&stage.pair.decode);
}

#[test]
fn a_client_disconnect_aborts_encoder_requests_and_legs() {
    let stage = Stage::start(2, NIXL, KvContract::Nixlv2);
    for leave in Leave::ALL {
        for split in [false, true] {
            stage.clear();
            let body = chat(&[image(1), image(2)], true);
            for encoder in &stage.encoders {
                encoder.fault(Fault::StallBeforeHead, 1);
            }
            let client = stage.begin(CHAT, &body, split);
            for encoder in &stage.encoders {
                wait_state(encoder, State::Responding);
            }
            let (_, _client) = leave.now(client);
            stage.encoders.iter().for_each(wait_aborted);
            expect_drained(&stage.pair.sidecar);
            assert!(stage.pair.prefill.requests().is_empty());
            assert!(stage.pair.decode.requests().is_empty());
            stage.clear();
            // In the leg that follows the encoder stage.
            let last = match split {
                true => &stage.pair.prefill,
                false => &stage.pair.decode,
            };
            last.fault(Fault::StallBeforeHead, 1);
            let client = stage.begin(CHAT, &body, split);
            wait_state(last, State::Responding);
            let (_, _client) = leave.now(client);
            wait_aborted(last);
            expect_drained(&stage.pair.sidecar);
        }
    }
    stage.expect_recovered();
}

/// Returns, for each connector, the sidecar's flags and the contract that its engines enforce.
fn connectors(mooncake: &Mooncake, bootstrap: &Engine) -> Vec<(Vec<String>, KvContract)> {
    let named = |name: &str| vec![format!("--kv-connector={name}")];
    let mut with_port = named("mooncake");
    with_port.push(format!("--mooncake-bootstrap-port={}", bootstrap.port()));
    vec![
        (named("nixlv2"), KvContract::Nixlv2),
        (
            named("shared-storage"),
            KvContract::SharedStorage(Store::new()),
        ),
        (named("sglang"), KvContract::Sglang(Meetings::new())),
        (with_port, KvContract::Mooncake(mooncake.clone())),
        (named("offloading"), KvContract::Offloading(Meetings::new())),
        (named("nixl"), KvContract::NixlV1(BlockBook::new())),
        (named("lmcache"), KvContract::Lmcache),
    ]
}

#[test]
fn the_stage_works_with_every_connector_and_every_api() {
    let mooncake = Mooncake {
        engines: EngineIds::new(&["e0"]),
        ..Mooncake::default()
    };
    let config = EngineConfig {
        bootstrap: Some(mooncake.engines.clone()),
        ..EngineConfig::default()
    };
    let bootstrap = Engine::start(config, 0).unwrap();
    for (args, contract) in connectors(&mooncake, &bootstrap) {
        let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
        args.extend(NIXL);
        let stage = Stage::start(1, &args, contract);
        for stream in [false, true] {
            stage.clear();
            let item = image(1);
            let body = chat(&[item.as_str(), TEXT], stream);
            stage.ask(&body, true).expect(200);
            assert_eq!(stage.encoded()[0].len(), 1, "{args:?}");
            let params = merged(&[(&item, &stage.encoders[0])]);
            for engine in [&stage.pair.prefill, &stage.pair.decode] {
                let seen = json_of(&only(engine));
                assert_eq!(seen[PARAMS], params, "{args:?}");
                assert_eq!(seen["cache_hit_threshold"], 0, "{args:?}");
                assert_eq!(engine.counters().contract_broken, 0, "{args:?}");
            }
        }
        // The other APIs have no items that this stage recognises; their prefill legs are capped as
        // usual.
        for api in Api::ALL {
            stage.clear();
            let question = api.ask(4, true);
            let response = stage.ask_on(api.path(), &question.body, true).expect(200);
            question.expect(&response);
            only(&stage.pair.prefill);
            only(&stage.pair.decode);
            for engine in [&stage.pair.prefill, &stage.pair.decode] {
                assert_eq!(engine.counters().contract_broken, 0, "{args:?} {api:?}");
            }
        }
        stage.pair.sidecar.expect_sound();
    }
}

#[test]
fn each_rank_decodes_its_own_requests() {
    let decoders = start_ranks(&EngineConfig::decode(), 2);
    let encoder = Engine::start(EngineConfig::encoder(), 0).unwrap();
    let prefill = Engine::start(EngineConfig::prefill(), 0).unwrap();
    let sidecar = Sidecar::launch(&Launch {
        args: &["--ec-connector=ec-nixl", "--data-parallel-size=2"],
        decoder_port: decoders[0].port(),
        ranks: 2,
        ..Launch::default()
    });
    let (line, target) = (encoder.host_port(), prefill.host_port());
    for rank in [0_u16, 1] {
        for split in [false, true] {
            decoders.iter().for_each(Engine::clear);
            let mut headers = vec![(ENCODERS, line.as_str())];
            if split {
                headers.push((PREFILLER, &target));
            }
            let mut client = sidecar.connect_to(rank);
            let body = chat(&[image(1)], true);
            client
                .ask("POST", CHAT, &headers, body.as_bytes())
                .expect(200);
            let counts: Vec<usize> = decoders.iter().map(|d| d.requests().len()).collect();
            let want = [usize::from(rank == 0), usize::from(rank == 1)];
            assert_eq!(counts, want, "rank {rank}, split {split}");
        }
    }
    // The older header field selects the rank, too.
    decoders.iter().for_each(Engine::clear);
    let named = format!(":{}", sidecar.port + 1);
    let headers = [
        (ENCODERS, line.as_str()),
        ("x-data-parallel-host-port", named.as_str()),
    ];
    let body = chat(&[image(1)], true);
    sidecar.post(CHAT, &body, &headers).expect(200);
    only(&decoders[1]);
}

#[test]
fn encoders_may_be_named_in_several_header_fields() {
    let stage = Stage::start(2, NIXL, KvContract::Nixlv2);
    let hosts: Vec<String> = stage.encoders.iter().map(Engine::host_port).collect();
    let mut headers = HEADERS.to_vec();
    headers.extend(hosts.iter().map(|host| (ENCODERS, host.as_str())));
    let body = chat(&[image(1), image(2)], true);
    stage.pair.sidecar.post(CHAT, &body, &headers).expect(200);
    let counts: Vec<usize> = stage.encoded().iter().map(Vec::len).collect();
    assert_eq!(counts, [1, 1]);
}

#[test]
fn a_body_that_is_not_an_object_is_rejected() {
    let stage = Stage::start(1, NIXL, KvContract::Nixlv2);
    for body in ["null", "[]", "{", "{}x", "17"] {
        stage.ask(body, false).expect_error(400, "bad_json");
    }
    assert!(stage.pair.decode.requests().is_empty());
}

/// A request with many items opens a bounded number of connections to an encoder.
#[test]
fn calls_to_encoders_are_limited_per_request() {
    const CALLS_MAX: usize = 32;
    const ITEMS: usize = 100;
    let stage = Stage::start(1, EXAMPLE, KvContract::default());
    let encoder = &stage.encoders[0];
    let parts: Vec<_> = (0..ITEMS).map(image).collect();
    // The first items are held up, so no call of another item may begin.
    encoder.fault(Fault::StallBeforeHead, u32::try_from(CALLS_MAX).unwrap());
    let client = stage.begin(CHAT, &chat(&parts, false), false);
    encoder
        .wait_for(DEADLINE, |log| log.len() == CALLS_MAX)
        .unwrap();
    assert_eq!(crate::harness::connections(encoder), CALLS_MAX);
    drop(client);
    wait_aborted(encoder);
    assert_eq!(stage.ask_on(CHAT, &chat(&parts, false), false).status, 200);
    let all = |log: &[Seen]| log.len() == CALLS_MAX + ITEMS;
    encoder.wait_for(DEADLINE, all).unwrap();
    assert!(crate::harness::connections(encoder) <= 2 * CALLS_MAX);
}
