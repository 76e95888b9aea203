//! Judges whether the decoder's response in the decode-first order can be sent to the client.

use std::ops::Range;

use crate::h1::{DataLines, LinePart};
use crate::json::{elements, member, string_is};

/// Whether a decode-first response can be sent to the client, judged from the part of it that has
/// been received so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The part of the response received so far does not decide it.
    Undecided,
    /// The decoder serves the request, so the withheld response may be forwarded.
    Served,
    /// The decoder found too little of the prompt in the store, so a prefill leg is needed.
    BelowThreshold,
}

/// Judges a streamed response as it arrives. Each byte and each event is read once.
///
/// The decoder sends `cache_threshold` before any token: in the first event or, for a chat
/// completion, in the event after the one with the role. A token, another finish reason, or a
/// second event with neither therefore means that the decoder serves the request.
#[derive(Debug, Default)]
pub struct StreamVerdict {
    lines: DataLines,
    /// Number of bytes read so far.
    read: usize,
    /// The data of the current line.
    data: Range<usize>,
    events: u32,
}

impl StreamVerdict {
    /// Reads on in `stream`, which is the response body from its first byte on, up to those that
    /// have just been received. Not called again after a verdict.
    pub fn read(&mut self, stream: &[u8]) -> Verdict {
        while let Some(part) = self.lines.next(stream, &mut self.read) {
            match part {
                LinePart::Data { start, end, begins } => {
                    let start = if begins { start } else { self.data.start };
                    self.data = start..end;
                }
                LinePart::End { is_data: false } => {}
                LinePart::End { is_data: true } => {
                    let data = &stream[std::mem::take(&mut self.data)];
                    match verdict_of_event(data.trim_ascii()) {
                        Verdict::Undecided => {}
                        known => return known,
                    }
                    self.events += 1;
                    if self.events == 2 {
                        return Verdict::Served;
                    }
                }
            }
        }
        Verdict::Undecided
    }
}

/// Returns the verdict on the JSON text of one event or of a complete response.
fn verdict_of_event(event: &[u8]) -> Verdict {
    let choices = member(event, "choices").unwrap_or_default();
    let Some(choice) = elements(choices).next() else {
        // `[DONE]`, an error or an event of another API: not a cache threshold.
        return Verdict::Served;
    };
    let is_set = |value: Option<&[u8]>| {
        value.is_some_and(|value| !matches!(value, b"null" | b"\"\"" | b"[]"))
    };
    match member(choice.value, "finish_reason") {
        Some(reason) if string_is(reason, "cache_threshold") => return Verdict::BelowThreshold,
        reason if is_set(reason) => return Verdict::Served,
        _ => {}
    }
    let delta = member(choice.value, "delta").unwrap_or(choice.value);
    let has_token = [
        "content",
        "text",
        "reasoning_content",
        "reasoning",
        "tool_calls",
        "token_ids",
    ]
    .iter()
    .any(|name| is_set(member(delta, name)) || is_set(member(choice.value, name)));
    if has_token {
        Verdict::Served
    } else {
        Verdict::Undecided
    }
}

/// Returns the verdict on a complete response that is not streamed. It is never `Undecided`.
#[must_use]
pub fn verdict_of_whole(response: &[u8]) -> Verdict {
    match verdict_of_event(response) {
        Verdict::BelowThreshold => Verdict::BelowThreshold,
        Verdict::Undecided | Verdict::Served => Verdict::Served,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the verdict on a stream of which `step` bytes arrive at a time.
    fn verdict(stream: &[u8], step: usize) -> Verdict {
        let mut judge = StreamVerdict::default();
        let ends = (step..stream.len()).step_by(step).chain([stream.len()]);
        let mut verdicts = ends.map(|end| judge.read(&stream[..end]));
        let known = verdicts.find(|verdict| *verdict != Verdict::Undecided);
        known.unwrap_or(Verdict::Undecided)
    }

    #[test]
    fn the_verdict_is_reached_as_early_as_possible() {
        let role = r#"data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#;
        let token =
            r#"data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}"#;
        let met = r#"data: {"choices":[{"index":0,"delta":{},"finish_reason":"cache_threshold"}]}"#;
        let text = r#"data: {"choices":[{"text":"a","finish_reason":null}]}"#;
        let text_met = r#"data: {"choices":[{"text":"","finish_reason":"cache_thresho\u006cd"}]}"#;
        let stop = r#"data: {"choices":[{"text":"","finish_reason":"stop"}]}"#;
        let ids = r#"data: {"choices":[{"token_ids":[7],"finish_reason":null}]}"#;
        let cases: [(&[&str], Verdict); 12] = [
            (&[], Verdict::Undecided),
            (&[role], Verdict::Undecided),
            (&[role, ""], Verdict::Undecided),
            (&[role, "", token], Verdict::Served),
            (&[role, "", met], Verdict::BelowThreshold),
            (&[role, "", role], Verdict::Served),
            (&[": keep-alive", "", role], Verdict::Undecided),
            (&[text], Verdict::Served),
            (&[text_met], Verdict::BelowThreshold),
            (&[stop], Verdict::Served),
            (&[ids], Verdict::Served),
            (&["data: [DONE]"], Verdict::Served),
        ];
        for (lines, want) in cases {
            let mut stream: String = lines.iter().map(|line| format!("{line}\n")).collect();
            assert_eq!(verdict(stream.as_bytes(), 1 << 20), want, "{stream}");
            stream.push_str("data: {\"choi");
            for step in 1..stream.len() {
                assert_eq!(verdict(stream.as_bytes(), step), want, "{step}: {stream}");
            }
        }
    }

    #[test]
    fn a_whole_response_is_forwarded_unless_its_finish_reason_is_cache_threshold() {
        let response = |reason: &str| format!(r#"{{"choices":[{{"finish_reason":{reason}}}]}}"#);
        let verdict = |reason| verdict_of_whole(response(reason).as_bytes());
        assert_eq!(verdict("\"cache_threshold\""), Verdict::BelowThreshold);
        assert_eq!(verdict("\"length\""), Verdict::Served);
        assert_eq!(verdict("null"), Verdict::Served);
        assert_eq!(verdict_of_whole(b"no json"), Verdict::Served);
    }
}
