//! AMD's `MoRI-IO`, a mode of `nixlv2` (`--moriio-write-mode`, `docs/pd-sidecar.md#moriio`).
//!
//! The prefiller writes into the decoder's memory, so each engine must have the other's address
//! before either leg starts. The data-parallel rank is a hash of the request's UUID, so that both
//! sides use the same rank without communicating.

use std::rc::Rc;
use std::time::Duration;

use blake2::{Blake2s256, Digest};

use super::contract::{BASE, Commit, Connector, OnDisconnect, Order, PrefixPull, Rules, SpanNames};
use crate::budget::Kept;
use crate::json::{Document, Edit, EditError, Level, Quoted, QuotedList, Scanner, Watch};
use crate::pd::edits::Caps;
use crate::pd::leg::{Leg, Take};
use crate::pd::options::MoriConfig;
use crate::pd::peer::Peer;
use crate::pd::request::{CLIENT_OWNED_KV, PdRequest, with_kv};

/// `MoRI-IO` in write mode, with the prefill leg before the decode leg.
pub(super) struct MoriSerial;

/// `MoRI-IO` in write mode, with concurrent legs (`--moriio-parallel-dispatch`).
pub(super) struct MoriConcurrent;

/// The members that clients must not set. In the responses API, engines read the addresses of their
/// peers from a `request_id` with marks, and ignore the request id of the head.
const CLIENT_OWNED: Watch = &with_kv::<{ OWN.len() + CLIENT_OWNED_KV.len() }>(OWN);

const OWN: Watch = &[(Level::Top, "request_id")];

const SERIAL_RULES: Rules = Rules {
    // `MoRI-IO` is a mode of this connector.
    name: "nixlv2",
    client_owned: CLIENT_OWNED,
    commit: Commit::OnPrefill,
    prefix_pull: PrefixPull::IfEnabled,
    can_decode_in_chunks: true,
    span_names: SpanNames::Short,
    ..BASE
};

const CONCURRENT_RULES: Rules = Rules {
    // The prefiller writes to the decoder until the transfer is reported as complete.
    prefill_on_disconnect: OnDisconnect::UntilFirstByte,
    decode_on_disconnect: OnDisconnect::UntilFirstByte,
    span_names: SpanNames::Long,
    is_parallel_dispatch: true,
    ..SERIAL_RULES
};

impl Connector for MoriSerial {
    fn rules(&self) -> &'static Rules {
        &SERIAL_RULES
    }

    fn order(&self, _: &PdRequest<'_>) -> Order {
        Order::Serial
    }

    fn prefill_leg(&self, request: &PdRequest<'_>, peer: &Peer) -> Result<Leg, EditError> {
        prefill_leg(request, peer, Caps::All, Take::Handoff)
    }

    fn decode_leg(
        &self,
        request: &PdRequest<'_>,
        peer: &Peer,
        handoff: Option<&Rc<Kept>>,
    ) -> Result<Leg, EditError> {
        let take = Take::Response(request.api.usage_shape());
        match handoff {
            Some(handoff) => serial_decode_leg(request, peer, handoff, take),
            None => request.decode_leg(b"null", take),
        }
    }
}

impl Connector for MoriConcurrent {
    fn rules(&self) -> &'static Rules {
        &CONCURRENT_RULES
    }

    fn order(&self, _: &PdRequest<'_>) -> Order {
        Order::Concurrent
    }

    fn prefill_leg(&self, request: &PdRequest<'_>, peer: &Peer) -> Result<Leg, EditError> {
        let mut leg = prefill_leg(request, peer, Caps::Every, Take::Nothing)?;
        // Both engines identify the transfer by this request id.
        leg.request_id = Some(request.uuid);
        Ok(leg)
    }

    fn decode_leg(
        &self,
        request: &PdRequest<'_>,
        peer: &Peer,
        _: Option<&Rc<Kept>>,
    ) -> Result<Leg, EditError> {
        let mut leg = concurrent_decode_leg(request, peer)?;
        leg.request_id = Some(request.uuid);
        Ok(leg)
    }

    fn prefill_head_wait(&self, mori: &MoriConfig) -> Option<Duration> {
        mori.parallel_wait
    }
}

/// Returns the rank, below `ranks`, of the request with the UUID `name`.
///
/// Other implementations compute the same: the first 8 bytes of BLAKE2s-256 of the text, as a
/// big-endian integer, modulo the number of ranks.
pub(super) fn rank(name: &str, ranks: u32) -> u32 {
    if ranks <= 1 {
        return 0;
    }
    let digest = Blake2s256::digest(name.as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&digest[..8]);
    let rank = u64::from_be_bytes(first) % u64::from(ranks);
    u32::try_from(rank).unwrap_or(0)
}

/// The data-parallel ranks that serve one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ranks {
    /// The rank within its pod, the same for the prefiller and the decoder. It is the value of
    /// `x-data-parallel-rank`, because an engine's front end counts only the ranks in its own pod.
    local: u32,
    /// The prefiller's rank, counted over all prefill pods.
    prefill: u32,
    /// The decoder's rank, counted over all decode pods.
    decode: u32,
}

impl Ranks {
    fn of(request: &PdRequest<'_>, peer: &Peer) -> Self {
        let mori = request.mori;
        let local = rank(request.uuid.text().as_str(), ranks_per_pod(mori));
        let first_rank_of = |hosts: &[String], host: &str| {
            let pod = hosts.iter().position(|known| known == host).unwrap_or(0);
            u32::try_from(pod).unwrap_or(0) * ranks_per_pod(mori)
        };
        Self {
            local,
            prefill: first_rank_of(&request.hosts.prefill, &peer.host()) + local,
            decode: first_rank_of(&request.hosts.decode, &mori.local_pod_ip) + local,
        }
    }
}

fn ranks_per_pod(mori: &MoriConfig) -> u32 {
    mori.dp_size_local.unwrap_or(mori.dp_size).max(1)
}

/// Converts the result of `rank`, counted over all pods of a role or within one pod, to the value
/// of a leg's `x-data-parallel-rank`, which is counted within a pod. Returns `None`, without
/// calling `rank`, if there is only one rank over all pods, in which case the field is not set.
fn header_rank(mori: &MoriConfig, rank: impl FnOnce() -> u32) -> Option<u32> {
    (mori.dp_size > 1).then(|| rank() % ranks_per_pod(mori))
}

/// Returns the value of the prefill leg's `x-data-parallel-rank` in read mode, or `None` if there
/// is only one rank. This field is the only difference between read mode and plain NIXL version 2.
pub(super) fn read_mode_rank(request: &PdRequest<'_>) -> Option<u32> {
    let mori = request.mori;
    header_rank(mori, || {
        rank(request.uuid.text().as_str(), ranks_per_pod(mori))
    })
}

/// Returns the prefill leg of both orders.
fn prefill_leg(
    request: &PdRequest<'_>,
    peer: &Peer,
    caps: Caps,
    take: Take,
) -> Result<Leg, EditError> {
    let mori = request.mori;
    let ranks = Ranks::of(request, peer);
    let mut params = format!(
        r#"{{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,"remote_block_ids":null,"remote_port":null,"remote_host":{},"remote_notify_port":{},"remote_handshake_port":{},"remote_dp_rank":{},"remote_dp_rank_override":true,"transfer_id":"tx{}","tp_size":{},"remote_dp_size":{}"#,
        Quoted(&mori.local_pod_ip),
        mori.decode_notify_port,
        mori.decode_handshake_port,
        ranks.decode,
        request.uuid,
        mori.tp_size,
        mori.dp_size,
    );
    push_hosts(&mut params, mori, &request.hosts.decode);
    if let Some(source) = &peer.source {
        params.push_str(&format!(r#","remote_kv_source":{}"#, source.object()));
    }
    params.push('}');
    let mut leg = request.prefill_leg(params.as_bytes(), caps, take)?;
    leg.rank = header_rank(mori, || ranks.local);
    Ok(leg)
}

/// Adds `hosts`, the addresses of the pods of the other role, and the number of ranks per pod, if
/// it is configured, to transfer parameters. Adds nothing if `hosts` is empty.
fn push_hosts(params: &mut String, mori: &MoriConfig, hosts: &[String]) {
    if hosts.is_empty() {
        return;
    }
    params.push_str(&format!(r#","remote_hosts":{}"#, QuotedList(hosts)));
    if let Some(local) = mori.dp_size_local {
        params.push_str(&format!(r#","remote_dp_size_local":{local}"#));
    }
}

/// Returns the decode leg of the concurrent order.
fn concurrent_decode_leg(request: &PdRequest<'_>, peer: &Peer) -> Result<Leg, EditError> {
    let mori = request.mori;
    let ranks = Ranks::of(request, peer);
    let mut params = format!(
        r#"{{"do_remote_prefill":true,"do_remote_decode":false,"remote_block_ids":[],"remote_engine_id":{},"remote_host":{},"remote_port":{handshake},"remote_notify_port":{},"remote_handshake_port":{handshake},"remote_dp_rank":{},"remote_dp_rank_override":true,"transfer_id":"tx{}","tp_size":{},"remote_dp_size":{}"#,
        Quoted(&format!(
            "{}:{}",
            peer.url_host(),
            mori.prefill_handshake_port
        )),
        Quoted(&peer.host()),
        mori.prefill_notify_port,
        ranks.prefill,
        request.uuid,
        mori.tp_size,
        mori.dp_size,
        handshake = mori.prefill_handshake_port,
    );
    push_hosts(&mut params, mori, &request.hosts.prefill);
    params.push('}');
    let mut decode = request.decode_leg(params.as_bytes(), Take::Response(None))?;
    decode.rank = header_rank(mori, || ranks.local);
    Ok(decode)
}

/// Members that are added to the handoff of a serial transfer, or replaced in it.
const HANDOFF: Watch = &[
    (Level::Top, "remote_dp_rank"),
    (Level::Top, "remote_dp_rank_override"),
    (Level::Top, "transfer_id"),
    (Level::Top, "remote_notify_port"),
    (Level::Top, "remote_handshake_port"),
    (Level::Top, "remote_dp_size"),
    (Level::Top, "remote_hosts"),
    (Level::Top, "remote_dp_size_local"),
];

/// Returns the decode leg of the serial order. It carries the prefiller's handoff with
/// `remote_dp_rank` and `remote_dp_rank_override` set, and with the other members of [`HANDOFF`]
/// added if they are missing and configured.
fn serial_decode_leg(
    request: &PdRequest<'_>,
    peer: &Peer,
    handoff: &[u8],
    take: Take,
) -> Result<Leg, EditError> {
    let mori = request.mori;
    let mut scanner = Scanner::new(HANDOFF);
    let Some(document) = scanner.feed(handoff).and_then(|()| scanner.finish()).ok() else {
        // The handoff is valid JSON, so the scan can only fail at one of the scanner's own limits.
        return request.decode_leg(handoff, take);
    };
    let rank = returned_rank(&document, handoff, mori.dp_size)
        .unwrap_or_else(|| Ranks::of(request, peer).prefill);
    let values = [
        ("remote_dp_rank", rank.to_string(), true),
        ("remote_dp_rank_override", "true".to_owned(), true),
        ("transfer_id", format!("\"tx{}\"", request.uuid), false),
        (
            "remote_notify_port",
            mori.decode_notify_port.to_string(),
            false,
        ),
        (
            "remote_handshake_port",
            mori.decode_handshake_port.to_string(),
            false,
        ),
        ("remote_dp_size", mori.dp_size.to_string(), false),
        (
            "remote_hosts",
            QuotedList(&request.hosts.prefill).to_string(),
            false,
        ),
        (
            "remote_dp_size_local",
            mori.dp_size_local.unwrap_or(0).to_string(),
            false,
        ),
    ];
    let is_used = |name: &str| match name {
        "remote_hosts" => !request.hosts.prefill.is_empty(),
        "remote_dp_size_local" => !request.hosts.prefill.is_empty() && mori.dp_size_local.is_some(),
        _ => true,
    };
    let edits: Vec<Edit<'_>> = values
        .iter()
        .filter(|(name, _, always)| {
            *always || (is_used(name) && document.last(Level::Top, name).is_none())
        })
        .map(|(name, value, _)| Edit::Set {
            level: Level::Top,
            name,
            value: value.as_bytes(),
        })
        .collect();
    let spliced = document.edit(&edits)?;
    let params: Vec<u8> = spliced.pieces(handoff).flatten().copied().collect();
    let mut leg = request.decode_leg(&params, take)?;
    leg.rank = header_rank(mori, || rank);
    Ok(leg)
}

/// Returns `remote_dp_rank` of the prefiller's handoff, or `None` if it is not an integer below
/// `ranks`.
fn returned_rank(document: &Document, handoff: &[u8], ranks: u32) -> Option<u32> {
    let member = document.last(Level::Top, "remote_dp_rank")?;
    let digits = member.value.of(handoff);
    let is_plain = digits.len() == 1 || digits.first() != Some(&b'0');
    let rank = std::str::from_utf8(digits).ok()?.parse::<u32>().ok()?;
    (is_plain && rank < ranks.max(1)).then_some(rank)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Api;
    use crate::pd::connector::nixlv2::Nixlv2;
    use crate::pd::testing::{NAME, Subject, apply, pair, peer};
    use serde_json::json;

    fn subject(dp_size: u32, dp_size_local: Option<u32>) -> Subject {
        let mut subject = Subject::new(Api::Chat, r#"{"messages":[],"min_tokens":5}"#);
        subject.mori.write_mode = true;
        subject.mori.local_pod_ip = "10.4.0.2".to_owned();
        subject.mori.dp_size = dp_size;
        subject.mori.dp_size_local = dp_size_local;
        subject
    }

    #[test]
    fn m1_m5_serial_legs_share_a_transfer_and_a_rank() {
        let subject = subject(8, None);
        let body = &subject.body;
        let rank = rank(NAME, 8);
        let prefill = MoriSerial.prefill_leg(&subject.request(), &peer()).unwrap();
        let transfer = format!("tx{NAME}");
        let sent = apply(&prefill, body);
        let want = json!({"do_remote_decode": true, "do_remote_prefill": false,
            "remote_engine_id": null, "remote_block_ids": null, "remote_port": null,
            "remote_host": "10.4.0.2", "remote_notify_port": 61005,
            "remote_handshake_port": 6301, "remote_dp_rank": rank,
            "remote_dp_rank_override": true, "transfer_id": transfer, "tp_size": 1,
            "remote_dp_size": 8});
        assert_eq!(sent["kv_transfer_params"], want);
        assert_eq!(
            (sent["max_tokens"].as_u64(), sent["min_tokens"].as_u64()),
            (Some(1), Some(1))
        );
        assert_eq!(prefill.rank, Some(rank));
        let decode = |handoff: &str| {
            let leg = serial_decode_leg(
                &subject.request(),
                &peer(),
                handoff.as_bytes(),
                Take::Response(None),
            );
            let leg = leg.unwrap();
            (apply(&leg, body)["kv_transfer_params"].clone(), leg.rank)
        };
        let filled = |rank: u32| {
            json!({"do_remote_prefill": true, "remote_dp_rank": rank,
            "remote_dp_rank_override": true, "transfer_id": transfer, "remote_notify_port": 61005,
            "remote_handshake_port": 6301, "remote_dp_size": 8})
        };
        assert_eq!(
            decode(r#"{"do_remote_prefill":true,"remote_dp_rank":3}"#),
            (filled(3), Some(3))
        );
        assert_eq!(
            decode(r#"{"do_remote_prefill":true,"remote_dp_rank":"3"}"#),
            (filled(rank), Some(rank))
        );
        let (kept, _) = decode(r#"{"transfer_id":"theirs","remote_notify_port":1}"#);
        assert_eq!(
            (&kept["transfer_id"], &kept["remote_notify_port"]),
            (&json!("theirs"), &json!(1))
        );
    }

    #[test]
    fn m2_m4_each_concurrent_leg_has_the_address_of_the_other_side() {
        let subject = subject(8, None);
        let body = &subject.body;
        let rank = rank(NAME, 8);
        let [prefill, decode] = pair(&MoriConcurrent, &subject.request(), &peer());
        for leg in [&prefill, &decode] {
            assert_eq!(leg.rank, Some(rank));
            assert_eq!(
                leg.request_id.map(|id| id.to_string()).as_deref(),
                Some(NAME)
            );
        }
        let sent = apply(&prefill, body);
        for name in [
            "max_tokens",
            "max_completion_tokens",
            "max_output_tokens",
            "min_tokens",
        ] {
            assert_eq!(sent[name], 1, "{name}");
        }
        assert_eq!(sent["kv_transfer_params"].get("remote_hosts"), None);
        let got = apply(&decode, body);
        assert_eq!(got["min_tokens"], 5);
        let want = json!({"do_remote_prefill": true, "do_remote_decode": false,
            "remote_block_ids": [], "remote_engine_id": "10.4.0.7:6301",
            "remote_host": "10.4.0.7", "remote_port": 6301, "remote_notify_port": 61005,
            "remote_handshake_port": 6301, "remote_dp_rank": rank,
            "remote_dp_rank_override": true, "transfer_id": format!("tx{NAME}"), "tp_size": 1,
            "remote_dp_size": 8});
        assert_eq!(got["kv_transfer_params"], want);
    }

    #[test]
    fn m3_ranks_of_several_pods_are_counted_over_the_pods() {
        let mut subject = subject(16, Some(8));
        let hosts = |last: [u8; 2]| last.map(|n| format!("10.4.0.{n}")).to_vec();
        subject.mori.hosts.prefill = hosts([6, 7]);
        subject.mori.hosts.decode = hosts([2, 3]);
        let body = &subject.body;
        let local = rank(NAME, 8);
        let [prefill, decode] = pair(&MoriConcurrent, &subject.request(), &peer());
        let params = |leg| apply(leg, body)["kv_transfer_params"].clone();
        assert_eq!((prefill.rank, decode.rank), (Some(local), Some(local)));
        let sent = params(&prefill);
        assert_eq!(sent["remote_hosts"], json!(["10.4.0.2", "10.4.0.3"]));
        assert_eq!(sent["remote_dp_size_local"], 8);
        assert_eq!(
            sent["remote_dp_rank"], local,
            "the decoder is in the first pod"
        );
        let sent = params(&decode);
        assert_eq!(sent["remote_hosts"], json!(["10.4.0.6", "10.4.0.7"]));
        assert_eq!(
            sent["remote_dp_rank"],
            8 + local,
            "the prefiller is in the second pod"
        );
    }

    #[test]
    fn n17_in_read_mode_only_the_prefill_leg_has_a_rank() {
        let mut subject = subject(8, None);
        subject.mori.write_mode = false;
        let prefill = Nixlv2.prefill_leg(&subject.request(), &peer()).unwrap();
        let decode = Nixlv2
            .decode_leg(&subject.request(), &peer(), None)
            .unwrap();
        assert_eq!((prefill.rank, decode.rank), (Some(rank(NAME, 8)), None));
        subject.mori.dp_size = 1;
        let prefill = Nixlv2.prefill_leg(&subject.request(), &peer()).unwrap();
        assert_eq!(prefill.rank, None, "n16");
    }

    #[test]
    fn m9_ranks_equal_those_of_other_implementations() {
        let zeros = "00000000-0000-0000-0000-000000000000";
        let vectors = [
            ("abc", 8, 2),
            ("cmpl-foo-0", 8, 5),
            (zeros, 8, 6),
            ("abc", 2, 0),
            ("abc", 16, 2),
            ("abc", 1, 0),
            ("abc", 0, 0),
        ];
        for (name, ranks, want) in vectors {
            assert_eq!(rank(name, ranks), want, "{name} of {ranks}");
        }
        for ranks in 2..=64 {
            let mut hits = vec![0; ranks as usize];
            for n in 0..ranks * 200 {
                hits[rank(&format!("request-{n}"), ranks) as usize] += 1;
            }
            let (least, most) = (hits.iter().min().unwrap(), hits.iter().max().unwrap());
            assert!(*least > 120 && *most < 280, "{ranks} ranks: {hits:?}");
        }
    }

    #[test]
    fn m10_a_returned_rank_is_used_only_if_it_is_valid() {
        let read = |value: &str| {
            let handoff = format!(r#"{{"a":1,"remote_dp_rank":{value}}}"#);
            let mut scanner = Scanner::new(HANDOFF);
            scanner.feed(handoff.as_bytes()).unwrap();
            returned_rank(&scanner.finish().unwrap(), handoff.as_bytes(), 8)
        };
        for (value, want) in [("3", Some(3)), ("5", Some(5)), ("0", Some(0))] {
            assert_eq!(read(value), want);
        }
        for value in ["null", "\"3\"", "3.5", "8", "-1", "3e0"] {
            assert_eq!(read(value), None, "{value}");
        }
    }
}
