//! Client of an OTLP collector, over gRPC or HTTP.
//!
//! The messages and the gRPC client are generated from OpenTelemetry's definitions. One request is
//! in flight at a time, with the configured timeout. Requests are never retried.

use std::str::FromStr;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_client::TraceServiceClient;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value as AnyKind;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span as ProtoSpan, Status};
use prost::Message;
use tonic::metadata::MetadataMap;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use crate::config::{OtlpConfig, OtlpProtocol, TracingConfig};
use crate::trace::{Span, Value};

/// Size limit in bytes of a collector's response body over HTTP: a message about rejected spans, or
/// an error.
const RESPONSE_BYTES_MAX: usize = 64 * 1024;
/// The `trace-flags` of exported spans: the sampled flag.
const SAMPLED: u32 = 1;

/// Client of one OTLP collector, with the header fields and the resource attributes that are sent
/// with every export.
pub(super) struct Collector {
    way: Transport,
    headers: HeaderMap,
    timeout: Duration,
    resource: Resource,
}

enum Transport {
    Grpc(TraceServiceClient<Channel>),
    Http(Uri, Client<HttpConnector, Body>),
    Https(Uri, Client<HttpsConnector<HttpConnector>, Body>),
}

impl Collector {
    /// Creates a client without connecting; the collector need not be running yet. Must be called
    /// inside a runtime.
    ///
    /// # Errors
    /// Returns a message if the configuration is invalid.
    pub(super) fn new(config: &TracingConfig, collector: &OtlpConfig) -> Result<Self, String> {
        let way = match collector.protocol {
            OtlpProtocol::Grpc => Transport::Grpc(grpc(collector)?),
            OtlpProtocol::HttpProtobuf => http(collector)?,
        };
        Ok(Self {
            way,
            headers: headers(&collector.headers)?,
            timeout: collector.timeout,
            resource: resource(config),
        })
    }

    /// Sends spans and returns how many of them the collector rejected.
    ///
    /// # Errors
    /// Returns the reason if the whole export failed.
    pub(super) async fn send(&mut self, spans: &[Span]) -> Result<u64, String> {
        let message = self.message(spans);
        let headers = self.headers.clone();
        let response = async {
            match &mut self.way {
                Transport::Grpc(client) => {
                    let metadata = MetadataMap::from_headers(headers);
                    let request = tonic::Request::from_parts(metadata, Default::default(), message);
                    let response = client.export(request).await;
                    Ok(response.map_err(|status| refusal(&status))?.into_inner())
                }
                Transport::Http(uri, client) => post(client, uri, headers, &message).await,
                Transport::Https(uri, client) => post(client, uri, headers, &message).await,
            }
        };
        let response = match tokio::time::timeout(self.timeout, response).await {
            Ok(response) => response?,
            Err(_) => return Err(format!("no response within {:?}", self.timeout)),
        };
        let refused = response
            .partial_success
            .map_or(0, |some| some.rejected_spans);
        Ok(u64::try_from(refused).unwrap_or(0))
    }

    fn message(&self, spans: &[Span]) -> ExportTraceServiceRequest {
        let scope = InstrumentationScope {
            name: env!("CARGO_PKG_NAME").to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..InstrumentationScope::default()
        };
        ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(self.resource.clone()),
                scope_spans: vec![ScopeSpans {
                    scope: Some(scope),
                    spans: spans.iter().map(proto).collect(),
                    ..ScopeSpans::default()
                }],
                ..ResourceSpans::default()
            }],
        }
    }
}

fn grpc(collector: &OtlpConfig) -> Result<TraceServiceClient<Channel>, String> {
    let endpoint = Endpoint::from_shared(collector.endpoint.clone());
    let mut endpoint = endpoint
        .map_err(|error| bad_endpoint(collector, &error))?
        .connect_timeout(collector.timeout);
    if collector.endpoint.starts_with("https:") {
        let tls = ClientTlsConfig::new().with_native_roots();
        let with_tls = endpoint.tls_config(tls);
        endpoint = with_tls.map_err(|error| bad_endpoint(collector, &error))?;
    }
    Ok(TraceServiceClient::new(endpoint.connect_lazy()))
}

fn http(collector: &OtlpConfig) -> Result<Transport, String> {
    let uri = Uri::from_str(&collector.endpoint);
    let uri = uri.map_err(|error| bad_endpoint(collector, &error))?;
    if collector.endpoint.starts_with("https:") {
        let roots = HttpsConnectorBuilder::new().with_native_roots();
        let roots = roots.map_err(|error| bad_endpoint(collector, &error))?;
        let connector = roots.https_only().enable_http1().build();
        let client = Client::builder(TokioExecutor::new()).build(connector);
        return Ok(Transport::Https(uri, client));
    }
    let client = Client::builder(TokioExecutor::new()).build_http();
    Ok(Transport::Http(uri, client))
}

fn bad_endpoint(collector: &OtlpConfig, error: &dyn std::error::Error) -> String {
    format!("OTLP endpoint `{}`: {error}", collector.endpoint)
}

/// Returns the header fields that are sent with every export. Fails if a name or value is not valid
/// in a header field. Values may be secret and are never included in messages.
fn headers(pairs: &[(String, String)]) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for (name, value) in pairs {
        let pair = (HeaderName::from_str(name), HeaderValue::from_str(value));
        let (Ok(name), Ok(mut value)) = pair else {
            return Err(format!(
                "OTEL_EXPORTER_OTLP_HEADERS: `{name}` or its value is not a valid header field"
            ));
        };
        value.set_sensitive(true);
        headers.append(name, value);
    }
    Ok(headers)
}

async fn post<C>(
    client: &Client<C, Body>,
    uri: &Uri,
    headers: HeaderMap,
    message: &ExportTraceServiceRequest,
) -> Result<ExportTraceServiceResponse, String>
where
    C: hyper_util::client::legacy::connect::Connect + Clone + Send + Sync + 'static,
{
    let mut request = Request::post(uri.clone())
        .body(Body::from(message.encode_to_vec()))
        .map_err(|error| error.to_string())?;
    *request.headers_mut() = headers;
    let protobuf = HeaderValue::from_static("application/x-protobuf");
    request.headers_mut().insert(CONTENT_TYPE, protobuf);
    let response = client.request(request).await;
    let response = response.map_err(|error| with_causes(&error))?;
    let status = response.status();
    // Read the body even on failure, so that the connection can be reused.
    let body = to_bytes(Body::new(response.into_body()), RESPONSE_BYTES_MAX).await;
    if !status.is_success() {
        return Err(format!("the collector responded {status}"));
    }
    let body = body.map_err(|error| error.to_string())?;
    // The status is a success: the spans were accepted even if the body cannot be decoded.
    Ok(ExportTraceServiceResponse::decode(body).unwrap_or_default())
}

/// Formats a gRPC status with its causes. A failed connection attempt also results in a status.
fn refusal(status: &tonic::Status) -> String {
    let cause = std::error::Error::source(status).map(with_causes);
    let cause = cause.map_or_else(String::new, |cause| format!(": {cause}"));
    format!("{:?}: {}{cause}", status.code(), status.message())
}

/// Formats an error with its causes: the outermost error alone does not name the cause.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut story = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        story = format!("{story}: {error}");
        cause = error.source();
    }
    story
}

fn resource(config: &TracingConfig) -> Resource {
    let own = [
        ("service.name", config.service_name.as_str()),
        ("telemetry.sdk.language", "rust"),
        ("telemetry.sdk.name", env!("CARGO_PKG_NAME")),
        ("telemetry.sdk.version", env!("CARGO_PKG_VERSION")),
    ];
    let further = config
        .resource
        .iter()
        .map(|(name, value)| (&**name, &**value));
    let attribute = |(name, value): (&str, &str)| key_value(name, text(value));
    Resource {
        attributes: own.into_iter().chain(further).map(attribute).collect(),
        ..Resource::default()
    }
}

fn proto(span: &Span) -> ProtoSpan {
    let status = span.error.map(|error| Status {
        message: error.to_owned(),
        code: StatusCode::Error.into(),
    });
    let attributes = span.attributes.iter();
    ProtoSpan {
        trace_id: span.trace_id.to_be_bytes().to_vec(),
        span_id: span.span_id.to_be_bytes().to_vec(),
        parent_span_id: if span.parent_id == 0 {
            Vec::new()
        } else {
            span.parent_id.to_be_bytes().to_vec()
        },
        flags: SAMPLED,
        name: span.name.clone().into_owned(),
        kind: span.kind as i32,
        start_time_unix_nano: span.begun_ns,
        end_time_unix_nano: span.ended_ns,
        attributes: attributes
            .map(|(name, value)| key_value(name, any(value)))
            .collect(),
        status,
        ..ProtoSpan::default()
    }
}

fn any(value: &Value) -> AnyKind {
    match value {
        Value::Text(value) => text(value),
        Value::Count(number) => AnyKind::IntValue(i64::try_from(*number).unwrap_or(i64::MAX)),
        // Exact up to 285,000 years.
        Value::Millis(millis) => AnyKind::DoubleValue(*millis as f64),
        Value::Flag(flag) => AnyKind::BoolValue(*flag),
    }
}

fn text(text: &str) -> AnyKind {
    AnyKind::StringValue(text.to_owned())
}

fn key_value(key: &str, value: AnyKind) -> KeyValue {
    KeyValue {
        key: key.to_owned(),
        value: Some(AnyValue { value: Some(value) }),
        ..KeyValue::default()
    }
}
