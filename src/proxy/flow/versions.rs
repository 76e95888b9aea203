//! Checks that the decoder can take a handoff whose form depends on the versions of the engines.
//!
//! The engines are asked only if they must be: a list of lists, the form of every vLLM since
//! 0.18.0, is passed on without a question.

use std::rc::Rc;
use std::time::Duration;

use super::split::Split;
use crate::fault::{Fault, Incident};
use crate::fleet::Target;
use crate::h1::{Framing, Name};
use crate::json::Splices;
use crate::limits::VERSION_MS_MAX;
use crate::metrics::Stranded;
use crate::net::Net;
use crate::pd::compat::{self, EngineVersion};
use crate::pd::{Collected, Leg, OnDisconnect, Role, SingleUse, Take};
use crate::proxy::exchange::Exchange;
use crate::trace::LegTrace;
use crate::upstream::{
    CallEnd, CallTask, Deadline, Deadlines, HeadWriter, OwnedCall, Scope, Stage, Timeout,
};

/// Returns whether the versions of the engines decide if the decoder can take the handoff.
pub(super) fn matter<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
    handoff: &SingleUse,
) -> bool {
    split.connector().rules().blocks_matter
        && !exchange.shard.config.pd.allow_flat_blocks
        && handoff.blocks().is_some_and(compat::depends_on_versions)
}

/// Asks both engines for their versions, and drops the handoff if the decoder would exit when it
/// reads it.
///
/// # Errors
/// `ClientGone` if the client disconnects while the engines are asked.
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
    let decoder = &split.decoder.target;
    let first = ask(exchange, Role::Prefill, prefiller);
    let second = ask(exchange, Role::Decode, decoder);
    let prefill_version = version(exchange, prefiller, first).await?;
    let decode_version = version(exchange, decoder, second).await?;
    let refusal = compat::refusal(blocks, prefill_version.as_ref(), decode_version.as_ref());
    if let Some(why) = refusal {
        handoff.refuse();
        shard.metrics.stranded(Stranded::LeftToLease);
        shard.report(Incident::HandoffRefused {
            prefiller: prefiller.clone(),
            why,
        });
    }
    Ok(())
}

/// The version of an engine, or the call that asks for it.
enum Asked<N: Net> {
    Known(Option<EngineVersion>),
    Call(CallTask<N>),
}

fn ask<N: Net>(exchange: &Exchange<'_, N>, role: Role, target: &Target) -> Asked<N> {
    let shard = exchange.shard;
    if let Some(known) = shard.versions.borrow().get(target, shard.net.now()) {
        return Asked::Known(known);
    }
    let names = [Name::Authorization];
    let head = HeadWriter::generated(shard.buffers.buffer(), b"GET", b"/version", target)
        .field(b"accept", b"application/json")
        .client_fields(&exchange.request.head, &exchange.request.bytes, &names)
        .finish(Framing::None);
    let wait = Duration::from_millis(VERSION_MS_MAX);
    let deadline = Deadline::of(shard.net.now(), Some(wait), Timeout::Leg);
    let call = OwnedCall {
        target: target.clone(),
        head,
        leg: Leg {
            role,
            body: Splices::untouched(0),
            take: Take::Whole,
            rank: None,
            request_id: None,
        },
        body: Rc::new(Vec::new()),
        begun: None,
        deadlines: Deadlines::all(deadline),
        is_counted: false,
    };
    let (upstreams, rule) = (&shard.upstreams, OnDisconnect::Cancel);
    Asked::Call(CallTask::call(upstreams, rule, LegTrace::NONE, call))
}

/// Waits for the version of an engine, and remembers it.
async fn version<N: Net>(
    exchange: &Exchange<'_, N>,
    target: &Target,
    asked: Asked<N>,
) -> Result<Option<EngineVersion>, Fault> {
    let call = match asked {
        Asked::Known(known) => return Ok(known),
        Asked::Call(call) => call,
    };
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
    let shard = exchange.shard;
    let mut versions = shard.versions.borrow_mut();
    versions.put(target, version.clone(), shard.net.now());
    Ok(version)
}
