//! The allowlist of engines that requests may name.
//!
//! The control plane publishes a list, and each request is checked against the current one. This
//! takes no lock, and a later change does not affect requests that have been checked. Without an
//! allowlist, every target is allowed.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::shard::Shard;
use crate::fault::Fault;
use crate::fleet::{AllowList, Target};
use crate::metrics::Named;
use crate::net::Net;

/// The current allowlist, shared by all shards and replaced as a whole by the control plane.
#[derive(Debug, Default)]
pub struct TargetAllowlist(ArcSwap<Published>);

#[derive(Debug, Default)]
struct Published {
    list: AllowList,
    /// Whether every source of the list has been read at least once.
    is_complete: bool,
}

impl TargetAllowlist {
    /// Creates an allowlist that is empty and not complete.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Replaces the list. `is_complete` states whether every source of the list has been read at
    /// least once. Until then, a target that is not on it gets [`Fault::AllowlistNotReady`],
    /// because a source that has not been read yet may allow it.
    pub fn publish(&self, list: AllowList, is_complete: bool) {
        self.0.store(Arc::new(Published { list, is_complete }));
    }

    /// Checks whether a request may name this target.
    ///
    /// # Errors
    /// [`Fault::TargetDenied`], or [`Fault::AllowlistNotReady`] if the list is not complete yet.
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
    /// Returns whether a request may name this target; always `true` without an allowlist. A denial
    /// is counted in the metrics under `kind`. The caller must connect to exactly the checked
    /// value.
    pub(super) fn permits(&self, kind: Named, target: &Target) -> bool {
        self.check(kind, target).is_ok()
    }

    /// Removes the targets that a request may not name. Each is counted in the metrics as a denial
    /// under `kind`.
    pub(super) fn drop_denied(&self, kind: Named, targets: &mut Vec<Target>) {
        targets.retain(|target| self.permits(kind, target));
    }

    /// Removes the prefill candidates that the allowlist does not permit. Fails if the first one is
    /// not permitted. The others are only alternatives to it, so removing one is not a failure; it
    /// is only counted in the metrics.
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
