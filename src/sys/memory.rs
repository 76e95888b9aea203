//! The memory that the allocator holds.

/// Returns the allocator's free memory to the system. glibc keeps what a peak of large requests
/// took, up to 64 MiB per thread and more between blocks in use. Other threads' allocations wait
/// meanwhile, a few milliseconds per 100 MiB. Does nothing with another C library.
pub fn release_free_memory() {
    #[cfg(target_env = "gnu")]
    #[expect(unsafe_code, reason = "a function of the C library")]
    {
        // SAFETY: the function has no preconditions and may be called by any thread.
        unsafe { libc::malloc_trim(0) };
    }
}
