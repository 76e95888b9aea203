//! The faults that an engine can apply on request, and the queue of pending faults.
//!
//! A fault applies to the next requests that it matches: those to its path (or to any path), or
//! those whose body contains its text. At most one fault applies to a request: the one that was set
//! first. Faults that match the body are considered only if no other fault applies. Paths under
//! `/mock/` are exempt, so that the mock can always be inspected over HTTP.

use std::time::Duration;

use serde::{Deserialize, Deserializer};

use crate::config::HandoffShape;
use crate::sync::Guarded;

/// A way in which the engine misbehaves while it handles a request.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Accepts the next connection and resets it. A path set with the fault is ignored.
    /// [`crate::Engine::refuse`] refuses the connect itself.
    Refuse,
    /// Resets the connection once the request is complete.
    ResetBeforeHead,
    /// Closes the connection (FIN) once the request is complete.
    CloseBeforeHead,
    /// Resets the connection after some events of a stream. A response that is not a stream ends
    /// after its head (`after_events` is 0) or halfway through its body (any other number).
    ResetMidBody {
        /// Number of stream events that are written before the reset.
        after_events: u32,
    },
    /// Closes the connection (FIN, without the last chunk) after some events of a stream. A
    /// response that is not a stream ends at the same point as with `ResetMidBody`.
    TruncateMidBody {
        /// Number of stream events that are written before the close.
        after_events: u32,
    },
    /// Reads the request, then never sends a response.
    StallBeforeHead,
    /// Sends the regular response, but only after [`crate::Engine::release`].
    Hold,
    /// Sends the head of the response, then nothing more.
    StallAfterHead,
    /// Sends some events of a stream, then nothing more; the connection remains open. A response
    /// that is not a stream ends at the same point as with `ResetMidBody`.
    StallMidStream {
        /// Number of stream events that are written before the stall.
        after_events: u32,
    },
    /// Sends some events of a stream, then vLLM's error event, `[DONE]` and the regular end of the
    /// body. Does not affect a stream with fewer than `after_events` events, nor a response that
    /// is not a stream.
    ErrorMidStream {
        /// Number of stream events that are written before the error event.
        after_events: u32,
    },
    /// Stops reading from the connection during the request body and never responds.
    StallRead {
        /// Number of bytes after the request head, including chunk framing, that are read from the
        /// socket.
        after_bytes: usize,
    },
    /// Responds with bytes that are not HTTP, then closes.
    Garbage,
    /// Sends the regular response, followed by a second response that no request belongs to.
    GarbageAfterResponse,
    /// Sends a response with this status, body and content type instead of the regular one.
    Status {
        /// Status code.
        code: u16,
        /// Response body.
        #[serde(default)]
        body: String,
        /// Value of `content-type`.
        #[serde(default = "json_type")]
        content_type: String,
    },
    /// Sends a JSON response with this status and body instead of the regular one, but only after
    /// [`crate::Engine::release`].
    HeldStatus {
        /// Status code.
        code: u16,
        /// Response body.
        #[serde(default)]
        body: String,
    },
    /// Sends a 200 with `content-encoding: gzip` and a body that is not valid gzip.
    Gzip,
    /// Sends a 200 with an HTML page.
    Html,
    /// Sends a 200 with truncated JSON and the correct `content-length` of the truncated body.
    HalfJson,
    /// Sends the regular response without `connection: close`, then closes the connection.
    CloseIdle,
    /// Sends the regular response, then closes the connection when the first byte of the next
    /// request arrives, without responding to that request.
    CloseOnNextRequest,
    /// Responds with an error body as soon as the request head is complete, before reading the
    /// request body.
    EarlyResponse {
        /// Status code.
        status: u16,
        /// Whether to read the body afterwards and keep the connection. Otherwise the response has
        /// `connection: close` and the connection is closed.
        #[serde(default)]
        keep: bool,
    },
    /// Writes the response in small fragments.
    Slow {
        /// Bytes per fragment.
        chunk_bytes: usize,
        /// Pause between fragments (`delay_ms` in JSON).
        #[serde(rename = "delay_ms", deserialize_with = "millis")]
        delay: Duration,
    },
    /// Sends a response head that never ends.
    EndlessHead,
    /// Sends `103 Early Hints` responses before the regular response.
    Interim {
        /// Number of interim responses.
        count: u32,
    },
    /// Sends both `content-length` and `transfer-encoding: chunked`.
    BothFramings,
    /// Sends a head whose lines end in a bare LF.
    BareLf,
    /// Sends a `content-length` larger than the body, then closes.
    ExtraLength,
    /// Sends the body with neither `content-length` nor chunks, so that only the end of the
    /// connection delimits it.
    NoFraming,
    /// Sends `101 Switching Protocols`, then echoes every byte.
    Upgrade101,
    /// Sends `204 No Content`.
    NoContent204,
    /// Sends `304 Not Modified` with a `content-length` and no body.
    NotModified304,
    /// Adds a `routed_experts` string to the response, before `usage`. Of the streams, only those
    /// of chat completions and of the responses API have it.
    LargeJson {
        /// Length of the `routed_experts` string in bytes.
        bytes: usize,
    },
    /// Sends an HTTP/1.0 response, then closes. A stream is delimited by the close, any other body
    /// by `content-length`.
    Http10Response,
    /// Issues handoffs in this shape instead of the configured one.
    Handoff(HandoffShape),
}

fn json_type() -> String {
    "application/json".to_owned()
}

fn millis<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    u64::deserialize(from).map(Duration::from_millis)
}

/// A pending fault and the number of requests it still applies to.
#[derive(Clone, Debug)]
struct Armed {
    path: Option<String>,
    /// Text that the request body must contain; `None` for a fault that does not depend on the
    /// body.
    needle: Option<String>,
    fault: Fault,
    left: u32,
}

/// The pending faults of an engine.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    armed: Guarded<Vec<Armed>>,
}

impl Faults {
    /// Adds `fault` for the next `times` requests to `path`, or to any path if `path` is `None`.
    /// With `u32::MAX`, the fault applies to all these requests.
    pub(crate) fn arm(&self, path: Option<&str>, fault: Fault, times: u32) {
        if times > 0 {
            self.armed.lock().push(Armed {
                path: path.map(str::to_owned),
                needle: None,
                fault,
                left: times,
            });
        }
    }

    /// Adds `fault` for the next `times` requests whose body contains `needle`.
    pub(crate) fn arm_for_body(&self, needle: &str, fault: Fault, times: u32) {
        if times > 0 {
            self.armed.lock().push(Armed {
                path: None,
                needle: Some(needle.to_owned()),
                fault,
                left: times,
            });
        }
    }

    /// Returns the number of pending faults.
    pub(crate) fn pending(&self) -> usize {
        self.armed.lock().len()
    }

    /// Removes all pending faults.
    pub(crate) fn clear(&self) {
        self.armed.lock().clear();
    }

    /// Returns the first pending fault for a request to `path` and counts the use, or `None`.
    /// [`Fault::Refuse`] and faults that depend on the body are skipped.
    pub(crate) fn take(&self, path: &str) -> Option<Fault> {
        self.take_where(|armed| {
            armed.fault != Fault::Refuse
                && armed.needle.is_none()
                && armed.path.as_deref().is_none_or(|wanted| wanted == path)
        })
    }

    /// Returns the first pending fault whose `needle` is contained in `body` and counts the use, or
    /// `None` if there is no such fault.
    pub(crate) fn take_for_body(&self, body: &[u8]) -> Option<Fault> {
        self.take_where(|armed| {
            armed
                .needle
                .as_ref()
                .is_some_and(|needle| memchr::memmem::find(body, needle.as_bytes()).is_some())
        })
    }

    /// Returns whether a [`Fault::Refuse`] is pending, so that a new connection must be reset, and
    /// counts the use.
    pub(crate) fn take_refuse(&self) -> bool {
        self.take_where(|armed| armed.fault == Fault::Refuse)
            .is_some()
    }

    fn take_where(&self, pred: impl Fn(&Armed) -> bool) -> Option<Fault> {
        let mut armed = self.armed.lock();
        let at = armed.iter().position(pred)?;
        let entry = armed.get_mut(at)?;
        let fault = entry.fault.clone();
        if entry.left != u32::MAX {
            entry.left -= 1;
            if entry.left == 0 {
                armed.remove(at);
            }
        }
        Some(fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_apply_in_order_and_expire() {
        let faults = Faults::default();
        faults.arm(Some("/a"), Fault::Html, 1);
        faults.arm(None, Fault::Gzip, 2);
        assert_eq!(faults.take("/b"), Some(Fault::Gzip));
        assert_eq!(faults.take("/a"), Some(Fault::Html));
        assert_eq!(faults.take("/a"), Some(Fault::Gzip));
        assert_eq!(faults.take("/a"), None);
        faults.arm_for_body("second", Fault::Html, 1);
        assert_eq!(faults.take("/a"), None);
        assert_eq!(faults.take_for_body(b"the first"), None);
        assert_eq!(faults.take_for_body(b"the second"), Some(Fault::Html));
        assert_eq!(faults.take_for_body(b"the second"), None);
        faults.arm(None, Fault::Refuse, u32::MAX);
        assert_eq!(faults.take("/a"), None);
        assert!(faults.take_refuse() && faults.take_refuse());
        faults.clear();
        assert!(!faults.take_refuse());
    }

    #[test]
    fn faults_deserialize_from_json() {
        let cases = [
            (r#""reset_before_head""#, Fault::ResetBeforeHead),
            (
                r#"{"reset_mid_body":{"after_events":2}}"#,
                Fault::ResetMidBody { after_events: 2 },
            ),
            (
                r#"{"slow":{"chunk_bytes":3,"delay_ms":5}}"#,
                Fault::Slow {
                    chunk_bytes: 3,
                    delay: Duration::from_millis(5),
                },
            ),
            (r#"{"handoff":"null"}"#, Fault::Handoff(HandoffShape::Null)),
        ];
        for (text, want) in cases {
            let got: Fault = serde_json::from_str(text).unwrap();
            assert_eq!(got, want, "{text}");
        }
    }
}
