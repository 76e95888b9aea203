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
    /// A line contains a CR that is not followed by LF.
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
    /// A field name contains a byte that is not allowed in a token (RFC 9110 5.6.2).
    BadToken,
    /// A field line begins with a colon.
    EmptyName,
    /// Whitespace between a field name and its colon (RFC 9112 5.1).
    SpaceBeforeColon,
    /// A field line without a colon.
    NoColon,
    /// A field line begins with whitespace: obsolete folding (RFC 9112 5.2).
    FieldLineFolded,
    /// A control byte other than HTAB in the first line or in a field value.
    ControlByte,
    /// The head has more than `HEAD_FIELDS_MAX` fields.
    TooManyFields,
    /// The head has more than `HEAD_BYTES_MAX` bytes.
    TooLong,
    /// The request line has more than `REQUEST_LINE_BYTES_MAX` bytes.
    LineTooLong,
    /// An HTTP/1.1 request without a Host field (RFC 9112 3.2).
    NoHost,
    /// A request with more than one Host field (RFC 9112 3.2).
    RepeatedHost,
    /// The Host field is not `host [":" port]`.
    BadHost,
    /// The Host field differs, ignoring ASCII case, from the authority (`host:port`) of an
    /// absolute-form request target.
    HostMismatch,
    /// A message with both Content-Length and Transfer-Encoding (RFC 9112 6.1).
    BothFramings,
    /// A message with more than one Content-Length field, even if the values are equal.
    RepeatedLength,
    /// Content-Length is not a decimal number that fits into 64 bits.
    BadLength,
    /// A message with more than one Transfer-Encoding field.
    RepeatedCoding,
    /// The value of Transfer-Encoding is not exactly `chunked`, ignoring ASCII case.
    UnknownCoding,
    /// Transfer-Encoding in an HTTP/1.0 message (RFC 9112 6.1).
    CodingInHttp10,
    /// A 1xx or 204 response, which cannot have a body, declares one.
    BodyForbidden,
    /// A 2xx response to CONNECT, which would turn the connection into a tunnel.
    ConnectAccepted,
    /// The Expect field has a value other than `100-continue` (RFC 9110 10.1.1).
    UnknownExpectation,
    /// The Connection fields of one head list more than `HOP_NAMES_MAX` field names that the proxy
    /// does not act on.
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
