//! Counters with a single writer.
//!
//! Only a shard's own thread writes its cells, and the scrape only reads them. An addition is
//! therefore a relaxed load and a relaxed store, without the locked instruction of `fetch_add`. A
//! second writer could lose counts, but would not violate memory safety.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

/// A counter that only one thread may write; any thread may read it.
#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    pub(super) fn add(&self, count: u64) {
        self.0
            .store(self.0.load(Relaxed).wrapping_add(count), Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// A value that can rise and fall. Only one thread may write it; any thread may read it.
#[derive(Debug, Default)]
pub(super) struct Gauge(AtomicI64);

impl Gauge {
    pub(super) fn add(&self, delta: i64) {
        self.0
            .store(self.0.load(Relaxed).wrapping_add(delta), Relaxed);
    }

    pub(super) fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

/// Upper bounds of a histogram's buckets, in the unit of the recorded values.
#[derive(Debug)]
pub(super) struct Bounds<const N: usize> {
    pub(super) upper: [u64; N],
    /// Number of units in one second, for example 1e6 for microseconds. The exposition is in
    /// seconds.
    pub(super) per_second: f64,
}

/// A histogram that only one thread may write. Values above the last bound are counted in `above`.
#[derive(Debug)]
pub(super) struct Histogram<const N: usize> {
    bounds: &'static Bounds<N>,
    buckets: [Counter; N],
    above: Counter,
    sum: Counter,
}

impl<const N: usize> Histogram<N> {
    pub(super) fn new(bounds: &'static Bounds<N>) -> Self {
        Self {
            bounds,
            buckets: std::array::from_fn(|_| Counter::default()),
            above: Counter::default(),
            sum: Counter::default(),
        }
    }

    /// Records a value. A value equal to a bound is counted in that bound's bucket, as Prometheus'
    /// `le` requires.
    pub(super) fn record(&self, value: u64) {
        let index = self.bounds.upper.partition_point(|bound| *bound < value);
        self.buckets.get(index).unwrap_or(&self.above).add(1);
        self.sum.add(value);
    }

    /// Adds this histogram's counts to `total`, and its bounds and sum converted to seconds.
    pub(super) fn add_to(&self, total: &mut Total) {
        total.buckets.resize(N + 1, (f64::INFINITY, 0));
        let counts = self.buckets.iter().chain([&self.above]);
        for (index, (slot, count)) in total.buckets.iter_mut().zip(counts).enumerate() {
            if let Some(bound) = self.bounds.upper.get(index) {
                slot.0 = precise(*bound) / self.bounds.per_second;
            }
            slot.1 += count.get();
            total.count += count.get();
        }
        total.sum += precise(self.sum.get()) / self.bounds.per_second;
    }
}

/// One histogram summed over all shards, in seconds.
#[derive(Debug, Default)]
pub(super) struct Total {
    /// Upper bound in seconds and count of each bucket. The counts are not cumulative.
    pub(super) buckets: Vec<(f64, u64)>,
    pub(super) count: u64,
    pub(super) sum: f64,
}

/// Converts `value` to a float. Values above 2^53 lose their last digits, which does not matter for
/// metrics.
#[expect(
    clippy::cast_precision_loss,
    reason = "years in microseconds are below 2^53"
)]
pub(super) fn precise(value: u64) -> f64 {
    value as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    static BOUNDS: Bounds<3> = Bounds {
        upper: [10, 20, 40],
        per_second: 10.0,
    };

    #[test]
    fn a_value_equal_to_a_bound_is_in_its_bucket() {
        let histogram = Histogram::new(&BOUNDS);
        for value in [0, 10, 11, 20, 21, 40, 41, 1000] {
            histogram.record(value);
        }
        let mut total = Total::default();
        histogram.add_to(&mut total);
        histogram.add_to(&mut total);
        let counts: Vec<_> = total.buckets.iter().map(|(_, count)| *count).collect();
        assert_eq!(counts, [4, 4, 4, 4]);
        assert_eq!(total.buckets[2].0, 4.0);
        assert_eq!(total.buckets[3].0, f64::INFINITY);
        assert_eq!(total.count, 16);
        assert!((total.sum - 2.0 * 114.3).abs() < 1e-9);
    }

    #[test]
    fn gauges_can_decrease() {
        let gauge = Gauge::default();
        gauge.add(2);
        gauge.add(-3);
        assert_eq!(gauge.get(), -1);
    }
}
