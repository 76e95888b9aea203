//! Checks the allowlist of targets: whether it is enabled, and its sources.

use std::path::PathBuf;

use super::super::flag_table;
use super::super::{AllowlistConfig, PoolGroup, PoolRef, Source};
use super::reader::Reader;
use crate::fleet::AllowRule;

/// Namespace of an `InferencePool` that is given by its name only.
const NAMESPACE_DEFAULT: &str = "default";
/// Longest name of a Kubernetes object in bytes.
const OBJECT_NAME_BYTES_MAX: usize = 253;

impl Reader<'_> {
    pub(in crate::config) fn allowlist(&mut self) -> Option<AllowlistConfig> {
        let switch = &flag_table::ENABLE_SSRF_PROTECTION;
        let asked = self.switch(switch);
        let allowlist = AllowlistConfig {
            rules: self.rules(),
            rules_file: Some(self.text(&flag_table::ALLOW_TARGETS_FILE))
                .filter(|path| !path.is_empty())
                .map(PathBuf::from),
            pool: self.pool(),
        };
        for key in [&flag_table::ALLOW_TARGET, &flag_table::ALLOW_TARGETS_FILE] {
            if self.is_given(key) && self.text(key).trim().is_empty() {
                // Probably a variable that is not set.
                let text = "is empty, so it would not restrict targets; leave it out for that, or \
                            give a value";
                self.problem(key, text);
            }
        }
        // Invalid rules count here too; they are reported as a separate problem.
        let own =
            !self.text(&flag_table::ALLOW_TARGET).is_empty() || allowlist.rules_file.is_some();
        if own && !asked && *self.raw.source(switch) != Source::Default {
            self.problem(
                switch,
                "is false, but --allow-target or --allow-targets-file is given; remove one of them \
                 to make clear whether all targets are allowed",
            );
        }
        if asked && !own && allowlist.pool.is_none() {
            self.problem(
                switch,
                "allows no target at all; give --inference-pool, --allow-target or \
                 --allow-targets-file",
            );
        }
        if !asked && !own {
            if allowlist.pool.is_some() {
                self.warnings.push(
                    "--inference-pool has no effect without --enable-ssrf-protection: requests may \
                     name any target"
                        .to_owned(),
                );
            }
            return None;
        }
        Some(allowlist)
    }

    fn rules(&mut self) -> Vec<AllowRule> {
        let key = &flag_table::ALLOW_TARGET;
        let mut rules = Vec::new();
        for item in self.list(key) {
            match AllowRule::parse(item) {
                Ok(rule) => rules.push(rule),
                Err(error) => {
                    let text = format!(
                        "`{item}`: {error}; give HOST[:PORT] or CIDR[:PORT], such as \
                         10.4.0.0/16:8000"
                    );
                    self.problem(key, &text);
                }
            }
        }
        rules
    }

    fn pool(&mut self) -> Option<PoolRef> {
        let key = &flag_table::INFERENCE_POOL;
        let group = self.choice(
            &flag_table::POOL_GROUP,
            &[
                ("inference.networking.k8s.io", PoolGroup::Stable),
                ("inference.networking.x-k8s.io", PoolGroup::Experimental),
            ],
        );
        let text = self.text(key);
        if text.is_empty() {
            return None;
        }
        let (namespace, name) = text.split_once('/').unwrap_or((NAMESPACE_DEFAULT, text));
        if !is_object_name(namespace) || !is_object_name(name) {
            self.wanted(
                key,
                "NAME or NAMESPACE/NAME, with valid Kubernetes object names",
            );
        }
        Some(PoolRef {
            group,
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }
}

/// Returns whether `text` is a valid Kubernetes object name. This is checked because the name is
/// inserted into a URL.
fn is_object_name(text: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends =
        bytes.first().copied().is_some_and(inner) && bytes.last().copied().is_some_and(inner);
    let all = bytes
        .iter()
        .all(|&byte| inner(byte) || byte == b'-' || byte == b'.');
    ends && all && bytes.len() <= OBJECT_NAME_BYTES_MAX
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::check::tests::{Given, checked, checked_in, problems};

    /// The expected allowlist: number of rules, whether it has a rules file, whether it has a pool.
    /// `None` expects no allowlist.
    type Parts = Option<(usize, bool, bool)>;

    const ON: (&super::super::super::Key, &str) = (&flag_table::ENABLE_SSRF_PROTECTION, "true");

    #[test]
    fn g2_pools() {
        let pool = |text| {
            let allowlist = checked(&[ON, (&flag_table::INFERENCE_POOL, text)])
                .config
                .allowlist;
            let pool = allowlist.unwrap().pool.unwrap();
            (pool.namespace, pool.name)
        };
        let of = |namespace: &str, name: &str| (namespace.to_owned(), name.to_owned());
        assert_eq!(pool("pool"), of("default", "pool"));
        assert_eq!(pool("ns/pool.v1-2"), of("ns", "pool.v1-2"));
        for text in ["a/b/c", "/b", "a/", "/", "a b", "a/..", "ns/-x", "Ns/x"] {
            let got = problems(&[ON, (&flag_table::INFERENCE_POOL, text)]);
            assert_eq!(got.len(), 1, "{text}: {got:?}");
            assert!(got[0].starts_with("--inference-pool: `"), "{got:?}");
        }
        let got = problems(&[(&flag_table::POOL_GROUP, "inference.networking.k8s")]);
        assert!(
            got[0].contains("did you mean `inference.networking.k8s.io`?"),
            "{got:?}"
        );
    }

    #[test]
    fn g2_an_allowlist_needs_a_source() {
        let off = (&flag_table::ENABLE_SSRF_PROTECTION, "false");
        let rule = (&flag_table::ALLOW_TARGET, "10.0.0.0/8");
        let file = (&flag_table::ALLOW_TARGETS_FILE, "rules");
        let pool = (&flag_table::INFERENCE_POOL, "pool");
        let table: &[(Given<'_>, Parts)] = &[
            (&[], None),
            (&[off], None),
            (&[pool], None),
            (&[ON, pool], Some((0, false, true))),
            (&[ON, rule], Some((1, false, false))),
            (&[rule], Some((1, false, false))),
            (&[file], Some((0, true, false))),
            (&[rule, file, pool], Some((1, true, true))),
            (
                &[(&flag_table::ALLOW_TARGET, "a:1, [::1]:2,b")],
                Some((3, false, false)),
            ),
        ];
        for (given, want) in table {
            let allowlist = checked(given).config.allowlist;
            let got = allowlist.map(|allowlist| {
                let file = allowlist.rules_file.is_some();
                (allowlist.rules.len(), file, allowlist.pool.is_some())
            });
            assert_eq!(got, *want, "{given:?}");
        }
        assert!(problems(&[ON])[0].contains("allows no target at all"));
        for own in [rule, file] {
            assert!(
                problems(&[off, own])[0].contains("is false, but"),
                "{own:?}"
            );
        }
        let got = problems(&[ON, (&flag_table::ALLOW_TARGET, "10.0.0.0/33,a")]);
        assert_eq!(got.len(), 1, "{got:?}");
        assert!(
            got[0].starts_with("--allow-target: `10.0.0.0/33`: the prefix"),
            "{got:?}"
        );
        let warnings = checked(&[pool]).warnings;
        assert!(
            warnings[0].starts_with("--inference-pool has no effect"),
            "{warnings:?}"
        );
    }

    #[test]
    fn pools_in_variables() {
        let pool = |environment: &[(&str, &str)], given: Given<'_>| {
            let mut raw = crate::config::check::tests::draft_in(environment, given);
            raw.set_old_pool(None, None);
            let allowlist = crate::config::check(&crate::config::personality::SIDECAR, &raw)
                .unwrap()
                .config
                .allowlist
                .unwrap();
            let pool = allowlist.pool.unwrap();
            format!("{}/{}", pool.namespace, pool.name)
        };
        let new = ("INFERENCE_POOL", "a/b");
        let name = ("INFERENCE_POOL_NAME", "d");
        let namespace = ("INFERENCE_POOL_NAMESPACE", "c");
        assert_eq!(pool(&[new], &[ON]), "a/b");
        assert_eq!(pool(&[name, namespace], &[ON]), "c/d");
        assert_eq!(pool(&[name], &[ON]), "default/d");
        assert_eq!(pool(&[new, name, namespace], &[ON]), "a/b");
        assert_eq!(
            pool(&[new], &[ON, (&flag_table::INFERENCE_POOL, "e")]),
            "default/e"
        );
        assert_eq!(checked_in(&[new], &[]).warnings.len(), 1);
    }
}
