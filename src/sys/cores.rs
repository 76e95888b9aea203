//! CPUs: the ones that this process may use, and the placement of shards.

use std::fmt;
use std::io;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use rustix::thread::{CpuSet, sched_setaffinity};

use super::cgroup;
use super::near::{self, NearError};
use super::topology::Topology;
use crate::config::units::format_cpus;
use crate::config::{Cores, Place};

/// The CPUs that this process may use.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProcessCpus {
    /// Their numbers, ascending; empty if the kernel does not report them.
    pub allowed: Vec<usize>,
    /// The quota (cgroup) in CPUs: 0.5 is half a CPU. `None` if none is set or none can be read.
    pub quota: Option<f64>,
    /// Whether a set of CPUs is assigned to a control group that contains nothing but this process.
    pub own_set: bool,
}

impl ProcessCpus {
    /// Reads them from the kernel, for the calling thread.
    #[must_use]
    pub fn read() -> Self {
        let quota = cgroup::cpu_quota();
        // A node that has exclusive CPUs gives a set of those that are left to every other
        // container. Only a quota that equals the number of CPUs distinguishes an exclusive set.
        let is_pod = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
        Self {
            allowed: allowed_cpus(),
            quota,
            own_set: cgroup::has_own_cpuset() && (quota.is_some() || !is_pod),
        }
    }

    /// Returns the CPUs on which no other program is expected, ascending.
    ///
    /// The scheduler puts nothing on isolated CPUs (`isolcpus`) without a request. A set of CPUs is
    /// not for this process alone if it has all CPUs of the machine, or more than the quota.
    fn exclusive(&self, topology: &Topology) -> Vec<usize> {
        let count = u32::try_from(self.allowed.len()).unwrap_or(u32::MAX);
        let has_quota_for = |count: u32| self.quota.is_none_or(|quota| quota >= f64::from(count));
        let is_all = !topology.online.is_empty() && self.allowed.len() >= topology.online.len();
        let own = self.own_set && has_quota_for(count) && !is_all;
        let is_exclusive = |cpu: &usize| own || topology.isolated.contains(cpu) && has_quota_for(1);
        let cpus = self.allowed.iter().copied();
        cpus.filter(is_exclusive).collect()
    }
}

/// The placement of all shards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorePlan {
    /// The placement of each shard, by shard number.
    pub seats: Vec<Seat>,
    /// Warnings for the operator about the placement, one sentence each.
    pub warnings: Vec<String>,
}

/// The placement of one shard, and the reason for it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    /// The CPUs among which the scheduler chooses, ascending. One means that the shard is pinned to
    /// it; none, that it may use all CPUs of the process.
    pub cpus: Vec<usize>,
    /// The NUMA node of the CPUs, if the kernel reports it.
    pub node: Option<usize>,
    /// Description of the devices that the CPUs were chosen to be near to; empty if there are none.
    pub near: String,
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.cpus.is_empty() {
            return f.write_str("unpinned");
        }
        let cpus = format_cpus(&self.cpus);
        match (self.node, &*self.near) {
            (None, "") => write!(f, "CPU {cpus}"),
            (Some(node), "") => write!(f, "CPU {cpus} (node {node})"),
            (None, near) => write!(f, "CPU {cpus} (near {near})"),
            (Some(node), near) => write!(f, "CPU {cpus} (node {node}, near {near})"),
        }
    }
}

/// Reason why the shards cannot be placed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CoreError {
    /// Some of the CPUs listed with `--cores` are not among those that this process may use.
    NotAllowed {
        /// The listed CPUs that this process may not use.
        named: Vec<usize>,
        /// All CPUs that this process may use.
        allowed: Vec<usize>,
    },
    /// The device or node given with `--cores` is not on this machine, or its CPUs cannot be
    /// determined.
    Near {
        /// The device or node given with `--cores`.
        place: Place,
        /// Reason why no CPUs were found for `place`.
        error: NearError,
    },
    /// Of the CPUs near the device, or on the node, given with `--cores`, this process may use
    /// none.
    Outside {
        /// The device or node given with `--cores`.
        place: Place,
        /// Description of the CPUs of `place` and of the devices near them.
        cpus: String,
        /// All CPUs that this process may use.
        allowed: Vec<usize>,
    },
    /// Of the CPUs near the device, or on the node, given with `--cores`, this process may use
    /// fewer than the number of shards requested.
    TooFew {
        /// The device or node given with `--cores`.
        place: Place,
        /// Number of shards requested.
        shards: usize,
        /// The CPUs of `place` that this process may use.
        cpus: Vec<usize>,
    },
}

impl fmt::Display for CoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAllowed { named, allowed } => write!(
                f,
                "CPU {} is not among those this process may use ({}); the value lists CPU numbers, \
                 it is not a count",
                format_cpus(named),
                format_cpus(allowed)
            ),
            Self::Near { place, error } => write!(f, "{place}: {error}"),
            Self::Outside {
                place,
                cpus,
                allowed,
            } => write!(
                f,
                "{place}: {cpus} are not among those this process may use ({}); allow some of \
                 them (taskset, AllowedCPUs=, the container's cpuset), or specify other CPUs",
                format_cpus(allowed)
            ),
            Self::TooFew {
                place,
                shards,
                cpus,
            } => write!(
                f,
                "{place}: {shards} shards need one CPU each, but this process may use only {} there ({})",
                cpus.len(),
                format_cpus(cpus)
            ),
        }
    }
}

impl std::error::Error for CoreError {}

/// Places the shards as `cores` (the option `--cores`) requests. `usable` lists the CPUs that this
/// process may use. `claim` claims a CPU for this process, and returns `false` if another process
/// has claimed it (see [`claim_cpu`]).
///
/// # Errors
/// Fails if a listed CPU is not allowed, or if the device or node given does not exist on this
/// machine, has no allowed CPU, or has fewer allowed CPUs than shards.
pub fn plan_cores(
    cores: &Cores,
    usable: &ProcessCpus,
    topology: &Topology,
    claim: impl FnMut(usize) -> bool,
) -> Result<CorePlan, CoreError> {
    let allowed = &usable.allowed;
    let mut plan = match cores {
        Cores::Auto => return Ok(plan_auto(usable, topology, claim)),
        Cores::Any { shards } => CorePlan {
            seats: vec![Seat::default(); *shards],
            warnings: Vec::new(),
        },
        Cores::List(cpus) => plan_list(cpus, allowed, topology)?,
        Cores::At { place, shards } => plan_place(place, *shards, allowed, topology)?,
    };
    let count = u32::try_from(plan.seats.len()).unwrap_or(u32::MAX);
    if let Some(quota) = usable.quota.filter(|quota| *quota < f64::from(count)) {
        plan.warnings.push(format!(
            "{count} shards share a CPU quota of {quota:.2}: whenever it is used up, the kernel \
             stops all of them for the rest of the period"
        ));
    }
    plan.warnings
        .extend(remote_memory_warning(&plan.seats, topology));
    Ok(plan)
}

/// Places the only shard of `--cores auto` near the GPUs that this process can open. GPUs that
/// cannot be opened are ignored, because a proxy in a separate container cannot determine which
/// GPUs its engine uses.
///
/// The shard is pinned only to a CPU on which no other program is expected: the best one near the
/// GPUs, or, if there are none, the last one, because device interrupts gather on the first ones.
/// Other instances of this program choose in the same way, so a CPU that one of them has claimed is
/// left out.
///
/// Otherwise the shard may use all CPUs of the GPUs' node. A thread of another program, for example
/// of the engine, can occupy any of them. The scheduler then moves the shard to another, while a
/// pinned shard would wait.
fn plan_auto(
    usable: &ProcessCpus,
    topology: &Topology,
    mut claim: impl FnMut(usize) -> bool,
) -> CorePlan {
    let numbers: Vec<_> = (0..topology.gpus.len()).collect();
    let mut spots = near::gpu_spots(&numbers, topology).unwrap_or_default();
    spots.retain(|spot| spot.known && topology.gpus_open);
    let mut free = usable.exclusive(topology);
    let mut warnings = Vec::new();
    let seat = loop {
        let chosen = near::choose(&spots, 1, &free, topology);
        let (cpu, near) = match (chosen.first(), free.last()) {
            (Some((spot, cpu)), _) => (*cpu, &*spots[*spot].near),
            (None, Some(cpu)) => (*cpu, ""),
            (None, None) => break shared_seat(&spots, usable, topology),
        };
        if claim(cpu) {
            break seat(&[cpu], near, topology);
        }
        free.retain(|other| *other != cpu);
        if free.is_empty() {
            warnings.push(
                "another ringside is pinned to each CPU that is reserved for this process; \
                 running without a CPU to itself (--cores chooses CPUs)"
                    .to_owned(),
            );
        }
    };
    let seats = vec![seat];
    warnings.extend(remote_memory_warning(&seats, topology));
    CorePlan { seats, warnings }
}

/// Returns the placement of a shard that shares its CPUs with other programs: those of the first
/// spot of which this process may use several, without isolated ones, among which the scheduler
/// moves no thread. With one CPU, the shard would wait while others are idle.
fn shared_seat(spots: &[near::Spot], usable: &ProcessCpus, topology: &Topology) -> Seat {
    let is_usable = |cpu: &&usize| usable.allowed.contains(cpu) && !topology.isolated.contains(cpu);
    let seats = spots.iter().map(|spot| {
        let cpus: Vec<_> = spot.cpus.iter().filter(is_usable).copied().collect();
        seat(&cpus, &spot.near, topology)
    });
    let mut seats = seats.filter(|seat| seat.cpus.len() > 1);
    seats.next().unwrap_or_default()
}

/// Claims a CPU of this host for the process, until it ends. Returns `false` if another process has
/// claimed it.
///
/// A claim is an abstract Unix socket, which the kernel releases with the process. Its name is
/// visible in the network namespace only; containers with their own are expected to have their own
/// CPUs too. If no socket can be created, the CPU counts as claimed by this process.
#[must_use]
pub fn claim_cpu(cpu: usize) -> bool {
    let name = format!("ringside/cpu/{cpu}");
    let Ok(address) = SocketAddrUnix::new_abstract_name(name.as_bytes()) else {
        return true;
    };
    let (family, kind) = (AddressFamily::UNIX, SocketType::DGRAM);
    let Ok(socket) = socket_with(family, kind, SocketFlags::CLOEXEC, None) else {
        return true;
    };
    match bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => false,
        Ok(()) | Err(_) => {
            // The claim lasts until the process ends.
            std::mem::forget(socket);
            true
        }
    }
}

/// Places one shard on each listed CPU, in the order given.
fn plan_list(
    cpus: &[usize],
    allowed: &[usize],
    topology: &Topology,
) -> Result<CorePlan, CoreError> {
    let foreign: Vec<_> = cpus
        .iter()
        .copied()
        .filter(|cpu| !allowed.is_empty() && !allowed.contains(cpu))
        .collect();
    if !foreign.is_empty() {
        return Err(CoreError::NotAllowed {
            named: foreign,
            allowed: allowed.to_vec(),
        });
    }
    let seats = cpus.iter().map(|cpu| seat(&[*cpu], "", topology));
    Ok(CorePlan {
        seats: seats.collect(),
        warnings: Vec::new(),
    })
}

/// Places `shards` shards on the best CPUs near the devices, or on the nodes, that `place` names,
/// spread over their NUMA nodes.
fn plan_place(
    place: &Place,
    shards: usize,
    allowed: &[usize],
    topology: &Topology,
) -> Result<CorePlan, CoreError> {
    let allowed = if allowed.is_empty() {
        &topology.online
    } else {
        allowed
    };
    let spots = near::spots(place, topology).map_err(|error| CoreError::Near {
        place: place.clone(),
        error,
    })?;
    let (usable, outside): (Vec<_>, Vec<_>) = spots
        .into_iter()
        .partition(|spot| spot.cpus.iter().any(|cpu| allowed.contains(cpu)));
    let outside: Vec<_> = outside.iter().map(ToString::to_string).collect();
    let chosen = near::choose(&usable, shards, allowed, topology);
    if chosen.is_empty() {
        return Err(CoreError::Outside {
            place: place.clone(),
            cpus: outside.join(" and "),
            allowed: allowed.to_vec(),
        });
    }
    if chosen.len() < shards {
        let mut cpus: Vec<_> = chosen.iter().map(|(_, cpu)| *cpu).collect();
        cpus.sort_unstable();
        return Err(CoreError::TooFew {
            place: place.clone(),
            shards,
            cpus,
        });
    }
    let mut warnings = Vec::new();
    if !outside.is_empty() {
        warnings.push(format!(
            "--cores {place}: {} are not among those this process may use ({}); no shard runs there",
            outside.join(" and "),
            format_cpus(allowed)
        ));
    }
    for spot in usable.iter().filter(|spot| !spot.known) {
        warnings.push(format!(
            "--cores {place}: the firmware does not report the NUMA node of {}; the kernel reports CPU \
             {} as local to it; if you know the node, specify it with --cores numa:N",
            spot.near,
            format_cpus(&spot.cpus)
        ));
    }
    let seats = chosen.iter();
    let seats = seats.map(|(spot, cpu)| seat(&[*cpu], &usable[*spot].near, topology));
    Ok(CorePlan {
        seats: seats.collect(),
        warnings,
    })
}

fn seat(cpus: &[usize], near: &str, topology: &Topology) -> Seat {
    Seat {
        cpus: cpus.to_vec(),
        node: cpus.first().and_then(|cpu| topology.node_of(*cpu)),
        near: near.to_owned(),
    }
}

/// Returns a warning if shards run on a node whose memory this process may not use (cpuset).
///
/// A shard normally gets memory of its node without further action: it allocates after it was
/// pinned, and the kernel takes pages from the node of the CPU that first writes them. No memory
/// policy is set here, so that one set by the operator (numactl, NUMAPolicy=) applies.
fn remote_memory_warning(seats: &[Seat], topology: &Topology) -> Option<String> {
    let allowed = &topology.memory_nodes;
    let mut far: Vec<_> = seats.iter().filter_map(|seat| seat.node).collect();
    far.sort_unstable();
    far.dedup();
    far.retain(|node| !allowed.is_empty() && !allowed.contains(node));
    (!far.is_empty()).then(|| {
        format!(
            "shards run on node {}, but this process may only allocate memory on node {} \
             (cpuset.mems): every memory access crosses nodes",
            format_cpus(&far),
            format_cpus(allowed)
        )
    })
}

/// Returns the CPUs that the calling thread may run on, ascending; empty if the kernel does not
/// report them.
#[must_use]
pub fn allowed_cpus() -> Vec<usize> {
    let ids = core_affinity::get_core_ids().unwrap_or_default();
    ids.into_iter().map(|core| core.id).collect()
}

/// Restricts the calling thread to these CPUs. With one of them it is pinned.
///
/// # Errors
/// `InvalidInput` if this thread may run on none of the CPUs.
pub fn pin(cpus: &[usize]) -> io::Result<()> {
    let mut set = CpuSet::new();
    // A number beyond the fixed size of the set would panic.
    for cpu in cpus.iter().filter(|cpu| **cpu < CpuSet::MAX_CPU) {
        set.set(*cpu);
    }
    Ok(sched_setaffinity(None, &set)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usable(allowed: &[usize], quota: Option<f64>, own_set: bool) -> ProcessCpus {
        ProcessCpus {
            allowed: allowed.to_vec(),
            quota,
            own_set,
        }
    }

    #[test]
    fn plans() {
        let unknown = Topology::default();
        let list = |cpus: &[usize]| Cores::List(cpus.to_vec());
        let pinned = |cpus: &[usize]| Some(cpus.iter().map(|cpu| vec![*cpu]).collect::<Vec<_>>());
        let unpinned = |shards| Some(vec![Vec::new(); shards]);
        let any = Cores::Any { shards: 3 };
        for (name, cores, allowed, want) in [
            ("any", any, &[0, 1][..], unpinned(3)),
            ("one", list(&[1]), &[0, 1], pinned(&[1])),
            (
                "in its order",
                list(&[3, 0]),
                &[0, 1, 2, 3],
                pinned(&[3, 0]),
            ),
            ("list, unknown", list(&[3]), &[], pinned(&[3])),
            ("outside", list(&[0, 8]), &[0, 1], None),
        ] {
            let plan = plan_cores(&cores, &usable(allowed, None, false), &unknown, |_| true);
            let got = plan.ok().map(|plan| {
                let cpus = plan.seats.into_iter().map(|seat| seat.cpus);
                cpus.collect::<Vec<_>>()
            });
            assert_eq!(got, want, "{name}");
        }
        let two = usable(&[0, 1], Some(1.5), false);
        let error = plan_cores(&list(&[0, 8, 9]), &two, &unknown, |_| true).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("CPU 8-9 is not among those this process may use (0-1)")
        );
        let plan = plan_cores(&list(&[0, 1]), &two, &unknown, |_| true).unwrap();
        assert!(plan.warnings[0].contains("quota of 1.50"));
    }

    #[test]
    fn auto_pins_only_to_cpus_without_other_programs() {
        let isolated = Topology {
            isolated: vec![2, 3],
            ..Topology::default()
        };
        for (name, allowed, quota, own_set, want) in [
            ("shared", &[0, 1][..], None, false, &[][..]),
            ("unknown", &[], None, true, &[]),
            ("own", &[0, 1], None, true, &[1]),
            (
                "own, with the quota of a pod",
                &[4, 5],
                Some(2.0),
                true,
                &[5],
            ),
            ("what pods with CPUs leave", &[4, 5], Some(1.0), true, &[]),
            ("isolated", &[0, 1, 2, 3, 4], None, false, &[3]),
            ("isolated, one CPU", &[0, 1, 2], Some(1.0), false, &[2]),
            ("isolated, half a CPU", &[2, 3], Some(0.5), false, &[]),
        ] {
            let usable = usable(allowed, quota, own_set);
            let plan = plan_cores(&Cores::Auto, &usable, &isolated, |_| true).unwrap();
            assert_eq!(plan.seats[0].cpus, want, "{name}");
            assert!(plan.warnings.is_empty(), "{name}");
        }
        let two = Topology {
            online: vec![0, 1],
            ..Topology::default()
        };
        let all = plan_cores(&Cores::Auto, &usable(&[0, 1], None, true), &two, |_| true);
        assert_eq!(all.unwrap().seats, [Seat::default()], "all CPUs");
        let claimed = |cpus: &'static [usize]| {
            let usable = usable(&[0, 1, 2], None, true);
            let claim = |cpu| !cpus.contains(&cpu);
            plan_cores(&Cores::Auto, &usable, &Topology::default(), claim).unwrap()
        };
        assert_eq!(claimed(&[2]).seats[0].cpus, [1]);
        assert_eq!(claimed(&[1, 2]).seats[0].cpus, [0]);
        let none = claimed(&[0, 1, 2]);
        assert_eq!((none.seats[0].cpus.len(), none.warnings.len()), (0, 1));
    }

    #[test]
    fn a_thread_is_restricted_to_cpus() {
        let allowed = allowed_cpus();
        assert!(!allowed.is_empty());
        std::thread::spawn(move || {
            pin(&allowed).unwrap();
            assert_eq!(allowed_cpus(), allowed);
            pin(&allowed[..1]).unwrap();
            assert_eq!(allowed_cpus(), [allowed[0]]);
        })
        .join()
        .unwrap();
        assert!(pin(&[usize::MAX]).is_err());
        assert!(pin(&[]).is_err());
    }
}
