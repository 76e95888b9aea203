//! OTLP export: the spans that a collector receives, and the effects of a slow, failing or absent
//! collector.

use std::sync::mpsc::{Receiver, Sender, channel};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTracePartialSuccess, ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use prost::Message;

use crate::client::DEADLINE;
use crate::harness::{CHAT, PREFILLER, free_ports};
use crate::harness_more::RawEngine;
use crate::trace::{BODY, CALLER, Stage, TRACE, with_length};

/// An export as a collector receives it: the header `x-token` and the message.
type Got = (Option<String>, ExportTraceServiceRequest);

/// A gRPC collector that rejects `refuses` spans of each export.
struct Fake {
    got: Sender<Got>,
    refuses: i64,
}

fn response(refuses: i64) -> ExportTraceServiceResponse {
    let refused = ExportTracePartialSuccess {
        rejected_spans: refuses,
        error_message: "full".to_owned(),
    };
    ExportTraceServiceResponse {
        partial_success: (refuses > 0).then_some(refused),
    }
}

#[tonic::async_trait]
impl TraceService for Fake {
    async fn export(
        &self,
        request: tonic::Request<ExportTraceServiceRequest>,
    ) -> Result<tonic::Response<ExportTraceServiceResponse>, tonic::Status> {
        let token = request.metadata().get("x-token");
        let token = token.map(|token| token.to_str().unwrap().to_owned());
        // An error means that the test has stopped receiving.
        let _ = self.got.send((token, request.into_inner()));
        Ok(tonic::Response::new(response(self.refuses)))
    }
}

/// Starts a gRPC collector, which rejects `refuses` spans of each export and runs until the test
/// process exits. Returns its port and the channel on which the test receives these exports.
fn grpc_collector(refuses: i64) -> (u16, Receiver<Got>) {
    let (sender, got) = channel();
    let port = free_ports(1);
    let fake = Fake {
        got: sender,
        refuses,
    };
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let serve = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(fake))
            .serve(([127, 0, 0, 1], port).into());
        runtime.block_on(serve).unwrap();
    });
    crate::harness::wait_for("the collector", || {
        std::net::TcpStream::connect(("127.0.0.1", port)).ok()
    });
    (port, got)
}

fn http_collector(refuses: i64) -> (RawEngine, Receiver<Got>) {
    let (sender, got) = channel();
    let engine = RawEngine::start(move |mut conn, _| {
        while let Some((head, body)) = conn.request() {
            assert!(head.starts_with("POST /v1/traces HTTP/1.1"), "{head}");
            assert!(
                head.to_lowercase()
                    .contains("content-type: application/x-protobuf")
            );
            let token = head.lines().find_map(|line| line.strip_prefix("x-token: "));
            let message = ExportTraceServiceRequest::decode(&*body).unwrap();
            let _ = sender.send((token.map(str::to_owned), message));
            let message = response(refuses).encode_to_vec();
            let text = String::from_utf8(message).unwrap();
            conn.say(&with_length("200 OK", &text));
        }
    });
    (engine, got)
}

fn environment<'a>(protocol: &'a str, endpoint: &'a str) -> Vec<(&'a str, &'a str)> {
    vec![
        ("OTEL_TRACES_SAMPLER", "always_on"),
        ("OTEL_TRACES_EXPORTER", "otlp"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint),
    ]
}

fn attribute<'a>(attributes: &'a [KeyValue], name: &str) -> Option<&'a Value> {
    let found = attributes.iter().find(|attribute| attribute.key == name);
    found?.value.as_ref()?.value.as_ref()
}

fn text(text: &str) -> Option<Value> {
    Some(Value::StringValue(text.to_owned()))
}

/// Receives exports until they contain `count` spans, and returns these spans. Fails if there are
/// more, or if an export lacks the expected `x-token` header or resource attributes.
fn spans(got: &Receiver<Got>, count: usize) -> Vec<Span> {
    let mut spans = Vec::new();
    while spans.len() < count {
        let (token, message) = got.recv_timeout(DEADLINE).unwrap();
        assert_eq!(token.as_deref(), Some("secret"));
        for part in message.resource_spans {
            let attributes = part.resource.unwrap().attributes;
            let names = [("service.name", "mine"), ("zone", "a b")];
            for (name, value) in names {
                assert_eq!(attribute(&attributes, name), text(value).as_ref());
            }
            for scoped in part.scope_spans {
                assert_eq!(scoped.scope.unwrap().name, "ringside");
                spans.extend(scoped.spans);
            }
        }
    }
    assert_eq!(spans.len(), count);
    spans
}

fn check(got: &Receiver<Got>, stage: &Stage) {
    stage.ask(PREFILLER, BODY).expect(200);
    let spans = spans(got, 6);
    let one = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
    let root = one(&format!("llm_d.pd_proxy.POST {CHAT}"));
    let hex = |bytes: &[u8]| -> String { bytes.iter().map(|b| format!("{b:02x}")).collect() };
    assert_eq!(hex(&root.parent_span_id), CALLER);
    for span in &spans {
        assert_eq!(hex(&span.trace_id), TRACE);
        assert_eq!(span.span_id.len(), 8);
        assert!(span.start_time_unix_nano > 0);
        assert!(span.start_time_unix_nano <= span.end_time_unix_nano);
        assert_eq!((&span.status, span.flags & 1), (&None, 1));
    }
    let (forward, prefill, decode) = (one("forward_request"), one("prefill"), one("decode"));
    let kinds = [root, forward, prefill, decode, one("HTTP POST")].map(Span::kind);
    let server = SpanKind::Server;
    let internal = SpanKind::Internal;
    assert_eq!(
        kinds,
        [server, server, internal, internal, SpanKind::Client]
    );
    assert_eq!(decode.parent_span_id, prefill.span_id);
    let of = |span: &Span, name: &str| attribute(&span.attributes, name).cloned();
    assert_eq!(of(forward, "llm_d.pd_proxy.outcome"), text("remote"));
    let used = of(forward, "llm_d.pd_proxy.disaggregation_used");
    assert_eq!(used, Some(Value::BoolValue(true)));
    let code = of(prefill, "llm_d.pd_proxy.prefill.status_code");
    assert_eq!(code, Some(Value::IntValue(200)));
    // Whole milliseconds as a floating-point number, as in pd-sidecar.
    let Some(Value::DoubleValue(millis)) = of(prefill, "llm_d.pd_proxy.prefill.duration_ms") else {
        panic!("{prefill:?}");
    };
    assert!(millis.fract() == 0.0);
}

const OWN: [(&str, &str); 3] = [
    ("OTEL_SERVICE_NAME", "mine"),
    ("OTEL_RESOURCE_ATTRIBUTES", "zone=a%20b"),
    ("OTEL_EXPORTER_OTLP_HEADERS", "x-token=secret"),
];

#[test]
fn spans_are_exported_by_grpc_and_by_http() {
    let (port, got) = grpc_collector(0);
    let endpoint = format!("http://127.0.0.1:{port}");
    let mut env = environment("grpc", &endpoint);
    env.extend(OWN);
    let stage = Stage::new(&[], &env);
    check(&got, &stage);
    stage
        .sidecar
        .wait_metric("ringside_trace_exported_total", &[], 6.0);

    let (collector, got) = http_collector(0);
    let endpoint = format!("http://127.0.0.1:{}", collector.port());
    let mut env = environment("http/protobuf", &endpoint);
    env.extend(OWN);
    let mut stage = Stage::new(&[], &env);
    check(&got, &stage);
    // The connection is reused, and the last spans are exported before the process exits.
    stage.ask(PREFILLER, BODY).expect(200);
    stage.sidecar.terminate();
    assert!(stage.sidecar.wait_exit().success());
    spans(&got, 6);
}

#[test]
fn spans_rejected_by_the_collector_are_counted() {
    let (port, _got) = grpc_collector(2);
    let (collector, _got_too) = http_collector(2);
    for (protocol, port) in [("grpc", port), ("http/protobuf", collector.port())] {
        let endpoint = format!("http://127.0.0.1:{port}");
        let stage = Stage::new(&[], &environment(protocol, &endpoint));
        stage.ask(PREFILLER, BODY).expect(200);
        let failed = [("reason", "export_failed")];
        stage
            .sidecar
            .wait_metric("ringside_trace_dropped_total", &failed, 2.0);
        stage
            .sidecar
            .wait_metric("ringside_trace_exported_total", &[], 4.0);
        stage
            .sidecar
            .wait_stderr("the collector rejected some spans");
    }
}

#[test]
fn a_collector_error_is_logged_with_its_status() {
    let angry = RawEngine::start(|mut conn, _| {
        while conn.request().is_some() && conn.say(&with_length("503 Later", "no")) {}
    });
    let endpoint = format!("http://127.0.0.1:{}", angry.port());
    let stage = Stage::new(&[], &environment("http/protobuf", &endpoint));
    stage.ask(PREFILLER, BODY).expect(200);
    stage.sidecar.wait_stderr("the collector responded 503");
}

#[test]
fn a_stuck_collector_only_causes_dropped_spans() {
    // The collector accepts connections and never responds.
    let stuck = RawEngine::start(|mut conn, _| while conn.request().is_some() {});
    let endpoint = format!("http://127.0.0.1:{}", stuck.port());
    let env = [
        ("OTEL_TRACES_SAMPLER", "always_on"),
        ("OTEL_TRACES_EXPORTER", "otlp"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
    ];
    let mut stage = Stage::new(&["--cores=1"], &env);
    let mut client = stage.sidecar.connect();
    for _ in 0..3000 {
        client.ask("GET", "/health", &[], b"").expect(200);
    }
    let full = [("reason", "ring_full")];
    let lost = stage.sidecar.metric("ringside_trace_dropped_total", &full);
    assert!(lost > 0.0);
    stage.sidecar.expect_sound();
    // The shutdown waits for the collector only briefly.
    drop(client);
    stage.sidecar.terminate();
    assert!(stage.sidecar.wait_exit().success());
    stage
        .sidecar
        .wait_stderr("final span export did not finish");
}

#[test]
fn an_absent_collector_is_logged_once() {
    for protocol in ["grpc", "http/protobuf"] {
        let endpoint = format!("http://127.0.0.1:{}", free_ports(1));
        let env = [
            ("OTEL_TRACES_SAMPLER", "always_on"),
            ("OTEL_TRACES_EXPORTER", "otlp"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", protocol),
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &endpoint),
        ];
        let mut stage = Stage::new(&[], &env);
        for round in 1..=2 {
            stage.ask(PREFILLER, BODY).expect(200);
            let failed = [("reason", "export_failed")];
            let want = f64::from(6 * round);
            stage
                .sidecar
                .wait_metric("ringside_trace_dropped_total", &failed, want);
        }
        let text = stage.sidecar.stderr();
        assert_eq!(text.matches("span export failed").count(), 1, "{text}");
        stage.sidecar.terminate();
        assert!(stage.sidecar.wait_exit().success());
    }
}
