//! Signals, received on a separate thread.
//!
//! SIGTERM and SIGINT end the process, SIGHUP reloads what files hold. SIGUSR1 and SIGUSR2, which
//! end a process by default and which supervisors and `logrotate` scripts send, have no effect.
//!
//! Another thread ends the process when a drain has exceeded its deadline, regardless of what the
//! control plane waits for.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::cli;
use crate::limits::{END_MS_MAX, LOG_FLUSH_MS_MAX};

/// A signal with an effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Signal {
    /// The process drains and ends.
    End,
    /// Files are read again, and logs opened again.
    Reload,
}

/// Receives the signals of the process.
pub(super) struct Signals {
    received: mpsc::UnboundedReceiver<Signal>,
    /// Sets the time at which the process is ended.
    end_at: Sender<Instant>,
}

impl Signals {
    /// Starts to receive signals, instead of being ended by them.
    pub(super) fn start() -> io::Result<Self> {
        let (report, received) = mpsc::unbounded_channel();
        let (ready, started) = channel();
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || receive(&report, &ready))?;
        started
            .recv()
            .unwrap_or_else(|error| Err(io::Error::other(error)))?;
        let (end_at, deadline) = channel();
        thread::Builder::new()
            .name("deadline".to_owned())
            .spawn(move || end_at_deadline(&deadline))?;
        Ok(Self { received, end_at })
    }

    /// Waits for the next signal.
    pub(super) async fn next(&mut self) -> Signal {
        match self.received.recv().await {
            Some(signal) => signal,
            // The thread never ends.
            None => std::future::pending().await,
        }
    }

    /// Ends the process `END_MS_MAX` after `wait` if it is still running then. A later call
    /// replaces the time.
    pub(super) fn end_after(&self, wait: Duration) {
        let end = wait + Duration::from_millis(END_MS_MAX);
        let _ = self.end_at.send(Instant::now() + end);
    }
}

fn receive(report: &mpsc::UnboundedSender<Signal>, ready: &Sender<io::Result<()>>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build();
    let received = runtime.and_then(|runtime| {
        runtime.block_on(async {
            let mut term = signal(SignalKind::terminate())?;
            let mut int = signal(SignalKind::interrupt())?;
            let mut hup = signal(SignalKind::hangup())?;
            let mut usr1 = signal(SignalKind::user_defined1())?;
            let mut usr2 = signal(SignalKind::user_defined2())?;
            let _ = ready.send(Ok(()));
            loop {
                let received = tokio::select! {
                    _ = term.recv() => Signal::End,
                    _ = int.recv() => Signal::End,
                    _ = hup.recv() => Signal::Reload,
                    _ = usr1.recv() => continue,
                    _ = usr2.recv() => continue,
                };
                if report.send(received).is_err() {
                    return Ok(());
                }
            }
        })
    });
    if let Err(error) = received {
        let _ = ready.send(Err(error));
    }
}

/// Waits for a deadline, and ends the process when it has passed.
fn end_at_deadline(deadlines: &Receiver<Instant>) {
    let Ok(mut end) = deadlines.recv() else {
        return;
    };
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match deadlines.recv_timeout(left) {
            Ok(later) => end = later,
            // The process is ending by itself.
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => break,
        }
    }
    tracing::error!("the process does not end by itself after the drain's deadline; ending it");
    if let Some(log) = cli::log_queues() {
        log.flush(Duration::from_millis(LOG_FLUSH_MS_MAX));
    }
    std::process::exit(0);
}
