//! The legs of a client that has disconnected.

use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use super::release;
use super::split::Split;
use crate::fault::Fault;
use crate::limits::{DETACHED_FIRST_BYTE_SECS_MAX, DETACHED_LEG_SECS_MAX};
use crate::net::{Conn, Net};
use crate::pd::{Freshness, OnDisconnect, Peer};
use crate::proxy::exchange::Exchange;
use crate::proxy::shard::Shard;
use crate::upstream::{CallEnd, CallTask, Connection, Response, TaskGuard};

/// Returns whether the response body has begun, which shows that the transfer to the decoder has
/// finished.
pub(super) fn has_begun<N: Net>(upstream: &Connection<N>, response: &Response) -> bool {
    response.is_complete() && (!response.rest().is_empty() || upstream.conn().peek_ready())
}

/// Applies the rule for a client disconnect to the decode leg. If the rule is `UntilFirstByte`, the
/// whole request has been sent and no body byte has arrived, the leg continues in a separate task
/// until that byte. Otherwise its connection is reset, which cancels it. Returns `ClientGone`.
pub(super) fn decode_leg<N: Net>(
    exchange: &Exchange<'_, N>,
    on_disconnect: OnDisconnect,
    upstream: Connection<N>,
    response: Response,
) -> Fault {
    let waits = on_disconnect == OnDisconnect::UntilFirstByte && upstream.is_sent();
    if waits && !has_begun(&upstream, &response) {
        let shard = Rc::clone(exchange.shard);
        // Counted before the task first runs, because a drain may check the count earlier.
        let counted = shard.upstreams.count_task();
        exchange
            .shard
            .net
            .spawn(await_first_byte(shard, counted, upstream, response));
    } else {
        upstream.conn().reset_on_close();
    }
    Fault::ClientGone
}

/// Lets a prefill leg continue in a separate task, for at most `DETACHED_LEG_SECS_MAX`, and then
/// releases the KV cache that the prefiller has kept.
pub(super) fn prefill_leg<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
    peer: &Peer,
    task: CallTask<N>,
) {
    let shard = Rc::clone(exchange.shard);
    let release = release::prepare(exchange, split, peer, &[]);
    let (connector, prefiller) = (split.connector(), peer.target.clone());
    // The leg is one of the tasks for which a drain waits, so this one is, too.
    let counted = shard.upstreams.count_task();
    exchange.shard.net.spawn(async move {
        let _counted = counted;
        let timer = shard.net.timer();
        let wait = Duration::from_secs(DETACHED_LEG_SECS_MAX);
        timer.set(shard.net.now(), Some(wait));
        let ended = poll_fn(|cx| match task.poll(cx) {
            Poll::Ready(ended) => Poll::Ready(ended.ok()),
            Poll::Pending => timer.poll(cx).map(|()| None),
        });
        let Some(Ok(CallEnd::Done(collected, _))) = ended.await else {
            return;
        };
        let handoff = connector.handoff(collected);
        let is_kept = handoff.is_some_and(|mut handoff| handoff.take(Freshness::Fresh).is_ok());
        match release {
            _ if !is_kept => {}
            Some(release) => release.send(&shard),
            None => shard.left_to_lease(&prefiller),
        }
    });
}

/// Waits for the first byte of the response body of a decode leg whose client has disconnected, for
/// at most `DETACHED_FIRST_BYTE_SECS_MAX`, then resets the connection, which cancels the leg. That
/// byte shows that the transfer to the decoder has finished. The response head does not: an engine
/// can send it before the transfer.
async fn await_first_byte<N: Net>(
    shard: Rc<Shard<N>>,
    _counted: TaskGuard<N>,
    upstream: Connection<N>,
    mut response: Response,
) {
    let timer = shard.net.timer();
    let wait = Duration::from_secs(DETACHED_FIRST_BYTE_SECS_MAX);
    timer.set(shard.net.now(), Some(wait));
    let conn = upstream.conn();
    loop {
        let is_open = poll_fn(|cx| {
            if conn.poll_readable(cx).is_ready() {
                return Poll::Ready(true);
            }
            timer.poll(cx).map(|()| false)
        });
        if !is_open.await
            || response.is_complete()
            || response.receive(&shard.buffers, conn).is_err()
        {
            break;
        }
        if response.is_complete() && !response.rest().is_empty() {
            break;
        }
    }
    upstream.conn().reset_on_close();
}
