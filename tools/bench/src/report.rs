//! Evaluates a run: differences with intervals, checks of the responses, the gate and warnings.
//! This module does no I/O; `table`, `json` and `page` only format its result.

use std::time::Duration;

use crate::busy::{Look, disturbance};
use crate::cli::{Options, Server};
use crate::limits::{
    BEYOND_QUANTILE_MIN, BUSY_SHARE_MAX, CLIENT_SHARE_MAX, GAPS_MAX, OFF_CPU_SHARE_MAX,
};
use crate::precision::{Machine, Precision, nanos};
use crate::response::Order;
use crate::run::{Done, Lag, Run};
use crate::stats::{Difference, Differences, Overhead, Values, differences};
use crate::units::show_ns;

/// The values of one metric, such as the time to first token, on all sides, and their differences.
#[derive(Clone, Debug)]
pub struct Metric {
    /// Name of the metric in the JSON report, such as `ttft`.
    pub name: &'static str,
    /// Name of the metric in the table and in messages, such as `time to first token`.
    pub title: &'static str,
    /// Measured values of each side in nanoseconds, direct first.
    pub values: Vec<Values>,
    /// Differences between the sides.
    pub differences: Differences,
}

impl Metric {
    /// Returns what the first proxy adds.
    #[must_use]
    pub fn added_by_first(&self) -> Overhead {
        self.differences.added.first().copied().unwrap_or_default()
    }
}

/// The result of checking the responses of the complete rounds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResponseCheck {
    /// Number of rounds checked.
    pub rounds: u64,
    /// Number of responses whose tokens are numbered by a mock engine. The order of their tokens is
    /// checked.
    pub numbered: u64,
    /// Number of responses per side in which a numbered token is missing, duplicated, swapped or
    /// from another response.
    pub broken: Vec<u64>,
    /// Number of rounds in which a proxy's response has another number of events than the direct
    /// one; `None` if that number also varies among direct responses.
    pub events_differ: Option<u64>,
    /// Number of rounds in which a proxy's response has another text than the direct one; `None` if
    /// the text also varies among direct responses.
    pub texts_differ: Option<u64>,
    /// Description of the first broken response or of the first round whose responses differ;
    /// `None` if there is nothing to report.
    pub first: Option<String>,
}

impl ResponseCheck {
    /// Returns whether a response of either side is broken, or responses differ that must be equal.
    /// With a real model, the number of events alone proves nothing if the texts are equal, because
    /// a busy engine may merge events.
    #[must_use]
    pub fn is_wrong(&self) -> bool {
        let events = self.events_differ.unwrap_or(0);
        self.broken.iter().any(|count| *count > 0)
            || self.texts_differ.unwrap_or(0) > 0
            || (events > 0 && self.is_mock())
    }

    const fn is_mock(&self) -> bool {
        self.numbered > 0
    }
}

/// The verdict on whether the p99 overhead is within `--max-overhead-p99`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The whole 95 % interval of the p99 overhead is at or below the limit.
    Held,
    /// The whole 95 % interval of the p99 overhead is above the limit.
    Exceeded,
    /// The limit lies inside the 95 % interval of the p99 overhead.
    Undecided,
}

impl Verdict {
    /// Returns the verdict on `p99`, the p99 overhead of one metric, for a limit of `limit_ns`
    /// nanoseconds.
    #[must_use]
    pub fn of(p99: Difference, limit_ns: f64) -> Self {
        if p99.low > limit_ns {
            Self::Exceeded
        } else if p99.high <= limit_ns {
            Self::Held
        } else {
            Self::Undecided
        }
    }

    /// Returns the name used in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Held => "held",
            Self::Exceeded => "exceeded",
            Self::Undecided => "undecided",
        }
    }
}

/// The result of `--max-overhead-p99` for the first proxy: the worse of the verdicts on the time to
/// first token and on the gap between chunks.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    /// Value of `--max-overhead-p99`.
    pub limit: Duration,
    /// The worse of the two verdicts.
    pub verdict: Verdict,
    /// Title of the metric that has this verdict, such as `time to first token`.
    pub metric: &'static str,
    /// The p99 overhead of the metric named by `metric`.
    pub p99: Difference,
}

/// The parameters and the environment of a run, as shown in its reports.
#[derive(Clone, Debug)]
pub struct Around {
    /// The options of the run.
    pub options: Options,
    /// Model name in the requests.
    pub model: String,
    /// Length of the prompt in bytes, without the tag of a unique prompt.
    pub prompt_bytes: usize,
    /// Machine and date of the run.
    pub machine: Machine,
    /// CPU time of other programs before the run.
    pub look: Look,
    /// Load averages at the end of the run.
    pub load_at_end: String,
    /// How precisely the client can measure times on this machine, determined before the run.
    pub precision: Precision,
}

/// The evaluated results of a run, which the table, JSON and HTML reports show.
#[derive(Clone, Debug)]
pub struct Report {
    /// Parameters and environment of the run.
    pub around: Around,
    /// Time to first token, gaps between chunks, total time.
    pub metrics: [Metric; 3],
    /// The unevaluated results of the run. Its `gaps` are empty, because they have been moved into
    /// `metrics`.
    pub run: Run,
    /// Number of rounds with complete responses of all sides.
    pub rounds_complete: u32,
    /// The result of checking the responses.
    pub sequence: ResponseCheck,
    /// The reason why the machine was too busy for a conclusion; `None` if it was not.
    pub busy: Option<String>,
    /// The verdict on `--max-overhead-p99`; `None` if the option is not given, or if the report
    /// does not conclude.
    pub gate: Option<Gate>,
    /// Warnings for the user: reasons to doubt the results.
    pub warnings: Vec<String>,
}

impl Report {
    /// Evaluates a run; takes seconds for millions of gaps.
    #[must_use]
    pub fn new(around: Around, mut run: Run) -> Self {
        let servers = &around.options.servers;
        let complete = Complete::of(&run.done, run.rounds, servers.len());
        let count = complete.count();
        let sequence = sequence(complete.rounds(), servers);
        let gaps = std::mem::take(&mut run.gaps);
        let metrics = metrics(&complete, gaps, around.options.seed);
        let busy = disturbance(&around.look, &run.looks);
        let concludes = busy.is_none() || around.options.allow_busy;
        let limit = around.options.overhead_p99_max.filter(|_| concludes);
        let mut report = Self {
            gate: limit.map(|limit| judge(limit, &metrics)),
            busy,
            around,
            metrics,
            run,
            rounds_complete: u32::try_from(count).unwrap_or(u32::MAX),
            sequence,
            warnings: Vec::new(),
        };
        report.warnings = warnings(&report);
        report
    }

    /// Returns whether the report states what the proxies add. It does not if the machine was busy,
    /// unless `--allow-busy` is given.
    #[must_use]
    pub fn concludes(&self) -> bool {
        self.busy.is_none() || self.around.options.allow_busy
    }

    /// Returns the sentence about a busy machine that precedes everything else in a report; `None`
    /// if the machine was not busy.
    #[must_use]
    pub fn busy_sentence(&self) -> Option<String> {
        let reason = self.busy.as_ref()?;
        Some(if self.concludes() {
            format!("BUSY MACHINE, measured because of --allow-busy; {reason}")
        } else {
            format!("BUSY MACHINE, therefore no conclusion; {reason}")
        })
    }
}

/// The responses of the complete rounds.
#[derive(Debug)]
struct Complete {
    /// Number of sides.
    sides: usize,
    /// The responses round by round, each in the order of the sides.
    done: Vec<Done>,
    /// For each round of the run, its number among the complete ones; `None` if a response is
    /// missing.
    numbers: Vec<Option<u32>>,
}

impl Complete {
    /// Selects the rounds that have a response of every side.
    fn of(done: &[Done], rounds: u32, sides: usize) -> Self {
        let mut found = vec![None; rounds as usize * sides];
        for response in done {
            let at = response.round as usize * sides + response.side.index();
            if let Some(place) = found.get_mut(at) {
                *place = Some(*response);
            }
        }
        let (mut kept, mut numbers, mut count) = (Vec::with_capacity(found.len()), Vec::new(), 0);
        for round in found.chunks(sides) {
            let is_complete = round.iter().all(Option::is_some);
            numbers.push(is_complete.then_some(count));
            if is_complete {
                kept.extend(round.iter().flatten());
                count += 1;
            }
        }
        Self {
            sides,
            done: kept,
            numbers,
        }
    }

    /// Returns the number of complete rounds.
    fn count(&self) -> usize {
        self.done.len() / self.sides
    }

    /// Iterates over the complete rounds.
    fn rounds(&self) -> impl Iterator<Item = &[Done]> {
        self.done.chunks(self.sides)
    }

    /// Returns the values of one time of each response, per side.
    fn values(&self, of: fn(&Done) -> u64) -> Vec<Values> {
        let side = |side: usize| {
            let each = self.rounds().map(|round| of(&round[side]));
            Values::new(each.zip(0..).collect())
        };
        (0..self.sides).map(side).collect()
    }
}

/// Returns the time to first token, the gaps between chunks and the total time of the complete
/// rounds, with the differences between the sides.
fn metrics(complete: &Complete, gaps: Vec<Vec<(u64, u32)>>, seed: u64) -> [Metric; 3] {
    let number = |round: u32| complete.numbers.get(round as usize).copied().flatten();
    let gaps = gaps.into_iter().map(|side| {
        let kept = side.into_iter();
        Values::new(
            kept.filter_map(|(gap, round)| Some((gap, number(round)?)))
                .collect(),
        )
    });
    let values = [
        complete.values(|done| done.ttft_ns),
        gaps.collect(),
        complete.values(|done| done.total_ns),
    ];
    let found = differences(&values, complete.count(), seed);
    let names = [
        ("ttft", "time to first token"),
        ("gap", "gap between chunks"),
        ("total", "whole response"),
    ];
    let mut each = values.into_iter().zip(found).zip(names);
    std::array::from_fn(|_| {
        let ((values, differences), (name, title)) = each.next().unwrap_or_default();
        Metric {
            name,
            title,
            values,
            differences,
        }
    })
}

/// Checks the responses of the complete rounds, of which each has one response per server.
fn sequence<'a>(rounds: impl Iterator<Item = &'a [Done]>, servers: &[Server]) -> ResponseCheck {
    let mut found = ResponseCheck {
        broken: vec![0; servers.len()],
        ..ResponseCheck::default()
    };
    let (mut events_differ, mut texts_differ) = (0, 0);
    let (mut events_vary, mut texts_vary) = (false, false);
    let mut like: Option<Done> = None;
    for round in rounds {
        let Some((direct, proxies)) = round.split_first() else {
            continue;
        };
        found.rounds += 1;
        for (response, server) in round.iter().zip(servers) {
            let order = response.text.order;
            found.numbered += u64::from(order != Order::Unnumbered);
            if order == Order::Broken {
                found.broken[response.side.index()] += 1;
                let (round, name) = (response.round, &server.name);
                found.first.get_or_insert_with(|| {
                    format!("round {round}, {name}: a token is missing, duplicated or moved")
                });
            }
        }
        let like = like.get_or_insert(*direct);
        events_vary |= like.events != direct.events;
        texts_vary |= like.text.hash != direct.text.hash;
        let (mut events, mut texts) = (false, false);
        for (proxy, server) in proxies.iter().zip(servers.iter().skip(1)) {
            let other_text = direct.text.hash != proxy.text.hash;
            let other_events = direct.events != proxy.events;
            (events, texts) = (events | other_events, texts | other_text);
            if (other_events || other_text) && found.first.is_none() {
                let what = if other_text { "different" } else { "the same" };
                found.first = Some(format!(
                    "round {}: {} events direct, {} through {}, {what} text",
                    direct.round,
                    direct.events,
                    proxy.events,
                    server.phrase()
                ));
            }
        }
        events_differ += u64::from(events);
        texts_differ += u64::from(texts);
    }
    found.events_differ = (!events_vary).then_some(events_differ);
    found.texts_differ = (!texts_vary).then_some(texts_differ);
    if !found.is_wrong() && (events_vary || events_differ == 0) {
        found.first = None;
    }
    found
}

fn judge(limit: Duration, metrics: &[Metric; 3]) -> Gate {
    let limit_ns = nanos(limit) as f64;
    let gates = metrics[..2].iter().map(|metric| Gate {
        limit,
        verdict: Verdict::of(metric.added_by_first().p99(), limit_ns),
        metric: metric.title,
        p99: metric.added_by_first().p99(),
    });
    let severity = |gate: &Gate| match gate.verdict {
        Verdict::Held => 0,
        Verdict::Undecided => 1,
        Verdict::Exceeded => 2,
    };
    let first = Gate {
        limit,
        verdict: Verdict::Held,
        metric: metrics[0].title,
        p99: metrics[0].added_by_first().p99(),
    };
    // If both verdicts are equal, the time to first token is reported.
    gates.fold(first, |worst, gate| {
        if severity(&gate) > severity(&worst) {
            gate
        } else {
            worst
        }
    })
}

/// Returns the median overhead of the proxy for which the client has to be most exact.
fn least_added(ttft: &Metric) -> Difference {
    let scale = |it: &Difference| it.estimate.abs().max((it.high - it.low) / 2.0);
    let medians = ttft.differences.added.iter().map(Overhead::p50);
    medians
        .min_by(|a, b| scale(a).total_cmp(&scale(b)))
        .unwrap_or_default()
}

fn warnings(report: &Report) -> Vec<String> {
    let (run, rounds) = (&report.run, report.rounds_complete as usize);
    let mut said = Vec::new();
    if rounds < BEYOND_QUANTILE_MIN * 100 {
        said.push(format!(
            "the p99 of {rounds} rounds depends on fewer than {BEYOND_QUANTILE_MIN} values; use {} \
             rounds or more before quoting it",
            BEYOND_QUANTILE_MIN * 100
        ));
    }
    said.extend(client_warnings(
        &run.lag,
        least_added(&report.metrics[0]),
        run.wall_ns,
        report.around.options.busy_poll,
    ));
    if run.full {
        said.push(format!(
            "the run ended early: at most {GAPS_MAX} gaps per side are kept; use fewer requests or \
             tokens"
        ));
    }
    for (server, counts) in report.around.options.servers.iter().zip(&run.counts) {
        let (name, waited) = (&server.name, counts.waited);
        if waited > 0 {
            said.push(format!(
                "{name}: {waited} requests had to wait for a connection; their times include the \
                 wait"
            ));
        }
        let again = counts.sent_again;
        if again > 0 {
            said.push(format!(
                "{name}: {again} requests were sent again because their connection was being \
                 closed; their times include the first attempt"
            ));
        }
    }
    let sequence = &report.sequence;
    if sequence.events_differ.unwrap_or(0) > 0 && !sequence.is_wrong() {
        said.push(
            "the number of events differs although the texts are equal: events are being merged"
                .to_owned(),
        );
    }
    if let Some(gate) = report
        .gate
        .filter(|gate| gate.verdict == Verdict::Undecided)
    {
        said.push(format!(
            "--max-overhead-p99 is undecided: the limit of {} lies inside the interval of the p99 \
             of the {}; use more requests",
            show_ns(nanos(gate.limit) as f64),
            gate.metric
        ));
    }
    said
}

/// Returns warnings if this tool, the client, was too slow or too busy to measure the overhead. A
/// delay of the client is too long if it exceeds a share of the median overhead in `ttft_p50`, or
/// of half the width of that overhead's interval if that is larger; the share is
/// [`CLIENT_SHARE_MAX`].
fn client_warnings(lag: &Lag, ttft_p50: Difference, wall_ns: u64, busy_poll: bool) -> Vec<String> {
    let mut said = Vec::new();
    let half_width = (ttft_p50.high - ttft_p50.low) / 2.0;
    let bound = ttft_p50.estimate.abs().max(half_width) * CLIENT_SHARE_MAX;
    let mut check = |late_ns: f64, what: &str| {
        if late_ns > bound {
            said.push(format!(
                "the client is not exact enough for this measurement: {what} {} (p50 overhead {} \
                 +- {}); give it a dedicated core (--cpu, --busy-poll) or reduce the load",
                show_ns(late_ns),
                show_ns(ttft_p50.estimate),
                show_ns(half_width)
            ));
        }
    };
    let p99 = |histogram: &hdrhistogram::Histogram<u64>| histogram.value_at_quantile(0.99) as f64;
    check(p99(&lag.stamp_ns), "p99 from wake-up to timestamp is");
    check(p99(&lag.send_ns), "p99 from planned to actual send is");
    if let Some(sched) = lag.sched.filter(|sched| !busy_poll && sched.runs > 0) {
        let mean = sched.waited_ns as f64 / sched.runs as f64;
        check(
            mean,
            "the mean time it waited for a CPU when ready to run is",
        );
    }
    let off = lag
        .sched
        .map_or(0.0, |sched| sched.waited_ns as f64 / wall_ns.max(1) as f64);
    if busy_poll && off > OFF_CPU_SHARE_MAX {
        said.push(format!(
            "the client never sleeps, but was not running for {:.1} % of the time; give it a \
             dedicated core (--cpu)",
            off * 100.0
        ));
    }
    let busy = busy_share(lag, wall_ns);
    if busy > BUSY_SHARE_MAX {
        said.push(format!(
            "the client was busy {:.0} % of the time: bytes that arrived meanwhile got a late \
             timestamp; lower --concurrency or --rate",
            busy * 100.0
        ));
    }
    said
}

/// Returns the share of the run during which the client processed received bytes.
#[must_use]
pub fn busy_share(lag: &Lag, wall_ns: u64) -> f64 {
    let busy_ns = lag.turn_ns.mean() * lag.turn_ns.len() as f64;
    (busy_ns / wall_ns.max(1) as f64).min(1.0)
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;
