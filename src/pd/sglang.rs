//! `SGLang`'s bootstrap rooms (`--kv-connector sglang`; reference 6.3): both legs at once, with the
//! same body, and the engines meet in a room that the body names.

use super::peer::Peer;
use super::plan::{Leg, Role, Take};
use super::request::PdRequest;
use crate::json::Quoted;
use crate::json::{EditError, Level};

/// Bits of a room number. The engines take 63; a list of prompts takes as many numbers from the
/// room on, so there is room above the largest.
const ROOM_BITS: u32 = 62;

/// Both legs.
///
/// # Errors
/// When the body needs more edits than allowed.
pub fn pair(request: &PdRequest<'_>, peer: &Peer) -> Result<[Leg; 2], EditError> {
    let host = Quoted(&peer.host()).to_string();
    let port = peer.bootstrap_port.to_string();
    // Random, not the time of day: two proxies must not open the same room in one nanosecond.
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
    fn s1_both_legs_have_the_same_body_with_a_room() {
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
