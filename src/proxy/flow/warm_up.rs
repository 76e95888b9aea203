//! Speculative prefill: the request that follows a chat turn (`pd::warm_up`).

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::split::Split;
use crate::api::Api;
use crate::fleet::Target;
use crate::h1::{Framing, Name};
use crate::limits::WARM_UP_SECS_MAX;
use crate::metrics::WarmUp as Counted;
use crate::net::Net;
use crate::pd::warm_up::Answer;
use crate::pd::{Leg, OnDisconnect, Outcome, Role, Take, Uuid};
use crate::proxy::body::Body;
use crate::proxy::exchange::Exchange;
use crate::proxy::relay::PendingResponse;
use crate::proxy::shard::Shard;
use crate::trace::LegTrace;
use crate::upstream::{
    Call, CallEnd, Deadline, Deadlines, HeadWriter, LegTask, TaskContext, Timeout,
};

/// A request whose response text is being collected.
pub(super) struct WarmUp {
    split: Split,
    prefiller: Target,
    answer: Rc<RefCell<Answer>>,
}

/// Begins to collect the response text to a chat request that asks for a speculative prefill.
/// Returns
/// `None` for any other request.
pub(super) fn prepare<N: Net>(
    exchange: &Exchange<'_, N>,
    split: Split,
    pending: &mut PendingResponse<N>,
) -> Option<Box<WarmUp>> {
    let is_on = exchange.shard.config.pd.speculative_prefill;
    let mut values = exchange.request.values(Name::XSpeculativePrefill);
    let is_asked = values.any(|value| value.eq_ignore_ascii_case(b"true"));
    let is_remote = matches!(exchange.stats.outcome, Some((Outcome::Remote, _)));
    let is_plain = split.encoded.is_none() && pending.experts.is_none();
    if !is_on || !is_asked || !is_remote || !is_plain || split.api != Api::Chat {
        return None;
    }
    let answer = Rc::new(RefCell::new(Answer::default()));
    pending.answer = Some(Rc::clone(&answer));
    Some(Box::new(WarmUp {
        split,
        prefiller: *exchange.stats.prefiller.clone()?,
        answer,
    }))
}

impl WarmUp {
    /// Sends the request, if the response text was received completely and no other such request of
    /// this shard is running. Nothing waits for it.
    pub(super) fn begin<N: Net>(self, exchange: &Exchange<'_, N>) {
        let shard = exchange.shard;
        let is_success = exchange
            .reply
            .status()
            .is_some_and(|status| (200..300).contains(&status));
        let answer = self.answer.take().finish().filter(|_| is_success);
        let body = answer.and_then(|answer| self.split.pd_request().warm_up_body(&answer));
        let body = body.and_then(|body| Body::own(shard, body));
        let (Some(body), Some(turn), false) = (body, Turn::take(shard), shard.is_draining()) else {
            shard.metrics.warm_up(Counted::Skipped);
            return;
        };
        let turn = Rc::new(turn);
        let decoder = &self.split.decoder;
        let split = Split::new(shard, self.split.api, body, decoder, None);
        let request = split.pd_request();
        let peer = split.peer(&self.prefiller);
        let connector = split.connector();
        if connector.rules().prefill_needs_decode {
            let legs = [
                connector.prefill_leg(&request, &peer),
                connector.decode_leg(&request, &peer, None),
            ];
            if let [Ok(prefill), Ok(decode)] = legs {
                send(exchange, &split, &self.prefiller, prefill, &turn);
                send(exchange, &split, &decoder.target, decode, &turn);
                return;
            }
        } else if let Ok(leg) = request.local_leg() {
            let leg = Leg {
                role: Role::Prefill,
                ..leg
            };
            send(exchange, &split, &self.prefiller, leg, &turn);
            return;
        }
        shard.metrics.warm_up(Counted::Skipped);
    }
}

fn send<N: Net>(
    exchange: &Exchange<'_, N>,
    split: &Split,
    target: &Target,
    leg: Leg,
    turn: &Rc<Turn<N>>,
) {
    let shard = exchange.shard;
    let leg = Leg {
        take: Take::Nothing,
        ..leg
    };
    let id = Uuid::v4([shard.net.random(), shard.net.random()]);
    let names = [Name::Authorization];
    let mut head = HeadWriter::generated(
        shard.buffers.buffer(),
        b"POST",
        b"/v1/chat/completions",
        target,
    )
    .field(b"content-type", b"application/json")
    .client_fields(&exchange.request.head, &exchange.request.bytes, &names)
    .field(b"x-request-id", id.text().as_str().as_bytes());
    if let Some(rank) = leg.rank {
        head = head.field(b"x-data-parallel-rank", rank.to_string().as_bytes());
    }
    let head = head.finish(Framing::Length(leg.body.len() as u64));
    let wait = Duration::from_secs(WARM_UP_SECS_MAX);
    let deadline = Deadline::of(shard.net.now(), Some(wait), Timeout::Leg);
    let (target, body, turn) = (target.clone(), Rc::clone(&split.body), Rc::clone(turn));
    let metrics = Arc::clone(&shard.metrics);
    let call = async move |context: Rc<TaskContext<N, ()>>| {
        let call = Call {
            engine: context.upstreams().engine(leg.role, &target),
            head: &head,
            leg: &leg,
            body: body.bytes(),
            is_counted: false,
        };
        let deadlines = Deadlines::all(deadline);
        let ended = context.upstreams().call(&context, &call, None, &deadlines);
        let is_done = matches!(ended.await, Ok(CallEnd::Done(..)));
        if leg.role == Role::Prefill {
            metrics.warm_up(if is_done {
                Counted::Done
            } else {
                Counted::Failed
            });
        }
        drop(turn);
    };
    let (to_end, untraced) = (OnDisconnect::RunToEnd, LegTrace::NONE);
    drop(LegTask::begin(&shard.upstreams, to_end, untraced, call));
}

/// The right of a shard to run one speculative prefill at a time.
struct Turn<N: Net>(Rc<Shard<N>>);

impl<N: Net> Turn<N> {
    fn take(shard: &Rc<Shard<N>>) -> Option<Self> {
        let is_taken = shard.is_warming_up.replace(true);
        (!is_taken).then(|| Self(Rc::clone(shard)))
    }
}

impl<N: Net> Drop for Turn<N> {
    fn drop(&mut self) {
        self.0.is_warming_up.set(false);
    }
}
