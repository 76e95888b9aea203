//! Whether other programs use the CPUs that a measurement needs.
//!
//! A look is the difference between two samples of the kernel's counters, taken while this tool and
//! the programs that it measures are idle, so that all CPU time in between belongs to others. The
//! decisions are pure functions over looks.

use std::fs;
use std::io;
use std::time::Duration;

use rustix::param::clock_ticks_per_second;

use crate::limits::{
    BUSY_CPUS_SHARE_MAX, BUSY_LOOKS_SHARE_MAX, CPUS_NEEDED, PROGRAM_CPUS_MIN, PROGRAMS_NAMED_MAX,
    STEAL_SHARE_MAX,
};
use crate::socket::{Poll, monotonic_ns};

/// CPU time since the start of the machine, in ticks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ticks {
    busy: u64,
    stolen: u64,
    total: u64,
}

impl Ticks {
    /// Parses the numbers of a `cpuN` line of `/proc/stat`: user, nice, system, idle, iowait, irq,
    /// softirq, steal (proc(5)). The guest times after them are part of user and nice.
    fn parse(numbers: &str) -> Option<Self> {
        let mut all = [0; 8];
        let mut texts = numbers.split_ascii_whitespace();
        for number in &mut all {
            *number = texts.next()?.parse().ok()?;
        }
        let [user, nice, system, _, _, irq, softirq, stolen] = all;
        Some(Self {
            busy: user + nice + system + irq + softirq,
            stolen,
            total: all.iter().sum(),
        })
    }

    /// Returns the ticks since `earlier`. Idle time may decrease by a tick on some kernels.
    const fn since(self, earlier: Self) -> Self {
        Self {
            busy: self.busy.saturating_sub(earlier.busy),
            stolen: self.stolen.saturating_sub(earlier.stolen),
            total: self.total.saturating_sub(earlier.total),
        }
    }
}

/// The CPU time of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Process {
    pid: u32,
    name: String,
    ticks: u64,
}

impl Process {
    /// Parses `/proc/PID/stat`. The name is in parentheses and may itself contain them.
    fn parse(text: &str) -> Option<Self> {
        let (pid, rest) = text.split_once(" (")?;
        let (name, rest) = rest.rsplit_once(") ")?;
        // Fields 14 and 15, utime and stime; the state after the name is field 3.
        let mut times = rest.split_ascii_whitespace().skip(11);
        let mut next = || times.next()?.parse::<u64>().ok();
        Some(Self {
            pid: pid.parse().ok()?,
            name: name.to_owned(),
            ticks: next()? + next()?,
        })
    }
}

/// The kernel's counters at one time.
#[derive(Clone, Debug, Default)]
struct Sample {
    /// The CPUs that this process may use.
    cpus: Vec<(usize, Ticks)>,
    /// All processes that are visible, except this one.
    processes: Vec<Process>,
    at_ns: u64,
}

impl Sample {
    /// Samples at the start of a look. The list of processes takes milliseconds to read, which must
    /// not count as time of other programs, so the counters of the CPUs are read after it.
    fn first() -> Self {
        let processes = processes();
        Self {
            processes,
            ..Self::of_cpus()
        }
    }

    /// Samples at the end of a look: the counters of the CPUs are read first.
    fn last() -> Self {
        let sample = Self::of_cpus();
        Self {
            processes: processes(),
            ..sample
        }
    }

    fn of_cpus() -> Self {
        let allowed = core_affinity::get_core_ids().unwrap_or_default();
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let cpus = cpus(&stat).filter(|(cpu, _)| allowed.iter().any(|core| core.id == *cpu));
        Self {
            cpus: cpus.collect(),
            processes: Vec::new(),
            at_ns: monotonic_ns(),
        }
    }
}

fn processes() -> Vec<Process> {
    let own = std::process::id();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbered = entries.filter(|entry| {
        let name = entry.file_name();
        name.to_str()
            .is_some_and(|name| name.parse::<u32>().is_ok())
    });
    // A process may end while the folder is read.
    let texts = numbered.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    let all = texts.filter_map(|text| Process::parse(&text));
    all.filter(|process| process.pid != own).collect()
}

/// Returns the CPUs in the text of `/proc/stat` with their times.
fn cpus(stat: &str) -> impl Iterator<Item = (usize, Ticks)> + '_ {
    stat.lines().filter_map(|line| {
        let (number, rest) = line.strip_prefix("cpu")?.split_once(' ')?;
        Some((number.parse().ok()?, Ticks::parse(rest)?))
    })
}

/// A program that used CPU time.
#[derive(Clone, Debug, PartialEq)]
pub struct Program {
    /// Name as reported by the kernel, at most 15 bytes.
    pub name: String,
    /// Process id.
    pub pid: u32,
    /// CPUs that it used; 1.0 is one whole CPU.
    pub cpus: f64,
}

/// How much CPU time other programs used while a run was idle.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Look {
    /// Number of CPUs that this process may use; 0 if the kernel provides no counters.
    pub cpus: usize,
    /// CPUs of these that other programs used; 1.0 is one whole CPU.
    pub used: f64,
    /// The CPU of `--cpu` and the share of it that other programs used.
    pub pinned: Option<(usize, f64)>,
    /// Share of the CPU time that the hypervisor gave to other machines (steal).
    pub stolen: f64,
    /// The programs that used most, in descending order. Those in other PID namespaces are missing.
    pub programs: Vec<Program>,
}

impl Look {
    /// Observes other programs for `time`. This process and those that it measures must be idle.
    ///
    /// # Errors
    /// If the timer fails.
    pub fn take(time: Duration, pinned: Option<usize>) -> io::Result<Self> {
        let before = Sample::first();
        // Without sockets, it waits for the whole time.
        Poll::new()?.wait(time, &mut Vec::new())?;
        let after = Sample::last();
        Ok(Self::between(
            &before,
            &after,
            pinned,
            clock_ticks_per_second(),
        ))
    }

    fn between(before: &Sample, after: &Sample, pinned: Option<usize>, hertz: u64) -> Self {
        let (mut used, mut pinned_share) = (0.0, None);
        let (mut stolen, mut total) = (0, 0);
        for (cpu, ticks) in &after.cpus {
            let earlier = before.cpus.iter().find(|(other, _)| other == cpu);
            let spent = ticks.since(earlier.map_or(*ticks, |(_, ticks)| *ticks));
            let share = spent.busy as f64 / spent.total.max(1) as f64;
            used += share;
            stolen += spent.stolen;
            total += spent.total;
            if pinned == Some(*cpu) {
                pinned_share = Some((*cpu, share));
            }
        }
        let elapsed_ticks =
            after.at_ns.saturating_sub(before.at_ns) as f64 / 1e9 * hertz.max(1) as f64;
        let mut programs: Vec<Program> = (after.processes.iter())
            .filter_map(|process| {
                let earlier = before.processes.iter().find(|it| it.pid == process.pid);
                let ticks = process.ticks - earlier.map_or(0, |it| it.ticks.min(process.ticks));
                (ticks > 0).then(|| Program {
                    name: process.name.clone(),
                    pid: process.pid,
                    cpus: ticks as f64 / elapsed_ticks.max(1.0),
                })
            })
            .collect();
        programs.sort_by(|a, b| b.cpus.total_cmp(&a.cpus));
        programs.truncate(PROGRAMS_NAMED_MAX);
        Self {
            cpus: after.cpus.len(),
            used,
            pinned: pinned_share,
            stolen: stolen as f64 / total.max(1) as f64,
            programs,
        }
    }

    /// Returns how many CPUs a measurement on this machine needs: one each for the client, the
    /// engine and a proxy, as far as the machine has them.
    #[must_use]
    pub fn needed(&self) -> usize {
        self.cpus.min(CPUS_NEEDED)
    }

    /// Returns why the machine is too busy to measure; `None` if it is not. Other programs may use
    /// all CPUs that the measurement does not need.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        let (needed, percent) = (self.needed(), BUSY_CPUS_SHARE_MAX * 100.0);
        let taken = self.used - (self.cpus - needed) as f64;
        let mut reason = if taken > needed as f64 * BUSY_CPUS_SHARE_MAX {
            format!(
                "other programs use {:.2} of {} CPUs, and the measurement needs {needed} (limit: \
                 {percent:.0} % of these)",
                self.used, self.cpus
            )
        } else if let Some((cpu, share)) = self.pinned
            && share > BUSY_CPUS_SHARE_MAX
        {
            format!(
                "other programs use {:.0} % of CPU {cpu} (--cpu; limit: {percent:.0} %)",
                share * 100.0
            )
        } else if self.stolen > STEAL_SHARE_MAX {
            return Some(format!(
                "other machines on this host take {:.1} % of the CPU time (steal; limit: {:.0} %)",
                self.stolen * 100.0,
                STEAL_SHARE_MAX * 100.0
            ));
        } else {
            return None;
        };
        let programs = self
            .programs
            .iter()
            .filter(|it| it.cpus >= PROGRAM_CPUS_MIN);
        let programs = programs.map(|it| format!("{} (pid {}) {:.2}", it.name, it.pid, it.cpus));
        let programs: Vec<String> = programs.collect();
        if !programs.is_empty() {
            reason = format!("{reason}: {}", programs.join(", "));
        }
        Some(reason)
    }
}

/// Returns why a run does not allow a conclusion, from the look before it and those during it;
/// `None` if it does. A few busy looks during a long run are accepted.
#[must_use]
pub fn disturbance(before: &Look, during: &[Look]) -> Option<String> {
    if let Some(reason) = before.reason() {
        return Some(format!("before the run, {reason}"));
    }
    let busy = || during.iter().filter(|look| look.reason().is_some());
    let count = busy().count();
    if count as f64 <= during.len() as f64 * BUSY_LOOKS_SHARE_MAX {
        return None;
    }
    let worst = busy().max_by(|a, b| a.used.total_cmp(&b.used))?;
    Some(format!(
        "in {count} of {} looks during the run, other programs used too much; at worst, {}",
        during.len(),
        worst.reason()?
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "cpu  10 0 10 100 0 0 0 4 0 0\n\
                        cpu0 5 1 3 50 2 1 1 2 9 9\ncpu1 5 0 5 50 0 0 0 2 0 0\nintr 5 6\n";

    #[test]
    fn counters_are_parsed() {
        let found: Vec<_> = cpus(STAT).collect();
        let first = Ticks {
            busy: 11,
            stolen: 2,
            total: 65,
        };
        assert_eq!(found[0], (0, first));
        assert_eq!((found.len(), found[1].0), (2, 1));
        assert_eq!(cpus("cpu0 1 2 3\ncpux 1\n").count(), 0);
        let text = "42 (a) b (c)) S 1 2 3 4 5 6 7 8 9 10 30 12 0 0 20 0";
        let want = Process {
            pid: 42,
            name: "a) b (c)".to_owned(),
            ticks: 42,
        };
        assert_eq!(Process::parse(text), Some(want));
        assert_eq!(Process::parse("42 (a) S 1 2"), None);
    }

    #[test]
    fn a_look_is_the_difference_of_two_samples() {
        let ticks = |busy, stolen, total| Ticks {
            busy,
            stolen,
            total,
        };
        let process = |pid, name: &str, ticks| Process {
            pid,
            name: name.to_owned(),
            ticks,
        };
        let before = Sample {
            cpus: vec![(0, ticks(100, 0, 200)), (1, ticks(0, 0, 200))],
            processes: vec![process(7, "a", 50), process(8, "b", 3)],
            at_ns: 0,
        };
        let after = Sample {
            cpus: vec![(0, ticks(150, 0, 300)), (1, ticks(10, 20, 300))],
            processes: vec![process(7, "a", 60), process(8, "b", 3), process(9, "c", 40)],
            at_ns: 1_000_000_000,
        };
        let look = Look::between(&before, &after, Some(1), 100);
        assert_eq!((look.cpus, look.pinned), (2, Some((1, 0.1))));
        assert!((look.used - 0.6).abs() < 1e-9 && (look.stolen - 0.1).abs() < 1e-9);
        let named: Vec<_> = look.programs.iter().map(|it| (it.pid, it.cpus)).collect();
        assert_eq!(named, [(9, 0.4), (7, 0.1)]);
    }

    fn look(cpus: usize, used: f64) -> Look {
        Look {
            cpus,
            used,
            ..Look::default()
        }
    }

    #[test]
    fn only_the_cpus_that_the_measurement_needs_count() {
        let pinned = |share| Look {
            pinned: Some((3, share)),
            ..look(8, 0.5)
        };
        let stolen = |share| Look {
            stolen: share,
            ..look(2, 0.0)
        };
        for (look, want) in [
            (look(2, 0.0), None),
            (look(2, 0.19), None),
            (
                look(2, 0.5),
                Some("use 0.50 of 2 CPUs, and the measurement needs 2"),
            ),
            (
                look(1, 0.2),
                Some("use 0.20 of 1 CPUs, and the measurement needs 1"),
            ),
            (look(8, 5.2), None),
            (
                look(8, 5.4),
                Some("use 5.40 of 8 CPUs, and the measurement needs 3"),
            ),
            (look(0, 0.0), None),
            (pinned(0.05), None),
            (pinned(0.5), Some("use 50 % of CPU 3 (--cpu; limit: 10 %)")),
            (stolen(0.01), None),
            (
                stolen(0.05),
                Some("take 5.0 % of the CPU time (steal; limit: 2 %)"),
            ),
        ] {
            let found = look.reason();
            match want {
                None => assert_eq!(found, None, "{look:?}"),
                Some(part) => assert!(found.unwrap().contains(part), "{look:?}"),
            }
        }
        let named = Look {
            programs: vec![Program {
                name: "rustc".to_owned(),
                pid: 5,
                cpus: 1.25,
            }],
            ..look(2, 1.3)
        };
        let reason = named.reason().unwrap();
        assert!(reason.ends_with(": rustc (pid 5) 1.25"), "{reason}");
    }

    #[test]
    fn a_run_is_disturbed_before_it_or_by_more_than_a_few_looks() {
        let (idle, full) = (look(2, 0.0), look(2, 2.0));
        let during = |busy: usize, all: usize| {
            let mut looks = vec![full.clone(); busy];
            looks.resize(all, idle.clone());
            disturbance(&idle, &looks)
        };
        assert_eq!(during(0, 0), None);
        assert_eq!(during(0, 5), None);
        assert_eq!(during(1, 10), None);
        let found = during(1, 1).unwrap();
        assert!(
            found.starts_with("in 1 of 1 looks during the run"),
            "{found}"
        );
        assert!(
            found.contains("at worst, other programs use 2.00 of 2 CPUs"),
            "{found}"
        );
        assert!(during(3, 10).is_some());
        let found = disturbance(&full, &[]).unwrap();
        assert!(
            found.starts_with("before the run, other programs use"),
            "{found}"
        );
    }

    #[test]
    fn this_machine_has_counters() {
        let look = Look::take(Duration::from_millis(30), Some(0)).unwrap();
        assert!(look.cpus > 0, "{look:?}");
        assert!(
            look.used >= 0.0 && look.used <= look.cpus as f64,
            "{look:?}"
        );
    }
}
