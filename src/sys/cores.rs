//! CPUs: which ones this process may use, how much of them, and which shard runs where.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::near::{self, NearError};
use super::topology::Topology;
use crate::config::units::show_cpus;
use crate::config::{Cores, Place};

/// Which shard runs where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorePlan {
    /// One entry per shard.
    pub seats: Vec<Seat>,
    /// What an operator should know about the plan, a sentence each.
    pub warnings: Vec<String>,
}

/// Where one shard runs, and why there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seat {
    /// The CPU it is pinned to, or `None` to leave it to the scheduler.
    pub cpu: Option<usize>,
    /// The CPU's NUMA node, where the kernel tells.
    pub node: Option<usize>,
    /// The devices it was put beside, in words; empty where none was asked for.
    pub beside: String,
}

impl fmt::Display for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(cpu) = self.cpu else {
            return f.write_str("unpinned");
        };
        match (self.node, &*self.beside) {
            (None, "") => write!(f, "CPU {cpu}"),
            (Some(node), "") => write!(f, "CPU {cpu} (node {node})"),
            (None, beside) => write!(f, "CPU {cpu} (beside {beside})"),
            (Some(node), beside) => write!(f, "CPU {cpu} (node {node}, beside {beside})"),
        }
    }
}

/// Why no plan could be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CoreError {
    /// CPUs that were named and are not allowed, and those that are.
    NotAllowed {
        /// Named, but not allowed.
        named: Vec<usize>,
        /// All that are allowed.
        allowed: Vec<usize>,
    },
    /// A place that this machine does not have.
    Near {
        /// As it was written.
        place: Place,
        /// What is wrong with it.
        error: NearError,
    },
    /// A place with none of the CPUs that are allowed.
    Outside {
        /// As it was written.
        place: Place,
        /// The place's CPUs and whose they are, in words.
        cpus: String,
        /// All CPUs that are allowed.
        allowed: Vec<usize>,
    },
    /// More shards than CPUs.
    TooFew {
        /// As it was written.
        place: Place,
        /// Shards asked for.
        shards: usize,
        /// The place's CPUs that are allowed.
        cpus: Vec<usize>,
    },
}

impl fmt::Display for CoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAllowed { named, allowed } => write!(
                f,
                "CPU {} is not among those this process may use ({}); cores are CPU names, not a \
                 count",
                show_cpus(named),
                show_cpus(allowed)
            ),
            Self::Near { place, error } => write!(f, "{place}: {error}"),
            Self::Outside {
                place,
                cpus,
                allowed,
            } => write!(
                f,
                "{place}: {cpus} are not among those this process may use ({}); allow some of \
                 them (taskset, AllowedCPUs=, the container's cpuset), or give another place",
                show_cpus(allowed)
            ),
            Self::TooFew {
                place,
                shards,
                cpus,
            } => write!(
                f,
                "{place}: {shards} shards need as many CPUs, and this process may use {} there ({})",
                cpus.len(),
                show_cpus(cpus)
            ),
        }
    }
}

impl std::error::Error for CoreError {}

/// Decides which shard runs where. `allowed` may be empty where the kernel does not tell.
///
/// # Errors
/// A named CPU that is not allowed; a place that this machine does not have or this process may not
/// use.
pub fn plan_cores(
    cores: &Cores,
    allowed: &[usize],
    quota: Option<f64>,
    topology: &Topology,
) -> Result<CorePlan, CoreError> {
    let mut plan = match cores {
        Cores::Auto => return Ok(plan_auto(allowed, quota, topology)),
        Cores::List(cpus) => plan_list(cpus, allowed, topology)?,
        Cores::At { place, shards } => plan_place(place, *shards, allowed, topology)?,
    };
    let count = u32::try_from(plan.seats.len()).unwrap_or(u32::MAX);
    if let Some(quota) = quota.filter(|quota| *quota < f64::from(count)) {
        plan.warnings.push(format!(
            "{count} shards share a CPU quota of {quota:.2}: the kernel will stop all of them for \
             the rest of each period"
        ));
    }
    plan.warnings.extend(far_memory(&plan.seats, topology));
    Ok(plan)
}

/// One shard. A pinned thread under a quota below one CPU would wait for its own CPU while others
/// are idle, so it stays unpinned then. Otherwise beside the GPUs this process can open, if there
/// are any; a proxy in a container of its own cannot tell which GPUs are its engine's. Else the
/// last CPU: device interrupts gather on the first ones.
fn plan_auto(allowed: &[usize], quota: Option<f64>, topology: &Topology) -> CorePlan {
    let throttled = quota.is_some_and(|quota| quota < 1.0);
    let numbers: Vec<_> = (0..topology.gpus.len()).collect();
    let mut spots = near::gpu_spots(&numbers, topology).unwrap_or_default();
    spots.retain(|spot| spot.known && topology.gpus_open);
    let beside = near::choose(&spots, 1, allowed, topology);
    let seat = match (beside.first(), allowed.last()) {
        _ if throttled => Seat::default(),
        (Some((spot, cpu)), _) => seat(*cpu, &spots[*spot].beside, topology),
        (None, Some(cpu)) => seat(*cpu, "", topology),
        (None, None) => Seat::default(),
    };
    let seats = vec![seat];
    let warnings = far_memory(&seats, topology).into_iter().collect();
    CorePlan { seats, warnings }
}

/// One shard per CPU, in the order given.
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

/// `shards` shards on the best CPUs of a place, spread over its nodes.
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
            show_cpus(allowed)
        ));
    }
    for spot in usable.iter().filter(|spot| !spot.known) {
        warnings.push(format!(
            "--cores {place}: the firmware does not say which NUMA node {} is on; CPU {} are near it \
             as far as the kernel knows; name the node with --cores numa:N if you know it",
            spot.beside,
            show_cpus(&spot.cpus)
        ));
    }
    let seats = chosen.iter();
    let seats = seats.map(|(spot, cpu)| seat(*cpu, &usable[*spot].beside, topology));
    Ok(CorePlan {
        seats: seats.collect(),
        warnings,
    })
}

fn seat(cpu: usize, beside: &str, topology: &Topology) -> Seat {
    Seat {
        cpu: Some(cpu),
        node: topology.node_of(cpu),
        beside: beside.to_owned(),
    }
}

/// A shard's memory comes from its own node without being asked for: it allocates after it was
/// pinned, and the kernel takes pages from the node of the CPU that first writes them. A policy of
/// the operator's (numactl, NUMAPolicy=) is obeyed, so none is set here. Only a cpuset that takes
/// the node's memory away is worth a word.
fn far_memory(seats: &[Seat], topology: &Topology) -> Option<String> {
    let allowed = &topology.memory_nodes;
    let mut far: Vec<_> = seats.iter().filter_map(|seat| seat.node).collect();
    far.sort_unstable();
    far.dedup();
    far.retain(|node| !allowed.is_empty() && !allowed.contains(node));
    (!far.is_empty()).then(|| {
        format!(
            "shards run on node {}, and this process may have memory from node {} only \
             (cpuset.mems): every access crosses over",
            show_cpus(&far),
            show_cpus(allowed)
        )
    })
}

/// CPUs the calling thread may run on, ascending; empty where the kernel does not tell.
#[must_use]
pub fn allowed_cpus() -> Vec<usize> {
    let ids = core_affinity::get_core_ids().unwrap_or_default();
    ids.into_iter().map(|core| core.id).collect()
}

/// Pins the calling thread.
///
/// # Errors
/// `InvalidInput` for a CPU this thread may not run on.
pub fn pin(cpu: usize) -> io::Result<()> {
    // The library indexes a fixed set with the number.
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

/// How many CPUs' worth of time this process may use; `None` is unlimited.
#[must_use]
pub fn cpu_quota() -> Option<f64> {
    cpu_quota_in(Path::new("/"))
}

/// As `cpu_quota`, with the file system's root as a parameter for tests.
///
/// A quota of any parent applies too, so the smallest one counts. In a container without its own
/// cgroup namespace the path of `/proc/self/cgroup` does not exist below the mount; the mount's own
/// files are this process's then.
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
            // Mounted under the joined name, with a link for each.
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

/// Smallest quota from `mount` down to `mount/path`.
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

/// `cpu.max`: quota (or `max`) and period.
fn quota_v2(directory: &Path) -> Option<f64> {
    let text = fs::read_to_string(directory.join("cpu.max")).ok()?;
    let (quota, period) = text.trim().split_once(' ')?;
    share(quota, period)
}

/// `cpu.cfs_quota_us` (-1 is unlimited) and `cpu.cfs_period_us`.
fn quota_v1(directory: &Path) -> Option<f64> {
    let quota = fs::read_to_string(directory.join("cpu.cfs_quota_us")).ok()?;
    let period = fs::read_to_string(directory.join("cpu.cfs_period_us")).ok()?;
    share(quota.trim(), period.trim())
}

/// `max` and `-1` are not numbers here, so both mean no quota.
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
            let plan = plan_cores(&cores, &allowed, quota, &unknown);
            let got = plan.ok().map(|plan| {
                let cpus = plan.seats.iter().map(|seat| seat.cpu);
                cpus.collect::<Vec<_>>()
            });
            assert_eq!(got, want, "{name}");
        }
        let error = plan_cores(&list(&[0, 8, 9]), &[0, 1], None, &unknown).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("CPU 8-9 is not among those this process may use (0-1)")
        );
        let plan = plan_cores(&list(&[0, 1]), &[0, 1], Some(1.5), &unknown).unwrap();
        assert!(plan.warnings[0].contains("quota of 1.50"));
    }

    /// Name, files, quota.
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
    fn this_thread_can_be_pinned_where_it_may_run() {
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
