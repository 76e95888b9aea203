//! The log file: replaced by a new one when it reaches a size, with a few older files kept.

use std::fs::{File, OpenOptions};
use std::io::{self, Write, stderr};
use std::path::{Path, PathBuf};

use super::log_queue::Output;
use crate::config::LogFile;

/// Renamed files that are kept.
const KEPT_MAX: u32 = 4;

/// A log file that is renamed when it reaches its maximum size. Writing never fails: what cannot be
/// written is lost, and standard error reports the first loss.
pub(super) struct RotatedFile {
    path: PathBuf,
    bytes_max: u64,
    file: Option<File>,
    bytes: u64,
    has_failed: bool,
}

impl RotatedFile {
    /// Opens the file, to append to it.
    pub(super) fn open(config: &LogFile) -> io::Result<Self> {
        let (file, bytes) = open(&config.path)?;
        Ok(Self {
            path: config.path.clone(),
            bytes_max: config.bytes_max,
            file: Some(file),
            bytes,
            has_failed: false,
        })
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        let is_full = self.bytes > 0 && self.bytes + line.len() as u64 > self.bytes_max;
        let renamed = if is_full { self.rename() } else { Ok(()) };
        if is_full || self.file.is_none() {
            self.file = None;
            let (file, bytes) = open(&self.path)?;
            self.file = Some(file);
            // A file that cannot be renamed grows on; the next attempt follows as many bytes later.
            self.bytes = if renamed.is_ok() { bytes } else { 0 };
        }
        if let Some(file) = &mut self.file {
            file.write_all(line)?;
            self.bytes += line.len() as u64;
        }
        renamed
    }

    /// Renames the file to `FILE.1`, and older ones to the next number. The oldest is replaced. A
    /// file that another process has removed or renamed is no error. If the file itself cannot be
    /// renamed, the older ones keep their names.
    fn rename(&self) -> io::Result<()> {
        let aside = self.numbered(0);
        if !is_renamed(&self.path, &aside)? {
            return Ok(());
        }
        for number in (0..KEPT_MAX).rev() {
            is_renamed(&self.numbered(number), &self.numbered(number + 1))?;
        }
        Ok(())
    }

    fn numbered(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        PathBuf::from(name)
    }
}

impl Output for RotatedFile {
    /// Another program may have renamed the file.
    fn reopen(&mut self) {
        self.file = None;
        // Its size is read when it is opened.
        self.bytes = 0;
    }
}

impl Write for RotatedFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.append(line) {
            Ok(()) => self.has_failed = false,
            Err(error) => {
                if !self.has_failed {
                    let path = self.path.display();
                    let _ = writeln!(
                        stderr(),
                        "log file {path}: {error}; it is not rotated, or lines are lost, until this \
                         succeeds"
                    );
                }
                self.has_failed = true;
            }
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Renames a file. Returns `false` if there is no such file.
fn is_renamed(from: &Path, to: &Path) -> io::Result<bool> {
    match std::fs::rename(from, to) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn open(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().create(true).append(true).open(path)?;
    let bytes = file.metadata()?.len();
    Ok((file, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_is_renamed_and_four_old_ones_are_kept() {
        let folder = std::env::temp_dir().join(format!("ringside-log-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("x.log");
        let config = LogFile {
            path,
            bytes_max: 10,
        };
        let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap_or_default();
        let mut file = RotatedFile::open(&config).unwrap();
        file.write_all(b"1234\n").unwrap();
        file.write_all(b"5678\n").unwrap();
        assert_eq!(read("x.log"), "1234\n5678\n");
        // A process that is started again appends.
        drop(file);
        let mut file = RotatedFile::open(&config).unwrap();
        file.write_all(b"a line longer than the maximum\n").unwrap();
        assert_eq!(read("x.log.1"), "1234\n5678\n");
        for line in ["b\n", "c is long\n", "d is long\n", "e is long\n"] {
            file.write_all(line.as_bytes()).unwrap();
        }
        assert_eq!(read("x.log"), "e is long\n");
        assert_eq!(read("x.log.1"), "d is long\n");
        assert_eq!(read("x.log.3"), "b\n");
        assert_eq!(read("x.log.4"), "a line longer than the maximum\n");
        assert_eq!(read("x.log.5"), "");
        // Another process removes the file.
        std::fs::remove_file(&config.path).unwrap();
        file.write_all(b"f is long\n").unwrap();
        assert_eq!(read("x.log"), "f is long\n");
        // The file cannot be renamed: it grows, and no older one is lost.
        let obstacle = folder.join("x.log.0");
        std::fs::create_dir_all(obstacle.join("full")).unwrap();
        let older = read("x.log.1");
        for _ in 0..10 {
            file.write_all(b"kept\n").unwrap();
        }
        assert!(
            read("x.log").ends_with(&"kept\n".repeat(10)),
            "{}",
            read("x.log")
        );
        assert_eq!(read("x.log.1"), older);
        std::fs::remove_dir_all(&obstacle).unwrap();
        for _ in 0..3 {
            file.write_all(b"again\n").unwrap();
        }
        assert_ne!(read("x.log.1"), older);
        std::fs::remove_dir_all(&folder).unwrap();
        // The folder is gone, and nothing fails.
        drop(file);
        assert!(RotatedFile::open(&config).is_err());
    }
}
