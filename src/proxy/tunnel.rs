//! Connections upgraded to the WebSocket protocol (RFC 9110 7.8, RFC 6455).
//!
//! Bytes are forwarded without inspection only after the engine has responded with 101 to an
//! upgrade that the client requested. Until then, bytes that follow the request are not forwarded.

use std::io::IoSlice;
use std::task::{Context, Poll};

use super::exchange::Exchange;
use super::head::{self, Outgoing, ResponseExtra};
use super::shard::Shard;
use crate::fault::{Cause, Fault};
use crate::h1::Name;
use crate::limits::RECYCLED_BUFFER_BYTES_MAX;
use crate::metrics::Phase;
use crate::net::{Conn, Net, would_block};
use crate::pd::Role;
use crate::upstream::{Connection, Deadline, Response};

/// One direction of a tunnel.
struct Lane {
    /// Bytes received from one peer; those from `at` on have not been sent to the other yet.
    pending: Vec<u8>,
    at: usize,
    /// Whether the sending peer has closed its side. This has been forwarded to the receiving peer.
    ended: bool,
}

/// Forwards the engine's 101 response to the client, then forwards bytes in both directions until
/// both sides have closed. Fails if the response switches to a protocol other than WebSocket, or if
/// that was not requested from the engine (`upgrade_sent`).
pub(super) async fn relay_upgrade<N: Net>(
    exchange: &mut Exchange<'_, N>,
    upstream: Connection<N>,
    response: Response,
    upgrade_sent: bool,
) -> Result<(), Fault> {
    let was_requested = upgrade_sent && exchange.request.body.is_done();
    let protocol = response
        .head
        .field(Name::Upgrade)
        .map(|field| field.value.of(&response.bytes));
    let protocol = protocol.filter(|name| name.eq_ignore_ascii_case(b"websocket"));
    let Some(protocol) = protocol.filter(|_| was_requested) else {
        return Err(Fault::leg(Role::Decode, Cause::BadResponse));
    };
    let mut out = exchange.shard.buffers.buffer();
    let extra = ResponseExtra {
        request_id: exchange.request.id.as_bytes(),
        method: exchange.request.head.method,
        keep_alive: false,
        http10: false,
        upgrade: Some(protocol),
    };
    head::push_response(
        &mut out,
        &response.head,
        &response.bytes,
        Outgoing::None,
        &extra,
    )
    .map_err(|_| Fault::leg(Role::Decode, Cause::BadResponse))?;
    exchange.reply.begin(101);
    exchange.enter(Phase::Streaming);
    exchange
        .client
        .send(exchange.shard, &[IoSlice::new(&out)])
        .await?;
    let mut down = Lane {
        pending: response.rest().to_vec(),
        at: 0,
        ended: false,
    };
    let mut up = Lane {
        pending: exchange.client.take_ahead(exchange.shard, usize::MAX),
        at: 0,
        ended: false,
    };
    exchange.keep_alive = false;
    run_tunnel(exchange, &upstream, &mut down, &mut up).await?;
    exchange.reply.finish();
    Ok(())
}

async fn run_tunnel<N: Net>(
    exchange: &Exchange<'_, N>,
    upstream: &Connection<N>,
    down: &mut Lane,
    up: &mut Lane,
) -> Result<(), Fault> {
    let (engine, client) = (upstream.conn(), &exchange.client.conn);
    while !(down.ended && up.ended) {
        exchange.shard.net.give_way().await;
        let pass =
            |lane: &mut Lane, from: &N::Conn, to: &N::Conn| lane.pass(exchange.shard, from, to);
        let moved = pass(down, engine, client)? | pass(up, client, engine)?;
        if moved {
            continue;
        }
        exchange
            .client
            .until_own(exchange.shard, Deadline::NONE, |cx| {
                let down = down.poll(engine, client, cx);
                let up = up.poll(client, engine, cx);
                if down.is_ready() || up.is_ready() {
                    Poll::Ready(())
                } else {
                    Poll::Pending
                }
            })
            .await
            .or_gone()?;
    }
    Ok(())
}

impl Lane {
    /// Ready when a receive or a send in this direction may make progress. Never ready once the
    /// direction has ended.
    fn poll<C: Conn>(&self, from: &C, to: &C, cx: &mut Context<'_>) -> Poll<()> {
        if self.ended {
            Poll::Pending
        } else if self.at < self.pending.len() {
            to.poll_writable(cx)
        } else {
            from.poll_readable(cx)
        }
    }

    /// Performs one send or one receive in this direction without waiting. Returns whether it made
    /// progress.
    fn pass<N: Net>(
        &mut self,
        shard: &Shard<N>,
        from: &N::Conn,
        to: &N::Conn,
    ) -> Result<bool, Fault> {
        if self.ended {
            return Ok(false);
        }
        if self.at < self.pending.len() {
            return match to.try_send(&self.pending[self.at..]) {
                Ok(sent) => {
                    self.at += sent;
                    Ok(true)
                }
                Err(error) if would_block(&error) => Ok(false),
                Err(_) => Err(Fault::ClientGone),
            };
        }
        self.pending.clear();
        self.at = 0;
        let received = shard.buffers.with_small(|buffer| {
            from.try_recv(buffer)
                .inspect(|n| self.pending.extend_from_slice(&buffer[..*n]))
        });
        match received {
            Ok(0) => {
                self.ended = true;
                self.pending = Vec::new();
                to.finish();
                Ok(true)
            }
            Ok(_) => Ok(true),
            Err(error) if would_block(&error) => {
                // A quiet tunnel may stay so for days.
                if self.pending.capacity() > RECYCLED_BUFFER_BYTES_MAX {
                    self.pending = Vec::new();
                }
                Ok(false)
            }
            Err(_) => Err(Fault::ClientGone),
        }
    }
}
