//! The shard threads. Each has its own executor, listeners and CPUs.

use std::cell::Cell;
use std::io;
use std::net::TcpListener;
use std::rc::Rc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::Notify;

use super::accept::{Entrance, Served, accept, wait};
use super::inbox::{Inbox, Message};
use super::incidents::Incidents;
use super::publish::Published;
use super::resolver_threads::Resolver;
use super::sockets::SocketErrorLog;
use super::tls::TlsContext;
use crate::budget::Budget;
use crate::config::Config;
use crate::limits::{ACCEPT_BATCH_MAX, VANISHED_CHECK_SECS, VANISHED_MS_MIN, VANISHED_TRIES_MIN};
use crate::metrics::ShardMetrics;
use crate::metrics::access_log::AccessRing;
use crate::net::Net;
use crate::net::probe::Driver;
use crate::net::runtime::{self, Runtime};
use crate::net::tls::Secure;
use crate::proxy::places::Places;
use crate::proxy::shard::{Shard, ShardDeps, is_local_address};
use crate::sys::{self, Silence};
use crate::trace::TraceRing;

/// Interval at which a draining shard wakes its idle sessions and checks whether any are left.
const DRAIN_CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// The state that all shards of a process share.
pub(super) struct Shared {
    pub(super) config: Arc<Config>,
    pub(super) budget: Arc<Budget>,
    pub(super) places: Arc<Places>,
    /// The inboxes of all shards, once all have started.
    pub(super) inboxes: Arc<OnceLock<Vec<Inbox>>>,
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

/// The parameters of the thread of one shard.
pub(super) struct ShardSpawn {
    pub(super) cpus: Vec<usize>,
    pub(super) driver: Driver,
    pub(super) part: ShardPart,
    /// Called once when the thread ends, with the error if it failed or panicked.
    pub(super) ended: Box<dyn FnOnce(io::Result<()>) + Send>,
}

/// The parts of the process that belong to one shard.
pub(super) struct ShardPart {
    pub(super) index: usize,
    /// The shard's listening sockets: one per rank, in rank order.
    pub(super) listeners: Vec<TcpListener>,
    pub(super) metrics: Arc<ShardMetrics>,
    pub(super) sinks: LogSinks,
    /// Called with the shard's inbox once the shard accepts connections. Dropped without a call if
    /// the shard fails before.
    pub(super) started: Box<dyn FnOnce(io::Result<Inbox>) + Send>,
}

/// The ring buffers through which a shard passes records to the access log and spans to the span
/// exporter. Each is `None` if that output is off.
pub(super) struct LogSinks {
    pub(super) access: Option<AccessRing>,
    pub(super) traces: Option<TraceRing>,
}

/// Starts a shard's thread.
pub(super) fn spawn(shared: Arc<Shared>, spawn: ShardSpawn) -> io::Result<JoinHandle<()>> {
    let index = spawn.part.index;
    let name = format!("shard-{index}");
    thread::Builder::new().name(name).spawn(move || {
        // Pin before the shard allocates memory: the kernel then takes its pages from the CPU's own
        // NUMA node.
        if !spawn.cpus.is_empty()
            && let Err(error) = sys::pin(&spawn.cpus)
        {
            tracing::warn!(shard = index, cpus = ?spawn.cpus, %error, "shard cannot be pinned to its CPUs; running unpinned");
        }
        let busy_poll = shared.config.busy_poll;
        let (driver, part, ended) = (spawn.driver, spawn.part, EndReport(Some(spawn.ended)));
        let serve = async |net: Runtime| serve(net, shared, part).await;
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

async fn serve(net: Runtime, shared: Arc<Shared>, part: ShardPart) -> io::Result<()> {
    let metrics = part.metrics;
    let (notifications, notifier) = net.notifier()?;
    let inbox = Inbox::new(notifier);
    let counted = Arc::clone(&metrics);
    net.on_panic(move || counted.panic());
    let deps = deps(
        &shared,
        &inbox,
        part.index,
        Arc::clone(&metrics),
        part.sinks,
    );
    let entrance = Rc::new(Entrance {
        index: part.index,
        net: net.clone(),
        shard: Shard::new(Secure(net.clone()), deps),
        acceptor: shared.tls.acceptor(&metrics),
        places: Arc::clone(&shared.places),
        inboxes: Arc::clone(&shared.inboxes),
        places_wanted: Arc::clone(&shared.places_wanted),
        has_failed: Cell::new(false),
    });
    for (rank, listener) in (0_u16..).zip(part.listeners) {
        let listener = net.listener(listener)?;
        net.spawn_vital(accept(Rc::clone(&entrance), listener, rank));
    }
    net.spawn_vital(reset_vanished(net.clone(), Arc::clone(&metrics)));
    shared.listening.fetch_add(1, Ordering::Release);
    let _end = EndInbox(inbox.clone());
    (part.started)(Ok(inbox.clone()));
    while !entrance.shard.is_draining() {
        notifications.notified().await;
        metrics.set_events_lost(u64::from(net.events_lost()));
        if handle_messages(&entrance, &inbox) == Handled::Cut {
            shared.listening.fetch_sub(1, Ordering::Release);
            return Ok(());
        }
    }
    shared.listening.fetch_sub(1, Ordering::Release);
    drain(&entrance, &inbox).await;
    Ok(())
}

/// Ends the inbox of a shard with the shard, also if it fails: others would hand all new clients
/// over to it, because it has none.
struct EndInbox(Inbox);

impl Drop for EndInbox {
    fn drop(&mut self) {
        self.0.end();
    }
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
fn handle_messages(entrance: &Entrance, inbox: &Inbox) -> Handled {
    let shard = &entrance.shard;
    entrance.serve_all(inbox.take_clients(ACCEPT_BATCH_MAX));
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
async fn drain(entrance: &Entrance, inbox: &Inbox) {
    let Entrance { net, shard, .. } = entrance;
    let timer = net.timer();
    loop {
        net.nudge_all();
        timer.set(net.now(), Some(DRAIN_CHECK_INTERVAL));
        wait(&timer).await;
        let is_cut = handle_messages(entrance, inbox) == Handled::Cut;
        if is_cut || (shard.sessions() == 0 && inbox.close()) {
            return;
        }
    }
}

fn deps(
    shared: &Arc<Shared>,
    inbox: &Inbox,
    index: usize,
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
        index,
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
        on_incident: Rc::new(move |incident| incidents.record(incident)),
        secure,
        access: sinks.access,
        traces: sinks.traces,
    }
}
