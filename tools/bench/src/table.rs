//! Formats the report as a table for a terminal.

use std::fmt::Write;

use crate::limits::RESAMPLES;
use crate::precision::{Machine, nanos};
use crate::report::{Metric, Report, busy_share};
use crate::response::shown;
use crate::schedule::Load;
use crate::stats::{Difference, Overhead, QUANTILES, Values};
use crate::units::{show_ns, show_signed_ns};

/// Columns of the labels, unless a proxy's name needs more.
const LABEL_COLUMNS_MIN: usize = 20;
const CELL_COLUMNS: usize = 13;

/// Describes in one phrase how the overheads and their 95 % intervals were computed.
#[must_use]
pub fn method(report: &Report) -> String {
    format!(
        "proxy minus direct, quantile by quantile; 95 % intervals by a percentile bootstrap over \
         {} rounds, {RESAMPLES} resamples, seed {}",
        report.rounds_complete, report.around.options.seed
    )
}

/// Describes the load in words.
#[must_use]
pub fn load_text(load: Load) -> String {
    match load {
        Load::Closed { concurrency } => format!("closed loop, {concurrency} at a time"),
        Load::Open { rate, poisson } => {
            let kind = if poisson { "poisson" } else { "evenly spaced" };
            format!("open loop, {rate} requests/s, {kind}")
        }
    }
}

/// Formats the estimate of an overhead, or returns `below noise` if its interval contains 0. If the
/// estimate and both ends of the interval are exactly 0, returns `none`.
#[must_use]
pub fn added(difference: Difference) -> String {
    if difference == Difference::default() {
        "none".to_owned()
    } else if difference.is_resolved() {
        show_signed_ns(difference.estimate)
    } else {
        "below noise".to_owned()
    }
}

/// Formats what a proxy adds as a multiple of what the first proxy adds; `-` unless both add
/// something that is distinguishable from noise.
#[must_use]
pub fn ratio(added: Difference, by_first: Difference) -> String {
    if added.low > 0.0 && by_first.low > 0.0 {
        format!("{:.2}x", added.estimate / by_first.estimate)
    } else {
        "-".to_owned()
    }
}

/// Formats the whole report as text for a terminal.
#[must_use]
pub fn table(report: &Report) -> String {
    let mut text = String::new();
    if let Some(sentence) = report.busy_sentence() {
        let _ = writeln!(text, "{sentence}\n");
    }
    head(&mut text, report);
    let labels = labels(report);
    header(&mut text, labels);
    for metric in &report.metrics {
        block(&mut text, labels, metric, report);
    }
    if report.concludes() {
        legend(&mut text, report);
    }
    responses(&mut text, report);
    client(&mut text, report);
    if let Some(gate) = &report.gate {
        let _ = writeln!(
            text,
            "gate: --max-overhead-p99 {}: {} (p99 of the {}: {}, interval {})",
            show_ns(nanos(gate.limit) as f64),
            gate.verdict.name(),
            gate.metric,
            show_signed_ns(gate.p99.estimate),
            interval(gate.p99)
        );
    }
    for warning in &report.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    text
}

/// Describes the machine in one phrase: its name, CPUs and kernel.
#[must_use]
pub fn machine_text(machine: &Machine) -> String {
    format!(
        "host {}, {}, {} CPUs, Linux {}",
        machine.host, machine.cpu, machine.cpus, machine.kernel
    )
}

/// Returns the version of this tool and what the servers state about theirs. A proxy may pass on
/// the engine's field.
#[must_use]
pub fn versions(report: &Report) -> String {
    let mut versions = format!("ringside-bench {}", env!("CARGO_PKG_VERSION"));
    let servers = report.around.options.servers.iter();
    let mut silent = Vec::new();
    for (server, counts) in servers.zip(&report.run.counts) {
        match &counts.server {
            Some(field) => {
                let (name, field) = (&server.name, shown(field.as_bytes()));
                let _ = write!(versions, "; {name} sends `server: {field}`");
            }
            None => silent.push(server.name.as_str()),
        }
    }
    if !silent.is_empty() {
        let _ = write!(versions, "; no `server` field from {}", silent.join(", "));
    }
    versions
}

/// Explains the rows of the table.
fn legend(text: &mut String, report: &Report) {
    let _ = writeln!(text, "\nadded: {}.", method(report));
    let _ = writeln!(
        text,
        "below noise: the interval contains 0; the overhead lies somewhere in the interval. One \
         interval in 20 does not contain the true value."
    );
    if let [_, first, _, ..] = &report.around.options.servers[..] {
        let name = &first.name;
        let _ = writeln!(
            text,
            "minus {name}: the difference between the two proxies. ratio: what the proxy adds, as a \
             multiple of what {name} adds."
        );
    }
}

fn head(text: &mut String, report: &Report) {
    let options = &report.around.options;
    let servers = options.servers.iter();
    let servers = servers.map(|server| format!("{} {}", server.name, server.target.authority()));
    let machine = &report.around.machine;
    let _ = writeln!(text, "{}, {}", machine.date, versions(report));
    let _ = writeln!(
        text,
        "{}, load {} at the start, {} at the end",
        machine_text(machine),
        machine.load_at_start,
        report.around.load_at_end
    );
    let _ = writeln!(
        text,
        "{}: POST {}, model {}, prompt of {} bytes{}, {} tokens at most",
        servers.collect::<Vec<_>>().join(", "),
        options.path,
        shown(report.around.model.as_bytes()),
        report.around.prompt_bytes,
        if options.unique { " (unique)" } else { "" },
        options.tokens_max
    );
    let _ = writeln!(
        text,
        "{} rounds in {}, {}, after {} warm-up rounds",
        report.rounds_complete,
        show_ns(report.run.wall_ns as f64),
        load_text(options.load),
        options.warmup
    );
    text.push('\n');
}

/// Returns the number of columns that the labels of all rows need.
fn labels(report: &Report) -> usize {
    let servers = report.around.options.servers.iter();
    let longest = servers.map(|server| "    minus ".len() + server.name.len() + 1);
    longest.max().unwrap_or(0).max(LABEL_COLUMNS_MIN)
}

fn header(text: &mut String, labels: usize) {
    let _ = write!(text, "{:labels$}", "");
    for share in QUANTILES {
        let _ = write!(text, "{:>CELL_COLUMNS$}", format!("p{:.0}", share * 100.0));
    }
    let _ = writeln!(text, "{:>CELL_COLUMNS$}", "mean");
}

/// Appends the rows of one metric: those of the engine, then those of each proxy.
fn block(text: &mut String, labels: usize, metric: &Metric, report: &Report) {
    let servers = &report.around.options.servers;
    let _ = writeln!(text, "{}", metric.title);
    if metric.values.iter().any(Values::is_empty) {
        let _ = writeln!(text, "  nothing measured");
        return;
    }
    let mut row = |label: &str, cells: &mut dyn Iterator<Item = String>| {
        let _ = write!(text, "{label:labels$}");
        for cell in cells {
            let _ = write!(text, "{cell:>CELL_COLUMNS$}");
        }
        text.push('\n');
    };
    let by_first = metric.added_by_first();
    let mut added_by = metric.differences.added.iter();
    let mut over_first = metric.differences.over_first.iter();
    for (side, (server, values)) in servers.iter().zip(&metric.values).enumerate() {
        let mut cells = QUANTILES
            .map(|share| values.quantile(share) as f64)
            .to_vec();
        cells.push(values.mean());
        row(
            &format!("  {}", server.name),
            &mut cells.into_iter().map(show_ns),
        );
        if side == 0 || !report.concludes() {
            continue;
        }
        let Some(overhead) = added_by.next() else {
            continue;
        };
        let each = |it: &Overhead| it.quantiles.into_iter().chain([it.mean]);
        row("    added", &mut each(overhead).map(added));
        row(
            "      from",
            &mut each(overhead).map(|it| show_signed_ns(it.low)),
        );
        row(
            "      to",
            &mut each(overhead).map(|it| show_signed_ns(it.high)),
        );
        if side > 1
            && let Some(over_first) = over_first.next()
        {
            let label = format!("    minus {}", servers[1].name);
            row(&label, &mut each(over_first).map(added));
            let both = each(overhead).zip(each(&by_first));
            row("    ratio", &mut both.map(|(it, first)| ratio(it, first)));
        }
    }
}

fn interval(difference: Difference) -> String {
    let (low, high) = (
        show_signed_ns(difference.low),
        show_signed_ns(difference.high),
    );
    format!("{low} to {high}")
}

fn responses(text: &mut String, report: &Report) {
    let sequence = &report.sequence;
    let compared = |differ: Option<u64>, what: &str| match differ {
        Some(0) => format!("{what} equal"),
        Some(count) => format!("{what} DIFFER in {count} rounds"),
        None => format!("{what} not compared (they vary between direct responses)"),
    };
    let mut said = vec![
        compared(sequence.events_differ, "numbers of events"),
        compared(sequence.texts_differ, "texts"),
    ];
    if sequence.numbered > 0 {
        let broken: u64 = sequence.broken.iter().sum();
        said.push(format!(
            "{} of {} responses with numbered tokens broken",
            broken, sequence.numbered
        ));
    }
    let _ = writeln!(
        text,
        "responses: {} rounds compared: {}",
        sequence.rounds,
        said.join(", ")
    );
    if let Some(first) = &sequence.first {
        let _ = writeln!(text, "  first: {first}");
    }
    let servers = &report.around.options.servers;
    for (server, counts) in servers.iter().zip(&report.run.counts) {
        if let Some(first) = &counts.first_failure {
            let (count, name) = (counts.failures, &server.name);
            let _ = writeln!(text, "FAILED: {count} requests, {name}; first: {first}");
        }
    }
    let connections = servers
        .iter()
        .zip(&report.run.counts)
        .map(|(server, counts)| {
            let p50 = show_ns(counts.connect_ns.value_at_quantile(0.5) as f64);
            format!(
                "{} {p50}, opened again {} times",
                server.name, counts.reopened
            )
        });
    let connections = connections.collect::<Vec<_>>().join("; ");
    let _ = writeln!(text, "connect, p50: {connections}");
}

fn client(text: &mut String, report: &Report) {
    let (options, lag, precision) = (
        &report.around.options,
        &report.run.lag,
        &report.around.precision,
    );
    let place = match options.cpu {
        Some(cpu) => format!("on CPU {cpu}"),
        None => "not pinned".to_owned(),
    };
    let polls = if options.busy_poll {
        "polling"
    } else {
        "sleeping"
    };
    let p99 = |of: &hdrhistogram::Histogram<u64>| show_ns(of.value_at_quantile(0.99) as f64);
    let waited = lag.sched.map_or("unknown".to_owned(), |sched| {
        let mean = sched.waited_ns as f64 / sched.runs.max(1) as f64;
        format!("{} per run", show_ns(mean))
    });
    let _ = write!(
        text,
        "client: {place}, {polls}; clock {}, byte over loopback to timestamp {} (p99 {}); wake-up \
         to timestamp p99 {}, busy {:.1} %, waited for a CPU {waited}",
        show_ns(precision.clock_ns as f64),
        show_ns(precision.loopback_p50_ns as f64),
        show_ns(precision.loopback_p99_ns as f64),
        p99(&lag.stamp_ns),
        busy_share(lag, report.run.wall_ns) * 100.0,
    );
    if matches!(options.load, Load::Open { .. }) {
        let _ = write!(text, ", planned to actual send p99 {}", p99(&lag.send_ns));
    }
    text.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_not_reported_as_a_number() {
        for ((estimate, low, high), want) in [
            ((31_240.0, 29_000.0, 33_000.0), "+31.2 us"),
            ((-900.0, -1_000.0, -1.0), "-900 ns"),
            ((31_240.0, -1.0, 33_000.0), "below noise"),
            ((1.0, 0.0, 2.0), "below noise"),
            ((0.0, 0.0, 0.0), "none"),
        ] {
            let difference = Difference {
                estimate,
                low,
                high,
            };
            assert_eq!(added(difference), want);
        }
    }

    #[test]
    fn a_ratio_needs_two_differences_above_the_noise() {
        let it = |estimate: f64, low: f64| Difference {
            estimate,
            low,
            high: estimate * 2.0,
        };
        for (added, by_first, want) in [
            (it(30.0, 20.0), it(20.0, 10.0), "1.50x"),
            (it(10.0, 5.0), it(20.0, 10.0), "0.50x"),
            (it(30.0, -1.0), it(20.0, 10.0), "-"),
            (it(30.0, 20.0), it(20.0, -1.0), "-"),
            (it(30.0, 20.0), Difference::default(), "-"),
        ] {
            assert_eq!(ratio(added, by_first), want);
        }
    }
}
