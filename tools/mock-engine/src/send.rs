//! Sends a [`Plan`]: formats its bytes, paces the tokens, and applies the faults that a [`Wire`]
//! contains.

use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::events::Events;
use crate::exchange::{Ended, Exchange};
use crate::http::{Disconnected, after};
use crate::pace::Pace;
use crate::wire::{Content, Cut, Delimiter, Next, Plan, Wire, head};

/// Number of bytes of output after which buffered events are written, if no pause flushes them
/// earlier.
const GATHER_BYTES: usize = 16 << 10;

/// The event that vLLM sends when the engine fails after a stream has started.
const ERROR_EVENT: &str = "data: {\"error\":{\"message\":\"EngineCore encountered an issue.\",\
     \"type\":\"InternalServerError\",\"param\":null,\"code\":500}}\n\n";

impl Exchange<'_> {
    /// Sends `plan` in the way that `wire` specifies.
    pub(crate) async fn send(&mut self, plan: Plan, wire: Wire) -> Result<Ended, Disconnected> {
        let start = Instant::now();
        self.conn.slow = wire.slow;
        self.status = Some(plan.status);
        for _ in 0..wire.interim {
            let hints = "HTTP/1.1 103 Early Hints\r\nlink: </style.css>; rel=preload\r\n\r\n";
            self.conn.out.extend_from_slice(hints.as_bytes());
        }
        if wire.interim > 0 {
            self.conn.flush().await?;
            self.conn.wrote = false;
        }
        let minor = self.head.minor_version;
        let chunked = wire.chunked(&plan.content, minor);
        let announce = wire.http10
            || (wire.next.is_none() && !self.head.keep_alive)
            || wire.next == Some(Next::CloseGently);
        let head = head(&plan, &wire, chunked, announce);
        self.conn.out.extend_from_slice(head.as_bytes());
        let mut pace = self.pace(&plan.content);
        self.wait_for_first_token(&plan, &wire, start, &mut pace)
            .await?;
        if wire.stall_after_head {
            self.flush().await?;
            return Err(self.conn.stall().await);
        }
        let delimited = chunked || matches!(wire.delimiter, Delimiter::Proper);
        let open_ended = matches!(plan.content, Content::Events(_)) && !chunked;
        let cut = if self.head.method == "HEAD" {
            None
        } else {
            self.send_content(plan.content, &wire, chunked, start, pace)
                .await?
        };
        match cut {
            Some(Cut::Reset) => return Ok(Ended::Cut(Next::Reset)),
            Some(Cut::Truncate) => return Ok(Ended::Cut(Next::Close)),
            Some(Cut::Stall) => return Err(self.conn.stall().await),
            Some(Cut::Error) | None => {}
        }
        if wire.garbage_after {
            self.conn
                .out
                .extend_from_slice(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nextra");
        }
        let conn = &mut *self.conn;
        self.finished = self.shared.log.finish_with(self.seq, || conn.write_now());
        if !self.finished {
            self.flush().await?;
        }
        self.conn.slow = None;
        let must_close = announce || open_ended || !delimited;
        let next = wire.next.unwrap_or(if must_close {
            Next::Close
        } else {
            Next::KeepAlive
        });
        Ok(Ended::Responded(next))
    }

    /// Returns the times of the tokens in a response.
    fn pace(&self, content: &Content) -> Pace {
        let nth = match content {
            Content::Whole(_, 0) | Content::Nothing(_) => 0,
            Content::Whole(..) | Content::Events(_) => {
                self.shared.paced.fetch_add(1, Ordering::Relaxed)
            }
        };
        Pace::new(&self.shared.config, nth)
    }

    /// Waits for the other leg and for [`crate::Engine::release`] if required, then for the time
    /// that generation takes: up to the first token of a stream, or up to the last token of a whole
    /// response. With `early_head`, writes the head of a stream before it waits.
    async fn wait_for_first_token(
        &mut self,
        plan: &Plan,
        wire: &Wire,
        start: Instant,
        pace: &mut Pace,
    ) -> Result<(), Disconnected> {
        let config = &self.shared.config;
        let content = &plan.content;
        if config.early_head && matches!(content, Content::Events(_)) {
            self.flush().await?;
        }
        if let Some(other) = &plan.wait {
            self.conn.wait_on(other.met()).await?;
        }
        if wire.held {
            self.conn.wait_on(self.shared.gate.opened()).await?;
        }
        let wait = match content {
            Content::Whole(_, 0) | Content::Nothing(_) => return Ok(()),
            Content::Whole(_, tokens) => pace.due(tokens.saturating_sub(1)),
            Content::Events(_) => pace.first(),
        };
        self.conn.pause_until(after(start, wait)).await
    }

    async fn send_content(
        &mut self,
        content: Content,
        wire: &Wire,
        chunked: bool,
        start: Instant,
        pace: Pace,
    ) -> Result<Option<Cut>, Disconnected> {
        match content {
            Content::Nothing(_) => Ok(None),
            Content::Events(events) => self.send_events(*events, wire, chunked, start, pace).await,
            Content::Whole(body, tokens) => {
                self.response_bytes = body.len() as u64;
                if let Some(observed) = &mut self.observed {
                    observed.whole(tokens, pace.first());
                }
                let kept = match wire.cut {
                    Some((_, Cut::Error)) | None => body.len(),
                    Some((0, _)) => 0,
                    Some(_) => body.len() / 2,
                };
                let part = body.get(..kept).unwrap_or_default();
                if chunked {
                    self.push_chunk(part);
                } else {
                    self.conn.out.extend_from_slice(part);
                }
                self.flush_cut(wire.cut.map(|(_, cut)| cut), chunked).await
            }
        }
    }

    /// Ends the body and returns `cut`. If `cut` truncates the body, writes the buffered output;
    /// otherwise appends the terminator of a chunked body.
    async fn flush_cut(
        &mut self,
        cut: Option<Cut>,
        chunked: bool,
    ) -> Result<Option<Cut>, Disconnected> {
        match cut {
            Some(Cut::Reset | Cut::Truncate | Cut::Stall) => self.flush().await?,
            Some(Cut::Error) | None if chunked => {
                self.conn.out.extend_from_slice(b"0\r\n\r\n");
            }
            Some(Cut::Error) | None => {}
        }
        Ok(cut)
    }

    async fn send_events(
        &mut self,
        mut events: Events,
        wire: &Wire,
        chunked: bool,
        start: Instant,
        mut pace: Pace,
    ) -> Result<Option<Cut>, Disconnected> {
        let mut sent = 0;
        loop {
            if let Some((after, cut)) = wire.cut
                && after == sent
            {
                if cut == Cut::Error {
                    self.push(ERROR_EVENT, chunked);
                    self.push("data: [DONE]\n\n", chunked);
                    return self.flush_cut(None, chunked).await;
                }
                return self.flush_cut(Some(cut), chunked).await;
            }
            let Some(event) = events.next() else {
                // The regular end, unless a fault is set for a later event than the last: the
                // terminator is then omitted, except for an error event.
                return self.flush_cut(wire.cut.map(|(_, cut)| cut), chunked).await;
            };
            if event.token > 0 && pace.waits_between_tokens() {
                let due = after(start, pace.due(event.token));
                if due > Instant::now() {
                    self.flush().await?;
                    self.conn.pause_until(due).await?;
                }
            }
            self.push(&event.text, chunked);
            sent += 1;
            if event.has_token
                && let Some(observed) = &mut self.observed
            {
                observed.token(event.token);
            }
            if self.conn.out.len() >= GATHER_BYTES {
                self.flush().await?;
                self.conn.yield_and_check().await?;
            }
        }
    }

    fn push(&mut self, event: &str, chunked: bool) {
        if chunked {
            self.push_chunk(event.as_bytes());
        } else {
            self.conn.out.extend_from_slice(event.as_bytes());
        }
    }

    fn push_chunk(&mut self, bytes: &[u8]) {
        let size = format!("{:x}\r\n", bytes.len());
        self.conn.out.extend_from_slice(size.as_bytes());
        self.conn.out.extend_from_slice(bytes);
        self.conn.out.extend_from_slice(b"\r\n");
    }
}
