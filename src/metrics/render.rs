//! Renders the metrics as OpenMetrics text, summed over the shards.
//!
//! Runs on the control plane's thread. The result is not an atomic snapshot: one counter may be a
//! few requests ahead of another, which does not affect rates.

use std::fmt::Error;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry;

use super::allowlist::{Allowlist, AllowlistMetrics};
use super::cell::{Counter, Gauge, Total, precise};
use super::dns::{DnsCounters, DnsScrape};
use super::labels::{
    CodeClass, Direction, Named, Phase, Push, Route, RoutingDoubt, Stranded, TlsPeer, WarmUp,
};
use super::out::Out;
use super::pd_sidecar::PdSidecar;
use super::shard::ShardMetrics;
use super::traces::{TraceCounters, TraceScrape};
use crate::net::tls;
use crate::pd::{Outcome, Reason, Role};
use crate::sys::process;

/// The metrics of all shards and of the control plane.
#[derive(Debug)]
pub struct Registry {
    inner: registry::Registry,
}

impl Registry {
    /// Creates a registry. `driver` names the I/O driver of each shard. `fault_labels` are the
    /// labels of the error counters; the shards' metrics must have been created with their number.
    #[must_use]
    pub fn new(
        shards: Vec<Arc<ShardMetrics>>,
        driver: Vec<&'static str>,
        fault_labels: &'static [&'static str],
    ) -> Self {
        let started = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0.0, |since| since.as_secs_f64());
        let mut inner = registry::Registry::default();
        inner.register_collector(Box::new(Scrape {
            shards,
            driver,
            fault_labels,
            started,
        }));
        Self { inner }
    }

    /// Adds the counters of `MoRI-IO` name look-ups.
    #[must_use]
    pub fn with_dns(mut self, counters: Arc<DnsCounters>) -> Self {
        self.inner.register_collector(Box::new(DnsScrape(counters)));
        self
    }

    /// Adds the metrics of the allowlist.
    pub fn add_allowlist(&mut self, metrics: Arc<AllowlistMetrics>) {
        self.inner.register_collector(Box::new(Allowlist(metrics)));
    }

    /// Adds a collector, whose metrics are part of the exposition from then on.
    pub fn add(&mut self, collector: impl Collector) {
        self.inner.register_collector(Box::new(collector));
    }

    /// Adds the metrics of the span export.
    pub fn add_traces(&mut self, counters: Arc<TraceCounters>, shards: Vec<Arc<ShardMetrics>>) {
        self.add(TraceScrape { counters, shards });
    }

    /// Creates a registry of the metrics that pd-sidecar has, under its names.
    #[must_use]
    pub fn pd_sidecar(shards: Vec<Arc<ShardMetrics>>, connector: &'static str) -> Self {
        let mut inner = registry::Registry::default();
        inner.register_collector(Box::new(PdSidecar { shards, connector }));
        Self { inner }
    }

    /// Returns all metrics and those of `other` as the text of one exposition.
    #[must_use]
    pub fn render_with(&self, other: &Self) -> String {
        let mut text = self.render();
        // The mark of the end of an exposition.
        text.truncate(text.trim_end_matches("# EOF\n").len());
        text.push_str(&other.render());
        text
    }

    /// Returns all metrics in the format `OpenMetrics`.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = String::with_capacity(32 * 1024);
        // Writing to a `String` cannot fail, so an error would be a defect of the encoder.
        if text::encode(&mut text, &self.inner).is_err() {
            tracing::error!(
                "metrics cannot be encoded; the response is incomplete (a bug in ringside)"
            );
        }
        text
    }
}

#[derive(Debug)]
struct Scrape {
    shards: Vec<Arc<ShardMetrics>>,
    driver: Vec<&'static str>,
    fault_labels: &'static [&'static str],
    started: f64,
}

impl Collector for Scrape {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut out = Out(encoder);
        self.requests(&mut out)?;
        self.times(&mut out)?;
        self.failures(&mut out)?;
        self.prefill_decode(&mut out)?;
        self.connections(&mut out)?;
        self.balance(&mut out)?;
        self.tls(&mut out)?;
        self.program(&mut out)
    }
}

impl Scrape {
    fn requests(&self, out: &mut Out<'_>) -> Result<(), Error> {
        let count = |route: Route, code: CodeClass| {
            self.sum(|shard| &shard.done[route.index()][code.index()])
        };
        // Read before `started`, so that the difference is never negative.
        let done = Route::ALL.map(|route| CodeClass::ALL.map(|code| count(route, code)));
        let started = Route::ALL.map(|route| self.sum(|shard| &shard.started[route.index()]));
        out.counters(
            "ringside_requests",
            "Finished requests, by route and status class of the response",
            Route::ALL.iter().flat_map(|route| {
                let done = &done;
                CodeClass::ALL.iter().map(move |code| {
                    let labels = [("route", route.label()), ("code", code.label())];
                    (labels, done[route.index()][code.index()])
                })
            }),
        )?;
        out.gauges(
            "ringside_in_flight",
            "Requests in progress",
            Route::ALL.iter().map(|route| {
                let done: u64 = done[route.index()].iter().sum();
                let now = started[route.index()].saturating_sub(done);
                (
                    [("route", route.label())],
                    i64::try_from(now).unwrap_or(i64::MAX),
                )
            }),
        )
    }

    /// How clients are distributed over the shards.
    fn balance(&self, out: &mut Out<'_>) -> Result<(), Error> {
        let shards = || self.shards.iter().enumerate();
        let label = |index: usize| [("shard", index.to_string())];
        out.gauges(
            "ringside_shard_client_connections",
            "Open client connections, by shard",
            shards().map(|(index, shard)| (label(index), shard.clients.get())),
        )?;
        out.counters(
            "ringside_shard_clients_handed_over",
            "Client connections that a shard accepted and handed over to one with fewer, by the shard that accepted them",
            shards().map(|(index, shard)| (label(index), shard.clients_handed_over.get())),
        )?;
        out.counters(
            "ringside_shard_requests",
            "Requests begun, by shard",
            shards().map(|(index, shard)| {
                let started = shard.started.iter().map(Counter::get);
                (label(index), started.sum())
            }),
        )
    }

    fn times(&self, out: &mut Out<'_>) -> Result<(), Error> {
        out.histograms(
            "ringside_request_duration_seconds",
            "Time from the first byte of a request to the last byte of its response",
            Route::ALL.map(|route| {
                let total = self.total(|shard, total| shard.duration[route.index()].add_to(total));
                ([("route", route.label())], total)
            }),
        )?;
        out.histograms(
            "ringside_time_to_first_token_seconds",
            "Time from the first byte of a request to the first body byte of its response, for successful requests on intercepted paths",
            Route::ALL.map(|route| {
                let total =
                    self.total(|shard, total| shard.first_token[route.index()].add_to(total));
                ([("route", route.label())], total)
            }),
        )?;
        out.histograms(
            "ringside_leg_duration_seconds",
            "Duration of one attempt of a leg; of a decode leg, until its response head has arrived",
            Role::ALL.map(|role| {
                let total = self.total(|shard, total| shard.legs[role.index()].add_to(total));
                ([("leg", role.label())], total)
            }),
        )?;
        out.histograms(
            "ringside_proxy_overhead_seconds",
            "Time spent inside ringside, by part of the exchange; only a sample of the chunks is measured",
            Direction::ALL.map(|direction| {
                let total =
                    self.total(|shard, total| shard.overhead[direction.index()].add_to(total));
                ([("direction", direction.label())], total)
            }),
        )
    }

    fn failures(&self, out: &mut Out<'_>) -> Result<(), Error> {
        out.counters(
            "ringside_errors",
            "Failures, by error code",
            self.fault_labels.iter().enumerate().map(|(index, label)| {
                let counts = self
                    .shards
                    .iter()
                    .filter_map(|shard| shard.faults.get(index));
                ([("code", *label)], counts.map(Counter::get).sum())
            }),
        )?;
        out.counters(
            "ringside_client_disconnects",
            "Clients that disconnected or stalled before their response was complete, by phase",
            Phase::ALL.iter().map(|phase| {
                let count = self.sum(|shard| &shard.left[phase.index()]);
                ([("phase", phase.label())], count)
            }),
        )?;
        out.counters(
            "ringside_targets_denied",
            "Targets named by requests and not permitted by the allowlist",
            Named::ALL.iter().map(|named| {
                let count = self.sum(|shard| &shard.denied[named.index()]);
                ([("named", named.label())], count)
            }),
        )?;
        out.counter(
            "ringside_session_panics",
            "Tasks that panicked, such as client sessions, which were closed",
            self.sum(|shard| &shard.panics),
        )?;
        out.counter(
            "ringside_accept_paused",
            "Times that accepting was paused for lack of file descriptors or memory, or at the limit \
             on client connections",
            self.sum(|shard| &shard.accept_paused),
        )?;
        out.counter(
            "ringside_idle_connections_closed",
            "Idle client connections closed in favour of new ones (--max-connections)",
            self.sum(|shard| &shard.idle_closed),
        )?;
        out.counter(
            "ringside_events_lost",
            "Events that the kernel lost for lack of memory: connections may wait for nothing",
            self.sum(|shard| &shard.events_lost),
        )?;
        out.counter(
            "ringside_peers_vanished",
            "Connections reset because the client or engine acknowledged nothing for about a minute",
            self.sum(|shard| &shard.peers_vanished),
        )?;
        out.counter(
            "ringside_access_log_dropped",
            "Access-log records lost because their shard's ring was full",
            self.sum(|shard| &shard.access_log_dropped),
        )
    }

    /// Writes the metrics of split requests. All outcomes with the reason `none` are always
    /// included. Other pairs of outcome and reason are included only once they have occurred, since
    /// most pairs are impossible.
    fn prefill_decode(&self, out: &mut Out<'_>) -> Result<(), Error> {
        let pairs = Outcome::ALL
            .iter()
            .flat_map(|outcome| Reason::ALL.iter().map(move |reason| (outcome, reason)));
        out.counters(
            "ringside_pd_requests",
            "Requests by where their prompt was computed, and why",
            pairs.filter_map(|(outcome, reason)| {
                let count = self.sum(|shard| &shard.pd[outcome.index()][reason.index()]);
                let labels = [("outcome", outcome.label()), ("reason", reason.label())];
                (count > 0 || *reason == Reason::None).then_some((labels, count))
            }),
        )?;
        out.counter(
            "ringside_prefill_retries",
            "Repeated prefill attempts",
            self.sum(|shard| &shard.retries),
        )?;
        out.counter(
            "ringside_replays",
            "Legs sent again because the reused connection had been closed",
            self.sum(|shard| &shard.replays),
        )?;
        out.counter(
            "ringside_client_kv_params_masked",
            "Members of client requests, such as kv_transfer_params, that were not passed to engines",
            self.sum(|shard| &shard.masked),
        )?;
        out.counters(
            "ringside_routing_headers",
            "Intercepted requests whose routing headers do not have one clear meaning, by reason",
            RoutingDoubt::ALL.iter().map(|doubt| {
                let count = self.sum(|shard| &shard.routing_doubts[doubt.index()]);
                ([("doubt", doubt.label())], count)
            }),
        )?;
        out.counters(
            "ringside_nixl_push",
            "Events of NIXL push with prefill and decode legs that start together",
            Push::ALL.iter().map(|event| {
                let count = self.sum(|shard| &shard.pushes[event.index()]);
                ([("event", event.label())], count)
            }),
        )?;
        out.counters(
            "ringside_speculative_prefills",
            "Speculative prefills after chat turns, by result",
            WarmUp::ALL.iter().map(|end| {
                let count = self.sum(|shard| &shard.warm_ups[end.index()]);
                ([("result", end.label())], count)
            }),
        )?;
        out.counters(
            "ringside_stranded_kv",
            "Handoffs that no decode leg carried, by fate of their KV cache blocks",
            Stranded::ALL.iter().map(|outcome| {
                let count = self.sum(|shard| &shard.stranded[outcome.index()]);
                ([("outcome", outcome.label())], count)
            }),
        )
    }

    fn connections(&self, out: &mut Out<'_>) -> Result<(), Error> {
        out.gauges(
            "ringside_upstream_connections",
            "Connections to engines, by leg and state",
            Role::ALL.iter().flat_map(|role| {
                let leg = ("leg", role.label());
                let idle = self.level(|shard| &shard.pool_idle[role.index()]);
                let active = self.level(|shard| &shard.pool_active[role.index()]);
                [
                    ([leg, ("state", "idle")], idle),
                    ([leg, ("state", "active")], active),
                ]
            }),
        )?;
        out.gauge(
            "ringside_client_connections",
            "Client connections",
            self.level(|shard| &shard.clients),
        )?;
        out.counter(
            "ringside_spliced_bytes",
            "Body bytes spliced in the kernel without a copy to user space",
            self.sum(|shard| &shard.spliced_bytes),
        )?;
        out.counter(
            "ringside_copied_bytes",
            "Bytes of request bodies that were forwarded through a buffer in user space without changes",
            self.sum(|shard| &shard.copied_bytes),
        )
    }

    /// Writes the numbers of TLS handshakes. A pair of peer and outcome is included only once it
    /// has occurred.
    fn tls(&self, out: &mut Out<'_>) -> Result<(), Error> {
        let pairs = TlsPeer::ALL
            .iter()
            .flat_map(|peer| tls::Outcome::ALL.iter().map(move |end| (peer, end)));
        out.counters(
            "ringside_tls_handshakes",
            "TLS handshakes by outcome; later protocol violations are counted too",
            pairs.filter_map(|(peer, end)| {
                let count = self.sum(|shard| &shard.tls[peer.index()][end.index()]);
                (count > 0).then_some(([("peer", peer.label()), ("outcome", end.label())], count))
            }),
        )
    }

    fn program(&self, out: &mut Out<'_>) -> Result<(), Error> {
        let version = env!("CARGO_PKG_VERSION");
        out.infos(
            "ringside_build",
            "Version of ringside",
            [[("version", version)]].into_iter(),
        )?;
        let mut drivers = self.driver.clone();
        drivers.sort_unstable();
        drivers.dedup();
        out.infos(
            "ringside_driver",
            "I/O driver of the shards",
            drivers.into_iter().map(|driver| [("driver", driver)]),
        )?;
        let process = process::usage();
        out.seconds(
            "process_start_time_seconds",
            "Start time of the process in seconds since 1970",
            self.started,
        )?;
        out.gauge(
            "process_open_fds",
            "Open file descriptors",
            clamp(process.open_fds),
        )?;
        out.gauge(
            "process_max_fds",
            "Limit on open file descriptors",
            clamp(process.max_fds),
        )?;
        out.gauge(
            "process_resident_memory_bytes",
            "Resident memory in bytes",
            clamp(process.resident_bytes),
        )?;
        let mut metric = out.0.encode_descriptor(
            "process_cpu_seconds",
            "CPU time of the process in seconds",
            None,
            MetricType::Counter,
        )?;
        metric.encode_counter::<NoLabelSet, f64, f64>(&(precise(process.cpu_micros) / 1e6), None)
    }

    fn sum(&self, pick: impl Fn(&ShardMetrics) -> &Counter) -> u64 {
        self.shards.iter().map(|shard| pick(shard).get()).sum()
    }

    fn level(&self, pick: impl Fn(&ShardMetrics) -> &Gauge) -> i64 {
        self.shards.iter().map(|shard| pick(shard).get()).sum()
    }

    fn total(&self, add: impl Fn(&ShardMetrics, &mut Total)) -> Total {
        let mut total = Total::default();
        for shard in &self.shards {
            add(shard, &mut total);
        }
        total
    }
}

fn clamp(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAULTS: &[&str] = &["no_decoder", "bad_head"];

    fn registry() -> (Vec<Arc<ShardMetrics>>, Registry) {
        let shards: Vec<_> = (0..2).map(|_| Arc::new(ShardMetrics::new(2))).collect();
        let registry = Registry::new(shards.clone(), vec!["io_uring", "io_uring"], FAULTS);
        (shards, registry)
    }

    #[test]
    fn shards_are_summed() {
        let (shards, registry) = registry();
        for shard in &shards {
            shard.request_started(Route::Chat);
            shard.request_started(Route::Chat);
            shard.request_done(Route::Chat, CodeClass::C2xx, 350_000);
            shard.ttft(Route::Chat, 30_000);
            shard.leg(Role::Prefill, 20_000);
            shard.overhead(Direction::Chunk, 4_000);
            shard.fault(1);
            shard.client_left(Phase::BetweenLegs);
            shard.pd(Outcome::Remote, Reason::None);
            shard.pool_idle(Role::Decode, 3);
            shard.pool_idle(Role::Decode, -1);
            shard.client_connections(5);
            shard.spliced_bytes(100);
        }
        shards[0].pd(Outcome::LocalFallback, Reason::StaleKv);
        let text = registry.render();
        for line in [
            "ringside_requests_total{route=\"chat\",code=\"2xx\"} 2",
            "ringside_requests_total{route=\"other\",code=\"aborted\"} 0",
            "ringside_in_flight{route=\"chat\"} 2",
            "ringside_request_duration_seconds_count{route=\"chat\"} 2",
            "ringside_request_duration_seconds_sum{route=\"chat\"} 0.7",
            "ringside_request_duration_seconds_bucket{le=\"0.3\",route=\"chat\"} 0",
            "ringside_request_duration_seconds_bucket{le=\"0.5\",route=\"chat\"} 2",
            "ringside_time_to_first_token_seconds_bucket{le=\"0.04\",route=\"chat\"} 2",
            "ringside_leg_duration_seconds_bucket{le=\"+Inf\",leg=\"prefill\"} 2",
            "ringside_proxy_overhead_seconds_bucket{le=\"0.000005\",direction=\"chunk\"} 2",
            "ringside_errors_total{code=\"bad_head\"} 2",
            "ringside_client_disconnects_total{phase=\"between_legs\"} 2",
            "ringside_pd_requests_total{outcome=\"remote\",reason=\"none\"} 2",
            "ringside_pd_requests_total{outcome=\"failed\",reason=\"none\"} 0",
            "ringside_pd_requests_total{outcome=\"local_fallback\",reason=\"handoff_stale\"} 1",
            "ringside_upstream_connections{leg=\"decode\",state=\"idle\"} 4",
            "ringside_client_connections 10",
            "ringside_shard_client_connections{shard=\"1\"} 5",
            "ringside_shard_requests_total{shard=\"0\"} 2",
            "ringside_spliced_bytes_total 200",
            "ringside_driver_info{driver=\"io_uring\"} 1",
            concat!(
                "ringside_build_info{version=\"",
                env!("CARGO_PKG_VERSION"),
                "\"} 1"
            ),
            "ringside_access_log_dropped_total 0",
            "ringside_session_panics_total 0",
            "ringside_prefill_retries_total 0",
            "ringside_replays_total 0",
            "ringside_client_kv_params_masked_total 0",
            "ringside_accept_paused_total 0",
        ] {
            assert!(
                text.lines().any(|other| other == line),
                "{line} not in\n{text}"
            );
        }
        assert!(!text.contains("outcome=\"none\""));
        assert!(!text.contains("reason=\"best_of\""));
        assert!(!text.contains("request_duration_seconds_count{route=\"other\"}"));
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn every_series_has_a_type_and_appears_once() {
        let (_, registry) = registry();
        let text = registry.render();
        let mut types = Vec::new();
        let mut series = Vec::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                types.push(rest.split(' ').next().unwrap().to_owned());
            } else if !line.starts_with('#') {
                let name = line.rsplit_once(' ').unwrap().0;
                assert!(
                    types.last().is_some_and(|family| name.starts_with(family)),
                    "{line}"
                );
                series.push(name.to_owned());
            }
        }
        let (families, names) = (types.len(), series.len());
        types.sort_unstable();
        types.dedup();
        series.sort_unstable();
        series.dedup();
        assert_eq!((types.len(), series.len()), (families, names));
    }
}
