//! Quantiles, and confidence intervals of the difference between two of them.
//!
//! Each value belongs to a round of requests, one to each side. The bootstrap draws as many rounds
//! as were measured, with replacement, and computes the difference of quantiles for the drawn
//! rounds. It repeats this [`RESAMPLES`] times; the interval is the middle 95 % of the results.
//!
//! Whole rounds are drawn because the values within a round depend on each other: the gaps of one
//! response do, and so do two requests that experience the same drift. Rounds are assumed to be
//! independent. If a disturbance lasts for many rounds, the intervals are too narrow; running the
//! benchmark with the same server on both sides shows how large this effect is on a given machine.
//!
//! A quantile is always a measured value (nearest rank): the smallest value such that at least the
//! given share of all values is not larger.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};

use crate::limits::RESAMPLES;

/// The quantiles that are reported.
pub const QUANTILES: [f64; 3] = [0.5, 0.9, 0.99];
/// Share of the resampled differences that lie below the 95 % interval; the same share lies above
/// it.
const TAIL: f64 = 0.025;

/// The values of one side, each with the number of its round.
#[derive(Clone, Debug, Default)]
pub struct Values {
    /// Values with their rounds, in ascending order.
    sorted: Vec<(u64, u32)>,
}

impl Values {
    /// Sorts `values`, each given with the number of its round.
    #[must_use]
    pub fn new(mut values: Vec<(u64, u32)>) -> Self {
        values.sort_unstable();
        Self { sorted: values }
    }

    /// Returns the number of values.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.sorted.len()
    }

    /// Returns whether there are no values.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// Iterates over the values in ascending order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = u64> + '_ {
        self.sorted.iter().map(|(value, _)| *value)
    }

    /// Returns the quantile at `share`, which is above 0 and at most 1; 0 if there are no values.
    #[must_use]
    pub fn quantile(&self, share: f64) -> u64 {
        let rank = rank(share, self.len() as u64).max(1) as usize;
        self.sorted.get(rank - 1).map_or(0, |(value, _)| *value)
    }

    /// Returns the mean; 0 if there are no values.
    #[must_use]
    pub fn mean(&self) -> f64 {
        let sum: u128 = self.iter().map(u128::from).sum();
        sum as f64 / self.len().max(1) as f64
    }

    /// Returns the quantiles at [`QUANTILES`] and the mean, with the values of each round counted
    /// as often as the round's entry in `weights`.
    fn weighted(&self, weights: &[u32]) -> [f64; 4] {
        let (mut total, mut sum) = (0_u64, 0_u128);
        for (value, round) in &self.sorted {
            let weight = weights[*round as usize];
            total += u64::from(weight);
            sum += u128::from(*value) * u128::from(weight);
        }
        let mut found = [0.0, 0.0, 0.0, sum as f64 / total.max(1) as f64];
        let ranks = QUANTILES.map(|share| rank(share, total).max(1));
        let (mut seen, mut next) = (0, 0);
        for (value, round) in &self.sorted {
            seen += u64::from(weights[*round as usize]);
            while next < ranks.len() && seen >= ranks[next] {
                found[next] = *value as f64;
                next += 1;
            }
            if next == ranks.len() {
                break;
            }
        }
        found
    }
}

/// Returns the rank of the quantile at `share` among `len` values, counted from 1.
fn rank(share: f64, len: u64) -> u64 {
    // The product may be slightly above a whole number: 0.07 * 100.0 is 7.000000000000001.
    (share * len as f64 - 1e-9).ceil() as u64
}

/// A difference in nanoseconds and its 95 % interval.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Difference {
    /// Proxy minus direct, as measured, in nanoseconds.
    pub estimate: f64,
    /// Lower end of the 95 % interval of the difference, in nanoseconds.
    pub low: f64,
    /// Upper end of the 95 % interval of the difference, in nanoseconds.
    pub high: f64,
}

impl Difference {
    /// Returns whether the interval excludes 0. If it does not, the difference cannot be
    /// distinguished from noise.
    #[must_use]
    pub fn is_resolved(&self) -> bool {
        self.low > 0.0 || self.high < 0.0
    }
}

/// The overhead of the proxy at each of [`QUANTILES`] and for the mean.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Overhead {
    /// The difference, proxy minus direct, at each of [`QUANTILES`].
    pub quantiles: [Difference; 3],
    /// The difference of the means, proxy minus direct.
    pub mean: Difference,
}

impl Overhead {
    /// Returns the overhead at the median.
    #[must_use]
    pub const fn p50(&self) -> Difference {
        self.quantiles[0]
    }

    /// Returns the overhead at the 99th percentile.
    #[must_use]
    pub const fn p99(&self) -> Difference {
        self.quantiles[2]
    }
}

/// The differences between the sides of one metric.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Differences {
    /// For each proxy, in the order of the sides: the proxy minus direct.
    pub added: Vec<Overhead>,
    /// For each proxy after the first: the proxy minus the first proxy.
    pub over_first: Vec<Overhead>,
}

/// Computes the differences of each metric from the values of all sides, direct first. Rounds are
/// numbered from 0 to `rounds - 1`. The same seed results in the same intervals.
#[must_use]
pub fn differences(metrics: &[Vec<Values>], rounds: usize, seed: u64) -> Vec<Differences> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut weights = vec![1_u32; rounds];
    let estimates: Vec<_> = metrics
        .iter()
        .map(|sides| subtract(sides, &weights))
        .collect();
    let empty = |metric: &Vec<[f64; 4]>| vec![[const { Vec::new() }; 4]; metric.len()];
    let mut drawn: Vec<Vec<[Vec<f64>; 4]>> = estimates.iter().map(empty).collect();
    for _ in 0..if rounds == 0 { 0 } else { RESAMPLES } {
        weights.fill(0);
        for _ in 0..rounds {
            weights[rng.random_range(0..rounds)] += 1;
        }
        for (kept, sides) in drawn.iter_mut().zip(metrics) {
            for (kept, found) in kept.iter_mut().zip(subtract(sides, &weights)) {
                for (kept, found) in kept.iter_mut().zip(found) {
                    kept.push(found);
                }
            }
        }
    }
    let each = metrics.iter().zip(estimates).zip(drawn);
    each.map(|((sides, estimates), drawn)| {
        let mut all = estimates.into_iter().zip(drawn);
        let mut next = |count: usize| -> Vec<Overhead> {
            let some = all.by_ref().take(count);
            some.map(|(estimate, drawn)| overhead(estimate, drawn))
                .collect()
        };
        Differences {
            added: next(sides.len().saturating_sub(1)),
            over_first: next(sides.len().saturating_sub(2)),
        }
    })
    .collect()
}

/// Returns the differences of the quantiles at [`QUANTILES`] and of the mean: of each proxy from
/// direct, then of each proxy after the first from the first. Each value counts as often as the
/// entry of its round in `weights`.
fn subtract(sides: &[Values], weights: &[u32]) -> Vec<[f64; 4]> {
    let sides: Vec<[f64; 4]> = sides.iter().map(|side| side.weighted(weights)).collect();
    let sides = sides.as_slice();
    let from = |base: usize| {
        let later = sides.iter().skip(base + 1);
        later.filter_map(move |side| {
            let base = sides.get(base)?;
            Some(std::array::from_fn(|i| side[i] - base[i]))
        })
    };
    from(0).chain(from(1)).collect()
}

fn overhead(estimates: [f64; 4], drawn: [Vec<f64>; 4]) -> Overhead {
    let mut each = estimates.into_iter().zip(drawn);
    let mut next = || {
        let (estimate, drawn) = each.next().unwrap_or_default();
        interval(estimate, drawn)
    };
    Overhead {
        quantiles: [next(), next(), next()],
        mean: next(),
    }
}

fn interval(estimate: f64, mut drawn: Vec<f64>) -> Difference {
    drawn.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| {
        let rank = rank(share, drawn.len() as u64).max(1) as usize;
        drawn.get(rank - 1).copied().unwrap_or(estimate)
    };
    Difference {
        estimate,
        low: at(TAIL),
        high: at(1.0 - TAIL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbered(values: &[u64]) -> Values {
        Values::new(values.iter().copied().zip(0..).collect())
    }

    #[test]
    fn quantiles_are_measured_values() {
        let hundred: Vec<u64> = (1..=100).rev().collect();
        for (values, share, want) in [
            (&[][..], 0.5, 0),
            (&[7], 0.5, 7),
            (&[7], 0.99, 7),
            (&[1, 2], 0.5, 1),
            (&[3, 1, 2], 0.5, 2),
            (&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 0.9, 9),
            (&hundred, 0.99, 99),
            (&hundred, 1.0, 100),
            (&hundred, 0.001, 1),
        ] {
            assert_eq!(numbered(values).quantile(share), want, "{values:?} {share}");
        }
        assert_eq!(numbered(&[1, 2, 6]).mean(), 3.0);
        assert_eq!(numbered(&[]).mean(), 0.0);
    }

    /// Reference implementation of [`Values::weighted`] that repeats every value as often as the
    /// entry of its round in `weights`.
    fn naive(values: &[(u64, u32)], weights: &[u32]) -> [f64; 4] {
        let mut all: Vec<u64> = values
            .iter()
            .flat_map(|(value, round)| vec![*value; weights[*round as usize] as usize])
            .collect();
        all.sort_unstable();
        let at = |percent: usize| match all.len() {
            0 => 0.0,
            len => all[((len * percent).div_ceil(100)).max(1) - 1] as f64,
        };
        let mean = all.iter().sum::<u64>() as f64 / all.len().max(1) as f64;
        [at(50), at(90), at(99), mean]
    }

    #[test]
    fn weighted_quantiles_equal_those_of_repeated_values() {
        let mut rng = SmallRng::seed_from_u64(7);
        for trial in 0..500 {
            let rounds = rng.random_range(1..40_u32);
            let values: Vec<(u64, u32)> = (0..rng.random_range(0..200))
                .map(|_| (rng.random_range(0..50), rng.random_range(0..rounds)))
                .collect();
            let weights: Vec<u32> = (0..rounds).map(|_| rng.random_range(0..4)).collect();
            let got = Values::new(values.clone()).weighted(&weights);
            let want = naive(&values, &weights);
            for (got, want) in got.iter().zip(want) {
                assert!((got - want).abs() < 1e-6, "trial {trial}: {got} {want}");
            }
        }
    }

    /// Returns `count` random values of each side, direct first, from a range of width `noise`. The
    /// range of the proxy's values is higher by `added`.
    fn rounds(count: u64, noise: u64, added: u64) -> (Values, Values) {
        let mut rng = SmallRng::seed_from_u64(count + noise);
        let mut side = |added| {
            let value = |rng: &mut SmallRng| 10_000 + added + rng.random_range(0..noise);
            Values::new((0..count).map(|i| (value(&mut rng), i as u32)).collect())
        };
        (side(0), side(added))
    }

    fn added(direct: Values, proxy: Values, rounds: usize, seed: u64) -> Overhead {
        differences(&[vec![direct, proxy]], rounds, seed)[0].added[0]
    }

    #[test]
    fn only_a_difference_above_the_noise_is_resolved() {
        let (direct, proxy) = rounds(500, 100, 60);
        let found = added(direct, proxy, 500, 1);
        for difference in found.quantiles.iter().chain([&found.mean]) {
            assert!(difference.is_resolved(), "{difference:?}");
            assert!(difference.low <= 60.0 && 60.0 <= difference.high + 10.0);
            assert!(difference.low <= difference.estimate);
            assert!(difference.estimate <= difference.high);
        }
        let (direct, proxy) = rounds(500, 10_000, 60);
        let found = added(direct, proxy, 500, 1);
        assert!(!found.mean.is_resolved(), "{:?}", found.mean);
        assert!(!found.p50().is_resolved(), "{:?}", found.p50());
    }

    #[test]
    fn intervals_contain_the_true_value_in_about_95_percent() {
        let mut covered = 0;
        for seed in 0..60 {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut side = |added: u64| {
                let values = (0..80).map(|i| (added + rng.random_range(0..1_000_u64), i));
                Values::new(values.collect())
            };
            let (direct, proxy) = (side(0), side(500));
            let found = added(direct, proxy, 80, seed);
            covered += u32::from(found.mean.low <= 500.0 && 500.0 <= found.mean.high);
        }
        // 57 of 60 are expected. The seeds are fixed, so the test is deterministic.
        assert!((50..=60).contains(&covered), "{covered}");
    }

    #[test]
    fn equal_seeds_give_equal_intervals_and_no_rounds_give_zero() {
        let (direct, proxy) = rounds(50, 1_000, 10);
        let run = |seed| added(direct.clone(), proxy.clone(), 50, seed);
        assert_eq!(run(3), run(3));
        assert_ne!(run(3), run(4));
        let found = added(Values::default(), Values::default(), 0, 1);
        assert_eq!(found, Overhead::default());
        assert!(!found.p50().is_resolved());
    }

    #[test]
    fn every_proxy_is_compared_with_direct_and_with_the_first_proxy() {
        let side = |ns: u64| Values::new((0..20).map(|i| (ns, i)).collect());
        let sides: Vec<Values> = [100, 130, 120, 190].map(side).into();
        let found = differences(&[sides, vec![side(1)]], 20, 1);
        let p50 = |all: &[Overhead]| all.iter().map(|it| it.p50().estimate).collect::<Vec<_>>();
        assert_eq!(p50(&found[0].added), [30.0, 20.0, 90.0]);
        assert_eq!(p50(&found[0].over_first), [-10.0, 60.0]);
        assert_eq!(found[1], Differences::default());
    }
}
