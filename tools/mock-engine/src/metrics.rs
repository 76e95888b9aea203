//! `GET /metrics`: every metric family of a vLLM 0.32.0 server, in its order.
//!
//! The fixture lists the families as one server printed them: names, types, help, labels, label
//! values and bounds. Families of things that the mock has not, such as preemptions or the Python
//! interpreter, are 0. Unlike vLLM's Python front end, the mock counts aborted requests.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::LazyLock;

use serde::Deserialize;

use crate::engine::{Load, Shared};
use crate::stats::{Finish, HTTP_DURATION, HTTP_DURATION_FINE, Histogram, Http, Totals};

/// A metric family of the fixture.
#[derive(Debug, Deserialize)]
struct Family {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    help: String,
    labels: Vec<String>,
    /// The values of the labels other than the engine and the model, if there are any, for each
    /// series.
    series: Vec<BTreeMap<String, String>>,
    /// The bounds of a histogram as they are printed, the last one `+Inf`.
    buckets: Vec<String>,
}

static FAMILIES: LazyLock<Vec<Family>> = LazyLock::new(|| {
    let lines = include_str!("../fixtures/vllm-0.32-metrics.jsonl").lines();
    lines
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
});

/// Returns the bounds of the histogram `name`, without `+Inf`.
pub(crate) fn bounds(name: &str) -> Vec<f64> {
    let family = FAMILIES.iter().find(|family| family.name == name);
    let bounds = family
        .map(|family| family.buckets.iter())
        .into_iter()
        .flatten();
    let bounds = bounds.filter_map(|bound| bound.parse().ok());
    bounds.filter(|bound: &f64| bound.is_finite()).collect()
}

/// The values of one scrape.
struct Scrape<'a> {
    totals: Totals,
    load: Load,
    rank: String,
    model: &'a str,
}

/// Returns the metrics of an engine in the Prometheus text format.
pub(crate) fn metrics(shared: &Shared) -> String {
    let scrape = Scrape {
        totals: shared.stats.totals(),
        load: *shared.load.lock(),
        rank: shared.config.rank.to_string(),
        model: &shared.config.model,
    };
    let mut text = String::with_capacity(96 << 10);
    for family in FAMILIES.iter() {
        let _ = writeln!(text, "# HELP {} {}", family.name, family.help);
        let _ = writeln!(text, "# TYPE {} {}", family.name, family.kind);
        if family.name.starts_with("http_") {
            scrape.http(family, &mut text);
        } else if family.series.is_empty() {
            scrape.series(family, &BTreeMap::new(), &mut text);
        }
        for series in &family.series {
            scrape.series(family, series, &mut text);
        }
    }
    let received = shared.log.counters().requests;
    let _ = writeln!(
        text,
        "# HELP vllm:mock_requests_total Requests that the mock received."
    );
    let _ = writeln!(text, "# TYPE vllm:mock_requests_total counter");
    let labels = scrape.labels(&["engine", "model_name"], &BTreeMap::new(), None);
    let _ = writeln!(
        text,
        "vllm:mock_requests_total{labels} {:?}",
        received as f64
    );
    text
}

impl Scrape<'_> {
    /// Prints one series of a family.
    fn series(&self, family: &Family, series: &BTreeMap<String, String>, text: &mut String) {
        let name = family.name.as_str();
        if family.kind == "histogram" {
            let histogram = self.totals.histograms.get(name);
            return self.histogram(family, series, histogram, text);
        }
        let labels = self.labels(&family.labels, series, None);
        let value = self.value(name, series);
        let _ = writeln!(text, "{name}{labels} {value:?}");
    }

    /// Prints a histogram, an empty one for `None`.
    fn histogram(
        &self,
        family: &Family,
        series: &BTreeMap<String, String>,
        histogram: Option<&Histogram>,
        text: &mut String,
    ) {
        let name = &family.name;
        let mut counts = histogram.into_iter().flat_map(Histogram::cumulative);
        let mut count = 0.0;
        for bound in &family.buckets {
            count = counts.next().unwrap_or(0) as f64;
            let labels = self.labels(&family.labels, series, Some(bound));
            let _ = writeln!(text, "{name}_bucket{labels} {count:?}");
        }
        let sum = histogram.map_or(0.0, |histogram| histogram.sum);
        let labels = self.labels(&family.labels, series, None);
        let _ = writeln!(
            text,
            "{name}_count{labels} {count:?}\n{name}_sum{labels} {sum:?}"
        );
    }

    /// Formats the labels of a sample in alphabetical order, with `le` if a bound is given.
    fn labels(
        &self,
        names: &[impl AsRef<str>],
        series: &BTreeMap<String, String>,
        bound: Option<&str>,
    ) -> String {
        let mut all: BTreeMap<&str, &str> = BTreeMap::new();
        for name in names.iter().map(AsRef::as_ref) {
            let value = match name {
                "engine" => Some(self.rank.as_str()),
                "model_name" => Some(self.model),
                _ => series.get(name).map(String::as_str),
            };
            all.insert(name, value.unwrap_or_default());
        }
        all.extend(bound.map(|bound| ("le", bound)));
        if all.is_empty() {
            return String::new();
        }
        let all: Vec<String> = all
            .iter()
            .map(|(name, value)| format!("{name}=\"{}\"", escaped(value)))
            .collect();
        format!("{{{}}}", all.join(","))
    }

    /// Returns the value of a counter or gauge.
    fn value(&self, name: &str, series: &BTreeMap<String, String>) -> f64 {
        let totals = &self.totals;
        let label = |name: &str| series.get(name).map_or("", String::as_str);
        let [prefix, transfer] = totals.cached;
        let cached = prefix + transfer;
        let count = match name {
            "vllm:kv_cache_usage_perc" => return self.load.kv_cache_usage,
            "process_start_time_seconds" => return totals.started,
            _ if name.ends_with("_created") => return totals.started,
            "vllm:num_requests_running" => self.load.running.unwrap_or(totals.running),
            "vllm:num_requests_waiting" => self.load.waiting,
            "vllm:num_requests_waiting_by_reason" if label("reason") == "capacity" => {
                self.load.waiting
            }
            "vllm:engine_sleep_state" => u64::from(label("sleep_state") == "awake"),
            "vllm:prefix_cache_queries_total" | "vllm:prompt_tokens_total" => totals.prompt_tokens,
            "vllm:prefix_cache_hits_total" => prefix,
            "vllm:external_prefix_cache_queries_total" => totals.external_queries,
            "vllm:external_prefix_cache_hits_total" => transfer,
            "vllm:prompt_tokens_cached_total" => cached,
            "vllm:prompt_tokens_by_source_total" => match label("source") {
                "local_cache_hit" => prefix,
                "external_kv_transfer" => transfer,
                _ => totals.prompt_tokens.saturating_sub(cached),
            },
            "vllm:prompt_tokens_cached_by_source_total" => match label("source") {
                "device" => prefix,
                "p2p" => transfer,
                _ => 0,
            },
            "vllm:generation_tokens_total" => totals.generation_tokens,
            "vllm:request_success_total" => {
                let reason = match label("finished_reason") {
                    "stop" => Finish::Stop,
                    "length" => Finish::Length,
                    "abort" => Finish::Abort,
                    "error" => Finish::Error,
                    _ => return 0.0,
                };
                totals.finished.get(&reason).copied().unwrap_or(0)
            }
            "vllm:tool_call_parser_invocations_total"
                if label("outcome") == "tool_call"
                    && label("request_type") == "chat_completions" =>
            {
                let [whole, streamed] = totals.calls;
                if label("mode") == "streaming" {
                    streamed
                } else {
                    whole
                }
            }
            "python_info" | "vllm:cache_config_info" => 1,
            _ => 0,
        };
        count as f64
    }

    /// Prints a family of HTTP requests, with a series for each handler that had one.
    fn http(&self, family: &Family, text: &mut String) {
        let name = family.name.as_str();
        let series = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            let pairs = pairs.iter();
            pairs
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect()
        };
        if name.starts_with(HTTP_DURATION_FINE) {
            return self.series(family, &series(&[]), text);
        }
        let by_method = family.labels.iter().any(|label| label == "method");
        let mut handlers: BTreeMap<&str, (u64, u64, u64)> = BTreeMap::new();
        for ((handler, method), http) in &self.totals.http {
            let total: u64 = http.statuses.values().sum();
            let sums = handlers.entry(handler).or_default();
            sums.0 += total;
            sums.1 += http.request_bytes;
            sums.2 += http.response_bytes;
            let both = [("handler", *handler), ("method", *method)];
            match name {
                HTTP_DURATION => {
                    self.histogram(family, &series(&both), Some(&http.duration), text);
                }
                _ if by_method && family.labels.iter().any(|label| label == "status") => {
                    self.statuses(family, both, http, text);
                }
                _ if by_method => self.series(family, &series(&both), text),
                _ => {}
            }
        }
        for (handler, (count, received, sent)) in handlers.into_iter().filter(|_| !by_method) {
            let labels = self.labels(&family.labels, &series(&[("handler", handler)]), None);
            if family.kind == "gauge" {
                let _ = writeln!(text, "{name}{labels} {:?}", self.totals.started);
                continue;
            }
            let sum = if name == "http_request_size_bytes" {
                received
            } else {
                sent
            } as f64;
            let count = count as f64;
            let _ = writeln!(
                text,
                "{name}_count{labels} {count:?}\n{name}_sum{labels} {sum:?}"
            );
        }
    }

    /// Prints the number of responses of one handler and method for each class of status.
    fn statuses(&self, family: &Family, both: [(&str, &str); 2], http: &Http, text: &mut String) {
        for (class, count) in &http.statuses {
            let status = format!("{class}xx");
            let pairs = both.iter().copied().chain([("status", status.as_str())]);
            let series: BTreeMap<String, String> = pairs
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect();
            let labels = self.labels(&family.labels, &series, None);
            let value = match family.kind.as_str() {
                "gauge" => self.totals.started,
                _ => *count as f64,
            };
            let _ = writeln!(text, "{}{labels} {value:?}", family.name);
        }
    }
}

/// Escapes a label value.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fixture_is_complete() {
        assert_eq!(FAMILIES.len(), 94);
        assert!(bounds("vllm:request_params_n").starts_with(&[1.0, 2.0, 5.0]));
        for name in [
            HTTP_DURATION,
            HTTP_DURATION_FINE,
            "vllm:iteration_tokens_total",
        ] {
            assert!(!bounds(name).is_empty(), "{name}");
        }
    }

    #[test]
    fn label_values_are_escaped() {
        assert_eq!(escaped("a\"b\\c\nd"), r#"a\"b\\c\nd"#);
    }
}
