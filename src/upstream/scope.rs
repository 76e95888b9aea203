//! The context that a call runs in: the exchange that made it, or a separate task.

use std::cell::Cell;
use std::task::{Context, Poll};

use super::wait::{Deadline, Waited};
use crate::metrics::Phase;
use crate::net::Net;
use crate::pd::Role;

/// The progress of a call, which decides how its scope watches for a client disconnect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// No byte of the request has been sent. The client's upload may still have to be read from its
    /// socket.
    BeforeRequest,
    /// The request is being sent or has been sent.
    AfterRequest,
}

/// The context that a call runs in. Defines what ends a wait besides the awaited event and its
/// deadline.
pub(crate) trait Scope<N: Net> {
    /// The phase of the request under which the metrics count a client disconnect.
    fn phase(&self) -> &Cell<Phase>;

    /// Called when the head of a successful (2xx) response has arrived.
    fn on_success(&self) {}

    /// Called when a call of `role` has ended: with a response of this status, or with an error of
    /// this label.
    fn record_leg(&self, _role: Role, _ended: Result<u16, &'static str>) {}

    /// Waits until `ready` is ready, the call is no longer needed (its client has disconnected or
    /// its owner has cancelled it), or the deadline passes.
    async fn until<T>(
        &self,
        stage: Stage,
        deadline: Deadline,
        ready: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Waited<T>;
}
