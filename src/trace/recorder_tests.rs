//! Tests of the spans of a request.

use super::*;

const MS: u64 = 1_000_000;

fn recorder() -> Recorder {
    let context = TraceContext::new([1, 2], 3).sampled();
    Recorder::new(context, 9, (b"POST", b"/v1/x"), 10 * MS)
}

fn style() -> Style {
    Style {
        connector: "shared-storage",
        is_long: true,
        is_concurrent: false,
        is_parallel_dispatch: false,
        streams: true,
        is_data_parallel: false,
    }
}

fn start(role: Role, id: u64, now_ms: u64) -> LegStart<'static> {
    LegStart {
        role,
        method: "POST".into(),
        host: "h".to_owned(),
        port: None,
        target: "h:1".to_owned(),
        request_id: b"r",
        has_phase: true,
        now_ns: now_ms * MS,
        ids: [id, id + 1, id + 2],
    }
}

fn finish(recorder: Recorder, error: Option<&'static str>) -> Vec<Span> {
    recorder.finish(&Finish {
        now_ns: 100 * MS,
        status: 200,
        error,
        outcome: Some(("remote", None)),
    })
}

/// Returns the name, span id, parent id and end time in milliseconds of each span, ordered by span
/// id.
fn shape(spans: &[Span]) -> Vec<(&str, u64, u64, u64)> {
    let of = |span: &'_ Span| (span.span_id, span.parent_id, span.ended_ns / MS);
    let with_name = |span| {
        let (id, parent, ended) = of(span);
        (&*span.name, id, parent, ended)
    };
    let mut shape: Vec<_> = spans.iter().map(with_name).collect();
    shape.sort_unstable_by_key(|(_, id, ..)| *id);
    shape
}

fn millis(span: &Span, name: &str) -> Option<u64> {
    let full = format!("llm_d.pd_proxy.{name}");
    let found = span.attributes.iter().find(|(own, _)| *own == full)?;
    match found.1 {
        Value::Millis(millis) => Some(millis),
        _ => None,
    }
}

#[test]
fn decode_first_has_separate_decode_spans() {
    let mut recorder = recorder();
    recorder.forward(4, 11 * MS);
    recorder.split(style());
    assert_eq!(recorder.leg(start(Role::Decode, 10, 20)).span_id, 10);
    recorder.responded(200);
    assert_eq!(recorder.leg(start(Role::Prefill, 20, 30)).span_id, 20);
    recorder.prefilled(Ok(200), 40 * MS);
    recorder.leg(start(Role::Decode, 30, 55));
    recorder.responded(200);
    let spans = finish(recorder, None);
    assert_eq!(
        shape(&spans),
        [
            ("llm_d.pd_proxy.POST /v1/x", 3, 9, 100),
            ("forward_request", 4, 3, 100),
            ("HTTP POST", 10, 12, 30),
            ("llm_d.pd_proxy.decode", 12, 4, 30),
            ("HTTP POST", 20, 21, 40),
            ("llm_d.pd_proxy.prefill", 21, 4, 40),
            ("HTTP POST", 30, 32, 100),
            ("llm_d.pd_proxy.decode", 32, 21, 100),
        ]
    );
    let decode = spans.iter().find(|span| span.span_id == 32).unwrap();
    for (name, want) in [
        ("true_ttft_ms", 45),
        ("prefill_duration_ms", 10),
        ("coordinator_overhead_ms", 15),
        ("decode_duration_ms", 45),
        ("decode.duration_ms", 45),
        ("total_duration_ms", 90),
    ] {
        assert_eq!(millis(decode, name), Some(want), "{name}");
    }
    assert!(spans.iter().all(|span| span.error.is_none()));
}

#[test]
fn spans_of_a_leg_task_are_detached_from_the_request() {
    let mut recorder = recorder();
    recorder.forward(4, 11 * MS);
    recorder.split(Style {
        is_concurrent: true,
        ..style()
    });
    recorder.leg(start(Role::Prefill, 20, 20));
    let mut detached = recorder.detach();
    recorder.leg(start(Role::Decode, 30, 21));
    recorder.failed("decode_reset", 25 * MS);
    let spans = finish(recorder, Some("decode_reset"));
    assert_eq!(
        shape(&spans),
        [
            ("llm_d.pd_proxy.POST /v1/x", 3, 9, 100),
            ("forward_request", 4, 3, 100),
            ("HTTP POST", 30, 32, 25),
            ("llm_d.pd_proxy.decode", 32, 21, 100),
        ]
    );
    assert!(spans.iter().all(|span| span.error == Some("decode_reset")));
    finish_detached(&mut detached, Err("client_gone"), 300 * MS);
    assert_eq!(
        shape(&detached),
        [
            ("HTTP POST", 20, 21, 300),
            ("llm_d.pd_proxy.prefill", 21, 4, 300),
        ]
    );
    assert!(
        detached
            .iter()
            .all(|span| span.error == Some("client_gone"))
    );
}

#[test]
fn legs_beyond_the_limit_get_the_span_id_of_their_phase() {
    let mut recorder = recorder();
    recorder.forward(4, 11 * MS);
    recorder.split(style());
    recorder.cut(16);
    for nth in 0..TRACE_LEGS_MAX as u64 + 5 {
        let context = recorder.leg(start(Role::Decode, 1000 + 10 * nth, 20 + nth));
        recorder.responded(200);
        recorder.chunk(16 * nth);
        let is_bounded = nth >= TRACE_LEGS_MAX as u64;
        // 1001 is the id of the `chunked_decode` span.
        let want = if is_bounded { 1001 } else { 1000 + 10 * nth };
        assert_eq!(context.span_id, want);
        assert!(context.is_sampled());
    }
    let spans = finish(recorder, None);
    assert_eq!(spans.len(), TRACE_LEGS_MAX + 3);
    let chunked = spans.iter().find(|span| span.span_id == 1001).unwrap();
    assert_eq!((&*chunked.name, chunked.parent_id), ("chunked_decode", 4));
    let name = "llm_d.pd_proxy.chunked_decode.chunks";
    let chunks = Value::Count(TRACE_LEGS_MAX as u64 + 5);
    assert!(chunked.attributes.contains(&(name, chunks)));
}

#[test]
fn open_spans_end_with_the_request() {
    let spans = finish(recorder(), Some("bad_head"));
    assert_eq!(shape(&spans), [("llm_d.pd_proxy.POST /v1/x", 3, 9, 100)]);
    assert_eq!(spans[0].error, Some("bad_head"));
    let status = ("http.response.status_code", Value::Count(200));
    assert!(spans[0].attributes.contains(&status));
}
