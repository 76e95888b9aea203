//! Implementation of `ringside-bench neighbours`, from its options to its report. It measures how
//! much proxies delay quiet streams while other clients of the same proxy load it.
//!
//! Three threads share the work: the engine, the measuring client (the calling thread), and the
//! attack, which has the lowest priority. The modules are listed in dependency order.

pub mod request;

pub mod attack;
pub mod engine;
pub mod quiet;

pub mod report;

use std::io::{self, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::cli::{Attack, NeighboursOptions, Output};
use crate::exit::Exit;
use crate::limits::{ATTACK_DRAIN_MS_MAX, ATTACK_RETRY_MS, NEIGHBOURS_DESCRIPTORS};
use crate::overhead::{check_cpu, create, on_cpu, write};
use crate::precision::Machine;
use crate::socket::Poll;
use attack::{Plan, Work};
use engine::Engine;
use quiet::{Delays, Streams};
use report::{Cell, Report};

/// Performs the measurement and writes the reports. If a cell fails, the reports contain the cells
/// before it.
///
/// # Errors
/// Returns an error if the run could not be completed, or a quiet stream broke or stalled.
pub fn run(options: &NeighboursOptions) -> Result<(), Exit> {
    let failed = |text: String| Exit::runtime(format!("ringside-bench: {text}"));
    check_cpu(options.cpu)?;
    // Created before the run, so that an unusable path does not waste a long run.
    let json_file = match &options.json {
        Some(Output::File(path)) => Some(create("--json", path)?),
        Some(Output::Stdout) | None => None,
    };
    allow_descriptors()?;
    let machine = Machine::read();
    // Before the other threads are started, because they inherit it.
    on_cpu(options.cpu).map_err(failed)?;
    let engine = Engine::start(options.listen).map_err(|error| {
        let listen = options.listen;
        Exit::config(format!("ringside-bench: --listen {listen}: {error}"))
    })?;
    let mut cells = Vec::new();
    let measured = measure(options, &engine, &mut cells);
    let stopped = engine.stop().map_err(|error| format!("engine: {error}"));
    let report = Report {
        options: options.clone(),
        machine,
        cells,
    };
    publish(&report, json_file)?;
    // An engine that has failed is the cause of broken streams.
    stopped.and(measured).map_err(failed)
}

fn publish(report: &Report, json_file: Option<std::fs::File>) -> Result<(), Exit> {
    let to_stdout = report.options.json == Some(Output::Stdout);
    if !report.options.quiet {
        let text = report.text();
        // A closed pipe is not an error.
        let _ = if to_stdout {
            io::stderr().lock().write_all(text.as_bytes())
        } else {
            io::stdout().lock().write_all(text.as_bytes())
        };
    }
    let json = format!("{:#}\n", report.json());
    if let Some(file) = json_file {
        write("--json", file, &json)?;
    }
    if to_stdout {
        write("--json", io::stdout().lock(), &json)?;
    }
    Ok(())
}

/// Raises this process's soft limit of open files to the hard limit.
fn allow_descriptors() -> Result<(), Exit> {
    let mut limit = getrlimit(Resource::Nofile);
    // `None` means no limit.
    if let Some(hard) = limit.maximum
        && hard < NEIGHBOURS_DESCRIPTORS
    {
        return Err(Exit::config(format!(
            "ringside-bench: {NEIGHBOURS_DESCRIPTORS} open files are needed, and the hard limit is \
             {hard}; raise it (ulimit -Hn)"
        )));
    }
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit)
        .map_err(|error| Exit::config(format!("ringside-bench: limit of open files: {error}")))
}

/// Returns the indexes of `count` proxies in the order of a round. Each round starts with another
/// proxy, so that no proxy always follows the same one.
fn order(round: u32, count: usize) -> impl Iterator<Item = usize> {
    (0..count).map(move |nth| (nth + round as usize) % count)
}

/// Measures all cells and appends them to `cells`.
fn measure(
    options: &NeighboursOptions,
    engine: &Engine,
    cells: &mut Vec<Cell>,
) -> Result<(), String> {
    for round in 0..options.rounds {
        for attack in options.attacks.iter().copied() {
            for proxy in order(round, options.proxies.len()) {
                let to = &options.proxies[proxy];
                let Some(target) = to.target(attack) else {
                    continue;
                };
                let measured = measure_cell(engine, to.addr, attack, target, options.time);
                let (delays, work) = measured.map_err(|error| {
                    let (name, attack) = (&to.name, attack.name());
                    format!("{name}, {attack}, round {}: {error}", round + 1)
                })?;
                let cell = Cell {
                    round,
                    attack,
                    proxy,
                    delays,
                    work,
                };
                if !options.quiet {
                    progress(options, &cell);
                }
                cells.push(cell);
            }
        }
    }
    Ok(())
}

fn progress(options: &NeighboursOptions, cell: &Cell) {
    let _ = writeln!(
        io::stderr().lock(),
        "round {} of {}, {}, {}: added p99 {}, work {}",
        cell.round + 1,
        options.rounds,
        cell.attack.name(),
        options.proxies[cell.proxy].name,
        cell.added_p99(),
        report::rate(cell.attack, &cell.work)
    );
}

/// Measures quiet streams through the proxy at `proxy` during an attack on `target`, which is an
/// address of the same proxy.
fn measure_cell(
    engine: &Engine,
    proxy: SocketAddr,
    attack: Attack,
    target: SocketAddr,
    time: Duration,
) -> Result<(Delays, Work), String> {
    let plan = Plan::new(attack, target)?;
    let mut streams = Streams::open(proxy, engine.addr())?;
    let stop = AtomicBool::new(false);
    let measured = thread::scope(|scope| {
        let spawned = plan.as_ref().map(|plan| {
            let thread = thread::Builder::new().name("attack".to_owned());
            let (stop, uploaded) = (&stop, || engine.upload_bytes());
            thread.spawn_scoped(scope, move || attack::run(plan, target, uploaded, stop))
        });
        let attacking = spawned.transpose().map_err(|error| error.to_string())?;
        let measured = streams.measure(time);
        // On failure too: the scope ends when the attack's thread has ended.
        stop.store(true, Ordering::Relaxed);
        let finished = measured.and_then(|()| streams.finish());
        let work = match attacking.map(thread::ScopedJoinHandle::join) {
            Some(Ok(work)) => work.map_err(|error| format!("attack: {error}"))?,
            Some(Err(_)) => return Err("the attack's thread panicked".to_owned()),
            None => Work::default(),
        };
        Ok((finished?, work))
    });
    drain(engine)?;
    measured
}

/// Waits until the engine has no request of an attack left, for at most [`ATTACK_DRAIN_MS_MAX`], so
/// that the next cell starts with idle proxies.
fn drain(engine: &Engine) -> Result<(), String> {
    let mut clock = Poll::new().map_err(|error| error.to_string())?;
    let (begun, time_max) = (Instant::now(), Duration::from_millis(ATTACK_DRAIN_MS_MAX));
    while engine.is_occupied() && begun.elapsed() < time_max {
        let waited = clock.wait(Duration::from_millis(ATTACK_RETRY_MS), &mut Vec::new());
        waited.map_err(|error| error.to_string())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// Starts an engine on a free port.
    fn engine() -> Engine {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = free.local_addr().unwrap();
        drop(free);
        Engine::start(addr).unwrap()
    }

    /// Measures `attack` on the engine itself, for longer each time that the attack did nothing: on
    /// a loaded machine a thread of the lowest priority may not run for a second.
    fn measure_until_done(engine: &Engine, addr: SocketAddr, attack: Attack) -> (Delays, Work) {
        let mut time = Duration::from_millis(100);
        loop {
            let measured = measure_cell(engine, addr, attack, addr, time);
            let (delays, work) = measured.unwrap_or_else(|error| panic!("{attack:?}: {error}"));
            let is_last = time > Duration::from_secs(10);
            if work.done > 0 || work.failures > 0 || attack == Attack::None || is_last {
                return (delays, work);
            }
            time *= 2;
        }
    }

    #[test]
    fn every_round_starts_with_another_proxy() {
        assert_eq!(order(0, 3).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(order(1, 3).collect::<Vec<_>>(), [1, 2, 0]);
        assert_eq!(order(5, 3).collect::<Vec<_>>(), [2, 0, 1]);
    }

    #[test]
    fn every_attack_without_tls_is_measured_on_the_engine_itself() {
        allow_descriptors().unwrap();
        let engine = engine();
        let addr = engine.addr();
        for attack in Attack::ALL {
            if attack == Attack::Handshakes {
                continue;
            }
            let (delays, work) = measure_until_done(&engine, addr, attack);
            assert!(!delays.direct.is_empty(), "{attack:?}");
            assert!(!delays.proxied.is_empty(), "{attack:?}");
            assert_eq!(work.done > 0, attack != Attack::None, "{attack:?}");
            assert_eq!(work.failures, 0, "{attack:?}");
        }
        engine.stop().unwrap();
    }

    #[test]
    fn a_proxy_that_does_not_listen_is_an_error() {
        let engine = engine();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = free.local_addr().unwrap();
        drop(free);
        let time = Duration::from_millis(10);
        let measured = measure_cell(&engine, addr, Attack::None, addr, time);
        assert!(measured.unwrap_err().contains("refused"));
        engine.stop().unwrap();
    }
}
