//! A minimal Kubernetes API server for the watch of a pool: collections that are listed in pages
//! and watched, with failures that a test selects.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};

use crate::allowlist::Folder;
use crate::harness_more::{RawConn, RawEngine};

/// Bearer token in the kubeconfig.
const TOKEN: &str = "suite-token";
/// Number of objects per page of a list, regardless of the limit in the request.
const PAGE: usize = 2;
/// Interval at which an idle watch checks whether its client has disconnected.
const LOOK: Duration = Duration::from_millis(100);

pub(crate) const PODS: &str = "/api/v1/namespaces/prod/pods";
pub(crate) const POOLS: &str =
    "/apis/inference.networking.k8s.io/v1/namespaces/prod/inferencepools";
pub(crate) const OLD_POOLS: &str =
    "/apis/inference.networking.x-k8s.io/v1alpha2/namespaces/prod/inferencepools";

/// How the server handles requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Behaviour {
    #[default]
    Well,
    /// The server closes the connection instead of sending a response.
    Down,
    /// The server refuses each request with this status.
    Refuses(u16),
    /// The server does not respond to lists of pods until the test selects another behaviour.
    HoldsPods,
}

/// How the server ends a watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// The response is completed, as when the server's watch timeout expires.
    Clean,
    /// The response is truncated within a line.
    Abrupt,
    /// An error event of code 410 is sent, and the response is completed.
    Gone,
}

/// A change of an object. `before` is `None` for an object that was created, `after` for one that
/// was removed. A bookmark has neither.
struct Change {
    version: u64,
    path: &'static str,
    before: Option<Value>,
    after: Option<Value>,
}

#[derive(Default)]
struct State {
    version: u64,
    /// The oldest resource version from which a watch can start. Older ones are refused with 410.
    oldest: u64,
    objects: BTreeMap<(&'static str, String), Value>,
    changes: Vec<Change>,
    /// Number of times that a test has ended all watches, and how it ended them the last time.
    cuts: (u64, Option<Cut>),
    mood: Behaviour,
    /// The request lines of all requests so far, in order.
    seen: Vec<String>,
    /// Descriptions of the problems found in requests, for `expect_sound`.
    wrong: Vec<String>,
    ends: bool,
}

impl State {
    fn set(&mut self, path: &'static str, name: &str, object: Option<Value>) -> Change {
        self.version += 1;
        let version = self.version;
        let after = object.map(|mut object| {
            object["metadata"]["name"] = json!(name);
            object["metadata"]["namespace"] = json!("prod");
            object["metadata"]["resourceVersion"] = json!(version.to_string());
            object
        });
        let key = (path, name.to_owned());
        let before = match &after {
            Some(object) => self.objects.insert(key, object.clone()),
            None => self.objects.remove(&key),
        };
        Change {
            version,
            path,
            before,
            after,
        }
    }
}

/// A running API server. Its watches end when it is dropped.
pub(crate) struct Api {
    state: Arc<(Mutex<State>, Condvar)>,
    server: RawEngine,
    folder: Folder,
}

impl Api {
    pub(crate) fn start() -> Self {
        let state: Arc<(Mutex<State>, Condvar)> = Arc::default();
        state.0.lock().unwrap().version = 1000;
        let shared = Arc::clone(&state);
        let server = RawEngine::start(move |conn, _| serve(conn, &shared));
        Self {
            state,
            server,
            folder: Folder::new(),
        }
    }

    /// Writes a kubeconfig for this server and returns its path.
    pub(crate) fn kubeconfig(&self) -> String {
        let port = self.server.port();
        let config = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: suite\n\
             clusters:\n- name: suite\n  cluster:\n    server: http://127.0.0.1:{port}\n\
             contexts:\n- name: suite\n  context:\n    cluster: suite\n    user: suite\n\
             users:\n- name: suite\n  user:\n    token: {TOKEN}\n"
        );
        self.folder.write("kubeconfig", &config)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.0.lock().unwrap()
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let done = change(&mut self.state());
        self.state.1.notify_all();
        done
    }

    /// Creates or replaces the object `name` in the collection `path`, or removes it if `object` is
    /// `None`. Sends the change to the watches of the collection.
    pub(crate) fn set(&self, path: &'static str, name: &str, object: Option<Value>) {
        self.change(|state| {
            let change = state.set(path, name, object);
            state.changes.push(change);
        });
    }

    /// As `set`, but the change is never sent to a watch.
    pub(crate) fn set_silently(&self, path: &'static str, name: &str, object: Option<Value>) {
        self.change(|state| drop(state.set(path, name, object)));
    }

    /// Creates or replaces the pod `name` with these addresses and this value of the label `app`.
    pub(crate) fn set_pod(&self, name: &str, app: &str, ips: &[&str]) {
        self.set(PODS, name, Some(pod(app, ips)));
    }

    pub(crate) fn remove_pod(&self, name: &str) {
        self.set(PODS, name, None);
    }

    /// Creates or replaces the pool with a selector that requires this value of the label `app`.
    pub(crate) fn set_pool(&self, app: &str) {
        let selector = json!({"matchLabels": {"app": app}});
        self.set(POOLS, "pool", Some(json!({"spec": {"selector": selector}})));
    }

    /// Sends a bookmark with a newer version to the watches of pods, and returns that version.
    pub(crate) fn bookmark(&self) -> u64 {
        self.change(|state| {
            state.version += 1;
            state.changes.push(Change {
                version: state.version,
                path: PODS,
                before: None,
                after: None,
            });
            state.version
        })
    }

    /// Discards all versions except the newest: a watch from an older one is refused with 410.
    pub(crate) fn compact(&self) {
        self.change(|state| state.oldest = state.version);
    }

    /// Ends every watch.
    pub(crate) fn cut(&self, how: Cut) {
        self.change(|state| state.cuts = (state.cuts.0 + 1, Some(how)));
    }

    pub(crate) fn mood(&self, mood: Behaviour) {
        self.change(|state| state.mood = mood);
    }

    /// Returns the number of list requests and the number of watch requests for a collection so
    /// far. Requests for pages after the first are not counted.
    pub(crate) fn asked(&self, path: &str) -> (usize, usize) {
        let state = self.state();
        let of = |line: &&String| {
            let rest = line.strip_prefix("GET ").unwrap();
            let target = rest.split(' ').next().unwrap();
            target.split('?').next().unwrap() == path && !target.contains("&continue=")
        };
        let asked = || state.seen.iter().filter(of);
        let watches = asked().filter(|line| line.contains("watch=true")).count();
        (asked().count() - watches, watches)
    }

    /// Returns whether the request line of any request so far contains all of these texts.
    pub(crate) fn saw(&self, parts: &[&str]) -> bool {
        let state = self.state();
        let mut lines = state.seen.iter();
        lines.any(|line| parts.iter().all(|part| line.contains(part)))
    }

    /// Fails if any request had no token, or was a watch that did not request bookmarks.
    #[track_caller]
    pub(crate) fn expect_sound(&self) {
        assert_eq!(self.state().wrong, Vec::<String>::new());
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        self.change(|state| state.ends = true);
    }
}

/// Returns a pod as the API represents it, including members that ringside does not need.
pub(crate) fn pod(app: &str, ips: &[&str]) -> Value {
    let ips: Vec<Value> = ips.iter().map(|ip| json!({"ip": ip})).collect();
    let mut status = json!({
        "phase": "Running", "hostIP": "10.9.9.9", "podIPs": ips,
        "conditions": [{"type": "Ready", "status": "False", "observedGeneration": 3}],
    });
    if let Some(first) = ips.first() {
        status["podIP"] = first["ip"].clone();
    }
    json!({
        "kind": "Pod", "apiVersion": "v1",
        "metadata": {"labels": {"app": app, "x": "y"}, "generation": 12, "managedFields": [{}]},
        "spec": {"containers": [{"name": "vllm", "ports": [{"containerPort": 8000}]}]},
        "status": status,
    })
}

fn serve(mut conn: RawConn, shared: &(Mutex<State>, Condvar)) {
    while let Some(head) = conn.head() {
        let line = head.lines().next().unwrap().to_owned();
        let target = line.split(' ').nth(1).unwrap().to_owned();
        let mood = {
            let mut state = shared.0.lock().unwrap();
            let bearer = format!("authorization: bearer {TOKEN}");
            if !head.to_ascii_lowercase().contains(&bearer) {
                state.wrong.push(format!("no token: {head}"));
            }
            state.seen.push(line);
            state.mood
        };
        let is_watch = target.contains("watch=true");
        match mood {
            Behaviour::Down => return,
            Behaviour::Refuses(status) => response(&mut conn, status, &refusal(status)),
            Behaviour::Well | Behaviour::HoldsPods if is_watch => {
                return watch(conn, &target, shared);
            }
            Behaviour::Well | Behaviour::HoldsPods => {
                let mut state = shared.0.lock().unwrap();
                while target.starts_with(PODS) && state.mood == Behaviour::HoldsPods && !state.ends
                {
                    state = shared.1.wait(state).unwrap();
                }
                let page = page(&state, &target);
                drop(state);
                response(&mut conn, 200, &page);
            }
        }
    }
}

fn response(conn: &mut RawConn, status: u16, body: &Value) {
    let body = body.to_string();
    conn.say(&format!(
        "HTTP/1.1 {status} Status\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    ));
}

fn refusal(status: u16) -> Value {
    json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": format!("refused with {status}"), "reason": "Suite", "code": status,
    })
}

fn parameter(target: &str, name: &str) -> Option<String> {
    let (_, query) = target.split_once('?')?;
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    let value = pairs
        .filter(|(have, _)| *have == name)
        .map(|(_, v)| v)
        .next()?;
    Some(value.replace("%3D", "=").replace("%2C", ","))
}

/// Returns whether an object matches the selectors of a request.
fn is_wanted(target: &str, object: &Value) -> bool {
    let labels = parameter(target, "labelSelector").unwrap_or_default();
    let has_labels = labels.split(',').filter(|one| !one.is_empty()).all(|one| {
        let (name, value) = one.split_once('=').unwrap();
        object["metadata"]["labels"][name] == value
    });
    let fields = parameter(target, "fieldSelector").unwrap_or_default();
    let has_name = match fields.strip_prefix("metadata.name=") {
        Some(name) => object["metadata"]["name"] == name,
        None => fields.is_empty(),
    };
    has_labels && has_name
}

fn path_of(target: &str) -> &str {
    target.split('?').next().unwrap_or_default()
}

/// Returns one page of the list that a request for `target` selects. The continuation token is the
/// offset of the next page.
fn page(state: &State, target: &str) -> Value {
    let offset = parameter(target, "continue").map_or(0, |text| text.parse().unwrap());
    let all = state.objects.iter();
    let wanted: Vec<&Value> = all
        .filter(|((path, _), object)| *path == path_of(target) && is_wanted(target, object))
        .map(|(_, object)| object)
        .collect();
    let items: Vec<&Value> = wanted.iter().skip(offset).take(PAGE).copied().collect();
    let mut list = json!({
        "kind": "List", "apiVersion": "v1",
        "metadata": {"resourceVersion": state.version.to_string()},
        "items": items,
    });
    if offset + PAGE < wanted.len() {
        list["metadata"]["continue"] = json!((offset + PAGE).to_string());
        list["metadata"]["remainingItemCount"] = json!(wanted.len() - offset - PAGE);
    }
    list
}

/// Returns the event that a watch of `target` receives for a change, or `None` if the change does
/// not concern an object that the watch selects.
fn event(target: &str, change: &Change) -> Option<Value> {
    if change.path != path_of(target) {
        return None;
    }
    let wanted = |object: &Option<Value>| object.clone().filter(|o| is_wanted(target, o));
    let version = change.version.to_string();
    let (kind, object) = match (wanted(&change.before), wanted(&change.after)) {
        (None, Some(object)) => ("ADDED", object),
        (Some(_), Some(object)) => ("MODIFIED", object),
        (Some(mut object), None) => {
            object["metadata"]["resourceVersion"] = json!(version);
            ("DELETED", object)
        }
        (None, None) if change.before.is_none() && change.after.is_none() => {
            let metadata = json!({"resourceVersion": version, "creationTimestamp": null});
            let object = json!({"kind": "Pod", "apiVersion": "v1", "metadata": metadata});
            ("BOOKMARK", object)
        }
        (None, None) => return None,
    };
    Some(json!({"type": kind, "object": object}))
}

/// Responds to a watch request: sends the changes that it selects until a test ends the watch, the
/// API server is dropped, or the client has disconnected. Responds 410 if the version to watch from
/// is older than [`State::oldest`].
fn watch(mut conn: RawConn, target: &str, shared: &(Mutex<State>, Condvar)) {
    let from = parameter(target, "resourceVersion").unwrap();
    let mut sent_version: u64 = from.parse().unwrap();
    let mut state = shared.0.lock().unwrap();
    if !target.contains("allowWatchBookmarks=true") {
        state
            .wrong
            .push(format!("bookmarks are not requested: {target}"));
    }
    let cuts = state.cuts.0;
    if sent_version < state.oldest {
        drop(state);
        return response(&mut conn, 410, &refusal(410));
    }
    conn.say(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
    );
    loop {
        let news: Vec<Value> = state
            .changes
            .iter()
            .filter(|change| change.version > sent_version)
            .filter_map(|change| event(target, change))
            .collect();
        sent_version = sent_version.max(state.version);
        let cut = (state.cuts.0 > cuts).then(|| state.cuts.1.unwrap());
        let ends = state.ends;
        drop(state);
        for event in &news {
            chunk(&mut conn, &format!("{event}\n"));
        }
        match cut {
            Some(Cut::Clean) => {
                conn.say("0\r\n\r\n");
                return;
            }
            Some(Cut::Abrupt) => {
                conn.say("40\r\n{\"type\":\"ADDED\",\"obj");
                return;
            }
            Some(Cut::Gone) => {
                let event = json!({"type": "ERROR", "object": refusal(410)});
                chunk(&mut conn, &format!("{event}\n"));
                conn.say("0\r\n\r\n");
                return;
            }
            None => {}
        }
        if ends || has_left(&conn) {
            return;
        }
        state = shared.0.lock().unwrap();
        if state.version == sent_version && state.cuts.0 == cuts && !state.ends {
            state = shared.1.wait_timeout(state, LOOK).unwrap().0;
        }
    }
}

fn chunk(conn: &mut RawConn, text: &str) {
    conn.say(&format!("{:x}\r\n{text}\r\n", text.len()));
}

fn has_left(conn: &RawConn) -> bool {
    conn.stream.set_nonblocking(true).unwrap();
    let seen = conn.stream.peek(&mut [0]);
    conn.stream.set_nonblocking(false).unwrap();
    matches!(seen, Ok(0))
}
