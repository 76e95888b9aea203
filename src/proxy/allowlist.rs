//! Checks the engines that a request names against the allowlist.
//!
//! Each request is checked against the current list. This takes no lock, and a later change does
//! not affect requests that have been checked. Without an allowlist, every target is allowed.

use super::shard::Shard;
use crate::fault::{Fault, Incident};
use crate::fleet::{Permit, Target};
use crate::metrics::Named;
use crate::net::Net;

/// Returns whether a request may name this target; always `true` without an allowlist. A denial is
/// counted in the metrics under `kind`. The caller must connect to exactly the checked value.
pub(super) fn permits<N: Net>(shard: &Shard<N>, kind: Named, target: &Target) -> bool {
    check(shard, kind, target).is_ok()
}

/// Removes the targets that a request may not name. Each is counted in the metrics as a denial
/// under `kind`.
pub(super) fn drop_denied<N: Net>(shard: &Shard<N>, kind: Named, targets: &mut Vec<Target>) {
    targets.retain(|target| permits(shard, kind, target));
}

/// Removes the prefill candidates that the allowlist does not permit. Fails if the first one is not
/// permitted. The others are only alternatives to it, so removing one is not a failure; it is only
/// counted in the metrics.
pub(super) fn admit<N: Net>(shard: &Shard<N>, targets: &mut Vec<Target>) -> Result<(), Fault> {
    let Some(first) = targets.first() else {
        return Ok(());
    };
    check(shard, Named::Prefill, first)?;
    if targets.len() > 1 {
        let mut later = targets.split_off(1);
        drop_denied(shard, Named::Prefill, &mut later);
        targets.append(&mut later);
    }
    Ok(())
}

fn check<N: Net>(shard: &Shard<N>, kind: Named, target: &Target) -> Result<(), Fault> {
    let permit = shard.with_fleet(|fleet| {
        let allow = fleet.allow.as_ref();
        allow.map_or(Permit::Allowed, |allow| allow.check(target))
    });
    let fault = match permit {
        Permit::Allowed => return Ok(()),
        Permit::Denied => Fault::TargetDenied,
        Permit::Unknown => Fault::AllowlistNotReady,
    };
    shard.metrics.denied(kind);
    shard.report(Incident::TargetDenied {
        target: target.clone(),
        is_ready: permit == Permit::Denied,
    });
    Err(fault)
}
