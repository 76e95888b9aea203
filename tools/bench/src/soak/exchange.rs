//! One request and its response, which is compared with the expected one as it arrives. This module
//! does not use sockets.

use crate::http::{Reader, ResponseError};
use crate::limits::{SHOWN_BODY_BYTES_MAX, TEXT_BYTES_MAX};
use crate::response::shown;
use crate::soak::check::{Check, Kind, Mismatch};
use crate::soak::plan::{How, Point};
use crate::sse::{EventTooLarge, Splitter};

impl From<EventTooLarge> for Mismatch {
    fn from(_: EventTooLarge) -> Self {
        Self::new(Kind::Changed, "an event of the stream is too large")
    }
}

/// A request and its response.
#[derive(Debug)]
pub struct Exchange {
    /// Number of the request, counted from 0 over all connections of the run.
    pub number: u64,
    /// Whether a streamed response is expected.
    pub stream: bool,
    /// Whether the request was pipelined after another one.
    pub second: bool,
    /// When and how the request is aborted; `None` if it is not.
    pub abort: Option<(Point, How)>,
    /// Whether any byte of the response has arrived.
    pub has_response_bytes: bool,
    reader: Reader,
    splitter: Splitter,
    check: Check,
    body: Vec<u8>,
}

impl Exchange {
    /// Creates an exchange whose response must have the given tag and number of tokens.
    #[must_use]
    pub fn new(number: u64, stream: bool, tag: String, tokens: u32) -> Self {
        Self {
            number,
            stream,
            second: false,
            abort: None,
            has_response_bytes: false,
            reader: Reader::new(),
            splitter: Splitter::default(),
            check: Check::new(tag, tokens),
            body: Vec::new(),
        }
    }

    /// Returns the description used in messages, such as `request 12 (stream, pipelined)`.
    #[must_use]
    pub fn name(&self) -> String {
        let kind = if self.stream { "stream" } else { "whole" };
        let second = if self.second { ", pipelined" } else { "" };
        format!("request {} ({kind}{second})", self.number)
    }

    /// Returns the number of received tokens; always 0 if the response is not a stream.
    #[must_use]
    pub const fn came(&self) -> u32 {
        if self.stream { self.check.came() } else { 0 }
    }

    /// Returns whether the response head has arrived.
    #[must_use]
    pub const fn has_head(&self) -> bool {
        self.reader.head().is_some()
    }

    /// Returns whether the response is complete.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.reader.is_done()
    }

    /// Returns whether the response head has arrived and allows the connection to be used again.
    #[must_use]
    pub fn is_reusable(&self) -> bool {
        self.reader.head().is_some_and(|head| head.keep_alive)
    }

    /// Consumes received bytes and returns those that follow the end of this response. If the
    /// response is complete afterwards, it is also correct.
    ///
    /// # Errors
    /// If the response differs from the expected one.
    pub fn take<'a>(&mut self, piece: &'a [u8]) -> Result<&'a [u8], Mismatch> {
        self.has_response_bytes = true;
        let rest = (self.reader.feed_response(piece, &mut self.body))
            .map_err(|error| self.framing(error))?;
        let Some(head) = self.reader.head() else {
            return Ok(rest);
        };
        let done = self.reader.is_done();
        if head.status != 200 || head.event_stream != self.stream {
            if done || self.body.len() > SHOWN_BODY_BYTES_MAX {
                let (status, what) = (head.status, if head.event_stream { "a" } else { "no" });
                let body = shown(&self.body);
                let text = format!("expected status 200, got {status}, {what} stream: {body}");
                return Err(Mismatch::new(Kind::Refused, text));
            }
            return Ok(rest);
        }
        if self.stream {
            let check = &mut self.check;
            self.splitter.feed(&self.body, |data| check.event(data))?;
            self.body.clear();
        } else if self.body.len() > TEXT_BYTES_MAX {
            return Err(Mismatch::new(Kind::AfterEnd, "the response is too large"));
        }
        if done {
            self.complete()?;
        }
        Ok(rest)
    }

    /// Processes the end of the connection.
    ///
    /// # Errors
    /// If the response is incomplete or differs from the expected one.
    pub fn end(&mut self) -> Result<(), Mismatch> {
        self.reader.end().map_err(|error| self.framing(error))?;
        self.complete()
    }

    fn complete(&mut self) -> Result<(), Mismatch> {
        if !self.stream {
            return self.check.whole(&self.body);
        }
        self.check.finish()?;
        if self.splitter.is_inside() {
            let text = "expected the end after [DONE], got the beginning of an event";
            return Err(Mismatch::new(Kind::AfterEnd, text));
        }
        Ok(())
    }

    fn framing(&self, error: ResponseError) -> Mismatch {
        let kind = match error {
            ResponseError::Cut => Kind::Cut,
            ResponseError::Head
            | ResponseError::HeadTooLarge
            | ResponseError::Interim
            | ResponseError::Framing
            | ResponseError::Chunk
            | ResponseError::TrailingBytes => Kind::Framing,
        };
        Mismatch::new(kind, format!("after token {}: {error}", self.came()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAG: &str = "00000000";

    fn event(i: u32, finish: &str) -> String {
        let data = format!(
            "data: {{\"choices\":[{{\"text\":\"t{i}-{TAG} \",\"finish_reason\":{finish}}}]}}\n\n"
        );
        format!("{:x}\r\n{data}\r\n", data.len())
    }

    fn stream() -> String {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
                    transfer-encoding: chunked\r\n\r\n";
        let (first, last) = (event(0, "null"), event(1, "\"length\""));
        format!("{head}{first}{last}e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    }

    fn whole(text: &str) -> String {
        let body = format!(r#"{{"choices":[{{"text":"{text}","finish_reason":"length"}}]}}"#);
        let len = body.len();
        format!("HTTP/1.1 200 OK\r\ncontent-length: {len}\r\n\r\n{body}")
    }

    fn taken(stream: bool, bytes: &str) -> Result<(bool, String), Mismatch> {
        let mut exchange = Exchange::new(1, stream, TAG.to_owned(), 2);
        let rest = exchange.take(bytes.as_bytes())?;
        let rest = String::from_utf8_lossy(rest).into_owned();
        Ok((exchange.is_done(), rest))
    }

    #[test]
    fn bytes_of_the_next_response_are_returned() {
        let next = "HTTP/1.1 200";
        for (is_stream, bytes) in [(true, stream()), (false, whole("t0-00000000 t1-00000000 "))] {
            let both = format!("{bytes}{next}");
            assert_eq!(taken(is_stream, &both), Ok((true, next.to_owned())));
            for at in 0..bytes.len() {
                let mut exchange = Exchange::new(1, is_stream, TAG.to_owned(), 2);
                assert_eq!(exchange.take(&bytes.as_bytes()[..at]), Ok(&b""[..]));
                assert!(!exchange.is_done() && exchange.has_response_bytes);
                assert_eq!(exchange.take(&bytes.as_bytes()[at..]), Ok(&b""[..]));
                assert!(exchange.is_done() && exchange.is_reusable());
            }
        }
    }

    #[test]
    fn wrong_responses_are_reported_with_their_kind() {
        let refused = "HTTP/1.1 503 Busy\r\ncontent-length: 3\r\n\r\nbad".to_owned();
        let nonsense = "SSH-2.0-x\r\n\r\n".to_owned();
        let late = stream().replace("0\r\n\r\n", "3\r\ndat\r\n0\r\n\r\n");
        let cases = [
            (true, refused, Kind::Refused),
            (true, whole("t0-00000000 "), Kind::Refused),
            (false, stream(), Kind::Refused),
            (false, whole("t0-00000000 "), Kind::Cut),
            (true, nonsense, Kind::Framing),
            (
                true,
                stream().replacen("\r\n\r\n", "\r\n\r\nx", 1),
                Kind::Framing,
            ),
            (
                true,
                stream().replace("t1-00000000", "t1-00000001"),
                Kind::OtherResponse,
            ),
            (true, late, Kind::AfterEnd),
        ];
        for (nth, (is_stream, bytes, kind)) in cases.into_iter().enumerate() {
            let wrong = taken(is_stream, &bytes).unwrap_err();
            assert_eq!(wrong.kind, kind, "{nth}: {wrong}");
        }
        let mut exchange = Exchange::new(1, true, TAG.to_owned(), 2);
        let text = stream();
        exchange.take(&text.as_bytes()[..text.len() - 2]).unwrap();
        let cut = exchange.end().unwrap_err();
        assert_eq!(cut.kind, Kind::Cut);
        assert!(cut.text.contains("after token 2"), "{cut}");
    }
}
