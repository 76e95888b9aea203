//! The heads of a request's legs.

use super::exchange::Exchange;
use super::trace;
use crate::fault::Fault;
use crate::fleet::Target;
use crate::h1::Framing;
use crate::net::{Conn, Net};
use crate::pd::{Leg, Role, Take, Uuid};
use crate::upstream::{Forwarded, HeadWriter};

/// Buffer capacity in bytes reserved for the fields that a leg's head has in addition to the
/// client's: ids, addresses and the body length. More than these fields need.
const LEG_HEAD_EXTRA_BYTES: usize = 192;

/// Writes the request head of a leg to `out`, without framing fields, and starts the leg's span.
/// `leg` is `None` for a request whose body is forwarded as it arrives.
pub(super) fn head<N: Net>(
    exchange: &Exchange<'_, N>,
    out: Vec<u8>,
    target: &Target,
    leg: Option<&Leg>,
    upgrade: bool,
) -> Result<HeadWriter, Fault> {
    let request = &exchange.request;
    let uuid = leg.and_then(|leg| leg.request_id).map(Uuid::text);
    let uuid = uuid.as_ref();
    let role = leg.map_or(Role::Decode, |leg| leg.role);
    let extra = Forwarded {
        request_id: uuid.map_or(request.id.as_bytes(), |uuid| uuid.as_str().as_bytes()),
        rank: leg.and_then(|leg| leg.rank),
        trace_headers: trace::trace_leg(exchange, role, target, leg),
        client_ip: exchange.client.conn.peer().map(|peer| peer.ip()),
        target,
        // Not forwarded if the proxy must read or edit the response.
        accept_encoding: leg.is_none_or(|leg| leg.take == Take::Response(None)),
        upgrade,
        is_tls: exchange.client.conn.uses_tls(),
    };
    HeadWriter::forwarded(out, &request.head, &request.bytes, &extra).map_err(Fault::Head)
}

/// Writes the head of a leg whose body is spliced, and starts the leg's span.
pub(super) fn spliced_head<N: Net>(
    exchange: &Exchange<'_, N>,
    target: &Target,
    leg: &Leg,
) -> Result<Vec<u8>, Fault> {
    // Close to the final size, because the head is held for as long as the engine is silent.
    let out = Vec::with_capacity(exchange.request.head.len + LEG_HEAD_EXTRA_BYTES);
    let head = head(exchange, out, target, Some(leg), false)?;
    Ok(head.finish(Framing::Length(leg.body.len() as u64)))
}
