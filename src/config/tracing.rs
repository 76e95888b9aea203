//! The tracing configuration.

use std::time::Duration;

/// OpenTelemetry tracing settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TracingConfig {
    /// Destination of the spans.
    pub exporter: TraceExporter,
    /// Number of traces recorded per million requests without a sampling decision of the caller. A
    /// caller's decision takes precedence.
    pub recorded_per_million: u32,
    /// Value of the resource attribute `service.name`.
    pub service_name: String,
    /// Names and values of the resource attributes other than `service.name`, in the order given.
    pub resource: Vec<(String, String)>,
}

/// Destination of spans.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TraceExporter {
    /// Spans are written to standard output, one JSON line per span.
    Console,
    /// Spans are sent to this OTLP collector.
    Otlp(OtlpConfig),
}

/// Settings of an OTLP collector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtlpConfig {
    /// Transport protocol.
    pub protocol: OtlpProtocol,
    /// URL of the collector, `http://` or `https://`. For `HttpProtobuf` it includes the path.
    pub endpoint: String,
    /// Header fields sent with every export.
    pub headers: Vec<(String, String)>,
    /// Time limit of one export to the collector.
    pub timeout: Duration,
}

/// The transport protocol of an OTLP collector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtlpProtocol {
    /// OTLP over gRPC.
    Grpc,
    /// OTLP over HTTP with Protocol Buffers bodies.
    HttpProtobuf,
}
