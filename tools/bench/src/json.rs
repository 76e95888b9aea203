//! The report as JSON, with all parameters and results. Times are in nanoseconds.

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::busy::Look;
use crate::cli::{Length, Server};
use crate::limits::{RESAMPLES, ROWS_MAX};
use crate::precision::{histogram, nanos};
use crate::report::{Metric, Report, busy_share};
use crate::run::{Counts, Done};
use crate::schedule::Load;
use crate::stats::{Difference, Overhead, QUANTILES, Values};
use crate::table::method;

/// Version of the JSON report's format. Incremented when a member is removed or changes its
/// meaning.
pub const SCHEMA: u32 = 2;

/// Returns the complete `overhead` report as JSON.
#[must_use]
pub fn json(report: &Report) -> Value {
    let (run, servers) = (&report.run, &report.around.options.servers[..]);
    let counts = || servers.iter().zip(&run.counts);
    json!({
        "tool": "ringside-bench overhead",
        "version": env!("CARGO_PKG_VERSION"),
        "schema": SCHEMA,
        "date": report.around.machine.date,
        "machine": {
            "host": report.around.machine.host,
            "cpu": report.around.machine.cpu,
            "cpus": report.around.machine.cpus,
            "kernel": report.around.machine.kernel,
            "load_at_start": report.around.machine.load_at_start,
            "load_at_end": report.around.load_at_end,
        },
        "busy": {
            "reason": report.busy,
            "allowed": report.around.options.allow_busy,
            "concludes": report.concludes(),
            "before": look(&report.around.look),
            "during": run.looks.iter().map(look).collect::<Vec<_>>(),
        },
        "parameters": parameters(report),
        "method": {
            "text": method(report),
            "confidence": 0.95,
            "resamples": RESAMPLES,
            "quantile": "nearest rank",
        },
        "rounds": run.rounds,
        "rounds_complete": report.rounds_complete,
        "wall_ns": run.wall_ns,
        "metrics": report.metrics.iter().map(|it| metric(it, report)).collect::<Vec<_>>(),
        "answers": responses(report),
        "failures": counts().map(|(server, counts)| json!({
            "side": server.name,
            "count": counts.failures,
            "first": counts.first_failure,
        })).collect::<Vec<_>>(),
        "connections": counts().map(connections).collect::<Vec<_>>(),
        "client": client(report),
        "gate": report.gate.map(|gate| json!({
            "max_overhead_p99_ns": nanos(gate.limit),
            "verdict": gate.verdict.name(),
            "metric": gate.metric,
            "p99": difference(gate.p99),
        })),
        "warnings": report.warnings,
        "rows": rows(&run.done, servers),
        "rows_left_out": run.done.len().saturating_sub(ROWS_MAX),
    })
}

fn look(look: &Look) -> Value {
    let programs = look.programs.iter();
    json!({
        "cpus": look.cpus,
        "cpus_used": look.used,
        "pinned_cpu_share": look.pinned.map(|(_, share)| share),
        "steal_share": look.stolen,
        "programs": programs.map(|program| json!({
            "name": program.name,
            "pid": program.pid,
            "cpus": program.cpus,
        })).collect::<Vec<_>>(),
    })
}

fn connections((server, counts): (&Server, &Counts)) -> Value {
    json!({
        "side": server.name,
        "server_field": counts.server,
        "connect_p50_ns": counts.connect_ns.value_at_quantile(0.5),
        "connect_max_ns": counts.connect_ns.max(),
        "opened_again": counts.reopened,
        "requests_that_waited": counts.waited,
        "requests_sent_again": counts.sent_again,
    })
}

/// Returns one entry for each complete response, in the order in which the responses ended, but at
/// most [`ROWS_MAX`].
fn rows(done: &[Done], servers: &[Server]) -> Vec<Value> {
    let row = |done: &Done| {
        json!({
            "round": done.round,
            "side": servers.get(done.side.index()).map(|server| &server.name),
            "start_ns": done.start_ns,
            "ttft_ns": done.ttft_ns,
            "total_ns": done.total_ns,
            "events": done.events,
        })
    };
    done.iter().take(ROWS_MAX).map(row).collect()
}

/// Returns the parameters of the run. Header fields are included without their values, which may be
/// secret.
fn parameters(report: &Report) -> Value {
    let options = &report.around.options;
    let names = |side: usize| -> Vec<&str> {
        let fields = options.fields[side].iter();
        fields.map(|(name, _)| name.as_str()).collect()
    };
    let load = match options.load {
        Load::Closed { concurrency } => json!({"loop": "closed", "concurrency": concurrency}),
        Load::Open { rate, poisson } => json!({
            "loop": "open",
            "rate": rate,
            "arrivals": if poisson { "poisson" } else { "fixed" },
        }),
    };
    let length = match options.length {
        Length::Rounds(rounds) => json!({"rounds": rounds}),
        Length::Time(time) => json!({"duration_ns": nanos(time)}),
    };
    json!({
        "direct": options.servers.first().map(|server| server.target.authority()),
        "proxies": options.servers.iter().skip(1).map(|server| json!({
            "name": server.name,
            "address": server.target.authority(),
        })).collect::<Vec<_>>(),
        "path": options.path,
        "model": report.around.model,
        "prompt_bytes": report.around.prompt_bytes,
        "prompt_tokens": options.prompt.is_none().then_some(options.prompt_tokens),
        "unique_prompts": options.unique,
        "max_tokens": options.tokens_max,
        "ignore_eos": options.ignore_eos,
        "load": load,
        "length": length,
        "warmup": options.warmup,
        "timeout_ns": nanos(options.timeout),
        "header_names": names(1),
        "direct_header_names": names(0),
        "seed": options.seed,
        "cpu": options.cpu,
        "busy_poll": options.busy_poll,
    })
}

/// Returns one metric. The differences are null if the report does not conclude.
fn metric(metric: &Metric, report: &Report) -> Value {
    let (servers, concludes) = (&report.around.options.servers, report.concludes());
    let overhead = |it: &Overhead| concludes.then(|| overhead(it));
    let differences = &metric.differences;
    let mut over_first = differences.over_first.iter();
    let sides = servers.iter().zip(&metric.values).skip(1);
    let proxies = sides.zip(&differences.added).enumerate();
    let proxies = proxies.map(|(i, ((server, of), added))| {
        json!({
            "name": server.name,
            "values": values(of),
            "overhead": overhead(added),
            "minus_first": (i > 0).then(|| over_first.next()).flatten().map(overhead),
        })
    });
    let proxies: Vec<Value> = proxies.collect();
    json!({
        "name": metric.name,
        "title": metric.title,
        "direct": metric.values.first().map(values),
        "proxies": proxies,
    })
}

fn overhead(overhead: &Overhead) -> Value {
    json!({
        "p50": difference(overhead.quantiles[0]),
        "p90": difference(overhead.quantiles[1]),
        "p99": difference(overhead.quantiles[2]),
        "mean": difference(overhead.mean),
    })
}

fn difference(difference: Difference) -> Value {
    json!({
        "estimate_ns": difference.estimate,
        "low_ns": difference.low,
        "high_ns": difference.high,
        "resolved": difference.is_resolved(),
    })
}

fn values(values: &Values) -> Value {
    let [p50, p90, p99] = QUANTILES.map(|share| values.quantile(share));
    let mut buckets = Vec::new();
    // Only non-empty buckets. If the histogram cannot be created, there are none.
    if let Ok(mut histogram) = histogram() {
        for value in values.iter() {
            histogram.saturating_record(value);
        }
        buckets = steps(&histogram);
    }
    json!({
        "count": values.len(),
        "mean_ns": values.mean(),
        "min_ns": values.iter().next().unwrap_or(0),
        "p50_ns": p50,
        "p90_ns": p90,
        "p99_ns": p99,
        "max_ns": values.quantile(1.0),
        "histogram_ns": buckets,
    })
}

/// Returns one entry for each non-empty bucket of `histogram`: the largest value that belongs to
/// the bucket, and the number of values recorded in it. Values are kept with two significant
/// digits.
fn steps(histogram: &Histogram<u64>) -> Vec<[u64; 2]> {
    let recorded = histogram.iter_recorded();
    recorded
        .map(|step| [step.value_iterated_to(), step.count_since_last_iteration()])
        .collect()
}

fn responses(report: &Report) -> Value {
    let sequence = &report.sequence;
    let servers = report.around.options.servers.iter().enumerate();
    let sides = servers.map(|(side, server)| {
        let own = report
            .run
            .done
            .iter()
            .filter(|done| done.side.index() == side);
        let (events, arrivals) = own.fold((0, 0), |(events, arrivals), done| {
            (
                events + u64::from(done.events),
                arrivals + u64::from(done.arrivals),
            )
        });
        json!({
            "side": server.name,
            "events": events,
            "arrivals_with_text": arrivals,
            "broken": sequence.broken.get(side),
        })
    });
    let sides: Vec<Value> = sides.collect();
    json!({
        "rounds_compared": sequence.rounds,
        "rounds_with_other_number_of_events": sequence.events_differ,
        "rounds_with_other_text": sequence.texts_differ,
        "numbered": sequence.numbered,
        "wrong": sequence.is_wrong(),
        "first": sequence.first,
        "sides": sides,
    })
}

fn client(report: &Report) -> Value {
    let (lag, precision) = (&report.run.lag, &report.around.precision);
    let summary = |of: &Histogram<u64>| {
        json!({
            "count": of.len(),
            "p50_ns": of.value_at_quantile(0.5),
            "p99_ns": of.value_at_quantile(0.99),
            "max_ns": of.max(),
        })
    };
    json!({
        "clock_ns": precision.clock_ns,
        "loopback_p50_ns": precision.loopback_p50_ns,
        "loopback_p99_ns": precision.loopback_p99_ns,
        "planned_to_actual_send": summary(&lag.send_ns),
        "wake_to_stamp": summary(&lag.stamp_ns),
        "turn": summary(&lag.turn_ns),
        "busy_share": busy_share(lag, report.run.wall_ns),
        "run_queue_wait_ns": lag.sched.map(|sched| sched.waited_ns),
        "run_queue_runs": lag.sched.map(|sched| sched.runs),
    })
}
