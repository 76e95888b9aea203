//! The values as written, before any check, and their precedence.
//!
//! A flag takes precedence over the document (YAML), the document over the environment, and the
//! environment over the default. The source of each value is recorded. A key's environment variable
//! is ignored, with a warning, if it cannot be parsed.

use std::collections::BTreeMap;
use std::fmt;

use super::flag_table::{self, Key, Kind};
use super::{Problem, units};

/// Keys that have two names, the new one first.
const RENAMED: [[&Key; 2]; 2] = [
    [&flag_table::MODEL_SERVER_PORT, &flag_table::VLLM_PORT],
    [&flag_table::SECURE_SERVING, &flag_table::SECURE_PROXY],
];

/// The source from which a value was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A flag, with the name under which it was given. This can be a removed flag, which is mapped
    /// to a key.
    Flag(&'static str),
    /// An entry of the YAML document.
    Document {
        /// The file that contains the document, or the flag `--configuration`.
        name: String,
        /// Line of the entry, starting at 1.
        line: u64,
    },
    /// The environment variable with this name.
    Environment(&'static str),
    /// No source gives a value, so the default applies.
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) => write!(f, "--{name}"),
            Self::Document { name, line } => write!(f, "{name}:{line}"),
            Self::Environment(name) => write!(f, "environment {name}"),
            Self::Default => f.write_str("default"),
        }
    }
}

/// A value as written, with its source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawValue {
    /// The value as text. The items of a list are separated by commas.
    pub text: String,
    /// Source of the text.
    pub source: Source,
}

/// The values as written, before any check.
#[derive(Clone, Debug)]
pub struct RawConfig {
    /// The keys that have a value, in the order of `--help`.
    pub(super) table: &'static [&'static Key],
    flags: BTreeMap<&'static str, RawValue>,
    document: BTreeMap<&'static str, RawValue>,
    /// Values of the keys' environment variables, which apply if neither a flag nor the document
    /// gives one.
    environment: BTreeMap<&'static str, RawValue>,
    defaults: BTreeMap<&'static str, &'static str>,
    variables: BTreeMap<&'static str, String>,
    /// Problems found while reading flags and the document.
    pub(super) problems: Vec<Problem>,
    /// Warnings found while reading flags and the document, one sentence each.
    pub(super) warnings: Vec<String>,
}

impl RawConfig {
    /// Creates a configuration of the keys in `table`, without flags or document, with the values
    /// of the environment: of the keys' variables and of `variables`.
    #[must_use]
    pub fn new(
        table: &'static [&'static Key],
        variables: &[&'static str],
        environment: &dyn Fn(&str) -> Option<String>,
    ) -> Self {
        let mut raw = Self {
            table,
            flags: BTreeMap::new(),
            document: BTreeMap::new(),
            environment: BTreeMap::new(),
            defaults: BTreeMap::new(),
            variables: BTreeMap::new(),
            problems: Vec::new(),
            warnings: Vec::new(),
        };
        // An empty variable counts as unset.
        let read = |name: &str| environment(name).filter(|text| !text.is_empty());
        for &name in variables {
            if let Some(text) = read(name) {
                raw.variables.insert(name, text);
            }
        }
        for key in table {
            let Some(name) = key.environment else {
                continue;
            };
            if let Some(text) = read(name) {
                let source = Source::Environment(name);
                raw.environment.insert(key.name, RawValue { text, source });
            }
        }
        raw
    }

    /// Changes the default of `key`. Used when running under the name of a program whose default
    /// differs.
    pub fn set_default(&mut self, key: &Key, text: &'static str) {
        self.defaults.insert(key.name, text);
    }

    /// Sets the flag value of `key`. A later value replaces an earlier one.
    pub fn set(&mut self, key: &Key, value: impl Into<String>) {
        self.set_as(key, value, key.name);
    }

    /// Like [`RawConfig::set`], for a flag given under the name `name`, which messages show as the
    /// source.
    pub fn set_as(&mut self, key: &Key, value: impl Into<String>, name: &'static str) {
        let (text, source) = (value.into(), Source::Flag(name));
        self.flags.insert(key.name, RawValue { text, source });
    }

    /// Appends an item to the list given for `key` by flags. `name` is the name of the flag that
    /// gave the item.
    pub fn add_as(&mut self, key: &Key, item: &str, name: &'static str) {
        match self
            .flags
            .get_mut(key.name)
            .filter(|flag| !flag.text.is_empty())
        {
            Some(RawValue { text, .. }) => {
                text.push(',');
                text.push_str(item);
            }
            None => self.set_as(key, item, name),
        }
    }

    /// Returns whether the flag of `key` was given, under any of its names.
    #[must_use]
    pub fn has_flag(&self, key: &Key) -> bool {
        self.flags.contains_key(key.name)
    }

    /// Sets the value that the document gives for `key`. `name` is the name of the document, `line`
    /// the line of the entry.
    pub(super) fn set_in_document(&mut self, key: &Key, text: String, name: &str, line: u64) {
        let name = name.to_owned();
        let source = Source::Document { name, line };
        self.document.insert(key.name, RawValue { text, source });
    }

    /// Sets `--inference-pool` from the first sidecar's two flags for the namespace and the name of
    /// the pool. A flag that is `None` is replaced by its environment variable; without a name,
    /// nothing is set. If one of the flags is given, `--inference-pool` takes precedence over them;
    /// otherwise `INFERENCE_POOL` takes precedence.
    pub fn set_old_pool(&mut self, namespace: Option<&str>, name: Option<&str>) {
        let key = &flag_table::INFERENCE_POOL;
        let by_flag = namespace.is_some() || name.is_some();
        let half = |flag: Option<&str>, variable| {
            let text = flag.or_else(|| self.variable(variable))?;
            (!text.is_empty()).then(|| text.to_owned())
        };
        let namespace = half(namespace, "INFERENCE_POOL_NAMESPACE");
        let Some(name) = half(name, "INFERENCE_POOL_NAME") else {
            if namespace.is_some() {
                self.warn("the namespace of an InferencePool has no effect without its name");
            }
            return;
        };
        let text = match namespace {
            Some(namespace) => format!("{namespace}/{name}"),
            None => name,
        };
        if by_flag && !self.has_flag(key) {
            self.set_as(key, text, "inference-pool-name");
        } else if !by_flag && !self.environment.contains_key(key.name) {
            self.warn("INFERENCE_POOL_NAME is deprecated; use INFERENCE_POOL");
            let source = Source::Environment("INFERENCE_POOL_NAME");
            self.environment.insert(key.name, RawValue { text, source });
        }
    }

    /// Records a warning: one sentence without the final full stop.
    pub fn warn(&mut self, text: impl Into<String>) {
        self.warnings.push(text.into());
    }

    /// Records a problem.
    pub fn add_problem(&mut self, problem: Problem) {
        self.problems.push(problem);
    }

    /// Returns the value of an environment variable that corresponds to no single key, or `None` if
    /// it is unset or empty.
    pub(super) fn variable(&self, name: &str) -> Option<&str> {
        self.variables.get(name).map(String::as_str)
    }

    /// Returns the value of `key` from the source with the highest precedence, or `None` if only
    /// the default applies.
    fn value(&self, key: &Key) -> Option<&RawValue> {
        let environment = || {
            let value = self.environment.get(key.name)?;
            is_readable(key, &value.text).then_some(value)
        };
        let flag = self.flags.get(key.name);
        flag.or_else(|| self.document.get(key.name))
            .or_else(environment)
    }

    /// Returns the value that a flag, the document or the environment gives for `key`, or `None` if
    /// only the default applies.
    #[must_use]
    pub fn given(&self, key: &Key) -> Option<&str> {
        self.value(key).map(|value| value.text.as_str())
    }

    /// Returns the source of the value of `key`.
    #[must_use]
    pub fn source(&self, key: &Key) -> &Source {
        self.value(key)
            .map_or(&Source::Default, |value| &value.source)
    }

    /// Returns the value of `key`: the one given, or its default.
    #[must_use]
    pub fn text(&self, key: &Key) -> &str {
        let default = self.defaults.get(key.name).copied();
        self.given(key).or(default).unwrap_or(key.default)
    }

    /// Returns the key that specifies the decoder's port: `--model-server-port` or the older
    /// `--vllm-port`.
    pub(super) fn model_server_port(&self) -> &'static Key {
        self.in_effect(RENAMED[0])
    }

    /// Returns the key that specifies whether clients are served with TLS: `--secure-serving` or
    /// the older `--secure-proxy`.
    pub(super) fn secure_serving(&self) -> &'static Key {
        self.in_effect(RENAMED[1])
    }

    /// Returns the one of two names of a key that is in effect. A flag with either name takes
    /// precedence over the document; within the same source, the new name takes precedence.
    fn in_effect(&self, [new, old]: [&'static Key; 2]) -> &'static Key {
        let by_flag = self.has_flag(old) && !self.has_flag(new);
        let alone = self.value(old).is_some() && self.value(new).is_none();
        if by_flag || alone { old } else { new }
    }

    /// Adds a warning for each environment variable that is ignored because it cannot be parsed.
    /// pd-sidecar ignores such variables silently.
    pub(super) fn warn_of_unreadable_variables(&mut self) {
        for key in self.table {
            let Some(RawValue { text, source }) = self.environment.get(key.name) else {
                continue;
            };
            let overruled = self.has_flag(key) || self.document.contains_key(key.name);
            if let Source::Environment(name) = source
                && !overruled
                && !is_readable(key, text)
            {
                let wanted = match key.kind {
                    Kind::Switch => "neither true nor false",
                    Kind::Value(_) | Kind::List(_) => "not a number",
                };
                let text = format!("{name} is `{text}`, which is {wanted}; it is ignored");
                self.warnings.push(text);
            }
        }
    }

    /// Returns all values in effect, each as name, value and source: the keys in the order of
    /// `--help`, then the environment variables that correspond to no single key and are set.
    #[must_use]
    pub fn effective(&self) -> Vec<(&'static str, String, Source)> {
        let hidden = |key: &Key| {
            // Of two names of a key, only one is in effect. An inline document is shown as its
            // entries.
            let is_other_name = RENAMED.iter().any(|names| {
                let is_name = names.iter().any(|name| name.name == key.name);
                is_name && key.name != self.in_effect(*names).name
            });
            is_other_name || key.name == flag_table::CONFIGURATION.name
        };
        let keys = self.table.iter().filter(|key| !hidden(key)).map(|key| {
            let source = self.source(key).clone();
            (key.name, self.text(key).to_owned(), source)
        });
        let variables = self.variables.iter().map(|(name, text)| {
            // Header values contain credentials.
            let text = if name.ends_with("_HEADERS") {
                "(set)".to_owned()
            } else {
                text.clone()
            };
            (*name, text, Source::Environment(name))
        });
        keys.chain(variables).collect()
    }
}

/// Returns whether `text`, the value of `key`'s environment variable, can be parsed as a switch or
/// number if `key` requires one. Its range is checked later.
fn is_readable(key: &Key, text: &str) -> bool {
    match key.kind {
        Kind::Switch => units::switch(text).is_some(),
        Kind::Value("PORT" | "N") => text.parse::<i64>().is_ok(),
        Kind::Value(_) | Kind::List(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::personality::SIDECAR;

    fn empty() -> RawConfig {
        RawConfig::new(flag_table::ALL, &[], &|_| None)
    }

    const NEW: &Key = &flag_table::MODEL_SERVER_PORT;
    const OLD: &Key = &flag_table::VLLM_PORT;

    #[test]
    fn precedence_is_flag_document_environment_default() {
        let key = &flag_table::MOONCAKE_BOOTSTRAP_PORT;
        let variable = |name: &str| (name == "MOONCAKE_BOOTSTRAP_PORT").then(|| "3".to_owned());
        for (flag, document, environment, want) in [
            (true, true, true, "1"),
            (false, true, true, "2"),
            (false, false, true, "3"),
            (false, false, false, "8998"),
            (true, false, false, "1"),
            (false, true, false, "2"),
        ] {
            let mut raw = RawConfig::new(flag_table::ALL, &[], &|name| {
                variable(name).filter(|_| environment)
            });
            if flag {
                raw.set(key, "1");
            }
            if document {
                raw.read_document(&SIDECAR, "x.yaml", "# x\nmooncake-bootstrap-port: 2\n");
            }
            assert_eq!(raw.text(key), want, "{flag} {document} {environment}");
            let source = match want {
                "1" => "--mooncake-bootstrap-port",
                "2" => "x.yaml:2",
                "3" => "environment MOONCAKE_BOOTSTRAP_PORT",
                _ => "default",
            };
            assert_eq!(raw.source(key).to_string(), source);
        }
    }

    #[test]
    fn g3_model_server_port_precedence_across_sources() {
        // Flag and document, each with the new and the old name; the first one given takes
        // precedence.
        for bits in 0..16_u8 {
            let has = |bit: u8| bits & (1 << bit) != 0;
            let mut raw = empty();
            let mut document = String::new();
            if has(0) {
                raw.set(NEW, "1");
            }
            if has(1) {
                raw.set(OLD, "2");
            }
            if has(2) {
                document.push_str("model-server-port: 3\n");
            }
            if has(3) {
                document.push_str("vllm-port: 4\n");
            }
            raw.read_document(&SIDECAR, "x.yaml", &document);
            let want = (0..4_u8)
                .find(|bit| has(*bit))
                .map_or("8200".to_owned(), |bit| (bit + 1).to_string());
            assert_eq!(raw.text(raw.model_server_port()), want, "{bits:04b}");
        }
        let mut first = empty();
        first.set_default(NEW, "8001");
        assert_eq!(first.text(first.model_server_port()), "8001");
        first.set(OLD, "5");
        assert_eq!(first.text(first.model_server_port()), "5");
    }

    #[test]
    fn repeated_list_flags_are_concatenated() {
        let key = &flag_table::ENABLE_TLS;
        let mut raw = empty();
        raw.read_document(&SIDECAR, "x.yaml", "enable-tls: [encoder]");
        assert_eq!(raw.text(key), "encoder");
        for item in ["", "decoder", "prefiller"] {
            raw.add_as(key, item, key.name);
        }
        assert_eq!(raw.text(key), "decoder,prefiller");
    }

    #[test]
    fn every_key_is_listed_once() {
        let raw = empty();
        let names: Vec<_> = raw.effective().into_iter().map(|(name, ..)| name).collect();
        let hidden = [OLD.name, "secure-proxy", "configuration"];
        let keys = flag_table::ALL.iter().map(|key| key.name);
        let want: Vec<_> = keys.filter(|name| !hidden.contains(name)).collect();
        assert_eq!(names, want);
        let mut raw = empty();
        raw.set(OLD, "1");
        let names: Vec<_> = raw.effective().into_iter().map(|(name, ..)| name).collect();
        assert!(names.contains(&OLD.name) && !names.contains(&NEW.name));
    }
}
