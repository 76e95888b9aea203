//! Responses whose routed experts are merged from those of both engines (`pd::experts`).
//!
//! The response is not streamed: it must be complete before the client is sent a status, because
//! experts that do not match make it an error.

use super::decode;
use crate::budget::{Kept, Reserved};
use crate::fault::{Cause, Fault, Incident};
use crate::json::has_experts;
use crate::json::transform::{ResponseForm, Transforms};
use crate::net::{Net, end_turn};
use crate::pd::{ExpertsError, PromptExperts, Role};
use crate::proxy::exchange::Exchange;
use crate::proxy::relay::{self, PendingResponse};

/// The decoder's response cannot be read, or its experts not be merged.
const UNUSABLE: Fault = Fault::leg(Role::Decode, Cause::BadResponse);

/// Replaces the prompt's part of the routed experts in the decoder's response and sends that to the
/// client. A response that is an error or an event stream is relayed as it is.
pub(super) async fn respond<N: Net>(
    exchange: &mut Exchange<'_, N>,
    mut pending: PendingResponse<N>,
    prompt: Result<PromptExperts, ExpertsError>,
) -> Result<(), Fault> {
    let response = &pending.response;
    let status = response.head.status;
    if !(200..300).contains(&status) || response.is_event_stream() {
        return Box::pin(relay::relay(exchange, pending)).await;
    }
    // The edited copy of the response.
    let mut reserved = Reserved::new(&exchange.shard.budget);
    let edits = std::mem::take(&mut pending.edits);
    let body = decode::read_whole(exchange, pending).await;
    let mut body = body.map_err(|fault| match fault {
        Fault::ClientGone | Fault::BudgetSpent => fault,
        _ => UNUSABLE,
    })?;
    let merged = match prompt {
        // The prefiller's response is large for another reason.
        Err(ExpertsError::TooLarge) if !has_experts(&body) => Ok(()),
        Err(error) => Err(error),
        Ok(prompt) => merge(exchange, &prompt, &mut body).await,
    };
    if let Err(error) = merged {
        exchange.shard.report(Incident::ExpertsNotMerged(error));
        return Err(UNUSABLE);
    }
    if edits.is_empty() {
        return exchange.respond_local(status, &body, None, None).await;
    }
    reserved.grow_to(body.len() as u64)?;
    let mut edited = Vec::with_capacity(body.len());
    let mut transforms = Transforms::new(ResponseForm::Json, edits);
    transforms.feed(&body, &mut |piece| edited.extend_from_slice(piece));
    transforms.finish(&mut |piece| edited.extend_from_slice(piece));
    exchange.respond_local(status, &edited, None, None).await
}

/// Replaces the rows of the prompt, which may have many MiB, one step per turn.
async fn merge<N: Net>(
    exchange: &Exchange<'_, N>,
    prompt: &PromptExperts,
    body: &mut Kept,
) -> Result<(), ExpertsError> {
    let mut merging = prompt.begin_merge(body)?;
    while !prompt.merge_more(&mut merging, body.bytes_mut())? {
        end_turn();
        exchange.shard.net.give_way().await;
    }
    Ok(())
}
