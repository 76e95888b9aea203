//! Tests of the access log, from the ring to the file.

use super::*;
use crate::metrics::{EndedAt, EndedBy, Inline, Phase, Route};
use crate::pd::{Outcome, Reason};
use serde_json::Value;

fn record(id: &str) -> Record {
    Record {
        unix_micros: 1_700_000_000_123_456,
        id: Inline::new(id.as_bytes()),
        route: Route::Chat,
        method: Inline::new(b"POST"),
        status: 200,
        ended_by: EndedBy::Client,
        ended_at: EndedAt::of(Phase::Streaming),
        client: Some("[::ffff:10.0.0.1]:4711".parse().unwrap()),
        upstream: Inline::new(b"10.0.0.3:8200"),
        rank: Some(3),
        model: Inline::new(b"m"),
        is_stream: true,
        error: Some("client_gone"),
        trace_id: Some(0xabc),
        agent: Inline::new(b"curl/8"),
        prefill: Inline::new(b"10.0.0.2:8000"),
        outcome: Some(Outcome::Remote),
        reason: Reason::None,
        attempts: 2,
        bytes_in: 1 << 40,
        bytes_out: 7,
        prefill_micros: Some(1_500),
        ttft_micros: None,
        total_micros: 2_000_001,
        proxy_micros: 9,
    }
}

fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("ringside-access-{name}-{}", std::process::id()))
}

#[test]
fn a_line_is_json_with_every_field() {
    let mut out = Vec::new();
    line::write(&record("a\"b"), &mut out);
    assert_eq!(out.pop(), Some(b'\n'));
    let got: Value = serde_json::from_slice(&out).unwrap();
    let want: Value = serde_json::from_str(
        r#"{"ts":"2023-11-14T22:13:20.123456Z","id":"a\"b","route":"chat","method":"POST",
        "status":200,"end":"CS","client":"10.0.0.1","client_port":4711,"agent":"curl/8","model":"m","stream":true,
        "upstream":"10.0.0.3:8200","rank":3,"prefill":"10.0.0.2:8000","pd":"remote",
        "reason":"none","error":"client_gone","trace_id":"00000000000000000000000000000abc","attempts":2,"bytes_in":1099511627776,"bytes_out":7,"t_prefill":1.500,
        "t_ttft":null,"t_total":2000.001,"t_proxy":0.009}"#,
    )
    .unwrap();
    assert_eq!(got, want);
}

#[test]
fn the_longest_line_fits() {
    let worst = Record {
        unix_micros: u64::MAX / 1_000,
        id: Inline::new(&[1; 100]),
        method: Inline::new(&[1; 100]),
        prefill: Inline::new(&[1; 100]),
        client: Some(
            "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535"
                .parse()
                .unwrap(),
        ),
        upstream: Inline::new(&[1; 100]),
        rank: Some(u16::MAX),
        model: Inline::new(&[1; 100]),
        error: Some("prefill_answer_too_large"),
        trace_id: Some(u128::MAX),
        agent: Inline::new(&[1; 100]),
        attempts: u32::MAX,
        bytes_in: u64::MAX,
        bytes_out: u64::MAX,
        prefill_micros: Some(u64::MAX),
        ttft_micros: Some(u64::MAX),
        total_micros: u64::MAX,
        proxy_micros: u64::MAX,
        ..record("")
    };
    let mut out = Vec::new();
    line::write(&worst, &mut out);
    assert!(out.len() <= line::BYTES_MAX, "{}", out.len());
    assert_eq!(worst.id.as_bytes().len(), 64);
}

#[test]
fn all_shards_reach_the_file() {
    let path = scratch("all");
    let target = AccessLog::File(path.clone());
    let (mut rings, writer) = start(&target, 2).unwrap().unwrap();
    for count in 0..100 {
        for ring in &mut rings {
            assert!(ring.push(record(&format!("r{count}"))));
        }
    }
    assert_eq!(writer.finish(Duration::from_secs(60)), 200);
    let text = fs::read_to_string(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(text.lines().count(), 200);
    assert!(
        text.lines()
            .all(|line| serde_json::from_str::<Value>(line).is_ok())
    );
}

#[test]
fn a_full_ring_drops() {
    let (producer, _consumer) = rtrb::RingBuffer::new(2);
    let mut ring = AccessRing { producer };
    let pushed = [0; 3].map(|_| ring.push(record("x")));
    assert_eq!(pushed, [true, true, false]);
}

#[test]
fn a_rotated_file_is_reopened() {
    let path = scratch("rotated");
    let old = path.with_extension("1");
    let mut file = RotatedFile::open(path.clone()).unwrap();
    file.file.write_all(b"one\n").unwrap();
    fs::rename(&path, &old).unwrap();
    file.file.write_all(b"two\n").unwrap();
    file.follow();
    file.file.write_all(b"three\n").unwrap();
    file.follow();
    file.file.write_all(b"four\n").unwrap();
    assert_eq!(fs::read_to_string(&old).unwrap(), "one\ntwo\n");
    assert_eq!(fs::read_to_string(&path).unwrap(), "three\nfour\n");
    fs::remove_file(&old).unwrap();
    fs::remove_file(&path).unwrap();
}

#[test]
fn off_returns_none_and_a_bad_file_is_an_error() {
    assert!(start(&AccessLog::Off, 1).unwrap().is_none());
    assert!(start(&AccessLog::File(PathBuf::from("/no/such/directory/log")), 1).is_err());
}
