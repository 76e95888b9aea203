//! The serial order: a prefill leg, then a decode leg that carries its handoff. A prefiller that is
//! known to push KV cache gets both together (`push`).

use super::prefill::Prefill;
use super::split::Split;
use super::{decode, decode_chunks, prefill, push, release, versions};
use crate::fault::Fault;
use crate::fleet::Target;
use crate::net::Net;
use crate::pd::OnDisconnect;
use crate::proxy::exchange::Exchange;
use crate::proxy::relay::PendingResponse;

/// Runs a prefill leg, then a decode leg built from its response. Returns the decoder's
/// response, or the prefill engine's error response.
pub(super) async fn serial<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &mut Split,
    targets: &[Target],
) -> Result<PendingResponse<N>, Fault> {
    let prefill = match push::identity(exchange, split, targets) {
        // Boxed, because a request that waits for its prefill would be larger.
        Some(identity) => Box::pin(push::prefill(exchange, split, targets, &identity)).await?,
        None => prefill::prefill(exchange, split, targets, 0).await?,
    };
    // A separate function, because a variable that several waits share adds to the size of all.
    decode_after(exchange, split, prefill).await
}

/// Runs the decode leg that follows a prefill leg. Returns its response, or the one that `prefill`
/// already has.
async fn decode_after<N: Net>(
    exchange: &mut Exchange<'_, N>,
    split: &mut Split,
    prefill: Prefill<N>,
) -> Result<PendingResponse<N>, Fault> {
    let (mut prefilled, mut peer) = match prefill {
        Prefill::Done(prefilled, peer) => (prefilled, peer),
        Prefill::Response(pending) => return Ok(pending),
    };
    let mut checked = Ok(());
    if let Some(handoff) = &mut prefilled.handoff {
        push::learn(exchange, &peer.target, handoff);
        if versions::matter(exchange, split, handoff) {
            // Boxed, because nearly no handoff needs it.
            checked = Box::pin(versions::check(exchange, split, &peer.target, handoff)).await;
        }
    }
    if split.connector().rules().can_decode_in_chunks {
        decode_chunks::cut(exchange, split);
    }
    let pending = if let Err(fault) = checked {
        Err(fault)
    } else if exchange.client.has_disconnected(exchange.shard).await {
        Err(Fault::ClientGone)
    } else {
        decode::decode(exchange, split, &mut peer, &mut prefilled).await
    };
    let rule = split.connector().rules().decode_on_disconnect;
    let pending = match pending {
        Ok(pending) if rule == OnDisconnect::UntilFirstByte => {
            // Boxed, because hardly any connector needs it.
            Box::pin(decode::after_first_byte(exchange, rule, pending)).await
        }
        pending => pending,
    };
    if pending.is_err()
        && let Some(handoff) = prefilled.stranded()
    {
        release::count_stranded(exchange, split, &peer, &handoff);
    }
    pending
}
