//! The attributes of a request's spans, which are those of pd-sidecar's spans.

use std::borrow::Cow;

use super::exchange::Exchange;
use crate::api::Api;
use crate::fault::Fault;
use crate::fleet::Target;
use crate::h1::{Method, Name};
use crate::json::{Kind, Level};
use crate::net::Net;
use crate::pd::connector::SpanNames;
use crate::pd::routing_headers::Routing;
use crate::pd::{Connector, Leg, Order, PdRequest, Reason, Role, Uuid};
use crate::trace::{Finish, LegStart, RequestTrace, Style, TraceHeaders, Value, path_of};

/// Starts the `forward_request` span of a generation request (one that may be split).
pub(super) fn trace_forward<N: Net>(exchange: &Exchange<'_, N>, api: Api) {
    let (net, pd) = (&exchange.shard.net, &exchange.shard.config.pd);
    exchange.trace.record(net, |recorder, now_ns| {
        let path = path_of(&exchange.request.head, &exchange.request.bytes);
        recorder.forward(net.random(), now_ns);
        let connector = pd.kv_connector.name();
        recorder.set("llm_d.pd_proxy.connector", connector);
        recorder.set("llm_d.pd_proxy.kv_connector", connector);
        if let Some(encoder) = pd.encoder {
            recorder.set("llm_d.pd_proxy.ec_connector", encoder.name());
        }
        recorder.set("llm_d.pd_proxy.request_path", Value::text(path));
        if let Some(api) = api_name(api) {
            recorder.set("llm_d.openai.api", api);
        }
    });
}

/// Records the engines that the request head names as attributes of the `forward_request` span.
pub(super) fn trace_routing<N: Net>(exchange: &Exchange<'_, N>, routing: &Routing) {
    exchange.trace.record(&exchange.shard.net, |recorder, _| {
        let count = |count: usize| Value::Count(count as u64);
        if routing.encoders_named > 0 {
            let allowed = routing.encoders.len();
            recorder.set("llm_d.ec_proxy.encode_disaggregation_used", allowed > 0);
            recorder.set(
                "llm_d.ec_proxy.encoder_candidates",
                count(routing.encoders_named),
            );
            let name = match allowed {
                0 => "llm_d.ec_proxy.encoder_allowed",
                _ => "llm_d.ec_proxy.encoder_count",
            };
            recorder.set(name, count(allowed));
        }
        let first = routing.prefillers.first();
        recorder.set("llm_d.pd_proxy.disaggregation_used", first.is_some());
        if let Some(first) = first {
            recorder.set("llm_d.pd_proxy.prefill_target", shown(first));
            let count = Value::Count(routing.prefillers.len() as u64);
            recorder.set("llm_d.pd_proxy.prefill_candidates", count);
        }
        if let Some(source) = &routing.source {
            recorder.set("llm_d.pd_proxy.kv_cache_source", shown(source));
        }
    });
}

/// Records that the request names a prefill target that is not allowed.
pub(super) fn trace_denied<N: Net>(exchange: &Exchange<'_, N>, target: &Target) {
    exchange.trace.record(&exchange.shard.net, |recorder, _| {
        recorder.set("llm_d.pd_proxy.denied_target", shown(target));
    });
}

/// Records how the request is split. Called once its body is known.
pub(super) fn trace_split<N: Net>(
    exchange: &Exchange<'_, N>,
    connector: &dyn Connector,
    pd_request: &PdRequest<'_>,
) {
    exchange.trace.record(&exchange.shard.net, |recorder, _| {
        let rules = connector.rules();
        let stream = pd_request.document.last(Level::Top, "stream");
        recorder.split(Style {
            connector: rules.name,
            is_long: rules.span_names == SpanNames::Long,
            is_concurrent: connector.order(pd_request) == Order::Concurrent,
            is_parallel_dispatch: rules.is_parallel_dispatch,
            streams: stream.is_some_and(|member| member.kind == Kind::True),
            is_data_parallel: exchange.client.rank() == 0
                && exchange
                    .request
                    .head
                    .field(Name::XDataParallelHostPort)
                    .is_some(),
        });
    });
}

/// Starts the span of a leg to `target` and returns the trace fields for its head. `leg` is given
/// if the leg belongs to a split request.
pub(super) fn trace_leg<N: Net>(
    exchange: &Exchange<'_, N>,
    role: Role,
    target: &Target,
    leg: Option<&Leg>,
) -> Option<TraceHeaders> {
    let (net, request) = (&exchange.shard.net, &exchange.request);
    let uuid = leg.and_then(|leg| leg.request_id).map(Uuid::text);
    let uuid = uuid.as_ref();
    exchange.trace.leg(net, |now_ns| LegStart {
        role,
        method: if request.head.method == Method::Post || leg.is_some() {
            Cow::Borrowed("POST")
        } else {
            let method = request.head.method_span.of(&request.bytes);
            Cow::Owned(String::from_utf8_lossy(method).into_owned())
        },
        host: target.host(),
        port: target.port(),
        target: target.to_string(),
        request_id: uuid.map_or(request.id.as_bytes(), |uuid| uuid.as_str().as_bytes()),
        has_phase: leg.is_some(),
        now_ns,
        ids: [net.random(), net.random(), net.random()],
    })
}

/// Ends the request's spans and pushes them to the ring. Does nothing if the request is not
/// sampled.
pub(super) fn trace_end<N: Net>(exchange: &mut Exchange<'_, N>) {
    let trace = std::mem::replace(&mut exchange.trace, RequestTrace::Off);
    let stats = &exchange.stats;
    let outcome = stats.outcome.map(|(outcome, reason)| {
        let reason = match reason {
            Reason::None => None,
            // The value that pd-sidecar uses.
            Reason::NoPrefiller => Some("no_prefill_header"),
            reason => Some(reason.label()),
        };
        (outcome.label(), reason)
    });
    trace.finish(&exchange.shard.net, |now_ns| Finish {
        now_ns,
        status: exchange.reply.status().unwrap_or(0),
        error: stats.fault.map(|fault| match fault {
            // The value that pd-sidecar uses.
            Fault::TargetDenied => "ssrf_protection_denied",
            fault => fault.label(),
        }),
        outcome,
    });
}

fn shown(target: &Target) -> Value {
    Value::text(target.to_string().as_bytes())
}

const fn api_name(api: Api) -> Option<&'static str> {
    match api {
        Api::Chat | Api::Completions | Api::Messages => Some("chat_completions"),
        Api::Responses => Some("responses"),
        Api::Generate => Some("generate"),
        Api::Invocations => Some("invocations"),
        Api::Unsplit => None,
    }
}
