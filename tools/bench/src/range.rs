//! The range of an axis. A few extreme values must not flatten the others, so the range leaves them
//! out and counts them.

use crate::units::{show_ns, show_signed_ns};

/// How far an axis reaches beyond the middle 80 % of the values, in widths of these.
const REACH: f64 = 3.0;
/// Smallest width of the middle 80 %, as a share of the median: equal values also get an axis.
const WIDTH_SHARE_MIN: f64 = 0.05;
/// How far an axis of differences reaches, in medians of their sizes.
const REACH_OF_DIFFERENCES: f64 = 10.0;
/// All values are inside if the axis then is at most this many times as long.
const STRETCH_MAX: f64 = 2.0;
/// An axis is logarithmic if its end is more than this many times its start.
const LINEAR_RATIO_MAX: f64 = 20.0;

/// Values on one side of the range.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Beyond {
    /// Number of values.
    pub count: usize,
    /// The value that is farthest from the range.
    pub farthest: f64,
}

/// The range of an axis, and the values that it leaves out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Range {
    /// Start of the axis.
    pub low: f64,
    /// End of the axis.
    pub high: f64,
    /// Values below the start.
    pub below: Beyond,
    /// Values above the end.
    pub above: Beyond,
}

impl Range {
    /// Returns the range for several groups of values, of which each is in ascending order. It
    /// contains the middle 80 % of every group.
    #[must_use]
    pub fn of(groups: &[Vec<f64>]) -> Self {
        let mut ends: Option<(f64, f64)> = None;
        for group in groups.iter().filter(|group| !group.is_empty()) {
            let at = |share: f64| group[((group.len() - 1) as f64 * share).round() as usize];
            let (low, middle, high) = (at(0.1), at(0.5), at(0.9));
            let reach = (high - low).max(middle.abs() * WIDTH_SHARE_MIN) * REACH;
            let own = (at(0.0).max(low - reach), at(1.0).min(high + reach));
            ends = Some(match ends {
                Some((low, high)) => (low.min(own.0), high.max(own.1)),
                None => own,
            });
        }
        let ends = ends.unwrap_or_default();
        Self::stretched(ends, groups.iter().flatten().copied())
    }

    /// Returns the range for differences. It contains 0.
    #[must_use]
    pub fn of_differences(values: &[f64]) -> Self {
        let mut sizes: Vec<f64> = values.iter().map(|value| value.abs()).collect();
        sizes.sort_unstable_by(f64::total_cmp);
        let median = sizes.get(sizes.len() / 2).copied().unwrap_or(0.0);
        let reach = match median * REACH_OF_DIFFERENCES {
            reach if reach > 0.0 => reach,
            _ => f64::INFINITY,
        };
        let low = values.iter().copied().fold(0.0, f64::min).max(-reach);
        let high = values.iter().copied().fold(0.0, f64::max).min(reach);
        Self::stretched((low, high), values.iter().copied())
    }

    /// Returns a range with these ends, or with all values if that is not much longer.
    fn stretched(ends: (f64, f64), values: impl Iterator<Item = f64> + Clone) -> Self {
        let all = values
            .clone()
            .fold(ends, |(low, high), value| (low.min(value), high.max(value)));
        let is_short = all.1 - all.0 <= (ends.1 - ends.0) * STRETCH_MAX;
        let (low, high) = if is_short { all } else { ends };
        Self::between(low, high, values)
    }

    fn between(low: f64, high: f64, values: impl Iterator<Item = f64>) -> Self {
        let mut range = Self {
            low,
            high,
            ..Self::default()
        };
        for value in values {
            if value > high {
                range.above.count += 1;
                range.above.farthest = range.above.farthest.max(value);
            } else if value < low {
                let farthest = match range.below.count {
                    0 => value,
                    _ => range.below.farthest.min(value),
                };
                range.below = Beyond {
                    count: range.below.count + 1,
                    farthest,
                };
            }
        }
        range
    }

    /// Returns whether the axis should be logarithmic, because a linear one would flatten the
    /// smaller values.
    #[must_use]
    pub fn is_logarithmic(&self) -> bool {
        self.low > 0.0 && self.high / self.low > LINEAR_RATIO_MAX
    }

    /// Returns whether `value` is left out.
    #[must_use]
    pub fn is_outside(&self, value: f64) -> bool {
        value < self.low || value > self.high
    }

    /// Describes the values that are left out, such as `2 points above 1.00 ms (up to 60.0 s)`;
    /// `None` if there are none. `what` is the singular of their name.
    #[must_use]
    pub fn note(&self, what: &str, signed: bool) -> Option<String> {
        let show = if signed { show_signed_ns } else { show_ns };
        let mut parts = Vec::new();
        for (beyond, side, end, to) in [
            (self.above, "above", self.high, "up to"),
            (self.below, "below", self.low, "down to"),
        ] {
            if beyond.count > 0 {
                let plural = if beyond.count == 1 { "" } else { "s" };
                let (count, farthest) = (beyond.count, show(beyond.farthest));
                parts.push(format!(
                    "{count} {what}{plural} {side} {} ({to} {farthest})",
                    show(end)
                ));
            }
        }
        (!parts.is_empty()).then(|| format!("outside: {}", parts.join(", ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, first: f64, step: f64) -> Vec<f64> {
        (0..count).map(|i| first + step * i as f64).collect()
    }

    #[test]
    fn extreme_values_are_left_out_and_counted() {
        let mut group = values(98, 1e6, 1e3);
        group.extend([5e9, 60e9]);
        let range = Range::of(&[group.clone()]);
        assert_eq!(range.low, 1e6);
        assert!(range.high < 1.4e6, "{range:?}");
        assert_eq!((range.above.count, range.above.farthest), (2, 60e9));
        assert!(!range.is_logarithmic() && range.is_outside(5e9));
        let note = range.note("value", false).unwrap();
        assert!(note.starts_with("outside: 2 values above 1."), "{note}");
        assert!(note.ends_with("(up to 60.0 s)"), "{note}");
        group.insert(0, 3.0);
        let range = Range::of(&[group]);
        assert_eq!((range.below.count, range.below.farthest), (1, 3.0));
        assert!(
            range
                .note("point", false)
                .unwrap()
                .contains(", 1 point below ")
        );
    }

    #[test]
    fn ordinary_values_are_all_inside() {
        let mut with_tail = values(95, 1e6, 1e3);
        with_tail.extend(values(5, 1.4e6, 1e3));
        for groups in [
            vec![with_tail],
            vec![values(100, 1e6, 1e4)],
            vec![values(50, 1e6, 1e4), values(50, 2e6, 1e4)],
            vec![vec![5.0; 9], vec![]],
            vec![],
        ] {
            let range = Range::of(&groups);
            assert_eq!(range.note("value", false), None, "{groups:?}");
            assert!(groups.iter().flatten().all(|it| !range.is_outside(*it)));
        }
    }

    #[test]
    fn a_slow_side_needs_a_logarithmic_axis() {
        let range = Range::of(&[values(100, 1e6, 1e3), values(100, 2e9, 1e6)]);
        assert!(range.is_logarithmic(), "{range:?}");
        assert_eq!(range.note("value", false), None);
        assert!(!Range::of(&[values(10, 0.0, 1.0)]).is_logarithmic());
    }

    #[test]
    fn differences_keep_zero_and_leave_out_extremes() {
        let range = Range::of_differences(&[10.0, 12.0, -3.0, 11.0, 9.0]);
        assert_eq!((range.low, range.high), (-3.0, 12.0));
        let range = Range::of_differences(&[10.0, 12.0, 11.0, 9.0, 3e8]);
        assert_eq!((range.low, range.high, range.above.count), (0.0, 110.0, 1));
        let note = range.note("end", true).unwrap();
        assert_eq!(note, "outside: 1 end above +110 ns (up to +300 ms)");
        let range = Range::of_differences(&[-10.0, -12.0, -3e8]);
        assert_eq!((range.low, range.high, range.below.count), (-120.0, 0.0, 1));
        assert_eq!(Range::of_differences(&[]), Range::default());
        assert_eq!(Range::of_differences(&[0.0, 0.0]), Range::default());
    }
}
