//! The limits that control groups set for this process: its CPU quota and its set of CPUs.

use std::fs;
use std::path::{Path, PathBuf};

/// Returns the CPU quota (cgroup) of this process in CPUs: 0.5 is half a CPU. `None` if no quota is
/// set or none can be read.
pub(super) fn cpu_quota() -> Option<f64> {
    cpu_quota_in(Path::new("/"))
}

/// Like [`cpu_quota`], with the root of the file system as a parameter for tests.
///
/// Quotas of parent groups apply too, so the smallest one is returned. In a container without a
/// separate cgroup namespace, the path in `/proc/self/cgroup` does not exist below the mount. In
/// that case, the files at the root of the mount are those of this process.
fn cpu_quota_in(root: &Path) -> Option<f64> {
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

/// Names of programs that start another one in a container and do nothing else.
const INITS: [&str; 5] = ["tini", "dumb-init", "docker-init", "catatonit", "pause"];

/// Returns whether CPUs are assigned to this process alone: its control group (version 2) has a set
/// of CPUs (`cpuset.cpus`) and contains no other process, except an init that started this one.
///
/// That is a container with exclusive CPUs, or a systemd service with `AllowedCPUs=`, in which
/// nothing else runs. It is not a job of a batch system, in which the engine runs as well. A
/// process that is started later, and another group with the same CPUs, are not visible from here.
pub(super) fn has_own_cpuset() -> bool {
    let parent = std::os::unix::process::parent_id();
    has_own_cpuset_in(Path::new("/"), std::process::id(), parent)
}

fn has_own_cpuset_in(root: &Path, process: u32, parent: u32) -> bool {
    let membership = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let Some(path) = membership
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
    else {
        return false;
    };
    let mount = root.join("sys/fs/cgroup");
    let mut directory = mount.join(path);
    if path.split('/').any(|name| name == "..") || !directory.is_dir() {
        directory = mount;
    }
    let read = |name| fs::read_to_string(directory.join(name)).unwrap_or_default();
    let processes = read("cgroup.procs");
    let is_init = || {
        let name = fs::read_to_string(root.join(format!("proc/{parent}/comm")));
        name.is_ok_and(|name| INITS.contains(&name.trim_end()))
    };
    let is_own = |line: &str| {
        let number = line.parse();
        // 0 is listed for a process of another PID namespace.
        number == Ok(process) || parent != 0 && number == Ok(parent) && is_init()
    };
    !read("cpuset.cpus").trim().is_empty() && !processes.is_empty() && processes.lines().all(is_own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::topology::tests::Tree;

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
    fn a_set_of_cpus_is_own_if_nothing_else_runs_in_the_group() {
        const SERVICE: &str = "sys/fs/cgroup/system.slice/ringside.service";
        let in_service = "0::/system.slice/ringside.service\n";
        let root = "sys/fs/cgroup";
        for (name, membership, directory, cpus, processes, want) in [
            ("service", in_service, SERVICE, Some("4-7"), "20\n", true),
            (
                "started by init",
                "0::/\n",
                root,
                Some("2,4"),
                "1\n20\n",
                true,
            ),
            (
                "started by a shell",
                "0::/\n",
                root,
                Some("2,4"),
                "7\n20\n",
                false,
            ),
            ("hidden path", "0::/pod/x\n", root, Some("2"), "20\n", true),
            (
                "outside the mount",
                "0::/../x\n",
                root,
                Some("2"),
                "20\n",
                true,
            ),
            (
                "with an engine",
                "0::/job\n",
                root,
                Some("2"),
                "20\n21\n",
                false,
            ),
            (
                "a process of another namespace",
                "0::/\n",
                root,
                Some("2"),
                "0\n20\n",
                false,
            ),
            ("no set", in_service, SERVICE, Some("\n"), "20\n", false),
            ("root group", "0::/\n", root, None, "1\n20\n", false),
            ("no list of processes", "0::/\n", root, Some("2"), "", false),
            ("version 1", "3:cpuset:/a\n", root, Some("2"), "20\n", false),
        ] {
            let tree = Tree::new([
                ("proc/self/cgroup", membership),
                (&*format!("{directory}/cgroup.procs"), processes),
                ("proc/1/comm", "tini\n"),
                ("proc/7/comm", "sh\n"),
                ("proc/0/comm", "tini\n"),
            ]);
            if let Some(cpus) = cpus {
                fs::write(tree.0.join(directory).join("cpuset.cpus"), cpus).unwrap();
            }
            let parent = match name {
                "started by a shell" => 7,
                "a process of another namespace" => 0,
                _ => 1,
            };
            assert_eq!(has_own_cpuset_in(&tree.0, 20, parent), want, "{name}");
        }
        assert!(!has_own_cpuset_in(Path::new("/no/such/root"), 20, 1));
    }
}
