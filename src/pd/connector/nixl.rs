//! The serial NIXL protocol, version 1 (`--kv-connector nixl`,
//! `docs/pd-sidecar.md#nixl-version-1`), for engines that do not support version 2.
//!
//! Its parameters are members of the top-level object, and the prefill leg keeps the client's token
//! limits.

use std::rc::Rc;

use super::contract::{BASE, Connector, Order, Rules};
use crate::budget::Kept;
use crate::json::{EditError, Level, Watch, member};
use crate::pd::handoff::SingleUse;
use crate::pd::leg::{Collected, Leg, Role, Take};
use crate::pd::outcome::Reason;
use crate::pd::peer::Peer;
use crate::pd::request::{CLIENT_OWNED_KV, PdRequest, with_kv};

/// Members that the decode leg copies from the prefill response.
const COPIED_MEMBERS: [&str; 4] = [
    "remote_block_ids",
    "remote_engine_id",
    "remote_host",
    "remote_port",
];

/// The members that clients must not set: those of version 2, and the parameters of version 1.
const CLIENT_OWNED: Watch = &with_kv::<{ OWN.len() + CLIENT_OWNED_KV.len() }>(OWN);

const OWN: Watch = &[
    (Level::Top, "do_remote_decode"),
    (Level::Top, "do_remote_prefill"),
    (Level::Top, "remote_block_ids"),
    (Level::Top, "remote_engine_id"),
    (Level::Top, "remote_host"),
    (Level::Top, "remote_port"),
];

/// The connector `nixl`.
pub(super) struct Nixl;

const RULES: Rules = Rules {
    name: "nixl",
    client_owned: CLIENT_OWNED,
    ..BASE
};

impl Connector for Nixl {
    fn rules(&self) -> &'static Rules {
        &RULES
    }

    fn order(&self, _: &PdRequest<'_>) -> Order {
        Order::Serial
    }

    /// Returns the client's body with `do_remote_decode` set and streaming disabled.
    fn prefill_leg(&self, request: &PdRequest<'_>, _: &Peer) -> Result<Leg, EditError> {
        let mut edits = request.edits();
        edits.set(Level::Top, "do_remote_decode", b"true");
        edits.whole_response();
        request.leg(Role::Prefill, &edits, Take::Whole)
    }

    /// Returns the client's body with members of the prefill response, a JSON object; a member that
    /// it lacks is sent as `null`. Without a response the decoder computes the prompt itself.
    fn decode_leg(
        &self,
        request: &PdRequest<'_>,
        _: &Peer,
        response: Option<&Rc<Kept>>,
    ) -> Result<Leg, EditError> {
        let mut edits = request.edits();
        if let Some(response) = response {
            edits.set(Level::Top, "do_remote_prefill", b"true");
            for name in COPIED_MEMBERS {
                edits.set(Level::Top, name, member(response, name).unwrap_or(b"null"));
            }
        }
        request.leg(Role::Decode, &edits, Take::Response(None))
    }

    /// Returns the whole response if it describes KV cache.
    fn handoff(&self, collected: Collected) -> Option<SingleUse> {
        match collected {
            Collected::Whole(response) if has_kv_cache(&response) => Some(SingleUse::of(response)),
            Collected::Whole(_) | Collected::Handoff(_) | Collected::Nothing => {
                Some(SingleUse::none(Reason::MissingKv))
            }
        }
    }
}

/// Returns whether a prefill response describes KV cache: it must have block ids and an engine id.
fn has_kv_cache(response: &[u8]) -> bool {
    let has = |name| member(response, name).is_some_and(|value| value != b"null");
    has("remote_block_ids") && has("remote_engine_id")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Api;
    use crate::pd::testing::{Subject, apply, kept, peer};
    use serde_json::json;

    #[test]
    fn the_parameters_are_top_level_members() {
        let body = r#"{"messages":[],"max_tokens":9,"stream":true,"stream_options":{},"remote_host":"h","do_remote_prefill":true}"#;
        let mut subject = Subject::new(Api::Chat, body);
        subject.owned = Nixl.rules().client_owned;
        let prefill = Nixl.prefill_leg(&subject.request(), &peer()).unwrap();
        let want = json!({"messages": [], "max_tokens": 9, "stream": false,
            "do_remote_decode": true});
        assert_eq!(apply(&prefill, body), want);
        let response = r#"{"id":"x","remote_block_ids":[1],"remote_engine_id":"e","remote_port":12345678901234567890}"#;
        assert!(has_kv_cache(response.as_bytes()));
        assert!(!has_kv_cache(
            br#"{"remote_block_ids":null,"remote_engine_id":"e"}"#
        ));
        let decode = Nixl
            .decode_leg(&subject.request(), &peer(), kept(Some(response)).as_ref())
            .unwrap();
        let mut want = json!({"messages": [], "max_tokens": 9, "stream": true,
            "stream_options": {}});
        assert_eq!(
            apply(
                &Nixl.decode_leg(&subject.request(), &peer(), None).unwrap(),
                body
            ),
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
