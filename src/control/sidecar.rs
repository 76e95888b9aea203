//! The `ringside sidecar` command: start-up, running and shutdown.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::allowlist::Allowlist;
use super::certificate::Renewal;
use super::decoders;
use super::inbox::{Inbox, Message};
use super::mori;
use super::resolver::{Resolver, resolve};
use super::shards::{self, Common, Rings, Start};
use super::sockets::SocketErrorLog;
use super::tls::TlsContext;
use super::traces::{self, Exporter};
use crate::admin::{self, AdminState};
use crate::cli::Exit;
use crate::config::{Config, ListenAddress};
use crate::fault;
use crate::metrics::access::{self, AccessWriter};
use crate::metrics::{DnsCounters, Registry, Reloads, ReloadsShown, ShardMetrics};
use crate::net::probe::{Driver, probe_ring};
use crate::proxy::Budget;
use crate::proxy::shard::Decoder;
use crate::sys;

/// A sidecar whose shards are accepting connections.
pub struct Running {
    common: Arc<Common>,
    inboxes: Vec<Inbox>,
    ended: mpsc::UnboundedReceiver<io::Result<()>>,
    access: Option<AccessWriter>,
    traces: Option<Exporter>,
    /// Address the admin server listens on; `None` if it is off.
    pub admin: Option<SocketAddr>,
    admin_draining: Arc<AtomicBool>,
    registry: Arc<Registry>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running")
            .field("shards", &self.inboxes.len())
            .finish_non_exhaustive()
    }
}

/// Runs a sidecar until SIGTERM or SIGINT, then drains it.
///
/// # Errors
/// Returns the reason and exit code if the sidecar cannot start, or if a shard fails.
pub fn run_sidecar(config: Config, warnings: &[String]) -> Result<(), Exit> {
    crate::cli::init_log(&config.log);
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime
        .map_err(|error| Exit::runtime(format!("control plane failed to start: {error}")))?;
    runtime.block_on(async {
        let signals = Signals::new().map_err(|error| Exit::runtime(error.to_string()))?;
        Running::start(config).await?.until_signal(signals).await
    })
}

struct Signals {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
        }
    }
}

impl Running {
    /// Binds the listeners, logs the effective configuration, and starts the shards and the admin
    /// server.
    ///
    /// # Errors
    /// Returns the first problem that prevents serving, with its exit code.
    pub async fn start(config: Config) -> Result<Self, Exit> {
        let files = sys::raise_nofile();
        let driver = choose_driver();
        let (allowed, quota) = (sys::allowed_cpus(), sys::cpu_quota());
        let plan = sys::plan_cores(&config.cores, &allowed, quota, &sys::Topology::read())?;
        log_warnings(&config, &plan);
        let (tls, renewal) = TlsContext::load(&config)?;
        for rank in &config.ranks {
            sys::probe(rank.listen)?;
        }
        let admin = config
            .admin
            .map(|address| sys::bind_alone(ListenAddress::Address(address)));
        let admin = admin.transpose()?;
        let dns = Arc::new(DnsCounters::default());
        let mori = mori::resolve(&config, &dns).await?;
        let common = common(config, mori, tls).await?;
        let shard_count = plan.seats.len();
        let log = access::start(&common.config.log.access, shard_count)
            .map_err(|error| Exit::runtime(format!("--access-log cannot be opened: {error}")))?;
        let (rings, writer) = log.unzip();
        let mut tracing = traces::start(common.config.tracing.as_ref(), shard_count).await?;
        log_configuration(
            &common.config,
            driver,
            &plan.seats,
            files.as_ref().ok().and_then(|f| f.soft),
        );
        let metrics: Vec<_> = (0..shard_count)
            .map(|_| Arc::new(ShardMetrics::new(fault::LABELS.len())))
            .collect();
        let (report_ended, ended) = mpsc::unbounded_channel();
        let mut rings = rings.unwrap_or_default().into_iter();
        let mut inboxes = Vec::with_capacity(shard_count);
        for (index, seat) in plan.seats.iter().enumerate() {
            let metrics = Arc::clone(&metrics[index]);
            let rings = Rings::of(rings.next(), tracing.rings.next());
            let inbox = start_shard(
                &common,
                index,
                seat.cpu,
                driver,
                metrics,
                rings,
                report_ended.clone(),
            );
            inboxes.push(inbox.await?);
        }
        let mut registry = registry(&common, driver, &metrics, dns);
        tracing.show(&mut registry, metrics);
        keep_certificate(renewal, &mut registry);
        let mut running = Self {
            common,
            inboxes,
            ended,
            access: writer,
            traces: tracing.exporter,
            admin: None,
            admin_draining: Arc::new(AtomicBool::new(false)),
            registry: Arc::new(registry),
        };
        if let Some(listener) = admin {
            running.serve_admin(listener)?;
        }
        Ok(running)
    }

    fn serve_admin(&mut self, listener: std::net::TcpListener) -> Result<(), Exit> {
        let failed =
            |error: io::Error| Exit::runtime(format!("admin server failed to start: {error}"));
        listener.set_nonblocking(true).map_err(failed)?;
        let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
        self.admin = listener.local_addr().ok();
        let allowlist = self.common.allowlist.clone();
        let state = AdminState {
            registry: Arc::clone(&self.registry),
            shards_listening: Arc::clone(&self.common.listening),
            shards_expected: self.inboxes.len(),
            draining: Arc::clone(&self.admin_draining),
            decoders: decoders::watch(&self.common.decoders, self.common.tls.decode.clone()),
            allowlist: allowlist
                .map(|list| -> admin::LookUp { Arc::new(move || list.readiness()) }),
        };
        tokio::spawn(async move {
            if let Err(error) = admin::serve(listener, state, std::future::pending()).await {
                tracing::error!(%error, "admin server stopped: /metrics and /readyz are unavailable until a restart");
            }
        });
        Ok(())
    }

    /// Returns the metrics in the exposition format that the admin server serves.
    #[must_use]
    pub fn metrics(&self) -> String {
        self.registry.render()
    }

    /// Serves until the first signal, then drains. A second signal ends the drain immediately.
    /// Fails if a shard ends before the first signal.
    async fn until_signal(mut self, mut signals: Signals) -> Result<(), Exit> {
        tokio::select! {
            () = signals.next() => {}
            ended = self.ended.recv() => return Err(shard_ended(ended)),
        }
        let (timeout, settle) = (
            self.common.config.drain.timeout,
            self.common.config.drain.settle,
        );
        tracing::info!("draining");
        let drained = self.drain(settle, timeout);
        let cut = tokio::select! {
            cut = drained => cut,
            () = signals.next() => {
                tracing::warn!("second signal received: exiting without waiting for open requests");
                true
            }
        };
        if cut {
            // Skip the final flush: the access log's writer may be blocked on a full pipe, and
            // `finish` would then never return.
            tracing::warn!(
                "drain incomplete: open streams are aborted (--drain-timeout limits the wait)"
            );
            return Ok(());
        }
        if let Some(access) = self.access.take() {
            access.finish();
        }
        if let Some(traces) = self.traces.take() {
            traces.finish().await;
        }
        Ok(())
    }

    /// Drains the shards: reports unhealthy from now on, stops accepting after `settle`, and then
    /// waits until all open requests have finished. Returns `true` if `timeout` expired first.
    pub async fn drain(&mut self, settle: Duration, timeout: Option<Duration>) -> bool {
        self.admin_draining.store(true, Ordering::Release);
        self.common.unhealthy.store(true, Ordering::Release);
        tokio::time::sleep(settle).await;
        self.common.draining.store(true, Ordering::Release);
        for inbox in &self.inboxes {
            inbox.send(Message::CheckDrain);
        }
        let all = async {
            for _ in 0..self.inboxes.len() {
                self.ended.recv().await;
            }
        };
        match timeout {
            None => {
                all.await;
                false
            }
            Some(timeout) => tokio::time::timeout(timeout, all).await.is_err(),
        }
    }
}

/// Spawns the task that reloads the certificate from its directory, if one is configured, and
/// registers the metric that counts the reloads.
fn keep_certificate(renewal: Option<Renewal>, registry: &mut Registry) {
    if let Some(renewal) = renewal {
        let reloads = Arc::new(Reloads::default());
        registry.add(ReloadsShown(Arc::clone(&reloads)));
        tokio::spawn(renewal.run(reloads));
    }
}

async fn common(
    config: Config,
    mori: Option<mori::Hosts>,
    tls: TlsContext,
) -> Result<Arc<Common>, Exit> {
    let allowlist = match &config.allowlist {
        Some(config) => Some(Allowlist::start(config).await?),
        None => None,
    };
    let mut decoders = Vec::with_capacity(config.ranks.len());
    for rank in &config.ranks {
        let target = rank.decoder.clone();
        let addresses = resolve(&target);
        if addresses.is_empty() {
            tracing::warn!(decoder = %target, "decoder name does not resolve yet; it will be looked up again");
        }
        decoders.push(Decoder { target, addresses });
    }
    let resolver = Resolver::start().map_err(|error| Exit::runtime(error.to_string()))?;
    Ok(Arc::new(Common {
        budget: Budget::new(config.limits.body_budget_bytes),
        config: Arc::new(config),
        unhealthy: Arc::default(),
        draining: Arc::default(),
        listening: Arc::new(AtomicUsize::new(0)),
        decoders,
        resolver,
        socket_errors: SocketErrorLog::start(),
        mori,
        allowlist,
        tls,
    }))
}

fn registry(
    common: &Common,
    driver: Driver,
    metrics: &[Arc<ShardMetrics>],
    dns: Arc<DnsCounters>,
) -> Registry {
    let labels = vec![driver.label(); metrics.len()];
    let mut registry = Registry::new(metrics.to_vec(), labels, fault::LABELS);
    if common.mori.is_some() {
        registry = registry.with_dns(dns);
    }
    if let Some(list) = &common.allowlist {
        registry.add_allowlist(Arc::clone(&list.metrics));
    }
    registry
}

async fn start_shard(
    common: &Arc<Common>,
    index: usize,
    cpu: Option<usize>,
    driver: Driver,
    metrics: Arc<ShardMetrics>,
    rings: Rings,
    report_ended: mpsc::UnboundedSender<io::Result<()>>,
) -> Result<Inbox, Exit> {
    let ranks = common.config.ranks.iter();
    let listeners = ranks
        .map(|rank| sys::bind_shared(rank.listen))
        .collect::<Result<_, _>>()?;
    let (report_started, started) = oneshot::channel();
    let start = Start {
        index,
        cpu,
        driver,
        listeners,
        metrics,
        rings,
        started: Box::new(move |inbox| drop(report_started.send(inbox))),
        ended: Box::new(move |result| drop(report_ended.send(result))),
    };
    let failed = |error: io::Error| Exit::runtime(format!("shard {index}: {error}"));
    shards::spawn(Arc::clone(common), start).map_err(failed)?;
    match started.await {
        Ok(inbox) => inbox.map_err(failed),
        Err(_) => Err(Exit::runtime(format!(
            "shard {index} stopped during start-up"
        ))),
    }
}

fn shard_ended(ended: Option<io::Result<()>>) -> Exit {
    match ended {
        Some(Err(error)) => Exit::runtime(format!("shard failed: {error}")),
        // Shards stop only when draining. Exit, so that a supervisor restarts the process, rather
        // than continue with fewer shards.
        Some(Ok(())) | None => Exit::runtime("shard stopped unexpectedly"),
    }
}

fn log_warnings(config: &Config, plan: &sys::CorePlan) {
    for warning in &plan.warnings {
        tracing::warn!("{warning}");
    }
    if config.busy_poll.is_some() && plan.seats.iter().any(|seat| seat.cpu.is_none()) {
        tracing::warn!(
            "--busy-poll with an unpinned shard: polling uses up the CPU quota, and streams stall \
             until the next period; turn it off or raise the quota"
        );
    }
}

/// Selects the I/O driver of the shards: io_uring if the kernel accepts it with the required flags;
/// otherwise logs a warning and selects epoll.
fn choose_driver() -> Driver {
    match probe_ring() {
        Ok(()) => Driver::Uring,
        Err(error) => {
            tracing::warn!(%error, "io_uring is not available; using epoll (to use io_uring, allow it in the seccomp profile and kernel.io_uring_disabled)");
            Driver::Epoll
        }
    }
}

fn log_configuration(config: &Config, driver: Driver, seats: &[sys::Seat], files: Option<u64>) {
    for (key, value) in config.describe() {
        tracing::info!("{key}: {value}");
    }
    tracing::info!("shards: {}", seats.len());
    for (index, seat) in seats.iter().enumerate() {
        tracing::info!("shard {index}: {seat}");
    }
    tracing::info!("driver: {}", driver.label());
    if let Some(files) = files {
        tracing::info!("file descriptor limit: {files}");
    }
    tracing::info!("ringside {} is ready", env!("CARGO_PKG_VERSION"));
}
