//! The report of a `neighbours` run, as text and as JSON. Times are in nanoseconds.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::cli::{Attack, NeighboursOptions};
use crate::limits::{QUIET_EVENTS_SHARE_MIN, QUIET_INTERVAL_MS, QUIET_STREAMS};
use crate::neighbours::attack::Work;
use crate::neighbours::quiet::Delays;
use crate::precision::{Machine, load_average, nanos};
use crate::stats::Values;
use crate::units::{show_ns, show_signed_ns};

/// Version of the JSON report's format. Incremented when a member is removed or changes its
/// meaning.
pub const SCHEMA: u32 = 1;

/// One measurement: an attack on a proxy in a round.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Number of the round, from 0.
    pub round: u32,
    /// The attack.
    pub attack: Attack,
    /// Index of the proxy among those of the options.
    pub proxy: usize,
    /// Delays of the events.
    pub delays: Delays,
    /// The work that the attack achieved.
    pub work: Work,
}

impl Cell {
    /// Formats the 99th percentile of the delays through the proxy minus that of the direct ones.
    #[must_use]
    pub fn added_p99(&self) -> String {
        let pooled = Pooled::of(std::iter::once(self));
        pooled.map_or_else(String::new, |it| show_signed_ns(it.added_ns(0.99)))
    }
}

/// The results of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// The options of the run.
    pub options: NeighboursOptions,
    /// Machine and date of the run.
    pub machine: Machine,
    /// The measurements, in the order of the run.
    pub cells: Vec<Cell>,
}

/// All rounds of an attack on a proxy.
#[derive(Clone, Debug)]
struct Pooled {
    cells: u32,
    direct: Values,
    proxied: Values,
    work: Work,
}

impl Pooled {
    /// Pools the cells; `None` if there are none.
    fn of<'a>(cells: impl Iterator<Item = &'a Cell>) -> Option<Self> {
        let (mut direct, mut proxied, mut work) = (Vec::new(), Vec::new(), Work::default());
        let mut count = 0;
        for cell in cells {
            count += 1;
            let numbered = |delay: &u64| (*delay, cell.round);
            direct.extend(cell.delays.direct.iter().map(numbered));
            proxied.extend(cell.delays.proxied.iter().map(numbered));
            work.done += cell.work.done;
            work.failures += cell.work.failures;
            work.elapsed_ns += cell.work.elapsed_ns;
        }
        (!proxied.is_empty()).then(|| Self {
            cells: count,
            direct: Values::new(direct),
            proxied: Values::new(proxied),
            work,
        })
    }

    /// Returns the quantile of the proxied delays minus that of the direct ones.
    fn added_ns(&self, share: f64) -> f64 {
        self.proxied.quantile(share) as f64 - self.direct.quantile(share) as f64
    }

    /// Returns the share of the planned events through the proxy that the engine has sent, where
    /// each cell took `time_ns`.
    fn events_share(&self, time_ns: u64) -> f64 {
        let interval_ns = QUIET_INTERVAL_MS as f64 * 1e6;
        let planned = time_ns as f64 / interval_ns * QUIET_STREAMS as f64 * f64::from(self.cells);
        self.proxied.len() as f64 / planned
    }
}

const fn unit(attack: Attack) -> &'static str {
    match attack {
        Attack::None => "",
        Attack::Uploads | Attack::Downloads => "MiB/s",
        Attack::Pipelining => "requests/s",
        Attack::Handshakes => "handshakes/s",
        Attack::Resets => "connections/s",
    }
}

/// Formats the work per second with its unit.
#[must_use]
pub fn rate(attack: Attack, work: &Work) -> String {
    let rate = match attack {
        Attack::None => return "-".to_owned(),
        Attack::Uploads | Attack::Downloads => work.rate() / f64::from(1 << 20),
        Attack::Pipelining | Attack::Handshakes | Attack::Resets => work.rate(),
    };
    format!("{rate:.0} {}", unit(attack))
}

/// Formats the ratio of an added delay to the lowest one. There is none if the lowest one is not
/// above 0, which is within the noise.
fn ratio(added_ns: f64, lowest_ns: f64) -> String {
    if added_ns <= lowest_ns {
        "lowest".to_owned()
    } else if lowest_ns > 0.0 {
        format!("{:.2}x", added_ns / lowest_ns)
    } else {
        "-".to_owned()
    }
}

impl Report {
    /// Returns the pooled results of `attack` on each proxy.
    fn pooled(&self, attack: Attack) -> Vec<Option<Pooled>> {
        let indexes = 0..self.options.proxies.len();
        let cells = |proxy: usize| {
            let all = self.cells.iter();
            all.filter(move |cell| (cell.attack, cell.proxy) == (attack, proxy))
        };
        indexes.map(|proxy| Pooled::of(cells(proxy))).collect()
    }

    /// Returns the report as text.
    #[must_use]
    pub fn text(&self) -> String {
        let (options, machine) = (&self.options, &self.machine);
        let mut text = format!(
            "{} rounds, {} per attack and proxy; {QUIET_STREAMS} quiet streams through the proxy \
             and 1 direct, an event every {QUIET_INTERVAL_MS} ms\n\
             {}, {}, {} CPUs, Linux {}, load {} at the start\n",
            options.rounds,
            show_ns(nanos(options.time) as f64),
            machine.date,
            machine.cpu,
            machine.cpus,
            machine.kernel,
            machine.load_at_start,
        );
        for attack in &options.attacks {
            self.table(&mut text, *attack);
        }
        text.push_str(
            "\nadded: quantile of the delays through the proxy minus the same quantile of the \
             direct ones, all rounds\ntogether. A proxy that does less work is not quieter: \
             compare the added delay at a similar work.\n",
        );
        text
    }

    fn table(&self, text: &mut String, attack: Attack) {
        let pooled = self.pooled(attack);
        let added_p99 = |row: &Pooled| row.added_ns(0.99);
        let lowest_ns = pooled
            .iter()
            .flatten()
            .map(added_p99)
            .fold(f64::INFINITY, f64::min);
        let _ = writeln!(
            text,
            "\n{:<16}{:>12}{:>12}{:>10}{:>12}{:>12}{:>10}{:>22}{:>10}",
            attack.name(),
            "added p50",
            "added p99",
            "p99 ratio",
            "max",
            "direct p99",
            "samples",
            "work",
            "failures"
        );
        for (proxy, row) in self.options.proxies.iter().zip(&pooled) {
            let name = format!("  {}", proxy.name);
            let _ = match row {
                Some(row) => writeln!(
                    text,
                    "{name:<16}{:>12}{:>12}{:>10}{:>12}{:>12}{:>10}{:>22}{:>10}",
                    show_signed_ns(row.added_ns(0.5)),
                    show_signed_ns(added_p99(row)),
                    ratio(added_p99(row), lowest_ns),
                    show_ns(row.proxied.quantile(1.0) as f64),
                    show_ns(row.direct.quantile(0.99) as f64),
                    row.proxied.len(),
                    rate(attack, &row.work),
                    row.work.failures
                ),
                None if proxy.target(attack).is_none() => {
                    writeln!(text, "{name:<16}  skipped: no tls= address")
                }
                None => writeln!(text, "{name:<16}  not measured"),
            };
        }
        for (proxy, row) in self.options.proxies.iter().zip(&pooled) {
            let share = (row.as_ref()).map(|row| row.events_share(nanos(self.options.time)));
            if let Some(share) = share.filter(|share| *share < QUIET_EVENTS_SHARE_MIN) {
                let _ = writeln!(
                    text,
                    "  warning: {}: the engine sent only {:.0} % of the events; this machine is \
                     busy with something else",
                    proxy.name,
                    share * 100.0
                );
            }
        }
    }

    /// Returns the report as JSON, with all cells.
    #[must_use]
    pub fn json(&self) -> Value {
        let options = &self.options;
        json!({
            "tool": "ringside-bench neighbours",
            "version": env!("CARGO_PKG_VERSION"),
            "schema": SCHEMA,
            "date": self.machine.date,
            "machine": {
                "cpu": self.machine.cpu,
                "cpus": self.machine.cpus,
                "kernel": self.machine.kernel,
                "load_at_start": self.machine.load_at_start,
                "load_at_end": load_average(),
            },
            "parameters": {
                "listen": options.listen.to_string(),
                "proxies": options.proxies.iter().map(|proxy| json!({
                    "name": proxy.name,
                    "address": proxy.addr.to_string(),
                    "tls": proxy.tls.map(|addr| addr.to_string()),
                })).collect::<Vec<_>>(),
                "attacks": options.attacks.iter().map(|it| it.name()).collect::<Vec<_>>(),
                "rounds": options.rounds,
                "time_ns": nanos(options.time),
                "cpu": options.cpu,
                "quiet_streams": QUIET_STREAMS,
                "quiet_interval_ms": QUIET_INTERVAL_MS,
            },
            "pooled": options.attacks.iter().flat_map(|attack| {
                self.pooled(*attack).into_iter().zip(&options.proxies).filter_map(|(row, proxy)| {
                    let row = row?;
                    Some(member(None, *attack, &proxy.name, [&row.direct, &row.proxied], row.work))
                })
            }).collect::<Vec<_>>(),
            "cells": self.cells.iter().filter_map(|cell| {
                let row = Pooled::of(std::iter::once(cell))?;
                let name = &options.proxies[cell.proxy].name;
                let values = [&row.direct, &row.proxied];
                Some(member(Some(cell.round), cell.attack, name, values, cell.work))
            }).collect::<Vec<_>>(),
        })
    }
}

/// Returns one row of the JSON report. `round` is `None` for all rounds together.
fn member(
    round: Option<u32>,
    attack: Attack,
    proxy: &str,
    [direct, proxied]: [&Values; 2],
    work: Work,
) -> Value {
    json!({
        "round": round,
        "attack": attack.name(),
        "proxy": proxy,
        "proxied": quantiles(proxied),
        "direct": quantiles(direct),
        "work": work.done,
        "work_unit": match attack {
            Attack::None => None,
            Attack::Uploads | Attack::Downloads => Some("bytes"),
            Attack::Pipelining => Some("requests"),
            Attack::Handshakes => Some("handshakes"),
            Attack::Resets => Some("connections"),
        },
        "work_ns": work.elapsed_ns,
        "failures": work.failures,
    })
}

fn quantiles(values: &Values) -> Value {
    json!({
        "samples": values.len(),
        "p50_ns": values.quantile(0.5),
        "p90_ns": values.quantile(0.9),
        "p99_ns": values.quantile(0.99),
        "max_ns": values.quantile(1.0),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::cli::Proxy;

    fn report() -> Report {
        let proxy = |name: &str, tls: bool| Proxy {
            name: name.to_owned(),
            addr: ([127, 0, 0, 1], 2).into(),
            tls: tls.then_some(([127, 0, 0, 1], 3).into()),
        };
        let cell = |round, proxy, added: u64| Cell {
            round,
            attack: Attack::Uploads,
            proxy,
            delays: Delays {
                direct: vec![1_000; 10],
                proxied: vec![1_000 + added; 40],
            },
            work: Work {
                done: 512 << 20,
                failures: 1,
                elapsed_ns: 1_000_000_000,
            },
        };
        Report {
            options: NeighboursOptions {
                listen: ([127, 0, 0, 1], 1).into(),
                proxies: vec![proxy("a", true), proxy("b", false)],
                attacks: vec![Attack::Uploads, Attack::Handshakes],
                rounds: 2,
                time: Duration::from_secs(1),
                cpu: None,
                json: None,
                quiet: false,
            },
            machine: Machine::default(),
            cells: vec![cell(0, 0, 500), cell(0, 1, 250), cell(1, 1, 250)],
        }
    }

    #[test]
    fn text_has_a_row_per_proxy() {
        let text = report().text();
        let rows: Vec<Vec<&str>> = text
            .lines()
            .filter(|line| line.starts_with("  "))
            .map(|line| line.split_whitespace().collect())
            .collect();
        let cells = |nth: usize| rows[nth].join(" ");
        assert_eq!(
            cells(0),
            "a +500 ns +500 ns 2.00x 1.50 us 1.00 us 40 512 MiB/s 1"
        );
        assert_eq!(
            cells(1),
            "b +250 ns +250 ns lowest 1.25 us 1.00 us 80 512 MiB/s 2"
        );
        // 40 of 800 events in one round, and 80 of 1,600 in two.
        assert!(cells(2).starts_with("warning: a: the engine sent only 5 %"));
        assert!(cells(3).starts_with("warning: b: the engine sent only 5 %"));
        assert_eq!(cells(4), "a not measured");
        assert_eq!(cells(5), "b skipped: no tls= address");
    }

    #[test]
    fn json_has_all_cells_and_the_pooled_rows() {
        let json = report().json();
        let at = |path: &str| json.pointer(path).cloned().unwrap_or_default();
        assert_eq!(at("/cells/2/round"), 1);
        assert_eq!(at("/cells/2/proxy"), "b");
        assert_eq!(at("/cells/2/proxied/p99_ns"), 1_250);
        assert_eq!(at("/cells/2/direct/samples"), 10);
        assert_eq!(at("/cells/3"), Value::Null);
        assert_eq!(at("/pooled/1/proxied/samples"), 80);
        assert_eq!(at("/pooled/1/round"), Value::Null);
        assert_eq!(at("/pooled/1/work"), 2_u64 * (512 << 20));
        assert_eq!(at("/pooled/2"), Value::Null);
    }

    #[test]
    fn a_ratio_to_noise_is_not_shown() {
        assert_eq!(ratio(300.0, 200.0), "1.50x");
        assert_eq!(ratio(200.0, 200.0), "lowest");
        assert_eq!(ratio(300.0, -200.0), "-");
    }
}
