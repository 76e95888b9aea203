//! HTTP/1.1 for the scripted clients and engines, independent of the proxy's own implementation.

use std::rc::Rc;

use crate::net::sim::{SimConn, SimNet};

/// A request or response that was received completely.
#[derive(Clone, Debug, Default)]
pub(super) struct Message {
    pub(super) line: String,
    pub(super) fields: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

impl Message {
    pub(super) fn field(&self, name: &str) -> Option<&str> {
        let found = self.fields.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }

    pub(super) fn status(&self) -> u16 {
        self.line[9..12].parse().unwrap()
    }

    /// Returns whether the end of the connection is the end of this response's body.
    pub(super) fn is_open_ended(&self) -> bool {
        self.field("content-length").is_none() && self.field("transfer-encoding").is_none()
    }

    /// Returns the value of `x-request-id`; empty if the message has none.
    pub(super) fn id(&self) -> String {
        self.field("x-request-id").unwrap_or_default().to_owned()
    }

    fn parse_head(head: &[u8]) -> Self {
        let text = String::from_utf8(head.to_vec()).unwrap();
        let mut lines = text.split("\r\n");
        let line = lines.next().unwrap().to_owned();
        let field = |line: &str| {
            let (name, value) = line.split_once(':').unwrap();
            (name.to_ascii_lowercase(), value.trim().to_owned())
        };
        Self {
            line,
            fields: lines.map(field).collect(),
            body: Vec::new(),
        }
    }
}

/// Reason that no complete request or response was received.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Broken {
    /// The connection ended before the first byte of the message.
    Nothing,
    /// The connection ended or was reset during the message, or the chunk framing of the message is
    /// malformed.
    Cut,
}

/// The client's or engine's end of a connection, and the bytes received on it that no message has
/// consumed.
pub(super) struct Wire {
    pub(super) conn: Rc<SimConn>,
    pub(super) bytes: Vec<u8>,
    /// Whether the peer has ended the stream with FIN, not RST.
    ended: bool,
}

impl Wire {
    pub(super) fn new(conn: Rc<SimConn>) -> Self {
        Self {
            conn,
            bytes: Vec::new(),
            ended: false,
        }
    }

    async fn more(&mut self) -> Result<(), Broken> {
        let before = self.bytes.len();
        match self.conn.recv(&mut self.bytes, 4096).await {
            Ok(0) => {
                self.ended = !self.conn.was_reset();
                Err(Broken::Cut)
            }
            Ok(_) => Ok(()),
            Err(_) if before == 0 => Err(Broken::Nothing),
            Err(_) => Err(Broken::Cut),
        }
    }

    /// Reads one request or response. Bytes that follow it remain in `bytes`. Fails if the
    /// connection ends first.
    pub(super) async fn read(&mut self, is_response: bool) -> Result<Message, Broken> {
        let end = loop {
            if let Some(end) = find(&self.bytes, b"\r\n\r\n") {
                break end;
            }
            if let Err(broken) = self.more().await {
                let nothing = self.bytes.is_empty();
                return Err(if nothing { Broken::Nothing } else { broken });
            }
        };
        let mut message = Message::parse_head(&self.bytes[..end]);
        self.bytes.drain(..end + 4);
        let is_chunked = message.field("transfer-encoding") == Some("chunked");
        let length = message.field("content-length").map(|v| v.parse().unwrap());
        let no_body = is_response && (message.status() < 200 || message.status() == 204);
        assert!(
            !(is_chunked && length.is_some()),
            "two framings: {message:?}"
        );
        message.body = match length {
            _ if no_body => Vec::new(),
            _ if is_chunked => self.read_chunks().await?,
            Some(length) => self.take(length).await?,
            None if is_response => self.read_to_end().await?,
            None => Vec::new(),
        };
        Ok(message)
    }

    async fn take(&mut self, n: usize) -> Result<Vec<u8>, Broken> {
        while self.bytes.len() < n {
            self.more().await.map_err(|_| Broken::Cut)?;
        }
        Ok(self.bytes.drain(..n).collect())
    }

    async fn read_to_end(&mut self) -> Result<Vec<u8>, Broken> {
        while !self.ended {
            if self.more().await.is_err() && !self.ended {
                return Err(Broken::Cut);
            }
        }
        Ok(std::mem::take(&mut self.bytes))
    }

    async fn read_chunks(&mut self) -> Result<Vec<u8>, Broken> {
        let mut body = Vec::new();
        loop {
            let end = loop {
                if let Some(end) = find(&self.bytes, b"\r\n") {
                    break end;
                }
                self.more().await.map_err(|_| Broken::Cut)?;
            };
            let line = self.take(end + 2).await?;
            let digits = String::from_utf8_lossy(&line[..end]).into_owned();
            let Ok(size) = usize::from_str_radix(&digits, 16) else {
                return Err(Broken::Cut);
            };
            body.extend(self.take(size).await?);
            if self.take(2).await? != b"\r\n" {
                return Err(Broken::Cut);
            }
            if size == 0 {
                return Ok(body);
            }
        }
    }
}

pub(super) fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// Returns `body` in transfer coding chunks of random sizes.
pub(super) fn chunked(net: &SimNet, body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < body.len() {
        let size = 1 + net.below(body.len() as u64 / 2 + 1) as usize;
        let piece = &body[at..(at + size).min(body.len())];
        out.extend_from_slice(format!("{:x}\r\n", piece.len()).as_bytes());
        out.extend_from_slice(piece);
        out.extend_from_slice(b"\r\n");
        at += piece.len();
    }
    out.extend_from_slice(b"0\r\n\r\n");
    out
}
