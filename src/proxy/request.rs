//! A client's request: its head, and how much of its body has been read.

use super::request_id::RequestId;
use crate::api::Route;
use crate::h1::{Framing, Method, Name, RequestHead, Version};

/// A request whose head has been read.
pub(super) struct Request {
    pub(super) head: RequestHead,
    /// The bytes of the request head. Until the body is read, they are followed by the bytes that
    /// were received with the head.
    pub(super) bytes: Vec<u8>,
    pub(super) framing: Framing,
    pub(super) id: RequestId,
    pub(super) route: Route,
    pub(super) body: RequestBody,
}

/// How much of a request's body has been read from the client connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestBody {
    /// Nothing, except what arrived with the head.
    Unread,
    /// A part.
    Reading,
    /// The whole body, so the next bytes belong to the next request.
    Done,
}

impl RequestBody {
    /// Returns the state after more of the body has been read: all of it if `is_done`.
    pub(super) const fn read(is_done: bool) -> Self {
        if is_done { Self::Done } else { Self::Reading }
    }

    /// Returns whether the whole body has been read.
    pub(super) fn is_done(self) -> bool {
        self == Self::Done
    }
}

impl Request {
    /// Returns the values of the fields with this name, in order.
    pub(super) fn values(&self, name: Name) -> impl Iterator<Item = &[u8]> + Clone {
        self.head
            .fields_named(name)
            .map(|field| field.value.of(&self.bytes))
    }

    /// Returns the buffer with the head and the bytes that were received with it. Keeps a copy of
    /// the head, which `copy` makes.
    pub(super) fn take_arrived(&mut self, copy: impl FnOnce(&[u8]) -> Vec<u8>) -> Vec<u8> {
        let head = copy(&self.bytes[..self.head.len]);
        std::mem::replace(&mut self.bytes, head)
    }

    /// Returns whether a part of the body has arrived with the head, or there is none to wait for.
    pub(super) fn has_body_arrived(&self) -> bool {
        self.body.is_done() || self.bytes.len() > self.head.len
    }

    pub(super) fn is_head(&self) -> bool {
        self.head.method == Method::Head
    }

    /// Returns whether the client uses HTTP/1.0, which has no chunked coding.
    pub(super) fn is_http10(&self) -> bool {
        self.head.version == Version::Http10
    }
}
