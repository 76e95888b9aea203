//! Health of the local decoders, for the readiness page.
//!
//! A check starts only when the readiness page lists the decoders (`/readyz?verbose`, or `/readyz`
//! while not ready) and the last check is older than `CHECK_AGE_MAX`. Without such requests, no
//! decoder is asked.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hyper::StatusCode;
use rustls::ClientConfig;
use tokio::sync::Notify;

use super::engine_page::{self, NoPage};
use super::publish::{Changes, Published};
use crate::admin::DecoderStates;
use crate::fleet::{Change, Health};

/// Time after the request for a health check during which its results are reused and no new check
/// is requested.
const CHECK_AGE_MAX: Duration = Duration::from_secs(5);
/// Time limit of one decoder's health check. A decoder that exceeds it is reported as `silent`.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);

/// Spawns the task that checks the health of the decoders, over TLS if `tls` is given. Returns a
/// function that reports the results of the last check and requests another one if that is older
/// than `CHECK_AGE_MAX`.
pub(super) fn watch(
    published: &Published,
    tls: Option<Arc<ClientConfig>>,
    changes: Changes,
) -> DecoderStates {
    let wanted = Arc::new(Notify::new());
    tokio::spawn(look(
        Arc::clone(published),
        tls,
        Arc::clone(&wanted),
        changes,
    ));
    let asked = Mutex::new(None::<Instant>);
    let published = Arc::clone(published);
    Arc::new(move || {
        let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.is_none_or(|then| then.elapsed() > CHECK_AGE_MAX) {
            *asked = Some(Instant::now());
            wanted.notify_one();
        }
        let snapshot = published.load();
        let endpoints = snapshot.endpoints();
        endpoints
            .map(|one| (one.target.to_string(), one.health().text()))
            .collect()
    })
}

async fn look(
    published: Published,
    tls: Option<Arc<ClientConfig>>,
    wanted: Arc<Notify>,
    changes: Changes,
) {
    loop {
        wanted.notified().await;
        let snapshot = published.load_full();
        for one in snapshot.endpoints() {
            let page = engine_page::get(&one.target, "/health", tls.as_ref(), CHECK_TIMEOUT).await;
            let health = match page {
                Ok((StatusCode::OK, _)) => Health::Ready,
                Ok(_) => Health::NotReady,
                Err(NoPage::Silent) => Health::Silent,
                Err(NoPage::Unreachable) => Health::Unreachable,
            };
            changes.apply(Change::Health(one.id, health)).await;
        }
    }
}
