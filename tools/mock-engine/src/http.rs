//! The bytes of one HTTP/1.1 connection: reads requests and writes output, without deciding on
//! responses.
//!
//! During every wait the connection is still read, so that a FIN or a reset ends the wait
//! immediately, as it ends a request in uvicorn. Bytes of pipelined requests are buffered up to
//! `AHEAD_BYTES_MAX`. Once the buffer is full, the socket's readiness is polled for the close
//! instead.

use std::io::ErrorKind;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use tokio::io::Interest;
use tokio::time::sleep_until;

use crate::api::hex;
use crate::listener::Stream;
use crate::log::Framing;

/// Buffer space in bytes that is reserved for each read from a socket.
const READ_BYTES: usize = 64 << 10;
/// Number of buffered bytes at which a connection stops reading ahead while a response is in
/// progress.
const AHEAD_BYTES_MAX: usize = 1 << 20;
/// Maximum size of a request head in bytes. vLLM's Python front end accepts a header field of 5 MB.
const HEAD_BYTES_MAX: usize = 8 << 20;
/// Maximum number of header fields. vLLM's Python front end accepts 1000.
const HEADERS_MAX: usize = 2_048;
/// Maximum length in bytes of a chunk-size or trailer line.
const LINE_BYTES_MAX: usize = 16 << 10;
/// Maximum number of trailer fields after a chunked body.
const TRAILERS_MAX: usize = 128;
/// Maximum size of a request body in bytes, without its framing.
pub(crate) const BODY_BYTES_MAX: u64 = 512 << 20;
/// Interval for polling whether the client has disconnected while the read-ahead buffer is full.
const DISCONNECT_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// The client closed or reset the connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Disconnected;

/// Reason why no request head was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HeadError {
    Disconnected,
    Idle,
    Malformed,
}

/// Reason why a body was not read completely.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BodyError {
    Disconnected,
    Malformed,
    TooLarge,
}

impl From<Disconnected> for BodyError {
    fn from(_: Disconnected) -> Self {
        Self::Disconnected
    }
}

/// A request head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) minor_version: u8,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) framing: Framing,
    pub(crate) keep_alive: bool,
    pub(crate) expects_continue: bool,
}

impl Head {
    /// Returns the value of the first header field called `name`, ignoring case.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(have, _)| have.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
    }
}

/// A request body.
#[derive(Debug, Default)]
pub(crate) struct Body {
    /// The first bytes of the body, as many as the `keep_max` of [`Conn::read_body`] allows.
    pub(crate) kept: Vec<u8>,
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
    pub(crate) trailers: Vec<(String, String)>,
}

/// Hashes body bytes as they arrive and keeps the first `keep_max` of them.
struct Sink {
    kept: Vec<u8>,
    keep_max: usize,
    bytes: u64,
    hash: Sha256,
}

impl Sink {
    fn take(&mut self, bytes: &[u8]) -> Result<(), BodyError> {
        self.bytes += bytes.len() as u64;
        if self.bytes > BODY_BYTES_MAX {
            return Err(BodyError::TooLarge);
        }
        self.hash.update(bytes);
        let room = self.keep_max.saturating_sub(self.kept.len());
        let kept = bytes.get(..room).unwrap_or(bytes);
        self.kept.extend_from_slice(kept);
        Ok(())
    }
}

/// A client's connection, with the received bytes that have not been parsed yet.
#[derive(Debug)]
pub(crate) struct Conn {
    stream: Stream,
    inbuf: Vec<u8>,
    /// Bytes to write at the next flush.
    pub(crate) out: Vec<u8>,
    /// Whether anything was written since this field was last set to false, which is done once a
    /// request is complete and again after its interim responses.
    pub(crate) wrote: bool,
    /// Maximum number of bytes per write, and the pause between writes; `None` writes without
    /// limit.
    pub(crate) slow: Option<(usize, Duration)>,
    /// A copy of all bytes written to the connection for the current request; `None` records
    /// nothing.
    pub(crate) recording: Option<Vec<u8>>,
}

impl Conn {
    pub(crate) fn new(stream: Stream) -> Self {
        Self {
            stream,
            inbuf: Vec::new(),
            out: Vec::new(),
            wrote: false,
            slow: None,
            recording: None,
        }
    }

    /// Reads a request head. Returns [`HeadError::Idle`] if its first byte does not arrive within
    /// `idle`; `None` waits without limit.
    pub(crate) async fn read_head(&mut self, idle: Option<Duration>) -> Result<Head, HeadError> {
        if self.inbuf.is_empty() {
            self.first_byte(idle).await?;
        }
        let mut searched = 0;
        loop {
            let from = self.inbuf.get(searched..).unwrap_or_default();
            if let Some(at) = memchr::memmem::find(from, b"\r\n\r\n") {
                let end = searched + at + 4;
                let head = parse_head(self.inbuf.get(..end).unwrap_or_default());
                self.inbuf.drain(..end);
                return head.ok_or(HeadError::Malformed);
            }
            if self.inbuf.len() > HEAD_BYTES_MAX {
                return Err(HeadError::Malformed);
            }
            searched = self.inbuf.len().saturating_sub(3);
            fill(&self.stream, &mut self.inbuf)
                .await
                .map_err(|Disconnected| HeadError::Disconnected)?;
        }
    }

    /// Waits for the first byte of the next request. Returns [`HeadError::Idle`] if it does not
    /// arrive within `idle`; `None` waits without limit.
    pub(crate) async fn first_byte(&mut self, idle: Option<Duration>) -> Result<(), HeadError> {
        if !self.inbuf.is_empty() {
            return Ok(());
        }
        let filled = fill(&self.stream, &mut self.inbuf);
        match idle {
            None => filled.await.map_err(|Disconnected| HeadError::Disconnected),
            Some(idle) => match tokio::time::timeout(idle, filled).await {
                Ok(filled) => filled.map_err(|Disconnected| HeadError::Disconnected),
                Err(_) => Err(HeadError::Idle),
            },
        }
    }

    /// Reads a complete body and keeps its first `keep_max` bytes.
    pub(crate) async fn read_body(
        &mut self,
        framing: Framing,
        keep_max: usize,
    ) -> Result<Body, BodyError> {
        let mut sink = Sink {
            kept: Vec::new(),
            keep_max,
            bytes: 0,
            hash: Sha256::new(),
        };
        let mut trailers = Vec::new();
        match framing {
            Framing::None => {}
            Framing::ContentLength(length) if length > BODY_BYTES_MAX => {
                return Err(BodyError::TooLarge);
            }
            Framing::ContentLength(length) => {
                let reserve = keep_max.min(length as usize).min(AHEAD_BYTES_MAX);
                sink.kept.reserve_exact(reserve);
                self.read_exact(length, &mut sink).await?;
            }
            Framing::Chunked => trailers = self.read_chunks(&mut sink).await?,
        }
        Ok(Body {
            kept: sink.kept,
            bytes: sink.bytes,
            sha256: hex(&sink.hash.finalize()),
            trailers,
        })
    }

    async fn read_exact(&mut self, length: u64, sink: &mut Sink) -> Result<(), BodyError> {
        let mut left = length;
        while left > 0 {
            if self.inbuf.is_empty() {
                fill(&self.stream, &mut self.inbuf).await?;
            }
            let take = usize::try_from(left).map_or(self.inbuf.len(), |n| n.min(self.inbuf.len()));
            sink.take(self.inbuf.get(..take).unwrap_or_default())?;
            self.inbuf.drain(..take);
            left -= take as u64;
        }
        Ok(())
    }

    async fn read_chunks(&mut self, sink: &mut Sink) -> Result<Vec<(String, String)>, BodyError> {
        loop {
            let line = self.read_line().await?;
            let size = chunk_size(&line).ok_or(BodyError::Malformed)?;
            if size == 0 {
                break;
            }
            self.read_exact(size, sink).await?;
            if !self.read_line().await?.is_empty() {
                return Err(BodyError::Malformed);
            }
        }
        let mut trailers = Vec::new();
        loop {
            let line = self.read_line().await?;
            if line.is_empty() {
                return Ok(trailers);
            }
            let line = String::from_utf8_lossy(&line).into_owned();
            let (name, value) = line.split_once(':').ok_or(BodyError::Malformed)?;
            trailers.push((name.to_owned(), value.trim().to_owned()));
            if trailers.len() > TRAILERS_MAX {
                return Err(BodyError::Malformed);
            }
        }
    }

    /// Reads a line that ends in CRLF and returns it without the CRLF. A line that ends in a bare
    /// LF or is too long is [`BodyError::Malformed`].
    async fn read_line(&mut self) -> Result<Vec<u8>, BodyError> {
        loop {
            if let Some(at) = memchr::memchr(b'\n', &self.inbuf) {
                let mut line: Vec<u8> = self.inbuf.drain(..=at).collect();
                line.pop();
                return match line.pop() {
                    Some(b'\r') => Ok(line),
                    _ => Err(BodyError::Malformed),
                };
            }
            if self.inbuf.len() > LINE_BYTES_MAX {
                return Err(BodyError::Malformed);
            }
            fill(&self.stream, &mut self.inbuf).await?;
        }
    }

    /// Reads until `bytes` bytes have arrived after the head, then stops reading and waits until
    /// the client disconnects.
    pub(crate) async fn stall_after(&mut self, bytes: usize) -> Disconnected {
        let mut have = self.inbuf.len();
        let mut piece = vec![0; READ_BYTES];
        while have < bytes {
            let most = (bytes - have).min(READ_BYTES);
            let room = piece.get_mut(..most).unwrap_or_default();
            if self.stream.readable().await.is_err() {
                return Disconnected;
            }
            match self.stream.try_read(room) {
                Ok(0) => return Disconnected,
                Ok(n) => have += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(_) => return Disconnected,
            }
        }
        closed(&self.stream).await
    }

    /// Waits until the client disconnects.
    pub(crate) async fn stall(&mut self) -> Disconnected {
        loop {
            if let Err(gone) = ahead(&self.stream, &mut self.inbuf).await {
                return gone;
            }
        }
    }

    /// Waits until `done` completes or the client disconnects.
    pub(crate) async fn wait_on(
        &mut self,
        done: impl Future<Output = ()>,
    ) -> Result<(), Disconnected> {
        tokio::pin!(done);
        loop {
            tokio::select! {
                biased;
                read = ahead(&self.stream, &mut self.inbuf) => read?,
                () = &mut done => return Ok(()),
            }
        }
    }

    /// Waits until `due` or until the client disconnects.
    pub(crate) async fn pause_until(&mut self, due: Instant) -> Result<(), Disconnected> {
        if due <= Instant::now() {
            return Ok(());
        }
        self.wait_on(sleep_until(due.into())).await
    }

    /// Yields to other connections, then reads ahead without waiting, which detects a disconnect.
    /// If the read-ahead buffer is full, nothing is read and no disconnect is detected.
    pub(crate) async fn yield_and_check(&mut self) -> Result<(), Disconnected> {
        tokio::task::yield_now().await;
        if self.inbuf.len() >= AHEAD_BYTES_MAX {
            return Ok(());
        }
        self.inbuf.reserve(READ_BYTES);
        match self.stream.try_read_buf(&mut self.inbuf) {
            Ok(0) => Err(Disconnected),
            Ok(_) => Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
            Err(_) => Err(Disconnected),
        }
    }

    /// Writes all bytes in `out`, at the pace of `slow` if it is set.
    pub(crate) async fn flush(&mut self) -> Result<(), Disconnected> {
        let out = std::mem::take(&mut self.out);
        match self.slow {
            None => self.write(&out).await?,
            Some((bytes, delay)) => {
                for piece in out.chunks(bytes.max(1)) {
                    if self.wrote {
                        self.pause_until(after(Instant::now(), delay)).await?;
                    }
                    self.write(piece).await?;
                }
            }
        }
        self.out = out;
        self.out.clear();
        Ok(())
    }

    /// Writes as much of `out` as the socket accepts immediately, or nothing if `slow` is set.
    /// Returns whether that was everything; otherwise the rest remains in `out` for
    /// [`Conn::flush`].
    pub(crate) fn write_now(&mut self) -> bool {
        if self.slow.is_some() {
            return false;
        }
        match self.stream.try_write(&self.out) {
            Ok(n) => {
                self.wrote |= n > 0;
                record(&mut self.recording, self.out.get(..n));
                self.out.drain(..n);
                self.out.is_empty()
            }
            // The error occurs again in `flush`, which reports it.
            Err(_) => false,
        }
    }

    async fn write(&mut self, bytes: &[u8]) -> Result<(), Disconnected> {
        let mut left = bytes;
        while !left.is_empty() {
            match self.stream.try_write(left) {
                Ok(n) => {
                    self.wrote = true;
                    record(&mut self.recording, left.get(..n));
                    left = left.get(n..).unwrap_or_default();
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    tokio::select! {
                        ready = self.stream.writable() => ready.map_err(|_| Disconnected)?,
                        read = ahead(&self.stream, &mut self.inbuf) => read?,
                    }
                }
                Err(_) => return Err(Disconnected),
            }
        }
        Ok(())
    }

    /// Echoes every byte until the client disconnects.
    pub(crate) async fn echo(&mut self) -> Disconnected {
        loop {
            self.out.append(&mut self.inbuf);
            if let Err(gone) = self.flush().await {
                return gone;
            }
            if let Err(gone) = fill(&self.stream, &mut self.inbuf).await {
                return gone;
            }
        }
    }

    /// Sends FIN, then discards incoming data for at most `linger`, because closing a socket with
    /// unread bytes would send a reset.
    pub(crate) async fn close_gently(&mut self, linger: Duration) {
        if socket2::SockRef::from(&self.stream)
            .shutdown(std::net::Shutdown::Write)
            .is_err()
        {
            return;
        }
        let due = Instant::now() + linger;
        while Instant::now() < due {
            self.inbuf.clear();
            let filled = fill(&self.stream, &mut self.inbuf);
            if !matches!(
                tokio::time::timeout_at(due.into(), filled).await,
                Ok(Ok(()))
            ) {
                return;
            }
        }
    }

    /// Closes the connection with a TCP reset.
    pub(crate) fn reset(self) {
        reset(&self.stream);
    }
}

/// Returns `start + wait`, with `wait` limited to 100 million seconds so that the sum does not
/// overflow.
pub(crate) fn after(start: Instant, wait: Duration) -> Instant {
    const YEARS: Duration = Duration::from_secs(100_000_000);
    start.checked_add(wait.min(YEARS)).unwrap_or(start)
}

/// Configures the socket so that closing it sends a reset.
pub(crate) fn reset(stream: &Stream) {
    // If this fails, the close sends a FIN, which makes the test fail.
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Waits until data arrives and reads it into `inbuf`.
async fn fill(stream: &Stream, inbuf: &mut Vec<u8>) -> Result<(), Disconnected> {
    loop {
        stream.readable().await.map_err(|_| Disconnected)?;
        inbuf.reserve(READ_BYTES);
        match stream.try_read_buf(inbuf) {
            Ok(0) => return Err(Disconnected),
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return Err(Disconnected),
        }
    }
}

fn record(recording: &mut Option<Vec<u8>>, written: Option<&[u8]>) {
    if let Some(recording) = recording {
        recording.extend_from_slice(written.unwrap_or_default());
    }
}

/// Waits until data arrives and reads it into `inbuf`. If `inbuf` is full, reads nothing and
/// returns an error once the client has closed the connection.
async fn ahead(stream: &Stream, inbuf: &mut Vec<u8>) -> Result<(), Disconnected> {
    if inbuf.len() < AHEAD_BYTES_MAX {
        fill(stream, inbuf).await
    } else {
        Err(closed(stream).await)
    }
}

/// Waits until the client has closed the connection, without reading.
///
/// Unread bytes keep the socket readable, so waiting for readability would return immediately. The
/// readiness is polled every [`DISCONNECT_POLL_INTERVAL`] instead.
async fn closed(stream: &Stream) -> Disconnected {
    loop {
        match stream.ready(Interest::READABLE).await {
            Ok(ready) if !ready.is_read_closed() => {}
            Ok(_) | Err(_) => return Disconnected,
        }
        tokio::time::sleep(DISCONNECT_POLL_INTERVAL).await;
    }
}

fn chunk_size(line: &[u8]) -> Option<u64> {
    let digits = line.split(|byte| *byte == b';').next()?;
    let digits = std::str::from_utf8(digits).ok()?.trim_end();
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, 16).ok()
}

fn parse_head(bytes: &[u8]) -> Option<Head> {
    let mut few = [httparse::EMPTY_HEADER; 64];
    let mut request = httparse::Request::new(&mut few);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(_)) => head_from(&request),
        Err(httparse::Error::TooManyHeaders) => {
            let mut many = vec![httparse::EMPTY_HEADER; HEADERS_MAX];
            let mut request = httparse::Request::new(&mut many);
            match request.parse(bytes) {
                Ok(httparse::Status::Complete(_)) => head_from(&request),
                Ok(httparse::Status::Partial) | Err(_) => None,
            }
        }
        Ok(httparse::Status::Partial) | Err(_) => None,
    }
}

fn head_from(request: &httparse::Request<'_, '_>) -> Option<Head> {
    let minor_version = request.version?;
    let headers: Vec<(String, String)> = request
        .headers
        .iter()
        .map(|header| {
            let value = String::from_utf8_lossy(header.value).into_owned();
            (header.name.to_owned(), value)
        })
        .collect();
    let mut head = Head {
        method: request.method?.to_owned(),
        target: request.path?.to_owned(),
        minor_version,
        headers,
        framing: Framing::None,
        keep_alive: minor_version == 1,
        expects_continue: false,
    };
    head.framing = framing(&head)?;
    let connection = head.header("connection").unwrap_or_default();
    if connection
        .split(',')
        .any(|token| token.trim().eq_ignore_ascii_case("close"))
    {
        head.keep_alive = false;
    }
    head.expects_continue = head
        .header("expect")
        .is_some_and(|value| value.eq_ignore_ascii_case("100-continue"));
    Some(head)
}

/// Returns the framing of a request body, or `None` if it is ambiguous, invalid or unsupported: two
/// framings, two lengths, a length that is not a number, or a coding other than chunked.
fn framing(head: &Head) -> Option<Framing> {
    let all = |name: &str| {
        head.headers
            .iter()
            .filter(|(have, _)| have.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.trim().to_owned())
            .collect::<Vec<_>>()
    };
    let (lengths, codings) = (all("content-length"), all("transfer-encoding"));
    match (lengths.as_slice(), codings.as_slice()) {
        ([], []) => Some(Framing::None),
        ([length], []) if length.bytes().all(|byte| byte.is_ascii_digit()) => {
            length.parse().ok().map(Framing::ContentLength)
        }
        ([], [coding]) if coding.eq_ignore_ascii_case("chunked") => Some(Framing::Chunked),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ambiguous_framings_are_refused() {
        for (headers, want) in [
            ("", Some(Framing::None)),
            ("content-length: 5\r\n", Some(Framing::ContentLength(5))),
            ("Transfer-Encoding: Chunked\r\n", Some(Framing::Chunked)),
            ("content-length: 5\r\ncontent-length: 5\r\n", None),
            ("content-length: +5\r\n", None),
            ("content-length: \r\n", None),
            ("content-length: 5\r\ntransfer-encoding: chunked\r\n", None),
            ("transfer-encoding: gzip, chunked\r\n", None),
        ] {
            let text = format!("POST / HTTP/1.1\r\n{headers}\r\n");
            let got = parse_head(text.as_bytes()).map(|head| head.framing);
            assert_eq!(got, want, "{headers}");
        }
    }

    #[test]
    fn a_thousand_header_fields_are_accepted() {
        let many = "a: b\r\n".repeat(1_000);
        let head = parse_head(format!("GET / HTTP/1.0\r\n{many}\r\n").as_bytes()).unwrap();
        assert_eq!((head.headers.len(), head.keep_alive), (1_000, false));
    }

    #[test]
    fn chunk_sizes() {
        for (line, want) in [
            ("0", Some(0)),
            ("fF", Some(255)),
            ("a;x=y", Some(10)),
            ("", None),
            ("-1", None),
            ("0x5", None),
            ("11111111111111111", None),
        ] {
            assert_eq!(chunk_size(line.as_bytes()), want, "{line}");
        }
    }
}
