//! Tests of the report, with runs constructed by hand.

use super::*;
use crate::cli::Target;
use crate::precision::SchedStat;
use crate::response::Text;
use crate::schedule::Side;

fn done(round: u32, side: Side) -> Done {
    Done {
        round,
        side,
        start_ns: u64::from(round) * 1_000,
        ttft_ns: 100,
        total_ns: 500,
        events: 4,
        arrivals: 3,
        text: Text {
            hash: 9,
            order: Order::Unnumbered,
        },
    }
}

fn side(index: usize) -> Side {
    Side::all(9).nth(index).unwrap()
}

fn servers(names: &[&str]) -> Vec<Server> {
    let server = |name: &&str| Server {
        name: (*name).to_owned(),
        target: Target {
            host: "h".to_owned(),
            port: 1,
            tls: false,
        },
    };
    names.iter().map(server).collect()
}

fn rounds(count: u32, sides: usize, change: impl Fn(&mut Done)) -> Vec<Vec<Done>> {
    let one = |round| {
        let mut all: Vec<Done> = Side::all(sides).map(|side| done(round, side)).collect();
        all.iter_mut().for_each(&change);
        all
    };
    (0..count).map(one).collect()
}

/// Checks rounds of an engine and one proxy.
fn check(rounds: &[Vec<Done>]) -> ResponseCheck {
    let servers = servers(&["direct", "proxy"]);
    sequence(rounds.iter().map(Vec::as_slice), &servers)
}

#[test]
fn rounds_with_one_response_are_left_out() {
    let responses = [
        done(0, side(1)),
        done(2, side(0)),
        done(0, side(0)),
        done(9, side(0)),
    ];
    let found = Complete::of(&responses, 3, 2);
    assert_eq!(found.numbers, [Some(0), None, None]);
    assert_eq!(found.count(), 1);
    let sides: Vec<Side> = found.done.iter().map(|done| done.side).collect();
    assert_eq!(sides, [side(0), side(1)]);
    let mut later = rounds(3, 3, |_| {}).concat();
    later.remove(4);
    let found = Complete::of(&later, 3, 3);
    assert_eq!(found.numbers, [Some(0), None, Some(1)]);
    assert_eq!(found.rounds().nth(1).unwrap()[2].round, 2);
    assert_eq!(found.values(|done| done.ttft_ns).len(), 3);
}

#[test]
fn equal_responses_are_not_wrong() {
    let found = check(&rounds(3, 2, |_| {}));
    assert_eq!((found.rounds, found.numbered), (3, 0));
    assert_eq!(
        (found.events_differ, found.texts_differ),
        (Some(0), Some(0))
    );
    assert!(!found.is_wrong() && found.first.is_none());
}

#[test]
fn a_changed_text_is_wrong_if_direct_texts_do_not_vary() {
    let changed = rounds(3, 2, |done| {
        if done.round == 1 && done.side == side(1) {
            done.text.hash = 1;
            done.events = 3;
        }
    });
    let found = check(&changed);
    assert_eq!(
        (found.events_differ, found.texts_differ),
        (Some(1), Some(1))
    );
    assert!(found.is_wrong());
    let first = found.first.unwrap();
    assert_eq!(
        first,
        "round 1: 4 events direct, 3 through the proxy, different text"
    );

    let varied = rounds(3, 2, |done| {
        done.text.hash = u64::from(done.round) * 2 + done.side.index() as u64;
        done.events = done.round;
    });
    let found = check(&varied);
    assert_eq!((found.events_differ, found.texts_differ), (None, None));
    assert!(!found.is_wrong() && found.first.is_none());
}

#[test]
fn merged_events_are_wrong_on_a_mock_engine_only() {
    let merge = |order| {
        rounds(2, 2, move |done| {
            done.text.order = order;
            done.events -= u32::from(done.side == side(1));
        })
    };
    let model = check(&merge(Order::Unnumbered));
    assert!(!model.is_wrong());
    assert!(model.first.is_some());
    let mock = check(&merge(Order::Kept));
    assert!(mock.is_wrong());
}

#[test]
fn a_wrong_order_is_reported_even_if_both_sides_have_it() {
    let broken = check(&rounds(2, 2, |done| done.text.order = Order::Broken));
    assert_eq!((broken.numbered, &broken.broken[..]), (4, &[2, 2][..]));
    assert!(broken.is_wrong());
    assert!(
        broken
            .first
            .unwrap()
            .starts_with("round 0, direct: a token")
    );
}

#[test]
fn a_second_proxy_that_changes_the_text_is_named() {
    let changed = rounds(3, 3, |done| {
        if done.round == 2 && done.side == side(2) {
            done.text.hash = 1;
        }
    });
    let servers = servers(&["direct", "a", "b"]);
    let found = sequence(changed.iter().map(Vec::as_slice), &servers);
    assert_eq!((found.rounds, found.texts_differ), (3, Some(1)));
    let first = found.first.unwrap();
    assert_eq!(
        first,
        "round 2: 4 events direct, 4 through b, different text"
    );
}

fn difference(estimate: f64, low: f64, high: f64) -> Difference {
    Difference {
        estimate,
        low,
        high,
    }
}

#[test]
fn the_gate_fails_only_if_the_whole_interval_is_above_the_limit() {
    for (low, high, want) in [
        (-5.0, 10.0, Verdict::Held),
        (5.0, 20.0, Verdict::Undecided),
        (10.0, 20.0, Verdict::Undecided),
        (11.0, 20.0, Verdict::Exceeded),
    ] {
        assert_eq!(Verdict::of(difference(9.0, low, high), 10.0), want);
    }
    let metric = |title, p99| Metric {
        name: "x",
        title,
        values: vec![Values::default(); 2],
        differences: Differences {
            added: vec![Overhead {
                quantiles: [Difference::default(), Difference::default(), p99],
                mean: Difference::default(),
            }],
            over_first: Vec::new(),
        },
    };
    let held = difference(1.0, 0.0, 2.0);
    let over = difference(99.0, 90.0, 100.0);
    let either = difference(10.0, 5.0, 20.0);
    for (ttft, gap, total, want, by) in [
        (held, held, over, Verdict::Held, "a"),
        (held, either, over, Verdict::Undecided, "b"),
        (either, over, held, Verdict::Exceeded, "b"),
        (over, over, held, Verdict::Exceeded, "a"),
    ] {
        let metrics = [metric("a", ttft), metric("b", gap), metric("c", total)];
        let gate = judge(Duration::from_nanos(10), &metrics);
        assert_eq!((gate.verdict, gate.metric), (want, by));
    }
}

#[test]
fn a_client_that_is_not_exact_enough_causes_a_warning() {
    let exact = difference(30_000.0, 29_000.0, 31_000.0);
    let mut lag = Lag::new().unwrap();
    lag.stamp_ns.record(2_000).unwrap();
    lag.turn_ns.record(5_000).unwrap();
    lag.sched = Some(SchedStat {
        waited_ns: 100_000,
        runs: 100,
    });
    assert!(client_warnings(&lag, exact, 1_000_000, false).is_empty());
    // 30 us of overhead, and 20 us of waiting for a CPU per run.
    lag.sched = Some(SchedStat {
        waited_ns: 2_000_000,
        runs: 100,
    });
    let said = client_warnings(&lag, exact, 1_000_000, false);
    assert!(said.len() == 1 && said[0].contains("waited for a CPU"));
    // With busy polling, the share of the time counts: 2 ms of one second, and 2 ms of 100 ms.
    assert!(client_warnings(&lag, exact, 1_000_000_000, true).is_empty());
    let said = client_warnings(&lag, exact, 100_000_000, true);
    assert!(said.len() == 1 && said[0].contains("2.0 % of the time"));
    // The interval is so wide that the client's delay does not matter.
    let noisy = difference(30_000.0, -200_000.0, 200_000.0);
    assert!(client_warnings(&lag, noisy, 1_000_000, false).is_empty());
    lag.stamp_ns.record(1_000_000).unwrap();
    lag.send_ns.record(1_000_000).unwrap();
    let said = client_warnings(&lag, exact, 8_000, false);
    assert_eq!(said.len(), 4, "{said:?}");
    assert!(said[3].contains("busy 6"), "{said:?}");
}

/// Returns a report on rounds of an engine and two proxies, on a machine with two CPUs of which
/// other programs used `used`.
fn report(used: f64, more: &[&str], change: impl Fn(&mut Done)) -> Report {
    let base = [
        "ringside-bench",
        "overhead",
        "--direct=http://e:1",
        "--proxy=a=http://p:1",
        "--proxy=b=http://q:1",
        "--seed=1",
    ];
    let args = base.iter().chain(more).map(std::ffi::OsString::from);
    let Ok(crate::cli::Task::Overhead(options)) = crate::cli::parse(args) else {
        panic!("not accepted: {more:?}");
    };
    let around = Around {
        options: *options,
        model: "m".to_owned(),
        prompt_bytes: 1,
        machine: Machine::default(),
        look: Look {
            cpus: 2,
            used,
            ..Look::default()
        },
        load_at_end: String::new(),
        precision: Precision::default(),
    };
    let mut run = Run::new(3).unwrap();
    run.rounds = 40;
    run.done = rounds(40, 3, |done| {
        done.ttft_ns = 1_000_000 + 50_000 * done.side.index() as u64;
        done.total_ns = 2 * done.ttft_ns;
        change(done);
    })
    .concat();
    for (side, gaps) in run.gaps.iter_mut().enumerate() {
        gaps.extend((0..40).map(|round| (1_000 + 100 * side as u64, round)));
    }
    run.wall_ns = 40_000;
    Report::new(around, run)
}

#[test]
fn a_report_from_a_busy_machine_does_not_conclude() {
    let gate = "--max-overhead-p99=1ns";
    let differences = |report: &Report| {
        let json = crate::json::json(report);
        let found = json.pointer("/metrics/0/proxies/0/overhead").unwrap();
        (found.is_null(), json["busy"]["concludes"].as_bool())
    };
    for (used, more, concludes) in [
        (0.1, &[gate][..], true),
        (1.5, &[gate], false),
        (1.5, &[gate, "--allow-busy"], true),
    ] {
        let report = report(used, more, |_| {});
        assert_eq!(report.concludes(), concludes);
        assert_eq!(report.gate.is_some(), concludes);
        let (table, page) = (crate::table::table(&report), crate::page::page(&report));
        for part in ["added", "ratio", "minus a", "gate:"] {
            assert_eq!(table.contains(part), concludes, "{part}:\n{table}");
        }
        assert!(table.contains("time to first token\n  direct"), "{table}");
        for part in ["<h2>Added latency", "delays the median"] {
            assert_eq!(page.contains(part), concludes, "{part}: {page}");
        }
        assert_eq!(differences(&report), (!concludes, Some(concludes)));
        let is_busy = used > 1.0;
        assert_eq!(table.starts_with("BUSY MACHINE"), is_busy, "{table}");
        assert_eq!(page.contains("<b>BUSY MACHINE"), is_busy);
    }
}

#[test]
fn several_proxies_are_in_one_table() {
    let report = report(0.0, &[], |_| {});
    let table = crate::table::table(&report);
    let line = |label: &str| {
        let mut lines = table.lines().skip(4).map(str::trim_start);
        let line = lines.find(|line| line.starts_with(label)).unwrap();
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(line("a "), "a 1.05 ms 1.05 ms 1.05 ms 1.05 ms");
    assert_eq!(line("b "), "b 1.10 ms 1.10 ms 1.10 ms 1.10 ms");
    assert_eq!(
        line("minus a "),
        "minus a +50.0 us +50.0 us +50.0 us +50.0 us"
    );
    assert_eq!(line("ratio"), "ratio 2.00x 2.00x 2.00x 2.00x");
    assert!(
        table.contains("\ndirect e:1, a p:1, b q:1: POST"),
        "{table}"
    );
}

#[test]
fn a_page_survives_an_extreme_value_and_starts_with_its_origin() {
    let mut report = report(0.0, &[], |done| {
        if (done.round, done.side) == (7, side(1)) {
            done.ttft_ns = 60_000_000_000;
        }
    });
    report.around.machine.host = "node<7>".to_owned();
    report.around.machine.date = "2026-01-02T03:04:05Z".to_owned();
    report.around.machine.kernel = "6.1".to_owned();
    report.run.counts[1].server = Some("nginx/1.27".to_owned());
    let page = crate::page::page(&report);
    assert!(
        page.contains("outside: 1 value above 1.") && page.contains("up to 60.0 s"),
        "{page}"
    );
    let (top, _) = page.split_once("<h2>").unwrap();
    for part in [
        "2026-01-02T03:04:05Z (UTC), host node&lt;7&gt;,",
        "Linux 6.1",
        concat!("ringside-bench ", env!("CARGO_PKG_VERSION")),
        "; a sends `server: nginx/1.27`; no `server` field from direct, b",
    ] {
        assert!(top.contains(part), "{part}: {top}");
    }
}
