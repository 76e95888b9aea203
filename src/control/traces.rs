//! Exports spans on a separate thread, since a terminal may be slow and a collector unreachable.
//!
//! The shards' rings are the only queue. They fill while an export runs; when a ring is full, its
//! shard drops records and counts them. The spans of a failed export are dropped and counted too.
//! Nothing is sent twice. Warnings are logged at most once per [`TRACE_WARNING_SECS`].

use std::io::{self, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use std::vec;

use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::cli::Exit;
use crate::config::{OtlpConfig, TraceExporter, TracingConfig};
use crate::limits::{
    TRACE_BATCH_SPANS_MAX, TRACE_FLUSH_MS_MAX, TRACE_SWEEP_MS, TRACE_WARNING_SECS,
};
use crate::metrics::{Registry, ShardMetrics, TraceCounters};
use crate::trace::{Span, TraceRing, TraceRings, console, rings};

#[cfg(feature = "otlp")]
use super::otlp::Collector;

/// Handle to the exporting thread.
#[derive(Debug)]
pub(super) struct Exporter {
    /// When dropped, the thread exports the records left in the rings and exits.
    stop: oneshot::Sender<()>,
    ended: oneshot::Receiver<()>,
}

impl Exporter {
    /// Exports the remaining spans, waiting at most [`TRACE_FLUSH_MS_MAX`]. Spans that are not
    /// exported by then are lost.
    pub(super) async fn finish(self) {
        drop(self.stop);
        let wait = Duration::from_millis(TRACE_FLUSH_MS_MAX);
        if tokio::time::timeout(wait, self.ended).await.is_err() {
            tracing::warn!(
                "final span export did not finish within {wait:?}; the remaining spans are lost"
            );
        }
    }
}

/// The tracing state of the process.
#[derive(Debug, Default)]
pub(super) struct Tracing {
    /// One ring per shard; empty if tracing is off.
    pub(super) rings: vec::IntoIter<TraceRing>,
    pub(super) exporter: Option<Exporter>,
    counters: Arc<TraceCounters>,
}

impl Tracing {
    /// Adds the metrics about spans to the registry if tracing is on.
    pub(super) fn show(&self, registry: &mut Registry, shards: Vec<Arc<ShardMetrics>>) {
        if self.exporter.is_some() {
            registry.add_traces(Arc::clone(&self.counters), shards);
        }
    }
}

/// Starts the exporter and creates a ring for each shard. Does nothing without a configuration.
///
/// # Errors
/// Returns an error if the collector's configuration is invalid or the thread cannot be started.
pub(super) async fn start(config: Option<&TracingConfig>, shards: usize) -> Result<Tracing, Exit> {
    let Some(config) = config.cloned() else {
        return Ok(Tracing::default());
    };
    let (producers, rings) = rings(shards);
    let counters = Arc::<TraceCounters>::default();
    let (stop, stopped) = oneshot::channel();
    let (report_ended, ended) = oneshot::channel();
    let (report_started, started) = oneshot::channel();
    let counted = Arc::clone(&counters);
    let work = async move {
        match Sink::new(&config) {
            Ok(sink) => {
                // The receiver is dropped if the start was cancelled.
                let _ = report_started.send(None);
                Export::new(sink, rings, counted).run(stopped).await;
            }
            Err(problem) => drop(report_started.send(Some(problem))),
        }
        let _ = report_ended.send(());
    };
    let failed =
        |error: io::Error| Exit::runtime(format!("span exporter failed to start: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    let thread = thread::Builder::new().name("traces".to_owned());
    thread
        .spawn(move || runtime.block_on(work))
        .map_err(failed)?;
    match started.await {
        Ok(None) => Ok(Tracing {
            rings: producers.into_iter(),
            exporter: Some(Exporter { stop, ended }),
            counters,
        }),
        Ok(Some(problem)) => Err(Exit::config(format!("ringside: {problem}"))),
        Err(_) => Err(Exit::runtime("span exporter stopped during start-up")),
    }
}

/// The destination of spans.
enum Sink {
    Console {
        service: String,
        lines: Vec<u8>,
    },
    #[cfg(feature = "otlp")]
    Collector(Box<Collector>),
}

impl Sink {
    fn new(config: &TracingConfig) -> Result<Self, String> {
        match &config.exporter {
            TraceExporter::Console => Ok(Self::Console {
                service: config.service_name.clone(),
                lines: Vec::new(),
            }),
            TraceExporter::Otlp(collector) => Self::collector(config, collector),
        }
    }

    #[cfg(feature = "otlp")]
    fn collector(config: &TracingConfig, collector: &OtlpConfig) -> Result<Self, String> {
        let collector = Collector::new(config, collector)?;
        Ok(Self::Collector(Box::new(collector)))
    }

    #[cfg(not(feature = "otlp"))]
    fn collector(_: &TracingConfig, _: &OtlpConfig) -> Result<Self, String> {
        Err(
            "OTEL_TRACES_EXPORTER=otlp: this build does not support OTLP; build with the feature \
             `otlp` (cargo build --features otlp), or set OTEL_TRACES_EXPORTER=console"
                .to_owned(),
        )
    }

    /// Sends spans and returns how many of them the destination rejected. The error is the reason
    /// why the whole export failed.
    #[cfg_attr(
        not(feature = "otlp"),
        expect(clippy::unused_async, reason = "only the collector is asynchronous")
    )]
    async fn send(&mut self, spans: Vec<Span>) -> Result<u64, String> {
        match self {
            Self::Console { service, lines } => {
                lines.clear();
                for span in &spans {
                    console::write(span, service, lines);
                }
                let mut out = io::stdout().lock();
                let written = out.write_all(lines).and_then(|()| out.flush());
                written.map(|()| 0).map_err(|error| error.to_string())
            }
            #[cfg(feature = "otlp")]
            Self::Collector(collector) => collector.send(&spans).await,
        }
    }
}

struct Export {
    sink: Sink,
    rings: TraceRings,
    counters: Arc<TraceCounters>,
    /// Time of the last warning about lost spans; `None` before the first.
    warned: Option<Instant>,
    /// Number of spans lost since the last warning about lost spans.
    lost: u64,
}

impl Export {
    const fn new(sink: Sink, rings: TraceRings, counters: Arc<TraceCounters>) -> Self {
        Self {
            sink,
            rings,
            counters,
            warned: None,
            lost: 0,
        }
    }

    async fn run(mut self, mut stopped: oneshot::Receiver<()>) {
        let mut is_stopping = false;
        while !is_stopping {
            is_stopping = tokio::select! {
                _ = &mut stopped => true,
                () = tokio::time::sleep(Duration::from_millis(TRACE_SWEEP_MS)) => false,
            };
            loop {
                let spans = self.rings.take(TRACE_BATCH_SPANS_MAX);
                if spans.is_empty() {
                    break;
                }
                self.export(spans).await;
            }
        }
    }

    async fn export(&mut self, spans: Vec<Span>) {
        let count = spans.len() as u64;
        let (lost, why) = match self.sink.send(spans).await {
            Ok(0) => (0, None),
            Ok(refused) => (
                refused.min(count),
                Some("the collector rejected some spans".to_owned()),
            ),
            Err(error) => (count, Some(error)),
        };
        self.counters.exported(count - lost);
        let Some(why) = why else { return };
        self.counters.failed(lost);
        self.lost += lost;
        let pause = Duration::from_secs(TRACE_WARNING_SECS);
        if self.warned.is_none_or(|warned| warned.elapsed() >= pause) {
            tracing::warn!(spans = self.lost, error = %why, "span export failed; spans are lost");
            self.warned = Some(Instant::now());
            self.lost = 0;
        }
    }
}

#[cfg(all(test, not(feature = "otlp")))]
mod tests {
    use super::*;

    #[test]
    fn a_build_without_otlp_names_the_feature() {
        let collector = OtlpConfig {
            protocol: crate::config::OtlpProtocol::Grpc,
            endpoint: "http://localhost:4317".to_owned(),
            headers: Vec::new(),
            timeout: Duration::from_secs(1),
        };
        let config = TracingConfig {
            exporter: TraceExporter::Otlp(collector.clone()),
            recorded_per_million: 1,
            service_name: String::new(),
            resource: Vec::new(),
        };
        let problem = Sink::collector(&config, &collector).err().unwrap();
        assert!(problem.contains("`otlp`"), "{problem}");
    }
}
