//! What is known of the local decoders, for the readiness page.
//!
//! A decoder is looked at only when somebody asks and the last look is old: an idle proxy sends
//! its engine nothing.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;

use crate::admin::DecoderStates;
use crate::fleet::{Address, Target};
use crate::proxy::shard::Decoder;

/// A look is good for this long.
const LOOK_AGE_MAX: Duration = Duration::from_secs(5);
/// A decoder that has not answered by then counts as silent.
const LOOK_WAIT_MAX: Duration = Duration::from_secs(2);

const STATES: [&str; 5] = ["unknown", "ready", "not ready", "silent", "unreachable"];

struct Watched {
    target: Target,
    state: AtomicU8,
}

/// Starts the task that looks, and gives what reads its results.
pub(super) fn watch(decoders: &[Decoder]) -> DecoderStates {
    let watched: Arc<Vec<Watched>> = Arc::new(
        decoders
            .iter()
            .map(|decoder| Watched {
                target: decoder.target.clone(),
                state: AtomicU8::new(0),
            })
            .collect(),
    );
    let wanted = Arc::new(Notify::new());
    tokio::spawn(look(Arc::clone(&watched), Arc::clone(&wanted)));
    let asked = Mutex::new(None::<Instant>);
    Arc::new(move || {
        let mut asked = asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.is_none_or(|then| then.elapsed() > LOOK_AGE_MAX) {
            *asked = Some(Instant::now());
            wanted.notify_one();
        }
        let state = |one: &Watched| STATES[usize::from(one.state.load(Ordering::Relaxed))];
        watched
            .iter()
            .map(|one| (one.target.to_string(), state(one)))
            .collect()
    })
}

async fn look(watched: Arc<Vec<Watched>>, wanted: Arc<Notify>) {
    loop {
        wanted.notified().await;
        for one in watched.iter() {
            let asked = tokio::time::timeout(LOOK_WAIT_MAX, health(one));
            let state = asked.await.unwrap_or(3);
            one.state.store(state, Ordering::Relaxed);
        }
    }
}

/// Index into `STATES` of what a decoder says of itself.
async fn health(one: &Watched) -> u8 {
    if let Some(Address::Unix(socket)) = one.target.address() {
        let path = socket.sun_path();
        return match UnixStream::connect(OsStr::from_bytes(&path)).await {
            Ok(stream) => ask(stream, &one.target).await,
            Err(_) => 4,
        };
    }
    // By name: what it resolved to at the start may have changed, or have been nothing.
    match TcpStream::connect(one.target.to_string()).await {
        Ok(stream) => ask(stream, &one.target).await,
        Err(_) => 4,
    }
}

async fn ask(mut stream: impl AsyncRead + AsyncWrite + Unpin, target: &Target) -> u8 {
    let request = format!(
        "GET /health HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n",
        target.authority()
    );
    let mut line = [0_u8; 12];
    let answered = async {
        stream.write_all(request.as_bytes()).await?;
        stream.read_exact(&mut line).await
    };
    match answered.await {
        Ok(_) if line.ends_with(b" 200") => 1,
        Ok(_) => 2,
        Err(_) => 3,
    }
}
