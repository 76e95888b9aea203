//! Logs why connections to engines' Unix sockets fail.
//!
//! The client's response only states that the engine is unavailable. The log gives the operator the
//! cause, since a Unix socket can be misconfigured in more ways than a TCP port. Shards queue the
//! failures without blocking, and a task writes them to the log.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

use tokio::sync::mpsc;

use crate::fleet::{Address, SocketPath};

/// Capacity of the queue from the shards to the logging task, for the whole process. Failures
/// beyond it are dropped: they would repeat those in the queue.
const FAILURES_MAX: usize = 64;
/// Time after a logged failure of a socket during which further failures of the same kind of this
/// socket are not logged.
const SAME_AGAIN: Duration = Duration::from_secs(30);

struct Failure {
    socket: SocketPath,
    error: io::Error,
}

/// Passes failed connections to Unix sockets to the task that logs them. Usable from any thread.
#[derive(Clone)]
pub(super) struct SocketErrorLog(mpsc::Sender<Failure>);

impl SocketErrorLog {
    /// Spawns the task that logs failed connections to Unix sockets.
    pub(super) fn start() -> Self {
        let (failures, reported) = mpsc::channel(FAILURES_MAX);
        tokio::spawn(write(reported));
        Self(failures)
    }

    /// Queues a failed connection to `socket` for the log without blocking. If the queue is full,
    /// the failure is dropped.
    pub(super) fn record(&self, socket: &SocketPath, error: &io::Error) {
        let error = match error.raw_os_error() {
            Some(number) => io::Error::from_raw_os_error(number),
            None => error.kind().into(),
        };
        let socket = socket.clone();
        // If the queue is full, it already holds enough failures to log.
        let _ = self.0.try_send(Failure { socket, error });
    }
}

async fn write(mut reported: mpsc::Receiver<Failure>) {
    let user = rustix::process::geteuid().as_raw();
    // Bounded by the sockets in the configuration: requests cannot name a socket.
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

/// Returns the log message for a failed connection to `socket`: the cause and a remedy. `user` is
/// the effective user id of this process.
fn explain(socket: &SocketPath, error: &io::Error, user: u32) -> String {
    let why = match error.kind() {
        ErrorKind::NotFound => format!(
            "no such socket; start the engine with --uds {socket}, or mount the directory in \
             which it creates the socket"
        ),
        ErrorKind::ConnectionRefused => "connection refused; the engine has exited or is \
                                         still starting"
            .to_owned(),
        ErrorKind::PermissionDenied => format!(
            "permission denied for user {user}; this process needs write permission on the socket \
             and search permission on its directories (run both as one user, or chmod)"
        ),
        ErrorKind::WouldBlock => "backlog is full; the engine does not accept connections; \
                                  retrying until --connect-timeout"
            .to_owned(),
        _ => format!("{error}; the path must be a stream socket on which an engine listens"),
    };
    format!("{}: {why}", Address::Unix(socket.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_names_the_socket_and_a_remedy() {
        let socket = SocketPath::parse("/run/vllm.sock").unwrap();
        for (number, words) in [
            (libc::ENOENT, "start the engine with --uds /run/vllm.sock"),
            (libc::ECONNREFUSED, "connection refused"),
            (libc::EACCES, "permission denied for user 65534"),
            (libc::EAGAIN, "backlog is full"),
            (libc::EPROTOTYPE, "the path must be a stream socket"),
            (libc::ENOTDIR, "the path must be a stream socket"),
        ] {
            let text = explain(&socket, &io::Error::from_raw_os_error(number), 65_534);
            assert!(text.starts_with("unix:/run/vllm.sock: "), "{text}");
            assert!(text.contains(words), "{text}");
        }
    }
}
