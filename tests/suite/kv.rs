//! Engine pairs that enforce a connector's contract, and checks shared by the tests of all
//! connectors: responses, the heads of the legs, failures and client disconnects.

use mock_engine::{
    BlockBook, Counters, Engine, EngineConfig, EngineIds, Fault, HandoffRegistry, KvContract,
    Meetings, Mooncake, Seen, State, Store,
};

use crate::apis::{Api, Question};
use crate::client::{Client, DEADLINE, End, request};
use crate::harness::{Launch, PREFILLER, Pair, Sidecar, json_of, only, start_decoder};
use crate::harness_more::{Leave, expect_drained};

/// Configuration of a [`Pair`].
#[derive(Clone, Debug, Default)]
pub(crate) struct Setup<'a> {
    pub(crate) args: &'a [&'a str],
    pub(crate) env: &'a [(&'a str, &'a str)],
    pub(crate) contract: KvContract,
    /// Number of data-parallel ranks that the engines accept in `x-data-parallel-rank`. 0 counts
    /// as one.
    pub(crate) dp_size: u32,
    /// Whether the decode engine sends the head of a stream immediately instead of with the first
    /// event.
    pub(crate) early_head: bool,
    pub(crate) keep_response: bool,
}

impl Setup<'_> {
    #[track_caller]
    pub(crate) fn start(&self) -> Pair {
        let handoffs = HandoffRegistry::new();
        let config = |config| EngineConfig {
            contract: self.contract.clone(),
            verify_handoff: Some(handoffs.clone()),
            data_parallel_size: self.dp_size.max(1),
            keep_response: self.keep_response,
            ..config
        };
        let prefill = Engine::start(config(EngineConfig::prefill()), 0).unwrap();
        let (decode, flag) = start_decoder(EngineConfig {
            early_head: self.early_head,
            // As real engines do. The sidecar releases KV cache by a request for no model.
            check_model: true,
            ..config(EngineConfig::decode())
        });
        let sidecar = Sidecar::launch(&Launch {
            args: &[&[&*flag], self.args].concat(),
            env: self.env,
            ..Launch::default()
        });
        Pair {
            prefill,
            decode,
            sidecar,
            handoffs,
        }
    }
}

/// The connector, or the mode of a connector, with which [`each_connector`] runs a test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mode {
    pub(crate) name: &'static str,
    /// Whether both legs are sent concurrently.
    pub(crate) is_concurrent: bool,
}

/// Runs `test` for every connector and mode. The engines of each enforce its contract, and its
/// sidecar has the additional flags `more`.
pub(crate) fn each_connector(more: &[&str], mut test: impl FnMut(Mode, &Setup<'_>)) {
    let mooncake = Mooncake {
        engines: EngineIds::new(&["e0", "e1"]),
        ..Mooncake::default()
    };
    let config = EngineConfig {
        bootstrap: Some(mooncake.engines.clone()),
        ..EngineConfig::default()
    };
    let bootstrap = Engine::start(config, 0).unwrap();
    let port = format!("--mooncake-bootstrap-port={}", bootstrap.port());
    let named = |name: &str| vec![format!("--kv-connector={name}")];
    let (serial, parallel) = (crate::mori::terms(false, 1), crate::mori::terms(true, 1));
    let mori = [crate::mori::flags(&serial), crate::mori::flags(&parallel)];
    let [serial_flags, parallel_flags] = mori;
    let all = [
        ("nixlv2", named("nixlv2"), KvContract::Nixlv2),
        ("mori-serial", serial_flags, KvContract::Mori(serial)),
        (
            "shared-storage",
            named("shared-storage"),
            KvContract::SharedStorage(Store::new()),
        ),
        ("nixl", named("nixl"), KvContract::NixlV1(BlockBook::new())),
        ("lmcache", named("lmcache"), KvContract::Lmcache),
        (
            "mooncake",
            [named("mooncake"), vec![port]].concat(),
            KvContract::Mooncake(mooncake),
        ),
        ("mori-parallel", parallel_flags, KvContract::Mori(parallel)),
        (
            "sglang",
            named("sglang"),
            KvContract::Sglang(Meetings::new()),
        ),
        (
            "offloading",
            named("offloading"),
            KvContract::Offloading(Meetings::new()),
        ),
    ];
    for (name, args, contract) in all {
        let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
        args.extend(more);
        let dp_size = if name == "mooncake" { 2 } else { 1 };
        let setup = Setup {
            args: &args,
            contract,
            dp_size,
            ..Setup::default()
        };
        test(
            Mode {
                name,
                is_concurrent: matches!(name, "mori-parallel" | "sglang"),
            },
            &setup,
        );
    }
}

/// Sends a question as a split request, and fails unless the response is complete and belongs to
/// the question.
#[track_caller]
pub(crate) fn responded(pair: &Pair, question: &Question) {
    responded_with(pair, question, &[]);
}

/// As [`responded`], with additional header fields.
#[track_caller]
pub(crate) fn responded_with(pair: &Pair, question: &Question, headers: &[(&str, &str)]) {
    let response = pair
        .post_with(question.api.path(), &question.body, headers)
        .expect(200);
    question.expect(&response);
}

/// Waits until all requests have received their responses, and returns the only request of the
/// prefill engine and of the decode engine. Fails unless both kept the contract and have the same
/// method and target.
#[track_caller]
pub(crate) fn both_legs(pair: &Pair) -> (Seen, Seen) {
    expect_contract_kept(pair);
    for engine in [&pair.prefill, &pair.decode] {
        let done = |log: &[Seen]| log.iter().all(|seen| seen.state == State::Responded);
        let log = engine.wait_for(DEADLINE, done);
        assert!(log.is_some(), "{:?}", engine.requests());
    }
    let (prefill, decode) = (only(&pair.prefill), only(&pair.decode));
    assert_eq!(prefill.target, decode.target);
    assert_eq!(prefill.method, decode.method);
    (prefill, decode)
}

/// Fails if an engine received a request that is malformed or breaks the connector's contract, or a
/// handoff that is unknown, altered, used before, or issued for another prompt.
#[track_caller]
pub(crate) fn expect_contract_kept(pair: &Pair) {
    for engine in [&pair.prefill, &pair.decode] {
        let counters = engine.counters();
        let bad = |c: &Counters| {
            c.contract_broken
                + c.malformed
                + c.poisoned
                + c.wrong_role
                + c.handoff_altered
                + c.handoff_foreign
                + c.handoff_reused
                + c.handoff_unknown
        };
        assert_eq!(bad(&counters), 0, "{counters:?}");
    }
}

/// Clears the request logs of both engines.
pub(crate) fn forget(pair: &Pair) {
    pair.prefill.clear();
    pair.decode.clear();
}

/// Waits until an engine's log contains a request in this state; fails at the deadline.
#[track_caller]
pub(crate) fn wait_state(engine: &Engine, want: State) {
    let log = engine.wait_for(DEADLINE, |log| log.iter().any(|seen| seen.state == want));
    let states: Vec<State> = engine.requests().iter().map(|seen| seen.state).collect();
    assert!(log.is_some(), "not {want:?}: {states:?}");
}

/// Waits until an engine has recorded an aborted request.
#[track_caller]
pub(crate) fn wait_aborted(engine: &Engine) {
    let aborted = |log: &[Seen]| log.iter().any(|seen| seen.state.is_aborted());
    let log = engine.wait_for(DEADLINE, aborted);
    let states: Vec<State> = engine.requests().iter().map(|seen| seen.state).collect();
    assert!(log.is_some(), "never aborted: {states:?}");
}

/// Sends a question as a split request and returns the connection without reading the response.
pub(crate) fn begin(pair: &Pair, question: &Question) -> Client {
    let target = pair.prefill.host_port();
    let mut client = pair.sidecar.connect();
    let headers = [(PREFILLER, target.as_str())];
    client.send(request(
        "POST",
        question.api.path(),
        &headers,
        question.body.as_bytes(),
    ));
    client
}

/// Ends all faults, then checks that further requests succeed, that all legs have ended, that no
/// session has panicked, and that the connector's contract was kept.
#[track_caller]
pub(crate) fn expect_recovered(pair: &Pair) {
    for engine in [&pair.prefill, &pair.decode] {
        engine.clear_faults();
        engine.release();
    }
    for api in [Api::Chat, Api::Generate] {
        for stream in [true, false] {
            responded(pair, &api.ask(4, stream));
        }
    }
    let local = Api::Chat.ask(4, true);
    let response = pair.sidecar.post(local.api.path(), &local.body, &[]);
    local.expect(&response.expect(200));
    expect_drained(&pair.sidecar);
    pair.sidecar.expect_sound();
    expect_contract_kept(pair);
}

/// Required fate of the legs when the client disconnects (`docs/engines.md#client-disconnects`).
/// Under every rule, a decode leg that has received its first response byte is closed by the
/// disconnect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rule {
    /// The legs run one after the other. The disconnect closes the running leg.
    Serial,
    /// As `Serial`, but the decode leg runs until its first response byte.
    SerialPush,
    /// As `SerialPush`, but the prefill leg runs to its end, and its KV cache is then released.
    SerialToEnd,
    /// The legs are concurrent. The disconnect closes both.
    Room,
    /// The legs are concurrent. After the disconnect, the prefill leg runs to its end, and the
    /// decode leg runs until its first response byte: until then the prefill engine may be writing
    /// into the decode engine's memory. No token is relayed to the client before the prefill engine
    /// has responded.
    PushHeldBack,
}

pub(crate) fn engine_error(code: u16) -> Fault {
    Fault::Status {
        code,
        body: format!("{{\"error\":{{\"message\":\"engine says {code}\"}}}}"),
        content_type: "application/problem+json".to_owned(),
    }
}

/// Checks, for a connector with concurrent legs, that a failed prefill leg cancels the decode leg,
/// and that the client receives the error of the prefill leg.
#[track_caller]
pub(crate) fn failed_prefill_cancels_decode(setup: &Setup<'_>) {
    let pair = setup.start();
    for code in [500, 503, 400, 429] {
        pair.prefill.fault(engine_error(code), 1);
        let question = Api::Chat.ask(4, true);
        let response = pair.post(question.api.path(), &question.body);
        let response = response.expect(code);
        assert!(
            response.text().contains(&format!("engine says {code}")),
            "{}",
            response.text()
        );
        assert_eq!(
            response.header("content-type"),
            Some("application/problem+json")
        );
        no_decode_survives(&pair);
    }
    for (fault, label) in [
        (Fault::ResetBeforeHead, "prefill_reset"),
        (Fault::CloseBeforeHead, "prefill_reset"),
        (Fault::Garbage, "prefill_answer"),
    ] {
        // The fault applies twice: to the pooled connection and to the new connection of the retry.
        pair.prefill.fault(fault, 2);
        let question = Api::Chat.ask(4, false);
        let response = pair.post(question.api.path(), &question.body);
        response.expect_error(502, label);
        pair.prefill.clear_faults();
        no_decode_survives(&pair);
    }
    pair.prefill.refuse(true);
    let question = Api::Chat.ask(4, true);
    let response = pair.post(question.api.path(), &question.body);
    response.expect_error(502, "prefill_connect");
    no_decode_survives(&pair);
    pair.prefill.refuse(false);
    expect_recovered(&pair);
}

/// Waits until every decode leg has been aborted, and fails at the deadline. Then clears the
/// request logs of both engines.
#[track_caller]
fn no_decode_survives(pair: &Pair) {
    let over = |log: &[Seen]| log.iter().all(|seen| seen.state.is_aborted());
    let log = pair.decode.wait_for(DEADLINE, over);
    assert!(log.is_some(), "{:?}", pair.decode.requests());
    forget(pair);
}

/// Checks a connector with concurrent legs whose prefill leg fails after the head of the decode
/// leg's response has been relayed. The exchange must not hang, and unless only the prefill
/// response is truncated, the client must not receive a complete 200 response.
#[track_caller]
pub(crate) fn failed_prefill_after_the_head(setup: &Setup<'_>) {
    let pair = Setup {
        early_head: true,
        ..setup.clone()
    }
    .start();
    let fault = Fault::TruncateMidBody { after_events: 0 };
    for fault in [engine_error(500), fault, Fault::ResetBeforeHead] {
        pair.prefill.fault(fault.clone(), 1);
        let question = Api::Chat.ask(4, true);
        let response = pair.post(question.api.path(), &question.body);
        let is_cut = response.status == 200 && response.end != End::Complete;
        // If only the prefill response is truncated, the transfer has already taken place, so the
        // decode response may be complete.
        let is_whole = response.status == 200 && matches!(fault, Fault::TruncateMidBody { .. });
        assert!(
            response.status >= 500 || is_cut || is_whole,
            "{fault:?}: {response:?}"
        );
    }
    expect_recovered(&pair);
}

/// Checks that the legs are concurrent: sends requests to engines that each respond only after the
/// other engine has received its leg.
#[track_caller]
pub(crate) fn legs_are_concurrent(setup: &Setup<'_>, meetings: &Meetings) {
    meetings.prefill_waits(true);
    let pair = setup.start();
    for api in Api::ALL {
        for stream in [false, true] {
            responded(&pair, &api.ask(4, stream));
        }
    }
    assert_eq!(meetings.complete(), 10);
    expect_contract_kept(&pair);
}

/// Disconnects clients in each phase of a request. Fails unless the legs end as `rule` requires and
/// further requests succeed.
#[track_caller]
pub(crate) fn client_disconnects(setup: &Setup<'_>, rule: Rule) {
    let pair = setup.start();
    for leave in Leave::ALL {
        disconnect_while_both_are_silent(&pair, leave, rule);
        disconnect_while_decode_is_silent(&pair, leave, rule);
        disconnect_during_a_stream(&pair, leave, rule);
    }
    expect_recovered(&pair);
}

/// Waits until the sidecar has detected that its last client has disconnected.
#[track_caller]
fn wait_disconnect_detected(pair: &Pair) {
    pair.sidecar
        .wait_metric("ringside_client_connections", &[], 0.0);
}

/// Waits until no request in an engine's log is in the state `Responding`.
#[track_caller]
fn wait_over(engine: &Engine) {
    let over = |log: &[Seen]| log.iter().all(|seen| seen.state != State::Responding);
    assert!(engine.wait_for(DEADLINE, over).is_some());
}

/// Waits until the decode leg of a disconnected client has ended. Under `Serial` and `Room`, the
/// sidecar must abort it. Under the other rules, checks that the leg still runs once the
/// disconnect has been detected, and then lets the engine respond, which ends the leg.
#[track_caller]
fn decode_leg_ends(pair: &Pair, rule: Rule) {
    match rule {
        Rule::Serial | Rule::Room => wait_aborted(&pair.decode),
        Rule::SerialPush | Rule::SerialToEnd | Rule::PushHeldBack => {
            wait_disconnect_detected(pair);
            assert_eq!(only(&pair.decode).state, State::Responding);
            pair.decode.release();
            wait_over(&pair.decode);
        }
    }
    pair.decode.release();
}

#[track_caller]
fn disconnect_while_both_are_silent(pair: &Pair, leave: Leave, rule: Rule) {
    forget(pair);
    pair.prefill.fault(Fault::Hold, 1);
    let is_concurrent = matches!(rule, Rule::Room | Rule::PushHeldBack);
    if is_concurrent {
        pair.decode.fault(Fault::Hold, 1);
    }
    let client = begin(pair, &Api::Chat.ask(4, true));
    wait_state(&pair.prefill, State::Responding);
    if is_concurrent {
        wait_state(&pair.decode, State::Responding);
    }
    let (_, _client) = leave.now(client);
    if is_concurrent {
        decode_leg_ends(pair, rule);
    }
    match rule {
        Rule::Serial | Rule::SerialPush | Rule::Room => {
            wait_aborted(&pair.prefill);
            pair.prefill.release();
        }
        Rule::SerialToEnd | Rule::PushHeldBack => {
            wait_disconnect_detected(pair);
            pair.prefill.release();
            wait_state(&pair.prefill, State::Responded);
        }
    }
    if rule == Rule::SerialToEnd {
        let is_release = |log: &[Seen]| log.len() == 1 && log[0].state == State::Responded;
        assert!(pair.decode.wait_for(DEADLINE, is_release).is_some());
        let body = json_of(&only(&pair.decode));
        assert_eq!(body["model"], "ringside-releases-kv-cache");
    }
    expect_drained(&pair.sidecar);
    let legs = usize::from(is_concurrent || rule == Rule::SerialToEnd);
    assert_eq!(pair.decode.requests().len(), legs);
}

#[track_caller]
fn disconnect_while_decode_is_silent(pair: &Pair, leave: Leave, rule: Rule) {
    forget(pair);
    pair.decode.fault(Fault::Hold, 1);
    let client = begin(pair, &Api::Chat.ask(4, false));
    wait_state(&pair.decode, State::Responding);
    wait_state(&pair.prefill, State::Responded);
    let (_, _client) = leave.now(client);
    decode_leg_ends(pair, rule);
    expect_drained(&pair.sidecar);
}

#[track_caller]
fn disconnect_during_a_stream(pair: &Pair, leave: Leave, rule: Rule) {
    forget(pair);
    if rule == Rule::Room {
        pair.prefill.fault(Fault::Hold, 1);
    }
    pair.decode
        .fault(Fault::StallMidStream { after_events: 3 }, 1);
    let mut client = begin(pair, &Api::Chat.ask(64, true));
    assert_eq!(client.head().status, 200);
    client.chunk().unwrap();
    let (_, _client) = leave.now(client);
    wait_aborted(&pair.decode);
    // The transfer has finished, and so will the prefill leg.
    pair.prefill.release();
    wait_state(&pair.prefill, State::Responded);
    expect_drained(&pair.sidecar);
}
