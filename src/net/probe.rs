//! Detects whether this process may use io_uring, and defines the settings of the shards' rings.

use std::io;

/// The kernel interface that reports readiness to a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// io_uring with `DEFER_TASKRUN`, `SINGLE_ISSUER` and `COOP_TASKRUN`.
    Uring,
    /// epoll, used where io_uring is refused.
    Epoll,
}

impl Driver {
    /// Returns the name used in logs and metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Uring => "io_uring",
            Self::Epoll => "epoll",
        }
    }
}

/// Returns a builder with the flags and the completion queue size of a shard's io_uring instance.
/// Without `DEFER_TASKRUN` a request costs 19-33 % more CPU (measured), so a kernel that refuses
/// one of the flags gets epoll instead of a slower ring.
#[must_use]
pub fn ring_builder() -> io_uring::Builder {
    let mut builder = io_uring::IoUring::builder();
    builder
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        // Reports deferred work in a flag of the ring, which is read without a system call.
        .setup_taskrun_flag()
        .setup_cqsize(COMPLETIONS);
    builder
}

/// Number of entries of the submission queue of a shard's io_uring instance.
pub const RING_ENTRIES: u32 = 256;
/// Number of entries of the completion queue of a shard's io_uring instance. If more events arrive
/// in one iteration of the event loop, the kernel ends multishot polls, which are then armed again.
pub(super) const COMPLETIONS: u32 = 4096;

/// Checks that this process may use io_uring: builds a ring exactly as the shards will, and runs
/// one no-op through it, because a seccomp filter may allow the set-up call and refuse the others.
///
/// # Errors
/// The error with which the kernel refused the ring: `EPERM` under seccomp or `io_uring_disabled`,
/// `EINVAL` for flags that the kernel does not support yet, `ENOMEM` under a small memlock limit.
pub fn probe_ring() -> io::Result<()> {
    let mut ring = ring_builder().build(RING_ENTRIES)?;
    let no_op = io_uring::opcode::Nop::new().build().user_data(1);
    push_no_op(&mut ring, &no_op)?;
    ring.submit_and_wait(1)?;
    match ring.completion().next() {
        Some(entry) if entry.result() >= 0 => Ok(()),
        Some(entry) => Err(io::Error::from_raw_os_error(-entry.result())),
        None => Err(io::Error::other("the ring returned no completion")),
    }
}

#[expect(unsafe_code, reason = "the submission queue takes raw entries")]
fn push_no_op(ring: &mut io_uring::IoUring, entry: &io_uring::squeue::Entry) -> io::Result<()> {
    let mut queue = ring.submission();
    // SAFETY: a no-op refers to no memory, so the entry stays valid for the whole operation.
    let pushed = unsafe { queue.push(entry) };
    pushed.map_err(|_| io::Error::other("the submission queue is full"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn probing_twice_returns_the_same_result() {
        assert_eq!(super::probe_ring().is_ok(), super::probe_ring().is_ok());
    }
}
