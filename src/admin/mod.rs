//! The admin port: liveness, readiness and metrics.
//!
//! Runs on the control plane's thread. Requests are not authenticated, so no page changes any state
//! or shows the contents of client requests.

use std::fmt;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::serve::Listener;

use crate::fleet::{Service, Snapshot};
use crate::metrics::{Exposition, Registry};

/// Returns the name and state of each local decoder; called when the readiness page lists them.
pub type DecoderStates = Arc<dyn Fn() -> Vec<(String, &'static str)> + Send + Sync>;

/// The state that the admin port reports.
#[derive(Clone)]
pub struct AdminState {
    /// The metrics that the page `/metrics` shows.
    pub registry: Arc<Registry>,
    /// Number of shards that are accepting connections.
    pub shards_listening: Arc<AtomicUsize>,
    /// Number of shards that must be listening for the process to be ready.
    pub shards_expected: usize,
    /// Returns the indices of the shards that do not run although they should.
    pub stuck_shards: Arc<dyn Fn() -> Vec<usize> + Send + Sync>,
    /// The state of the fleet.
    pub fleet: Arc<ArcSwap<Snapshot>>,
    /// State of the local decoders. Shown, but not part of readiness: while an engine loads its
    /// model, ringside is ready and responds to requests with 503.
    pub decoders: DecoderStates,
}

impl fmt::Debug for AdminState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminState")
            .field("shards_listening", &self.shards_listening)
            .field("shards_expected", &self.shards_expected)
            .finish_non_exhaustive()
    }
}

/// Serves the admin pages on `listener` until `shutdown` completes, then finishes the requests in
/// flight.
///
/// # Errors
/// Returns the listener's error.
pub async fn serve<L: Listener>(
    listener: L,
    state: AdminState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()>
where
    L::Addr: fmt::Debug,
{
    axum::serve(listener, routes(state))
        .with_graceful_shutdown(shutdown)
        .await
}

/// Returns the text of the metrics page.
pub type MetricsText = Arc<dyn Fn() -> String + Send + Sync>;

/// Serves `/metrics` alone on `listener`, with the text that `text` returns.
///
/// # Errors
/// Returns the listener's error.
pub async fn serve_metrics<L: Listener>(listener: L, text: MetricsText) -> io::Result<()>
where
    L::Addr: fmt::Debug,
{
    let page = async move |headers: HeaderMap| metrics_page(&headers, text());
    let router = Router::new()
        .route("/metrics", get(page))
        .fallback(async || not_found_among("/metrics"));
    axum::serve(listener, router).await
}

fn routes(state: AdminState) -> Router {
    Router::new()
        .route("/livez", get(alive))
        .route("/healthz", get(alive))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .fallback(not_found)
        .with_state(state)
}

/// Responds 200 to `/livez` and `/healthz` unless a shard is stuck. If a shard fails, the process
/// exits.
async fn alive(State(state): State<AdminState>) -> Response {
    let stuck = (state.stuck_shards)();
    if stuck.is_empty() {
        return "ok\n".into_response();
    }
    let mut text = String::new();
    for index in stuck {
        text.push_str(&format!("[-]shard {index}: does not run\n"));
    }
    (StatusCode::SERVICE_UNAVAILABLE, text).into_response()
}

async fn ready(State(state): State<AdminState>, uri: Uri) -> Response {
    let listening = state.shards_listening.load(Ordering::Acquire);
    let fleet = state.fleet.load();
    let draining = fleet.service != Service::Open;
    let started = listening >= state.shards_expected;
    let awaited = fleet
        .allow
        .as_ref()
        .and_then(|allow| allow.awaited.as_ref());
    let ready = started && !draining && awaited.is_none();
    let verbose = uri
        .query()
        .is_some_and(|query| query.split('&').any(|part| part.starts_with("verbose")));
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    if ready && !verbose {
        return (status, "ok\n").into_response();
    }
    let mark = |good: bool| if good { "[+]" } else { "[-]" };
    let mut text = format!(
        "{}shards: {listening} of {} listening\n{}draining: {}\n",
        mark(started),
        state.shards_expected,
        mark(!draining),
        if draining { "yes" } else { "no" },
    );
    if let Some(allow) = &fleet.allow {
        let line = match awaited {
            None => format!("allowlist: {} entries", allow.list.len()),
            Some(pool) => format!("allowlist: waiting for the pods of {pool}"),
        };
        text.push_str(&format!("{}{line}\n", mark(awaited.is_none())));
    }
    for (name, decoder) in (state.decoders)() {
        text.push_str(&format!("[ ]decoder {name}: {decoder}\n"));
    }
    text.push_str(if ready { "ready\n" } else { "not ready\n" });
    (status, text).into_response()
}

async fn metrics(State(state): State<AdminState>, headers: HeaderMap) -> Response {
    metrics_page(&headers, state.registry.render())
}

/// Returns the metrics in the format that the client accepts.
fn metrics_page(headers: &HeaderMap, text: String) -> Response {
    let accept = headers.get_all(header::ACCEPT).iter();
    let accept: Vec<_> = accept.filter_map(|value| value.to_str().ok()).collect();
    let exposition = Exposition::accepted(&accept.join(","));
    let kind = [
        (header::CONTENT_TYPE, exposition.content_type()),
        (header::VARY, "accept"),
    ];
    (kind, exposition.of(text)).into_response()
}

async fn not_found() -> Response {
    not_found_among("/livez, /readyz, /metrics")
}

fn not_found_among(pages: &str) -> Response {
    let text = format!(
        "{{\"error\":{{\"message\":\"no such page; available: {pages}\",\
         \"type\":\"not_found\",\"param\":null,\"code\":404}}}}\n"
    );
    let headers = [(header::CONTENT_TYPE, "application/json")];
    (StatusCode::NOT_FOUND, headers, text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{self, Change, RuleSource};
    use crate::metrics::{Route, ShardMetrics};
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};
    use std::sync::atomic::AtomicBool;
    use tokio::net::TcpListener;
    use tokio::sync::oneshot;

    fn get(address: SocketAddr, head: &str) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(
            stream,
            "{head} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        )
        .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    }

    fn with_server(state: AdminState, check: impl FnOnce(SocketAddr)) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let server = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).unwrap();
                serve(listener, state, async { drop(stopped.await) }).await
            })
        });
        check(address);
        drop(stop);
        server.join().unwrap().unwrap();
    }

    fn stuck_if(flag: &Arc<AtomicBool>) -> Arc<dyn Fn() -> Vec<usize> + Send + Sync> {
        let flag = Arc::clone(flag);
        Arc::new(move || {
            flag.load(Ordering::Acquire)
                .then_some(1)
                .into_iter()
                .collect()
        })
    }

    #[test]
    fn pages() {
        let shard = Arc::new(ShardMetrics::new(1));
        shard.request_started(Route::Chat);
        let registry = Registry::new(vec![shard], vec!["epoll"], &["bug"]);
        let mut fleet = fleet::Registry::new(Vec::new());
        fleet.enable_allowlist(Some("ns/pool".to_owned()));
        let is_stuck = Arc::new(AtomicBool::new(false));
        let state = AdminState {
            registry: Arc::new(registry),
            shards_listening: Arc::new(AtomicUsize::new(1)),
            shards_expected: 2,
            stuck_shards: stuck_if(&is_stuck),
            fleet: Arc::new(ArcSwap::from_pointee(fleet.snapshot().clone())),
            decoders: Arc::new(|| vec![("localhost:8200".to_owned(), "loading")]),
        };
        let listening = Arc::clone(&state.shards_listening);
        let published = Arc::clone(&state.fleet);
        let mut apply = move |change| {
            fleet.apply(change);
            published.store(Arc::new(fleet.snapshot().clone()));
        };
        with_server(state, |address| {
            let status = |head: &str, code: &str, want: &str| {
                let response = get(address, head);
                assert!(
                    response.starts_with(&format!("HTTP/1.1 {code} ")),
                    "{head}: {response}"
                );
                assert!(response.contains(want), "{head}: {response}");
            };
            status("GET /livez", "200", "\r\n\r\nok\n");
            is_stuck.store(true, Ordering::Release);
            status("GET /livez", "503", "[-]shard 1: does not run\n");
            is_stuck.store(false, Ordering::Release);
            status("GET /healthz", "200", "ok\n");
            status(
                "GET /readyz",
                "503",
                "[-]shards: 1 of 2 listening\n[+]draining: no\n",
            );
            listening.store(2, Ordering::Release);
            status(
                "GET /readyz",
                "503",
                "[+]draining: no\n[-]allowlist: waiting for the pods of ns/pool\n",
            );
            apply(Change::Allow(RuleSource::Pods, Vec::new()));
            status("GET /readyz", "200", "\r\n\r\nok\n");
            status(
                "GET /readyz?verbose",
                "200",
                "[ ]decoder localhost:8200: loading\nready\n",
            );
            status("HEAD /readyz", "200", "content-length: 3");
            apply(Change::Service(Service::Settling));
            status("GET /readyz", "503", "[-]draining: yes\n");
            status("GET /livez", "200", "ok\n");
            status(
                "GET /metrics",
                "200",
                "ringside_in_flight{route=\"chat\"} 1\n",
            );
            status(
                "GET /metrics",
                "200",
                "content-type: text/plain; version=0.0.4",
            );
            status("GET /", "404", "content-type: application/json");
            status("POST /livez", "405", "allow: GET,HEAD");
        });
    }
}
