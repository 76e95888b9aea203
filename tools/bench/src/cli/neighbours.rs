//! Command line of `ringside-bench neighbours`.

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::{Output, number, option, switch, time_of, wrong};
use crate::exit::Exit;
use crate::limits::{
    BULK_CONNECTIONS, DOWNLOAD_BYTES, NEIGHBOURS_ROUNDS_MAX, PIPELINED_REQUESTS, QUIET_INTERVAL_MS,
    QUIET_STREAMS, SMALL_CONNECTIONS, UPLOAD_BYTES,
};

/// The load that other clients of a proxy cause while the quiet streams are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attack {
    /// There are no other clients.
    None,
    /// Large request bodies.
    Uploads,
    /// Large response bodies.
    Downloads,
    /// Many connections with several small requests each.
    Pipelining,
    /// TLS handshakes that are abandoned after the server's first bytes.
    Handshakes,
    /// Connections that are reset immediately after the request.
    Resets,
}

impl Attack {
    /// All attacks, in the order of the report.
    pub const ALL: [Self; 6] = [
        Self::None,
        Self::Uploads,
        Self::Downloads,
        Self::Pipelining,
        Self::Handshakes,
        Self::Resets,
    ];

    /// Returns the name of the attack on the command line and in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Uploads => "uploads",
            Self::Downloads => "downloads",
            Self::Pipelining => "pipelining",
            Self::Handshakes => "handshakes",
            Self::Resets => "resets",
        }
    }

    fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|attack| attack.name() == name)
    }
}

/// A proxy to measure.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxy {
    /// Name in the report.
    pub name: String,
    /// Address that accepts plain HTTP.
    pub addr: SocketAddr,
    /// Address that accepts TLS; `None` to skip the attack with handshakes.
    pub tls: Option<SocketAddr>,
}

impl Proxy {
    /// Returns the address to which `attack` connects; `None` if this proxy does not have it.
    #[must_use]
    pub const fn target(&self, attack: Attack) -> Option<SocketAddr> {
        match attack {
            Attack::Handshakes => self.tls,
            Attack::None
            | Attack::Uploads
            | Attack::Downloads
            | Attack::Pipelining
            | Attack::Resets => Some(self.addr),
        }
    }

    /// Parses `NAME=ADDR` or `NAME=ADDR,tls=ADDR`.
    fn of(text: &str) -> Option<Self> {
        let (name, rest) = text.split_once('=')?;
        let (addr, tls) = match rest.split_once(',') {
            Some((addr, more)) => {
                let tls: SocketAddr = more.strip_prefix("tls=")?.parse().ok()?;
                (addr, Some(tls))
            }
            None => (rest, None),
        };
        (!name.is_empty()).then_some(Self {
            name: name.to_owned(),
            addr: addr.parse().ok()?,
            tls,
        })
    }
}

/// Options of `ringside-bench neighbours`.
#[derive(Clone, Debug, PartialEq)]
pub struct NeighboursOptions {
    /// Address on which this tool runs the engine.
    pub listen: SocketAddr,
    /// The proxies, which forward to `listen`.
    pub proxies: Vec<Proxy>,
    /// The attacks, in the order of the run.
    pub attacks: Vec<Attack>,
    /// Number of rounds. In each round, every attack is made on every proxy.
    pub rounds: u32,
    /// Duration of one measurement: of one attack on one proxy.
    pub time: Duration,
    /// Number of the CPU that all threads of this tool are pinned to; `None` to leave them
    /// unpinned.
    pub cpu: Option<usize>,
    /// Destination of the JSON report; `None` to write none.
    pub json: Option<Output>,
    /// Whether to print neither the table of results nor progress.
    pub quiet: bool,
}

pub(super) fn command() -> Command {
    let after = format!(
        "TIME is a number with ms, s, m or h.\n\n\
         The tool runs an engine on --listen. In each cell (round, attack, proxy), {QUIET_STREAMS} \
         streams through the proxy and\none directly from the engine carry an event every \
         {QUIET_INTERVAL_MS} ms, each with the time at which it was sent. The\nreport compares the \
         delays of both until receipt, while other clients load the proxy:\n  \
         none        no other clients\n  \
         uploads     {BULK_CONNECTIONS} connections, each sends requests of {} MiB\n  \
         downloads   {BULK_CONNECTIONS} connections, each requests responses of {} MiB\n  \
         pipelining  {SMALL_CONNECTIONS} connections, each sends {PIPELINED_REQUESTS} small \
         requests together\n  \
         handshakes  {SMALL_CONNECTIONS} TLS connections, each reset after the server's first \
         bytes and opened again\n  \
         resets      {SMALL_CONNECTIONS} connections, each reset after its request and opened \
         again\n\
         All cells of one attack in one round follow each other, in an order that changes with \
         the round.\n\n\
         Exit codes: 0 measured; 1 a stream broke or stalled, or the run could not be completed; \
         2 usage error;\n3 invalid for this machine.",
        UPLOAD_BYTES >> 20,
        DOWNLOAD_BYTES >> 20,
    );
    Command::new("neighbours")
        .about("Measure how much proxies delay quiet streams while other clients load them")
        .after_help(after)
        .args(args())
}

fn args() -> Vec<Arg> {
    vec![
        option(
            "listen",
            "ADDR",
            "Run the engine on this IP:PORT, to which the proxies forward",
        )
        .required(true)
        .value_parser(value_parser!(SocketAddr)),
        option(
            "proxy",
            "NAME=ADDR[,tls=ADDR]",
            "A proxy: its name, its IP:PORT, and its IP:PORT for TLS",
        )
        .required(true)
        .action(ArgAction::Append),
        option("attack", "LIST", "Attacks, separated by commas")
            .value_delimiter(',')
            .value_parser(Attack::ALL.map(Attack::name))
            .default_values(Attack::ALL.map(Attack::name)),
        option("rounds", "N", "Rounds of all attacks on all proxies")
            .default_value("5")
            .value_parser(value_parser!(u32).range(1..=i64::from(NEIGHBOURS_ROUNDS_MAX))),
        option("time", "TIME", "Duration of one attack on one proxy").default_value("3s"),
        option("cpu", "N", "Pin all threads of this tool to this CPU")
            .value_parser(value_parser!(u64).range(0..1024)),
        option("json", "FILE", "Write a JSON report; - for standard output"),
        switch("quiet", "Print no table and no progress").short('q'),
    ]
}

pub(super) fn options(matches: &ArgMatches) -> Result<NeighboursOptions, Exit> {
    let mut proxies: Vec<Proxy> = Vec::new();
    for text in matches.get_many::<String>("proxy").into_iter().flatten() {
        let proxy = Proxy::of(text)
            .ok_or_else(|| wrong("--proxy", text, "NAME=IP:PORT or NAME=IP:PORT,tls=IP:PORT"))?;
        if proxies.iter().any(|other| other.name == proxy.name) {
            return Err(wrong(
                "--proxy",
                text,
                "a proxy with a name that no other has",
            ));
        }
        proxies.push(proxy);
    }
    let mut attacks: Vec<Attack> = Vec::new();
    for name in matches.get_many::<String>("attack").into_iter().flatten() {
        let attack = Attack::of(name).filter(|attack| !attacks.contains(attack));
        attacks.push(
            attack.ok_or_else(|| wrong("--attack", name, "an attack that is given only once"))?,
        );
    }
    let listen = matches.get_one::<SocketAddr>("listen").copied();
    Ok(NeighboursOptions {
        listen: listen.ok_or_else(|| wrong("--listen", "", "IP:PORT"))?,
        proxies,
        attacks,
        rounds: matches.get_one("rounds").copied().unwrap_or(5),
        time: time_of(matches, "time")?.unwrap_or(Duration::from_secs(3)),
        cpu: number(matches, "cpu").map(|cpu| cpu as usize),
        json: matches
            .get_one::<String>("json")
            .map(|name| Output::of(name)),
        quiet: matches.get_flag("quiet"),
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::cli::{Task, parse};

    fn line(more: &[&str]) -> Result<NeighboursOptions, Exit> {
        let base = ["ringside-bench", "neighbours", "--listen=127.0.0.1:1"];
        match parse(base.iter().chain(more).map(OsString::from))? {
            Task::Neighbours(options) => Ok(*options),
            Task::Overhead(_) | Task::Soak(_) => Err(Exit::usage("another command")),
        }
    }

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn defaults_and_all_options_are_parsed() {
        let options = line(&["--proxy=a=127.0.0.1:2"]).unwrap();
        assert_eq!(options.listen, addr("127.0.0.1:1"));
        assert_eq!(options.attacks, Attack::ALL);
        assert_eq!((options.rounds, options.cpu), (5, None));
        assert_eq!(options.time, Duration::from_secs(3));
        assert!(!options.quiet && options.json.is_none());
        let options = line(&[
            "--proxy=a=127.0.0.1:2,tls=127.0.0.1:3",
            "--proxy",
            "b=[::1]:4",
            "--attack=resets,none",
            "--rounds=2",
            "--time=250ms",
            "--cpu=1",
            "--json=-",
            "-q",
        ])
        .unwrap();
        let [a, b] = &options.proxies[..] else {
            panic!("{:?}", options.proxies);
        };
        assert_eq!((a.name.as_str(), a.addr), ("a", addr("127.0.0.1:2")));
        assert_eq!(a.target(Attack::Handshakes), Some(addr("127.0.0.1:3")));
        assert_eq!(a.target(Attack::Uploads), Some(a.addr));
        assert_eq!((b.addr, b.tls), (addr("[::1]:4"), None));
        assert_eq!(b.target(Attack::Handshakes), None);
        assert_eq!(options.attacks, [Attack::Resets, Attack::None]);
        assert_eq!((options.rounds, options.cpu), (2, Some(1)));
        assert_eq!(options.time, Duration::from_millis(250));
        assert_eq!(options.json, Some(Output::Stdout));
        assert!(options.quiet);
    }

    #[test]
    fn invalid_command_lines_are_rejected() {
        let proxy = "--proxy=a=127.0.0.1:2";
        for (more, part) in [
            (&[][..], "--proxy"),
            (&["--proxy=127.0.0.1:2"], "NAME=IP:PORT"),
            (&["--proxy==127.0.0.1:2"], "NAME=IP:PORT"),
            (&["--proxy=a=localhost:2"], "NAME=IP:PORT"),
            (&["--proxy=a=127.0.0.1"], "NAME=IP:PORT"),
            (&["--proxy=a=127.0.0.1:2,tls=x"], "NAME=IP:PORT"),
            (&["--proxy=a=127.0.0.1:2,127.0.0.1:3"], "NAME=IP:PORT"),
            (&[proxy, proxy], "no other has"),
            (&[proxy, "--attack=floods"], "floods"),
            (&[proxy, "--attack=none,none"], "only once"),
            (&[proxy, "--rounds=0"], "--rounds"),
            (&[proxy, "--time=3"], "a time above 0"),
            (&[proxy, "--listen=x"], "--listen"),
        ] {
            let exit = line(more).unwrap_err();
            assert_eq!(exit.code, Exit::USAGE, "{more:?}: {exit}");
            assert!(exit.message.contains(part), "{more:?}: {exit}");
        }
    }
}
