//! Implementation of `ringside-bench overhead`, from its options to its reports.

use std::fs::File;
use std::io::{self, Write};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::busy::Look;
use crate::cli::{Length, Options, Output, Server, Target};
use crate::client;
use crate::exit::Exit;
use crate::json::json;
use crate::limits::LOOK_BEFORE_MS;
use crate::models::first_model;
use crate::page::page;
use crate::precision::{Machine, Precision, load_average, nanos};
use crate::progress::Progress;
use crate::report::{Around, Report, Verdict};
use crate::request::{Question, Requests, prompt_of};
use crate::run::{Peer, Run, Setup};
use crate::schedule::Until;
use crate::table::table;
use crate::units::{show_ns, show_signed_ns};
use crate::wire::Secure;

/// Interval at which the progress is updated.
const PROGRESS_LOOK: Duration = Duration::from_millis(200);

/// Performs the measurement and writes the reports.
///
/// # Errors
/// Returns an error if the measurement fails, and also if the report contains failed requests, no
/// complete round, wrong responses, a busy machine or an exceeded `--max-overhead-p99`.
pub fn run(options: Options) -> Result<(), Exit> {
    check_gaps(&options)?;
    check_cpu(options.cpu)?;
    // Create the files before the run, so that a wrong path does not waste an hour.
    let json_file = match &options.json {
        Some(Output::File(path)) => Some(create("--json", path)?),
        Some(Output::Stdout) | None => None,
    };
    let html_file = match &options.html {
        Some(path) => Some(create("--html", path)?),
        None => None,
    };
    let machine = Machine::read();
    let look = look(&options)?;
    let (setup, model, prompt_bytes) = setup(&options)?;
    let (precision, run) = measure(&setup, &options)?;
    let report = Report::new(
        Around {
            options,
            model,
            prompt_bytes,
            machine,
            look,
            load_at_end: load_average(),
            precision,
        },
        run,
    );
    let to_stdout = report.around.options.json == Some(Output::Stdout);
    if let Some(file) = json_file {
        write("--json", file, &format!("{:#}\n", json(&report)))?;
    }
    if let Some(file) = html_file {
        write("--html", file, &page(&report))?;
    }
    if !report.around.options.quiet {
        let text = table(&report);
        // Ignore write errors: the reader of a pipe may have closed it.
        let _ = if to_stdout {
            io::stderr().lock().write_all(text.as_bytes())
        } else {
            io::stdout().lock().write_all(text.as_bytes())
        };
    }
    if to_stdout {
        write(
            "--json",
            io::stdout().lock(),
            &format!("{:#}\n", json(&report)),
        )?;
    }
    conclude(&report)
}

/// Returns an error with the exit code if the report contains failed requests, no complete round,
/// wrong responses, a busy machine or an exceeded `--max-overhead-p99`.
fn conclude(report: &Report) -> Result<(), Exit> {
    let servers = &report.around.options.servers;
    for (server, counts) in servers.iter().zip(&report.run.counts) {
        if let Some(first) = &counts.first_failure {
            return Err(Exit::runtime(format!(
                "ringside-bench: {} of {} requests failed; {}: {first}",
                report.run.failures(),
                u64::from(report.run.rounds) * servers.len() as u64,
                server.name
            )));
        }
    }
    if report.rounds_complete == 0 {
        return Err(Exit::runtime("ringside-bench: no round was complete"));
    }
    if report.sequence.is_wrong() {
        let first = report.sequence.first.as_deref().unwrap_or("see the report");
        return Err(Exit::runtime(format!(
            "ringside-bench: responses differ where they must be equal; {first}"
        )));
    }
    if let Some(reason) = report.busy.as_ref().filter(|_| !report.concludes()) {
        return Err(Exit::runtime(format!(
            "ringside-bench: no conclusion, because the machine was busy: {reason}; repeat the run, \
             or conclude anyway with --allow-busy"
        )));
    }
    match &report.gate {
        Some(gate) if gate.verdict == Verdict::Exceeded => Err(Exit::runtime(format!(
            "ringside-bench: gate not met: --max-overhead-p99: {} adds {} to the p99 of the \
             {} (at least {} with 97.5 % confidence), the limit is {}",
            servers.get(1).map_or("the proxy", Server::phrase),
            show_signed_ns(gate.p99.estimate),
            gate.metric,
            show_signed_ns(gate.p99.low),
            show_ns(nanos(gate.limit) as f64)
        ))),
        // `--quiet` omits the table, but a script must still learn that the gate is undecided.
        Some(gate) if gate.verdict == Verdict::Undecided && report.around.options.quiet => {
            let text =
                "ringside-bench: warning: --max-overhead-p99 is undecided; use more requests";
            let _ = writeln!(io::stderr().lock(), "{text}");
            Ok(())
        }
        Some(_) | None => Ok(()),
    }
}

/// Observes other programs before the run. Returns an error if they use CPUs that the measurement
/// needs, unless `--allow-busy` is given.
fn look(options: &Options) -> Result<Look, Exit> {
    let look = Look::take(Duration::from_millis(LOOK_BEFORE_MS), options.cpu)
        .map_err(|error| Exit::runtime(format!("ringside-bench: {error}")))?;
    match look.reason() {
        Some(reason) if !options.allow_busy => Err(Exit::runtime(format!(
            "ringside-bench: the machine is busy: {reason}; nothing was measured; wait until it is \
             idle, or measure anyway with --allow-busy"
        ))),
        Some(reason) if !options.quiet => {
            let text = format!("ringside-bench: warning: the machine is busy: {reason}");
            let _ = writeln!(io::stderr().lock(), "{text}");
            Ok(look)
        }
        Some(_) | None => Ok(look),
    }
}

/// Returns an error if the requested number of rounds can result in more than `GAPS_MAX` gaps
/// between events per side. Always succeeds if the length of the run is given as a time.
fn check_gaps(options: &Options) -> Result<(), Exit> {
    let Length::Rounds(rounds) = options.length else {
        return Ok(());
    };
    let gaps = rounds.saturating_mul(u64::from(options.tokens_max - 1));
    let gaps_max = crate::limits::GAPS_MAX as u64;
    if gaps > gaps_max {
        return Err(Exit::usage(format!(
            "ringside-bench: --requests {rounds} times --max-tokens {} exceeds the {gaps_max} \
             gaps that are kept; lower one of them",
            options.tokens_max
        )));
    }
    Ok(())
}

pub(crate) fn check_cpu(cpu: Option<usize>) -> Result<(), Exit> {
    let allowed = core_affinity::get_core_ids().unwrap_or_default();
    match cpu {
        Some(cpu) if allowed.iter().all(|core| core.id != cpu) => {
            let names: Vec<String> = allowed.iter().map(|core| core.id.to_string()).collect();
            Err(Exit::config(format!(
                "ringside-bench: --cpu {cpu} is not a CPU that this process may use ({})",
                names.join(", ")
            )))
        }
        Some(_) | None => Ok(()),
    }
}

pub(crate) fn create(option: &str, path: &Path) -> Result<File, Exit> {
    File::create(path).map_err(|error| {
        let path = path.display();
        Exit::config(format!(
            "ringside-bench: {option}: cannot write {path}: {error}"
        ))
    })
}

pub(crate) fn write(option: &str, mut to: impl Write, text: &str) -> Result<(), Exit> {
    to.write_all(text.as_bytes())
        .and_then(|()| to.flush())
        .map_err(|error| Exit::runtime(format!("ringside-bench: {option}: {error}")))
}

/// Resolves the host names, queries the model if none is given, and prepares the requests. Returns
/// the parameters of the run, the model's name and the length of the prompt in bytes.
fn setup(options: &Options) -> Result<(Setup, String, usize), Exit> {
    let failed = |text: String| Exit::runtime(format!("ringside-bench: {text}"));
    let peers: Vec<Peer> = (options.servers.iter())
        .map(|server| peer(server, options.insecure))
        .collect::<Result<_, _>>()?;
    let direct = options.servers.first().zip(peers.first());
    let (server, peer) = direct.ok_or_else(|| failed("no engine".to_owned()))?;
    let model = match &options.model {
        Some(model) => model.clone(),
        None if peer.secure.is_some() => {
            return Err(failed(
                "--direct uses TLS; set the model with --model".to_owned(),
            ));
        }
        None => first_model(peer.addr, &server.target.authority(), &options.fields[0])
            .map_err(failed)?,
    };
    let prompt = options
        .prompt
        .clone()
        .unwrap_or_else(|| prompt_of(options.prompt_tokens));
    let prompt_bytes = prompt.len();
    let question = Question {
        path: options.path.clone(),
        api: options.api,
        model: model.clone(),
        prompt,
        tokens_max: options.tokens_max,
        ignore_eos: options.ignore_eos,
        unique: options.unique,
    };
    let servers = options.servers.iter().enumerate();
    let fields: Vec<&[(String, String)]> = servers
        .map(|(side, _)| options.fields[side.min(1)].as_slice())
        .collect();
    let hosts = options
        .servers
        .iter()
        .map(|server| server.target.authority());
    let hosts: Vec<String> = hosts.collect();
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let setup = Setup {
        requests: Requests::new(&question, &hosts, &fields),
        peers,
        load: options.load,
        until: match options.length {
            Length::Rounds(rounds) => Until::Rounds(rounds),
            Length::Time(time) => Until::Ns(nanos(time)),
        },
        warmup: options.warmup,
        seed: options.seed,
        // Not derived from the seed: a repeated run must not find its own prompts in a cache.
        salt: now.map_or(0, nanos),
        silence_max: options.timeout,
        busy_poll: options.busy_poll,
        cpu: options.cpu,
    };
    Ok((setup, model, prompt_bytes))
}

/// Resolves the host name of a server and prepares its TLS configuration.
fn peer(server: &Server, insecure: bool) -> Result<Peer, Exit> {
    let (name, target) = (&server.name, &server.target);
    let secure = target.tls.then(|| Secure::new(&target.host, insecure));
    let secure = secure.transpose();
    Ok(Peer {
        name: name.clone(),
        addr: resolve(name, target)?,
        secure: secure.map_err(|text| Exit::runtime(format!("ringside-bench: {name}: {text}")))?,
    })
}

/// Resolves the host name of `target` and returns its first address. IPv4 is preferred, since
/// engines listen on 0.0.0.0 by default. Error messages start with `name`.
pub(crate) fn resolve(name: &str, target: &Target) -> Result<SocketAddr, Exit> {
    let found = (target.host.as_str(), target.port).to_socket_addrs();
    let mut addrs: Vec<SocketAddr> = found
        .map_err(|error| {
            Exit::runtime(format!(
                "ringside-bench: {name}: cannot resolve {}: {error}",
                target.host
            ))
        })?
        .collect();
    addrs.sort_by_key(SocketAddr::is_ipv6);
    addrs.first().copied().ok_or_else(|| {
        Exit::runtime(format!(
            "ringside-bench: {name}: {} has no address",
            target.host
        ))
    })
}

/// Measures the client's precision and performs the run, on a separate thread that does nothing
/// else. The calling thread shows the progress.
fn measure(setup: &Setup, options: &Options) -> Result<(Precision, Run), Exit> {
    let progress = AtomicU64::new(0);
    let failed = |text: String| Exit::runtime(format!("ringside-bench: {text}"));
    thread::scope(|scope| {
        let (sender, ended) = mpsc::sync_channel(1);
        let (progress, cpu) = (&progress, options.cpu);
        let thread = thread::Builder::new().name("client".to_owned());
        let spawned = thread.spawn_scoped(scope, move || {
            let _ = sender.send(on_cpu(cpu).and_then(|()| {
                let precision = Precision::measure().map_err(|error| error.to_string())?;
                let run = client::run(setup, progress).map_err(|error| error.to_string())?;
                Ok((precision, run))
            }));
        });
        spawned.map_err(|error| failed(error.to_string()))?;
        let mut shown = Progress::new(options);
        let begun = Instant::now();
        loop {
            match ended.recv_timeout(PROGRESS_LOOK) {
                Ok(result) => {
                    shown.finish();
                    return result.map_err(failed);
                }
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    shown.show(progress.load(Ordering::Relaxed), begun.elapsed());
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(failed(
                        "the client thread ended without a result".to_owned(),
                    ));
                }
            }
        }
    })
}

pub(crate) fn on_cpu(cpu: Option<usize>) -> Result<(), String> {
    match cpu {
        Some(id) if !core_affinity::set_for_current(core_affinity::CoreId { id }) => {
            Err(format!("--cpu {id}: cannot pin the thread"))
        }
        Some(_) | None => Ok(()),
    }
}
