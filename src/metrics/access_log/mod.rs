//! The access log: one JSON line per request, written by a separate thread.
//!
//! A shard pushes a fixed-size [`Record`] into its own wait-free ring, and one thread empties all
//! rings every 50 ms. If a ring is full, the record is dropped and the shard counts it: a slow disk
//! costs log lines, not latency. A record has no field that could hold a prompt or credentials.

mod line;
mod record;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

pub(crate) use line::text as push_text;
pub use record::{EndedAt, EndedBy, Inline, Record};

use crate::config::AccessLog;

/// Number of records that one shard's ring can hold, about 2.5 MiB in total. With a sweep every 50
/// ms this suffices for 80,000 requests per second and shard.
const RING_RECORDS: usize = 4096;
/// Time between two sweeps. In a sweep, the writer thread writes the records of all rings.
const SWEEP: Duration = Duration::from_millis(50);
/// Number of bytes of formatted lines at which a sweep writes them to the log's destination. The
/// remaining lines are written at the end of the sweep.
const BATCH_BYTES: usize = 64 * 1024;
/// Number of sweeps between two checks whether the log file has been rotated: about one second.
const SWEEPS_PER_LOOK: u32 = 20;

/// The sending side of the access log; one per shard.
#[derive(Debug)]
pub struct AccessRing {
    producer: rtrb::Producer<Record>,
}

impl AccessRing {
    /// Queues a record without blocking. Returns `false` if the ring was full and the record is
    /// lost.
    pub fn push(&mut self, record: Record) -> bool {
        self.producer.push(record).is_ok()
    }
}

/// Handle to the thread that writes the access log.
#[derive(Debug)]
pub struct AccessWriter {
    stop: Arc<AtomicBool>,
    reopen: Arc<AtomicBool>,
    /// Number of records since the start that were written, or failed to be, which was logged.
    handled: Arc<AtomicU64>,
    thread: JoinHandle<()>,
    /// Disconnected when the thread ends.
    ended: mpsc::Receiver<()>,
}

impl AccessWriter {
    /// Makes the thread open the log file again, if its path refers to another one.
    pub fn reopen(&self) {
        self.reopen.store(true, Ordering::Release);
        self.thread.thread().unpark();
    }

    /// Stops the thread once it has written the records left in the rings, and waits for it, at
    /// most for `wait`. Returns the number of records that it has handled since the start.
    #[must_use]
    pub fn finish(self, wait: Duration) -> u64 {
        self.stop.store(true, Ordering::Release);
        self.thread.thread().unpark();
        // Nothing is ever sent.
        let _ = self.ended.recv_timeout(wait);
        self.handled.load(Ordering::Acquire)
    }
}

/// Starts the access log. Returns one ring per shard and the handle to the writing thread, or
/// `None` if the log is off.
///
/// # Errors
/// Returns an error if the file cannot be opened or the thread cannot be started.
pub fn start(
    target: &AccessLog,
    shards: usize,
) -> io::Result<Option<(Vec<AccessRing>, AccessWriter)>> {
    let sink = match target {
        AccessLog::Off => return Ok(None),
        AccessLog::Stdout => Sink::Stdout,
        AccessLog::Stderr => Sink::Stderr,
        AccessLog::File(path) => Sink::File(RotatedFile::open(path.clone())?),
    };
    let (producers, consumers): (Vec<_>, Vec<_>) = (0..shards)
        .map(|_| rtrb::RingBuffer::new(RING_RECORDS))
        .map(|(producer, consumer)| (AccessRing { producer }, consumer))
        .unzip();
    let handled = Arc::new(AtomicU64::new(0));
    let stop = Arc::new(AtomicBool::new(false));
    let mut writer = Writer {
        consumers,
        sink,
        batch: Vec::with_capacity(BATCH_BYTES + line::BYTES_MAX),
        batched: 0,
        handled: Arc::clone(&handled),
        failing: false,
    };
    let stopped = Arc::clone(&stop);
    let reopen = Arc::new(AtomicBool::new(false));
    let reopens = Arc::clone(&reopen);
    let (running, ended) = mpsc::channel();
    let thread = thread::Builder::new()
        .name("access-log".to_owned())
        .spawn(move || {
            let _running: mpsc::Sender<()> = running;
            writer.run(&stopped, &reopens);
        })?;
    let writer = AccessWriter {
        stop,
        reopen,
        handled,
        thread,
        ended,
    };
    Ok(Some((producers, writer)))
}

enum Sink {
    Stdout,
    Stderr,
    File(RotatedFile),
}

struct Writer {
    consumers: Vec<rtrb::Consumer<Record>>,
    sink: Sink,
    batch: Vec<u8>,
    /// Records in `batch`.
    batched: u64,
    handled: Arc<AtomicU64>,
    /// Whether the last write failed, so that an outage is logged only once.
    failing: bool,
}

impl Writer {
    fn run(&mut self, stop: &AtomicBool, reopen: &AtomicBool) {
        let mut sweeps = 0_u32;
        loop {
            // Read the flag before the sweep: the sweep then covers all records pushed before the
            // stop.
            let last = stop.load(Ordering::Acquire);
            self.sweep();
            if last {
                return;
            }
            sweeps = sweeps.wrapping_add(1);
            let looks = sweeps.is_multiple_of(SWEEPS_PER_LOOK);
            if (reopen.swap(false, Ordering::AcqRel) || looks)
                && let Sink::File(file) = &mut self.sink
            {
                file.follow();
            }
            thread::park_timeout(SWEEP);
        }
    }

    fn sweep(&mut self) {
        for index in 0..self.consumers.len() {
            // At most one ring's capacity, so that a busy shard does not delay the others.
            for _ in 0..RING_RECORDS {
                let Ok(record) = self.consumers[index].pop() else {
                    break;
                };
                line::write(&record, &mut self.batch);
                self.batched += 1;
                if self.batch.len() >= BATCH_BYTES {
                    self.flush();
                }
            }
        }
        self.flush();
    }

    fn flush(&mut self) {
        if self.batch.is_empty() {
            return;
        }
        let written = match &mut self.sink {
            Sink::Stdout => write_all(&mut io::stdout().lock(), &self.batch),
            Sink::Stderr => write_all(&mut io::stderr().lock(), &self.batch),
            Sink::File(file) => file.file.write_all(&self.batch),
        };
        self.batch.clear();
        let count = std::mem::take(&mut self.batched);
        self.handled.fetch_add(count, Ordering::AcqRel);
        if let Err(error) = &written
            && !self.failing
        {
            tracing::warn!(%error, "access log write failed; lines are lost until writing succeeds again");
        }
        self.failing = written.is_err();
    }
}

fn write_all(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    out.write_all(bytes)?;
    out.flush()
}

/// A log file that is reopened when its path refers to another file, as after `logrotate`.
struct RotatedFile {
    path: PathBuf,
    file: File,
}

impl RotatedFile {
    fn open(path: PathBuf) -> io::Result<Self> {
        let file = append(&path)?;
        Ok(Self { path, file })
    }

    fn follow(&mut self) {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let named = fs::metadata(&self.path).map(identity).ok();
        let ours = self.file.metadata().map(identity).ok();
        // If the path cannot be opened, continue with the old file.
        if named != ours
            && let Ok(file) = append(&self.path)
        {
            self.file = file;
        }
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

#[cfg(test)]
mod tests;
