//! The encoder stage: one leg per item, all side by side; the first failure ends the others.

use std::rc::Rc;
use std::task::Poll;

use super::client::{Limit, Watch};
use super::exchange::{Exchange, micros_since};
use super::leg::{LegFault, Waits};
use super::run::{Attempt, Call, Collected, Limits, Runs, finish_head};
use super::shard::leg_role;
use super::split::{Split, too_many};
use super::task::LegTask;
use crate::config::EcConnector;
use crate::fault::Fault;
use crate::fleet::Target;
use crate::h1::{self, Name};
use crate::net::Net;
use crate::pd::encode::{self, Merge, TooManyItems};
use crate::pd::{Encoded, Leg, OnDisconnect, Role};

/// Bytes of an encoder's error that the client is shown.
const SHOWN_BYTES_MAX: usize = 512;

type EncodeTask<N> = LegTask<N, Result<Attempt<N>, LegFault>>;

impl<N: Net> Exchange<'_, N> {
    /// Sends the request's items to `encoders` in turn, and notes what the later legs carry.
    pub(super) async fn encode(
        &mut self,
        split: &mut Split,
        encoders: &[Target],
    ) -> Result<(), Fault> {
        let ec = self.shard.config.pd.encoder.unwrap_or(EcConnector::Example);
        let pd_request = split.pd_request();
        let items = encode::items(&pd_request).map_err(|TooManyItems| Fault::TooManyItems)?;
        let mut tasks = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            let leg = encode::leg(&pd_request, item, ec).map_err(too_many)?;
            let target = &encoders[index % encoders.len()];
            tasks.push(Some(self.begin_encode(split, target, leg, index)));
        }
        let mut responses: Vec<_> = tasks.iter().map(|_| Collected::Nothing).collect();
        while tasks.iter().any(Option::is_some) {
            let (index, ended) = self.next_ended(&mut tasks).await?;
            responses[index] = self.encoded(index, ended)?;
        }
        let mut merge = Merge::default();
        for (index, response) in responses.iter().enumerate() {
            if let Collected::Whole(response) = response
                && !merge.take(response)
            {
                tracing::debug!(item = index, "an encoder gave no ec_transfer_params");
            }
        }
        split.encoded = Some(Encoded {
            params: merge.finish(),
        });
        Ok(())
    }

    fn begin_encode(
        &mut self,
        split: &Split,
        target: &Target,
        leg: Leg,
        index: usize,
    ) -> EncodeTask<N> {
        self.stats.attempts += 1;
        let shard = self.shard;
        let head = self.encode_head(target, &leg, index);
        let traced = self.trace.detach();
        let id = shard.pools.endpoint(Role::Encode, target, false);
        let (target, body) = (target.clone(), Rc::clone(&split.body));
        LegTask::begin(shard, OnDisconnect::Cancel, |context| async move {
            let call = Call {
                id,
                target: &target,
                head: &head,
                leg: &leg,
                body: &body.bytes,
            };
            let begun = context.shard().net.now();
            let ended = context.run_leg(&call, &mut None, &Limits::NONE).await;
            let took = micros_since(context.shard().net.now(), begun);
            context.shard().metrics.leg(leg_role(Role::Encode), took);
            traced.end(context.shard(), Role::Encode, &ended);
            ended
        })
    }

    /// The head of an item's request: our own, but with the client's credentials.
    fn encode_head(&self, target: &Target, leg: &Leg, index: usize) -> Vec<u8> {
        let mut head = self.shard.buffer();
        head.extend_from_slice(b"POST /v1/chat/completions HTTP/1.1\r\n");
        h1::push_field(&mut head, b"host", target.authority().as_bytes());
        h1::push_field(&mut head, b"content-type", b"application/json");
        for field in self.head.fields_named(Name::Authorization) {
            h1::push_field(&mut head, b"authorization", field.value.of(&self.bytes));
        }
        head.extend_from_slice(b"x-request-id: ");
        head.extend_from_slice(self.request_id.as_bytes());
        head.extend_from_slice(b"-enc-");
        h1::push_decimal(&mut head, index as u64);
        head.extend_from_slice(b"\r\n");
        let trace_headers = self.trace_leg(Role::Encode, target, Some(leg));
        self.push_trace(&mut head, trace_headers);
        finish_head(&mut head, leg);
        head
    }

    /// Waits for the next leg to end, and takes it off the list.
    async fn next_ended(
        &self,
        tasks: &mut [Option<EncodeTask<N>>],
    ) -> Result<(usize, Result<Attempt<N>, LegFault>), Fault> {
        self.until(Watch::Ahead, Limit::NONE, |cx| {
            for (index, slot) in tasks.iter_mut().enumerate() {
                if let Some(task) = slot
                    && let Poll::Ready(ended) = task.poll(cx)
                {
                    *slot = None;
                    let ended = ended.unwrap_or_else(|fault| Err(fault.into()));
                    return Poll::Ready((index, ended));
                }
            }
            Poll::Pending
        })
        .await
    }

    /// What an item's leg gave; the client is told which one failed, and how.
    fn encoded(
        &mut self,
        index: usize,
        ended: Result<Attempt<N>, LegFault>,
    ) -> Result<Collected, Fault> {
        match ended {
            Ok(Attempt::Done(collected, ..)) => Ok(collected),
            Ok(Attempt::Status(_, response, _)) => {
                let mut detail = format!("item {index}");
                if !self.shard.config.pd.hide_prefill_errors {
                    let rest = response.rest();
                    let shown = &rest[..rest.len().min(SHOWN_BYTES_MAX)];
                    detail.push_str(": ");
                    detail.push_str(&String::from_utf8_lossy(shown));
                }
                self.stats.detail = Some(detail);
                Err(Fault::EncodeStatus(response.head.status))
            }
            Err(fault) => {
                self.stats.detail = Some(format!("item {index}"));
                Err(fault.fault(Role::Encode))
            }
        }
    }
}
