//! The serial NIXL protocol, version 1 (`--kv-connector nixl`,
//! `docs/pd-sidecar.md#nixl-version-1`), for engines that do not support version 2.
//!
//! Its parameters are members of the top-level object, and the prefill leg keeps the client's token
//! limits.

use super::plan::{Leg, Role, Take};
use super::request::PdRequest;
use crate::json::{EditError, Level, member};

/// Members that the decode leg copies from the prefill response.
const COPIED_MEMBERS: [&str; 4] = [
    "remote_block_ids",
    "remote_engine_id",
    "remote_host",
    "remote_port",
];

/// Returns the prefill leg: the client's body with `do_remote_decode` set and streaming disabled.
///
/// # Errors
/// If the body needs more than `JSON_EDITS_MAX` edits.
pub fn prefill_leg(request: &PdRequest<'_>) -> Result<Leg, EditError> {
    let mut edits = request.edits();
    edits.set(Level::Top, "do_remote_decode", b"true");
    edits.whole_response();
    request.leg(Role::Prefill, &edits, Take::Whole)
}

/// Returns the decode leg. `response` is the prefill response, a JSON object; a member that it
/// lacks is sent as `null`. Without a response the decoder computes the prompt itself.
///
/// # Errors
/// If the body needs more than `JSON_EDITS_MAX` edits.
pub fn decode_leg(request: &PdRequest<'_>, response: Option<&[u8]>) -> Result<Leg, EditError> {
    let mut edits = request.edits();
    if let Some(response) = response {
        edits.set(Level::Top, "do_remote_prefill", b"true");
        for name in COPIED_MEMBERS {
            edits.set(Level::Top, name, member(response, name).unwrap_or(b"null"));
        }
    }
    request.leg(Role::Decode, &edits, Take::Response(None))
}

/// Returns whether a prefill response describes KV cache: it must have block ids and an engine id.
#[must_use]
pub fn has_kv_cache(response: &[u8]) -> bool {
    let says = |name| member(response, name).is_some_and(|value| value != b"null");
    says("remote_block_ids") && says("remote_engine_id")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pd::Api;
    use crate::pd::testing::{Subject, apply};
    use serde_json::json;

    #[test]
    fn the_parameters_are_top_level_members() {
        let body = r#"{"messages":[],"max_tokens":9,"stream":true,"stream_options":{},"remote_host":"h","do_remote_prefill":true}"#;
        let mut subject = Subject::new(Api::Chat, body);
        subject.owned = crate::pd::request::owned(crate::pd::options::KvConnector::Nixl);
        let prefill = prefill_leg(&subject.request()).unwrap();
        let want = json!({"messages": [], "max_tokens": 9, "stream": false,
            "do_remote_decode": true});
        assert_eq!(apply(&prefill, body), want);
        let response = br#"{"id":"x","remote_block_ids":[1],"remote_engine_id":"e","remote_port":12345678901234567890}"#;
        assert!(has_kv_cache(response));
        assert!(!has_kv_cache(
            br#"{"remote_block_ids":null,"remote_engine_id":"e"}"#
        ));
        let decode = decode_leg(&subject.request(), Some(response)).unwrap();
        let mut want = json!({"messages": [], "max_tokens": 9, "stream": true,
            "stream_options": {}});
        assert_eq!(
            apply(&decode_leg(&subject.request(), None).unwrap(), body),
            want
        );
        want["do_remote_prefill"] = json!(true);
        want["remote_block_ids"] = json!([1]);
        want["remote_engine_id"] = json!("e");
        want["remote_host"] = json!(null);
        want["remote_port"] = json!(12_345_678_901_234_567_890_u64);
        assert_eq!(apply(&decode, body), want);
    }
}
