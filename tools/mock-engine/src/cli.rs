//! Command line of the `mock-engine` binary and of `ringside mock`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use crate::config::{EngineConfig, Role};
use crate::engine::Engine;
use crate::kv::{BlockBook, EngineIds, KvContract, Meetings, Mooncake, Store};
use crate::listener::Place;
use crate::tls::Tls;

const HELP: &str = "\
A mock vLLM server: the HTTP API of an engine, without a model.

usage: mock-engine --port P [options]
       mock-engine --uds PATH [options]

  --port P                 TCP port to listen on; rank r listens on P + r
  --host H                 IP address to listen on (127.0.0.1)
  --uds PATH               Unix socket to listen on, or @name for an abstract
                           socket; {rank} is replaced by the rank's number
  --role ROLE              prefill, decode, both or encoder (both)
  --contract NAME          KV connector whose requests are checked: nixlv2,
                           shared-storage, sglang, mooncake, offloading, nixl
                           or lmcache (nixlv2)
  --engine-ids A,B         engine ids to return from Mooncake's GET /query
  --ttft TIME              time from the request to the first token (20ms)
  --itl TIME               time from one token to the next (5ms)
  --tokens N               tokens in a response; the request's limit lowers
                           it (32)
  --model NAME             model name in responses (mock-model)
  --data-parallel-size N   start one engine for each of N ranks (1)
  --tls-cert FILE          enable TLS on the port with this certificate chain
                           (PEM)
  --tls-key FILE           private key for --tls-cert (PEM)
  --lenient                do not check the members of prefill requests and of
                           kv_transfer_params (nixlv2 only)
  --no-echo                respond 404 to unknown paths; without this option
                           the response describes the request
  --help                   print this help

TIME is a number followed by ms, us or s; a bare number is in milliseconds.

  GET  /mock/requests      list the received requests
  POST /mock/fault         set a fault for the next requests, for example
                           {\"fault\":\"reset_before_head\",\"times\":1,\"path\":null}
";

/// The settings that the command line requests.
#[derive(Clone, Debug)]
struct Options {
    config: EngineConfig,
    place: Place,
    ranks: u32,
}

enum Parsed {
    Run(Box<Options>),
    Help,
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
        Ok(Parsed::Run(options)) => options,
        Ok(Parsed::Help) => {
            print!("{HELP}");
            return 0;
        }
        Err(message) => {
            eprintln!("mock-engine: {message}\n\n{HELP}");
            return 2;
        }
    };
    let Options {
        config,
        place,
        ranks,
    } = *options;
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

/// The options that take a value.
const VALUED: [&str; 13] = [
    "--port",
    "--host",
    "--uds",
    "--role",
    "--contract",
    "--engine-ids",
    "--ttft",
    "--itl",
    "--tokens",
    "--model",
    "--tls-cert",
    "--tls-key",
    "--data-parallel-size",
];

fn parse(mut args: impl Iterator<Item = String>) -> Result<Parsed, String> {
    let mut config = EngineConfig {
        ttft: Duration::from_millis(20),
        itl: Duration::from_millis(5),
        // `GET /mock/requests` does not include bodies, so there is no need to keep them.
        keep_body_bytes: 0,
        keep_json: false,
        log_requests_max: 1_000,
        ..EngineConfig::default()
    };
    let mut host = None;
    let mut port = None;
    let mut uds = None;
    let mut tls = (None, None);
    let mut ranks = 1;
    while let Some(arg) = args.next() {
        let (name, inline) = match arg.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (arg, None),
        };
        match name.as_str() {
            "--help" | "-h" => return Ok(Parsed::Help),
            "--lenient" if inline.is_none() => {
                config.strict = false;
                continue;
            }
            "--no-echo" if inline.is_none() => {
                config.echo = false;
                continue;
            }
            known if VALUED.contains(&known) => {}
            _ => return Err(format!("{name}: unknown option")),
        }
        let value = inline
            .or_else(|| args.next())
            .ok_or_else(|| format!("{name}: requires a value"))?;
        let wrong = |want: &str| format!("{name}: {value:?} is not {want}");
        match name.as_str() {
            "--port" => port = Some(value.parse().map_err(|_| wrong("a port"))?),
            "--host" => host = Some(value.parse().map_err(|_| wrong("an IP address"))?),
            "--uds" => uds = Some(value),
            "--role" => config.role = role(&value).ok_or_else(|| wrong("a role"))?,
            "--contract" => {
                config.contract = contract(&value).ok_or_else(|| wrong("a contract"))?;
            }
            "--engine-ids" => config.bootstrap = Some(engine_ids(&value)),
            "--ttft" => config.ttft = time(&value).ok_or_else(|| wrong("a time"))?,
            "--itl" => config.itl = time(&value).ok_or_else(|| wrong("a time"))?,
            "--tokens" => config.tokens = value.parse().map_err(|_| wrong("a number"))?,
            "--model" => config.model = value,
            "--tls-cert" => tls.0 = Some(value),
            "--tls-key" => tls.1 = Some(value),
            _ => ranks = value.parse().map_err(|_| wrong("a number"))?,
        }
    }
    if let (KvContract::Mooncake(terms), Some(ids)) = (&mut config.contract, &config.bootstrap) {
        terms.engines = ids.clone();
    }
    config.tls = tls_of(tls)?;
    Ok(Parsed::Run(Box::new(Options {
        config,
        place: place(host, port, uds)?,
        ranks,
    })))
}

/// Loads the TLS configuration from the files of a certificate chain and its private key. Returns
/// `Ok(None)` if neither file is given, and an error message if only one is given or if they cannot
/// be loaded.
fn tls_of(files: (Option<String>, Option<String>)) -> Result<Option<Tls>, String> {
    match files {
        (None, None) => Ok(None),
        (Some(chain), Some(key)) => {
            let tls = Tls::from_files(chain.as_ref(), key.as_ref());
            let tls = tls.map_err(|error| format!("--tls-cert, --tls-key: {error}"))?;
            Ok(Some(tls))
        }
        _ => Err("--tls-cert and --tls-key must be used together".to_owned()),
    }
}

/// Returns the listen address that `--host`, `--port` and `--uds` specify. Returns an error message
/// if neither `--port` nor `--uds` is given, if `--uds` is combined with one of the others, or if
/// its path is empty.
fn place(host: Option<IpAddr>, port: Option<u16>, uds: Option<String>) -> Result<Place, String> {
    let host_or_default = host.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    match (uds, port) {
        (Some(_), Some(_)) => Err("--uds: cannot be used with --port".to_owned()),
        (Some(_), None) if host.is_some() => Err("--uds: cannot be used with --host".to_owned()),
        (Some(path), None) if path.is_empty() || path == "@" => {
            Err("--uds: requires a path".to_owned())
        }
        (Some(path), None) => Ok(Place::Unix(path)),
        (None, Some(port)) => Ok(SocketAddr::new(host_or_default, port).into()),
        (None, None) => Err("--port or --uds is required".to_owned()),
    }
}

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

/// Parses the value of `--contract`. Returns `None` if no contract has this name.
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

/// Parses a duration such as `20ms`, `500us`, `1.5s` or a bare number of milliseconds. Returns
/// `None` for any other text.
fn time(text: &str) -> Option<Duration> {
    let (number, scale) = if let Some(number) = text.strip_suffix("ms") {
        (number, 1e-3)
    } else if let Some(number) = text.strip_suffix("us") {
        (number, 1e-6)
    } else if let Some(number) = text.strip_suffix('s') {
        (number, 1.0)
    } else {
        (text, 1e-3)
    };
    let seconds = number.parse::<f64>().ok()? * scale;
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(line: &str) -> Result<Parsed, String> {
        parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn parses_a_full_command_line() {
        let line = "--port=9 --role prefill --ttft 1.5s --itl 500us --tokens 7 \
                    --data-parallel-size 2 --host 0.0.0.0 --lenient --contract mooncake \
                    --engine-ids a,b";
        let Ok(Parsed::Run(got)) = options(line) else {
            panic!("rejected")
        };
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
        let Ok(Parsed::Run(got)) = options("--uds /run/{rank}.sock --data-parallel-size 2") else {
            panic!("rejected")
        };
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
            "--uds",
            "--uds=",
            "--uds /a --port 1",
            "--uds /a --host 127.0.0.1",
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
        assert!(matches!(options("--port 1 --help"), Ok(Parsed::Help)));
    }
}
