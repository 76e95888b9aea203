//! The current allowlist, shared by all shards and replaced as a whole by the control plane.

use std::sync::Arc;

use arc_swap::ArcSwap;

use super::{AllowList, Target};

/// The current allowlist.
#[derive(Debug, Default)]
pub struct TargetAllowlist(ArcSwap<Published>);

#[derive(Debug, Default)]
struct Published {
    list: AllowList,
    /// Whether every source of the list has been read at least once.
    is_complete: bool,
}

/// Whether a request may name a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permit {
    /// The target is on the list.
    Allowed,
    /// The target is not on the list.
    Denied,
    /// The target is not on the list, but a source that has not been read yet may allow it.
    Unknown,
}

impl TargetAllowlist {
    /// Creates an allowlist that is empty and not complete.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Replaces the list. `is_complete` states whether every source of the list has been read at
    /// least once. Until then, a target that is not on it is [`Permit::Unknown`].
    pub fn publish(&self, list: AllowList, is_complete: bool) {
        self.0.store(Arc::new(Published { list, is_complete }));
    }

    /// Returns whether a request may name this target.
    #[must_use]
    pub fn check(&self, target: &Target) -> Permit {
        let published = self.0.load();
        if published.list.permits(target) {
            Permit::Allowed
        } else if published.is_complete {
            Permit::Denied
        } else {
            Permit::Unknown
        }
    }
}
