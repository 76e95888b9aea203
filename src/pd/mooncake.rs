//! Mooncake's transfer engine (`--kv-connector mooncake`, `docs/pd-sidecar.md#mooncake`).
//!
//! The legs are concurrent. The decoder fetches the KV cache from the engine whose id the
//! prefiller's bootstrap server returned.

use super::peer::{BootstrapEngine, Peer};
use super::plan::{Leg, Take};
use super::request::{Caps, PdRequest};
use crate::json::Quoted;
use crate::json::{EditError, inner, member, members};

/// Returns the prefill leg and the decode leg of a request, in this order.
///
/// # Errors
/// If the body needs more than `JSON_EDITS_MAX` edits.
pub fn pair(request: &PdRequest<'_>, peer: &Peer) -> Result<[Leg; 2], EditError> {
    let uuid = request.uuid;
    let params = format!(
        r#"{{"do_remote_decode":true,"do_remote_prefill":false,"transfer_id":"xfer-{uuid}"}}"#
    );
    let mut prefill = request.prefill_leg(params.as_bytes(), Caps::Sent, Take::Nothing)?;
    let engine = peer.engine.as_ref();
    prefill.rank = engine.map(|engine| engine.rank);
    Ok([prefill, decode_leg(request, peer)?])
}

/// Returns the decode leg alone, to repeat it when the engine id in the first one is out of date.
///
/// # Errors
/// If the body needs more than `JSON_EDITS_MAX` edits.
pub fn decode_leg(request: &PdRequest<'_>, peer: &Peer) -> Result<Leg, EditError> {
    let address = format!("http://{}:{}", peer.url_host(), peer.bootstrap_port);
    let engine = peer
        .engine
        .as_ref()
        .map_or(&b"null"[..], |engine| &engine.id);
    let mut params = format!(
        r#"{{"do_remote_decode":false,"do_remote_prefill":true,"transfer_id":"xfer-{}","remote_bootstrap_addr":{},"remote_engine_id":"#,
        request.uuid,
        Quoted(&address),
    )
    .into_bytes();
    params.extend_from_slice(engine);
    params.push(b'}');
    request.decode_leg(&params, Take::Response(None))
}

/// Maximum number of engines of one prefiller. A bootstrap response with more is rejected.
pub const ENGINES_MAX: usize = 1024;

/// Parses the response of a bootstrap server, `{"0":{"engine_id":"e0"},...}`, and returns its
/// engines in rank order. Returns `None` if the response does not have this shape, contains no
/// engine, or contains more than [`ENGINES_MAX`].
#[must_use]
pub fn engines(response: &[u8]) -> Option<Vec<BootstrapEngine>> {
    let mut engines = Vec::new();
    let mut walk = members(response);
    for item in &mut walk {
        let rank = std::str::from_utf8(inner(item.key)?).ok()?.parse().ok()?;
        let id = member(item.value, "engine_id")?;
        let is_text = inner(id).is_some_and(|text| !text.is_empty());
        if !is_text || engines.len() == ENGINES_MAX {
            return None;
        }
        let id = id.into();
        engines.push(BootstrapEngine { rank, id });
    }
    engines.sort_unstable_by_key(|engine| engine.rank);
    (walk.is_whole() && !engines.is_empty()).then_some(engines)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pd::Api;
    use crate::pd::testing::{NAME, Subject, apply, peer};
    use serde_json::json;

    #[test]
    fn k1_k3_the_legs_share_a_transfer_id_and_use_the_rank_of_the_engine() {
        let body = r#"{"model":"q3","prompt":"hi","max_tokens":32,"stream":true}"#;
        let subject = Subject::new(Api::Completions, body);
        let [prefill, decode] = pair(&subject.request(), &peer()).unwrap();
        let transfer = format!("xfer-{NAME}");
        let want = json!({"model": "q3", "prompt": "hi", "max_tokens": 1, "stream": false,
            "kv_transfer_params": {"do_remote_decode": true, "do_remote_prefill": false,
                "transfer_id": transfer}});
        assert_eq!(apply(&prefill, body), want);
        assert_eq!((prefill.rank, decode.rank), (Some(1), None));
        let want = json!({"model": "q3", "prompt": "hi", "max_tokens": 32, "stream": true,
            "kv_transfer_params": {"do_remote_decode": false, "do_remote_prefill": true,
                "transfer_id": transfer, "remote_bootstrap_addr": "http://10.4.0.7:8998",
                "remote_engine_id": "e1"}});
        assert_eq!(apply(&decode, body), want);
    }

    #[test]
    fn k1_engines_are_sorted_by_rank() {
        let response = br#"{"1":{"worker_addr":{},"engine_id":"e1"},"0":{"engine_id":"e0"}}"#;
        let found = engines(response).unwrap();
        let shown: Vec<_> = found.iter().map(|e| (e.rank, &*e.id)).collect();
        assert_eq!(shown, [(0, &b"\"e0\""[..]), (1, &b"\"e1\""[..])]);
        for broken in [
            "",
            "{}",
            "[]",
            "null",
            r#"{"0":{}}"#,
            r#"{"0":{"engine_id":7}}"#,
            r#"{"0":{"engine_id":""}}"#,
            r#"{"x":{"engine_id":"e"}}"#,
            r#"{"0":{"engine_id":"e"}"#,
        ] {
            assert_eq!(engines(broken.as_bytes()), None, "{broken}");
        }
    }
}
