//! The tracing configuration.

use std::time::Duration;

/// OpenTelemetry tracing settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracingConfig {
    /// Destination of the spans.
    pub exporter: TraceExporter,
    /// Number of traces recorded per million requests whose caller sends no sampling decision. A
    /// caller's decision takes precedence.
    pub recorded_per_million: u32,
    /// The resource attribute `service.name`.
    pub service_name: String,
    /// Names and values of the resource attributes other than `service.name`, in the order given.
    pub resource: Vec<(String, String)>,
}

/// Destination of spans.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TraceExporter {
    /// Standard output, one JSON line per span.
    Console,
    /// An OTLP collector.
    Otlp(OtlpConfig),
}

/// Settings of an OTLP collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpConfig {
    /// Transport protocol.
    pub protocol: OtlpProtocol,
    /// URL, `http://` or `https://`. For `HttpProtobuf` it includes the path.
    pub endpoint: String,
    /// Header fields sent with every export.
    pub headers: Vec<(String, String)>,
    /// Time limit of one export to the collector.
    pub timeout: Duration,
}

/// The transport protocol of an OTLP collector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtlpProtocol {
    /// gRPC.
    Grpc,
    /// HTTP with Protocol Buffers bodies.
    HttpProtobuf,
}
