//! The engine that the proxies forward to: a single-threaded HTTP/1.1 server with quiet streams and
//! with the resources that the attacks request.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::limits::{
    DOWNLOAD_BYTES, DOWNLOAD_SEND_BYTES, ENGINE_BACKLOG, ENGINE_STOP_MS, NEIGHBOURS_RECEIVE_BYTES,
    QUIET_INTERVAL_MS, QUIET_STREAMS,
};
use crate::neighbours::request::{RequestReader, Route};
use crate::socket::{self, Poll, Received, Watch, monotonic_ns};

/// The number that identifies the listener in poll results.
const LISTENER: usize = usize::MAX - 1;
const INTERVAL_NS: u64 = QUIET_INTERVAL_MS * 1_000_000;
/// The quiet streams of a cell send at different times within the interval, so that none waits for
/// the send of another.
const PHASES: u64 = QUIET_STREAMS as u64 + 1;

/// Values that the engine's thread shares with the others.
#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// Number of bytes received in bodies of uploads.
    upload_bytes: AtomicU64,
    /// Number of connections with a request or response in progress, other than quiet streams.
    occupied: AtomicUsize,
}

/// A running engine.
pub struct Engine {
    addr: SocketAddr,
    shared: Arc<Shared>,
    thread: thread::JoinHandle<io::Result<()>>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("addr", &self.addr)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts an engine on `addr`, in a separate thread.
    ///
    /// # Errors
    /// If `addr` cannot be used, or the kernel reports an error.
    pub fn start(addr: SocketAddr) -> io::Result<Self> {
        let listener = socket::listen(&addr, ENGINE_BACKLOG)?;
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || Server::new(listener, own)?.run())?;
        Ok(Self {
            addr,
            shared,
            thread,
        })
    }

    /// Returns the address of the engine.
    #[must_use]
    pub const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Returns the number of bytes received so far in bodies of uploads.
    #[must_use]
    pub fn upload_bytes(&self) -> u64 {
        self.shared.upload_bytes.load(Ordering::Relaxed)
    }

    /// Returns whether there is a request or response in progress other than quiet streams.
    #[must_use]
    pub fn is_occupied(&self) -> bool {
        self.shared.occupied.load(Ordering::Relaxed) > 0
    }

    /// Closes all connections and ends the thread.
    ///
    /// # Errors
    /// The error that ended the thread, if it ended earlier.
    pub fn stop(self) -> io::Result<()> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.join();
        ended.unwrap_or_else(|_| Err(io::Error::other("the engine's thread panicked")))
    }
}

/// The reason to drop a connection: the peer has closed it, or sent something malformed.
struct Gone;

/// The events of a quiet stream.
struct Stream {
    /// Number of the next event.
    next: u64,
    /// Time of the next event.
    due_ns: u64,
}

struct Connection {
    socket: OwnedFd,
    watch: Watch,
    reader: RequestReader,
    /// Received bytes after a request whose response is in progress.
    unread: Vec<u8>,
    /// Bytes of responses that the socket has not accepted yet.
    unsent: Vec<u8>,
    /// Bytes of a download's body that follow `unsent`.
    download_left: u64,
    stream: Option<Stream>,
    /// Whether this connection is counted in [`Shared::occupied`].
    is_occupied: bool,
}

impl Connection {
    fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            watch: Watch::Readable,
            reader: RequestReader::default(),
            unread: Vec::new(),
            unsent: Vec::new(),
            download_left: 0,
            stream: None,
            is_occupied: false,
        }
    }

    const fn has_unsent(&self) -> bool {
        !self.unsent.is_empty() || self.download_left > 0
    }

    /// Sends and receives what the socket allows, one piece of each. Starts a quiet stream with the
    /// first event at `stream_due_ns`.
    fn step(
        &mut self,
        buffer: &mut [u8],
        filler: &[u8],
        stream_due_ns: u64,
        shared: &Shared,
    ) -> Result<(), Gone> {
        self.send(filler)?;
        if !self.has_unsent() && !self.unread.is_empty() {
            let unread = std::mem::take(&mut self.unread);
            self.consume(&unread, stream_due_ns, shared)?;
        }
        if !self.has_unsent() {
            match socket::receive(&self.socket, buffer) {
                Received::Bytes(len) => self.consume(&buffer[..len], stream_due_ns, shared)?,
                Received::Nothing => {}
                Received::End | Received::Failed(_) => return Err(Gone),
            }
        }
        self.send(filler)
    }

    /// Processes received bytes: all requests up to one that has a long response.
    fn consume(
        &mut self,
        mut piece: &[u8],
        stream_due_ns: u64,
        shared: &Shared,
    ) -> Result<(), Gone> {
        if self.stream.is_some() {
            // A stream has no end, so no request can follow it.
            return Err(Gone);
        }
        while !piece.is_empty() && self.download_left == 0 && self.stream.is_none() {
            let fed = self.reader.feed(piece).map_err(|_| Gone)?;
            shared
                .upload_bytes
                .fetch_add(fed.upload_bytes, Ordering::Relaxed);
            if let Some(route) = fed.complete {
                self.respond(route, stream_due_ns);
            }
            piece = fed.rest;
        }
        self.unread.extend_from_slice(piece);
        Ok(())
    }

    fn respond(&mut self, route: Route, stream_due_ns: u64) {
        let json = "application/json";
        match route {
            Route::Stream => {
                self.unsent.extend_from_slice(
                    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\
                      transfer-encoding: chunked\r\n\r\n",
                );
                self.stream = Some(Stream {
                    next: 0,
                    due_ns: stream_due_ns,
                });
            }
            Route::Upload => self.respond_text("200 OK", json, r#"{"choices":[{"text":"a"}]}"#),
            Route::Models => self.respond_text("200 OK", json, r#"{"data":[{"id":"m"}]}"#),
            Route::Unknown => self.respond_text("404 Not Found", "text/plain", "not found\n"),
            Route::Download => {
                let head = format!(
                    "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\n\
                     content-length: {DOWNLOAD_BYTES}\r\n\r\n"
                );
                self.unsent.extend_from_slice(head.as_bytes());
                self.download_left = DOWNLOAD_BYTES;
            }
        }
    }

    fn respond_text(&mut self, status: &str, media: &str, body: &str) {
        let response = format!(
            "HTTP/1.1 {status}\r\ncontent-type: {media}\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        self.unsent.extend_from_slice(response.as_bytes());
    }

    /// Sends one piece of what is due.
    fn send(&mut self, filler: &[u8]) -> Result<(), Gone> {
        if !self.unsent.is_empty() {
            let sent = socket::send(&self.socket, &self.unsent).map_err(|_| Gone)?;
            self.unsent.drain(..sent);
        } else if self.download_left > 0 {
            let left = usize::try_from(self.download_left).unwrap_or(usize::MAX);
            let piece = &filler[..filler.len().min(left)];
            let sent = socket::send(&self.socket, piece).map_err(|_| Gone)?;
            self.download_left -= sent as u64;
        }
        Ok(())
    }

    /// Sends the next event of the quiet stream if it is due. The time in it is taken immediately
    /// before the send.
    fn send_event(&mut self, now_ns: u64) -> Result<(), Gone> {
        let Some(stream) = self.stream.as_mut().filter(|it| it.due_ns <= now_ns) else {
            return Ok(());
        };
        // A late engine omits events instead of sending several together.
        stream.due_ns += (now_ns - stream.due_ns) / INTERVAL_NS * INTERVAL_NS + INTERVAL_NS;
        let event = event_chunk(stream.next, monotonic_ns());
        stream.next += 1;
        self.unsent.extend_from_slice(event.as_bytes());
        self.send(&[])
    }

    /// Returns whether a request or response is in progress that is not a quiet stream.
    const fn is_busy(&self) -> bool {
        self.stream.is_none() && (self.has_unsent() || self.reader.is_inside())
    }
}

/// Returns an event as one chunk: its number and the time at which it is sent.
fn event_chunk(number: u64, sent_ns: u64) -> String {
    let event = format!("data: {{\"n\":{number},\"t\":{sent_ns}}}\n\n");
    format!("{:x}\r\n{event}\r\n", event.len())
}

/// Returns the time of the first event of the stream with this number: the next time in its phase
/// of the interval.
const fn first_due_ns(now_ns: u64, stream: u64) -> u64 {
    let phase = stream % PHASES * INTERVAL_NS / PHASES;
    (now_ns / INTERVAL_NS + 1) * INTERVAL_NS + phase
}

struct Server {
    poll: Poll,
    listener: OwnedFd,
    connections: Vec<Option<Connection>>,
    /// Indexes of unused entries of `connections`.
    free: Vec<usize>,
    /// Indexes of the connections with quiet streams.
    streams: Vec<usize>,
    /// Number of quiet streams so far.
    streams_begun: u64,
    shared: Arc<Shared>,
    buffer: Vec<u8>,
    filler: Vec<u8>,
}

impl Server {
    fn new(listener: OwnedFd, shared: Arc<Shared>) -> io::Result<Self> {
        let poll = Poll::new()?;
        poll.add(&listener, LISTENER, Watch::Readable)?;
        Ok(Self {
            poll,
            listener,
            connections: Vec::new(),
            free: Vec::new(),
            streams: Vec::new(),
            streams_begun: 0,
            shared,
            buffer: vec![0; NEIGHBOURS_RECEIVE_BYTES],
            filler: vec![b'a'; DOWNLOAD_SEND_BYTES],
        })
    }

    fn run(&mut self) -> io::Result<()> {
        let mut ready = Vec::new();
        while !self.shared.stop.load(Ordering::Relaxed) {
            self.arm_timer()?;
            self.poll
                .wait(Duration::from_millis(ENGINE_STOP_MS), &mut ready)?;
            self.send_events()?;
            for number in ready.drain(..) {
                if number == LISTENER {
                    self.accept()?;
                } else {
                    self.step(number)?;
                }
                // An attack can make many connections ready at the same time.
                self.send_events()?;
            }
        }
        Ok(())
    }

    fn arm_timer(&self) -> io::Result<()> {
        let due = self.streams.iter().filter_map(|number| {
            let stream = self.connections.get(*number)?.as_ref()?.stream.as_ref()?;
            Some(stream.due_ns)
        });
        match due.min() {
            Some(due_ns) => {
                let wait_ns = due_ns.saturating_sub(monotonic_ns());
                self.poll.wake_after(Duration::from_nanos(wait_ns))
            }
            None => Ok(()),
        }
    }

    fn accept(&mut self) -> io::Result<()> {
        while let Some(socket) = socket::accept(&self.listener)? {
            let number = self.free.pop().unwrap_or(self.connections.len());
            if number == self.connections.len() {
                self.connections.push(None);
            }
            self.poll.add(&socket, number, Watch::Readable)?;
            self.connections[number] = Some(Connection::new(socket));
        }
        Ok(())
    }

    /// Advances a connection. It may already be closed, or may be a new one in the same place.
    fn step(&mut self, number: usize) -> io::Result<()> {
        let Some(connection) = self.connections.get_mut(number).and_then(Option::as_mut) else {
            return Ok(());
        };
        let had_stream = connection.stream.is_some();
        let due_ns = first_due_ns(monotonic_ns(), self.streams_begun);
        let stepped = connection.step(&mut self.buffer, &self.filler, due_ns, &self.shared);
        if !had_stream && connection.stream.is_some() {
            self.streams.push(number);
            self.streams_begun += 1;
        }
        self.settle(number, stepped)
    }

    fn send_events(&mut self) -> io::Result<()> {
        let now_ns = monotonic_ns();
        // Backwards, since a closed stream is removed from the list.
        for at in (0..self.streams.len()).rev() {
            let number = self.streams[at];
            if let Some(connection) = self.connections[number].as_mut() {
                let sent = connection.send_event(now_ns);
                self.settle(number, sent)?;
            }
        }
        Ok(())
    }

    /// Updates what is known about a connection after it was used; removes it if it is gone.
    fn settle(&mut self, number: usize, used: Result<(), Gone>) -> io::Result<()> {
        let Some(connection) = self.connections[number].as_mut() else {
            return Ok(());
        };
        let is_busy = used.is_ok() && connection.is_busy();
        match (connection.is_occupied, is_busy) {
            (false, true) => self.shared.occupied.fetch_add(1, Ordering::Relaxed),
            (true, false) => self.shared.occupied.fetch_sub(1, Ordering::Relaxed),
            (true, true) | (false, false) => 0,
        };
        connection.is_occupied = is_busy;
        if used.is_ok() {
            let watch = match connection.has_unsent() {
                true => Watch::Writable,
                false => Watch::Readable,
            };
            if watch != connection.watch {
                connection.watch = watch;
                self.poll.change(&connection.socket, number, watch)?;
            }
        } else if let Some(connection) = self.connections[number].take() {
            // With a reset, because the proxy has closed its side already: its port is free again
            // instead of waiting for a minute (TIME_WAIT).
            socket::reset(connection.socket)?;
            self.streams.retain(|stream| *stream != number);
            self.free.push(number);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_have_different_phases() {
        let due: Vec<u64> = (0..PHASES).map(|it| first_due_ns(7, it)).collect();
        assert_eq!(due[0], INTERVAL_NS);
        for pair in due.windows(2) {
            assert_eq!(pair[1] - pair[0], INTERVAL_NS / PHASES);
        }
        assert_eq!(first_due_ns(INTERVAL_NS, PHASES), 2 * INTERVAL_NS);
    }

    #[test]
    fn an_event_is_one_chunk() {
        let want = "19\r\ndata: {\"n\":12,\"t\":3456}\n\n\r\n";
        assert_eq!(event_chunk(12, 3456), want);
    }
}
