//! Tracing: the trace context that engines receive, the exported spans, and the request counters.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use crate::client::Response;
use crate::harness::{CHAT, Launch, PREFILLER, Sidecar, VERSIONS_OFF, wait_for};
use crate::harness_more::RawEngine;

pub(crate) const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
pub(crate) const CALLER: &str = "b7ad6b7169203331";
const ALL: &[(&str, &str)] = &[("OTEL_TRACES_SAMPLER", "parentbased_always_on")];
pub(crate) const BODY: &str =
    r#"{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":4,"stream":false}"#;

/// Returns a response that is valid for every leg of every connector.
fn response_of(finish_reason: &str) -> String {
    let body = json!({
        "id": "x", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{
            "index": 0,
            "message": {"role": "assistant", "content": "ok"},
            "finish_reason": finish_reason,
        }],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        "kv_transfer_params": {
            "do_remote_prefill": true, "do_remote_decode": false, "remote_block_ids": [[1]],
            "remote_engine_id": "e", "remote_host": "127.0.0.1", "remote_port": 1,
        },
        "remote_block_ids": [1], "remote_engine_id": "e", "remote_host": "h", "remote_port": 1,
        "ec_transfer_params": {"h": {}},
    });
    with_length("200 OK", &body.to_string())
}

pub(crate) fn with_length(status: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

/// Heads of the requests that an engine has received.
type Heads = Arc<Mutex<Vec<String>>>;

/// Starts an engine that responds with the text that `response` returns for the head and the body
/// of a request. An empty text closes the connection. Also returns the list to which the heads of
/// all requests are added.
fn engine(response: impl Fn(&str, &str) -> String + Send + Sync + 'static) -> (RawEngine, Heads) {
    let heads = Heads::default();
    let log = Arc::clone(&heads);
    let engine = RawEngine::start(move |mut conn, _| {
        while let Some((head, body)) = conn.request() {
            let response = response(&head, &String::from_utf8_lossy(&body));
            log.lock().unwrap().push(head);
            if response.is_empty() || !conn.say(&response) {
                return;
            }
        }
    });
    (engine, heads)
}

fn plain_engine() -> (RawEngine, Heads) {
    engine(|head, _| {
        if head.starts_with("GET /query") {
            return with_length("200 OK", r#"{"0":{"engine_id":"e0"}}"#);
        }
        response_of("length")
    })
}

/// Returns the values of all header fields `name` in a request head, in order.
fn values<'a>(head: &'a str, name: &str) -> Vec<&'a str> {
    let fields = head
        .lines()
        .skip(1)
        .filter_map(|line| line.split_once(": "));
    fields
        .filter(|(own, _)| own.eq_ignore_ascii_case(name))
        .map(|(_, value)| value)
        .collect()
}

/// Returns the trace ID, the parent span ID and the flags of the `traceparent` in a request head.
fn trace_context(head: &str) -> (String, String, String) {
    let values = values(head, "traceparent");
    let [value] = values[..] else {
        panic!("{values:?} in {head}");
    };
    assert_eq!(value.len(), 55, "{value}");
    let parts: Vec<_> = value.split('-').map(str::to_owned).collect();
    assert_eq!(parts[0], "00");
    (parts[1].clone(), parts[2].clone(), parts[3].clone())
}

/// A sidecar between two engines. It writes its spans to a file.
pub(crate) struct Stage {
    prefill: RawEngine,
    prefill_heads: Heads,
    _decode: RawEngine,
    decode_heads: Heads,
    pub(crate) sidecar: Sidecar,
    file: PathBuf,
}

impl Stage {
    pub(crate) fn new(args: &[&str], env: &[(&str, &str)]) -> Self {
        Self::with(args, env, plain_engine(), plain_engine())
    }

    fn with(
        args: &[&str],
        env: &[(&str, &str)],
        (prefill, prefill_heads): (RawEngine, Heads),
        (decode, decode_heads): (RawEngine, Heads),
    ) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let nth = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ringside-spans-{}-{nth}", std::process::id());
        let file = std::env::temp_dir().join(name);
        let sidecar = Sidecar::launch(&Launch {
            args: &[&["--tracing", VERSIONS_OFF], args].concat(),
            env,
            decoder_port: decode.port(),
            stdout: Some(&file),
            ..Launch::default()
        });
        Self {
            prefill,
            prefill_heads,
            _decode: decode,
            decode_heads,
            sidecar,
            file,
        }
    }

    fn prefill_target(&self) -> String {
        format!("127.0.0.1:{}", self.prefill.port())
    }

    /// Sends a request with a trace context, and with the prefill target in the field `routing`.
    pub(crate) fn ask(&self, routing: &str, body: &str) -> Response {
        let parent = format!("00-{TRACE}-{CALLER}-01");
        let target = self.prefill_target();
        let headers = [
            ("traceparent", parent.as_str()),
            ("tracestate", "a=1,b=2"),
            ("baggage", "user=7"),
            (routing, &target),
        ];
        self.sidecar.post(CHAT, body, &headers)
    }

    /// Waits until `count` spans have been written; fails if there are more.
    fn spans(&self, count: usize) -> Spans {
        let spans = wait_for("the spans", || {
            let text = std::fs::read_to_string(&self.file).unwrap();
            let whole = text.lines().filter(|line| line.ends_with('}'));
            let spans: Vec<Value> = whole.map(|l| serde_json::from_str(l).unwrap()).collect();
            (spans.len() >= count).then_some(spans)
        });
        assert_eq!(spans.len(), count, "{spans:#?}");
        Spans(spans)
    }

    fn heads(&self) -> (Vec<String>, Vec<String>) {
        let clone = |heads: &Heads| heads.lock().unwrap().clone();
        (clone(&self.prefill_heads), clone(&self.decode_heads))
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

struct Spans(Vec<Value>);

impl Spans {
    /// Returns the only span with that name.
    #[track_caller]
    fn one(&self, name: &str) -> &Value {
        let named = self.named(name);
        assert_eq!(named.len(), 1, "{name}: {:#?}", self.0);
        named[0]
    }

    fn named(&self, name: &str) -> Vec<&Value> {
        self.0.iter().filter(|span| span["name"] == name).collect()
    }

    #[track_caller]
    fn by_id(&self, id: &str) -> &Value {
        let mut spans = self.0.iter();
        spans
            .find(|span| span["span_id"] == id)
            .unwrap_or_else(|| panic!("{id} is not among {:#?}", self.0))
    }

    #[track_caller]
    fn expect_parent(&self, child: &Value, parent: &Value) {
        assert_eq!(child["parent_id"], parent["span_id"], "{:#?}", self.0);
    }
}

#[track_caller]
fn expect(span: &Value, attributes: Value) {
    for (name, value) in attributes.as_object().unwrap() {
        let full = match name.split_once('.') {
            Some(("http" | "url" | "server" | "llm_d", _)) => name.clone(),
            _ => format!("llm_d.pd_proxy.{name}"),
        };
        assert_eq!(&span["attributes"][&full], value, "{full} of {span:#}");
    }
}

#[track_caller]
fn expect_numbers(span: &Value, names: &[&str]) {
    for name in names {
        let value = &span["attributes"][format!("llm_d.pd_proxy.{name}")];
        assert!(value.is_u64(), "{name} of {span:#}");
    }
}

const MORI: &[&str] = &[
    "--moriio-write-mode",
    "--moriio-parallel-dispatch",
    "--moriio-local-pod-ip=10.0.0.1",
];

/// A connector with its flags, and properties that determine the shape of its traces.
struct Way {
    connector: &'static str,
    flags: &'static [&'static str],
    /// Whether the names of the prefill and decode phase spans have the prefix `llm_d.pd_proxy.`.
    is_long: bool,
    is_concurrent: bool,
}

const fn way(connector: &'static str, is_long: bool, is_concurrent: bool) -> Way {
    Way {
        connector,
        flags: &[],
        is_long,
        is_concurrent,
    }
}

const WAYS: [Way; 8] = [
    way("nixlv2", false, false),
    Way {
        flags: MORI,
        ..way("nixlv2", true, true)
    },
    way("shared-storage", true, false),
    way("nixl", true, false),
    way("lmcache", true, false),
    way("sglang", false, true),
    way("mooncake", true, false),
    way("offloading", true, false),
];

#[test]
fn t1_the_incoming_trace_reaches_every_leg_of_every_connector() {
    for way in &WAYS {
        let prefill = plain_engine();
        let bootstrap = format!("--mooncake-bootstrap-port={}", prefill.0.port());
        let chosen = format!("--kv-connector={}", way.connector);
        let mut args = vec![chosen.as_str()];
        args.extend(way.flags);
        if way.connector == "mooncake" {
            args.push(&bootstrap);
        }
        let stage = Stage::with(&args, ALL, prefill, plain_engine());
        stage.ask(PREFILLER, BODY).expect(200);
        let spans = stage.spans(6);
        check_tree(way, &stage, &spans);
        check_attributes(way, &stage, &spans);
        check_counts(way, &stage.sidecar);
        stage.sidecar.expect_sound();
    }
}

/// Returns the spans of the prefill phase and the decode phase, in this order.
fn phases<'a>(way: &Way, spans: &'a Spans) -> [&'a Value; 2] {
    let prefix = if way.is_long { "llm_d.pd_proxy." } else { "" };
    ["prefill", "decode"].map(|name| spans.one(&format!("{prefix}{name}")))
}

/// Checks the parent of every span, and that each engine received the span ID of its leg.
fn check_tree(way: &Way, stage: &Stage, spans: &Spans) {
    let connector = way.connector;
    for span in &spans.0 {
        assert_eq!(span["trace_id"], TRACE);
        assert_eq!(span["service"], "llm-d-disagg-sidecar");
        assert_eq!(span["error"], Value::Null, "{connector}: {span:#}");
        let time = |name: &str| span[name].as_u64().unwrap();
        assert!(time("start_unix_ns") <= time("end_unix_ns"));
    }
    let root = spans.one(&format!("llm_d.pd_proxy.POST {CHAT}"));
    let forward = spans.one("forward_request");
    let phases = phases(way, spans);
    assert_eq!(
        (&root["kind"], &forward["kind"]),
        (&json!("server"), &json!("server"))
    );
    assert_eq!(root["parent_id"], CALLER);
    spans.expect_parent(forward, root);
    spans.expect_parent(phases[0], forward);
    // As in pd-sidecar, the decode phase is a child of the prefill phase; existing dashboards
    // expect that.
    spans.expect_parent(phases[1], phases[0]);
    let (mut prefill, decode) = stage.heads();
    prefill.retain(|head| head.starts_with("POST"));
    assert_eq!((prefill.len(), decode.len()), (1, 1), "{connector}");
    for (head, phase) in [(&prefill[0], phases[0]), (&decode[0], phases[1])] {
        assert_eq!(values(head, "tracestate"), ["a=1,b=2"]);
        assert_eq!(values(head, "baggage"), ["user=7"]);
        let (trace, id, flags) = trace_context(head);
        assert_eq!((&*trace, &*flags), (TRACE, "01"), "{connector}");
        let leg = spans.by_id(&id);
        let name_and_kind = (&leg["name"], &leg["kind"]);
        assert_eq!(name_and_kind, (&json!("HTTP POST"), &json!("client")));
        spans.expect_parent(leg, phase);
        expect(leg, json!({"http.response.status_code": 200}));
    }
}

fn check_attributes(way: &Way, stage: &Stage, spans: &Spans) {
    let connector = way.connector;
    let root = spans.one(&format!("llm_d.pd_proxy.POST {CHAT}"));
    expect(
        root,
        json!({"http.response.status_code": 200, "url.path": CHAT}),
    );
    let forward = spans.one("forward_request");
    expect(
        forward,
        json!({
            "connector": connector, "kv_connector": connector, "request_path": CHAT,
            "llm_d.openai.api": "chat_completions", "disaggregation_used": true,
            "prefill_target": stage.prefill_target(), "prefill_candidates": 1,
            "outcome": "remote", "reason": null, "error": null,
        }),
    );
    let [prefill, decode] = phases(way, spans);
    expect(
        prefill,
        json!({
            "connector": connector, "prefill_target": stage.prefill_target(),
            "prefill.status_code": 200, "prefill.async": way.is_concurrent.then_some(true),
        }),
    );
    expect_numbers(prefill, &["prefill.duration_ms"]);
    expect(
        decode,
        json!({
            "connector": connector, "decode.streaming": false, "decode.data_parallel": false,
            "concurrent_pd": way.is_concurrent,
            "decode.concurrent_with_prefill": way.is_concurrent.then_some(true),
        }),
    );
    let durations = [
        "decode.duration_ms",
        "decode_duration_ms",
        "total_duration_ms",
        "true_ttft_ms",
    ];
    expect_numbers(decode, &durations);
    if !way.is_concurrent {
        expect_numbers(decode, &["prefill_duration_ms", "coordinator_overhead_ms"]);
    }
    let is_dispatch = way.flags == MORI;
    for span in [forward, prefill, decode] {
        expect(
            span,
            json!({"parallel_dispatch": is_dispatch.then_some(true)}),
        );
    }
    if is_dispatch {
        expect_numbers(forward, &["parallel_window_ms", "total_duration_ms"]);
    }
}

/// Checks that the request and each leg were counted exactly once.
fn check_counts(way: &Way, sidecar: &Sidecar) {
    sidecar.wait_outcome("remote", "none");
    let all = sidecar.metric("ringside_pd_requests_total", &[]);
    assert!((all - 1.0).abs() < 1e-9, "{}: {all}", way.connector);
    let asks = way.connector == "mooncake";
    let legs = [("prefill", true), ("decode", true), ("bootstrap", asks)];
    for (leg, has_run) in legs {
        let count = sidecar.metric("ringside_leg_duration_seconds_count", &[("leg", leg)]);
        let want = f64::from(u8::from(has_run));
        assert!(
            (count - want).abs() < 1e-9,
            "{}: {count} {leg} legs",
            way.connector
        );
    }
}

#[test]
fn encoders_receive_the_trace_context() {
    let (encoder, heads) = plain_engine();
    let stage = Stage::new(&["--ec-connector=ec-nixl"], ALL);
    let encoder_target = format!("127.0.0.1:{}", encoder.port());
    let body = r#"{"model":"m","max_tokens":4,"messages":[{"role":"user","content":[
        {"type":"image_url","image_url":{"url":"http://i/1"}},
        {"type":"image_url","image_url":{"url":"http://i/2"}}]}]}"#;
    let parent = format!("00-{TRACE}-{CALLER}-01");
    let target = stage.prefill_target();
    let headers = [
        ("traceparent", parent.as_str()),
        ("tracestate", "a=1"),
        ("baggage", "user=7"),
        ("x-encoder-hosts-ports", &encoder_target),
        (PREFILLER, &target),
    ];
    stage.sidecar.post(CHAT, body, &headers).expect(200);
    let spans = stage.spans(8);
    let forward = spans.one("forward_request");
    expect(
        forward,
        json!({
            "ec_connector": "ec-nixl", "llm_d.ec_proxy.encode_disaggregation_used": true,
            "llm_d.ec_proxy.encoder_count": 1, "llm_d.ec_proxy.encoder_candidates": 1,
        }),
    );
    let heads = heads.lock().unwrap().clone();
    assert_eq!(heads.len(), 2);
    for head in heads {
        let (trace, id, _) = trace_context(&head);
        assert_eq!(trace, TRACE);
        assert_eq!(values(&head, "tracestate"), ["a=1"]);
        assert_eq!(values(&head, "baggage"), ["user=7"]);
        spans.expect_parent(spans.by_id(&id), forward);
    }
    stage.sidecar.wait_outcome("remote", "none");
    let encode = [("leg", "encode")];
    let legs = stage
        .sidecar
        .metric("ringside_leg_duration_seconds_count", &encode);
    assert!((legs - 2.0).abs() < 1e-9);
}

#[test]
fn denied_targets_are_recorded_in_the_span() {
    let args = [
        "--enable-ssrf-protection",
        "--allow-target=10.9.9.9",
        "--ec-connector=ec-example",
    ];
    let stage = Stage::new(&args, ALL);
    let target = stage.prefill_target();
    let encoders = [("x-encoder-hosts-ports", "10.0.0.1:1,10.0.0.2:1")];
    let named = [(PREFILLER, target.as_str())];
    stage.sidecar.post(CHAT, BODY, &named).expect(403);
    stage.sidecar.post(CHAT, BODY, &encoders).expect(200);
    let spans = stage.spans(5);
    let forwards = spans.named("forward_request");
    expect(
        forwards[0],
        json!({
            "error": "ssrf_protection_denied", "denied_target": target, "outcome": "failed",
            "reason": "target_denied",
        }),
    );
    expect(
        forwards[1],
        json!({
            "llm_d.ec_proxy.encode_disaggregation_used": false,
            "llm_d.ec_proxy.encoder_allowed": 0, "llm_d.ec_proxy.encoder_candidates": 2,
        }),
    );
}

#[test]
fn decode_chunks_are_children_of_one_span() {
    let chunks = |_: &str, body: &str| {
        // Two chunks of two tokens.
        response_of(if body.contains("continue_final_message") {
            "stop"
        } else {
            "length"
        })
    };
    let body = BODY.replace("\"max_tokens\":4", "\"max_tokens\":8");
    for is_split in [false, true] {
        let args = ["--decode-chunk-size=2"];
        let stage = Stage::with(&args, ALL, plain_engine(), engine(chunks));
        let routing = if is_split { PREFILLER } else { "x-nobody" };
        stage.ask(routing, &body).expect(200);
        let spans = stage.spans(if is_split { 8 } else { 5 });
        let chunked = spans.one("chunked_decode");
        let parent = if is_split {
            "decode"
        } else {
            "forward_request"
        };
        spans.expect_parent(chunked, spans.one(parent));
        expect(
            chunked,
            json!({
                "chunked_decode.chunk_size": 2, "chunked_decode.streaming": false,
                "chunked_decode.chunks": 2, "chunked_decode.total_tokens": 4,
            }),
        );
        expect_numbers(chunked, &["chunked_decode.duration_ms"]);
        let (_, decode) = stage.heads();
        assert_eq!(decode.len(), 2);
        for head in &decode {
            let (trace, id, _) = trace_context(head);
            assert_eq!(trace, TRACE);
            spans.expect_parent(spans.by_id(&id), chunked);
        }
    }
}

#[test]
fn decode_only_requests_have_three_spans_and_pass_through_requests_two() {
    let stage = Stage::new(&[], ALL);
    stage.ask("x-nobody", BODY).expect(200);
    let spans = stage.spans(3);
    let forward = spans.one("forward_request");
    expect(
        forward,
        json!({
            "disaggregation_used": false, "outcome": "local_policy", "reason": "no_prefill_header",
        }),
    );
    let (_, decode) = stage.heads();
    let leg = spans.by_id(&trace_context(&decode[0]).1);
    spans.expect_parent(leg, forward);
    expect(leg, json!({"http.response.status_code": 200}));

    // A pass-through request without a `traceparent` starts a new trace.
    stage
        .sidecar
        .get("/v1/models?x=1", &[("tracestate", "a=1")])
        .expect(200);
    let spans = stage.spans(5);
    let root = spans.one("llm_d.pd_proxy.GET /v1/models");
    assert_eq!(root["parent_id"], Value::Null);
    let (_, decode) = stage.heads();
    let (trace, id, flags) = trace_context(&decode[1]);
    assert_eq!(
        (json!(trace), flags.as_str()),
        (root["trace_id"].clone(), "01")
    );
    assert_ne!(root["trace_id"], TRACE);
    assert!(values(&decode[1], "tracestate").is_empty(), "{}", decode[1]);
    let leg = spans.one("HTTP GET");
    assert_eq!(leg["span_id"], id);
    spans.expect_parent(leg, root);
}

#[test]
fn the_parents_sampling_decision_takes_precedence_over_the_sampler() {
    let none: &[(&str, &str)] = &[("OTEL_TRACES_SAMPLER_ARG", "0")];
    let sampled = format!("00-{TRACE}-{CALLER}-01");
    let not_sampled = format!("00-{TRACE}-{CALLER}-00");
    // Sampler, incoming `traceparent`, whether spans are recorded.
    let cases = [
        (ALL, Some(&*not_sampled), false),
        (none, Some(&*sampled), true),
        (none, None, false),
        (ALL, None, true),
    ];
    for (sampler, parent, is_recorded) in cases {
        let stage = Stage::new(&[], sampler);
        let target = stage.prefill_target();
        let mut headers = vec![(PREFILLER, target.as_str())];
        headers.extend(parent.map(|parent| ("traceparent", parent)));
        stage.sidecar.post(CHAT, BODY, &headers).expect(200);
        let (prefill, decode) = stage.heads();
        let legs = [trace_context(&prefill[0]), trace_context(&decode[0])];
        assert_eq!(legs[0].0, legs[1].0);
        if parent.is_some() {
            assert_eq!(legs[0].0, TRACE);
        }
        let flags = if is_recorded { "01" } else { "00" };
        assert!(legs.iter().all(|leg| leg.2 == flags), "{legs:?}");
        if is_recorded {
            stage.spans(6);
        } else {
            // Recorded spans are written before the process exits.
            let mut stage = stage;
            stage.sidecar.terminate();
            assert!(stage.sidecar.wait_exit().success());
            stage.spans(0);
        }
    }
}

#[test]
fn a_malformed_traceparent_starts_a_new_trace() {
    let stage = Stage::new(&[], ALL);
    let good = format!("00-{TRACE}-{CALLER}-01");
    let bad = [
        vec!["ff-".to_owned() + &good[3..]],
        vec![good.to_uppercase()],
        vec![good.replace(TRACE, &"0".repeat(32))],
        vec![format!("{good}-more")],
        vec![good.clone(), good.clone()],
        vec![String::new()],
    ];
    for (nth, parents) in bad.iter().enumerate() {
        let mut headers: Vec<_> = parents
            .iter()
            .map(|p| ("traceparent", p.as_str()))
            .collect();
        headers.extend([("tracestate", "a=1"), ("baggage", "b=2")]);
        stage.sidecar.post(CHAT, BODY, &headers).expect(200);
        let (_, decode) = stage.heads();
        let (trace, ..) = trace_context(&decode[nth]);
        assert_ne!(trace, TRACE, "{parents:?}");
        assert!(values(&decode[nth], "tracestate").is_empty());
        assert_eq!(values(&decode[nth], "baggage"), ["b=2"]);
    }
    let spans = stage.spans(3 * bad.len());
    let roots = spans.named(&format!("llm_d.pd_proxy.POST {CHAT}"));
    assert!(roots.iter().all(|root| root["parent_id"] == Value::Null));
}

#[test]
fn trace_fields_pass_unmodified_without_tracing() {
    let (engine, heads) = plain_engine();
    let sidecar = Sidecar::start(&[VERSIONS_OFF], engine.port());
    let odd = "FF-not-a-traceparent";
    let fields = [
        ("traceparent", odd),
        ("tracestate", "a=1"),
        ("baggage", "b=2"),
    ];
    sidecar.post(CHAT, BODY, &fields).expect(200);
    sidecar.post(CHAT, BODY, &[]).expect(200);
    let heads = heads.lock().unwrap().clone();
    for (name, value) in fields {
        assert_eq!(values(&heads[0], name), [value]);
        assert!(values(&heads[1], name).is_empty());
    }
    let page = sidecar.admin("/metrics").unwrap().text();
    assert!(!page.contains("ringside_trace"));
}

#[test]
fn failures_are_recorded_on_the_spans_that_failed() {
    // A prefill engine that returns an error, which is relayed to the client.
    let failing = engine(|_, _| with_length("500 Oops", "{}"));
    let stage = Stage::with(&[], ALL, failing, plain_engine());
    stage.ask(PREFILLER, BODY).expect(500);
    let spans = stage.spans(4);
    let prefill = spans.one("prefill");
    assert_eq!(prefill["error"], "prefill request failed");
    expect(prefill, json!({"prefill.status_code": 500}));
    let leg = spans.one("HTTP POST");
    assert_eq!(leg["error"], "status");
    let forward = spans.one("forward_request");
    expect(
        forward,
        json!({"outcome": "failed", "reason": "prefill_status", "error": "prefill_status"}),
    );
    assert_eq!(forward["error"], "prefill_status");

    // A decoder that closes the connection without a response.
    let gone = engine(|_, _| String::new());
    let stage = Stage::with(&[], ALL, plain_engine(), gone);
    stage.ask(PREFILLER, BODY).expect(502);
    let spans = stage.spans(6);
    assert_eq!(spans.one("prefill")["error"], Value::Null);
    let legs = spans.named("HTTP POST");
    let errors: Vec<_> = legs.iter().map(|leg| &leg["error"]).collect();
    assert!(errors.contains(&&json!("decode_reset")), "{errors:?}");
    let root = spans.one(&format!("llm_d.pd_proxy.POST {CHAT}"));
    for span in [root, spans.one("forward_request"), spans.one("decode")] {
        assert_eq!(span["error"], "decode_reset");
    }
    expect(root, json!({"http.response.status_code": 502}));

    // A prefill target that is not an address.
    let headers = [(PREFILLER, "not a host")];
    stage.sidecar.post(CHAT, BODY, &headers);
    let spans = stage.spans(8);
    let forwards = spans.named("forward_request");
    expect(
        forwards[1],
        json!({"outcome": "failed", "reason": "bad_target"}),
    );
}

#[test]
fn every_prefill_attempt_is_a_child_of_one_prefill_span() {
    let turns = AtomicU32::new(0);
    let moody = engine(move |_, _| match turns.fetch_add(1, Ordering::Relaxed) {
        0 => with_length("503 Later", "{}"),
        _ => response_of("stop"),
    });
    let args = ["--prefill-max-retries=1", "--prefill-retry-backoff=1ms"];
    let stage = Stage::with(&args, ALL, moody, plain_engine());
    stage.ask(PREFILLER, BODY).expect(200);
    let spans = stage.spans(7);
    let prefill = spans.one("prefill");
    expect(prefill, json!({"prefill.status_code": 200}));
    assert_eq!(prefill["error"], Value::Null);
    let (heads, _) = stage.heads();
    let ids: Vec<_> = heads.iter().map(|head| trace_context(head).1).collect();
    assert_ne!(ids[0], ids[1]);
    for (id, error) in ids.iter().zip([json!("status"), Value::Null]) {
        let leg = spans.by_id(id);
        spans.expect_parent(leg, prefill);
        assert_eq!(leg["error"], error);
    }
}

#[test]
fn early_rejections_of_generation_requests_are_counted_once() {
    let (engine, _) = plain_engine();
    let sidecar = Sidecar::start(&["--max-body=64", VERSIONS_OFF], engine.port());
    let unknown = [("x-data-parallel-host-port", "10.9.9.9:1")];
    sidecar.post(CHAT, BODY, &[]).expect(413);
    sidecar.post(CHAT, "{}", &unknown).expect(400);
    sidecar.get("/v1/models", &unknown).expect(200);
    let labels = [("outcome", "failed"), ("reason", "client_error")];
    sidecar.wait_metric("ringside_pd_requests_total", &labels, 2.0);
    sidecar.wait_metric("ringside_in_flight", &[], 0.0);
    let all = sidecar.metric("ringside_pd_requests_total", &[]);
    assert!((all - 2.0).abs() < 1e-9, "{all}");
}
