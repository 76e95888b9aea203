//! `LMCache` as a shared store (`--kv-connector lmcache`, `docs/pd-sidecar.md#lmcache`), with the
//! legs that the first llm-d sidecar sent.

use std::rc::Rc;

use super::contract::{Connector, Order, Rules};
use super::shared_storage;
use crate::budget::Kept;
use crate::json::EditError;
use crate::pd::edits::Caps;
use crate::pd::leg::{Leg, Role, Take};
use crate::pd::peer::Peer;
use crate::pd::request::PdRequest;

/// The connector `lmcache`.
pub(super) struct Lmcache;

const RULES: Rules = Rules {
    name: "lmcache",
    ..shared_storage::RULES
};

impl Connector for Lmcache {
    fn rules(&self) -> &'static Rules {
        &RULES
    }

    fn order(&self, _: &PdRequest<'_>) -> Order {
        Order::Serial
    }

    fn prefill_leg(&self, request: &PdRequest<'_>, _: &Peer) -> Result<Leg, EditError> {
        let mut edits = request.edits();
        edits.cap(request.api, Caps::Maxima);
        request.leg(Role::Prefill, &edits, Take::Nothing)
    }

    fn decode_leg(
        &self,
        request: &PdRequest<'_>,
        _: &Peer,
        _: Option<&Rc<Kept>>,
    ) -> Result<Leg, EditError> {
        request.local_leg()
    }
}
