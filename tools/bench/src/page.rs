//! The report as one self-contained HTML page: styles and plots are inline, and a
//! `Content-Security-Policy` in its head forbids loading anything else.

use std::fmt::Write;

use crate::limits::TIMELINE_COLUMNS_MAX;
use crate::report::Report;
use crate::stats::Difference;
use crate::svg::{bars, cdf, escape, timeline};
use crate::table::{added, method, table};
use crate::units::show_signed_ns;

const STYLE: &str = "
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#6a737d;--grid:#e3e6ea;
--direct:#2b6cb0;--proxy:#c2571a}
@media(prefers-color-scheme:dark){:root{--paper:#14171a;--ink:#e6e8ea;--soft:#98a2ad;
--grid:#2c3238;--direct:#6cb0f5;--proxy:#f0955a}}
body{background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif;margin:0 auto;
max-width:44rem;padding:1.5rem}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin:2rem 0 .3rem}
p{margin:.3rem 0}.soft{color:var(--soft)}
.warning{border-left:3px solid var(--proxy);padding-left:.7rem}
svg{width:100%;height:auto}svg text{fill:var(--soft);font:11px system-ui,sans-serif}
svg text.name{fill:var(--ink)}
.grid{stroke:var(--grid)}.zero,.whisker{stroke:var(--ink);fill:none}
.line{fill:none;stroke-width:1.8}.line.direct{stroke:var(--direct)}.line.proxy{stroke:var(--proxy)}
.bar{fill:var(--proxy);stroke:var(--proxy);opacity:.75}.bar.noise{fill:none;stroke-dasharray:3 3}
.key.direct{color:var(--direct)}.key.proxy{color:var(--proxy)}
pre{overflow-x:auto;font-size:12px;line-height:1.4}
";

/// Returns the report as a complete HTML page.
#[must_use]
pub fn page(report: &Report) -> String {
    let mut html = String::new();
    let _ = write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src \
         'unsafe-inline'\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>Proxy overhead, {date}</title><style>{STYLE}</style></head><body>\n\
         <h1>Overhead of the proxy</h1>\n",
        date = escape(&report.around.machine.date)
    );
    summary(&mut html, report);
    let [ttft, gap, _] = &report.metrics;
    section(
        &mut html,
        "Added latency",
        &format!(
            "{}. Whiskers show the interval; a hollow bar is below noise.",
            method(report)
        ),
        &bars("added latency", &overhead_rows(report)),
    );
    let key = "<span class=\"key direct\">\u{2501} direct</span>, \
               <span class=\"key proxy\">\u{2501} through the proxy</span>. ";
    for metric in [ttft, gap] {
        let title = format!("Distribution: {}", metric.title);
        let note = format!("{key}Share of values that are not larger.");
        section_raw(&mut html, &title, &note, &cdf(&title, &metric.values));
    }
    let columns = columns(report);
    let title = "Course of the run";
    let note = format!("{key}Median time to first token in each part of the run.");
    let plot = timeline(title, &columns, report.run.wall_ns);
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
    let said = |it: Difference| {
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
    let [direct, proxy] = report
        .around
        .options
        .targets
        .each_ref()
        .map(|it| it.authority());
    let _ = writeln!(
        html,
        "<p>The proxy {} in front of {} delays the median first token by <b>{}</b>, and the 99th \
         percentile of first tokens by <b>{}</b>. It adds <b>{}</b> to the 99th percentile of gaps \
         between chunks.</p>",
        escape(&proxy),
        escape(&direct),
        escape(&said(ttft.overhead.p50())),
        escape(&said(ttft.overhead.p99())),
        escape(&said(gap.overhead.p99()))
    );
    for warning in &report.warnings {
        let _ = writeln!(html, "<p class=\"warning\">{}</p>", escape(warning));
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

fn overhead_rows(report: &Report) -> Vec<(String, Difference)> {
    let [ttft, gap, _] = &report.metrics;
    let mut rows = Vec::new();
    for metric in [ttft, gap] {
        let [p50, p90, p99] = metric.overhead.quantiles;
        let named = [
            ("p50", p50),
            ("p90", p90),
            ("p99", p99),
            ("mean", metric.overhead.mean),
        ];
        rows.extend(
            named.map(|(name, it)| (format!("{}, {name}: {}", metric.title, added(it)), it)),
        );
    }
    rows
}

/// Divides the run into equal intervals and returns for each of them the median time to first token
/// in nanoseconds, direct first; `None` for a side without a response to a request that started in
/// the interval.
fn columns(report: &Report) -> Vec<[Option<u64>; 2]> {
    let done = &report.run.done;
    let count = (done.len() / 8).clamp(1, TIMELINE_COLUMNS_MAX);
    let begun = done.iter().map(|done| done.start_ns).min().unwrap_or(0);
    let mut stretches = vec![[const { Vec::new() }; 2]; count];
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
    stretches.into_iter().map(|both| both.map(median)).collect()
}
