//! `ringside sidecar`: pd-sidecar's flags and our own.

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches};

use super::{Exit, absent};
use crate::config::keys::{self, Key, Kind};
use crate::config::{self, Checked, Draft, Problem};

const EXAMPLES: &str = "\
Examples:
  Replace pd-sidecar beside a decoder on port 8200:
    ringside sidecar --port 8000 --model-server-port 8200 --secure-proxy=false
  Four data-parallel ranks, ports 8000-8003 in front of 8200-8203, two shards beside GPU 0 to 3:
    ringside sidecar --data-parallel-size 4 --cores 'near:gpu0-3*2' --secure-proxy=false";

const NOTES: &str = "\
Switches take =true or =false; of a repeated flag the last one counts.
Durations: 250ms, 30s, 5m, 1m30s, 1h; every timeout can be off. Sizes: 65536, 64KiB, 512MiB, 1MB.
Environment: POD_IP, ENABLE_PREFILLER_SAMPLING.
Exit codes: 0 ok, 1 failure while running, 2 usage, 3 configuration, 4 port or permission, 5 kernel.";

/// The subcommand, one argument per key.
pub(super) fn command() -> clap::Command {
    clap::Command::new("sidecar")
        .about("Stand in for llm-d's pd-sidecar, flag for flag")
        .after_help(format!("{EXAMPLES}\n\n`--help` shows every flag."))
        .after_long_help(format!("{EXAMPLES}\n\n{NOTES}"))
        // pflag: of a repeated flag the last one counts.
        .args_override_self(true)
        .args(keys::ALL.iter().map(|key| argument(key)))
        .args(absent::args())
}

fn argument(key: &Key) -> Arg {
    let arg = Arg::new(key.name)
        .long(key.name)
        .help(help(key))
        .help_heading(key.group.heading())
        .hide_short_help(!key.common)
        .action(ArgAction::Set);
    let arg = match key.kind {
        // Go's spelling: a value only behind `=`.
        Kind::Switch => arg
            .value_name("BOOL")
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true"),
        Kind::Value(name) => arg
            .value_name(name)
            .num_args(1)
            .allow_negative_numbers(true),
    };
    match key.default {
        "" => arg,
        default => arg.default_value(default).hide_default_value(true),
    }
}

/// The help with its default on the same line; clap would take two more for it.
fn help(key: &Key) -> String {
    match key.default {
        "" => key.help.to_owned(),
        default => format!("{} [default: {default}]", key.help),
    }
}

/// From matched arguments to a checked configuration; all problems in one exit.
pub(super) fn read(
    matches: &ArgMatches,
    environment: &dyn Fn(&str) -> Option<String>,
) -> Result<Checked, Exit> {
    let mut draft = Draft::new(environment);
    for key in keys::ALL {
        if matches.value_source(key.name) == Some(ValueSource::CommandLine)
            && let Some(value) = matches.get_one::<String>(key.name)
        {
            draft.set(key, value.as_str());
        }
    }
    let mut problems = absent::problems(matches);
    match config::check(&draft) {
        Ok(checked) if problems.is_empty() => Ok(checked),
        Ok(_) => Err(refusal(&problems)),
        Err(more) => {
            problems.extend(more);
            Err(refusal(&problems))
        }
    }
}

fn refusal(problems: &[Problem]) -> Exit {
    let lines: Vec<_> = problems
        .iter()
        .map(|problem| format!("  {problem}."))
        .collect();
    let count = match problems.len() {
        1 => "a problem".to_owned(),
        count => format!("{count} problems"),
    };
    Exit::config(format!(
        "ringside: the configuration has {count}:\n{}",
        lines.join("\n")
    ))
}
