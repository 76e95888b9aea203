//! The contract of `MoRI-IO` in write mode. The prefill engine writes into the decode engine's
//! memory, so the prefill leg contains the decode engine's address, and both legs contain the rank.
//!
//! If the legs are sent in sequence, the decode leg contains the object that the prefill engine
//! returned, with further members added. If they are sent concurrently, it contains the prefill
//! engine's address.

use std::sync::Arc;

use super::fields::{
    Cap, broken, exactly, is, not_streamed, number, object, one_token, text, texts, uuid,
};
use super::meet::{Meetings, Side};
use super::offloading::pull;
use super::{Admitted, Call, dp_rank};
use crate::api::Refusal;
use crate::config::Role;
use crate::json::Fields;
use crate::pd::{self, Leg};
use crate::sync::Guarded;

const PARAMS: &str = "kv_transfer_params";
const RANK: &str = "x-data-parallel-rank";

/// The members that `kv_transfer_params` must have in every prefill leg and, if the legs are sent
/// concurrently, in every decode leg.
const PREFILL: [&str; 13] = [
    "do_remote_decode",
    "do_remote_prefill",
    "remote_engine_id",
    "remote_block_ids",
    "remote_port",
    "remote_host",
    "remote_notify_port",
    "remote_handshake_port",
    "remote_dp_rank",
    "remote_dp_rank_override",
    "transfer_id",
    "tp_size",
    "remote_dp_size",
];

/// The settings of a `MoRI-IO` deployment that the legs must contain, and the split requests
/// received so far.
#[derive(Clone, Debug, Default)]
pub struct Mori {
    /// Whether the engines expect the legs concurrently instead of in sequence.
    pub parallel: bool,
    /// Host of the decode engine that every prefill leg must contain.
    pub decode_host: String,
    /// The decode engine's ports: notification, handshake.
    pub decode_ports: (u16, u16),
    /// The prefill engine's ports: notification, handshake.
    pub prefill_ports: (u16, u16),
    /// Number of tensor-parallel ranks; 0 means 1.
    pub tp_size: u64,
    /// Number of data-parallel ranks over all hosts; 0 means 1.
    pub dp_size: u64,
    /// Number of data-parallel ranks per host; 0 if not configured.
    pub dp_size_local: u64,
    /// Hosts of the prefill engines, which decode legs must list in `remote_hosts`; empty unless
    /// there are several.
    pub prefill_hosts: Vec<String>,
    /// Hosts of the decode engines, which prefill legs must list in `remote_hosts`; empty unless
    /// there are several.
    pub decode_hosts: Vec<String>,
    /// The split requests received so far, by transfer id.
    pub meetings: Meetings,
    /// The `kv_transfer_params` in prefill responses, if the legs are sent in sequence.
    pub returned: Returned,
}

/// The `kv_transfer_params` object in prefill responses. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Returned(Arc<Guarded<Option<String>>>);

impl Returned {
    /// Sets the object's bytes; `None` restores the default object, which contains no rank.
    pub fn set(&self, raw: Option<&str>) {
        *self.0.lock() = raw.map(str::to_owned);
    }

    fn handed_out(&self, port: u16) -> String {
        let usual = || {
            format!(
                "{{ \"do_remote_prefill\":true,\"do_remote_decode\":false,\
                 \"remote_block_ids\":[[1, 2]],\"remote_engine_id\":\"m-{port}\",\
                 \"remote_host\":\"127.0.0.1\",\"remote_port\":{port},\"mock_float\":1.0}}"
            )
        };
        self.0.lock().clone().unwrap_or_else(usual)
    }
}

pub(super) fn admit(terms: &Mori, call: &Call<'_>) -> Result<Admitted, Refusal> {
    match (pd::leg(call.fields.value(PARAMS)), call.role) {
        (Leg::Prefill, Role::Prefill | Role::Both) => prefill(terms, call),
        (Leg::Decode, Role::Decode | Role::Both) => decode(terms, call),
        (Leg::Local, Role::Decode | Role::Both) => Ok(Admitted::default()),
        // The proxy forwards a prefill response's `kv_transfer_params` unchanged if it is not an
        // object.
        (Leg::Poison, Role::Decode) if !terms.parallel => Ok(Admitted::default()),
        (leg, role) => Err(broken(format!("{PARAMS}: {leg:?} leg at {role:?} engine"))),
    }
}

fn prefill(terms: &Mori, call: &Call<'_>) -> Result<Admitted, Refusal> {
    let params = object(call.fields, PARAMS)?;
    let mut names = PREFILL.to_vec();
    if !terms.decode_hosts.is_empty() {
        names.push("remote_hosts");
        if terms.dp_size_local > 0 {
            names.push("remote_dp_size_local");
        }
    }
    if params.has("remote_kv_source") {
        names.push("remote_kv_source");
        pull(&params)?;
    }
    exactly(&params, PARAMS, &names)?;
    for name in ["remote_engine_id", "remote_block_ids", "remote_port"] {
        is(&params, name, "null")?;
    }
    let host = text(&params, "remote_host")?;
    if host != terms.decode_host {
        let want = &terms.decode_host;
        return Err(broken(format!("remote_host: want {want}, got {host}")));
    }
    let (notify, handshake) = terms.decode_ports;
    equal(&params, "remote_notify_port", notify.into())?;
    equal(&params, "remote_handshake_port", handshake.into())?;
    sizes(terms, &params, &terms.decode_hosts)?;
    let transfer = transfer_id(&params)?;
    let rank = rank(terms, call, &params)?;
    hashed(terms, &transfer, rank)?;
    not_streamed(call.fields)?;
    one_token(call.fields, call.kind, Cap::Set, Cap::Set)?;
    let agreed = if terms.parallel {
        rank.to_string()
    } else {
        String::new()
    };
    let members = if terms.parallel {
        String::new()
    } else {
        format!(
            ",\"kv_transfer_params\":{}",
            terms.returned.handed_out(call.port)
        )
    };
    Ok(Admitted {
        members,
        is_prefill: true,
        wait: terms
            .meetings
            .arrive(Side::Prefill, &transfer, call.prompt_sha256, &agreed)?,
        ..Admitted::default()
    })
}

fn decode(terms: &Mori, call: &Call<'_>) -> Result<Admitted, Refusal> {
    let params = object(call.fields, PARAMS)?;
    is(&params, "remote_dp_rank_override", "true")?;
    let transfer = transfer_id(&params)?;
    let rank = rank(terms, call, &params)?;
    let agreed = if terms.parallel {
        parallel_decode(terms, &params)?;
        hashed(terms, &transfer, rank)?;
        rank.to_string()
    } else {
        let (notify, handshake) = terms.decode_ports;
        equal(&params, "remote_notify_port", notify.into())?;
        equal(&params, "remote_handshake_port", handshake.into())?;
        equal(&params, "remote_dp_size", terms.dp_size.max(1))?;
        hosts(terms, &params, &terms.prefill_hosts)?;
        String::new()
    };
    Ok(Admitted {
        wait: terms
            .meetings
            .arrive(Side::Decode, &transfer, call.prompt_sha256, &agreed)?,
        ..Admitted::default()
    })
}

fn parallel_decode(terms: &Mori, params: &Fields<'_>) -> Result<(), Refusal> {
    let mut names = PREFILL.to_vec();
    if !terms.prefill_hosts.is_empty() {
        names.push("remote_hosts");
        if terms.dp_size_local > 0 {
            names.push("remote_dp_size_local");
        }
    }
    exactly(params, PARAMS, &names)?;
    is(params, "remote_block_ids", "[]")?;
    let (notify, handshake) = terms.prefill_ports;
    let host = text(params, "remote_host")?;
    let engine = text(params, "remote_engine_id")?;
    if engine != format!("{host}:{handshake}") {
        return Err(broken(format!(
            "remote_engine_id: {engine} does not match {host}"
        )));
    }
    equal(params, "remote_port", handshake.into())?;
    equal(params, "remote_notify_port", notify.into())?;
    equal(params, "remote_handshake_port", handshake.into())?;
    sizes(terms, params, &terms.prefill_hosts)
}

fn sizes(terms: &Mori, params: &Fields<'_>, list: &[String]) -> Result<(), Refusal> {
    is(params, "remote_dp_rank_override", "true")?;
    equal(params, "tp_size", terms.tp_size.max(1))?;
    equal(params, "remote_dp_size", terms.dp_size.max(1))?;
    hosts(terms, params, list)
}

fn hosts(terms: &Mori, params: &Fields<'_>, list: &[String]) -> Result<(), Refusal> {
    if list.is_empty() {
        return Ok(());
    }
    let have = texts(params, "remote_hosts")?;
    if have != list {
        return Err(broken(format!("remote_hosts: want {list:?}, got {have:?}")));
    }
    if terms.dp_size_local > 0 {
        equal(params, "remote_dp_size_local", terms.dp_size_local)?;
    }
    Ok(())
}

fn equal(params: &Fields<'_>, name: &str, want: u64) -> Result<(), Refusal> {
    is(params, name, &want.to_string())
}

/// Returns `remote_dp_rank`, which must be below the number of data-parallel ranks. The
/// `x-data-parallel-rank` header field must contain the same rank or, if there is only one rank, be
/// absent.
fn rank(terms: &Mori, call: &Call<'_>, params: &Fields<'_>) -> Result<u64, Refusal> {
    let rank = number(params, "remote_dp_rank")?;
    let header = call.head.header(RANK);
    let want = (terms.dp_size > 1).then(|| rank.to_string());
    if header != want.as_deref() {
        return Err(broken(format!("{RANK}: want {want:?}, got {header:?}")));
    }
    if rank >= terms.dp_size.max(1) {
        return Err(broken(format!(
            "remote_dp_rank: {rank} is not below {}",
            terms.dp_size
        )));
    }
    Ok(rank)
}

/// Checks that `rank` is the [`dp_rank`] of the transfer id `transfer` without its prefix `tx`,
/// either over all ranks or over the ranks of one host.
fn hashed(terms: &Mori, transfer: &str, rank: u64) -> Result<(), Refusal> {
    let id = transfer.strip_prefix("tx").unwrap_or(transfer);
    let over_all = dp_rank(id, terms.dp_size);
    let over_host = dp_rank(id, terms.dp_size_local);
    if rank == over_all || (terms.dp_size_local > 0 && rank == over_host) {
        return Ok(());
    }
    Err(broken(format!(
        "remote_dp_rank: {id} belongs to rank {over_all}, got {rank}"
    )))
}

fn transfer_id(params: &Fields<'_>) -> Result<String, Refusal> {
    let id = text(params, "transfer_id")?;
    match id.strip_prefix("tx") {
        Some(rest) => uuid("transfer_id", rest)?,
        None => return Err(broken(format!("transfer_id: want tx…, got {id}"))),
    }
    Ok(id)
}
