//! The report as one self-contained HTML page: styles and plots are inline, and a
//! `Content-Security-Policy` in its head forbids loading anything else.

use std::fmt::Write;

use crate::cli::Server;
use crate::limits::{SIDES_MAX, TIMELINE_COLUMNS_MAX};
use crate::report::{Metric, Report};
use crate::stats::Difference;
use crate::svg::{Bar, bars, cdf, escape, timeline};
use crate::table::{added, machine_text, method, table, versions};
use crate::units::show_signed_ns;

const STYLE: &str = "
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#6a737d;--grid:#e3e6ea;
--alert:#c2571a}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e6e8ea;--soft:#98a2ad;
--grid:#2c3238;--alert:#f0955a}}
body{background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif;margin:0 auto;
max-width:44rem;padding:1.5rem}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin:2rem 0 .3rem}
p{margin:.3rem 0}.soft{color:var(--soft)}
.warning{border-left:3px solid var(--alert);padding-left:.7rem}
svg{width:100%;height:auto}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
svg text.name{fill:var(--ink)}
.grid{stroke:var(--grid)}.zero,.whisker{stroke:var(--ink);fill:none}
.beyond{fill:currentColor}.line{fill:none;stroke:currentColor;stroke-width:1.8}
.bar{fill:currentColor;stroke:currentColor;opacity:.75}.bar.noise{fill:none;stroke-dasharray:3 3}
pre{overflow-x:auto;font-size:12px;line-height:1.4}
";

/// Colours of the sides, direct first. All are readable on light and on dark paper.
const COLOURS: [&str; SIDES_MAX] = [
    "#3b82c4", "#d9692b", "#2f9e60", "#a55fd0", "#c4902a", "#d0487a", "#2aa5b5", "#8a7a63",
    "#7f8a94",
];

fn style() -> String {
    let mut style = STYLE.to_owned();
    for (side, colour) in COLOURS.iter().enumerate() {
        let _ = writeln!(style, ".side{side}{{color:{colour}}}");
    }
    style
}

/// Returns the legend of a plot with one line per side, as HTML.
fn key(servers: &[Server]) -> String {
    let mut key = String::new();
    for (side, server) in servers.iter().enumerate() {
        let name = escape(&server.name);
        let _ = write!(key, "<span class=\"side{side}\">\u{2501} {name}</span> ");
    }
    key
}

/// Returns the report as a complete HTML page.
#[must_use]
pub fn page(report: &Report) -> String {
    let mut html = String::new();
    let _ = write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src \
         'unsafe-inline'\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>Proxy overhead, {date}</title><style>{style}</style></head><body>\n\
         <h1>Proxy overhead</h1>\n",
        style = style(),
        date = escape(&report.around.machine.date)
    );
    let machine = &report.around.machine;
    let _ = writeln!(
        html,
        "<p class=\"soft\">{} (UTC), {}<br>{}</p>",
        escape(&machine.date),
        escape(&machine_text(machine)),
        escape(&versions(report))
    );
    if let Some(sentence) = report.busy_sentence() {
        let _ = writeln!(
            html,
            "<p class=\"warning\"><b>{}</b></p>",
            escape(&sentence)
        );
    }
    if report.concludes() {
        summary(&mut html, report);
    }
    for warning in &report.warnings {
        let _ = writeln!(html, "<p class=\"warning\">{}</p>", escape(warning));
    }
    let [ttft, gap, _] = &report.metrics;
    let servers = &report.around.options.servers;
    if report.concludes() {
        section(
            &mut html,
            "Added latency",
            &format!(
                "{}. Whiskers show the interval; a hollow bar is below noise.",
                method(report)
            ),
            &bars("added latency", &overhead_rows(report)),
        );
    }
    let key = key(servers);
    for metric in [ttft, gap] {
        let title = format!("Distribution: {}", metric.title);
        let note = format!("{key}Share of values that are not larger.");
        section_raw(&mut html, &title, &note, &cdf(&title, &metric.values));
    }
    let columns = columns(report);
    let title = "Course of the run";
    let note = format!("{key}Median time to first token in each part of the run.");
    let plot = timeline(title, servers.len(), &columns, report.run.wall_ns);
    section_raw(&mut html, title, &note, &plot);
    let _ = write!(
        html,
        "<h2>All results</h2>\n<pre>{}</pre>\n</body></html>\n",
        table(report)
            .lines()
            .map(escape)
            .collect::<Vec<_>>()
            .join("\n")
    );
    html
}

fn summary(html: &mut String, report: &Report) {
    let [ttft, gap, _] = &report.metrics;
    let phrase = |it: Difference| {
        let range = format!(
            "between {} and {}",
            show_signed_ns(it.low),
            show_signed_ns(it.high)
        );
        match it.is_resolved() {
            true => format!("{} ({range})", added(it)),
            false => format!("an amount below noise ({range})"),
        }
    };
    let [direct, proxies @ ..] = &report.around.options.servers[..] else {
        return;
    };
    let of = |metric: &Metric, nth: usize| metric.differences.added.get(nth).copied();
    for (nth, proxy) in proxies.iter().enumerate() {
        let (Some(ttft), Some(gap)) = (of(ttft, nth), of(gap, nth)) else {
            continue;
        };
        let _ = writeln!(
            html,
            "<p><span class=\"side{}\">\u{25a0}</span> {} at {} in front of {} delays the median \
             first token by <b>{}</b>, and the 99th percentile of first tokens by <b>{}</b>. It adds \
             <b>{}</b> to the 99th percentile of gaps between chunks.</p>",
            nth + 1,
            escape(proxy.phrase()),
            escape(&proxy.target.authority()),
            escape(&direct.target.authority()),
            escape(&phrase(ttft.p50())),
            escape(&phrase(ttft.p99())),
            escape(&phrase(gap.p99()))
        );
    }
}

fn section(html: &mut String, title: &str, note: &str, plot: &str) {
    section_raw(html, title, &escape(note), plot);
}

/// Appends a section to `html`. The text `title` is escaped; `note` and `plot` are already HTML and
/// are not.
fn section_raw(html: &mut String, title: &str, note: &str, plot: &str) {
    let title = escape(title);
    let _ = writeln!(
        html,
        "<h2>{title}</h2>\n<p class=\"soft\">{note}</p>\n{plot}"
    );
}

fn overhead_rows(report: &Report) -> Vec<Bar> {
    let [ttft, gap, _] = &report.metrics;
    let servers = &report.around.options.servers;
    let mut rows = Vec::new();
    for metric in [ttft, gap] {
        for quantile in ["p50", "p90", "p99", "mean"] {
            for (nth, overhead) in metric.differences.added.iter().enumerate() {
                let difference = match quantile {
                    "p50" => overhead.quantiles[0],
                    "p90" => overhead.quantiles[1],
                    "p99" => overhead.quantiles[2],
                    _ => overhead.mean,
                };
                let mut label = format!("{}, {quantile}", metric.title);
                if servers.len() > 2 {
                    label = format!("{label}, {}", servers[nth + 1].name);
                }
                rows.push(Bar {
                    label: format!("{label}: {}", added(difference)),
                    side: nth + 1,
                    difference,
                });
            }
        }
    }
    rows
}

/// Divides the run into equal intervals and returns for each of them the median time to first token
/// in nanoseconds, direct first; `None` for a side without a response to a request that started in
/// the interval.
fn columns(report: &Report) -> Vec<Vec<Option<u64>>> {
    let sides = report.around.options.servers.len();
    let done = &report.run.done;
    let count = (done.len() / 8).clamp(1, TIMELINE_COLUMNS_MAX);
    let begun = done.iter().map(|done| done.start_ns).min().unwrap_or(0);
    let mut stretches = vec![vec![Vec::new(); sides]; count];
    for response in done {
        let since = response.start_ns.saturating_sub(begun) as f64;
        let column = since / report.run.wall_ns.max(1) as f64 * count as f64;
        let column = (column as usize).min(count - 1);
        stretches[column][response.side.index()].push(response.ttft_ns);
    }
    let median = |mut values: Vec<u64>| {
        values.sort_unstable();
        values.get(values.len() / 2).copied()
    };
    let column = |all: Vec<Vec<u64>>| all.into_iter().map(median).collect();
    stretches.into_iter().map(column).collect()
}
