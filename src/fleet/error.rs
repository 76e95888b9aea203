//! How the text of a target is malformed.

/// Reason why a text is not a valid target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetError {
    /// The host is missing: the text is empty, or starts with the `:` before the port.
    HostMissing,
    /// The host is longer than a DNS name can be (253 bytes).
    HostTooLong,
    /// The host is neither a well-formed host name nor an IPv4 address.
    HostMalformed,
    /// A bracket is not closed, does not enclose an IPv6 address, or is followed by something other
    /// than a port.
    AddressMalformed,
    /// The port is not a number from 1 to 65535, or is missing although it is required.
    PortMalformed,
    /// The target contains user information (`user@host`).
    UserInfo,
    /// The target has a scheme other than one leading `http://`.
    Scheme,
    /// The target contains a path, a query or a fragment: one of `/`, `?`, `#` and `\`.
    NotAlone,
    /// The target contains white space or a control byte.
    Blank,
    /// The path or the abstract name of a Unix socket is empty.
    SocketMissing,
    /// The path of a Unix socket does not start with `/` or `@`.
    SocketRelative,
    /// The path of a Unix socket has an empty, `.` or `..` component.
    SocketParts,
    /// The path or the abstract name of a Unix socket is longer than the kernel accepts.
    SocketTooLong,
    /// The path of a Unix socket is not UTF-8.
    SocketMalformed,
}

impl TargetError {
    /// Returns the error message. It contains no address and no part of the input, so it can be
    /// sent to a client.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::HostMissing => "the target has no host",
            Self::HostTooLong => "the target's host name is too long",
            Self::HostMalformed => "the target's host is not a host name or an IPv4 address",
            Self::AddressMalformed => "the target's bracketed IPv6 address is malformed",
            Self::PortMalformed => "the target's port is not a number from 1 to 65535",
            Self::UserInfo => "the target must not contain user information",
            Self::Scheme => "the target's scheme must be http or be omitted",
            Self::NotAlone => "the target must be host:port without a path",
            Self::Blank => "the target contains white space or a control character",
            Self::SocketMissing => "the socket has no path; give one, such as /run/vllm.sock",
            Self::SocketRelative => "the socket's path must start with / (or @, if it is abstract)",
            Self::SocketParts => {
                "the socket's path must name a file, without empty, `.` or `..` components"
            }
            Self::SocketTooLong => {
                "the socket's path is longer than 107 bytes, the maximum for sockets"
            }
            Self::SocketMalformed => "the socket's path is not UTF-8",
        }
    }
}
