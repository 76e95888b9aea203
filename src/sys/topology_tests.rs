//! Recorded sysfs trees, and tests of the layouts that are read from them.
//!
//! A tree is a text. `path: content` is a file, `path -> target` a link, `#` starts a comment. One
//! `{a-b}` in a path expands to one file per number. In the content, `{}` is that number, and
//! `{+n}` and `{-n}` are offsets to it.

use super::*;
use std::sync::atomic::{AtomicUsize, Ordering};

pub(in crate::sys) const ONE_GPU: &str = include_str!("../../tests/fixtures/sysfs/one-gpu.txt");
pub(in crate::sys) const EIGHT_GPUS: &str =
    include_str!("../../tests/fixtures/sysfs/eight-gpus.txt");
pub(in crate::sys) const NONE: &str = include_str!("../../tests/fixtures/sysfs/none.txt");
pub(in crate::sys) const CONTAINER: &str = include_str!("../../tests/fixtures/sysfs/container.txt");
pub(in crate::sys) const UNKNOWN_NODE: &str =
    include_str!("../../tests/fixtures/sysfs/unknown-node.txt");

/// A temporary directory with the files of a recorded tree. Removed when dropped.
pub(in crate::sys) struct Tree(pub(in crate::sys) PathBuf);

impl Tree {
    pub(in crate::sys) fn new<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Self {
        static TREES: AtomicUsize = AtomicUsize::new(0);
        let number = TREES.fetch_add(1, Ordering::Relaxed);
        let name = format!("ringside-tree-{}-{number}", std::process::id());
        let tree = Self(std::env::temp_dir().join(name));
        fs::create_dir_all(&tree.0).unwrap();
        for (path, text) in files {
            fs::write(tree.place(path), text).unwrap();
        }
        tree
    }

    pub(in crate::sys) fn recorded(text: &str) -> Self {
        let tree = Self::new([]);
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some((path, target)) = line.split_once(" -> ") {
                std::os::unix::fs::symlink(target, tree.place(path)).unwrap();
                continue;
            }
            // Split at the first colon that is followed by a space: PCI addresses contain colons
            // too.
            let (path, content) = line.split_once(": ").unwrap_or_else(|| {
                let path = line.strip_suffix(':');
                (
                    path.unwrap_or_else(|| panic!("invalid line in a tree: {line}")),
                    "",
                )
            });
            for (path, content) in expand(path, content) {
                let content = content.replace("\\n", "\n").replace("\\t", "\t");
                fs::write(tree.place(&path), content + "\n").unwrap();
            }
        }
        tree
    }

    fn place(&self, path: &str) -> PathBuf {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn expand(path: &str, content: &str) -> Vec<(String, String)> {
    let Some((front, rest)) = path.split_once('{') else {
        return vec![(path.to_owned(), content.to_owned())];
    };
    let (range, back) = rest.split_once('}').unwrap();
    let (first, last) = range.split_once('-').unwrap();
    let width = first.len();
    let numbers = first.parse::<i64>().unwrap()..=last.parse().unwrap();
    let line = |number: i64| {
        let mut parts = content.split('{');
        let mut text = parts.next().unwrap().to_owned();
        for part in parts {
            let (offset, rest) = part.split_once('}').unwrap();
            let offset = offset.parse().unwrap_or(0);
            text += &format!("{}{rest}", number + offset);
        }
        (format!("{front}{number:0width$}{back}"), text)
    };
    numbers.map(line).collect()
}

pub(in crate::sys) fn read(text: &str) -> Topology {
    Topology::read_in(&Tree::recorded(text).0)
}

fn gpus(topology: &Topology) -> Vec<String> {
    topology.gpus.iter().map(ToString::to_string).collect()
}

#[test]
fn one_gpu() {
    let topology = read(ONE_GPU);
    assert_eq!(topology.online, Vec::from_iter(0..32));
    assert_eq!(topology.cores.len(), 16);
    assert_eq!(topology.cores[3], [3, 19]);
    assert_eq!(topology.nodes, BTreeMap::from([(0, Vec::from_iter(0..32))]));
    assert_eq!(topology.memory_nodes, [0]);
    assert_eq!(gpus(&topology), ["0000:41:00.0"], "no audio device, no BMC");
    assert!(topology.gpus_open);
    assert_eq!(topology.devices["lo"], []);
    assert_eq!(topology.devices["eno1"][0].node, Some(0));
    assert_eq!(topology.pci.len(), 4);
}

#[test]
fn eight_gpus() {
    let topology = read(EIGHT_GPUS);
    assert_eq!(topology.cores.len(), 64);
    assert_eq!(topology.cores[63], [63, 127]);
    let buses = ["18", "2a", "3a", "5d", "9a", "ab", "ba", "db"];
    let want: Vec<_> = buses.iter().map(|bus| format!("0000:{bus}:00.0")).collect();
    assert_eq!(gpus(&topology), want, "no NVSwitch, no BMC");
    for (number, address) in topology.gpus.iter().enumerate() {
        let locality = &topology.pci[address];
        assert_eq!(locality.node, Some(number / 4));
        assert_eq!(locality.cpus, topology.nodes[&(number / 4)]);
    }
    assert_eq!(
        (topology.node_of(95), topology.node_of(96)),
        (Some(0), Some(1))
    );
    assert_eq!(topology.node_of(128), None);
    let nodes = |name: &str| -> Vec<_> {
        topology.devices[name]
            .iter()
            .map(|device| device.node)
            .collect()
    };
    assert_eq!(nodes("mlx5_4"), [Some(1)]);
    assert_eq!(nodes("ens20f0"), [Some(1)]);
    assert_eq!(nodes("bond0"), [Some(0), Some(1)]);
    assert_eq!(nodes("bond0.100"), [Some(0), Some(1)]);
    assert_eq!(nodes("docker0"), []);
}

#[test]
fn machines_without_gpu_node_or_pci() {
    let topology = read(NONE);
    assert_eq!(
        gpus(&topology),
        Vec::<String>::new(),
        "a hypervisor's VGA adapter is not a GPU"
    );
    assert!(!topology.gpus_open);
    // The virtio device reports no locality; its PCI device does.
    let want = Locality {
        node: None,
        cpus: vec![0, 1],
    };
    assert_eq!(topology.devices["eth0"], [want]);

    let topology = read(CONTAINER);
    assert_eq!(topology.nodes[&1], Vec::from_iter(32..64));
    assert_eq!((topology.pci.len(), topology.gpus.len()), (0, 0));
    assert_eq!(topology.devices["eth0"], []);
    assert_eq!(topology.memory_nodes, [0]);

    assert_eq!(read(""), Topology::default());
}

#[test]
fn unknown_nodes() {
    let topology = read(UNKNOWN_NODE);
    assert_eq!(
        gpus(&topology),
        ["0000:05:00.0", "0000:26:00.0", "0000:85:00.0"]
    );
    assert!(topology.gpus_open);
    let nodes = topology.gpus.iter().map(|gpu| topology.pci[gpu].node);
    assert_eq!(Vec::from_iter(nodes), [None, None, Some(1)]);
    assert_eq!(topology.nodes[&2], Vec::<usize>::new());
}

/// Tests containers with the device files of two, one and none of the machine's GPUs.
#[test]
fn gpus_that_can_be_opened_are_numbered() {
    let tree = Tree::recorded(EIGHT_GPUS);
    for minor in [0, 1, 2, 3, 5, 6] {
        fs::remove_file(tree.0.join(format!("dev/nvidia{minor}"))).unwrap();
    }
    let topology = Topology::read_in(&tree.0);
    assert_eq!(
        gpus(&topology),
        ["0000:ab:00.0", "0000:ba:00.0"],
        "minors 7 and 4"
    );
    assert!(topology.gpus_open);
    // The older method of adding GPUs to a container also hides the driver's entries of other GPUs.
    fs::remove_dir_all(tree.0.join("proc/driver/nvidia/gpus/0000:ab:00.0")).unwrap();
    assert_eq!(gpus(&Topology::read_in(&tree.0)), ["0000:ba:00.0"]);
    fs::remove_file(tree.0.join("dev/nvidia4")).unwrap();
    let topology = Topology::read_in(&tree.0);
    assert_eq!((topology.gpus.len(), topology.gpus_open), (7, false));
}

#[test]
fn gpus_are_numbered_by_vendor() {
    let device = |address: &str, vendor: &str, class: &str| {
        let path = format!("sys/bus/pci/devices/{address}");
        format!("{path}/vendor: {vendor}\n{path}/class: {class}\n")
    };
    let text = [
        device("0000:00:02.0", "0x8086", "0x030000"),
        device("0000:03:00.0", "0x1002", "0x038000"),
        device("0000:41:00.0", "0x10de", "0x030000"),
        device("0000:42:00.0", "0x10de", "0x030200"),
        device("0000:00:0b.0", "0x8086", "0x120000"),
        device("10000:01:00.0", "0x10de", "0x030200"),
    ]
    .concat();
    let all = [
        "0000:41:00.0",
        "0000:42:00.0",
        "10000:01:00.0",
        "0000:03:00.0",
        "0000:00:02.0",
    ];
    assert_eq!(gpus(&read(&text)), all);
    // The other NVIDIA GPUs are passed to a virtual machine: they are not bound to NVIDIA's driver.
    let driven = "proc/driver/nvidia/gpus/0000:42:00.0/information: Device Minor: \t 0\n";
    let driven = gpus(&read(&(text + driven)));
    assert_eq!(driven, ["0000:42:00.0", "0000:03:00.0", "0000:00:02.0"]);
}

#[test]
fn kernel_lists() {
    for (text, want) in [
        ("0-3,8\n", vec![0, 1, 2, 3, 8]),
        ("0\n", vec![0]),
        ("\n", vec![]),
        ("", vec![]),
        ("1022-2047\n", vec![1022, 1023]),
        ("2000", vec![]),
        ("x,1", vec![1]),
    ] {
        assert_eq!(read_list(text), want, "{text:?}");
    }
}

#[test]
fn this_machine_is_read() {
    let topology = Topology::read();
    let threads: Vec<_> = topology.cores.iter().flatten().collect();
    assert_eq!(
        threads.len(),
        topology.online.len(),
        "each CPU belongs to exactly one core"
    );
    for cpus in topology.nodes.values() {
        assert!(cpus.iter().all(|cpu| topology.online.contains(cpu)));
    }
}

#[test]
fn isolated_cpus() {
    for (text, want) in [("2-3,8\n", &[2, 3, 8][..]), ("\n", &[]), ("x", &[])] {
        let tree = Tree::new([("sys/devices/system/cpu/isolated", text)]);
        assert_eq!(Topology::read_in(&tree.0).isolated, want, "{text:?}");
    }
}
