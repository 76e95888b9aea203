//! A blocking HTTP client that gives access to the raw bytes.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use mock_engine::Engine;
use serde_json::Value;
use sha2::{Digest, Sha256};

/// Maximum duration of any wait in these tests.
pub(crate) const DEADLINE: Duration = Duration::from_secs(5);

/// A connection to an engine.
pub(crate) struct Client(pub(crate) TcpStream);

/// A complete response.
#[derive(Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
    /// The chunks of a chunked body.
    pub(crate) chunks: Vec<String>,
}

impl Response {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.head
            .lines()
            .filter_map(|line| line.split_once(": "))
            .find(|(have, _)| *have == name)
            .map(|(_, value)| value)
    }

    /// Returns the JSON of each `data:` line in the chunks, without `[DONE]`.
    pub(crate) fn events(&self) -> Vec<Value> {
        self.chunks
            .iter()
            .flat_map(|chunk| chunk.lines())
            .filter_map(|line| line.strip_prefix("data: "))
            .filter(|data| *data != "[DONE]")
            .map(|data| serde_json::from_str(data).unwrap())
            .collect()
    }
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Formats a POST request with a JSON body.
pub(crate) fn post(path: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nhost: e\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Sends one request on a new connection and returns the response.
pub(crate) fn ask(engine: &Engine, request: &str) -> Response {
    let mut client = Client::new(engine);
    client.send(request);
    client.response().unwrap()
}

impl Client {
    pub(crate) fn new(engine: &Engine) -> Self {
        let stream = TcpStream::connect(engine.addr()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        Self(stream)
    }

    pub(crate) fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).unwrap();
    }

    /// Reads until the connection ends. Returns all bytes, and the read error: `None` if the
    /// connection ended with a FIN.
    pub(crate) fn rest(&mut self) -> (Vec<u8>, Option<ErrorKind>) {
        let mut all = Vec::new();
        let error = self.0.read_to_end(&mut all).err().map(|e| e.kind());
        (all, error)
    }

    fn line(&mut self) -> Option<String> {
        let (mut line, mut byte) = (Vec::new(), [0]);
        while !line.ends_with(b"\r\n") {
            if self.0.read(&mut byte).ok()? == 0 {
                return None;
            }
            line.push(byte[0]);
        }
        Some(String::from_utf8_lossy(&line).into_owned())
    }

    pub(crate) fn head(&mut self) -> Option<String> {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            head.push_str(&self.line()?);
        }
        Some(head)
    }

    fn exactly(&mut self, bytes: usize) -> Option<Vec<u8>> {
        let mut body = vec![0; bytes];
        self.0.read_exact(&mut body).ok()?;
        Some(body)
    }

    /// Reads a response. Returns `None` if the connection ends before the response is complete.
    pub(crate) fn response(&mut self) -> Option<Response> {
        let head = self.head()?;
        let mut response = Response {
            status: head[9..12].parse().unwrap(),
            head,
            body: Vec::new(),
            chunks: Vec::new(),
        };
        if response.header("transfer-encoding") == Some("chunked") {
            loop {
                let size = usize::from_str_radix(self.line()?.trim_end(), 16).unwrap();
                let chunk = self.exactly(size + 2)?;
                if size == 0 {
                    return Some(response);
                }
                let chunk = String::from_utf8_lossy(&chunk[..size]).into_owned();
                response.body.extend_from_slice(chunk.as_bytes());
                response.chunks.push(chunk);
            }
        }
        let length = response.header("content-length").unwrap().parse().unwrap();
        response.body = self.exactly(length)?;
        Some(response)
    }
}
