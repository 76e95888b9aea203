//! The log file: replaced by a new one when it reaches a size, with a few older files kept.

use std::fs::{File, OpenOptions};
use std::io::{self, Write, stderr};
use std::path::{Path, PathBuf};

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
        if is_full || self.file.is_none() {
            self.file = None;
            if is_full {
                self.rename()?;
            }
            let (file, bytes) = open(&self.path)?;
            (self.file, self.bytes) = (Some(file), bytes);
        }
        if let Some(file) = &mut self.file {
            file.write_all(line)?;
            self.bytes += line.len() as u64;
        }
        Ok(())
    }

    /// Renames the file to `FILE.1`, and older ones to the next number. The oldest is replaced.
    fn rename(&self) -> io::Result<()> {
        for number in (1..KEPT_MAX).rev() {
            match std::fs::rename(self.numbered(number), self.numbered(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
        }
        std::fs::rename(&self.path, self.numbered(1))
    }

    fn numbered(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        PathBuf::from(name)
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
                        "log file {path}: {error}; lines are lost until writing succeeds again"
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
        std::fs::remove_dir_all(&folder).unwrap();
        // The folder is gone, and nothing fails.
        drop(file);
        assert!(RotatedFile::open(&config).is_err());
    }
}
