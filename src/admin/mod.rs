//! The admin port: liveness, readiness and metrics.
//!
//! Runs on the control plane's thread. Requests are not authenticated, so no page changes any state
//! or shows the contents of client requests.

use std::fmt;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use crate::metrics::{CONTENT_TYPE, Registry};

/// Returns the name and state of each local decoder; called when the readiness page lists them.
pub type DecoderStates = Arc<dyn Fn() -> Vec<(String, &'static str)> + Send + Sync>;

/// Result of a check that readiness depends on, shown as a line of the readiness page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// `false` makes the process not ready.
    pub is_good: bool,
    /// Name and result of the check.
    pub text: String,
}

/// Performs a check that readiness depends on.
pub type LookUp = Arc<dyn Fn() -> Check + Send + Sync>;

/// The state that the admin port reports.
#[derive(Clone)]
pub struct AdminState {
    /// The metrics that the page `/metrics` shows.
    pub registry: Arc<Registry>,
    /// Number of shards that are accepting connections.
    pub shards_listening: Arc<AtomicUsize>,
    /// Number of shards that must be listening for the process to be ready.
    pub shards_expected: usize,
    /// Whether the process is draining before it exits. It is then not ready.
    pub draining: Arc<AtomicBool>,
    /// State of the local decoders. Shown, but not part of readiness: while an engine loads its
    /// model, ringside is ready and responds to requests with 503.
    pub decoders: DecoderStates,
    /// Checks whether the allowlist is complete; `None` without an allowlist.
    pub allowlist: Option<LookUp>,
}

impl fmt::Debug for AdminState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdminState")
            .field("shards_listening", &self.shards_listening)
            .field("shards_expected", &self.shards_expected)
            .field("draining", &self.draining)
            .finish_non_exhaustive()
    }
}

/// Serves the admin pages on `listener` until `shutdown` completes, then finishes the requests in
/// flight.
///
/// # Errors
/// Returns the listener's error.
pub async fn serve(
    listener: TcpListener,
    state: AdminState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    axum::serve(listener, routes(state))
        .with_graceful_shutdown(shutdown)
        .await
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

/// Responds 200 to `/livez` and `/healthz`, always: if a shard fails, the process exits, so a
/// process that responds is alive.
async fn alive() -> &'static str {
    "ok\n"
}

async fn ready(State(state): State<AdminState>, uri: Uri) -> Response {
    let listening = state.shards_listening.load(Ordering::Acquire);
    let draining = state.draining.load(Ordering::Acquire);
    let started = listening >= state.shards_expected;
    let allowlist = state.allowlist.map(|look_up| look_up());
    let ready = started && !draining && allowlist.as_ref().is_none_or(|check| check.is_good);
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
    if let Some(Check {
        is_good,
        text: line,
    }) = allowlist
    {
        text.push_str(&format!("{}{line}\n", mark(is_good)));
    }
    for (name, decoder) in (state.decoders)() {
        text.push_str(&format!("[ ]decoder {name}: {decoder}\n"));
    }
    text.push_str(if ready { "ready\n" } else { "not ready\n" });
    (status, text).into_response()
}

async fn metrics(State(state): State<AdminState>) -> Response {
    (
        [(header::CONTENT_TYPE, CONTENT_TYPE)],
        state.registry.render(),
    )
        .into_response()
}

async fn not_found() -> Response {
    let text = "{\"error\":{\"message\":\"no such page; available: /livez, /readyz, /metrics\",\
                \"type\":\"not_found\",\"param\":null,\"code\":404}}\n";
    let headers = [(header::CONTENT_TYPE, "application/json")];
    (StatusCode::NOT_FOUND, headers, text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Route, ShardMetrics};
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream};
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

    #[test]
    fn pages() {
        let shard = Arc::new(ShardMetrics::new(1));
        shard.request_started(Route::Chat);
        let registry = Registry::new(vec![shard], vec!["epoll"], &["bug"]);
        let allowlist_known = Arc::new(AtomicBool::new(false));
        let known = Arc::clone(&allowlist_known);
        let state = AdminState {
            registry: Arc::new(registry),
            shards_listening: Arc::new(AtomicUsize::new(1)),
            shards_expected: 2,
            draining: Arc::new(AtomicBool::new(false)),
            decoders: Arc::new(|| vec![("localhost:8200".to_owned(), "loading")]),
            allowlist: Some(Arc::new(move || Check {
                is_good: known.load(Ordering::Acquire),
                text: "allowlist: a check".to_owned(),
            })),
        };
        let (listening, draining) = (
            Arc::clone(&state.shards_listening),
            Arc::clone(&state.draining),
        );
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
                "[+]draining: no\n[-]allowlist: a check\n",
            );
            allowlist_known.store(true, Ordering::Release);
            status("GET /readyz", "200", "\r\n\r\nok\n");
            status(
                "GET /readyz?verbose",
                "200",
                "[ ]decoder localhost:8200: loading\nready\n",
            );
            status("HEAD /readyz", "200", "content-length: 3");
            draining.store(true, Ordering::Release);
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
                "content-type: application/openmetrics-text",
            );
            status("GET /", "404", "content-type: application/json");
            status("POST /livez", "405", "allow: GET,HEAD");
        });
    }
}
