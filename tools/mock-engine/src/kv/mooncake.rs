//! The Mooncake contract: both legs have the same transfer id, and the decode leg contains the
//! engine id of the rank that runs the prefill leg. `GET /query` on the prefill engine's bootstrap
//! port returns the engine id of each rank.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::fields::{
    Cap, absent, broken, exactly, is, not_streamed, object, one_token, text, uuid4,
};
use super::meet::{Meetings, Side};
use super::{Admitted, Call};
use crate::api::Refusal;
use crate::config::Role;
use crate::pd::{self, Leg};
use crate::sync::Guarded;

const PARAMS: &str = "kv_transfer_params";
const RANK: &str = "x-data-parallel-rank";

/// The engine ids of the ranks of a prefill engine, in rank order. Clones share the ids.
#[derive(Clone, Debug, Default)]
pub struct EngineIds(Arc<Guarded<Vec<String>>>);

impl EngineIds {
    /// Creates a list of engine ids, one per rank, starting with rank 0.
    #[must_use]
    pub fn new(ids: &[&str]) -> Self {
        let engines = Self::default();
        engines.set(ids);
        engines
    }

    /// Replaces the ids, as a restart of the engine does.
    pub fn set(&self, ids: &[&str]) {
        *self.0.lock() = ids.iter().map(|id| (*id).to_owned()).collect();
    }

    fn of_rank(&self, rank: usize) -> Option<String> {
        self.0.lock().get(rank).cloned()
    }

    fn has(&self, id: &str) -> bool {
        self.0.lock().iter().any(|have| have == id)
    }

    /// Returns the body of the response to `GET /query` of a Mooncake bootstrap server: the engine
    /// id of each rank.
    pub(crate) fn page(&self) -> String {
        let ids = self.0.lock();
        let ranks = ids.iter().enumerate();
        let page: Map<String, Value> = ranks
            .map(|(rank, id)| (rank.to_string(), json!({"engine_id": id})))
            .collect();
        Value::from(page).to_string()
    }
}

/// The state that Mooncake engines share.
#[derive(Clone, Debug, Default)]
pub struct Mooncake {
    /// The engine ids of the prefill engine's ranks.
    pub engines: EngineIds,
    /// The split requests received so far, by transfer id.
    pub meetings: Meetings,
}

pub(super) fn admit(terms: &Mooncake, call: &Call<'_>) -> Result<Admitted, Refusal> {
    match (pd::leg(call.fields.value(PARAMS)), call.role) {
        (Leg::Prefill, Role::Prefill | Role::Both) => prefill(terms, call),
        (Leg::Decode, Role::Decode | Role::Both) => decode(terms, call),
        (Leg::Local, Role::Decode | Role::Both) => Ok(Admitted::default()),
        (leg, role) => Err(broken(format!("{PARAMS}: {leg:?} leg at {role:?} engine"))),
    }
}

fn prefill(terms: &Mooncake, call: &Call<'_>) -> Result<Admitted, Refusal> {
    let params = object(call.fields, PARAMS)?;
    let names = ["do_remote_prefill", "do_remote_decode", "transfer_id"];
    exactly(&params, PARAMS, &names)?;
    let transfer = transfer_id(&params)?;
    not_streamed(call.fields)?;
    one_token(call.fields, call.kind, Cap::IfGiven, Cap::IfGiven)?;
    let rank = call.head.header(RANK).unwrap_or("absent");
    let engine = rank
        .parse()
        .ok()
        .and_then(|rank| terms.engines.of_rank(rank));
    let engine = engine.ok_or_else(|| broken(format!("{RANK}: no engine has rank {rank}")))?;
    let wait = terms
        .meetings
        .arrive(Side::Prefill, &transfer, call.prompt_sha256, &engine)?;
    Ok(Admitted {
        is_prefill: true,
        wait,
        ..Admitted::default()
    })
}

fn decode(terms: &Mooncake, call: &Call<'_>) -> Result<Admitted, Refusal> {
    let params = object(call.fields, PARAMS)?;
    let names = [
        "do_remote_prefill",
        "do_remote_decode",
        "transfer_id",
        "remote_bootstrap_addr",
        "remote_engine_id",
    ];
    exactly(&params, PARAMS, &names)?;
    is(&params, "do_remote_decode", "false")?;
    let transfer = transfer_id(&params)?;
    let addr = text(&params, "remote_bootstrap_addr")?;
    if !addr.starts_with("http://") || addr.ends_with('/') {
        return Err(broken(format!("remote_bootstrap_addr: {addr}")));
    }
    let engine = text(&params, "remote_engine_id")?;
    if !terms.engines.has(&engine) {
        return Err(Refusal::internal(&format!("unknown engine {engine}")));
    }
    absent(call.fields, "bootstrap_room")?;
    let wait = terms
        .meetings
        .arrive(Side::Decode, &transfer, call.prompt_sha256, &engine)?;
    Ok(Admitted {
        wait,
        ..Admitted::default()
    })
}

fn transfer_id(params: &crate::json::Fields<'_>) -> Result<String, Refusal> {
    let id = text(params, "transfer_id")?;
    match id.strip_prefix("xfer-") {
        Some(uuid) => uuid4("transfer_id", uuid)?,
        None => return Err(broken(format!("transfer_id: want xfer-…, got {id}"))),
    }
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_query_page_lists_each_ranks_engine_id() {
        let engines = EngineIds::new(&["e0", "e1"]);
        assert_eq!(
            engines.page(),
            r#"{"0":{"engine_id":"e0"},"1":{"engine_id":"e1"}}"#
        );
        engines.set(&["n0"]);
        assert!(engines.has("n0") && !engines.has("e0"));
        assert_eq!(engines.of_rank(1), None);
    }
}
