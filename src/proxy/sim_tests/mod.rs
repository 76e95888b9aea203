//! Tests of the proxy with scripted clients and engines on the simulated network, under thousands
//! of seeds.
//!
//! `RINGSIDE_SIM_RUNS=n` multiplies the number of seeds by `n`. `RINGSIDE_SIM_SEED=s` runs only
//! that seed. A failed run reports its seed.

mod client;
mod engine;
mod scenes;
mod stage;
mod wire;

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::atomic::Ordering;

use serde_json::Value;

use self::stage::{DECODER, LegOrder, Log, PREFILLERS, Received, Scenario, SentRequest, Stage, ms};
use crate::limits::DETACHED_LEG_SECS_MAX;
use crate::net::Net;
use crate::net::sim::{Finished, SimNet};
use crate::pd::Role;

/// Longest time in milliseconds that may pass from a client's disconnect until its engine sees it:
/// up to 50 until the proxy sees it, plus the time of the proxy and of the path to the engine.
const DISCONNECT_MS_MAX: u64 = 50 + 2 * 4;

/// Returns the seeds of a test: `count` times `RINGSIDE_SIM_RUNS` of them, or only
/// `RINGSIDE_SIM_SEED`.
fn seeds(count: u64) -> Vec<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    if let Some(seed) = number("RINGSIDE_SIM_SEED") {
        return vec![seed];
    }
    (0..count * number("RINGSIDE_SIM_RUNS").unwrap_or(1)).collect()
}

/// Runs the scenario with one seed and checks everything that must hold at its end. Panics if a
/// check fails.
fn run_seed(seed: u64, plot: Scenario) -> Finished<[u64; 3]> {
    let net = SimNet::new(seed);
    let stage = Stage::new(&net, plot, stage::config(plot));
    let kept = Rc::clone(&stage);
    let run = net.run(run_simulation(stage));
    let run = run.unwrap_or_else(|stuck| panic!("{stuck}"));
    assert_eq!(run.panics, 0, "seed {seed}: a task panicked");
    check_run(&kept);
    run
}

/// Starts the engines and clients, waits until they have finished, and checks that no session, body
/// budget or pooled connection with unread bytes is left. Returns the numbers of complete, refused
/// and truncated responses.
async fn run_simulation(stage: Rc<Stage>) -> [u64; 3] {
    engine::start(&stage, Role::Decode, DECODER);
    for address in PREFILLERS {
        engine::start(&stage, Role::Prefill, address);
    }
    let clients = 1 + stage.net.below(3) as usize;
    stage.clients_left.set(clients);
    for index in 0..clients {
        stage
            .net
            .spawn(client::run_client(Rc::clone(&stage), index));
    }
    if stage.plot.drains {
        stage.net.sleep(stage.random_delay()).await;
        stage.drain_begun.set(true);
        stage.draining.store(true, Ordering::Relaxed);
        stage.net.nudge_all();
    }
    let clients_end = async {
        while stage.clients_left.get() > 0 && stage.net.panics() == 0 {
            stage.net.sleep(ms(1)).await;
        }
    };
    let ended = client::within(&stage, ms(600_000), clients_end).await;
    stage.check(ended, "the clients do not finish");
    let sessions_end = async {
        while stage.shard.sessions() > 0 {
            stage.net.sleep(ms(1)).await;
        }
    };
    // A concurrent prefill leg may continue after its client has disconnected, up to
    // `DETACHED_LEG_SECS_MAX`.
    let wait = match stage.plot.wiring {
        LegOrder::Concurrent => ms(1000 * DETACHED_LEG_SECS_MAX + 1000),
        LegOrder::Serial | LegOrder::Store => ms(DISCONNECT_MS_MAX),
    };
    let ended = client::within(&stage, wait, sessions_end).await;
    stage.check(ended, "sessions outlive their clients");
    stage.check(stage.budget.used() == 0, "body bytes stay reserved");
    // Bytes that an engine sent on an idle connection have arrived after this, and must have closed
    // it.
    stage.net.sleep(ms(30)).await;
    stage.check(
        stage.net.unread() == 0,
        "a pooled connection has unread bytes",
    );
    let log = stage.log.borrow();
    [log.complete, log.refused, log.cut]
}

/// Checks the log of a finished run: the bodies that engines received, that no handoff was sent
/// twice, the number of repeats, the bootstrap rooms, and how soon engines saw disconnects.
fn check_run(stage: &Stage) {
    let log = stage.log.borrow();
    for received in &log.received {
        judge_body(stage, &log.asked[&received.id], received);
    }
    let mut seen = log.handoffs_seen.clone();
    seen.sort();
    for pair in seen.windows(2) {
        stage.check(pair[0] != pair[1], format!("{} was sent twice", pair[0]));
    }
    judge_repeats(stage, &log);
    judge_rooms(stage, &log);
    for (id, left) in &log.left {
        let Some(ended) = log.engine_ended.get(id) else {
            continue;
        };
        let Some(ended) = ended else {
            stage.check(
                false,
                format!("an engine still works on {id}, whose client has disconnected"),
            );
            continue;
        };
        let took = ended.since(*left);
        stage.check(
            took <= ms(DISCONNECT_MS_MAX),
            format!("{id}: an engine saw the disconnect after {took:?}"),
        );
    }
}

/// Checks that engines received no request more often than its retries and replays allow.
fn judge_repeats(stage: &Stage, log: &Log) {
    for (id, asked) in &log.asked {
        let count = |role| {
            let of = |r: &&Received| r.id == *id && r.role == role;
            log.received.iter().filter(of).count()
        };
        // A prefill leg has one retry, and each of its attempts one replay. A decode leg with a
        // handoff may be replayed, and may be recomputed without the handoff.
        stage.check(
            count(Role::Prefill) <= 4,
            format!("{id}: {} prefills", count(Role::Prefill)),
        );
        let decodes_max = if asked.is_split { 3 } else { 2 };
        stage.check(
            count(Role::Decode) <= decodes_max,
            format!("{id}: {} decodes", count(Role::Decode)),
        );
    }
}

/// Checks that a body received by an engine is the client's body with exactly the edits of its leg.
fn judge_body(stage: &Stage, asked: &SentRequest, received: &Received) {
    let id = &received.id;
    let Some(wanted) = &asked.json else {
        stage.check(
            received.body == asked.body,
            format!("{id}: the body was changed"),
        );
        return;
    };
    let got: Value = serde_json::from_slice(&received.body)
        .unwrap_or_else(|error| panic!("seed {}: {id}: {error}", stage.net.seed()));
    let own = ["kv_transfer_params", "ec_transfer_params"];
    let split_route = wanted.get("messages").is_some();
    if split_route && stage.plot.wiring != LegOrder::Serial {
        return judge_wired(stage, wanted, received, &got);
    }
    match (received.role, split_route, asked.is_split) {
        (Role::Encode | Role::Bootstrap, _, _) => stage.check(false, "a leg that no test requests"),
        (Role::Prefill, _, _) => {
            stage.check(
                got == client::prefill_view(wanted),
                format!("{id}: prefill {got}"),
            );
        }
        (Role::Decode, false, _) => {
            stage.check(got == *wanted, format!("{id}: {got}"));
            stage.check(
                received.body.len() == asked.body.len(),
                "the length changed",
            );
        }
        (Role::Decode, true, false) => {
            let wanted = client::without(wanted.clone(), &own);
            stage.check(got == wanted, format!("{id}: local {got}"));
        }
        (Role::Decode, true, true) => {
            let handoff = &got["kv_transfer_params"];
            let theirs = handoff["remote_engine_id"].as_str().unwrap_or_default();
            let is_own = theirs.starts_with(&format!("handoff-{id}-"));
            stage.check(
                handoff.is_null() || is_own,
                format!("{id}: handoff {handoff}"),
            );
            let wanted = client::without(wanted.clone(), &own);
            stage.check(
                client::without(got.clone(), &own) == wanted,
                format!("{id}: decode {got}"),
            );
        }
    }
}

/// Like `judge_body`, for legs of the concurrent order and of the connector shared-storage.
fn judge_wired(stage: &Stage, wanted: &Value, received: &Received, got: &Value) {
    let id = &received.id;
    if stage.plot.wiring == LegOrder::Concurrent {
        let room = got["bootstrap_room"].as_u64();
        let view = client::without(got.clone(), &["bootstrap_room", "bootstrap_host"]);
        stage.check(room.is_some(), format!("{id}: no room in {got}"));
        stage.check(view == client::room_view(wanted), format!("{id}: {got}"));
        return;
    }
    let own = ["kv_transfer_params", "ec_transfer_params"];
    let is_first_try = received.role == Role::Decode
        && wanted.get("cache_hit_threshold").is_some()
        && *got == client::without(wanted.clone(), &own);
    let is_leg = *got == client::store_view(wanted, received.role);
    stage.check(is_first_try || is_leg, format!("{id}: {got}"));
}

/// Checks that every bootstrap room belongs to one request, and that at most one decode leg used
/// it.
fn judge_rooms(stage: &Stage, log: &Log) {
    let mut rooms: BTreeMap<u64, (&str, bool)> = BTreeMap::new();
    let legs = log.received.iter().filter_map(|received| {
        let body: Value = serde_json::from_slice(&received.body).ok()?;
        Some((received, body["bootstrap_room"].as_u64()?))
    });
    for (received, room) in legs {
        let entry = rooms.entry(room).or_insert((&received.id, false));
        stage.check(entry.0 == received.id, "two requests share a room");
        let is_second_decode = received.role == Role::Decode && entry.1;
        stage.check(!is_second_decode, format!("{}: decoded twice", received.id));
        entry.1 |= received.role == Role::Decode;
    }
}

fn play_all(count: u64, plot: Scenario) -> [u64; 3] {
    let mut sums = [0; 3];
    for seed in seeds(count) {
        let run = run_seed(seed, plot);
        for (sum, n) in sums.iter_mut().zip(run.value) {
            *sum += n;
        }
    }
    sums
}

#[test]
fn every_response_is_complete_and_belongs_to_its_request() {
    let [complete, refused, cut] = play_all(600, Scenario::default());
    assert!(complete > 0 && refused == 0 && cut == 0);
}

#[test]
fn closed_idle_connections_fail_no_request_that_can_be_repeated() {
    let plot = Scenario {
        idle_ends: true,
        ..Scenario::default()
    };
    play_all(500, plot);
}

#[test]
fn client_disconnects_stop_the_engines() {
    let plot = Scenario {
        clients_disconnect: true,
        ..Scenario::default()
    };
    play_all(600, plot);
}

#[test]
fn engine_faults_never_look_like_complete_responses() {
    let plot = Scenario {
        engines_fail: true,
        ..Scenario::default()
    };
    play_all(600, plot);
}

#[test]
fn all_faults_together() {
    let plot = Scenario {
        engines_fail: true,
        idle_ends: true,
        clients_disconnect: true,
        connects_fail: true,
        ..Scenario::default()
    };
    play_all(800, plot);
}

#[test]
fn a_drain_finishes_running_requests() {
    let plot = Scenario {
        drains: true,
        ..Scenario::default()
    };
    play_all(400, plot);
}

/// Repeats the scenarios of the tests above with the concurrent order (sglang) and with
/// shared-storage.
#[test]
fn concurrent_legs_and_legs_that_use_a_store() {
    for wiring in [LegOrder::Concurrent, LegOrder::Store] {
        let calm = Scenario {
            wiring,
            ..Scenario::default()
        };
        let [complete, refused, cut] = play_all(300, calm);
        assert!(complete > 0 && refused == 0 && cut == 0, "{wiring:?}");
        let clients_disconnect = true;
        let idle_ends = true;
        play_all(
            300,
            Scenario {
                clients_disconnect,
                ..calm
            },
        );
        play_all(200, Scenario { idle_ends, ..calm });
        play_all(
            200,
            Scenario {
                drains: true,
                ..calm
            },
        );
        let faulty = Scenario {
            engines_fail: true,
            ..calm
        };
        play_all(300, faulty);
        let all = Scenario {
            clients_disconnect,
            idle_ends,
            connects_fail: true,
            ..faulty
        };
        play_all(500, all);
    }
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let plot = Scenario {
        engines_fail: true,
        clients_disconnect: true,
        ..Scenario::default()
    };
    for seed in seeds(20) {
        assert_eq!(
            run_seed(seed, plot),
            run_seed(seed, plot),
            "seed {seed} gave two different runs"
        );
    }
}
