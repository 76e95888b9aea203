//! The io_uring and epoll drivers: the fallback to epoll if the kernel refuses io_uring, and the
//! log line and metric that report the driver in use.

use crate::harness::{CHAT, Launch, Pair, Sidecar};
use crate::harness_more::{
    Driver, ask_for, expect_drained, expect_handoffs_sound, expect_healthy, expect_text, pair_on,
    split_request,
};
use mock_engine::{Engine, EngineConfig, Fault};

#[track_caller]
fn expect_driver(sidecar: &Sidecar, driver: &str) {
    let page = sidecar.admin("/metrics").unwrap().expect(200).text();
    let line = format!("ringside_driver_info{{driver=\"{driver}\"}} 1");
    assert!(page.contains(&line), "{page}");
    sidecar.wait_stderr(&format!("driver: {driver}"));
}

#[test]
fn refused_io_uring_falls_back_to_epoll_and_is_reported() {
    for (errno, words) in [
        // seccomp and `kernel.io_uring_disabled`.
        (libc::EPERM, "Operation not permitted"),
        // A kernel that does not support the setup flags.
        (libc::EINVAL, "Invalid argument"),
        (libc::ENOSYS, "not implemented"),
        (libc::ENOMEM, "Cannot allocate memory"),
    ] {
        let engine = Engine::start(EngineConfig::default(), 0).unwrap();
        let sidecar = Sidecar::launch(&Launch {
            decoder_port: engine.port(),
            ring_errno: Some(errno),
            ..Launch::default()
        });
        expect_driver(&sidecar, "epoll");
        sidecar.wait_stderr("io_uring is not available; using epoll");
        sidecar.wait_stderr(words);
        let (prompt, body) = ask_for(4, true);
        expect_text(&sidecar.post(CHAT, &body, &[]).expect(200), &prompt, 4);
        sidecar.expect_sound();
    }
}

#[test]
fn io_uring_is_used_if_the_kernel_allows_it() {
    if !ringside_probe() {
        eprintln!("skipped: this kernel refuses io_uring");
        return;
    }
    let pair = Pair::start(&[]);
    expect_driver(&pair.sidecar, "io_uring");
}

fn ringside_probe() -> bool {
    ringside::net::probe::probe_ring().is_ok()
}

#[test]
fn both_drivers_stream_split_responses() {
    for driver in [Driver::Ring, Driver::Epoll] {
        let pair = pair_on(driver, &[], |_| {}, |_| {});
        // Tokens are not held back until more data follows: these three arrive although the engine
        // stalls after them.
        pair.decode
            .fault(Fault::StallMidStream { after_events: 3 }, 1);
        let mut client = pair.sidecar.connect();
        client.send(split_request(&pair, &ask_for(20, true).1));
        assert_eq!(client.head().status, 200);
        let mut text = String::new();
        while text.matches("\n\n").count() < 3 {
            text += &String::from_utf8(client.chunk().unwrap()).unwrap();
        }
        drop(client);
        // Request and response bodies that are larger than any buffer.
        let padding = "x".repeat(3 << 20);
        let (prompt, body) = ask_for(20_000, true);
        let body = body.replacen('{', &format!("{{\"user\":\"{padding}\","), 1);
        let response = pair.post(CHAT, &body).expect(200);
        expect_text(&response, &prompt, 20_000);
        expect_healthy(&pair);
        expect_drained(&pair.sidecar);
        expect_handoffs_sound(&pair);
        pair.sidecar.expect_sound();
    }
}
