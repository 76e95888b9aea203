//! The one owner of the fleet's state: applies changes and creates snapshots.

use std::sync::Arc;

use super::endpoint::{Endpoint, EndpointId, EndpointSpec, Health};
use super::snapshot::{Allow, MoriHosts, Pool, Service, Snapshot};
use super::{AllowList, AllowRule, EngineVersion};

/// A change of the fleet's state.
#[derive(Clone, Debug)]
pub enum Change {
    /// The rules of one source of the allowlist, which replace its previous ones.
    Allow(RuleSource, Vec<AllowRule>),
    /// The pods of a `MoRI-IO` deployment, with names resolved.
    Mori(MoriHosts),
    /// The result of a health check.
    Health(EndpointId, Health),
    /// The version that an engine has stated; `None` if it states none.
    Version(EndpointId, Option<EngineVersion>),
    /// Whether the process accepts requests.
    Service(Service),
}

/// A source of the allowlist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RuleSource {
    /// The configuration.
    Fixed,
    /// The rules file.
    File,
    /// The pods of an `InferencePool`.
    Pods,
}

/// The state of the fleet.
#[derive(Debug, Default)]
pub struct Registry {
    snapshot: Snapshot,
    endpoints_added: u32,
    /// The rules of each source, in the order of [`RuleSource`]; `None` without an allowlist.
    rules: Option<[Vec<AllowRule>; 3]>,
}

impl Registry {
    /// Creates the state of a process with these pools.
    #[must_use]
    pub fn new(pools: Vec<Vec<EndpointSpec>>) -> Self {
        let mut registry = Self::default();
        let pools = pools.into_iter().map(|endpoints| Pool {
            endpoints: endpoints
                .into_iter()
                .map(|spec| registry.add(spec))
                .collect(),
        });
        let pools = pools.collect();
        registry.snapshot.pools = pools;
        registry
    }

    /// Enables the allowlist, without rules. `awaited` is the name of the `InferencePool` whose
    /// pods it must contain before it is complete.
    pub fn enable_allowlist(&mut self, awaited: Option<String>) {
        self.rules = Some(Default::default());
        let list = AllowList::default();
        self.snapshot.allow = Some(Arc::new(Allow { list, awaited }));
    }

    fn add(&mut self, spec: EndpointSpec) -> Arc<Endpoint> {
        let id = EndpointId(self.endpoints_added);
        self.endpoints_added += 1;
        Arc::new(Endpoint::new(id, spec))
    }

    /// Applies a change. Returns whether shards must be given a new snapshot to see it.
    pub fn apply(&mut self, change: Change) -> bool {
        match change {
            Change::Allow(source, rules) => self.allow(source, rules),
            Change::Mori(hosts) => self.snapshot.mori = Some(Arc::new(hosts)),
            Change::Service(service) => self.snapshot.service = service,
            Change::Health(id, health) => {
                self.with_endpoint(id, |endpoint| endpoint.set_health(health));
                return false;
            }
            Change::Version(id, version) => {
                self.with_endpoint(id, |endpoint| endpoint.set_version(version));
                return false;
            }
        }
        self.snapshot.epoch += 1;
        true
    }

    /// Calls `change` with an endpoint, if it still exists.
    fn with_endpoint(&self, id: EndpointId, change: impl FnOnce(&Endpoint)) {
        let mut endpoints = self.snapshot.endpoints();
        if let Some(endpoint) = endpoints.find(|endpoint| endpoint.id == id) {
            change(endpoint);
        }
    }

    /// Merges the new rules of a source with those of the others. Does nothing without an
    /// allowlist.
    fn allow(&mut self, source: RuleSource, rules: Vec<AllowRule>) {
        let (Some(sources), Some(allow)) = (&mut self.rules, &self.snapshot.allow) else {
            return;
        };
        sources[source as usize] = rules;
        let awaited = match source {
            RuleSource::Pods => None,
            RuleSource::Fixed | RuleSource::File => allow.awaited.clone(),
        };
        let list = AllowList::new(sources.iter().flatten());
        self.snapshot.allow = Some(Arc::new(Allow { list, awaited }));
    }

    /// Returns the current state.
    #[must_use]
    pub const fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{EndpointIndex, Permit, Target};

    fn target(text: &str) -> Target {
        Target::parse(text.as_bytes()).unwrap()
    }

    fn rules(texts: &[&str]) -> Vec<AllowRule> {
        let rules = texts.iter().map(|text| AllowRule::parse(text).unwrap());
        rules.collect()
    }

    fn registry() -> Registry {
        let pools = ["127.0.0.1:8200", "127.0.0.1:8201"].map(|text| {
            vec![EndpointSpec {
                target: target(text),
                addresses: Vec::new(),
            }]
        });
        Registry::new(pools.into())
    }

    #[test]
    fn requests_in_flight_are_counted_until_their_reservation_is_dropped() {
        let mut registry = registry();
        let [first, second] = [0, 1].map(|pool| EndpointIndex { pool, at: 0 });
        let in_flight = |registry: &Registry, pool: usize| {
            registry.snapshot().pools[pool].endpoints[0].in_flight()
        };
        let one = registry.snapshot().reserve(first).unwrap();
        let other = registry.snapshot().reserve(first).unwrap();
        assert_eq!(
            (one.in_flight(), one.target.to_string()),
            (2, "127.0.0.1:8200".to_owned())
        );
        // A new snapshot has the same endpoints.
        assert!(registry.apply(Change::Service(Service::Settling)));
        drop(other);
        assert_eq!(in_flight(&registry, 0), 1);
        assert_eq!(registry.snapshot().reserve(second).unwrap().in_flight(), 1);
        assert_eq!(in_flight(&registry, 1), 0);
        for (pool, at) in [(2, 0), (0, 1)] {
            let absent = EndpointIndex { pool, at };
            assert!(registry.snapshot().reserve(absent).is_none());
        }
    }

    #[test]
    fn health_and_version_need_no_new_snapshot() {
        let mut registry = registry();
        let id = registry.snapshot().pools[1].endpoints[0].id;
        let before = registry.snapshot().clone();
        assert!(!registry.apply(Change::Health(id, Health::Silent)));
        assert_eq!(before.pools[1].endpoints[0].health(), Health::Silent);
        assert_eq!(before.pools[0].endpoints[0].health(), Health::Unknown);
        let version = EngineVersion::read(br#"{"version":"0.32.0"}"#);
        assert!(!registry.apply(Change::Version(id, version.clone())));
        assert_eq!(
            before.pools[1].endpoints[0].version().as_deref(),
            version.as_ref()
        );
        assert_eq!(before.pools[0].endpoints[0].version(), None);
        assert!(!registry.apply(Change::Version(id, None)));
        assert_eq!(before.pools[1].endpoints[0].version(), None);
        assert_eq!(registry.snapshot().epoch, before.epoch);
    }

    #[test]
    fn the_rules_of_a_source_replace_its_previous_ones() {
        let mut registry = registry();
        registry.apply(Change::Allow(RuleSource::File, rules(&["ignored"])));
        assert!(registry.snapshot().allow.is_none(), "there is no allowlist");
        registry.enable_allowlist(Some("ns/pool".to_owned()));
        let check = |registry: &Registry, text| {
            let allow = registry.snapshot().allow.clone().unwrap();
            allow.check(&target(text))
        };
        registry.apply(Change::Allow(RuleSource::Fixed, rules(&["a:80"])));
        registry.apply(Change::Allow(RuleSource::File, rules(&["b:80"])));
        for (text, want) in [
            ("a:80", Permit::Allowed),
            ("b:80", Permit::Allowed),
            ("c:80", Permit::Unknown),
        ] {
            assert_eq!(check(&registry, text), want, "{text}");
        }
        registry.apply(Change::Allow(RuleSource::Pods, rules(&["c:80"])));
        registry.apply(Change::Allow(RuleSource::File, rules(&[])));
        for (text, want) in [
            ("a:80", Permit::Allowed),
            ("b:80", Permit::Denied),
            ("c:80", Permit::Allowed),
        ] {
            assert_eq!(check(&registry, text), want, "{text}");
        }
        assert_eq!(registry.snapshot().allow.as_ref().unwrap().list.len(), 2);
    }
}
