//! Notifies a caller when the files of a directory may have changed.
//!
//! The watch is on the directory, not on a file: a ConfigMap or Secret volume is updated by
//! swapping a symbolic link in its directory, and editors replace a file by renaming a new one over
//! it. The caller reads the files and compares their contents, since notifications may be spurious.
//! Notifications also come at intervals, for changes that inotify does not report: on network file
//! systems, in other directories that symbolic links lead to, or when the system's inotify limits
//! are reached.

use std::io;
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::time::Duration;

use rustix::fd::OwnedFd;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use crate::limits::{
    WATCH_POLL_SECS, WATCH_READ_BYTES, WATCH_RETRY_SECS, WATCH_SETTLE_MS, WATCH_SETTLE_MS_MAX,
};

/// The number of times that all files were asked to be read again.
static ASKED: LazyLock<watch::Sender<u64>> = LazyLock::new(|| watch::Sender::new(0));

/// Makes every [`DirWatch`] notify, as if something in its directory had changed.
pub(super) fn read_again() {
    ASKED.send_modify(|asked| *asked += 1);
}

/// A watched directory. Watching starts in `new`, so no change after it is missed: read the files
/// afterwards.
#[derive(Debug)]
pub(super) struct DirWatch {
    directory: PathBuf,
    events: Option<Events>,
    asked: watch::Receiver<u64>,
}

/// An inotify instance with one watch.
#[derive(Debug)]
struct Events {
    inotify: AsyncFd<OwnedFd>,
}

impl DirWatch {
    /// Starts watching. If that fails, logs a warning, and notifies at intervals only until a later
    /// attempt to watch succeeds. Must be called inside the control plane's runtime.
    pub(super) fn new(directory: &Path) -> Self {
        let mut watch = Self {
            directory: directory.to_owned(),
            events: None,
            asked: ASKED.subscribe(),
        };
        if let Err(error) = watch_directory(directory).and_then(|fd| watch.follow(fd)) {
            let directory = watch.directory.display();
            tracing::warn!(
                "{directory} cannot be watched: {error}; checking it every {WATCH_RETRY_SECS} s"
            );
        }
        watch
    }

    /// Watches the directory that contains `file`.
    pub(super) fn around(file: &Path) -> Self {
        match file.parent() {
            Some(directory) if !directory.as_os_str().is_empty() => Self::new(directory),
            Some(_) | None => Self::new(Path::new(".")),
        }
    }

    /// Waits for an event in the directory, and then until it has been quiet for
    /// [`WATCH_SETTLE_MS`], at most until [`WATCH_SETTLE_MS_MAX`] after the first event. Returns
    /// immediately after [`read_again`]. Without an event, returns after [`WATCH_POLL_SECS`], or
    /// after [`WATCH_RETRY_SECS`] if the directory is not being watched.
    pub(super) async fn changed(&mut self) {
        let look_secs = match self.events {
            Some(_) => WATCH_POLL_SECS,
            None => WATCH_RETRY_SECS,
        };
        let mut asked = self.asked.clone();
        tokio::select! {
            () = self.event() => self.settle().await,
            // The sender is never dropped.
            _ = asked.changed() => {}
            () = sleep(Duration::from_secs(look_secs)) => {}
        }
        self.asked.mark_unchanged();
        if self.events.is_none() {
            // Start watching before the caller reads, so that no change in between is missed. The
            // directory may be on a mount that hangs.
            let directory = self.directory.clone();
            let watching = tokio::task::spawn_blocking(move || watch_directory(&directory));
            if let Ok(Ok(inotify)) = watching.await {
                let _ = self.follow(inotify);
            }
        }
    }

    async fn settle(&mut self) {
        let end = Instant::now() + Duration::from_millis(WATCH_SETTLE_MS_MAX);
        loop {
            let quiet = Instant::now() + Duration::from_millis(WATCH_SETTLE_MS);
            let until = quiet.min(end);
            if timeout_at(until, self.event()).await.is_err() || Instant::now() >= end {
                return;
            }
        }
    }

    /// Waits for an inotify event, forever if the directory is not being watched. Drops the watch
    /// if the directory was removed, moved or unmounted.
    async fn event(&mut self) {
        let lost = match &self.events {
            Some(events) => events.next().await,
            None => std::future::pending().await,
        };
        if lost {
            self.events = None;
        }
    }

    #[expect(
        unsafe_code,
        reason = "`AsyncFd` requires the caller to keep the descriptor open and the same"
    )]
    fn follow(&mut self, inotify: OwnedFd) -> io::Result<()> {
        // SAFETY: the `AsyncFd` owns the descriptor, which is not replaced during its lifetime.
        let inotify = unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE) };
        let inotify = inotify.map_err(io::Error::from)?;
        self.events = Some(Events { inotify });
        Ok(())
    }
}

/// Returns an inotify instance that watches `directory`.
fn watch_directory(directory: &Path) -> io::Result<OwnedFd> {
    let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let what = WatchFlags::CREATE
        | WatchFlags::CLOSE_WRITE
        | WatchFlags::MOVED_TO
        | WatchFlags::MOVED_FROM
        | WatchFlags::DELETE
        | WatchFlags::DELETE_SELF
        | WatchFlags::MOVE_SELF
        | WatchFlags::ONLYDIR;
    inotify::add_watch(&inotify, directory, what)?;
    Ok(inotify)
}

impl Events {
    /// Waits for events and reads all that are pending. Returns `true` if the watch has ended, so
    /// that no more will follow.
    async fn next(&self) -> bool {
        loop {
            let Ok(mut ready) = self.inotify.readable().await else {
                return true;
            };
            if let Some(lost) = take(self.inotify.get_ref()) {
                return lost;
            }
            ready.clear_ready();
        }
    }
}

/// Reads all pending events. Returns `None` if there were none, otherwise whether the watch on the
/// directory has ended.
fn take(inotify: &OwnedFd) -> Option<bool> {
    let mut buffer = [MaybeUninit::uninit(); WATCH_READ_BYTES];
    let mut reader = Reader::new(inotify, &mut buffer);
    let end = ReadFlags::IGNORED | ReadFlags::MOVE_SELF | ReadFlags::UNMOUNT;
    let mut seen = None;
    loop {
        match reader.next() {
            Ok(event) => seen = Some(seen == Some(true) || event.events().intersects(end)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return seen,
            // A working inotify instance returns no other error.
            Err(_) => return Some(true),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::task::Poll;

    /// Time within which the tests expect a notification. It is shorter than the interval
    /// [`WATCH_POLL_SECS`], so a notification within this time was caused by an event.
    const DEADLINE: Duration = Duration::from_secs(WATCH_POLL_SECS / 2);

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let name = format!("ringside-watch-{}-{name}", std::process::id());
            let path = std::env::temp_dir().join(name);
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(path.join("in")).unwrap();
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn run(test: impl AsyncFnOnce()) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build();
        runtime.unwrap().block_on(test());
    }

    async fn expect_change(watch: &mut DirWatch) {
        let waited = tokio::time::timeout(DEADLINE, watch.changed()).await;
        assert!(waited.is_ok(), "no event within the deadline");
    }

    async fn expect_quiet(watch: &mut DirWatch) {
        let mut changed = std::pin::pin!(watch.changed());
        let once = std::future::poll_fn(|cx| Poll::Ready(changed.as_mut().poll(cx))).await;
        assert!(once.is_pending());
    }

    #[test]
    fn simultaneous_changes_are_reported_once() {
        run(async || {
            let folder = Folder::new("together");
            let file = folder.0.join("in/rules");
            let mut watch = DirWatch::around(&file);
            expect_quiet(&mut watch).await;
            fs::write(&file, "a").unwrap();
            fs::write(&file, "b").unwrap();
            fs::write(folder.0.join("in/other"), "").unwrap();
            expect_change(&mut watch).await;
            expect_quiet(&mut watch).await;
            fs::rename(folder.0.join("in/other"), &file).unwrap();
            expect_change(&mut watch).await;
            fs::remove_file(&file).unwrap();
            expect_change(&mut watch).await;
        });
    }

    #[test]
    fn an_update_of_a_config_map_is_noticed() {
        run(async || {
            let folder = Folder::new("swap");
            let at = |name: &str| folder.0.join("in").join(name);
            for version in ["..1", "..2"] {
                fs::create_dir(at(version)).unwrap();
                fs::write(at(version).join("rules"), version).unwrap();
            }
            symlink("..1", at("..data")).unwrap();
            symlink("..data/rules", at("rules")).unwrap();
            let mut watch = DirWatch::around(&at("rules"));
            symlink("..2", at("..data_tmp")).unwrap();
            fs::rename(at("..data_tmp"), at("..data")).unwrap();
            expect_change(&mut watch).await;
            assert_eq!(fs::read_to_string(at("rules")).unwrap(), "..2");
            expect_quiet(&mut watch).await;
        });
    }

    #[test]
    fn a_directory_that_is_replaced_is_watched_again() {
        run(async || {
            let folder = Folder::new("replaced");
            let inner = folder.0.join("in");
            let mut watch = DirWatch::new(&inner);
            fs::rename(&inner, folder.0.join("old")).unwrap();
            fs::create_dir(&inner).unwrap();
            expect_change(&mut watch).await;
            fs::write(inner.join("rules"), "").unwrap();
            expect_change(&mut watch).await;
            fs::remove_dir_all(&inner).unwrap();
            expect_change(&mut watch).await;
            assert!(watch.events.is_none());
            // Checked at intervals until the directory exists again.
            fs::create_dir(&inner).unwrap();
            expect_change(&mut watch).await;
            assert!(watch.events.is_some());
        });
    }

    #[test]
    fn a_directory_that_cannot_be_watched_is_checked_at_intervals() {
        run(async || {
            let folder = Folder::new("missing");
            let mut watch = DirWatch::new(&folder.0.join("in/missing"));
            assert!(watch.events.is_none());
            expect_change(&mut watch).await;
        });
    }
}
