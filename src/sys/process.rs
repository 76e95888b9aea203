//! Resource usage of this process, for the metrics. Values that cannot be read from `/proc/self`
//! are zero.

use std::fs;

/// Current resource usage of this process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Number of open file descriptors.
    pub open_fds: u64,
    /// Soft limit on open file descriptors; `u64::MAX` if unlimited.
    pub max_fds: u64,
    /// Resident memory in bytes.
    pub resident_bytes: u64,
    /// CPU time used by all threads since the start of the process, in microseconds.
    pub cpu_micros: u64,
}

/// Reads the current usage. Blocks on `/proc`, so it must not run on a shard.
#[must_use]
pub fn usage() -> Usage {
    let cpu = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let micros = |value: i64, per: u64| u64::try_from(value).unwrap_or(0).saturating_mul(per);
    Usage {
        open_fds: fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64),
        max_fds: rustix::process::getrlimit(rustix::process::Resource::Nofile)
            .current
            .unwrap_or(u64::MAX),
        resident_bytes: fs::read_to_string("/proc/self/status")
            .ok()
            .and_then(|text| resident(&text))
            .unwrap_or(0),
        cpu_micros: micros(cpu.tv_sec, 1_000_000) + micros(cpu.tv_nsec, 1) / 1_000,
    }
}

/// Returns the resident memory in bytes: `VmRSS` from the text of `/proc/self/status`, where it is
/// in KiB although the unit reads `kB`. `None` if the line is missing or not valid.
fn resident(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_is_read() {
        let status = "Name:\tringside\nVmHWM:\t  9 kB\nVmRSS:\t    5120 kB\n";
        assert_eq!(resident(status), Some(5 << 20));
        assert_eq!(resident("Name:\tx\n"), None);
    }

    #[test]
    fn usage_of_this_process_is_nonzero() {
        let usage = usage();
        assert!(usage.open_fds > 0);
        assert!(usage.max_fds >= usage.open_fds);
        assert!(usage.resident_bytes > 0);
    }
}
