//! Samples of the proxy's process from `/proc`, and whether the process grows.

use std::fs;
use std::io;
use std::time::Duration;

use crate::limits::{
    DESCRIPTORS_GROWTH_MAX, RSS_GROWTH_BYTES_MAX, RSS_GROWTH_SHARE_MAX, SAMPLE_MS_MAX, SAMPLES_MIN,
    SOAK_WARMUP_S_MAX, WINDOW_S_MAX, WINDOW_SAMPLES_MIN,
};

/// The state of the process at one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sample {
    /// Time since the start of the run, in nanoseconds.
    pub at_ns: u64,
    /// Resident set in bytes.
    pub rss_bytes: u64,
    /// Number of open descriptors.
    pub descriptors: u64,
    /// CPU time, user and system, since the process started, in nanoseconds.
    pub cpu_ns: u64,
}

/// Reads the current state of the process `pid`; `at_ns` is stored as the sample's time.
///
/// # Errors
/// If there is no such process, or it belongs to another user.
pub fn sample(pid: u32, at_ns: u64) -> io::Result<Sample> {
    let of = |name: &str| format!("/proc/{pid}/{name}");
    let malformed = |name: &str| io::Error::other(format!("{} has an unexpected format", of(name)));
    let status = fs::read_to_string(of("status"))?;
    let stat = fs::read_to_string(of("stat"))?;
    let mut descriptors = 0;
    for entry in fs::read_dir(of("fd"))? {
        entry?;
        descriptors += 1;
    }
    Ok(Sample {
        at_ns,
        rss_bytes: rss_bytes(&status).ok_or_else(|| malformed("status"))?,
        descriptors,
        cpu_ns: cpu_ns(&stat, rustix::param::clock_ticks_per_second())
            .ok_or_else(|| malformed("stat"))?,
    })
}

/// Returns `VmRSS` from the text of `/proc/PID/status`, in bytes; `None` if it is missing or
/// malformed.
fn rss_bytes(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Returns the sum of fields 14 and 15 (user and system time) of `/proc/PID/stat`, in nanoseconds;
/// `None` if they are missing or malformed. Parsing starts after the last `)`, because the second
/// field is a name in parentheses that may contain any characters.
fn cpu_ns(stat: &str, ticks_per_second: u64) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace().skip(11);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    let both = ticks()?.checked_add(ticks()?)?;
    both.checked_mul(1_000_000_000 / ticks_per_second.max(1))
}

/// When a run of a given length is sampled, and which parts of it are compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Time between two samples.
    pub every: Duration,
    /// Time before the first window.
    pub warmup: Duration,
    /// Length of the first and of the last window.
    pub window: Duration,
}

impl Windows {
    /// Returns the windows for a run of length `run`. A run of five minutes or more is sampled
    /// every two seconds; its first minute is warm-up, and its second and last minutes are
    /// compared. In a shorter run these times are fractions of its length.
    #[must_use]
    pub fn of(run: Duration) -> Self {
        Self {
            every: (run / SAMPLES_MIN as u32).min(Duration::from_millis(SAMPLE_MS_MAX)),
            warmup: (run / 5).min(Duration::from_secs(SOAK_WARMUP_S_MAX)),
            window: (run / 4).min(Duration::from_secs(WINDOW_S_MAX)),
        }
    }
}

/// The course of one property of the process (resident set or number of descriptors) over a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trend {
    /// Median of the property in the first window, which follows the warm-up.
    pub first: u64,
    /// Median of the property in all samples after the warm-up.
    pub median: u64,
    /// Maximum of the property in all samples, including those of the warm-up.
    pub max: u64,
    /// Median of the property in the last window, at the end of the run.
    pub last: u64,
    /// Largest value of `last` at which the property counts as flat, that is as not growing.
    pub last_max: u64,
}

impl Trend {
    /// Returns whether the property did not grow beyond the tolerance, `last_max`.
    #[must_use]
    pub const fn is_flat(&self) -> bool {
        self.last <= self.last_max
    }
}

/// The result of comparing the samples of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// The course of the resident set, in bytes.
    pub rss: Trend,
    /// The course of the number of open descriptors.
    pub descriptors: Trend,
}

/// Judges the samples of a run that ended at `end_ns`; returns `None` if a window contains fewer
/// than [`WINDOW_SAMPLES_MIN`] samples.
#[must_use]
pub fn judge(samples: &[Sample], windows: Windows, end_ns: u64) -> Option<Judgement> {
    let ns = crate::precision::nanos;
    let (warmup, window) = (ns(windows.warmup), ns(windows.window));
    let course = |of: fn(&Sample) -> u64, last_max: fn(u64) -> u64| {
        let median_of = |from: u64, to: u64| {
            let within = |sample: &&Sample| (from..=to).contains(&sample.at_ns);
            let mut values: Vec<u64> = samples.iter().filter(within).map(of).collect();
            values.sort_unstable();
            let enough = values.len() >= WINDOW_SAMPLES_MIN;
            enough.then(|| values[(values.len() - 1) / 2])
        };
        let first = median_of(warmup, warmup.saturating_add(window))?;
        Some(Trend {
            first,
            median: median_of(warmup, end_ns)?,
            max: samples.iter().map(of).max()?,
            last: median_of(end_ns.saturating_sub(window), end_ns)?,
            last_max: last_max(first),
        })
    };
    Some(Judgement {
        rss: course(
            |sample| sample.rss_bytes,
            |first| first + (first as f64 * RSS_GROWTH_SHARE_MAX) as u64 + RSS_GROWTH_BYTES_MAX,
        )?,
        descriptors: course(
            |sample| sample.descriptors,
            |first| first + DESCRIPTORS_GROWTH_MAX,
        )?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files_are_parsed() {
        let status = "Name:\tx\nVmHWM:\t   99 kB\nVmRSS:\t   1234 kB\nThreads:\t1\n";
        assert_eq!(rss_bytes(status), Some(1234 * 1024));
        assert_eq!(rss_bytes("Name:\tx\n"), None);
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 25 17 3 4 20 0 1 0 5 6";
        assert_eq!(cpu_ns(stat, 100), Some(420_000_000));
        assert_eq!(cpu_ns("7 (x", 100), None);
        assert_eq!(cpu_ns("7 (x) S 1", 100), None);
    }

    #[test]
    fn a_process_can_sample_itself() {
        let own = sample(std::process::id(), 3).unwrap();
        assert!(own.rss_bytes > 100_000 && own.descriptors > 2, "{own:?}");
        assert_eq!(own.at_ns, 3);
        assert!(sample(u32::MAX, 0).is_err());
    }

    #[test]
    fn windows_fit_into_short_and_long_runs() {
        let secs = Duration::from_secs;
        for (run, every, warmup, window) in [
            (secs(3600), secs(2), secs(60), secs(60)),
            (secs(300), secs(2), secs(60), secs(60)),
            (secs(60), secs(1), secs(12), secs(15)),
            (
                secs(3),
                Duration::from_millis(50),
                Duration::from_millis(600),
                Duration::from_millis(750),
            ),
        ] {
            let got = Windows::of(run);
            let want = Windows {
                every,
                warmup,
                window,
            };
            assert_eq!(got, want, "{run:?}");
            assert!(got.warmup + got.window * 2 <= run, "{run:?}");
        }
    }

    /// Judges a run of ten minutes with one sample per second. `of` returns the resident set and
    /// the descriptors for each second.
    fn judged(of: impl Fn(u64) -> (u64, u64)) -> Judgement {
        let samples: Vec<Sample> = (0..600)
            .map(|at| {
                let (rss_bytes, descriptors) = of(at);
                Sample {
                    at_ns: at * 1_000_000_000,
                    rss_bytes,
                    descriptors,
                    cpu_ns: 0,
                }
            })
            .collect();
        let run = Duration::from_secs(600);
        judge(&samples, Windows::of(run), 600_000_000_000).unwrap()
    }

    #[test]
    fn growth_is_distinguished_from_warm_up_and_peaks() {
        const MIB: u64 = 1024 * 1024;
        type Of = fn(u64) -> (u64, u64);
        let cases: [(Of, bool, bool); 6] = [
            (|_| (100 * MIB, 50), true, true),
            // Growth only during the warm-up.
            (|at| ((40 + at.min(60)) * MIB, 2 + at.min(60)), true, true),
            // A peak late in the run.
            (
                |at| match at {
                    570..590 => (900 * MIB, 5_000),
                    _ => (100 * MIB, 50),
                },
                true,
                true,
            ),
            (|at| (100 * MIB + at * MIB / 60, 50), false, true),
            (|at| (100 * MIB, 50 + at / 20), true, false),
            // Growth within the tolerance.
            (|at| (100 * MIB + at * MIB / 120, 50 + at / 60), true, true),
        ];
        for (nth, (of, rss, descriptors)) in cases.into_iter().enumerate() {
            let got = judged(of);
            let flat = (got.rss.is_flat(), got.descriptors.is_flat());
            assert_eq!(flat, (rss, descriptors), "{nth}: {got:?}");
        }
        let peak = judged(|at| (if at == 30 { 9 } else { 5 }, 1));
        assert_eq!((peak.rss.max, peak.rss.median), (9, 5));
        assert_eq!(peak.rss.last_max, 5 + RSS_GROWTH_BYTES_MAX);
    }

    #[test]
    fn too_few_samples_are_not_judged() {
        let windows = Windows::of(Duration::from_secs(600));
        assert_eq!(judge(&[], windows, 600_000_000_000), None);
        let early = [Sample::default(); 10];
        assert_eq!(judge(&early, windows, 600_000_000_000), None);
    }
}
