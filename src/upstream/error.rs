//! How a call to an engine fails.

use super::wait::{Timeout, Waited};
use crate::fault::{Cause, Fault};
use crate::pd::{Reason, Role};

/// How a call to an engine failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallError {
    /// The engine or the connection to it failed.
    Failed(Cause),
    /// A deadline of the leg passed.
    TimedOut(Timeout),
    /// The client has disconnected, or the leg is no longer needed.
    Disconnected,
    /// A fault that has nothing to do with the engine, such as a malformed request body that is
    /// forwarded as it arrives, or a resource of this machine that is exhausted.
    Other(Fault),
}

impl CallError {
    /// Returns the fault of a leg of `role` whose call failed in this way.
    pub(crate) const fn fault(self, role: Role) -> Fault {
        match self {
            Self::Failed(cause) => Fault::leg(role, cause),
            Self::TimedOut(timeout) => Fault::leg(role, Self::cause_of(timeout)),
            Self::Disconnected => Fault::ClientGone,
            Self::Other(fault) => fault,
        }
    }

    /// Returns the label of the error in the span of a leg of `role`.
    pub(crate) const fn label(self, role: Role) -> &'static str {
        match self {
            Self::TimedOut(Timeout::Handoff) => Reason::StaleKv.label(),
            _ => self.fault(role).label(),
        }
    }

    /// Returns whether no connection to the engine could be established.
    pub(crate) const fn is_refused(self) -> bool {
        matches!(
            self,
            Self::Failed(Cause::Refused) | Self::TimedOut(Timeout::Connect)
        )
    }

    const fn cause_of(timeout: Timeout) -> Cause {
        match timeout {
            Timeout::Connect => Cause::ConnectTimeout,
            Timeout::Pair => Cause::PairTimeout,
            Timeout::Client
            | Timeout::FirstByte
            | Timeout::Leg
            | Timeout::Handoff
            | Timeout::Pause
            | Timeout::Detached => Cause::Timeout,
        }
    }
}

impl From<Fault> for CallError {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::ClientGone => Self::Disconnected,
            fault => Self::Other(fault),
        }
    }
}

impl<T> Waited<T> {
    /// Returns the awaited value, or the error of a call that waited for it.
    pub(crate) fn or_call_error(self) -> Result<T, CallError> {
        match self {
            Self::Ready(value) => Ok(value),
            Self::Disconnected => Err(CallError::Disconnected),
            Self::TimedOut(timeout) => Err(CallError::TimedOut(timeout)),
        }
    }
}

impl From<Cause> for CallError {
    fn from(cause: Cause) -> Self {
        Self::Failed(cause)
    }
}
