//! A seccomp filter that refuses io_uring, as the profiles of container runtimes do.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Makes `io_uring_setup` fail with `errno` in the program that `command` starts.
#[expect(
    unsafe_code,
    reason = "the filter applies to the child only, so it is installed between fork and exec"
)]
pub(crate) fn refuse_ring(command: &mut Command, errno: i32) {
    let filter = filter(u32::try_from(errno).unwrap());
    // SAFETY: the closure makes two system calls and accesses only memory that was allocated before
    // the fork; it takes no lock and allocates nothing.
    unsafe { command.pre_exec(move || install(&filter)) };
}

/// Returns a filter that fails `io_uring_setup` with `errno` and allows every other call. It does
/// not check the architecture, because the tested binary makes only native system calls.
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
    // SAFETY: all arguments are integers. An unprivileged process may install a filter only after
    // this call.
    let allowed = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if allowed != 0 {
        return Err(io::Error::last_os_error());
    }
    let program: *const libc::sock_fprog = &raw const program;
    // SAFETY: `program` and the filter it points to are valid until the call returns; the kernel
    // copies them and does not write to them.
    let installed =
        unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, program) };
    if installed == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
