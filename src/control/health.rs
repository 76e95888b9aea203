//! Health of the local decoders, for the readiness page.
//!
//! A check starts only when the readiness page lists the decoders (`/readyz?verbose`, or `/readyz`
//! while not ready) and the last check is older than `CHECK_AGE_MAX`. Without such requests, an
//! idle proxy sends nothing to its engines.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::ToSocketAddrs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;

use super::publish::{Changes, Published};
use crate::admin::DecoderStates;
use crate::fleet::{Address, Change, Health, Target};

/// Time after the request for a health check during which its results are reused and no new check
/// is requested.
const CHECK_AGE_MAX: Duration = Duration::from_secs(5);
/// Time limit of one decoder's health check. A decoder that exceeds it is reported as `silent`.
/// With TLS, the limit applies separately to each read, to each write and to each TCP connect; a
/// decoder whose connects exceed it is reported as `unreachable`.
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
            let health = match &tls {
                None => tokio::time::timeout(CHECK_TIMEOUT, health(&one.target)).await,
                Some(tls) => Ok(health_over_tls(&one.target, Arc::clone(tls)).await),
            };
            let health = health.unwrap_or(Health::Silent);
            changes.apply(Change::Health(one.id, health)).await;
        }
    }
}

/// Requests `/health` from a decoder without TLS. The caller limits the time.
async fn health(target: &Target) -> Health {
    if let Some(Address::Unix(socket)) = target.address() {
        let path = socket.sun_path();
        return match UnixStream::connect(OsStr::from_bytes(&path)).await {
            Ok(stream) => ask(stream, target).await,
            Err(_) => Health::Unreachable,
        };
    }
    // Connect by name: the addresses may have changed since the start, or the name may not have
    // resolved then.
    match TcpStream::connect(target.to_string()).await {
        Ok(stream) => ask(stream, target).await,
        Err(_) => Health::Unreachable,
    }
}

/// Like [`health`], for a decoder with TLS. Uses blocking calls on a separate thread: checks are
/// rare and sequential.
async fn health_over_tls(target: &Target, tls: Arc<ClientConfig>) -> Health {
    let target = target.clone();
    let asked = tokio::task::spawn_blocking(move || {
        let wait = Some(CHECK_TIMEOUT);
        if let Some(Address::Unix(socket)) = target.address() {
            let path = socket.sun_path();
            let Ok(stream) = net::UnixStream::connect(OsStr::from_bytes(&path)) else {
                return Health::Unreachable;
            };
            let limited = stream.set_read_timeout(wait);
            let limited = limited.and_then(|()| stream.set_write_timeout(wait));
            return limited.map_or(Health::Silent, |()| ask_over_tls(stream, &target, tls));
        }
        let addresses = target.to_string().to_socket_addrs();
        let mut addresses = addresses.into_iter().flatten();
        let connect = |at| std::net::TcpStream::connect_timeout(&at, CHECK_TIMEOUT).ok();
        let Some(stream) = addresses.find_map(connect) else {
            return Health::Unreachable;
        };
        let limited = stream.set_read_timeout(wait);
        let limited = limited.and_then(|()| stream.set_write_timeout(wait));
        limited.map_or(Health::Silent, |()| ask_over_tls(stream, &target, tls))
    });
    asked.await.unwrap_or(Health::Silent)
}

fn ask_over_tls(mut stream: impl Read + Write, target: &Target, tls: Arc<ClientConfig>) -> Health {
    let Ok(name) = ServerName::try_from(super::tls::host(target)) else {
        return Health::Silent;
    };
    let Ok(mut session) = rustls::ClientConnection::new(tls, name) else {
        return Health::Silent;
    };
    let mut stream = rustls::Stream::new(&mut session, &mut stream);
    let mut line = [0_u8; 12];
    let asked = stream.write_all(request(target).as_bytes());
    state_of(asked.and_then(|()| stream.read_exact(&mut line)), &line)
}

fn request(target: &Target) -> String {
    format!(
        "GET /health HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n",
        target.authority()
    )
}

fn state_of(responded: std::io::Result<()>, line: &[u8]) -> Health {
    match responded {
        Ok(()) if line.ends_with(b" 200") => Health::Ready,
        Ok(()) => Health::NotReady,
        Err(_) => Health::Silent,
    }
}

async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, target: &Target) -> Health {
    let mut line = [0_u8; 12];
    let responded = async {
        stream.write_all(request(target).as_bytes()).await?;
        stream.read_exact(&mut line).await.map(|_| ())
    };
    let responded = responded.await;
    state_of(responded, &line)
}
