//! The contract of NIXL push: the prefill leg asks for a handoff of push mode, and the decode leg
//! names the prefill engine and the request id of the prefill leg. The decode leg either carries
//! the handoff or was sent without waiting for it; both find the prefill leg by that id.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;

use super::fields::{broken, exactly, is, not_streamed, object, text};
use super::meet::{Meetings, Side};
use super::{Admitted, Call};
use crate::api::Refusal;
use crate::config::Role;
use crate::pd::{self, Leg};
use crate::sync::Guarded;

const PARAMS: &str = "kv_transfer_params";

/// The state that engines with NIXL push share.
#[derive(Clone, Debug, Default)]
pub struct Push {
    /// The split requests received so far, by engine id and request id.
    pub meetings: Meetings,
    engine: Arc<Guarded<String>>,
    concurrent: Arc<AtomicU64>,
}

impl Push {
    /// Creates the state of engines whose prefill engine has the id `engine`.
    #[must_use]
    pub fn new(engine: &str) -> Self {
        let push = Self::default();
        push.set_engine(engine);
        push
    }

    /// Replaces the id of the prefill engine, as a restart does.
    pub fn set_engine(&self, engine: &str) {
        engine.clone_into(&mut self.engine.lock());
    }

    /// Returns the number of decode legs that carried no block ids, so that they cannot have been
    /// made from a handoff.
    #[must_use]
    pub fn concurrent(&self) -> u64 {
        self.concurrent.load(Ordering::Relaxed)
    }
}

pub(super) fn admit(terms: &Push, call: &Call<'_>) -> Result<Admitted, Refusal> {
    match (pd::leg(call.fields.value(PARAMS)), call.role) {
        (Leg::Prefill, Role::Prefill | Role::Both) => prefill(terms, call),
        (Leg::Decode, Role::Decode | Role::Both) => decode(terms, call),
        (Leg::Local, Role::Decode | Role::Both) => Ok(Admitted::default()),
        (leg, role) => Err(broken(format!("{PARAMS}: {leg:?} leg at {role:?} engine"))),
    }
}

fn prefill(terms: &Push, call: &Call<'_>) -> Result<Admitted, Refusal> {
    let params = object(call.fields, PARAMS)?;
    is(&params, "do_remote_decode", "true")?;
    not_streamed(call.fields)?;
    let id = call.head.header("x-request-id").unwrap_or_default();
    let engine = terms.engine.lock().clone();
    let key = format!("{engine}/{id}");
    terms
        .meetings
        .arrive(Side::Prefill, &key, call.prompt_sha256, "")?;
    let handoff = json!({"do_remote_prefill": true, "do_remote_decode": false,
        "remote_block_ids": [[1, 2, 3]], "remote_engine_id": engine, "remote_request_id": id,
        "remote_host": "127.0.0.1", "remote_port": call.port, "tp_size": 1, "pp_size": 1,
        "transfer_mode": "push"});
    Ok(Admitted {
        members: format!(",\"{PARAMS}\":{handoff}"),
        is_prefill: true,
        ..Admitted::default()
    })
}

fn decode(terms: &Push, call: &Call<'_>) -> Result<Admitted, Refusal> {
    let params = object(call.fields, PARAMS)?;
    is(&params, "do_remote_decode", "false")?;
    is(&params, "transfer_mode", "\"push\"")?;
    let id = text(&params, "remote_request_id")?;
    if !params.has("remote_block_ids") {
        let names = [
            "do_remote_prefill",
            "do_remote_decode",
            "remote_engine_id",
            "remote_host",
            "remote_port",
            "tp_size",
            "pp_size",
            "remote_request_id",
            "transfer_mode",
        ];
        exactly(&params, PARAMS, &names)?;
        if call.head.header("x-request-id") != Some(&*id) {
            return Err(broken("x-request-id: not that of the prefill leg"));
        }
        terms.concurrent.fetch_add(1, Ordering::Relaxed);
    }
    // A decoder that names an engine of the past waits for blocks that are never written.
    let key = format!("{}/{id}", text(&params, "remote_engine_id")?);
    let wait = terms
        .meetings
        .arrive(Side::Decode, &key, call.prompt_sha256, "")?;
    Ok(Admitted {
        wait,
        ..Admitted::default()
    })
}
