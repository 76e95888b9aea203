//! The command line: parses arguments into validated options, or returns an `Exit`. It does not
//! resolve names or open files. Without `--seed`, the seed is taken from the clock.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command, value_parser};

use crate::exit::Exit;
use crate::limits::{
    BUSY_CPUS_SHARE_MAX, CONNECTIONS_MAX, CPUS_NEEDED, PROMPT_TOKENS_MAX, RATE_MAX, RESAMPLES,
    RESPONSE_TOKENS_MAX, ROUNDS_MAX,
};
use crate::request::Api;
use crate::schedule::Load;
use crate::units::time;

mod neighbours;
mod soak;
mod target;

pub use neighbours::{Attack, NeighboursOptions, Proxy};
pub use soak::SoakOptions;
pub use target::{Server, Target};
use target::{servers, target};

/// The command to run.
#[derive(Clone, Debug, PartialEq)]
pub enum Task {
    /// Measure the latency that a proxy adds.
    Overhead(Box<Options>),
    /// Run a proxy under load for a long time and check it.
    Soak(Box<SoakOptions>),
    /// Measure how much proxies delay quiet streams while other clients load them.
    Neighbours(Box<NeighboursOptions>),
}

/// The requested length of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// The run consists of this many rounds of requests, not counting the warm-up.
    Rounds(u64),
    /// The run starts new rounds of requests for this long, counted from the start of the first
    /// round after the warm-up.
    Time(Duration),
}

/// The destination of a report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// The report is written to standard output, and the text that is otherwise printed there to
    /// standard error.
    Stdout,
    /// The report is written to the file at this path.
    File(PathBuf),
}

impl Output {
    /// Parses `-` as standard output, and anything else as a path.
    fn of(name: &str) -> Self {
        match name {
            "-" => Self::Stdout,
            name => Self::File(name.into()),
        }
    }
}

/// Options of `ringside-bench overhead`.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The engine (index 0) and the proxies in front of it.
    pub servers: Vec<Server>,
    /// Path of the requests.
    pub path: String,
    /// The API that `path` belongs to.
    pub api: Api,
    /// Model name in the requests; `None` to use the first model that the engine lists.
    pub model: Option<String>,
    /// Prompt of all requests; `None` to generate one of about `prompt_tokens` tokens.
    pub prompt: Option<String>,
    /// Approximate length of a generated prompt in tokens.
    pub prompt_tokens: u32,
    /// Whether every prompt starts with a unique tag, so that no prefix cache contains it.
    pub unique: bool,
    /// Maximum number of tokens requested in each response.
    pub tokens_max: u32,
    /// Whether requests set `ignore_eos`, so that every response reaches `tokens_max`.
    pub ignore_eos: bool,
    /// When requests are sent: in a closed loop with a number of concurrent requests, or in an open
    /// loop at a rate.
    pub load: Load,
    /// Length of the run, as a number of rounds or as a time.
    pub length: Length,
    /// Number of rounds of requests at the start of the run that are not measured.
    pub warmup: u32,
    /// Names and values of additional header fields in requests to the engine (index 0) and to the
    /// proxies (index 1).
    pub fields: [Vec<(String, String)>; 2],
    /// Time without a received byte after which a request fails.
    pub timeout: Duration,
    /// Maximum overhead at the 99th percentile, for the time to first token and for the gap between
    /// chunks, of the first proxy; `None` for no limit.
    pub overhead_p99_max: Option<Duration>,
    /// Destination of the JSON report; `None` to write none.
    pub json: Option<Output>,
    /// Path of the HTML report; `None` to write none.
    pub html: Option<PathBuf>,
    /// Seed of the random numbers that determine the order of the requests of a round, the send
    /// times in an open loop, and the bootstrap's resamples.
    pub seed: u64,
    /// Number of the CPU that the measuring thread is pinned to; `None` to leave it unpinned.
    pub cpu: Option<usize>,
    /// Whether the measuring thread polls its sockets continuously instead of sleeping.
    pub busy_poll: bool,
    /// Whether to measure and conclude although other programs use the CPUs.
    pub allow_busy: bool,
    /// Whether to print neither the table of results nor the progress.
    pub quiet: bool,
    /// Whether to accept any TLS certificate of the engine and of the proxies.
    pub insecure: bool,
}

/// Parses the command-line arguments, of which the first is the program's name.
///
/// # Errors
/// Returns the message and the exit code. Help and version are returned as exits with code 0.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Task, Exit> {
    let matches = program().try_get_matches_from(args).map_err(|error| {
        let text = error.render().to_string();
        match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Exit::said(text),
            _ => Exit::usage(text),
        }
    })?;
    match matches.subcommand() {
        Some(("overhead", matches)) => Ok(Task::Overhead(Box::new(options(matches)?))),
        Some(("soak", matches)) => Ok(Task::Soak(Box::new(soak::options(matches)?))),
        Some(("neighbours", matches)) => {
            Ok(Task::Neighbours(Box::new(neighbours::options(matches)?)))
        }
        _ => Err(Exit::usage("ringside-bench: no command given; see --help")),
    }
}

fn program() -> Command {
    Command::new("ringside-bench")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Measures LLM engines and proxies in front of them")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .subcommand(overhead())
        .subcommand(soak::command())
        .subcommand(neighbours::command())
}

fn option(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name(value).help(help)
}

fn switch(name: &'static str, help: &'static str) -> Arg {
    let action = ArgAction::SetTrue;
    Arg::new(name).long(name).action(action).help(help)
}

fn overhead() -> Command {
    let after = format!(
        "TIME is a number with ns, us, ms, s, m or h.\n\n\
         A round has one request to each side (the engine and every proxy), in random order. The \
         first proxy is\nthe one that the others are compared with. Intervals: 95 %, percentile \
         bootstrap over\nrounds, {RESAMPLES} resamples.\n\n\
         Before and after the run, and between rounds if one request runs at a time, the tool \
         observes for a moment\nwhat other programs use. If that is more than {:.0} % of the CPUs that \
         the measurement needs (at most {CPUS_NEEDED}),\nit does not conclude (--allow-busy).\n\n\
         Exit codes: 0 measured; 1 a request failed, a response was wrong, the machine was busy, \
         the run could not be\ncompleted, or the gate --max-overhead-p99 was not met; 2 usage \
         error; 3 invalid for this machine or these\nservers.\n\n\
         The gate is not met if the lower end of the interval of the p99 overhead, of the first \
         token or of the\ngaps, is above the limit. If the interval contains the limit, the exit \
         code is 0 and the report states\nthat the gate is undecided.",
        BUSY_CPUS_SHARE_MAX * 100.0
    );
    Command::new("overhead")
        .about("Measure the latency that proxies add to an engine")
        .after_help(after)
        .args(where_args())
        .args(load_args())
        .args(report_args())
        .group(ArgGroup::new("load").args(["concurrency", "rate"]))
        .group(ArgGroup::new("length").args(["requests", "duration"]))
        .group(ArgGroup::new("text").args(["prompt", "prompt-tokens"]))
}

fn where_args() -> Vec<Arg> {
    vec![
        option(
            "direct",
            "URL",
            "The engine, http://HOST:PORT or https://HOST:PORT",
        )
        .required(true),
        option(
            "proxy",
            "[NAME=]URL",
            "A proxy in front of it, http or https; repeat it for several",
        )
        .required(true)
        .action(ArgAction::Append),
        option("path", "PATH", "Path of the requests").default_value("/v1/completions"),
        option(
            "model",
            "NAME",
            "Model; the default is the engine's first model",
        ),
        option(
            "header",
            "K: V",
            "Additional field of requests to all proxies, e.g. x-prefiller-host-port",
        )
        .action(ArgAction::Append),
        option(
            "direct-header",
            "K: V",
            "Additional field of requests to the engine, e.g. authorization",
        )
        .action(ArgAction::Append),
        option("prompt", "TEXT", "Prompt of all requests"),
        option(
            "prompt-tokens",
            "N",
            "Generate a prompt of about N tokens [default: 128]",
        )
        .value_parser(value_parser!(u32).range(1..=i64::from(PROMPT_TOKENS_MAX))),
        switch(
            "unique-prompts",
            "Start every prompt with a unique tag, so that no prefix cache contains it",
        ),
        option("max-tokens", "N", "Limit of each response in tokens")
            .default_value("32")
            .value_parser(value_parser!(u32).range(1..=i64::from(RESPONSE_TOKENS_MAX))),
        switch(
            "respect-eos",
            "Do not send ignore_eos, which gives all responses the same length",
        ),
    ]
}

fn load_args() -> Vec<Arg> {
    vec![
        option(
            "concurrency",
            "C",
            "Closed loop: C concurrent requests [default: 1]",
        )
        .value_parser(value_parser!(u64).range(1..=CONNECTIONS_MAX as u64)),
        option(
            "rate",
            "R",
            "Open loop: R requests per second, on all sides together",
        )
        .value_parser(value_parser!(f64)),
        option(
            "arrivals",
            "KIND",
            "Distribution of the times between requests of the open loop",
        )
        .value_parser(["poisson", "fixed"])
        .default_value("poisson")
        .requires("rate"),
        option(
            "requests",
            "N",
            "Rounds, with one request to each side [default: 500]",
        )
        .value_parser(value_parser!(u64).range(1..=ROUNDS_MAX)),
        option("duration", "TIME", "Start new rounds for this long"),
        option("warmup", "N", "Rounds that are sent first and not measured")
            .default_value("20")
            .value_parser(value_parser!(u32).range(0..=100_000)),
        option(
            "timeout",
            "TIME",
            "Time without progress after which a request fails",
        )
        .default_value("60s"),
        option(
            "seed",
            "N",
            "Seed of the order, arrivals and resamples [default: from the clock]",
        )
        .value_parser(value_parser!(u64)),
        option("cpu", "N", "Pin the measuring thread to this CPU")
            .value_parser(value_parser!(u64).range(0..1024)),
        switch(
            "allow-busy",
            "Measure although other programs use the CPUs; the report states so",
        ),
        switch(
            "busy-poll",
            "Poll without sleeping: more precise, but needs a dedicated core",
        ),
    ]
}

fn report_args() -> Vec<Arg> {
    vec![
        option(
            "max-overhead-p99",
            "TIME",
            "Gate: exit with code 1 if the first proxy adds more than this at the 99th percentile",
        ),
        option("json", "FILE", "Write a JSON report; - for standard output"),
        option("html", "FILE", "Write an HTML report with plots"),
        switch("quiet", "Print no table and no progress").short('q'),
        switch("insecure", "Accept any certificate of an https server"),
    ]
}

fn options(matches: &ArgMatches) -> Result<Options, Exit> {
    let text = |name: &str| matches.get_one::<String>(name).cloned();
    let path = text("path").unwrap_or_default();
    let api = Api::of(&path).filter(|_| is_path(&path)).ok_or_else(|| {
        let want = "/v1/completions or /v1/chat/completions (with any prefix)";
        wrong("--path", &path, want)
    })?;
    let load = match matches.get_one::<f64>("rate").copied() {
        Some(rate) if rate > 0.0 && rate <= RATE_MAX => Load::Open {
            rate,
            poisson: text("arrivals").is_none_or(|kind| kind == "poisson"),
        },
        Some(rate) => {
            let want = format!("above 0 and at most {RATE_MAX}");
            return Err(wrong("--rate", &rate.to_string(), &want));
        }
        None => Load::Closed {
            concurrency: number(matches, "concurrency").unwrap_or(1) as usize,
        },
    };
    let length = match time_of(matches, "duration")? {
        Some(time) => Length::Time(time),
        None => Length::Rounds(number(matches, "requests").unwrap_or(500)),
    };
    Ok(Options {
        servers: servers(matches)?,
        path,
        api,
        model: text("model"),
        prompt: text("prompt"),
        prompt_tokens: matches.get_one("prompt-tokens").copied().unwrap_or(128),
        unique: matches.get_flag("unique-prompts"),
        tokens_max: matches.get_one("max-tokens").copied().unwrap_or(32),
        ignore_eos: !matches.get_flag("respect-eos"),
        load,
        length,
        warmup: matches.get_one("warmup").copied().unwrap_or(20),
        fields: [
            fields(matches, "direct-header")?,
            fields(matches, "header")?,
        ],
        timeout: time_of(matches, "timeout")?.unwrap_or(Duration::from_secs(60)),
        overhead_p99_max: time_of(matches, "max-overhead-p99")?,
        json: text("json").map(|name| Output::of(&name)),
        html: text("html").map(PathBuf::from),
        seed: number(matches, "seed").unwrap_or_else(clock_seed),
        cpu: number(matches, "cpu").map(|cpu| cpu as usize),
        busy_poll: matches.get_flag("busy-poll"),
        allow_busy: matches.get_flag("allow-busy"),
        quiet: matches.get_flag("quiet"),
        insecure: matches.get_flag("insecure"),
    })
}

/// Returns a seed from the clock, for runs without `--seed`. Every JSON report contains the seed.
fn clock_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(1, |now| u64::from(now.subsec_nanos()) ^ now.as_secs())
}

fn wrong(name: &str, value: &str, want: &str) -> Exit {
    Exit::usage(format!("ringside-bench: {name}: `{value}` is not {want}"))
}

fn number(matches: &ArgMatches, name: &str) -> Option<u64> {
    matches.get_one::<u64>(name).copied()
}

fn time_of(matches: &ArgMatches, name: &str) -> Result<Option<Duration>, Exit> {
    let Some(text) = matches.get_one::<String>(name) else {
        return Ok(None);
    };
    match time(text) {
        Some(time) if time > Duration::ZERO => Ok(Some(time)),
        _ => Err(wrong(
            &format!("--{name}"),
            text,
            "a time above 0 like 200us, 1.5ms or 30s",
        )),
    }
}

/// Returns whether `text` starts with `/` and has only visible ASCII characters, so that it can be
/// used in a request line unmodified.
fn is_path(text: &str) -> bool {
    text.starts_with('/') && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Header fields that this tool generates and the user must not set: a second one would make the
/// request ambiguous.
const OWN_FIELDS: [&str; 5] = [
    "host",
    "content-length",
    "content-type",
    "transfer-encoding",
    "connection",
];

fn fields(matches: &ArgMatches, option: &str) -> Result<Vec<(String, String)>, Exit> {
    let given = matches.get_many::<String>(option).into_iter().flatten();
    given.map(|text| field(option, text)).collect()
}

fn field(option: &str, text: &str) -> Result<(String, String), Exit> {
    let refused = |want: &str| wrong(&format!("--{option}"), text, want);
    let (name, value) = text
        .split_once(':')
        .ok_or_else(|| refused("a field like 'name: value'"))?;
    let value = value.trim();
    let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if name.is_empty() || !name.bytes().all(is_token) || value.chars().any(char::is_control) {
        return Err(refused("a field like 'name: value'"));
    }
    if OWN_FIELDS.iter().any(|own| name.eq_ignore_ascii_case(own)) {
        return Err(refused("a field that may be set: the tool generates it"));
    }
    Ok((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(more: &[&str]) -> Result<Options, Exit> {
        let base = ["ringside-bench", "overhead"];
        let args = base.iter().chain(more).map(OsString::from);
        match parse(args)? {
            Task::Overhead(options) => Ok(*options),
            Task::Soak(_) | Task::Neighbours(_) => Err(Exit::usage("another command")),
        }
    }

    fn sides(more: &[&str]) -> Result<Options, Exit> {
        let base = ["--direct", "http://a:1", "--proxy", "http://[::1]:2/"];
        line(&[&base, more].concat())
    }

    #[test]
    fn defaults() {
        let options = sides(&[]).unwrap();
        assert_eq!(
            (options.servers.iter())
                .map(|it| (it.name.as_str(), it.target.authority()))
                .collect::<Vec<_>>(),
            [("direct", "a:1".into()), ("proxy", "[::1]:2".into())]
        );
        assert_eq!(options.load, Load::Closed { concurrency: 1 });
        assert_eq!(options.length, Length::Rounds(500));
        assert_eq!((options.api, options.tokens_max), (Api::Completions, 32));
        assert_eq!((options.warmup, options.prompt_tokens), (20, 128));
        assert!(options.ignore_eos && !options.unique && !options.busy_poll);
        assert_eq!(options.overhead_p99_max, None);
    }

    #[test]
    fn all_options_are_parsed() {
        let options = sides(&[
            "--path=/v1/chat/completions",
            "--model=m",
            "--prompt=hi",
            "--unique-prompts",
            "--respect-eos",
            "--max-tokens=7",
            "--rate=2.5",
            "--arrivals=fixed",
            "--duration=1.5s",
            "--warmup=0",
            "--header=x-prefiller-host-port: h:1",
            "--header=X-B:c",
            "--direct-header=authorization: Bearer x",
            "--timeout=9s",
            "--max-overhead-p99=200us",
            "--json=-",
            "--html=x.html",
            "--seed=4",
            "--cpu=1",
            "--busy-poll",
            "--allow-busy",
            "-q",
        ])
        .unwrap();
        let load = Load::Open {
            rate: 2.5,
            poisson: false,
        };
        assert_eq!((options.load, options.api), (load, Api::Chat));
        assert_eq!(options.length, Length::Time(Duration::from_millis(1_500)));
        assert_eq!(options.fields[0][0].0, "authorization");
        assert_eq!(options.fields[1][1], ("X-B".to_owned(), "c".to_owned()));
        assert_eq!(options.overhead_p99_max, Some(Duration::from_micros(200)));
        assert_eq!(options.json, Some(Output::Stdout));
        assert_eq!((options.seed, options.cpu), (4, Some(1)));
        assert!(options.unique && !options.ignore_eos && options.busy_poll && options.quiet);
        assert!(options.allow_busy);
    }

    #[test]
    fn invalid_command_lines_are_rejected() {
        for (more, code, part) in [
            (&["--rate=0"][..], Exit::USAGE, "--rate"),
            (&["--rate=nan"], Exit::USAGE, "--rate"),
            (
                &["--rate=1", "--concurrency=2"],
                Exit::USAGE,
                "cannot be used with",
            ),
            (
                &["--requests=1", "--duration=2s"],
                Exit::USAGE,
                "cannot be used with",
            ),
            (
                &["--prompt=a", "--prompt-tokens=2"],
                Exit::USAGE,
                "cannot be used with",
            ),
            (&["--arrivals=fixed"], Exit::USAGE, "--rate"),
            (&["--requests=0"], Exit::USAGE, "--requests"),
            (&["--duration=30"], Exit::USAGE, "a time above 0"),
            (&["--max-overhead-p99=0"], Exit::USAGE, "a time above 0"),
            (&["--path=/v1/responses"], Exit::USAGE, "--path"),
            (&["--path=/v1/chat completions"], Exit::USAGE, "--path"),
            (&["--header=nocolon"], Exit::USAGE, "name: value"),
            (&["--header=a b: c"], Exit::USAGE, "name: value"),
            (&["--header=a: b\r\nc: d"], Exit::USAGE, "name: value"),
            (&["--header=Host: x"], Exit::USAGE, "the tool generates it"),
            (&["--nonsense"], Exit::USAGE, "--nonsense"),
            (&["--help"], Exit::OK, "Exit codes"),
        ] {
            let exit = sides(more).unwrap_err();
            assert_eq!(exit.code, code, "{more:?}: {exit}");
            assert!(exit.message.contains(part), "{more:?}: {exit}");
        }
        assert_eq!(line(&[]).unwrap_err().code, Exit::USAGE);
    }
}
