//! Error events in the streams of engines (`docs/engines.md#event-streams`).

use std::sync::LazyLock;

use memchr::memmem;

/// Searches for the name of the member that describes an error.
///
/// The finder is static because creating one takes longer than searching an event.
static ERROR: LazyLock<memmem::Finder<'static>> =
    LazyLock::new(|| memmem::Finder::new("\"error\""));

/// Returns whether a part of a stream has an `error` member that is an object or a text, as engines
/// send it in place of the rest of a response. In a text that a model wrote, the quotes would be
/// escaped.
///
/// An engine writes an event at once, so that an event which is divided between two parts is not
/// looked for.
#[must_use]
pub fn has_error_event(part: &[u8]) -> bool {
    let finder = &*ERROR;
    finder.find_iter(part).any(|at| {
        let mut rest = part[at + finder.needle().len()..]
            .iter()
            .filter(|byte| !byte.is_ascii_whitespace());
        rest.next() == Some(&b':') && matches!(rest.next(), Some(b'{' | b'"'))
    })
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
            ("data: {\"error\":\"text\"}\n\ndata: [DONE]\n\n", true),
            (
                "event: error\ndata: {\"type\":\"error\",\"error\":{\"type\":\"x\"}}\n\n",
                true,
            ),
            (
                "data: {\"type\":\"response.failed\",\"response\":{\"error\" : {\"code\":\"x\"}}}\n\n",
                true,
            ),
            ("data: {\"response\":{\"error\":null}}\n\n", false),
            (
                "data: {\"choices\":[{\"delta\":{\"content\":\"{\\\"error\\\": {}\"}}]}\n\n",
                false,
            ),
            (
                "data: {\"choices\":[{\"delta\":{\"content\":\"error\"}}]}\n\n",
                false,
            ),
            ("data: {\"x\":\"error\",\"y\":{}}\n\n", false),
            ("data: {\"error\"", false),
            ("", false),
        ] {
            assert_eq!(has_error_event(part.as_bytes()), want, "{part}");
        }
    }
}
