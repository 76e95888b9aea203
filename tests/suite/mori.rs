//! `MoRI-IO`, a mode of nixlv2 (`docs/pd-sidecar.md#moriio`): the prefill engine writes into the
//! decode engine's memory, with serial or concurrent legs. Conformance rows M1 to M10, D1, N16 and
//! N17, and P12 in part.

use mock_engine::{Counters, Engine, Fault, KvContract, Mori, Seen, State, dp_rank};
use serde_json::{Value, json};

use crate::apis::{Api, Completion};
use crate::client::{DEADLINE, End};
use crate::harness::{CHAT, Pair, json_of, only, run_to_exit, wait_for};
use crate::harness_more::{Leave, expect_drained};
use crate::kv::{
    Rule, Setup, begin, both_legs, client_disconnects, expect_contract_kept, expect_recovered,
    failed_prefill_cancels_decode, forget, legs_are_concurrent, responded, responded_with,
    wait_aborted, wait_state,
};

const PARAMS: &str = "kv_transfer_params";
const RANK: &str = "x-data-parallel-rank";

/// Flags for `MoRI-IO` with serial legs. The ports differ from each other and from the defaults, so
/// that a mix-up is detected.
const SERIAL: [&str; 6] = [
    "--moriio-write-mode",
    "--moriio-local-pod-ip=10.0.0.1",
    "--moriio-decode-notify-port=61015",
    "--moriio-decode-handshake-port=6311",
    "--moriio-prefill-notify-port=61025",
    "--moriio-prefill-handshake-port=6321",
];
const PARALLEL: &str = "--moriio-parallel-dispatch";

pub(crate) fn terms(parallel: bool, dp_size: u64) -> Mori {
    Mori {
        parallel,
        decode_host: "10.0.0.1".to_owned(),
        decode_ports: (61015, 6311),
        prefill_ports: (61025, 6321),
        tp_size: 2,
        dp_size,
        ..Mori::default()
    }
}

/// Returns the sidecar's flags that correspond to `terms`, the contract that the engines enforce.
pub(crate) fn flags(terms: &Mori) -> Vec<String> {
    let mut flags: Vec<String> = SERIAL.iter().map(|flag| (*flag).to_owned()).collect();
    if terms.parallel {
        flags.push(PARALLEL.to_owned());
    }
    flags.push(format!("--moriio-tp-size={}", terms.tp_size));
    flags.push(format!("--moriio-dp-size={}", terms.dp_size));
    if terms.dp_size_local > 0 {
        flags.push(format!("--moriio-dp-size-local={}", terms.dp_size_local));
    }
    for (flag, hosts) in [
        ("remote", &terms.prefill_hosts),
        ("decode", &terms.decode_hosts),
    ] {
        if !hosts.is_empty() {
            flags.push(format!("--moriio-{flag}-hosts={}", hosts.join(",")));
        }
    }
    flags
}

/// Runs `test` with a setup whose engines enforce `terms`, and whose sidecar has the corresponding
/// flags and the additional flags `more`.
fn with_setup<T>(terms: &Mori, more: &[&str], test: impl FnOnce(&Setup<'_>) -> T) -> T {
    let flags = flags(terms);
    let args: Vec<&str> = flags
        .iter()
        .map(String::as_str)
        .chain(more.iter().copied())
        .collect();
    test(&Setup {
        args: &args,
        contract: KvContract::Mori(terms.clone()),
        dp_size: u32::try_from(terms.dp_size).unwrap(),
        ..Setup::default()
    })
}

fn start(terms: &Mori) -> Pair {
    with_setup(terms, &[], |setup| setup.start())
}

fn transfer_of(seen: &Seen) -> String {
    let id = json_of(seen)[PARAMS]["transfer_id"].clone();
    id.as_str().unwrap().to_owned()
}

/// Returns the `kv_transfer_params` that the prefill engine must receive for the transfer ID
/// `transfer`.
fn prefill_object(terms: &Mori, transfer: &str) -> Value {
    json!({"do_remote_decode": true, "do_remote_prefill": false, "remote_engine_id": null,
        "remote_block_ids": null, "remote_port": null, "remote_host": "10.0.0.1",
        "remote_notify_port": 61015, "remote_handshake_port": 6311,
        "remote_dp_rank": dp_rank(&transfer[2..], terms.dp_size),
        "remote_dp_rank_override": true, "transfer_id": transfer, "tp_size": terms.tp_size,
        "remote_dp_size": terms.dp_size})
}

#[test]
fn m1_serial_legs_share_a_transfer() {
    let terms = terms(false, 1);
    let pair = start(&terms);
    for api in Api::ALL {
        for stream in [false, true] {
            forget(&pair);
            let more = match (api, stream) {
                (Api::Chat, true) => r#","stream_options":{"include_usage":true}"#,
                _ => "",
            };
            let question = api.ask_with(6, stream, more);
            responded(&pair, &question);
            let (prefill, decode) = both_legs(&pair);
            let transfer = transfer_of(&prefill);
            assert_eq!(transfer, transfer_of(&decode));
            let set = json!({"stream": false, PARAMS: prefill_object(&terms, &transfer)});
            let client = question.json();
            let have = json_of(&prefill);
            let removed = ["stream_options"];
            api.expect_capped(&client, &have, &set, &removed, Completion::Always);
            let mut have = json_of(&decode);
            let params = have[PARAMS].take();
            let mut want = client;
            want[PARAMS] = Value::Null;
            assert_eq!(have, want);
            // The members that the prefill engine returned, and those that the sidecar has added.
            assert_eq!(params["remote_host"], "127.0.0.1");
            assert_eq!(params["mock_float"].to_string(), "1.0");
            assert_eq!(params["remote_dp_rank"], 0);
            assert_eq!(params["remote_notify_port"], 61015);
            assert_eq!(params["remote_handshake_port"], 6311);
            assert_eq!((prefill.header(RANK), decode.header(RANK)), (None, None));
            assert!(prefill.at < decode.at);
        }
    }
    pair.sidecar.expect_sound();
}

#[test]
fn m1_the_cached_token_count_comes_from_the_prefill_engine() {
    let pair = start(&terms(false, 1));
    let question = Api::Chat.ask(6, false);
    let response = pair.post(CHAT, &question.body).expect(200).json();
    assert_eq!(
        response["usage"]["prompt_tokens_details"]["cached_tokens"],
        7
    );
}

/// Returns the `kv_transfer_params` that the decode engine must receive for the transfer ID
/// `transfer` if the legs are concurrent.
fn decode_object(terms: &Mori, transfer: &str) -> Value {
    json!({"do_remote_prefill": true, "do_remote_decode": false, "remote_block_ids": [],
        "remote_engine_id": "127.0.0.1:6321", "remote_host": "127.0.0.1", "remote_port": 6321,
        "remote_notify_port": 61025, "remote_handshake_port": 6321,
        "remote_dp_rank": dp_rank(&transfer[2..], terms.dp_size),
        "remote_dp_rank_override": true, "transfer_id": transfer, "tp_size": terms.tp_size,
        "remote_dp_size": terms.dp_size})
}

#[test]
fn m2_concurrent_legs_share_a_transfer_and_a_rank() {
    let terms = terms(true, 8);
    let pair = start(&terms);
    for api in Api::ALL {
        for stream in [false, true] {
            forget(&pair);
            let question = api.ask(6, stream);
            responded(&pair, &question);
            let (prefill, decode) = both_legs(&pair);
            let transfer = transfer_of(&prefill);
            let client = question.json();
            let set = json!({"stream": false, PARAMS: prefill_object(&terms, &transfer)});
            let mut have = json_of(&prefill);
            // pd-sidecar caps this member for every API.
            if api != Api::Responses {
                have.as_object_mut().unwrap().remove("max_output_tokens");
            }
            api.expect_capped(&client, &have, &set, &[], Completion::Always);
            let mut want = client;
            want[PARAMS] = decode_object(&terms, &transfer);
            assert_eq!(json_of(&decode), want);
            let rank = dp_rank(&transfer[2..], 8).to_string();
            assert_eq!(prefill.header_all(RANK), [rank.as_str()]);
            assert_eq!(decode.header_all(RANK), [rank.as_str()]);
        }
    }
    pair.sidecar.expect_sound();
}

#[test]
fn m2_both_legs_have_the_same_request_id() {
    let pair = start(&terms(true, 1));
    for headers in [&[][..], &[("x-request-id", "gw-17")]] {
        forget(&pair);
        responded_with(&pair, &Api::Chat.ask(4, true), headers);
        let (prefill, decode) = both_legs(&pair);
        let ids = prefill.header_all("x-request-id");
        assert_eq!(ids.len(), 1, "{ids:?}");
        assert_eq!(ids, decode.header_all("x-request-id"));
    }
}

fn two_hosts(parallel: bool) -> Mori {
    Mori {
        dp_size_local: 8,
        prefill_hosts: vec!["10.1.0.1".to_owned(), "10.1.0.2".to_owned()],
        decode_hosts: vec!["10.2.0.1".to_owned(), "10.2.0.2".to_owned()],
        ..terms(parallel, 16)
    }
}

#[test]
fn m3_each_leg_receives_the_hosts_of_the_other_role() {
    for parallel in [true, false] {
        let terms = two_hosts(parallel);
        let pair = start(&terms);
        responded(&pair, &Api::Chat.ask(4, true));
        let (prefill, decode) = both_legs(&pair);
        let params = json_of(&prefill)[PARAMS].take();
        assert_eq!(params["remote_hosts"], json!(["10.2.0.1", "10.2.0.2"]));
        assert_eq!(params["remote_dp_size_local"], 8);
        assert_eq!(params["remote_dp_size"], 16);
        let params = json_of(&decode)[PARAMS].take();
        assert_eq!(params["remote_hosts"], json!(["10.1.0.1", "10.1.0.2"]));
        assert_eq!(params["remote_dp_size_local"], 8);
    }
}

#[test]
fn m3_the_rank_is_local_to_a_host() {
    // llm-d-router#2895: the front end of a host accepts only the ranks of that host.
    let terms = two_hosts(true);
    let pair = start(&terms);
    for _ in 0..8 {
        forget(&pair);
        responded(&pair, &Api::Chat.ask(2, true));
        let (prefill, decode) = both_legs(&pair);
        for leg in [prefill, decode] {
            let rank: u64 = leg.header(RANK).unwrap().parse().unwrap();
            assert!(rank < 8, "{rank}");
        }
    }
}

#[test]
fn m4_min_tokens_is_capped_only_in_the_prefill_leg() {
    let pair = start(&terms(true, 1));
    let question = Api::Chat.ask_with(9, true, r#","min_tokens":5"#);
    responded(&pair, &question);
    let (prefill, decode) = both_legs(&pair);
    assert_eq!(json_of(&prefill)["min_tokens"], 1);
    assert_eq!(json_of(&decode)["min_tokens"], 5);
}

#[test]
fn m5_serial_legs_have_the_same_rank() {
    let terms = terms(false, 8);
    let pair = start(&terms);
    responded(&pair, &Api::Chat.ask(4, true));
    let (prefill, decode) = both_legs(&pair);
    let transfer = transfer_of(&prefill);
    let rank = dp_rank(&transfer[2..], 8);
    assert_eq!(json_of(&prefill)[PARAMS]["remote_dp_rank"], rank);
    assert_eq!(prefill.header_all(RANK), [rank.to_string()]);
    assert_eq!(decode.header_all(RANK), [rank.to_string()]);
    let params = json_of(&decode)[PARAMS].take();
    assert_eq!(params["remote_dp_rank"], rank);
    assert_eq!(params["remote_dp_rank_override"], true);
    assert_eq!(params["remote_dp_size"], 8);
    assert_eq!(params["transfer_id"], transfer.as_str());
}

#[test]
fn m5_members_returned_by_the_prefill_engine_are_kept() {
    let terms = terms(false, 1);
    let pair = start(&terms);
    let own = r#"{"do_remote_prefill":true,"remote_notify_port":1,"remote_handshake_port":2,"remote_dp_size":1, "x" : 1e5}"#;
    terms.returned.set(Some(own));
    // These ports differ from the configured ones, so the decode engine rejects them; only the body
    // it received is checked.
    let question = Api::Chat.ask(4, true);
    pair.post(CHAT, &question.body);
    let seen = only(&pair.decode);
    let raw = String::from_utf8(seen.body.clone()).unwrap();
    assert!(raw.contains(r#""x" : 1e5"#), "{raw}");
    let params = json_of(&seen)[PARAMS].take();
    assert_eq!(params["remote_notify_port"], 1);
    assert_eq!(params["remote_handshake_port"], 2);
    assert_eq!(params["remote_dp_rank_override"], true);
    // A value that is not an object is not completed, and does not crash an engine.
    for raw in ["null", "17", "[]", "\"x\""] {
        forget(&pair);
        terms.returned.set(Some(raw));
        let question = Api::Chat.ask(4, true);
        let response = pair.post(CHAT, &question.body);
        question.expect(&response.expect(200));
        assert!(!json_of(&only(&pair.decode))[PARAMS].is_object(), "{raw}");
    }
}

#[test]
fn m6_a_prefill_failure_replaces_the_decode_response() {
    let terms = terms(true, 8);
    terms.meetings.decode_waits(false);
    let pair = start(&terms);
    for stream in [false, true] {
        forget(&pair);
        let fault = Fault::HeldStatus {
            code: 500,
            body: "{\"said\":500}".to_owned(),
        };
        pair.prefill.fault(fault, 1);
        let question = Api::Chat.ask(4, stream);
        let mut client = begin(&pair, &question);
        wait_state(&pair.decode, State::Responded);
        pair.prefill.release();
        let response = client.response().expect(500);
        assert_eq!(response.text(), "{\"said\":500}");
    }
    expect_recovered(&pair);
}

#[test]
fn m6_a_failed_prefill_cancels_decode() {
    with_setup(&terms(true, 1), &[], failed_prefill_cancels_decode);
}

#[test]
fn m7_the_wait_for_a_prefill_is_bounded() {
    let terms = terms(true, 1);
    let wait = "--moriio-parallel-decode-wait-timeout=300ms";
    let pair = with_setup(&terms, &[wait], |setup| setup.start());
    pair.prefill.fault(Fault::StallBeforeHead, 1);
    pair.decode.fault(Fault::StallBeforeHead, 1);
    let question = Api::Chat.ask(4, true);
    let response = pair.post(CHAT, &question.body);
    assert_eq!(response.status, 504, "{response:?}");
    assert!(response.json().is_object());
    wait_aborted(&pair.prefill);
    wait_aborted(&pair.decode);
    forget(&pair);
    // The decode engine responds, and the prefill engine does not.
    terms.meetings.decode_waits(false);
    pair.prefill.fault(Fault::StallBeforeHead, 1);
    let question = Api::Chat.ask(4, true);
    let response = pair.post(CHAT, &question.body);
    assert_eq!(response.status, 504, "{response:?}");
    wait_aborted(&pair.prefill);
    terms.meetings.decode_waits(true);
    expect_recovered(&pair);
}

#[test]
fn m8_a_successful_prefill_releases_the_held_back_stream() {
    let terms = terms(true, 8);
    terms.meetings.decode_waits(false);
    let pair = start(&terms);
    for tokens in [4, 5_000] {
        forget(&pair);
        pair.prefill.fault(Fault::Hold, 1);
        let question = Api::Chat.ask_with(tokens, true, r#","ignore_eos":true"#);
        let mut client = begin(&pair, &question);
        // The decode engine can send the short response completely. It can send the long one only
        // to the extent that the sidecar buffers it.
        let wrote = |log: &[Seen]| log.iter().any(|seen| seen.first_byte_at.is_some());
        assert!(pair.decode.wait_for(DEADLINE, wrote).is_some());
        pair.prefill.release();
        let response = client.response().expect(200);
        assert_eq!(
            response.header("content-type"),
            Some("text/event-stream; charset=utf-8")
        );
        question.expect(&response);
        assert!(response.text().ends_with("data: [DONE]\n\n"));
        // This mode does not rewrite the cached-token count.
        assert!(!response.text().contains("\"cached_tokens\":7"));
    }
    expect_contract_kept(&pair);
}

#[test]
fn a_forced_tool_call_stays_with_the_decoder_if_the_legs_are_concurrent() {
    let body = r#"{"messages":[{"role":"user","content":"x"}],"max_tokens":4,"tools":[],"tool_choice":"required"}"#;
    for parallel in [true, false] {
        let pair = start(&terms(parallel, 1));
        pair.post(CHAT, body).expect(200);
        assert_eq!(pair.prefill.requests().len(), usize::from(!parallel));
        let params = json_of(&only(&pair.decode))[PARAMS].clone();
        assert_eq!(params.is_null(), parallel);
    }
}

#[test]
fn m8_the_legs_are_concurrent() {
    let terms = terms(true, 1);
    with_setup(&terms, &[], |setup| {
        legs_are_concurrent(setup, &terms.meetings);
    });
}

#[test]
fn m10_a_valid_rank_returned_by_the_prefill_engine_is_used() {
    let terms = terms(false, 8);
    let pair = start(&terms);
    let object = |rank: &str| {
        format!(
            "{{\"do_remote_prefill\":true,\"do_remote_decode\":false,\
             \"remote_block_ids\":[[1]]{rank}}}"
        )
    };
    for (rank, want) in [
        ("3", Some(3)),
        ("5", Some(5)),
        ("0", Some(0)),
        ("", None),
        ("null", None),
        ("\"3\"", None),
        ("3.5", None),
        ("8", None),
        ("-1", None),
    ] {
        forget(&pair);
        let member = match rank {
            "" => String::new(),
            rank => format!(",\"remote_dp_rank\":{rank}"),
        };
        terms.returned.set(Some(&object(&member)));
        responded(&pair, &Api::Chat.ask(4, true));
        let (prefill, decode) = both_legs(&pair);
        let hashed = dp_rank(&transfer_of(&prefill)[2..], 8);
        let want = want.unwrap_or(hashed);
        let params = json_of(&decode)[PARAMS].take();
        assert_eq!(params["remote_dp_rank"], want, "{rank}");
        assert_eq!(decode.header_all(RANK), [want.to_string()], "{rank}");
        assert_eq!(prefill.header_all(RANK), [hashed.to_string()], "{rank}");
    }
}

#[test]
fn d1_host_names_are_sent_as_addresses() {
    let mut terms = terms(true, 1);
    terms.prefill_hosts = vec!["127.0.0.1".to_owned()];
    terms.decode_hosts = vec!["10.4.0.9".to_owned()];
    let written = Mori {
        prefill_hosts: vec!["localhost".to_owned()],
        ..terms.clone()
    };
    let flags = flags(&written);
    let args: Vec<&str> = flags.iter().map(String::as_str).collect();
    let pair = Setup {
        args: &args,
        env: &[("MORIIO_DNS_RESOLVE_TTL_SECONDS", "1")],
        contract: KvContract::Mori(terms),
        ..Setup::default()
    }
    .start();
    for _ in 0..2 {
        forget(&pair);
        responded(&pair, &Api::Chat.ask(4, true));
        let (prefill, decode) = both_legs(&pair);
        assert_eq!(
            json_of(&prefill)[PARAMS]["remote_hosts"],
            json!(["10.4.0.9"])
        );
        assert_eq!(
            json_of(&decode)[PARAMS]["remote_hosts"],
            json!(["127.0.0.1"])
        );
        // Repeat after the name has been resolved again.
        wait_for("a look-up", || {
            let rounds = pair.sidecar.metric("moriio_dns_reresolve_total", &[]);
            (rounds > 0.0).then_some(())
        });
    }
    assert!(pair.sidecar.metric("moriio_dns_ip_changed_total", &[]) == 0.0);
    assert!(pair.sidecar.metric("moriio_dns_lookup_failures_total", &[]) == 0.0);
}

#[test]
fn d1_an_unresolvable_host_name_is_a_startup_error() {
    // RFC 6761 6.4: a name below `invalid` never resolves.
    let mut args = vec!["sidecar", "--secure-proxy=false", "--admin-address=off"];
    args.extend(SERIAL);
    args.push("--moriio-remote-hosts=no.such.invalid");
    let (code, text) = run_to_exit(&args);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains("no.such.invalid"), "{text}");
}

#[test]
fn n16_without_the_mode_no_mori_member_or_field_is_sent() {
    let pair = Setup::default().start();
    responded(&pair, &Api::Chat.ask(4, true));
    let (prefill, decode) = both_legs(&pair);
    for leg in [&prefill, &decode] {
        assert_eq!(leg.header(RANK), None);
        let params = json_of(leg)[PARAMS].take();
        for name in ["transfer_id", "remote_dp_size", "remote_hosts"] {
            assert_eq!(params.get(name), None, "{name}");
        }
    }
}

#[test]
fn n17_read_mode_sends_a_rank_only_with_the_prefill_leg() {
    let pair = Setup {
        args: &["--moriio-dp-size=8"],
        dp_size: 8,
        ..Setup::default()
    }
    .start();
    for _ in 0..4 {
        forget(&pair);
        responded(&pair, &Api::Chat.ask(4, true));
        let (prefill, decode) = both_legs(&pair);
        let rank: u64 = prefill.header(RANK).unwrap().parse().unwrap();
        assert!(rank < 8);
        assert_eq!(decode.header(RANK), None);
        assert_eq!(json_of(&prefill)[PARAMS], crate::harness::prefill_params());
        let params = json_of(&decode)[PARAMS].take();
        for name in ["remote_dp_rank", "remote_dp_rank_override", "transfer_id"] {
            assert_eq!(params.get(name), None, "{name}");
        }
    }
}

#[test]
fn p12_a_source_is_sent_with_the_prefill_leg_in_both_modes() {
    let source = [("x-kv-cache-source-host-port", "10.4.0.9:8000")];
    for parallel in [false, true] {
        let terms = terms(parallel, 1);
        let pull = "--enable-p2p-pull";
        let pair = with_setup(&terms, &[pull], |setup| setup.start());
        responded_with(&pair, &Api::Chat.ask(4, false), &source);
        let (prefill, decode) = both_legs(&pair);
        let params = json_of(&prefill)[PARAMS].take();
        assert_eq!(params["remote_kv_source"]["remote_host"], "10.4.0.9");
        assert_eq!(params["remote_kv_source"]["remote_port"], 7777);
        let params = json_of(&decode)[PARAMS].take();
        assert_eq!(params.get("remote_kv_source"), None);
    }
}

#[test]
fn legs_end_as_required_when_the_client_disconnects() {
    with_setup(&terms(false, 1), &[], |setup| {
        client_disconnects(setup, Rule::Serial);
    });
    with_setup(&terms(true, 1), &[], |setup| {
        client_disconnects(setup, Rule::PushHeldBack);
    });
}

/// In pd-sidecar, such a disconnect terminated the process (llm-d-router#2895).
#[test]
fn a_client_disconnect_while_decode_output_is_held_back_aborts_both_legs() {
    let terms = terms(true, 1);
    terms.meetings.decode_waits(false);
    let pair = start(&terms);
    for leave in Leave::ALL {
        forget(&pair);
        pair.prefill.fault(Fault::StallBeforeHead, 1);
        let fault = Fault::StallMidStream { after_events: 3 };
        pair.decode.fault(fault, 1);
        let client = begin(&pair, &Api::Chat.ask(64, true));
        let wrote = |log: &[Seen]| log.iter().any(|seen| seen.first_byte_at.is_some());
        assert!(pair.decode.wait_for(DEADLINE, wrote).is_some());
        wait_state(&pair.prefill, State::Responding);
        let (_, _client) = leave.now(client);
        wait_aborted(&pair.prefill);
        wait_aborted(&pair.decode);
        expect_drained(&pair.sidecar);
    }
    terms.meetings.decode_waits(true);
    expect_recovered(&pair);
}

#[test]
fn a_decode_leg_truncated_while_held_back_affects_only_its_request() {
    let terms = terms(true, 1);
    terms.meetings.decode_waits(false);
    let pair = start(&terms);
    for fault in [
        Fault::ResetMidBody { after_events: 2 },
        Fault::TruncateMidBody { after_events: 2 },
        Fault::ResetBeforeHead,
        Fault::Garbage,
    ] {
        forget(&pair);
        pair.prefill.fault(Fault::Hold, 1);
        pair.decode.fault(fault, 1);
        let mut client = begin(&pair, &Api::Chat.ask(64, true));
        let struck = |log: &[Seen]| log.iter().any(|seen| seen.state == State::Faulted);
        assert!(pair.decode.wait_for(DEADLINE, struck).is_some());
        pair.prefill.release();
        // An error response or a truncated stream.
        if let Ok(head) = client.try_head() {
            let (_, end) = client.body(head.framing("POST"));
            assert!(head.status >= 500 || end != End::Complete, "{head:?}");
        }
        let idle = |counters: &Counters| counters.running == 0;
        let engines: [&Engine; 2] = [&pair.prefill, &pair.decode];
        for engine in engines {
            assert!(engine.wait_counters(DEADLINE, idle).is_some());
        }
    }
    terms.meetings.decode_waits(true);
    expect_recovered(&pair);
}
