//! The limit on open files.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit on open files of this process. `None` means unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLimit {
    /// The limit that is in effect.
    pub soft: Option<u64>,
    /// The maximum to which the soft limit can be raised.
    pub hard: Option<u64>,
}

/// Raises the soft limit on open files to the hard limit, and returns the limit now in effect. The
/// soft limit defaults to 1024 on most systems because of `select`, which is not used here.
///
/// # Errors
/// The error with which the kernel refused the new limit. The old limit remains in effect.
pub fn raise_nofile() -> io::Result<FileLimit> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            maximum: limit.maximum,
        },
    )?;
    Ok(FileLimit {
        soft: limit.maximum,
        hard: limit.maximum,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_raised_to_the_hard_limit() {
        let limit = raise_nofile().unwrap();
        assert_eq!(limit.soft, limit.hard);
        assert_eq!(getrlimit(Resource::Nofile).current, limit.hard);
    }
}
