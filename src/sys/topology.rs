//! The machine's layout according to sysfs: CPUs, cores, NUMA nodes, GPUs, network and RDMA
//! devices.
//!
//! This module only reads; `near` makes decisions. Data that cannot be read is empty, never
//! guessed: an unreadable layout does not prevent the start, and only a configuration that refers
//! to a missing part results in an error. The root of the file system is a parameter, so that tests
//! can use recorded trees.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::config::PciAddress;
use crate::config::units::CPU_MAX;

/// Maximum nesting of network interfaces, such as a VLAN on a bond of ports. The kernel limits it
/// to 8.
const LOWER_DEPTH_MAX: usize = 8;
/// Number of directories searched for a device's NUMA node, from the device up through its parents.
/// The node of a virtio device is that of its PCI device, the node of a USB interface that of its
/// hub.
const PARENTS_MAX: usize = 3;

const NVIDIA: u16 = 0x10de;
const AMD: u16 = 0x1002;
const INTEL: u16 = 0x8086;
/// GPU vendors, in the order in which their GPUs are numbered, with the PCI classes of their GPUs:
/// display controllers (0x03xx) and, for AMD Instinct, processing accelerators (0x1200). The VGA
/// adapters of management controllers (ASPEED, Matrox) and hypervisors have other vendors. The
/// order ensures that graphics integrated into a processor are not numbered before the GPUs that
/// engines use.
const GPUS: [(u16, &[u16]); 3] = [
    (NVIDIA, &[0x0300, 0x0302]),
    (AMD, &[0x0300, 0x0380, 0x1200]),
    (INTEL, &[0x0300, 0x0380]),
];

/// The layout of this machine. Lists of CPUs are ascending.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Topology {
    /// CPUs that are online; empty if sysfs is hidden.
    pub online: Vec<usize>,
    /// CPUs that the kernel's scheduler leaves alone (`isolcpus`).
    pub isolated: Vec<usize>,
    /// Cores, each as the list of its CPUs (hardware threads), ordered by their first CPU.
    pub cores: Vec<Vec<usize>>,
    /// The CPUs of each NUMA node, by node number; empty if the kernel reports no nodes. A node
    /// that has only memory has an empty list.
    pub nodes: BTreeMap<usize, Vec<usize>>,
    /// Nodes on which this process may allocate memory; empty if the kernel does not report them.
    pub memory_nodes: Vec<usize>,
    /// The location of each PCI device, by address.
    pub pci: BTreeMap<PciAddress, Locality>,
    /// PCI addresses of the GPUs in the order of their numbers: NVIDIA, AMD, Intel, each ordered by
    /// PCI address. If `/dev` contains the device files of some of them, the others are left out,
    /// as in nvidia-smi.
    pub gpus: Vec<PciAddress>,
    /// Whether `/dev` contains the device files of `gpus`, so that this process can open them. A
    /// proxy in a separate container can open none.
    pub gpus_open: bool,
    /// Network interfaces and RDMA devices by name, each with the location of its hardware: several
    /// entries for a bond, none for a virtual interface.
    pub devices: BTreeMap<String, Vec<Locality>>,
}

/// The location of a device relative to the CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Locality {
    /// The NUMA node, or `None` if the firmware does not report it.
    pub node: Option<usize>,
    /// `local_cpulist`: the CPUs of the node, or all CPUs if the node is unknown.
    pub cpus: Vec<usize>,
}

impl Topology {
    /// Reads the layout of this machine. Blocks on sysfs: a few files per CPU and PCI device.
    #[must_use]
    pub fn read() -> Self {
        Self::read_in(Path::new("/"))
    }

    /// Like [`Topology::read`], with the root of the file system as a parameter for tests.
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
            isolated: list(&system.join("cpu/isolated")),
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

    /// Returns the NUMA node of a CPU, or `None` if the kernel reports none.
    #[must_use]
    pub fn node_of(&self, cpu: usize) -> Option<usize> {
        let mut nodes = self.nodes.iter();
        nodes.find_map(|(node, cpus)| cpus.contains(&cpu).then_some(*node))
    }
}

/// Groups the online CPUs by core. A CPU whose siblings are not reported is a separate core.
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

/// Reads from `/proc/self/status` the nodes on which this process may allocate memory
/// (`Mems_allowed_list`): a cpuset may allow a node's CPUs but not its memory. Empty if it cannot
/// be read.
fn memory_nodes(status: &Path) -> Vec<usize> {
    let status = fs::read_to_string(status).unwrap_or_default();
    let mut lines = status.lines();
    let allowed = lines.find_map(|line| line.strip_prefix("Mems_allowed_list:"));
    allowed.map(read_list).unwrap_or_default()
}

/// Vendor and class of a PCI device. The lowest byte of the class, the programming interface, is
/// dropped.
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

/// Returns the PCI addresses of the GPUs whose device file exists, in the order of their numbers,
/// and `true`: this process can open them. If no device file exists, returns all GPUs and `false`.
///
/// An NVIDIA GPU that is not bound to NVIDIA's driver (for example because it is passed to a
/// virtual machine) has no number. In a container with only some of the machine's GPUs, sysfs still
/// contains all of them; the device files show which ones the container has.
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

/// Returns the number in the name of an NVIDIA GPU's device file, which may differ from the number
/// of the GPU. `None` if the driver's `information` file lacks it.
fn nvidia_minor(information: &Path) -> Option<u32> {
    let text = fs::read_to_string(information).ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Device Minor:"))?;
    line.trim().parse().ok()
}

/// Returns the location of a network interface's hardware, or, if it has none (a bond, a VLAN),
/// that of the interfaces below it, down to `depth` levels. Empty for a virtual interface.
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

/// Returns the location of the device that an entry of `/sys/class` belongs to, or of the nearest
/// parent that has one. `None` if there is none, as for a virtual interface.
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

/// Reads the location of a device from its sysfs directory. Returns `None` if the directory has no
/// `numa_node` and no CPUs in `local_cpulist`.
fn locality(device: &Path) -> Option<Locality> {
    let node = fs::read_to_string(device.join("numa_node")).ok();
    let cpus = list(&device.join("local_cpulist"));
    if node.is_none() && cpus.is_empty() {
        return None;
    }
    // -1 means that the firmware did not report the node. It does not parse as `usize`.
    let node = node.and_then(|text| text.trim().parse().ok());
    Some(Locality { node, cpus })
}

/// Returns the names in a directory, ascending; none if it cannot be read.
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

/// Parses an ascending list of CPUs or nodes in the kernel's format, such as `0-3,8`. Numbers from
/// `CPU_MAX` on are left out, because no thread can be pinned to such a CPU. In the configuration
/// such a CPU number is an error.
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
