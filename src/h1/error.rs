//! Errors of head parsing and framing.

use std::fmt;

/// Reason why a head, or the framing it declares, was refused.
///
/// The connection cannot be used after any of these errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeadError {
    /// A line ends in LF without CR. RFC 9112 2.2 allows accepting it, but implementations disagree
    /// on whether it ends a line.
    BareLf,
    /// A CR without LF inside a line.
    BareCr,
    /// The request line is not `method SP target SP version`.
    BadRequestLine,
    /// The status line is not `version SP status [SP reason]`.
    BadStatusLine,
    /// The status code is outside 100..=599.
    BadStatus,
    /// The method is not a token.
    BadMethod,
    /// The request target has forbidden bytes, or a form that the method does not allow.
    BadTarget,
    /// The version is not `HTTP/` digit `.` digit.
    BadVersion,
    /// A well-formed version that is neither HTTP/1.0 nor HTTP/1.1.
    UnsupportedVersion,
    /// A field name has bytes outside the token set.
    BadToken,
    /// A field line begins with a colon.
    EmptyName,
    /// Whitespace between a field name and its colon (RFC 9112 5.1).
    SpaceBeforeColon,
    /// A field line without a colon.
    NoColon,
    /// A field line begins with whitespace: obsolete folding (RFC 9112 5.2).
    FieldLineFolded,
    /// A NUL or another control byte.
    ControlByte,
    /// More than `HEAD_FIELDS_MAX` fields.
    TooManyFields,
    /// More than `HEAD_BYTES_MAX` bytes.
    TooLong,
    /// A request line of more than `REQUEST_LINE_BYTES_MAX` bytes.
    LineTooLong,
    /// HTTP/1.1 without Host (RFC 9112 3.2).
    NoHost,
    /// More than one Host (RFC 9112 3.2).
    RepeatedHost,
    /// Host is not `host [":" port]`.
    BadHost,
    /// Host differs from the authority of an absolute-form target.
    HostMismatch,
    /// Content-Length and Transfer-Encoding together (RFC 9112 6.1).
    BothFramings,
    /// More than one Content-Length, equal or not.
    RepeatedLength,
    /// Content-Length is not a decimal number that fits into 64 bits.
    BadLength,
    /// More than one Transfer-Encoding field.
    RepeatedCoding,
    /// Transfer-Encoding is not exactly `chunked`.
    UnknownCoding,
    /// Transfer-Encoding in an HTTP/1.0 message (RFC 9112 6.1).
    CodingInHttp10,
    /// A response that cannot have a body (1xx, 204) declares one.
    BodyForbidden,
    /// A 2xx response to CONNECT, which would turn the connection into a tunnel.
    ConnectAccepted,
    /// An expectation other than `100-continue` (RFC 9110 10.1.1).
    UnknownExpectation,
    /// The Connection fields list more than `HOP_NAMES_MAX` unknown names.
    TooManyHopNames,
}

impl HeadError {
    /// Returns the status code to send to a client whose request head was refused.
    ///
    /// It does not apply to a response head that an engine sent: the caller reports that as 502.
    #[must_use]
    pub const fn status(self) -> u16 {
        match self {
            Self::LineTooLong => 414,
            Self::UnknownExpectation => 417,
            Self::TooManyFields | Self::TooLong | Self::TooManyHopNames => 431,
            Self::UnknownCoding => 501,
            Self::UnsupportedVersion => 505,
            Self::BareLf
            | Self::BareCr
            | Self::BadRequestLine
            | Self::BadStatusLine
            | Self::BadStatus
            | Self::BadMethod
            | Self::BadTarget
            | Self::BadVersion
            | Self::BadToken
            | Self::EmptyName
            | Self::SpaceBeforeColon
            | Self::NoColon
            | Self::FieldLineFolded
            | Self::ControlByte
            | Self::NoHost
            | Self::RepeatedHost
            | Self::BadHost
            | Self::HostMismatch
            | Self::BothFramings
            | Self::RepeatedLength
            | Self::BadLength
            | Self::RepeatedCoding
            | Self::CodingInHttp10
            | Self::BodyForbidden
            | Self::ConnectAccepted => 400,
        }
    }

    /// Returns a description of the error that contains no part of the refused message.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::BareLf => "a line ends in LF without CR",
            Self::BareCr => "a CR is not followed by LF",
            Self::BadRequestLine => "the request line is malformed",
            Self::BadStatusLine => "the status line is malformed",
            Self::BadStatus => "the status code is out of range",
            Self::BadMethod => "the method is not a token",
            Self::BadTarget => "the request target is malformed",
            Self::BadVersion => "the HTTP version is malformed",
            Self::UnsupportedVersion => "only HTTP/1.0 and HTTP/1.1 are supported",
            Self::BadToken => "a field name is not a token",
            Self::EmptyName => "a field name is empty",
            Self::SpaceBeforeColon => "whitespace between a field name and its colon",
            Self::NoColon => "a field line has no colon",
            Self::FieldLineFolded => "a field line begins with whitespace",
            Self::ControlByte => "a control byte in the head",
            Self::TooManyFields => "too many fields",
            Self::TooLong => "the head is too long",
            Self::LineTooLong => "the request line is too long",
            Self::NoHost => "Host is missing",
            Self::RepeatedHost => "Host is repeated",
            Self::BadHost => "Host is malformed",
            Self::HostMismatch => "Host differs from the request target",
            Self::BothFramings => "both Content-Length and Transfer-Encoding",
            Self::RepeatedLength => "Content-Length is repeated",
            Self::BadLength => "Content-Length is malformed",
            Self::RepeatedCoding => "Transfer-Encoding is repeated",
            Self::UnknownCoding => "Transfer-Encoding is not exactly chunked",
            Self::CodingInHttp10 => "Transfer-Encoding in an HTTP/1.0 message",
            Self::BodyForbidden => "a body is declared where none is allowed",
            Self::ConnectAccepted => "CONNECT was accepted",
            Self::UnknownExpectation => "the expectation is not 100-continue",
            Self::TooManyHopNames => "Connection lists too many names",
        }
    }
}

impl fmt::Display for HeadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl std::error::Error for HeadError {}
