//! What a soak counted.

use crate::limits::SOAK_ERRORS_SHOWN_MAX;
use crate::soak::check::{Kind, Wrong};

/// How far a request had come when it was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It was not sent as a whole.
    Sending,
    /// Nothing of the answer had come.
    BeforeHead,
    /// A part of the answer had come.
    Within,
}

impl Stage {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Sending, Self::BeforeHead, Self::Within];

    /// Its name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sending => "while sent",
            Self::BeforeHead => "before the head",
            Self::Within => "within the answer",
        }
    }
}

/// Counts of one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that were begun, those sent again included.
    pub begun: u64,
    /// Streams that came as they had to.
    pub streams: u64,
    /// Other answers that came as they had to.
    pub wholes: u64,
    /// Of both, answers to pipelined requests.
    pub pipelined: u64,
    /// Tokens that came, each in an event of its own, in streams; those of given-up ones included.
    pub chunks: u64,
    /// Bytes received.
    pub bytes: u64,
    /// Given-up requests, by stage, FIN and RST.
    pub aborts: [[u64; 2]; Stage::ALL.len()],
    /// Connections that were opened.
    pub connections: u64,
    /// Of those, slow readers.
    pub narrow: u64,
    /// Times that a slow reader did not read.
    pub pauses: u64,
    /// Connections that the proxy announced to close.
    pub closed: u64,
    /// Requests sent again on a new connection: theirs was closed before they were answered.
    pub again: u64,
    /// Requests that were under way at the end of the run.
    pub unfinished: u64,
    /// Longest time by which the client was late for its own clock, in nanoseconds.
    pub late_ns: u64,
    /// Failed requests, in the order of [`Kind::ALL`].
    pub errors: [u64; Kind::ALL.len()],
    /// Descriptions of the first of them.
    pub shown: Vec<String>,
}

impl Tally {
    /// Counts a failed request; `what` says which one.
    pub fn wrong(&mut self, what: &str, wrong: &Wrong) {
        let counts = Kind::ALL.iter().zip(&mut self.errors);
        for (kind, count) in counts {
            *count += u64::from(*kind == wrong.kind);
        }
        if self.shown.len() < SOAK_ERRORS_SHOWN_MAX {
            self.shown.push(format!("{what}: {wrong}"));
        }
    }

    /// Failed requests.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.errors.iter().sum()
    }

    /// Given-up requests.
    #[must_use]
    pub fn given_up(&self) -> u64 {
        self.aborts.iter().flatten().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_by_kind_and_the_first_are_described() {
        let mut tally = Tally::default();
        for number in 0..=SOAK_ERRORS_SHOWN_MAX {
            tally.wrong(&format!("stream {number}"), &Wrong::new(Kind::Lost, "x"));
        }
        tally.wrong("stream 0", &Wrong::new(Kind::Silence, "y"));
        assert_eq!((tally.errors[0], tally.errors[9]), (11, 1));
        assert_eq!(tally.failures(), 12);
        assert_eq!(tally.shown.len(), SOAK_ERRORS_SHOWN_MAX);
        assert_eq!(tally.shown[1], "stream 1: lost or out of order: x");
    }
}
