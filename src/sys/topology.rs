//! The machine's layout as sysfs tells it: CPUs, cores, NUMA nodes, GPUs, network and RDMA devices.
//!
//! Reads and decides nothing; `near` decides. What cannot be read is empty, never guessed: the
//! layout is no reason not to start, and whoever asks for a place in it gets the error there. The
//! file system's root is a parameter, so that recorded trees are read like the real one.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::config::PciAddress;
use crate::config::units::CPU_MAX;

/// Interfaces below an interface, such as a VLAN of a bond of ports. The kernel nests up to 8.
const LOWER_DEPTH_MAX: usize = 8;
/// Parents of a device that are asked for its node: a virtio device's is the PCI device it is on, a
/// USB interface's that of its hub.
const PARENTS_MAX: usize = 3;

const NVIDIA: u16 = 0x10de;
const AMD: u16 = 0x1002;
const INTEL: u16 = 0x8086;
/// Makers of GPUs in the order their GPUs are numbered, and the PCI classes these have: display
/// controllers (0x03xx) and, AMD's Instinct, processing accelerators (0x1200). The VGA of a server's
/// management controller (ASPEED, Matrox) and of a hypervisor has another maker. The makers are
/// ordered so that a processor's own graphics do not come before what an engine runs on.
const GPUS: [(u16, &[u16]); 3] = [
    (NVIDIA, &[0x0300, 0x0302]),
    (AMD, &[0x0300, 0x0380, 0x1200]),
    (INTEL, &[0x0300, 0x0380]),
];

/// What sysfs tells of this machine. Lists of CPUs are ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// CPUs that are online; empty where sysfs is hidden.
    pub online: Vec<usize>,
    /// Cores as the CPUs (hardware threads) each has, by their first CPU.
    pub cores: Vec<Vec<usize>>,
    /// NUMA nodes by number; empty where the kernel has none. One with memory only has no CPUs.
    pub nodes: BTreeMap<usize, Vec<usize>>,
    /// Nodes this process may have memory from; empty where the kernel does not tell.
    pub memory_nodes: Vec<usize>,
    /// PCI devices.
    pub pci: BTreeMap<PciAddress, Locality>,
    /// GPUs in the order of their numbers: NVIDIA's, AMD's, Intel's, each by PCI address. Where
    /// this process can open some of them, the others are left out, as nvidia-smi does.
    pub gpus: Vec<PciAddress>,
    /// Whether this process can open `gpus`. A proxy in a container of its own can open none.
    pub gpus_open: bool,
    /// Network interfaces and RDMA devices by name, each with the hardware it is on: several for a
    /// bond, none for a virtual one.
    pub devices: BTreeMap<String, Vec<Locality>>,
}

/// Which CPUs a device is near to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locality {
    /// Its NUMA node; `None` where the firmware did not say.
    pub node: Option<usize>,
    /// `local_cpulist`: the node's CPUs, or all where the node is unknown.
    pub cpus: Vec<usize>,
}

impl Topology {
    /// Reads this machine's. Blocks on sysfs: a few files per CPU and PCI device.
    #[must_use]
    pub fn read() -> Self {
        Self::read_in(Path::new("/"))
    }

    /// As `read`, with the file system's root as a parameter for tests.
    #[must_use]
    pub fn read_in(root: &Path) -> Self {
        let system = root.join("sys/devices/system");
        let online = list(&system.join("cpu/online"));
        let class = root.join("sys/class");
        let mut devices = BTreeMap::new();
        for name in names(&class.join("net")) {
            let found = interface(&class.join("net"), &name, LOWER_DEPTH_MAX);
            devices.insert(name, found);
        }
        for name in names(&class.join("infiniband")) {
            let found = locality_of(&class.join("infiniband").join(&name));
            devices.entry(name).or_insert_with(|| Vec::from_iter(found));
        }
        let (pci, kinds) = pci(&root.join("sys/bus/pci/devices"));
        let (gpus, gpus_open) = gpus(root, &kinds);
        Self {
            cores: cores(&system.join("cpu"), &online),
            online,
            nodes: nodes(&system.join("node")),
            memory_nodes: memory_nodes(&root.join("proc/self/status")),
            pci,
            gpus,
            gpus_open,
            devices,
        }
    }

    /// The node a CPU is on.
    #[must_use]
    pub fn node_of(&self, cpu: usize) -> Option<usize> {
        let mut nodes = self.nodes.iter();
        nodes.find_map(|(node, cpus)| cpus.contains(&cpu).then_some(*node))
    }
}

/// Siblings of each CPU that is online; a CPU whose siblings are not told is a core of its own.
fn cores(directory: &Path, online: &[usize]) -> Vec<Vec<usize>> {
    let mut cores: Vec<Vec<usize>> = Vec::new();
    for cpu in online {
        if cores.iter().any(|core| core.contains(cpu)) {
            continue;
        }
        let mut core = list(&directory.join(format!("cpu{cpu}/topology/thread_siblings_list")));
        core.retain(|sibling| online.contains(sibling));
        cores.push(if core.contains(cpu) { core } else { vec![*cpu] });
    }
    cores
}

fn nodes(directory: &Path) -> BTreeMap<usize, Vec<usize>> {
    let numbers = list(&directory.join("online")).into_iter();
    numbers
        .map(|node| (node, list(&directory.join(format!("node{node}/cpulist")))))
        .collect()
}

/// `Mems_allowed_list`: a cpuset may leave a node's CPUs and take its memory away.
fn memory_nodes(status: &Path) -> Vec<usize> {
    let status = fs::read_to_string(status).unwrap_or_default();
    let mut lines = status.lines();
    let allowed = lines.find_map(|line| line.strip_prefix("Mems_allowed_list:"));
    allowed.map(read_list).unwrap_or_default()
}

/// Maker and class of a PCI device, without the class's lowest byte, the programming interface.
type Kind = (u16, u16);

fn pci(directory: &Path) -> (BTreeMap<PciAddress, Locality>, BTreeMap<PciAddress, Kind>) {
    let (mut pci, mut kinds) = (BTreeMap::new(), BTreeMap::new());
    for name in names(directory) {
        let device = directory.join(&name);
        let Some(address) = PciAddress::read(&name) else {
            continue;
        };
        if let (Some(vendor), Some(class)) =
            (hex(&device.join("vendor")), hex(&device.join("class")))
            && let (Ok(vendor), Ok(class)) = (u16::try_from(vendor), u16::try_from(class >> 8))
        {
            kinds.insert(address, (vendor, class));
        }
        pci.insert(address, locality(&device).unwrap_or_default());
    }
    (pci, kinds)
}

/// The GPUs in order, and whether this process can open them.
///
/// A GPU that NVIDIA's driver does not have (it may be handed to a virtual machine) has no number.
/// In a container with some of a machine's GPUs sysfs still shows all of them; their device files
/// tell which ones it has.
fn gpus(root: &Path, kinds: &BTreeMap<PciAddress, Kind>) -> (Vec<PciAddress>, bool) {
    let driven = root.join("proc/driver/nvidia/gpus");
    let driven_by_nvidia = fs::read_dir(&driven).is_ok();
    let mut all = Vec::new();
    let mut open = Vec::new();
    for (maker, classes) in GPUS {
        let of_maker = kinds
            .iter()
            .filter(|(_, (vendor, class))| *vendor == maker && classes.contains(class));
        for (address, _) in of_maker {
            let file = if maker == NVIDIA {
                let own = driven.join(address.to_string());
                if driven_by_nvidia && !own.is_dir() {
                    continue;
                }
                nvidia_minor(&own.join("information")).map(|minor| format!("nvidia{minor}"))
            } else {
                let drm = root.join(format!("sys/bus/pci/devices/{address}/drm"));
                let mut nodes = names(&drm).into_iter();
                let render = nodes.find(|name| name.starts_with("renderD"));
                render.map(|name| format!("dri/{name}"))
            };
            all.push(*address);
            if file.is_some_and(|file| root.join("dev").join(file).exists()) {
                open.push(*address);
            }
        }
    }
    if open.is_empty() {
        (all, false)
    } else {
        (open, true)
    }
}

/// The number in the name of an NVIDIA GPU's device file, which is not the GPU's own number.
fn nvidia_minor(information: &Path) -> Option<u32> {
    let text = fs::read_to_string(information).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Device Minor:"))?;
    line.trim().parse().ok()
}

/// The hardware of a network interface, or of those below it.
fn interface(class: &Path, name: &str, depth: usize) -> Vec<Locality> {
    let directory = class.join(name);
    if let Some(own) = locality_of(&directory) {
        return vec![own];
    }
    if depth == 0 {
        return Vec::new();
    }
    let below = names(&directory).into_iter();
    let below = below.filter_map(|entry| Some(entry.strip_prefix("lower_")?.to_owned()));
    below
        .flat_map(|lower| interface(class, &lower, depth - 1))
        .collect()
}

/// Of the device that an entry of `/sys/class` is on.
fn locality_of(entry: &Path) -> Option<Locality> {
    let mut device = entry.join("device");
    for _ in 0..PARENTS_MAX {
        if let Some(found) = locality(&device) {
            return Some(found);
        }
        device.push("..");
    }
    None
}

/// `None` where the directory is not that of a device on a bus that knows nodes.
fn locality(device: &Path) -> Option<Locality> {
    let node = fs::read_to_string(device.join("numa_node")).ok();
    let cpus = list(&device.join("local_cpulist"));
    if node.is_none() && cpus.is_empty() {
        return None;
    }
    // -1, "not told by the firmware", is not a number here.
    let node = node.and_then(|text| text.trim().parse().ok());
    Some(Locality { node, cpus })
}

/// Names in a directory, ascending; none where it cannot be read.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort_unstable();
    names
}

fn hex(path: &PathBuf) -> Option<u32> {
    let text = fs::read_to_string(path).ok()?;
    u32::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
}

fn list(path: &Path) -> Vec<usize> {
    read_list(&fs::read_to_string(path).unwrap_or_default())
}

/// Reads a list as the kernel writes it, ascending. What is above `CPU_MAX` cannot be pinned to and
/// is left out, unlike in what an operator writes.
fn read_list(text: &str) -> Vec<usize> {
    let part = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let first: usize = first.trim().parse().ok()?;
        let last: usize = last.trim().parse().ok()?;
        Some(first..=last.min(CPU_MAX - 1))
    };
    text.split(',').filter_map(part).flatten().collect()
}

#[cfg(test)]
#[path = "topology_tests.rs"]
pub(super) mod tests;
