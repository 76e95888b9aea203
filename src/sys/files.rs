//! The limit of open files.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limit of open files; `None` is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLimit {
    /// What holds now.
    pub soft: Option<u64>,
    /// What the soft limit can be raised to.
    pub hard: Option<u64>,
}

/// Raises the soft limit of open files to the hard one. Shells set the soft one to 1024 for the
/// sake of `select`, which nothing here uses.
///
/// # Errors
/// The kernel's; the old limit holds then.
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
    fn the_soft_limit_is_the_hard_one() {
        let limit = raise_nofile().unwrap();
        assert_eq!(limit.soft, limit.hard);
        assert_eq!(getrlimit(Resource::Nofile).current, limit.hard);
    }
}
