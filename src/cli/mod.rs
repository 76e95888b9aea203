//! The command line: parses arguments into a [`Command`], or an [`Exit`] with code and message.
//!
//! The only inputs are the arguments, the environment and the file named by `--configuration-file`.
//! Nothing is written or started. This module handles syntax only; `config` interprets the values.

mod check_config;
mod exit;
mod log;
mod log_file;
mod log_queue;
mod personality;
mod spelling;

use std::ffi::OsString;
use std::path::Path;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, value_parser};

use crate::config::personality::SIDECAR;
use crate::config::{self, Config, Personality, RawConfig};

pub use check_config::CheckConfig;
pub use exit::Exit;
pub use log::{init_log, log_queues, set_log_level};
pub use log_queue::LogQueues;

/// The command to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Run the proxy with this configuration. The texts are warnings about the configuration, to
    /// log at startup.
    Proxy(Box<Config>, Vec<String>),
    /// Check this configuration and print it.
    Check(Box<CheckConfig>),
    /// Run the mock engine with these arguments.
    Mock(Vec<String>),
    /// Run mock engines, a sidecar and some requests in one process.
    Demo(DemoOptions),
}

/// Options of `ringside demo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DemoOptions {
    /// Whether the demo sends one round of requests and exits, instead of serving until it is
    /// interrupted.
    pub once: bool,
    /// Listening port of the demo's sidecar.
    pub port: u16,
    /// Length of the prompt of each request that the demo sends, in tokens.
    pub prompt_tokens: u32,
}

/// Name of the command that checks a configuration and prints it.
const CHECK_CONFIG: &str = "check-config";

/// Parses the command line, including the program name, using the environment of this process.
///
/// # Errors
/// Returns the message and exit code for the user. `--help` and `--version` are exits with code 0.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, Exit> {
    parse_with(args, &|name| std::env::var(name).ok())
}

/// Like [`parse`], but reads environment variables with `environment`, which returns `None` for an
/// unset variable.
///
/// # Errors
/// The same as for [`parse`].
pub fn parse_with(
    args: impl IntoIterator<Item = OsString>,
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<Command, Exit> {
    let args = utf8(args)?;
    let replaced = program_name(&args).and_then(config::personality::of_program);
    let alias = replaced.map(|(_, alias)| alias);
    let args = match replaced {
        Some((personality, _)) => with_command(personality, args),
        None => args,
    };
    let args = match args.get(1).map(String::as_str).and_then(of_command) {
        Some(personality) => spelling::normalise(personality, &args)?,
        None => args,
    };
    let matches = program()
        .try_get_matches_from(args)
        .map_err(|error| refused(&error))?;
    match matches.subcommand() {
        Some((name, matches)) if let Some(personality) = of_command(name) => {
            let is_check = name == CHECK_CONFIG;
            let file = is_check.then(|| matches.get_one::<String>(FILE)).flatten();
            let raw = personality::raw(personality, matches, environment, alias, file);
            if is_check {
                return check_config(personality, matches, &raw);
            }
            let checked = personality::read(personality, &raw)?;
            Ok(Command::Proxy(Box::new(checked.config), checked.warnings))
        }
        Some(("mock", matches)) => mock_engine_built_in().map(|()| Command::Mock(rest(matches))),
        Some(("demo", matches)) => mock_engine_built_in().map(|()| Command::Demo(demo(matches))),
        _ => Err(Exit::usage(
            "ringside: no command given; see `ringside --help`",
        )),
    }
}

fn program() -> clap::Command {
    clap::Command::new("ringside")
        .bin_name("ringside")
        .version(env!("CARGO_PKG_VERSION"))
        .about("An HTTP/1.1 data-plane proxy for LLM inference engines")
        .propagate_version(true)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .disable_help_subcommand(true)
        .subcommands(
            config::personality::ALL
                .iter()
                .map(|one| personality::command(one, one.name).about(one.about)),
        )
        .subcommand(
            personality::command(&SIDECAR, CHECK_CONFIG)
                .about("Make every check of a start, and print every value with its source")
                .args(check_config_args()),
        )
        .subcommand(
            clap::Command::new("mock")
                .about("Run a mock engine that needs no GPU; see `ringside mock --help`")
                // All arguments after `mock`, including `--help`, are passed to the mock engine.
                .disable_help_flag(true)
                .disable_version_flag(true)
                .arg(
                    Arg::new("args")
                        .action(ArgAction::Append)
                        .num_args(0..)
                        .trailing_var_arg(true)
                        .allow_hyphen_values(true),
                ),
        )
        .subcommand(
            clap::Command::new("demo")
                .about("Run mock engines, a sidecar and some requests in one process")
                .arg(
                    Arg::new("once")
                        .long("once")
                        .action(ArgAction::SetTrue)
                        .help("Send one round of requests and exit"),
                )
                .arg(
                    Arg::new("port")
                        .long("port")
                        .value_name("PORT")
                        .value_parser(value_parser!(u16))
                        .default_value("8000")
                        .help("Listening port of the demo's sidecar"),
                )
                .arg(
                    Arg::new("prompt-tokens")
                        .long("prompt-tokens")
                        .value_name("N")
                        .value_parser(value_parser!(u32).range(1..=1_000_000))
                        .default_value("2000")
                        .help("Length of each prompt in tokens"),
                ),
        )
}

/// Returns the arguments that `check-config` has in addition to those of the sidecar.
fn check_config_args() -> [Arg; 4] {
    let switch = |name: &'static str, help: &'static str| {
        let arg = Arg::new(name).long(name).action(ArgAction::SetTrue);
        arg.help(help).help_heading("Check")
    };
    [
        Arg::new(FILE)
            .value_name("FILE")
            .help("Configuration file (YAML), as --configuration-file"),
        switch("offline", "Leave out the checks that need the network"),
        switch("json", "Print the report as JSON"),
        switch(
            "diff",
            "Print only the values that differ from the defaults",
        ),
    ]
}

/// Id of the argument of `check-config` that is a file.
const FILE: &str = "FILE";

fn check_config(
    personality: &Personality,
    matches: &ArgMatches,
    raw: &RawConfig,
) -> Result<Command, Exit> {
    let form = check_config::Form {
        is_json: matches.get_flag("json"),
        is_diff: matches.get_flag("diff"),
    };
    let checked = config::check(personality, raw).map_err(|problems| match form.is_json {
        true => check_config::refused(&problems),
        false => personality::refusal(&problems),
    })?;
    let is_offline = matches.get_flag("offline");
    let check = CheckConfig::new(raw, checked, form, is_offline);
    Ok(Command::Check(Box::new(check)))
}

fn demo(matches: &ArgMatches) -> DemoOptions {
    DemoOptions {
        once: matches.get_flag("once"),
        port: matches.get_one("port").copied().unwrap_or(8000),
        prompt_tokens: matches.get_one("prompt-tokens").copied().unwrap_or(2000),
    }
}

fn rest(matches: &ArgMatches) -> Vec<String> {
    matches
        .get_many::<String>("args")
        .map(|args| args.cloned().collect())
        .unwrap_or_default()
}

fn mock_engine_built_in() -> Result<(), Exit> {
    if cfg!(feature = "mock") {
        Ok(())
    } else {
        Err(Exit::config(
            "ringside: this build has no mock engine; build it with the feature `mock`",
        ))
    }
}

fn utf8(args: impl IntoIterator<Item = OsString>) -> Result<Vec<String>, Exit> {
    args.into_iter()
        .map(|arg| {
            arg.into_string().map_err(|arg| {
                Exit::usage(format!(
                    "ringside: the argument `{}` is not UTF-8",
                    arg.to_string_lossy()
                ))
            })
        })
        .collect()
}

/// Returns the personality of a command that runs or checks a proxy.
fn of_command(name: &str) -> Option<&'static Personality> {
    if name == CHECK_CONFIG {
        return Some(&SIDECAR);
    }
    let mut all = config::personality::ALL.iter();
    all.find(|personality| personality.name == name).copied()
}

/// Inserts the command of `personality`, whose replaced program this one is named after, unless the
/// first argument is `check-config`.
fn with_command(personality: &Personality, mut args: Vec<String>) -> Vec<String> {
    if args.get(1).is_none_or(|arg| arg != CHECK_CONFIG) {
        args.insert(1, personality.name.to_owned());
    }
    args
}

fn program_name(args: &[String]) -> Option<&str> {
    Path::new(args.first()?).file_name()?.to_str()
}

/// Converts a clap error, which can be the help or version text, to an exit.
fn refused(error: &clap::Error) -> Exit {
    let message = error.render().to_string();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Exit::success(message),
        _ => Exit::usage(message),
    }
}

#[cfg(test)]
#[path = "cli_tests.rs"]
mod tests;
