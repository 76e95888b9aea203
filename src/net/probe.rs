//! Which driver this machine lets us use.

use std::io;

/// How readiness reaches a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// io_uring with `DEFER_TASKRUN`, `SINGLE_ISSUER` and `COOP_TASKRUN`.
    Uring,
    /// epoll, where io_uring is refused.
    Epoll,
}

impl Driver {
    /// The name in logs and metrics.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Uring => "io_uring",
            Self::Epoll => "epoll",
        }
    }
}

/// The flags the shards' rings are built with. Without `DEFER_TASKRUN` a request costs 19-33 %
/// more CPU (measured), so a kernel that refuses one of them gets epoll instead of a slower ring.
#[must_use]
pub fn ring_builder() -> io_uring::Builder {
    let mut builder = io_uring::IoUring::builder();
    builder
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_coop_taskrun()
        // Work that the kernel has deferred shows as a flag, without a system call.
        .setup_taskrun_flag()
        .setup_cqsize(COMPLETIONS);
    builder
}

/// Entries of a shard's submission queue.
pub const RING_ENTRIES: u32 = 256;
/// Entries of its completion queue. When more events come at once, polls end and are begun anew.
const COMPLETIONS: u32 = 4096;

/// Tries the exact ring the shards will use, and one no-op through it: a filter may allow the
/// set-up call and refuse the others.
///
/// # Errors
/// Whatever the kernel refused the ring with (`EPERM` under seccomp or `io_uring_disabled`,
/// `EINVAL` for flags older than the kernel, `ENOMEM` under a small memlock limit).
pub fn probe_ring() -> io::Result<()> {
    let mut ring = ring_builder().build(RING_ENTRIES)?;
    let no_op = io_uring::opcode::Nop::new().build().user_data(1);
    push_no_op(&mut ring, &no_op)?;
    ring.submit_and_wait(1)?;
    match ring.completion().next() {
        Some(entry) if entry.result() >= 0 => Ok(()),
        Some(entry) => Err(io::Error::from_raw_os_error(-entry.result())),
        None => Err(io::Error::other("the ring gave no completion")),
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
    fn probing_twice_gives_the_same_response() {
        assert_eq!(super::probe_ring().is_ok(), super::probe_ring().is_ok());
    }
}
