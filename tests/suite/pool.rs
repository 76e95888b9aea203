//! The allowlist that follows the pods of an InferencePool: conformance row A2, and the ways in
//! which an API server can interrupt or refuse a watch.

use serde_json::json;

use crate::allowlist::{BODY, DENIED, ON, expect_streams_whole, status};
use crate::harness::{CHAT, Launch, PREFILLER, Pair, Sidecar, free_ports, ringside, wait_for};
use crate::harness_more::{expect_handoffs_sound, pair_from};
use crate::kube::{Api, Behaviour, Cut, OLD_POOLS, PODS, POOLS, pod};
use mock_engine::EngineConfig;

const POOL: &str = "--inference-pool=prod/pool";
const ENTRIES: &str = "ringside_allowlist_entries";
const UP: &str = "ringside_allowlist_source_up";
const FAILURES: &str = "ringside_allowlist_source_failures_total";
const OF_PODS: [(&str, &str); 1] = [("source", "pods")];

/// Starts an API server with the pool, which selects pods with `app=vllm`.
fn api() -> Api {
    let api = Api::start();
    api.set_pool("vllm");
    api
}

#[track_caller]
fn pair(api: &Api, args: &[&str]) -> Pair {
    pair_like(api, args, |_| {}, false)
}

#[track_caller]
fn pair_like(
    api: &Api,
    args: &[&str],
    change_decode: impl FnOnce(&mut EngineConfig),
    is_unready: bool,
) -> Pair {
    let kubeconfig = api.kubeconfig();
    let launch = Launch {
        args: &[&[ON, POOL], args].concat(),
        env: &[("KUBECONFIG", &kubeconfig)],
        is_unready,
        ..Launch::default()
    };
    pair_from(&launch, |_| {}, change_decode)
}

/// Sends requests that name the pair's prefiller until one is allowed, or, if `is_allowed` is
/// false, until one is denied.
#[track_caller]
fn wait_allowed(pair: &Pair, is_allowed: bool) {
    let target = pair.prefill.host_port();
    let want = if is_allowed { 200 } else { 403 };
    wait_for("the allowlist to change", || {
        (status(&pair.sidecar, &target) == want).then_some(())
    });
}

#[track_caller]
fn wait_entries(sidecar: &Sidecar, count: f64) {
    sidecar.wait_metric(ENTRIES, &[], count);
}

/// Waits until a collection has been watched at least `watches` times.
#[track_caller]
fn wait_watching(api: &Api, path: &str, watches: usize) {
    wait_for("a watch", || (api.asked(path).1 >= watches).then_some(()));
}

#[test]
fn a2_the_selector_of_either_api_group_is_applied() {
    let api = Api::start();
    let v1 = json!({"spec": {"selector": {"matchLabels": {"app": "vllm", "x": "y"}}}});
    api.set(POOLS, "pool", Some(v1));
    let flat = json!({"spec": {"selector": {"app": "old"}}});
    api.set(OLD_POOLS, "pool", Some(flat.clone()));
    // A pool with another name, which must be ignored.
    api.set(
        POOLS,
        "other",
        Some(json!({"spec": {"selector": {"matchLabels": {"app": "other"}}}})),
    );
    api.set_pod("a", "vllm", &["127.0.0.1", "fd00::1"]);
    api.set_pod("b", "old", &["127.0.0.2"]);
    api.set_pod("c", "other", &["127.0.0.3"]);
    for (group, allowed, selector) in [
        (
            "inference.networking.k8s.io",
            ["a:1", "[fd00::1]:1", "127.0.0.1:1"],
            "app%3Dvllm%2Cx%3Dy",
        ),
        (
            "inference.networking.x-k8s.io",
            ["b:1", "b:2", "127.0.0.2:1"],
            "app%3Dold",
        ),
    ] {
        let flag = format!("--pool-group={group}");
        let pair = pair(&api, &[&flag]);
        for target in allowed {
            assert_eq!(status(&pair.sidecar, target), 502, "{group} {target}");
        }
        let all = [
            "a:1",
            "127.0.0.1:1",
            "b:1",
            "127.0.0.2:1",
            "c:1",
            "127.0.0.3:1",
            "10.9.9.9:1",
        ];
        for target in all.iter().filter(|target| !allowed.contains(target)) {
            assert_eq!(status(&pair.sidecar, target), 403, "{group} {target}");
        }
        assert!(api.saw(&[group, "fieldSelector=metadata.name%3Dpool"]));
        assert!(api.saw(&[PODS, selector]));
    }
    // Selectors without usable labels allow no pods, but the sidecar is ready, as it is without a
    // pool.
    for spec in [
        flat,
        json!({}),
        json!({"spec": {}}),
        json!({"spec": {"selector": {"matchLabels": {"app": 7}}}}),
        json!({"spec": {"selector": {"matchLabels": {}}}}),
    ] {
        api.set(POOLS, "pool", Some(spec.clone()));
        let pair = pair(&api, &[]);
        assert_eq!(status(&pair.sidecar, "a:1"), 403, "{spec}");
        pair.sidecar.wait_stderr("none of its pods are allowed");
    }
    api.set(POOLS, "pool", None);
    let pair = pair(&api, &[]);
    assert_eq!(status(&pair.sidecar, "a:1"), 403);
    pair.sidecar
        .wait_stderr("InferencePool prod/pool does not exist");
    api.expect_sound();
}

#[test]
fn added_changed_and_removed_pods_are_followed() {
    let api = api();
    for nth in 0..5 {
        api.set_pod(&format!("pod-{nth}"), "vllm", &[&format!("10.0.0.{nth}")]);
    }
    let pair = pair(&api, &[]);
    // The list has three pages.
    wait_entries(&pair.sidecar, 10.0);
    assert_eq!(pair.sidecar.metric(UP, &[]), 2.0);
    wait_allowed(&pair, false);
    // New pods have no address at first.
    api.set_pod("new", "vllm", &[]);
    wait_entries(&pair.sidecar, 11.0);
    api.set_pod("new", "vllm", &["127.0.0.1"]);
    wait_allowed(&pair, true);
    api.set_pod("new", "vllm", &["127.0.0.9"]);
    wait_allowed(&pair, false);
    api.set_pod("new", "vllm", &["127.0.0.1"]);
    wait_allowed(&pair, true);
    // A pod that loses the label no longer belongs to the pool.
    api.set_pod("new", "other", &["127.0.0.1"]);
    wait_allowed(&pair, false);
    api.set_pod("new", "vllm", &["127.0.0.1"]);
    wait_allowed(&pair, true);
    api.remove_pod("new");
    wait_allowed(&pair, false);
    wait_entries(&pair.sidecar, 10.0);
    assert_eq!(api.asked(PODS), (1, 1));
    assert_eq!(api.asked(POOLS), (1, 1));
    api.expect_sound();
    pair.sidecar.expect_sound();
}

#[test]
fn an_interrupted_watch_resumes_at_its_last_version() {
    let api = api();
    api.set_pod("one", "vllm", &["10.0.0.1"]);
    let pair = pair(&api, &[]);
    wait_entries(&pair.sidecar, 2.0);
    for (nth, how) in [Cut::Clean, Cut::Abrupt, Cut::Abrupt, Cut::Clean]
        .into_iter()
        .enumerate()
    {
        wait_watching(&api, PODS, nth + 1);
        wait_watching(&api, POOLS, nth + 1);
        api.cut(how);
        // This change may happen while no watch is open.
        api.set_pod(&format!("more-{nth}"), "vllm", &[&format!("10.0.1.{nth}")]);
        #[expect(clippy::cast_precision_loss, reason = "a handful")]
        wait_entries(&pair.sidecar, (4 + 2 * nth) as f64);
    }
    api.set_pod("late", "vllm", &["127.0.0.1"]);
    wait_allowed(&pair, true);
    assert_eq!(api.asked(PODS).0, 1, "listed again unnecessarily");
    assert_eq!(pair.sidecar.metric(FAILURES, &[]), 0.0);
    api.expect_sound();
}

#[test]
fn a_watch_resumes_at_a_bookmark() {
    let api = api();
    let pair = pair(&api, &[]);
    wait_watching(&api, PODS, 1);
    // The bookmark is sent before the watch ends. Afterwards it is the only version that the server
    // still has.
    let version = api.bookmark();
    api.compact();
    api.cut(Cut::Clean);
    wait_watching(&api, PODS, 2);
    assert!(api.saw(&["watch=true", &format!("resourceVersion={version}")]));
    api.set_pod("after", "vllm", &["127.0.0.1"]);
    wait_allowed(&pair, true);
    assert_eq!(api.asked(PODS), (1, 2), "listed again despite the bookmark");
    api.expect_sound();
}

#[test]
fn an_expired_version_causes_a_new_list() {
    let api = api();
    api.set_pod("one", "vllm", &["127.0.0.1"]);
    api.set_pod("two", "vllm", &["10.0.0.2"]);
    let pair = pair(&api, &[]);
    wait_allowed(&pair, true);
    wait_watching(&api, PODS, 1);
    // During a watch. The list reveals the change that the watch did not report.
    api.set_silently(PODS, "one", None);
    api.cut(Cut::Gone);
    wait_allowed(&pair, false);
    wait_entries(&pair.sidecar, 2.0);
    assert_eq!(api.asked(PODS).0, 2);
    // At the start of a watch.
    wait_watching(&api, PODS, 2);
    api.set_silently(PODS, "three", Some(pod("vllm", &["127.0.0.1"])));
    api.compact();
    api.cut(Cut::Abrupt);
    wait_allowed(&pair, true);
    assert_eq!(api.asked(PODS).0, 3);
    // Neither counts as a failure.
    assert_eq!(pair.sidecar.metric(FAILURES, &[]), 0.0);
    api.expect_sound();
}

#[test]
fn the_last_list_applies_while_the_server_is_unreachable() {
    let api = api();
    api.set_pod("one", "vllm", &["127.0.0.1"]);
    let pair = pair(&api, &[]);
    wait_allowed(&pair, true);
    for (mood, failures) in [(Behaviour::Down, 2.0), (Behaviour::Refuses(500), 4.0)] {
        api.mood(mood);
        api.cut(Cut::Abrupt);
        wait_for("failures", || {
            (pair.sidecar.metric(FAILURES, &OF_PODS) >= failures).then_some(())
        });
        pair.sidecar.wait_metric(UP, &[], 0.0);
        wait_allowed(&pair, true);
        assert_eq!(pair.sidecar.admin("/readyz").unwrap().status, 200);
        api.mood(Behaviour::Well);
        pair.sidecar.wait_metric(UP, &[], 2.0);
    }
    pair.sidecar
        .wait_stderr("500: refused with 500; keeping the last known state");
    api.remove_pod("one");
    wait_allowed(&pair, false);
    assert_eq!(api.asked(PODS).0, 1);
}

#[test]
fn changed_selectors_and_deleted_pools_are_followed() {
    let api = api();
    api.set_pod("a", "vllm", &["127.0.0.1"]);
    api.set_pod("b", "next", &["10.0.0.1", "10.0.0.2"]);
    let pair = pair(&api, &[]);
    wait_allowed(&pair, true);
    // The previous pods stay allowed until the new ones are known.
    api.mood(Behaviour::HoldsPods);
    api.set_pool("next");
    wait_for("the list of the new pods", || {
        (api.asked(PODS).0 == 2).then_some(())
    });
    wait_allowed(&pair, true);
    assert_eq!(pair.sidecar.admin("/readyz").unwrap().status, 200);
    api.mood(Behaviour::Well);
    wait_entries(&pair.sidecar, 3.0);
    wait_allowed(&pair, false);
    // Changes of pods outside the pool do not affect the allowlist.
    api.set_pod("a", "vllm", &["127.0.0.1", "127.0.0.7"]);
    api.set_pod("b2", "next", &["10.0.0.3"]);
    wait_entries(&pair.sidecar, 5.0);
    // The pool is deleted and created again.
    api.set(POOLS, "pool", None);
    wait_entries(&pair.sidecar, 0.0);
    assert_eq!(pair.sidecar.admin("/readyz").unwrap().status, 200);
    pair.sidecar
        .wait_stderr("InferencePool prod/pool does not exist");
    api.set_pool("vllm");
    wait_allowed(&pair, true);
    api.expect_sound();
}

#[test]
fn the_sidecar_is_not_ready_until_the_pods_are_known() {
    let api = api();
    api.set_pod("one", "vllm", &["127.0.0.1"]);
    api.mood(Behaviour::HoldsPods);
    let pair = pair_like(&api, &["--allow-target=10.0.0.0/8"], |_| {}, true);
    let page = pair.sidecar.admin("/readyz").unwrap().expect(503).text();
    let line = "[-]allowlist: waiting for the pods of prod/pool\n";
    assert!(page.contains(line), "{page}");
    let target = pair.prefill.host_port();
    let response = pair.sidecar.post(CHAT, BODY, &[(PREFILLER, &target)]);
    let response = response.expect_error(503, "allowlist_not_ready");
    assert_eq!(response.header("retry-after"), Some("1"));
    pair.sidecar
        .wait_metric(DENIED, &[("named", "prefill")], 1.0);
    // Requests that need no pods are served: those without a prefiller, and those whose target is
    // allowed by a rule of the configuration.
    pair.sidecar.post(CHAT, BODY, &[]).expect(200);
    assert_ne!(status(&pair.sidecar, "10.255.255.255:9"), 403);
    api.mood(Behaviour::Well);
    wait_allowed(&pair, true);
    let page = pair
        .sidecar
        .admin("/readyz?verbose")
        .unwrap()
        .expect(200)
        .text();
    assert!(page.contains("[+]allowlist: 3 entries\n"), "{page}");
}

#[test]
fn a_refusing_api_server_is_logged() {
    let api = api();
    api.mood(Behaviour::Refuses(403));
    let pair = pair_like(&api, &[], |_| {}, true);
    pair.sidecar.wait_stderr(
        "failed to read the pool: 403: refused with 403; keeping the last known state",
    );
    assert_eq!(pair.sidecar.admin("/readyz").unwrap().status, 503);
    api.set_pod("one", "vllm", &["127.0.0.1"]);
    api.mood(Behaviour::Well);
    wait_allowed(&pair, true);
}

#[test]
fn missing_access_to_an_api_server_is_a_configuration_error() {
    let port = free_ports(1);
    let run = ringside()
        .args(["sidecar", "--secure-proxy=false", "--admin-address=off"])
        .args([&format!("--port={port}"), ON, POOL])
        .env("KUBECONFIG", "/nowhere/kubeconfig")
        .env("HOME", "/nowhere")
        .env_remove("KUBERNETES_SERVICE_HOST")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(3), "{text}");
    assert!(
        text.contains("--inference-pool prod/pool: no access to the Kubernetes API"),
        "{text}"
    );
}

#[test]
fn running_streams_survive_changes_of_the_pods() {
    let api = api();
    api.set_pod("prefill", "vllm", &["127.0.0.1"]);
    let slow = |config: &mut EngineConfig| config.itl = std::time::Duration::from_millis(40);
    let pair = pair_like(&api, &[], slow, false);
    wait_allowed(&pair, true);
    expect_streams_whole(&pair, |changes| {
        // The prefiller of all streams is removed and added again, and the watch is interrupted in
        // between.
        match changes % 4 {
            0 => api.remove_pod("prefill"),
            1 | 3 => api.set_pod("prefill", "vllm", &["127.0.0.1"]),
            _ => api.set(POOLS, "pool", None),
        }
        if changes % 4 == 3 {
            api.set_pool("vllm");
        }
        api.cut([Cut::Clean, Cut::Abrupt, Cut::Gone][changes % 3]);
        wait_allowed(&pair, changes % 2 == 1);
    });
    expect_handoffs_sound(&pair);
    pair.sidecar.expect_sound();
    api.expect_sound();
}
