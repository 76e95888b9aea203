//! The configuration document (YAML): its keys are flag names without dashes, and its values have
//! the syntax of the flags' values.
//!
//! As in pd-sidecar, an empty value and `0` count as not given, except for switches and
//! `prefill-max-retries`. An unknown key is a problem.

use super::flag_table::{self, Key, Kind};
use super::nearest::did_you_mean;
use super::yaml::{self, Entry, Value};
use super::{Personality, Problem, RawConfig, units};

impl RawConfig {
    /// Adds the values of the document `text` of a personality. `name`, its file or the flag that
    /// contains it, is shown in messages. Problems are recorded, not returned.
    pub fn read_document(&mut self, personality: &Personality, name: &str, text: &str) {
        match yaml::read(text) {
            Ok(entries) => {
                for entry in entries {
                    if let Err(why) = self.read_entry(personality, name, &entry) {
                        self.add_problem(problem(name, text, entry.line, entry.column, why));
                    }
                }
            }
            Err(error) => {
                self.add_problem(problem(name, text, error.line, error.column, error.text));
            }
        }
    }

    fn read_entry(
        &mut self,
        personality: &Personality,
        name: &str,
        entry: &Entry,
    ) -> Result<(), String> {
        let key = known(personality, &entry.key)?;
        let text = match &entry.value {
            Value::Nothing if is_guard(key) => String::new(),
            Value::Nothing => return Ok(()),
            Value::Text(text) => text.trim().to_owned(),
            Value::List(items) if matches!(key.kind, Kind::List(_)) => items.join(","),
            Value::List(_) => return Err(format!("`{}` takes one value, not a list", key.name)),
            Value::Nested => return Err(format!("`{}` takes no nested values", key.name)),
        };
        if key.kind == Kind::Switch {
            let text = switch(&text).map_or(text, |on| on.to_string());
            self.set_in_document(key, text, name, entry.line);
        } else if (text.is_empty() && !is_guard(key))
            || (text == "0" && key.name != flag_table::PREFILL_MAX_RETRIES.name && !is_guard(key))
        {
            if text == "0" && key.default != "0" {
                self.warn(format!(
                    "{name}:{}: {}: 0 counts as not given, as in pd-sidecar; using {}",
                    entry.line,
                    key.name,
                    self.text(key)
                ));
            }
        } else {
            self.set_in_document(key, text, name, entry.line);
        }
        Ok(())
    }
}

/// Returns whether an empty value of the key would open a guard. It is then refused, since it is
/// probably a mistake, and pd-sidecar does not have the key.
fn is_guard(key: &Key) -> bool {
    let guards = [&flag_table::ALLOW_TARGET, &flag_table::ALLOW_TARGETS_FILE];
    guards.iter().any(|guard| guard.name == key.name)
}

/// Parses a switch like a flag does, and additionally accepts YAML 1.1's `yes`, `no`, `on` and
/// `off`. Returns `None` for any other text.
fn switch(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "yes" | "on" => Some(true),
        "no" | "off" => Some(false),
        _ => units::switch(text),
    }
}

fn known(personality: &Personality, name: &str) -> Result<&'static Key, String> {
    let in_documents = |key: &&&Key| {
        ![
            flag_table::CONFIGURATION.name,
            flag_table::CONFIGURATION_FILE.name,
        ]
        .contains(&key.name)
    };
    let known = || personality.table.iter().filter(in_documents);
    if let Some(key) = known().find(|key| key.name == name) {
        return Ok(key);
    }
    let mut removed = personality.removed.iter();
    if let Some(removed) = removed.find(|removed| removed.name == name) {
        let instead = removed.replacement();
        return Err(format!("`{name}` is no longer a key; use `{instead}`"));
    }
    // In YAML, a colon ends a key only if white space follows.
    if let Some((before, _)) = name.split_once(':')
        && known().any(|key| key.name == before)
    {
        return Err(format!("`{name}` needs a space after the colon"));
    }
    let nearest = did_you_mean(name, known().map(|key| key.name));
    Err(format!("`{name}` is not a key{nearest}"))
}

fn problem(name: &str, text: &str, line: u64, column: u64, why: String) -> Problem {
    Problem {
        key: format!("{name}:{line}:{column}"),
        text: why,
        excerpt: excerpt(text, line, column),
    }
}

/// Returns line number `line` of the document `text`, and below it a marker at `column`. Both are
/// counted from 1. Returns an empty text if there is no such line.
fn excerpt(text: &str, line: u64, column: u64) -> String {
    let index = usize::try_from(line.saturating_sub(1)).unwrap_or(usize::MAX);
    let Some(shown) = text.lines().nth(index) else {
        return String::new();
    };
    let before = usize::try_from(column.saturating_sub(1)).unwrap_or(0);
    // Tabs are kept, so that the marker is aligned with the text above.
    let indent: String = shown
        .chars()
        .take(before)
        .map(|c| if c == '\t' { '\t' } else { ' ' })
        .collect();
    format!("{line:>6} | {shown}\n{:>6} | {indent}^", "")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::personality::SIDECAR;

    fn read(text: &str) -> RawConfig {
        let mut raw = RawConfig::new(flag_table::ALL, &[], &|_| None);
        raw.read_document(&SIDECAR, "x.yaml", text);
        raw
    }

    fn problems(text: &str) -> Vec<String> {
        let raw = read(text);
        raw.problems.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn g1_values_are_applied() {
        use flag_table::{
            ALLOW_TARGET, ENABLE_TLS, FIRST_BYTE_TIMEOUT, KV_CONNECTOR, MORIIO_DECODE_HOSTS, PORT,
            PREFILL_MAX_RETRIES, SECURE_PROXY, TRACING,
        };
        for (text, key, want) in [
            ("port: 8100", &PORT, "8100"),
            ("port: \"8100\"", &PORT, "8100"),
            ("{\"port\": 8100}", &PORT, "8100"),
            ("kv-connector: sglang", &KV_CONNECTOR, "sglang"),
            ("secure-proxy: false", &SECURE_PROXY, "false"),
            ("secure-proxy: no", &SECURE_PROXY, "false"),
            ("tracing: On", &TRACING, "true"),
            ("tracing: 1", &TRACING, "true"),
            ("first-byte-timeout: off", &FIRST_BYTE_TIMEOUT, "off"),
            ("prefill-max-retries: 0", &PREFILL_MAX_RETRIES, "0"),
            (
                "enable-tls: [prefiller, decoder]",
                &ENABLE_TLS,
                "prefiller,decoder",
            ),
            (
                "enable-tls: prefiller,decoder",
                &ENABLE_TLS,
                "prefiller,decoder",
            ),
            ("enable-tls:\n- encoder\n", &ENABLE_TLS, "encoder"),
            (
                "allow-target: [10.0.0.0/8, \"[::1]:80\"]",
                &ALLOW_TARGET,
                "10.0.0.0/8,[::1]:80",
            ),
            ("moriio-decode-hosts: a,b", &MORIIO_DECODE_HOSTS, "a,b"),
        ] {
            let raw = read(text);
            assert!(raw.problems.is_empty(), "{text}: {:?}", raw.problems);
            assert_eq!(raw.given(key), Some(want), "{text}");
            let name = "x.yaml".to_owned();
            let source = super::super::Source::Document { name, line: 1 };
            assert_eq!(*raw.source(key), source, "{text}");
        }
    }

    #[test]
    fn empty_and_zero_count_as_not_given() {
        use flag_table::{
            DECODE_CHUNK_SIZE, ENABLE_TLS, KV_CONNECTOR, MAX_IDLE_CONNS_PER_HOST, TRACING,
        };
        for (text, key, warnings) in [
            ("max-idle-conns-per-host: 0", &MAX_IDLE_CONNS_PER_HOST, 1),
            ("decode-chunk-size: 0", &DECODE_CHUNK_SIZE, 0),
            ("kv-connector: \"\"", &KV_CONNECTOR, 0),
            ("kv-connector:", &KV_CONNECTOR, 0),
            ("enable-tls: []", &ENABLE_TLS, 0),
            ("tracing: null", &TRACING, 0),
        ] {
            let raw = read(text);
            assert_eq!(raw.given(key), None, "{text}");
            assert_eq!(raw.warnings.len(), warnings, "{text}: {:?}", raw.warnings);
            assert!(raw.problems.is_empty(), "{text}");
        }
    }

    #[test]
    fn every_key_except_configuration_is_accepted() {
        for key in flag_table::ALL {
            let refused = !problems(&format!("{}: x", key.name)).is_empty();
            assert_eq!(
                refused,
                key.name.starts_with("configuration"),
                "{}",
                key.name
            );
        }
    }

    #[test]
    fn g1_problems_show_their_position() {
        for (text, want) in [
            (
                "port: 8000\nprot: 1\n",
                "x.yaml:2:1: `prot` is not a key; did you mean `port`?\n     2 | prot: 1\n       | ^",
            ),
            (
                "connector: nixlv2",
                "x.yaml:1:1: `connector` is no longer a key; use `kv-connector`",
            ),
            (
                "inference-pool-name: x",
                "x.yaml:1:1: `inference-pool-name` is no longer a key; use `inference-pool`",
            ),
            ("  frobnicate: 1", "x.yaml:1:3: `frobnicate` is not a key\n"),
            (
                "port: [1, 2]",
                "x.yaml:1:1: `port` takes one value, not a list",
            ),
            (
                "enable-tls: {decoder: true}",
                "x.yaml:1:1: `enable-tls` takes no nested values",
            ),
            (
                "enable-tls: [[decoder]]",
                "x.yaml:1:1: `enable-tls` takes no nested values",
            ),
            ("port: 1\nport: 2", "x.yaml:2:1: `port` is given twice"),
            ("port: [1", "x.yaml:1:7: unclosed bracket"),
            (
                "{port:1}",
                "x.yaml:1:2: `port:1` needs a space after the colon",
            ),
            (
                "\tprot: 2",
                "x.yaml:1:2: `prot` is not a key; did you mean `port`?\n     1 | \tprot: 2\n       | \t^",
            ),
        ] {
            let got = problems(text);
            assert_eq!(got.len(), 1, "{text}: {got:?}");
            assert!(got[0].starts_with(want), "{text}: {}", got[0]);
        }
        assert_eq!(problems("prot: 1\nprto: 2\nhosst: 3").len(), 3);
    }
}
