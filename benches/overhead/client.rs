//! A blocking client with one connection.

use std::io::{Read, Write};
use std::net::TcpStream;

use rustls::{ClientConnection, StreamOwned};

use crate::stage::{Stage, Wire};

/// A stream that carries plain text or TLS.
pub(crate) trait Stream: Read + Write {}

impl<S: Read + Write> Stream for S {}

/// A client connection that stays open between requests.
pub(crate) struct Client {
    stream: Box<dyn Stream>,
    received: Vec<u8>,
    buffer: Vec<u8>,
}

impl Client {
    /// Connects to `port`.
    pub(crate) fn connect(stage: &Stage, port: u16) -> Self {
        let socket = TcpStream::connect(("127.0.0.1", port)).unwrap();
        socket.set_nodelay(true).unwrap();
        let stream: Box<dyn Stream> = match stage.wire {
            Wire::Plain => Box::new(socket),
            Wire::Tls => {
                let name = "localhost".try_into().unwrap();
                let session = ClientConnection::new(stage.identity.client(), name).unwrap();
                Box::new(StreamOwned::new(session, socket))
            }
        };
        Self {
            stream,
            received: Vec::new(),
            buffer: vec![0; 64 << 10],
        }
    }

    /// Sends a request and receives the whole response, which must be a 200.
    pub(crate) fn exchange(&mut self, request: &[u8]) {
        let head = self.begin(request);
        let length = content_length(&self.received[..head]);
        while !match length {
            Some(length) => self.received.len() >= head + length,
            None => self.received[head..].ends_with(b"0\r\n\r\n"),
        } {
            self.receive();
        }
    }

    /// Sends a request and receives the head of the response.
    pub(crate) fn begin_stream(&mut self, request: &[u8]) {
        self.begin(request);
    }

    /// Receives one chunk of `bytes` bytes, framing included, which is sent alone.
    pub(crate) fn receive_chunk(&mut self, bytes: usize) {
        self.received.clear();
        while self.received.len() < bytes {
            self.receive();
        }
    }

    /// Sends a request and receives at least the head of the response. Returns the head's length.
    fn begin(&mut self, request: &[u8]) -> usize {
        self.received.clear();
        self.stream.write_all(request).unwrap();
        self.stream.flush().unwrap();
        loop {
            self.receive();
            if let Some(end) = position(&self.received, b"\r\n\r\n") {
                assert!(
                    self.received.starts_with(b"HTTP/1.1 200"),
                    "{}",
                    String::from_utf8_lossy(&self.received)
                );
                return end + 4;
            }
        }
    }

    fn receive(&mut self) {
        let count = self.stream.read(&mut self.buffer).unwrap();
        assert!(count > 0, "the connection was closed");
        self.received.extend_from_slice(&self.buffer[..count]);
    }
}

/// Returns the value of Content-Length; `None` if the response is chunked.
fn content_length(head: &[u8]) -> Option<usize> {
    let text = std::str::from_utf8(head).unwrap().to_ascii_lowercase();
    let value = text.split_once("content-length:")?.1;
    value.lines().next()?.trim().parse().ok()
}

/// Returns the position of `needle` in `bytes`.
pub(crate) fn position(bytes: &[u8], needle: &[u8]) -> Option<usize> {
    bytes.windows(needle.len()).position(|at| at == needle)
}
