//! The engine that a call is sent to.

use super::pool::SlotId;
use crate::fleet::Target;
use crate::pd::Role;

/// An engine: its slot in the pool, its location, and its role in the call.
#[derive(Clone, Copy)]
pub(crate) struct Engine<'a> {
    pub(super) slot: SlotId,
    pub(crate) target: &'a Target,
    pub(crate) role: Role,
}
