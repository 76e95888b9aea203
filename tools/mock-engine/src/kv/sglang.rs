//! The `SGLang` contract: both legs have the same three members, which identify a room of the
//! prefill engine's bootstrap server.

use super::fields::{absent, broken, number, port, text};
use super::meet::{Meetings, Side};
use super::{Admitted, Call};
use crate::api::Refusal;
use crate::config::Role;

const ROOM: &str = "bootstrap_room";
const MEMBERS: [&str; 3] = ["bootstrap_host", "bootstrap_port", ROOM];
/// Number of valid bootstrap rooms, from 0: engines store a room as a signed 64-bit number.
const ROOMS: u64 = 1 << 63;

pub(super) fn admit(meetings: &Meetings, call: &Call<'_>) -> Result<Admitted, Refusal> {
    let is_split = MEMBERS.iter().any(|name| call.fields.has(name));
    let side = match call.role {
        Role::Prefill => Side::Prefill,
        Role::Decode | Role::Both | Role::Encoder if !is_split => return Ok(Admitted::default()),
        Role::Decode | Role::Both | Role::Encoder => Side::Decode,
    };
    let host = text(call.fields, "bootstrap_host")?;
    let port = port(call.fields, "bootstrap_port")?;
    let room = number(call.fields, ROOM)?;
    if room >= ROOMS {
        return Err(broken(format!("{ROOM}: {room} is not below 2^63")));
    }
    absent(call.fields, "kv_transfer_params")?;
    let terms = format!("{host}:{port}");
    let wait = meetings.arrive(side, &room.to_string(), call.prompt_sha256, &terms)?;
    Ok(Admitted {
        is_prefill: side == Side::Prefill,
        wait,
        ..Admitted::default()
    })
}
