//! The work of every reader of client bodies and engine responses is linear: it at most doubles for
//! an input of twice the size, for the worst input that is known for it.

use super::bootstrap::engines;
use super::decode_chunks::{Cut, Progress};
use super::decode_first::{StreamVerdict, Verdict};
use super::encode::{Merge, Stage, items};
use super::options::EcConnector;
use super::testing::Subject;
use super::warm_up::Answer;
use crate::api::Api;
use crate::budget::Budget;
use crate::work;

/// Asserts that the work of `run` on twice the size is at most 2.2 times as much: a little more
/// than the double, because names of more digits are longer.
fn expect_linear(what: &str, run: impl Fn(usize)) {
    let [one, two] = [2000, 4000].map(|size| work::of(|| run(size)));
    assert!(one >= 2000, "{what}: {one} units for 2000 are too few");
    assert!(two * 10 <= one * 22, "{what}: {one} units, then {two}");
}

fn list(count: usize, element: impl Fn(usize) -> String) -> String {
    (0..count).map(element).collect::<Vec<_>>().join(",")
}

#[test]
fn items_of_encoders() {
    let find = |api: Api, body: &str| {
        let subject = Subject::new(api, body);
        let request = subject.request();
        let _ = items(&request);
        let _ = Stage::new(&request, EcConnector::Nixl, &Budget::new(u64::MAX));
    };
    let chat = |messages: String| find(Api::Chat, &format!(r#"{{"messages":[{messages}]}}"#));
    let parts = |parts: String| chat(format!(r#"{{"role":"user","content":[{parts}]}}"#));
    expect_linear("messages", |n| {
        chat(list(n, |_| r#"{"content":[]}"#.into()))
    });
    expect_linear("parts", |n| {
        parts(list(n, |_| r#"{"type":"text","text":""}"#.into()));
    });
    expect_linear("the same item", |n| {
        parts(list(n, |_| {
            r#"{"type":"image_url","image_url":{"url":"u"}}"#.into()
        }));
    });
    expect_linear("members of a part", |n| {
        let members = list(n, |nth| format!(r#""m{nth}":1"#));
        parts(format!(r#"{{{members},"type":"image_url"}}"#));
    });
    expect_linear("repeated names", |n| {
        parts(format!("{{{}}}", list(n, |_| r#""type":"x""#.into())));
    });
    expect_linear("a long URL", |n| {
        let url = "u".repeat(n);
        parts(format!(
            r#"{{"type":"image_url","image_url":{{"url":"{url}"}}}}"#
        ));
    });
    expect_linear("members of a request of another API", |n| {
        let members = list(n, |nth| format!(r#""m{nth}":1"#));
        find(Api::Messages, &format!(r#"{{{members},"messages":[]}}"#));
    });
    expect_linear("blocks of the messages API", |n| {
        let blocks = list(n, |_| r#"{"type":"tool_result","content":[]}"#.into());
        let message = format!(r#"{{"role":"user","content":[{blocks}]}}"#);
        find(Api::Messages, &format!(r#"{{"messages":[{message}]}}"#));
    });
}

#[test]
fn responses_of_encoders() {
    let response = |from: usize, count: usize| {
        let members = list(count, |nth| format!(r#""m{}":1"#, from + nth));
        format!(r#"{{"ec_transfer_params":{{{members}}}}}"#)
    };
    expect_linear("many responses", |n| {
        let all: Vec<_> = (0..n / 20).map(|nth| response(nth % 40 * 20, 20)).collect();
        let mut merge = Merge::default();
        for one in &all {
            let _ = merge.take(one.as_bytes());
        }
    });
}

#[test]
fn streams_that_arrive_byte_by_byte() {
    expect_linear("a verdict on a long event", |n| {
        let stream = format!("data: {}", "x".repeat(n));
        let mut verdict = StreamVerdict::default();
        for end in 0..stream.len() {
            assert_eq!(verdict.read(&stream.as_bytes()[..end]), Verdict::Undecided);
        }
    });
    expect_linear("a response text", |n| {
        let event = |nth| {
            format!(
                "data: {{\"choices\":[{{\"index\":0,\"delta\":{{\"content\":\"{nth}\"}}}}]}}\n\n"
            )
        };
        let stream: String = (0..n / 10).map(event).collect();
        let mut answer = Answer::default();
        for byte in stream.as_bytes().chunks(1) {
            answer.feed(byte);
        }
    });
}

#[test]
fn responses_of_decoders_and_bootstrap_servers() {
    expect_linear("choices of a decode chunk", |n| {
        let body = r#"{"messages":[{"role":"user","content":"x"}],"max_tokens":100}"#;
        let subject = Subject::new(Api::Chat, body);
        let cut = Cut::of(Api::Chat, &subject.document, body.as_bytes(), 10).unwrap();
        let choices = list(n, |_| r#"{"message":{"content":"x"}}"#.into());
        let response = format!(r#"{{"choices":[{choices}],"usage":{{"completion_tokens":10}}}}"#);
        assert!(Progress::new(cut).take(response.as_bytes()).is_ok());
    });
    expect_linear("engines", |n| {
        let page = list(n / 4, |nth| format!(r#""{nth}":{{"engine_id":"e{nth}"}}"#));
        assert!(engines(format!("{{{page}}}").as_bytes()).is_some());
    });
}
