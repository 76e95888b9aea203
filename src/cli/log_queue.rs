//! The queue of log lines that a separate thread writes.
//!
//! Standard error may be a pipe that is read slowly or not at all, and a log file may be on a mount
//! that hangs. Neither may stop a shard, the control plane or the other output, so each output has
//! a queue and a thread, and a line that does not fit into the queue is counted and lost.

use std::io::{self, Stderr, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

use crate::limits::LOG_QUEUE_BYTES_MAX;

/// An output of the log.
pub(super) trait Output: Write + Send {
    /// Opens the file again, if the output is one.
    fn reopen(&mut self) {}
}

impl Output for Stderr {}

/// A queue of log lines. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct LogQueue {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    queued: Mutex<Queued>,
    /// Notified when a line has been queued.
    filled: Condvar,
    /// Notified when everything that was queued has been written.
    emptied: Condvar,
}

#[derive(Debug, Default)]
struct Queued {
    lines: Vec<u8>,
    /// Lines of `lines`.
    count: u64,
    /// Lines that the thread is writing.
    writing: u64,
    /// Whether the output is to be opened again.
    reopens: bool,
    /// Lines lost since the start, and those of them that the log does not mention yet.
    lost: u64,
    lost_unmentioned: u64,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queued> {
        self.queued.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LogQueue {
    /// Starts the thread that writes the lines to `output`. `mention_lost` makes the line that
    /// reports a number of lost lines.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(super) fn start(
        output: Box<dyn Output>,
        mention_lost: fn(u64) -> String,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let queue = Self {
            shared: Arc::clone(&shared),
        };
        let name = "log".to_owned();
        thread::Builder::new()
            .name(name)
            .spawn(move || write_lines(&shared, output, mention_lost))?;
        Ok(queue)
    }

    /// Returns the number of lines that were lost because the queue was full.
    fn lost(&self) -> u64 {
        self.shared.lock().lost
    }

    /// Waits until everything that is queued has been written, at most for `wait`. Returns the
    /// number of lines that are not written.
    fn flush(&self, wait: Duration) -> u64 {
        let has_lines = |queued: &mut Queued| queued.count + queued.writing > 0;
        let waited = self
            .shared
            .emptied
            .wait_timeout_while(self.shared.lock(), wait, has_lines);
        let (queued, _) = waited.unwrap_or_else(PoisonError::into_inner);
        queued.count + queued.writing
    }

    fn push(&self, line: &[u8]) {
        let mut queued = self.shared.lock();
        if queued.lines.len() + line.len() > LOG_QUEUE_BYTES_MAX {
            queued.lost += 1;
            queued.lost_unmentioned += 1;
            return;
        }
        queued.lines.extend_from_slice(line);
        queued.count += 1;
        drop(queued);
        self.shared.filled.notify_one();
    }
}

/// Writes queued lines as long as the process runs, each with one call.
fn write_lines(shared: &Shared, mut output: Box<dyn Output>, mention_lost: fn(u64) -> String) {
    let mut lines = Vec::new();
    loop {
        let queued = shared.lock();
        let is_idle = |queued: &mut Queued| queued.count == 0 && !queued.reopens;
        let waited = shared.filled.wait_while(queued, is_idle);
        let mut queued = waited.unwrap_or_else(PoisonError::into_inner);
        let reopens = std::mem::take(&mut queued.reopens);
        std::mem::swap(&mut lines, &mut queued.lines);
        queued.writing = std::mem::take(&mut queued.count);
        let lost = std::mem::take(&mut queued.lost_unmentioned);
        drop(queued);
        if reopens {
            output.reopen();
        }
        if lost > 0 {
            lines.extend_from_slice(mention_lost(lost).as_bytes());
        }
        for line in lines.split_inclusive(|byte| *byte == b'\n') {
            // Nothing can report that the log cannot be written.
            let _ = output.write_all(line);
        }
        lines.clear();
        let mut queued = shared.lock();
        queued.writing = 0;
        if queued.count == 0 {
            shared.emptied.notify_all();
        }
    }
}

/// The queues of all outputs of the log.
#[derive(Clone, Debug)]
pub struct LogQueues(pub(super) Vec<LogQueue>);

impl LogQueues {
    /// Returns the number of lines that were lost because a queue was full.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.0.iter().map(LogQueue::lost).sum()
    }

    /// Opens the log file again, if there is one: before the next line is written.
    pub fn reopen(&self) {
        for queue in &self.0 {
            queue.shared.lock().reopens = true;
            queue.shared.filled.notify_one();
        }
    }

    /// Waits until everything that is queued has been written, at most for `wait` per output.
    pub fn flush(&self, wait: Duration) {
        for queue in &self.0 {
            queue.flush(wait);
        }
    }
}

/// Passes each line to the queues. A line is one call of `write`.
#[derive(Debug)]
pub struct LineWriter<'a>(&'a [LogQueue]);

impl Write for LineWriter<'_> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        for queue in self.0 {
            queue.push(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogQueues {
    type Writer = LineWriter<'a>;

    fn make_writer(&'a self) -> Self::Writer {
        LineWriter(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    /// An output that takes a permit for each write.
    struct Gated {
        permits: mpsc::Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Output for Gated {}

    impl Write for Gated {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.permits.recv().map_err(io::Error::other)?;
            self.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_blocked_output_blocks_no_caller_and_lost_lines_are_counted() {
        let (permit, permits) = mpsc::channel();
        let written = Arc::new(Mutex::new(Vec::new()));
        let output = Gated {
            permits,
            written: Arc::clone(&written),
        };
        let mention = |lost| format!("{lost} log lines were lost\n");
        let log = LogQueue::start(Box::new(output), mention).unwrap();
        let all = LogQueues(vec![log.clone()]);
        let line = [&[b'x'; 1023][..], b"\n"].concat();
        let fill = || all.make_writer().write_all(&line).unwrap();
        let full = LOG_QUEUE_BYTES_MAX / 1024;
        // The thread may have taken one full queue.
        for _ in 0..2 * full + 100 {
            fill();
        }
        assert!(log.lost() >= 100, "{}", log.lost());
        assert!(log.flush(Duration::ZERO) > 0);
        for _ in 0..2 * full + 2 {
            permit.send(()).unwrap();
        }
        assert_eq!(log.flush(Duration::from_secs(10)), 0);
        let text = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        assert!(text.contains(" log lines were lost"), "not mentioned");
        let lost = log.lost();
        fill();
        permit.send(()).unwrap();
        assert_eq!(log.flush(Duration::from_secs(10)), 0);
        assert_eq!(log.lost(), lost);
    }
}
