//! Responses to requests other than inference: health, models, metrics, the pages of the mock
//! itself, and (if `echo` is on) a description of any request to an unknown path.

use std::sync::atomic::Ordering;

use serde_json::json;

use crate::engine::Shared;
use crate::fault_page::fault_page;
use crate::http::{Body, Head};
use crate::kv::EngineIds;
use crate::log::path_of;
use crate::metrics::metrics;
use crate::routes;
use crate::token::MODEL_TOKENS_MAX;
use crate::wire::Plan;

/// Returns the response to a request other than inference.
pub(crate) fn page(shared: &Shared, head: &Head, body: &Body) -> Plan {
    let path = path_of(&head.target);
    let get = head.method == "GET";
    let post = head.method == "POST";
    match path {
        "/health" | "/ping" if get => health(shared),
        "/ping" if post && !shared.config.echo => health(shared),
        "/load" if get && !shared.config.echo => load(shared),
        "/v1/models" if get => models(shared),
        // A real engine does not check the method of this one.
        "/metrics" if get || !shared.config.echo => Plan::new(
            200,
            "text/plain; version=0.0.4; charset=utf-8",
            metrics(shared),
        ),
        "/query" if get && shared.config.bootstrap.is_some() => {
            let ids = shared.config.bootstrap.as_ref();
            Plan::json(200, ids.map(EngineIds::page).unwrap_or_default())
        }
        "/mock/requests" if get => requests(shared),
        "/mock/fault" if post => fault_page(shared, body),
        _ => match routes::allow(path, &shared.config) {
            Some(methods) => {
                Plan::json(405, "{\"detail\":\"Method Not Allowed\"}").with("allow", methods)
            }
            None if shared.config.echo => echo(head, body),
            None => Plan::json(404, "{\"detail\":\"Not Found\"}"),
        },
    }
}

fn health(shared: &Shared) -> Plan {
    let mut plan = Plan::json(shared.health.load(Ordering::Relaxed), "");
    plan.content_type.clear();
    plan
}

fn load(shared: &Shared) -> Plan {
    // This request itself counts as a running one.
    let running = shared.log.counters().running.saturating_sub(1);
    Plan::json(200, json!({"server_load": running}).to_string())
}

fn models(shared: &Shared) -> Plan {
    let model = &shared.config.model;
    let list = json!({"object": "list", "data": [{
        "id": model, "object": "model", "created": 1_760_000_000, "owned_by": "vllm",
        "root": model, "parent": null, "max_model_len": MODEL_TOKENS_MAX, "permission": [],
    }]});
    Plan::json(200, list.to_string())
}

fn requests(shared: &Shared) -> Plan {
    let counters = shared.log.counters();
    let dump = json!({
        "requests": shared.log.summaries(),
        "counters": {
            "connections_accepted": counters.connections_accepted,
            "connections_open": counters.connections_open,
            "requests": counters.requests,
            "answered": counters.responded,
            "aborted": counters.aborted,
            "idle_closed": counters.idle_closed,
            "malformed": counters.malformed,
            "faulted": counters.faulted,
            "contract_broken": counters.contract_broken,
            "handoff_issued": counters.handoff_issued,
            "handoff_used": counters.handoff_used,
            "handoff_reused": counters.handoff_reused,
            "handoff_foreign": counters.handoff_foreign,
            "handoff_altered": counters.handoff_altered,
            "handoff_unknown": counters.handoff_unknown,
            "poisoned": counters.poisoned,
            "wrong_role": counters.wrong_role,
        },
    });
    Plan::json(200, dump.to_string())
}

fn echo(head: &Head, body: &Body) -> Plan {
    let echo = json!({
        "path": path_of(&head.target),
        "target": head.target,
        "method": head.method,
        "body_bytes": body.bytes,
        "body_sha256": body.sha256,
    });
    Plan::json(200, echo.to_string())
}
