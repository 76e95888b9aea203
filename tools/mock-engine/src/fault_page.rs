//! `POST /mock/fault`: sets and clears faults over HTTP.
//!
//! A request that this page accepts has the effect that it describes. Anything else gets a 400 that
//! states what is wrong: an unknown member, an unknown fault, a value that would exhaust memory.

use serde::Deserialize;
use serde_json::{Value, json};

use crate::engine::Shared;
use crate::fault::Fault;
use crate::http::Body;
use crate::wire::Plan;

/// Maximum number of bytes in the body of a request to a page under `/mock/`.
pub(crate) const BODY_BYTES_MAX: usize = 1 << 20;
/// Maximum number of pending faults.
const PENDING_MAX: usize = 1_000;
/// Maximum value of `large_json.bytes`: the response is built in memory.
const LARGE_BYTES_MAX: usize = 64 << 20;
/// Maximum value of `interim.count`: the interim responses are built in memory.
const INTERIM_MAX: u32 = 1_000;

/// Every fault as `fault` takes it, with a line of help. A fault with members is shown with all of
/// them.
pub(crate) const FAULTS: [(&str, &str); 33] = [
    (r#""refuse""#, "reset the next connection; takes no path"),
    (r#""reset_before_head""#, "RST instead of a response"),
    (r#""close_before_head""#, "FIN instead of a response"),
    (
        r#"{"reset_mid_body":{"after_events":2}}"#,
        "RST after 2 events",
    ),
    (
        r#"{"truncate_mid_body":{"after_events":2}}"#,
        "FIN after 2 events",
    ),
    (r#""stall_before_head""#, "never respond"),
    (r#""hold""#, "respond after {\"release\":true}"),
    (r#""stall_after_head""#, "send the head only"),
    (
        r#"{"stall_mid_stream":{"after_events":2}}"#,
        "send 2 events only",
    ),
    (
        r#"{"error_mid_stream":{"after_events":2}}"#,
        "error event after 2 events",
    ),
    (
        r#"{"stall_read":{"after_bytes":100}}"#,
        "stop reading the body",
    ),
    (r#""garbage""#, "respond with bytes that are not HTTP"),
    (
        r#""garbage_after_response""#,
        "append an unrequested response",
    ),
    (
        r#"{"status":{"code":503,"body":"{}","content_type":"application/json"}}"#,
        "this response",
    ),
    (
        r#"{"held_status":{"code":503,"body":"{}"}}"#,
        "the same, after {\"release\":true}",
    ),
    (r#""gzip""#, "200 with a body that is not valid gzip"),
    (r#""html""#, "200 with an HTML page"),
    (r#""half_json""#, "200 with truncated JSON"),
    (
        r#""close_idle""#,
        "close after the response, without notice",
    ),
    (
        r#""close_on_next_request""#,
        "close when the next request arrives",
    ),
    (
        r#"{"early_response":{"status":413,"keep":false}}"#,
        "respond before the body is read",
    ),
    (
        r#"{"slow":{"chunk_bytes":3,"delay_ms":5}}"#,
        "write 3 bytes every 5 ms",
    ),
    (r#""endless_head""#, "send header fields without end"),
    (r#"{"interim":{"count":1}}"#, "103 before the response"),
    (
        r#""both_framings""#,
        "content-length and transfer-encoding: chunked",
    ),
    (r#""bare_lf""#, "lines of the head end in LF"),
    (r#""extra_length""#, "content-length exceeds the body"),
    (
        r#""no_framing""#,
        "neither content-length nor chunks, then close",
    ),
    (
        r#""upgrade101""#,
        "101 Switching Protocols, then echo the bytes",
    ),
    (r#""no_content204""#, "204 No Content"),
    (
        r#""not_modified304""#,
        "304 with a content-length and no body",
    ),
    (
        r#"{"large_json":{"bytes":1000000}}"#,
        "add a string of this length to the response",
    ),
    (r#""http10_response""#, "HTTP/1.0 response, then close"),
];

/// The last entry of the list, apart from the others because its values have names.
pub(crate) const HANDOFF: (&str, &str) = (
    r#"{"handoff":"stale"}"#,
    "handoff of this shape: fresh, flat, omit, null, empty, text, list, stale, decoys",
);

/// Returns the name of a fault in its JSON form.
fn name(form: &str) -> &str {
    form.split('"').nth(1).unwrap_or(form)
}

/// Returns the names of all faults, separated by commas.
fn names() -> String {
    let all = FAULTS.iter().chain([&HANDOFF]).map(|(form, _)| name(form));
    all.collect::<Vec<_>>().join(", ")
}

/// Returns the help on faults: one line for each, indented.
pub(crate) fn help() -> String {
    let lines = FAULTS.iter().chain([&HANDOFF]).map(|(form, effect)| {
        if form.len() < 44 {
            format!("    {form:<44} {effect}\n")
        } else {
            format!("    {form}\n{:49}{effect}\n", "")
        }
    });
    lines.collect()
}

/// The body of a request, such as `{"fault": "html", "times": 1, "path": "/x"}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Order {
    fault: Option<Value>,
    times: Option<u32>,
    path: Option<String>,
    /// Text that the body of the faulted request contains.
    contains: Option<String>,
    #[serde(default)]
    clear: bool,
    #[serde(default)]
    release: bool,
}

/// Carries out the order in `body`, and returns the response to it.
pub(crate) fn fault_page(shared: &Shared, body: &Body) -> Plan {
    match carry_out(shared, body) {
        Ok(pending) => Plan::json(200, json!({"ok": true, "pending": pending}).to_string()),
        Err(error) => Plan::json(400, json!({"error": error}).to_string()),
    }
}

/// Carries out the order in `body`. Returns the number of pending faults.
fn carry_out(shared: &Shared, body: &Body) -> Result<usize, String> {
    if body.bytes > body.kept.len() as u64 {
        return Err(format!("the body exceeds {BODY_BYTES_MAX} bytes"));
    }
    let order: Order = serde_json::from_slice(&body.kept).map_err(|error| error.to_string())?;
    let fault = order.fault.as_ref().map(read).transpose()?;
    if fault.is_none() && !order.clear && !order.release {
        return Err("one of fault, clear and release is required".to_owned());
    }
    if order.times == Some(0) {
        return Err("times must be at least 1".to_owned());
    }
    if order.path.is_some() && order.contains.is_some() {
        return Err("path and contains exclude each other".to_owned());
    }
    let selects = order.path.is_some() || order.contains.is_some();
    if selects && fault == Some(Fault::Refuse) {
        return Err(
            "refuse applies to a connection: it takes neither path nor contains".to_owned(),
        );
    }
    if fault.is_none() && (selects || order.times.is_some()) {
        return Err("times, path and contains need a fault".to_owned());
    }
    if order.clear {
        shared.faults.clear();
    }
    if order.release {
        shared.gate.open();
    }
    if let Some(fault) = fault {
        if shared.faults.pending() >= PENDING_MAX {
            return Err(format!("{PENDING_MAX} faults are pending already"));
        }
        let (path, contains) = (order.path.as_deref(), order.contains.as_deref());
        shared.arm(path, contains, fault, order.times.unwrap_or(1));
    }
    Ok(shared.faults.pending())
}

/// Reads a fault, and checks that its values are bounded.
fn read(value: &Value) -> Result<Fault, String> {
    let given = match value {
        Value::String(given) => Some(given.as_str()),
        Value::Object(members) if members.len() == 1 => members.keys().next().map(String::as_str),
        _ => None,
    };
    let known = |form: &&(&str, &str)| Some(name(form.0)) == given;
    let Some((form, _)) = FAULTS.iter().chain([&HANDOFF]).find(known) else {
        return Err(format!(
            "no such fault: {value}; the faults are {}",
            names()
        ));
    };
    let fault: Fault = serde_json::from_value(value.clone())
        .map_err(|error| format!("{error}; the fault has the form {form}"))?;
    let problem = match &fault {
        Fault::Status { code, .. } | Fault::HeldStatus { code, .. }
            if !(200..=599).contains(code) =>
        {
            "code must be from 200 to 599".to_owned()
        }
        Fault::EarlyResponse { status, .. } if !(200..=599).contains(status) => {
            "status must be from 200 to 599".to_owned()
        }
        Fault::Status { content_type, .. } if content_type.contains(['\r', '\n']) => {
            "content_type must be one line".to_owned()
        }
        Fault::Slow { chunk_bytes: 0, .. } => "chunk_bytes must be at least 1".to_owned(),
        Fault::LargeJson { bytes } if *bytes > LARGE_BYTES_MAX => {
            format!("bytes must be at most {LARGE_BYTES_MAX}")
        }
        Fault::Interim { count } if *count > INTERIM_MAX => {
            format!("count must be at most {INTERIM_MAX}")
        }
        _ => return Ok(fault),
    };
    Err(problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_in_the_help_is_a_fault() {
        for (form, _) in FAULTS.iter().chain([&HANDOFF]) {
            let value: Value = serde_json::from_str(form).unwrap();
            assert!(read(&value).is_ok(), "{form}: {:?}", read(&value));
        }
        for shape in HANDOFF.1.split(": ").nth(1).unwrap().split(", ") {
            assert!(read(&json!({"handoff": shape})).is_ok(), "{shape}");
        }
        // The list is complete: serde names all faults when it meets another one.
        let error = serde_json::from_str::<Fault>("\"x\"").unwrap_err();
        let known = error.to_string();
        let known: Vec<&str> = known.split('`').skip(3).step_by(2).collect();
        assert_eq!(known.len(), FAULTS.len() + 1);
        for name in known {
            assert!(names().split(", ").any(|listed| listed == name), "{name}");
        }
    }

    #[test]
    fn unusable_faults_are_refused() {
        for (form, part) in [
            (json!("nothing"), "the faults are refuse, reset_before_head"),
            (json!({"html": 1, "gzip": 2}), "no such fault"),
            (json!(3), "no such fault"),
            (json!("slow"), r#"the form {"slow":{"chunk_bytes":3"#),
            (
                json!({"slow": {"chunk_bytes": 0, "delay_ms": 1}}),
                "at least 1",
            ),
            (json!({"status": {"code": 99}}), "from 200 to 599"),
            (
                json!({"early_response": {"status": 700}}),
                "from 200 to 599",
            ),
            (json!({"large_json": {"bytes": u64::MAX}}), "at most"),
            (json!({"interim": {"count": 1_001}}), "at most"),
            (json!({"handoff": "x"}), "handoff"),
        ] {
            let error = read(&form).unwrap_err();
            assert!(error.contains(part), "{form}: {error}");
        }
    }
}
