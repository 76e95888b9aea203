//! The report of a soak run, as text and as JSON.

use std::fmt::Write as _;
use std::time::Duration;

use serde_json::{Value, json};

use crate::cli::SoakOptions;
use crate::limits::BUSY_SHARE_MAX;
use crate::precision::nanos;
use crate::soak::check::Kind;
use crate::soak::tally::{Stage, Tally};
use crate::soak::watch::{Judgement, Sample, Trend};
use crate::units::show_ns;

/// The proxy's process over the run.
#[derive(Clone, Debug)]
pub struct Process {
    /// Process id.
    pub pid: u32,
    /// The sample before the first connection.
    pub start: Sample,
    /// The samples during the run.
    pub samples: Vec<Sample>,
    /// The result of comparing the samples; `None` if there were too few.
    pub judgement: Option<Judgement>,
    /// The sample after all connections were closed, taken when the number of descriptors had
    /// returned to that of the start or the wait for this had timed out.
    pub settled: Sample,
}

/// The results of a soak run.
#[derive(Clone, Debug)]
pub struct Report {
    /// The options of the run.
    pub options: SoakOptions,
    /// Duration of the run.
    pub wall: Duration,
    /// The counters of the run's requests, responses and connections.
    pub tally: Tally,
    /// The proxy's process, if `--pid` is given.
    pub process: Option<Process>,
    /// CPU time that this tool used during the run.
    pub client_cpu: Duration,
}

fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// Formats a whole number with spaces between groups of three digits.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (nth, digit) in digits.chars().enumerate() {
        if nth > 0 && (digits.len() - nth).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

impl Report {
    /// Returns the share of one CPU that the client used.
    fn client_share(&self) -> f64 {
        self.client_cpu.as_secs_f64() / self.wall.as_secs_f64().max(1e-9)
    }

    /// Returns all problems as lines; empty if the run succeeded.
    #[must_use]
    pub fn verdict(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let failures = self.tally.failures();
        if failures > 0 {
            lines.push(format!("{} requests failed", grouped(failures)));
            lines.extend(self.tally.shown.iter().cloned());
            let more = failures - self.tally.shown.len() as u64;
            if more > 0 {
                lines.push(format!("and {} more", grouped(more)));
            }
        }
        if self.tally.streams == 0 && failures == 0 {
            lines.push("no stream completed; use a longer --duration".to_owned());
        }
        match self.process.as_ref().map(|process| process.judgement) {
            Some(Some(judgement)) => {
                for (name, course, show) in courses(&judgement) {
                    if !course.is_flat() {
                        lines.push(format!(
                            "the process grows: {name} {} after warm-up, {} at the end, above the \
                             limit of {}",
                            show(course.first),
                            show(course.last),
                            show(course.last_max)
                        ));
                    }
                }
            }
            Some(None) => lines.push(format!(
                "too few samples to judge the process; the client was late by up to {}: give it more \
                 CPU time, or use a longer --duration",
                show_ns(self.tally.late_ns as f64)
            )),
            None => {}
        }
        lines
    }

    /// Returns the report as text.
    #[must_use]
    pub fn text(&self) -> String {
        let (options, tally) = (&self.options, &self.tally);
        let mut text = format!(
            "http://{}{}: {} streams for {:.1} s, {} tokens each, seed {}\n",
            options.proxy.authority(),
            options.path,
            options.streams,
            self.wall.as_secs_f64(),
            options.tokens,
            options.seed
        );
        let mut line = |name: &str, what: String| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{name:<13}{what}");
        };
        tally_text(tally, self.wall, &mut line);
        if let Some(process) = &self.process {
            process.text(tally.chunks, &mut line);
        }
        let share = self.client_share();
        let warning = if share > BUSY_SHARE_MAX {
            "; warning: the client may be the bottleneck, reduce the load"
        } else {
            ""
        };
        line(
            "client",
            format!(
                "{:.0} % of one CPU, late by up to {}{warning}",
                share * 100.0,
                show_ns(tally.late_ns as f64)
            ),
        );
        text
    }

    /// Returns the report as JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        let (options, tally) = (&self.options, &self.tally);
        let errors = Kind::ALL.iter().zip(tally.errors);
        let errors: serde_json::Map<String, Value> = errors
            .map(|(kind, count)| (kind.name().to_owned(), json!(count)))
            .collect();
        let aborts: Vec<Value> = Stage::ALL
            .iter()
            .zip(tally.aborts)
            .map(|(stage, [fin, rst])| json!({"stage": stage.name(), "fin": fin, "rst": rst}))
            .collect();
        json!({
            "schema": 1,
            "parameters": {
                "proxy": options.proxy.authority(),
                "path": options.path,
                "streams": options.streams,
                "duration_ns": nanos(options.duration),
                "abort_share": options.abort_share,
                "tokens": options.tokens,
                "header_names": options.fields.iter().map(|(name, _)| name).collect::<Vec<_>>(),
                "seed": options.seed,
            },
            "wall_ns": nanos(self.wall),
            "requests_begun": tally.begun,
            "requests_unfinished": tally.unfinished,
            "streams_complete": tally.streams,
            "wholes_complete": tally.unstreamed,
            "pipelined_complete": tally.pipelined,
            "chunks": tally.chunks,
            "bytes": tally.bytes,
            "aborts": aborts,
            "connections": tally.connections,
            "slow_readers": tally.narrow,
            "pauses": tally.pauses,
            "closed_by_proxy": tally.closed,
            "requests_sent_again": tally.again,
            "errors": errors,
            "errors_shown": tally.shown,
            "process": self.process.as_ref().map(Process::json),
            "client_cpu_ns": nanos(self.client_cpu),
            "client_late_ns": tally.late_ns,
            "verdict": self.verdict(),
        })
    }
}

fn tally_text(tally: &Tally, wall: Duration, line: &mut impl FnMut(&str, String)) {
    let [
        begun,
        aborted,
        unfinished,
        streams,
        unstreamed,
        pipelined,
        chunks,
    ] = [
        tally.begun,
        tally.aborted(),
        tally.unfinished,
        tally.streams,
        tally.unstreamed,
        tally.pipelined,
        tally.chunks,
    ]
    .map(grouped);
    line(
        "requests",
        format!("{begun} started, {aborted} aborted, {unfinished} in progress at the end"),
    );
    line(
        "complete",
        format!("{streams} streams, {unstreamed} whole responses; {pipelined} of these pipelined"),
    );
    let rate = tally.chunks as f64 / wall.as_secs_f64().max(1e-9);
    let received = mib(tally.bytes);
    line(
        "chunks",
        format!("{chunks} compared ({rate:.0} per second), {received} received"),
    );
    for (stage, [fin, rst]) in Stage::ALL.iter().zip(tally.aborts) {
        let (name, fin, rst) = (stage.name(), grouped(fin), grouped(rst));
        line("aborted", format!("{name}: {fin} FIN, {rst} RST"));
    }
    let [connections, narrow, pauses, closed, again] = [
        tally.connections,
        tally.narrow,
        tally.pauses,
        tally.closed,
        tally.again,
    ]
    .map(grouped);
    line(
        "connections",
        format!(
            "{connections} opened, {narrow} of them slow readers ({pauses} pauses), {closed} \
             closed by the proxy, {again} requests replaced"
        ),
    );
    let errors = Kind::ALL.iter().zip(tally.errors);
    let errors: Vec<String> = errors
        .filter(|(_, count)| *count > 0)
        .map(|(kind, count)| format!("{} {}", grouped(count), kind.name()))
        .collect();
    let none = errors.is_empty().then(|| "none".to_owned());
    line("errors", none.unwrap_or_else(|| errors.join(", ")));
}

type Shown = fn(u64) -> String;

fn courses(judgement: &Judgement) -> [(&'static str, Trend, Shown); 2] {
    [
        ("resident set", judgement.rss, mib),
        ("descriptors", judgement.descriptors, grouped),
    ]
}

impl Process {
    /// Returns the CPU time that the process used from the start of the run to its last sample.
    fn cpu(&self) -> Duration {
        let last = self.samples.last().unwrap_or(&self.start);
        Duration::from_nanos(last.cpu_ns.saturating_sub(self.start.cpu_ns))
    }

    fn text(&self, chunks: u64, line: &mut impl FnMut(&str, String)) {
        for (name, course, show) in self.judgement.iter().flat_map(courses) {
            let flat = if course.is_flat() {
                format!("flat (at most {})", show(course.last_max))
            } else {
                format!("NOT FLAT (at most {})", show(course.last_max))
            };
            line(
                name,
                format!(
                    "{} after warm-up, {} median, {} max, {} at the end: {flat}",
                    show(course.first),
                    show(course.median),
                    show(course.max),
                    show(course.last)
                ),
            );
        }
        let cpu = self.cpu().as_secs_f64();
        let wall = self.samples.last().map_or(0, |sample| sample.at_ns) as f64 / 1e9;
        line(
            "process",
            format!(
                "{} at the start, {cpu:.1} s of CPU time ({:.0} % of one CPU, {:.1} us per chunk)",
                mib(self.start.rss_bytes),
                cpu / wall.max(1e-9) * 100.0,
                cpu / chunks.max(1) as f64 * 1e6
            ),
        );
        let last = self.samples.last().unwrap_or(&self.start);
        line(
            "afterwards",
            format!(
                "{} descriptors ({} at the start), {}, {:.1} s after the last connection",
                grouped(self.settled.descriptors),
                grouped(self.start.descriptors),
                mib(self.settled.rss_bytes),
                self.settled.at_ns.saturating_sub(last.at_ns) as f64 / 1e9
            ),
        );
    }

    fn json(&self) -> Value {
        let one = |sample: &Sample| {
            json!({
                "at_ns": sample.at_ns,
                "rss_bytes": sample.rss_bytes,
                "descriptors": sample.descriptors,
                "cpu_ns": sample.cpu_ns,
            })
        };
        let course = |course: Trend| {
            json!({
                "after_warmup": course.first,
                "median": course.median,
                "max": course.max,
                "last": course.last,
                "last_max": course.last_max,
                "flat": course.is_flat(),
            })
        };
        json!({
            "pid": self.pid,
            "cpu_ns": nanos(self.cpu()),
            "rss_bytes": self.judgement.map(|judgement| course(judgement.rss)),
            "descriptors": self.judgement.map(|judgement| course(judgement.descriptors)),
            "start": one(&self.start),
            "settled": one(&self.settled),
            "samples": self.samples.iter().map(one).collect::<Vec<_>>(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_formatted_for_reading() {
        for (number, want) in [
            (0, "0"),
            (999, "999"),
            (1_000, "1 000"),
            (1_234_567, "1 234 567"),
        ] {
            assert_eq!(grouped(number), want);
        }
        assert_eq!(mib(3 << 19), "1.5 MiB");
    }
}
