//! The ways an engine can misbehave on request, and the queue of faults that
//! are waiting for their request.
//!
//! A fault hits the next request whose path matches, in the order the faults
//! were set; `/mock/` paths are exempt so that a shell user can always look.

use std::time::Duration;

use serde::{Deserialize, Deserializer};

use crate::config::HandoffShape;
use crate::sync::Guarded;

/// One way to misbehave.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fault {
    /// Accepts the connection and resets it. Applies to connections, so its
    /// path is ignored; [`crate::Engine::refuse`] refuses the connect itself.
    Refuse,
    /// Resets the connection once the request is complete.
    ResetBeforeHead,
    /// Closes the connection (FIN) once the request is complete.
    CloseBeforeHead,
    /// Resets after this many events; an answer that is not a stream is cut
    /// after its head (0) or in the middle of its body.
    ResetMidBody {
        /// Events written before the fault.
        after_events: u32,
    },
    /// Closes (FIN, no terminator) after this many events.
    TruncateMidBody {
        /// Events written before the fault.
        after_events: u32,
    },
    /// Reads the request, then says nothing for ever.
    StallBeforeHead,
    /// Answers only after [`crate::Engine::release`].
    Hold,
    /// Sends the head of the answer, then nothing for ever.
    StallAfterHead,
    /// Sends this many events, then nothing for ever.
    StallMidStream {
        /// Events written before the fault.
        after_events: u32,
    },
    /// Sends this many events, then vLLM's error event and the end of the
    /// stream. An answer that is not a stream is not affected.
    ErrorMidStream {
        /// Events written before the fault.
        after_events: u32,
    },
    /// Stops reading the request body after this many bytes, for ever.
    StallRead {
        /// Body bytes (as framed on the wire) taken from the socket.
        after_bytes: usize,
    },
    /// Answers with bytes that are not HTTP, then closes.
    Garbage,
    /// A good answer, then bytes nobody asked for.
    GarbageAfterResponse,
    /// This answer in place of the real one.
    Status {
        /// The status code.
        code: u16,
        /// The body.
        #[serde(default)]
        body: String,
        /// The `content-type`.
        #[serde(default = "json_type")]
        content_type: String,
    },
    /// As `Status`, JSON, but only after [`crate::Engine::release`].
    HeldStatus {
        /// The status code.
        code: u16,
        /// The body.
        #[serde(default)]
        body: String,
    },
    /// A 200 that claims `content-encoding: gzip`, with opaque bytes.
    Gzip,
    /// A 200 with an HTML page.
    Html,
    /// A 200 with JSON that ends in the middle, under a correct length.
    HalfJson,
    /// A good answer, then a close without having announced it.
    CloseIdle,
    /// A good answer; the connection is closed when the first byte of the next
    /// request arrives, and that request is never answered.
    CloseOnNextRequest,
    /// Answers right after the head of the request.
    EarlyResponse {
        /// The status code.
        status: u16,
        /// Reads the body afterwards and keeps the connection; otherwise says
        /// `connection: close` and closes.
        #[serde(default)]
        keep: bool,
    },
    /// Writes the answer in small pieces.
    Slow {
        /// Bytes per piece.
        chunk_bytes: usize,
        /// Pause between pieces (`delay_ms` in JSON).
        #[serde(rename = "delay_ms", deserialize_with = "millis")]
        delay: Duration,
    },
    /// A head that never ends.
    EndlessHead,
    /// This many `103 Early Hints` before the answer.
    Interim {
        /// How many.
        count: u32,
    },
    /// `content-length` and `transfer-encoding: chunked` in one head.
    BothFramings,
    /// A head whose lines end in a bare LF.
    BareLf,
    /// A `content-length` larger than the body, then a close.
    ExtraLength,
    /// A body that ends with the connection, neither length nor chunks.
    NoFraming,
    /// `101 Switching Protocols`, then every byte is sent back.
    Upgrade101,
    /// `204 No Content`.
    NoContent204,
    /// `304 Not Modified` with a `content-length` and no body.
    NotModified304,
    /// A member of this many bytes before `usage`.
    LargeJson {
        /// Bytes of padding.
        bytes: usize,
    },
    /// An HTTP/1.0 answer with a length, then a close.
    Http10Response,
    /// Another shape of handoff than the configured one.
    Handoff(HandoffShape),
}

fn json_type() -> String {
    "application/json".to_owned()
}

fn millis<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    u64::deserialize(from).map(Duration::from_millis)
}

/// A fault and how often it is still to strike.
#[derive(Clone, Debug)]
struct Armed {
    path: Option<String>,
    /// What the body must hold.
    needle: Option<String>,
    fault: Fault,
    left: u32,
}

/// The faults that wait for their requests.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    armed: Guarded<Vec<Armed>>,
}

impl Faults {
    /// Arms `fault` for `times` requests; `u32::MAX` is for ever.
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

    /// Arms `fault` for `times` requests whose body holds `needle`.
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

    /// Disarms everything.
    pub(crate) fn clear(&self) {
        self.armed.lock().clear();
    }

    /// Takes the first fault for a request to `path`.
    pub(crate) fn take(&self, path: &str) -> Option<Fault> {
        self.take_where(|armed| {
            armed.fault != Fault::Refuse
                && armed.needle.is_none()
                && armed.path.as_deref().is_none_or(|wanted| wanted == path)
        })
    }

    /// Takes the first fault for a request with this body.
    pub(crate) fn take_for_body(&self, body: &[u8]) -> Option<Fault> {
        self.take_where(|armed| {
            armed
                .needle
                .as_ref()
                .is_some_and(|needle| memchr::memmem::find(body, needle.as_bytes()).is_some())
        })
    }

    /// Whether the connection just accepted is to be reset.
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
    fn faults_strike_in_order_and_wear_out() {
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
    fn faults_can_be_written_as_json() {
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
