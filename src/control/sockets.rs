//! What the log says of engines' sockets that cannot be connected to.
//!
//! A request only learns that its engine is not there; why is for who set it up, and a socket has
//! more ways to be wrong than a port. Shards hand that over without waiting; it is written here.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::fleet::{Address, SocketPath};

/// Failures on their way to the log; more are dropped, since they say the same.
const FAILURES_MAX: usize = 64;
/// The same failure of the same socket is written again after this long.
const SAME_AGAIN: Duration = Duration::from_secs(30);

struct Failure {
    socket: SocketPath,
    error: io::Error,
}

/// Takes failures from any thread.
#[derive(Clone)]
pub(super) struct SocketErrorLog(mpsc::Sender<Failure>);

impl SocketErrorLog {
    /// Starts the task that writes them.
    pub(super) fn start() -> Self {
        let (failures, reported) = mpsc::channel(FAILURES_MAX);
        tokio::spawn(write(reported));
        Self(failures)
    }

    /// Hands one over.
    pub(super) fn record(&self, socket: &SocketPath, error: &io::Error) {
        let error = match error.raw_os_error() {
            Some(number) => io::Error::from_raw_os_error(number),
            None => error.kind().into(),
        };
        let socket = socket.clone();
        // A full queue holds enough to tell.
        let _ = self.0.try_send(Failure { socket, error });
    }
}

async fn write(mut reported: mpsc::Receiver<Failure>) {
    let user = rustix::process::geteuid().as_raw();
    // One entry per socket of the configuration: nobody else can name one.
    let mut written: HashMap<SocketPath, (ErrorKind, Instant)> = HashMap::new();
    while let Some(Failure { socket, error }) = reported.recv().await {
        let kind = error.kind();
        let again = written.get(&socket);
        if again.is_none_or(|(last, at)| *last != kind || at.elapsed() > SAME_AGAIN) {
            tracing::warn!("{}", explain(&socket, &error, user));
            written.insert(socket, (kind, Instant::now()));
        }
    }
}

/// What is wrong with a socket and what to do about it.
fn explain(socket: &SocketPath, error: &io::Error, user: u32) -> String {
    let why = match error.kind() {
        ErrorKind::NotFound => format!(
            "there is no such socket; start the engine with --uds {socket}, or mount the directory \
             that it makes the socket in"
        ),
        ErrorKind::ConnectionRefused => "nobody listens on it: the engine has ended, or is \
                                         still starting"
            .to_owned(),
        ErrorKind::PermissionDenied => format!(
            "user {user}, as whom this process runs, may not connect; it needs write permission on \
             the socket and search permission on its directories (run both as one user, or chmod)"
        ),
        ErrorKind::WouldBlock => "its queue is full: the engine does not accept connections; \
                                  trying again until --connect-timeout"
            .to_owned(),
        _ => format!("{error}; it must be a stream socket that an engine listens on"),
    };
    format!("{}: {why}", Address::Unix(socket.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_failure_names_the_socket_and_what_to_do() {
        let socket = SocketPath::parse("/run/vllm.sock").unwrap();
        for (number, words) in [
            (libc::ENOENT, "start the engine with --uds /run/vllm.sock"),
            (libc::ECONNREFUSED, "nobody listens on it"),
            (libc::EACCES, "user 65534, as whom"),
            (libc::EAGAIN, "its queue is full"),
            (libc::EPROTOTYPE, "it must be a stream socket"),
            (libc::ENOTDIR, "it must be a stream socket"),
        ] {
            let text = explain(&socket, &io::Error::from_raw_os_error(number), 65_534);
            assert!(text.starts_with("unix:/run/vllm.sock: "), "{text}");
            assert!(text.contains(words), "{text}");
        }
    }
}
