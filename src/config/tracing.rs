//! Where spans go.

use std::time::Duration;

/// OpenTelemetry tracing; its absence costs nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracingConfig {
    /// Where spans are sent.
    pub exporter: TraceExporter,
    /// New traces that are recorded, of each million; a caller's decision goes before it.
    pub recorded_per_million: u32,
    /// `service.name`.
    pub service_name: String,
    /// Further attributes of the resource, in the order given.
    pub resource: Vec<(String, String)>,
}

/// Where spans are sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TraceExporter {
    /// To standard output, a JSON line each.
    Console,
    /// To a collector.
    Otlp(OtlpConfig),
}

/// An OTLP collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpConfig {
    /// What it speaks.
    pub protocol: OtlpProtocol,
    /// Its URL, `http://` or `https://`; for HTTP the whole one, with its path.
    pub endpoint: String,
    /// Fields sent with every export.
    pub headers: Vec<(String, String)>,
    /// Bound of one export.
    pub timeout: Duration,
}

/// What a collector speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtlpProtocol {
    /// gRPC.
    Grpc,
    /// HTTP with protocol buffers.
    HttpProtobuf,
}
