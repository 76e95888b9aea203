//! `SGLang`'s bootstrap rooms (`--kv-connector sglang`, `docs/pd-sidecar.md#sglang`).
//!
//! The legs are concurrent and have the same body, which contains the number of the room that the
//! engines use for the transfer.

use super::peer::Peer;
use super::plan::{Leg, Role, Take};
use super::request::PdRequest;
use crate::json::Quoted;
use crate::json::{EditError, Level};

/// Number of random bits in a room number. Engines accept 63. A request with a list of prompts uses
/// consecutive numbers from the room upwards, so one bit is left for those above the largest room.
const ROOM_BITS: u32 = 62;

/// Returns the prefill leg and the decode leg of a request, in this order.
///
/// # Errors
/// If the body needs more than `JSON_EDITS_MAX` edits.
pub fn pair(request: &PdRequest<'_>, peer: &Peer) -> Result<[Leg; 2], EditError> {
    let host = Quoted(&peer.host()).to_string();
    let port = peer.bootstrap_port.to_string();
    // Random rather than the time of day as in pd-sidecar: two proxies must not use the same room
    // because their requests arrive in the same nanosecond.
    let room = (request.random >> (u64::BITS - ROOM_BITS)).to_string();
    let mut edits = request.edits();
    edits.set(Level::Top, "bootstrap_host", host.as_bytes());
    edits.set(Level::Top, "bootstrap_port", port.as_bytes());
    edits.set(Level::Top, "bootstrap_room", room.as_bytes());
    Ok([
        request.leg(Role::Prefill, &edits, Take::Nothing)?,
        request.leg(Role::Decode, &edits, Take::Response(None))?,
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pd::Api;
    use crate::pd::testing::{Subject, apply, peer};
    use serde_json::json;

    #[test]
    fn s1_both_legs_have_the_same_body_and_room() {
        let body = r#"{"model":"q3","messages":[],"stream":true,"max_tokens":9}"#;
        let subject = Subject::new(Api::Chat, body);
        let [prefill, decode] = pair(&subject.request(), &peer()).unwrap();
        let want = json!({"model": "q3", "messages": [], "stream": true, "max_tokens": 9,
            "bootstrap_host": "10.4.0.7", "bootstrap_port": 8998,
            "bootstrap_room": (1_u64 << 62) - 1});
        assert_eq!(apply(&prefill, body), want);
        assert_eq!(apply(&decode, body), want);
    }
}
