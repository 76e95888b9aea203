//! The connectors of the first llm-d sidecar: NIXL v1 (`docs/pd-sidecar.md#nixl-version-1`) and
//! `LMCache` (`docs/pd-sidecar.md#lmcache`).

use mock_engine::{BlockBook, Fault, HandoffShape, KvContract};
use serde_json::{Value, json};

use crate::apis::{Api, Completion};
use crate::harness::{CHAT, json_of};
use crate::kv::{Rule, Setup, both_legs, client_disconnects, expect_recovered, forget, responded};

const FOUR: [&str; 4] = [
    "remote_block_ids",
    "remote_engine_id",
    "remote_host",
    "remote_port",
];

fn nixl(book: &BlockBook) -> Setup<'static> {
    Setup {
        args: &["--kv-connector=nixl"],
        contract: KvContract::NixlV1(book.clone()),
        ..Setup::default()
    }
}

fn lmcache() -> Setup<'static> {
    Setup {
        args: &["--kv-connector=lmcache"],
        contract: KvContract::Lmcache,
        ..Setup::default()
    }
}

#[test]
fn nixl_v1_copies_four_members_to_the_decode_leg() {
    let book = BlockBook::new();
    let pair = nixl(&book).start();
    for (nth, stream) in [false, true, true].into_iter().enumerate() {
        forget(&pair);
        let more = match stream {
            true => r#","stream_options":{"include_usage":true}"#,
            false => "",
        };
        let question = Api::Chat.ask_with(6, stream, more);
        responded(&pair, &question);
        let (prefill, decode) = both_legs(&pair);
        let mut want = question.json();
        want["stream"] = json!(false);
        want["do_remote_decode"] = json!(true);
        want.as_object_mut().unwrap().remove("stream_options");
        assert_eq!(json_of(&prefill), want, "nothing must be capped");
        let mut have = json_of(&decode);
        assert_eq!(have["remote_block_ids"][0], nth as u64);
        assert_eq!(have["remote_block_ids"][1].to_string(), "9007199254740993");
        for name in FOUR.iter().chain(&["do_remote_prefill"]) {
            assert!(have.as_object_mut().unwrap().remove(*name).is_some());
        }
        assert_eq!(have, question.json());
        let ids = prefill.header_all("x-request-id");
        assert_eq!(ids.len(), 1);
        assert_eq!(ids, decode.header_all("x-request-id"));
        assert!(prefill.at < decode.at);
    }
    assert_eq!(book.used(), 3);
}

#[test]
fn nixl_v1_serves_completions() {
    let book = BlockBook::new();
    let pair = nixl(&book).start();
    responded(&pair, &Api::Completions.ask(6, true));
    both_legs(&pair);
    assert_eq!(book.used(), 1);
}

#[test]
fn nixl_v1_members_that_are_missing_are_null() {
    let pair = nixl(&BlockBook::new()).start();
    let partly = Fault::Status {
        code: 200,
        body: r#"{"choices":[],"remote_block_ids":[ 1 ],"remote_engine_id":"e"}"#.to_owned(),
        content_type: "application/json".to_owned(),
    };
    pair.prefill.fault(partly, 1);
    // The decode engine rejects the unknown engine ID; only the body it received is checked.
    let question = Api::Chat.ask(4, false);
    pair.post(CHAT, &question.body);
    let body = json_of(&pair.decode.requests()[0]);
    assert_eq!(body["remote_block_ids"], json!([1]));
    assert_eq!(body["remote_engine_id"], "e");
    assert_eq!(body.get("remote_host"), Some(&Value::Null));
    assert_eq!(body.get("remote_port"), Some(&Value::Null));
    assert_eq!(body["do_remote_prefill"], true);
}

/// Deviates from the first sidecar, which sent four null members that an engine cannot handle.
#[test]
fn nixl_v1_without_transfer_members_the_decoder_computes_the_prompt() {
    let pair = nixl(&BlockBook::new()).start();
    pair.prefill.fault(Fault::Handoff(HandoffShape::Omit), 1);
    let question = Api::Chat.ask(4, false);
    responded(&pair, &question);
    let (_, decode) = both_legs(&pair);
    assert_eq!(json_of(&decode), question.json());
}

#[test]
fn nixl_v1_members_from_the_client_are_replaced() {
    let book = BlockBook::new();
    let pair = nixl(&book).start();
    let more = r#","do_remote_prefill":true,"remote_host":"evil","remote_port":1"#;
    responded(&pair, &Api::Chat.ask_with(4, true, more));
    both_legs(&pair);
    assert_eq!(book.used(), 1);
}

#[test]
fn lmcache_caps_the_prefill_leg_and_decodes_the_unmodified_body() {
    let pair = lmcache().start();
    for api in Api::ALL {
        for stream in [false, true] {
            forget(&pair);
            let question = api.ask_with(6, stream, r#", "cache_hit_threshold" : 1.0 "#);
            responded(&pair, &question);
            let (prefill, decode) = both_legs(&pair);
            assert_eq!(decode.body, question.body.as_bytes());
            let client = question.json();
            let have = json_of(&prefill);
            api.expect_capped(&client, &have, &json!({}), &[], Completion::Always);
            assert!(prefill.at < decode.at);
        }
    }
}

#[test]
fn a_prefill_failure_is_relayed_to_the_client() {
    for setup in [nixl(&BlockBook::new()), lmcache()] {
        let pair = setup.start();
        for code in [400, 500, 503, 307] {
            let fault = Fault::Status {
                code,
                body: format!("{{\"said\":{code}}}"),
                content_type: "application/json".to_owned(),
            };
            pair.prefill.fault(fault, 1);
            let question = Api::Chat.ask(4, true);
            let response = pair.post(CHAT, &question.body).expect(code);
            assert_eq!(response.text(), format!("{{\"said\":{code}}}"));
        }
        // The fault applies twice, to the pooled connection and to the retry on a new one.
        pair.prefill.fault(Fault::ResetBeforeHead, 2);
        let question = Api::Chat.ask(4, true);
        pair.post(CHAT, &question.body)
            .expect_error(502, "prefill_reset");
        assert!(pair.decode.requests().is_empty());
        expect_recovered(&pair);
    }
}

#[test]
fn legs_end_as_required_when_the_client_disconnects() {
    client_disconnects(&nixl(&BlockBook::new()), Rule::Serial);
    client_disconnects(&lmcache(), Rule::Serial);
}
