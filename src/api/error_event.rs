//! Error events in the streams of engines (`docs/engines.md#event-streams`).

/// Returns whether a part of a stream has an event in which an engine reports that the response has
/// failed. The part may have chunk framing.
///
/// Only the first member of an event is read: other events contain texts and objects of the
/// client. An engine writes an event in one go, so one that is divided between two parts is not
/// searched for.
#[must_use]
pub fn has_error_event(part: &[u8]) -> bool {
    let ends = memchr::memchr_iter(b'\n', part);
    let mut starts = std::iter::once(0).chain(ends.map(|end| end + 1));
    starts.any(|start| {
        part[start..]
            .strip_prefix(b"data:")
            .is_some_and(|data| is_error(data).is_some())
    })
}

/// Returns `Some` if the data of an event begins as that of an error: `{"error":...`, the shape of
/// vLLM and `SGLang`, `{"object":"error"` of older releases, or `{"type":...` with the type of an
/// error in the messages and responses APIs.
fn is_error(data: &[u8]) -> Option<()> {
    let member = after(data, b"{")?;
    if let Some(value) = after(member, b"\"error\"") {
        let value = after(value, b":")?;
        return after(value, b"{").or_else(|| after(value, b"\"")).map(drop);
    }
    let kind = after(member, b"\"type\"").or_else(|| after(member, b"\"object\""))?;
    let kind = after(kind, b":")?;
    after(kind, b"\"error\"").or_else(|| after(kind, b"\"response.failed\""))?;
    Some(())
}

/// Returns the rest of `text` after blanks and `token`, if it begins so. A line end is no blank.
fn after<'a>(text: &'a [u8], token: &[u8]) -> Option<&'a [u8]> {
    let start = text.iter().position(|byte| !matches!(byte, b' ' | b'\t'))?;
    text[start..].strip_prefix(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_events_are_found_in_every_api() {
        for (part, want) in [
            (
                "data: {\"error\": {\"message\": \"KV load failed\"}}\n\n",
                true,
            ),
            ("2c\r\ndata: {\"error\":\"text\"}\n\n\r\n", true),
            (
                "data:{\"a\":1}\r\n\r\ndata: { \"error\" : {}}\r\n\r\n",
                true,
            ),
            (
                "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"x\"}}\n\n",
                true,
            ),
            (
                "event: response.failed\ndata: {\"type\":\"response.failed\",\"response\":{}}\n\n",
                true,
            ),
            ("data: {\"object\":\"error\",\"message\":\"x\"}\n\n", true),
            ("data: {\"error\":null,\"choices\":[]}\n\n", false),
            // The client's tools and metadata.
            (
                "data: {\"type\":\"response.created\",\"response\":{\"metadata\":{\"error\":\"x\"}}}\n\n",
                false,
            ),
            (
                "data: {\"choices\":[{\"delta\":{\"content\":\"{\\\"error\\\": {}\"}}]}\n\n",
                false,
            ),
            ("data: {\"x\":\"error\",\"error\":{}}\n\n", false),
            ("event: error\n", false),
            ("x data: {\"error\":{}}\n", false),
            ("data: {\"error\"", false),
            ("data: [DONE]\n\n", false),
            ("data:\n{\"error\":{}}\n", false),
            ("", false),
        ] {
            assert_eq!(has_error_event(part.as_bytes()), want, "{part}");
        }
    }
}
