//! `ringside-bench soak`, from its options to its report. It checks that a proxy in front of mock
//! engines relays correctly under load and that its process does not grow.
//!
//! The modules are listed in dependency order.

pub mod check;
pub mod plan;
pub mod tally;
pub mod watch;

pub mod ask;
pub mod exchange;

pub mod client;

pub mod report;

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::cli::{Output, SoakOptions};
use crate::exit::Exit;
use crate::limits::{OWN_DESCRIPTORS, SETTLE_S_MAX, SOAK_PROGRESS_S};
use crate::overhead::{create, resolve, write};
use crate::precision::nanos;
use crate::socket::Poll;
use ask::RequestTemplate;
use client::Setup;
use report::{Process, Report};
use tally::Tally;
use watch::{Sample, Windows, judge, sample};

const PROGRESS_NS: u64 = SOAK_PROGRESS_S * 1_000_000_000;
/// Interval between checks of the proxy's number of open descriptors after the run.
const SETTLE_INTERVAL: Duration = Duration::from_millis(200);

/// Runs the soak test and writes its reports.
///
/// # Errors
/// If the run has no result, or its report contains a problem.
pub fn run(options: &SoakOptions) -> Result<(), Exit> {
    // Created before the run, so that an unusable path does not waste a long run.
    let json_file = match &options.json {
        Some(Output::File(path)) => Some(create("--json", path)?),
        Some(Output::Stdout) | None => None,
    };
    allow_descriptors(options.streams)?;
    let addr = resolve("proxy", &options.proxy)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let setup = Setup {
        addr,
        asking: RequestTemplate::new(
            &options.path,
            options.api,
            options.tokens,
            // Not derived from the seed: a repeated run must not find its own prompts in a cache.
            now.map_or(0, nanos),
            &options.proxy.authority(),
            &options.fields,
        ),
        streams: options.streams,
        tokens: options.tokens,
        duration: options.duration,
        abort_share: options.abort_share,
        seed: options.seed,
    };
    let report = soak(options, &setup)?;
    let text = report.text();
    let json = format!("{:#}\n", report.json());
    if let Some(file) = json_file {
        write("--json", file, &json)?;
    }
    // A closed pipe is not an error.
    if options.json == Some(Output::Stdout) {
        let _ = io::stderr().lock().write_all(text.as_bytes());
        write("--json", io::stdout().lock(), &json)?;
    } else {
        let _ = io::stdout().lock().write_all(text.as_bytes());
    }
    match report.verdict() {
        lines if lines.is_empty() => Ok(()),
        lines => Err(Exit::runtime(format!(
            "ringside-bench: soak: {}",
            lines.join("\n  ")
        ))),
    }
}

/// Raises this process's soft limit of open files to the number that `streams` connections need.
/// Returns an error if the hard limit is lower.
fn allow_descriptors(streams: usize) -> Result<(), Exit> {
    let need = streams as u64 + OWN_DESCRIPTORS;
    let mut limit = getrlimit(Resource::Nofile);
    // `None` means no limit.
    let below = |limit: Option<u64>| limit.is_some_and(|limit| limit < need);
    if !below(limit.current) {
        return Ok(());
    }
    let refused = |why: String| {
        Exit::config(format!(
            "ringside-bench: --streams {streams} needs {need} open files: {why}; raise the hard \
             limit (ulimit -Hn) or lower --streams"
        ))
    };
    if below(limit.maximum) {
        let hard = limit.maximum.unwrap_or(0);
        return Err(refused(format!("the hard limit is {hard}")));
    }
    limit.current = Some(need);
    setrlimit(Resource::Nofile, limit).map_err(|error| refused(error.to_string()))
}

fn sample_process(pid: u32, at_ns: u64) -> Result<Sample, String> {
    sample(pid, at_ns).map_err(|error| {
        let at = Duration::from_nanos(at_ns);
        format!("--pid {pid}: cannot read the process {at:.1?} after the start: {error}")
    })
}

/// Runs the client, samples the proxy's process during the run if `--pid` is given, and returns the
/// report.
fn soak(options: &SoakOptions, setup: &Setup) -> Result<Report, Exit> {
    let failed = |text: String| Exit::runtime(format!("ringside-bench: {text}"));
    let start = match options.pid {
        Some(pid) => Some(sample(pid, 0).map_err(|error| {
            Exit::config(format!(
                "ringside-bench: --pid {pid}: {error}; name a running process of this user"
            ))
        })?),
        None => None,
    };
    let own = sample(std::process::id(), 0).map_err(|error| failed(error.to_string()))?;
    let windows = Windows::of(options.duration);
    let talks = options.progress || io::stderr().is_terminal();
    let (mut sample_ns, mut progress_ns) = (0, PROGRESS_NS);
    let mut samples = Vec::new();
    let begun = Instant::now();
    let mut tick = |now: u64, tally: &Tally| {
        if let Some(pid) = options.pid
            && now >= sample_ns
        {
            samples.push(sample_process(pid, now)?);
            sample_ns = now + nanos(windows.every);
        }
        if talks && now >= progress_ns {
            progress(now, tally, samples.last());
            progress_ns = now + PROGRESS_NS;
        }
        Ok(())
    };
    let tally = client::run(setup, &mut tick).map_err(|error| failed(error.to_string()))?;
    let wall = begun.elapsed();
    let after = sample(std::process::id(), 0).map_err(|error| failed(error.to_string()))?;
    let process = match options.pid.zip(start) {
        Some((pid, start)) => Some(Process {
            pid,
            start,
            judgement: judge(&samples, windows, nanos(wall)),
            settled: settle(pid, start, begun).map_err(failed)?,
            samples,
        }),
        None => None,
    };
    Ok(Report {
        options: options.clone(),
        wall,
        tally,
        process,
        client_cpu: Duration::from_nanos(after.cpu_ns - own.cpu_ns),
    })
}

/// Waits until the proxy's process has no more open descriptors than in the sample `start`, and
/// returns the last sample. Stops waiting after [`SETTLE_S_MAX`] seconds, because a proxy may keep
/// connections to engines.
fn settle(pid: u32, start: Sample, begun: Instant) -> Result<Sample, String> {
    let mut clock = Poll::new().map_err(|error| error.to_string())?;
    let since = Instant::now();
    loop {
        let now = sample_process(pid, nanos(begun.elapsed()))?;
        let late = since.elapsed() >= Duration::from_secs(SETTLE_S_MAX);
        if now.descriptors <= start.descriptors || late {
            return Ok(now);
        }
        let waited = clock.wait(SETTLE_INTERVAL, &mut Vec::new());
        waited.map_err(|error| error.to_string())?;
    }
}

fn progress(now: u64, tally: &Tally, process: Option<&Sample>) {
    let process = process.map_or_else(String::new, |sample| {
        format!(
            ", process {} KiB and {} descriptors",
            sample.rss_bytes / 1024,
            sample.descriptors
        )
    });
    let _ = writeln!(
        io::stderr().lock(),
        "{} s: {} requests, {} chunks, {} aborted, {} failed{process}",
        now / 1_000_000_000,
        tally.begun,
        tally.chunks,
        tally.aborted(),
        tally.failures()
    );
}
