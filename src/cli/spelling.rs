//! Converts Go-style flags to GNU style before clap parses them.
//!
//! The first pd-sidecar used Go's `flag` package, where `-port=8000` is a long flag, and existing
//! manifests use this form. Only the arguments of the sidecar commands are converted.

use super::Exit;
use crate::config::keys::{self, Kind};
use crate::config::removed;

/// Converts `-name` to `--name` in the arguments of `sidecar` and `check-config`. Returns an error
/// for a switch with a separate value (`--switch true`), which pflag does not support either.
pub(super) fn normalise(args: Vec<String>) -> Result<Vec<String>, Exit> {
    if !matches!(
        args.get(1).map(String::as_str),
        Some("sidecar" | "check-config")
    ) {
        return Ok(args);
    }
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
            && arg.strip_prefix("--").is_some_and(is_switch)
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

fn is_switch(name: &str) -> bool {
    let ours = keys::ALL
        .iter()
        .any(|key| key.name == name && key.kind == Kind::Switch);
    let removed = removed::ALL
        .iter()
        .any(|removed| removed.name == name && removed.is_switch);
    ours || removed
}
