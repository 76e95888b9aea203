//! The offloading connector (`docs/pd-sidecar.md#offloading`) and cached-prefix pulls
//! (`docs/pd-sidecar.md#cached-prefix-pulls`): conformance rows P1 to P12.

use std::collections::HashSet;

use mock_engine::{Engine, EngineConfig, KvContract, Meetings, Seen};
use serde_json::{Value, json};

use crate::apis::{Api, Completion, Question};
use crate::harness::{CHAT, Launch, PREFILLER, Pair, Sidecar, json_of, only, start_ranks};
use crate::harness::{prefill_params, start_decoder};
use crate::kv::{
    Rule, Setup, both_legs, client_disconnects, engine_error, failed_prefill_cancels_decode,
    forget, responded, responded_with,
};

const SOURCE: &str = "x-kv-cache-source-host-port";
const PARAMS: &str = "kv_transfer_params";

fn setup(meetings: &Meetings) -> Setup<'static> {
    Setup {
        args: &["--kv-connector=offloading"],
        contract: KvContract::Offloading(meetings.clone()),
        ..Setup::default()
    }
}

fn start() -> (Pair, Meetings) {
    let meetings = Meetings::new();
    (setup(&meetings).start(), meetings)
}

/// Replaces the member `kv_request_id` of an object by null and returns its previous value. Fails
/// unless that has 36 characters, like a UUID.
#[track_caller]
fn take_id(object: &mut Value) -> String {
    let id = object["kv_request_id"].take();
    let id = id.as_str().unwrap().to_owned();
    assert_eq!(id.len(), 36, "{id}");
    id
}

#[test]
fn p1_both_legs_share_a_request_id() {
    let (pair, _) = start();
    for api in Api::ALL {
        for stream in [false, true] {
            forget(&pair);
            let more = match (api, stream) {
                (Api::Chat, true) => r#","stream_options":{"include_usage":true}"#,
                (Api::Chat, false) => r#","max_completion_tokens":6,"min_tokens":3"#,
                _ => "",
            };
            let question = api.ask_with(6, stream, more);
            responded(&pair, &question);
            let (prefill, decode) = both_legs(&pair);
            let (prefill, mut decode) = (json_of(&prefill), json_of(&decode));
            let id = take_id(&mut decode[PARAMS]["remote_prefiller"]);
            let mut want = question.json();
            want[PARAMS] = json!({"remote_prefiller": {"kv_request_id": null,
                "remote_host": "127.0.0.1", "remote_port": 7777}});
            assert_eq!(decode, want);
            let set = json!({"stream": false,
                PARAMS: {"remote_decoder": {"kv_request_id": id}}});
            let client = question.json();
            let removed = ["stream_options"];
            api.expect_capped(&client, &prefill, &set, &removed, Completion::IfGiven);
        }
    }
    pair.sidecar.expect_sound();
}

#[test]
fn a_request_that_the_prefiller_refuses_does_not_reach_the_decoder() {
    let (pair, _) = start();
    for code in [400, 422, 500] {
        forget(&pair);
        pair.prefill.fault(engine_error(code), 1);
        let question = Api::Chat.ask(6, true);
        pair.post(CHAT, &question.body).expect(code);
        assert!(pair.decode.requests().is_empty());
        assert_eq!(pair.prefill.requests().len(), 1);
    }
    responded(&pair, &Api::Chat.ask(6, true));
}

#[test]
fn a_retried_prefill_has_another_request_id() {
    let meetings = Meetings::new();
    let pair = Setup {
        args: &["--kv-connector=offloading", "--prefill-max-retries=1"],
        ..setup(&meetings)
    }
    .start();
    pair.prefill.fault(engine_error(503), 1);
    responded(&pair, &Api::Chat.ask(6, true));
    let ids: HashSet<_> = pair
        .prefill
        .requests()
        .iter()
        .map(|seen| take_id(&mut json_of(seen)[PARAMS]["remote_decoder"]))
        .collect();
    assert_eq!(ids.len(), 2);
    let decode = take_id(&mut json_of(&only(&pair.decode))[PARAMS]["remote_prefiller"]);
    assert!(ids.contains(&decode));
}

#[test]
fn the_count_of_cached_tokens_is_the_prefillers() {
    let (pair, _) = start();
    let response = pair.post(CHAT, &Api::Chat.ask(6, false).body).expect(200);
    let count = "/usage/prompt_tokens_details/cached_tokens";
    assert_eq!(response.json().pointer(count), Some(&json!(7)));
}

#[test]
fn p2_members_absent_from_the_request_are_not_capped() {
    let (pair, _) = start();
    responded(&pair, &Api::Chat.ask(6, false));
    let (prefill, decode) = both_legs(&pair);
    for leg in [prefill, decode] {
        assert_eq!(json_of(&leg).get("max_completion_tokens"), None);
    }
}

/// A sidecar with one listener per data-parallel rank, each in front of a separate decoder, and a
/// prefill engine.
struct Ranks {
    prefill: Engine,
    decoders: Vec<Engine>,
    sidecar: Sidecar,
}

impl Ranks {
    fn start(ranks: u16, args: &[&str], contract: &KvContract) -> Self {
        let config = |config: EngineConfig| EngineConfig {
            contract: contract.clone(),
            data_parallel_size: 1,
            ..config
        };
        let prefill = Engine::start(config(EngineConfig::prefill()), 0).unwrap();
        let decoders = start_ranks(&config(EngineConfig::decode()), ranks);
        let size = format!("--data-parallel-size={ranks}");
        let sidecar = Sidecar::launch(&Launch {
            args: &[&[&*size], args].concat(),
            env: &[("POD_IP", "10.9.9.9")],
            decoder_port: decoders[0].port(),
            ranks,
            ..Launch::default()
        });
        Self {
            prefill,
            decoders,
            sidecar,
        }
    }

    /// Sends a request to rank 0 that names `source` as the source of a cached prefix, and no
    /// prefill engine. Returns the `kv_transfer_params` that the decoder of rank 0 received.
    #[track_caller]
    fn decode_only(&self, source: &str) -> Value {
        self.decoders[0].clear();
        let question = Api::Chat.ask(4, true);
        let headers = [(SOURCE, source)];
        let response = self.sidecar.post(CHAT, &question.body, &headers);
        question.expect(&response.expect(200));
        let seen = only(&self.decoders[0]);
        assert_eq!(seen.header(SOURCE), None);
        let mut body = json_of(&seen);
        let params = body
            .as_object_mut()
            .unwrap()
            .remove(PARAMS)
            .unwrap_or_default();
        assert_eq!(body, question.json(), "all other members must be unchanged");
        params
    }
}

fn offloading_ranks(ranks: u16) -> Ranks {
    let contract = KvContract::Offloading(Meetings::new());
    Ranks::start(ranks, &["--kv-connector=offloading"], &contract)
}

#[test]
fn p3_a_source_without_a_prefill_engine_is_sent_with_the_decode_leg() {
    let ranks = offloading_ranks(1);
    let mut params = ranks.decode_only("10.4.0.9:8000");
    take_id(&mut params["remote_kv_source"]);
    assert_eq!(
        params,
        json!({"remote_kv_source":
            {"kv_request_id": null, "remote_host": "10.4.0.9", "remote_port": 7777}})
    );
}

#[test]
fn p4_a_source_is_sent_with_the_prefill_leg() {
    let (pair, _) = start();
    let question = Api::Chat.ask(4, true);
    responded_with(&pair, &question, &[(SOURCE, "10.4.0.9:8000")]);
    let (prefill, decode) = both_legs(&pair);
    let (mut prefill, decode) = (json_of(&prefill), json_of(&decode));
    let own = take_id(&mut prefill[PARAMS]["remote_kv_source"]);
    assert_eq!(
        prefill[PARAMS]["remote_kv_source"],
        json!({"kv_request_id": null, "remote_host": "10.4.0.9", "remote_port": 7777})
    );
    let shared = take_id(&mut prefill[PARAMS]["remote_decoder"]);
    assert_ne!(own, shared);
    assert_eq!(decode[PARAMS].as_object().unwrap().len(), 1);
    assert_eq!(
        decode[PARAMS]["remote_prefiller"]["kv_request_id"],
        shared.as_str()
    );
}

#[test]
fn p4_only_the_first_source_field_is_used() {
    let ranks = offloading_ranks(1);
    let question = Api::Chat.ask(4, true);
    let headers = [(SOURCE, " 10.4.0.9:8000 "), (SOURCE, "10.4.0.8:8000")];
    let response = ranks.sidecar.post(CHAT, &question.body, &headers);
    question.expect(&response.expect(200));
    let body = json_of(&only(&ranks.decoders[0]));
    assert_eq!(body[PARAMS]["remote_kv_source"]["remote_host"], "10.4.0.9");
}

#[test]
fn p5_invalid_sources_and_the_engine_itself_are_not_injected() {
    let ranks = offloading_ranks(1);
    let own = format!("10.9.9.9:{}", ranks.sidecar.port);
    for source in [
        "",
        "nonsense",
        ":8000",
        "10.4.0.9",
        "10.4.0.9:x",
        "https://10.4.0.9:8000",
        own.as_str(),
    ] {
        ranks.decoders[0].clear();
        let question = Api::Chat.ask(4, true);
        let headers = [(SOURCE, source)];
        let response = ranks.sidecar.post(CHAT, &question.body, &headers);
        question.expect(&response.expect(200));
        let seen = only(&ranks.decoders[0]);
        assert_eq!(seen.body, question.body.as_bytes(), "{source:?}");
        assert_eq!(seen.header(SOURCE), None);
    }
    let (pair, _) = start();
    let prefiller = pair.prefill.host_port();
    let with_scheme = format!("http://{prefiller}");
    for source in [prefiller.as_str(), &with_scheme, "nonsense", ":1", ""] {
        forget(&pair);
        responded_with(&pair, &Api::Chat.ask(4, true), &[(SOURCE, source)]);
        let (prefill, _) = both_legs(&pair);
        let names = json_of(&prefill)[PARAMS].as_object().unwrap().len();
        assert_eq!(names, 1, "{source:?}");
    }
}

/// The source of a cached prefix is compared with the prefill candidate that serves the request,
/// not with the first candidate of the list.
#[test]
fn p5_a_later_candidate_does_not_pull_from_itself() {
    let (pair, _) = start();
    let down = Engine::start(EngineConfig::prefill(), 0).unwrap();
    down.refuse(true);
    let own = pair.prefill.host_port();
    let targets = format!("{},{own}", down.host_port());
    for (source, pulls) in [(own.as_str(), false), ("10.4.0.9:8000", true)] {
        forget(&pair);
        let question = Api::Chat.ask(4, true);
        let headers = [(PREFILLER, targets.as_str()), (SOURCE, source)];
        let response = pair.sidecar.post(CHAT, &question.body, &headers);
        question.expect(&response.expect(200));
        let (prefill, _) = both_legs(&pair);
        let pulled = json_of(&prefill)[PARAMS].get("remote_kv_source").is_some();
        assert_eq!(pulled, pulls, "{source}");
    }
}

#[test]
fn p6_another_rank_of_this_pod_is_a_source() {
    let ranks = offloading_ranks(2);
    let source = format!("10.9.9.9:{}", ranks.sidecar.port + 1);
    let params = ranks.decode_only(&source);
    let pull = &params["remote_kv_source"];
    assert_eq!(pull["remote_host"], "10.9.9.9");
    assert_eq!(pull["remote_port"], 7778);
}

#[test]
fn p7_transfer_parameters_from_the_client_are_replaced() {
    let ranks = offloading_ranks(1);
    let more = r#","kv_transfer_params":{"remote_kv_source":{"remote_host":"evil"}}"#;
    let question = Api::Chat.ask_with(4, true, more);
    let headers = [(SOURCE, "10.4.0.9:8000")];
    let response = ranks.sidecar.post(CHAT, &question.body, &headers);
    question.expect(&response.expect(200));
    let params = json_of(&only(&ranks.decoders[0]))[PARAMS].take();
    assert_eq!(params["remote_kv_source"]["remote_host"], "10.4.0.9");
    assert_eq!(params.as_object().unwrap().len(), 1);
    let (pair, _) = start();
    responded(&pair, &Api::Chat.ask_with(4, true, more));
    both_legs(&pair);
}

#[test]
fn p8_request_ids_are_unique() {
    let (pair, meetings) = start();
    for _ in 0..20 {
        responded(&pair, &Api::Chat.ask(2, true));
    }
    let ids: HashSet<String> = meetings.keys().into_iter().collect();
    assert_eq!((ids.len(), meetings.complete()), (20, 20));
}

#[test]
fn p9_only_connectors_that_can_pull_receive_a_source() {
    let nixl = KvContract::Nixlv2;
    let cases: [(&[&str], KvContract, bool); 5] = [
        (
            &["--kv-connector=offloading"],
            KvContract::Offloading(Meetings::new()),
            true,
        ),
        (&["--enable-p2p-pull"], nixl.clone(), true),
        (&[], nixl, false),
        (
            &["--kv-connector=sglang"],
            KvContract::Sglang(Meetings::new()),
            false,
        ),
        (
            &["--kv-connector=shared-storage"],
            KvContract::SharedStorage(mock_engine::Store::new()),
            false,
        ),
    ];
    for (args, contract, pulls) in cases {
        let lenient = |config| EngineConfig {
            contract: match &contract {
                // Decode engines of both connectors accept the object.
                KvContract::Nixlv2 => KvContract::Offloading(Meetings::new()),
                other => other.clone(),
            },
            ..config
        };
        let (decode, flag) = start_decoder(lenient(EngineConfig::decode()));
        let sidecar = Sidecar::launch(&Launch {
            args: &[&[&*flag], args].concat(),
            ..Launch::default()
        });
        let question = Api::Chat.ask(4, true);
        let headers = [(SOURCE, "10.4.0.9:8000")];
        let response = sidecar.post(CHAT, &question.body, &headers).expect(200);
        question.expect(&response);
        let seen = only(&decode);
        let pulled = json_of(&seen).get(PARAMS).is_some();
        assert_eq!(pulled, pulls, "{args:?}");
        assert_eq!(seen.header(SOURCE), None, "{args:?}");
    }
}

/// Sends a request that names `source` as the source of a cached prefix, and returns the port of
/// that source that the decode leg specifies (`remote_kv_source.remote_port`). Nothing needs to
/// listen at `source`.
#[track_caller]
fn source_port(ranks: &Ranks, source: &str) -> u64 {
    let params = ranks.decode_only(source);
    params["remote_kv_source"]["remote_port"].as_u64().unwrap()
}

#[test]
fn p10_the_source_port_depends_on_the_rank_of_the_target() {
    let one = offloading_ranks(1);
    let port = one.sidecar.port;
    assert_eq!(source_port(&one, &format!("10.4.0.9:{port}")), 7777);
    assert_eq!(source_port(&one, &format!("10.4.0.9:{}", port + 1)), 7777);
    let four = offloading_ranks(4);
    let port = four.sidecar.port;
    for (target, want) in [
        (format!("10.4.0.9:{port}"), 7777),
        (format!("10.4.0.9:{}", port + 2), 7779),
        (format!("10.4.0.9:{}", port + 3), 7780),
        (format!("10.4.0.9:{}", port - 1), 7777),
        (format!("10.4.0.9:{}", port + 4), 7777),
        (format!("http://10.4.0.9:{}", port + 2), 7779),
        (format!("[fd00::9]:{}", port + 2), 7779),
    ] {
        assert_eq!(source_port(&four, &target), want, "{target}");
    }
    // The same rule applies to a prefill target.
    let question = Api::Chat.ask(4, true);
    let target = four.prefill.host_port();
    let headers = [(PREFILLER, target.as_str())];
    four.decoders[0].clear();
    let response = four.sidecar.post(CHAT, &question.body, &headers);
    question.expect(&response.expect(200));
    let body = json_of(&only(&four.decoders[0]));
    assert_eq!(body[PARAMS]["remote_prefiller"]["remote_port"], 7777);
}

#[test]
fn p10_the_base_port_is_configurable() {
    let meetings = Meetings::new();
    let pair = Setup {
        args: &["--kv-connector=offloading", "--p2p-connector-port=9100"],
        ..setup(&meetings)
    }
    .start();
    responded(&pair, &Api::Chat.ask(4, true));
    let (_, decode) = both_legs(&pair);
    let port = json_of(&decode)[PARAMS]["remote_prefiller"]["remote_port"].clone();
    assert_eq!(port, 9100);
}

#[test]
fn p11_the_brackets_of_an_ipv6_source_are_removed() {
    let ranks = offloading_ranks(1);
    let params = ranks.decode_only("[fd00::9]:8000");
    assert_eq!(params["remote_kv_source"]["remote_host"], "fd00::9");
}

/// Sends a split request that names the source of a cached prefix, with the nixlv2 connector.
/// Returns the `kv_transfer_params` in the prefill leg.
#[track_caller]
fn nixl_prefill(args: &[&str], source: impl FnOnce(&Pair) -> String) -> Value {
    let setup = Setup {
        args,
        ..Setup::default()
    };
    let pair = setup.start();
    let source = source(&pair);
    let question: Question = Api::Chat.ask(4, true);
    responded_with(&pair, &question, &[(SOURCE, &source)]);
    let (prefill, decode): (Seen, Seen) = both_legs(&pair);
    assert_eq!(pair.decode.counters().handoff_used, 1);
    assert_eq!(json_of(&decode)[PARAMS].get("remote_kv_source"), None);
    json_of(&prefill)[PARAMS].take()
}

#[test]
fn p12_nixl_pulls_only_if_enabled() {
    let elsewhere = |_: &Pair| "10.4.0.9:8000".to_owned();
    let mut params = nixl_prefill(&["--enable-p2p-pull"], elsewhere);
    take_id(&mut params["remote_kv_source"]);
    let mut want = prefill_params();
    want["remote_kv_source"] =
        json!({"kv_request_id": null, "remote_host": "10.4.0.9", "remote_port": 7777});
    assert_eq!(params, want);
    assert_eq!(nixl_prefill(&[], elsewhere), prefill_params());
    let prefiller = |pair: &Pair| pair.prefill.host_port();
    assert_eq!(
        nixl_prefill(&["--enable-p2p-pull"], prefiller),
        prefill_params()
    );
}

#[test]
fn a_failed_prefill_cancels_decode() {
    failed_prefill_cancels_decode(&setup(&Meetings::new()));
}

#[test]
fn legs_end_as_required_when_the_client_disconnects() {
    client_disconnects(&setup(&Meetings::new()), Rule::SerialPush);
}
