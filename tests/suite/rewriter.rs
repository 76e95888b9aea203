//! Conformance row U1: the cached-token count is rewritten in streams that are split at awkward
//! offsets. Nothing but the count may differ from the stream that the engine sent.

use mock_engine::{Engine, EngineConfig};

use crate::harness::{CHAT, PREFILLER, Sidecar, VERSIONS_OFF};
use crate::harness_more::RawEngine;

const USAGE: &str = r#"data: {"id":"x", "choices":[],"usage":{"prompt_tokens":1 ,"prompt_tokens_details":{"cached_tokens":49}}}"#;
const TOKEN: &str =
    r#"data: {"id":"x","choices":[{"delta":{"content":"a < b \u003c \"usage\":"}}]}"#;

/// Returns the body that the client receives when the decode engine sends its stream in these
/// chunks.
#[track_caller]
fn relayed(pieces: &[String]) -> String {
    let prefill = Engine::start(EngineConfig::prefill(), 0).unwrap();
    let sent = pieces.to_vec();
    let decode = RawEngine::start(move |mut conn, _| {
        while conn.request().is_some() {
            let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
                        transfer-encoding: chunked\r\n\r\n";
            let mut going = conn.say(head);
            for piece in &sent {
                going = going && conn.say(&format!("{:x}\r\n{piece}\r\n", piece.len()));
            }
            if !going || !conn.say("0\r\n\r\n") {
                return;
            }
        }
    });
    let sidecar = Sidecar::start(&[VERSIONS_OFF], decode.port());
    let target = prefill.host_port();
    let body = r#"{"messages":["u1"],"stream":true}"#;
    let response = sidecar.post(CHAT, body, &[(PREFILLER, &target)]);
    response.expect(200).text()
}

/// Has the decode engine send `stream` in several chunks, split at the byte offsets `cuts` of
/// `stream`. Checks that the client receives it with no change except to the cached-token count.
#[track_caller]
fn check(stream: &str, cuts: &[usize]) {
    let want = stream.replace("\"cached_tokens\":49", "\"cached_tokens\":7");
    let mut pieces = Vec::new();
    let mut from = 0;
    for &cut in cuts.iter().chain(&[stream.len()]) {
        if cut > from {
            pieces.push(stream[from..cut].to_owned());
            from = cut;
        }
    }
    assert_eq!(relayed(&pieces), want, "{cuts:?}");
}

fn usual() -> String {
    format!("{TOKEN}\n\n{USAGE}\n\ndata: [DONE]\n\n")
}

#[test]
fn u1_split_before_the_data_field() {
    let stream = usual();
    let at = stream.find(USAGE).unwrap();
    check(&stream, &[at]);
    // Inside the field name `data:`.
    check(&stream, &[at + 1, at + 4, at + 5, at + 6]);
}

#[test]
fn u1_split_inside_the_json() {
    let stream = usual();
    let at = stream.find("\"cached_tokens\"").unwrap();
    for cut in [at, at + 5, at + 15, at + 16, at + 17, at + 18, at + 20] {
        check(&stream, &[cut]);
    }
    let every: Vec<usize> = (1..stream.len()).collect();
    check(&stream, &every);
}

#[test]
fn u1_the_count_is_rewritten_without_a_final_newline() {
    check(&format!("{TOKEN}\n\n{USAGE}"), &[]);
    check(&format!("{TOKEN}\n\n{USAGE}\n"), &[]);
    check("data: [DONE]", &[3]);
    check(&format!("{TOKEN}\n\ndata: "), &[]);
}

#[test]
fn u1_lines_that_are_not_json() {
    let stream = format!(
        ": a comment\n\nevent: x\nid: 7\nretry: 5\ndata: not json\n\ndata: [\ndata:{{}}\n\
         data: {{\"usage\":\n\ndata: null\n\n{USAGE}\n\nother: {{\"usage\":{{}}}}\n\ndata: [DONE]\n\n"
    );
    check(&stream, &[]);
    check(&stream, &[20, 40, 60, 80]);
}
