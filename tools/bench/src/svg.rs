//! Plots as inline SVG. Colours are CSS classes, so that the page can have a light and a dark
//! theme.
//!
//! Every text from outside this file passes through [`escape`].

use std::fmt::Write;

use crate::limits::CURVE_POINTS_MAX;
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

/// Maps data values to coordinates of the plot.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    fn x(low: f64, high: f64) -> Self {
        Self::new(low, high, LEFT, WIDTH - RIGHT)
    }

    fn y(low: f64, high: f64) -> Self {
        Self::new(low, high, HEIGHT - BOTTOM, TOP)
    }

    fn new(low: f64, high: f64, from: f64, to: f64) -> Self {
        let high = if high > low { high } else { low + 1.0 };
        Self {
            low,
            high,
            from,
            to,
        }
    }

    fn place(&self, value: f64) -> f64 {
        let share = (value - self.low) / (self.high - self.low);
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    /// Returns the values of the tick marks: a few round values within the axis's range.
    fn ticks(&self) -> Vec<f64> {
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

/// Plots the cumulative distribution of each side: the time on the x axis, and the share of values
/// that are not larger on the y axis. The x axis ends at the 99.5th percentile of the slower side,
/// so that one outlier does not flatten the rest.
#[must_use]
pub fn cdf(label: &str, sides: &[Values]) -> String {
    let mut svg = open(HEIGHT, label);
    let ends = |share: f64| sides.iter().map(move |side| side.quantile(share));
    let low = ends(f64::MIN_POSITIVE).min().unwrap_or(0) as f64;
    let high = ends(0.995).max().unwrap_or(0) as f64;
    let (x, y) = (Axis::x(low, high), Axis::y(0.0, 1.0));
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

/// Plots one bar for each difference, with its interval. The bar is hollow if the interval
/// contains 0.
#[must_use]
pub fn bars(label: &str, rows: &[Bar]) -> String {
    const ROW: f64 = 26.0;
    const LABELS: f64 = 250.0;
    let bottom = TOP + ROW * rows.len() as f64;
    let mut svg = open(bottom + BOTTOM, label);
    let ends = rows.iter().flat_map(|row| {
        [
            row.difference.low,
            row.difference.high,
            row.difference.estimate,
        ]
    });
    let (low, high) = ends.fold((0.0_f64, 0.0_f64), |(low, high), end| {
        (low.min(end), high.max(end))
    });
    let axis = Axis::new(low, high, LABELS, WIDTH - RIGHT);
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
            LABELS - 8.0,
            middle + 4.0,
            escape(&row.label),
            zero.min(at),
            middle - 6.0,
            (at - zero).abs(),
            middle - 4.0,
            middle - 4.0
        );
    }
    let _ = writeln!(
        svg,
        "<path class=\"zero\" d=\"M{zero:.1} {TOP}V{bottom:.1}\"/></svg>"
    );
    svg
}

/// Plots the medians of `sides` sides over the course of the run, which shows drift and whether it
/// affected all sides alike. Each element of `columns` has the medians of one interval of the run,
/// direct first; `None` is skipped.
#[must_use]
pub fn timeline(label: &str, sides: usize, columns: &[Vec<Option<u64>>], wall_ns: u64) -> String {
    let mut svg = open(HEIGHT, label);
    let seen = || columns.iter().flatten().flatten();
    let low = seen().min().map_or(0.0, |ns| *ns as f64);
    let high = seen().max().map_or(0.0, |ns| *ns as f64);
    let (x, y) = (Axis::x(0.0, wall_ns as f64), Axis::y(low, high));
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
            let _ = write!(
                path,
                "{letter}{:.1} {:.1}",
                x.place(time),
                y.place(ns as f64)
            );
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
            let axis = Axis::x(low, high);
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
