//! Complete plans on recorded sysfs trees, and properties of `choose` on random machines.

use super::*;
use crate::config::Cores;
use crate::sys::cores::{CorePlan, ProcessCpus, plan_cores};
use crate::sys::topology::tests::{CONTAINER, EIGHT_GPUS, NONE, ONE_GPU, UNKNOWN_NODE, read};

/// Plans for a process that has these CPUs to itself.
fn plan(topology: &Topology, allowed: &[usize], text: &str) -> Result<CorePlan, String> {
    let cores = text.parse().unwrap();
    let mut topology = topology.clone();
    topology.isolated = allowed.to_vec();
    let usable = ProcessCpus {
        allowed: allowed.to_vec(),
        ..ProcessCpus::default()
    };
    plan_cores(&cores, &usable, &topology, |_| true).map_err(|error| error.to_string())
}

fn cpus(text: &str) -> Vec<usize> {
    crate::config::units::cpu_list(text).unwrap()
}

/// A test case: the value of `--cores`, the allowed CPUs, and the expected placement of each shard
/// as displayed.
type Row<'a> = (&'a str, &'a str, &'a [&'a str]);

fn check(tree: &str, rows: &[Row<'_>]) {
    let topology = read(tree);
    for (text, allowed, want) in rows {
        let plan = plan(&topology, &cpus(allowed), text).unwrap_or_else(|e| panic!("{text}: {e}"));
        let seats: Vec<_> = plan.seats.iter().map(ToString::to_string).collect();
        assert_eq!(seats, *want, "{text} on {allowed}");
    }
}

#[test]
fn seats_on_one_gpu() {
    let near = "CPU 31 (node 0, near gpu0 0000:41:00.0)";
    check(
        ONE_GPU,
        &[
            ("auto", "0-31", &[near]),
            ("near:gpu0", "0-31", &[near]),
            ("near:0000:41:00.0", "0-31", &[near]),
            ("near:eno1", "0-31", &["CPU 31 (node 0, near eno1)"]),
            ("numa:0", "0-31", &["CPU 31 (node 0)"]),
            // CPU 16 is on the same core as CPU 0.
            (
                "auto",
                "0-1,16",
                &["CPU 1 (node 0, near gpu0 0000:41:00.0)"],
            ),
            ("numa:0", "0,16", &["CPU 16 (node 0)"]),
            // CPU 5, on the same core as CPU 21, is not allowed.
            ("numa:0", "0-4,16-21", &["CPU 20 (node 0)"]),
            ("3,0", "0-31", &["CPU 3 (node 0)", "CPU 0 (node 0)"]),
            // Whole cores first, then the core of CPU 0, then second threads.
            (
                "numa:0*5",
                "0-2,16-18",
                &[
                    "CPU 18 (node 0)",
                    "CPU 17 (node 0)",
                    "CPU 16 (node 0)",
                    "CPU 2 (node 0)",
                    "CPU 1 (node 0)",
                ],
            ),
        ],
    );
}

#[test]
fn seats_on_eight_gpus() {
    let all = "0-127";
    check(
        EIGHT_GPUS,
        &[
            ("auto", all, &["CPU 95 (node 0, near gpu0-3)"]),
            ("auto", "40-50", &["CPU 50 (node 1, near gpu4-7)"]),
            (
                "near:gpu0",
                all,
                &["CPU 95 (node 0, near gpu0 0000:18:00.0)"],
            ),
            (
                "near:gpu7",
                all,
                &["CPU 127 (node 1, near gpu7 0000:db:00.0)"],
            ),
            (
                "near:DB:00.0",
                all,
                &["CPU 127 (node 1, near gpu7 0000:db:00.0)"],
            ),
            ("near:gpu0-3", all, &["CPU 95 (node 0, near gpu0-3)"]),
            (
                "near:gpu7,0",
                all,
                &["CPU 127 (node 1, near gpu7 0000:db:00.0)"],
            ),
            (
                "near:gpu0-7*4",
                all,
                &[
                    "CPU 95 (node 0, near gpu0-3)",
                    "CPU 127 (node 1, near gpu4-7)",
                    "CPU 94 (node 0, near gpu0-3)",
                    "CPU 126 (node 1, near gpu4-7)",
                ],
            ),
            ("near:mlx5_4", all, &["CPU 127 (node 1, near mlx5_4)"]),
            (
                "near:bond0.100*2",
                all,
                &[
                    "CPU 95 (node 0, near bond0.100)",
                    "CPU 127 (node 1, near bond0.100)",
                ],
            ),
            ("numa:1,0", all, &["CPU 127 (node 1)"]),
            ("numa:0-1*2", all, &["CPU 95 (node 0)", "CPU 127 (node 1)"]),
            // A whole core on the other node is preferred to a second thread or the core of CPU 0
            // on this one.
            (
                "numa:0-1*3",
                "0,64,31,95,62-63",
                &["CPU 95 (node 0)", "CPU 63 (node 1)", "CPU 62 (node 1)"],
            ),
        ],
    );
}

#[test]
fn seats_on_machines_with_little_information() {
    check(
        NONE,
        &[
            ("auto", "0-1", &["CPU 1 (node 0)"]),
            ("near:eth0", "0-1", &["CPU 1 (node 0, near eth0)"]),
            (
                "near:00:03.0*2",
                "0-1",
                &[
                    "CPU 1 (node 0, near 0000:00:03.0)",
                    "CPU 0 (node 0, near 0000:00:03.0)",
                ],
            ),
        ],
    );
    check(
        CONTAINER,
        &[
            ("auto", "40-43", &["CPU 43 (node 1)"]),
            ("numa:1", "40-43", &["CPU 43 (node 1)"]),
        ],
    );
    check(
        UNKNOWN_NODE,
        &[
            // The two GPUs with unknown node do not influence the choice; the third one does.
            ("auto", "0-31", &["CPU 31 (node 1, near gpu2 0000:85:00.0)"]),
            ("auto", "0-7", &["CPU 7 (node 0)"]),
            (
                "near:gpu1",
                "0-31",
                &["CPU 15 (node 0, near gpu1 0000:26:00.0)"],
            ),
        ],
    );
    check("", &[("auto", "0-3", &["CPU 3"]), ("2", "0-3", &["CPU 2"])]);
}

/// GPU memory and CXL memory form a node without CPUs. A device on such a node is near all CPUs.
#[test]
fn a_device_of_unknown_node_is_near_the_only_node_with_cpus() {
    let mut topology = read(ONE_GPU);
    topology.nodes.insert(1, Vec::new());
    for node in [None, Some(1)] {
        let address = topology.gpus[0];
        topology.pci.insert(
            address,
            Locality {
                node,
                cpus: Vec::new(),
            },
        );
        let plan = plan(&topology, &cpus("0-31"), "near:gpu0").unwrap();
        assert_eq!(plan.seats[0].cpus, [31]);
        assert!(plan.warnings.is_empty(), "{:?}", plan.warnings);
    }
}

#[test]
fn unknown_allowed_cpus_mean_all_online_cpus() {
    let topology = read(ONE_GPU);
    let plan = plan(&topology, &[], "near:gpu0").unwrap();
    assert_eq!(plan.seats[0].cpus, [31]);
}

/// Checks that each row is refused. A row is the value of `--cores`, the allowed CPUs, and the
/// start of the expected error message.
fn check_refusals(tree: &str, rows: &[(&str, &str, &str)]) {
    let topology = read(tree);
    for (text, allowed, want) in rows {
        let error = plan(&topology, &cpus(allowed), text).unwrap_err();
        assert!(error.starts_with(want), "{text}: {error}");
    }
}

#[test]
fn missing_devices_and_nodes_are_refused() {
    let all = "0-31";
    check_refusals(
        ONE_GPU,
        &[
            (
                "near:gpu1",
                all,
                "near:gpu1: there is no gpu1 on this machine, only gpu0 0000:41:00.0",
            ),
            (
                "near:gpu0*33",
                all,
                "near:gpu0: 33 shards need one CPU each, but this process may use only 32 there (0-31)",
            ),
            (
                "near:eth0",
                all,
                "near:eth0: there is no eth0 on this machine, only eno1, gpu0 0000:41:00.0",
            ),
            (
                "near:aa:00.0",
                all,
                "near:0000:aa:00.0: there is no 0000:aa:00.0 on this machine, only eno1, gpu0 ",
            ),
            (
                "numa:1",
                all,
                "numa:1: there is no node 1 on this machine, only node 0",
            ),
        ],
    );
    check_refusals(
        NONE,
        &[(
            "near:gpu0",
            "0-1",
            "near:gpu0: there is no gpu0 on this machine, nor any other of its kind",
        )],
    );
    check_refusals(
        UNKNOWN_NODE,
        &[
            (
                "near:c1:00.0",
                all,
                "near:0000:c1:00.0: the kernel reports no CPUs for 0000:c1:00.0",
            ),
            (
                "numa:2",
                all,
                "numa:2: the kernel reports no CPUs for node 2",
            ),
        ],
    );
}

#[test]
fn hidden_devices_and_disallowed_cpus_are_refused() {
    check_refusals(
        EIGHT_GPUS,
        &[
            (
                "near:gpu0",
                "32-63",
                "near:gpu0: the CPUs near gpu0 0000:18:00.0 (0-31,64-95) are not among those this process may use (32-63); allow",
            ),
            (
                "numa:0",
                "32-63",
                "numa:0: CPU 0-31,64-95 are not among those this process may use (32-63)",
            ),
            ("near:docker0", "0-127", "near:docker0: docker0 is virtual"),
        ],
    );
    let ours = "40-43";
    check_refusals(
        CONTAINER,
        &[
            ("near:gpu0", ours, "near:gpu0: /sys contains no PCI devices"),
            (
                "near:3b:00.0",
                ours,
                "near:0000:3b:00.0: /sys contains no PCI devices",
            ),
            ("near:eth0", ours, "near:eth0: eth0 is virtual"),
            ("numa:0", ours, "numa:0: CPU 0-31 are not among"),
        ],
    );
    check_refusals(
        "",
        &[
            (
                "near:gpu0",
                "0-3",
                "near:gpu0: /sys does not contain this machine's layout; mount sysfs",
            ),
            ("numa:0", "0-3", "numa:0: /sys does not contain"),
        ],
    );
}

/// Checks the warnings of each row. A row is the value of `--cores`, the allowed CPUs, and a part
/// of the only expected warning; empty for no warning.
fn check_warnings(tree: &str, rows: &[(&str, &str, &str)]) {
    let topology = read(tree);
    for (text, allowed, want) in rows {
        let warnings = plan(&topology, &cpus(allowed), text).unwrap().warnings;
        assert_eq!(
            warnings.len(),
            usize::from(!want.is_empty()),
            "{text}: {warnings:?}"
        );
        assert!(
            warnings.iter().all(|got| got.contains(want)),
            "{text}: {warnings:?}"
        );
    }
}

#[test]
fn warnings() {
    check_warnings(
        EIGHT_GPUS,
        &[
            ("near:gpu0-7", "0-63", ""),
            (
                "near:gpu0-7",
                "0-31",
                "the CPUs near gpu4-7 (32-63,96-127) are not among",
            ),
            ("auto", "0-31", ""),
        ],
    );
    check_warnings(
        UNKNOWN_NODE,
        &[
            (
                "near:gpu0",
                "0-31",
                "does not report the NUMA node of gpu0 0000:05:00.0; the kernel reports CPU 0-31 as local",
            ),
            ("near:gpu2", "0-31", ""),
        ],
    );
    check_warnings(NONE, &[("near:eth0", "0-1", "")]);
    let far = "shards run on node 1, but this process may only allocate memory on node 0";
    check_warnings(
        CONTAINER,
        &[
            ("numa:1", "40-43", far),
            ("43", "40-43", far),
            ("auto", "40-43", far),
        ],
    );
}

/// A sidecar in a separate container sees all GPUs of the machine and can open none of them.
#[test]
fn auto_ignores_gpus_that_cannot_be_opened() {
    let mut topology = read(EIGHT_GPUS);
    topology.gpus_open = false;
    let plan = |text| plan(&topology, &cpus("0-127"), text).unwrap().seats[0].to_string();
    assert_eq!(plan("auto"), "CPU 127 (node 1)");
    assert_eq!(plan("near:gpu0-3"), "CPU 95 (node 0, near gpu0-3)");
}

#[test]
fn a_shared_set_of_cpus_is_that_of_the_gpus_node() {
    let eight = read(EIGHT_GPUS);
    let mut one = read(ONE_GPU);
    one.isolated = cpus("24-31");
    let mut closed = eight.clone();
    closed.gpus_open = false;
    for (name, topology, allowed, want) in [
        (
            "both nodes",
            &eight,
            "0-127",
            "CPU 0-31,64-95 (node 0, near gpu0-3)",
        ),
        (
            "one node",
            &eight,
            "40-50",
            "CPU 40-50 (node 1, near gpu4-7)",
        ),
        (
            "a part of a node",
            &eight,
            "30-33",
            "CPU 30-31 (node 0, near gpu0-3)",
        ),
        (
            "one CPU of the node",
            &eight,
            "31-63",
            "CPU 32-63 (node 1, near gpu4-7)",
        ),
        ("one CPU of each node", &eight, "31,63", "unpinned"),
        ("no GPU is open", &closed, "0-127", "unpinned"),
        (
            "without isolated",
            &one,
            "0-23",
            "CPU 0-23 (node 0, near gpu0 0000:41:00.0)",
        ),
        (
            "isolated",
            &one,
            "0-31",
            "CPU 31 (node 0, near gpu0 0000:41:00.0)",
        ),
    ] {
        let usable = ProcessCpus {
            allowed: cpus(allowed),
            ..ProcessCpus::default()
        };
        let plan = plan_cores(&Cores::Auto, &usable, topology, |_| true).unwrap();
        assert_eq!(plan.seats[0].to_string(), want, "{name}");
        assert!(plan.warnings.is_empty(), "{name}");
    }
}

#[test]
fn a_quota_unpins_only_with_auto() {
    let topology = read(ONE_GPU);
    let seats = |text: &str, quota| {
        let usable = ProcessCpus {
            allowed: cpus("2-31"),
            quota: Some(quota),
            own_set: true,
        };
        let plan = plan_cores(&text.parse().unwrap(), &usable, &topology, |_| true).unwrap();
        let cpus = plan.seats.iter().map(|seat| format_cpus(&seat.cpus));
        (cpus.collect::<Vec<_>>().join(" "), plan.warnings.len())
    };
    assert_eq!(seats("auto", 0.5), ("2-31".to_owned(), 0));
    assert_eq!(seats("auto", 29.0), ("2-31".to_owned(), 0));
    assert_eq!(seats("auto", 30.0), ("31".to_owned(), 0));
    assert_eq!(seats("near:gpu0", 0.5), ("31".to_owned(), 1));
    assert_eq!(seats("numa:0*2", 1.5), ("31 30".to_owned(), 1));
    assert_eq!(seats("numa:0*2", 2.0), ("31 30".to_owned(), 0));
}

/// Returns a random number below `bound` (Marsaglia's xorshift), the same numbers on every run.
fn random(state: &mut u64, bound: usize) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 11) as usize % bound
}

/// Checks the properties of the result of `choose` that can be computed in another way: the number
/// of CPUs, the number of cores, and whether the core of CPU 0 was needed.
#[test]
fn no_core_is_shared_while_one_is_free() {
    let mut state = 0x9e37_79b9_7f4a_7c15;
    for round in 0..2000 {
        let threads = 1 + random(&mut state, 3);
        let cores_count = 1 + random(&mut state, 8);
        let core = |core: usize| (0..threads).map(|t| core + t * cores_count).collect();
        let topology = Topology {
            online: (0..cores_count * threads).collect(),
            cores: (0..cores_count).map(core).collect(),
            ..Topology::default()
        };
        let allowed: Vec<_> = topology
            .online
            .iter()
            .copied()
            .filter(|_| random(&mut state, 4) > 0)
            .collect();
        let spots: Vec<_> = (0..1 + random(&mut state, 3))
            .map(|_| Spot {
                near: String::new(),
                cpus: topology
                    .online
                    .iter()
                    .copied()
                    .filter(|_| random(&mut state, 3) > 0)
                    .collect(),
                known: true,
            })
            .collect();
        let shards = 1 + random(&mut state, 10);
        let chosen = choose(&spots, shards, &allowed, &topology);

        let usable =
            |cpu: &usize| allowed.contains(cpu) && spots.iter().any(|spot| spot.cpus.contains(cpu));
        let usable: Vec<_> = topology.online.iter().copied().filter(usable).collect();
        let distinct = |cpus: &[usize]| {
            let cores = cpus.iter().map(|cpu| cpu % cores_count);
            std::collections::BTreeSet::from_iter(cores)
        };
        let picked: Vec<_> = chosen.iter().map(|(_, cpu)| *cpu).collect();
        let case = format!("round {round}: {picked:?} of {usable:?}, {cores_count} cores");
        assert_eq!(picked.len(), shards.min(usable.len()), "{case}");
        assert_eq!(
            std::collections::BTreeSet::from_iter(&picked).len(),
            picked.len(),
            "{case}"
        );
        assert!(picked.iter().all(|cpu| usable.contains(cpu)), "{case}");
        assert!(
            chosen
                .iter()
                .all(|(spot, cpu)| spots[*spot].cpus.contains(cpu)),
            "{case}"
        );
        let (own, all) = (distinct(&picked), distinct(&usable));
        assert_eq!(own.len(), shards.min(all.len()), "{case}");
        let others = all.iter().filter(|core| **core != 0).count();
        assert_eq!(
            own.contains(&0),
            all.contains(&0) && shards > others,
            "{case}"
        );
    }
}
