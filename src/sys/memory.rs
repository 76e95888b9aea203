//! The memory that the allocator holds.

#[cfg(all(target_env = "gnu", target_pointer_width = "64"))]
use crate::limits::ALLOCATOR_FREE_BYTES_MAX;

/// Makes the allocator keep the memory of freed bodies for the next ones. Does nothing with another
/// C library than glibc on 64 bits, or if the environment sets the allocator's parameters.
///
/// glibc adapts its thresholds to what is freed, but with the first body of a size, and with
/// several bodies at a time, it returns each to the system and faults its pages in again. A split
/// request with a body of 256 KiB takes 187 us of CPU time that way, and 110 us without.
pub fn keep_freed_memory() {
    #[cfg(all(target_env = "gnu", target_pointer_width = "64"))]
    {
        let is_set = |name: &str| std::env::var_os(name).is_some();
        let names = ["MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"];
        let tunables = std::env::var("GLIBC_TUNABLES").unwrap_or_default();
        if names.into_iter().any(is_set) || tunables.contains("glibc.malloc.") {
            return;
        }
        for parameter in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
            #[expect(unsafe_code, reason = "a function of the C library")]
            // SAFETY: the function has no preconditions and may be called by any thread.
            unsafe {
                libc::mallopt(parameter, ALLOCATOR_FREE_BYTES_MAX);
            }
        }
    }
}

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
