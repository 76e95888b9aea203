//! The handle of a running engine: its thread and runtime, its listener, and the state that all
//! of its connections share.
//!
//! Dropping the handle ends the thread and closes all sockets immediately, as if the process had
//! been killed.

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
use crate::stats::Stats;
use crate::sync::{Gate, Guarded};
use crate::token::Words;

/// The port number that the next engine on a Unix socket puts into its handoffs.
///
/// Each of these engines gets a different number because the port is part of a handoff's id.
static NEXT_SIDE_PORT: AtomicU16 = AtomicU16::new(5_600);

/// The load that `/metrics` reports; set it with [`Engine::set_load`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Value of `vllm:num_requests_running`; `None` reports the actual number of running requests.
    pub running: Option<u64>,
    /// Value of `vllm:num_requests_waiting`.
    pub waiting: u64,
    /// Value of `vllm:kv_cache_usage_perc`.
    pub kv_cache_usage: f64,
}

/// State shared by all connections of one engine.
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
    /// Number of responses that took the time of generating tokens.
    pub(crate) paced: AtomicU64,
    pub(crate) port: u16,
    pub(crate) words: Words,
    pub(crate) stats: Stats,
}

impl Shared {
    /// Adds `fault` for the next `times` requests to `path` or, if `contains` is given, for those
    /// whose body contains this text. Closes the gate if the fault waits at it.
    pub(crate) fn arm(&self, path: Option<&str>, contains: Option<&str>, fault: Fault, times: u32) {
        if matches!(fault, Fault::Hold | Fault::HeldStatus { .. }) {
            self.gate.close();
        }
        match contains {
            Some(needle) => self.faults.arm_for_body(needle, fault, times),
            None => self.faults.arm(path, fault, times),
        }
    }
}

#[derive(Debug)]
enum Control {
    /// Closes the listener (`true`) or opens it again (`false`), then acknowledges through the
    /// sender.
    Refuse(bool, std_mpsc::SyncSender<()>),
}

/// A running engine, stopped when dropped.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    place: Place,
    control: Option<mpsc::UnboundedSender<Control>>,
    thread: Option<JoinHandle<()>>,
}

impl Engine {
    /// Starts an engine on 127.0.0.1 that serves from a separate thread until dropped.
    ///
    /// Port 0 selects any free port.
    ///
    /// # Errors
    ///
    /// Returns an error if the address cannot be bound, or if the runtime or the thread cannot be
    /// created.
    pub fn start(config: EngineConfig, port: u16) -> io::Result<Self> {
        Self::start_on(config, SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
    }

    /// Starts an engine like [`Engine::start`], on any address or Unix socket.
    ///
    /// An existing socket file on which nothing listens is replaced. The file is removed when the
    /// engine is dropped.
    ///
    /// # Errors
    ///
    /// Returns an error if the address cannot be bound, or if the runtime or the thread cannot be
    /// created.
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
            paced: AtomicU64::new(0),
            port,
            words: Words::default(),
            stats: Stats::default(),
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

    /// Starts one engine per data-parallel rank on 127.0.0.1: rank r on `port` + r or, with port 0,
    /// each rank on any free port.
    ///
    /// # Errors
    ///
    /// Returns the first error; the engines that have already started are stopped.
    pub fn start_ranks(config: EngineConfig, port: u16, ranks: u32) -> io::Result<Vec<Self>> {
        let addr = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self::start_ranks_on(config, addr, ranks)
    }

    /// Starts engines like [`Engine::start_ranks`], on any address, or on Unix sockets whose path
    /// contains `{rank}`.
    ///
    /// # Errors
    ///
    /// Returns the first error; the engines that have already started are stopped.
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

    /// Returns the TCP port, or 0 for a Unix socket.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.addr().port()
    }

    /// Returns the TCP listen address, or `0.0.0.0:0` for a Unix socket.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.place.addr()
    }

    /// Returns the listen address: TCP or Unix socket.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Returns the TCP listen address as `host:port`, as used in routing headers, or `0.0.0.0:0`
    /// for a Unix socket.
    #[must_use]
    pub fn host_port(&self) -> String {
        self.addr().to_string()
    }

    /// Returns a copy of the request log, in order of arrival.
    ///
    /// Once a client has read a complete response, the entry of its request is in state
    /// `Responded`, unless [`Fault::Slow`] applied or the socket could not accept the end of the
    /// response immediately. To observe any other state, use [`Engine::wait_for`].
    #[must_use]
    pub fn requests(&self) -> Vec<Seen> {
        self.shared.log.requests()
    }

    /// Removes the requests received so far from the log; the counters are unchanged.
    pub fn clear(&self) {
        self.shared.log.clear();
    }

    /// Waits until `pred` returns true for the request log and returns a copy of the log, or `None`
    /// if that takes longer than `deadline`.
    ///
    /// `pred` runs while the log is locked, so it must not call methods of this engine.
    pub fn wait_for(
        &self,
        deadline: Duration,
        pred: impl Fn(&[Seen]) -> bool,
    ) -> Option<Vec<Seen>> {
        self.shared.log.wait_for(deadline, pred)
    }

    /// Waits until `pred` returns true for the counters and returns them, or `None` if that takes
    /// longer than `deadline`.
    ///
    /// `pred` runs while the log is locked, so it must not call methods of this engine.
    pub fn wait_counters(
        &self,
        deadline: Duration,
        pred: impl Fn(&Counters) -> bool,
    ) -> Option<Counters> {
        self.shared.log.wait_counters(deadline, pred)
    }

    /// Returns the current counters.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.log.counters()
    }

    /// Sets a fault for the next `times` requests to any path; `u32::MAX` means all requests.
    ///
    /// Health checks and metric scrapes count as requests. If a proxy sends any, use
    /// [`Engine::fault_on`].
    pub fn fault(&self, fault: Fault, times: u32) {
        self.shared.arm(None, None, fault, times);
    }

    /// Sets a fault for the next `times` requests whose path, without the query, is `path`;
    /// `u32::MAX` means all requests.
    pub fn fault_on(&self, path: &str, fault: Fault, times: u32) {
        self.shared.arm(Some(path), None, fault, times);
    }

    /// Sets a fault for the next `times` requests whose body contains `needle`.
    ///
    /// Faults that act before the body is read are not suitable here: `EarlyResponse` and
    /// `StallRead` have no effect, and `Refuse` ignores `needle`.
    pub fn fault_with(&self, needle: &str, fault: Fault, times: u32) {
        self.shared.arm(None, Some(needle), fault, times);
    }

    /// Releases all requests that [`Fault::Hold`] or [`Fault::HeldStatus`] delays.
    ///
    /// Later requests that such a fault applies to are not delayed either, until another one is
    /// set.
    pub fn release(&self) {
        self.shared.gate.open();
    }

    /// Removes all faults that are still pending.
    pub fn clear_faults(&self) {
        self.shared.faults.clear();
    }

    /// Closes the listener so that connects are refused (`true`), or opens it again (`false`).
    ///
    /// Returns after the change has taken effect. Existing connections remain open. The port
    /// remains bound, so that no other process can use it.
    pub fn refuse(&self, refuse: bool) {
        let (done, acknowledged) = std_mpsc::sync_channel(1);
        if let Some(control) = &self.control
            && control.send(Control::Refuse(refuse, done)).is_ok()
        {
            // An error means that the thread has ended, which also refuses connects.
            let _ = acknowledged.recv();
        }
    }

    /// Sets the HTTP status with which the engine responds to `GET /health` and `GET /ping`.
    pub fn set_health(&self, status: u16) {
        self.shared.health.store(status, Ordering::Relaxed);
    }

    /// Sets the load that `/metrics` reports.
    pub fn set_load(&self, load: Load) {
        *self.shared.load.lock() = load;
    }

    /// Returns the registry that records this engine's handoffs: the configured one, or the
    /// private one if none is configured.
    #[must_use]
    pub fn handoffs(&self) -> HandoffRegistry {
        self.shared.registry.clone()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.control = None;
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has already been printed.
            let _ = thread.join();
        }
    }
}

/// Accepts connections, and closes or opens the listener as [`Control`] specifies, until the
/// [`Engine`] is dropped.
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
                        // Most likely out of file descriptors: wait for connections to close.
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
                // An error means that the caller no longer waits for the acknowledgement.
                let _ = done.send(());
            }
        }
    }
}

/// Decrements `connections_open` when a connection's task ends for any reason.
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
    stream.set_nodelay();
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        if let Ok(stream) = stream.secured(shared.config.tls.as_ref()).await {
            serve(stream, &shared, number).await;
        }
        drop(open);
    });
}
