//! Receiving the head of an engine's response.

use super::buffers::Buffers;
use super::connection::Connection;
use super::error::CallError;
use super::scope::{Scope, Stage};
use super::upstreams::Upstreams;
use super::wait::Deadline;
use crate::fault::Cause;
use crate::h1::{self, Framing, Name, ResponseHead};
use crate::limits::INTERIM_RESPONSES_MAX;
use crate::net::{Conn, Net, would_block};

/// The head of an engine's response, complete or not, and the body bytes received so far.
#[derive(Default)]
pub(crate) struct Response {
    pub(crate) bytes: Vec<u8>,
    pub(crate) head: ResponseHead,
    pub(crate) framing: Framing,
    is_complete: bool,
    interim: u32,
}

impl Response {
    /// Whether the head of the final response (not an interim 1xx one) has arrived completely.
    pub(crate) const fn is_complete(&self) -> bool {
        self.is_complete
    }

    /// The body bytes received so far, including framing: those that arrived with the head and any
    /// appended to `bytes` since.
    pub(crate) fn rest(&self) -> &[u8] {
        &self.bytes[self.head.len..]
    }

    /// Returns whether a body with a known length has arrived completely.
    pub(crate) fn is_whole(&self) -> bool {
        matches!(self.framing, Framing::Length(length) if self.rest().len() as u64 >= length)
    }

    /// Returns whether the engine declares the body as a stream of server-sent events.
    pub(crate) fn is_event_stream(&self) -> bool {
        let field = self.head.field(Name::ContentType);
        field.is_some_and(|field| h1::is_event_stream(field.value.of(&self.bytes)))
    }

    /// Returns whether the body has a content coding, so that the proxy cannot read it.
    pub(crate) fn is_coded(&self) -> bool {
        h1::is_coded(&self.head.fields, &self.bytes)
    }

    /// Receives once from the engine and parses the response head if it is complete.
    ///
    /// # Errors
    /// `ConnectionClosed` if the connection ended before any byte of a response, `BadResponse` if
    /// it ended later or the bytes are malformed.
    pub(crate) fn receive<C: Conn>(
        &mut self,
        buffers: &Buffers,
        conn: &C,
    ) -> Result<(), CallError> {
        if self.bytes.capacity() == 0 {
            // Allocated only now, because the engine may have been silent for minutes.
            self.bytes = buffers.buffer();
            self.head.fields = buffers.fields();
        }
        let received = buffers.with_small(|buffer| {
            conn.try_recv(buffer)
                .inspect(|n| self.bytes.extend_from_slice(&buffer[..*n]))
        });
        let nothing_yet = self.bytes.is_empty() && self.interim == 0;
        match received {
            Ok(0) if nothing_yet => Err(CallError::Failed(Cause::ConnectionClosed)),
            Ok(0) => Err(CallError::Failed(Cause::BadResponse)),
            Ok(_) => self.parse(),
            Err(error) if would_block(&error) => Ok(()),
            Err(_) if nothing_yet => Err(CallError::Failed(Cause::ConnectionClosed)),
            Err(_) => Err(CallError::Failed(Cause::BadResponse)),
        }
    }

    /// Parses the response head if it is complete. Interim responses (1xx other than 101, RFC 9110
    /// 15.2) before it are dropped, up to a limit: the proxy itself handles `Expect: 100-continue`,
    /// so none of them is meant for the client.
    fn parse(&mut self) -> Result<(), CallError> {
        while self
            .head
            .parse(&self.bytes)
            .map_err(|_| CallError::Failed(Cause::BadResponse))?
        {
            let is_final = self.head.status >= 200 || self.head.status == 101;
            if is_final {
                self.is_complete = true;
                return Ok(());
            }
            self.interim += 1;
            if self.interim > INTERIM_RESPONSES_MAX {
                return Err(CallError::Failed(Cause::BadResponse));
            }
            self.bytes.drain(..self.head.len);
        }
        Ok(())
    }
}

impl<N: Net> Upstreams<N> {
    /// Receives until the head of the engine's response is complete in `response`.
    pub(crate) async fn receive_response<S: Scope<N>>(
        &self,
        scope: &S,
        upstream: &Connection<N>,
        response: &mut Response,
        deadline: Deadline,
    ) -> Result<(), CallError> {
        let conn = upstream.conn();
        while !response.is_complete {
            scope
                .until(Stage::AfterRequest, deadline, |cx| conn.poll_readable(cx))
                .await
                .or_call_error()?;
            response.receive(&self.buffers, conn)?;
        }
        Ok(())
    }
}
