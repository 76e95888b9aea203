//! The times at which tokens are due, with random variation.
//!
//! Each wait varies separately around its configured value, uniformly and at most as far as the
//! jitter permits, and never below zero. The variation follows from the seed and from the number of
//! the response, so a run whose requests arrive in the same order has the same times.

use std::time::Duration;

use crate::config::EngineConfig;
use crate::pooling::mix;

/// The largest deviation of a wait from its configured value.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Jitter {
    /// The waits do not vary.
    #[default]
    None,
    /// This time, for the first token and for each later one.
    Time(Duration),
    /// This share of the configured value, from 0 to 1.
    Share(f64),
}

/// The times of the tokens of one response, since the request was complete.
#[derive(Debug)]
pub(crate) struct Pace {
    itl: Duration,
    jitter: Jitter,
    random: u64,
    /// Time at which the first token is due.
    first: Duration,
    /// Index of the latest token asked for, and the time at which it is due.
    token: u32,
    due: Duration,
}

impl Pace {
    /// Returns the times of response number `nth` of the engine.
    pub(crate) fn new(config: &EngineConfig, nth: u64) -> Self {
        let mut random = config.seed ^ (u64::from(config.rank) << 32);
        random = mix(&mut random) ^ nth;
        let mut pace = Self {
            itl: config.itl,
            jitter: config.jitter,
            random,
            first: Duration::ZERO,
            token: 0,
            due: Duration::ZERO,
        };
        pace.first = pace.vary(config.ttft);
        pace.due = pace.first;
        pace
    }

    /// Returns the time at which the first token is due.
    pub(crate) fn first(&self) -> Duration {
        self.first
    }

    /// Returns the time at which the token with this index is due. The index must not decrease from
    /// call to call.
    pub(crate) fn due(&mut self, token: u32) -> Duration {
        if self.jitter == Jitter::None {
            return self.first.saturating_add(self.itl.saturating_mul(token));
        }
        while self.token < token {
            self.token += 1;
            let wait = self.vary(self.itl);
            self.due = self.due.saturating_add(wait);
        }
        self.due
    }

    /// Returns whether there can be a wait between tokens.
    pub(crate) fn waits_between_tokens(&self) -> bool {
        !self.itl.is_zero() || matches!(self.jitter, Jitter::Time(_))
    }

    /// Returns `wait` with its random variation.
    fn vary(&mut self, wait: Duration) -> Duration {
        let most = match self.jitter {
            Jitter::None => return wait,
            Jitter::Time(time) => time.as_secs_f64(),
            Jitter::Share(share) => wait.as_secs_f64() * share.clamp(0.0, 1.0),
        };
        // 53 bits make a value from 0 to 1.
        let unit = (mix(&mut self.random) >> 11) as f64 / (1_u64 << 53) as f64;
        let varied = (unit * 2.0 - 1.0).mul_add(most, wait.as_secs_f64());
        Duration::try_from_secs_f64(varied.max(0.0)).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTFT: Duration = Duration::from_millis(20);
    const ITL: Duration = Duration::from_millis(5);

    fn config(jitter: Jitter, seed: u64) -> EngineConfig {
        EngineConfig {
            ttft: TTFT,
            itl: ITL,
            jitter,
            seed,
            ..EngineConfig::default()
        }
    }

    fn times(config: &EngineConfig, nth: u64) -> Vec<Duration> {
        let mut pace = Pace::new(config, nth);
        assert_eq!(pace.first(), pace.due(0));
        (0..100).map(|token| pace.due(token)).collect()
    }

    #[test]
    fn without_jitter_the_times_are_exact() {
        let times = times(&config(Jitter::None, 1), 3);
        assert_eq!(times[0], TTFT);
        assert_eq!(times[99], TTFT + ITL * 99);
    }

    #[test]
    fn variation_is_bounded_and_follows_from_the_seed() {
        for (jitter, of_first, of_others) in [
            (Jitter::Time(Duration::from_millis(2)), 2e-3, 2e-3),
            (Jitter::Share(0.1), 2e-3, 5e-4),
        ] {
            let config_of = |seed| config(jitter, seed);
            let all = times(&config_of(1), 0);
            let off = |time: Duration, base: Duration| time.as_secs_f64() - base.as_secs_f64();
            assert!(off(all[0], TTFT).abs() <= of_first + 1e-9);
            let gaps: Vec<f64> = all
                .windows(2)
                .map(|two| off(two[1] - two[0], ITL))
                .collect();
            assert!(
                gaps.iter().all(|gap| gap.abs() <= of_others + 1e-8),
                "{gaps:?}"
            );
            // It varies in both directions, and uses most of the range.
            let most = gaps.iter().copied().fold(0.0, f64::max);
            let least = gaps.iter().copied().fold(0.0, f64::min);
            assert!(
                most > of_others * 0.8 && least < of_others * -0.8,
                "{least} {most}"
            );
            assert_eq!(all, times(&config_of(1), 0));
            assert_ne!(all, times(&config_of(1), 1));
            assert_ne!(all, times(&config_of(2), 0));
        }
        // A wait is never negative, and a jump has the same result as single steps.
        let wide = config(Jitter::Time(Duration::from_secs(1)), 1);
        let all = times(&wide, 0);
        assert!(all.is_sorted());
        assert_eq!(Pace::new(&wide, 0).due(99), all[99]);
    }
}
