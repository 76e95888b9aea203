//! Logs failed TLS handshakes.
//!
//! A shard counts each handshake and queues each failure without blocking. Failures worth a warning
//! are logged at `warn` at most once per `SAME_AGAIN` for each kind of peer and outcome, with the
//! number of similar failures since the previous warning. All other failures are logged at `debug`.
//! So neither a port scanner nor an engine with a wrong certificate floods the log.

use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::metrics::{ShardMetrics, TlsPeer};
use crate::net::tls::{End, Outcome, Report};

/// Capacity of the queue from the shards to the task that logs failed handshakes, for the whole
/// process. Failures beyond it are counted but not logged.
const FAILURES_MAX: usize = 64;
/// Minimum interval between two warnings about the same kind of peer and outcome.
const SAME_AGAIN: Duration = Duration::from_secs(30);

struct Failure {
    peer: TlsPeer,
    outcome: Outcome,
    error: Option<String>,
    ip: Option<IpAddr>,
}

/// Passes failed TLS handshakes to the task that logs them. Usable from any thread.
#[derive(Clone)]
pub(super) struct Handshakes(mpsc::Sender<Failure>);

impl Handshakes {
    /// Spawns the task that logs failed handshakes.
    pub(super) fn start() -> Self {
        let (failures, reported) = mpsc::channel(FAILURES_MAX);
        tokio::spawn(write(reported));
        Self(failures)
    }

    /// Returns the callback that counts a shard's TLS handshakes with one kind of peer in `metrics`
    /// and queues the failed ones for the log. `expected` is an outcome that is no failure.
    pub(super) fn report(
        &self,
        peer: TlsPeer,
        metrics: &Arc<ShardMetrics>,
        expected: Outcome,
    ) -> Rc<Report> {
        let (failures, metrics) = (self.0.clone(), Arc::clone(metrics));
        Rc::new(move |end: &End<'_>| {
            metrics.tls(peer, end.outcome);
            if end.outcome == Outcome::Ok || end.outcome == expected {
                return;
            }
            // If the queue is full, it already holds enough failures to log.
            if let Ok(place) = failures.try_reserve() {
                place.send(Failure {
                    peer,
                    outcome: end.outcome,
                    error: end.error.map(ToString::to_string),
                    ip: end.peer.map(|peer| peer.ip()),
                });
            }
        })
    }
}

async fn write(mut reported: mpsc::Receiver<Failure>) {
    // Bounded: both parts of the key are enums.
    let mut warned: HashMap<(TlsPeer, Outcome), (Instant, u64)> = HashMap::new();
    while let Some(failure) = reported.recv().await {
        let text = explain(&failure);
        let key = (failure.peer, failure.outcome);
        if !is_worth_a_warning(key.0, key.1) {
            tracing::debug!("{text}");
            continue;
        }
        let entry = warned.get_mut(&key);
        match entry {
            Some((at, more)) if at.elapsed() < SAME_AGAIN => {
                *more += 1;
                tracing::debug!("{text}");
            }
            Some((at, more)) if *more > 0 => {
                tracing::warn!("{text} ({more} more of this kind since the last warning)");
                (*at, *more) = (Instant::now(), 0);
            }
            _ => {
                tracing::warn!("{text}");
                warned.insert(key, (Instant::now(), 0));
            }
        }
    }
}

/// Returns whether a failed handshake is logged as a warning. This applies to all failures with
/// engines, but for clients only if the client uses another protocol (plain HTTP or HTTP/2): most
/// other failures are port scanners, or health checks that only connect.
fn is_worth_a_warning(peer: TlsPeer, outcome: Outcome) -> bool {
    peer != TlsPeer::Client || matches!(outcome, Outcome::PlainText | Outcome::Protocol)
}

/// Returns the log message for a failed handshake: the peer, the cause and a remedy.
fn explain(failure: &Failure) -> String {
    let who = match (failure.peer, failure.ip) {
        (TlsPeer::Client, Some(ip)) => format!("client {ip}"),
        (TlsPeer::Client, None) => "a client".to_owned(),
        (peer, Some(ip)) => format!("{} engine at {ip}", peer.label()),
        (peer, None) => format!("{} engine", peer.label()),
    };
    let what = match (failure.peer, failure.outcome) {
        (_, Outcome::Ok) => "no error",
        (TlsPeer::Client, Outcome::PlainText) => {
            "plain HTTP was sent to the TLS port; use https, or set --secure-serving=false"
        }
        (TlsPeer::Client, Outcome::Protocol) => {
            "the client does not offer http/1.1 (ALPN); it probably supports only HTTP/2, which is \
             not supported here; the alert no_application_protocol was sent"
        }
        (_, Outcome::Protocol) => "the engine does not support http/1.1 (ALPN)",
        (_, Outcome::Version) => {
            "no common TLS version, cipher suite, curve or signature scheme (supported: TLS 1.2 and 1.3)"
        }
        (TlsPeer::Client, Outcome::Certificate) => "the client rejected the certificate",
        (_, Outcome::Certificate) => {
            "certificate verification failed; the certificate must be valid for the configured \
             host and chain to a system root or to one in --tls-ca-file"
        }
        (TlsPeer::Client, Outcome::Alert) => "the client sent an alert",
        (_, Outcome::Alert) => {
            "the engine sent an alert; if it requires a client certificate, set --tls-client-cert \
             and --tls-client-key"
        }
        (TlsPeer::Client, Outcome::Unfinished) => "connection closed during the handshake",
        (_, Outcome::Unfinished) => {
            "connection closed during the handshake; if the engine uses plain HTTP, remove it from \
             --enable-tls"
        }
        (TlsPeer::Client, Outcome::Broken) => "invalid TLS data received",
        (_, Outcome::Broken | Outcome::PlainText) => {
            "invalid TLS data received; if the engine uses plain HTTP, remove it from --enable-tls"
        }
    };
    match &failure.error {
        Some(error) => format!("TLS handshake with {who} failed: {what} ({error})"),
        None => format!("TLS handshake with {who} failed: {what}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_names_the_peer_and_the_error() {
        for peer in TlsPeer::ALL {
            for outcome in Outcome::ALL {
                let text = explain(&Failure {
                    peer,
                    outcome,
                    error: Some("why".into()),
                    ip: Some(IpAddr::from([192, 0, 2, 1])),
                });
                assert!(
                    text.contains("192.0.2.1") && text.ends_with("(why)"),
                    "{text}"
                );
            }
        }
    }
}
