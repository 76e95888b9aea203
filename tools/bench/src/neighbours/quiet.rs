//! The measuring client: quiet streams through a proxy and one directly from the engine, of which
//! each event contains the time at which the engine sent it.

use std::fmt;
use std::net::SocketAddr;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::time::Duration;

use crate::http::Reader;
use crate::limits::{QUIET_STALL_MS_MAX, QUIET_STREAMS, QUIET_WARMUP_MS, RECEIVE_BYTES};
use crate::precision::nanos;
use crate::socket::{self, Poll, Received, Watch, monotonic_ns};
use crate::sse::{EventTooLarge, Splitter};

/// An event of a quiet stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Position in the stream, from 0.
    pub number: u64,
    /// Time at which the engine sent it.
    pub sent_ns: u64,
}

impl Event {
    /// Parses `{"n":NUMBER,"t":TIME}`.
    fn of(data: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(data).ok()?;
        let text = text.strip_prefix(r#"{"n":"#)?.strip_suffix('}')?;
        let (number, sent_ns) = text.split_once(r#","t":"#)?;
        Some(Self {
            number: number.parse().ok()?,
            sent_ns: sent_ns.parse().ok()?,
        })
    }
}

/// An incremental reader of the response that is a quiet stream.
#[derive(Debug, Default)]
pub struct EventReader {
    response: Reader,
    body: Vec<u8>,
    splitter: Splitter,
    /// Number of events so far.
    events: u64,
}

/// The reason why a stream cannot be measured, for the user.
struct Broken(String);

impl From<EventTooLarge> for Broken {
    fn from(_: EventTooLarge) -> Self {
        Self("an event is too large".to_owned())
    }
}

impl EventReader {
    /// Parses the next received bytes and calls `found` with each event that they complete.
    ///
    /// # Errors
    /// Returns a message if the response is not a stream of numbered events.
    pub fn feed(&mut self, piece: &[u8], mut found: impl FnMut(Event)) -> Result<(), String> {
        self.body.clear();
        let fed = self.response.feed(piece, &mut self.body);
        fed.map_err(|error| error.to_string())?;
        match self.response.head() {
            Some(head) if head.status != 200 => {
                return Err(format!("the response has status {}", head.status));
            }
            Some(_) if self.response.is_done() => return Err("the stream ended".to_owned()),
            Some(_) | None => {}
        }
        let events = &mut self.events;
        let split = self.splitter.feed(&self.body, |data| {
            let event = Event::of(data).filter(|event| event.number == *events);
            let event =
                event.ok_or_else(|| Broken(format!("event {events} is missing or changed")))?;
            *events += 1;
            found(event);
            Ok(())
        });
        split.map_err(|Broken(text)| text)
    }
}

/// Which way a stream takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Direct,
    Proxied,
}

struct Stream {
    way: Way,
    socket: OwnedFd,
    /// Bytes of the request that the socket has not accepted yet.
    unsent: Vec<u8>,
    reader: EventReader,
    /// Time at which the last received event was sent; 0 before the first.
    last_sent_ns: u64,
}

/// Delays of events, from send to receipt, in nanoseconds.
#[derive(Clone, Debug, Default)]
pub struct Delays {
    /// Delays of the events that the engine sent directly.
    pub direct: Vec<u64>,
    /// Delays of the events that the engine sent through the proxy.
    pub proxied: Vec<u64>,
}

/// The quiet streams of one cell.
pub struct Streams {
    poll: Poll,
    streams: Vec<Stream>,
    /// Events that the engine sends in this time are measured.
    window: Range<u64>,
    delays: Delays,
    buffer: Vec<u8>,
    ready: Vec<usize>,
}

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams").finish_non_exhaustive()
    }
}

impl Streams {
    /// Opens [`QUIET_STREAMS`] streams through the proxy and one directly to the engine, and reads
    /// them for [`QUIET_WARMUP_MS`].
    ///
    /// # Errors
    /// Returns a message if a stream cannot be opened or breaks.
    pub fn open(proxy: SocketAddr, engine: SocketAddr) -> Result<Self, String> {
        let mut opened = Self {
            poll: Poll::new().map_err(|error| error.to_string())?,
            streams: Vec::new(),
            window: 0..0,
            delays: Delays::default(),
            buffer: vec![0; RECEIVE_BYTES],
            ready: Vec::new(),
        };
        for _ in 0..QUIET_STREAMS {
            opened.connect(Way::Proxied, proxy)?;
        }
        opened.connect(Way::Direct, engine)?;
        opened.read_until_sent(1)?;
        opened.read_for(Duration::from_millis(QUIET_WARMUP_MS))?;
        Ok(opened)
    }

    /// Reads the streams for `time` and measures the events that the engine sends in it.
    ///
    /// # Errors
    /// Returns a message if a stream breaks.
    pub fn measure(&mut self, time: Duration) -> Result<(), String> {
        let now_ns = monotonic_ns();
        self.window = now_ns..now_ns + nanos(time);
        self.read_for(time)
    }

    /// Receives the events of the measurement that have not arrived yet, closes the streams and
    /// returns the delays.
    ///
    /// # Errors
    /// Returns a message if a stream breaks or stalls, or nothing was measured.
    pub fn finish(mut self) -> Result<Delays, String> {
        // The latest events are the most important ones: without them, a proxy that stalls would
        // seem quicker than one that is slow.
        self.read_until_sent(self.window.end)?;
        if self.delays.direct.is_empty() || self.delays.proxied.is_empty() {
            return Err("no event was sent during the measurement; use a longer --time".to_owned());
        }
        Ok(self.delays)
    }

    fn connect(&mut self, way: Way, addr: SocketAddr) -> Result<(), String> {
        let text = |error: std::io::Error| format!("{addr}: {error}");
        let socket = socket::connect(&addr).map_err(text)?;
        let number = self.streams.len();
        self.poll.add(&socket, number, Watch::Both).map_err(text)?;
        let body = r#"{"model":"m","stream":true,"messages":[{"role":"user","content":"a"}]}"#;
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: {addr}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.streams.push(Stream {
            way,
            socket,
            unsent: request.into_bytes(),
            reader: EventReader::default(),
            last_sent_ns: 0,
        });
        Ok(())
    }

    fn read_for(&mut self, time: Duration) -> Result<(), String> {
        let end_ns = monotonic_ns() + nanos(time);
        loop {
            let now_ns = monotonic_ns();
            if now_ns >= end_ns {
                return Ok(());
            }
            self.read(end_ns - now_ns)?;
        }
    }

    /// Reads until each stream has received an event that was sent at `sent_ns` or later.
    fn read_until_sent(&mut self, sent_ns: u64) -> Result<(), String> {
        let stall_ns = QUIET_STALL_MS_MAX * 1_000_000;
        let end_ns = monotonic_ns() + stall_ns;
        while self.streams.iter().any(|it| it.last_sent_ns < sent_ns) {
            let now_ns = monotonic_ns();
            if now_ns >= end_ns {
                return Err(format!(
                    "a quiet stream has received nothing for {QUIET_STALL_MS_MAX} ms"
                ));
            }
            self.read(end_ns - now_ns)?;
        }
        Ok(())
    }

    /// Waits for at most `time_ns` and reads the streams that are ready.
    fn read(&mut self, time_ns: u64) -> Result<(), String> {
        let text = |error: std::io::Error| error.to_string();
        let time_max = Duration::from_nanos(time_ns);
        let mut ready = std::mem::take(&mut self.ready);
        self.poll.wait(time_max, &mut ready).map_err(text)?;
        for number in ready.drain(..) {
            self.step(number)?;
        }
        self.ready = ready;
        Ok(())
    }

    fn step(&mut self, number: usize) -> Result<(), String> {
        let Some(stream) = self.streams.get_mut(number) else {
            return Ok(());
        };
        let broken = |why: String| match stream.way {
            Way::Direct => format!("the direct stream broke: {why}"),
            Way::Proxied => format!("a stream through the proxy broke: {why}"),
        };
        if !stream.unsent.is_empty() {
            let sent = socket::send(&stream.socket, &stream.unsent);
            let sent = sent.map_err(|error| broken(error.to_string()))?;
            stream.unsent.drain(..sent);
            if stream.unsent.is_empty() {
                let changed = self.poll.change(&stream.socket, number, Watch::Readable);
                changed.map_err(|error| broken(error.to_string()))?;
            }
        }
        let received = socket::receive(&stream.socket, &mut self.buffer);
        let now_ns = monotonic_ns();
        let len = match received {
            Received::Bytes(len) => len,
            Received::Nothing => return Ok(()),
            Received::End => return Err(broken("the connection was closed".to_owned())),
            Received::Failed(error) => return Err(broken(error.to_string())),
        };
        let delays = match stream.way {
            Way::Direct => &mut self.delays.direct,
            Way::Proxied => &mut self.delays.proxied,
        };
        let (window, last_sent_ns) = (&self.window, &mut stream.last_sent_ns);
        let fed = stream.reader.feed(&self.buffer[..len], |event| {
            *last_sent_ns = event.sent_ns;
            if window.contains(&event.sent_ns) {
                delays.push(now_ns.saturating_sub(event.sent_ns));
            }
        });
        fed.map_err(broken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&[u8]]) -> Result<Vec<u64>, String> {
        let (mut reader, mut times) = (EventReader::default(), Vec::new());
        for piece in pieces {
            reader.feed(piece, |event| times.push(event.sent_ns))?;
        }
        Ok(times)
    }

    #[test]
    fn events_are_the_same_at_any_split() {
        let bytes: &[u8] = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n\
            16\r\ndata: {\"n\":0,\"t\":70}\n\n\r\n\
            2d\r\ndata: {\"n\":1,\"t\":701}\n\ndata: {\"n\":2,\"t\":72}\n\n\r\n";
        for at in 0..=bytes.len() {
            let got = read(&[&bytes[..at], &bytes[at..]]);
            assert_eq!(got, Ok(vec![70, 701, 72]), "{at}");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(read(&single), Ok(vec![70, 701, 72]));
    }

    #[test]
    fn broken_streams_are_errors() {
        let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        for (bytes, part) in [
            (
                "HTTP/1.1 502 Bad Gateway\r\ncontent-length: 0\r\n\r\n".to_owned(),
                "status 502",
            ),
            (format!("{head}0\r\n\r\n"), "the stream ended"),
            (format!("{head}xyz\r\n"), "malformed"),
            (
                format!("{head}16\r\ndata: {{\"n\":1,\"t\":70}}\n\n\r\n"),
                "event 0",
            ),
            (format!("{head}9\r\ndata: x\n\n\r\n"), "event 0"),
        ] {
            let error = read(&[bytes.as_bytes()]).unwrap_err();
            assert!(error.contains(part), "{bytes:?}: {error}");
        }
    }
}
