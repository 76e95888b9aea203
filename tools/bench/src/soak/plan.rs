//! Draws the next request of a stream, and whether and how it is aborted, from a seeded random
//! number generator.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::limits::{ABORT_AFTER_MS_MAX, PAUSE_MS_MAX, SOAK_PROMPT_BYTES_MAX};

/// Share of requests that do not request a stream.
const WHOLE_SHARE: f64 = 0.02;
/// Of the requests that are not aborted, the share that is followed immediately by a second,
/// pipelined request.
const PIPELINED_SHARE: f64 = 0.02;
/// Share of connections from which the client reads slowly.
const NARROW_SHARE: f64 = 0.02;
/// Half of the prompts have at most this many bytes of filler; the other half is drawn from the
/// whole range up to [`SOAK_PROMPT_BYTES_MAX`].
const PROMPT_BYTES_USUAL: u32 = 1024;

/// When a request is aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Point {
    /// The request is aborted when this many thousandths of its bytes have been sent.
    Sending(u16),
    /// The request is aborted this many milliseconds after it has been sent completely.
    AfterMs(u64),
    /// The request is aborted when this many tokens of the response have arrived; with 0, when the
    /// response head has arrived.
    Tokens(u32),
}

/// How the connection of an aborted request is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The connection is closed by an orderly end (FIN).
    Fin,
    /// The connection is closed by a reset (RST).
    Rst,
}

/// The parameters of one request, or of two pipelined ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    /// Whether the request is for a streamed response.
    pub stream: bool,
    /// When and how the request is aborted; `None` if it is not.
    pub abort: Option<(Point, How)>,
    /// Whether a second request is sent immediately after it.
    pub second: bool,
    /// Bytes of filler in the prompt.
    pub prompt_bytes: u32,
}

/// A pause during which a connection does not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pause {
    /// Number of received tokens after which the pause starts.
    pub tokens: u32,
    /// Length of the pause in milliseconds.
    pub time_ms: u64,
}

/// Draws requests, aborts and pauses.
#[derive(Debug)]
pub struct Plan {
    rng: SmallRng,
    abort_share: f64,
    tokens: u32,
}

impl Plan {
    /// Creates a plan that aborts the share `abort_share` of the requests, from 0 to 1. Responses
    /// have `tokens` tokens, at least one.
    #[must_use]
    pub fn new(seed: u64, abort_share: f64, tokens: u32) -> Self {
        Self {
            rng: SmallRng::seed_from_u64(seed),
            abort_share,
            tokens,
        }
    }

    /// Draws the next request.
    pub fn draw(&mut self) -> Draw {
        let stream = !self.rng.random_bool(WHOLE_SHARE);
        let abort = self.rng.random_bool(self.abort_share).then(|| {
            let point = match self.rng.random_range(0..4_u8) {
                0 => Point::Sending(self.rng.random_range(0..1000)),
                // Half of the aborts of streams happen after a number of tokens.
                2.. if stream => Point::Tokens(self.rng.random_range(0..self.tokens)),
                _ => Point::AfterMs(self.rng.random_range(0..=ABORT_AFTER_MS_MAX)),
            };
            let how = if self.rng.random_bool(0.5) {
                How::Fin
            } else {
                How::Rst
            };
            (point, how)
        });
        let bytes_max = if self.rng.random_bool(0.5) {
            PROMPT_BYTES_USUAL
        } else {
            SOAK_PROMPT_BYTES_MAX
        };
        Draw {
            stream,
            abort,
            second: abort.is_none() && self.rng.random_bool(PIPELINED_SHARE),
            prompt_bytes: self.rng.random_range(0..=bytes_max),
        }
    }

    /// Draws whether the client reads slowly from the next connection.
    pub fn narrow(&mut self) -> bool {
        self.rng.random_bool(NARROW_SHARE)
    }

    /// Draws the pause during a response on a connection from which the client reads slowly.
    pub fn pause(&mut self) -> Pause {
        Pause {
            tokens: self.rng.random_range(0..self.tokens),
            time_ms: self.rng.random_range(PAUSE_MS_MAX / 10..=PAUSE_MS_MAX),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(abort_share: f64) -> Vec<Draw> {
        let mut plan = Plan::new(5, abort_share, 7);
        (0..10_000).map(|_| plan.draw()).collect()
    }

    #[test]
    fn draws_follow_the_shares_and_repeat_for_a_seed() {
        let all = draws(0.1);
        assert_eq!(all, draws(0.1));
        let share = |of: fn(&Draw) -> bool| {
            all.iter().filter(|draw| of(draw)).count() as f64 / all.len() as f64
        };
        for (got, want) in [
            (share(|draw| draw.abort.is_some()), 0.1),
            (share(|draw| !draw.stream), WHOLE_SHARE),
            (share(|draw| draw.second), 0.9 * PIPELINED_SHARE),
        ] {
            assert!((got - want).abs() < 0.01, "{got} {want}");
        }
        let mut plan = Plan::new(5, 0.1, 7);
        let narrow = (0..10_000).filter(|_| plan.narrow()).count();
        assert!((100..300).contains(&narrow), "{narrow}");
        for _ in 0..1_000 {
            let pause = plan.pause();
            assert!(pause.tokens < 7 && pause.time_ms <= PAUSE_MS_MAX);
        }
        assert!(draws(0.0).iter().all(|draw| draw.abort.is_none()));
    }

    #[test]
    fn aborts_are_of_every_kind_and_valid() {
        let all = draws(1.0);
        for how in [How::Fin, How::Rst] {
            for kind in 0..3 {
                let is = |draw: &&Draw| {
                    let (point, own) = draw.abort.unwrap();
                    let of = match point {
                        Point::Sending(_) => 0,
                        Point::AfterMs(_) => 1,
                        Point::Tokens(_) => 2,
                    };
                    (of, own) == (kind, how)
                };
                assert!(all.iter().filter(is).count() > 500, "{kind} {how:?}");
            }
        }
        for draw in all {
            assert!(!draw.second && draw.prompt_bytes <= SOAK_PROMPT_BYTES_MAX);
            match draw.abort.unwrap().0 {
                Point::Sending(part) => assert!(part < 1000),
                Point::AfterMs(after) => assert!(after <= ABORT_AFTER_MS_MAX),
                Point::Tokens(tokens) => assert!(draw.stream && tokens < 7),
            }
        }
    }
}
