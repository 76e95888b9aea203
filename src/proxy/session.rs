//! A client's connection from its first byte to its last.

use std::rc::Rc;
use std::time::Duration;

use super::client::{Client, Limit};
use super::exchange::{self, Next};
use super::shard::{SessionGuard, Shard};
use crate::fault::Fault;
use crate::limits::{LINGER_BYTES_MAX, LINGER_MS_MAX, STEPS_PER_TURN_MAX};
use crate::net::tls::Opened;
use crate::net::{Conn, Net, would_block};

/// Serves request after request. While the client is silent this future is all there is of it, so
/// it stays small: the exchange, which is large, is boxed when a first byte has arrived.
pub(super) async fn run<N: Net>(guard: SessionGuard<N>, conn: N::Conn, rank: usize) {
    let shard = &guard.shard;
    let client = Client::new(&shard.net, conn, rank);
    if client.conn.is_encrypted() && !Box::pin(open(shard, &client)).await {
        return;
    }
    let mut exchanges = 0_u32;
    while client.next_request(shard).await {
        exchanges = exchanges.wrapping_add(1);
        if exchanges.is_multiple_of(STEPS_PER_TURN_MAX) {
            // Pipelined requests that are answered here wait for nothing in between.
            Box::pin(shard.net.yield_now()).await;
        }
        match Box::pin(exchange::run(shard, &client)).await {
            Next::Request => {}
            Next::Close => return,
            Next::Linger => {
                Box::pin(linger(shard, &client)).await;
                return;
            }
        }
    }
}

/// Waits for the handshake, which has as long as a head. `false`: there will be no request.
async fn open<N: Net>(shard: &Rc<Shard<N>>, client: &Client<N>) -> bool {
    let limit = Limit::of(
        shard.net.now(),
        shard.config.timeouts.head,
        Fault::HeadTimeout,
    );
    let opened = client.until_own(shard, limit, |cx| client.conn.poll_open(cx));
    match opened.await {
        Ok(Opened::Ready) => true,
        Ok(Opened::PlainText) => {
            shard.count_fault(Fault::PlainText);
            if exchange::refuse_head(shard, client, Fault::PlainText).await == Next::Linger {
                linger(shard, client).await;
            }
            false
        }
        Ok(Opened::Failed) | Err(_) => false,
    }
}

/// Closes so that the answer just sent is not lost: closing a socket with unread bytes makes the
/// kernel send a reset, which may overtake the answer (RFC 9112 9.6). So: FIN, then read what the
/// client still sends, up to a bound, until it closes.
async fn linger<N: Net>(shard: &Shard<N>, client: &Client<N>) {
    client.conn.finish();
    let wait = Duration::from_millis(LINGER_MS_MAX);
    let limit = Limit::of(shard.net.now(), Some(wait), Fault::BodyTimeout);
    let mut left = LINGER_BYTES_MAX;
    let mut steps = 0_u32;
    while left > 0 {
        steps = steps.wrapping_add(1);
        if steps.is_multiple_of(STEPS_PER_TURN_MAX) {
            shard.net.yield_now().await;
        }
        if client
            .until_own(shard, limit, |cx| client.conn.poll_readable(cx))
            .await
            .is_err()
        {
            return;
        }
        match shard.with_small(|buffer| client.conn.try_recv(buffer)) {
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

    const fn future_bytes<F>(_: &impl Fn(SessionGuard<Net>, Wire<Socket>, usize) -> F) -> usize {
        size_of::<F>()
    }

    /// Thousands of idle clients are normal: what each costs is bounded by the build, not by hope.
    #[test]
    fn an_idle_session_is_small() {
        let bytes = future_bytes(&run::<Net>);
        assert!(bytes <= 512, "{bytes} bytes");
    }
}
