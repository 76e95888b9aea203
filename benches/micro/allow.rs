//! Checks of a target against an allowlist of 5,000 pods and a few prefixes, and construction of
//! that list.

use std::hint::black_box;

use criterion::Criterion;
use ringside::fleet::{Allow, AllowList, AllowRule, Target};

pub(crate) fn bench(criterion: &mut Criterion) {
    let pods = (0..5000).flat_map(|i| {
        let ip = format!("10.{}.{}.{}", i / 62_500, i / 250 % 250, i % 250);
        [ip, format!("prefill-5f7c9d-{i}")]
    });
    let nets = ["10.250.0.0/16:8000", "192.168.7.0/24", "fd00::/8"].map(str::to_owned);
    let rules: Vec<_> = pods
        .chain(nets)
        .filter_map(|text| AllowRule::parse(&text).ok())
        .collect();
    assert_eq!(rules.len(), 10_003);
    let allowlist = Allow {
        list: AllowList::new(&rules),
        awaited: None,
    };
    let mut group = criterion.benchmark_group("allow");
    for (name, text) in [
        ("listed address", "10.0.19.249:8000"),
        ("listed name", "prefill-5f7c9d-4999:8000"),
        ("address in a prefix", "10.250.1.1:8000"),
        ("denied address", "169.254.169.254:80"),
    ] {
        let Ok(target) = Target::parse(text.as_bytes()) else {
            unreachable!("{text} is a target")
        };
        group.bench_function(name, |b| b.iter(|| allowlist.check(black_box(&target))));
    }
    group.bench_function("list of 10,003", |b| {
        b.iter(|| AllowList::new(black_box(&rules)))
    });
    group.finish();
}
