//! Start-up: binds the listeners, reads the sources, and starts the shards and the admin server.

use std::io;
use std::net::TcpListener as StdListener;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use super::certificate::Renewal;
use super::discovery::Sources;
use super::health;
use super::heartbeat::{self, Missed};
use super::inbox::Inbox;
use super::incidents::Incidents;
use super::memory;
use super::metrics_port::MetricsPort;
use super::page_listener::PageListener;
use super::publish::{Changes, Publisher};
use super::reload::Reload;
use super::resolver_threads::{Resolver, resolve_all};
use super::shards::{self, LogSinks, ShardPart, ShardSpawn, Shared};
use super::signals::Signals;
use super::sockets::SocketErrorLog;
use super::supervise::Running;
use super::tls::TlsContext;
use super::traces;
use super::versions;
use crate::admin::{self, AdminState};
use crate::budget::Budget;
use crate::cli::{self, Exit, LogQueues};
use crate::config::{AdminConfig, Config, ListenAddress};
use crate::fault;
use crate::fleet::{EndpointSpec, Registry as Fleet, Target};
use crate::limits::{
    BIND_RETRY_MS_MAX, BIND_RETRY_PAUSE_MS, LOG_FLUSH_MS_MAX, RESERVED_FILES, SHARD_FILES,
};
use crate::metrics::access_log::{self, AccessRing, AccessWriter};
use crate::metrics::{
    BudgetShown, DnsCounters, LogLinesLost, Registry, ReloadResult, ReloadResultShown, Reloads,
    ReloadsShown, ShardMetrics,
};
use crate::net::probe::{Driver, probe_ring};
use crate::proxy::places::Places;
use crate::sys;
use crate::trace::TraceRing;

/// Runs the proxy until SIGTERM or SIGINT, then drains it.
///
/// # Errors
/// Returns the reason and exit code if the process cannot start, or if a shard fails.
pub fn run(config: Config, warnings: &[String]) -> Result<(), Exit> {
    sys::keep_freed_memory();
    cli::init_log(&config.log)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let runtime = runtime
        .map_err(|error| Exit::runtime(format!("control plane failed to start: {error}")))?;
    let ended = runtime.block_on(async {
        let signals = Signals::start().map_err(|error| Exit::runtime(error.to_string()))?;
        start(config).await?.until_signal(signals).await
    });
    // A file operation may hang.
    runtime.shutdown_background();
    if let Some(log) = cli::log_queues() {
        log.flush(Duration::from_millis(LOG_FLUSH_MS_MAX));
    }
    ended
}

/// Binds the listeners, logs the effective configuration, and starts the shards and the admin
/// server.
///
/// # Errors
/// Returns the first problem that prevents serving, with its exit code.
pub async fn start(config: Config) -> Result<Running, Exit> {
    let files = sys::raise_nofile();
    let driver = choose_driver();
    let cpus = sys::ProcessCpus::read();
    let topology = sys::Topology::read();
    let plan = sys::plan_cores(&config.cores, &cpus, &topology, sys::claim_cpu)?;
    for warning in start_warnings(&config, &plan) {
        tracing::warn!("{warning}");
    }
    let (tls, renewal) = TlsContext::load(&config)?;
    let admin = bind_ports(&config).await?;
    let metrics_port = config.metrics.as_ref().map(MetricsPort::bind).transpose()?;
    let dns = Arc::new(DnsCounters::default());
    let allowlist = config.allowlist.as_ref().map(|_| Arc::default());
    let mut publisher = Publisher::new(fleet(&config).await, allowlist.clone());
    let sources = Sources::read(&config, allowlist.as_ref(), &dns, &mut publisher).await?;
    let files = files.ok().and_then(|files| files.soft);
    let shard_count = plan.seats.len();
    let places = Places::new(client_places(&config, files, shard_count), shard_count);
    let shared = shared(config, &publisher, tls, places)?;
    let resolves_names = sources.resolves_names();
    let changes = publisher.start();
    sources.follow(allowlist.as_ref(), &changes).await?;
    follow_versions(&shared, &changes);
    memory::follow(Arc::clone(&shared.budget));
    let log = start_access_log(&shared.config, shard_count)?;
    let (rings, writer) = log.unzip();
    let mut tracing = traces::start(shared.config.tracing.as_ref(), shard_count).await?;
    log_configuration(&shared, driver, &plan.seats, files);
    let metrics: Vec<_> = (0..shard_count)
        .map(|_| Arc::new(ShardMetrics::new(fault::LABELS.len())))
        .collect();
    let mut registry = registry(driver, &metrics, resolves_names.then_some(dns));
    if let Some(allowlist) = &allowlist {
        registry.add_allowlist(Arc::clone(allowlist));
    }
    let sinks = (rings.unwrap_or_default().into_iter(), &mut tracing.rings);
    let (inboxes, ended) = start_shards(&shared, &plan.seats, driver, &metrics, sinks).await?;
    let missed = heartbeat::follow(&inboxes);
    close_idle_of_others(&shared, &inboxes);
    let shard_metrics = metrics.clone();
    tracing.show(&mut registry, metrics);
    keep_certificate(renewal, &mut registry);
    let reloaded = add_process_metrics(&shared, &mut registry);
    let metrics = Arc::new(registry);
    if let Some((port, renewal)) = metrics_port {
        let text = metrics_text(&shared.config, &metrics, &shard_metrics);
        let failed = |error: io::Error| Exit::runtime(format!("--metrics-port: {error}"));
        port.serve(text).map_err(failed)?;
        if let Some(renewal) = renewal {
            tokio::spawn(renewal.run(Arc::default()));
        }
    }
    if let Some(listener) = admin {
        let metrics = Arc::clone(&metrics);
        serve_admin(listener, &shared, metrics, missed, &changes)?;
    }
    Ok(Running {
        drain: shared.config.drain.clone(),
        changes,
        inboxes,
        ended,
        access: writer,
        traces: tracing.exporter,
        metrics,
        shard_metrics,
        reload: Reload::start(&shared.config, reloaded),
        started: tokio::time::Instant::now(),
    })
}

/// Starts the access log. Returns a ring for each shard and the handle to its thread, or `None` if
/// the log is off.
fn start_access_log(
    config: &Config,
    shards: usize,
) -> Result<Option<(Vec<AccessRing>, AccessWriter)>, Exit> {
    access_log::start(&config.log.access, shards)
        .map_err(|error| Exit::config(format!("ringside: --access-log cannot be opened: {error}")))
}

/// Registers the metrics of the whole process. Returns that of reloads.
fn add_process_metrics(shared: &Shared, registry: &mut Registry) -> Arc<ReloadResult> {
    let reloaded = Arc::new(ReloadResult::default());
    registry.add(ReloadResultShown(Arc::clone(&reloaded)));
    registry.add(BudgetShown(Arc::clone(&shared.budget)));
    registry.add(LogLinesLost(|| {
        cli::log_queues().map_or(0, LogQueues::lost)
    }));
    reloaded
}

/// Checks that the ports for clients are free, and binds that of the admin server.
async fn bind_ports(config: &Config) -> Result<Option<StdListener>, Exit> {
    for listener in &config.listeners {
        retry_while_busy(|| sys::probe(listener.address)).await?;
    }
    match config.admin {
        Some(admin) => Ok(Some(bind_admin(admin).await?)),
        None => Ok(None),
    }
}

/// Binds with `bind`, again for some time while the port is in use: the kernel closes the sockets
/// of a killed process after it has reported its end.
async fn retry_while_busy<T>(
    bind: impl Fn() -> Result<T, sys::BindError>,
) -> Result<T, sys::BindError> {
    let end = tokio::time::Instant::now() + Duration::from_millis(BIND_RETRY_MS_MAX);
    loop {
        match bind() {
            Err(sys::BindError::Busy(_)) if tokio::time::Instant::now() < end => {
                tokio::time::sleep(Duration::from_millis(BIND_RETRY_PAUSE_MS)).await;
            }
            bound => return bound,
        }
    }
}

/// Binds the port of the admin server. If the default one is taken, another sidecar probably
/// runs on this host: a free port is used.
async fn bind_admin(admin: AdminConfig) -> Result<StdListener, Exit> {
    let bind = |address| sys::bind_alone(ListenAddress::Address(address));
    let bound = match admin.may_move {
        true => bind(admin.address),
        false => retry_while_busy(|| bind(admin.address)).await,
    };
    match bound {
        Err(sys::BindError::Busy(_)) if admin.may_move => {
            let mut address = admin.address;
            address.set_port(0);
            let listener = bind(address)?;
            let moved = listener.local_addr();
            let moved = moved.map_err(|error| Exit::runtime(format!("admin server: {error}")))?;
            tracing::warn!(
                "the default admin address {} is in use; the admin server listens on {moved} \
                 (--admin-address sets it)",
                admin.address
            );
            Ok(listener)
        }
        bound => Ok(bound?),
    }
}

/// Returns the page of the additional metrics server.
fn metrics_text(
    config: &Config,
    registry: &Arc<Registry>,
    shards: &[Arc<ShardMetrics>],
) -> admin::MetricsText {
    let registry = Arc::clone(registry);
    let shows_peer = config
        .metrics
        .as_ref()
        .is_some_and(|one| one.shows_pd_sidecar);
    let peer = shows_peer.then(|| {
        let connector = config.pd.kv_connector.name();
        Registry::pd_sidecar(shards.to_vec(), connector)
    });
    Arc::new(move || match &peer {
        None => registry.render(),
        Some(peer) => registry.render_with(peer),
    })
}

/// Starts one shard per seat. Returns their inboxes, and the channel that reports the end of each.
async fn start_shards(
    shared: &Arc<Shared>,
    seats: &[sys::Seat],
    driver: Driver,
    metrics: &[Arc<ShardMetrics>],
    (mut access, mut traces): (
        impl Iterator<Item = AccessRing>,
        impl Iterator<Item = TraceRing>,
    ),
) -> Result<(Vec<Inbox>, mpsc::UnboundedReceiver<io::Result<()>>), Exit> {
    let (report_ended, ended) = mpsc::unbounded_channel();
    let mut inboxes = Vec::with_capacity(seats.len());
    for (index, (seat, metrics)) in seats.iter().zip(metrics).enumerate() {
        let listeners = shared.config.listeners.iter();
        let listeners = listeners
            .map(|listener| sys::bind_shared(listener.address))
            .collect::<Result<_, _>>()?;
        let (report_started, started) = oneshot::channel();
        let report_ended = report_ended.clone();
        let spawn = ShardSpawn {
            cpus: seat.cpus.clone(),
            driver,
            part: ShardPart {
                index,
                listeners,
                metrics: Arc::clone(metrics),
                sinks: LogSinks {
                    access: access.next(),
                    traces: traces.next(),
                },
                started: Box::new(move |inbox| drop(report_started.send(inbox))),
            },
            ended: Box::new(move |result| drop(report_ended.send(result))),
        };
        let failed = |error: io::Error| Exit::runtime(format!("shard {index}: {error}"));
        shards::spawn(Arc::clone(shared), spawn).map_err(failed)?;
        let Ok(inbox) = started.await else {
            let text = format!("shard {index} stopped during start-up");
            return Err(Exit::runtime(text));
        };
        inboxes.push(inbox.map_err(failed)?);
    }
    // From here on, shards hand clients over.
    drop(shared.inboxes.set(inboxes.clone()));
    Ok((inboxes, ended))
}

fn serve_admin(
    listener: std::net::TcpListener,
    shared: &Shared,
    metrics: Arc<Registry>,
    missed: Missed,
    changes: &Changes,
) -> Result<(), Exit> {
    let failed = |error: io::Error| Exit::runtime(format!("admin server failed to start: {error}"));
    listener.set_nonblocking(true).map_err(failed)?;
    let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
    let tls = shared.tls.decode.clone();
    let state = AdminState {
        registry: metrics,
        shards_listening: Arc::clone(&shared.listening),
        shards_expected: missed.shards(),
        stuck_shards: Arc::new(move || missed.stuck()),
        fleet: Arc::clone(&shared.published),
        decoders: health::watch(&shared.published, tls, changes.clone()),
    };
    let pages = PageListener::start(listener, |stream| std::future::ready(Ok(stream)));
    tokio::spawn(async move {
        if let Err(error) = admin::serve(pages, state, std::future::pending()).await {
            tracing::error!(%error, "admin server stopped: /metrics and /readyz are unavailable until a restart");
        }
    });
    Ok(())
}

/// Spawns the task that makes all shards close idle clients when one of them has no place left for
/// a new client.
fn close_idle_of_others(shared: &Shared, inboxes: &[Inbox]) {
    let (wanted, inboxes) = (Arc::clone(&shared.places_wanted), inboxes.to_vec());
    tokio::spawn(async move {
        loop {
            wanted.notified().await;
            inboxes.iter().for_each(Inbox::close_idle);
        }
    });
}

/// Spawns the task that asks the decoders for their versions, if these matter.
fn follow_versions(shared: &Shared, changes: &Changes) {
    if shared.config.pd.asks_versions() {
        let (tls, lost) = (shared.tls.decode.clone(), Arc::clone(&shared.decoder_lost));
        versions::follow(&shared.published, tls, changes.clone(), lost);
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

/// Returns the fleet that the configuration describes.
pub(super) async fn fleet(config: &Config) -> Fleet {
    let targets = config.pools.iter().flat_map(|pool| &pool.endpoints);
    let targets: Vec<&Target> = targets.collect();
    let mut resolved = resolve_all(&targets).await.into_iter();
    let mut pools = Vec::with_capacity(config.pools.len());
    for pool in &config.pools {
        let mut endpoints = Vec::with_capacity(pool.endpoints.len());
        for (target, addresses) in pool.endpoints.iter().zip(resolved.by_ref()) {
            if addresses.is_empty() {
                tracing::warn!(decoder = %target, "decoder name does not resolve yet; it will be looked up again");
            }
            let target = target.clone();
            endpoints.push(EndpointSpec { target, addresses });
        }
        pools.push(endpoints);
    }
    let mut fleet = Fleet::new(pools);
    if let Some(allowlist) = &config.allowlist {
        fleet.enable_allowlist(allowlist.pool.as_ref().map(ToString::to_string));
    }
    fleet
}

/// Returns how many client connections the process may have. By default they can use half of the
/// limit on open files, `files`, because each request needs a connection to an engine too.
fn client_places(config: &Config, files: Option<u64>, shards: usize) -> usize {
    let Some(files) = files else {
        return config.limits.client_connections_max.unwrap_or(usize::MAX);
    };
    let ranks = config.listeners.len() as u64;
    let reserved = RESERVED_FILES + (SHARD_FILES + ranks) * shards as u64;
    let half = files.saturating_sub(reserved) / 2;
    let half = usize::try_from(half).unwrap_or(usize::MAX).max(1);
    match config.limits.client_connections_max {
        Some(max) if max > half => {
            tracing::warn!(
                "--max-connections is {max}: with {files} file descriptors, more than {half} \
                 connections leave too few for engines; raise the limit on open files (ulimit -n)"
            );
            max
        }
        Some(max) => max,
        None => half,
    }
}

fn shared(
    config: Config,
    publisher: &Publisher,
    tls: TlsContext,
    places: Arc<Places>,
) -> Result<Arc<Shared>, Exit> {
    let resolver = Resolver::start().map_err(|error| Exit::runtime(error.to_string()))?;
    Ok(Arc::new(Shared {
        budget: Budget::new(config.limits.body_budget_bytes),
        places,
        inboxes: Arc::default(),
        config: Arc::new(config),
        published: publisher.published(),
        listening: Arc::new(AtomicUsize::new(0)),
        resolver,
        socket_errors: SocketErrorLog::start(),
        incidents: Incidents::start(),
        decoder_lost: Arc::default(),
        places_wanted: Arc::default(),
        tls,
    }))
}

fn registry(
    driver: Driver,
    metrics: &[Arc<ShardMetrics>],
    dns: Option<Arc<DnsCounters>>,
) -> Registry {
    let labels = vec![driver.label(); metrics.len()];
    let registry = Registry::new(metrics.to_vec(), labels, fault::LABELS);
    match dns {
        Some(dns) => registry.with_dns(dns),
        None => registry,
    }
}

/// Returns the warnings about guards that are open and about the cores.
pub(super) fn start_warnings(config: &Config, plan: &sys::CorePlan) -> Vec<String> {
    let mut warnings = config.open_guards();
    warnings.extend_from_slice(&plan.warnings);
    if config.busy_poll.is_some() && plan.seats.iter().any(|seat| seat.cpus.len() != 1) {
        warnings.push(
            "--busy-poll with a shard that is not pinned to a CPU: polling takes CPU time from \
             other programs, and uses up a CPU quota, after which streams stall until its next \
             period; give the shard a CPU (--cores)"
                .to_owned(),
        );
    }
    warnings
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

fn log_configuration(shared: &Shared, driver: Driver, seats: &[sys::Seat], files: Option<u64>) {
    let places = shared.places.max();
    for (key, value) in shared.config.describe() {
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
    tracing::info!("client connections: {places} at most");
    tracing::info!("ringside {} is ready", env!("CARGO_PKG_VERSION"));
}
