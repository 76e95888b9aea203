//! Command line of `ringside-bench soak`.

use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::{Output, Target, clock_seed, fields, is_path, number, option, switch, target, time_of};
use crate::exit::Exit;
use crate::limits::{
    DESCRIPTORS_GROWTH_MAX, RESPONSE_TOKENS_MAX, RSS_GROWTH_BYTES_MAX, RSS_GROWTH_SHARE_MAX,
    STREAMS_MAX,
};
use crate::request::Api;

/// Shortest run in which growth of the proxy's process can be assessed; `--pid` is rejected for a
/// shorter one.
const JUDGED_MIN: Duration = Duration::from_secs(2);

/// Options of `ringside-bench soak`.
#[derive(Clone, Debug, PartialEq)]
pub struct SoakOptions {
    /// The proxy to check.
    pub proxy: Target,
    /// Path of the requests.
    pub path: String,
    /// The API that `path` belongs to.
    pub api: Api,
    /// Number of concurrent connections, each of which sends one request after another.
    pub streams: usize,
    /// Duration of the run.
    pub duration: Duration,
    /// Share of requests that the client aborts, from 0 to 1.
    pub abort_share: f64,
    /// Number of tokens requested in each response.
    pub tokens: u32,
    /// Names and values of additional header fields in the requests.
    pub fields: Vec<(String, String)>,
    /// Id of the proxy's process; `None` to not check whether the process grows.
    pub pid: Option<u32>,
    /// Seed from which requests, aborts and pauses are drawn.
    pub seed: u64,
    /// Destination of the JSON report; `None` to write none.
    pub json: Option<Output>,
    /// Whether to print progress even if standard error is not a terminal.
    pub progress: bool,
}

pub(super) fn command() -> Command {
    let after = format!(
        "TIME is a number with ms, s, m or h.\n\n\
         Every response must equal the response of a mock engine (ringside mock) to its prompt; \
         each event is\ncompared on arrival. A share of the requests is aborted, by FIN or by RST: \
         while the request is sent,\nbefore the response head, or within the response. A few \
         connections read slowly, a few requests are\npipelined, and a few responses are not \
         streamed.\n\n\
         --pid: the process is flat if the median of the last minute is at most {} % + {} KiB \
         (resident set) and\n{DESCRIPTORS_GROWTH_MAX} (descriptors) above the median of the second \
         minute; runs of less than five minutes use\nproportionally shorter windows.\n\n\
         Exit codes: 0 success; 1 a wrong response, a failed request, or a process that is not \
         flat; 2 usage error;\n3 invalid for this machine or this proxy.",
        RSS_GROWTH_SHARE_MAX * 100.0,
        RSS_GROWTH_BYTES_MAX / 1024
    );
    Command::new("soak")
        .about("Check that a proxy in front of mock engines relays correctly and does not grow")
        .after_help(after)
        .args(args())
}

fn args() -> Vec<Arg> {
    vec![
        option("proxy", "URL", "The proxy, http://HOST:PORT").required(true),
        option("path", "PATH", "Path of the requests").default_value("/v1/completions"),
        option(
            "header",
            "K: V",
            "Additional field of the requests, e.g. x-prefiller-host-port",
        )
        .action(ArgAction::Append),
        option("streams", "N", "Concurrent requests")
            .default_value("1024")
            .value_parser(value_parser!(u64).range(1..=STREAMS_MAX as u64)),
        option("duration", "TIME", "Duration of the run").default_value("10m"),
        option(
            "abort-share",
            "SHARE",
            "Share of requests that the client aborts, from 0 to 1",
        )
        .default_value("0.1")
        .value_parser(value_parser!(f64)),
        option("tokens", "N", "Tokens of each response")
            .default_value("256")
            .value_parser(value_parser!(u32).range(1..=i64::from(RESPONSE_TOKENS_MAX))),
        option(
            "pid",
            "PID",
            "Id of the proxy's process, to check that it does not grow",
        )
        .value_parser(value_parser!(u32).range(1..)),
        option(
            "seed",
            "N",
            "Seed of the random numbers [default: from the clock]",
        )
        .value_parser(value_parser!(u64)),
        option("json", "FILE", "Write a JSON report; - for standard output"),
        switch(
            "progress",
            "Print progress regularly, even if standard error is not a terminal",
        ),
    ]
}

/// Returns `target` unchanged, or an error if it uses TLS, which `soak` does not support.
fn plain(target: Target) -> Result<Target, Exit> {
    if target.tls {
        let text = "ringside-bench: --proxy: https is not supported by soak; use a plain http port";
        return Err(Exit::config(text.to_owned()));
    }
    Ok(target)
}

pub(super) fn options(matches: &ArgMatches) -> Result<SoakOptions, Exit> {
    let text = |name: &str| matches.get_one::<String>(name).cloned();
    let path = text("path").unwrap_or_default();
    let api = Api::of(&path).filter(|_| is_path(&path)).ok_or_else(|| {
        let want = "/v1/completions or /v1/chat/completions (with any prefix)";
        super::wrong("--path", &path, want)
    })?;
    let share = matches.get_one::<f64>("abort-share").copied();
    let abort_share = share.unwrap_or(0.1);
    if !(0.0..=1.0).contains(&abort_share) {
        let value = abort_share.to_string();
        return Err(super::wrong("--abort-share", &value, "from 0 to 1"));
    }
    let duration = time_of(matches, "duration")?.unwrap_or(Duration::from_secs(600));
    let pid = matches.get_one::<u32>("pid").copied();
    if pid.is_some() && duration < JUDGED_MIN {
        return Err(Exit::usage(format!(
            "ringside-bench: --pid: {duration:?} is too short to assess growth; set \
             --duration to {JUDGED_MIN:?} or more"
        )));
    }
    Ok(SoakOptions {
        proxy: plain(target(matches, "proxy")?)?,
        path,
        api,
        streams: number(matches, "streams").unwrap_or(1024) as usize,
        duration,
        abort_share,
        tokens: matches.get_one("tokens").copied().unwrap_or(256),
        fields: fields(matches, "header")?,
        pid,
        seed: number(matches, "seed").unwrap_or_else(clock_seed),
        json: text("json").map(|name| Output::of(&name)),
        progress: matches.get_flag("progress"),
    })
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

    use super::*;
    use crate::cli::{Task, parse};

    fn line(more: &[&str]) -> Result<SoakOptions, Exit> {
        let base = ["ringside-bench", "soak", "--proxy=http://a:1"];
        match parse(base.iter().chain(more).map(OsString::from))? {
            Task::Soak(options) => Ok(*options),
            Task::Overhead(_) | Task::Neighbours(_) => Err(Exit::usage("another command")),
        }
    }

    #[test]
    fn defaults_and_all_options_are_parsed() {
        let options = line(&[]).unwrap();
        assert_eq!((options.streams, options.tokens), (1024, 256));
        assert_eq!(options.duration, Duration::from_secs(600));
        assert_eq!((options.abort_share, options.pid), (0.1, None));
        let options = line(&[
            "--path=/v1/chat/completions",
            "--streams=3",
            "--duration=2s",
            "--abort-share=1",
            "--tokens=5",
            "--header=x-a: b",
            "--pid=7",
            "--seed=8",
            "--json=-",
            "--progress",
        ])
        .unwrap();
        assert_eq!((options.api, options.streams), (Api::Chat, 3));
        assert_eq!((options.tokens, options.abort_share), (5, 1.0));
        assert_eq!(options.fields[0].1, "b");
        assert_eq!((options.pid, options.seed), (Some(7), 8));
        assert_eq!(options.json, Some(Output::Stdout));
        assert!(options.progress);
    }

    #[test]
    fn invalid_command_lines_are_rejected() {
        for (more, part) in [
            (&["--abort-share=1.1"][..], "from 0 to 1"),
            (&["--abort-share=nan"], "from 0 to 1"),
            (&["--streams=0"], "--streams"),
            (&["--streams=16385"], "--streams"),
            (&["--tokens=0"], "--tokens"),
            (&["--path=/v1/responses"], "--path"),
            (&["--duration=9"], "a time above 0"),
            (&["--pid=1", "--duration=1s"], "set --duration"),
            (&["--pid=0"], "--pid"),
        ] {
            let exit = line(more).unwrap_err();
            assert_eq!(exit.code, Exit::USAGE, "{more:?}: {exit}");
            assert!(exit.message.contains(part), "{more:?}: {exit}");
        }
    }
}
