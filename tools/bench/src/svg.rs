//! Plots as inline SVG. Colours are CSS classes, so that the page can have a light and a dark
//! theme.
//!
//! Every text from outside this file passes through [`escape`].

use std::fmt::Write;

use crate::limits::CURVE_POINTS_MAX;
use crate::range::Range;
use crate::stats::{Difference, Values};
use crate::units::show_ns;

/// Escapes text for HTML text and attribute values. Control characters become spaces.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c if c.is_control() => safe.push(' '),
            c => safe.push(c),
        }
    }
    safe
}

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 36.0;
/// Approximate number of ticks on an axis.
const TICKS: f64 = 6.0;

/// Maps data values to coordinates of the plot, linearly or by their logarithms.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    is_logarithmic: bool,
}

impl Axis {
    fn x(range: &Range) -> Self {
        Self::new(range, LEFT, WIDTH - RIGHT)
    }

    fn y(range: &Range) -> Self {
        Self::new(range, HEIGHT - BOTTOM, TOP)
    }

    fn new(range: &Range, from: f64, to: f64) -> Self {
        let (low, high) = (range.low, range.high);
        let high = if high > low { high } else { low + 1.0 };
        Self {
            low,
            high,
            from,
            to,
            is_logarithmic: range.is_logarithmic(),
        }
    }

    /// Returns the coordinate of `value`; values outside the range are moved to its ends.
    fn place(&self, value: f64) -> f64 {
        let share = if self.is_logarithmic {
            let value = value.max(self.low);
            (value / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    /// Returns the values of the tick marks: a few round values within the axis's range.
    fn ticks(&self) -> Vec<f64> {
        if self.is_logarithmic {
            return self.log_ticks();
        }
        let rough = (self.high - self.low) / TICKS;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .map(|factor| factor * power)
            .find(|step| *step >= rough)
            .unwrap_or(rough);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }

    fn log_ticks(&self) -> Vec<f64> {
        let powers = self.low.log10().floor() as i32..=self.high.log10().ceil() as i32;
        let decades = self.high.log10() - self.low.log10();
        let factors: &[f64] = if decades > TICKS / 2.0 {
            &[1.0]
        } else {
            &[1.0, 2.0, 5.0]
        };
        powers
            .flat_map(|power| {
                factors
                    .iter()
                    .map(move |factor| factor * 10_f64.powi(power))
            })
            .filter(|tick| (self.low..=self.high).contains(tick))
            .collect()
    }
}

fn open(height: f64, label: &str) -> String {
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">\n",
        escape(label)
    )
}

fn x_axis(svg: &mut String, axis: &Axis, bottom: f64) {
    for tick in axis.ticks() {
        let (x, text) = (axis.place(tick), show_ns(tick));
        let _ = writeln!(
            svg,
            "<path class=\"grid\" d=\"M{x:.1} {TOP}V{bottom:.1}\"/>\
             <text class=\"tick\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{text}</text>",
            bottom + 16.0
        );
    }
}

/// Appends a sentence about the values that the axis leaves out, at the top right of the plot.
fn outside(svg: &mut String, note: Option<String>) {
    if let Some(note) = note {
        let _ = writeln!(
            svg,
            "<text class=\"outside\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            TOP - 4.0,
            escape(&note)
        );
    }
}

/// Plots the cumulative distribution of each side: the time on the x axis, and the share of values
/// that are not larger on the y axis. The x axis leaves out extreme values and states how many.
#[must_use]
pub fn cdf(label: &str, sides: &[Values]) -> String {
    let mut svg = open(HEIGHT, label);
    let sorted = |side: &Values| side.iter().map(|ns| ns as f64).collect();
    let range = Range::of(&sides.iter().map(sorted).collect::<Vec<Vec<f64>>>());
    let shares = Range {
        high: 1.0,
        ..Range::default()
    };
    let (x, y) = (Axis::x(&range), Axis::y(&shares));
    outside(&mut svg, range.note("value", false));
    x_axis(&mut svg, &x, HEIGHT - BOTTOM);
    for share in [0.0, 0.25, 0.5, 0.75, 0.9, 1.0] {
        let at = y.place(share);
        let _ = writeln!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{:.1}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{:.0} %</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            share * 100.0
        );
    }
    for (side, values) in sides.iter().enumerate() {
        if values.is_empty() {
            continue;
        }
        let mut path = String::new();
        for i in 0..=CURVE_POINTS_MAX {
            let share = (i as f64 / CURVE_POINTS_MAX as f64).max(f64::MIN_POSITIVE);
            let value = values.quantile(share) as f64;
            let letter = if i == 0 { 'M' } else { 'L' };
            let _ = write!(path, "{letter}{:.1} {:.1}", x.place(value), y.place(share));
        }
        let _ = writeln!(svg, "<path class=\"line side{side}\" d=\"{path}\"/>");
    }
    svg.push_str("</svg>\n");
    svg
}

/// A difference to plot.
#[derive(Clone, Debug)]
pub struct Bar {
    /// Text next to the bar.
    pub label: String,
    /// Number of the side, which determines the colour.
    pub side: usize,
    /// The difference and its interval.
    pub difference: Difference,
}

/// Appends an arrow at the end of an axis, which shows that a value lies outside. `shape` is the
/// path from 5 above `y`.
fn arrow(svg: &mut String, side: usize, x: f64, y: f64, shape: &str) {
    let y = y - 5.0;
    let _ = writeln!(
        svg,
        "<path class=\"beyond side{side}\" d=\"M{x:.1} {y:.1}{shape}\"/>"
    );
}

/// Plots one bar for each difference, with its interval. The bar is hollow if the interval
/// contains 0. The axis leaves out extreme ends, states how many, and has an arrow for each.
#[must_use]
pub fn bars(label: &str, rows: &[Bar]) -> String {
    const ROW: f64 = 26.0;
    // About the width of a character.
    const COLUMN: f64 = 6.0;
    let longest = rows.iter().map(|row| row.label.len()).max().unwrap_or(0);
    let labels = (longest as f64 * COLUMN + 16.0).clamp(LEFT, WIDTH * 2.0 / 3.0);
    let bottom = TOP + ROW * rows.len() as f64;
    let mut svg = open(bottom + BOTTOM, label);
    let ends = rows.iter().map(|row| row.difference);
    let ends = ends.flat_map(|it| [it.low, it.high, it.estimate]);
    let range = Range::of_differences(&ends.collect::<Vec<f64>>());
    let axis = Axis::new(&range, labels, WIDTH - RIGHT);
    outside(&mut svg, range.note("end", true));
    x_axis(&mut svg, &axis, bottom);
    let zero = axis.place(0.0);
    for (i, row) in rows.iter().enumerate() {
        let (it, side) = (row.difference, row.side);
        let middle = TOP + ROW * (i as f64 + 0.5);
        let (at, low, high) = (
            axis.place(it.estimate),
            axis.place(it.low),
            axis.place(it.high),
        );
        let class = if it.is_resolved() { "bar" } else { "bar noise" };
        let _ = writeln!(
            svg,
            "<text class=\"name\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\
             <rect class=\"{class} side{side}\" x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"12\"/>\
             <path class=\"whisker\" d=\"M{low:.1} {middle:.1}H{high:.1}M{low:.1} {:.1}v8M{high:.1} {:.1}v8\"/>",
            labels - 8.0,
            middle + 4.0,
            escape(&row.label),
            zero.min(at),
            middle - 6.0,
            (at - zero).abs(),
            middle - 4.0,
            middle - 4.0
        );
        if it.high > range.high || it.estimate > range.high {
            arrow(&mut svg, side, WIDTH - RIGHT, middle, "l10 5l-10 5z");
        }
        if it.low < range.low || it.estimate < range.low {
            arrow(&mut svg, side, labels, middle, "l-10 5l10 5z");
        }
    }
    let _ = writeln!(
        svg,
        "<path class=\"zero\" d=\"M{zero:.1} {TOP}V{bottom:.1}\"/></svg>"
    );
    svg
}

/// Plots the medians of `sides` sides over the course of the run, which shows drift and whether it
/// affected all sides alike. Each element of `columns` has the medians of one interval of the run,
/// direct first; `None` is skipped. The y axis leaves out extreme medians, states how many, and has
/// an arrow for each.
#[must_use]
pub fn timeline(label: &str, sides: usize, columns: &[Vec<Option<u64>>], wall_ns: u64) -> String {
    let mut svg = open(HEIGHT, label);
    let of_side = |side: usize| {
        let own = columns.iter().filter_map(|column| *column.get(side)?);
        let mut own: Vec<f64> = own.map(|ns| ns as f64).collect();
        own.sort_unstable_by(f64::total_cmp);
        own
    };
    let range = Range::of(&(0..sides).map(of_side).collect::<Vec<_>>());
    let times = Range {
        high: wall_ns as f64,
        ..Range::default()
    };
    let (x, y) = (Axis::x(&times), Axis::y(&range));
    outside(&mut svg, range.note("point", false));
    x_axis(&mut svg, &x, HEIGHT - BOTTOM);
    for tick in y.ticks() {
        let at = y.place(tick);
        let _ = writeln!(
            svg,
            "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{:.1}\"/>\
             <text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            WIDTH - RIGHT,
            LEFT - 6.0,
            at + 4.0,
            show_ns(tick)
        );
    }
    for side in 0..sides {
        let mut path = String::new();
        for (i, column) in columns.iter().enumerate() {
            let Some(ns) = column.get(side).copied().flatten() else {
                continue;
            };
            let time = (i as f64 + 0.5) / columns.len() as f64 * wall_ns as f64;
            let letter = if path.is_empty() { 'M' } else { 'L' };
            let (ns, at) = (ns as f64, x.place(time));
            let _ = write!(path, "{letter}{at:.1} {:.1}", y.place(ns));
            if ns > range.high {
                arrow(&mut svg, side, at - 5.0, TOP + 5.0, "l10 0l-5 -10z");
            } else if ns < range.low {
                arrow(
                    &mut svg,
                    side,
                    at - 5.0,
                    HEIGHT - BOTTOM + 5.0,
                    "l10 0l-5 10z",
                );
            }
        }
        let _ = writeln!(svg, "<path class=\"line side{side}\" d=\"{path}\"/>");
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped() {
        assert_eq!(
            escape("<a href='x' b=\"y\">&\u{1b}\n"),
            "&lt;a href=&#39;x&#39; b=&quot;y&quot;&gt;&amp;  "
        );
    }

    #[test]
    fn ticks_are_round_and_within_the_axis() {
        for (low, high, want) in [
            (0.0, 100.0, &[0.0, 20.0, 40.0, 60.0, 80.0, 100.0][..]),
            (-30.0, 95.0, &[0.0, 50.0]),
            (7.0, 7.0, &[7.0, 7.2, 7.4, 7.6, 7.8, 8.0]),
            (1.1e6, 1.9e6, &[1.2e6, 1.4e6, 1.6e6, 1.8e6]),
        ] {
            let axis = Axis::x(&Range {
                low,
                high,
                ..Range::default()
            });
            let ticks = axis.ticks();
            assert_eq!(ticks.len(), want.len(), "{ticks:?}");
            for (tick, want) in ticks.iter().zip(want) {
                assert!((tick - want).abs() < 1e-9 * want.abs().max(1.0), "{tick}");
                let place = axis.place(*tick);
                assert!((LEFT..=WIDTH - RIGHT).contains(&place), "{tick}");
            }
        }
    }

    #[test]
    fn logarithmic_axes_have_round_ticks_and_even_decades() {
        let axis = Axis::x(&Range {
            low: 1e3,
            high: 1e9,
            ..Range::default()
        });
        let ticks = axis.ticks();
        let places: Vec<f64> = ticks.iter().map(|tick| axis.place(*tick)).collect();
        assert!((5..=8).contains(&ticks.len()), "{ticks:?}");
        let steps: Vec<f64> = places.windows(2).map(|two| two[1] - two[0]).collect();
        assert!(
            steps.iter().all(|step| (step - steps[0]).abs() < 1e-6),
            "{steps:?}"
        );
        assert_eq!(axis.place(0.0), LEFT);
    }

    /// Returns the x coordinates of the first curve of a plot.
    fn xs(svg: &str) -> Vec<f64> {
        let path = svg.split("d=\"M").find(|part| part.contains('L')).unwrap();
        let path = path.split('"').next().unwrap();
        let points = path
            .split('L')
            .map(|point| point.split(' ').next().unwrap());
        points.map(|x| x.parse().unwrap()).collect()
    }

    #[test]
    fn an_extreme_value_does_not_flatten_the_others() {
        let mut values: Vec<(u64, u32)> = (0..99).map(|i| (1_000_000 + 1_000 * i, 0)).collect();
        values.push((60_000_000_000, 0));
        let svg = cdf("x", &[Values::new(values)]);
        let xs = xs(&svg);
        let (from, to) = (xs[CURVE_POINTS_MAX / 10], xs[CURVE_POINTS_MAX * 9 / 10]);
        assert!(to - from > 100.0, "{from} {to}");
        assert!(
            svg.contains("outside: 1 value above 1.10 ms (up to 60.0 s)")
                || svg.contains("outside: 1 value above 1.3"),
            "{svg}"
        );

        let bar = |estimate: f64| Bar {
            label: "a".to_owned(),
            side: 1,
            difference: Difference {
                estimate,
                low: estimate * 0.9,
                high: estimate * 1.1,
            },
        };
        let svg = bars("x", &[bar(30e3), bar(40e3), bar(60e9)]);
        assert!(
            svg.contains("outside: 3 ends above") && svg.contains("up to +66.0 s"),
            "{svg}"
        );
        assert_eq!(svg.matches("class=\"beyond side1\"").count(), 1);
        let width = svg
            .split("width=\"")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap();
        assert!(width.parse::<f64>().unwrap() > 20.0, "{width}");

        let mut columns: Vec<Vec<Option<u64>>> = (0..20).map(|i| vec![Some(1_000 + i)]).collect();
        columns[7] = vec![Some(9_000_000)];
        let svg = timeline("x", 1, &columns, 1_000);
        assert!(
            svg.contains("outside: 1 point above") && svg.contains("up to 9.00 ms"),
            "{svg}"
        );
        assert_eq!(svg.matches("class=\"beyond side0\"").count(), 1);
    }

    #[test]
    fn plots_of_no_value_and_of_one_value_are_valid() {
        let one = Values::new(vec![(5, 0)]);
        let none = Values::default();
        for svg in [
            cdf("x", &[none.clone(), none.clone()]),
            cdf("x", &[one.clone(), none]),
            cdf("x", &[one.clone(), one]),
            bars("x", &[]),
            bars(
                "x",
                &[Bar {
                    label: "a<b".to_owned(),
                    side: 1,
                    difference: Difference::default(),
                }],
            ),
            timeline("x", 2, &[], 0),
            timeline("x", 2, &[vec![None, Some(3)], vec![Some(1), None]], 10),
        ] {
            assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"));
            assert!(!svg.contains("NaN") && !svg.contains("inf") && !svg.contains("a<b"));
        }
    }
}
