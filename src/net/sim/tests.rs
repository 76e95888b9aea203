//! Tests of the simulation itself: runs are repeatable, time jumps, and data is lost as with TCP.

use std::net::SocketAddr;

use super::*;
use crate::net::{Conn, would_block};

fn seeds(count: u64, test: impl Fn(u64)) {
    for seed in 0..count {
        test(seed);
    }
}

/// Sends `bytes` over a connection whose behaviour is drawn from the seed. The receiver starts
/// after 1 ms, and its received bytes are the value of the run.
fn transfer(seed: u64, bytes: &[u8]) -> Finished<Vec<u8>> {
    let net = SimNet::new(seed);
    let (near, far) = net.pair();
    let sent = bytes.to_vec();
    net.spawn(async move {
        far.send(&sent).await.unwrap();
    });
    let clock = net.clone();
    net.run(async move {
        let mut received = Vec::new();
        clock.sleep(Duration::from_millis(1)).await;
        while near.recv(&mut received, 700).await.unwrap() > 0 {}
        received
    })
    .unwrap()
}

#[test]
fn bytes_arrive_completely_and_in_order_and_runs_are_repeatable() {
    let bytes: Vec<u8> = (0..5000_u32).map(|i| (i % 251) as u8).collect();
    let mut traces = std::collections::HashSet::new();
    seeds(200, |seed| {
        let run = transfer(seed, &bytes);
        assert!(run.value == bytes, "seed {seed}");
        assert_eq!(run.panics, 0);
        assert_eq!(run, transfer(seed, &bytes), "seed {seed} is not repeatable");
    });
    for seed in 0..50 {
        traces.insert(transfer(seed, &bytes).trace);
    }
    assert_eq!(traces.len(), 50, "different seeds produced the same run");
}

#[test]
fn time_jumps_to_the_next_deadline() {
    let net = SimNet::new(1);
    let timer = net.timer();
    timer.set(net.now(), Some(Duration::from_secs(3600)));
    let run = net.run(async move { poll_fn(|cx| timer.poll(cx)).await });
    let run = run.unwrap();
    assert!(run.ended.since(Instant(0)) >= Duration::from_secs(3600));
    assert!(run.polls < 100);
}

#[test]
fn a_deadlocked_run_fails_with_its_seed() {
    let net = SimNet::new(42);
    let (near, _far) = net.pair();
    let run = net.run(async move {
        let _ = near.recv(&mut Vec::new(), 1).await;
    });
    let stuck = run.unwrap_err();
    assert!(matches!(stuck, Stuck::Deadlock { seed: 42, .. }));
    assert!(stuck.to_string().contains("seed 42"));
}

#[test]
fn a_panic_ends_one_task_and_closes_its_connections() {
    let net = SimNet::new(3);
    let (near, far) = net.pair();
    net.spawn(async move {
        let _far = far;
        panic!("contained");
    });
    let run = net.run(async move { near.recv(&mut Vec::new(), 1).await.map_err(|e| e.kind()) });
    let run = run.unwrap();
    assert_eq!((run.value, run.panics), (Ok(0), 1));
    let net = SimNet::new(4);
    let stuck = net
        .run(async { panic!("main") })
        .map(|run: Finished<()>| run.value);
    assert_eq!(stuck, Err(Stuck::Panicked { seed: 4 }));
}

#[test]
fn a_send_stops_at_the_capacity_and_continues_when_there_is_room() {
    let net = SimNet::new(5);
    net.set_manner(Some(LinkBehaviour::calm(10)));
    let (near, far) = net.pair();
    let run = net.run(async move {
        assert_eq!(near.try_send(&[1; 25]).unwrap(), 10);
        assert!(would_block(&near.try_send(&[1]).unwrap_err()));
        assert_eq!(far.try_recv(&mut [0; 4]).unwrap(), 4);
        poll_fn(|cx| near.poll_writable(cx)).await;
        assert_eq!(near.try_send(&[1; 25]).unwrap(), 4);
        (near.outbound(), far.inbound())
    });
    let flow = Flow {
        sent: 14,
        taken: 4,
        capacity: 10,
    };
    assert_eq!(run.unwrap().value, (flow, flow));
}

#[test]
fn a_hangup_wait_ends_while_bytes_are_unread() {
    seeds(50, |seed| {
        let net = SimNet::new(seed);
        let (near, far) = net.pair();
        let run = net.run(async move {
            let _ = near.try_send(b"x");
            drop(near);
            far.hangup().await;
            let mut rest = Vec::new();
            while let Ok(1..) = far.recv(&mut rest, 8).await {}
            rest.len()
        });
        assert!(run.unwrap().value <= 1);
    });
}

#[test]
fn a_reset_is_reported_once_and_only_if_no_fin_has_arrived() {
    seeds(50, |seed| {
        let net = SimNet::new(seed);
        let (near, far) = net.pair();
        let run = net.run(async move {
            near.reset_on_close();
            drop(near);
            let first = far.recv(&mut Vec::new(), 1).await.map_err(|e| e.kind());
            assert_eq!(first, Err(io::ErrorKind::ConnectionReset));
            assert_eq!(far.recv(&mut Vec::new(), 1).await.unwrap(), 0);
            let sent = far.try_send(b"x").unwrap_err().kind();
            assert_eq!(sent, io::ErrorKind::BrokenPipe);
        });
        run.unwrap();
    });
}

#[test]
fn bytes_sent_to_a_closed_side_cause_a_reset() {
    seeds(50, |seed| {
        let net = SimNet::new(seed);
        let (near, far) = net.pair();
        let clock = net.clone();
        let run = net.run(async move {
            drop(near);
            // After a FIN the receiver sees no reset, but its sends start to fail.
            while let Ok(()) = far.send(b"x").await {
                clock.sleep(Duration::from_millis(1)).await;
            }
            assert_eq!(far.recv(&mut Vec::new(), 1).await.unwrap_or(0), 0);
        });
        run.unwrap();
    });
}

#[test]
fn connects_succeed_are_refused_fail_immediately_or_hang() {
    let address: SocketAddr = "192.0.2.9:80".parse().unwrap();
    seeds(20, |seed| {
        let net = SimNet::new(seed);
        let engine = net.clone();
        let run = net.run(async move {
            let address = &Address::from(address);
            let refused = engine.connect(address).unwrap();
            poll_fn(|cx| refused.poll_writable(cx)).await;
            assert!(refused.connected().is_err());
            let listener = engine.listen(address.clone());
            listener.on_connect(ConnectBehaviour::Accept, Duration::from_millis(5));
            let near = engine.connect(address).unwrap();
            assert!(would_block(&near.try_send(b"x").unwrap_err()));
            poll_fn(|cx| near.poll_writable(cx)).await;
            near.connected().unwrap();
            near.send(b"x").await.unwrap();
            let far = listener.accept().await;
            let mut received = Vec::new();
            assert_eq!(far.recv(&mut received, 1).await.unwrap(), 1);
            listener.on_connect(
                ConnectBehaviour::Fail(io::ErrorKind::AddrNotAvailable),
                Duration::ZERO,
            );
            assert!(engine.connect(address).is_err());
            listener.on_connect(ConnectBehaviour::Hang, Duration::ZERO);
            let hanging = engine.connect(address).unwrap();
            poll_fn(|cx| hanging.poll_writable(cx)).await;
        });
        assert!(matches!(run, Err(Stuck::Deadlock { .. })), "{run:?}");
    });
}
