//! How much of the response to a request has been sent to the client.

/// The state of the response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// Nothing has been sent, so any response is still possible.
    Unsent,
    /// The head with this status has been sent, and perhaps a part of the body.
    Streaming(u16),
    /// The whole response has been sent.
    Done(u16),
    /// The response ended before it was complete. Only its missing end shows that to the client.
    Broken(u16),
}

impl Reply {
    /// Returns whether no part of a response has been sent.
    pub(super) fn is_unsent(self) -> bool {
        self == Self::Unsent
    }

    /// Returns the status of the response; `None` if no part of it has been sent.
    pub(super) const fn status(self) -> Option<u16> {
        match self {
            Self::Unsent => None,
            Self::Streaming(status) | Self::Done(status) | Self::Broken(status) => Some(status),
        }
    }

    /// Records that the head of a response is about to be sent.
    pub(super) fn begin(&mut self, status: u16) {
        debug_assert!(self.is_unsent(), "a second response");
        *self = Self::Streaming(status);
    }

    /// Records that the response has been sent completely.
    pub(super) const fn finish(&mut self) {
        if let Self::Streaming(status) = *self {
            *self = Self::Done(status);
        }
    }

    /// Records that nothing more of the response will be sent.
    pub(super) const fn break_off(&mut self) {
        if let Self::Streaming(status) = *self {
            *self = Self::Broken(status);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_ends_done_or_broken_once_it_has_begun() {
        let mut reply = Reply::Unsent;
        reply.finish();
        reply.break_off();
        assert_eq!((reply, reply.status()), (Reply::Unsent, None));
        reply.begin(200);
        let mut other = reply;
        reply.finish();
        reply.break_off();
        assert_eq!((reply, reply.status()), (Reply::Done(200), Some(200)));
        other.break_off();
        other.finish();
        assert_eq!((other, other.status()), (Reply::Broken(200), Some(200)));
    }
}
