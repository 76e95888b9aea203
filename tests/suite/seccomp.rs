//! A kernel that refuses io_uring, as containers' seccomp profiles do.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes `io_uring_setup` fail with `errno` in the program that is about to be started.
#[expect(
    unsafe_code,
    reason = "the filter belongs to the child, so it is installed between fork and exec"
)]
pub(crate) fn refuse_ring(command: &mut Command, errno: i32) {
    let filter = filter(u32::try_from(errno).unwrap());
    // SAFETY: the closure makes two system calls and touches nothing but memory made before the
    // fork; it takes no lock and allocates nothing.
    unsafe { command.pre_exec(move || install(&filter)) };
}

/// "If the call is `io_uring_setup`, fail with `errno`; else go on." A process of another
/// architecture's calls is not expected here, so the architecture is not looked at.
fn filter(errno: u32) -> [libc::sock_filter; 4] {
    let statement = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap(),
        jt,
        jf,
        k,
    };
    let call = u32::try_from(libc::SYS_io_uring_setup).unwrap();
    [
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, call),
        statement(
            libc::BPF_RET | libc::BPF_K,
            0,
            0,
            libc::SECCOMP_RET_ERRNO | errno,
        ),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
}

#[expect(unsafe_code, reason = "no safe interface installs a filter")]
fn install(filter: &[libc::sock_filter; 4]) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: 4,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: plain numbers; without this an unprivileged process may not install a filter.
    let allowed = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if allowed != 0 {
        return Err(io::Error::last_os_error());
    }
    let program: *const libc::sock_fprog = &raw const program;
    // SAFETY: `program` and the filter it points to live until the call has returned; the kernel
    // copies them and does not write.
    let installed =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, program) };
    if installed == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
