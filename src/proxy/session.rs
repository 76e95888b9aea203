//! A client connection, from accept to close.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use super::client::Client;
use super::idle::NONE;
use super::serve::{self, Next};
use super::shard::{SessionGuard, Shard};
use crate::fault::Fault;
use crate::limits::{LINGER_BYTES_MAX, LINGER_MS_MAX};
use crate::metrics::Phase;
use crate::net::{Conn, Instant, Net, Opened, is_turn_over, set_bulk, would_block};
use crate::upstream::{Deadline, Timeout, Waited};

/// Serves an accepted client connection in a new task until the connection ends. `rank` is the
/// index of the rank whose listener accepted it; `guard` is its place.
pub fn begin<N: Net>(guard: SessionGuard<N>, conn: N::Conn, rank: u16) {
    let net = guard.shard.net.clone();
    net.spawn(run(guard, conn, rank));
}

/// Serves the requests of one client connection until it closes.
///
/// This future exists for as long as the connection, also while the session is idle, so it must
/// stay small. The exchange is large; it is boxed, and only once the first byte of a request has
/// arrived.
async fn run<N: Net>(guard: SessionGuard<N>, conn: N::Conn, rank: u16) {
    let shard = &guard.shard;
    let client = Client::new(&shard.net, conn, rank);
    if client.conn.is_encrypted() && !Box::pin(open(shard, &client)).await {
        return;
    }
    while next_request(shard, &client).await {
        if !client.ahead.borrow().is_empty() {
            // A client that pipelines has its next request served in any case, so its requests must
            // not delay others. One that the proxy responds to itself waits for nothing.
            set_bulk();
            Box::pin(shard.net.give_way()).await;
        }
        match Box::pin(serve::run(shard, &client)).await {
            Next::Request => {}
            Next::Close => return,
            Next::Linger => {
                Box::pin(linger(shard, &client)).await;
                return;
            }
        }
    }
}

/// Waits for the first byte of the next request. Returns `false` if the keep-alive timeout expired,
/// the proxy is draining, or the connection is closed in favour of another one. Also returns `true`
/// at the end of the connection, which is detected when the head is received.
async fn next_request<N: Net>(shard: &Shard<N>, client: &Client<N>) -> bool {
    client.phase.set(Phase::Idle);
    if !client.ahead.borrow().is_empty() {
        return true;
    }
    client
        .timer
        .set(shard.net.now(), shard.config.timeouts.keepalive);
    let arrived = poll_fn(|cx| {
        if client.conn.poll_readable(cx).is_ready() {
            return Poll::Ready(true);
        }
        if client.idle_at.get() == NONE {
            client.idle_at.set(shard.idle.enter(client.timer.number()));
        }
        if shard.is_draining() || shard.idle.must_close(client.idle_at.get()) {
            // At the end of a turn, a connection with a request is not ready either.
            return Poll::Ready(is_turn_over() && client.conn.peek_ready());
        }
        // Polled even without a keep-alive timeout: a drain wakes this task through the timer.
        client.timer.poll(cx).map(|()| false)
    })
    .await;
    shard.idle.leave(client.idle_at.replace(NONE));
    client.timer.set(Instant(0), None);
    arrived
}

/// Waits for the client's TLS handshake, for at most the head timeout. Returns `false` if it
/// failed: the connection will carry no request. Plain text gets an error response, unless the port
/// accepts both.
async fn open<N: Net>(shard: &Rc<Shard<N>>, client: &Client<N>) -> bool {
    let wait = shard.config.timeouts.head;
    let deadline = Deadline::of(shard.net.now(), wait, Timeout::Client);
    let opened = client.until_own(shard, deadline, |cx| client.conn.poll_open(cx));
    match opened.await {
        Waited::Ready(Opened::Ready) => true,
        Waited::Ready(Opened::PlainText) if shard.accepts_plain_text() => true,
        Waited::Ready(Opened::PlainText) => {
            shard.count_fault(Fault::PlainText);
            if serve::refuse_head(shard, client, Fault::PlainText).await == Next::Linger {
                linger(shard, client).await;
            }
            false
        }
        Waited::Ready(Opened::Failed) | Waited::Disconnected | Waited::TimedOut(_) => false,
    }
}

/// Closes the client connection such that the response just sent is not lost.
///
/// Closing a socket with unread bytes makes the kernel send a reset, which may overtake the
/// response (RFC 9112 9.6). So this sends FIN first, then reads and discards client bytes until the
/// client closes, up to `LINGER_BYTES_MAX` and `LINGER_MS_MAX`.
async fn linger<N: Net>(shard: &Shard<N>, client: &Client<N>) {
    client.conn.finish();
    let wait = Duration::from_millis(LINGER_MS_MAX);
    let deadline = Deadline::of(shard.net.now(), Some(wait), Timeout::Client);
    let mut left = LINGER_BYTES_MAX;
    while left > 0 {
        let waited = client
            .until_own(shard, deadline, |cx| client.conn.poll_readable(cx))
            .await;
        if waited != Waited::Ready(()) {
            return;
        }
        match shard
            .buffers
            .with_small(|buffer| client.conn.try_recv(buffer))
        {
            Ok(0) => return,
            Ok(n) => left = left.saturating_sub(n),
            Err(error) if would_block(&error) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::runtime::{Runtime, Socket};
    use crate::net::tls::{Secure, Wire};

    type Net = Secure<Runtime>;

    const fn future_bytes<F>(_: &impl Fn(SessionGuard<Net>, Wire<Socket>, u16) -> F) -> usize {
        size_of::<F>()
    }

    /// The size of an idle session's future is bounded by this test, because thousands of idle
    /// clients are normal.
    #[test]
    fn an_idle_session_is_small() {
        let bytes = future_bytes(&run::<Net>);
        assert!(bytes <= 512, "{bytes} bytes");
    }
}
