//! Adds the pods of an `InferencePool` to the allowlist.
//!
//! The pool selects its pods by labels. Both the pool and the selected pods are watched. A pod is
//! allowed by each of its addresses and by its name, on any port and in any phase: whether it can
//! serve is for the scheduler to decide.

use std::collections::BTreeMap;
use std::sync::Arc;

use kube::{Client, Config};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::Value;
use tokio::sync::watch;

use super::reflect::{Collection, Objects, reflect};
use crate::cli::Exit;
use crate::config::{PoolGroup, PoolRef};
use crate::control::publish::Changes;
use crate::fleet::{AllowRule, Change, RuleSource};
use crate::metrics::{AllowSource, AllowlistMetrics};

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct PoolSpec {
    selector: Option<Value>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PodStatus {
    #[serde(rename = "podIP", default)]
    pod_ip: String,
    #[serde(rename = "podIPs", default)]
    pod_ips: Vec<PodIp>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
struct PodIp {
    #[serde(default)]
    ip: String,
}

type Pools = Objects<PoolSpec, IgnoredAny>;
type Pods = Objects<IgnoredAny, PodStatus>;

/// The pods that the watched `InferencePool` selects at present.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Wanted {
    /// The pool has not been read yet. The rules for its pods are left unchanged.
    Unknown,
    /// The pool does not exist, or its selector cannot be used. No pod is allowed.
    Nothing,
    /// The pool selects the pods that match this label selector, such as `app=vllm,role=decode`.
    Labels(String),
}

/// Spawns the tasks that watch a pool and its pods and send the rules for them to `changes`.
///
/// # Errors
/// Returns an error if neither a kubeconfig nor a pod's service account is present, or if the
/// client configuration is invalid.
pub(in crate::control) async fn follow(
    pool: &PoolRef,
    metrics: &Arc<AllowlistMetrics>,
    changes: Changes,
) -> Result<(), Exit> {
    let refused = |why: String| Exit::config(format!("ringside: --inference-pool {pool}: {why}"));
    let mut config = Config::infer().await.map_err(|error| {
        refused(format!(
            "no access to the Kubernetes API: {error}; set KUBECONFIG, or run in a pod with a \
             service account"
        ))
    })?;
    // `reflect` retries failed requests with its own delays.
    config.default_retry = false;
    let client = Client::try_from(config).map_err(|error| {
        refused(format!(
            "the Kubernetes client configuration is invalid: {error}"
        ))
    })?;
    metrics.uses(AllowSource::Pool);
    metrics.uses(AllowSource::Pods);
    let (sender, wanted_changes) = watch::channel(Wanted::Unknown);
    let pods = follow_pods(
        client.clone(),
        pool.clone(),
        Arc::clone(metrics),
        changes,
        wanted_changes,
    );
    tokio::spawn(pods);
    tokio::spawn(follow_pool(
        client,
        pool.clone(),
        Arc::clone(metrics),
        sender,
    ));
    Ok(())
}

async fn follow_pool(
    client: Client,
    pool: PoolRef,
    metrics: Arc<AllowlistMetrics>,
    sender: watch::Sender<Wanted>,
) {
    let (group, version) = (pool.group.name(), pool.group.version());
    let namespace = &pool.namespace;
    let collection = Collection {
        client: &client,
        path: format!("/apis/{group}/{version}/namespaces/{namespace}/inferencepools"),
        fields: format!("metadata.name={}", pool.name),
        labels: String::new(),
        source: AllowSource::Pool,
        metrics: &metrics,
    };
    reflect(&collection, |pools: &Pools| {
        let wanted = match pools.get(&pool.name) {
            None => {
                tracing::warn!("InferencePool {pool} does not exist: none of its pods are allowed; check --inference-pool and --pool-group");
                Wanted::Nothing
            }
            Some(kept) => {
                let selector = kept.spec.as_ref().and_then(|spec| spec.selector.as_ref());
                match labels(pool.group, selector) {
                    Ok(labels) => Wanted::Labels(labels),
                    Err(why) => {
                        tracing::warn!("InferencePool {pool}: {why}: none of its pods are allowed");
                        Wanted::Nothing
                    }
                }
            }
        };
        sender.send_if_modified(|before| std::mem::replace(before, wanted.clone()) != wanted);
    })
    .await;
}

/// Watches the pods that match the pool's current selector and puts them on the allowlist. After
/// the selector has changed, the previous pods remain allowed until the new ones have been listed.
async fn follow_pods(
    client: Client,
    pool: PoolRef,
    metrics: Arc<AllowlistMetrics>,
    changes: Changes,
    mut wanted_changes: watch::Receiver<Wanted>,
) {
    loop {
        let wanted = wanted_changes.borrow_and_update().clone();
        let following = async {
            match wanted {
                Wanted::Unknown => {}
                Wanted::Nothing => {
                    metrics.heard(AllowSource::Pods);
                    changes
                        .apply(Change::Allow(RuleSource::Pods, Vec::new()))
                        .await;
                }
                Wanted::Labels(labels) => {
                    tracing::info!("InferencePool {pool} selects pods with {labels}");
                    let collection = Collection {
                        client: &client,
                        path: format!("/api/v1/namespaces/{}/pods", pool.namespace),
                        fields: String::new(),
                        labels,
                        source: AllowSource::Pods,
                        metrics: &metrics,
                    };
                    // Only the latest rules matter, so nothing queues up if publishing is slow.
                    let (sender, latest) = watch::channel(Vec::new());
                    let reflecting = reflect(&collection, |pods: &Pods| {
                        sender.send_replace(rules(pods));
                    });
                    tokio::join!(reflecting, publish(latest, &changes));
                }
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = following => {}
            changed = wanted_changes.changed() => if changed.is_err() {
                return;
            },
        }
    }
}

/// Publishes the rules for the pods each time they change.
async fn publish(mut latest: watch::Receiver<Vec<AllowRule>>, changes: &Changes) {
    while latest.changed().await.is_ok() {
        let rules = latest.borrow_and_update().clone();
        changes.apply(Change::Allow(RuleSource::Pods, rules)).await;
    }
}

/// Returns a pool's label selector in the text form that the API takes as a query parameter. The
/// error is the reason why the selector cannot be used, for example that it is empty.
fn labels(group: PoolGroup, selector: Option<&Value>) -> Result<String, &'static str> {
    let selector = selector.ok_or("it has no selector")?;
    let labels = match group {
        PoolGroup::Stable => selector
            .get("matchLabels")
            .ok_or("its selector has no matchLabels")?,
        PoolGroup::Experimental => selector,
    };
    let labels = labels.as_object().ok_or("its selector is not a map")?;
    let labels = labels.iter().map(|(name, value)| {
        let value = value.as_str()?;
        Some((name.as_str(), value))
    });
    let labels: Option<BTreeMap<&str, &str>> = labels.collect();
    let labels = labels.ok_or("its selector has a value that is not a string")?;
    if labels.is_empty() {
        // The API would return every pod of the namespace.
        return Err("its selector is empty");
    }
    let labels = labels.iter().map(|(name, value)| format!("{name}={value}"));
    Ok(labels.collect::<Vec<_>>().join(","))
}

/// Returns the allowlist rules for the pods: one for each pod name and pod address, valid for any
/// port. Skips names and addresses that are not a valid host.
fn rules(pods: &Pods) -> Vec<AllowRule> {
    let hosts = pods.iter().flat_map(|(name, kept)| {
        let status = kept.status.iter();
        let addresses = status.flat_map(|status| {
            let more = status.pod_ips.iter().map(|one| &one.ip);
            std::iter::once(&status.pod_ip).chain(more)
        });
        std::iter::once(name).chain(addresses)
    });
    hosts
        .filter(|host| !host.is_empty())
        .filter_map(|host| AllowRule::host(host).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::reflect::Kept;
    use super::*;
    use crate::fleet::{AllowList, Target};
    use serde_json::json;

    #[test]
    fn a2_selectors_of_both_groups() {
        use PoolGroup::{Experimental, Stable};
        let flat = json!({"app": "vllm", "a.b/role": "decode"});
        let nested = json!({"matchLabels": flat});
        let read = Ok("a.b/role=decode,app=vllm".to_owned());
        assert_eq!(labels(Stable, Some(&nested)), read);
        assert_eq!(labels(Experimental, Some(&flat)), read);
        for (group, selector) in [
            (Stable, Some(&flat)),
            (Stable, None),
            (Experimental, None),
            (Experimental, Some(&nested)),
            (Stable, Some(&json!({"matchLabels": {}}))),
            (Stable, Some(&json!({"matchLabels": {"a": 1}}))),
            (Stable, Some(&json!({"matchLabels": "app=vllm"}))),
            (Stable, Some(&json!("app=vllm"))),
            (Experimental, Some(&json!({}))),
            (Experimental, Some(&json!({"a": "b", "c": null}))),
        ] {
            assert!(labels(group, selector).is_err(), "{group:?} {selector:?}");
        }
    }

    #[test]
    fn names_and_all_addresses_of_pods() {
        let pod = |status: Value| Kept {
            spec: None,
            status: serde_json::from_value(status).unwrap(),
        };
        let mut pods = Pods::new();
        let both =
            json!({"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::0:1"}]});
        pods.insert("one".to_owned(), pod(both));
        pods.insert("two".to_owned(), pod(json!({"phase": "Pending"})));
        pods.insert("three".to_owned(), pod(Value::Null));
        let list = AllowList::new(&rules(&pods));
        for (target, want) in [
            ("one:8000", true),
            ("10.0.0.1:8000", true),
            ("[fd00::1]:1", true),
            ("two:80", true),
            ("three:80", true),
            ("four:80", false),
            ("10.0.0.2:80", false),
        ] {
            let target = Target::parse(target.as_bytes()).unwrap();
            assert_eq!(list.permits(&target), want, "{target}");
        }
        assert_eq!(list.len(), 5);
    }
}
