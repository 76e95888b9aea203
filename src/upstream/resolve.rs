//! The addresses of an engine: from the pool's table or by a name look-up.

use std::rc::Rc;
use std::time::Duration;

use super::engine::Engine;
use super::error::CallError;
use super::scope::{Scope, Stage};
use super::upstreams::Upstreams;
use super::wait::Deadline;
use crate::fault::Fault;
use crate::fleet::{Address, Target};
use crate::limits::RESOLVED_SECS_MAX;
use crate::net::Net;

impl<N: Net> Upstreams<N> {
    /// Returns the addresses of an engine. A target that is an address needs no look-up. The
    /// addresses of a name come from the pool's table or, if it has none, from the resolver.
    /// Addresses in the table that are older than `RESOLVED_SECS_MAX` are still returned, but also
    /// looked up again for later requests. Empty if the name does not resolve.
    pub(crate) async fn addresses<S: Scope<N>>(
        &self,
        scope: &S,
        engine: Engine<'_>,
        deadline: Deadline,
    ) -> Result<Rc<[Address]>, CallError> {
        let target = engine.target;
        let known = self.pools.addresses(engine.slot);
        if let Some((addresses, at)) = &known {
            let is_young = self.net.now().since(*at) < Duration::from_secs(RESOLVED_SECS_MAX);
            if target.name().is_none() || is_young {
                return Ok(Rc::clone(addresses));
            }
        }
        let joined = self.lookups.borrow_mut().join(target);
        let Some(must_start) = joined else {
            return Err(CallError::Other(Fault::Exhausted));
        };
        let _guard = LookupGuard {
            upstreams: self,
            target,
        };
        if must_start && !(self.resolver)(target) {
            self.lookups.borrow_mut().forget(target);
            return Err(CallError::Other(Fault::Exhausted));
        }
        if let Some((addresses, _)) = known {
            // The known addresses are used while the look-up refreshes them, so no request waits
            // for a name server that has responded before.
            return Ok(addresses);
        }
        scope
            .until(Stage::BeforeRequest, deadline, |cx| {
                self.lookups.borrow_mut().poll(target, cx)
            })
            .await
            .or_call_error()
    }
}

/// Unregisters from a name look-up when dropped, including when the wait was cancelled.
struct LookupGuard<'a, N: Net> {
    upstreams: &'a Upstreams<N>,
    target: &'a Target,
}

impl<N: Net> Drop for LookupGuard<'_, N> {
    fn drop(&mut self) {
        self.upstreams.lookups.borrow_mut().unregister(self.target);
    }
}
