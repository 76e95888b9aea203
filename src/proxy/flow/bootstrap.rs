//! The engines of a Mooncake prefill server. The server's bootstrap port is queried for their ids,
//! and each shard caches the result.

use std::rc::Rc;
use std::time::Duration;

use crate::budget::Kept;
use crate::fault::{Cause, Fault};
use crate::fleet::Target;
use crate::h1::Framing;
use crate::json::Splices;
use crate::limits::BOOTSTRAP_MS_MAX;
use crate::net::Net;
use crate::pd::bootstrap::{ListedEngines, engines};
use crate::pd::{BootstrapEngine, Collected, Leg, Peer, Role, Take};
use crate::proxy::exchange::Exchange;
use crate::upstream::{Call, CallEnd, CallError, Deadline, Deadlines, HeadWriter, Timeout};

/// Returns one of the prefill server's engines, chosen at random from the cached list or, if
/// none is cached, from the list that a new query to `port` returns.
///
/// # Errors
/// A failed bootstrap leg if the query fails, or `ClientGone` if the client disconnects during
/// it.
pub(super) async fn pick_engine<N: Net>(
    exchange: &Exchange<'_, N>,
    target: &Target,
    port: u16,
) -> Result<BootstrapEngine, Fault> {
    let engines = bootstrap(exchange, target, port).await?;
    let pick = exchange.shard.net.random() % engines.list.len() as u64;
    Ok(engines.list[usize::try_from(pick).unwrap_or(0)].clone())
}

/// Queries a prefill server's engine list again. Called after the decoder has responded with a
/// 5xx status to a leg that names `peer.engine`, whose id may be outdated. If the engine of the
/// same rank now has another id, stores that engine in `peer` and returns `true`. Otherwise, or
/// if the query fails, returns `false`.
pub(super) async fn engine_id_changed<N: Net>(
    exchange: &Exchange<'_, N>,
    peer: &mut Peer,
) -> Result<bool, Fault> {
    exchange.shard.engines.borrow_mut().forget(&peer.target);
    let engines = match bootstrap(exchange, &peer.target, peer.bootstrap_port).await {
        Ok(engines) => engines,
        Err(Fault::Leg {
            role: Role::Bootstrap,
            ..
        }) => return Ok(false),
        Err(fault) => return Err(fault),
    };
    let Some(old) = &peer.engine else {
        return Ok(false);
    };
    let new = engines.list.iter().find(|engine| engine.rank == old.rank);
    let has_moved = new.is_some_and(|new| new.id != old.id);
    if has_moved {
        peer.engine = new.cloned();
    }
    Ok(has_moved)
}

async fn bootstrap<N: Net>(
    exchange: &Exchange<'_, N>,
    target: &Target,
    port: u16,
) -> Result<Rc<ListedEngines>, Fault> {
    let shard = exchange.shard;
    if let Some(engines) = shard.engines.borrow().get(target, || shard.net.now()) {
        return Ok(engines);
    }
    let response = match query(exchange, &target.with_port(port)).await {
        Ok(response) => response,
        Err(CallError::Disconnected) => return Err(Fault::ClientGone),
        Err(CallError::Other(fault)) => return Err(fault),
        Err(_) => return Err(Fault::leg(Role::Bootstrap, Cause::BadResponse)),
    };
    let list = engines(&response).ok_or(Fault::leg(Role::Bootstrap, Cause::BadResponse))?;
    let (engines, bytes) = ListedEngines::new(list, &shard.budget);
    let engines = Rc::new(engines);
    if let Some(bytes) = bytes {
        let mut known = shard.engines.borrow_mut();
        known.put_sized(target, Rc::clone(&engines), bytes, shard.net.now());
    }
    Ok(engines)
}

async fn query<N: Net>(exchange: &Exchange<'_, N>, server: &Target) -> Result<Kept, CallError> {
    let shard = exchange.shard;
    let head = HeadWriter::generated(shard.buffers.buffer(), b"GET", b"/query", server)
        .field(b"accept", b"application/json")
        .finish(Framing::None);
    let leg = Leg {
        role: Role::Bootstrap,
        body: Splices::default(),
        take: Take::Page,
        rank: None,
        request_id: None,
    };
    let call = Call {
        engine: shard.upstreams.engine(Role::Bootstrap, server),
        head: &head,
        leg: &leg,
        body: &[],
        is_counted: true,
    };
    let wait = Duration::from_millis(BOOTSTRAP_MS_MAX);
    let deadline = Deadline::of(shard.net.now(), Some(wait), Timeout::Leg);
    let deadlines = Deadlines::all(deadline);
    match shard
        .upstreams
        .call(exchange, &call, None, &deadlines)
        .await?
    {
        CallEnd::Done(Collected::Whole(response), _) => Ok(response),
        CallEnd::Done(..) | CallEnd::Status(..) => Err(CallError::Failed(Cause::BadResponse)),
    }
}
