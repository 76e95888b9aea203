//! The concurrent order: prefill and decode legs at the same time, for connectors whose engines
//! exchange data while both requests run.
//!
//! The prefill leg runs as a separate task ([`LegTask`]), the decode leg in the exchange. If the
//! prefill leg fails before the decode response is committed to the client, the decode leg is
//! cancelled and the client gets the prefill engine's error, instead of waiting for a transfer that
//! will not happen.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use super::exchange::{Exchange, micros_since};
use super::relay::Rewrite;
use super::shard::Shard;
use super::split::{PendingResponse, Split};
use crate::fault::{Cause, Fault};
use crate::fleet::Target;
use crate::limits::DETACHED_FIRST_BYTE_SECS_MAX;
use crate::metrics::Phase;
use crate::net::{Conn, Net};
use crate::pd::connector::{Bootstrap, Commit};
use crate::pd::{Leg, OnDisconnect, Peer, Role};
use crate::upstream::TaskGuard;
use crate::upstream::call::Attempt;
use crate::upstream::call::Call;
use crate::upstream::call::Deadlines;
use crate::upstream::connection::Connection;
use crate::upstream::connection::Reuse;
use crate::upstream::error::CallError;
use crate::upstream::response::Response;
use crate::upstream::scope::{Scope, Stage};
use crate::upstream::task::LegTask;
use crate::upstream::wait::{Deadline, Timeout};

type Ended<N> = Result<Attempt<N>, CallError>;
type PrefillTask<N> = LegTask<N, Ended<N>>;

/// Result of the decode leg of the concurrent order.
enum Decoded<N: Net> {
    /// The response that may now be relayed to the client, and the engine connection it arrives on.
    Responded(Connection<N>, Response),
    /// The pooled connection that the request was sent on had been closed by the engine. Both legs
    /// must be sent again.
    WasClosed,
}

impl<N: Net> Exchange<'_, N> {
    /// Runs the prefill and the decode leg at the same time. Returns the decode leg's response, or
    /// the prefill engine's error response if the prefill leg fails first.
    pub(super) async fn concurrent(
        &mut self,
        split: &mut Split,
        targets: &[Target],
    ) -> Result<PendingResponse<N>, Fault> {
        let mut reuse = Reuse::Allowed;
        loop {
            self.enter(Phase::Prefill);
            let (target, peer, upstream) = self.reach(split, targets).await?;
            self.record_prefill_target(target);
            let connector = split.connector();
            let prefill = connector.prefill_leg(&split.pd_request(), &peer)?;
            let decode = connector.decode_leg(&split.pd_request(), &peer, None)?;
            let mut task = self.begin_prefill(split, target, prefill, upstream)?;
            let ended = self
                .decode_unless_prefill_fails(split, decode, target, peer, &task, reuse)
                .await;
            match ended {
                Ok(Ok(Decoded::Responded(upstream, response))) => {
                    if !(200..300).contains(&response.head.status) {
                        // No decoder will fetch the prefilled KV cache.
                        task.on_drop(OnDisconnect::Cancel);
                    }
                    return Ok(PendingResponse {
                        upstream,
                        response,
                        rewrite: Rewrite::None,
                    });
                }
                // The engines may have started the transfer, so the next try needs new transfer
                // ids.
                Ok(Ok(Decoded::WasClosed)) => {
                    task.on_drop(OnDisconnect::Cancel);
                    self.shard.metrics.replay();
                    split.rename(&self.shard.net);
                    reuse = Reuse::Never;
                }
                Ok(Err(fault)) => {
                    if !matches!(fault, Fault::ClientGone | Fault::ClientStalled) {
                        task.on_drop(OnDisconnect::Cancel);
                    }
                    return Err(fault);
                }
                Err(Ok(Attempt::Status(upstream, response, sent))) => {
                    self.sent_whole = sent;
                    return self.prefill_refused(upstream, response);
                }
                Err(Ok(Attempt::Done(..))) => return Err(Fault::Bug("a prefill that succeeded")),
                Err(Err(fault)) => return Err(fault.fault(Role::Prefill)),
            }
        }
    }

    /// Connects to the first prefill candidate that is reachable and is not this proxy or one of
    /// its decoders. For Mooncake, the candidate's bootstrap server must also return its engines.
    /// No engine has been sent any part of the request yet, so trying the next candidate has no
    /// side effects. Fails if no candidate qualifies.
    async fn reach<'t>(
        &self,
        split: &Split,
        targets: &'t [Target],
    ) -> Result<(&'t Target, Peer, Connection<N>), Fault> {
        let mut fault = Fault::leg(Role::Prefill, Cause::Refused);
        for target in targets {
            let mut peer = split.peer(target);
            if split.connector().rules().bootstrap == Bootstrap::Queried {
                match self.pick_engine(target, peer.bootstrap_port).await {
                    Ok(engine) => peer.engine = Some(engine),
                    Err(
                        failed @ Fault::Leg {
                            role: Role::Bootstrap,
                            ..
                        },
                    ) => {
                        fault = failed;
                        continue;
                    }
                    Err(fault) => return Err(fault),
                }
            }
            let id = self.shard.upstreams.endpoint(Role::Prefill, target);
            let connected = self
                .shard
                .upstreams
                .connect(
                    self,
                    id,
                    target,
                    Role::Prefill,
                    Reuse::Allowed,
                    Deadline::NONE,
                )
                .await;
            match connected {
                Ok(_) if self.shard.upstreams.is_self(id) => {
                    fault = Fault::leg(Role::Prefill, Cause::Refused)
                }
                Ok(upstream) => return Ok((target, peer, upstream)),
                Err(error) if error.is_refused() => {
                    fault = Fault::leg(Role::Prefill, Cause::Refused);
                    self.shard.engines.borrow_mut().forget(target);
                }
                Err(other) => return Err(other.fault(Role::Prefill)),
            }
        }
        Err(fault)
    }

    /// Starts the prefill leg as a task, on a connection that is already established. The recorded
    /// duration of the leg therefore does not include the connect.
    fn begin_prefill(
        &mut self,
        split: &Split,
        target: &Target,
        leg: Leg,
        upstream: Connection<N>,
    ) -> Result<PrefillTask<N>, Fault> {
        self.stats.attempts += 1;
        let shard = self.shard;
        let head = self.spliced_head(target, &leg)?;
        let traced = self.trace.detach();
        let id = shard.upstreams.endpoint(Role::Prefill, target);
        let (target, body) = (target.clone(), Rc::clone(&split.body));
        let pd = &shard.config.pd;
        let now = shard.net.now();
        let deadline = Deadline::of(now, pd.prefill_timeout, Timeout::Leg);
        let connector = split.connector();
        let pair_wait = connector.prefill_head_wait(&pd.mori);
        let deadlines = Deadlines {
            head: deadline.or_sooner(Deadline::of(now, pair_wait, Timeout::Pair)),
            ..Deadlines::all(deadline)
        };
        let on_disconnect = connector.rules().prefill_on_disconnect;
        let shard = Rc::clone(shard);
        Ok(LegTask::begin(
            &self.shard.upstreams,
            on_disconnect,
            |context| async move {
                let call = Call {
                    id,
                    target: &target,
                    head: &head,
                    leg: &leg,
                    body: &body.bytes,
                };
                let begun = shard.net.now();
                let ended = context
                    .upstreams()
                    .call(&context, &call, &mut Some(upstream), &deadlines)
                    .await;
                let took = micros_since(shard.net.now(), begun);
                shard.metrics.leg(Role::Prefill, took);
                traced.end(&shard, Role::Prefill, &ended);
                ended
            },
        ))
    }

    /// Runs the decode leg until its response may be relayed. If the prefill leg fails or returns a
    /// status other than 2xx first, returns that result as the outer `Err`.
    async fn decode_unless_prefill_fails(
        &mut self,
        split: &Split,
        leg: Leg,
        target: &Target,
        peer: Peer,
        task: &PrefillTask<N>,
        reuse: Reuse,
    ) -> Result<Result<Decoded<N>, Fault>, Ended<N>> {
        let mut prefill_succeeded = false;
        let mut work = pin!(self.run_decode_leg(split, leg, target, peer, task, reuse));
        poll_fn(|cx| {
            if let Poll::Ready(decoded) = work.as_mut().poll(cx) {
                return Poll::Ready(Ok(decoded));
            }
            if prefill_succeeded {
                return Poll::Pending;
            }
            match task.poll(cx) {
                Poll::Ready(Ok(Ok(Attempt::Done(..)))) => {
                    prefill_succeeded = true;
                    // Poll the decode leg again, because it may be waiting for this success.
                    cx.waker().wake_by_ref();
                    Poll::Pending
                }
                Poll::Ready(Ok(ended)) => Poll::Ready(Err(ended)),
                Poll::Ready(Err(fault)) => Poll::Ready(Err(Err(fault.into()))),
                Poll::Pending => Poll::Pending,
            }
        })
        .await
    }

    async fn run_decode_leg(
        &mut self,
        split: &Split,
        mut leg: Leg,
        target: &Target,
        mut peer: Peer,
        task: &PrefillTask<N>,
        mut reuse: Reuse,
    ) -> Result<Decoded<N>, Fault> {
        let mut may_query_again = split.connector().rules().bootstrap == Bootstrap::Queried;
        loop {
            let upstream = self.connect_decoder(split, reuse).await?;
            let response = match self
                .decode_once(&upstream, split, &leg, Deadline::NONE)
                .await
            {
                Ok(response) => response,
                Err(CallError::Failed(Cause::ConnectionClosed)) if upstream.reused => {
                    return Ok(Decoded::WasClosed);
                }
                Err(CallError::Disconnected) => {
                    let response = Response::default();
                    return Err(self.detach_decode_leg(split, upstream, response, task));
                }
                Err(fault) => return Err(fault.fault(Role::Decode)),
            };
            if may_query_again
                && response.head.status >= 500
                && self.engine_id_changed(target, &mut peer).await?
            {
                // The prefill leg still waits under the same transfer id. Only the engine id in the
                // decode leg was outdated.
                may_query_again = false;
                leg = split
                    .connector()
                    .decode_leg(&split.pd_request(), &peer, None)?;
                reuse = Reuse::Never;
                continue;
            }
            return match self.commit(split, &upstream, &response, task).await {
                Ok(()) => Ok(Decoded::Responded(upstream, response)),
                Err(Fault::ClientGone) => {
                    Err(self.detach_decode_leg(split, upstream, response, task))
                }
                Err(fault) => Err(fault),
            };
        }
    }

    /// Waits until the decode response, whose head has arrived, may be relayed to the client:
    /// immediately if it is an error response; otherwise once the prefill leg has succeeded or, for
    /// connectors that allow it, the first body byte has arrived.
    async fn commit(
        &self,
        split: &Split,
        upstream: &Connection<N>,
        response: &Response,
        task: &PrefillTask<N>,
    ) -> Result<(), Fault> {
        let by_first_byte = split.connector().rules().commit == Commit::OnFirstByte;
        if !response.rest().is_empty() {
            task.record_first_byte();
        }
        let is_success = (200..300).contains(&response.head.status);
        if !is_success || (by_first_byte && !response.rest().is_empty()) {
            return Ok(());
        }
        let conn = upstream.conn();
        self.until(Stage::AfterRequest, Deadline::NONE, |cx| {
            let has_succeeded = task.has_succeeded(cx);
            let has_byte = by_first_byte && conn.poll_readable(cx).is_ready();
            if has_succeeded || has_byte {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await
        .or_gone()
    }

    /// Applies the connector's rule for a client disconnect to the decode leg. If the rule is
    /// `UntilFirstByte`, the whole request has been sent and no body byte has arrived, the leg
    /// continues in a separate task until that byte. Otherwise its connection is reset, which
    /// cancels it. Returns `ClientGone`.
    fn detach_decode_leg(
        &self,
        split: &Split,
        upstream: Connection<N>,
        response: Response,
        task: &PrefillTask<N>,
    ) -> Fault {
        let has_begun =
            response.is_complete() && (!response.rest().is_empty() || upstream.conn().peek_ready());
        if has_begun {
            task.record_first_byte();
        }
        let on_disconnect = split.connector().rules().decode_on_disconnect;
        if on_disconnect == OnDisconnect::UntilFirstByte && upstream.is_sent.get() && !has_begun {
            let shard = Rc::clone(self.shard);
            // Counted before the task first runs, because a drain may check the count earlier.
            let counted = shard.upstreams.count_task();
            self.shard
                .net
                .spawn(await_first_byte(shard, counted, upstream, response));
        } else {
            upstream.conn().reset_on_close();
        }
        Fault::ClientGone
    }
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
