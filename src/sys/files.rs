//! Reading files that other programs write, and the limit on open files.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Reason why a file was not read.
#[derive(Debug)]
pub enum ReadError {
    /// It is a directory, a named pipe or another kind of file that is not regular.
    NotRegular,
    /// It is longer than allowed.
    TooLarge,
    /// The kernel's error.
    Io(io::Error),
}

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Reads a regular file of at most `bytes_max` bytes. Does not wait for the writer of a named pipe.
/// A network file system that hangs makes it wait.
///
/// # Errors
/// The file is not regular, too large, or cannot be read.
pub fn read_regular(path: &Path, bytes_max: u64) -> Result<Vec<u8>, ReadError> {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)?;
    if !file.metadata()?.is_file() {
        return Err(ReadError::NotRegular);
    }
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > bytes_max {
        return Err(ReadError::TooLarge);
    }
    Ok(bytes)
}

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
    fn only_regular_files_are_read_and_none_is_waited_for() {
        let path = std::env::temp_dir().join(format!("ringside-read-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, b"12345").unwrap();
        assert_eq!(read_regular(&path, 5).unwrap(), b"12345");
        assert!(matches!(read_regular(&path, 4), Err(ReadError::TooLarge)));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(read_regular(&path, 5), Err(ReadError::Io(_))));
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &path, kind, mode, 0).unwrap();
        assert!(matches!(read_regular(&path, 5), Err(ReadError::NotRegular)));
        std::fs::remove_file(&path).unwrap();
        let folder = std::env::temp_dir();
        assert!(matches!(
            read_regular(&folder, 5),
            Err(ReadError::NotRegular)
        ));
    }

    #[test]
    fn the_soft_limit_is_raised_to_the_hard_limit() {
        let limit = raise_nofile().unwrap();
        assert_eq!(limit.soft, limit.hard);
        assert_eq!(getrlimit(Resource::Nofile).current, limit.hard);
    }
}
