//! The commands that run a proxy, and `ringside check-config`: the flags of a personality.

use clap::{Arg, ArgAction, ArgMatches};

use std::fs::File;
use std::io::{self, Read};

use super::Exit;
use crate::config::flag_table::{self, Key, Kind};
use crate::config::personality::{Alias, Personality};
use crate::config::{self, Checked, Config, Problem, RawConfig};
use crate::limits::CONFIGURATION_BYTES_MAX;

/// Maximum width, in bytes, of the value column in the `check-config` report. Longer values extend
/// beyond the column.
const TEXT_COLUMN_MAX: usize = 32;

/// Creates the clap subcommand `name` with one argument per key of the personality and, hidden, one
/// per removed flag.
pub(super) fn command(personality: &Personality, name: &'static str) -> clap::Command {
    let Personality {
        examples, notes, ..
    } = personality;
    clap::Command::new(name)
        .after_help(format!("{examples}\n\n`--help` shows every flag."))
        .after_long_help(format!("{examples}\n\n{notes}"))
        // As in pflag, the last of a repeated flag takes effect.
        .args_override_self(true)
        .args(personality.table.iter().map(|key| argument(key)))
        .args(personality.removed.iter().map(|removed| {
            let arg = Arg::new(removed.name).long(removed.name).hide(true);
            let kind = if removed.is_switch {
                Kind::Switch
            } else {
                Kind::Value("VALUE")
            };
            with_value(arg, kind)
        }))
}

fn argument(key: &Key) -> Arg {
    let arg = Arg::new(key.name)
        .long(key.name)
        .help(help(key))
        .help_heading(key.group.heading())
        .hide_short_help(!key.common);
    with_value(arg, key.kind)
}

fn with_value(arg: Arg, kind: Kind) -> Arg {
    match kind {
        // As in pflag, a switch takes its value only after `=`.
        Kind::Switch => arg
            .action(ArgAction::Set)
            .value_name("BOOL")
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("true"),
        Kind::Value(name) => arg
            .action(ArgAction::Set)
            .value_name(name)
            .num_args(1)
            .allow_negative_numbers(true),
        Kind::List(name) => arg.action(ArgAction::Append).value_name(name).num_args(1),
    }
}

/// Returns the `--help` text of a key, with its default value and environment variable on the same
/// line. clap would add two lines.
fn help(key: &Key) -> String {
    let mut help = key.help.to_owned();
    if !key.default.is_empty() {
        help.push_str(&format!(" [default: {}]", key.default));
    }
    if let Some(name) = key.environment {
        help.push_str(&format!(" [env: {name}]"));
    }
    help
}

/// Collects the values from the command line, the document and the environment. `alias` is the
/// replaced program under whose name the program runs, if any. `file` is a configuration file that
/// is given without its flag.
pub(super) fn raw(
    personality: &Personality,
    matches: &ArgMatches,
    environment: &dyn Fn(&str) -> Option<String>,
    alias: Option<&Alias>,
    file: Option<&String>,
) -> RawConfig {
    let mut raw = RawConfig::new(personality.table, personality.variables, environment);
    for (key, text) in alias.into_iter().flat_map(|alias| alias.defaults) {
        raw.set_default(key, text);
    }
    for key in personality.table {
        if let Some(values) = matches.get_many::<String>(key.name) {
            match key.kind {
                Kind::List(_) => values.for_each(|item| raw.add_as(key, item, key.name)),
                Kind::Switch | Kind::Value(_) => {
                    values.for_each(|value| raw.set(key, value.as_str()));
                }
            }
        }
    }
    if let Some(file) = file {
        raw.set(&flag_table::CONFIGURATION_FILE, file.as_str());
    }
    let given = |name: &str| matches.get_one::<String>(name).cloned();
    (personality.apply_removed)(&mut raw, &given);
    read_document(personality, &mut raw);
    raw
}

/// Reads the configuration document if exactly one is given, inline or as a file. If both are
/// given, reads neither: [`config::check()`] reports the problem.
fn read_document(personality: &Personality, raw: &mut RawConfig) {
    let (inline, file) = (&flag_table::CONFIGURATION, &flag_table::CONFIGURATION_FILE);
    match (raw.given(inline), raw.given(file)) {
        (Some(text), None) => {
            let text = text.to_owned();
            raw.read_document(personality, "--configuration", &text);
        }
        (None, Some(path)) => {
            let path = path.to_owned();
            match read_file(&path) {
                Ok(text) => raw.read_document(personality, &path, &text),
                Err(error) => raw.add_problem(Problem {
                    key: format!("--{}", file.name),
                    text: format!("`{path}` cannot be read: {error}"),
                    excerpt: String::new(),
                }),
            }
        }
        (None, None) | (Some(_), Some(_)) => {}
    }
}

fn read_file(path: &str) -> io::Result<String> {
    let mut text = String::new();
    let mut file = File::open(path)?.take(CONFIGURATION_BYTES_MAX + 1);
    file.read_to_string(&mut text)?;
    if text.len() as u64 > CONFIGURATION_BYTES_MAX {
        return Err(io::Error::other(format!(
            "it is larger than {CONFIGURATION_BYTES_MAX} bytes"
        )));
    }
    Ok(text)
}

/// Checks the configuration `raw`. If it has problems, returns one exit whose message lists all of
/// them.
pub(super) fn read(personality: &Personality, raw: &RawConfig) -> Result<Checked, Exit> {
    config::check(personality, raw).map_err(|problems| refusal(&problems))
}

/// Returns the output of `check-config`: every value with its source, a summary, the warnings and
/// the problems.
pub(super) fn report(
    values: &[(&'static str, String, config::Source)],
    config: &Config,
    warnings: &[String],
    problems: &[String],
) -> String {
    let width = |column: fn(&(&str, String, config::Source)) -> usize, max: usize| {
        let widths = values.iter().map(column);
        widths.filter(|width| *width <= max).max().unwrap_or(0)
    };
    let names = width(|(name, ..)| name.len(), usize::MAX);
    let texts = width(|(_, text, _)| text.len(), TEXT_COLUMN_MAX);
    let mut report = String::new();
    for (name, text, source) in values {
        let text = match text.as_str() {
            "" => "-",
            text => text,
        };
        report.push_str(&format!("{name:names$}  {text:texts$}  {source}\n"));
    }
    report.push_str("\nSummary:\n");
    for (name, text) in config.describe() {
        report.push_str(&format!("  {name}: {text}\n"));
    }
    for warning in warnings {
        report.push_str(&format!("\nwarning: {warning}"));
    }
    for problem in problems {
        report.push_str(&format!("\nproblem: {problem}"));
    }
    match warnings.len() {
        _ if !problems.is_empty() => {
            report.push_str("\n\nringside cannot start with this configuration.");
        }
        0 => report.push_str("\nThe configuration is valid."),
        1 => report.push_str("\n\nThe configuration is valid, with 1 warning."),
        count => report.push_str(&format!(
            "\n\nThe configuration is valid, with {count} warnings."
        )),
    }
    report
}

pub(super) fn refusal(problems: &[Problem]) -> Exit {
    let lines: Vec<_> = problems
        .iter()
        .map(|problem| match problem.excerpt.as_str() {
            "" => format!("  {problem}."),
            _ => format!("  {problem}"),
        })
        .collect();
    let count = match problems.len() {
        1 => "1 problem".to_owned(),
        count => format!("{count} problems"),
    };
    Exit::config(format!(
        "ringside: the configuration has {count}:\n{}",
        lines.join("\n")
    ))
}
