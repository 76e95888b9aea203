//! KV cache that nobody will fetch: the prefiller is told, by way of the decoder, to give it up.
//!
//! A prefiller keeps the blocks of a finished prefill until a decoder has read them or the lease
//! has run out (30 s). There is no call that ends the lease, but a decoder whose HTTP server
//! refuses a request that carries a handoff tells the prefiller so. A request for a model that does
//! not exist is refused before its prompt is even tokenised, and nothing is transferred
//! (vLLM 0.32, `_with_kv_transfer_rejection_cleanup`; measured, docs/stranded-kv.md).

use std::time::Duration;

use super::client::Limit;
use super::exchange::Exchange;
use super::leg::Waits;
use super::run::{Attempt, Call, Limits, Runs, finish_head};
use super::split::Split;
use super::task::LegTask;
use crate::config::KvConnector;
use crate::fault::Fault;
use crate::h1::{self, Name};
use crate::json::Splices;
use crate::limits::RELEASE_MS_MAX;
use crate::metrics::Stranded;
use crate::net::Net;
use crate::pd::{Leg, OnDisconnect, Role, Take};

/// A model no server has: what it is refused for.
const MODEL: &[u8] = b"ringside-releases-kv-cache";

impl<N: Net> Exchange<'_, N> {
    /// Notes a handoff that no decode leg will carry, and has its blocks given up where that is
    /// wanted and possible.
    pub(super) fn count_stranded(&self, split: &Split, handoff: &[u8]) {
        let shard = self.shard;
        let pd = &shard.config.pd;
        let can_release = pd.connector == KvConnector::Nixlv2 && !pd.mori.write_mode;
        if !pd.release_stranded_kv || !can_release {
            shard.metrics.stranded(Stranded::LeftToLease);
            return;
        }
        let body = body(handoff);
        let leg = Leg {
            role: Role::Decode,
            body: Splices::untouched(body.len()),
            take: Take::Nothing,
            rank: None,
            request_id: None,
        };
        let head = self.release_head(split, &leg);
        let (id, target) = (split.decoder, shard.decoder_target(split.decoder).clone());
        let wait = Duration::from_millis(RELEASE_MS_MAX);
        let limit = Limit::of(shard.net.now(), Some(wait), Fault::FirstByteTimeout);
        // Nobody waits for it: the client is gone.
        drop(LegTask::begin(
            shard,
            OnDisconnect::RunToEnd,
            |aside| async move {
                let call = Call {
                    id,
                    target: &target,
                    head: &head,
                    leg: &leg,
                    body: &body,
                };
                let ended = aside.run_leg(&call, &mut None, &Limits::all(limit)).await;
                let is_refused = matches!(
                    &ended,
                    Ok(Attempt::Status(_, response, true)) if (400..500).contains(&response.head.status)
                );
                aside.shard().metrics.stranded(if is_refused {
                    Stranded::Released
                } else {
                    Stranded::Failed
                });
            },
        ));
    }

    /// The head of the refused request: ours, but with the client's credentials and rank.
    fn release_head(&self, split: &Split, leg: &Leg) -> Vec<u8> {
        let mut head = self.shard.buffer();
        let target = self.shard.decoder_target(split.decoder);
        head.extend_from_slice(b"POST /v1/completions HTTP/1.1\r\n");
        h1::push_field(&mut head, b"host", target.authority().as_bytes());
        h1::push_field(&mut head, b"content-type", b"application/json");
        for field in &self.head.fields {
            if matches!(field.known, Name::Authorization | Name::XDataParallelRank) {
                let (name, value) = (field.name.of(&self.bytes), field.value.of(&self.bytes));
                h1::push_field(&mut head, name, value);
            }
        }
        h1::push_field(&mut head, b"x-request-id", self.request_id.as_bytes());
        finish_head(&mut head, leg);
        head
    }
}

fn body(handoff: &[u8]) -> Vec<u8> {
    [
        br#"{"model":""#,
        MODEL,
        br#"","prompt":"x","max_tokens":1,"kv_transfer_params":"#,
        handoff,
        b"}",
    ]
    .concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refused_request_carries_the_handoff_as_it_came() {
        let body = body(br#"{"do_remote_prefill":true,"x":1.0}"#);
        let text = String::from_utf8(body).unwrap();
        assert!(text.ends_with(r#""kv_transfer_params":{"do_remote_prefill":true,"x":1.0}}"#));
        let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(parsed["model"], "ringside-releases-kv-cache");
    }
}
