//! The counters of a soak run.

use crate::limits::SOAK_ERRORS_SHOWN_MAX;
use crate::soak::check::{Kind, Mismatch};

/// Progress of a request when the client aborted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Aborted before the request had been sent completely and before any byte of the response had
    /// arrived.
    Sending,
    /// Aborted after the request had been sent completely, but before any byte of the response had
    /// arrived.
    BeforeHead,
    /// Aborted after part of the response had arrived.
    Within,
}

impl Stage {
    /// All stages.
    pub const ALL: [Self; 3] = [Self::Sending, Self::BeforeHead, Self::Within];

    /// Returns the name used in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sending => "while sent",
            Self::BeforeHead => "before the head",
            Self::Within => "within the answer",
        }
    }
}

/// The counters of one run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests started, including those counted in `again`.
    pub begun: u64,
    /// Streamed responses that were complete and correct.
    pub streams: u64,
    /// Responses without streaming that were complete and correct.
    pub unstreamed: u64,
    /// Those responses among `streams` and `unstreamed` whose request was pipelined after another
    /// one.
    pub pipelined: u64,
    /// Tokens received in streams, one per event, including the streams of aborted requests.
    pub chunks: u64,
    /// Bytes received from the proxy, including response heads.
    pub bytes: u64,
    /// Aborted requests by [`Stage`], each closed by FIN (first) or RST (second).
    pub aborts: [[u64; 2]; Stage::ALL.len()],
    /// Connections started, including those that failed to open later.
    pub connections: u64,
    /// Connections from which the client reads slowly.
    pub narrow: u64,
    /// Pauses during which the client did not read from a connection.
    pub pauses: u64,
    /// Connections that could not be used again after a correct response.
    pub closed: u64,
    /// Requests that were replaced by a new request on a new connection, because their connection
    /// was closed before any byte of their response.
    pub again: u64,
    /// Requests in progress at the end of the run.
    pub unfinished: u64,
    /// Longest delay of the client's periodic check, in nanoseconds.
    pub late_ns: u64,
    /// Number of failed requests per kind of error, in the order of [`Kind::ALL`].
    pub errors: [u64; Kind::ALL.len()],
    /// Descriptions of the first failed requests, at most [`SOAK_ERRORS_SHOWN_MAX`].
    pub shown: Vec<String>,
}

impl Tally {
    /// Counts a failed request and keeps its description if it is one of the first; `what`
    /// identifies the request in the description.
    pub fn wrong(&mut self, what: &str, wrong: &Mismatch) {
        let counts = Kind::ALL.iter().zip(&mut self.errors);
        for (kind, count) in counts {
            *count += u64::from(*kind == wrong.kind);
        }
        if self.shown.len() < SOAK_ERRORS_SHOWN_MAX {
            self.shown.push(format!("{what}: {wrong}"));
        }
    }

    /// Returns the number of failed requests.
    #[must_use]
    pub fn failures(&self) -> u64 {
        self.errors.iter().sum()
    }

    /// Returns the number of aborted requests.
    #[must_use]
    pub fn aborted(&self) -> u64 {
        self.aborts.iter().flatten().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_counted_by_kind_and_the_first_ones_described() {
        let mut tally = Tally::default();
        for number in 0..=SOAK_ERRORS_SHOWN_MAX {
            tally.wrong(&format!("stream {number}"), &Mismatch::new(Kind::Lost, "x"));
        }
        tally.wrong("stream 0", &Mismatch::new(Kind::Silence, "y"));
        assert_eq!((tally.errors[0], tally.errors[9]), (11, 1));
        assert_eq!(tally.failures(), 12);
        assert_eq!(tally.shown.len(), SOAK_ERRORS_SHOWN_MAX);
        assert_eq!(tally.shown[1], "stream 1: lost or out of order: x");
    }
}
