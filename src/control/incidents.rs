//! Logs incidents that shards report: each kind at most once per `SAME_AGAIN` and engine, with the
//! number of incidents since the previous line, and the recovery of each engine.

use std::collections::HashMap;
use std::future::pending;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::fault::{Engine, Incident};

/// Capacity of the queue from the shards to the logging task, for the whole process. Incidents
/// beyond it are counted in metrics, and failed legs in the next line about their engine.
const INCIDENTS_MAX: usize = 64;
/// Kinds and engines of which the last log line is remembered. Incidents of more of them within
/// `SAME_AGAIN` are counted in metrics but not logged.
const REMEMBERED_MAX: usize = 256;
/// Minimum interval between two log lines about the same kind and engine.
const SAME_AGAIN: Duration = Duration::from_secs(30);

/// Passes incidents to the task that logs them. Usable from any thread.
#[derive(Clone)]
pub(super) struct Incidents(mpsc::Sender<Incident>);

impl Incidents {
    /// Spawns the task that logs incidents.
    pub(super) fn start() -> Self {
        let (sender, reported) = mpsc::channel(INCIDENTS_MAX);
        tokio::spawn(write(reported));
        Self(sender)
    }

    /// Queues an incident for the log without blocking. Returns `false`, and drops it, if the queue
    /// is full.
    pub(super) fn record(&self, incident: Incident) -> bool {
        self.0.try_send(incident).is_ok()
    }
}

async fn write(mut reported: mpsc::Receiver<Incident>) {
    let mut book = Book::default();
    loop {
        let due = book.due();
        tokio::select! {
            incident = reported.recv() => match incident {
                Some(incident) => book.take(incident, Instant::now(), log),
                None => return,
            },
            () = until(due) => book.write_due(Instant::now(), log),
        }
    }
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => pending().await,
    }
}

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Line {
    /// A kind of incident, and how often it has happened since the previous line about it.
    Happened(Incident, u64),
    /// An engine serves again: the time since the first line about its failure, and the number of
    /// legs that have failed since.
    Recovered(Engine, Duration, u64),
}

/// The lines that have been written, and those left to write.
#[derive(Debug, Default)]
struct Book {
    kinds: HashMap<(&'static str, String), Kind>,
    failed: HashMap<Engine, Failed>,
}

#[derive(Debug)]
struct Kind {
    written: Instant,
    since: Option<Pending>,
}

/// The incidents after a line, of which none has been written yet.
#[derive(Debug)]
struct Pending {
    last: Incident,
    count: u64,
    /// Whether the engine has served again since.
    is_over: bool,
}

/// An engine about whose failure a line has been written.
#[derive(Debug)]
struct Failed {
    since: Instant,
    legs: u64,
}

impl Book {
    /// Returns when the next line is due.
    fn due(&self) -> Option<Instant> {
        let written = self.kinds.values().map(|kind| kind.written);
        written.min().map(|written| written + SAME_AGAIN)
    }

    /// Takes an incident, and writes a line if none has been written about this kind for some time.
    fn take(&mut self, incident: Incident, now: Instant, write: impl Fn(Line)) {
        if let Incident::Recovered(engine) = incident {
            self.recovered(engine, now, write);
            return;
        }
        let count = match &incident {
            Incident::Failed { legs, .. } => *legs,
            _ => 1,
        };
        if let Incident::Failed { engine, legs, .. } = &incident
            && let Some(failed) = self.failed.get_mut(engine)
        {
            failed.legs += legs;
        }
        match self.kinds.get_mut(&incident.key()) {
            Some(kind) => {
                let before = kind.since.take().map_or(0, |pending| pending.count);
                kind.since = Some(Pending {
                    last: incident,
                    count: before + count,
                    is_over: false,
                });
            }
            None => {
                if self.kinds.len() < remembered_max(&incident) {
                    let kind = Kind {
                        written: now,
                        since: None,
                    };
                    self.kinds.insert(incident.key(), kind);
                    self.happened(incident, count, now, &write);
                }
            }
        }
    }

    /// Writes that an engine serves again, if a line about its failure has been written. Otherwise
    /// that line is still due, and this one follows it.
    fn recovered(&mut self, engine: Engine, now: Instant, write: impl Fn(Line)) {
        let failed = self.failed.remove(&engine);
        for kind in self.kinds.values_mut() {
            let Some(pending) = kind.since.as_mut() else {
                continue;
            };
            match &pending.last {
                Incident::Failed { engine: its, .. } if *its == engine => {}
                _ => continue,
            }
            match &failed {
                // These are included in the line that follows.
                Some(_) => kind.since = None,
                None => pending.is_over = true,
            }
        }
        if let Some(Failed { since, legs }) = failed {
            write(Line::Recovered(engine, now - since, legs));
        }
    }

    /// Writes the lines that are due, and forgets the kinds without further incidents.
    fn write_due(&mut self, now: Instant, write: impl Fn(Line)) {
        let mut due = Vec::new();
        self.kinds.retain(|_, kind| {
            if now - kind.written < SAME_AGAIN {
                return true;
            }
            kind.written = now;
            let again = kind.since.take();
            let is_kept = again.is_some();
            due.extend(again);
            is_kept
        });
        for Pending {
            last,
            count,
            is_over,
        } in due
        {
            let engine = match &last {
                Incident::Failed { engine, .. } if is_over => Some(engine.clone()),
                _ => None,
            };
            self.happened(last, count, now, &write);
            if let Some(engine) = engine {
                self.recovered(engine, now, &write);
            }
        }
    }

    fn happened(&mut self, incident: Incident, count: u64, now: Instant, write: &impl Fn(Line)) {
        if let Incident::Failed { engine, .. } = &incident
            && !self.failed.contains_key(engine)
        {
            if self.failed.len() >= REMEMBERED_MAX {
                // It may never serve again.
                let oldest = self.failed.iter().min_by_key(|(_, failed)| failed.since);
                if let Some(oldest) = oldest.map(|(engine, _)| engine.clone()) {
                    self.failed.remove(&oldest);
                }
            }
            let failed = Failed {
                since: now,
                legs: count,
            };
            self.failed.insert(engine.clone(), failed);
        }
        write(Line::Happened(incident, count));
    }
}

/// Returns how many kinds may be remembered if one of this incident is to be added. Clients can
/// name prefillers, and must not be able to hide the failures of local decoders.
const fn remembered_max(incident: &Incident) -> usize {
    match incident {
        Incident::Failed { engine, .. } if engine.rank.is_some() => 2 * REMEMBERED_MAX,
        _ => REMEMBERED_MAX,
    }
}

fn log(line: Line) {
    match line {
        Line::Happened(incident, legs) => match &incident {
            Incident::Failed {
                engine, trouble, ..
            } => tracing::warn!(
                role = engine.role.label(),
                endpoint = %engine.target,
                rank = engine.rank,
                kind = trouble.label(),
                legs,
                "{incident}"
            ),
            _ if legs > 1 => tracing::warn!("{incident} ({legs} times since the last such line)"),
            _ => tracing::warn!("{incident}"),
        },
        Line::Recovered(engine, after, legs) => tracing::info!(
            role = engine.role.label(),
            endpoint = %engine.target,
            rank = engine.rank,
            after_s = after.as_secs(),
            legs,
            "an engine serves again"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Trouble;
    use crate::fleet::Target;
    use crate::pd::Role;
    use std::cell::RefCell;

    fn engine(port: u16) -> Engine {
        Engine {
            role: Role::Prefill,
            target: Target::new("10.0.0.1", port).unwrap(),
            rank: None,
        }
    }

    fn failed(port: u16, trouble: Trouble, legs: u64) -> Incident {
        Incident::Failed {
            engine: engine(port),
            trouble,
            legs,
        }
    }

    #[test]
    fn each_kind_and_engine_has_one_line_in_a_while_with_a_count() {
        let (lines, mut book) = (RefCell::new(Vec::new()), Book::default());
        let write = |line| lines.borrow_mut().push(line);
        let start = Instant::now();
        let second = Duration::from_secs(1);
        for legs in [1, 3, 2] {
            book.take(failed(1, Trouble::Refused, legs), start, write);
        }
        book.take(failed(1, Trouble::Late, 1), start, write);
        book.take(failed(2, Trouble::Refused, 1), start, write);
        assert_eq!(lines.take().len(), 3);
        assert_eq!(book.due(), Some(start + SAME_AGAIN));
        book.write_due(start + SAME_AGAIN - second, write);
        assert_eq!(lines.take(), []);
        book.write_due(start + SAME_AGAIN, write);
        let again = Line::Happened(failed(1, Trouble::Refused, 2), 5);
        assert_eq!(lines.take(), [again]);
        assert_eq!(book.kinds.len(), 1, "quiet kinds are forgotten");
        book.write_due(start + 2 * SAME_AGAIN, write);
        assert_eq!((lines.take().len(), book.due()), (0, None));
    }

    #[test]
    fn a_recovery_is_written_once_after_a_failure_was() {
        let (lines, mut book) = (RefCell::new(Vec::new()), Book::default());
        let write = |line| lines.borrow_mut().push(line);
        let start = Instant::now();
        let later = start + Duration::from_secs(7);
        book.take(Incident::Recovered(engine(1)), start, write);
        assert_eq!(lines.take(), []);
        book.take(failed(1, Trouble::Cut, 1), start, write);
        book.take(failed(1, Trouble::Cut, 4), start, write);
        lines.take();
        book.take(Incident::Recovered(engine(1)), later, write);
        let recovered = Line::Recovered(engine(1), Duration::from_secs(7), 5);
        assert_eq!(lines.take(), [recovered]);
        book.take(Incident::Recovered(engine(1)), later, write);
        assert_eq!(lines.take(), []);
        // Nothing that the lines so far contain is written again.
        book.write_due(start + SAME_AGAIN, write);
        assert_eq!(lines.take(), []);
        // A failure and a recovery soon after a line are written when the kind may have one again.
        book.take(failed(1, Trouble::Cut, 1), later, write);
        assert_eq!(lines.take().len(), 1);
        book.take(Incident::Recovered(engine(1)), later, write);
        lines.take();
        book.take(failed(1, Trouble::Cut, 2), later, write);
        book.take(Incident::Recovered(engine(1)), later, write);
        assert_eq!(lines.take(), []);
        let due = later + SAME_AGAIN;
        book.write_due(due, write);
        let happened = Line::Happened(failed(1, Trouble::Cut, 2), 2);
        let over = Line::Recovered(engine(1), Duration::ZERO, 2);
        assert_eq!(lines.take(), [happened, over]);
        book.write_due(due + SAME_AGAIN, write);
        assert_eq!(lines.take(), []);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (lines, mut book) = (RefCell::new(0), Book::default());
        let write = |_| *lines.borrow_mut() += 1;
        for port in 1..=1000 {
            book.take(failed(port, Trouble::Refused, 1), Instant::now(), write);
        }
        assert_eq!(*lines.borrow(), REMEMBERED_MAX);
        assert_eq!((book.kinds.len(), book.failed.len()), (256, 256));
        // A local decoder still has its line.
        let decoder = Engine {
            role: Role::Decode,
            rank: Some(0),
            ..engine(1)
        };
        let incident = Incident::Failed {
            engine: decoder,
            trouble: Trouble::Refused,
            legs: 1,
        };
        book.take(incident, Instant::now(), write);
        assert_eq!(*lines.borrow(), REMEMBERED_MAX + 1);
    }
}
