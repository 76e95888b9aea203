//! Runs the `ringside-bench overhead` binary on a machine whose CPUs are all in use. This is a
//! separate program, because its load would delay the tests of other files.

#![expect(
    clippy::unwrap_used,
    reason = "test helpers panic on failure, as tests do"
)]

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use mock_engine::{Engine, EngineConfig};

const BENCH: &str = env!("CARGO_BIN_EXE_ringside-bench");

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Keeps all CPUs in use until it is dropped.
struct Burn(Arc<AtomicBool>);

impl Burn {
    fn start() -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        for _ in 0..thread::available_parallelism().unwrap().get() {
            let stop = Arc::clone(&stop);
            thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        Self(stop)
    }
}

impl Drop for Burn {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_busy_machine_is_not_measured_unless_allowed() {
    let engine = Engine::start(EngineConfig::default(), 0).unwrap();
    let address = format!("http://{}", engine.addr());
    let base = ["overhead", "--requests=5", "--max-tokens=2"];
    let burn = Burn::start();
    let run = |more: &[&str]| {
        Command::new(BENCH)
            .args(base)
            .args(["--direct", &address, "--proxy", &address])
            .args(more)
            .output()
            .unwrap()
    };
    let output = run(&[]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
    assert!(
        said.starts_with("ringside-bench: the machine is busy: other programs use"),
        "{said}"
    );
    assert!(
        said.contains("(pid ") && said.contains("nothing was measured"),
        "{said}"
    );
    assert_eq!(engine.requests().len(), 0);

    let output = run(&["--allow-busy"]);
    let (table, said) = (text(&output.stdout), text(&output.stderr));
    drop(burn);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(
        said.starts_with("ringside-bench: warning: the machine is busy"),
        "{said}"
    );
    let first = "BUSY MACHINE, measured because of --allow-busy; before the run, other programs";
    assert!(table.starts_with(first), "{table}");
    assert!(table.contains("added"), "{table}");
}
