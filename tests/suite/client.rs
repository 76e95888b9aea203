//! A blocking HTTP/1.1 client that hides nothing: raw bytes out, every byte of the answer in.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde_json::Value;

/// No wait in these tests may last longer. Generous: it is only ever spent by a failure.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// How a body was delimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Framing {
    None,
    Length(u64),
    Chunked,
    UntilClose,
}

/// How an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// As its framing promised.
    Complete,
    /// By a close before its framing allowed it.
    Cut,
    /// By a reset.
    Reset,
}

/// The head of an answer.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) version: String,
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
}

impl Head {
    fn parse(text: &str) -> Self {
        let mut lines = text.trim_end().split("\r\n");
        let line = lines.next().unwrap();
        let mut words = line.splitn(3, ' ');
        Self {
            version: words.next().unwrap().to_owned(),
            status: words.next().unwrap().parse().unwrap(),
            headers: lines
                .map(|line| line.split_once(':').unwrap())
                .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
                .collect(),
        }
    }

    /// The only header of that name.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let all = self.header_all(name);
        assert!(all.len() < 2, "{name} is given twice: {all:?}");
        all.first().copied()
    }

    pub(crate) fn header_all(&self, name: &str) -> Vec<&str> {
        self.headers
            .iter()
            .filter(|(have, _)| have == name)
            .map(|(_, value)| value.as_str())
            .collect()
    }

    /// How the body of an answer to `method` is delimited; panics where that is ambiguous.
    pub(crate) fn framing(&self, method: &str) -> Framing {
        let length = self.header("content-length");
        let coding = self.header("transfer-encoding");
        assert!(
            length.is_none() || coding.is_none(),
            "both framings: {self:?}"
        );
        if method == "HEAD" || self.status < 200 || matches!(self.status, 204 | 304) {
            return Framing::None;
        }
        match (length, coding) {
            (Some(length), _) => Framing::Length(length.parse().unwrap()),
            (None, Some("chunked")) => Framing::Chunked,
            (None, Some(other)) => panic!("transfer-encoding: {other}"),
            (None, None) => Framing::UntilClose,
        }
    }
}

/// An answer read to its end.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) head: Head,
    pub(crate) framing: Framing,
    pub(crate) body: Vec<u8>,
    pub(crate) end: End,
}

impl std::ops::Deref for Response {
    type Target = Head;

    fn deref(&self) -> &Head {
        &self.head
    }
}

impl Response {
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?} {}", self.head, self.text()))
    }

    /// The data of each event that is JSON, in order.
    pub(crate) fn events(&self) -> Vec<Value> {
        self.text()
            .lines()
            .filter_map(|line| line.strip_prefix("data: "))
            .filter(|data| *data != "[DONE]")
            .map(|data| serde_json::from_str(data).unwrap())
            .collect()
    }

    /// Fails unless the answer has this status and came whole.
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{:?} {}", self.head, self.text());
        assert_eq!(self.end, End::Complete, "{:?} {}", self.head, self.text());
        self
    }

    /// Fails unless the answer is an error of ringside's own in pd-sidecar's shape.
    #[track_caller]
    pub(crate) fn expect_error(self, status: u16, code: &str) -> Self {
        let this = self.expect(status);
        assert_eq!(this.header("x-ringside-error"), Some(code), "{this:?}");
        assert_eq!(this.header("content-type"), Some("application/json"));
        let body = this.json();
        let names: Vec<_> = body.as_object().unwrap().keys().collect();
        assert_eq!(names, ["object", "message", "type", "param", "code"]);
        assert_eq!(body["object"], "error");
        assert_eq!(body["param"], "");
        assert_eq!(body["code"], status);
        let kind = match status {
            400..=499 => "BadRequestError",
            502 => "BadGateway",
            503 => "ServiceUnavailable",
            504 => "GatewayTimeout",
            _ => "InternalServerError",
        };
        assert_eq!(body["type"], kind);
        assert_ne!(body["message"], "");
        this
    }
}

/// A client's side of TLS, for one who reads and one who writes.
type Session = Arc<Mutex<rustls::ClientConnection>>;

/// A connection.
pub(crate) struct Client {
    stream: TcpStream,
    tls: Option<Session>,
    /// Received records that were not processed.
    records: Vec<u8>,
    /// Received and not yet looked at.
    buffer: Vec<u8>,
    /// What the kernel last said instead of bytes.
    ended: Option<End>,
}

impl Client {
    pub(crate) fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            tls: None,
            records: Vec::new(),
            buffer: Vec::new(),
            ended: None,
        }
    }

    /// A connection with TLS on it; the handshake happens with the first bytes.
    pub(crate) fn secure(port: u16, session: rustls::ClientConnection) -> Self {
        let mut client = Self::connect(port);
        client.tls = Some(Arc::new(Mutex::new(session)));
        client
    }

    /// Shakes hands now, if that has not happened; the error if it fails.
    pub(crate) fn shake_hands(&mut self) -> std::io::Result<()> {
        let Some(tls) = &self.tls else { return Ok(()) };
        let mut tls = tls.lock().unwrap();
        while tls.is_handshaking() {
            tls.complete_io(&mut self.stream)?;
        }
        Ok(())
    }

    /// The certificate the other side has shown.
    pub(crate) fn certificate(&self) -> Vec<u8> {
        let tls = self.tls.as_ref().unwrap().lock().unwrap();
        tls.peer_certificates().unwrap()[0].to_vec()
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.shake_hands()?;
        let Some(tls) = &self.tls else {
            return self.stream.write_all(bytes);
        };
        for piece in bytes.chunks(16 * 1024) {
            let mut records = Vec::new();
            {
                let mut tls = tls.lock().unwrap();
                tls.writer().write_all(piece)?;
                while tls.wants_write() {
                    tls.write_tls(&mut records)?;
                }
            }
            self.stream.write_all(&records)?;
        }
        Ok(())
    }

    /// Reads, and does not write: that the other side takes nothing more says nothing of what it
    /// has said.
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.shake_hands()?;
        let Some(tls) = &self.tls else {
            return self.stream.read(buffer);
        };
        let mut records = [0; 1024];
        let mut received = &records[..0];
        loop {
            match tls.lock().unwrap().reader().read(buffer) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                other => {
                    self.records.extend_from_slice(received);
                    return other;
                }
            }
            if !self.records.is_empty() {
                let n = self.records.len().min(records.len());
                records[..n].copy_from_slice(&self.records[..n]);
                self.records.drain(..n);
                received = &records[..n];
            } else if received.is_empty() {
                let n = self.stream.read(&mut records)?;
                received = &records[..n];
            }
            let mut tls = tls.lock().unwrap();
            tls.read_tls(&mut received)?;
            tls.process_new_packets().map_err(std::io::Error::other)?;
        }
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.write_all(bytes.as_ref()).unwrap();
    }

    /// As `send`, where the other side may have closed already.
    pub(crate) fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        self.write_all(bytes.as_ref()).is_ok()
    }

    /// The same connection, for sending from another thread.
    pub(crate) fn share(&self) -> Self {
        Self {
            stream: self.stream.try_clone().unwrap(),
            tls: self.tls.clone(),
            records: Vec::new(),
            buffer: Vec::new(),
            ended: None,
        }
    }

    /// Ends our direction.
    pub(crate) fn finish(&mut self) {
        if let Some(tls) = &self.tls {
            let mut tls = tls.lock().unwrap();
            tls.send_close_notify();
            // Either fails if the other side was faster.
            let _ = tls.write_tls(&mut self.stream);
            let _ = self.stream.shutdown(Shutdown::Write);
            return;
        }
        self.stream.shutdown(Shutdown::Write).unwrap();
    }

    /// Sends as much of `bytes` as is taken within a few looks; the connection blocks again.
    pub(crate) fn send_some(&mut self, mut bytes: &[u8]) {
        self.stream.set_nonblocking(true).unwrap();
        let mut refusals = 0;
        while refusals < 50 && !bytes.is_empty() {
            let wrote = match &self.tls {
                Some(tls) => {
                    rustls::Stream::new(&mut *tls.lock().unwrap(), &mut self.stream).write(bytes)
                }
                None => self.stream.write(bytes),
            };
            match wrote {
                Ok(sent) => bytes = &bytes[sent..],
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    refusals += 1;
                    crate::harness::look_again();
                }
                Err(error) => panic!("{error}"),
            }
        }
        self.stream.set_nonblocking(false).unwrap();
    }

    /// Ends the connection with a reset.
    pub(crate) fn reset(self) {
        rustix::net::sockopt::set_socket_linger(&self.stream, Some(Duration::ZERO)).unwrap();
    }

    /// The socket, for what the methods here do not offer.
    pub(crate) fn socket(&self) -> &TcpStream {
        &self.stream
    }

    /// One request and its answer.
    pub(crate) fn ask(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response {
        self.send(request(method, path, headers, body));
        self.response_to(method)
    }

    /// Takes more bytes in; `false` at the end.
    fn fill(&mut self) -> bool {
        if self.ended.is_some() {
            return false;
        }
        let mut piece = [0; 64 * 1024];
        match self.read(&mut piece) {
            Ok(0) => self.ended = Some(End::Cut),
            Ok(n) => {
                self.buffer.extend_from_slice(&piece[..n]);
                return true;
            }
            // A wait with a time limit is not begun again by the kernel.
            Err(error) if error.kind() == ErrorKind::Interrupted => return true,
            // Without the peer's word for it an end is none.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof
                ) =>
            {
                self.ended = Some(End::Reset);
            }
            Err(error) => panic!(
                "nothing came ({error}) after {:?}",
                String::from_utf8_lossy(&self.buffer)
            ),
        }
        false
    }

    fn take_until(&mut self, needle: &[u8]) -> Result<Vec<u8>, End> {
        loop {
            let found = self
                .buffer
                .windows(needle.len())
                .position(|window| window == needle);
            if let Some(at) = found {
                return Ok(self.buffer.drain(..at + needle.len()).collect());
            }
            if !self.fill() {
                return Err(self.ended.unwrap());
            }
        }
    }

    fn take_exactly(&mut self, bytes: usize, into: &mut Vec<u8>) -> Result<(), End> {
        while self.buffer.len() < bytes {
            if !self.fill() {
                into.append(&mut self.buffer);
                return Err(self.ended.unwrap());
            }
        }
        into.extend(self.buffer.drain(..bytes));
        Ok(())
    }

    /// The next head, an interim one included.
    #[track_caller]
    pub(crate) fn head(&mut self) -> Head {
        self.try_head()
            .unwrap_or_else(|end| panic!("{end:?} in place of an answer"))
    }

    /// The next head, or how the connection ended before it.
    pub(crate) fn try_head(&mut self) -> Result<Head, End> {
        let bytes = self.take_until(b"\r\n\r\n")?;
        Ok(Head::parse(std::str::from_utf8(&bytes).unwrap()))
    }

    /// The next chunk of a chunked body; empty at the end of the body.
    pub(crate) fn chunk(&mut self) -> Result<Vec<u8>, End> {
        let line = self.take_until(b"\r\n")?;
        let line = std::str::from_utf8(&line).unwrap().trim_end();
        let size = usize::from_str_radix(line, 16).unwrap_or_else(|_| panic!("chunk {line:?}"));
        let mut chunk = Vec::new();
        if size == 0 {
            // No trailers: the engines here send none.
            self.take_exactly(2, &mut chunk)?;
            assert_eq!(chunk, b"\r\n");
            return Ok(Vec::new());
        }
        self.take_exactly(size + 2, &mut chunk)?;
        assert_eq!(chunk.split_off(size), b"\r\n");
        Ok(chunk)
    }

    /// The body that follows a head.
    pub(crate) fn body(&mut self, framing: Framing) -> (Vec<u8>, End) {
        let mut body = Vec::new();
        let end = match framing {
            Framing::None => Ok(()),
            Framing::Length(length) => {
                self.take_exactly(usize::try_from(length).unwrap(), &mut body)
            }
            Framing::Chunked => loop {
                match self.chunk() {
                    Ok(chunk) if chunk.is_empty() => break Ok(()),
                    Ok(chunk) => body.extend(chunk),
                    Err(end) => break Err(end),
                }
            },
            Framing::UntilClose => {
                while self.fill() {}
                body.append(&mut self.buffer);
                match self.ended {
                    Some(End::Reset) => Err(End::Reset),
                    _ => Ok(()),
                }
            }
        };
        (body, end.err().unwrap_or(End::Complete))
    }

    /// The next final answer, to a request that was no HEAD.
    #[track_caller]
    pub(crate) fn response(&mut self) -> Response {
        self.response_to("GET")
    }

    /// The next final answer, to a request of this method.
    #[track_caller]
    pub(crate) fn response_to(&mut self, method: &str) -> Response {
        let head = loop {
            let head = self.head();
            if head.status >= 200 {
                break head;
            }
        };
        let framing = head.framing(method);
        let (body, end) = self.body(framing);
        Response {
            head,
            framing,
            body,
            end,
        }
    }

    /// Takes the given number of raw bytes.
    #[track_caller]
    pub(crate) fn raw(&mut self, bytes: usize) -> Vec<u8> {
        let mut taken = Vec::new();
        self.take_exactly(bytes, &mut taken).unwrap();
        taken
    }

    /// Everything up to the end of the connection, and whether that was a reset.
    pub(crate) fn rest(&mut self) -> (Vec<u8>, End) {
        while self.fill() {}
        (std::mem::take(&mut self.buffer), self.ended.unwrap())
    }

    /// Fails unless the other side closes without another byte.
    #[track_caller]
    pub(crate) fn expect_closed(&mut self) {
        let (rest, _) = self.rest();
        assert!(rest.is_empty(), "{}", String::from_utf8_lossy(&rest));
    }
}

/// A request with a length, and with a `Host` unless one is given.
pub(crate) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut bytes = head(method, path, headers);
    if !body.is_empty() || method == "POST" {
        bytes.extend(format!("Content-Length: {}\r\n", body.len()).into_bytes());
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(body);
    bytes
}

/// A request whose body goes out in the given chunks.
pub(crate) fn chunked_request(
    path: &str,
    headers: &[(&str, &str)],
    chunks: &[impl AsRef<[u8]>],
) -> Vec<u8> {
    let mut bytes = head("POST", path, headers);
    bytes.extend_from_slice(b"Transfer-Encoding: chunked\r\n\r\n");
    for chunk in chunks {
        let chunk = chunk.as_ref();
        bytes.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
        bytes.extend_from_slice(chunk);
        bytes.extend_from_slice(b"\r\n");
    }
    bytes.extend_from_slice(b"0\r\n\r\n");
    bytes
}

/// A request head without its framing and blank line; a POST is JSON unless it says otherwise.
pub(crate) fn head(method: &str, path: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    let given = |wanted: &str| {
        headers
            .iter()
            .any(|(name, _)| name.eq_ignore_ascii_case(wanted))
    };
    let mut text = format!("{method} {path} HTTP/1.1\r\n");
    if !given("host") {
        text.push_str("Host: api.example\r\n");
    }
    if method == "POST" && !given("content-type") {
        text.push_str("Content-Type: application/json\r\n");
    }
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    text.into_bytes()
}
