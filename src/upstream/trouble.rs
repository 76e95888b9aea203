//! Reports engines that fail their legs, and those that serve again, for the log.
//!
//! The end of each leg is reported exactly once, where it is known whether the leg is sent again: a
//! pooled connection that turns out to be closed is no failure. A connect is reported in
//! `connection`, the status of a response and the end of a call in `call`, and the end of a relayed
//! response by the proxy.

use super::connection::Connection;
use super::engine::Engine;
use super::error::CallError;
use super::pool::SlotId;
use super::upstreams::Upstreams;
use super::wait::Timeout;
use crate::fault::{Cause, Fault, Trouble};
use crate::net::Net;

impl<N: Net> Upstreams<N> {
    /// Reports that an engine has failed.
    pub(crate) fn report(&self, slot: SlotId, trouble: Trouble) {
        self.pools.report(slot, trouble, &self.on_incident);
    }

    /// Reports that an engine has served a leg to its end.
    fn report_well(&self, slot: SlotId) {
        self.pools.report_well(slot, &self.on_incident);
    }

    /// Reports a prefiller that is this proxy itself, or one of its decoders.
    pub(crate) fn report_itself(&self, engine: Engine<'_>) {
        self.report(engine.slot, Trouble::Itself);
    }

    /// Reports the status of a response, if it is a failure of the engine.
    pub(super) fn report_status(&self, slot: SlotId, status: u16) {
        if status >= 500 {
            self.report(slot, Trouble::Status(status));
        }
    }

    /// Reports the end of a leg that is not sent again. The status of its response has been
    /// reported.
    pub(crate) fn report_end(&self, slot: SlotId, ended: Result<u16, CallError>) {
        match ended {
            Ok(status) if status < 500 => self.report_well(slot),
            Ok(_) => {}
            Err(error) => {
                if let Some(trouble) = error.trouble() {
                    self.report(slot, trouble);
                }
            }
        }
    }

    /// Reports an engine to which no connection could be established.
    pub(super) fn report_unconnected(&self, slot: SlotId, error: CallError) {
        let trouble = match error {
            CallError::TimedOut(Timeout::Connect) => Trouble::ConnectTimeout,
            CallError::Failed(_) if self.pools.addresses(slot).is_none() => Trouble::Unresolved,
            CallError::Failed(_) => Trouble::Refused,
            CallError::TimedOut(_) | CallError::Disconnected | CallError::Other(_) => return,
        };
        self.report(slot, trouble);
    }
}

impl<N: Net> Connection<N> {
    /// Reports that a leg on this connection has failed and is not sent again.
    pub(crate) fn report_failed(&self, upstreams: &Upstreams<N>, error: CallError) {
        upstreams.report_end(self.slot(), Err(error));
    }

    /// Reports the engine if it has caused `fault`, with which a response of this status ends, and
    /// returns `fault`. A status of 500 or above has been reported.
    pub(crate) fn reported(&self, upstreams: &Upstreams<N>, status: u16, fault: Fault) -> Fault {
        if let Fault::Leg { cause, .. } = fault
            && status < 500
        {
            self.report_failed(upstreams, cause.into());
        }
        fault
    }

    /// Reports that a response with this status has been received completely.
    pub(crate) fn report_done(&self, upstreams: &Upstreams<N>, status: u16) {
        upstreams.report_end(self.slot(), Ok(status));
    }
}

impl CallError {
    /// Returns how the engine has failed, for an error on a connection that was established; `None`
    /// if something else has.
    const fn trouble(self) -> Option<Trouble> {
        match self {
            Self::Failed(cause) => match cause {
                Cause::ConnectionClosed => Some(Trouble::Closed),
                Cause::BadResponse | Cause::Unusable => Some(Trouble::BadResponse),
                Cause::TooLarge => Some(Trouble::TooLarge),
                Cause::Timeout | Cause::PairTimeout => Some(Trouble::Late),
                Cause::Truncated => Some(Trouble::Cut),
                Cause::Status(status) => Some(Trouble::Status(status)),
                // Reported with the connect.
                Cause::Refused | Cause::ConnectTimeout => None,
            },
            Self::TimedOut(timeout) => match timeout {
                Timeout::FirstByte | Timeout::Leg | Timeout::Pair => Some(Trouble::Late),
                Timeout::Connect
                | Timeout::Client
                | Timeout::Handoff
                | Timeout::Pause
                | Timeout::Detached => None,
            },
            Self::Disconnected | Self::Other(_) => None,
        }
    }
}
