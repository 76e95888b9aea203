//! Accepts the clients of a shard, and those of shards that have fewer.

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::sync::Notify;

use super::inbox::{Client, Inbox};
use crate::limits::{ACCEPT_BATCH_MAX, ACCEPT_PAUSE_MS, ACCEPT_PAUSE_MS_MIN};
use crate::net::runtime::{Listener, Runtime};
use crate::net::tls::{Acceptor, Secure, Wire};
use crate::net::{Net, Timer, would_block};
use crate::proxy::places::Places;
use crate::proxy::session;
use crate::proxy::shard::Shard;

/// The network layer of a shard: the executor's sockets, with optional TLS.
pub(super) type Served = Secure<Runtime>;

/// The way of client connections into one shard.
pub(super) struct Entrance {
    pub(super) index: usize,
    pub(super) net: Runtime,
    pub(super) shard: Rc<Shard<Served>>,
    /// Clients use TLS if it is `Some`.
    pub(super) acceptor: Option<Acceptor>,
    pub(super) places: Arc<Places>,
    /// The inboxes of all shards, once all have started.
    pub(super) inboxes: Arc<OnceLock<Vec<Inbox>>>,
    /// Notified when the shard has neither a place for a new client nor an idle client to close.
    pub(super) places_wanted: Arc<Notify>,
    /// Whether a client of another shard could not be served, which is logged once.
    pub(super) has_failed: Cell<bool>,
}

impl Entrance {
    /// Serves a client at this shard.
    ///
    /// # Errors
    /// The socket cannot be watched; it is closed.
    pub(super) fn serve(&self, client: Client) -> io::Result<()> {
        let conn = self.net.adopt(client.accepted)?;
        let conn = match &self.acceptor {
            Some(acceptor) => acceptor.accept(conn),
            None => Wire::Plain(conn),
        };
        session::begin(self.shard.admit(client.place), conn, client.rank);
        Ok(())
    }

    /// Serves clients that other shards have accepted.
    pub(super) fn serve_all(&self, clients: Vec<Client>) {
        for client in clients {
            if let Err(error) = self.serve(client)
                && !self.has_failed.replace(true)
            {
                tracing::warn!(
                    %error,
                    "client connections are closed because their sockets cannot be watched"
                );
            }
        }
    }

    /// Passes a client to the shard that should serve it.
    fn pass(&self, mut client: Client) -> io::Result<()> {
        if let Some(inboxes) = self.inboxes.get()
            && !self.shard.is_draining()
        {
            let to = self.places.choose(self.index);
            if to != self.index {
                client.place.assign(to);
                match inboxes[to].hand_over(client) {
                    Ok(()) => {
                        self.shard.count_handed_over();
                        return Ok(());
                    }
                    Err(refused) => client = refused,
                }
            }
        }
        self.serve(client)
    }
}

/// Accepts the connections of one listener until the drain starts, and then those still in the
/// backlog: the kernel has already completed their TCP handshakes. `rank` is the listener's index.
pub(super) async fn accept(entrance: Rc<Entrance>, listener: Listener, rank: u16) {
    let shard = &entrance.shard;
    let timer = entrance.net.timer();
    let mut paused = false;
    loop {
        let stop = shard.is_draining();
        let ended = accept_batch(&entrance, &listener, rank);
        match &ended {
            BatchEnd::Empty if stop => return,
            BatchEnd::Empty | BatchEnd::More => paused = false,
            BatchEnd::Full | BatchEnd::Failed(_) if stop => return,
            BatchEnd::Full | BatchEnd::Failed(_) => {
                if !std::mem::replace(&mut paused, true) {
                    warn_of_pause(&ended, entrance.places.max());
                }
                shard.count_accept_paused();
                let pause_ms = match shard.close_idle() {
                    0 => {
                        // Others may have idle connections.
                        entrance.places_wanted.notify_one();
                        ACCEPT_PAUSE_MS
                    }
                    _ => ACCEPT_PAUSE_MS_MIN,
                };
                let pause = Duration::from_millis(pause_ms);
                timer.set(entrance.net.now(), Some(pause));
                wait(&timer).await;
                continue;
            }
        }
        // A timer without a deadline: a drain wakes every timer, and so this task.
        timer.set(entrance.net.now(), None);
        let readable = listener.readable();
        let mut readable = std::pin::pin!(readable);
        std::future::poll_fn(|cx| {
            if shard.is_draining() || readable.as_mut().poll(cx).is_ready() {
                return std::task::Poll::Ready(());
            }
            let _ = timer.poll(cx);
            std::task::Poll::Pending
        })
        .await;
    }
}

/// Waits until the timer's deadline.
pub(super) async fn wait(timer: &Timer) {
    std::future::poll_fn(|cx| timer.poll(cx)).await;
}

/// Reason why a batch of accepts ended.
enum BatchEnd {
    /// No connection is pending.
    Empty,
    /// More connections may be pending.
    More,
    /// The process has as many client connections as it may have.
    Full,
    Failed(io::Error),
}

fn warn_of_pause(ended: &BatchEnd, places: usize) {
    match ended {
        BatchEnd::Failed(error) => tracing::warn!(
            %error,
            "accept failed, probably out of file descriptors or memory; closing idle connections \
             and retrying (if this persists, raise the limit on open files)"
        ),
        _ => tracing::warn!(
            "{places} client connections are open, the limit (--max-connections, by default \
             derived from the limit on open files); closing idle ones for new ones"
        ),
    }
}

/// Accepts up to [`ACCEPT_BATCH_MAX`] pending connections.
fn accept_batch(entrance: &Entrance, listener: &Listener, rank: u16) -> BatchEnd {
    for _ in 0..ACCEPT_BATCH_MAX {
        // A place that is taken for a connection that does not exist would make others close idle
        // ones.
        if entrance.places.is_nearly_full() && !listener.has_pending() {
            return BatchEnd::Empty;
        }
        let Some(place) = entrance.places.take() else {
            return BatchEnd::Full;
        };
        let passed = listener.try_accept().and_then(|accepted| {
            entrance.pass(Client {
                accepted,
                rank,
                place,
            })
        });
        match passed {
            Ok(()) => {}
            Err(error) if would_block(&error) => return BatchEnd::Empty,
            // The connection failed before it was accepted: ECONNABORTED, and the network errors
            // that accept(2) documents as to be retried.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(103 | 71 | 92 | 64 | 95 | 100 | 101 | 112 | 113 | 1)
                ) => {}
            // With EMFILE, ENFILE, ENOBUFS and ENOMEM the connection remains in the backlog. Other
            // errors would recur immediately. In both cases the caller pauses.
            Err(error) => return BatchEnd::Failed(error),
        }
    }
    BatchEnd::More
}
