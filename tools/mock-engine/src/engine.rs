//! The engine as a test holds it: a thread with a runtime of its own, a
//! listener, and what all connections share.
//!
//! Dropping the handle ends the thread and closes every socket at once, as a
//! killed process would.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::mpsc as std_mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::config::EngineConfig;
use crate::exchange::serve;
use crate::fault::{Fault, Faults};
use crate::http::reset;
use crate::listener::{Bound, ListenerState, Place, Stream};
use crate::log::{Counters, Log, Seen};
use crate::pd::{HandoffRegistry, Issuer};
use crate::sync::{Gate, Guarded};

/// The port that handoffs of engines behind Unix sockets name, from here on: one for each, since
/// it is part of their ids.
static NEXT_SIDE_PORT: AtomicU16 = AtomicU16::new(5_600);

/// What `/metrics` shows besides what the engine counts itself.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// `vllm:num_requests_running`; `None` for the real number.
    pub running: Option<u64>,
    /// `vllm:num_requests_waiting`.
    pub waiting: u64,
    /// `vllm:kv_cache_usage_perc`.
    pub kv_cache_usage: f64,
}

/// What the connections of one engine share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: EngineConfig,
    pub(crate) log: Log,
    pub(crate) faults: Faults,
    pub(crate) gate: Gate,
    pub(crate) registry: HandoffRegistry,
    pub(crate) issuer: Issuer,
    pub(crate) health: AtomicU16,
    pub(crate) load: Guarded<Load>,
    pub(crate) responses: AtomicU64,
    pub(crate) port: u16,
}

#[derive(Debug)]
enum Control {
    /// Close the listener, or open it again; then acknowledge.
    Refuse(bool, std_mpsc::SyncSender<()>),
}

/// A running engine; dropping it stops it.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    place: Place,
    control: Option<mpsc::UnboundedSender<Control>>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Binds 127.0.0.1 and serves from a thread of its own until dropped.
    /// Port 0 takes any free one.
    ///
    /// # Errors
    ///
    /// What binding, the runtime or the thread reports.
    pub fn start(config: EngineConfig, port: u16) -> io::Result<Self> {
        Self::start_on(config, SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
    }

    /// As [`Engine::start`], on any address or Unix socket. The file of a socket that nobody
    /// listens on is replaced, and removed when the engine is dropped.
    ///
    /// # Errors
    ///
    /// What binding, the runtime or the thread reports.
    pub fn start_on(config: EngineConfig, place: impl Into<Place>) -> io::Result<Self> {
        let place = place.into();
        let bound = Bound::at(&place)?;
        bound.listen()?;
        let place = bound.place(place)?;
        let port = match &place {
            Place::Tcp(addr) => addr.port(),
            Place::Unix(_) => NEXT_SIDE_PORT.fetch_add(1, Ordering::Relaxed),
        };
        let shared = Arc::new(Shared {
            log: Log::new(config.log_requests_max),
            faults: Faults::default(),
            gate: Gate::default(),
            registry: config.verify_handoff.clone().unwrap_or_default(),
            issuer: Issuer::default(),
            health: AtomicU16::new(config.health),
            load: Guarded::new(Load::default()),
            responses: AtomicU64::new(0),
            port,
            config,
        });
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let (control, orders) = mpsc::unbounded_channel();
        let task_shared = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name(format!("{}:{port}", shared.config.name))
            .spawn({
                let place = place.clone();
                move || runtime.block_on(run(task_shared, bound, place, orders))
            })?;
        Ok(Self {
            shared,
            place,
            control: Some(control),
            thread: Some(thread),
        })
    }

    /// One engine per data-parallel rank, on consecutive ports; with port 0,
    /// each on any free one.
    ///
    /// # Errors
    ///
    /// What starting one of them reports; the others are stopped again.
    pub fn start_ranks(config: EngineConfig, port: u16, ranks: u32) -> io::Result<Vec<Self>> {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self::start_ranks_on(config, addr, ranks)
    }

    /// As [`Engine::start_ranks`], on any address, or on the Unix sockets of a path with `{rank}`
    /// in it.
    ///
    /// # Errors
    ///
    /// What starting one of them reports; the others are stopped again.
    pub fn start_ranks_on(
        config: EngineConfig,
        place: impl Into<Place>,
        ranks: u32,
    ) -> io::Result<Vec<Self>> {
        let place = place.into();
        let mut engines = Vec::new();
        for rank in 0..ranks {
            let config = EngineConfig {
                rank,
                data_parallel_size: ranks,
                ..config.clone()
            };
            engines.push(Self::start_on(config, place.of_rank(rank, ranks)?)?);
        }
        Ok(engines)
    }

    /// The port it listens on; 0 on a Unix socket.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.addr().port()
    }

    /// The address it listens on; no address and port 0 on a Unix socket.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.place.addr()
    }

    /// Where it listens.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// `host:port`, as an address header spells it.
    #[must_use]
    pub fn host_port(&self) -> String {
        self.addr().to_string()
    }

    /// Every request received so far, in order. Whoever has read a complete
    /// answer finds it `Responded` here, unless the socket could not take the
    /// end of it at once; other states are for [`Engine::wait_for`].
    #[must_use]
    pub fn requests(&self) -> Vec<Seen> {
        self.shared.log.requests()
    }

    /// Forgets the requests received so far; counters stay.
    pub fn clear(&self) {
        self.shared.log.clear();
    }

    /// Waits until `pred` holds for the log and returns a snapshot, or `None`
    /// at the deadline. `pred` runs under the log's lock: it must not call
    /// methods of this engine.
    pub fn wait_for(
        &self,
        deadline: Duration,
        pred: impl Fn(&[Seen]) -> bool,
    ) -> Option<Vec<Seen>> {
        self.shared.log.wait_for(deadline, pred)
    }

    /// Waits until `pred` holds for the counters, or `None` at the deadline.
    pub fn wait_counters(
        &self,
        deadline: Duration,
        pred: impl Fn(&Counters) -> bool,
    ) -> Option<Counters> {
        self.shared.log.wait_counters(deadline, pred)
    }

    /// The counters now.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.log.counters()
    }

    /// Sets a fault for the next `times` requests to any path; `u32::MAX` is
    /// for ever. A health check or a scrape is a request too: where a proxy
    /// makes them, use [`Engine::fault_on`].
    pub fn fault(&self, fault: Fault, times: u32) {
        self.close_gate(&fault);
        self.shared.faults.arm(None, fault, times);
    }

    /// Sets a fault for the next `times` requests to `path` (no query).
    pub fn fault_on(&self, path: &str, fault: Fault, times: u32) {
        self.close_gate(&fault);
        self.shared.faults.arm(Some(path), fault, times);
    }

    /// Sets a fault for the next `times` requests whose body holds `needle`. Faults that strike
    /// before a body is read do nothing here: `Refuse`, `EarlyResponse`, `StallRead`.
    pub fn fault_with(&self, needle: &str, fault: Fault, times: u32) {
        self.close_gate(&fault);
        self.shared.faults.arm_for_body(needle, fault, times);
    }

    fn close_gate(&self, fault: &Fault) {
        if matches!(fault, Fault::Hold | Fault::HeldStatus { .. }) {
            self.shared.gate.close();
        }
    }

    /// Lets the requests that [`Fault::Hold`] holds, and those it will, be answered; the next
    /// such fault that is set holds again.
    pub fn release(&self) {
        self.shared.gate.open();
    }

    /// Takes back every fault that has not struck.
    pub fn clear_faults(&self) {
        self.shared.faults.clear();
    }

    /// Closes the listener, so that connects are refused, or opens it again.
    /// Returns when that has happened. Open connections stay. The port stays
    /// bound meanwhile, so nobody else can take it.
    pub fn refuse(&self, refuse: bool) {
        let (done, acknowledged) = std_mpsc::sync_channel(1);
        if let Some(control) = &self.control
            && control.send(Control::Refuse(refuse, done)).is_ok()
        {
            // An error means that the thread has ended: refused as well.
            let _ = acknowledged.recv();
        }
    }

    /// The status of `GET /health` from now on.
    pub fn set_health(&self, status: u16) {
        self.shared.health.store(status, Ordering::Relaxed);
    }

    /// What `/metrics` shows from now on.
    pub fn set_load(&self, load: Load) {
        *self.shared.load.lock() = load;
    }

    /// The registry its handoffs go into: the configured one or its own.
    #[must_use]
    pub fn handoffs(&self) -> HandoffRegistry {
        self.shared.registry.clone()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.control = None;
        if let Some(thread) = self.thread.take() {
            // A panic on that thread has already been printed there.
            let _ = thread.join();
        }
    }
}

/// Accepts until the handle is dropped.
async fn run(
    shared: Arc<Shared>,
    bound: Bound,
    place: Place,
    mut orders: mpsc::UnboundedReceiver<Control>,
) {
    let mut listener = ListenerState::Shut(Some(bound)).open(&place);
    let mut accepted = 0;
    loop {
        let order = match &listener {
            ListenerState::Shut(_) => orders.recv().await,
            ListenerState::Open(open) => tokio::select! {
                biased;
                order = orders.recv() => order,
                stream = open.accept() => {
                    match stream {
                        Ok(stream) => {
                            admit(&shared, stream, accepted);
                            accepted += 1;
                        }
                        // Out of descriptors: let some close first.
                        Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                    }
                    continue;
                }
            },
        };
        match order {
            None => return,
            Some(Control::Refuse(refuse, done)) => {
                listener = if refuse {
                    listener.shut(&place)
                } else {
                    listener.open(&place)
                };
                // The caller waits for this; if it left, nobody does.
                let _ = done.send(());
            }
        }
    }
}

/// Counts a connection out when its task ends, however it ends.
struct Open(Arc<Shared>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.log.count(|counters| counters.connections_open -= 1);
    }
}

fn admit(shared: &Arc<Shared>, stream: Stream, number: u64) {
    shared.log.count(|counters| {
        counters.connections_accepted += 1;
        counters.connections_open += 1;
    });
    let open = Open(Arc::clone(shared));
    if shared.faults.take_refuse() {
        shared.log.count(|counters| counters.faulted += 1);
        reset(&stream);
        return;
    }
    stream.send_at_once();
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        if let Ok(stream) = stream.secured(shared.config.tls.as_ref()).await {
            serve(stream, &shared, number).await;
        }
        drop(open);
    });
}
