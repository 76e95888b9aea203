//! Request methods.

/// A request method. Methods are case-sensitive (RFC 9110 9.1): `get` is [`Method::Other`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each variant is the method of that name")]
pub enum Method {
    Connect,
    Delete,
    Get,
    Head,
    Options,
    Patch,
    Post,
    Put,
    Trace,
    /// Any other token; [`RequestLine::method_span`](super::RequestLine::method_span) locates its
    /// bytes.
    #[default]
    Other,
}

impl Method {
    /// Returns whether a repetition of a request has no further effect (RFC 9110 section 9.2.2).
    #[must_use]
    pub const fn is_idempotent(self) -> bool {
        match self {
            Self::Delete | Self::Get | Self::Head | Self::Options | Self::Put | Self::Trace => true,
            Self::Connect | Self::Patch | Self::Post | Self::Other => false,
        }
    }

    /// Returns the method whose name is `bytes`, or [`Method::Other`].
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        match bytes {
            b"CONNECT" => Self::Connect,
            b"DELETE" => Self::Delete,
            b"GET" => Self::Get,
            b"HEAD" => Self::Head,
            b"OPTIONS" => Self::Options,
            b"PATCH" => Self::Patch,
            b"POST" => Self::Post,
            b"PUT" => Self::Put,
            b"TRACE" => Self::Trace,
            _ => Self::Other,
        }
    }
}
