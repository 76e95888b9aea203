//! The precision of the client, and the machine it runs on.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;

use crate::limits::SELF_CHECKS;
use crate::units::date;

/// Largest value of a histogram: one day. Longer times are recorded as this value.
const HISTOGRAM_NS_MAX: u64 = 24 * 3600 * 1_000_000_000;

/// Returns an empty histogram of nanoseconds with two significant digits. All its memory is
/// allocated here, because growing it later would take longer than the times to be measured.
///
/// # Errors
/// Never for these bounds; the library's constructor always returns a `Result`.
pub fn histogram() -> io::Result<Histogram<u64>> {
    Histogram::new_with_max(HISTOGRAM_NS_MAX, 2).map_err(io::Error::other)
}

/// How precisely this client can measure times on this machine, determined before the run.
#[derive(Clone, Copy, Debug, Default)]
pub struct Precision {
    /// Median time between two consecutive readings of the clock, in nanoseconds.
    pub clock_ns: u64,
    /// Median time to send one byte over loopback and receive it in the same thread, in
    /// nanoseconds: a lower bound of the delay of a timestamp.
    pub loopback_p50_ns: u64,
    /// The 99th percentile of the time whose median is `loopback_p50_ns`.
    pub loopback_p99_ns: u64,
}

impl Precision {
    /// Measures the precision, which takes about ten milliseconds. Call this on the measuring
    /// thread.
    ///
    /// # Errors
    /// If a loopback socket fails.
    pub fn measure() -> io::Result<Self> {
        let mut clock = Vec::with_capacity(SELF_CHECKS);
        for _ in 0..SELF_CHECKS {
            clock.push(nanos(Instant::now().elapsed()));
        }
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let mut near = TcpStream::connect(listener.local_addr()?)?;
        let (mut far, _) = listener.accept()?;
        near.set_nodelay(true)?;
        // A precaution only: loopback does not lose bytes.
        far.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut trips = Vec::with_capacity(SELF_CHECKS);
        for _ in 0..SELF_CHECKS {
            let begun = Instant::now();
            near.write_all(b"x")?;
            far.read_exact(&mut [0])?;
            trips.push(nanos(begun.elapsed()));
        }
        clock.sort_unstable();
        trips.sort_unstable();
        Ok(Self {
            clock_ns: clock[SELF_CHECKS / 2],
            loopback_p50_ns: trips[SELF_CHECKS / 2],
            loopback_p99_ns: trips[SELF_CHECKS * 99 / 100],
        })
    }
}

/// Converts to nanoseconds, limited to [`u64::MAX`].
#[must_use]
pub fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Scheduler statistics of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SchedStat {
    /// Nanoseconds during which the thread was ready to run but not running.
    pub waited_ns: u64,
    /// Number of times the thread was scheduled on a CPU.
    pub runs: u64,
}

impl SchedStat {
    /// Reads the statistics of the calling thread; `None` if the kernel does not provide them.
    #[must_use]
    pub fn read() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/thread-self/schedstat").ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split_ascii_whitespace().skip(1);
        let mut next = || numbers.next()?.parse().ok();
        Some(Self {
            waited_ns: next()?,
            runs: next()?,
        })
    }

    /// Returns the statistics of the period since `earlier` was read.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self {
            waited_ns: self.waited_ns.saturating_sub(earlier.waited_ns),
            runs: self.runs.saturating_sub(earlier.runs),
        }
    }
}

/// Machine and date of a run.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    /// Host name.
    pub host: String,
    /// CPU model as reported by the kernel.
    pub cpu: String,
    /// Number of CPUs available to the process.
    pub cpus: usize,
    /// Kernel release.
    pub kernel: String,
    /// Load averages of 1, 5 and 15 minutes at the start.
    pub load_at_start: String,
    /// Date and time at the start, in UTC, such as `2026-11-20T12:00:00Z`.
    pub date: String,
}

impl Machine {
    /// Reads the values from the kernel and the clock; a text that the kernel does not provide is
    /// `unknown`.
    #[must_use]
    pub fn read() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            host: first_line("/proc/sys/kernel/hostname"),
            cpu: cpu_model(&cpuinfo),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            kernel: first_line("/proc/sys/kernel/osrelease"),
            load_at_start: load_average(),
            date: date(since_1970.map_or(0, |time| time.as_secs())),
        }
    }
}

/// Returns the load averages of 1, 5 and 15 minutes, separated by spaces; `unknown` if the kernel
/// does not provide them.
#[must_use]
pub fn load_average() -> String {
    let line = first_line("/proc/loadavg");
    let three: Vec<&str> = line.split(' ').take(3).collect();
    three.join(" ")
}

const UNKNOWN: &str = "unknown";

fn cpu_model(cpuinfo: &str) -> String {
    let line = cpuinfo.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        (name.trim() == "model name").then(|| value.trim().to_owned())
    });
    line.unwrap_or_else(|| UNKNOWN.to_owned())
}

fn first_line(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().next().unwrap_or_default().trim();
    if line.is_empty() { UNKNOWN } else { line }.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scheduler_statistics() {
        let stat = SchedStat::parse("18489032 45388 12\n").unwrap();
        assert_eq!((stat.waited_ns, stat.runs), (45_388, 12));
        let later = SchedStat {
            waited_ns: 50_000,
            runs: 13,
        };
        assert_eq!(
            later.since(stat),
            SchedStat {
                waited_ns: 4_612,
                runs: 1
            }
        );
        assert_eq!(SchedStat::parse("1 2"), None);
        assert_eq!(SchedStat::parse(""), None);
    }

    #[test]
    fn histograms_keep_two_digits() {
        let mut times = histogram().unwrap();
        for ns in [0, 7, 123_456, 60_000_000_000, u64::MAX] {
            times.saturating_record(ns);
        }
        assert_eq!(times.len(), 5);
        let median = times.value_at_quantile(0.5);
        assert!((122_000..125_000).contains(&median), "{median}");
        assert!(times.max() >= HISTOGRAM_NS_MAX);
    }

    #[test]
    fn machines_are_described() {
        let text = "processor\t: 0\nmodel name\t: AMD EPYC 9654: x\nmodel name\t: other\n";
        assert_eq!(cpu_model(text), "AMD EPYC 9654: x");
        assert_eq!(cpu_model("BogoMIPS : 50\n"), UNKNOWN);
        assert_eq!(first_line("/nothing/here"), UNKNOWN);
    }

    #[test]
    fn the_client_measures_its_own_precision() {
        let precision = Precision::measure().unwrap();
        assert!(precision.loopback_p50_ns > 0);
        assert!(precision.loopback_p50_ns <= precision.loopback_p99_ns);
    }
}
