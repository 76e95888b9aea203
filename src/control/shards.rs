//! The shard threads. Each has its own executor, listeners and CPUs.

use std::io;
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::Notify;

use super::inbox::{Inbox, Message};
use super::incidents::Incidents;
use super::publish::Published;
use super::resolver_threads::Resolver;
use super::sockets::SocketErrorLog;
use super::tls::TlsContext;
use crate::budget::Budget;
use crate::config::Config;
use crate::limits::{
    ACCEPT_BATCH_MAX, ACCEPT_PAUSE_MS, ACCEPT_PAUSE_MS_MIN, VANISHED_CHECK_SECS, VANISHED_MS_MIN,
    VANISHED_TRIES_MIN,
};
use crate::metrics::ShardMetrics;
use crate::metrics::access_log::AccessRing;
use crate::net::probe::Driver;
use crate::net::runtime::{self, Listener, Runtime, Socket};
use crate::net::tls::{Acceptor, Secure, Wire};
use crate::net::{Net, Timer, would_block};
use crate::proxy::session;
use crate::proxy::shard::{Places, Shard, ShardDeps, is_local_address};
use crate::sys::{self, Silence};
use crate::trace::TraceRing;

/// Interval at which a draining shard wakes its idle sessions and checks whether any are left.
const DRAIN_CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// The state that all shards of a process share.
pub(super) struct Shared {
    pub(super) config: Arc<Config>,
    pub(super) budget: Arc<Budget>,
    pub(super) places: Arc<Places>,
    pub(super) published: Published,
    /// Number of shards that accept connections.
    pub(super) listening: Arc<AtomicUsize>,
    pub(super) resolver: Resolver,
    pub(super) socket_errors: SocketErrorLog,
    pub(super) incidents: Incidents,
    /// Notified when a shard has lost a decoder.
    pub(super) decoder_lost: Arc<Notify>,
    /// Notified when a shard has neither a place for a new client nor an idle client to close.
    pub(super) places_wanted: Arc<Notify>,
    pub(super) tls: TlsContext,
}

/// The parameters of one shard.
pub(super) struct ShardSpawn {
    pub(super) index: usize,
    pub(super) cpus: Vec<usize>,
    pub(super) driver: Driver,
    /// The shard's listening sockets: one per rank, in rank order.
    pub(super) listeners: Vec<TcpListener>,
    pub(super) metrics: Arc<ShardMetrics>,
    pub(super) sinks: LogSinks,
    /// Called with the shard's inbox once the shard accepts connections. Dropped without a call if
    /// the shard fails before.
    pub(super) started: Box<dyn FnOnce(io::Result<Inbox>) + Send>,
    /// Called once when the thread ends, with the error if it failed or panicked.
    pub(super) ended: Box<dyn FnOnce(io::Result<()>) + Send>,
}

/// The network layer of a shard: the executor's sockets, with optional TLS.
type Served = Secure<Runtime>;

/// A rank's listening socket. Its connections use TLS if `acceptor` is `Some`.
struct RankListener {
    listener: Listener,
    acceptor: Option<Acceptor>,
    rank: usize,
}

impl RankListener {
    fn wire(&self, conn: Socket) -> Wire<Socket> {
        match &self.acceptor {
            Some(acceptor) => acceptor.accept(conn),
            None => Wire::Plain(conn),
        }
    }
}

/// The ring buffers through which a shard passes records to the access log and spans to the span
/// exporter. Each is `None` if that output is off.
pub(super) struct LogSinks {
    pub(super) access: Option<AccessRing>,
    pub(super) traces: Option<TraceRing>,
}

/// Starts a shard's thread.
pub(super) fn spawn(shared: Arc<Shared>, spawn: ShardSpawn) -> io::Result<JoinHandle<()>> {
    let name = format!("shard-{}", spawn.index);
    thread::Builder::new().name(name).spawn(move || {
        // Pin before the shard allocates memory: the kernel then takes its pages from the CPU's own
        // NUMA node.
        if !spawn.cpus.is_empty()
            && let Err(error) = sys::pin(&spawn.cpus)
        {
            tracing::warn!(shard = spawn.index, cpus = ?spawn.cpus, %error, "shard cannot be pinned to its CPUs; running unpinned");
        }
        let busy_poll = shared.config.busy_poll;
        let ShardSpawn {
            driver,
            listeners,
            metrics,
            sinks,
            started,
            ended,
            ..
        } = spawn;
        let ended = EndReport(Some(ended));
        let serve = async |net: Runtime| serve(net, shared, listeners, metrics, sinks, started).await;
        let result = runtime::run(driver, busy_poll, serve).and_then(|served| served);
        ended.report(result);
    })
}

/// Reports the end of a shard's thread to the control plane. Reports an error if dropped without
/// `report`, so that a panic of the thread is not missed.
struct EndReport(Option<Box<dyn FnOnce(io::Result<()>) + Send>>);

impl EndReport {
    fn report(mut self, result: io::Result<()>) {
        if let Some(ended) = self.0.take() {
            ended(result);
        }
    }
}

impl Drop for EndReport {
    fn drop(&mut self) {
        if let Some(ended) = self.0.take() {
            ended(Err(io::Error::other("the thread panicked")));
        }
    }
}

async fn serve(
    net: Runtime,
    shared: Arc<Shared>,
    listeners: Vec<TcpListener>,
    metrics: Arc<ShardMetrics>,
    sinks: LogSinks,
    started: Box<dyn FnOnce(io::Result<Inbox>) + Send>,
) -> io::Result<()> {
    let (notifications, notifier) = net.notifier()?;
    let inbox = Inbox::new(notifier);
    let counted = Arc::clone(&metrics);
    net.on_panic(move || counted.panic());
    let acceptor = shared.tls.acceptor(&metrics);
    let shard = Shard::new(
        Secure(net.clone()),
        deps(&shared, &inbox, Arc::clone(&metrics), sinks),
    );
    for (rank, listener) in listeners.into_iter().enumerate() {
        let listener = net.listener(listener)?;
        let rank_listener = RankListener {
            listener,
            acceptor: acceptor.clone(),
            rank,
        };
        net.spawn_vital(accept(
            Rc::clone(&shard),
            rank_listener,
            net.timer(),
            net.clone(),
            Arc::clone(&shared.places_wanted),
        ));
    }
    net.spawn_vital(reset_vanished(net.clone(), Arc::clone(&metrics)));
    shared.listening.fetch_add(1, Ordering::Release);
    started(Ok(inbox.clone()));
    while !shard.is_draining() {
        notifications.notified().await;
        metrics.set_events_lost(u64::from(net.events_lost()));
        if handle_messages(&shard, &inbox) == Handled::Cut {
            shared.listening.fetch_sub(1, Ordering::Release);
            inbox.end();
            return Ok(());
        }
    }
    shared.listening.fetch_sub(1, Ordering::Release);
    drain(&net, &shard, &inbox).await;
    inbox.end();
    Ok(())
}

/// Repeatedly resets the connections whose client or engine has vanished.
async fn reset_vanished(net: Runtime, metrics: Arc<ShardMetrics>) {
    let least = Silence {
        tries: VANISHED_TRIES_MIN,
        ms: VANISHED_MS_MIN,
    };
    let timer = net.timer();
    loop {
        timer.set(net.now(), Some(Duration::from_secs(VANISHED_CHECK_SECS)));
        wait(&timer).await;
        metrics.peers_vanished(net.reset_vanished(least).await);
    }
}

/// Whether the messages to a shard require it to end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Handled {
    Continue,
    Cut,
}

/// Handles all messages that the shard has received.
fn handle_messages(shard: &Shard<Served>, inbox: &Inbox) -> Handled {
    if inbox.must_close_idle() {
        shard.close_idle();
    }
    let mut handled = Handled::Continue;
    for message in inbox.take() {
        match message {
            Message::Resolved(resolved) => shard.resolved(resolved),
            Message::CheckDrain => {}
            Message::Cut => handled = Handled::Cut,
        }
    }
    handled
}

/// Waits until the shard has no open client connection and no leg that runs as a separate task, or
/// until the control plane cuts those that are left. Repeatedly wakes all waiting sessions, so that
/// idle ones close.
async fn drain(net: &Runtime, shard: &Rc<Shard<Served>>, inbox: &Inbox) {
    let timer = net.timer();
    loop {
        net.nudge_all();
        timer.set(net.now(), Some(DRAIN_CHECK_INTERVAL));
        wait(&timer).await;
        if handle_messages(shard, inbox) == Handled::Cut || shard.sessions() == 0 {
            return;
        }
    }
}

fn deps(
    shared: &Arc<Shared>,
    inbox: &Inbox,
    metrics: Arc<ShardMetrics>,
    sinks: LogSinks,
) -> ShardDeps<Served> {
    let listeners = shared.config.listeners.iter();
    let ports: Vec<u16> = listeners.map(|one| one.address.port()).collect();
    let (resolver, inbox) = (shared.resolver.clone(), inbox.clone());
    let (socket_errors, incidents) = (shared.socket_errors.clone(), shared.incidents.clone());
    let decoder_lost = Arc::clone(&shared.decoder_lost);
    let secure = shared.tls.upstream(&metrics);
    ShardDeps {
        config: Arc::clone(&shared.config),
        metrics,
        budget: Arc::clone(&shared.budget),
        places: Arc::clone(&shared.places),
        fleet: Arc::clone(&shared.published),
        is_own_listener: Box::new(move |address| {
            ports.contains(&address.port()) && is_local_address(address.ip())
        }),
        is_same_listener: Box::new(|decoder, address| {
            if !is_local_address(decoder.ip()) || !is_local_address(address.ip()) {
                return Some(false);
            }
            // Without such a listener, the decoder may just not be running.
            sys::has_wildcard_listener(address.ip(), address.port()).then_some(true)
        }),
        resolver: Box::new(move |name, by| resolver.ask(name, by, &inbox)),
        on_socket_failed: Box::new(move |socket, error| socket_errors.record(socket, error)),
        on_decoder_lost: Box::new(move || decoder_lost.notify_one()),
        on_incident: Box::new(move |incident| incidents.record(incident)),
        secure,
        access: sinks.access,
        traces: sinks.traces,
    }
}

/// Accepts connections until the drain starts, and then those still in the backlog: the kernel has
/// already completed their TCP handshakes.
async fn accept(
    shard: Rc<Shard<Served>>,
    rank_listener: RankListener,
    timer: Timer,
    net: Runtime,
    places_wanted: Arc<Notify>,
) {
    let mut paused = false;
    loop {
        let stop = shard.is_draining();
        let ended = accept_batch(&shard, &rank_listener);
        match &ended {
            BatchEnd::Empty if stop => return,
            BatchEnd::Empty | BatchEnd::More => paused = false,
            BatchEnd::Full | BatchEnd::Failed(_) if stop => return,
            BatchEnd::Full | BatchEnd::Failed(_) => {
                if !std::mem::replace(&mut paused, true) {
                    warn_of_pause(&ended, shard.places_max());
                }
                shard.count_accept_paused();
                let pause_ms = match shard.close_idle() {
                    0 => {
                        // Others may have idle connections.
                        places_wanted.notify_one();
                        ACCEPT_PAUSE_MS
                    }
                    _ => ACCEPT_PAUSE_MS_MIN,
                };
                timer.set(net.now(), Some(Duration::from_millis(pause_ms)));
                wait(&timer).await;
                continue;
            }
        }
        // A timer without a deadline: a drain wakes every timer, and so this task.
        timer.set(net.now(), None);
        let readable = rank_listener.listener.readable();
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
fn accept_batch(shard: &Rc<Shard<Served>>, rank_listener: &RankListener) -> BatchEnd {
    for _ in 0..ACCEPT_BATCH_MAX {
        // A place that is taken for a connection that does not exist would make others close idle
        // ones.
        if shard.is_nearly_full() && !rank_listener.listener.has_pending() {
            return BatchEnd::Empty;
        }
        let Some(guard) = shard.admit() else {
            return BatchEnd::Full;
        };
        match rank_listener.listener.try_accept() {
            Ok(conn) => session::begin(guard, rank_listener.wire(conn), rank_listener.rank),
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

async fn wait(timer: &Timer) {
    std::future::poll_fn(|cx| timer.poll(cx)).await;
}
