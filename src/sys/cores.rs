//! CPUs: the ones that this process may use, its CPU quota, and the placement of shards.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};

use super::near::{self, NearError};
use super::topology::Topology;
use crate::config::units::format_cpus;
use crate::config::{Cores, Place};

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
    /// The CPU that the shard is pinned to, or `None` if the scheduler chooses.
    pub cpu: Option<usize>,
    /// The NUMA node of the CPU, if the kernel reports it.
    pub node: Option<usize>,
    /// Description of the devices that the CPU was chosen to be near to; empty if there are none.
    pub near: String,
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(cpu) = self.cpu else {
            return f.write_str("unpinned");
        };
        match (self.node, &*self.near) {
            (None, "") => write!(f, "CPU {cpu}"),
            (Some(node), "") => write!(f, "CPU {cpu} (node {node})"),
            (None, near) => write!(f, "CPU {cpu} (near {near})"),
            (Some(node), near) => write!(f, "CPU {cpu} (node {node}, near {near})"),
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

/// Places the shards as `cores` (the option `--cores`) requests. `allowed` lists the CPUs that this
/// process may use; it is empty if the kernel does not report them. `quota` is the CPU quota of
/// this process (see [`cpu_quota`]). `claim` claims a CPU for this process, and returns `false` if
/// another process has claimed it (see [`claim_cpu`]).
///
/// # Errors
/// Fails if a listed CPU is not allowed, or if the device or node given does not exist on this
/// machine, has no allowed CPU, or has fewer allowed CPUs than shards.
pub fn plan_cores(
    cores: &Cores,
    allowed: &[usize],
    quota: Option<f64>,
    topology: &Topology,
    claim: impl FnMut(usize) -> bool,
) -> Result<CorePlan, CoreError> {
    let mut plan = match cores {
        Cores::Auto => return Ok(plan_auto(allowed, quota, topology, claim)),
        Cores::Any { shards } => CorePlan {
            seats: vec![Seat::default(); *shards],
            warnings: Vec::new(),
        },
        Cores::List(cpus) => plan_list(cpus, allowed, topology)?,
        Cores::At { place, shards } => plan_place(place, *shards, allowed, topology)?,
    };
    let count = u32::try_from(plan.seats.len()).unwrap_or(u32::MAX);
    if let Some(quota) = quota.filter(|quota| *quota < f64::from(count)) {
        plan.warnings.push(format!(
            "{count} shards share a CPU quota of {quota:.2}: whenever it is used up, the kernel \
             stops all of them for the rest of the period"
        ));
    }
    plan.warnings
        .extend(remote_memory_warning(&plan.seats, topology));
    Ok(plan)
}

/// Places the only shard of `--cores auto`.
///
/// With a quota below one CPU the shard is not pinned: a pinned thread would wait for its CPU while
/// other CPUs are idle. Otherwise it is placed near the GPUs that this process can open. If there
/// are none, it gets the last CPU, because device interrupts gather on the first ones. GPUs that
/// cannot be opened are ignored, because a proxy in a separate container cannot determine which
/// GPUs its engine uses.
///
/// Other instances of this program on the host choose in the same way, so a CPU that one of them
/// has claimed is left out. If all are claimed, the shard is not pinned.
fn plan_auto(
    allowed: &[usize],
    quota: Option<f64>,
    topology: &Topology,
    mut claim: impl FnMut(usize) -> bool,
) -> CorePlan {
    let throttled = quota.is_some_and(|quota| quota < 1.0);
    let numbers: Vec<_> = (0..topology.gpus.len()).collect();
    let mut spots = near::gpu_spots(&numbers, topology).unwrap_or_default();
    spots.retain(|spot| spot.known && topology.gpus_open);
    let mut free = if throttled {
        Vec::new()
    } else {
        allowed.to_vec()
    };
    let seat = loop {
        let chosen = near::choose(&spots, 1, &free, topology);
        let (cpu, near) = match (chosen.first(), free.last()) {
            (Some((spot, cpu)), _) => (*cpu, &*spots[*spot].near),
            (None, Some(cpu)) => (*cpu, ""),
            (None, None) => break Seat::default(),
        };
        if claim(cpu) {
            break seat(cpu, near, topology);
        }
        free.retain(|other| *other != cpu);
    };
    let mut warnings = Vec::new();
    if seat.cpu.is_none() && !throttled && !allowed.is_empty() {
        warnings.push(
            "every CPU that this process may use is taken by another ringside; running unpinned \
             (--cores chooses CPUs)"
                .to_owned(),
        );
    }
    let seats = vec![seat];
    warnings.extend(remote_memory_warning(&seats, topology));
    CorePlan { seats, warnings }
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
    let seats = cpus.iter().map(|cpu| seat(*cpu, "", topology));
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
    let seats = seats.map(|(spot, cpu)| seat(*cpu, &usable[*spot].near, topology));
    Ok(CorePlan {
        seats: seats.collect(),
        warnings,
    })
}

fn seat(cpu: usize, near: &str, topology: &Topology) -> Seat {
    Seat {
        cpu: Some(cpu),
        node: topology.node_of(cpu),
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

/// Pins the calling thread to a CPU.
///
/// # Errors
/// `InvalidInput` if this thread may not run on the CPU.
pub fn pin(cpu: usize) -> io::Result<()> {
    // `core_affinity` indexes a set of fixed size with the CPU number, so a larger one would panic.
    let in_set = cpu < crate::config::units::CPU_MAX;
    if in_set && core_affinity::set_for_current(core_affinity::CoreId { id: cpu }) {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the kernel refused this CPU",
        ))
    }
}

/// Returns the CPU quota (cgroup) of this process in CPUs: 0.5 is half a CPU. `None` if no quota is
/// set or none can be read.
#[must_use]
pub fn cpu_quota() -> Option<f64> {
    cpu_quota_in(Path::new("/"))
}

/// Like [`cpu_quota`], with the root of the file system as a parameter for tests.
///
/// Quotas of parent groups apply too, so the smallest one is returned. In a container without a
/// separate cgroup namespace, the path in `/proc/self/cgroup` does not exist below the mount. In
/// that case, the files at the root of the mount are those of this process.
#[must_use]
pub fn cpu_quota_in(root: &Path) -> Option<f64> {
    let membership = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mount = root.join("sys/fs/cgroup");
    let mut smallest: Option<f64> = None;
    for line in membership.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next())
        else {
            continue;
        };
        let quota = if controllers.is_empty() {
            smallest_of(&mount, path, quota_v2)
        } else if controllers.split(',').any(|controller| controller == "cpu") {
            // Mounted under the joined name, with a link for each controller.
            [controllers, "cpu"]
                .iter()
                .find_map(|name| smallest_of(&mount.join(name), path, quota_v1))
        } else {
            None
        };
        smallest = match (smallest, quota) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
    }
    smallest
}

/// Returns the smallest quota in CPUs that `read` finds in the cgroup directories from `mount` down
/// to `mount/path`, or `None` if it finds none.
fn smallest_of(mount: &Path, path: &str, read: impl Fn(&Path) -> Option<f64>) -> Option<f64> {
    let mut directory: PathBuf = mount.to_owned();
    let mut quotas = vec![read(&directory)];
    for name in path
        .split('/')
        .filter(|name| !name.is_empty() && *name != "..")
    {
        directory.push(name);
        quotas.push(read(&directory));
    }
    quotas.into_iter().flatten().reduce(f64::min)
}

/// Reads the quota in CPUs from `cpu.max` of a version 2 cgroup, which contains the CPU time per
/// period (or `max`) and the length of the period.
fn quota_v2(directory: &Path) -> Option<f64> {
    let text = fs::read_to_string(directory.join("cpu.max")).ok()?;
    let (quota, period) = text.trim().split_once(' ')?;
    share(quota, period)
}

/// Reads the quota in CPUs from `cpu.cfs_quota_us` (-1 is unlimited) and `cpu.cfs_period_us` of a
/// version 1 cgroup.
fn quota_v1(directory: &Path) -> Option<f64> {
    let quota = fs::read_to_string(directory.join("cpu.cfs_quota_us")).ok()?;
    let period = fs::read_to_string(directory.join("cpu.cfs_period_us")).ok()?;
    share(quota.trim(), period.trim())
}

/// Returns `quota` divided by `period`, which is the quota in CPUs. `max` and `-1` do not parse as
/// `u32`, so both result in `None`: no quota.
fn share(quota: &str, period: &str) -> Option<f64> {
    let quota: u32 = quota.parse().ok()?;
    let period: u32 = period.parse().ok().filter(|period| *period > 0)?;
    Some(f64::from(quota) / f64::from(period))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::topology::tests::Tree;

    #[test]
    fn plans() {
        let unknown = Topology::default();
        let list = |cpus: &[usize]| Cores::List(cpus.to_vec());
        let pinned = |cpus: &[usize]| Some(cpus.iter().copied().map(Some).collect::<Vec<_>>());
        for (name, cores, allowed, quota, want) in [
            ("auto", Cores::Auto, vec![0, 1, 2], None, pinned(&[2])),
            (
                "auto, whole quota",
                Cores::Auto,
                vec![4, 5],
                Some(1.0),
                pinned(&[5]),
            ),
            (
                "auto, half a CPU",
                Cores::Auto,
                vec![0, 1],
                Some(0.5),
                Some(vec![None]),
            ),
            ("auto, unknown", Cores::Auto, vec![], None, Some(vec![None])),
            (
                "any",
                Cores::Any { shards: 3 },
                vec![0, 1],
                None,
                Some(vec![None; 3]),
            ),
            ("one", list(&[1]), vec![0, 1], None, pinned(&[1])),
            (
                "list in its order",
                list(&[3, 0]),
                vec![0, 1, 2, 3],
                None,
                pinned(&[3, 0]),
            ),
            ("list, unknown", list(&[3]), vec![], None, pinned(&[3])),
            ("outside", list(&[0, 8]), vec![0, 1], None, None),
        ] {
            let plan = plan_cores(&cores, &allowed, quota, &unknown, |_| true);
            let got = plan.ok().map(|plan| {
                let cpus = plan.seats.iter().map(|seat| seat.cpu);
                cpus.collect::<Vec<_>>()
            });
            assert_eq!(got, want, "{name}");
        }
        let claimed = |cpus: &'static [usize]| {
            let plan = plan_cores(&Cores::Auto, &[0, 1, 2], None, &unknown, |cpu| {
                !cpus.contains(&cpu)
            });
            plan.unwrap()
        };
        assert_eq!(claimed(&[2]).seats[0].cpu, Some(1));
        assert_eq!(claimed(&[1, 2]).seats[0].cpu, Some(0));
        let none = claimed(&[0, 1, 2]);
        assert_eq!((none.seats[0].cpu, none.warnings.len()), (None, 1));
        let error = plan_cores(&list(&[0, 8, 9]), &[0, 1], None, &unknown, |_| true).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("CPU 8-9 is not among those this process may use (0-1)")
        );
        let plan = plan_cores(&list(&[0, 1]), &[0, 1], Some(1.5), &unknown, |_| true).unwrap();
        assert!(plan.warnings[0].contains("quota of 1.50"));
    }

    /// A test case: its name, the files as path and content, and the expected quota in CPUs.
    type Recorded<'a> = (&'a str, &'a [(&'a str, &'a str)], Option<f64>);

    #[test]
    fn quotas_of_recorded_v2_trees() {
        const POD: &str = "sys/fs/cgroup/kubepods.slice/pod.slice/cpu.max";
        const V2: &str = "0::/kubepods.slice/pod.slice/engine.scope\n";
        let table: &[Recorded<'_>] = &[
            ("nothing", &[], None),
            (
                "v2-namespace",
                &[
                    ("proc/self/cgroup", "0::/\n"),
                    ("sys/fs/cgroup/cpu.max", "50000 100000\n"),
                ],
                Some(0.5),
            ),
            (
                "v2-unlimited",
                &[
                    ("proc/self/cgroup", "0::/\n"),
                    ("sys/fs/cgroup/cpu.max", "max 100000\n"),
                ],
                None,
            ),
            (
                "v2-parent",
                &[
                    ("proc/self/cgroup", V2),
                    (POD, "200000 100000\n"),
                    (
                        "sys/fs/cgroup/kubepods.slice/pod.slice/engine.scope/cpu.max",
                        "max 100000\n",
                    ),
                ],
                Some(2.0),
            ),
            (
                "v2-hidden-path",
                &[
                    ("proc/self/cgroup", V2),
                    ("sys/fs/cgroup/cpu.max", "25000 100000\n"),
                ],
                Some(0.25),
            ),
        ];
        for (name, files, want) in table {
            let tree = Tree::new(files.iter().copied());
            assert_eq!(cpu_quota_in(&tree.0), *want, "{name}");
        }
    }

    #[test]
    fn quotas_of_recorded_v1_trees() {
        let table: &[Recorded<'_>] = &[
            (
                "v1",
                &[
                    ("proc/self/cgroup", "7:memory:/a\n4:cpu,cpuacct:/docker/b\n"),
                    (
                        "sys/fs/cgroup/cpu,cpuacct/docker/b/cpu.cfs_quota_us",
                        "150000\n",
                    ),
                    (
                        "sys/fs/cgroup/cpu,cpuacct/docker/b/cpu.cfs_period_us",
                        "100000\n",
                    ),
                ],
                Some(1.5),
            ),
            (
                "v1-unlimited",
                &[
                    ("proc/self/cgroup", "4:cpu,cpuacct:/\n"),
                    ("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n"),
                    ("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n"),
                ],
                None,
            ),
            (
                "broken",
                &[
                    ("proc/self/cgroup", "0::/\nx\n"),
                    ("sys/fs/cgroup/cpu.max", "1 0\n"),
                ],
                None,
            ),
        ];
        for (name, files, want) in table {
            let tree = Tree::new(files.iter().copied());
            assert_eq!(cpu_quota_in(&tree.0), *want, "{name}");
        }
    }

    #[test]
    fn this_thread_can_be_pinned_to_an_allowed_cpu() {
        let allowed = allowed_cpus();
        assert!(!allowed.is_empty());
        std::thread::spawn(move || {
            pin(allowed[0]).unwrap();
            assert_eq!(allowed_cpus(), [allowed[0]]);
        })
        .join()
        .unwrap();
        assert!(pin(usize::MAX).is_err());
    }
}
