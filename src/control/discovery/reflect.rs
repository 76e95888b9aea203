//! A local copy of a collection of Kubernetes objects: listed once, then updated by a watch.
//!
//! It runs forever. Failures are retried, the first time immediately and then with growing delays;
//! meanwhile the objects last read remain valid. The collection is listed again only when the
//! server no longer has the version to watch from (410 Gone), or when a change has raised the
//! number of objects above `POOL_OBJECTS_MAX`.
//!
//! The watcher of `kube-runtime` 5.0 is not used, because it reports neither bookmarks nor that a
//! watch has started: after a failure, the metrics could not show that the watch works again until
//! an object changes. It also repeats a watch that was refused with 410 from the same version.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::StreamExt;
use kube::Client;
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::core::request::Request;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout};

use crate::limits::{
    POOL_BATCH_MAX, POOL_OBJECTS_MAX, POOL_PAGE_OBJECTS, POOL_RESPONSE_SECS_MAX, POOL_RETRY_MS_MAX,
    POOL_RETRY_MS_MIN, POOL_WATCH_SECS, POOL_WATCH_SECS_MIN,
};
use crate::metrics::{AllowSource, AllowlistMetrics};

/// Kubernetes objects by name, reduced to the parts that are kept.
pub(super) type Objects<S, T> = BTreeMap<String, Kept<S, T>>;

/// The parts of a Kubernetes object that are kept. `S` and `T` define which fields of `spec` and
/// `status` are read.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Kept<S, T> {
    pub(super) spec: Option<S>,
    pub(super) status: Option<T>,
}

/// A collection of Kubernetes objects to read: the API client, the path, the selectors, and the
/// metrics to update.
pub(super) struct Collection<'a> {
    pub(super) client: &'a Client,
    /// URL path of the collection, such as `/api/v1/namespaces/default/pods`.
    pub(super) path: String,
    /// Field selector that the objects must match; empty selects all.
    pub(super) fields: String,
    /// Label selector that the objects must match; empty selects all.
    pub(super) labels: String,
    pub(super) source: AllowSource,
    pub(super) metrics: &'a AllowlistMetrics,
}

#[derive(Clone, Debug, Deserialize)]
struct Object<S, T> {
    metadata: Meta,
    spec: Option<S>,
    status: Option<T>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Meta {
    name: String,
    #[serde(default)]
    resource_version: String,
}

#[derive(Debug, Deserialize)]
struct Page<S, T> {
    #[serde(default)]
    metadata: PageMeta,
    #[serde(default = "Vec::new")]
    items: Vec<Object<S, T>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PageMeta {
    #[serde(default)]
    resource_version: String,
    #[serde(default, rename = "continue")]
    rest: String,
}

/// The reason why a list or a watch ended.
enum End {
    /// The server or an intermediary closed the watch, as is normal after a while.
    Closed,
    /// The collection must be listed again, usually because the server no longer has the version to
    /// watch from (410 Gone).
    Gone,
    Failed(String),
}

impl From<kube::Error> for End {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 410 => Self::Gone,
            kube::Error::Api(status) => {
                Self::Failed(format!("{}: {}", status.code, status.message))
            }
            // The outermost error alone does not name the cause.
            error => {
                let mut text = error.to_string();
                let mut source = std::error::Error::source(&error);
                while let Some(inner) = source {
                    text += &format!(": {inner}");
                    source = inner.source();
                }
                Self::Failed(text)
            }
        }
    }
}

/// Lists and watches a collection forever. Calls `on_change` with all objects: first when the list
/// is complete, and then whenever an object was added or removed or its kept parts have changed.
pub(super) async fn reflect<S, T>(
    collection: &Collection<'_>,
    mut on_change: impl FnMut(&Objects<S, T>),
) where
    S: DeserializeOwned + Clone + PartialEq + Send + 'static,
    T: DeserializeOwned + Clone + PartialEq + Send + 'static,
{
    let mut objects: Option<Objects<S, T>> = None;
    let mut version = None;
    let mut pauses = Pauses::default();
    loop {
        let end = match &version {
            None => match collection.list().await {
                Ok((all, listed)) => {
                    version = Some(listed);
                    if objects.as_ref() != Some(&all) {
                        on_change(&all);
                        objects = Some(all);
                    }
                    continue;
                }
                Err(end) => end,
            },
            Some(from) => {
                let mut state = State {
                    objects: objects.get_or_insert_default(),
                    version: from.clone(),
                    on_change: &mut on_change,
                };
                let begun = Instant::now();
                let end = collection.watch(&mut state).await;
                let lasted = begun.elapsed() >= Duration::from_secs(POOL_WATCH_SECS_MIN);
                if lasted || state.version != *from {
                    pauses.none();
                }
                version = Some(state.version);
                end
            }
        };
        match end {
            End::Closed => {}
            End::Gone => version = None,
            End::Failed(why) => {
                collection.metrics.failed(collection.source);
                let what = collection.source.label();
                tracing::warn!(
                    "allowlist: failed to read the {what}: {why}; keeping the last known state"
                );
            }
        }
        tokio::time::sleep(pauses.next(random_ms())).await;
    }
}

/// The objects and the resource version, both of which a watch updates, and the callback for
/// changes.
struct State<'a, S, T, F: FnMut(&Objects<S, T>)> {
    objects: &'a mut Objects<S, T>,
    version: String,
    on_change: &'a mut F,
}

impl<S, T, F> State<'_, S, T, F>
where
    S: PartialEq,
    T: PartialEq,
    F: FnMut(&Objects<S, T>),
{
    /// Applies a batch of events and calls `on_change` at most once. Returns `Some` if an event
    /// ended the watch; later events of the batch are ignored.
    fn take(&mut self, events: Vec<kube::Result<WatchEvent<Object<S, T>>>>) -> Option<End> {
        let mut has_changed = false;
        let mut end = None;
        for event in events {
            match event {
                Ok(WatchEvent::Added(object) | WatchEvent::Modified(object)) => {
                    has_changed |= self.put(object);
                }
                Ok(WatchEvent::Deleted(object)) => {
                    self.version = object.metadata.resource_version;
                    has_changed |= self.objects.remove(&object.metadata.name).is_some();
                }
                Ok(WatchEvent::Bookmark(mark)) => self.version = mark.metadata.resource_version,
                Ok(WatchEvent::Error(status)) => end = Some(kube::Error::Api(status).into()),
                Err(error) => end = Some(error.into()),
            }
            if self.objects.len() > POOL_OBJECTS_MAX {
                // List again: the list fails with an error that names the limit.
                end = Some(End::Gone);
            }
            if end.is_some() {
                break;
            }
        }
        if has_changed {
            (self.on_change)(self.objects);
        }
        end
    }

    fn put(&mut self, object: Object<S, T>) -> bool {
        self.version = object.metadata.resource_version;
        let kept = Kept {
            spec: object.spec,
            status: object.status,
        };
        let before = self.objects.get(&object.metadata.name);
        let has_changed = before != Some(&kept);
        if has_changed {
            self.objects.insert(object.metadata.name, kept);
        }
        has_changed
    }
}

impl Collection<'_> {
    /// Reads all objects, page by page. Returns them and the resource version from which to watch.
    /// Fails if there are more than `POOL_OBJECTS_MAX` objects.
    async fn list<S, T>(&self) -> Result<(Objects<S, T>, String), End>
    where
        S: DeserializeOwned,
        T: DeserializeOwned,
    {
        let mut objects = Objects::new();
        let mut params = ListParams::default()
            .fields(&self.fields)
            .labels(&self.labels)
            .limit(POOL_PAGE_OBJECTS);
        loop {
            let request = Request::new(&self.path).list(&params);
            let request = request.map_err(kube::Error::BuildRequest)?;
            let text = self.within(self.client.request_text(request)).await?;
            let page: Page<S, T> = serde_json::from_str(&text).map_err(kube::Error::SerdeError)?;
            self.metrics.heard(self.source);
            for object in page.items {
                let kept = Kept {
                    spec: object.spec,
                    status: object.status,
                };
                objects.insert(object.metadata.name, kept);
            }
            if objects.len() > POOL_OBJECTS_MAX {
                return Err(End::Failed(format!("more than {POOL_OBJECTS_MAX} objects")));
            }
            if page.metadata.rest.is_empty() {
                return Ok((objects, page.metadata.resource_version));
            }
            params.continue_token = Some(page.metadata.rest);
        }
    }

    /// Watches the collection for changes since the resource version in `state`, and applies the
    /// changes to `state`. Returns the reason why the watch ended.
    async fn watch<S, T, F>(&self, state: &mut State<'_, S, T, F>) -> End
    where
        S: DeserializeOwned + Clone + PartialEq + Send + 'static,
        T: DeserializeOwned + Clone + PartialEq + Send + 'static,
        F: FnMut(&Objects<S, T>),
    {
        let params = WatchParams::default()
            .fields(&self.fields)
            .labels(&self.labels)
            .timeout(POOL_WATCH_SECS);
        let request = match Request::new(&self.path).watch(&params, &state.version) {
            Ok(request) => request,
            Err(error) => return kube::Error::BuildRequest(error).into(),
        };
        let begun = self.client.request_events::<Object<S, T>>(request);
        let events = match self.within(begun).await {
            Ok(events) => events,
            Err(end) => return end,
        };
        self.metrics.heard(self.source);
        let mut events = std::pin::pin!(events.ready_chunks(POOL_BATCH_MAX));
        // The server closes the watch earlier than this. If it has not, the connection is dead.
        let until =
            Instant::now() + self.response_timeout() + Duration::from_secs(POOL_WATCH_SECS.into());
        while let Ok(Some(batch)) = tokio::time::timeout_at(until, events.next()).await {
            if let Some(end) = state.take(batch) {
                return end;
            }
            self.metrics.heard(self.source);
        }
        End::Closed
    }

    const fn response_timeout(&self) -> Duration {
        Duration::from_secs(POOL_RESPONSE_SECS_MAX)
    }

    async fn within<V>(&self, asked: impl Future<Output = kube::Result<V>>) -> Result<V, End> {
        match timeout(self.response_timeout(), asked).await {
            Ok(responded) => Ok(responded?),
            Err(_) => Err(End::Failed(format!(
                "no response within {POOL_RESPONSE_SECS_MAX} s"
            ))),
        }
    }
}

/// Delays between attempts to reach the Kubernetes API: zero first, then exponentially growing up
/// to [`POOL_RETRY_MS_MAX`]. The field is the number of delays since the last success.
#[derive(Debug, Default)]
struct Pauses(u32);

impl Pauses {
    /// Resets the delays after a success.
    fn none(&mut self) {
        self.0 = 0;
    }

    /// Returns the next delay. `random`, any number, determines by how much it is shortened (by
    /// less than half), so that many proxies do not retry at the same time.
    fn next(&mut self, random: u64) -> Duration {
        let attempt = self.0;
        self.0 = self.0.saturating_add(1);
        let Some(doublings) = attempt.checked_sub(1) else {
            return Duration::ZERO;
        };
        let ms = POOL_RETRY_MS_MIN << doublings.min(16);
        let ms = ms.min(POOL_RETRY_MS_MAX);
        Duration::from_millis(ms - random % (ms / 2))
    }
}

/// Returns the number of microseconds since the start of the current second, which is random enough
/// to spread retries.
fn random_ms() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| u64::from(since.subsec_micros()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_reset() {
        let mut pauses = Pauses::default();
        let next = |pauses: &mut Pauses| u64::try_from(pauses.next(0).as_millis()).unwrap();
        assert_eq!(next(&mut pauses), 0);
        let mut last = next(&mut pauses);
        assert_eq!(last, POOL_RETRY_MS_MIN);
        for _ in 0..100 {
            let now = next(&mut pauses);
            assert!(now == last * 2 || now == POOL_RETRY_MS_MAX, "{now}");
            last = now;
        }
        assert_eq!(last, POOL_RETRY_MS_MAX);
        let random = Pauses(50).next(u64::MAX).as_millis();
        assert!(random > u128::from(POOL_RETRY_MS_MAX / 2));
        pauses.none();
        assert_eq!(next(&mut pauses), 0);
    }
}
