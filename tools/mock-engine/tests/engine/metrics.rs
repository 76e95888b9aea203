//! `/metrics` against the families that a vLLM 0.32 server printed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mock_engine::{Engine, EngineConfig};
use serde_json::{Value, json};

use crate::client::{Client, ask, post};
use crate::command::Mock;

const FIXTURE: &str = include_str!("../../fixtures/vllm-0.32-metrics.jsonl");

/// A sample: its name, its labels and its value.
type Sample = (String, BTreeMap<String, String>, f64);

/// Metrics as a scraper reads them.
#[derive(Debug, Default)]
struct Scrape {
    types: BTreeMap<String, String>,
    samples: Vec<Sample>,
}

impl Scrape {
    fn read(text: &str) -> Self {
        let mut scrape = Self::default();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                let old = scrape.types.insert(name.to_owned(), kind.to_owned());
                assert_eq!(old, None, "{name}");
            } else if !line.starts_with('#') {
                scrape.samples.push(sample(line));
            }
        }
        scrape
    }

    fn of(mock: &Mock) -> Self {
        let response = mock.get("/metrics");
        let kind = response.header("content-type").unwrap();
        assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
        Self::read(&String::from_utf8(response.body).unwrap())
    }

    /// Returns the value of the sample with this name and these labels.
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let has = |sample: &&Sample| {
            let has =
                |(name, value): &(&str, &str)| sample.1.get(*name).is_some_and(|v| v == value);
            sample.0 == name && labels.iter().all(has)
        };
        let found: Vec<&Sample> = self.samples.iter().filter(has).collect();
        assert_eq!(found.len(), 1, "{name} {labels:?}: {found:?}");
        found[0].2
    }
}

fn sample(line: &str) -> Sample {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let (name, labels) = series.split_once('{').unwrap_or((series, ""));
    let labels = labels
        .trim_end_matches('}')
        .split("\",")
        .filter_map(|pair| {
            let (name, value) = pair.split_once("=\"")?;
            Some((name.to_owned(), value.trim_end_matches('"').to_owned()))
        });
    (name.to_owned(), labels.collect(), value.parse().unwrap())
}

fn names(value: &Value) -> BTreeSet<&str> {
    let all = value.as_array().unwrap().iter();
    all.map(|name| name.as_str().unwrap()).collect()
}

#[test]
fn every_family_of_vllm_is_printed_with_its_labels() {
    let mock = Mock::start(&[]);
    // The families of HTTP requests have series once there was a request.
    mock.post("/v1/completions", &json!({"prompt": "a"}));
    let scrape = Scrape::of(&mock);
    let mut expected = 0;
    for line in FIXTURE.lines() {
        let family: Value = serde_json::from_str(line).unwrap();
        let name = family["name"].as_str().unwrap();
        let kind = family["type"].as_str().unwrap();
        assert_eq!(
            scrape.types.get(name).map(String::as_str),
            Some(kind),
            "{name}"
        );
        let suffixes: &[&str] = match kind {
            "histogram" => &["_bucket", "_count", "_sum"],
            "summary" => &["_count", "_sum"],
            _ => &[""],
        };
        for suffix in suffixes {
            let full = format!("{name}{suffix}");
            let samples: Vec<&Sample> = scrape.samples.iter().filter(|s| s.0 == full).collect();
            assert!(!samples.is_empty(), "{full}");
            let mut labels = names(&family["labels"]);
            if *suffix == "_bucket" {
                labels.insert("le");
                let bounds: BTreeSet<&str> = samples.iter().map(|s| s.1["le"].as_str()).collect();
                assert_eq!(bounds, names(&family["buckets"]), "{full}");
            }
            for sample in samples {
                let have: BTreeSet<&str> = sample.1.keys().map(String::as_str).collect();
                assert_eq!(have, labels, "{full}");
            }
        }
        for series in family["series"].as_array().unwrap() {
            let pairs: Vec<(&str, &str)> = series
                .as_object()
                .unwrap()
                .iter()
                .map(|(name, value)| (name.as_str(), value.as_str().unwrap()))
                .collect();
            if kind != "histogram" {
                scrape.value(name, &pairs);
            }
        }
        expected += 1;
    }
    assert!(expected > 90);
    // The only other family is the mock's own.
    assert_eq!(scrape.types.len(), expected + 1);
}

#[test]
fn the_values_follow_from_the_requests() {
    let mock = Mock::start(&["--itl", "1ms", "--ttft", "10ms"]);
    let path = "/v1/completions";
    mock.post(path, &json!({"prompt": "a b c", "max_tokens": 5}));
    mock.post(
        path,
        &json!({"prompt": "a b", "max_tokens": 64, "stream": true}),
    );
    mock.post(path, &json!({"prompt": "a", "max_tokens": 0}));
    mock.get("/nothing");
    let scrape = Scrape::of(&mock);
    let value = |name: &str| scrape.value(name, &[]);
    assert_eq!(value("vllm:prompt_tokens_total"), 5.0);
    assert_eq!(value("vllm:generation_tokens_total"), 37.0);
    assert_eq!(value("vllm:num_requests_running"), 0.0);
    for (reason, count) in [("length", 1.0), ("stop", 1.0), ("abort", 0.0)] {
        let labels = [("finished_reason", reason)];
        assert_eq!(
            scrape.value("vllm:request_success_total", &labels),
            count,
            "{reason}"
        );
    }
    let source = [("source", "local_compute")];
    assert_eq!(
        scrape.value("vllm:prompt_tokens_by_source_total", &source),
        5.0
    );
    for (name, count) in [
        ("vllm:time_to_first_token_seconds", 2.0),
        ("vllm:inter_token_latency_seconds", 4.0 + 31.0),
        ("vllm:e2e_request_latency_seconds", 2.0),
        ("vllm:request_queue_time_seconds", 2.0),
        ("vllm:iteration_tokens_total", 37.0),
        ("vllm:request_prompt_tokens", 2.0),
    ] {
        assert_eq!(value(&format!("{name}_count")), count, "{name}");
        let last = scrape.value(&format!("{name}_bucket"), &[("le", "+Inf")]);
        assert_eq!(last, count, "{name}");
    }
    assert_eq!(value("vllm:iteration_tokens_total_sum"), 5.0 + 37.0);
    assert_eq!(value("vllm:request_params_max_tokens_sum"), 5.0 + 64.0);
    assert!(value("vllm:time_to_first_token_seconds_sum") >= 0.02);
    assert!(value("vllm:e2e_request_latency_seconds_sum") >= 0.02 + 0.035);
    let below = scrape.value(
        "vllm:time_to_first_token_seconds_bucket",
        &[("le", "0.005")],
    );
    assert_eq!(below, 0.0);
    for (handler, status, count) in [(path, "2xx", 2.0), (path, "4xx", 1.0), ("none", "4xx", 1.0)] {
        let labels = [("handler", handler), ("status", status)];
        assert_eq!(
            scrape.value("http_requests_total", &labels),
            count,
            "{labels:?}"
        );
    }
}

#[test]
fn aborted_streams_and_transfers_are_counted() {
    let config = EngineConfig {
        itl: Duration::from_secs(60),
        look_alike: true,
        ..EngineConfig::default()
    };
    let engine = Engine::start(config, 0).unwrap();
    let read = || {
        let response = ask(&engine, "GET /metrics HTTP/1.1\r\nhost: e\r\n\r\n");
        Scrape::read(&String::from_utf8(response.body).unwrap())
    };
    let mut client = Client::new(&engine);
    let params = json!({
        "do_remote_prefill": true, "do_remote_decode": false, "remote_block_ids": [[1]],
    });
    let body = json!({"prompt": "a b", "stream": true, "kv_transfer_params": params});
    client.send(&post("/v1/completions", &body.to_string()));
    client.head().unwrap();
    assert_eq!(read().value("vllm:num_requests_running", &[]), 1.0);
    drop(client);
    let aborted = [("finished_reason", "abort")];
    while read().value("vllm:request_success_total", &aborted) < 1.0 {}
    let scrape = read();
    assert_eq!(scrape.value("vllm:num_requests_running", &[]), 0.0);
    assert_eq!(scrape.value("vllm:generation_tokens_total", &[]), 1.0);
    let external = [("source", "external_kv_transfer")];
    assert_eq!(
        scrape.value("vllm:prompt_tokens_by_source_total", &external),
        2.0
    );
    assert_eq!(
        scrape.value("vllm:external_prefix_cache_hits_total", &[]),
        2.0
    );
}
