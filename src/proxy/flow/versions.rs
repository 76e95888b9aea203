//! Checks that the decoder can take a handoff whose form depends on the versions of the engines.
//!
//! The control plane knows the decoder's version. Prefillers are known only from the headers of
//! requests, so a prefiller is asked on a request's way, but only if its version decides: never for
//! a list of lists, the form of every vLLM since 0.18.0, unless the decoder is older.

use std::rc::Rc;
use std::time::Duration;

use super::split::Split;
use crate::fault::{Fault, Incident};
use crate::fleet::{EngineVersion, Target};
use crate::h1::{Framing, Name};
use crate::json::Splices;
use crate::limits::VERSION_MS_MAX;
use crate::metrics::Stranded;
use crate::net::Net;
use crate::pd::{Collected, Leg, OnDisconnect, Role, SingleUse, Take, compat};
use crate::proxy::exchange::Exchange;
use crate::trace::LegTrace;
use crate::upstream::{
    CallEnd, CallTask, Deadline, Deadlines, HeadWriter, OwnedCall, Scope, Stage, Timeout,
};

/// Returns whether the decoder takes the handoff only from a prefiller with the same version.
pub(super) fn matter<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
    handoff: &SingleUse,
) -> bool {
    exchange.shard.config.pd.asks_versions()
        && handoff
            .blocks()
            .is_some_and(|blocks| !compat::takes(split.decoder.version().as_deref(), blocks))
}

/// Drops the handoff unless prefiller and decoder have the same version. Asks the prefiller for it
/// if necessary.
///
/// # Errors
/// `ClientGone` if the client disconnects while the prefiller is asked.
pub(super) async fn check<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
    prefiller: &Target,
    handoff: &mut SingleUse,
) -> Result<(), Fault> {
    let shard = exchange.shard;
    let Some(blocks) = handoff.blocks() else {
        return Ok(());
    };
    let decoder = split.decoder.version();
    let stated = match &decoder {
        Some(_) => version(exchange, prefiller).await?,
        // Without the decoder's, it decides nothing.
        None => None,
    };
    if let Some(why) = compat::refusal(blocks, stated.as_ref(), decoder.as_deref()) {
        handoff.refuse();
        shard.metrics.stranded(Stranded::LeftToLease);
        shard.report(Incident::HandoffRefused {
            prefiller: prefiller.clone(),
            why,
        });
    }
    Ok(())
}

/// Returns the version of a prefiller, which is asked for it if the shard does not know it.
async fn version<N: Net>(
    exchange: &Exchange<'_, N>,
    prefiller: &Target,
) -> Result<Option<EngineVersion>, Fault> {
    let shard = exchange.shard;
    let known = shard.versions.borrow().get(prefiller, || shard.net.now());
    if let Some(known) = known {
        return Ok(known);
    }
    let call = ask(exchange, prefiller);
    let ended = exchange
        .until(Stage::AfterRequest, Deadline::NONE, |cx| call.poll(cx))
        .await
        .or_gone()?;
    let version = match ended {
        Ok(Ok(CallEnd::Done(Collected::Whole(response), _))) => EngineVersion::read(&response),
        Ok(Ok(CallEnd::Status(..))) => None,
        // No response: the engine is asked again by the next request.
        Ok(Ok(CallEnd::Done(..)) | Err(_)) | Err(_) => return Ok(None),
    };
    let mut versions = shard.versions.borrow_mut();
    versions.put(prefiller, version.clone(), shard.net.now());
    Ok(version)
}

fn ask<N: Net>(exchange: &Exchange<'_, N>, prefiller: &Target) -> CallTask<N> {
    let shard = exchange.shard;
    let names = [Name::Authorization];
    let head = HeadWriter::generated(shard.buffers.buffer(), b"GET", b"/version", prefiller)
        .field(b"accept", b"application/json")
        .client_fields(&exchange.request.head, &exchange.request.bytes, &names)
        .finish(Framing::None);
    let wait = Duration::from_millis(VERSION_MS_MAX);
    let deadline = Deadline::of(shard.net.now(), Some(wait), Timeout::Leg);
    let call = OwnedCall {
        target: prefiller.clone(),
        head,
        leg: Leg {
            role: Role::Prefill,
            body: Splices::untouched(0),
            take: Take::Page,
            rank: None,
            request_id: None,
        },
        body: Rc::new(Vec::new()),
        begun: None,
        deadlines: Deadlines::all(deadline),
        is_counted: false,
    };
    CallTask::call(&shard.upstreams, OnDisconnect::Cancel, LegTrace::NONE, call)
}
