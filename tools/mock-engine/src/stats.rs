//! The measurements of an engine, which [`crate::metrics`] prints.
//!
//! A generation request is measured in an [`Observation`] while it runs, and added to the totals
//! when its exchange ends.

use std::collections::{BTreeMap, HashMap};
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::api::Ask;
use crate::form::Form;
use crate::metrics::bounds;
use crate::sync::Guarded;
use crate::token::MODEL_TOKENS_MAX;

/// Returns the names of the histograms of finished generation requests, each with its value.
fn values(seen: &Observation, now: Instant) -> [(&'static str, f64); 13] {
    let whole = (now - seen.start).as_secs_f64();
    let prefill = seen
        .first
        .map_or(whole, |first| (first - seen.start).as_secs_f64());
    let decode = whole - prefill;
    let steps = f64::from(seen.steps.saturating_sub(1).max(1));
    let limit = seen.limit.map_or_else(
        || MODEL_TOKENS_MAX.saturating_sub(seen.prompt_tokens),
        u64::from,
    );
    let computed = seen.prompt_tokens.saturating_sub(seen.cached);
    [
        ("vllm:request_prompt_tokens", seen.prompt_tokens as f64),
        ("vllm:request_generation_tokens", seen.tokens as f64),
        (
            "vllm:request_max_num_generation_tokens",
            f64::from(seen.steps),
        ),
        ("vllm:request_params_n", f64::from(seen.choices)),
        ("vllm:request_params_max_tokens", limit as f64),
        ("vllm:request_time_per_output_token_seconds", decode / steps),
        ("vllm:e2e_request_latency_seconds", whole),
        // The mock has no queue.
        ("vllm:request_queue_time_seconds", 0.0),
        ("vllm:request_inference_time_seconds", whole),
        ("vllm:request_prefill_time_seconds", prefill),
        ("vllm:request_decode_time_seconds", decode),
        ("vllm:request_num_preemptions", 0.0),
        ("vllm:request_prefill_kv_computed_tokens", computed as f64),
    ]
}

const FIRST_TOKEN: &str = "vllm:time_to_first_token_seconds";
const INTER_TOKEN: &str = "vllm:inter_token_latency_seconds";
const STEP: &str = "vllm:iteration_tokens_total";
/// An empty histogram of the times between tokens, which every generation request starts with.
static NO_GAPS: LazyLock<Histogram> = LazyLock::new(|| Histogram::of(INTER_TOKEN));
pub(crate) const HTTP_DURATION: &str = "http_request_duration_seconds";
pub(crate) const HTTP_DURATION_FINE: &str = "http_request_duration_highr_seconds";

/// A histogram: the number of observations up to each bound, not cumulative.
#[derive(Clone, Debug, Default)]
pub(crate) struct Histogram {
    bounds: Vec<f64>,
    /// One for each bound, and one for values above all of them.
    counts: Vec<u64>,
    pub(crate) sum: f64,
}

impl Histogram {
    /// Returns an empty histogram of the family `name`.
    fn of(name: &str) -> Self {
        let bounds = bounds(name);
        Self {
            counts: vec![0; bounds.len() + 1],
            bounds,
            sum: 0.0,
        }
    }

    /// Adds `value`, `times` times.
    fn add(&mut self, value: f64, times: u64) {
        let at = self.bounds.partition_point(|bound| *bound < value);
        if let Some(count) = self.counts.get_mut(at) {
            *count += times;
        }
        self.sum += value * times as f64;
    }

    /// Adds the observations of a histogram with the same bounds.
    fn merge(&mut self, other: &Self) {
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
        self.sum += other.sum;
    }

    /// Returns the cumulative counts, the last one that of all observations.
    pub(crate) fn cumulative(&self) -> impl Iterator<Item = u64> {
        self.counts.iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        })
    }
}

/// The reason why a generation request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Finish {
    Stop,
    Length,
    Abort,
    Error,
}

/// The source of the cached tokens of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CachedBy {
    /// The engine's own prefix cache.
    Prefix,
    /// The KV cache that another engine sent.
    Transfer,
}

/// The measurements of one generation request.
#[derive(Debug)]
pub(crate) struct Observation {
    start: Instant,
    prompt_tokens: u64,
    cached: u64,
    cached_by: CachedBy,
    choices: u32,
    limit: Option<u32>,
    finish: Finish,
    /// Number of times that a tool call parser runs; `None` if the response is no tool call. The
    /// flag is whether the response is a stream.
    calls: Option<(bool, u64)>,
    first: Option<Instant>,
    last: Option<Instant>,
    /// Number of generated tokens of all choices.
    tokens: u64,
    /// Number of generated tokens per choice.
    steps: u32,
    gaps: Histogram,
}

impl Observation {
    /// Starts the measurement of a request.
    pub(crate) fn new(ask: &Ask, cached: u64, cached_by: CachedBy) -> Self {
        let calls = matches!(ask.form, Form::Call { .. }).then(|| match ask.stream {
            true => (true, u64::from(ask.tokens) + 1),
            false => (false, u64::from(ask.choices)),
        });
        Self {
            start: Instant::now(),
            prompt_tokens: ask.prompt_tokens,
            cached: cached.min(ask.prompt_tokens),
            cached_by,
            choices: ask.choices,
            limit: ask.limit,
            finish: if ask.limited {
                Finish::Length
            } else {
                Finish::Stop
            },
            calls,
            first: None,
            last: None,
            tokens: 0,
            steps: 0,
            gaps: NO_GAPS.clone(),
        }
    }

    /// Adds a token with the index `token` in its choice, sent now.
    pub(crate) fn token(&mut self, token: u32) {
        self.tokens += 1;
        if token < self.steps {
            return;
        }
        let now = Instant::now();
        if let Some(last) = self.last {
            self.gaps.add((now - last).as_secs_f64(), 1);
        }
        self.first.get_or_insert(now);
        self.last = Some(now);
        self.steps = token + 1;
    }

    /// Adds all `tokens` of a response that is not a stream: the first one after `prefill`, the
    /// last one now.
    pub(crate) fn whole(&mut self, tokens: u32, prefill: Duration) {
        let now = Instant::now();
        let first = (self.start + prefill).min(now);
        let gaps = tokens.saturating_sub(1);
        if gaps > 0 {
            let gap = (now - first).as_secs_f64() / f64::from(gaps);
            self.gaps.add(gap, u64::from(gaps));
        }
        self.first = Some(first);
        self.last = Some(now);
        self.steps = tokens;
        self.tokens = u64::from(tokens) * u64::from(self.choices);
    }
}

/// The requests of one handler and method.
#[derive(Clone, Debug, Default)]
pub(crate) struct Http {
    /// Number of responses by the first digit of their status.
    pub(crate) statuses: BTreeMap<u16, u64>,
    pub(crate) request_bytes: u64,
    pub(crate) response_bytes: u64,
    pub(crate) duration: Histogram,
}

/// The totals of an engine.
#[derive(Clone, Debug)]
pub(crate) struct Totals {
    /// Start time of the engine in seconds since the Unix epoch.
    pub(crate) started: f64,
    /// Number of generation requests in progress.
    pub(crate) running: u64,
    pub(crate) prompt_tokens: u64,
    pub(crate) generation_tokens: u64,
    /// Tokens found in the prefix cache, and received from another engine.
    pub(crate) cached: [u64; 2],
    /// Prompt tokens of the requests that another engine's KV cache was requested for.
    pub(crate) external_queries: u64,
    pub(crate) finished: BTreeMap<Finish, u64>,
    /// Runs of the tool call parser: for whole responses, and for streams.
    pub(crate) calls: [u64; 2],
    pub(crate) histograms: HashMap<&'static str, Histogram>,
    pub(crate) http: BTreeMap<(&'static str, &'static str), Http>,
}

impl Totals {
    fn add(&mut self, name: &'static str, value: f64, times: u64) {
        let histogram = self.histograms.entry(name);
        histogram
            .or_insert_with(|| Histogram::of(name))
            .add(value, times);
    }
}

/// The totals of an engine, shared by its connections.
#[derive(Debug)]
pub(crate) struct Stats(Guarded<Totals>);

impl Default for Stats {
    fn default() -> Self {
        let started = SystemTime::now().duration_since(UNIX_EPOCH);
        Self(Guarded::new(Totals {
            started: started.map_or(0.0, |since| since.as_secs_f64()),
            running: 0,
            prompt_tokens: 0,
            generation_tokens: 0,
            cached: [0; 2],
            external_queries: 0,
            finished: BTreeMap::new(),
            calls: [0; 2],
            histograms: HashMap::new(),
            http: BTreeMap::new(),
        }))
    }
}

impl Stats {
    /// Counts a generation request as running.
    pub(crate) fn enter(&self) {
        self.0.lock().running += 1;
    }

    /// Counts a generation request as no longer running, and adds its measurements, unless it was
    /// refused. `reason` replaces the finish reason of a response that was not sent completely.
    pub(crate) fn leave(&self, seen: Option<&Observation>, reason: Option<Finish>) {
        let mut totals = self.0.lock();
        totals.running = totals.running.saturating_sub(1);
        let Some(seen) = seen else {
            return;
        };
        totals.prompt_tokens += seen.prompt_tokens;
        totals.generation_tokens += seen.tokens;
        let [prefix, transfer] = &mut totals.cached;
        match seen.cached_by {
            CachedBy::Prefix => *prefix += seen.cached,
            CachedBy::Transfer => *transfer += seen.cached,
        }
        if seen.cached_by == CachedBy::Transfer {
            totals.external_queries += seen.prompt_tokens;
        }
        let reason = reason.unwrap_or(seen.finish);
        *totals.finished.entry(reason).or_default() += 1;
        if let Some((is_stream, runs)) = seen.calls
            && let Some(count) = totals.calls.get_mut(usize::from(is_stream))
        {
            *count += runs;
        }
        if let Some(first) = seen.first {
            totals.add(FIRST_TOKEN, (first - seen.start).as_secs_f64(), 1);
            // The first step computes the prompt, too.
            totals.add(STEP, seen.prompt_tokens as f64 + 1.0, 1);
            totals.add(STEP, 1.0, seen.tokens.saturating_sub(1));
        }
        let gaps = totals.histograms.entry(INTER_TOKEN);
        gaps.or_insert_with(|| Histogram::of(INTER_TOKEN))
            .merge(&seen.gaps);
        for (name, value) in values(seen, Instant::now()) {
            totals.add(name, value, 1);
        }
    }

    /// Adds a response. `handler` is the path of the request, or `none` if it is unknown.
    pub(crate) fn http(
        &self,
        (handler, method): (&'static str, &'static str),
        status: u16,
        (request_bytes, response_bytes): (u64, u64),
        took: Duration,
    ) {
        let mut totals = self.0.lock();
        totals.add(HTTP_DURATION_FINE, took.as_secs_f64(), 1);
        let http = totals
            .http
            .entry((handler, method))
            .or_insert_with(|| Http {
                duration: Histogram::of(HTTP_DURATION),
                ..Http::default()
            });
        *http.statuses.entry(status / 100).or_default() += 1;
        http.request_bytes += request_bytes;
        http.response_bytes += response_bytes;
        http.duration.add(took.as_secs_f64(), 1);
    }

    /// Returns a copy of the totals.
    pub(crate) fn totals(&self) -> Totals {
        self.0.lock().clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_count_up_to_and_including_each_bound() {
        let mut histogram = Histogram::of("vllm:request_params_n");
        for value in [0.0, 1.0, 1.5, 20.0, 21.0] {
            histogram.add(value, 1);
        }
        let counts: Vec<u64> = histogram.cumulative().collect();
        // The bounds are 1, 2, 5, 10, 20.
        assert_eq!(counts, [2, 3, 3, 3, 4, 5]);
        assert!((histogram.sum - 43.5).abs() < 1e-9);
        let twice = histogram.clone();
        histogram.merge(&twice);
        assert_eq!(histogram.cumulative().last(), Some(10));
    }
}
