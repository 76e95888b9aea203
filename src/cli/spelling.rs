//! Go's spelling of flags, made GNU's before clap sees it.
//!
//! The first pd-sidecar used Go's `flag` package, where `-port=8000` is a long flag; manifests in
//! use still say so. Only the sidecar's arguments are touched.

use super::Exit;
use crate::config::keys::{self, Kind};
use crate::config::removed;

/// Turns `-name` into `--name`, and refuses `--switch true`, which pflag would not read either.
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

/// The part behind the dash of `-name` or `-name=value`, `-v` too. Not of `-h`, and not of `-1`, a
/// value.
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
