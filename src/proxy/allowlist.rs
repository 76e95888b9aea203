//! Which engines a request may name.
//!
//! The control plane publishes a list, a request looks at the one of its moment: no lock, and a
//! change of the list touches no request that is past this point. Without a guard everything is
//! allowed.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::shard::Shard;
use crate::fault::Fault;
use crate::fleet::{AllowList, Target};
use crate::metrics::Named;
use crate::net::Net;

/// The list that holds now.
#[derive(Debug, Default)]
pub struct TargetAllowlist(ArcSwap<Published>);

#[derive(Debug, Default)]
struct Published {
    list: AllowList,
    /// Whether every source of the list has been read once.
    is_complete: bool,
}

impl TargetAllowlist {
    /// A guard that has no list yet.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Puts a list in place of the one before. `is_complete`: what is not on it is denied, and not
    /// just unknown yet.
    pub fn publish(&self, list: AllowList, is_complete: bool) {
        self.0.store(Arc::new(Published { list, is_complete }));
    }

    /// Whether a request may name this target.
    ///
    /// # Errors
    /// [`Fault::TargetDenied`], or [`Fault::AllowlistNotReady`] where the answer may change soon.
    pub fn check(&self, target: &Target) -> Result<(), Fault> {
        let published = self.0.load();
        if published.list.permits(target) {
            Ok(())
        } else if published.is_complete {
            Err(Fault::TargetDenied)
        } else {
            Err(Fault::AllowlistNotReady)
        }
    }
}

impl<N: Net> Shard<N> {
    /// Whether a request may name this target as an engine of that kind; a refusal is counted. The
    /// value that is checked has to be the one that is dialled.
    pub(super) fn permits(&self, kind: Named, target: &Target) -> bool {
        self.check(kind, target).is_ok()
    }

    /// Drops the targets that may not be named.
    pub(super) fn drop_denied(&self, kind: Named, targets: &mut Vec<Target>) {
        targets.retain(|target| self.permits(kind, target));
    }

    /// Takes the prefill targets that may be dialled: what the request begins with has to be
    /// allowed, a target that would only be tried after it may be missing.
    pub(super) fn admit(&self, targets: &mut Vec<Target>) -> Result<(), Fault> {
        let Some(first) = targets.first() else {
            return Ok(());
        };
        self.check(Named::Prefill, first)?;
        if self.allowlist.is_some() && targets.len() > 1 {
            let mut later = targets.split_off(1);
            self.drop_denied(Named::Prefill, &mut later);
            targets.append(&mut later);
        }
        Ok(())
    }

    fn check(&self, kind: Named, target: &Target) -> Result<(), Fault> {
        let Some(allowlist) = &self.allowlist else {
            return Ok(());
        };
        let checked = allowlist.check(target);
        if checked.is_err() {
            self.metrics.denied(kind);
        }
        checked
    }
}
