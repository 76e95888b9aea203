//! The progress of an `overhead` run on standard error: one line that is rewritten on a terminal,
//! and a line at an interval elsewhere. It estimates the time left from the rounds that are done.

use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::cli::{Length, Options, Output};
use crate::limits::PROGRESS_LINE_S;

/// How far a run is.
#[derive(Clone, Copy, Debug, PartialEq)]
struct State {
    /// Requests that have ended, including the warm-up.
    requests: u64,
    /// Number of sides, which is the number of requests of a round.
    sides: u64,
    /// Rounds of the warm-up.
    warmup: u64,
    length: Length,
    elapsed: Duration,
}

impl State {
    fn rounds(&self) -> u64 {
        self.requests / self.sides.max(1)
    }

    /// Returns the share of the run that is done, from 0 to 1.
    fn share(&self) -> f64 {
        let share = match self.length {
            Length::Rounds(rounds) => {
                self.requests as f64 / ((rounds + self.warmup) * self.sides).max(1) as f64
            }
            // The warm-up precedes the time, but is short.
            Length::Time(time) => self.elapsed.as_secs_f64() / time.as_secs_f64().max(1e-9),
        };
        share.min(1.0)
    }

    /// Returns the time left; `None` before anything is known.
    fn left(&self) -> Option<Duration> {
        match self.length {
            Length::Time(time) => Some(time.saturating_sub(self.elapsed)),
            Length::Rounds(_) if self.requests == 0 => None,
            Length::Rounds(_) => {
                let elapsed = self.elapsed.as_secs_f64();
                let left = elapsed / self.share() - elapsed;
                Duration::try_from_secs_f64(left.max(0.0)).ok()
            }
        }
    }

    fn text(&self) -> String {
        let rounds = match self.length {
            Length::Rounds(rounds) => {
                format!("round {} of {}", self.rounds(), rounds + self.warmup)
            }
            Length::Time(_) => format!("round {}", self.rounds()),
        };
        match self.left() {
            Some(left) => format!("{rounds}, about {} left", clock(left)),
            None => rounds,
        }
    }
}

/// Formats a time for a reader: `45 s`, `12 min 5 s`, `3 h 2 min`.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    match () {
        () if hours > 0 => format!("{hours} h {} min", minutes % 60),
        () if minutes > 0 => format!("{minutes} min {} s", seconds % 60),
        () => format!("{seconds} s"),
    }
}

enum Display {
    Silent,
    /// Terminal.
    Bar(ProgressBar),
    /// Not a terminal; contains the time of the last line.
    Lines(Duration),
}

/// Shows the progress of one run.
pub(crate) struct Progress {
    display: Display,
    sides: u64,
    warmup: u64,
    length: Length,
}

impl Progress {
    /// Creates the progress of a run. It is silent with `--quiet`, and if the JSON report is
    /// written to standard output, because another program then reads the output.
    pub(crate) fn new(options: &Options) -> Self {
        let display = if options.quiet || options.json == Some(Output::Stdout) {
            Display::Silent
        } else if io::stderr().is_terminal() {
            let bar = ProgressBar::new(BAR_STEPS);
            // If the library rejects the template, its default remains in use.
            if let Ok(style) = ProgressStyle::with_template("{bar:40} {msg}") {
                bar.set_style(style);
            }
            Display::Bar(bar)
        } else {
            Display::Lines(Duration::ZERO)
        };
        Self {
            display,
            sides: options.servers.len() as u64,
            warmup: u64::from(options.warmup),
            length: options.length,
        }
    }

    /// Shows that `requests` requests have ended, after `elapsed`.
    pub(crate) fn show(&mut self, requests: u64, elapsed: Duration) {
        let state = State {
            requests,
            sides: self.sides,
            warmup: self.warmup,
            length: self.length,
            elapsed,
        };
        match &mut self.display {
            Display::Silent => {}
            Display::Bar(bar) => {
                bar.set_position((state.share() * BAR_STEPS as f64) as u64);
                bar.set_message(state.text());
            }
            Display::Lines(last) => {
                if elapsed.saturating_sub(*last) >= Duration::from_secs(PROGRESS_LINE_S) {
                    *last = elapsed;
                    let _ = writeln!(io::stderr().lock(), "{}", state.text());
                }
            }
        }
    }

    /// Removes the line from the terminal.
    pub(crate) fn finish(&self) {
        if let Display::Bar(bar) = &self.display {
            bar.finish_and_clear();
        }
    }
}

/// Positions of the bar: more than a terminal has columns.
const BAR_STEPS: u64 = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_left_follows_from_the_rounds() {
        let rounds = |requests, elapsed| State {
            requests,
            sides: 3,
            warmup: 20,
            length: Length::Rounds(480),
            elapsed: Duration::from_secs(elapsed),
        };
        let time = |elapsed| State {
            length: Length::Time(Duration::from_secs(90)),
            ..rounds(31, elapsed)
        };
        for (state, want) in [
            (rounds(0, 1), "round 0 of 500"),
            (rounds(2, 0), "round 0 of 500, about 0 s left"),
            (rounds(300, 10), "round 100 of 500, about 40 s left"),
            (rounds(30, 60), "round 10 of 500, about 49 min 0 s left"),
            (rounds(3, 30), "round 1 of 500, about 4 h 9 min left"),
            (rounds(1_500, 10), "round 500 of 500, about 0 s left"),
            (time(10), "round 10, about 1 min 20 s left"),
            (time(100), "round 10, about 0 s left"),
        ] {
            assert_eq!(state.text(), want);
        }
    }
}
