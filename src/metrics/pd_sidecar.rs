//! The metrics of llm-d's pd-sidecar, under its names, so that its dashboards and alerts keep
//! working (`docs/pd-sidecar.md#metrics`).
//!
//! Releases of pd-sidecar differ in the labels of these metrics: some have `connector`, later ones
//! `disagg_type`. Both are written, so a sum over either is right.

use std::fmt::Error;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;

use super::cell::Total;
use super::labels::{Disagg, Route};
use super::out::Out;
use super::shard::ShardMetrics;
use crate::pd::Role;

/// The stages of a split request, and the names of the histograms of their durations.
const STAGES: [(Role, &str); 3] = [
    (Role::Encode, "llm_d_disagg_sidecar_encode_duration_seconds"),
    (
        Role::Prefill,
        "llm_d_disagg_sidecar_prefill_duration_seconds",
    ),
    (Role::Decode, "llm_d_disagg_sidecar_decode_duration_seconds"),
];

/// pd-sidecar's names of APIs, and the routes that each one covers.
const API_TYPES: [(&str, &[Route]); 3] = [
    (
        "chat_completions",
        &[
            Route::Chat,
            Route::Completions,
            Route::Messages,
            Route::Invocations,
        ],
    ),
    ("responses", &[Route::Responses]),
    ("generate", &[Route::Generate]),
];

/// Collector that adds the metrics.
#[derive(Debug)]
pub(super) struct PdSidecar {
    pub(super) shards: Vec<Arc<ShardMetrics>>,
    /// Value of the label `connector`.
    pub(super) connector: &'static str,
}

impl Collector for PdSidecar {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut out = Out(encoder);
        let shards = || self.shards.iter();
        let connector = ("connector", self.connector);
        out.counters(
            "llm_d_disagg_sidecar_requests",
            "Requests on the intercepted paths, by API type",
            API_TYPES.iter().map(|(api, routes)| {
                let started = shards().flat_map(|shard| {
                    let routes = routes.iter();
                    routes.map(|route| shard.started[route.index()].get())
                });
                ([("api_type", *api)], started.sum())
            }),
        )?;
        out.counters(
            "llm_d_disagg_sidecar_disagg_requests",
            "Requests that are split among several engines",
            Disagg::ALL.iter().map(|disagg| {
                let count = shards().map(|shard| shard.disagg[disagg.index()].get());
                let labels = [connector, ("disagg_type", disagg.label())];
                (labels, count.sum())
            }),
        )?;
        for (role, name) in STAGES {
            let mut total = Total::default();
            for shard in shards() {
                shard.stages[role.index()].add_to(&mut total);
            }
            out.histograms(
                name,
                "Duration of a stage of split requests",
                [([connector], total)],
            )?;
        }
        out.counters(
            "llm_d_disagg_sidecar_request_errors",
            "Split requests that failed, by stage",
            STAGES.iter().map(|(role, _)| {
                let count = shards().map(|shard| shard.stage_errors[role.index()].get());
                ([connector, ("stage", role.label())], count.sum())
            }),
        )
    }
}
