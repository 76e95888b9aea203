//! NIXL push: the prefiller writes the KV cache into the memory of the decoder, instead of the
//! decoder reading it (`docs/pd-sidecar.md#nixl-push`).
//!
//! A decoder that knows the prefiller's identity beforehand can start together with it: it
//! registers its blocks with the prefiller, which writes them when they are computed. The identity
//! is learned from a handoff whose `transfer_mode` is `push`.

use super::uuid::Uuid;
use crate::json::{member, string_is};

/// The members of a handoff that identify a prefiller.
const REQUIRED: [&str; 4] = ["remote_engine_id", "remote_host", "remote_port", "tp_size"];
/// Members that some releases of vLLM add to them.
const OPTIONAL: [&str; 2] = ["pp_size", "dcp_size"];
/// Largest identity, in bytes. An engine id is a UUID with a suffix, and a host at most 253 bytes.
const IDENTITY_BYTES_MAX: usize = 1024;

/// The identity of a prefiller that pushes: the members that are equal in all of its handoffs, as
/// JSON text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushIdentity(Vec<u8>);

impl PushIdentity {
    /// Reads the identity from a handoff, which must be valid JSON. Returns `None` if the handoff
    /// is not one of push mode, or if it lacks a required member.
    #[must_use]
    pub fn of(handoff: &[u8]) -> Option<Self> {
        if !string_is(member(handoff, "transfer_mode")?, "push") {
            return None;
        }
        let mut text = Vec::new();
        for name in REQUIRED {
            add(&mut text, name, member(handoff, name).filter(is_scalar)?);
        }
        for name in OPTIONAL {
            if let Some(value) = member(handoff, name).filter(is_scalar) {
                add(&mut text, name, value);
            }
        }
        (text.len() <= IDENTITY_BYTES_MAX).then_some(Self(text))
    }

    /// Returns the `kv_transfer_params` of a decode leg that is sent together with its prefill leg.
    /// Both legs have `request_id` as their `x-request-id`, by which the prefiller finds the blocks
    /// that the decoder has registered.
    #[must_use]
    pub fn params(&self, request_id: Uuid) -> Vec<u8> {
        let mut params = br#"{"do_remote_prefill":true,"do_remote_decode":false"#.to_vec();
        params.extend_from_slice(&self.0);
        params.extend_from_slice(
            format!(r#","remote_request_id":"{request_id}","transfer_mode":"push"}}"#).as_bytes(),
        );
        params
    }
}

fn add(text: &mut Vec<u8>, name: &str, value: &[u8]) {
    text.extend_from_slice(format!(r#","{name}":"#).as_bytes());
    text.extend_from_slice(value);
}

/// Returns whether a value is a string or a number.
fn is_scalar(value: &&[u8]) -> bool {
    let first = value.first().copied();
    matches!(first, Some(b'"' | b'-' | b'0'..=b'9'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const HANDOFF: &str = r#"{"do_remote_prefill":true,"do_remote_decode":false,
        "remote_block_ids":[[1,2]],"remote_engine_id":"e-1","remote_request_id":"cmpl-7",
        "remote_host":"10.0.0.1","remote_port":5600,"tp_size":2,"dcp_size":1,"pp_size":1,
        "remote_num_tokens":421,"transfer_mode":"push"}"#;

    #[test]
    fn the_decode_parameters_have_the_identity_and_no_blocks() {
        let uuid = Uuid::v4([1, 2]);
        let params = PushIdentity::of(HANDOFF.as_bytes()).unwrap().params(uuid);
        let params: Value = serde_json::from_slice(&params).unwrap();
        assert_eq!(
            params,
            json!({"do_remote_prefill": true, "do_remote_decode": false,
                "remote_engine_id": "e-1", "remote_host": "10.0.0.1", "remote_port": 5600,
                "tp_size": 2, "pp_size": 1, "dcp_size": 1, "transfer_mode": "push",
                "remote_request_id": uuid.to_string()})
        );
    }

    #[test]
    fn only_a_complete_handoff_of_push_mode_has_an_identity() {
        let with = |from: &str, to: &str| HANDOFF.replace(from, to);
        for handoff in [
            with(r#""push""#, r#""pull""#),
            with(r#","transfer_mode":"push""#, ""),
            with(r#""remote_engine_id":"e-1","#, ""),
            with(r#""remote_engine_id":"e-1""#, r#""remote_engine_id":null"#),
            with(r#""remote_host":"10.0.0.1""#, r#""remote_host":["a","b"]"#),
            with("5600", "null"),
            with(r#""tp_size":2,"#, ""),
            with("e-1", &"e".repeat(IDENTITY_BYTES_MAX)),
        ] {
            assert_ne!(handoff, HANDOFF);
            assert_eq!(PushIdentity::of(handoff.as_bytes()), None, "{handoff}");
        }
        let old = with(r#""dcp_size":1,"pp_size":1,"#, "");
        assert!(PushIdentity::of(old.as_bytes()).is_some());
    }

    #[test]
    fn requests_of_one_engine_have_the_same_identity() {
        let next = HANDOFF
            .replace("[[1,2]]", "[[3]]")
            .replace("cmpl-7", "cmpl-8");
        let identity = |text: &str| PushIdentity::of(text.as_bytes());
        assert_eq!(identity(&next), identity(HANDOFF));
        let restarted = HANDOFF.replace("e-1", "e-2");
        assert_ne!(identity(&restarted), identity(HANDOFF));
    }
}
