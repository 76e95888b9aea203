//! One request of the measuring client and its response: parses received bytes and determines how
//! the exchange ended. It sends and receives nothing itself.

use std::borrow::Cow;

use crate::http::Reader;
use crate::limits::SHOWN_BODY_BYTES_MAX;
use crate::response::{EventError, Response, shown};
use crate::schedule::Ask;
use crate::sse::Splitter;

/// A request in flight and its response as received so far.
pub(super) struct Exchange<'a> {
    pub(super) ask: Ask,
    /// Start of the request, in nanoseconds of the run's clock. In an open loop, this is its
    /// planned send time. In a closed loop, it is the time at which the request was sent, or queued
    /// if no connection was available.
    pub(super) start_ns: u64,
    pub(super) request: Cow<'a, [u8]>,
    pub(super) sent: usize,
    /// Whether the socket's send buffer is full, so that it is polled for writability.
    pub(super) full: bool,
    pub(super) moved_ns: u64,
    /// Whether any response byte has been received.
    pub(super) has_response_bytes: bool,
    pub(super) reader: Reader,
    pub(super) splitter: Splitter,
    pub(super) response: Response,
    pub(super) body: Vec<u8>,
}

/// The result of an exchange.
pub(super) enum Ended {
    Well { keep: bool },
    Failed(String),
}

impl<'a> Exchange<'a> {
    /// Creates the exchange of a request that has not been sent yet.
    pub(super) fn new(ask: Ask, request: Cow<'a, [u8]>) -> Self {
        Self {
            ask,
            start_ns: 0,
            request,
            sent: 0,
            full: false,
            moved_ns: 0,
            has_response_bytes: false,
            reader: Reader::new(),
            splitter: Splitter::default(),
            response: Response::default(),
            body: Vec::new(),
        }
    }

    /// Parses response bytes that were received at `stamp`. Returns the exchange's result once it
    /// has ended, and `None` before that.
    pub(super) fn take(&mut self, piece: &[u8], stamp: u64) -> Option<Ended> {
        let is_stream = |reader: &Reader| {
            let head = reader.head();
            head.is_some_and(|head| head.status == 200 && head.event_stream)
        };
        if let Err(error) = self.reader.feed(piece, &mut self.body) {
            return Some(Ended::Failed(error.to_string()));
        }
        if is_stream(&self.reader) {
            let response = &mut self.response;
            let events = |data: &[u8]| response.event(data, stamp);
            if let Err::<(), EventError>(error) = self.splitter.feed(&self.body, events) {
                return Some(Ended::Failed(error.to_string()));
            }
            self.body.clear();
        }
        let enough = self.body.len() > SHOWN_BODY_BYTES_MAX;
        (enough || self.reader.is_done()).then(|| self.outcome())
    }

    /// Returns the exchange's result after the peer has closed the connection: a failure unless the
    /// response is complete.
    pub(super) fn end(&mut self) -> Ended {
        match self.reader.end() {
            Ok(()) => self.outcome(),
            Err(error) => Ended::Failed(error.to_string()),
        }
    }

    fn outcome(&self) -> Ended {
        match self.reader.head() {
            Some(head) if head.status == 200 && head.event_stream => Ended::Well {
                // If the response ended before the request was sent completely, the connection
                // cannot be reused.
                keep: head.keep_alive && self.sent == self.request.len(),
            },
            Some(head) if head.status == 200 => Ended::Failed(format!(
                "the response is not an event stream: {}",
                shown(&self.body)
            )),
            Some(head) => Ended::Failed(format!("status {}: {}", head.status, shown(&self.body))),
            None => Ended::Failed("no response".to_owned()),
        }
    }
}
