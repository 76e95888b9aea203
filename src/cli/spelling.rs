//! Converts Go-style flags to GNU style before clap parses them.
//!
//! The first pd-sidecar used Go's `flag` package, where `-port=8000` is a long flag, and existing
//! manifests use this form. Only the arguments of the commands that run a proxy are converted.

use super::Exit;
use crate::config::Personality;
use crate::config::flag_table::Kind;

/// Converts `-name` to `--name` in the arguments of a command of the personality. Returns an error
/// for a switch with a separate value (`--switch true`), which pflag does not support either.
pub(super) fn normalise(personality: &Personality, args: &[String]) -> Result<Vec<String>, Exit> {
    let mut out = Vec::with_capacity(args.len());
    let mut rest = false;
    for (index, arg) in args.iter().enumerate() {
        rest |= arg == "--";
        if index < 2 || rest {
            out.push(arg.clone());
            continue;
        }
        let arg = match long_name(arg) {
            Some(name) => format!("--{name}"),
            None => arg.clone(),
        };
        let next = args.get(index + 1).map(String::as_str);
        if let Some(value @ ("true" | "false")) = next
            && arg
                .strip_prefix("--")
                .is_some_and(|name| is_switch(personality, name))
        {
            return Err(Exit::usage(format!(
                "ringside: `{arg} {value}` is two arguments; write `{arg}={value}`"
            )));
        }
        out.push(arg);
    }
    Ok(out)
}

/// Returns the part after the dash of `-name`, `-name=value` or `-v`. Returns `None` for any other
/// text, such as `--name`, another single letter (`-h`), or a number (`-1`), which is a value.
fn long_name(arg: &str) -> Option<&str> {
    let name = arg.strip_prefix('-')?;
    let long = name.len() > 1 && name.starts_with(|first: char| first.is_ascii_lowercase());
    (long || name == "v").then_some(name)
}

fn is_switch(personality: &Personality, name: &str) -> bool {
    let ours = personality
        .table
        .iter()
        .any(|key| key.name == name && key.kind == Kind::Switch);
    let removed = personality
        .removed
        .iter()
        .any(|removed| removed.name == name && removed.is_switch);
    ours || removed
}
