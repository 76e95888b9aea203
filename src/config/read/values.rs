//! Reads values by type: durations, sizes, numbers, lists, choices.
//!
//! A value that cannot be parsed is recorded as a problem and replaced by a placeholder.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use super::super::Problem;
use super::super::Source;
use super::super::flag_table::{self, Key};
use super::super::nearest::did_you_mean;
use super::super::units::{self, UnitError};
use super::reader::Reader;

impl<'a> Reader<'a> {
    /// Returns the text given for `key`, or its default.
    pub(in crate::config) fn text(&self, key: &Key) -> &'a str {
        self.raw.text(key)
    }

    pub(in crate::config) fn switch(&mut self, key: &Key) -> bool {
        units::switch(self.text(key)).unwrap_or_else(|| {
            self.wanted(key, "true or false");
            false
        })
    }

    /// Reads a time limit. Returns `None` for `off`; zero is a problem.
    pub(in crate::config) fn timeout(&mut self, key: &Key) -> Option<Duration> {
        if self.text(key) == "off" {
            return None;
        }
        let value = self.duration(key);
        if value.is_zero() {
            self.problem(
                key,
                "is zero, so it would always expire; write `off` to disable it",
            );
        }
        Some(value)
    }

    pub(in crate::config) fn positive(&mut self, key: &Key) -> Duration {
        let value = self.duration(key);
        if value.is_zero() {
            self.wanted(key, "a duration above zero");
        }
        value
    }

    pub(in crate::config) fn duration(&mut self, key: &Key) -> Duration {
        match units::duration(self.text(key)) {
            Ok(value) => value,
            Err(error) => {
                let why = match error {
                    UnitError::Unit => "has no known unit",
                    UnitError::TooLarge => "is longer than a year",
                    UnitError::Empty
                    | UnitError::Number
                    | UnitError::Range
                    | UnitError::Duplicate => "is not a duration",
                };
                let off =
                    if key.name.ends_with("-timeout") || key.name == flag_table::BUSY_POLL.name {
                        ", or off"
                    } else {
                        ""
                    };
                let text = format!(
                    "`{}` {why}; write 250ms, 30s, 5m or 1m30s{off}",
                    self.text(key)
                );
                self.problem(key, &text);
                Duration::from_secs(1)
            }
        }
    }

    /// Reads a size in bytes. Zero is a problem.
    pub(in crate::config) fn size(&mut self, key: &Key) -> u64 {
        match units::size(self.text(key)) {
            Ok(value) if value > 0 => value,
            _ => {
                self.wanted(key, "a size above zero, such as 64KiB, 512MiB or 2GiB");
                1
            }
        }
    }

    pub(in crate::config) fn count(&mut self, key: &Key, min: u32, max: u32) -> u32 {
        self.number(key, min, max, &format!("a number from {min} to {max}"))
    }

    /// Reads a value that must be the name of one of `choices`, and returns the value paired with
    /// that name. `choices` must not be empty: the first value is the placeholder.
    pub(in crate::config) fn choice<T: Copy>(&mut self, key: &Key, choices: &[(&str, T)]) -> T {
        let text = self.text(key);
        if let Some((_, value)) = choices.iter().find(|(name, _)| *name == text) {
            return *value;
        }
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        self.unknown(key, text, &names);
        choices[0].1
    }

    pub(in crate::config) fn wanted(&mut self, key: &Key, wanted: &str) {
        let text = format!("`{}` is not valid; give {wanted}", self.text(key));
        self.problem(key, &text);
    }

    /// Records a problem with `key`: `text` is not one of `names`. Suggests the nearest name if one
    /// is near enough.
    pub(in crate::config) fn unknown(&mut self, key: &Key, text: &str, names: &[&str]) {
        let nearest = did_you_mean(text, names.iter().copied());
        let names = either(names);
        let text = match nearest.as_str() {
            "" => format!("`{text}` is not valid; give {names}"),
            nearest => format!("`{text}` is not valid{nearest} Give {names}"),
        };
        self.problem(key, &text);
    }

    /// Reads a number from `min` to `max`, both included. `wanted` describes the valid values.
    pub(in crate::config) fn number<T>(&mut self, key: &Key, min: T, max: T, wanted: &str) -> T
    where
        T: Copy + PartialOrd + std::str::FromStr,
    {
        match self.text(key).parse::<T>() {
            Ok(value) if value >= min && value <= max => value,
            _ => {
                self.wanted(key, wanted);
                min
            }
        }
    }

    pub(in crate::config) fn port(&mut self, key: &Key) -> u16 {
        self.number(key, 1, u16::MAX, "a port from 1 to 65535")
    }

    /// Returns the items of the comma-separated list given for `key`, without surrounding white
    /// space.
    pub(in crate::config) fn list(&self, key: &Key) -> impl Iterator<Item = &'a str> + use<'a> {
        let text = self.text(key);
        let items = (!text.trim().is_empty()).then(|| text.split(','));
        items.into_iter().flatten().map(str::trim)
    }

    pub(in crate::config) fn is_given(&self, key: &Key) -> bool {
        self.raw.given(key).is_some()
    }

    /// Records a problem with the value of `key`. The message `text` is preceded by the source of
    /// the value.
    pub(in crate::config) fn problem(&mut self, key: &Key, text: &str) {
        let place = match self.raw.source(key) {
            Source::Flag(name) => format!("--{name}"),
            Source::Document { name, line } => format!("{name}:{line}: {}", key.name),
            Source::Environment(name) => (*name).to_owned(),
            Source::Default => format!("--{}", key.name),
        };
        self.refuse(place, text);
    }

    /// Records a problem: the environment variable `name` has an invalid value. `wanted` describes
    /// the valid values.
    pub(in crate::config) fn refuse_variable(&mut self, name: &str, wanted: &str) {
        let text = self.raw.variable(name).unwrap_or_default();
        let text = format!("`{text}` is not valid; give {wanted}");
        self.refuse(name.to_owned(), &text);
    }

    fn refuse(&mut self, key: String, text: &str) {
        self.problems.push(Problem {
            key,
            text: text.to_owned(),
            excerpt: String::new(),
        });
    }

    /// Returns the value of an environment variable, or `default` if it is unset or `read` returns
    /// `None` for it. In the latter case adds a warning, in which `wanted` describes the valid
    /// values; pd-sidecar ignores the variable silently.
    pub(in crate::config) fn variable<T>(
        &mut self,
        name: &str,
        default: T,
        wanted: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> T {
        let Some(text) = self.raw.variable(name) else {
            return default;
        };
        read(text).unwrap_or_else(|| {
            let text = format!("{name} is `{text}`, which is not {wanted}; it is ignored");
            self.warnings.push(text);
            default
        })
    }
}

/// Formats names as `a`, `a or b` or `a, b or c`.
fn either(names: &[&str]) -> String {
    match names {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

/// Parses an IP address and a port in the form used by Go servers: an empty host means all
/// addresses. The host `localhost` means 127.0.0.1. Returns `None` if `text` has another form.
pub(super) fn address(text: &str) -> Option<SocketAddr> {
    match text.rsplit_once(':')? {
        ("", port) => Some(SocketAddr::from((
            Ipv6Addr::UNSPECIFIED,
            port.parse().ok()?,
        ))),
        ("localhost", port) => Some(SocketAddr::from((Ipv4Addr::LOCALHOST, port.parse().ok()?))),
        _ => text.parse().ok(),
    }
}
