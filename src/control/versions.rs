//! The versions of the local decoders, which decide the handoffs that they can take.
//!
//! Each decoder is asked at the start and every `VERSION_SECS_MAX`; every second as long as one
//! does not respond; and soon after a shard has lost one, because it may return as another release.
//! Until a decoder responds, its last version counts.

use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::engine_page;
use super::publish::{Changes, Published};
use crate::fleet::{Change, Endpoint, EngineVersion};
use crate::limits::{VERSION_MS_MAX, VERSION_SECS_MAX};

/// Minimum pause between two requests to the same decoder.
const PAUSE_MIN: Duration = Duration::from_secs(1);

/// Spawns the task that asks the decoders, over TLS if `tls` is given. A notification of `lost`
/// makes it ask them again.
pub(super) fn follow(
    published: &Published,
    tls: Option<Arc<ClientConfig>>,
    changes: Changes,
    lost: Arc<Notify>,
) {
    let published = Arc::clone(published);
    tokio::spawn(async move {
        loop {
            let is_complete = ask_all(&published, tls.as_ref(), &changes).await;
            tokio::time::sleep(PAUSE_MIN).await;
            if is_complete {
                let rest = Duration::from_secs(VERSION_SECS_MAX).saturating_sub(PAUSE_MIN);
                // Ends early if a decoder is lost.
                let _ = tokio::time::timeout(rest, lost.notified()).await;
            }
        }
    });
}

/// Asks all decoders at the same time. Returns whether all have responded.
async fn ask_all(
    published: &Published,
    tls: Option<&Arc<ClientConfig>>,
    changes: &Changes,
) -> bool {
    let mut asked = JoinSet::new();
    for endpoint in published.load().endpoints() {
        asked.spawn(ask(Arc::clone(endpoint), tls.cloned()));
    }
    let mut is_complete = true;
    while let Some(stated) = asked.join_next().await {
        let Ok((endpoint, Some(stated))) = stated else {
            is_complete = false;
            continue;
        };
        if endpoint.version().as_deref() == stated.as_ref() {
            continue;
        }
        let line = match &stated {
            Some(version) => format!("decoder {} has version {version}", endpoint.target),
            None => format!("decoder {} states no version any more", endpoint.target),
        };
        changes.apply(Change::Version(endpoint.id, stated)).await;
        tracing::info!("{line}");
    }
    is_complete
}

/// Asks a decoder for its version. Returns `Some(None)` if it states none, and `None` if it does
/// not respond.
async fn ask(
    endpoint: Arc<Endpoint>,
    tls: Option<Arc<ClientConfig>>,
) -> (Arc<Endpoint>, Option<Option<EngineVersion>>) {
    let wait = Duration::from_millis(VERSION_MS_MAX);
    let page = engine_page::get(&endpoint.target, "/version", tls.as_ref(), wait).await;
    let stated = match page {
        Ok((status, _)) if status.is_server_error() => None,
        Ok((status, page)) if status.is_success() => Some(EngineVersion::read(&page)),
        Ok(_) => Some(None),
        Err(_) => None,
    };
    (endpoint, stated)
}
