//! Evaluates a run: differences with intervals, checks of the responses, the gate and warnings.
//! This module does no I/O; `table`, `json` and `page` only format its result.

use std::time::Duration;

use crate::cli::Options;
use crate::limits::{
    BEYOND_QUANTILE_MIN, BUSY_SHARE_MAX, CLIENT_SHARE_MAX, GAPS_MAX, OFF_CPU_SHARE_MAX,
};
use crate::precision::{Machine, Precision, nanos};
use crate::response::Order;
use crate::run::{Done, Lag, Run};
use crate::schedule::Side;
use crate::stats::{Difference, Overhead, Values, overheads};
use crate::units::show_ns;

/// The values of one metric, such as the time to first token, on both sides, and their difference.
#[derive(Clone, Debug)]
pub struct Metric {
    /// Name of the metric in the JSON report, such as `ttft`.
    pub name: &'static str,
    /// Name of the metric in the table and in messages, such as `time to first token`.
    pub title: &'static str,
    /// Measured values of each side in nanoseconds, direct first.
    pub values: [Values; 2],
    /// Difference between the sides, proxy minus direct.
    pub overhead: Overhead,
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
    pub broken: [u64; 2],
    /// Number of rounds whose two responses have different numbers of events; `None` if the number
    /// of events also varies among direct responses.
    pub events_differ: Option<u64>,
    /// Number of rounds whose two responses have different texts; `None` if the text also varies
    /// among direct responses.
    pub texts_differ: Option<u64>,
    /// Description of the first broken response or of the first round whose responses differ; `None`
    /// if there is nothing to report.
    pub first: Option<String>,
}

impl ResponseCheck {
    /// Returns whether a response of either side is broken, or responses differ that must be equal.
    /// With a real model, the number of events alone proves nothing if the texts are equal, because
    /// a busy engine may merge events.
    #[must_use]
    pub fn is_wrong(&self) -> bool {
        let events = self.events_differ.unwrap_or(0);
        self.broken != [0, 0]
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

/// The result of `--max-overhead-p99`: the worse of the verdicts on the time to first token and on
/// the gap between chunks.
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
    /// Number of rounds with two complete responses.
    pub rounds_complete: u32,
    /// The result of checking the responses.
    pub sequence: ResponseCheck,
    /// The verdict on `--max-overhead-p99`; `None` if the option is not given.
    pub gate: Option<Gate>,
    /// Warnings for the user: reasons to doubt the results.
    pub warnings: Vec<String>,
}

impl Report {
    /// Evaluates a run; takes seconds for millions of gaps.
    #[must_use]
    pub fn new(around: Around, mut run: Run) -> Self {
        let rounds = complete(&run.done, run.rounds);
        let count = rounds.iter().flatten().count();
        let metrics = metrics(&rounds, std::mem::take(&mut run.gaps), around.options.seed);
        let sequence = sequence(rounds.iter().flatten());
        let limit = around.options.overhead_p99_max;
        let mut report = Self {
            gate: limit.map(|limit| judge(limit, &metrics)),
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
}

/// Returns the two responses of each round, direct first, in the order of the rounds' numbers; `None`
/// for a round of which a response is missing.
fn complete(done: &[Done], rounds: u32) -> Vec<Option<(Done, Done)>> {
    let mut halves = vec![[None; 2]; rounds as usize];
    for response in done {
        if let Some(round) = halves.get_mut(response.round as usize) {
            round[response.side.index()] = Some(*response);
        }
    }
    let both = |[direct, proxy]: [Option<Done>; 2]| direct.zip(proxy);
    halves.into_iter().map(both).collect()
}

/// Returns the time to first token, the gaps between chunks and the total time of the complete
/// rounds, with their overheads.
fn metrics(rounds: &[Option<(Done, Done)>], gaps: [Vec<(u64, u32)>; 2], seed: u64) -> [Metric; 3] {
    // New numbers for the complete rounds, without gaps.
    let mut next = 0..;
    let numbers: Vec<Option<u32>> = rounds
        .iter()
        .map(|round| round.as_ref().and_then(|_| next.next()))
        .collect();
    let number = |round: u32| numbers.get(round as usize).copied().flatten();
    let gaps = gaps.map(|side| {
        let kept = side.into_iter();
        Values::new(
            kept.filter_map(|(gap, round)| Some((gap, number(round)?)))
                .collect(),
        )
    });
    let both = |value: fn(&Done) -> u64| {
        [0, 1].map(|side| {
            let each = rounds
                .iter()
                .flatten()
                .map(|(direct, proxy)| [direct, proxy]);
            Values::new(each.map(|round| value(round[side])).zip(0..).collect())
        })
    };
    let values = [both(|done| done.ttft_ns), gaps, both(|done| done.total_ns)];
    let count = numbers.iter().flatten().count();
    let found = overheads(
        values.each_ref().map(|[direct, proxy]| (direct, proxy)),
        count,
        seed,
    );
    let names = [
        ("ttft", "time to first token"),
        ("gap", "gap between chunks"),
        ("total", "whole response"),
    ];
    let mut each = values.into_iter().zip(found).zip(names);
    std::array::from_fn(|_| {
        let ((values, overhead), (name, title)) = each.next().unwrap_or_default();
        Metric {
            name,
            title,
            values,
            overhead,
        }
    })
}

fn sequence<'a>(rounds: impl Iterator<Item = &'a (Done, Done)>) -> ResponseCheck {
    let mut found = ResponseCheck::default();
    let (mut events_differ, mut texts_differ) = (0, 0);
    let (mut events_vary, mut texts_vary) = (false, false);
    let mut like: Option<Done> = None;
    for (direct, proxy) in rounds {
        found.rounds += 1;
        for response in [direct, proxy] {
            let order = response.text.order;
            found.numbered += u64::from(order != Order::Unnumbered);
            if order == Order::Broken {
                found.broken[response.side.index()] += 1;
                let (round, side) = (response.round, response.side.name());
                found.first.get_or_insert_with(|| {
                    format!("round {round}, {side}: a token is missing, duplicated or moved")
                });
            }
        }
        let like = like.get_or_insert(*direct);
        events_vary |= like.events != direct.events;
        texts_vary |= like.text.hash != direct.text.hash;
        let differ = [
            direct.events != proxy.events,
            direct.text.hash != proxy.text.hash,
        ];
        events_differ += u64::from(differ[0]);
        texts_differ += u64::from(differ[1]);
        if differ.contains(&true) && found.first.is_none() {
            let what = if differ[1] { "different" } else { "the same" };
            found.first = Some(format!(
                "round {}: {} events direct, {} through the proxy, {what} text",
                direct.round, direct.events, proxy.events
            ));
        }
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
        verdict: Verdict::of(metric.overhead.p99(), limit_ns),
        metric: metric.title,
        p99: metric.overhead.p99(),
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
        p99: metrics[0].overhead.p99(),
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
        report.metrics[0].overhead.p50(),
        run.wall_ns,
        report.around.options.busy_poll,
    ));
    if run.full {
        said.push(format!(
            "the run ended early: at most {GAPS_MAX} gaps per side are kept; use fewer requests or \
             tokens"
        ));
    }
    for side in Side::BOTH {
        let (name, waited) = (side.name(), run.waited[side.index()]);
        if waited > 0 {
            said.push(format!(
                "{name}: {waited} requests had to wait for a connection; their times include the \
                 wait"
            ));
        }
        let again = run.sent_again[side.index()];
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
