//! Checks the manifests in `tools/deploy/kubernetes`: they are valid YAML, the binary accepts their
//! arguments, and they are consistent with each other and with the Kubernetes API requests of the
//! binary.

use serde_json::{Value, json};

/// Returns the YAML documents in the manifest file `name`.
fn manifest(name: &str) -> Vec<Value> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tools/deploy/kubernetes");
    let text = std::fs::read_to_string(format!("{folder}/{name}")).unwrap();
    serde_saphyr::from_multiple(&text).unwrap()
}

/// Returns the sidecar's container in the manifest `decode.yaml`.
fn sidecar() -> Value {
    let documents = manifest("decode.yaml");
    let [deployment] = documents.as_slice() else {
        panic!("{documents:?}")
    };
    assert_eq!(deployment["kind"], "Deployment");
    let labels = &deployment["spec"]["selector"]["matchLabels"];
    let template = &deployment["spec"]["template"];
    assert_eq!(labels, &template["metadata"]["labels"]);
    template["spec"]["initContainers"][0].clone()
}

/// Returns the value of the container's argument `name`. Panics if there is no such argument.
fn value<'a>(container: &'a Value, name: &str) -> &'a str {
    let args = container["args"].as_array().unwrap();
    let mut args = args.iter().map(|arg| arg.as_str().unwrap());
    args.find_map(|arg| arg.strip_prefix(name)?.strip_prefix('='))
        .unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn ports_and_probes_of_the_sidecar_agree() {
    let sidecar = sidecar();
    assert_eq!(sidecar["restartPolicy"], "Always");
    let port = |name: &str| {
        let ports = sidecar["ports"].as_array().unwrap();
        let port = ports.iter().find(|port| port["name"] == name).unwrap();
        port["containerPort"].to_string()
    };
    assert_eq!(value(&sidecar, "--port"), port("http"));
    assert_eq!(
        value(&sidecar, "--admin-address"),
        format!(":{}", port("admin"))
    );
    for (probe, path) in [("livenessProbe", "/livez"), ("readinessProbe", "/readyz")] {
        let get = &sidecar[probe]["httpGet"];
        assert_eq!(get, &json!({"path": path, "port": "admin"}));
    }
    // A startup probe would keep the engine from starting until the probe passes.
    assert_eq!(sidecar["startupProbe"], Value::Null);
    let engine = &manifest("decode.yaml")[0]["spec"]["template"]["spec"]["containers"][0];
    let port = engine["ports"][0]["containerPort"].to_string();
    assert_eq!(value(engine, "--port"), port);
    assert_eq!(value(&sidecar, "--model-server-port"), port);
}

#[test]
fn the_role_grants_exactly_the_access_that_ringside_uses() {
    let documents = manifest("rbac.yaml");
    let kinds: Vec<_> = documents
        .iter()
        .map(|one| one["kind"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["ServiceAccount", "Role", "RoleBinding"]);
    let spec = &manifest("decode.yaml")[0]["spec"]["template"]["spec"];
    assert_eq!(spec["serviceAccountName"], documents[0]["metadata"]["name"]);
    let (role, binding) = (&documents[1], &documents[2]);
    assert_eq!(binding["roleRef"]["name"], role["metadata"]["name"]);
    let account = &documents[0]["metadata"];
    assert_eq!(binding["subjects"][0]["name"], account["name"]);
    assert_eq!(binding["subjects"][0]["namespace"], account["namespace"]);
    let groups = [
        "inference.networking.k8s.io",
        "inference.networking.x-k8s.io",
    ];
    let verbs = ["get", "list", "watch"];
    assert_eq!(
        role["rules"],
        json!([
            {"apiGroups": [""], "resources": ["pods"], "verbs": verbs},
            {"apiGroups": groups, "resources": ["inferencepools"], "verbs": verbs},
        ])
    );
}

#[cfg(feature = "k8s")]
#[test]
fn the_binary_accepts_the_arguments_of_the_manifest() {
    use crate::allowlist::{BODY, status};
    use crate::harness::{CHAT, Launch};
    use crate::harness_more::pair_from;
    use crate::kube::Api;

    let api = Api::start();
    api.set_pool("vllm");
    api.set_pod("prefill", "vllm", &["127.0.0.1"]);
    let container = sidecar();
    let args = container["args"].as_array().unwrap();
    let args: Vec<String> = args
        .iter()
        .map(|arg| arg.as_str().unwrap())
        .map(|arg| {
            arg.replace("$(POD_NAMESPACE)", "prod")
                .replace("POOL_NAME", "pool")
        })
        .collect();
    assert_eq!(args[0], "sidecar");
    // `Launch` sets these flags itself.
    let ports = ["--port=", "--admin-address=", "--model-server-port="];
    let args: Vec<&str> = args[1..].iter().map(String::as_str).collect();
    let args: Vec<&str> = args
        .into_iter()
        .filter(|arg| !ports.iter().any(|port| arg.starts_with(port)))
        .collect();
    let kubeconfig = api.kubeconfig();
    let launch = Launch {
        args: &args,
        env: &[("KUBECONFIG", &kubeconfig), ("POD_IP", "10.0.0.1")],
        ..Launch::default()
    };
    let pair = pair_from(&launch, |_| {}, |_| {});
    pair.sidecar.post(CHAT, BODY, &[]).expect(200);
    assert_eq!(status(&pair.sidecar, &pair.prefill.host_port()), 200);
    assert_eq!(status(&pair.sidecar, "10.0.0.9:8000"), 403);
}
