//! Several shards: clients are distributed evenly over them, and keep their rank.

use mock_engine::{Engine, EngineConfig};

use crate::client::Client;
use crate::harness::{CHAT, Launch, Sidecar, start_ranks};
use crate::harness_more::{Driver, ask_for, expect_text};

const SHARDS: usize = 4;

/// Returns the number of client connections of each shard.
fn clients_of_shards(sidecar: &Sidecar) -> Vec<f64> {
    let of_shard = |shard: usize| {
        let labels = [("shard", &*shard.to_string())];
        sidecar.metric("ringside_shard_client_connections", &labels)
    };
    (0..SHARDS).map(of_shard).collect()
}

fn ask_health(client: &mut Client) {
    client.ask("GET", "/health", &[], b"").expect(200);
}

/// The kernel alone would assign eight clients to four shards evenly in one case of 26.
#[test]
fn few_clients_are_distributed_evenly() {
    for driver in [Driver::Ring, Driver::Epoll] {
        let decoder = Engine::start(EngineConfig::decode(), 0).unwrap();
        let sidecar = Sidecar::launch(&Launch {
            args: &["--cores=any*4"],
            decoder_port: decoder.port(),
            ring_errno: driver.errno(),
            ..Launch::default()
        });
        let mut clients = Vec::new();
        for _ in 0..2 * SHARDS {
            let mut client = sidecar.connect();
            ask_health(&mut client);
            clients.push(client);
        }
        assert_eq!(clients_of_shards(&sidecar), [2.0; SHARDS]);
        // Whichever of them close, new ones take their places.
        clients.drain(..SHARDS);
        sidecar.wait_metric("ringside_client_connections", &[], SHARDS as f64);
        for _ in 0..SHARDS {
            let mut client = sidecar.connect();
            ask_health(&mut client);
            clients.push(client);
        }
        assert_eq!(clients_of_shards(&sidecar), [2.0; SHARDS]);
        let (prompt, body) = ask_for(4, true);
        for client in &mut clients {
            let response = client.ask("POST", CHAT, &[], body.as_bytes());
            expect_text(&response.expect(200), &prompt, 4);
        }
        sidecar.expect_sound();
    }
}

/// All clients connect at the same time, so that several are handed over together.
#[test]
fn many_clients_are_distributed_evenly() {
    let decoder = Engine::start(EngineConfig::decode(), 0).unwrap();
    let sidecar = Sidecar::launch(&Launch {
        args: &["--cores=any*4"],
        decoder_port: decoder.port(),
        ..Launch::default()
    });
    let mut clients: Vec<_> = (0..200).map(|_| sidecar.connect()).collect();
    clients.iter_mut().for_each(ask_health);
    let counts = clients_of_shards(&sidecar);
    assert_eq!(counts.iter().sum::<f64>(), 200.0);
    // An eighth more than the others, and each shard may choose at the same time as the others.
    assert!(
        counts.iter().all(|count| (40.0..=60.0).contains(count)),
        "{counts:?}"
    );
}

#[test]
fn a_client_that_is_handed_over_keeps_its_rank() {
    let decoders = start_ranks(&EngineConfig::decode(), 2);
    let sidecar = Sidecar::launch(&Launch {
        args: &["--cores=any*4", "--data-parallel-size=2"],
        decoder_port: decoders[0].port(),
        ranks: 2,
        ..Launch::default()
    });
    let (prompt, body) = ask_for(2, true);
    for rank in [1_u16, 0] {
        decoders.iter().for_each(Engine::clear);
        let mut clients: Vec<_> = (0..2 * SHARDS).map(|_| sidecar.connect_to(rank)).collect();
        for client in &mut clients {
            let response = client.ask("POST", CHAT, &[], body.as_bytes());
            expect_text(&response.expect(200), &prompt, 2);
        }
        let counts = decoders.iter().map(|decoder| decoder.requests().len());
        let mut want = [0, 0];
        want[usize::from(rank)] = clients.len();
        assert!(counts.eq(want));
        drop(clients);
        sidecar.wait_metric("ringside_client_connections", &[], 0.0);
    }
}

/// Between the start of a drain and the end of its settle time, clients still connect.
#[test]
fn clients_are_served_while_a_drain_settles() {
    let decoder = Engine::start(EngineConfig::decode(), 0).unwrap();
    let mut sidecar = Sidecar::launch(&Launch {
        args: &["--cores=any*4", "--drain-settle=1m"],
        decoder_port: decoder.port(),
        ..Launch::default()
    });
    let mut before: Vec<_> = (0..SHARDS).map(|_| sidecar.connect()).collect();
    before.iter_mut().for_each(ask_health);
    sidecar.terminate();
    sidecar.wait_stderr("draining");
    let (prompt, body) = ask_for(4, true);
    for _ in 0..2 * SHARDS {
        let mut client = sidecar.connect();
        let response = client.ask("POST", CHAT, &[], body.as_bytes());
        expect_text(&response.expect(200), &prompt, 4);
    }
    // The second one ends the process without waiting for the settle time.
    sidecar.terminate_again();
}
