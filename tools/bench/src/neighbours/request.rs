//! An incremental reader of the requests that the engine receives. Bodies are only counted.

use memchr::memmem;

use crate::http::Reader;
use crate::limits::{HEAD_BYTES_MAX, HEAD_FIELDS_MAX};

/// The resource that a request names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `POST /v1/chat/completions`: a quiet stream.
    Stream,
    /// `POST /v1/completions`: a body to read, and a small response.
    Upload,
    /// `GET /v1/models`: a small response.
    Models,
    /// `GET /download`: a large response.
    Download,
    /// Anything else.
    Unknown,
}

impl Route {
    fn of(method: &str, path: &str) -> Self {
        match (method, path) {
            ("POST", "/v1/chat/completions") => Self::Stream,
            ("POST", "/v1/completions") => Self::Upload,
            ("GET", "/v1/models") => Self::Models,
            ("GET", "/download") => Self::Download,
            _ => Self::Unknown,
        }
    }
}

/// The error for bytes that are not a sequence of HTTP/1.1 requests with a supported framing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// The result of [`RequestReader::feed`].
#[derive(Debug, PartialEq, Eq)]
pub struct Fed<'a> {
    /// The bytes after the end of the request.
    pub rest: &'a [u8],
    /// Number of bytes that belong to the body of an upload.
    pub upload_bytes: u64,
    /// The route of the request, if it is now complete.
    pub complete: Option<Route>,
}

/// An incremental parser of requests, one after another.
#[derive(Debug, Default)]
pub struct RequestReader {
    /// The bytes received so far of an incomplete head.
    head: Vec<u8>,
    /// The request whose body is being received.
    body: Option<(Route, Reader)>,
    /// Body bytes of the current piece, which are discarded.
    discarded: Vec<u8>,
}

impl RequestReader {
    /// Returns whether a request has begun and is not complete.
    #[must_use]
    pub const fn is_inside(&self) -> bool {
        !self.head.is_empty() || self.body.is_some()
    }

    /// Parses the next received bytes, up to the end of the current request.
    ///
    /// # Errors
    /// Returns the first error; the reader must not be used afterwards.
    pub fn feed<'a>(&mut self, mut piece: &'a [u8]) -> Result<Fed<'a>, Malformed> {
        if self.body.is_none() {
            piece = self.feed_head(piece)?;
        }
        let mut fed = Fed {
            rest: piece,
            upload_bytes: 0,
            complete: None,
        };
        if let Some((route, reader)) = &mut self.body {
            self.discarded.clear();
            let rest = reader.feed_response(piece, &mut self.discarded);
            fed.rest = rest.map_err(|_| Malformed)?;
            if *route == Route::Upload {
                fed.upload_bytes = self.discarded.len() as u64;
            }
            fed.complete = reader.is_done().then_some(*route);
        }
        if fed.complete.is_some() {
            self.body = None;
        }
        Ok(fed)
    }

    /// Parses bytes of a head and begins the body if they complete it. Returns the bytes after the
    /// head.
    fn feed_head<'a>(&mut self, piece: &'a [u8]) -> Result<&'a [u8], Malformed> {
        let before = self.head.len();
        self.head.extend_from_slice(piece);
        // The blank line may start in bytes fed earlier.
        let from = before.saturating_sub(3);
        let Some(at) = memmem::find(&self.head[from..], b"\r\n\r\n") else {
            return if self.head.len() > HEAD_BYTES_MAX {
                Err(Malformed)
            } else {
                Ok(&[])
            };
        };
        let len = from + at + 4;
        self.body = Some(parse_head(&self.head[..len]).ok_or(Malformed)?);
        self.head.clear();
        Ok(&piece[len - before..])
    }
}

fn parse_head(bytes: &[u8]) -> Option<(Route, Reader)> {
    let mut fields = [httparse::EMPTY_HEADER; HEAD_FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    if !request.parse(bytes).ok()?.is_complete() {
        return None;
    }
    let route = Route::of(request.method?, request.path?);
    let (mut length, mut is_chunked) = (None, false);
    for field in request.headers.iter() {
        let value = field.value.trim_ascii();
        if field.name.eq_ignore_ascii_case("content-length") {
            let number: u64 = std::str::from_utf8(value).ok()?.parse().ok()?;
            if length.replace(number).is_some() {
                return None;
            }
        } else if field.name.eq_ignore_ascii_case("transfer-encoding") {
            if is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return None;
            }
            is_chunked = true;
        }
    }
    match (length, is_chunked) {
        (Some(_), true) => None,
        (None, true) => Some((route, Reader::at_body(None))),
        (length, false) => Some((route, Reader::at_body(Some(length.unwrap_or(0))))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds all pieces and returns the routes of the complete requests and the bytes of uploads.
    fn read(pieces: &[&[u8]]) -> Result<(Vec<Route>, u64), Malformed> {
        let mut reader = RequestReader::default();
        let (mut routes, mut bytes) = (Vec::new(), 0);
        for piece in pieces {
            let mut rest = *piece;
            while !rest.is_empty() {
                let fed = reader.feed(rest)?;
                rest = fed.rest;
                bytes += fed.upload_bytes;
                routes.extend(fed.complete);
            }
        }
        assert!(!reader.is_inside());
        Ok((routes, bytes))
    }

    #[test]
    fn pipelined_requests_are_the_same_at_any_split() {
        let bytes: &[u8] = b"GET /v1/models HTTP/1.1\r\nhost: a\r\n\r\n\
            POST /v1/completions HTTP/1.1\r\nhost: a\r\nContent-Length: 5\r\n\r\n\r\n\r\nx\
            POST /v1/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n\
            3\r\nabc\r\n2;x=y\r\nde\r\n0\r\n\r\n\
            POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\n{}\
            GET /download HTTP/1.1\r\nhost: a\r\n\r\n\
            GET /v1/completions HTTP/1.1\r\nhost: a\r\n\r\n";
        let routes = vec![
            Route::Models,
            Route::Upload,
            Route::Upload,
            Route::Stream,
            Route::Download,
            Route::Unknown,
        ];
        for at in 0..=bytes.len() {
            let got = read(&[&bytes[..at], &bytes[at..]]);
            assert_eq!(got, Ok((routes.clone(), 10)), "{at}");
        }
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(read(&single), Ok((routes, 10)));
    }

    #[test]
    fn malformed_requests_are_rejected() {
        for bytes in [
            "GET\r\n\r\n",
            "GET / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
            "POST / HTTP/1.1\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\ntransfer-encoding: gzip\r\n\r\n",
            "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nx\r\n",
        ] {
            assert_eq!(read(&[bytes.as_bytes()]), Err(Malformed), "{bytes:?}");
        }
        let long = vec![b'a'; HEAD_BYTES_MAX + 1];
        assert_eq!(read(&[&long]), Err(Malformed));
    }
}
