//! The engines of a Mooncake prefill server. The server's bootstrap port is queried for their ids,
//! and each shard caches the result.

use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use super::exchange::{Exchange, micros_since};
use crate::fault::{Cause, Fault};
use crate::fleet::Target;
use crate::h1::Framing;
use crate::json::Splices;
use crate::limits::{BOOTSTRAP_MS_MAX, BOOTSTRAP_SECS_MAX, BOOTSTRAPS_MAX};
use crate::net::{Instant, Net};
use crate::pd::bootstrap::engines;
use crate::pd::{BootstrapEngine, Collected, Leg, Peer, Role, Take};
use crate::upstream::call::Attempt;
use crate::upstream::call::Call;
use crate::upstream::call::Deadlines;
use crate::upstream::error::CallError;
use crate::upstream::head::HeadWriter;
use crate::upstream::wait::{Deadline, Timeout};

/// A shard's cache of the engine lists that Mooncake bootstrap servers returned. A list is used for
/// at most `BOOTSTRAP_SECS_MAX` seconds.
#[derive(Debug, Default)]
pub(super) struct Engines {
    known: HashMap<Target, Known>,
}

#[derive(Debug)]
struct Known {
    engines: Rc<[BootstrapEngine]>,
    since: Instant,
}

impl Engines {
    fn get(&self, target: &Target, now: Instant) -> Option<Rc<[BootstrapEngine]>> {
        let known = self.known.get(target)?;
        let is_young = now.since(known.since) < Duration::from_secs(BOOTSTRAP_SECS_MAX);
        is_young.then(|| Rc::clone(&known.engines))
    }

    fn put(&mut self, target: &Target, engines: Rc<[BootstrapEngine]>, now: Instant) {
        if self.known.len() >= BOOTSTRAPS_MAX {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.since);
            if let Some(oldest) = oldest.map(|(target, _)| target.clone()) {
                self.known.remove(&oldest);
            }
        }
        let since = now;
        self.known.insert(target.clone(), Known { engines, since });
    }

    /// Removes a prefill server's engine list from the cache, so that the next use queries it
    /// again. The server may have been restarted with new engine ids.
    pub(super) fn forget(&mut self, target: &Target) {
        self.known.remove(target);
    }
}

impl<N: Net> Exchange<'_, N> {
    /// Returns one of the prefill server's engines, chosen at random from the cached list or, if
    /// none is cached, from the list that a new query to `port` returns.
    ///
    /// # Errors
    /// A failed bootstrap leg if the query fails, or `ClientGone` if the client disconnects during
    /// it.
    pub(super) async fn pick_engine(
        &self,
        target: &Target,
        port: u16,
    ) -> Result<BootstrapEngine, Fault> {
        let engines = self.bootstrap(target, port).await?;
        let pick = self.shard.net.random() % engines.len() as u64;
        Ok(engines[usize::try_from(pick).unwrap_or(0)].clone())
    }

    /// Queries a prefill server's engine list again. Called after the decoder has responded with a
    /// 5xx status to a leg that names `peer.engine`, whose id may be outdated. If the engine of the
    /// same rank now has another id, stores that engine in `peer` and returns `true`. Otherwise, or
    /// if the query fails, returns `false`.
    pub(super) async fn engine_id_changed(
        &self,
        target: &Target,
        peer: &mut Peer,
    ) -> Result<bool, Fault> {
        self.shard.engines.borrow_mut().forget(target);
        let engines = match self.bootstrap(target, peer.bootstrap_port).await {
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
        let new = engines.iter().find(|engine| engine.rank == old.rank);
        let has_moved = new.is_some_and(|new| new.id != old.id);
        if has_moved {
            peer.engine = new.cloned();
        }
        Ok(has_moved)
    }

    async fn bootstrap(&self, target: &Target, port: u16) -> Result<Rc<[BootstrapEngine]>, Fault> {
        let shard = self.shard;
        if let Some(engines) = shard.engines.borrow().get(target, shard.net.now()) {
            return Ok(engines);
        }
        let response = match self.query(&target.with_port(port)).await {
            Ok(response) => response,
            Err(CallError::Disconnected) => return Err(Fault::ClientGone),
            Err(_) => return Err(Fault::leg(Role::Bootstrap, Cause::BadResponse)),
        };
        let engines: Rc<[_]> = engines(&response)
            .ok_or(Fault::leg(Role::Bootstrap, Cause::BadResponse))?
            .into();
        let mut known = shard.engines.borrow_mut();
        known.put(target, Rc::clone(&engines), shard.net.now());
        Ok(engines)
    }

    async fn query(&self, server: &Target) -> Result<Vec<u8>, CallError> {
        let shard = self.shard;
        let head = HeadWriter::generated(shard.buffers.buffer(), b"GET", b"/query", server)
            .field(b"accept", b"application/json")
            .finish(Framing::None);
        let leg = Leg {
            role: Role::Bootstrap,
            body: Splices::default(),
            take: Take::Whole,
            rank: None,
            request_id: None,
        };
        let call = Call {
            id: shard.upstreams.endpoint(Role::Bootstrap, server),
            target: server,
            head: &head,
            leg: &leg,
            body: &[],
        };
        let wait = Duration::from_millis(BOOTSTRAP_MS_MAX);
        let deadline = Deadline::of(shard.net.now(), Some(wait), Timeout::Leg);
        let begun = shard.net.now();
        let ended = self
            .shard
            .upstreams
            .call(self, &call, &mut None, &Deadlines::all(deadline))
            .await;
        let took = micros_since(shard.net.now(), begun);
        shard.metrics.leg(Role::Bootstrap, took);
        match ended? {
            Attempt::Done(Collected::Whole(response), ..) => Ok(response),
            Attempt::Done(..) | Attempt::Status(..) => Err(CallError::Failed(Cause::BadResponse)),
        }
    }
}
