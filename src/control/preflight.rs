//! `ringside check-config`: the checks of a start, without listening and without clients.
//!
//! The steps are those of `startup::start`. Each is made even if an earlier one has failed, so that
//! all problems are found together.

use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Access, access};
use rustix::io::Errno;

use super::certificate;
use super::discovery::Sources;
use super::publish::Publisher;
use super::resolver_threads::resolve_all;
use super::startup::{fleet, start_warnings};
use super::tls::TlsContext;
use super::traces;
use crate::cli::{CheckConfig, Exit};
use crate::config::{AccessLog, Config, ListenAddress};
use crate::net::probe::probe_ring;
use crate::sys::{self, BindError};

/// Checks a configuration. Returns the report with its exit code.
#[must_use]
pub fn check(check: CheckConfig) -> Exit {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let mut findings = Findings::default();
    match runtime {
        Ok(runtime) => {
            let (config, offline) = (check.config.clone(), check.is_offline);
            runtime.block_on(findings.collect(config, offline));
            // A file operation may hang.
            runtime.shutdown_background();
        }
        Err(error) => findings.problem(Exit::runtime(error.to_string())),
    }
    check.conclude(&findings.problems, findings.warnings)
}

/// The results of the checks.
#[derive(Default)]
struct Findings {
    problems: Vec<Exit>,
    warnings: Vec<String>,
}

impl Findings {
    fn problem(&mut self, problem: Exit) {
        self.problems.push(problem);
    }

    /// Records the problem of a step, if it has one.
    fn step<T>(&mut self, result: Result<T, impl Into<Exit>>) -> Option<T> {
        result.map_err(|error| self.problem(error.into())).ok()
    }

    async fn collect(&mut self, config: Config, is_offline: bool) {
        if let Err(error) = probe_ring() {
            self.warnings
                .push(format!("io_uring is not available, epoll is used: {error}"));
        }
        self.cores(&config);
        self.step(TlsContext::load(&config));
        self.addresses(&config);
        self.files(&config);
        self.step(traces::start(config.tracing.as_ref(), 0).await);
        self.sources(&config, is_offline).await;
        if !is_offline {
            self.names(&config).await;
        }
    }

    fn cores(&mut self, config: &Config) {
        let (cpus, topology) = (sys::ProcessCpus::read(), sys::Topology::read());
        // A process that is running may have claimed the CPUs.
        let plan = sys::plan_cores(&config.cores, &cpus, &topology, |_| true);
        if let Some(plan) = self.step(plan) {
            self.warnings.extend(start_warnings(config, &plan));
        }
    }

    fn addresses(&mut self, config: &Config) {
        let listeners = config.listeners.iter().map(|one| one.address);
        // At its default address, the admin server moves to a free port.
        let admin = config.admin.filter(|one| !one.may_move);
        let admin = admin.map(|one| ListenAddress::Address(one.address));
        let metrics = config.metrics.as_ref();
        let metrics = metrics.map(|one| ListenAddress::Address(one.address));
        for at in listeners.chain(admin).chain(metrics) {
            match sys::check_address(at) {
                Ok(()) => {}
                Err(BindError::Busy(at)) => self.warnings.push(format!(
                    "port {} is in use at present ({at}); a start fails unless that is the process \
                     to be replaced",
                    at.port()
                )),
                Err(error) => self.problem(error.into()),
            }
        }
    }

    fn files(&mut self, config: &Config) {
        let metrics = config.metrics.as_ref();
        if let Some(folder) = metrics.and_then(|one| one.cert_dir.as_ref()) {
            let loaded = certificate::load(folder)
                .map_err(|error| Exit::config(format!("ringside: --metrics-cert-dir: {error}")));
            self.step(loaded);
        }
        let access_log = match &config.log.access {
            AccessLog::File(path) => Some(("--access-log", path.as_path())),
            AccessLog::Off | AccessLog::Stdout | AccessLog::Stderr => None,
        };
        let log = config.log.file.as_ref();
        let log = log.map(|file| ("the log file", file.path.as_path()));
        for (name, path) in access_log.into_iter().chain(log) {
            if let Err(errno) = can_append(path) {
                let path = path.display();
                self.problem(Exit::config(format!(
                    "ringside: {name}: {path} cannot be written: {errno}"
                )));
            }
        }
    }

    /// Reads the sources of the allowlist and of other lists.
    async fn sources(&mut self, config: &Config, is_offline: bool) {
        let allowlist = config.allowlist.as_ref().map(|_| Arc::default());
        let mut config = config.clone();
        // The names of decoders are looked up separately.
        for pool in &mut config.pools {
            pool.endpoints.clear();
        }
        if is_offline {
            config.pd.mori.write_mode = false;
            if let Some(allowlist) = &mut config.allowlist {
                allowlist.pool = None;
            }
        }
        let mut publisher = Publisher::new(fleet(&config).await, allowlist.clone());
        let dns = Arc::default();
        let read = Sources::read(&config, allowlist.as_ref(), &dns, &mut publisher).await;
        if let Some(sources) = self.step(read) {
            let changes = publisher.start();
            let followed = sources.follow(allowlist.as_ref(), &changes).await;
            self.step(followed);
        }
    }

    async fn names(&mut self, config: &Config) {
        let targets: Vec<_> = config
            .pools
            .iter()
            .flat_map(|pool| &pool.endpoints)
            .collect();
        for (target, addresses) in targets.iter().zip(resolve_all(&targets).await) {
            if addresses.is_empty() {
                self.warnings
                    .push(format!("the name of decoder {target} does not resolve"));
            }
        }
    }
}

/// Checks that a file can be appended to, or created. Does not open it: it may be a named pipe.
fn can_append(path: &Path) -> Result<(), Errno> {
    match access(path, Access::WRITE_OK) {
        Err(Errno::NOENT) => {
            let folder = match path.parent() {
                Some(folder) if !folder.as_os_str().is_empty() => folder,
                Some(_) | None => Path::new("."),
            };
            access(folder, Access::WRITE_OK | Access::EXEC_OK)
        }
        Ok(()) if path.is_dir() => Err(Errno::ISDIR),
        result => result,
    }
}
