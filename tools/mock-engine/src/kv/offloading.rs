//! The contract of the offloading connector's P2P tier: both legs have the same KV request id, and
//! the decode leg contains the address of the prefill engine to fetch the KV cache from.
//! `remote_kv_source` identifies a third engine that has a prefix of the prompt in its cache.

use super::fields::{Cap, broken, exactly, not_streamed, object, one_token, port, text, uuid4};
use super::meet::{Meetings, Side};
use super::{Admitted, Call};
use crate::api::Refusal;
use crate::config::Role;
use crate::json::Fields;

const PARAMS: &str = "kv_transfer_params";
const SOURCE: &str = "remote_kv_source";

pub(super) fn admit(meetings: &Meetings, call: &Call<'_>) -> Result<Admitted, Refusal> {
    if call.fields.some(PARAMS).is_none() {
        return match call.role {
            Role::Prefill => Err(broken(format!("{PARAMS}: absent at a prefill engine"))),
            Role::Decode | Role::Both | Role::Encoder => Ok(Admitted::default()),
        };
    }
    let params = object(call.fields, PARAMS)?;
    let leg = [
        params.has("remote_decoder"),
        params.has("remote_prefiller"),
        params.has(SOURCE),
    ];
    match (leg, call.role) {
        ([true, false, _], Role::Prefill | Role::Both) => prefill(meetings, call, &params),
        ([false, true, false], Role::Decode | Role::Both) => decode(meetings, call, &params),
        ([false, false, true], Role::Decode | Role::Both) => {
            exactly(&params, PARAMS, &[SOURCE])?;
            pull(&params)?;
            Ok(Admitted::default())
        }
        _ => {
            let names: Vec<&str> = params.names().collect();
            let role = call.role;
            Err(broken(format!("{PARAMS}: {names:?} at {role:?} engine")))
        }
    }
}

fn prefill(meetings: &Meetings, call: &Call<'_>, params: &Fields<'_>) -> Result<Admitted, Refusal> {
    if params.has(SOURCE) {
        exactly(params, PARAMS, &["remote_decoder", SOURCE])?;
        pull(params)?;
    } else {
        exactly(params, PARAMS, &["remote_decoder"])?;
    }
    let decoder = object(params, "remote_decoder")?;
    exactly(&decoder, "remote_decoder", &["kv_request_id"])?;
    let id = request_id(&decoder)?;
    not_streamed(call.fields)?;
    one_token(call.fields, call.kind, Cap::IfGiven, Cap::IfGiven)?;
    Ok(Admitted {
        is_prefill: true,
        wait: meetings.arrive(Side::Prefill, &id, call.prompt_sha256, "")?,
        ..Admitted::default()
    })
}

fn decode(meetings: &Meetings, call: &Call<'_>, params: &Fields<'_>) -> Result<Admitted, Refusal> {
    exactly(params, PARAMS, &["remote_prefiller"])?;
    let id = peer(params, "remote_prefiller")?;
    Ok(Admitted {
        wait: meetings.arrive(Side::Decode, &id, call.prompt_sha256, "")?,
        ..Admitted::default()
    })
}

/// Checks `remote_kv_source`, which identifies an engine to fetch a cached prefix from.
pub(crate) fn pull(params: &Fields<'_>) -> Result<(), Refusal> {
    peer(params, SOURCE).map(drop)
}

/// Checks the member `name`, which identifies an engine to fetch KV cache from, and returns its
/// `kv_request_id`.
fn peer(params: &Fields<'_>, name: &str) -> Result<String, Refusal> {
    let peer = object(params, name)?;
    exactly(
        &peer,
        name,
        &["kv_request_id", "remote_host", "remote_port"],
    )?;
    let host = text(&peer, "remote_host")?;
    if host.contains("//") || host.starts_with('[') {
        return Err(broken(format!("{name}.remote_host: {host}")));
    }
    port(&peer, "remote_port")?;
    request_id(&peer)
}

fn request_id(fields: &Fields<'_>) -> Result<String, Refusal> {
    let id = text(fields, "kv_request_id")?;
    uuid4("kv_request_id", &id)?;
    Ok(id)
}
