//! Command line of the `mock-engine` binary and of `ringside mock`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command, Error, value_parser};
use tokio::signal::unix::{SignalKind, signal};

use crate::config::{EngineConfig, Role};
use crate::engine::Engine;
use crate::fault_page;
use crate::kv::{BlockBook, EngineIds, KvContract, Meetings, Mooncake, Store};
use crate::listener::Place;
use crate::pace::Jitter;
use crate::tls::Tls;

/// The settings that the command line requests.
#[derive(Clone, Debug)]
struct Options {
    config: EngineConfig,
    place: Place,
    ranks: u32,
}

/// Runs engines as the command line specifies, until SIGINT or SIGTERM.
///
/// `args` does not include the program's name. Returns the exit code: 0 after one of these signals
/// and after `--help`, 2 if the command line is invalid or an engine cannot be started.
#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "command-line output is for people"
)]
pub fn run_cli(args: impl Iterator<Item = String>) -> u8 {
    let options = match parse(args) {
        Ok(options) => options,
        Err(error) => {
            // A closed standard stream changes nothing: the code is returned anyway.
            let _ = error.print();
            return if error.use_stderr() { 2 } else { 0 };
        }
    };
    let Options {
        config,
        place,
        ranks,
    } = options;
    let named = place.to_string();
    let served = serve(|| {
        let engines = Engine::start_ranks_on(config, place, ranks)?;
        for engine in &engines {
            println!("mock-engine: listening on {}", engine.place());
        }
        Ok(engines)
    });
    match served {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("mock-engine: {named}: {error}");
            2
        }
    }
}

/// Starts the engines and drops them on SIGINT or SIGTERM, which also removes socket files.
fn serve(start: impl FnOnce() -> io::Result<Vec<Engine>>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        // Install the handlers first: once an engine listens, a signal may arrive at any time.
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let _engines = start()?;
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
        Ok(())
    })
}

fn parse(args: impl Iterator<Item = String>) -> Result<Options, Error> {
    let mut matches = command().try_get_matches_from(args)?;
    let mut config = EngineConfig {
        strict: !matches.get_flag("lenient"),
        echo: matches.get_flag("echo"),
        look_alike: true,
        check_model: !matches.get_flag("any-model"),
        tls: tls(&matches)?,
        // `GET /mock/requests` does not include bodies, so there is no need to keep them.
        keep_body_bytes: 0,
        keep_json: false,
        log_requests_max: 1_000,
        ..EngineConfig::default()
    };
    let place = place(&matches);
    set(&mut config.role, &mut matches, "role");
    set(&mut config.contract, &mut matches, "contract");
    set(&mut config.ttft, &mut matches, "ttft");
    set(&mut config.itl, &mut matches, "itl");
    set(&mut config.jitter, &mut matches, "jitter");
    set(&mut config.seed, &mut matches, "seed");
    set(&mut config.tokens, &mut matches, "tokens");
    set(&mut config.model, &mut matches, "model");
    config.bootstrap = matches.remove_one("engine-ids");
    if let (KvContract::Mooncake(terms), Some(ids)) = (&mut config.contract, &config.bootstrap) {
        terms.engines = ids.clone();
    }
    let mut ranks = 1;
    set(&mut ranks, &mut matches, "data-parallel-size");
    Ok(Options {
        config,
        place,
        ranks,
    })
}

/// Assigns the value of the option `name`, or its default value, to `setting`.
fn set<T: Clone + Send + Sync + 'static>(setting: &mut T, matches: &mut ArgMatches, name: &str) {
    if let Some(value) = matches.remove_one(name) {
        *setting = value;
    }
}

fn command() -> Command {
    let roles = PossibleValuesParser::new(ROLES).try_map(|name| role(&name).ok_or("no such role"));
    let contracts = PossibleValuesParser::new(CONTRACTS)
        .try_map(|name| contract(&name).ok_or("no such contract"));
    Command::new("mock-engine")
        .about("A mock vLLM server: the HTTP API of an engine, without a model")
        .after_help(format!("{AFTER_HELP}{}", fault_page::help()))
        .no_binary_name(true)
        .args_override_self(true)
        .group(ArgGroup::new("place").args(["port", "uds"]).required(true))
        .args([
            valued(
                "port",
                "P",
                "TCP port to listen on; rank r listens on P + r",
            )
            .value_parser(value_parser!(u16)),
            valued("host", "H", "IP address to listen on [default: 127.0.0.1]")
                .value_parser(value_parser!(IpAddr)),
            valued("uds", "PATH", UDS_HELP)
                .value_parser(socket)
                .conflicts_with("host"),
            valued("role", "ROLE", "Legs of split requests to accept")
                .value_parser(roles)
                .default_value("both"),
            valued(
                "contract",
                "NAME",
                "KV connector whose requests are checked",
            )
            .value_parser(contracts)
            .default_value("nixlv2"),
            valued(
                "engine-ids",
                "A,B",
                "Engine ids to return from Mooncake's GET /query",
            )
            .value_parser(|list: &str| Ok::<_, String>(engine_ids(list))),
            valued(
                "tokens",
                "N",
                "Tokens in a response; the request's limit lowers it",
            )
            .value_parser(value_parser!(u32))
            .default_value("32"),
            valued("model", "NAME", "Model name in responses").default_value("mock-model"),
            valued(
                "data-parallel-size",
                "N",
                "Start one engine for each of N ranks",
            )
            .value_parser(value_parser!(u32))
            .default_value("1"),
        ])
        .args(timing_args())
        .args(tls_args())
        .args([
            flag("lenient", LENIENT_HELP),
            flag("echo", ECHO_HELP),
            flag("any-model", ANY_MODEL_HELP),
        ])
}

fn timing_args() -> [Arg; 4] {
    [
        valued("ttft", "TIME", "Time from the request to the first token")
            .value_parser(time)
            .default_value("20ms"),
        valued("itl", "TIME", "Time from one token to the next")
            .value_parser(time)
            .default_value("5ms"),
        valued("jitter", "J", JITTER_HELP).value_parser(jitter),
        valued(
            "seed",
            "N",
            "Seed of the random deviations of --jitter [default: 0]",
        )
        .value_parser(value_parser!(u64)),
    ]
}

fn tls_args() -> [Arg; 2] {
    [
        valued(
            "tls-cert",
            "FILE",
            "Enable TLS on the port with this certificate chain (PEM)",
        )
        .requires("tls-key"),
        valued("tls-key", "FILE", "Private key for --tls-cert (PEM)").requires("tls-cert"),
    ]
}

fn valued(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name(value).help(help)
}

fn flag(name: &'static str, help: &'static str) -> Arg {
    let arg = Arg::new(name).long(name).help(help);
    arg.action(ArgAction::SetTrue)
}

const UDS_HELP: &str = "\
Unix socket to listen on, or @name for an abstract socket; {rank} is
replaced by the rank's number";
const JITTER_HELP: &str = "\
Largest random deviation of --ttft and of each --itl: a TIME, or a
percentage of them such as 20%";
const LENIENT_HELP: &str = "\
Do not check the members of prefill requests and of kv_transfer_params
(nixlv2 only)";
const ECHO_HELP: &str = "\
Respond to unknown paths with a description of the request instead of 404";
const ANY_MODEL_HELP: &str = "\
Accept requests for every model; without this option, only --model exists";
const AFTER_HELP: &str = r#"TIME is a number followed by ms, us or s; a bare number is in milliseconds.

  GET  /mock/requests   list the received requests
  POST /mock/fault      set a fault for the next requests, for example
                        {"fault":"reset_before_head","times":1,"path":"/v1/completions"}

Members of the body of POST /mock/fault:
  fault     one of the list below
  times     number of requests to apply it to [default: 1]; 4294967295: all
  path      apply it only to requests to this path (without the query)
  contains  apply it only to API requests whose body contains this text
  clear     true: first remove all pending faults
  release   true: let the requests that hold and held_status delay continue

Faults apply to any path except /version and those under /mock/. They are:
"#;

/// Loads the TLS configuration from the files that the command line names. Returns `Ok(None)` if it
/// names none.
fn tls(matches: &ArgMatches) -> Result<Option<Tls>, Error> {
    let file = |name| matches.get_one::<String>(name).map(Path::new);
    let (Some(chain), Some(key)) = (file("tls-cert"), file("tls-key")) else {
        return Ok(None);
    };
    let failed = |error| {
        let text = format!("--tls-cert, --tls-key: {error}");
        command().error(ErrorKind::Io, text)
    };
    Tls::from_files(chain, key).map(Some).map_err(failed)
}

/// Returns the listen address that `--host`, `--port` and `--uds` specify.
fn place(matches: &ArgMatches) -> Place {
    if let Some(path) = matches.get_one::<String>("uds") {
        return Place::Unix(path.clone());
    }
    let host = matches.get_one("host").copied();
    let port = matches.get_one("port").copied().unwrap_or_default();
    SocketAddr::new(host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST)), port).into()
}

fn socket(path: &str) -> Result<String, &'static str> {
    match path {
        "" | "@" => Err("not a path"),
        path => Ok(path.to_owned()),
    }
}

const ROLES: [&str; 4] = ["prefill", "decode", "both", "encoder"];

fn role(text: &str) -> Option<Role> {
    match text {
        "prefill" => Some(Role::Prefill),
        "decode" => Some(Role::Decode),
        "both" => Some(Role::Both),
        "encoder" => Some(Role::Encoder),
        _ => None,
    }
}

fn engine_ids(list: &str) -> EngineIds {
    EngineIds::new(&list.split(',').collect::<Vec<_>>())
}

const CONTRACTS: [&str; 7] = [
    "nixlv2",
    "shared-storage",
    "sglang",
    "mooncake",
    "offloading",
    "nixl",
    "lmcache",
];

/// Returns a new contract of one of the [`CONTRACTS`], or `None` if there is no such contract.
///
/// The prefill and the decode engine are expected to run in separate processes. The response to a
/// decode leg therefore does not wait for the prefill leg, and NIXL version 1 handoffs are not
/// verified.
/// There is no name for `MoRI-IO` because its contract needs further settings.
fn contract(text: &str) -> Option<KvContract> {
    Some(match text {
        "nixlv2" => KvContract::Nixlv2,
        "shared-storage" => KvContract::SharedStorage(Store::new()),
        "sglang" => KvContract::Sglang(Meetings::apart()),
        "mooncake" => KvContract::Mooncake(Mooncake {
            meetings: Meetings::apart(),
            ..Mooncake::default()
        }),
        "offloading" => KvContract::Offloading(Meetings::apart()),
        "nixl" => KvContract::NixlV1(BlockBook::apart()),
        "lmcache" => KvContract::Lmcache,
        _ => return None,
    })
}

/// Parses a duration such as `20ms`, `500us`, `1.5s` or a bare number of milliseconds.
fn time(text: &str) -> Result<Duration, String> {
    let (number, scale) = if let Some(number) = text.strip_suffix("ms") {
        (number, 1e-3)
    } else if let Some(number) = text.strip_suffix("us") {
        (number, 1e-6)
    } else if let Some(number) = text.strip_suffix('s') {
        (number, 1.0)
    } else {
        (text, 1e-3)
    };
    let seconds = number.parse::<f64>().map_err(|_| "not a time")? * scale;
    Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
}

/// Parses a percentage from 0% to 100%, or a duration.
fn jitter(text: &str) -> Result<Jitter, String> {
    let Some(number) = text.strip_suffix('%') else {
        return time(text).map(Jitter::Time);
    };
    match number.parse::<f64>() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(Jitter::Share(percent / 100.0)),
        Ok(_) | Err(_) => Err("not a percentage from 0% to 100%".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Result<Options, Error> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn parses_a_full_command_line() {
        let line = "--port=9 --role prefill --ttft 1.5s --itl 500us --tokens 7 \
                    --data-parallel-size 2 --host 0.0.0.0 --lenient --contract mooncake \
                    --engine-ids a,b";
        let got = options(line).unwrap();
        assert_eq!(got.config.role, Role::Prefill);
        assert_eq!(got.config.ttft, Duration::from_millis(1_500));
        assert_eq!(got.config.itl, Duration::from_micros(500));
        assert_eq!(
            (got.config.tokens, got.ranks, got.config.strict),
            (7, 2, false)
        );
        assert_eq!(got.place.to_string(), "0.0.0.0:9");
        assert!(matches!(got.config.contract, KvContract::Mooncake(_)));
        assert!(got.config.bootstrap.is_some());
        let got = options("--uds /run/{rank}.sock --data-parallel-size 2").unwrap();
        let ranks = [0, 1].map(|rank| got.place.of_rank(rank, got.ranks).unwrap().to_string());
        assert_eq!(ranks, ["unix:/run/0.sock", "unix:/run/1.sock"]);
    }

    #[test]
    fn invalid_command_lines_exit_2() {
        for line in [
            "",
            "--port",
            "--port x",
            "--port 1 --role y",
            "--port 1 --contract y",
            "--port 1 --ttft -1",
            "--port 1 --jitter 101%",
            "--port 1 --jitter x%",
            "--port 1 --jitter x",
            "--port 1 --seed -1",
            "--uds",
            "--uds=",
            "--uds /a --port 1",
            "--uds /a --host 127.0.0.1",
            "--port 1 --tls-cert /a",
            "--port 1 --tls-key /a",
            "--port 1 --tls-cert /nonexistent/a --tls-key /nonexistent/b",
            "--port 1 --lenient=1",
            "--uds /nonexistent/a --data-parallel-size 2",
            "--uds /nonexistent/a",
            "--z 1",
        ] {
            assert_eq!(
                run_cli(line.split_whitespace().map(str::to_owned)),
                2,
                "{line}"
            );
        }
        let help = options("--port 1 --help").unwrap_err();
        assert_eq!(help.kind(), ErrorKind::DisplayHelp);
        assert_eq!(run_cli(["-h".to_owned()].into_iter()), 0);
    }

    #[test]
    fn the_command_is_consistent() {
        command().debug_assert();
        for name in ROLES {
            assert!(role(name).is_some(), "{name}");
        }
        for name in CONTRACTS {
            assert!(contract(name).is_some(), "{name}");
        }
        let defaults = options("--port 1 --port 2 --tokens 3 --tokens 4").unwrap();
        assert_eq!(defaults.place.to_string(), "127.0.0.1:2");
        assert_eq!((defaults.config.tokens, defaults.ranks), (4, 1));
        assert_eq!(defaults.config.ttft, Duration::from_millis(20));
        assert_eq!(defaults.config.itl, Duration::from_millis(5));
        assert_eq!(defaults.config.jitter, Jitter::None);
        for (text, want) in [
            ("20%", Jitter::Share(0.2)),
            ("2ms", Jitter::Time(Duration::from_millis(2))),
        ] {
            let got = options(&format!("--port 1 --jitter {text} --seed 7")).unwrap();
            assert_eq!((got.config.jitter, got.config.seed), (want, 7));
        }
    }
}
