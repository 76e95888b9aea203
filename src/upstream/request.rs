//! Sending a request whose body is the client's, with edits.

use std::io::IoSlice;
use std::task::Poll;

use super::connection::Connection;
use super::error::CallError;
use super::response::Response;
use super::scope::{Scope, Stage};
use super::upstreams::Upstreams;
use super::wait::Deadline;
use crate::json::Splices;
use crate::limits::SEND_SLICES_MAX;
use crate::net::{Conn, Net, would_block};

/// A whole request: its head including the blank line, and the client's body with edits applied.
pub(crate) struct SplicedRequest<'a> {
    pub(crate) head: &'a [u8],
    pub(crate) splices: &'a Splices,
    pub(crate) body: &'a [u8],
}

impl SplicedRequest<'_> {
    /// Sends as much as the socket accepts, starting at offset `at` of the request (the head
    /// followed by the edited body). Returns the number of bytes sent.
    fn try_send<C: Conn>(&self, conn: &C, at: usize) -> std::io::Result<usize> {
        let mut slices = [IoSlice::new(&[]); SEND_SLICES_MAX];
        let mut count = 0;
        if at < self.head.len() {
            slices[0] = IoSlice::new(&self.head[at..]);
            count = 1;
        }
        let skip = at.saturating_sub(self.head.len());
        count += self.splices.fill(self.body, skip, &mut slices[count..]);
        conn.try_send_vectored(&slices[..count])
    }
}

impl<N: Net> Upstreams<N> {
    /// Sends a whole request: `head` (including its blank line) and the spliced body.
    /// `upstream.is_sent()` returns whether everything was sent.
    ///
    /// It is no error if the engine responds or closes the connection before it has received
    /// everything. The response, if there is one, then states the reason.
    pub(super) async fn send_spliced<S: Scope<N>>(
        &self,
        scope: &S,
        upstream: &Connection<N>,
        request: &SplicedRequest<'_>,
        response: &mut Response,
        deadline: Deadline,
    ) -> Result<(), CallError> {
        let conn = upstream.conn();
        let total = request.head.len() + request.splices.len();
        let mut at = 0;
        loop {
            match request.try_send(conn, at) {
                Ok(sent) => at += sent,
                Err(error) if would_block(&error) => {}
                Err(_) => {
                    upstream.broke.set(true);
                    return Ok(());
                }
            }
            if at == total {
                upstream.record_sent(self.net.now());
                return Ok(());
            }
            // Waits also if the socket accepts more, for the task's next turn.
            let event = scope
                .until(Stage::AfterRequest, deadline, |cx| {
                    if conn.poll_readable(cx).is_ready() {
                        return Poll::Ready(false);
                    }
                    conn.poll_writable(cx).map(|()| true)
                })
                .await
                .or_call_error()
                // The engine would see a FIN only after reading all buffered bytes. A reset reaches
                // it immediately.
                .inspect_err(|_| conn.reset_on_close())?;
            if !event {
                // An interim (1xx) response does not stop the send.
                response.receive(&self.buffers, conn)?;
                if response.is_complete() {
                    return Ok(());
                }
            }
        }
    }
}
