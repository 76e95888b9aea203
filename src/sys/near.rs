//! Finds the CPUs near a GPU, near a network or RDMA device, or on a NUMA node.
//!
//! Pure functions over a `Topology`. See `choose` for the rules by which CPUs are chosen.

use std::cmp::Reverse;
use std::fmt;

use super::topology::{Locality, Topology};
use crate::config::units::format_cpus;
use crate::config::{PciAddress, Place};

/// Maximum number of device names listed in one error message. A host with many containers has
/// thousands of interfaces.
const NAMES_SHOWN_MAX: usize = 24;

/// A part of the machine that shards can run on: one NUMA node, or a set of CPUs if the node is
/// unknown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spot {
    /// Names of the devices that these CPUs are near to; empty for a node that was specified
    /// directly.
    pub(super) near: String,
    /// The CPUs of this part of the machine, ascending; never empty.
    pub(super) cpus: Vec<usize>,
    /// Whether these CPUs are certainly the near ones. `false` if the device's node is unknown and
    /// several nodes have CPUs.
    pub(super) known: bool,
}

impl fmt::Display for Spot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.near {
            "" => write!(f, "CPU {}", format_cpus(&self.cpus)),
            near => write!(f, "the CPUs near {near} ({})", format_cpus(&self.cpus)),
        }
    }
}

/// Reason why no CPUs were found for the device or node given with `--cores`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NearError {
    /// sysfs lists no CPUs that are online; it may not be mounted.
    NoSysfs,
    /// sysfs contains no PCI devices, hence no GPUs.
    NoPci,
    /// The device or node does not exist.
    Absent {
        /// The device or node as specified, for example `gpu1`.
        name: String,
        /// Existing names, which the error message lists as alternatives.
        found: Vec<String>,
    },
    /// The network interface with this name is virtual: it has no hardware that could be near a
    /// CPU.
    Virtual(String),
    /// The kernel reports no CPUs for this device or node.
    NoCpus(String),
}

impl fmt::Display for NearError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoSysfs => f.write_str(
                "/sys does not contain this machine's layout; mount sysfs, or list CPUs, for \
                 example `2-3`",
            ),
            Self::NoPci => f.write_str(
                "/sys contains no PCI devices (a sandbox or virtual machine may hide them); \
                 specify a node, for example `numa:0`, or CPUs, for example `2-3`",
            ),
            Self::Absent { name, found } if found.is_empty() => {
                write!(
                    f,
                    "there is no {name} on this machine, nor any other of its kind"
                )
            }
            Self::Absent { name, found } => {
                let shown = &found[..found.len().min(NAMES_SHOWN_MAX)];
                write!(
                    f,
                    "there is no {name} on this machine, only {}",
                    shown.join(", ")
                )?;
                match found.len() - shown.len() {
                    0 => Ok(()),
                    more => write!(f, " and {more} more"),
                }
            }
            Self::Virtual(name) => write!(
                f,
                "{name} is virtual and has no hardware (in a container, the host's interface is \
                 not visible); specify the GPU, the RDMA device, or a node, for example `numa:0`"
            ),
            Self::NoCpus(name) => write!(
                f,
                "the kernel reports no CPUs for {name}; specify another node, for example \
                 `numa:0`, or CPUs, for example `2-3`"
            ),
        }
    }
}

/// Returns the parts of the machine that `place` refers to, in the order specified; never an empty
/// list. Fails if the device or node does not exist or has no CPUs.
pub(super) fn spots(place: &Place, topology: &Topology) -> Result<Vec<Spot>, NearError> {
    if topology.online.is_empty() {
        return Err(NearError::NoSysfs);
    }
    match place {
        Place::Gpus(numbers) => gpu_spots(numbers, topology),
        Place::Pci(address) => {
            let name = address.to_string();
            let device = topology.pci.get(address).ok_or_else(|| {
                if topology.pci.is_empty() {
                    NearError::NoPci
                } else {
                    let found = named_devices(topology);
                    NearError::Absent {
                        name: name.clone(),
                        found,
                    }
                }
            })?;
            let gpu = topology.gpus.iter().position(|gpu| gpu == address);
            let name = gpu.map_or(name, |number| gpu_name(number, *address));
            Ok(vec![spot(name, device, topology)?])
        }
        Place::Device(name) => device_spots(name, topology),
        Place::Nodes(numbers) => numbers
            .iter()
            .map(|number| node_spot(*number, topology))
            .collect(),
    }
}

/// Returns the parts of the machine near the GPUs with these numbers, which are indices in
/// [`Topology::gpus`]. GPUs with the same CPUs share one part. Fails if a GPU does not exist or has
/// no CPUs.
pub(super) fn gpu_spots(numbers: &[usize], topology: &Topology) -> Result<Vec<Spot>, NearError> {
    if topology.pci.is_empty() {
        return Err(NearError::NoPci);
    }
    let mut groups: Vec<(Spot, Vec<usize>)> = Vec::new();
    for number in numbers {
        let absent = || NearError::Absent {
            name: format!("gpu{number}"),
            found: named_gpus(topology).collect(),
        };
        let address = topology.gpus.get(*number).ok_or_else(absent)?;
        let device = topology.pci.get(address).ok_or_else(absent)?;
        let own = spot(gpu_name(*number, *address), device, topology)?;
        match groups.iter_mut().find(|(spot, _)| spot.cpus == own.cpus) {
            None => groups.push((own, vec![*number])),
            Some((spot, numbers)) => {
                numbers.push(*number);
                spot.near = format!("gpu{}", format_cpus(numbers));
                spot.known &= own.known;
            }
        }
    }
    Ok(groups.into_iter().map(|(spot, _)| spot).collect())
}

fn device_spots(name: &str, topology: &Topology) -> Result<Vec<Spot>, NearError> {
    let Some(hardware) = topology.devices.get(name) else {
        let (name, found) = (name.to_owned(), named_devices(topology));
        return Err(NearError::Absent { name, found });
    };
    let mut spots: Vec<Spot> = Vec::new();
    for device in hardware {
        let own = spot(name.to_owned(), device, topology)?;
        if spots.iter().all(|spot| spot.cpus != own.cpus) {
            spots.push(own);
        }
    }
    if spots.is_empty() {
        return Err(NearError::Virtual(name.to_owned()));
    }
    Ok(spots)
}

fn node_spot(number: usize, topology: &Topology) -> Result<Spot, NearError> {
    let name = || format!("node {number}");
    let Some(cpus) = topology.nodes.get(&number) else {
        let found = topology.nodes.keys().map(|node| format!("node {node}"));
        let (name, found) = (name(), found.collect());
        return Err(NearError::Absent { name, found });
    };
    if cpus.is_empty() {
        return Err(NearError::NoCpus(name()));
    }
    Ok(Spot {
        near: String::new(),
        cpus: cpus.clone(),
        known: true,
    })
}

/// Returns the CPUs near a device, which are those of its node.
///
/// If its node is unknown or has no CPUs, all online CPUs are near when only one node has CPUs at
/// all. Otherwise returns the CPUs that the kernel reports as local, which may be all CPUs.
fn spot(near: String, device: &Locality, topology: &Topology) -> Result<Spot, NearError> {
    let of_node = device.node.and_then(|node| topology.nodes.get(&node));
    let with_cpus = topology.nodes.values().filter(|cpus| !cpus.is_empty());
    let (cpus, known) = match of_node {
        Some(cpus) if !cpus.is_empty() => (cpus, true),
        _ if with_cpus.count() <= 1 => (&topology.online, true),
        _ => (&device.cpus, false),
    };
    if cpus.is_empty() {
        return Err(NearError::NoCpus(near));
    }
    let cpus = cpus.clone();
    Ok(Spot { near, cpus, known })
}

fn named_gpus(topology: &Topology) -> impl Iterator<Item = String> {
    let gpus = topology.gpus.iter().enumerate();
    gpus.map(|(number, address)| gpu_name(number, *address))
}

/// Returns the names that `--cores near:` accepts: interfaces and RDMA devices with hardware, and
/// GPUs.
fn named_devices(topology: &Topology) -> Vec<String> {
    let devices = topology.devices.iter();
    let real = devices.filter(|(_, hardware)| !hardware.is_empty());
    let names = real.map(|(name, _)| name.clone());
    names.chain(named_gpus(topology)).collect()
}

fn gpu_name(number: usize, address: PciAddress) -> String {
    format!("gpu{number} {address}")
}

/// A CPU that a shard could run on.
struct Candidate<'a> {
    /// Index in the `spots` passed to [`choose`] of the spot that contains the CPU.
    spot: usize,
    cpu: usize,
    core: &'a [usize],
    /// Whether CPU 0 is on the same core.
    first: bool,
    /// Whether another process may use a part of the core, because this one is not allowed all of
    /// its threads.
    split: bool,
}

/// Chooses `shards` of the allowed CPUs in `spots`, or all of them if there are fewer. Each one is
/// returned as the index of its spot and its CPU number.
///
/// CPUs are chosen one after the other, each time the best of the remaining ones by these criteria:
///
/// 1. The core with the fewest shards: two threads of one core share its execution units and
///    caches, so every core gets one shard before any gets two.
/// 2. Not the core of CPU 0: the kernel's own work and, without irqbalance, interrupts gather
///    there.
/// 3. A core whose threads are all allowed: another process on the other thread would slow it down.
/// 4. The spot with the fewest shards, then the one specified first.
/// 5. The highest CPU number: interrupts and other programs use low numbers first.
pub(super) fn choose(
    spots: &[Spot],
    shards: usize,
    allowed: &[usize],
    topology: &Topology,
) -> Vec<(usize, usize)> {
    let core_of = |cpu: usize| topology.cores.iter().find(|core| core.contains(&cpu));
    let first_core = core_of(0);
    let mut left = Vec::new();
    for (number, spot) in spots.iter().enumerate() {
        let usable = spot.cpus.iter().filter(|cpu| allowed.contains(cpu));
        left.extend(usable.map(|cpu| {
            let core = core_of(*cpu).map_or(std::slice::from_ref(cpu), Vec::as_slice);
            Candidate {
                spot: number,
                cpu: *cpu,
                core,
                first: *cpu == 0 || first_core.is_some_and(|first| first == core),
                split: core.iter().any(|cpu| !allowed.contains(cpu)),
            }
        }));
    }
    let mut chosen: Vec<(usize, usize)> = Vec::new();
    while chosen.len() < shards {
        let rank = |candidate: &&Candidate<'_>| {
            let on_core = |(_, cpu): &&(usize, usize)| candidate.core.contains(cpu);
            let at_spot = |(spot, _): &&(usize, usize)| candidate.spot == *spot;
            (
                chosen.iter().filter(on_core).count(),
                candidate.first,
                candidate.split,
                chosen.iter().filter(at_spot).count(),
                candidate.spot,
                Reverse(candidate.cpu),
            )
        };
        let Some((spot, cpu)) = left
            .iter()
            .min_by_key(rank)
            .map(|best| (best.spot, best.cpu))
        else {
            break;
        };
        chosen.push((spot, cpu));
        left.retain(|candidate| candidate.cpu != cpu);
    }
    chosen
}

#[cfg(test)]
#[path = "near_tests.rs"]
mod tests;
